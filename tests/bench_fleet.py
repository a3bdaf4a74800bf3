"""What more cards buy: nights of 1, 4 and 16 workers under a proposer of fixed quality, simulated. `python tests/bench_fleet.py`

An idea takes a share of what is left to gain, the same whatever else the program holds: one in five a gain of up to 40 % of it, the
others a loss. A run takes 320 s, a proposal 40 s of a model, one at a time, or none at each third turn (`tune`). Each is made on the
incumbent that its proposer sees, with N - 1 experiments under way, and judged against the incumbent when its run ends, with noise of
2 % of all there is to gain. A keep that the winner lacks is then run on top of it, as in lab/propose/ahead.py, or forgotten; one merge in
seven conflicts. (Each gain over its own parent added too, keep or not, these shares changed by 0.012 at most.)

share of all there is to gain, mean of 300 nights; then experiments an hour
workers   on top  10 runs  25 runs 100 runs 400 runs      1 h      2 h      4 h      8 h  an hour
      1  nothing    0.339    0.636    0.946    0.975    0.363    0.594    0.811    0.938     11.2
      4  nothing    0.274    0.543    0.932    0.975    0.729    0.913    0.963    0.974     44.8
      4    keeps    0.283    0.558    0.935    0.974    0.747    0.920    0.964    0.973     44.8
     16  nothing    0.227    0.378    0.810    0.970    0.866    0.959    0.973    0.979    134.0
     16    keeps    0.227    0.394    0.845    0.971    0.900    0.965    0.974    0.979    134.7
"""

import argparse
import heapq
from dataclasses import dataclass

import numpy as np

RUN_S, THINK_S, WINS, MOST, NOISE, CONFLICTS = 320.0, 40.0, 0.2, 0.4, 0.02, 1 / 7
POINTS, HOURS = (10, 25, 100, 400), (1, 2, 4, 8)
RULES = ("nothing", "keeps")


@dataclass(frozen=True)
class Program:
    """Which ideas it holds, what it was made on, and its measured score (share of all gains that is left)."""

    ideas: dict[int, float]
    parent: "Program | None" = None
    merges: int | None = None
    score: float = 1.0

    @property
    def left(self) -> float:
        return float(np.prod([1.0 - share for share in self.ideas.values()])) if self.ideas else 1.0


def night(workers: int, experiments: int, random: np.random.Generator, rule: str) -> list[tuple[float, float]]:
    """(hours, true share left of the incumbent) after each experiment."""
    best, now, thought_at, count, path = Program({}), 0.0, 0.0, 0, []
    running, lacking, merged = [], [], set()

    def propose(at: float) -> tuple[float, Program]:
        """When it begins, and what."""
        nonlocal count, thought_at
        while lacking:
            other = lacking.pop(0)
            new = {idea: share for idea, share in other.ideas.items() if idea not in other.parent.ideas}
            if id(other) in merged or set(new) <= set(best.ideas):
                continue
            merged.add(id(other))
            if random.random() > CONFLICTS:
                return at, Program({**best.ideas, **new}, best, merges=1)
        count += 1
        # thought of while the others ran, one after another
        thought_at = max(thought_at, at - RUN_S) + (0.0 if count % 3 == 0 else THINK_S)
        share = random.uniform(0, MOST) if random.random() < WINS else -random.exponential(0.2)
        return max(at, thought_at), Program({**best.ideas, count: share}, best)

    order = 0
    for _ in range(min(workers, experiments)):
        start, program = propose(0.0)
        heapq.heappush(running, (start + RUN_S, order := order + 1, program))
    while running:
        now, _, program = heapq.heappop(running)
        program = Program(
            program.ideas, program.parent, program.merges, program.left + random.normal(0, NOISE / 2**0.5)
        )
        if program.score < best.score:
            earlier, best = best, program
            if rule == "keeps" and not set(earlier.ideas) <= set(best.ideas) and earlier.parent:
                lacking.append(earlier)
        path.append((now / 3600, best.left))
        if len(path) + len(running) < experiments:
            start, program = propose(now)
            heapq.heappush(running, (start + RUN_S, order := order + 1, program))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--nights", type=int, default=300)
    args = parser.parse_args()
    print("share of all there is to gain, mean of the nights; then experiments an hour")
    heads = [*(f"{n} runs" for n in POINTS), *(f"{h} h" for h in HOURS)]
    print(f"{'workers':>7} {'on top':>8} " + " ".join(f"{head:>8}" for head in heads) + f" {'an hour':>8}")
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
            print(f"{workers:>7} {rule:>8} " + " ".join(f"{mean:8.3f}" for mean in means) + f" {np.mean(rate):8.1f}")


if __name__ == "__main__":
    main()
