"""One child process: limits, interrupts, what is left of it; the card; result.json; what may be copied."""

import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from conftest import NIGHT, ROOT, STUB, check_agreement, rows_of, wait_for

from lab import machine
from lab.measure import child, files, run
from lab.measure.child import started_for
from lab.measure.files import remove
from lab.records import OutOfTime

# --- interrupts, one at a time


@pytest.mark.parametrize(
    ("state", "number"),
    [("training", signal.SIGTERM), ("scoring", signal.SIGINT), ("recording", signal.SIGINT)],
)
def test_interrupted_in_each_state(checkout, state, number):
    """Child dead, the row written that was being written, exit 0 within 5 s, resumable."""
    stub = (checkout.folder / "prepare.py").read_text()
    scorer = (checkout.folder / "lab" / "measure" / "score.py").read_text()
    plumbing = (checkout.folder / "lab" / "record" / "git.py").read_text()
    if state == "recording":  # git takes its time: the signal comes while the objects are written
        (checkout.folder / "lab" / "record" / "git.py").write_text(
            plumbing.replace(
                '        return self.git("commit-tree", tree', '        Path("recording").touch()\n        __import__("time").sleep(1.0)\n        return self.git("commit-tree", tree'
            )
        )  # fmt: skip
    elif state == "training":
        action = 'Path("../out/now").touch()\n        time.sleep(30)\n        '
        (checkout.folder / "prepare.py").write_text(stub.replace("time.sleep(self.step_s)", action))
    else:
        action = '    print("scoring", flush=True)\n    __import__("time").sleep(30)\n    folder, below'
        (checkout.folder / "lab" / "measure" / "score.py").write_text(scorer.replace("    folder, below", action))
    process = checkout.start(*NIGHT, "--experiments", "1")
    night = checkout.folder / "runs" / "t" / "0000"
    sign = {
        "training": night / "out" / "now",
        "scoring": night / "score.log",
        "recording": checkout.folder / "recording",
    }[state]
    wait_for(lambda: sign.exists() and (state != "scoring" or "scoring" in sign.read_text()), process)
    start = time.monotonic()
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and time.monotonic() - start < 5 and "Traceback" not in output
    assert len(rows_of(checkout, "result")) == (1 if state == "recording" else 0)
    assert ("go on      python agent.py --tag t\n" in output) == (state == "recording")  # it has a baseline
    assert "the same command goes on" in output and not list(checkout.folder.rglob("*.lock"))
    (checkout.folder / "prepare.py").write_text(stub)
    (checkout.folder / "lab" / "measure" / "score.py").write_text(scorer)
    (checkout.folder / "lab" / "record" / "git.py").write_text(plumbing)
    checkout.agent(*NIGHT, "--experiments", "1")
    assert len(check_agreement(checkout)) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signals_that_follow_the_first_one_change_nothing(checkout, number):
    """Ctrl-C twice; a terminal that closes, and the shell that ends its jobs: nothing lost, nothing left running."""
    checkout.slow(30)
    process = checkout.start(*NIGHT)
    wait_for(lambda: (checkout.folder / "runs" / "t" / "0000" / "run.log").exists(), process)
    process.send_signal(number)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=25)
    assert process.returncode == 0
    assert "the same command goes on" in output and "Traceback" not in output
    assert not started_for(str(checkout.folder / "runs" / "t"))


def test_a_night_under_nohup_outlives_its_terminal(checkout):
    checkout.slow(0.1)
    checkout.within = ["nohup"]
    process = checkout.start(*NIGHT, "--experiments", "1")
    wait_for(lambda: (checkout.folder / "runs" / "t" / "0000" / "run.log").exists(), process)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=60)
    assert "the one experiment is done" in output and len(check_agreement(checkout)) == 2


# --- what is scored once more


