"""Beside the night: --check and --ablate, the honest numbers after it, and --dry, a rehearsal before it.

The first two go on where they stopped, since measure repeats no run that counts.
"""

import contextlib
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

from constants import SEED, Problem, counted, device_lock, locked, write_atomically
from lab.measure.child import run_child
from lab.measure.files import remove
from lab.measure.run import STARTUP_LIMIT_S, make_folder
from lab.measure.sandbox import child_command, choose_sandbox
from lab.propose.screen import screen
from lab.record.git import Repository
from lab.record.night import Night, read_checkout
from lab.record.start import open_night
from lab.records import Rejected, Run, log_tail, one_line

CHECK_SEED, ABLATE_SEED = 101, 201  # the first of those that --check and --ablate use, and the night never
CHECK_SEEDS, ABLATE_RUNS = 5, 3


def check(night: Night, seeds: int, measure, say) -> str:
    """Baseline and incumbent on fresh seeds, alternating; says what the night gained. Returns why it ended."""
    from scipy import stats

    first, best = night.results[0], night.incumbent
    sources = {"baseline": night.source(first.number), "incumbent": night.source(best.number)}
    numbers = {name: [] for name in sources}
    for i in range(seeds):
        for name in list(sources)[:: 1 if i % 2 == 0 else -1]:
            title = f"{name} on seed {CHECK_SEED + i}, run {1 + sum(map(len, numbers.values()))} of {2 * seeds}"
            numbers[name].append(test_bpb(night, measure(sources[name], CHECK_SEED + i, title), title, say))
    a, b = numbers.values()
    mean = sum(a) / seeds - sum(b) / seeds
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    low, high = (mean if math.isnan(bound) else float(bound) for bound in (interval.low, interval.high))
    claimed = first.run.val_bpb - best.run.val_bpb
    than = "not distinguishable from" if low <= 0 <= high else "better than" if low > 0 else "worse than"
    word = f"{than} the baseline"
    night.journal.append("check", seeds=seeds, **numbers, claimed=claimed, mean=mean, welch=[low, high], word=word)
    say(f"in the night, on one seed, on val: {claimed:.6f} (experiment {best.number})")
    say(f"on {seeds} fresh seeds, on test: {mean:+.6f}, Welch's 95 % interval {low:+.6f} to {high:+.6f}")
    say(word)
    return f"checked with {2 * seeds} runs"


def ablate(night: Night, measure, say) -> str:
    """Each kept change reverted alone, against three runs of the incumbent; says for each whether it matters. Returns why it ended."""
    keeps = night.keeps
    sources = [night.source(result.number) for result in keeps]
    whole, reference = sources[-1], []
    for i in range(ABLATE_RUNS):
        title = f"incumbent on seed {ABLATE_SEED + i}"
        reference.append(test_bpb(night, measure(whole, ABLATE_SEED + i, title), title, say))
    rows = []
    for before, after, result in zip(sources[:-1], sources[1:], keeps[1:], strict=True):
        row = {"number": result.number, "word": "cannot be reverted alone", "test_bpb": None}
        rows.append(row)
        try:
            source = night.repository.merge(after, whole, before)
            screen(source, {})
        except Rejected:
            continue
        if source != whole:
            title = f"without {result.number}"
            run = measure(source, ABLATE_SEED, title)
            row["word"] = night.run_trouble(run)
            row["test_bpb"] = None if row["word"] else run.test_bpb
            say(f"{title}: {row['word'] or f'test_bpb {run.test_bpb:.6f}'}")
    judged = [row for row in rows if row["test_bpb"] is not None]
    for row, word in zip(judged, words([row["test_bpb"] for row in judged], reference), strict=True):
        row["word"] = word
    night.journal.append("ablate", incumbent=reference, rows=rows)
    say(f"{'no.':>4}  without it")
    for row, result in zip(rows, keeps[1:], strict=True):
        say(f"{row['number']:4d}  {row['word']:24}  {one_line(result.description)}")
    return f"{counted(len(rows), 'kept change')} looked at"


def test_bpb(night: Night, run: Run, title: str, say) -> float:
    """The run's number on test, said aloud. Raises Problem if it does not count."""
    if why := night.run_trouble(run):
        raise Problem(f"{title}: no number that counts ({why}); the same command tries it again")
    say(f"{title}: test_bpb {run.test_bpb:.6f}")
    return run.test_bpb


def words(without: list[float], reference: list[float]) -> list[str]:
    """What each change reverted alone says, by t-tests on the noise of the reference runs, corrected for their number (Holm 1979)."""
    from scipy import stats

    n, mean, noise = len(reference), statistics.mean(reference), max(1e-9, statistics.stdev(reference))
    p_values = [2 * float(stats.t.sf(abs(bpb - mean) / (noise * math.sqrt(1 + 1 / n)), n - 1)) for bpb in without]
    verdicts, order = ["cannot tell"] * len(without), sorted(range(len(without)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        if p_values[i] > 0.05 / (len(without) - rank):
            break
        verdicts[i] = "carries weight" if without[i] > mean else "hurts"
    return verdicts


# ---------------------------------------------------------------------------
# --try --dry


def rehearsal(here: Path, runs: Path, args) -> None:
    """--try --dry: the checkout's train.py through the screen, and as far as its clock, eager; nothing is recorded. Raises Problem.

    With the device locked: nothing trains meanwhile.
    """
    folder = runs / "dry"
    with contextlib.ExitStack() as locks:
        locks.enter_context(locked(folder / "lock", "the rehearsal", "agent.py --dry"))
        try:
            start, repository, source = time.perf_counter(), Repository(here), read_checkout(here, "train.py")
            screen(source, {})
            night = open_night(here, folder, args, repository)
            locks.enter_context(locked(device_lock(night.device_id), "the device", "agent.py --dry"))
            night.settings = replace(night.settings, compile=False)
            write_atomically(folder / "harness" / "night.json", night.settings.json())
            night.sandbox = choose_sandbox(night, here, runs, repository.common_dir, args.no_sandbox, harmless=False)
            if trouble := rehearse(night, source):
                raise Problem(f"train.py does not run:\n{trouble}")
            print(
                f"train.py passes the screen, builds and takes three steps ({time.perf_counter() - start:.0f} s); nothing is recorded"
            )
        finally:
            remove(folder)


class AtTheClock(Exception):
    """A rehearsal came as far as its clock."""


def rehearse(night: Night, source: str) -> str:
    """Builds and warms a program up, without its clock and without text; why that failed, with the end of its log, else empty."""

    def on_clock():
        raise AtTheClock

    folder = night.folder / "dry"
    make_folder(night, folder, source, SEED, night.baseline_run)
    try:
        command = child_command("train", folder, night.sandbox)
        ended = run_child(command, folder / "run.log", (STARTUP_LIMIT_S,), on_clock)
    except AtTheClock:
        return ""
    return "\n".join([*log_tail(folder / "run.log")[-15:], ended.crash or "it ended before its clock started"])
