"""Journal, resume and recording: what survives a kill, a full disk, and a user who changes things meanwhile."""

import json
import os
import re
import shutil
import subprocess
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from conftest import (
    NIGHT,
    STUB,
    Script,
    better,
    check_agreement,
    fake_measure,
    fake_run,
    make_checkout,
    mount_small,
    open_here,
    rows_of,
    run_here,
    story,
    wait_for,
)  # fmt: skip

from agent import experiment, measure
from constants import CONFIRM_SEED, SEED, Problem
from lab.record.git import Repository
from lab.record.journal import FORMAT, Journal, read_journal, seconds_of_earlier_starts
from lab.record.night import make_run_here
from lab.record.start import ask_prepare, open_night
from lab.records import Proposal, sha256

# --- the journal


@pytest.mark.parametrize("event", ["night", "proposal", "run", "result"])
def test_the_journal_cut_at_any_byte_of_its_last_line_loses_that_line_alone(tmp_path, event, finished):
    lines = (finished.folder / "runs" / "t" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if json.loads(line)["event"] == event)
    before, path = b"".join(lines[:last]), tmp_path / "journal.jsonl"
    for cut in range(len(lines[last])):
        path.write_bytes(before + lines[last][:cut])
        journal = Journal(path)
        assert journal.rows == [json.loads(line) for line in lines[:last]] and path.read_bytes() == before
        if cut % 97 == 0 and last > 0:
            journal.append("note")
            assert len(Journal(path).rows) == last + 1


def test_a_damaged_line_and_an_older_format_are_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    first = f'{{"event": "night", "format": {FORMAT}}}\n'
    for text, said in (
        (first + '{"event"\n{"event": "end"}\n', "line 2 is damaged"), (first + "null\n", "line 2 is damaged"), (first + "{}\n", "line 2 is damaged"),
        ('{"event": "result"}\n', "lacks its first line"),
        ('{"event": "night"}\n', "format of an earlier version; start another night with --tag NEW"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(Problem, match=said):
            read_journal(path)


@pytest.fixture
def small_disk(tmp_path):
    """A checkout on a real file system of 4 MB."""
    folder = tmp_path / "disk"
    mount_small(folder, "4m")
    try:
        checkout = make_checkout(folder / "checkout", tmp_path / "cache", stub=True)
        checkout.edit("lab/measure/files.py", "DISK_FLOOR_BYTES = 2**30", "DISK_FLOOR_BYTES = 2**12")
        yield checkout
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(checkout, free_kb: int):
    filler = checkout.folder.parent / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(checkout.folder).free - 1024 * free_kb)))
    return filler


def test_an_append_that_finds_the_disk_full_leaves_nothing_behind(small_disk):
    """More rows follow once there is space: none of them is damaged."""
    journal = Journal(small_disk.folder / "journal.jsonl")
    journal.append("night", format=FORMAT, text="first")
    filler = fill(small_disk, 4)
    with pytest.raises(OSError, match="No space left"):
        journal.append("note", text="x" * 100_000)
    filler.unlink()
    journal.append("note", text="last")
    for rows in (journal.rows, Journal(journal.path).rows):
        assert [row["text"] for row in rows] == ["first", "last"]


@pytest.mark.parametrize("free_kb", [8, 48])
def test_a_disk_that_fills_up_stops_the_night_and_loses_nothing(small_disk, free_kb, undisturbed):
    """At whichever write it happens: one clear line, exit 1, and with space again the night goes on as if nothing had been."""
    small_disk.agent(*NIGHT, "--experiments", "2")
    filler = fill(small_disk, free_kb)
    output = small_disk.agent("--tag", "t", "--experiments", "40", expect=1)
    assert "Traceback" not in output and "goes on where it stopped" in output
    assert any(word in output for word in ("is full", "No space left", "t write", "are free in")), output
    filler.unlink()
    small_disk.agent("--tag", "t", "--experiments", "4")
    trees = -1  # which differ, since lab/measure/files.py does
    assert [row[:trees] for row in story(small_disk)] == [row[:trees] for row in undisturbed[:5]]