def test_what_two_kernels_rounded_in_two_ways_is_scored_once_more(checkout):
    """And nothing larger: the same weights, without another training."""
    checkout.agent(*NIGHT, "--experiments", "1")
    for number, edge, word in ((2, 0.0014, "keep"), (3, 0.014, "invalid")):
        (checkout.folder / "runs" / "t" / "rounded").unlink(missing_ok=True)
        probe = {"rows": 1024, "mean_nats": -2e-5, "last_mean_nats": -1e-4, "last_abs_nats": edge}
        source = STUB.replace("lr=0.4,", f"lr={0.4 / number}, probe={probe},")
        (checkout.folder / "train.py").write_text(source)
        checkout.agent("--tag", "t", "--try", "rounds")
        row = rows_of(checkout, "result")[-1]
        assert row["verdict"] == word and (word == "keep" or "at the edge of the probe change" in row["reason"])
        assert len(rows_of(checkout, "run")) == number + 2  # two of the baseline


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
    assert run.crash_reason(status, tmp_path / "run.log") == reason


def test_a_crash_is_recorded_with_its_reason_and_never_kept(checkout):
    for line, reason in (
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("raise SystemExit(0)", "without a call of run.finish"),
    ):
        source = STUB.replace("    steps = 0\n", f"    steps = 0\n    {line}\n").replace("lr=0.4", "lr=0.1")
        (checkout.folder / "train.py").write_text(source)
        output = checkout.agent("--tag", "t", "--profile", "cpu", "--no-confirm", "--try", "crashes")
        row = check_agreement(checkout)[-1]
        assert row["verdict"] == "crash" and reason in row["reason"] and row["val_bpb"] is None and "crash" in output


def test_what_the_compiler_wraps_is_named(tmp_path):
    with pytest.raises(RuntimeError) as error:
        torch.compile(lambda x: x.view(3, 7), fullgraph=True)(torch.ones(4))
    log = tmp_path / "run.log"
    log.write_text("".join(traceback.format_exception(error.value)))
    assert "invalid for input of size 4" in run.crash_reason(1, log)


def test_a_flood_of_output_ends_the_run_and_its_head_and_tail_are_kept(checkout):
    """Binary, escape sequences and carriage returns end as plain text."""
    checkout.drop_screen()
    checkout.agent(*NIGHT, "--experiments", "1")
    flood = "bytes(range(256)) * 4000 + b'\\x1b[2J\\x1b[31mred\\rover\\n'"
    code = (
        "    print('the first line', flush=True)\n"
        f"    flood = {flood}\n"
        "    for _ in range(300):\n"
        "        import os; os.write(1, flood)\n"
        "    os.write(1, b'the last line')\n    raise SystemExit(1)\n"
    )
    (checkout.folder / "train.py").write_text(STUB.replace("    steps = 0\n", "    steps = 0\n" + code))
    checkout.agent("--tag", "t", "--try", "flood")
    text = (checkout.folder / "runs" / "t" / "0002" / "run.log").read_text()
    assert len(text) < child.LOG_HEAD_BYTES + child.LOG_TAIL_BYTES + 1000
    assert "the first line" in text and "bytes are left out here" in text
    assert all(c.isprintable() or c in "\n\t" for c in text)
    row = rows_of(checkout, "result")[-1]
    assert row["verdict"] == "crash" and row["reason"] in ("printed over 16 MB", "the last line")


def test_a_log_keeps_exactly_its_head_and_tail(tmp_path):
    lines = b"".join(b"%07d\n" % i for i in range(100_000))  # 800,000 bytes
    with open(tmp_path / "log", "w+b") as log:
        log.write(lines)
        child.trim(log)
    head, tail = child.LOG_HEAD_BYTES, child.LOG_TAIL_BYTES
    note = f"\n[{len(lines) - head - tail:,} bytes are left out here]\n".encode()
    assert (tmp_path / "log").read_bytes() == lines[:head] + note + lines[-tail:]


