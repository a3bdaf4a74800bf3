"""Fixtures: the repository's own folder, prepared real data, and a small checkout with stub training for the agent."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
for name in list(os.environ):
    if name.startswith(("AUTORESEARCH_", "ANTHROPIC_", "HF_")):
        del os.environ[name]


STUB = (ROOT / "tests" / "stub_train.py").read_text()
NIGHT = ("--tag", "t", "--proposer", "random", "--profile", "cpu", "--no-confirm")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache folder in which `prepare.py --profile cpu` has run."""
    folder = tmp_path_factory.mktemp("cache")
    command = [sys.executable, str(ROOT / "prepare.py"), "--profile", "cpu"]
    subprocess.run(command, env={**os.environ, "AUTORESEARCH_CACHE": str(folder)}, check=True, timeout=120)
    return folder


def bubblewrap_works() -> bool:
    try:
        command = ["bwrap", "--unshare-user", "--unshare-pid", "--ro-bind", "/", "/", "--proc", "/proc", "true"]
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


# As in a container: part of /proc lies under a mount, so the kernel lets nobody mount another one.
CONTAINER = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /proc/driver && exec "$@"', "container"]


def container_works() -> bool:
    """Whether this machine lets the tests stand in for a container in which bubblewrap gets no /proc of its own."""
    try:
        command = ["bwrap", "--unshare-user", "--unshare-pid", "--ro-bind", "/", "/", "--proc", "/proc", "true"]
        done = subprocess.run([*CONTAINER, *command], capture_output=True, text=True)
        return "mount proc" in done.stderr
    except FileNotFoundError:
        return False


class Checkout:
    """A git checkout of the product with its own cache; `agent(...)` runs the program as its user would."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.cache = folder, cache
        self.within: list[str] = []  # a command within which all others run

    @property
    def environment(self):
        git = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
        return {**os.environ, **git, "AUTORESEARCH_CACHE": str(self.cache), "CUDA_VISIBLE_DEVICES": ""}

    def start(self, *args, script="agent.py", stdout=subprocess.PIPE, **environment):
        return subprocess.Popen(
            [*self.within, sys.executable, script, *args], cwd=self.folder, env={**self.environment, **environment}, text=True,
            stdout=stdout, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def slow(self, step_s: float) -> None:
        """Makes each of the stub's five steps take this long, in the nights that begin from now on."""
        self.start(script="prepare.py").communicate()
        (self.cache / "cpu-sotu" / "train.bin").write_text(f"stub{step_s}")

    def drop_screen(self) -> None:
        """Lets experiments past the screen: what they try then must fail elsewhere."""
        text = (self.folder / "agent.py").read_text()
        assert text.count("    check_rules(tree)\n") == 1
        (self.folder / "agent.py").write_text(text.replace("    check_rules(tree)\n", ""))

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
    folder.mkdir()
    for name in ("constants.py", "prepare.py", "train.py", "agent.py", "program.md", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    if stub:
        shutil.copy(ROOT / "tests" / "stub_prepare.py", folder / "prepare.py")
        shutil.copy(ROOT / "tests" / "stub_train.py", folder / "train.py")
    checkout = Checkout(folder, cache)
    checkout.git("init", "-q", "-b", "main")
    checkout.git("add", "-A")
    checkout.git("-c", "user.name=User", "-c", "user.email=user@example.com", "commit", "-qm", "start")
    return checkout


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose training is a stub of milliseconds."""
    return make_checkout(tmp_path / "checkout", tmp_path / "cache", stub=True)


@pytest.fixture
def real_checkout(tmp_path, cache):
    """A checkout of the real files on prepared data, of which 64 rows of val and of test are left, for speed."""
    shutil.copytree(cache, tmp_path / "cache")
    for name in ("val.bin", "test.bin"):
        os.truncate(tmp_path / "cache" / "cpu-sotu" / name, 64 * 257 * 2)
    return make_checkout(tmp_path / "checkout", tmp_path / "cache", stub=False)


def rows_of(checkout, event=None, tag="t"):
    lines = (checkout.folder / "runs" / tag / "journal.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the agent may be writing the last one
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
            assert row["val_bpb"] >= best or row["reason"].startswith("not confirmed")
        source = checkout.git("cat-file", "blob", f"{row['commit']}:train.py") + "\n"
        assert source == (checkout.folder / "runs" / tag / f"{row['number']:04d}" / "train.py").read_text()
    return results


def story(checkout):
    """A night without what differs from one machine to the next: times, and the commits that hold them."""
    same = ("number", "source", "verdict", "val_bpb", "parent", "description")
    return [
        [row[key] for key in same] + [checkout.git("rev-parse", f"{row['commit']}^{{tree}}")]
        for row in check_agreement(checkout)
    ]