@pytest.mark.parametrize(
    "how", ["write_bytes(bytes(2**23))", "open('wb').write((prepare.Path('big').unlink(), bytes(2**23))[1])"]
)
def test_a_run_that_fills_the_disk_is_a_crash_and_the_night_goes_on(small_disk, how):
    """Its own files, or files without a name, took the space: it is not run again and again. What it wrote is gone before its row is written."""
    small_disk.drop_screen()
    small_disk.agent(*NIGHT, "--experiments", "1")
    small_disk.edit("train.py", "    steps = 0\n", f"    steps = 0\n    prepare.Path('big').{how}\n")
    small_disk.agent("--tag", "t", "--try", "fills the disk")
    row = rows_of(small_disk, "result")[-1]
    assert row["verdict"] == "crash" and "No space left" in row["reason"]
    assert list((small_disk.folder / "runs" / "t" / "0002" / "out").iterdir()) == []
    small_disk.agent("--tag", "t", "--proposer", "tune", "--experiments", "3")
    assert len(check_agreement(small_disk)) == 4


def test_the_files_of_a_run_wait_for_its_verdict_whoever_takes_the_number(checkout, monkeypatch):
    """Its second seed was cut off, and another proposer is first. A run on another seed makes no experiment."""

    def measure_at(place, view, folder, source, seed, title, references):
        folder.mkdir(exist_ok=True)
        (folder / "train.py").write_text(source)
        return fake_run(night)(source, seed, title)

    monkeypatch.setattr("lab.record.night.measure_at", measure_at)
    night = open_here(checkout)
    run_here(night, 0)
    waiting = night.add_proposal(Proposal("waits", "", night.baseline.source.replace(*better(0.3)), parent=0), 1)
    for seed in (SEED, CONFIRM_SEED):
        measure(night, partial(make_run_here, night, None), waiting.source, seed, "")
    assert not night.run_folder(1).exists() and len(list(night.folder.glob("arrived-*"))) == 1
    run_here(night, 1, Script(("beta=0.8", "beta=0.7")))
    night = open_here(checkout)
    experiment(night, waiting, fake_measure(night))
    assert (night.run_folder(2) / "train.py").read_text() == waiting.source and not list(night.folder.glob("arrived-*"))


# --- kill and resume


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A checkout with an undisturbed night of six experiments, run in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    checkout = make_checkout(folder / "checkout", folder / "cache", stub=True)
    run_here(open_here(checkout))
    return checkout


@pytest.fixture(scope="module")
def undisturbed(finished):
    return story(finished)


def cut_copy(finished, tmp_path, count: int, torn: bytes = b"", moved: bool = False):
    """A copy of the finished night whose journal ends after `count` rows; its refs are as a kill at that instant leaves them."""
    folder = tmp_path / f"cut-{count}-{len(torn)}-{moved}"
    shutil.copytree(finished.folder, folder)
    checkout = type(finished)(folder, finished.cache)
    journal = folder / "runs" / "t" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    journal.write_bytes(b"".join(lines[:count]) + torn)
    results = [row for row in rows[:count] if row["event"] == "result"]
    done = results if moved or rows[count - 1]["event"] != "result" else results[:-1]
    for row in rows:
        if row["event"] == "result" and row not in done:
            checkout.git("update-ref", "-d", f"refs/autoresearch/t/{row['number']:04d}")
    keeps, branch = [row["commit"] for row in done if row["verdict"] == "keep"], "refs/heads/autoresearch/t"
    checkout.git("update-ref", *([branch, keeps[-1]] if keeps else ["-d", branch]))
    return checkout