def test_a_run_that_was_killed_from_outside_is_run_once_more(checkout, tmp_path):
    """And not again: a program that the system ends each time is at fault itself."""
    checkout.drop_screen()
    checkout.agent(*NIGHT, "--experiments", "1", "--no-sandbox")
    for deaths, verdict in ((1, "keep"), (9, "crash")):
        place = tmp_path / verdict
        place.mkdir()
        code = f"    import os\n    os.mkdir({str(place)!r} + '/death-%d' % os.getpid())\n"
        code += f"    if len(os.listdir({str(place)!r})) <= {deaths}:\n        os.kill(os.getpid(), 9)\n"
        source = STUB.replace("lr=0.4", f"lr={0.4 - deaths / 100}").replace("    steps = 0\n", f"{code}    steps = 0\n")
        (checkout.folder / "train.py").write_text(source)
        output = checkout.agent("--tag", "t", "--try", "killed", "--no-sandbox")
        assert output.count("killed by SIGKILL; this may have come from outside, so it is run once more") == 1
        assert rows_of(checkout, "result")[-1]["verdict"] == verdict and len(list(place.iterdir())) == 2


@pytest.mark.parametrize(
    ("reason", "outside"),
    [
        ("killed by SIGKILL", True), ("scoring: killed by SIGTERM", True), ("killed by SIGSEGV", False), ("killed by SIGABRT", False),
        ("torch.AcceleratorError: CUDA error: unknown error", True), ("RuntimeError: CUDA error: uncorrectable ECC error encountered", True),
        ("RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable", True),
        ("RuntimeError: No CUDA GPUs are available", True), ("RuntimeError: HIP error: no ROCm-capable device is detected", True),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", False), ("time-out after 300 s", False), ("", False),
    ],
)  # fmt: skip
def test_which_crashes_may_come_from_outside(reason, outside):
    assert bool(run.OUTSIDE.search(reason)) == outside


# --- one device, many cards


