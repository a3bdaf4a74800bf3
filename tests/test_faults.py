"""The faults that a night survives, each injected for real and named after its row in FAULTS.md. Training is the stub.

Rows 3, 10 and 14 are in test_sandbox.py, row 23 in test_download.py, row 24 in test_prepare.py.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from conftest import NIGHT, ROOT, STUB, check_agreement, make_checkout, rows_of, story

import agent
import constants
import prepare


def wait_for(condition, process=None, patience_s=60.0):
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The story of an undisturbed night of 40 experiments."""
    folder = tmp_path_factory.mktemp("undisturbed")
    checkout = make_checkout(folder / "checkout", folder / "cache", stub=True)
    checkout.agent(*NIGHT, "--experiments", "40")
    return story(checkout)


def test_fault_1_sixty_kills_at_random_instants(checkout, undisturbed):
    """No acknowledged row is lost, none doubled; the finished night equals one that nobody disturbed."""
    draw, kills, acknowledged = random.Random(1), 0, []
    journal = checkout.folder / "runs" / "t" / "journal.jsonl"
    checkout.agent(*NIGHT, "--experiments", "1")
    while kills < 60:
        process = checkout.start("--tag", "t", "--experiments", "40")
        starts = len(rows_of(checkout, "night"))
        wait_for(lambda: len(rows_of(checkout, "night")) > starts or process.poll() is not None)  # noqa: B023
        time.sleep(draw.uniform(0.0, 0.3))
        kills += process.poll() is None
        process.kill()
        process.communicate()
        whole = journal.read_bytes()[: journal.read_bytes().rfind(b"\n") + 1]
        now = [row for row in map(json.loads, whole.splitlines()) if row["event"] == "result"]
        assert now[: len(acknowledged)] == acknowledged
        acknowledged = now
    checkout.agent("--tag", "t", "--experiments", "40")
    assert kills == 60 and story(checkout) == undisturbed


@pytest.mark.parametrize("event", ["night", "proposal", "start", "result"])
def test_fault_4_the_journal_cut_at_any_byte_of_its_last_line(tmp_path, event, checkout):
    checkout.agent(*NIGHT, "--experiments", "2")
    raw = (checkout.folder / "runs" / "t" / "journal.jsonl").read_bytes()
    lines = raw.splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if json.loads(line)["event"] == event)
    before, path = b"".join(lines[:last]), tmp_path / "journal.jsonl"
    for cut in range(len(lines[last])):
        path.write_bytes(before + lines[last][:cut])
        journal = agent.Journal(path)
        assert journal.rows == [json.loads(line) for line in lines[:last]] and path.read_bytes() == before
        if cut % 97 == 0:
            journal.append("note")
            assert len(agent.Journal(path).rows) == last + 1


def mount_small(folder: Path, size: str):
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    """A checkout on a real file system of 3 MB."""
    folder = tmp_path / "disk"
    mount_small(folder, "3m")
    try:
        checkout = make_checkout(folder / "checkout", tmp_path / "cache", stub=True)
        rules = (checkout.folder / "constants.py").read_text()
        (checkout.folder / "constants.py").write_text(
            rules.replace("DISK_FLOOR_BYTES = 2**30", "DISK_FLOOR_BYTES = 2**12")
        )
        yield checkout
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("free_kb", [8, 24, 48, 100])
def test_fault_5_the_disk_fills_up_while_recording(small_disk, free_kb, undisturbed):
    """At whichever write it happens: one clear line, exit 1, and with space again the night goes on as if nothing had been."""
    small_disk.agent(*NIGHT, "--experiments", "3")
    filler = small_disk.folder.parent / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk.folder).free - 1024 * free_kb))
    output = small_disk.agent("--tag", "t", "--experiments", "40", expect=1)
    assert "Traceback" not in output and "goes on where it stopped" in output
    assert any(word in output for word in ("is full", "No space left", "unable to write", "are free in"))
    filler.unlink()
    small_disk.agent("--tag", "t", "--experiments", "6")
    same = [row[:-1] for row in story(small_disk)]  # the trees differ: constants.py does
    assert same == [row[:-1] for row in undisturbed[:7]]


