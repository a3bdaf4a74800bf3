"""One child process: limits, interrupts, what is left of it; the card; result.json; what may be copied."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import NIGHT, ROOT, check_agreement, fake_program, open_here, rows_of, run_here, wait_for
from test_records import RUN

import constants
from constants import CONFIRM_SEED, SEED
from lab import machine
from lab.measure import child, files, run
from lab.measure.child import started_for
from lab.measure.files import remove
from lab.records import OutOfTime, References

# --- interrupts, one at a time


STATES = {  # file, line, what takes its time in its place, what shows that it is there
    "training": (
        "prepare.py", "time.sleep(self.step_s)", 'Path("../out/now").touch()\n        time.sleep(30)', "runs/t/0000/out/now",
    ),
    "scoring": (
        "lab/measure/score.py", "    folder, below",
        '    Path(sys.argv[1], "now").touch()\n    __import__("time").sleep(30)\n    folder, below', "runs/t/0000/now",
    ),
    "recording": (
        "lab/record/git.py", '        return self.git("commit-tree"',
        '        Path("now").touch()\n        __import__("time").sleep(1.0)\n        return self.git("commit-tree"', "now",
    ),
}  # fmt: skip
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.mark.parametrize(
    ("state", "signals"),
    [("training", (TERM,)), ("training", (HUP, INT)), ("scoring", (INT, INT)), ("recording", (INT,))],
)
def test_interrupted_in_each_state(checkout, state, signals):
    """Nothing left running, the row written that was being written, exit 0 within 5 s, resumable. What follows the first signal changes nothing."""
    name, line, slow, sign = STATES[state]
    checkout.edit(name, line, slow)
    process = checkout.start(*NIGHT, "--experiments", "1")
    wait_for((checkout.folder / sign).exists, process)
    start = time.monotonic()
    for number in signals:
        process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and time.monotonic() - start < 5 and "Traceback" not in output
    assert len(rows_of(checkout, "result")) == (state == "recording")
    assert ("go on      python agent.py --tag t\n" in output) == (state == "recording")  # it has a baseline
    assert "the same command goes on" in output and not list(checkout.folder.rglob("*.lock"))
    assert not started_for(str(checkout.folder / "runs" / "t"))
    checkout.git("checkout", "--", name)
    checkout.agent(*NIGHT, "--experiments", "1")
    assert len(check_agreement(checkout)) == 2


def test_a_night_under_nohup_outlives_its_terminal(checkout):
    checkout.slow(0.1)
    checkout.within = ["nohup"]
    process = checkout.start(*NIGHT, "--experiments", "1")
    wait_for(lambda: (checkout.folder / "runs" / "t" / "0000" / "run.log").exists(), process)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=60)
    assert "1 experiment done" in output and len(check_agreement(checkout)) == 2


# --- what is tried once more

KILLED, LATE, BROKEN = {"crash": "killed by SIGKILL"}, {"clock_seconds": 306.0}, {"crash": "KeyError: 'x'"}
ROUNDED = {"probe": {"rows": 1024, "mean_nats": -2e-5, "last_mean_nats": -1e-4, "last_abs_nats": 1.4e-3}}


@pytest.mark.parametrize(
    ("trained", "scored", "seed"),  # what is special of each training and each scoring, in turn; the last one counts
    [
        ([KILLED, {}], [{}], SEED),
        ([KILLED, KILLED], [], SEED),  # a program that the system ends each time is at fault itself
        ([BROKEN], [], SEED), ([BROKEN, {}], [{}], CONFIRM_SEED), ([{"crash": "time-out after 9 s"}, {}], [{}], SEED), ([LATE, {}], [{}], SEED),
        ([{}], [{"crash": "scoring: killed by SIGKILL"}, {}], SEED),  # the same weights: who has seen val asks for no other training
        ([{}], [ROUNDED, {}], SEED), ([{}], [ROUNDED, ROUNDED, {}], SEED), ([{}], [ROUNDED] * 4, SEED),
    ],
)  # fmt: skip
def test_what_may_have_come_from_outside_is_tried_once_more(tmp_path, monkeypatch, trained, scored, seed):
    said, trainings, scorings = [], iter(trained), iter(scored)
    place = SimpleNamespace(settings=SimpleNamespace(budget_s=300.0), folder=tmp_path, say=said.append)
    monkeypatch.setattr(run, "train", lambda *_: replace(RUN, **next(trainings)))
    monkeypatch.setattr(run, "score", lambda place, made, *_: replace(made, **next(scorings)))
    made = run.measure_at(place, Mock(), tmp_path / "0001", "source", seed, "title", References(RUN, RUN))
    assert made == replace(RUN, **(scored or trained)[-1]) and not [*trainings, *scorings]
    assert len(said) == max(0, len(trained) - 1) + max(0, len(scored) - 1)


# --- crashes


@pytest.mark.parametrize(
    ("status", "log", "reason"),
    [
        (1, "Traceback:\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB\n\nbye", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"),
        (-11, "step 3", "killed by SIGSEGV"), (139, "step 3", "killed by SIGSEGV"), (1, "loss nan at step 3: the run diverged", "loss nan at step 3: the run diverged"),
        (1, "KeyError: 'x'", "KeyError: 'x'"), (3, "", "exit status 3, nothing printed"), (0, "KeyError: 'x'", ""),
    ],
)  # fmt: skip
def test_the_reason_of_a_crash_is_its_signal_or_the_last_exception_that_it_names(tmp_path, status, log, reason):
    (tmp_path / "run.log").write_text(log)
    assert child.crash_reason(status, tmp_path / "run.log") == reason


def test_a_run_without_a_finish_is_a_crash(checkout):
    checkout.edit("train.py", "    steps = 0\n", "    raise SystemExit(0)\n")
    output = checkout.agent("--tag", "t", "--profile", "cpu", "--no-confirm", "--try", "crashes")
    row = check_agreement(checkout)[-1]
    assert row["verdict"] == "crash" and row["val_bpb"] is None and "crash" in output
    assert "without a call of run.finish" in row["reason"]


def test_what_the_compiler_wraps_is_named(tmp_path):
    with pytest.raises(RuntimeError) as error:
        torch.compile(lambda x: x.view(3, 7), fullgraph=True)(torch.ones(4))
    log = tmp_path / "run.log"
    log.write_text("".join(traceback.format_exception(error.value)))
    assert "invalid for input of size 4" in child.crash_reason(1, log)


def watched(folder: Path, code: str, *limits):
    """(how run_child ends a program, how often it handed over the text). `clock()` asks for it, `end()` says that it is trained."""
    (folder / "out").mkdir(parents=True)
    head = (
        f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom constants import CLOCK_MARK, FINISH_MARK\n"
        "def clock(): print(CLOCK_MARK, flush=True); sys.stdin.readline()\ndef end(): print(FINISH_MARK, flush=True)\n"
    )
    command, texts = child.Child([sys.executable, "-c", head + code], dict(os.environ), folder), []
    return child.run_child(command, folder / "run.log", limits or (9, 9, 9), lambda: texts.append(1)), len(texts)


@pytest.mark.parametrize(
    ("code", "limits", "why"),
    [
        ("time.sleep(60)", (0.3, 9, 9), "before its clock started"),
        ("clock(); time.sleep(60)", (9, 0.3, 9), "after its clock started"),
        ("clock(); time.sleep(0.2); clock()", (9, 0.8, 9), "after its clock started"),  # a second mark gets no second line
        ("clock(); end(); time.sleep(60)", (9, 9, 0.3), "after it said that it was trained"),
        ("clock(); end()", (9, 9, 9), ""),
    ],
)  # fmt: skip
def test_a_run_that_outlasts_a_limit_is_ended(tmp_path, code, limits, why):
    ended, texts = watched(tmp_path, code, *limits)
    assert ended.crash.endswith(why) and bool(ended.crash) == bool(why)
    assert texts == ("clock" in code)


def test_attack_no_mark_hides_time_from_the_agents_watch(tmp_path):
    """From the first mark of a clock on, early or forged, time is training; from that of the end on it is saving."""
    forged = "clock(); time.sleep(0.6); print(CLOCK_MARK, flush=True); time.sleep(0.3); end()"
    ended, texts = watched(tmp_path / "forged", forged)
    assert ended.clock_seconds > 0.55 and texts == 1
    assert watched(tmp_path / "early", "clock(); end(); time.sleep(0.6)")[0].saving_seconds > 0.3


def test_a_flood_of_output_ends_the_run_and_its_head_and_tail_are_kept(tmp_path):
    """Binary, escape sequences and carriage returns end as plain text."""
    flood = "os.write(1, bytes(range(256)) * 4000 + b'\\x1b[2J\\x1b[31mred\\rover\\n'); time.sleep(0.01)"
    ended, _ = watched(tmp_path, f"print('the first line', flush=True)\nwhile True: {flood}")
    text = (tmp_path / "run.log").read_text()
    assert ended.crash == "printed over 16 MB" and len(text) < child.LOG_HEAD_BYTES + child.LOG_TAIL_BYTES + 1000
    assert "the first line" in text and "bytes are left out here" in text
    assert all(c.isprintable() or c in "\n\t" for c in text)


def test_a_log_keeps_exactly_its_head_and_tail(tmp_path):
    lines = b"".join(b"%07d\n" % i for i in range(100_000))  # 800,000 bytes
    with open(tmp_path / "log", "w+b") as log:
        log.write(lines)
        child.trim(log)
    head, tail = child.LOG_HEAD_BYTES, child.LOG_TAIL_BYTES
    note = f"\n[{len(lines) - head - tail:,} bytes are left out here]\n".encode()
    assert (tmp_path / "log").read_bytes() == lines[:head] + note + lines[-tail:]


@pytest.mark.parametrize(
    ("reason", "outside"),
    [
        ("killed by SIGKILL", True), ("scoring: killed by SIGTERM", True), ("killed by SIGSEGV", False),
        ("torch.AcceleratorError: CUDA error: unknown error", True), ("RuntimeError: CUDA error: uncorrectable ECC error encountered", True),
        ("RuntimeError: No CUDA GPUs are available", True), ("RuntimeError: HIP error: no ROCm-capable device is detected", True),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", False), ("time-out after 300 s", False), ("", False),
    ],
)  # fmt: skip
def test_which_crashes_may_come_from_outside(reason, outside):
    assert bool(run.OUTSIDE.search(reason)) == outside


# --- one device, many cards


def test_a_device_has_one_night_and_each_card_its_own(checkout, monkeypatch):
    """A second agent on the tag, another night, a train.py by hand: each names the holder. On two cards nights go side by side."""
    checkout.slow(30)
    first = checkout.start(*NIGHT, STUB_DEVICE_ID="cuda-1")
    wait_for(lambda: (checkout.folder / "runs" / "t" / "0000" / "run.log").exists(), first)
    holder = f"pid {first.pid}, agent.py, tag t"
    assert holder in checkout.agent(*NIGHT, expect=1, STUB_DEVICE_ID="cuda-1")
    assert holder in checkout.agent("--tag", "other", *NIGHT[2:], expect=1, STUB_DEVICE_ID="cuda-1")
    assert not (checkout.folder / "runs" / "other").exists()
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(checkout.cache))
    with pytest.raises(BlockingIOError, match=holder):
        constants.lock(constants.device_lock("cuda-1"), "python train.py")
    second = checkout.start("--tag", "other", *NIGHT[2:], STUB_DEVICE_ID="cuda-2")
    wait_for(lambda: (checkout.folder / "runs" / "other" / "0000" / "run.log").exists(), second)
    for process in (first, second):
        process.terminate()
        assert process.wait(timeout=10) == 0


def fake_card(folder: Path, monkeypatch, *answers: str) -> None:
    """An nvidia-smi that gives one answer after the other for the free memory, the last one for ever."""
    folder.mkdir()
    (folder / "free").write_text("\n".join(answers) + "\n")
    users = "echo '77, /usr/bin/ollama, serve'; echo '78, [N/A]'"
    free = "head -1 free; [ $(wc -l < free) -gt 1 ] && sed -i 1d free"
    fake_program(folder, "nvidia-smi", f'cd {folder}\ncase "$*" in *compute-apps*) {users};; *) {free};; esac\nexit 0')
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name, seconds in (("CARD_PATIENCE_S", 0.1), ("CARD_INTERVAL_S", 0.05), ("SMI_LIMIT_S", 0.3)):
        monkeypatch.setattr(f"lab.machine.{name}", seconds)


@pytest.mark.parametrize("answer", ["[N/A]", "", "No devices were found", "\x80\xff", "$(sleep 9)", "$(exit 9)"])
def test_a_card_that_does_not_say_how_much_is_free_is_not_waited_for(answer, tmp_path, monkeypatch):
    fake_card(tmp_path / "bin", monkeypatch, "0")
    if answer.startswith("$"):  # it hangs, or fails
        fake_program(tmp_path / "bin", "nvidia-smi", f"exec {answer[2:-1]}")
    else:
        (tmp_path / "bin" / "free").write_bytes(answer.encode("latin-1") + b"\n")
    assert machine.free_card_mb() is None
    machine.wait_for_card(1e9, pytest.fail)
    monkeypatch.setenv("PATH", "")
    assert machine.free_card_mb() is None and machine.card_users() == []


def test_a_full_card_is_waited_for_aloud(tmp_path, monkeypatch):
    fake_card(tmp_path / "bin", monkeypatch, "1000", "[N/A]")
    said = []
    machine.wait_for_card(9000.0, said.append)
    assert said == []  # a moment is no reason to say something
    fake_card(tmp_path / "bin2", monkeypatch, *["1000"] * 30, "9001")
    machine.wait_for_card(9000.0, said.append)
    line = "waiting: 1,000 MB of the card are free, a run needs 9,000; end what holds the rest: /usr/bin/ollama, serve (pid 77); [N/A] (pid 78)"
    assert said == [line] and (tmp_path / "bin2" / "free").read_text() == "9001\n"
    with pytest.raises(OutOfTime):
        machine.wait_for_card(9002.0, said.append, lambda: True)


def test_a_night_waits_for_its_card_and_does_not_end_for_it(checkout, tmp_path, monkeypatch):
    """The incumbent's peak has to fit, with what CUDA takes besides. --hours ends the wait."""
    fake_card(tmp_path / "bin", monkeypatch, *["9023"] * 30, "9024")
    checkout.edit("lab/machine.py", "CARD_PATIENCE_S = 10.0", "CARD_PATIENCE_S = 0.1")
    checkout.edit("lab/machine.py", "INTERVAL_S = 2.0", "INTERVAL_S = 0.01")
    checkout.edit("train.py", "lr=0.4,", "lr=0.4, peak_mb=8000,")
    output = checkout.agent(*NIGHT, "--experiments", "2", STUB_MEMORY_GB="24")
    assert output.count("waiting: 9,023 MB of the card are free, a run needs 9,024") == 1
    assert len(rows_of(checkout, "result")) == 3
    (tmp_path / "bin" / "free").write_text("9023\n")
    hours = (rows_of(checkout)[-1]["uptime"] + 2) / 3600  # of all starts
    output = checkout.agent("--tag", "t", "--experiments", "3", "--hours", f"{hours:.6f}")
    assert "--hours ended while waiting for the card" in output and "hours are used up" in output
    assert len(rows_of(checkout, "result")) == 3