@pytest.mark.parametrize("part", range(4))
def test_killed_after_any_row_the_night_ends_as_an_undisturbed_one(finished, undisturbed, tmp_path, part):
    """The journal cut after every row, and inside every line that follows it; the refs as they were then. Nothing counted is run again."""
    lines = (finished.folder / "runs" / "t" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    for count in range(2 + part, len(lines), 4):
        checkout = cut_copy(finished, tmp_path, count, lines[count][: len(lines[count]) // 2])
        counted = {(row["source"], row["seed"]) for row in rows_of(checkout) if row["event"] in ("run", "result")}
        night, again = open_here(checkout), []
        run_here(night, measure=fake_measure(night, lambda source, seed: again.append((source, seed))))  # noqa: B023
        assert story(checkout) == undisturbed
        assert not counted & {(sha256(source), seed) for source, seed in again}
        shutil.rmtree(checkout.folder)


def test_killed_between_the_moves_of_refs_they_are_made_on_resume(finished, tmp_path):
    """After `result` neither ref is moved, or the branch alone."""
    lines = (finished.folder / "runs" / "t" / "journal.jsonl").read_text().splitlines()
    keeps = [i for i, line in enumerate(lines) if '"event": "result"' in line and '"verdict": "keep"' in line]
    for moved in (False, True):
        checkout = cut_copy(finished, tmp_path, keeps[-1] + 1, moved=moved)
        last = json.loads(lines[keeps[-1]])
        checkout.git("update-ref", "-d", f"refs/autoresearch/t/{last['number']:04d}")
        open_here(checkout)
        assert check_agreement(checkout)[-1]["commit"] == last["commit"]


def test_two_proposals_that_wait_after_a_kill_are_both_run_and_no_third_is_asked_for(checkout):
    night = open_here(checkout)
    run_here(night, 1, Script(better(0.39)))
    for i in (1, 2):
        source = STUB.replace("beta=0.8", f"beta=0.{i}")
        night.add_proposal(Proposal(f"waiting {i}", "", source, proposer="script", parent=1), 2)
    script = Script()
    script.propose = lambda *_: pytest.fail("asked for a third")
    run_here(open_here(checkout), 3, script)
    assert [row["description"] for row in check_agreement(checkout)][2:] == ["waiting 1", "waiting 2"]


def test_until_the_baseline_is_done_another_train_py_begins_the_night_anew(checkout, tmp_path):
    """With the dataset, budget, profile and proposer of its first start."""
    text = tmp_path / "t.txt"
    text.write_text("stub")
    checkout.slow(0.3)
    process = checkout.start(*NIGHT, "--dataset", str(text), "--budget", "4")
    wait_for(lambda: (checkout.folder / "runs" / "t" / "0000" / "run.log").exists(), process)
    process.kill()
    process.wait()
    checkout.edit("train.py", "width=64", "width=90")
    checkout.slow(0.001)
    output = checkout.agent("--tag", "t", "--experiments", "1")
    assert f"dataset {text}" in output and "4 s a run" in output
    assert "width=90" in checkout.git("show", f"{check_agreement(checkout)[0]['commit']}:train.py")


def test_a_night_that_begins_anew_gives_up_nothing_that_was_paid_for(checkout):
    """Calls of a model, made beside the baseline; nor anything at all, if the machine cannot be asked."""
    night = open_here(checkout)
    checkout.edit("train.py", "width=64", "width=90")
    args = SimpleNamespace(attempt=None, profile="cpu", dataset=None, budget=None, confirm=None)

    def again(**how):
        return open_night(checkout.folder, night.folder, args, night.repository, **how)

    with pytest.raises(Problem, match="the driver is busy"):
        again(ask=Mock(side_effect=Problem("the driver is busy")))
    night.journal.append("call", id=0, usd=0.5)
    with pytest.raises(Problem, match=r"what its model has cost would be forgotten.*--tag NEW"):
        again()
    assert read_journal(night.journal.path)[0] == night.journal.rows


# --- what stops a night, and what does not


def test_a_branch_that_another_moved_or_checked_out_stops_the_night_and_is_left_to_the_user(checkout):
    night = open_here(checkout)
    run_here(night, 1, Script(better(0.39)))
    checkout.git("switch", "-q", "autoresearch/t")
    with pytest.raises(Problem, match="is checked out"):
        open_here(checkout)
    checkout.git("switch", "-q", "main")
    checkout.git("update-ref", "refs/heads/autoresearch/t", "main")
    with pytest.raises(Problem, match="not where this night left it"):
        run_here(night, 2, Script((better(0.39)[1], better(0.38)[1])))
    with pytest.raises(Problem, match=r"not where this night left it.*run: git update-ref refs/heads/autoresearch/t"):
        open_here(checkout)
    assert checkout.git("rev-parse", "autoresearch/t") == checkout.git("rev-parse", "main")


def test_refs_without_a_journal_stop_the_night_with_the_command_that_deletes_them(checkout):
    run_here(open_here(checkout), 1)
    (checkout.folder / "runs" / "t").rename(checkout.folder / "gone")
    output = checkout.agent(*NIGHT, expect=1)
    command = re.search(r"(git for-each-ref --format=.*--stdin)", output)[1]
    subprocess.run(command, shell=True, cwd=checkout.folder, check=True)
    assert "autoresearch" not in checkout.git("for-each-ref")


def test_a_prepare_that_the_system_ended_without_a_word_is_said(tmp_path):
    (tmp_path / "prepare.py").write_text("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(Problem, match=r"status -9; run: python prepare\.py --machine"):
        ask_prepare(tmp_path)


def test_what_changed_or_is_gone_since_the_night_began_refuses_to_go_on(checkout, monkeypatch):
    """Rules of the checkout, the frozen rules, data, device, torch, a flag: each is named, with the way on. Touching is no change."""
    (checkout.folder / "runs").write_text("")
    output = checkout.agent(*NIGHT, expect=1)
    assert "have to be folders that you may write to" in output and "Traceback" not in output
    (checkout.folder / "runs").unlink()
    checkout.agent(*NIGHT, "--experiments", "1")
    folder, data = checkout.folder / "runs" / "t", checkout.cache / "cpu-sotu"
    os.utime(data / "train.bin", (1, 1))
    args = SimpleNamespace(attempt=None, profile=None, dataset=None, budget=None, confirm=None)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(checkout.cache))

    def refused() -> str:
        with pytest.raises(Problem) as problem:
            open_night(checkout.folder, folder, args, Repository(checkout.folder)).check_unchanged()
        return str(problem.value)

    harness = [folder / "harness" / name for name in ("prepare.py", "score.py", "night.json")]
    for path in (*harness, data / "val.bin", data / "tokenizer.txt"):
        before, mode = path.read_bytes(), path.stat().st_mode
        path.chmod(0o644)
        path.write_bytes(before.replace(b"stub", b"bust") if path.suffix == ".json" else before + b"#")
        assert f"{path.name} changed" in refused() and "--tag NEW" in refused()
        path.unlink()
        assert f"{path.name} is gone; restore it" in refused()
        if path.name == "val.bin":
            assert "val.bin is gone; restore it" in checkout.agent("--tag", "t", "--experiments", "2", expect=1)
        path.write_bytes(before)
        path.chmod(mode)
    for name in ("constants.py", "lab/measure/score.py"):
        with open(checkout.folder / name, "a") as file:
            file.write("\n# changed\n")
        assert f"git checkout autoresearch/t -- {name}" in refused() and "--tag NEW" in refused()
        checkout.git("checkout", "autoresearch/t", "--", name)
    for fact in ("device_name", "torch"):
        monkeypatch.setenv(f"STUB_{fact.upper()}", "another")
        assert f"ran with {fact} stub, here it is another" in refused() and "--tag NEW" in refused()
        monkeypatch.delenv(f"STUB_{fact.upper()}")
    output = checkout.agent("--tag", "t", "--budget", "20", expect=1)
    assert "--budget 300, not 20" in output and "--tag NEW" in output
    checkout.agent("--tag", "t", "--experiments", "2")


def test_the_clock_of_the_machine_may_jump():
    """The hours of a night are monotonic; those of --check and --ablate do not count."""
    rows = [
        {"event": "night", "at": "2026-11-23T23:00:00+01:00", "uptime": 1.0, "arguments": {}},
        {"event": "result", "at": "2020-01-01T00:00:00+01:00", "uptime": 100.0},
        {"event": "night", "at": "2031-01-01T00:00:00+01:00", "uptime": 1.0, "arguments": {"check": "t"}},
        {"event": "run", "at": "2031-01-01T00:00:00+01:00", "uptime": 900.0},
        {"event": "night", "at": "2031-01-01T00:00:00+01:00", "uptime": 1.0, "arguments": {}},
    ]
    assert seconds_of_earlier_starts(rows) == 100.0
