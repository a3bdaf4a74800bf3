"""The fixed rules: profiles, budget, seeds, cards, paths; and what all programs share: Problem, Settings, lock. Standard library only."""

import errno
import hashlib
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO

for package in ("torch", "numpy", "tiktoken", "rustbpe", "requests", "pyarrow", "rich", "psutil", "scipy", "anthropic"):
    if find_spec(package) is None:
        how = 'python3 -m venv .venv && . .venv/bin/activate && pip install -e ".[dev]"'
        sys.exit(f"error: {sys.executable} has no package {package}; run: . .venv/bin/activate, or install anew: {how}")


class Problem(Exception):
    """Something that the user must act on. The message names the fact and the next command."""


# ---------------------------------------------------------------------------
# Profiles: the sizes that make results comparable. An experiment cannot change them.


@dataclass(frozen=True)
class Profile:
    name: str
    max_seq_len: int  # tokens a row; a stored row has one more, so that inputs and targets are shifted views of it
    vocab_size: int  # tokens, the special ones included
    eval_batch_rows: int  # rows in one evaluation batch; fixed, so that no edit of the training batch moves the number
    val_rows: int  # rows evaluated at most; a smaller split is evaluated whole
    test_rows: int
    default_dataset: str
    default_shards: int  # training shards of climbmix
    sizes: str  # the entry of train.py's CONFIGS: "cpu", or the class of the card by lab.machine.machine()
    # what lab.machine.machine() measures, once a night:
    dtype: str = "float32"  # of the activations: bfloat16 if it is fast
    peak_tflops: float | None = None  # of the card, dense bf16; None for a CPU or an unknown card
    memory_gb: float | None = None  # of the card, in 1e9 bytes
    # what the night's baseline chose on that card; None: not chosen yet
    attention: str | None = None  # the backend
    micro_rows: int | None = None  # rows of a forward pass that fit


PROFILES = {
    "gpu": Profile(
        name="gpu",
        max_seq_len=2048,  # as published in March 2026, so that numbers stay comparable
        vocab_size=8192,  # likewise
        eval_batch_rows=8,  # 16k tokens: logits of 0.5 GB in float32, fits an 8 GB card in chunks
        val_rows=10_240,  # 20.97M tokens, as published; noise of the estimate well under 0.001 bpb
        test_rows=2_560,  # 5.24M tokens: looked at for claims only
        default_dataset="climbmix",
        default_shards=16,  # about 42M tokens each after packing: twice what an H100 reads in five minutes
        sizes="H100",
    ),
    "cpu": Profile(
        name="cpu",
        max_seq_len=256,  # about one paragraph of the embedded corpus; longer rows cost steps
        vocab_size=4096,  # 2048: +0.02 after 60 s; at 8192 the output layer takes most of the time
        eval_batch_rows=64,  # 16k tokens
        val_rows=4_096,  # more than the embedded corpus has: its splits are evaluated whole
        test_rows=4_096,
        default_dataset="sotu",
        default_shards=1,
        sizes="cpu",
    ),
}
DATASETS = ("climbmix", "sotu")  # or a path

# ---------------------------------------------------------------------------
# The run

TIME_BUDGET_S = 300.0  # seconds of training, warm-up, evaluation and saving excluded
COMPILE_FROM_S = 60.0  # seconds: under this budget a cold torch.compile costs more than the training it speeds up
SHORT_SCORING = 4  # a night under it is scored on every fourth row alone: it shows the loop, not a result
CLOCK_MARK = (
    "<<autoresearch 5d1c: built, ready for the text>>"  # what a run prints before its clock; nobody prints it by chance
)
# What run.finish prints before it saves: until here the agent takes the time.
FINISH_MARK = "<<autoresearch 5d1c: trained>>"
TEXT_LINE = "the text is there\n"  # what the agent answers on stdin: from here it takes the time
# x ln(vocab): a model below this when the clock starts has been trained before it. Counts of a row's own
# past, which need no training, gave 0.86 on sotu; four seconds of training 0.70 (cpu profile). It is an alarm: the wall is the hidden text.
UNTRAINED_LOSS = 0.7
SEED = 1  # the seed of a run by hand and of a night
CONFIRM_SEED = 2  # on which a win and its incumbent are measured again

# ---------------------------------------------------------------------------
# What a night decides once