def test_an_idle_card_is_never_waited_for(checkout, tmp_path, monkeypatch):
    """An incumbent that nearly fills the card fits again in what was free when it ran."""
    fake_card(tmp_path / "bin", monkeypatch, "81079")
    night = open_here(checkout)
    run_here(night, 0)
    filled = {"peak_vram_mb": 76_100.0, "reserved_vram_mb": 80_300.0}
    own = replace(night.results[0].run, metrics=night.results[0].run.metrics | filled, free_mb=81_079.0)
    night.results[0], night.until = replace(night.results[0], run=own), -math.inf
    run.wait_until_ready(night, night.incumbent.run)
    fake_card(tmp_path / "bin2", monkeypatch, "78000")  # enough for its tensors, not for what their allocator takes
    with pytest.raises(OutOfTime):
        run.wait_until_ready(night, night.incumbent.run)


# --- what a child leaves


RESULT = {
    "training_seconds": 1.0, "total_seconds": 2.0, "peak_vram_mb": None, "reserved_vram_mb": None, "mfu_percent": None, "total_tokens_M": 1, "num_steps": 5,
    "num_params_M": 1.0, "startup_seconds": 1.0, "epoch": 0.1, "seed": 1, "loader_wait_seconds": 0.0, "micro_rows": 16, "backend": "FA3",
    "losses": [[0.1, 100, 2.0]], "step_ms": 30.5, "forward_backward_ms": 20.0, "optimizer_ms": 10.0, "loader_ms": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "read"),
    [
        ({}, {}), ({"val_bpb": 0.1}, {}), ({"training_seconds": "300"}, {"training_seconds": None}), ({"num_steps": True}, {"num_steps": None}),
        ({"epoch": float("nan")}, {"epoch": None}), ({"num_params_M": 10**400}, {"num_params_M": None}), ({"epoch": -0.1}, {"epoch": None}),
        ({"backend": "a\x1b[31mb"}, {"backend": None}), ({"micro_rows": 0}, {"micro_rows": None}), ({"micro_rows": 1.5}, {"micro_rows": None}),
        ({"total_tokens_M": 1e6}, {"total_tokens_M": None}), ({"peak_vram_mb": 1e6}, {"peak_vram_mb": None}), ({"mfu_percent": 101.0}, {}),
        ({"losses": [[1.0, 5, 2.0], [1.0, float("nan"), 2.0], [1.0], "x", [1, 2, 3, 4]]}, {"losses": [[1.0, 5, 2.0]]}),
    ],
)  # fmt: skip
def test_of_a_result_only_known_names_with_possible_numbers_are_kept(tmp_path, changes, read):
    (tmp_path / "result.json").write_text(json.dumps(RESULT | changes))
    assert run.read_result(tmp_path / "result.json", 80.0, 300.0) == RESULT | read


