"""What more cards buy: nights of 1, 4 and 16 workers under a proposer of fixed quality, simulated. `python tests/bench_fleet.py`

An idea takes a share of what is left to gain, the same whatever else the program holds: one in five a gain of up to 40 % of it, the
others a loss. A run takes 320 s, a proposal 40 s of a model, one at a time, or none at each third turn (`tune`). Each is made on the
incumbent that its proposer sees, with N - 1 experiments under way, and judged against it when its run ends, with noise of 2 % of all
there is to gain. A win on an incumbent that is none any more is put on top of the present one and measured again by the same worker, as
in agent.experiment(); one in seven conflicts, and is a discard. To compare: such a win is forgotten.

(Only if it is lower than the present incumbent, not just than its own parent: 0.014 less after one hour with 4 cards, 0.008 with 16.)

share of all there is to gain, mean of the nights; then experiments an hour
workers  such win  10 runs  25 runs 100 runs 400 runs      1 h      2 h      4 h      8 h  an hour
      1 forgotten    0.339    0.636    0.946    0.975    0.363    0.594    0.811    0.938     11.2
      4 forgotten    0.241    0.483    0.900    0.974    0.661    0.874    0.958    0.973     44.8
      4 once more    0.278    0.571    0.940    0.975    0.727    0.912    0.963    0.974     43.2
     16 forgotten    0.164    0.277    0.652    0.956    0.717    0.900    0.969    0.979    134.0
     16 once more    0.165    0.330    0.829    0.975    0.850    0.965    0.977    0.981    132.9
"""

import argparse
import heapq
from dataclasses import dataclass, replace

import numpy as np

RUN_S, THINK_S, WINS, MOST, NOISE, CONFLICTS = 320.0, 40.0, 0.2, 0.4, 0.02, 1 / 7
POINTS, HOURS = (10, 25, 100, 400), (1, 2, 4, 8)
RULES = ("forgotten", "once more")  # what becomes of a win on an earlier incumbent


@dataclass(frozen=True)
class Program:
    """Which ideas it holds, what it was made on, and its measured score (share of all gains that is left)."""

    ideas: dict[int, float]
    parent: "Program | None" = None
    score: float = 1.0

    @property
    def left(self) -> float:
        return float(np.prod([1.0 - share for share in self.ideas.values()])) if self.ideas else 1.0


def night(workers: int, experiments: int, random: np.random.Generator, rule: str) -> list[tuple[float, float]]:
    """(hours, true share left of the incumbent) after each experiment."""
    best, now, thought_at, count, path, running, order = Program({}), 0.0, 0.0, 0, [], [], 0

    def begin(at: float) -> None:
        """One more experiment: thought of while the others ran, one after another."""
        nonlocal count, thought_at, order
        count, order = count + 1, order + 1
        thought_at = max(thought_at, at - RUN_S) + (0.0 if count % 3 == 0 else THINK_S)
        share = random.uniform(0, MOST) if random.random() < WINS else -random.exponential(0.2)
        heapq.heappush(running, (max(at, thought_at) + RUN_S, order, Program({**best.ideas, count: share}, best)))

    for _ in range(min(workers, experiments)):
        begin(0.0)
    while running:
        now, _, program = heapq.heappop(running)
        program = replace(program, score=program.left + random.normal(0, NOISE / 2**0.5))
        if program.score < program.parent.score and program.parent is not best and rule == "once more":
            own = {idea: share for idea, share in program.ideas.items() if idea not in program.parent.ideas}
            if random.random() > CONFLICTS:
                order += 1
                heapq.heappush(running, (now + RUN_S, order, Program({**best.ideas, **own}, best)))
                continue
        elif program.score < program.parent.score and program.parent is best:
            best = program
        path.append((now / 3600, best.left))
        if len(path) + len(running) < experiments:
            begin(now)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--nights", type=int, default=300)
    args = parser.parse_args()
    print("share of all there is to gain, mean of the nights; then experiments an hour")
    heads = [*(f"{n} runs" for n in POINTS), *(f"{h} h" for h in HOURS)]
    print(f"{'workers':>7} {'such win':>9} " + " ".join(f"{head:>8}" for head in heads) + f" {'an hour':>8}")
    for workers in (1, 4, 16):
        for rule in RULES[:1] if workers == 1 else RULES:
            by_runs, by_hours, rate = [], [], []
            for seed in range(args.nights):
                path = night(workers, max(POINTS[-1], 100 * workers), np.random.default_rng(seed), rule)
                by_runs.append([1 - path[n - 1][1] for n in POINTS])
                ends = np.array([hours for hours, _ in path])
                by_hours.append([1 - path[max(0, int((ends <= h).sum()) - 1)][1] for h in HOURS])
                rate.append(len(path) / ends[-1])
            means = [*np.mean(by_runs, axis=0), *np.mean(by_hours, axis=0)]
            print(f"{workers:>7} {rule:>9} " + " ".join(f"{mean:8.3f}" for mean in means) + f" {np.mean(rate):8.1f}")


if __name__ == "__main__":
    main()
