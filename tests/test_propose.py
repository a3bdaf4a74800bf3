"""Proposers without a model: random, replay, try."""

import random

import pytest
from conftest import ROOT, STUB, Script, better, check_agreement, open_here, run_here
from hypothesis import given
from hypothesis import strategies as st

from constants import Problem
from lab.propose import Random, Replay, Try, neighbour, numeric_hyperparameters, proposals_to_replay, rows_to_replay
from lab.screen import screen

REAL = (ROOT / "train.py").read_text()


class Asked:
    """What a proposer looks at in a history."""

    def __init__(self, number):
        self.number, self.rejects = number, 0


def test_random_moves_one_number_of_the_profile():
    proposer = Random("t", "cpu")
    names = {name for name, _ in numeric_hyperparameters(REAL, "cpu")}
    assert {"n_layer", "MATRIX_LR", "step_tokens", "ROPE_BASE"} <= names and not {"softcap", "short_window"} & names
    for number in range(1, 12):
        proposal = proposer.propose(REAL, Asked(number), [])
        pairs = zip(REAL.split("\n"), proposal.source.split("\n"), strict=True)
        changed = [pair for pair in pairs if pair[0] != pair[1]]
        assert len(changed) == 1 and proposal.description.split(" ")[0] in changed[0][0]
        assert proposal == proposer.propose(REAL, Asked(number), [])
        screen(proposal.source, {})


def test_random_moves_the_sizes_of_the_card_that_is_there():
    """Its own numbers, and the defaults for those that it leaves out."""
    for sizes, layers, tokens in (("H100", 9, 2**18), ("RTX 4090", 5, 2**16), ("small", 4, 2**15)):
        found = {name: node.value for name, node in numeric_hyperparameters(REAL, sizes)}
        assert (found["n_layer"], found["step_tokens"]) == (layers, tokens)
        assert found["softcap"] == 15.0 and "momentum_steps" in found and "conv_taps" not in found


@given(st.one_of(st.integers(1, 10**6), st.floats(1e-6, 1e3)), st.integers())
def test_a_neighbour_is_another_number_of_the_same_kind(value, seed):
    new = eval(neighbour(value, random.Random(seed)))
    assert type(new) is type(value) and new > 0 and (new < 1 or not 0.5 < value < 0.999)
    assert new != value or value < 1e-5 or isinstance(value, float)


def replay(checkout, tag, kept_only=False):
    night = open_here(checkout, "again")
    return night, Replay(night, proposals_to_replay(rows_to_replay(checkout.folder / "runs", tag), kept_only))


def test_replay_repeats_the_keeps_of_another_night(checkout):
    """By its tag, its folder or its journal; what it has replayed already is not repeated after a stop."""
    first = open_here(checkout)
    run_here(first, 8)
    keeps = [row for row in check_agreement(checkout) if row["verdict"] == "keep"]
    assert len(keeps) > 2
    night, proposer = replay(checkout, "t", kept_only=True)
    run_here(night, 1, proposer)
    night, proposer = replay(checkout, str(checkout.folder / "runs" / "t" / "journal.jsonl"), kept_only=True)
    assert run_here(night, None, proposer) == "the replay is complete"
    second = check_agreement(checkout, "again")
    assert [row["description"] for row in second] == [row["description"] for row in keeps]
    assert second[-1]["val_bpb"] == keeps[-1]["val_bpb"]


def test_what_does_not_merge_is_left_out_of_a_replay(checkout):
    """Another baseline: the change of its learning rate finds other lines, the width is taken over."""
    run_here(open_here(checkout), None, Script(better(0.3), ("width=64", "width=60")))
    (checkout.folder / "train.py").write_text(STUB.replace("lr=0.4", "lr=0.39"))
    night, proposer = replay(checkout, "t")
    run_here(night, None, proposer)
    assert [result.description for result in night.results] == ["baseline", "change 2"]
    assert "lr=0.39" in night.source(night.results[1]) and "width=60" in night.source(night.results[1])


def test_a_night_without_keeps_has_nothing_to_replay(checkout):
    run_here(open_here(checkout), None, Script(("width=64", "width=99")))
    with pytest.raises(Problem, match="kept nothing but its baseline"):
        proposals_to_replay(rows_to_replay(checkout.folder / "runs", "t"), True)
    assert len(proposals_to_replay(rows_to_replay(checkout.folder / "runs", "t"), False)) == 1


def test_try_proposes_the_checkout_as_it_is():
    assert Try("a  b", STUB + "x = 1\n").propose(STUB, Asked(1), []).source == STUB + "x = 1\n"
    with pytest.raises(Problem, match="unchanged"):
        Try("a", STUB).propose(STUB, Asked(1), [])
