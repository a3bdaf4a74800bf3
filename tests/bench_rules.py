"""What the keep rules gain: `python tests/bench_rules.py [NIGHTS]`. Simulated nights, on a steady machine and on one that drifts.

A night is a hundred runs long, runs on the second seed counted. An idea is better by an exponential of mean 0.002 bpb one time in six,
else worse by one of mean 0.005; a run adds normal noise. A machine that drifts is 5 to 10 % slower for three to forty runs on end, as
two shared cores were, a third of the time: 0.09 bpb times that share. The verdicts are agent.judge's and agent.second_look's.

lower           lower on the night's seed
mean            and lower in the mean of two seeds, with stored runs
both, stored    and lower on the second seed too, with stored runs
both, fresh     likewise, challenger and incumbent run one after the other
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_records import RUN

import agent

RUNS = 100
RULES = ("lower", "mean", "both, stored", "both, fresh")


class Machine:
    """Measures programs: their true bpb, noise, and what a slow phase costs."""

    def __init__(self, random, noise: float, drifts: bool):
        self.random, self.noise, self.drifts = random, noise, drifts
        self.used, self.until, self.slow = 0, 0, 0.0

    def run(self, true_bpb: float):
        if self.drifts and self.used >= self.until:
            self.slow = 0.0 if self.slow else 0.09 * self.random.uniform(0.05, 0.10)
            self.until = self.used + self.random.integers(3, 41) * (1 if self.slow else 2)
        self.used += 1
        return replace(RUN, val_bpb=true_bpb + self.slow + self.noise * self.random.standard_normal(), test_bpb=None)


def night(random, noise: float, drifts: bool, rule: str) -> tuple[float, float, int]:
    """(true gain, claimed gain, keeps) in bpb of a night under a rule."""
    machine, true, keeps = Machine(random, noise, drifts), 1.0, 0
    baseline = incumbent = machine.run(true)
    second = machine.run(true)  # the baseline's: every night measures it
    while machine.used < RUNS:
        effect = random.exponential(0.002) if random.random() < 1 / 6 else -random.exponential(0.005)
        run, again = machine.run(true - effect), None
        keep = agent.judge(run, incumbent, baseline, 300.0).word == "keep"
        if keep and rule != "lower":
            again = machine.run(true - effect)
            beside = machine.run(true) if rule == "both, fresh" else second
            if rule == "mean":
                keep = run.val_bpb + again.val_bpb < incumbent.val_bpb + beside.val_bpb
            else:
                keep = agent.second_look(again, beside, lambda run: "").word == "keep"
        if keep:
            true, keeps, incumbent, second = true - effect, keeps + 1, run, again
    return 1.0 - true, baseline.val_bpb - incumbent.val_bpb, keeps


def main() -> None:
    nights = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    print("machine  noise (sd)  rule          true gain  +-      claimed  keeps")
    for drifts in (False, True):
        for noise in (0.0003, 0.0015, 0.0045):
            for rule in RULES:
                random = np.random.default_rng(1)
                found = np.array([night(random, noise, drifts, rule) for _ in range(nights)])
                (true, claimed, keeps), error = found.mean(axis=0), found[:, 0].std() / nights**0.5
                name = "drifts" if drifts else "steady"
                print(
                    f"{name}   {noise:10.4f}  {rule:12}  {true:9.4f}  {error:.4f}  {claimed:7.4f}  {keeps:5.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
