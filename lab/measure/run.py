"""One run: train and score a (source, seed); the text at its clock; its compile cache."""

import contextlib
import json
import math
import os
import re
import shutil
import stat
import time
from dataclasses import replace
from pathlib import Path

import constants
from constants import Problem
from lab.machine import CARD_CONTEXT_MB, free_card_mb, wait_for_card
from lab.measure.child import run_child
from lab.measure.files import (
    DISK_FLOOR_BYTES,
    OUT_BYTES,
    check_disk,
    copy_regular_files,
    free_bytes,
    make_run_folder,
    names_within,
    remove,
)
from lab.measure.place import Place
from lab.measure.sandbox import child_command
from lab.records import (
    References,
    Run,
    clean,
    late,
    like_rounding,
    look_limit_s,
    sha256,
    slack_s,
    startup_limit_s,
)

STARTUP_LIMIT_S = 1_800.0  # until the clock starts: several cold compiles on a slow machine
SAVING_LIMIT_S = 600.0  # after the budget, of the baseline: its weights on a slow disk
RESULT_BYTES = 64_000  # a result.json over this is neither read nor kept
# Of a scoring whose processes rounded in two ways: 3 of 73 processes did, and one scoring twice in a row.
ROUNDED_TRIES = 3
SCORE_LIMIT_S = 900.0  # one scoring; 20.97M tokens take under a minute on an H100


# ---------------------------------------------------------------------------
# What a child leaves


SHOWN = (  # of result.json
    "training_seconds total_seconds peak_vram_mb reserved_vram_mb mfu_percent total_tokens_M num_steps num_params_M startup_seconds epoch seed "
    "loader_wait_seconds step_ms forward_backward_ms optimizer_ms loader_ms"
).split()


def read_result(path: Path, memory_gb: float | None, budget_s: float) -> dict:
    """Return the known numbers of a result.json, which an experiment may have written: no verdict rests on them alone.

    A number that this machine cannot reach is None. memory_gb: of the card, in 1e9 bytes; None for a CPU. Raises OSError or
    ValueError if there is no such file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        raw = file.read(RESULT_BYTES + 1)
    if len(raw) > RESULT_BYTES:
        raise ValueError(f"over {RESULT_BYTES:,} bytes")
    try:
        result = json.loads(raw)
    except (ValueError, RecursionError):
        result = None
    if not isinstance(result, dict):
        raise ValueError("not a JSON object")

    card_mb = (memory_gb or 0.0) * 1e9 / 2**20
    most = {
        "peak_vram_mb": card_mb,
        "reserved_vram_mb": card_mb,
        "mfu_percent": 100.0,
        "total_tokens_M": 1_000 * budget_s,
    }  # 1e9 tokens a second

    def is_number(value, limit: float = 1e9) -> bool:
        return type(value) in (int, float) and 0 <= value <= limit

    shown = {name: result[name] if is_number(result.get(name), most.get(name, 1e9)) else None for name in SHOWN}
    rows, backend, losses = result.get("micro_rows"), result.get("backend"), result.get("losses")
    shown["micro_rows"] = rows if type(rows) is int and 0 < rows < 2**20 else None
    shown["backend"] = backend if backend in ("FA2", "FA3", "FA4", "sdpa") else None
    points = losses if isinstance(losses, list) and len(losses) <= 100 else []
    good = [point for point in points if isinstance(point, list) and len(point) == 3 and all(map(is_number, point))]
    return shown | {"losses": good}


OUTSIDE = re.compile(  # crashes that need not be the program's fault: the system ended it, or the driver lost the card
    r"killed by SIG(KILL|TERM|HUP|INT|QUIT|PWR)\b|(CUDA|HIP) error: .*(unknown error|busy or unavailable|is lost|ECC error|"
    r"no \S+ device is detected|not yet initialized|shutting down|launch failure|launch timed out)|No (CUDA|HIP) GPUs are available|while it ran$"
)


# ---------------------------------------------------------------------------
# The text: one link or copy of the rows for the night, and a link in a run's folder while its clock runs
#
# A run's text/ is empty until its clock starts, gone after its end, and read-only in the sandbox: nobody reads text before the clock.


@contextlib.contextmanager
def rows_of_the_night(place: Place):
    """Within it the night's folder has the training rows, on one file system with its runs: linked, else copied. Raises Problem."""
    source = Path(place.settings.data) / place.settings.train_file
    for left in (place.rows.parent, *place.folder.glob("*/text")):  # by an agent that was killed
        remove(left)
    place.rows.parent.mkdir()
    try:
        try:
            os.link(source, place.rows)
        except OSError:  # another file system, or a file of another user
            copy_rows(source, place.rows)
        place.check_unchanged()
        yield
    finally:
        remove(place.rows.parent)


def copy_rows(source: Path, target: Path) -> None:
    needed, free = source.stat().st_size, shutil.disk_usage(target.parent).free
    if needed > free:
        few = f"{source} cannot be linked to {target.parent}, and a copy takes {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free"
        raise Problem(f"{few}; free space there, or set AUTORESEARCH_CACHE to a folder beside the checkout")
    shutil.copyfile(source, target)


