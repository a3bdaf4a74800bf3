"""Fixtures: prepared real data, and small checkouts in which training is a stub, as a process or as a function.

Most nights of the tests run in this process with `fake_measure`, on real git, a real journal and a real server; the promises about
processes (kills, interrupts, the command line) start the program as its user does.
"""

import atexit
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
worker = os.environ.get("PYTEST_XDIST_WORKER", "")
# A core for each: torch's threads of two workers would slow each other fivefold.
if worker and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
for name in list(os.environ):
    if name.startswith(("AUTORESEARCH_", "ANTHROPIC_", "HF_")):
        del os.environ[name]
sys.dont_write_bytecode = False  # else each of some 400 starts of the program would compile it anew
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


import constants  # noqa: E402 (after the path)
import lab.measure.child  # noqa: E402
from agent import Limits, run_night  # noqa: E402
from lab.measure.place import HARNESS  # noqa: E402
from lab.propose.ahead import Proposer  # noqa: E402
from lab.propose.tune import Tune  # noqa: E402
from lab.record.git import Repository  # noqa: E402
from lab.record.journal import FORMAT, Journal  # noqa: E402
from lab.record.night import Night, measure  # noqa: E402
from lab.records import Proposal, Run, of_row, sha256  # noqa: E402

lab.measure.child.strays = list  # those of this process are the servers of its tests

STUB = (ROOT / "tests" / "stub_train.py").read_text()
PLAIN = ("--tag", "t", "--profile", "cpu", "--no-confirm")
NIGHT = (*PLAIN, "--proposer", "tune")


def data_of(cache: Path) -> Path:
    """The folder of the real cpu profile's data."""
    (folder,) = cache.glob("cpu-sotu-*")
    return folder


def start_prepare(cache: Path, *flags, **environment) -> subprocess.Popen:
    """`prepare.py --profile cpu` on this cache, as a process group of its own."""
    return subprocess.Popen(
        [sys.executable, ROOT / "prepare.py", "--profile", "cpu", *flags], env={**os.environ, "AUTORESEARCH_CACHE": str(cache), **environment},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def run_prepare(cache: Path, *flags, expect=0, **environment) -> str:
    process = start_prepare(cache, *flags, **environment)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == expect and "Traceback" not in output, output
    return output


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache folder in which `prepare.py --profile cpu` has run, once for all workers: the others wait for its lock."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if worker else base) / "prepared"
    run_prepare(folder)
    return folder


TRIAL = ["bwrap", "--unshare-user", "--unshare-pid", "--ro-bind", "/", "/", "--proc", "/proc", "true"]


def bubblewrap_works() -> bool:
    try:
        return subprocess.run(TRIAL, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


# As in a container: part of /proc lies under a mount, so the kernel lets nobody mount another one.
CONTAINER = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /proc/driver && exec "$@"', "container"]


def container_works() -> bool:
    """Whether this machine lets the tests stand in for a container in which bubblewrap gets no /proc of its own."""
    try:
        done = subprocess.run([*CONTAINER, *TRIAL], capture_output=True, text=True)
        return "mount proc" in done.stderr
    except FileNotFoundError:
        return False


def replaced(text: str, old: str, new: str) -> str:
    """The text with the one `old` in it replaced."""
    assert text.count(old) == 1
    return text.replace(old, new)


def small(source: str) -> str:
    """The real train.py with one layer and a small table on the cpu profile: everything is there, and takes a fraction of the time."""
    source = replaced(source, "        n_layer=2,", "        n_layer=1,")
    source = replaced(source, "        ngram_rows=2**16,", "        ngram_rows=2**10,")
    return replaced(source, "        step_tokens=2**12,", "        step_tokens=2**10,")  # some steps on a busy machine


class Checkout:
    """A git checkout of the product with its own cache; `agent(...)` runs the program as its user would."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.cache = folder, cache
        self.within: list[str] = []  # a command within which all others run

    @property
    def environment(self):
        git = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
        return {**os.environ, **git, "AUTORESEARCH_CACHE": str(self.cache), "CUDA_VISIBLE_DEVICES": ""}

    def start(self, *args, script="agent.py", **environment):
        return subprocess.Popen(
            [*self.within, sys.executable, script, *args], cwd=self.folder, env={**self.environment, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def slow(self, step_s: float) -> None:
        """Makes each of the stub's five steps take this long, in the nights that begin from now on."""
        data = self.cache / "cpu-sotu"
        data.mkdir(parents=True, exist_ok=True)
        for name in ("train.bin", "val.bin", "test.bin", "tokenizer.txt"):
            (data / name).write_text(f"stub{step_s}" if name == "train.bin" else "stub")

    def edit(self, name: str, old: str, new: str) -> None:
        """Replaces what stands once in a file."""
        (self.folder / name).write_text(replaced((self.folder / name).read_text(), old, new))

    def drop_screen(self) -> None:
        """Lets experiments past the screen: what they try then must fail elsewhere."""
        self.edit("lab/propose/screen.py", "check_rules(tree)\n", "pass\n")

    def agent(self, *args, expect=0, **environment) -> str:
        process = self.start(*args, **environment)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == expect, output
        return output

    def git(self, *args) -> str:
        done = subprocess.run(["git", *args], cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.rstrip("\n")


def make_checkout(folder: Path, cache: Path, stub: bool) -> Checkout:
    shutil.copytree(first_checkout(stub), folder, symlinks=True)
    return Checkout(folder, cache)


@lru_cache
def first_checkout(stub: bool) -> Path:
    """A committed checkout, made once, of which each test gets a copy: git and the tree take longer than copying."""
    folder = Path(tempfile.mkdtemp(prefix="checkout-")) / "checkout"
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    folder.mkdir()
    for name in ("constants.py", "prepare.py", "train.py", "agent.py", "program.md", ".gitignore"):
        shutil.copy2(ROOT / name, folder)
    # The times of the files are kept, by which Python knows what it has compiled; *.pyc.* are being written.
    for place in (ROOT / "lab", *ROOT.glob("__pycache__")):
        shutil.copytree(place, folder / place.name, ignore=shutil.ignore_patterns("*.pyc.*"))
    if stub:
        shutil.copy(ROOT / "tests" / "stub_score.py", folder / "lab" / "measure" / "score.py")
        shutil.copy(ROOT / "tests" / "stub_prepare.py", folder / "prepare.py")
        shutil.copy(ROOT / "tests" / "stub_train.py", folder / "train.py")
        drawing = "def save_progress(path, results, title):\n    path.touch()\n"  # matplotlib takes a second
        (folder / "lab" / "progress.py").write_text(drawing)
    checkout = Checkout(folder, folder)
    checkout.git("init", "-q", "-b", "main")
    checkout.git("add", "-A")
    checkout.git("-c", "user.name=User", "-c", "user.email=user@example.com", "commit", "-qm", "start")
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(folder)], check=True)
    return folder


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose training is a stub of milliseconds."""
    return make_checkout(tmp_path / "checkout", tmp_path / "cache", stub=True)


@pytest.fixture
def real_checkout(tmp_path, cache):
    """A checkout of the real files on prepared data, of which 16 rows of val and of test are left, for speed."""
    shutil.copytree(cache, tmp_path / "cache")
    for name in ("val.bin", "test.bin"):
        os.truncate(data_of(tmp_path / "cache") / name, 16 * 257 * 2)
    return make_checkout(tmp_path / "checkout", tmp_path / "cache", stub=False)


def fake_program(folder: Path, name: str, script: str = "") -> None:
    """Puts a shell script of this name into a folder."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def wait_for(condition, process=None, patience_s=60.0):
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.02)