def test_fault_5_the_disk_fills_up_while_training(small_disk):
    """The run is not recorded as a crash: it is not its fault, and it is run again."""
    small_disk.drop_screen()
    small_disk.agent(*NIGHT, "--experiments", "1")
    source = STUB.replace("    steps = 0\n", "    steps = 0\n    torch_save(model)\n").replace("lr=0.4", "lr=0.1")
    source = source.replace(
        "def build_model",
        "def torch_save(model):\n    prepare.Path('big').write_bytes(bytes(2**23))\n\n\ndef build_model",
    )
    (small_disk.folder / "train.py").write_text(source)
    output = small_disk.agent("--tag", "t", "--try", "fills the disk", expect=1)
    assert "are free in" in output and len(rows_of(small_disk, "result")) == 2
    small_disk.agent("--tag", "t", "--experiments", "3")
    assert len(check_agreement(small_disk)) == 4


def test_fault_6_on_a_detached_head(checkout):
    """The rest of the row (index.lock, dirty and staged work, untracked files) is in test_agent.py's first night."""
    checkout.git("checkout", "-q", "--detach")
    checkout.agent(*NIGHT, "--experiments", "2")
    assert len(check_agreement(checkout)) == 3 and checkout.git("status", "--short") == ""
    assert checkout.git("rev-parse", "HEAD") == checkout.git("rev-parse", "main")


def test_fault_7_the_branch_is_moved_while_the_night_runs(checkout):
    checkout.slow(0.05)
    process = checkout.start(*NIGHT, "--experiments", "30")
    wait_for(lambda: (checkout.folder / "runs" / "t" / "0001").exists(), process)
    checkout.git("update-ref", "refs/heads/autoresearch/t", "main")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "autoresearch/t is not where this night left it" in output
    assert checkout.git("rev-parse", "autoresearch/t") == checkout.git("rev-parse", "main")  # left to the user


def test_fault_8_two_on_one_device(checkout, tmp_path, monkeypatch):
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
        monkeypatch.setattr(f"constants.{name}", seconds)


