"""Replays, and a person's own train.py."""

import pytest
from conftest import STUB, Script, better, check_agreement, open_here, run_here

from constants import Problem
from lab.propose.ahead import History, Try
from lab.propose.replay import Replay, proposals_to_replay, rows_to_replay


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
    checkout.edit("train.py", "lr=0.4", "lr=0.39")
    night, proposer = replay(checkout, "t")
    run_here(night, None, proposer)
    assert [result.description for result in night.results] == ["baseline", "change 2"]
    assert "lr=0.39" in night.source(1) and "width=60" in night.source(1)


def test_a_night_without_keeps_has_nothing_to_replay(checkout):
    run_here(open_here(checkout), None, Script(("width=64", "width=99")))
    with pytest.raises(Problem, match="kept nothing but its baseline"):
        proposals_to_replay(rows_to_replay(checkout.folder / "runs", "t"), True)
    assert len(proposals_to_replay(rows_to_replay(checkout.folder / "runs", "t"), False)) == 1


def test_try_proposes_the_checkout_as_it_is():
    assert len(Try("a " * 50_000, "b " * 50_000, STUB).description) == 200  # it becomes the title of a commit
    assert Try("a  b", "", STUB + "x = 1\n").propose(STUB, History(None, ()), []).source == STUB + "x = 1\n"
    with pytest.raises(Problem, match="unchanged"):
        Try("a", "", STUB).propose(STUB, History(None, ()), [])
