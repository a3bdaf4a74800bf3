"""The fixed rules of the game: profiles, budgets, data, paths. Standard library only; says where Python or a package is missing."""

import hashlib
import os
import re
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

INSTALL = 'python3 -m venv .venv && . .venv/bin/activate && pip install -e ".[dev]"'
if sys.version_info < (3, 10):  # noqa: UP036 (nobody has installed anything yet)
    sys.exit(f"error: this is Python {sys.version.split()[0]}; 3.10 to 3.13 are needed. With one of them: {INSTALL}")
if sys.platform == "win32":
    sys.exit("error: Windows is not supported; WSL is Linux: wsl --install, then the same commands there")
for package in ("torch", "numpy", "tiktoken", "rustbpe", "requests", "pyarrow", "rich", "scipy", "anthropic"):
    if find_spec(package) is None:
        sys.exit(
            f"error: {sys.executable} has no package {package}; run: . .venv/bin/activate, or install anew: {INSTALL}"
        )

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
    sizes: str  # the entry of train.py's CONFIGS: "cpu", or the class of the card by prepare.machine()
    # what prepare.machine() measures, once a night:
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
DATASETS = ("climbmix", "sotu")
SPLITS = ("train", "val", "test")

# ---------------------------------------------------------------------------
# The run

TIME_BUDGET_S = 300.0  # seconds of training, warm-up, evaluation and saving excluded
COMPILE_FROM_S = 60.0  # seconds: under this budget a cold torch.compile costs more than the training it speeds up
CLOCK_MARK = "clock started"  # what a run prints then: the agent takes the time from outside too
UNTRAINED_LOSS = 0.9  # x ln(vocab): a model below this when the clock starts has been trained before it
PROBE_ROWS = 1_024  # rows of val and test that a claim's probe shows a fresh process, each up to a random position
PROBE_TAIL = 64  # positions before it whose predictions are compared
PROBE_MEAN_NATS = 1e-4  # by which they may differ on average from what the model was scored for
PROBE_NATS = {"float32": 1e-3, "bfloat16": 0.05}  # and a single one, by dtype of the activations
PROBE_LAST_NATS = {"float32": 1e-4, "bfloat16": 2e-3}  # and the mean of those whose target was out of sight
SEED = 1  # the seed of a run by hand and of a night
CONFIRM_SEED = 2  # on which a claim and its incumbent are run again
CHECK_SEED, ABLATE_SEED = 101, 201  # the first of those that --check and --ablate use, and the night never
SOURCE_BYTES = 64_000  # train.py stays under this
LITERAL_CHARS = 1_000  # no literal in train.py is longer: weights and answers do not hide in the source

# ---------------------------------------------------------------------------
# Cards