@pytest.mark.parametrize(
    "answer",
    [
        "[N/A]",
        "[Unknown Error]",
        "[Insufficient Permissions]",
        "N/A",
        "",
        "No devices were found",
        "\x80\xff",
        "$(sleep 9)",
        "$(exit 9)",
    ],
)
def test_a_card_that_does_not_say_how_much_is_free_is_not_waited_for(answer, tmp_path, monkeypatch):
    fake_card(tmp_path / "bin", monkeypatch, "0")
    if answer.startswith("$"):  # it hangs, or fails
        (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\nexec {answer[2:-1]}\n")
    else:
        (tmp_path / "bin" / "free").write_bytes(answer.encode("latin-1") + b"\n")
    assert agent.free_card_mb() is None
    agent.wait_for_card(1e9, pytest.fail)
    monkeypatch.setenv("PATH", "")
    assert agent.free_card_mb() is None and agent.card_users() == []


def test_a_full_card_is_waited_for_aloud(tmp_path, monkeypatch):
    fake_card(tmp_path / "bin", monkeypatch, "1000", "[N/A]")
    said = []
    agent.wait_for_card(9000.0, said.append)
    assert said == []  # a moment is no reason to say something
    fake_card(tmp_path / "bin2", monkeypatch, *["1000"] * 30, "9001")
    agent.wait_for_card(9000.0, said.append)
    line = "waiting: 1,000 MB of the card are free, a run needs 9,000; end what holds the rest: /usr/bin/ollama serve (pid 77); None (pid 78)"
    assert said == [line] and (tmp_path / "bin2" / "free").read_text() == "9001\n"
    with pytest.raises(TimeoutError):
        agent.wait_for_card(9002.0, said.append, lambda: True)


def test_a_night_waits_for_its_card_and_does_not_end_for_it(checkout, tmp_path, monkeypatch):
    """The incumbent's peak has to fit, with what CUDA takes besides. --hours ends the wait."""
    fake_card(tmp_path / "bin", monkeypatch, *["9023"] * 30, "9024")
    rules = (checkout.folder / "constants.py").read_text()
    rules = rules.replace("CARD_PATIENCE_S = 10.0", "CARD_PATIENCE_S = 0.1").replace(
        "INTERVAL_S = 2.0", "INTERVAL_S = 0.01"
    )
    (checkout.folder / "constants.py").write_text(rules)
    (checkout.folder / "train.py").write_text(STUB.replace("lr=0.4,", "lr=0.4, peak_mb=8000,"))
    output = checkout.agent(*NIGHT, "--experiments", "2")
    assert output.count("waiting: 9,023 MB of the card are free, a run needs 9,024") == 1
    assert len(rows_of(checkout, "result")) == 3
    (tmp_path / "bin" / "free").write_text("9023\n")
    output = checkout.agent("--tag", "t", "--experiments", "3", "--hours", "0.001")
    assert "hours are used up, the last of them waiting for the card" in output
    assert len(rows_of(checkout, "result")) == 3


@pytest.mark.parametrize(("deaths", "verdict"), [(1, "keep"), (9, "crash")])
def test_a_run_that_was_killed_from_outside_is_run_once_more(checkout, tmp_path, deaths, verdict):
    """And not again: a program that the system ends each time is at fault itself."""
    checkout.drop_screen()
    checkout.agent(*NIGHT, "--experiments", "1", "--no-sandbox")
    code = f"    import os\n    os.mkdir({str(tmp_path)!r} + '/death-%d' % os.getpid())\n"
    code += f"    if len([n for n in os.listdir({str(tmp_path)!r}) if 'death' in n]) <= {deaths}:\n        os.kill(os.getpid(), 9)\n"
    source = STUB.replace("lr=0.4", "lr=0.395").replace("    steps = 0\n", f"{code}    steps = 0\n")
    (checkout.folder / "train.py").write_text(source)
    output = checkout.agent("--tag", "t", "--try", "killed", "--no-sandbox")
    assert output.count("killed by SIGKILL: this may have come from outside, so it is run once more") == 1
    row = rows_of(checkout, "result")[-1]
    assert row["verdict"] == verdict and row["rerun_seconds"] > 0
    assert len(list(tmp_path.glob("death-*"))) == 2


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
    assert bool(agent.OUTSIDE.search(reason)) == outside


def test_a_repository_of_another_user_is_named_as_one(checkout):
    output = checkout.agent(*NIGHT, expect=1, GIT_TEST_ASSUME_DIFFERENT_OWNER="1")
    assert f"git config --global --add safe.directory {checkout.folder}" in output and "git init" not in output


@pytest.mark.parametrize("branch", ["autoresearch", "autoresearch/t/mine"])
def test_a_branch_in_the_way_is_named_before_the_baseline(checkout, branch):
    checkout.git("branch", branch)
    output = checkout.agent(*NIGHT, expect=1)
    assert "git branch -m" in output and f"refs/heads/{branch}" in output and "Traceback" not in output
    assert not (checkout.folder / "runs" / "t").exists()
    checkout.git("branch", "-m", branch, "other")
    checkout.agent(*NIGHT, "--experiments", "1")
    check_agreement(checkout)


def test_after_the_baseline_the_night_says_what_it_runs_on(checkout):
    output = checkout.agent(
        *NIGHT,
        "--experiments",
        "1",
        "--budget",
        "20",
        STUB_COMPILER_TROUBLE="torch.compile needs g++",
        STUB_SIZES="cpu",
    )
    lines = output.splitlines()
    (at,) = (i for i, line in enumerate(lines) if "baseline" in line and "keep" in line)
    assert lines[at + 1].strip() == "stub (sizes cpu, a test), stub, 500,000 tokens a second"
    assert lines[at + 2].startswith("   1 ")  # a budget under a minute is not compiled anyway
    output = checkout.agent(
        "--tag",
        "u",
        *NIGHT[2:],
        "--experiments",
        "1",
        "--budget",
        "60",
        STUB_COMPILER_TROUBLE="torch.compile needs g++",
    )
    assert "warning: runs are not compiled, so they train on fewer tokens: torch.compile needs g++" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("state", ["training", "scoring", "recording"])
def test_fault_9_interrupted_in_each_state(checkout, state, number):
    """Child dead, the row written that was being written, exit 0 within 5 s, resumable."""
    stub = (checkout.folder / "prepare.py").read_text()
    slow = {"training": "time.sleep(self.step_s)", "scoring": "folder, below = Path(sys.argv"}
    if state == "recording":  # git takes its time: the signal comes while the objects are written
        (checkout.folder / "agent.py").write_text(
            (checkout.folder / "agent.py").read_text().replace(
                '        return self.git("commit-tree", tree', '        Path("recording").touch()\n        time.sleep(1.0)\n        return self.git("commit-tree", tree'
            )
        )  # fmt: skip
    else:
        action = 'Path("../out/now").touch()\n        time.sleep(30)\n        '
        action = action if state == "training" else 'print("scoring", flush=True)\n        time.sleep(30)\n        '
        (checkout.folder / "prepare.py").write_text(stub.replace(slow[state], action + slow[state]))
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
    assert "the same command goes on" in output
    (checkout.folder / "prepare.py").write_text(stub)
    checkout.agent(*NIGHT, "--experiments", "1")
    assert len(check_agreement(checkout)) == 2


def test_fault_9_a_second_interrupt_stops_at_once(checkout):
    checkout.slow(30)
    process = checkout.start(*NIGHT)
    wait_for(lambda: (checkout.folder / "runs" / "t" / "0000" / "run.log").exists(), process)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("raise RuntimeError('CUDA out of memory. Tried to allocate 20 GiB')", "out of memory"),
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("raise SystemExit(0)", "no valid result.json"),
        ("raise KeyError('x')", "KeyError"),
        ("raise SystemExit('loss nan at step 3: the run diverged')", "loss nan"),
    ],
)
def test_fault_11_a_crash_is_recorded_with_its_class_and_never_kept(checkout, line, reason):
    checkout.drop_screen()
    checkout.agent(*NIGHT, "--experiments", "1")
    source = STUB.replace("    steps = 0\n", f"    steps = 0\n    {line}\n").replace("lr=0.4", "lr=0.1")
    (checkout.folder / "train.py").write_text(source)
    output = checkout.agent("--tag", "t", "--try", "crashes")
    row = check_agreement(checkout)[-1]
    assert row["verdict"] == "crash" and reason in row["reason"] and row["val_bpb"] is None
    assert "crash" in output


