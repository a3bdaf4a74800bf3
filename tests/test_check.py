"""--check and --ablate: the honest numbers; on stub runs, whose truth is known."""

import math
from types import SimpleNamespace

import pytest
from conftest import NIGHT, Script, better, fake_measure, open_here, rows_of, run_here, wait_for

from constants import Problem
from lab.arguments import choose_tag
from lab.check import ablate, check, words


def noisy(checkout, noise: float) -> None:
    """Gives the checkout's baseline this much noise from seed to seed."""
    checkout.edit("train.py", "width=64,", f"width=64, noise={noise},")


def night_with(checkout, *changes):
    """A finished night of these changes, and (measure, the runs that it makes from now on, what is said)."""
    night = open_here(checkout)
    run_here(night, None, Script(*changes))
    ran, said = [], []
    return night, fake_measure(night, lambda source, seed: ran.append((source, seed))), ran, said


def test_check_tells_a_gain_from_none(checkout):
    noisy(checkout, 0.002)
    night, measure, ran, said = night_with(checkout, better(0.36))
    assert check(night, 5, measure, said.append) == "checked with 10 runs"
    (found,) = rows_of(checkout, "check")
    truth = math.log(4) ** 2 - math.log(3.6) ** 2
    assert found["welch"][0] < truth < found["welch"][1] and found["welch"][0] > 0
    assert said[-1] == "better than the baseline" and len(found["baseline"]) == 5
    assert said[0] == f"baseline on seed 101, run 1 of 10: test_bpb {found['baseline'][0]:.6f}"
    order = [("lr=0.36" in source, seed) for source, seed in ran[:4]]  # whether it is the incumbent
    assert order == [(False, 101), (True, 101), (True, 102), (False, 102)]
    ran.clear()
    check(night, 5, measure, said.append)
    assert ran == []  # none twice: a check that was cut short goes on where it stopped


def test_check_says_so_if_there_is_nothing(checkout):
    noisy(checkout, 0.05)
    night, measure, _, said = night_with(checkout, better(0.398, luck=0.01))
    check(night, 3, measure, said.append)
    assert said[-1] == "not distinguishable from the baseline"


def test_check_needs_numbers_that_count(checkout):
    night, measure, _, said = night_with(checkout, better(0.39, distrust="keeps state", distrust_seed=102))
    with pytest.raises(Problem, match=r"incumbent on seed 102.*\(keeps state\); the same command tries it again"):
        check(night, 3, measure, said.append)


def test_ablate_says_which_changes_carry_weight(checkout):
    noisy(checkout, 0.0005)
    heavy, light = better(0.36), ("        beta=0.8,", "        beta=0.7,\n        luck=0.00001,")
    night, measure, _, said = night_with(checkout, heavy, light, (better(0.36)[1], better(0.35)[1]))
    assert [result.verdict.word for result in night.results] == ["keep"] * 4
    ablate(night, measure, said.append)
    (found,) = rows_of(checkout, "ablate")
    told = [row["word"] for row in found["rows"]]
    assert told == ["cannot be reverted alone", "cannot tell", "carries weight"], said


def test_holm_stops_at_the_first_that_is_not_rejected():
    """By hand: noise 0.01 of three, so t = difference / (0.01 x 1.1547) with 2 degrees of freedom; p < 0.05 / 2 from t = 6.205 on."""
    reference = [0.99, 1.0, 1.01]
    assert words([1.08, 1.05], reference) == ["carries weight", "carries weight"]  # t 6.93 and 4.33 > 4.303
    assert words([1.07, 1.05], reference) == ["cannot tell", "cannot tell"]  # t 6.06: and none after it
    assert words([0.9], reference) == ["hurts"] and words([], reference) == []


def test_without_seeds_that_differ_any_change_carries_weight(checkout):
    night, measure, _, said = night_with(checkout, better(0.39))
    ablate(night, measure, said.append)
    assert rows_of(checkout, "ablate")[0]["rows"][0]["word"] == "carries weight"
    check(night, 2, measure, said.append)
    assert said[-1] == "better than the baseline"


def test_nothing_kept_is_said_before_anything_is_taken(checkout):
    night_with(checkout, ("        beta=0.8,", "        beta=0.7,"))
    for args in (SimpleNamespace(check="t", ablate=None), SimpleNamespace(check=None, ablate="t")):
        with pytest.raises(Problem, match="kept nothing but its baseline"):
            choose_tag(args, checkout.folder / "runs")


def test_check_and_then_the_night_goes_on(checkout):
    """By the program: after --check a command without a tag goes on with the night that it checked, with the night's own flags."""
    process = checkout.start(*NIGHT)
    wait_for(lambda: [row["verdict"] for row in rows_of(checkout, "result")].count("keep") > 1, process)
    process.terminate()
    process.wait()
    done = len(rows_of(checkout, "result"))
    output = checkout.agent("--check", "t", "--seeds", "2")
    assert "Welch's 95 % interval" in output and "baseline on seed 101" in output
    checkout.agent("--experiments", str(done))
    assert len(rows_of(checkout, "result")) == done + 1
