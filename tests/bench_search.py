"""Which numeric search finds most in a night: `pip install optuna cmaes`, then `python tests/bench_search.py [SURFACES]`.

Sixteen numbers, each in doublings from its present value, on surfaces on which 0.0077 bpb can be gained: a coupled quadratic, and a rough
one, steeper on one side of its optimum and with cliffs beyond 1.5 doublings. A night keeps what measures lower; each measurement has
noise. The competitors: one number moved by a fixed factor at random (what `--proposer random` was), Optuna's samplers on one to five
numbers at once (the Gaussian process, which loads torch, and CMA-ES on all of them), and lab/propose/tune.py.

Gain x 10^4 bpb after 25, 50 and 100 runs, mean of 12 surfaces, at a noise of .0001, .0003, .0015, .0045 (Optuna 5.0, November 2026):

    quadratic  random              34  48  63  |   30  42  55  |    8  14  19  |    5   4   5
    quadratic  lab/propose/tune.py         61  68  71  |   52  65  69  |   25  36  45  |   10  15  24
    quadratic  TPE                 45  58  66  |   42  54  61  |   28  37  44  |    7   8   8
    quadratic  TPE, multivariate   43  56  65  |   41  52  58  |   19  22  29  |    7   7   9
    quadratic  CMA-ES              19  30  45  |   21  31  47  |   18  32  35  |    1   0  15
    rough      random              43  60  84  |   39  55  78  |   20  27  33  |   12  12  16
    rough      lab/propose/tune.py         81  90  93  |   74  85  91  |   36  59  74  |   17  23  33
    rough      TPE                 41  71  88  |   43  70  85  |   29  49  60  |   16  23  35
    rough      TPE, multivariate   56  77  88  |   53  71  79  |   26  36  42  |    8   8   8
    rough      CMA-ES               0   2  29  |   -1   5  30  |   -2  13  35  |   -1  -5  16

So 25 of its runs are worth 100 of `random` but at the lowest noise of the quadratic, and at low noise 50 of TPE: hence no library. The Gaussian process, on
two of the quadratic surfaces alone: 44 43 52 | 51 55 58 | 23 23 23 | -6 -10 4, where lab/propose/tune.py has 62 71 71 | 45 65 65 | 22 32 36 | -1 8 24.
"""

import math
import random
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lab.propose.tune import FAR, MAX_MOVED, best_moves

NUMBERS, GAIN = 16, 0.0077
NOISES, AFTER = (0.0001, 0.0003, 0.0015, 0.0045), (25, 50, 100)


def surface(kind: str, seed: int):
    """val_bpb over its minimum, as a function of (NUMBERS,) doublings; GAIN at zero if it is quadratic."""
    draw = np.random.default_rng(seed)
    scale = np.exp(draw.normal(0, 0.7, NUMBERS))
    root = scale[:, None] * (np.eye(NUMBERS) + draw.normal(0, 0.5 / math.sqrt(NUMBERS), (NUMBERS, NUMBERS)))
    best, bowl = draw.normal(0, 1, NUMBERS), root @ root.T
    bowl *= GAIN / (0.5 * best @ bowl @ best)
    if kind == "quadratic":
        return lambda x: 0.5 * (x - best) @ bowl @ (x - best)
    steep = 0.15 * np.diag(bowl) * np.exp(draw.normal(0, 0.7, NUMBERS))

    def rough(x):
        e = x - best
        cliffs = 0.02 * np.square(np.maximum(0, np.abs(x) - 1.5)).sum()
        return 0.5 * e @ bowl @ e + steep @ np.maximum(0, e) ** 3 + cliffs

    return rough


# ---------------------------------------------------------------------------
# Competitors: (tried (n, NUMBERS), measured (n,), present (NUMBERS,), seed) -> what to try next


def at_random(tried, measured, present, seed):
    draw, new = random.Random(seed), present.copy()
    new[draw.randrange(NUMBERS)] += draw.choice((-1, -0.6, -0.3, 0.3, 0.6, 1))
    return new


def tune(tried, measured, present, seed):
    draw, new = np.random.default_rng(seed), present.copy()
    changes = FAR * np.arcsinh((measured - measured[0]) / FAR)
    for i, move in best_moves(tried - present, changes, draw)[: draw.integers(1, MAX_MOVED + 1)]:
        new[i] += move
    return new