def test_a_result_that_is_none_is_refused(tmp_path):
    for i, text in enumerate(("", "null", "[]", "[" * 100_000, "x" * 70_000)):
        (tmp_path / f"text-{i}").write_text(text)
    (tmp_path / "real").write_text(json.dumps(RESULT))
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in set(tmp_path.iterdir()) - {tmp_path / "real"}:
        with pytest.raises((OSError, ValueError)):
            run.read_result(path, 80.0, 300.0)


# --- what the agent copies from a child's folder


def test_only_regular_files_are_copied(tmp_path):
    source, target, secret = tmp_path / "source", tmp_path / "target", tmp_path / "secret"
    (source / "inner").mkdir(parents=True)
    (secret / "folder").mkdir(parents=True)
    (secret / "val.bin").write_text("val")
    (source / "inner" / "kernel").write_text("kernel")
    (source / "link").symlink_to(secret / "val.bin")
    (source / "folder").symlink_to(secret)
    os.mkfifo(source / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(source / "socket"))
        files.copy_regular_files(source, target, 10**6)
    assert [path.relative_to(target).as_posix() for path in sorted(target.rglob("*"))] == ["inner", "inner/kernel"]


def test_what_is_swapped_during_the_copy_is_neither_followed_nor_waited_for(tmp_path):
    """A name that is a file, a folder, a pipe and a link to another's in turn, faster than one can look."""
    source, secret = tmp_path / "source", tmp_path / "secret"
    (secret / "inner").mkdir(parents=True)
    (secret / "inner" / "file").write_text("canary")
    source.mkdir()
    (source / "kept").write_text("mine")
    swap = f"""
import os, shutil
os.chdir({str(source)!r})
def folder(name):
    os.mkdir(name)
    open(name + "/inner", "w").write("mine")
while True:
    for make in (folder, os.mkfifo, lambda name: os.symlink({str(secret)!r}, name), lambda name: open(name, "w").close()):
        make("name")
        shutil.rmtree("name") if make is folder else os.unlink("name")
"""
    swapping, ends, copies = subprocess.Popen([sys.executable, "-c", swap]), time.monotonic() + 1.0, 0
    try:
        while time.monotonic() < ends:
            files.copy_regular_files(source, tmp_path / f"target-{copies}", 10**6)
            copies += 1
        assert swapping.poll() is None
    finally:
        swapping.kill()
        swapping.wait()
    copied = [path for path in tmp_path.glob("target-*/**/*") if not path.is_dir()]
    assert sum(path.name == "kept" for path in copied) == copies
    assert not any(path.is_symlink() or "canary" in path.read_text() for path in copied)


