"""The machine: which profile and sizes suit it, what keeps torch from its card, and what would make its runs faster."""

import glob
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import constants
from constants import COMPILE_FROM_S, Problem, Settings, write_atomically
from lab.records import OutOfTime, clean

TORCH_OF = "pip install --force-reinstall torch==2.13.0"  # for another build, --index-url and the last line's address
TORCH_WHEELS = "https://download.pytorch.org/whl"
ON_CPU = "add --profile cpu (to train.py: AUTORESEARCH_PROFILE=cpu)"
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


# ---------------------------------------------------------------------------
# What keeps torch from the card, or from compiling


def card_trouble(torch) -> str:
    """Why torch cannot run on this machine's GPU, and the command that helps; empty if it can."""
    if not (torch.version.cuda or torch.version.hip):
        return f"torch {torch.__version__} is a build for CPUs alone; for an NVIDIA card run: {TORCH_OF}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is said below
        if torch.cuda.is_available():
            try:
                torch.ones(8, device="cuda").sum().item()
                return ""
            except RuntimeError as error:
                reason, card = reason_of(error), torch.cuda.get_device_properties(0)
            if "no kernel image" not in reason:
                return f"{card.name} does not work: {reason}; see what nvidia-smi says of it"
            name = f"{card.name} (compute capability {card.major}.{card.minor})"
            wheel = "cu126" if card.major < 8 else "cu130"  # older cards are in the one, newer ones in the other
            return f"this torch has no kernels for {name}; run: {TORCH_OF} --index-url {TORCH_WHEELS}/{wheel}"
        try:
            torch.cuda.init()
            reason = "no card is visible"
        except Exception as error:
            reason = reason_of(error)
    if "too old" in reason:
        needs = f"the NVIDIA driver is too old for CUDA {torch.version.cuda}, which this torch brings"
        return f"{needs}; update it (580 and newer), or from 525 on run: {TORCH_OF} --index-url {TORCH_WHEELS}/cu126"
    return f"torch sees no GPU ({reason}); check with nvidia-smi (a container needs --gpus all)"


def reason_of(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]


def compiler_and_header(device: str) -> tuple[list[str], str]:
    """(the compiler that torch.compile takes, empty if there is none, the path of Python.h, there or not)"""
    variable, names = ("CC", ("gcc", "clang")) if device == "cuda" else ("CXX", ("g++", "clang++"))
    compilers = filter(None, map(shutil.which, os.environ.get(variable, "").split()[:1] or names))
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # where Debian keeps its headers
    return [*compilers][:1], str(Path(sysconfig.get_path("include", scheme)) / "Python.h")


def compiler_trouble(device: str) -> str:
    """What torch.compile lacks on this machine, and the command that installs it; empty if nothing."""
    compiler, header = compiler_and_header(device)
    variable = "CC" if device == "cuda" else "CXX"
    own = os.environ.get(variable, "").split()[:1]
    if own and not compiler:
        return f"torch.compile needs a compiler and {variable}={own[0]} is none; run: unset {variable}"
    missing = [] if compiler else [f"a {'C' if device == 'cuda' else 'C++'} compiler"]
    if not Path(header).exists():
        missing.append("Python.h")
    if not missing:
        return ""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = "xcode-select --install" if sys.platform == "darwin" else f"apt-get install g++ python{version}-dev"
    return f"torch.compile needs {' and '.join(missing)}; run: {command}"


# ---------------------------------------------------------------------------
# What a night decides once: profile, device, sizes, dtype


def choose(profile: str | None, dataset: str | None) -> tuple[str, str]:
    """Profile and dataset by the flags, else by the environment, else by what torch can use. Raises Problem.

    On a machine with an NVIDIA card that torch cannot use, nobody gets a night on the CPU without a word.
    """
    profile = profile or os.environ.get("AUTORESEARCH_PROFILE")
    if not profile:
        import torch

        trouble, nodes = card_trouble(torch), gpu_nodes()
        if trouble and any("nvidia" in node for node in nodes):
            raise Problem(f"{trouble}; to train on the CPU instead, {ON_CPU}")
        if trouble and nodes:
            amd = f"; for an AMD card that ROCm knows run: {TORCH_OF} --index-url {TORCH_WHEELS}/rocm7.2"
            print(
                f"note: profile cpu, since {trouble}{amd if '/dev/kfd' in nodes else ''}", file=sys.stderr, flush=True
            )
        profile = "cpu" if trouble else "gpu"
        if profile == "gpu" and (trouble := compiler_trouble("cuda")):
            raise Problem(trouble)
    if profile not in constants.PROFILES:
        known = ", ".join(constants.PROFILES)
        raise Problem(f"unknown profile {profile!r}; AUTORESEARCH_PROFILE and --profile take: {known}")
    dataset = dataset or os.environ.get("AUTORESEARCH_DATASET") or constants.PROFILES[profile].default_dataset
    if dataset in constants.DATASETS:
        return profile, dataset
    if not Path(dataset).expanduser().exists():
        raise Problem(
            f"there is no dataset and no path {dataset!r}; --dataset and AUTORESEARCH_DATASET take climbmix, sotu, or the path of a text"
        )
    return profile, str(Path(dataset).expanduser().resolve())