def test_fault_11_what_the_compiler_wraps_is_named(tmp_path):
    with pytest.raises(RuntimeError) as error:
        torch.compile(lambda x: x.view(3, 7), fullgraph=True)(torch.ones(4))
    log = tmp_path / "run.log"
    log.write_text("".join(traceback.format_exception(error.value)))
    assert "invalid for input of size 4" in agent.crash_reason(1, log)


def test_fault_12_a_flood_of_output_is_capped(checkout):
    """300 MB of binary, escape sequences and carriage returns end as a head and a tail of plain text."""
    checkout.drop_screen()
    checkout.agent(*NIGHT, "--experiments", "1")
    flood = "bytes(range(256)) * 4000 + b'\\x1b[2J\\x1b[31mred\\rover\\n'"
    code = (
        "    print('the first line', flush=True)\n"
        f"    flood = {flood}\n"
        "    for _ in range(300):\n"
        "        import os; os.write(1, flood)\n"
        "    print('\\nthe last line', flush=True)\n    raise SystemExit(1)\n"
    )
    (checkout.folder / "train.py").write_text(STUB.replace("    steps = 0\n", "    steps = 0\n" + code))
    checkout.agent("--tag", "t", "--try", "flood")
    text = (checkout.folder / "runs" / "t" / "0002" / "run.log").read_text()
    assert len(text) < constants.LOG_HEAD_BYTES + constants.LOG_TAIL_BYTES + 1000
    assert "the first line" in text and text.rstrip().endswith("the last line") and "bytes are left out here" in text
    assert all(c.isprintable() or c in "\n\t" for c in text)
    assert rows_of(checkout, "result")[-1]["reason"] == "the last line"


