"""The numeric search: one to five numbers of train.py at once, by a model of what the night's own results say about them.

A Bayesian quadratic, diagonal, in doublings of each number, with Thompson sampling. tests/bench_search.py measures it against
Optuna's samplers and says why it is not one of them.
"""

import numpy as np

from constants import Problem
from lab.propose.hyperparameters import Number, coordinate, numbers_of, skeleton, text_at, with_values
from lab.record.night import History, change_of
from lab.records import Proposal

MAX_MOVED = 5  # numbers of one proposal
MAX_STEP = 0.5  # doublings by which one moves
FARTHEST = 3.0  # doublings that count of a value far from the present one
TRIALS = 300  # of the night, the last ones: a fit takes milliseconds
SCALES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # of a curvature, in bpb a squared doubling
SLOPE = 0.5  # x that: of a slope, so that the best value is expected within half a doubling
NOISES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # of one difference, in bpb
FAR = 0.01  # bpb, or x the baseline: what is worse by more counts for little more


class Tune:
    """Proposes without a model of language. Draws depend on the tag, the experiment's number, its rejects and the history alone."""

    name, exhausted = "tune", "nothing is left to propose"

    def __init__(self, tag: str, sizes: str):
        self.tag, self.sizes = tag, sizes

    def between_runs(self, number: int) -> bool:
        return True

    def propose(self, source: str, history: History, feedback: list[str]) -> Proposal | None:
        """Raises Problem if train.py has no numbers."""
        numbers = numbers_of(source, self.sizes)
        if not numbers:
            raise Problem("train.py has no numbers at its top that `tune` could move; use another proposer")
        places, changes = trials(history, self.sizes, numbers)
        random = np.random.default_rng([*f"{self.tag}/{history.number}/{history.rejects}".encode()])
        at = np.array([coordinate(number.value, number.value) for number in numbers.values()])
        values, names = {}, list(numbers)
        moved = random.integers(1, MAX_MOVED + 1)
        for i, move in best_moves(np.clip(places - at, -FARTHEST, FARTHEST), changes, random):
            text = text_at(at[i] + move, numbers[names[i]])
            if text != numbers[names[i]].text and len(values) < moved:
                values[names[i]] = text
        if not values:  # integers that no small step reaches
            name = names[random.integers(len(names))]
            values[name] = text_at(at[names.index(name)] + random.choice((-1.0, 1.0)), numbers[name])
        description = ", ".join(f"{name} {numbers[name].text} -> {text}" for name, text in values.items())
        why = f"numeric search over {len(changes)} results of this night"
        return Proposal(description, why, with_values(source, self.sizes, values), "tune")


def trials(history: History, sizes: str, numbers: dict[str, Number]) -> tuple[np.ndarray, np.ndarray]:
    """(coordinates (n, numbers), changes of val_bpb (n,)) of the baseline and of all that differs from its incumbent in numbers alone.

    A change is counted from the baseline, over the keeps that led to the incumbent of its time; what others than numbers have
    gained is left out, so that results before and after it can be compared. What has no number counts as the worst.
    """
    results, levels, places, changes = history.results, {}, [], []
    skeletons = {number: skeleton(source, sizes) for number, source in history.sources.items()}
    for result in results:
        before = 0.0 if result.parent is None else levels[result.parent]
        alike = result.parent is None or skeletons[result.parent] == skeletons[result.number]
        change = change_of(results, result) if alike else None
        levels[result.number] = before + (change or 0.0)
        if alike:
            there = numbers_of(history.sources[result.number], sizes)
            places.append([coordinate(there.get(name, own).value, own.value) for name, own in numbers.items()])
            changes.append(before if result.parent is None else np.nan if change is None else before + change)
    places, changes = np.array(places).reshape(-1, len(numbers))[-TRIALS:], np.array(changes)[-TRIALS:]
    if np.isfinite(changes).any():
        changes = np.where(np.isfinite(changes), changes, np.nanmax(changes))
    far = FAR * max(1.0, results[0].run.val_bpb if results else 1.0)
    return places, far * np.arcsinh(changes / far)


def best_moves(moves: np.ndarray, changes: np.ndarray, random: np.random.Generator) -> list[tuple[int, float]]:
    """(index, move) of each number, the one that promises most first, by one draw from the posterior of the model.

    moves (n, d): what was tried, as distances from the present values; changes (n,) of val_bpb. Noise and the scale of the
    coefficients are those of the highest marginal likelihood.
    """
    n, d = moves.shape
    features = np.hstack([np.ones((n, 1)), moves, 0.5 * moves**2])
    best = (-np.inf,)
    for scale in SCALES:
        mean = np.r_[0.0, np.zeros(d), np.full(d, scale)]
        variance = np.r_[1.0, np.full(d, SLOPE * scale), np.full(d, scale)] ** 2
        for noise in NOISES:
            covariance = (features * variance) @ features.T + noise**2 * np.eye(n)
            lower = np.linalg.cholesky(covariance)
            error = changes - features @ mean
            likelihood = -0.5 * np.square(np.linalg.solve(lower, error)).sum() - np.log(np.diag(lower)).sum()
            if likelihood > best[0]:
                best = (likelihood, mean, variance, covariance, error)
    _, mean, variance, covariance, error = best
    gain = np.linalg.solve(covariance, features * variance).T
    posterior = np.diag(variance) - gain @ (features * variance)
    draw = random.multivariate_normal(mean + gain @ error, posterior, method="eigh")
    slope, curvature = draw[1 : d + 1], np.maximum(draw[d + 1 :], 1e-9)
    step = np.clip(-slope / curvature, -MAX_STEP, MAX_STEP)
    value = slope * step + 0.5 * curvature * step**2
    return [(int(i), float(step[i])) for i in np.argsort(value)]