def gpu_nodes(folder: str = "/dev") -> list[str]:
    """The device nodes of this machine's GPUs: NVIDIA's cards, AMD's, WSL's; none if CUDA_VISIBLE_DEVICES hides them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    return sorted(node for name in ("nvidia[0-9]*", "kfd", "dxg") for node in glob.glob(f"{folder}/{name}"))


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


def tflops(torch, device: str, dtype, size: int = 4096, seconds: float = 0.5, at_once: int = 8) -> float:
    """The best rate of (size, size) matrix products within `seconds`, in TFLOP/s: an idle card has to raise its clock first.

    On a card it waits after `at_once` of them, since each wait costs some 20 us.
    """
    a, best, began = torch.randn(size, size, device=device).to(dtype), math.inf, time.perf_counter()
    while time.perf_counter() - began < seconds or best == math.inf:
        start = time.perf_counter()
        for _ in range(at_once):
            b = a @ a
        b[0, 0].item()  # waits for the products
        best = min(best, (time.perf_counter() - start) / at_once)
    return 2 * size**3 / best / 1e12


def sizes_of(card: str, peak: float | None, uuid: str, measure) -> tuple[str, str]:
    """(class of the card, why), by its name, else by measure() in TFLOP/s, once: the cache keeps the answer."""
    if peak is not None:
        return card_class(peak, 0.0), "a known card"
    path, key = constants.cache_dir() / "cards.json", f"{uuid} {card} torch {version('torch')}"
    known = json.loads(path.read_text()) if path.exists() else {}
    if key not in known:
        known[key] = measure()
        write_atomically(path, json.dumps(known, indent=1))
    return card_class(None, known[key]), f"measured {known[key]:.3g} TFLOP/s, kept in {path.name}"


def cores() -> list[int]:
    """The cores that this thread may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]


def machine(profile: str) -> dict:
    """What a night decides once: device and what it can do, dtype, compiler, threads. Profile cpu takes the CPU in any case.

    Raises Problem if profile gpu finds no GPU that works, or nothing to compile with.
    """
    import torch

    threads = len(cores())
    host = {"torch": torch.__version__, "threads": threads, "peak_tflops": None, "memory_gb": None, "capability": None}
    host |= {"sizes": constants.PROFILES[profile].sizes, "sizes_reason": "", "compiler": False, "compiler_trouble": ""}
    host["flash_attention"] = {}
    for name in ("flash-attn-3", "flash-attn-4"):
        with suppress(PackageNotFoundError):
            host["flash_attention"][name] = version(name)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi numbers them
    if profile == "gpu":
        if not (trouble := card_trouble(torch)):
            return host | card_facts(torch)
        if not torch.backends.mps.is_available():
            raise Problem(f"profile gpu: {trouble}; to train on the CPU, {ON_CPU}")
        device = {"device": "mps", "device_name": "mps", "dtype": "float32"}
        return host | device | {"sizes": "small", "sizes_reason": "of Apple's GPUs"}
    host |= {"device": "cpu", "device_name": "cpu", "compiler_trouble": compiler_trouble("cpu")}
    torch.set_num_threads(threads)
    bf16, fp32 = torch.bfloat16, torch.float32
    rates = {bf16: 0.0, fp32: 0.0}
    for dtype in (bf16, fp32) * 5:  # in turn: whatever else runs slows both
        rates[dtype] = max(rates[dtype], tflops(torch, "cpu", dtype, 1024, 0.05, at_once=1))
    dtype = "bfloat16" if rates[bf16] > 1.3 * rates[fp32] else "float32"
    return host | {"dtype": dtype, "compiler": not host["compiler_trouble"]}