# ---------------------------------------------------------------------------
# Nights in this process


class Quiet:
    """A view that remembers what is said."""

    def __init__(self):
        self.lines, self.results = [], []

    def say(self, line, style=""):
        self.lines.append(line)

    def finished(self, result):
        self.results.append(result)


SETTINGS = constants.Settings(
    profile=constants.PROFILES["cpu"], dataset="sotu", data="", train_file="train.bin", train_rows=1_000, budget_s=300.0,
    compile=False, device="cpu", device_name="stub", capability=None, sizes_reason="", compiler_trouble="", threads=1, torch="stub",
    flash_attention={},
)  # fmt: skip


def settings_for(checkout, tag: str = "t", **changes) -> constants.Settings:
    own = {"data": str(checkout.cache / "cpu-sotu"), "tag": tag, "head": checkout.git("rev-parse", "HEAD")}
    return replace(SETTINGS, **own | changes)


def open_here(checkout, tag: str = "t", baseline: str | None = None, **changes) -> Night:
    """A night of the checkout in this process: begun, or taken up where its journal ends."""
    folder = checkout.folder / "runs" / tag
    (folder / "harness").mkdir(parents=True, exist_ok=True)
    for name, place in HARNESS.items():
        shutil.copy(checkout.folder / place, folder / "harness" / name)
    journal, repository = Journal(folder / "journal.jsonl"), Repository(checkout.folder)
    source = (checkout.folder / "train.py").read_text() if baseline is None else baseline
    begun = journal.of("proposal")
    first = of_row(Proposal, begun[0]) if begun else Proposal("baseline", "", source)
    night = Night(folder, settings_for(checkout, tag, **changes), "cpu", journal, repository, first)
    (folder / "harness" / "night.json").write_text(night.settings.json())
    night.recover()
    journal.append("night", format=FORMAT, arguments={})
    if not begun:
        night.baseline = night.add_proposal(first, 0)
    return night


def fake_measure(night: Night, before=lambda source, seed: None):
    """The closed form of stub_score.py as a `measure`, memoised and journalled like the real one. `before` is called for each run."""
    return partial(measure, night, fake_run(night, before))


