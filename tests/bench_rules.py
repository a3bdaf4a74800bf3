"""What the keep rule gains and claims, with and without confirmation, and how often --check's interval holds the truth.

    python tests/bench_rules.py [NIGHTS]

Simulated nights of 100 runs, a confirmation counting as runs too. An idea is better by an exponential of mean 0.002 bpb
one time in six, else worse by one of mean 0.005; a run adds normal noise. The verdicts are agent.judge's, the intervals
agent.difference's.
"""

import sys
from dataclasses import replace

import numpy as np
from test_agent import experiment

import agent

RUNS = 100


def night(random, noise: float, margin: float, confirm: bool) -> tuple[float, float, int]:
    """(true gain, claimed gain, keeps) in bpb of a night; margin in standard deviations of the noise."""
    true, used, keeps = 1.0, 1, 0
    baseline = incumbent = experiment(number=0, val_bpb=true + noise * random.standard_normal(), test_bpb=None)
    while used < RUNS:
        effect = random.exponential(0.002) if random.random() < 1 / 6 else -random.exponential(0.005)
        measured = true - effect + noise * random.standard_normal()
        claim = experiment(val_bpb=measured + margin * noise, test_bpb=None)
        used += 1
        verdict = agent.judge(claim, incumbent, baseline, 300.0)
        if verdict.word == "keep" and confirm:
            if incumbent.confirm_bpb is None:
                incumbent = replace(incumbent, confirm_bpb=true + noise * random.standard_normal())
                used += 1
            claim = replace(claim, confirm_bpb=true - effect + noise * random.standard_normal())
            used += 1
            verdict = agent.judge(claim, incumbent, baseline, 300.0)
        if verdict.word == "keep":
            true, keeps, incumbent = true - effect, keeps + 1, replace(claim, val_bpb=measured)
    return 1.0 - true, baseline.val_bpb - incumbent.val_bpb, keeps


def coverage(random, nights: int, runs: int, groups: int) -> float:
    """How often the 95 % interval of `runs` runs each holds the truth, with `groups` further replicated pairs."""
    held = 0
    for _ in range(nights):
        a, b = 1.0 + 0.001 * random.standard_normal(runs), 0.998 + 0.001 * random.standard_normal(runs)
        others = [list(0.001 * random.standard_normal(2)) for _ in range(groups)]
        low, high = agent.difference(list(a), list(b), others).pooled
        held += low < 0.002 < high
    return 1000 * held / nights


def main() -> None:
    nights = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    random = np.random.default_rng(1)
    rules = {
        "lower": (0.0, False),
        "lower by 1 sd": (1.0, False),
        "lower by 2 sd": (2.0, False),
        "confirmed": (0.0, True),
    }
    print("noise (sd)  rule            true gain  claimed  optimism in sd  keeps")
    for noise in (0.0003, 0.0008, 0.0015, 0.003, 0.006):
        for name, (margin, confirm) in rules.items():
            found = np.array([night(random, noise, margin, confirm) for _ in range(nights)])
            true, claimed, keeps = found.mean(axis=0)
            print(
                f"{noise:10.4f}  {name:14}  {true:9.4f}  {claimed:7.4f}  {(claimed - true) / noise:14.2f}  {keeps:5.1f}"
            )
    print("\nintervals that hold the truth, in 1,000")
    for runs, groups in ((2, 0), (3, 0), (3, 4), (5, 0), (5, 8)):
        print(f"{runs} runs each, {groups} further pairs: {coverage(random, 1000, runs, groups):.0f}")


if __name__ == "__main__":
    main()