PEAK_TFLOPS = (  # dense bf16, by the name that the driver gives; the first match counts
    ("B200", 2250.0),
    ("H100 NVL", 835.0),
    ("H200 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("A40", 149.7),
    ("L4", 121.0),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)
CARD_CLASSES = (  # class, least peak of a known card, least measured TFLOP/s of an unknown one
    ("H100", 600.0, 450.0),
    ("A100", 250.0, 190.0),
    ("RTX 4090", 60.0, 38.0),
    ("small", 0.0, 0.0),
)


def peak_tflops(card: str) -> float | None:
    """The peak of a card by the name that its driver gives; None if the table lacks it, and for a slice of a card.

    "NVIDIA A100-SXM4-80GB" -> 312.0; "NVIDIA RTX A1000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "GRID A100-10C" -> None
    """
    if re.search(r"\b(Laptop|Ti|D|Max-Q|MIG)\b|-\d+[ABCQ]$", card):
        return None
    return next((peak for name, peak in PEAK_TFLOPS if re.search(rf"\b{name}\b", card)), None)


def card_class(peak: float | None, measured: float) -> str:
    """The class of a card by its known peak, else by the measured rate of bf16 products, both in TFLOP/s."""
    return next(name for name, known, least in CARD_CLASSES if (measured >= least if peak is None else peak >= known))


def speed_text(facts: dict, result: dict) -> str:
    """How fast a run was: `NVIDIA H100 80GB HBM3 (sizes H100, a known card), FA3, 1,102,000 tokens a second, mfu 39.8 %`.

    facts: what prepare.machine() says; result: a result.json.
    """
    sizes = f" (sizes {facts['sizes']}, {facts['sizes_reason']})" if facts["sizes_reason"] else ""
    mfu = "" if result["mfu_percent"] is None else f", mfu {result['mfu_percent']:.1f} %"
    pace = 1e6 * result["total_tokens_M"] / max(result["training_seconds"], 1e-9)
    return f"{facts['device_name']}{sizes}, {result['backend']}, {pace:,.0f} tokens a second{mfu}"


def speed_advice(facts: dict, backend: str, compiled: bool, budget_s: float) -> str:
    """What would make runs on this machine faster, with the command; empty if nothing is known to. Arguments as above."""
    capability = facts["capability"]  # [major, minor] of an NVIDIA card, else None
    if facts["compiler_trouble"] and not compiled and budget_s >= COMPILE_FROM_S:
        return f"runs are not compiled, so they train on fewer tokens: {facts['compiler_trouble']}"
    if facts["dtype"] == "float32" or not capability or capability[0] < 8:
        return ""
    if backend == "sdpa":
        return "attention runs on the slow fallback although this card has FlashAttention; why: python train.py | grep attention"
    if backend == "FA2" and capability[0] in (9, 10):
        return "FlashAttention 4 reads 5 to 8 % more tokens than 2 on this card; run: pip install -e '.[hopper]'"
    return ""


# ---------------------------------------------------------------------------
# Limits that the agent sets from outside (seconds, bytes)

STARTUP_LIMIT_S = 1_800.0  # start to clock and clock to exit together: several cold compiles on a slow machine
SCORE_LIMIT_S = 900.0  # one scoring; 20.97M tokens take under a minute on an H100
PROBE_LIMIT_S = 120.0  # the trial of the sandbox: importing torch from a cold disk
KILL_PATIENCE_S = 20.0  # how long a process may take to go after kill -9: a driver that writes out, a full disk
RECENT = 10  # experiments whose edits are kept at hand
MAX_BOUNCES = 3  # failed screens before an idea is dropped
MAX_IDEAS = 20  # dropped ideas in a row before the night stops
MAX_PAID_IDEAS = 5  # likewise where each of them costs money
MAX_REPAIRS = 2  # attempts to mend one crashed idea
MAX_REFUSALS = 3  # refusals in a row before the night stops
STUCK_AFTER = 15  # experiments without a keep before a new direction is asked for
LEDGER_LINES = 200  # experiments that the model sees one by one; older ones come in groups
CHECK_SEEDS = {"cpu": 5, "gpu": 3}  # how many --check takes: a CPU is noisier, and its runs cost less
LARGE_GAIN = 0.03  # x incumbent: more than any published edit gave; run again on the second seed before it is believed
TEST_ALARM = 0.01  # bpb, or x incumbent if more: a gain on val that exceeds the gain on test by this is not believed
WOBBLE = 0.03  # of the incumbent's tokens a second: a CPU run of the same model further off may be run again
PACE_BPB = 0.09  # bpb that all of the throughput is worth, near its usual value: 1 % is worth 0.0009
NEAR_MISS = 0.001  # x incumbent: a discard this close is worth combining
MODEL = "claude-opus-5-5"
REPLY_TOKENS = 32_000  # of one reply, thinking included
API_TIMEOUT_S = 600.0  # without a byte from the server
API_PATIENCE_S = 60.0  # longest pause between two attempts where the server names none
MAX_CRASHES = 10  # crashes in a row before the night stops
LOG_HEAD_BYTES, LOG_TAIL_BYTES = 64_000, 192_000  # what is kept of a child's output
RESULT_BYTES = 64_000  # a result.json over this is refused
FILE_BYTES = 4 * 2**30  # the largest file that a child may write; the weights of the gpu profile take under 1 GB
OUT_BYTES = 8 * 2**30  # all that a child may leave in its folder
SCRATCH_BYTES = 2 * 2**30  # a sandboxed child's /tmp, in memory
DISK_FLOOR_BYTES = 2**30  # no run starts with less free space: its weights and compile cache have to fit
SMI_LIMIT_S = 20.0  # one answer of nvidia-smi: without its daemon it takes seconds, on a broken driver for ever
CARD_CONTEXT_MB = 1_024  # memory of the card that a process takes besides its tensors
CARD_PATIENCE_S = 10.0  # how long a card may take to give back the memory of a process that ended
CARD_INTERVAL_S = 2.0  # between two looks at a card that is full
CARD_REMINDER_S = 1_800.0  # between two lines that say so

# ---------------------------------------------------------------------------
# Data

HUB = "https://huggingface.co"  # HF_ENDPOINT replaces it
CLIMBMIX_REPO = "karpathy/climbmix-400b-shuffle"  # shard_00000 ... shard_06542, column `text`
VAL_SHARD, TEST_SHARD = 6542, 6541  # pinned; training takes shards from 0 upwards
START_SHARDS = 10  # enough training shards to begin a night; the rest may follow
USABLE_TOKENS = 330_000_000  # what the recipe reads in five minutes on an H100; fewer are repeated, so prepare.py warns
SOTU_SHA256 = "2503dcfcf03a7afbb4f8f7081346cf99fb565527748fddb4cd30d3e6a6632946"  # of sotu 0.1.2, texts joined by NUL
SOTU_DOCUMENT_CHARS = 1_000  # characters: addresses are cut at paragraphs into documents of about this size
DOCUMENT_CHARS = 10_000  # characters of a document that the tokenizer's training reads
TOKENIZER_CHARS = 1_000_000_000  # characters that the tokenizer's training reads in all
TOKENIZER_SHARDS = 8  # more than those characters need
# GPT-4's split pattern with numbers cut after two digits, as nanochat and the published reference have it
SPLIT_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)
SPECIAL_TOKENS = ("<|bos|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>")  # at the end of the vocabulary
PACK_BUFFER, PACK_REFILL = 1_000, 128  # documents that best-fit packing chooses from, and how many it reads at a time