def fake_run(night: Night, before=lambda source, seed: None):
    """The same, neither memoised nor journalled."""
    from stub_score import truth

    def make_run(source: str, seed: int, title: str) -> Run:
        before(source, seed)
        metrics = {"training_seconds": 300.0, "num_steps": 1000, "total_tokens_M": 10.0, "backend": "sdpa"}
        run = Run(sha256(source), seed, None, None, "", "", metrics, 320.0, 301.0, 20.0, 0.1, saving_seconds=0.1)
        try:
            namespace = {"__name__": "stub"}
            exec(compile(source, "train.py", "exec"), namespace)
            model = namespace["build_model"](None)
            caught = model.get("distrust_seed") in (None, seed) and model.get("distrust", "")
            true_bpb = truth(model, seed)
            best, val_bpb = night.incumbent, true_bpb - model.get("overfit", 0.0)
            wins = best is None or seed != constants.SEED or val_bpb < best.run.val_bpb
            claim = seed != constants.CONFIRM_SEED and wins
            run = replace(run, val_bpb=val_bpb, test_bpb=true_bpb if claim else None, distrust=caught or "")
        except Exception as error:
            run = replace(run, crash=f"{type(error).__name__}: {error}", metrics={}, scoring_seconds=None)
        return run

    return make_run


def run_here(
    night: Night, experiments: int | None = 6, proposer=None, hours=None, second_seed=False, measure=None, workers=1
) -> str:
    """Runs a night of this process to its end; returns the reason."""
    proposer = proposer or Tune()
    end = math.inf if hours is None else time.perf_counter() + 3600 * hours
    limits = Limits(experiments, hours, end, workers)
    return run_night(night, proposer, limits, measure or fake_measure(night), lambda: workers, Quiet(), second_seed)


class Script(Proposer):
    """A proposer that gives one change after the other: pairs of lines, or functions of the incumbent's source.

    `asked` are the histories and the feedbacks that it was asked with.
    """

    name, exhausted = "script", "the script is complete"

    def __init__(self, *changes):
        self.changes, self.asked = list(changes), []

    def propose(self, source, history, feedback):
        self.asked.append((history, feedback))
        if not self.changes:
            return None
        change = self.changes.pop(0)
        new = change(source) if callable(change) else source.replace(*change)
        return Proposal(f"change {history.number}", "", new)


FIRST = "        lr=0.4,  # best at 0.1"


def better(lr: float, **more) -> tuple[str, str]:
    """A change to another learning rate, nearer to the best one; `more` are further facts about the model."""
    facts = "".join(f"\n        {name}={value!r}," for name, value in more.items())
    return FIRST, f"        lr={lr},  # best at 0.1{facts}"


# ---------------------------------------------------------------------------
# What a night left


def rows_of(checkout, event=None, tag="t"):
    """The rows of a night's journal, none before it has one; those of results with the fields of their run."""
    journal = checkout.folder / "runs" / tag / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the agent may be writing the last one
    runs = {row["id"]: row for row in rows if row["event"] == "run"}
    rows = [runs[row["run"]] | row if row["event"] == "result" else row for row in rows]
    return [row for row in rows if event in (None, row["event"])]


def check_agreement(checkout, tag="t"):
    """Journal, refs, branch, results.tsv and folders of a night tell one story; returns its result rows."""
    results = rows_of(checkout, "result", tag)
    assert [row["number"] for row in results] == list(range(len(results)))
    refs = dict(
        line.split()[::-1]
        for line in checkout.git("for-each-ref", "--format=%(objectname) %(refname)", "refs/autoresearch").split("\n")
    )
    prefix = f"refs/autoresearch/{tag}/"
    assert {name: commit for name, commit in refs.items() if name.startswith(prefix)} == {
        f"{prefix}{row['number']:04d}": row["commit"] for row in results
    }
    keeps = [row["commit"] for row in results if row["verdict"] == "keep"]
    on_branch = checkout.git("rev-list", "--reverse", f"autoresearch/{tag}", "--not", "main").split("\n")
    assert on_branch == keeps
    assert not list((checkout.folder / "runs" / tag).glob("arrived-*"))
    lines = (checkout.folder / "runs" / tag / "results.tsv").read_text().splitlines()
    assert lines[0] == "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
    for line, row in zip(lines[1:], results, strict=True):
        commit, bpb, memory, status, description = line.split("\t")
        assert row["commit"].startswith(commit) and (status, description) == (row["verdict"], row["description"])
        assert bpb == ("" if row["val_bpb"] is None else f"{row['val_bpb']:.6f}") and memory == ""
    best = None
    for row in results:
        if row["verdict"] == "keep":
            assert best is None or row["val_bpb"] < best
            best = row["val_bpb"]
        elif row["verdict"] == "discard":
            parent = results[row["parent"]]["val_bpb"]
            assert row["val_bpb"] >= parent or row["reason"].startswith(("not confirmed", "lower than experiment"))
        source = checkout.git("cat-file", "blob", f"{row['commit']}:train.py") + "\n"
        assert sha256(source) == row["source"]
    return results


def story(checkout):
    """A night without what differs from one machine to the next: times, and the commits that hold them."""
    same = ("number", "source", "verdict", "val_bpb", "parent", "description")
    return [
        [row[key] for key in same] + [checkout.git("rev-parse", f"{row['commit']}^{{tree}}")]
        for row in check_agreement(checkout)
    ]


def mount_small(folder, size: str):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
