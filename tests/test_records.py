"""Which runs count, and what is left of a child's text."""

from dataclasses import replace

import pytest

from lab.records import Result, Run, Verdict, clean, trouble

METRICS = {"training_seconds": 300.0, "num_steps": 1000}
RUN = Run("sha", 1, 1.0, 1.0, "", "", METRICS, 320.0, 301.0, 20.0, 0.1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"metrics": {}}, ""),  # what a run says of itself can condemn it, not acquit it
        ({"metrics": {"training_seconds": 304.0, "num_steps": 1000}}, "trained 304.0 s of 300 s"),
        ({"run_seconds": 320.0 + 61}, "started for 80 s, the baseline 19 s"),
        ({"run_seconds": 320.0 + 59}, ""),
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


def test_a_run_may_take_the_time_to_compile_a_new_model():
    late = replace(RUN, run_seconds=320.0 + 150)
    assert trouble(late, replace(RUN, cold_seconds=70.0), 300.0) == ""  # 60 and 105 s
    assert "started for" in trouble(late, replace(RUN, cold_seconds=50.0), 300.0)
    on_card = replace(RUN, cold_seconds=50.0, metrics=METRICS | {"peak_vram_mb": 40_000.0})
    assert (
        trouble(late, on_card, 300.0) == ""
    )  # its micro-batch may be halved twice, and compiled each time: 60 and 225 s
    assert "started for" in trouble(replace(late, run_seconds=320.0 + 290), on_card, 300.0)


def test_a_result_comes_back_from_its_row():
    result = Result(
        3, 2, 7, "wider", "because", "improve", None, Verdict("keep", "lower"), RUN, (1.0, None), "abc", "def"
    )
    assert Result.of(result.row()) == result
    assert Result.of(replace(result, second=None).row()).second is None


def test_text_of_a_child_is_made_harmless():
    raw = b"\x1b[31mred\x1b[0m\x1b]0;title\x07 a\rb\x00c\xff\nlast\r\n"
    assert clean(raw) == "bc\ufffd\nlast\n"
