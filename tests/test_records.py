"""Which runs count, and what is left of a child's text."""

import json
from dataclasses import replace

import pytest

from lab.records import Result, Run, Verdict, clean, like_rounding, pace_text, run_trouble, startup_limit_s, unlike

METRICS = {"training_seconds": 299.5, "num_steps": 1000}
PARTS = {"load": 4.0, "val": 10.0}
PROBE = {"rows": 1_024, "last_mean_nats": 5e-5, "last_abs_nats": 1e-4}
RUN = Run(  # it started for 19 s, and its clock half a second after the line
    "sha", 1, 1.0, 1.0, "", "", METRICS, 320.0, 300.0, 20.0, 0.1, saving_seconds=1.0, weights_bytes=100, parts=PARTS, probe=PROBE
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"metrics": {}}, ""),  # what a run says of itself can condemn it, not acquit it
        ({"metrics": {"training_seconds": 304.0, "num_steps": 1}}, "trained 304.0 s of 300 s"),  # a step as long as it says
        ({"metrics": {"training_seconds": 0.11, "num_steps": 9}}, "says that it trained 0.1 s"),  # clock.stop() by train.py
        ({"clock_seconds": 305.2, "metrics": {"training_seconds": 303.2, "num_steps": 9}}, ""),  # a longer look
        ({"clock_seconds": 305.4, "metrics": {"training_seconds": 300.0}}, "trained for 303.4 s by the agent's watch"),
        ({"clock_seconds": 306.0, "metrics": {}}, "trained for 305.5 s by the agent's watch"), ({"clock_seconds": 303.0}, ""),
        ({"clock_seconds": None}, "never started"), ({"saving_seconds": None}, "never said that the training was over"),
        ({"saving_seconds": 3.5, "run_seconds": 322.5}, "from the end of its training to its exit; 3.0 s are allowed"),
        ({"saving_seconds": 3.5, "run_seconds": 322.5, "weights_bytes": 200}, ""),
        ({"saving_seconds": 18.0, "run_seconds": 337.0, "weights_bytes": 10**12}, "exit; 17.0 s are allowed"),
        ({"run_seconds": 301.0 + 58}, ""),
        ({"probe": {"last_mean_nats": -4e-4, "last_abs_nats": 5e-4}}, ""), ({"probe": {"last_mean_nats": 6e-4}}, "at the edge of the probe change"),
        ({"probe": {"last_abs_nats": 1.2e-3}}, "last_abs_nats 0.00120; the baseline's 0.00010"),
        ({"run_seconds": 301.0 + 59}, "started for 59 s; 58 s are allowed, the baseline took 19 s"),
        ({"parts": {"load": 7.0, "val": 21.0}}, ""), ({"parts": {"load": 7.5}}, "its part `load`; 7.0 s are allowed"),
        ({"parts": {"val": 21.5}}, "its part `val`; 21.0 s are allowed"), ({"distrust": "looks ahead"}, "looks ahead"),
    ],
)  # fmt: skip
def test_a_number_that_took_too_long_does_not_count(changes, said):
    found = run_trouble(replace(RUN, **changes), RUN, 300.0)
    assert said in found and bool(found) == bool(said)


def test_a_start_may_take_half_as_long_again_and_a_tenth_of_the_budget():
    """30 s at most, and 15 at least, as a busy machine needs: what is trained there, on other text that lies about, is little against the budget."""
    assert [startup_limit_s(RUN, budget_s) - 28.5 for budget_s in (8.0, 60.0, 300.0, 3_600.0)] == [15, 15, 30, 30]


def test_a_probe_is_held_against_that_of_the_baseline_only_above_rounding():
    silent = replace(RUN, probe={"last_mean_nats": 0.0, "last_abs_nats": 0.0})
    assert unlike(replace(RUN, probe=dict.fromkeys(RUN.probe, 9e-5)), silent) == ""
    lucky = replace(RUN, probe={"rows": 1_024, "last_mean_nats": 0.0, "last_abs_nats": 5e-3})  # its mean is 0 by chance
    assert unlike(replace(RUN, probe={"last_mean_nats": 4e-4, "last_abs_nats": 5e-3}), lucky) == ""
    assert unlike(replace(RUN, probe={"last_mean_nats": float("nan")}), silent)
    assert "0.00160" in unlike(replace(RUN, probe={"last_mean_nats": 1.6e-3}), silent)


@pytest.mark.parametrize(
    ("own", "theirs", "text"), [(94.0, 100.0, "-6 %"), (1.5, 1.0, "+50 %"), (None, 1.0, ""), (1.0, None, "")]
)
def test_the_pace_is_tokens_against_the_other_runs(own, theirs, text):
    a, b = (replace(RUN, metrics={"total_tokens_M": tokens}) for tokens in (own, theirs))
    assert pace_text(a, b) == text


def test_a_result_comes_back_from_its_row():
    runs = {id: replace(RUN, id=id) for id in range(3)}
    verdict, second = Verdict("keep", "lower"), (runs[1], runs[2])
    result = Result(3, 2, 7, "wider", "because", "improve", None, verdict, runs[0], second, "abc", "def")
    row = json.loads(json.dumps(result.row()))
    assert Result.of(row, runs) == result and (row["verdict"], row["reason"]) == ("keep", "lower")
    assert (row["run"], row["second"]) == (0, [1, 2])
    alone = replace(result, second=None)
    assert Result.of(alone.row(), runs) == alone


def test_text_of_a_child_is_made_harmless():
    raw = b"\x1b[31mred\x1b[0m\x1b]0;title\x07 a\rb\x00c\xff\nlast\r\n"
    assert clean(raw) == "bc\ufffd\nlast\n"


@pytest.mark.parametrize(
    ("edge", "distrust", "baseline", "again"),
    [
        (2e-7, "", RUN, False), (1.4e-3, "", RUN, True), (1.4e-3, "", None, True), (2e-7, "", None, False),
        (1.4e-3, "looks ahead", None, True), (1.4e-2, "looks ahead", RUN, False),
    ],
)  # fmt: skip
def test_what_two_kernels_may_differ_by_is_scored_once_more(edge, distrust, baseline, again):
    probe = {"rows": 1024, "mean_nats": 0.0, "last_mean_nats": 1e-5, "last_abs_nats": edge}
    assert like_rounding(replace(RUN, probe=probe, distrust=distrust), baseline) == again
    assert not like_rounding(replace(RUN, probe={}, distrust=distrust), baseline)
