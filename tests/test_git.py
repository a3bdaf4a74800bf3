"""Git by plumbing: merges, refs, and a checkout that is left alone."""

import random
import subprocess

import pytest
from conftest import NIGHT, ROOT, check_agreement, open_here, run_here

from constants import Problem
from lab.record.git import Repository
from lab.records import Rejected

KNOBS = [f"    knob_{i}={i}," for i in range(35)]


def test_changes_of_neighbouring_lines_merge_and_those_of_the_same_line_do_not():
    """Pairs of changes to the lines of a list, each of two lines: what does not overlap merges as by hand."""
    draw, merge = random.Random(1), Repository(ROOT).merge
    for _ in range(20):
        lines = draw.sample(range(35), 4)
        ours, theirs, both = (list(KNOBS) for _ in range(3))
        for line in lines[:2]:
            ours[line] = both[line] = f"    ours={line},"
        for line in lines[2:]:
            theirs[line] = both[line] = f"    theirs={line},"
        base, ours, theirs, both = ("\n".join(["x = dict(", *knobs, ")", ""]) for knobs in (KNOBS, ours, theirs, both))
        assert merge(base, ours, theirs) == both
    a, b = "a\nb\n\nc\n", "a\nB\n\nc\nd\n"
    assert merge(a, a, b) == b and merge(a, b, a) == b and merge(a, b, b) == b and merge("a\n", "a\n", "") == ""
    with pytest.raises(Rejected, match="in the same lines"):
        merge("a\nb\nc\n", "a\nB\nc\n", "a\nX\nc\n")


def test_a_night_leaves_the_checkout_alone(checkout):
    """Dirty, staged and untracked work, a lock left over by something that was killed, a detached head: as they were."""
    checkout.git("checkout", "-q", "--detach")
    head = checkout.git("rev-parse", "HEAD")
    checkout.edit("train.py", "width=64", "width=100")
    (checkout.folder / "staged.txt").write_text("staged")
    checkout.git("add", "staged.txt")
    (checkout.folder / "untracked.txt").write_text("untracked")
    (checkout.folder / ".git" / "index.lock").write_text("")
    (checkout.folder / ".git" / "hooks").mkdir(exist_ok=True)
    hook = checkout.folder / ".git" / "hooks" / "reference-transaction"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    index = (checkout.folder / ".git" / "index").read_bytes()
    run_here(open_here(checkout), 3)
    assert (checkout.folder / ".git" / "index").read_bytes() == index
    (checkout.folder / ".git" / "index.lock").unlink()
    hook.unlink()
    assert checkout.git("status", "--short").split("\n") == ["A  staged.txt", " M train.py", "?? untracked.txt"]
    assert checkout.git("rev-parse", "HEAD") == head
    results = check_agreement(checkout)
    assert "width=100" in checkout.git("show", f"{results[0]['commit']}:train.py")
    assert checkout.git("log", "-1", "--format=%an <%ae>", "autoresearch/t") == "autoresearch <autoresearch@localhost>"
    checkout.git("checkout", "autoresearch/t", "--", "train.py")  # the command that the summary prints


def test_an_inherited_git_dir_leads_nowhere(checkout, tmp_path, monkeypatch):
    """As a hook or `git rebase -x` sets it: the night's refs and commits land in its own repository."""
    night, other = open_here(checkout), tmp_path / "other"
    subprocess.run(["git", "init", "-q", str(other)], check=True)
    places = {"GIT_DIR": other / ".git", "GIT_WORK_TREE": other, "GIT_INDEX_FILE": other / ".git/index"}
    with monkeypatch.context() as patch:
        for name, value in places.items():
            patch.setenv(name, str(value))
        night.repository = Repository(checkout.folder)
        run_here(night, 1)
    assert checkout.git("for-each-ref", "refs/autoresearch/t") and len(check_agreement(checkout)) == 2
    refs = subprocess.run(["git", "-C", str(other), "for-each-ref"], capture_output=True, text=True, check=True)
    assert refs.stdout == ""


def test_a_branch_in_the_way_is_named_before_the_baseline(checkout):
    checkout.git("branch", "autoresearch")
    output = checkout.agent(*NIGHT, expect=1)
    assert "git branch -m" in output and "refs/heads/autoresearch" in output and "Traceback" not in output
    assert not (checkout.folder / "runs" / "t").exists()
    checkout.git("branch", "-m", "autoresearch", "autoresearch/t/mine")
    with pytest.raises(Problem, match=r"refs/heads/autoresearch/t/mine.*git branch -m"):
        Repository(checkout.folder).refuse_blocked("refs/heads/autoresearch/t")
    checkout.git("branch", "-m", "autoresearch/t/mine", "other")
    Repository(checkout.folder).refuse_blocked("refs/heads/autoresearch/t")


def test_what_is_no_repository_of_ones_own_is_named_with_the_next_command(checkout, tmp_path, monkeypatch):
    with pytest.raises(Problem, match="git init && git add -A"):
        Repository(tmp_path)
    checkout.git("init", "-q", str(tmp_path))
    with pytest.raises(Problem, match="no commit yet"):
        Repository(tmp_path)
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(Problem, match=f"git config --global --add safe.directory {checkout.folder}$"):
        Repository(checkout.folder)