def test_fault_12_a_log_keeps_exactly_its_head_and_tail(tmp_path):
    lines = b"".join(b"%07d\n" % i for i in range(100_000))  # 800,000 bytes
    with agent.CappedLog(tmp_path / "log") as log:
        for i in range(0, len(lines), 7_001):
            log.write(lines[i : i + 7_001])
    head, tail = constants.LOG_HEAD_BYTES, constants.LOG_TAIL_BYTES
    note = f"\n[{len(lines) - head - tail:,} bytes are left out here]\n".encode()
    assert (tmp_path / "log").read_bytes() == lines[:head] + note + lines[-tail:]


def test_fault_20_ten_crashes_in_a_row_stop_the_night(checkout, tmp_path):
    checkout.agent(*NIGHT, "--experiments", "1")
    rows = [
        {"event": "result", "number": i + 1, "verdict": "crash", "description": f"crash {i}", "hypothesis": "",
         "edits": [{"search": "    steps = 0", "replace": f"    steps = {i} // 0"}]}
        for i in range(12)
    ]  # fmt: skip
    (tmp_path / "crashes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = checkout.agent("--tag", "t", "--replay", str(tmp_path / "crashes.jsonl"), "--experiments", "30", expect=1)
    assert "10 experiments crashed in a row" in output
    assert sum(row["verdict"] == "crash" for row in check_agreement(checkout)) == 10


def test_fault_21_the_clock_of_the_machine_jumps(monkeypatch):
    """Budgets are monotonic: neither the five minutes nor the hours of a night see a change of the date."""
    torch = pytest.importorskip("torch")
    clock = prepare.Clock(300.0, torch.device("cpu"))
    jumped = time.time() + 86_400
    monkeypatch.setattr(time, "time", lambda: jumped)
    assert not clock.expired and clock.progress < 0.01 and clock.seconds < 5
    rows = [
        {"event": "night", "at": "2026-11-23T23:00:00+01:00", "uptime": 1.0, "arguments": {}},
        {"event": "result", "at": "2020-01-01T00:00:00+01:00", "uptime": 100.0},
        {"event": "night", "at": "2031-01-01T00:00:00+01:00", "uptime": 1.0},
    ]
    assert agent.seconds_of_earlier_starts(rows) == 100.0


@pytest.mark.parametrize(
    "name", ["runs/t/harness/prepare.py", "runs/t/harness/night.json", "tokenizer.txt", "train.bin", "val.bin"]
)
def test_fault_22_what_changes_during_the_night_stops_it(checkout, name):
    checkout.agent(*NIGHT, "--experiments", "1")
    path = checkout.folder / name if "/" in name else checkout.cache / "cpu-sotu" / name
    path.chmod(0o644)
    path.write_text(
        path.read_text().replace(*(("stub", "bust") if path.suffix != ".json" else ('"seed": 1', '"seed": 2')))
    )
    output = checkout.agent("--tag", "t", "--experiments", "2", expect=1)
    assert f"{path.name} changed" in output and "--tag NEW" in output


def test_fault_22_a_file_that_was_only_touched_is_no_change(checkout):
    checkout.agent(*NIGHT, "--experiments", "1")
    os.utime(checkout.cache / "cpu-sotu" / "train.bin", (1, 1))
    checkout.agent("--tag", "t", "--experiments", "2")


@pytest.mark.parametrize("fact", ["device_name", "torch"])
def test_fault_22_another_device_or_torch_refuses_to_resume(checkout, fact):
    checkout.agent(*NIGHT, "--experiments", "1")
    output = checkout.agent("--tag", "t", "--experiments", "2", expect=1, **{f"STUB_{fact.upper()}": "another"})
    assert f"ran with {fact} stub, here it is another" in output and "--tag NEW" in output


def test_the_night_says_what_it_takes_and_grows_by_little(checkout):
    output = checkout.agent(*NIGHT, "--experiments", "10")
    assert "MB in runs/t" in output
    assert agent.folder_bytes(checkout.folder / "runs" / "t") < 11 * 100_000
    assert len(list((checkout.folder / "runs" / "t").glob("*/out/model.pt"))) == 1
