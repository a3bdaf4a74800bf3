"""The numbers at the top of train.py, and the numeric search over what a night tried of them."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, STUB, Script, better, check_agreement, open_here, run_here
from hypothesis import given
from hypothesis import strategies as st

from constants import PROFILES, Problem
from lab.propose.ahead import History
from lab.propose.screen import screen
from lab.propose.tune import Number, Tune, best_moves, coordinate, numbers_of, skeleton, text_at, trials, with_values

REAL = (ROOT / "train.py").read_text()


def asked_for(number: int, rejects: int = 0, tag: str = "t"):
    """The history of a night without results, asked for this experiment."""
    night = SimpleNamespace(tag=tag, settings=SimpleNamespace(profile=PROFILES["cpu"]))
    return SimpleNamespace(night=night, results=(), number=number, rejects=rejects)


def values_of(source, sizes="cpu"):
    return {name: number.value for name, number in numbers_of(source, sizes).items()}


# --- numbers


def test_the_numbers_are_those_that_serve_the_profile():
    """Its own, and the defaults for those that it leaves out; what is off, a guard and the size of a forward pass are none."""
    names = set(numbers_of(REAL, "cpu"))
    assert {"n_layer", "MATRIX_LR", "step_tokens", "ROPE_BASE", "ADAM_BETAS[0]", "ADAM_BETAS[1]", "ADAM_EPS"} <= names
    assert not {"softcap", "short_window", "micro_rows", "BLOW_UP", "POLAR_EXPRESS[0]", "final_lr"} & names
    for sizes, layers, tokens in (("H100", 9, 2**18), ("RTX 4090", 5, 2**16), ("small", 4, 2**15)):
        known = values_of(REAL, sizes)
        assert (known["n_layer"], known["step_tokens"], known["softcap"]) == (layers, tokens, 15.0)
        assert "momentum_steps" in known and "conv_taps" not in known


def test_numbers_are_replaced_where_they_stand():
    source = (
        'A, B = (1, 0.5), 1e-10  # é\nCONFIGS = {"cpu": dict(π=3, lr=0.4, size=2**16), "gpu": dict(lr=9)}\nX = "7"\n'
        "ROWS = 10**6  # Fixed: room\n"
    )
    assert values_of(source) == {"A[0]": 1, "A[1]": 0.5, "B": 1e-10, "π": 3, "lr": 0.4, "size": 65536}
    new = with_values(source, "cpu", {"A[1]": "0.25", "B": "2e-10", "lr": "0.3", "size": "2**17"})
    assert new == source.replace("0.5", "0.25").replace("1e-10", "2e-10").replace("0.4", "0.3").replace("16", "17")
    assert skeleton(new, "cpu") == skeleton(source, "cpu") != skeleton(source.replace('"7"', '"8"'), "cpu")
    assert skeleton(source.replace("lr=9", "lr=8"), "cpu") != skeleton(source, "cpu")  # of another profile


POWERS = st.sampled_from([2**k for k in range(20)])


@given(st.one_of(st.integers(1, 10**6), st.floats(1e-6, 1e3), st.floats(0.5, 0.99), POWERS), st.floats(-1, 1))
def test_a_moved_number_is_of_the_same_kind(value, move):
    like = Number(value, repr(value), 0, 0, 0)
    text = text_at(coordinate(value, value) + move, like)
    new = eval(text)
    assert type(new) is type(value) and new > 0
    if isinstance(value, float) and 0 < value < 1:
        assert new <= 1
    if isinstance(value, int) and value >= 16 and value & (value - 1) == 0:
        assert new & (new - 1) == 0
    assert abs(coordinate(new, value) - coordinate(value, value)) <= 1.6
    assert text_at(coordinate(value, value), like) == repr(value)


# --- the search


def test_a_proposal_moves_one_to_five_numbers_and_repeats():
    counts = set()
    for number in range(1, 25):
        past = asked_for(number)
        proposal = Tune().propose(REAL, past, [])
        if number == 1:
            assert proposal == Tune().propose(REAL, past, []) and proposal.operator == "tune"
            assert proposal.source != Tune().propose(REAL, asked_for(1, tag="u"), []).source
        before, after = values_of(REAL), values_of(proposal.source)
        changed = [name for name in before if before[name] != after[name]]
        assert sorted(part.split(" ")[0] for part in proposal.description.split(", ")) == sorted(changed)
        assert skeleton(proposal.source, "cpu") == skeleton(REAL, "cpu")
        counts.add(len(changed))
    screen(proposal.source, {})
    assert counts == {1, 2, 3, 4, 5}


def test_a_refused_proposal_is_followed_by_another():
    first, second = (Tune().propose(STUB, asked_for(1, rejects), []) for rejects in (0, 1))
    assert first.source != second.source


def test_it_finds_the_better_value_of_a_whole_night(checkout):
    """The stub's val_bpb is (ln(lr / 0.1))^2 and little else: 1.92 at its lr of 0.4."""
    night = open_here(checkout)
    run_here(night, 25)
    check_agreement(checkout)
    best = values_of(night.source(night.incumbent.number))
    assert night.incumbent.run.val_bpb < 1.05 and abs(math.log(best["lr"] / 0.1)) < 0.25


def test_it_learns_from_a_model_the_numbers_alone(checkout):
    """What changed more than numbers is left out; after a keep of that kind the differences go on where they were."""
    night = open_here(checkout)
    structural = ("        width=64,", "        width=64,\n        luck=0.5,")
    run_here(night, None, Script(better(0.3), structural, (better(0.3)[1], better(0.2)[1]), ("lr=0.2,", "lr=1 // 0,")))
    words = [result.verdict.word for result in night.results]
    assert words == ["keep", "keep", "keep", "keep", "crash"]
    past = History(night, tuple(night.results))
    numbers = numbers_of(night.source(night.incumbent.number), "cpu")
    places, changes = trials(past, numbers)
    bpb = [result.run.val_bpb for result in night.results]
    expected = [0.0, bpb[1] - bpb[0], (bpb[1] - bpb[0]) + (bpb[3] - bpb[2])]
    far = 0.01 * bpb[0]
    assert np.sinh(changes / far) * far == pytest.approx(expected)
    assert places[:, list(numbers).index("lr")] == pytest.approx([math.log2(lr / (1 - lr)) for lr in (0.4, 0.3, 0.2)])


def test_what_has_no_number_counts_as_the_worst(checkout):
    night = open_here(checkout)
    run_here(night, None, Script(better(0.5), ("warmdown=0.6", "warmdown=0.5")))
    night.results[2] = replace(night.results[2], run=replace(night.results[2].run, val_bpb=None))
    _, changes = trials(History(night, tuple(night.results)), numbers_of(STUB, "cpu"))
    assert changes[-1] == changes.max() > 0


@pytest.mark.parametrize("seed", range(5))
def test_the_model_finds_the_way_down_a_known_bowl(seed):
    random = np.random.default_rng(seed)
    best, moves = np.array([0.45, -0.3, 0.0]), random.uniform(-1, 1, (30, 3))
    changes = 0.004 * np.square(moves - best).sum(axis=1) + random.normal(0, 1e-4, 30)
    order, steps = zip(*best_moves(moves, changes, random), strict=True)
    assert order == (0, 1, 2) and steps == pytest.approx(best, abs=0.15)  # what promises most comes first


def test_a_file_without_numbers_is_one_clear_line():
    with pytest.raises(Problem, match="has no numbers at its top"):
        Tune().propose("x = 'a'\n", asked_for(1), [])