def optuna_sampler(make, moved, tried, measured, present, seed):
    """make(seed) is the sampler. The study is rebuilt each time; of the suggestion `moved` numbers at most are taken."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    low, high = np.minimum(tried.min(axis=0), 0) - 1, np.maximum(tried.max(axis=0), 0) + 1
    space = {f"x{i}": optuna.distributions.FloatDistribution(low[i], high[i]) for i in range(NUMBERS)}
    study = optuna.create_study(sampler=make(seed))
    for x, y in zip(tried, measured, strict=True):
        params = {f"x{i}": float(x[i]) for i in range(NUMBERS)}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=float(y)))
    draw, new = random.Random(seed), present.copy()
    chosen = draw.sample(range(NUMBERS), draw.randint(1, moved)) if moved < NUMBERS else range(NUMBERS)
    if moved < NUMBERS and "GP" in type(study.sampler).__name__:
        fixed = {f"x{i}": float(present[i]) for i in range(NUMBERS) if i not in chosen}
        study.sampler = optuna.samplers.PartialFixedSampler(fixed, study.sampler)
        suggested = study.ask(space).params
    else:
        suggested = study.ask({f"x{i}": space[f"x{i}"] for i in chosen}).params
    for i in chosen:
        new[i] = suggested[f"x{i}"]
    return new


def tpe(multivariate, seed):
    import optuna

    return optuna.samplers.TPESampler(seed=seed, multivariate=multivariate, n_startup_trials=5)


def gaussian_process(seed):
    import optuna

    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=5)


class Evolution:
    """CMA-ES, whose state cannot be rebuilt from results: one study for the night, all numbers at once."""

    study = None

    def __call__(self, tried, measured, present, seed):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore")
        space = {f"x{i}": optuna.distributions.FloatDistribution(-3, 3) for i in range(NUMBERS)}
        if self.study is None:
            sampler = optuna.samplers.CmaEsSampler(x0=dict.fromkeys(space, 0.0), sigma0=0.3, seed=seed)
            self.study, first = optuna.create_study(sampler=sampler), float(measured[0])
            start = optuna.trial.create_trial(params=dict.fromkeys(space, 0.0), distributions=space, value=first)
            self.study.add_trial(start)
        else:
            self.study.tell(self.trial, float(measured[-1]))
        self.trial = self.study.ask(space)
        return np.array([self.trial.params[name] for name in space])


COMPETITORS = {
    "random": lambda: at_random,
    "lab/propose/tune.py": lambda: tune,
    "TPE": lambda: partial(optuna_sampler, partial(tpe, False), MAX_MOVED),
    "TPE, multivariate": lambda: partial(optuna_sampler, partial(tpe, True), MAX_MOVED),
    "CMA-ES": Evolution,
    "Gaussian process": lambda: partial(optuna_sampler, gaussian_process, MAX_MOVED),
}


# ---------------------------------------------------------------------------
# Nights


def night(name: str, kind: str, noise: float, seed: int) -> list[float]:
    """The true gain of the incumbent after so many runs."""
    true, draw, search = surface(kind, seed), np.random.default_rng(1_000 + seed), COMPETITORS[name]()
    present = np.zeros(NUMBERS)
    lowest = true(present) + draw.normal(0, noise)
    tried, measured, gains = [present], [lowest], []
    for number in range(1, max(AFTER) + 1):
        new = search(np.array(tried), np.array(measured), present, 7919 * number + seed)
        bpb = true(new) + draw.normal(0, noise)
        tried.append(new)
        measured.append(bpb)
        if bpb < lowest:
            present, lowest = new, bpb
        if number in AFTER:
            gains.append(true(np.zeros(NUMBERS)) - true(present))
    return gains


def main():
    surfaces, names = int(sys.argv[1]) if len(sys.argv) > 1 else 24, sys.argv[2:] or list(COMPETITORS)
    print(f"gain x 10^4 bpb after {', '.join(map(str, AFTER))} runs, mean of {surfaces} surfaces, at noise {NOISES}")
    with ProcessPoolExecutor() as pool:
        for kind in ("quadratic", "rough"):
            for name in names:
                cells = []
                for noise in NOISES:
                    gains = list(pool.map(partial(night, name, kind, noise), range(surfaces)))
                    cells.append(" ".join(f"{1e4 * gain:3.0f}" for gain in np.mean(gains, axis=0)))
                print(f"{kind:9}  {name:18}  {'  |  '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