def test_two_on_one_device(checkout, tmp_path, monkeypatch):
    """A second agent on the tag, another night, a manual train.py: each names the holder's pid and tag."""
    checkout.slow(30)
    first = checkout.start(*NIGHT)
    wait_for(lambda: (checkout.folder / "runs" / "t" / "0000" / "run.log").exists(), first)
    holder = f"pid {first.pid}, agent.py, tag t"
    assert holder in checkout.agent(*NIGHT, expect=1)
    assert holder in checkout.agent("--tag", "other", *NIGHT[2:], expect=1)
    assert not (checkout.folder / "runs" / "other").exists()
    shutil.copy(ROOT / "prepare.py", checkout.folder / "prepare.py")
    done = subprocess.run(
        [sys.executable, "-c", "import constants; constants.lock(constants.device_lock('cpu'), 'python train.py')"],
        cwd=checkout.folder, env=checkout.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert f"BlockingIOError: {holder}" in done.stderr
    first.terminate()
    assert first.wait(timeout=10) == 0


def test_two_nights_on_two_cards_go_side_by_side(checkout):
    checkout.slow(30)
    first = checkout.start(*NIGHT, STUB_DEVICE_ID="cuda-1")
    wait_for(lambda: (checkout.folder / "runs" / "t" / "0000" / "run.log").exists(), first)
    assert "tag t" in checkout.agent("--tag", "other", *NIGHT[2:], expect=1, STUB_DEVICE_ID="cuda-1")
    second = checkout.start("--tag", "other", *NIGHT[2:], STUB_DEVICE_ID="cuda-2")
    wait_for(lambda: (checkout.folder / "runs" / "other" / "0000" / "run.log").exists(), second)
    for process in (first, second):
        process.terminate()
        assert process.wait(timeout=10) == 0


def fake_card(folder: Path, monkeypatch, *answers: str) -> None:
    """An nvidia-smi that gives one answer after the other for the free memory, the last one for ever."""
    folder.mkdir()
    (folder / "free").write_text("\n".join(answers) + "\n")
    (folder / "nvidia-smi").write_text(
        f"#!/bin/sh\ncd {folder}\ncase \"$*\" in *compute-apps*) echo '77, /usr/bin/ollama, serve'; echo '78, [N/A]';; *) head -1 free\n"
        "[ $(wc -l < free) -gt 1 ] && sed -i 1d free;; esac\nexit 0\n"
    )
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name, seconds in (("CARD_PATIENCE_S", 0.1), ("CARD_INTERVAL_S", 0.05), ("SMI_LIMIT_S", 0.3)):
        monkeypatch.setattr(f"lab.machine.{name}", seconds)


@pytest.mark.parametrize(
    "answer", ["[N/A]", "[Unknown Error]", "", "No devices were found", "\x80\xff", "$(sleep 9)", "$(exit 9)"]
)
def test_a_card_that_does_not_say_how_much_is_free_is_not_waited_for(answer, tmp_path, monkeypatch):
    fake_card(tmp_path / "bin", monkeypatch, "0")
    if answer.startswith("$"):  # it hangs, or fails
        (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\nexec {answer[2:-1]}\n")
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
    line = "waiting: 1,000 MB of the card are free, a run needs 9,000; end what holds the rest: /usr/bin/ollama serve (pid 77); None (pid 78)"
    assert said == [line] and (tmp_path / "bin2" / "free").read_text() == "9001\n"
    with pytest.raises(OutOfTime):
        machine.wait_for_card(9002.0, said.append, lambda: True)


def test_a_night_waits_for_its_card_and_does_not_end_for_it(checkout, tmp_path, monkeypatch):
    """The incumbent's peak has to fit, with what CUDA takes besides. --hours ends the wait."""
    fake_card(tmp_path / "bin", monkeypatch, *["9023"] * 30, "9024")
    rules = (checkout.folder / "lab" / "machine.py").read_text()
    rules = rules.replace("CARD_PATIENCE_S = 10.0", "CARD_PATIENCE_S = 0.1").replace(
        "INTERVAL_S = 2.0", "INTERVAL_S = 0.01"
    )
    (checkout.folder / "lab" / "machine.py").write_text(rules)
    (checkout.folder / "train.py").write_text(STUB.replace("lr=0.4,", "lr=0.4, peak_mb=8000,"))
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
    from dataclasses import replace

    from conftest import open_here, run_here

    fake_card(tmp_path / "bin", monkeypatch, "81079")
    night = open_here(checkout)
    run_here(night, 0)
    filled = replace(
        night.results[0].run,
        metrics=night.results[0].run.metrics | {"peak_vram_mb": 76_100.0, "reserved_vram_mb": 80_300.0},
        free_mb=81_079.0,
    )
    night.results[0] = replace(night.results[0], run=filled)
    (night.folder / "harness" / "night.json").write_text(night.settings.json())
    night.until = -math.inf
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


def test_an_honest_result_is_read(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    assert run.read_result(tmp_path / "result.json", 80.0, 300.0) == RESULT


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("val_bpb", 0.1), ("training_seconds", "300"), ("num_steps", True), ("epoch", float("nan")), ("total_seconds", float("inf")),
        ("num_params_M", 10**400), ("backend", "a\x1b[31mb"), ("micro_rows", 0), ("micro_rows", 1.5), ("peak_vram_mb", [1]),
        ("total_tokens_M", -1.0), ("total_tokens_M", 1e6), ("peak_vram_mb", 1e12), ("mfu_percent", 101.0), ("training_seconds", -0.1),
    ],
)  # fmt: skip
def test_of_a_result_only_known_names_with_finite_numbers_are_kept(tmp_path, name, value):
    (tmp_path / "result.json").write_text(json.dumps(RESULT | {name: value}))
    found = run.read_result(tmp_path / "result.json", 80.0, 300.0)
    assert set(found) == set(RESULT) and found.get(name) is None
    assert {key: found[key] for key in RESULT if key != name} == {key: RESULT[key] for key in RESULT if key != name}


def test_of_a_loss_curve_only_triples_of_numbers_are_kept(tmp_path):
    losses = [[1.0, 5, 2.0], [1.0, float("nan"), 2.0], [1.0], "x", [1, 2, 3, 4]]
    (tmp_path / "result.json").write_text(json.dumps(RESULT | {"losses": losses}))
    assert run.read_result(tmp_path / "result.json", 80.0, 300.0)["losses"] == [[1.0, 5, 2.0]]


@pytest.mark.parametrize("text", ["", "null", "[]", "[" * 100_000, "x" * 70_000])
def test_a_result_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError):
        run.read_result(tmp_path / "result.json", 80.0, 300.0)