def hand_over_text(place: Place, folder: Path) -> None:
    """Links the rows into the text/ of a run's folder."""
    os.link(place.rows, folder / "text" / place.rows.name)


# ---------------------------------------------------------------------------
# Compile caches: each run starts from the night's, and what it compiled before its clock, when it had no text, may become the night's
#
# A run writes to its own copy alone. When its clock starts the agent sets that aside by source: a second run of the same source begins
# with it, and a keep makes it the night's.


def cache_aside(night: Path, source: str) -> Path:
    """Where the cache of a source (its sha256) is kept until its verdict."""
    return night / f"cache-{source[:16]}"


def cache_for(night: Path, source: str) -> Path:
    """The cache that a run begins with: that of its own source, else the night's, which need not exist."""
    aside = cache_aside(night, source)
    return aside if aside.exists() else night / "cache"


def set_cache_aside(night: Path, source: str, made: Path) -> None:
    """Keeps what a run has compiled, if that is more than it was given. A kill leaves the whole or nothing."""
    place, known = cache_aside(night, source), cache_for(night, source)
    if all(os.path.exists(f"{known}/{name}") for name in names_within(made)):  # False for a path that is too long
        return
    fresh = place.with_suffix(".new")
    remove(fresh)
    copy_regular_files(made, fresh, OUT_BYTES)
    remove(place)
    os.replace(fresh, place)


def settle_cache(night: Path, source: str, kept: bool) -> None:
    """After a verdict: the cache of a kept source becomes the night's, else it goes."""
    if kept and cache_aside(night, source).exists():
        remove(night / "cache")
        os.replace(cache_aside(night, source), night / "cache")
    remove(cache_aside(night, source))


def clear_caches(night: Path) -> None:
    """Of sources without a verdict: of --check and --ablate, of an earlier start."""
    for place in night.glob("cache-*"):
        remove(place)


# ---------------------------------------------------------------------------
# measure


def measure_at(place: Place, view, folder: Path, source: str, seed: int, title: str, references: References) -> Run:
    """One training and one scoring, in a run folder of this place; what may not be the program's doing is tried once more.

    That is: what the system or the driver ended, what crashed on another seed than the night's, and what took too long, since a
    machine may be busy: a slow start with an empty compile cache, as the baseline had. If scoring failed, or its two processes rounded
    in two ways (up to ROUNDED_TRIES times), the same weights are scored again: who has seen val must not be able to ask for another training.
    """
    baseline, on_night_seed, budget_s = references.baseline, seed == constants.SEED, place.settings.budget_s

    def from_outside(run: Run) -> str:
        slow = late(run, baseline, budget_s) if baseline and not run.crash else ""
        reason = run.crash or slow
        outside = OUTSIDE.search(run.crash) or "time-out" in run.crash or slow or not on_night_seed
        if not (reason and outside):
            return ""
        place.say(f"{reason}: this may have come from outside, so it is run once more: {title}")
        return reason

    run = train(place, view, folder, source, seed, title, references)
    if reason := from_outside(run):
        cold = not baseline or "before its clock" in reason or reason.startswith("started")
        remove(folder)  # it may be what fills the disk
        run = train(place, view, folder, source, seed, title, references, cold)
    if not run.crash:
        view.enter("scoring")
        scored = score(place, run, folder, references)
        for tries in range(ROUNDED_TRIES):
            if late(run, baseline, budget_s):
                break
            if like_rounding(scored, baseline):
                place.say(f"the scorer's two processes rounded in two ways, so it is scored once more: {title}")
            elif tries or not from_outside(scored):
                break
            scored = score(place, run, folder, references)
        run = scored
    view.end()
    if run.crash and free_bytes(place.folder) < DISK_FLOOR_BYTES:
        for full in (folder / "out", folder / "cache"):  # before its row is to be written
            remove(full)
            full.mkdir(parents=True)
        if free_bytes(place.folder) < DISK_FLOOR_BYTES:  # no fault of the experiment: it is run again
            remove(folder)
            check_disk(place.folder)
    if not on_night_seed:
        remove(folder)
    return run