@dataclass(frozen=True)
class Settings:
    """Everything about a run that an experiment cannot choose. night.json is its JSON; by hand it is made anew each time."""

    profile: Profile  # with what the machine has
    dataset: str  # climbmix, sotu, or the path of a text
    data: str  # folder of tokenizer and rows
    train_file: str
    train_rows: int  # how many it has
    budget_s: float
    compile: bool
    # the machine, see lab.machine.machine()
    device: str  # cuda, cpu, mps
    device_name: str
    capability: list[int] | None  # of an NVIDIA card
    sizes_reason: str
    compiler_trouble: str
    threads: int
    torch: str
    flash_attention: dict[str, str]  # versions of the installed packages
    # of a night
    score_every: int = 1  # 4: every fourth row of val and test is scored
    tag: str = ""
    head: str = ""  # commit of the checkout when it began
    harness_sha256: dict[str, str] = field(default_factory=dict)
    data_sha256: dict[str, str] = field(default_factory=dict)

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def made(host: dict, profile: str, budget_s: float, **others) -> "Settings":
        """Of what lab.machine.machine() says, the name of a profile, and the other fields."""
        host = dict(host)
        own = {name: host.pop(name) for name in ("sizes", "dtype", "peak_tflops", "memory_gb")}
        compiles = host.pop("compiler") and budget_s >= COMPILE_FROM_S
        return Settings(
            profile=replace(PROFILES[profile], **own), budget_s=budget_s, compile=compiles, **host, **others
        )

    @staticmethod
    def of(text: str) -> "Settings":
        values = json.loads(text)
        return Settings(**{**values, "profile": Profile(**values["profile"])})

    @property
    def flags(self) -> dict:
        """What a night fixes of the command line, by the flags' names."""
        return {"profile": self.profile.name, "dataset": self.dataset, "budget": self.budget_s}

    @property
    def device_text(self) -> str:
        """The device, with the class of sizes that it got and why."""
        sizes = f" (sizes {self.profile.sizes}, {self.sizes_reason})" if self.sizes_reason else ""
        return f"{self.device_name}{sizes}"

    @property
    def text(self) -> str:
        """The settings as one line, for the terminal and for the researcher."""
        memory = f" with {self.profile.memory_gb:g} GB" if self.profile.memory_gb else ""
        short = f" (runs under {COMPILE_FROM_S:g} s)" if self.budget_s < COMPILE_FROM_S else ""
        compiled = "compiled" if self.compile else f"not compiled{short}"
        return (
            f"profile {self.profile.name}, dataset {self.dataset}, {self.device_text}{memory}, {self.profile.dtype}, "
            f"{compiled}, {counted(self.threads, 'thread')}, {self.budget_s:g} s a run"
            f"{', scored on a quarter of the text' if self.score_every > 1 else ''}"
        )


# ---------------------------------------------------------------------------
# Paths, files, locks, wording


def home() -> Path:
    """The user's folder. Raises Problem if there is none."""
    try:
        return Path.home()
    except RuntimeError:
        raise Problem("HOME is not set, and /etc/passwd names no folder of yours; run: export HOME=FOLDER") from None


def cache_dir() -> Path:
    return Path(os.environ.get("AUTORESEARCH_CACHE") or home() / ".cache" / "autoresearch").expanduser().resolve()


def counted(count: int, noun: str) -> str:
    """1 keep, 2 keeps"""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def row_count(path: Path, profile: str) -> int:
    """How many rows a file of rows has."""
    return path.stat().st_size // (2 * (PROFILES[profile].max_seq_len + 1))


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def written(path: Path):
    """The file to write `path` to. A reader finds the old file or the new one, whole, also after a crash of the machine."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb", buffering=1 << 20) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_atomically(path: Path, text: str) -> None:
    with written(path) as file:
        file.write(text.encode())


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a limit on the size of files


def file_trouble(error: OSError, when_full: str) -> str:
    """What is wrong with a folder of the user's, with the command; when_full: what to do about a full disk. Raises any other error again."""
    if error.errno in FULL:
        reason = "" if error.errno == errno.ENOSPC else f" ({error.strerror})"
        return f"the disk of {error.filename or cache_dir()} is full{reason}; {when_full}"
    if error.errno == errno.EPIPE:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else its last flush complains too
        return "what read this output has ended; then run the same command again"
    if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        raise error
    places = "runs/ and AUTORESEARCH_CACHE have to be folders that you may write to"
    return f"{error.filename}: {error.strerror}; {places}"


def lock(path: Path, note: str, wait: bool = False, shared: bool = False) -> IO[str]:
    """The open file that holds a lock on `path` until it is closed, exclusive or shared, with our pid and `note` in it.

    Raises BlockingIOError, with what the holder wrote as its text, if another process has it; `wait` waits instead.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115 (it stays open as long as the lock is held)
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise BlockingIOError(holder) from None
    file.truncate(0)
    file.write(f"pid {os.getpid()}, {note}, in {Path(__file__).parent}")
    file.flush()
    return file


def guard_this_process() -> None:
    """Linux: orphans of our children become ours, and no process of the same user can read our memory or environment, or write them."""
    if sys.platform == "linux":
        import ctypes

        prctl = ctypes.CDLL(None).prctl
        prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE


def device_lock(device_id: str) -> Path:
    """Whoever trains on a device ("cpu", "mps", "cuda-" and the card's uuid) holds this lock: agent.py, or train.py by hand."""
    return cache_dir() / f"device-{device_id}.lock"


def locked(path: Path, what: str, note: str, shared: bool = False) -> IO[str]:
    """The lock, held until it is closed. Raises Problem, naming the holder, if another process has it."""
    try:
        return lock(path, note, shared=shared)
    except BlockingIOError as holder:
        raise Problem(f"{what} is in use by {holder}; stop it first, or wait") from None