def test_a_copy_has_its_limits(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in "abc":
        (source / name).write_bytes(bytes(1000))
    files.copy_regular_files(source, tmp_path / "bytes", 2500)
    files.copy_regular_files(source, tmp_path / "files", 10**6, most_files=1)
    assert len(list((tmp_path / "bytes").iterdir())) == 2 and len(list((tmp_path / "files").iterdir())) == 1
    for nothing in (tmp_path / "gone", tmp_path / "link"):
        (tmp_path / "link").exists() or (tmp_path / "link").symlink_to(source)
        files.copy_regular_files(nothing, tmp_path / f"of-{nothing.name}", 10**6)
        assert list((tmp_path / f"of-{nothing.name}").iterdir()) == []


def test_folders_nested_without_end_end_nothing(tmp_path):
    """Deeper than any path is long."""
    (tmp_path / "out").mkdir()
    here = os.open(tmp_path / "out", os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=here)
        here, above = os.open("d", os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)
    try:
        assert files.folder_bytes(tmp_path / "out") == 0
        files.copy_regular_files(tmp_path / "out", tmp_path / "copy", 10**6)
    finally:
        remove(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_compile_cache_with_paths_longer_than_paths_may_be_is_looked_through(tmp_path):
    """The night's lies under a longer name, and has all that could be copied: what is left is new, and no error."""
    folder, night = tmp_path / "run", tmp_path / ("n" * 150)
    (folder / "cache").mkdir(parents=True)
    here = os.open(folder / "cache", os.O_RDONLY)
    for _ in range(25):
        os.close(os.open("f" * 200, os.O_CREAT | os.O_WRONLY, dir_fd=here))
        os.mkdir("d" * 200, dir_fd=here)
        here = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
    files.copy_regular_files(folder / "cache", night / "cache", 10**6)
    assert (night / "cache" / ("d" * 200) / ("f" * 200)).exists()
    run.set_cache_aside(night, "sha", folder / "cache")
    assert run.cache_aside(night, "sha").exists()
    run.settle_cache(night, "sha", kept=False)
    remove(folder / "cache" / ("d" * 200))
    run.set_cache_aside(night, "sha", folder / "cache")
    assert not run.cache_aside(night, "sha").exists()