def train(
    place: Place, view, folder: Path, source: str, seed: int, title: str, references: References, cold: bool = False
) -> Run:
    """One training. What outlasts the bounds that the baseline sets is ended: it would not count."""
    settings, baseline, program = place.settings, references.baseline, sha256(source)
    wait_until_ready(place, references.incumbent)
    make_folder(place, folder, source, seed, baseline, cold)
    idle_s = None if place.last_exit is None else time.perf_counter() - place.last_exit
    limits = STARTUP_LIMIT_S, settings.budget_s + SAVING_LIMIT_S, SAVING_LIMIT_S
    if baseline:
        clock_limit_s = settings.budget_s + look_limit_s(baseline) + 2 * slack_s(settings.budget_s, baseline)
        limits = startup_limit_s(baseline, settings.budget_s), clock_limit_s, 20 * (baseline.saving_seconds or 0.0) + 60
    free_mb = free_card_mb() if settings.device == "cuda" else None

    def on_clock():
        if settings.compile:
            set_cache_aside(place.folder, program, folder / "cache")
        hand_over_text(place, folder)
        view.enter("training")

    view.begin(title, folder)
    command = child_command("train", folder, place.sandbox)
    try:
        ended = run_child(command, folder / "run.log", limits, on_clock, place.stop)
    finally:
        remove(folder / "text")
        place.last_exit = time.perf_counter()
    crash, metrics = ended.crash, {}
    if not crash:
        try:
            metrics = read_result(folder / "out" / "result.json", settings.profile.memory_gb, settings.budget_s)
        except FileNotFoundError:
            crash = "train.py ended without a call of run.finish; see run.log"
        except (OSError, ValueError) as error:
            crash = f"no valid result.json: {error}"
    return Run(
        program, seed, crash=crash, metrics=metrics, run_seconds=ended.seconds, clock_seconds=ended.clock_seconds, idle_seconds=idle_s,
        saving_seconds=ended.saving_seconds, weights_bytes=bytes_on_disk(folder / "out" / "model.pt"), free_mb=free_mb,
    )  # fmt: skip


def bytes_on_disk(path: Path) -> int | None:
    """Bytes that a file takes, holes not counted: a run that leaves a large hole has saved nothing. None if it is not there."""
    if not os.path.lexists(path):
        return None
    info = os.lstat(path)
    return min(info.st_size, 512 * info.st_blocks)


def wait_until_ready(place: Place, best: Run | None) -> None:
    """Waits for the card. Raises Problem if harness or data are gone or the disk is full, OutOfTime if --hours ends first.

    What a run needs is what the incumbent's allocator had reserved at most, and what CUDA itself takes.
    """
    place.refuse_missing()
    check_disk(place.folder)
    peak_mb = best and (best.metrics.get("reserved_vram_mb") or best.metrics.get("peak_vram_mb"))
    if peak_mb is not None:
        needed_mb = min(peak_mb + CARD_CONTEXT_MB, 0.98 * (best.free_mb or math.inf))
        wait_for_card(needed_mb, place.say, lambda: place.stop.is_set() or place.out_of_time)


def make_folder(place: Place, folder: Path, source: str, seed: int, baseline: Run | None, cold: bool = False) -> None:
    """An empty run folder with train.py, run.json and, unless it is to start cold, a compile cache to begin with.

    Later runs take the attention backend and the micro-batch that the baseline chose.
    """
    make_run_folder(folder)
    (folder / "train.py").write_text(source)
    chosen = baseline.metrics if baseline else {}
    chosen = {"attention": chosen.get("backend"), "micro_rows": chosen.get("micro_rows")}
    (folder / "run.json").write_text(json.dumps({"seed": seed, "chosen": chosen}))
    if place.settings.compile and not cold:
        copy_regular_files(cache_for(place.folder, sha256(source)), folder / "cache", OUT_BYTES)


def score(place: Place, run: Run, folder: Path, references: References) -> Run:
    """The run with what the scorer measures of its weights.

    What might be a win, or has another seed than the night's, is probed, and measured on test but on the second seed.
    """
    log, baseline, best = folder / "score.log", references.baseline, references.incumbent
    below = best.val_bpb if best and run.seed == constants.SEED else math.inf
    limit_s = min(SCORE_LIMIT_S, 2 * baseline.scoring_seconds + 3) if baseline else SCORE_LIMIT_S
    children = {action: child_command(action, folder, place.sandbox).argv for action in ("evaluate", "answer")}
    more = ("--below", repr(below), "--children", json.dumps(children))
    more += ("--no-test",) if run.seed == constants.CONFIRM_SEED else ()
    ended = run_child(child_command("score", folder, None, more), log, (limit_s,), stop=place.stop)
    place.last_exit = time.perf_counter()
    crash = ended.crash
    if crash.startswith("time-out") and baseline:
        crash += f": the baseline's took {baseline.scoring_seconds:.0f} s, and twice that is allowed"
    if crash:
        return replace(run, crash=f"scoring: {crash}")
    try:
        scores = json.loads((folder / "score.json").read_bytes())
        for name in ("val_bpb", "test_bpb"):
            none = scores[name] is None and name == "test_bpb"
            if not none and not (isinstance(scores[name], float) and 0 < scores[name] < 64):
                raise ValueError(f"{name} is {scores[name]!r}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        return replace(run, crash=f"scoring gave no number: {error}")
    return replace(
        run, val_bpb=scores["val_bpb"], test_bpb=scores["test_bpb"], distrust=clean(str(scores["invalid"]))[:500],
        scoring_seconds=ended.seconds, parts=scores["seconds"], probe=scores.get("probe", {}),
    )  # fmt: skip