def card_facts(torch) -> dict:
    """What machine() says of the first visible card. Raises Problem if there is nothing to compile with."""
    card, bf16 = torch.cuda.get_device_properties(0), torch.cuda.is_bf16_supported(including_emulation=False)
    compiler = (card.major, card.minor) >= (7, 0)  # what Triton needs
    if compiler and (trouble := compiler_trouble("cuda")):
        raise Problem(trouble)
    dtype = "bfloat16" if bf16 else "float32"
    peak = peak_tflops(card.name) if bf16 else None
    sizes, reason = sizes_of(
        f"{card.name}, {dtype}", peak, str(card.uuid), lambda: tflops(torch, "cuda", getattr(torch, dtype))
    )
    return {
        "device": "cuda",
        "device_name": card.name,
        "capability": None if torch.version.hip else [card.major, card.minor],
        "peak_tflops": peak,
        "memory_gb": round(card.total_memory / 1e9, 1),
        "dtype": dtype,
        "sizes": sizes,
        "sizes_reason": reason,
        "compiler": compiler,
    }


# ---------------------------------------------------------------------------
# How fast it is


def speed_text(settings: Settings, metrics: dict) -> str:
    """How fast a run was: `NVIDIA H100 80GB HBM3 (sizes H100, a known card), attention FA3, 1,102,000 tokens a second, mfu 39.8 %`."""
    parts = [settings.device_text, f"attention {metrics.get('backend') or 'unknown'}"]
    if metrics.get("total_tokens_M") and metrics.get("training_seconds"):
        parts.append(f"{1e6 * metrics['total_tokens_M'] / metrics['training_seconds']:,.0f} tokens a second")
    if metrics.get("mfu_percent") is not None:
        parts.append(f"mfu {metrics['mfu_percent']:.1f} %")
    return ", ".join(parts)


def speed_advice(settings: Settings, backend: str | None) -> str:
    """What would make runs on this machine faster, with the command; empty if nothing is known to."""
    capability = settings.capability
    if settings.compiler_trouble and not settings.compile and settings.budget_s >= COMPILE_FROM_S:
        return f"runs are not compiled, so they train on fewer tokens: {settings.compiler_trouble}"
    if settings.profile.dtype == "float32" or not capability or capability[0] < 8:
        return ""
    if backend == "sdpa":
        return "attention runs on the slow fallback although this card has FlashAttention; the baseline's run.log says why (grep attention)"
    if backend == "FA2" and capability[0] in (9, 10):
        return "FlashAttention 4 reads 5 to 8 % more tokens than 2 on this card; run: pip install -e '.[hopper]'"
    return ""


# ---------------------------------------------------------------------------
# The card as nvidia-smi describes it: what is free, who uses it, the wait for one that is full

SMI_LIMIT_S = 20.0  # one answer of nvidia-smi: without its daemon it takes seconds, on a broken driver for ever
CARD_CONTEXT_MB = 1_024  # memory of the card that a process takes besides its tensors
CARD_PATIENCE_S = 10.0  # how long a card may take to give back the memory of a process that ended
CARD_INTERVAL_S = 2.0  # between two looks at a card that is full
CARD_REMINDER_S = 1_800.0  # between two lines that say so


def ask_card(query: str) -> list[str]:
    """The lines that nvidia-smi answers about the card that runs take; none if it is not there, or does not answer.

    query="gpu=memory.free" -> ["10240"], on some machines ["[N/A]"]
    """
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = ["nvidia-smi", "-i", card, f"--query-{query}", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace"
        )
        output, _ = process.communicate(timeout=SMI_LIMIT_S)
    except OSError:
        return []
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: one that hangs in the driver does not go
        process.stdout.close()
        return []
    return [clean(line) for line in output.splitlines()] if process.returncode == 0 else []


def free_card_mb() -> float | None:
    """Free memory of the card that runs take, in MiB; None if nobody says."""
    with suppress(IndexError, ValueError):
        return float(ask_card("gpu=memory.free")[0])
    return None


def card_users() -> list[str]:
    """The processes that compute on the card that runs take, as `name (pid 17)`."""
    users = (line.partition(", ") for line in ask_card("compute-apps=pid,process_name"))
    return [f"{name} (pid {pid})" for pid, _, name in users if pid.isdecimal()]


def wait_for_card(needed_mb: float, say, give_up=lambda: False) -> None:
    """Wait until `needed_mb` are free on the card, or nobody says how much is. Say every half hour what holds the rest.

    Raises OutOfTime once give_up() is true.
    """
    began, said_at = time.perf_counter(), -math.inf
    while (free := free_card_mb()) is not None and free < needed_mb:
        now = time.perf_counter()
        if now - began > CARD_PATIENCE_S and now - said_at > CARD_REMINDER_S:
            said_at = now
            users = "; ".join(card_users()) or "nvidia-smi lists no process"
            say(
                f"waiting: {free:,.0f} MB of the card are free, a run needs {needed_mb:,.0f}; end what holds the rest: {users}"
            )
        if give_up():
            raise OutOfTime("waiting for the card")
        time.sleep(CARD_INTERVAL_S)