def test_a_result_that_is_a_link_a_pipe_or_a_folder_is_refused_and_goes(tmp_path):
    (tmp_path / "real").write_text(json.dumps(RESULT))
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder"):
        with pytest.raises((OSError, ValueError)):
            run.read_result(tmp_path / name, 80.0, 300.0)


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


def test_what_is_swapped_during_the_copy_is_not_followed(tmp_path):
    """A file that becomes a link to val or a pipe, a folder that becomes a link, a file that grows without end."""
    source, secret, stop = tmp_path / "source", tmp_path / "secret", threading.Event()
    secret.mkdir()
    (secret / "file").write_text("canary")
    source.mkdir()

    def swap():
        for i in itertools.cycle(range(4)):
            if stop.is_set():
                return
            for name, is_folder in (("file", False), ("folder", True)):
                fresh = source / f".{name}"
                if i == 0:
                    fresh.symlink_to(secret if is_folder else secret / "file")
                elif i == 1 and not is_folder:
                    os.mkfifo(fresh)
                elif is_folder:
                    fresh.mkdir()
                    (fresh / "file").write_text("mine")
                else:
                    fresh.write_text("mine")
                remove(source / name)
                fresh.rename(source / name)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for i in range(300):
            target = tmp_path / f"target-{i}"
            files.copy_regular_files(source, target, 10**6)
            copied = [path for path in target.rglob("*") if path.is_file()]
            assert not any(path.is_symlink() or "canary" in path.read_text() for path in copied)
    finally:
        stop.set()
        thread.join()


def test_a_copy_has_its_limits(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in "abc":
        (source / name).write_bytes(bytes(1000))
    files.copy_regular_files(source, tmp_path / "bytes", 2500)
    files.copy_regular_files(source, tmp_path / "files", 10**6, most_files=1)
    assert len(list((tmp_path / "bytes").iterdir())) == 2 and len(list((tmp_path / "files").iterdir())) == 1


def nest(folder: Path, depth: int) -> None:
    """Folders within folders, deeper than any path is long."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)


def test_folders_nested_without_end_end_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    nest(tmp_path / "out", 3000)
    try:
        assert files.folder_bytes(tmp_path / "out") == 0
        files.copy_regular_files(tmp_path / "out", tmp_path / "copy", 10**6)
    finally:
        remove(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_paths_longer_than_paths_may_be_are_left_out(tmp_path):
    """Few folders with long names: nobody may open what lies at the end of them by its path."""
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(25):
        os.mkdir("d" * 200, dir_fd=here)
        here = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    files.copy_regular_files(tmp_path, tmp_path.parent / f"{tmp_path.name}-copy", 10**6)
    assert (tmp_path.parent / f"{tmp_path.name}-copy" / ("d" * 200) / "file").exists()


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
    run.set_cache_aside(night, "sha", folder / "cache")
    assert run.cache_aside(night, "sha").exists()
    run.settle_cache(night, "sha", kept=False)
    remove(folder / "cache" / ("d" * 200))
    run.set_cache_aside(night, "sha", folder / "cache")
    assert not run.cache_aside(night, "sha").exists()
