"""Which runs count, and what is left of a child's text."""

from dataclasses import replace

import pytest

from lab.records import Result, Run, Verdict, clean, pace_text, trouble

METRICS = {"training_seconds": 300.0, "num_steps": 1000}
RUN = Run("sha", 1, 1.0, 1.0, "", "", METRICS, 320.0, 301.0, 20.0, 0.1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"metrics": {}}, ""),  # what a run says of itself can condemn it, not acquit it
        ({"metrics": {"training_seconds": 304.0, "num_steps": 1000}}, "trained 304.0 s of 300 s"),
        ({"run_seconds": 1_500.0}, ""),  # before the clock there is no text
        ({"run_seconds": 320.0 + 7, "clock_seconds": 301.0 + 7}, "after its clock started"),
        ({"run_seconds": 320.0 + 5, "clock_seconds": 301.0 + 5}, ""),
        ({"clock_seconds": None}, "never started"),
        ({"scoring_seconds": 51.0}, "scoring took 51 s"),
        ({"distrust": "looks ahead"}, "looks ahead"),
    ],
)
def test_a_number_that_took_too_long_does_not_count(changes, said):
    found = trouble(replace(RUN, **changes), RUN, 300.0)
    assert said in found and bool(found) == bool(said)


def test_without_the_sandbox_a_start_is_bound_by_the_baselines():
    """Three of them and a minute: each halving of the micro-batch compiles anew. The baseline's took 19 s."""
    for seconds, said in ((19 + 97, ""), (19 + 99, "started for 118 s, the baseline 19 s")):
        late = replace(RUN, run_seconds=301.0 + seconds)
        assert trouble(late, RUN, 300.0, sandboxed=False) == said and trouble(late, RUN, 300.0) == ""


@pytest.mark.parametrize(
    ("own", "theirs", "text"), [(94.0, 100.0, "-6 %"), (1.5, 1.0, "+50 %"), (None, 1.0, ""), (1.0, None, "")]
)
def test_the_pace_is_tokens_against_the_other_runs(own, theirs, text):
    a, b = (replace(RUN, metrics={"total_tokens_M": tokens}) for tokens in (own, theirs))
    assert pace_text(a, b) == text


def test_a_result_comes_back_from_its_row():
    result = Result(
        3, 2, 2, 7, "wider", "because", "improve", None, Verdict("keep", "lower"), RUN, (1.0, None), "abc", "def"
    )
    assert Result.of(result.row()) == result
    assert Result.of(replace(result, second=None).row()).second is None


def test_text_of_a_child_is_made_harmless():
    raw = b"\x1b[31mred\x1b[0m\x1b]0;title\x07 a\rb\x00c\xff\nlast\r\n"
    assert clean(raw) == "bc\ufffd\nlast\n"