# ---------------------------------------------------------------------------
# Paths, files, locks, wording, and the choice of profile


def cache_dir() -> Path:
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch").expanduser().absolute()


def data_dir(profile: str, dataset: str) -> Path:
    return cache_dir() / f"{profile}-{dataset}"


def counted(count: int, noun: str) -> str:
    """1 keep, 2 keeps"""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """A reader finds the old file or the new one, whole, also after a crash of the machine."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def lock(path: Path, note: str, wait: bool = False) -> IO[str]:
    """The open file that holds an exclusive lock on `path` until it is closed, with our pid and `note` in it.

    Raises BlockingIOError, with what the holder wrote as its text, where another process has it; `wait` waits instead.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115 (it stays open as long as the lock is held)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise BlockingIOError(holder) from None
    file.truncate(0)
    file.write(f"pid {os.getpid()}, {note}")
    file.flush()
    return file


def device_lock(device_id: str) -> Path:
    """Whoever trains on a device ("cpu", "mps", "cuda-" and the card's uuid) holds this lock: agent.py, or train.py by hand."""
    return cache_dir() / f"device-{device_id}.lock"


def checked(profile: str, dataset: str | None) -> tuple[str, str]:
    """A profile and a dataset (default: the environment's, else the profile's). Raises ValueError for an unknown one."""
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; AUTORESEARCH_PROFILE and --profile take: {', '.join(PROFILES)}")
    dataset = dataset or os.environ.get("AUTORESEARCH_DATASET") or PROFILES[profile].default_dataset
    if dataset not in DATASETS:
        raise ValueError(f"unknown dataset {dataset!r}; AUTORESEARCH_DATASET and --dataset take: {', '.join(DATASETS)}")
    return profile, dataset
