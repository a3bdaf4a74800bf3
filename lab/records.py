"""The records of a night, and the pure rules about them: which run counts, and what a child's text may hold."""

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

MERGE = "merge"  # the operator of an experiment that adds an earlier gain to the incumbent
DESCRIPTION_CHARS = 200  # of a proposal's description: it is the title of a commit
RUN_AGAIN = "then run the same command: it goes on where it stopped"


class Rejected(Exception):
    """Why a proposal is not run. The message goes back to its proposer."""


class OutOfTime(Exception):
    """--hours are used up; the message says what was waited for."""


@dataclass(frozen=True)
class Proposal:
    """A proposed train.py and its description. Not run yet."""

    description: str
    hypothesis: str
    source: str
    operator: str = ""  # improve, explore, tune or merge; empty if nobody asked for one of them
    mends: int | None = None  # the experiment that it mends (a crash, a near-miss of `explore`) or adds (merge)
    id: int = 0  # counts the proposals of a night
    proposer: str = ""
    parent: int | None = None  # the experiment that it was made against


@dataclass(frozen=True)
class Run:
    """One training and scoring of (source, seed)."""

    source: str  # sha256 of train.py
    seed: int
    val_bpb: float | None  # None: it has no number
    test_bpb: float | None  # measured only for the baseline, for wins, and by --check and --ablate
    crash: str  # why there is no number; else empty
    distrust: str  # why the scorer does not trust the number; else empty
    metrics: dict  # what the run says of itself: shown; it can make its own verdict worse, never better
    run_seconds: float  # start to exit
    clock_seconds: float | None  # from clock start to exit, by our own watch; None if the clock never started
    scoring_seconds: float | None
    idle_seconds: float | None  # from the last child's exit to this one's start; None for a first run
    free_mb: float | None = None  # free memory of the card before it started
    worker: int | None = None  # which of several

    @property
    def number(self) -> str:
        """val_bpb as people read it; empty if there is none."""
        return "" if self.val_bpb is None else f"{self.val_bpb:.6f}"


@dataclass(frozen=True)
class Rivals:
    """What a run is measured beside; None until there is one."""

    baseline: Run | None
    incumbent: Run | None


@dataclass(frozen=True)
class Verdict:
    word: str  # keep, discard, crash, invalid
    reason: str = ""


@dataclass(frozen=True)
class Result:
    """A finished experiment: the journal's `result` row."""

    number: int
    parent: int | None  # the incumbent that it was made on; None for the baseline
    rival: int | None  # the incumbent when it was judged: with one worker the same
    proposal: int  # its id
    description: str
    hypothesis: str
    operator: str
    mends: int | None
    verdict: Verdict
    run: Run
    second: tuple[float | None, float | None] | None  # val_bpb on the second seed, its own and the incumbent's
    commit: str
    fingerprint: str  # of the program: no proposal repeats it

    def row(self) -> dict:
        """One flat dict, as the journal has it: `verdict` is the word, `reason` its reason; the run's fields stand beside them."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("verdict", "run")}
        return {**own, "verdict": self.verdict.word, "reason": self.verdict.reason, **asdict(self.run)}

    @staticmethod
    def of(row: dict) -> "Result":
        own = {field.name: row[field.name] for field in fields(Result) if field.name not in ("verdict", "run")}
        second = None if row["second"] is None else tuple(row["second"])
        return Result(**{**own, "second": second}, verdict=Verdict(row["verdict"], row["reason"]), run=run_of(row))


def run_of(row: dict) -> Run:
    """The Run in a `run` or `result` row."""
    return Run(**{field.name: row[field.name] for field in fields(Run)})


def pace_text(run: Run, other: Run) -> str:
    """How many more tokens a run read than another, as a share: `-6 %`; empty if one of them does not say."""
    own, theirs = run.metrics.get("total_tokens_M"), other.metrics.get("total_tokens_M")
    return f"{100 * (own / theirs - 1):+.0f} %" if own and theirs else ""


# ---------------------------------------------------------------------------
# Which runs count

# A start without a sandbox may take the baseline's times this, since each halving of the micro-batch compiles anew, and this.
STARTUP_FACTOR, STARTUP_S = 3.0, 60.0


def trouble(run: Run, baseline: Run | None, budget_s: float, sandboxed: bool = True) -> str:
    """Why a run's number cannot be trusted; empty if it can. The time rules compare it with the baseline's run.

    Before the clock there is no text in the sandbox, so that only a run without one has to start as fast as the baseline.
    """
    if run.distrust:
        return run.distrust
    trained, steps = run.metrics.get("training_seconds") or 0.0, run.metrics.get("num_steps") or 1
    if trained > budget_s + max(0.01 * budget_s, trained / steps):
        return f"trained {trained:.1f} s of {budget_s:g} s: its last step took far longer than the others; was the machine busy?"
    if run.clock_seconds is None:
        return "its clock was never started"
    if baseline is None:
        return ""
    saving = baseline.clock_seconds - (baseline.metrics.get("training_seconds") or budget_s)
    if run.clock_seconds > budget_s + saving + overrun_s(budget_s):
        return f"ran for {run.clock_seconds:.0f} s after its clock started, {saving:.0f} s of them for saving; the budget is {budget_s:g} s"
    startup, usual = run.run_seconds - run.clock_seconds, baseline.run_seconds - baseline.clock_seconds
    if not sandboxed and startup > STARTUP_FACTOR * usual + STARTUP_S:
        return f"started for {startup:.0f} s, the baseline {usual:.0f} s"
    if (run.scoring_seconds or 0.0) > 2 * baseline.scoring_seconds + 10:
        return f"scoring took {run.scoring_seconds:.0f} s, the baseline's {baseline.scoring_seconds:.0f} s"
    return ""


def overrun_s(budget_s: float) -> float:
    """Seconds by which a run may outlast its budget and the baseline's saving: a stalled step, larger weights to save."""
    return max(5.0, 0.02 * budget_s)


# ---------------------------------------------------------------------------
# Text of children


def clean(raw: bytes | str) -> str:
    """Plain lines: no escape sequences, no control characters, of `\\r` lines only the last state."""
    text = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
    text = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.)", "", text)
    lines = (line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))
    return "\n".join("".join(c for c in line if c.isprintable() or c == "\t") for line in lines)


def one_line(text: str) -> str:
    return " ".join(clean(text).split())


def log_tail(path: Path, size: int = 4_000) -> list[str]:
    """The last non-empty lines of a log, cleaned; none if there is no log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - size))
            return [line for line in clean(file.read()).split("\n") if line.strip()]
    except FileNotFoundError:
        return []
