"""The records of a night, and the pure rules about them: which run counts, and what a child's text may hold."""

import ast
import hashlib
import math
import re
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

DESCRIPTION_CHARS = 200  # of a proposal's description: it is the title of a commit
UNEVEN = 0.1  # share of tokens by which two runs may differ: more in the baseline's, and it is measured again; in a keep's, it is said
RUN_AGAIN = "then run the same command: it goes on where it stopped"


class Stopped(Exception):
    """The night ends while this was under way: its child is ended, nothing of it is recorded."""


class Rejected(Exception):
    """Why a proposal is not run. The message goes back to its proposer."""


class OutOfTime(Exception):
    """--hours are used up; the message says what was waited for."""


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


parsing = threading.Lock()


def parsed(source: str) -> ast.Module:
    """The syntax tree of a program. One thread after the other: Python 3.11 counts the depth of all in one place (SystemError)."""
    with parsing:
        return ast.parse(source, "train.py")


def fingerprint(source: str) -> str:
    """What tells programs apart: the syntax tree, so that comments and layout make no new idea."""
    return sha256(ast.dump(parsed(source)))


@dataclass(frozen=True)
class Proposal:
    """A proposed train.py and its description. Not run yet."""

    description: str
    hypothesis: str
    source: str
    operator: str = ""  # improve, explore or tune; empty if nobody asked for one of them
    mends: int | None = None  # the experiment that it mends: a crash, a near-miss of `explore`
    id: int = 0  # counts the proposals of a night
    proposer: str = ""
    parent: int | None = None  # the experiment that it was made against


@dataclass(frozen=True)
class Run:
    """One training and scoring of (source, seed)."""

    source: str  # sha256 of train.py
    seed: int
    val_bpb: float | None = None  # None: it has no number
    test_bpb: float | None = None  # measured only for the baseline, for wins, and by --check and --ablate
    crash: str = ""  # why there is no number; else empty
    distrust: str = ""  # why the scorer does not trust the number; else empty
    metrics: dict = field(
        default_factory=dict
    )  # what the run says of itself: shown; it can make its own verdict worse, never better
    run_seconds: float = 0.0  # start to exit
    # from the line that starts its clock to the end of training, by our own watch; None without that line
    clock_seconds: float | None = None
    scoring_seconds: float | None = None
    idle_seconds: float | None = None  # from the last child's exit to this one's start; None for a first run
    saving_seconds: float | None = None  # from there to exit; None if run.finish never said that training was over
    weights_bytes: int | None = None  # of model.pt, on disk
    parts: dict[str, float] = field(default_factory=dict)  # seconds of the parts of its scoring
    probe: dict[str, float] = field(default_factory=dict)  # what the scorer's probe measured
    free_mb: float | None = None  # free memory of the card before it started
    worker: int | None = None  # which of several
    id: int | None = None  # counts the runs of a night, once its row is written

    @property
    def number(self) -> str:
        """val_bpb as people read it; empty if there is none."""
        return "" if self.val_bpb is None else f"{self.val_bpb:.6f}"

    @property
    def seconds(self) -> float:
        """Of training and scoring, start-up and saving included."""
        return self.run_seconds + (self.scoring_seconds or 0.0)

    @property
    def startup_seconds(self) -> float:
        """Start to clock, or to exit if its clock never started."""
        return self.run_seconds - (self.clock_seconds or 0.0) - (self.saving_seconds or 0.0)

    @property
    def look_seconds(self) -> float:
        """From the line that starts its clock to the clock: the rows are opened, the model looked at."""
        return self.clock_seconds - (self.metrics.get("training_seconds") or self.clock_seconds)


@dataclass(frozen=True)
class References:
    """What a run is measured beside; None until there is one."""

    baseline: Run | None
    incumbent: Run | None


@dataclass(frozen=True)
class Verdict:
    word: str  # keep, discard, crash, invalid
    reason: str = ""


@dataclass(frozen=True)
class Result:
    """A finished experiment: the journal's `result` row, which names its runs by their ids."""

    number: int
    parent: int | None  # the experiment that it was made on and judged against; None for the baseline
    proposal: int  # its id
    description: str
    hypothesis: str
    operator: str
    mends: int | None
    verdict: Verdict
    run: Run
    second: tuple[Run, Run] | None  # on the second seed, its own and the incumbent's
    commit: str
    fingerprint: str  # of the program: no proposal repeats it

    def row(self) -> dict:
        """One flat dict, as the journal has it: `verdict` is the word, `reason` its reason, runs are ids."""
        second = self.second and [run.id for run in self.second]
        verdict = {"verdict": self.verdict.word, "reason": self.verdict.reason}
        return vars(self) | verdict | {"run": self.run.id, "second": second}

    @staticmethod
    def of(row: dict, runs: dict[int, Run]) -> "Result":
        second = row["second"] and tuple(runs[id] for id in row["second"])
        verdict = Verdict(row["verdict"], row["reason"])
        return replace(of_row(Result, row), verdict=verdict, run=runs[row["run"]], second=second)


def of_row(kind, row: dict):
    """A Proposal, Run or Result from the journal's row, which may hold more."""
    return kind(**{name: row[name] for name in kind.__dataclass_fields__})


def runs_of(rows: list[dict]) -> dict[int, Run]:
    """All runs of a night, by their ids."""
    return {row["id"]: of_row(Run, row) for row in rows if row["event"] == "run"}


def change_of(results: list[Result], result: Result) -> float | None:
    """val_bpb against the experiment that it was made on; None without one, or without a number that its verdict believes."""
    if result.parent is None or result.run.val_bpb is None or result.verdict.word not in ("keep", "discard"):
        return None
    return result.run.val_bpb - results[result.parent].run.val_bpb


def pace_of(run: Run, other: Run) -> float | None:
    """How many more tokens a run read than another, as a share; None if one of them does not say."""
    own, theirs = run.metrics.get("total_tokens_M"), other.metrics.get("total_tokens_M")
    return own / theirs - 1 if own and theirs else None


def uneven(run: Run, other: Run) -> bool:
    """Whether two runs read so different numbers of tokens that their numbers are hard to compare."""
    return abs(pace_of(run, other) or 0.0) > UNEVEN


def pace_text(run: Run, other: Run) -> str:
    """The same in words: `-6 %`; empty if one of them does not say."""
    pace = pace_of(run, other)
    return "" if pace is None else f"{100 * pace:+.0f} %"


# ---------------------------------------------------------------------------
# Which runs count

MOST_GROWTH = 8.0  # of the weights against the baseline's: more gives no more time to save them
LEAST_CHANGE = {"last_mean_nats": 1e-4, "last_abs_nats": 1e-4}  # of the probe, that is never held against a run
# Of the probe: what two kernels differ by in bfloat16.
ROUNDING = {"mean_nats": 1e-4, "last_mean_nats": 1e-3, "last_abs_nats": 5e-3}
LEAST_SLACK_S = 1.0  # by which any time may exceed its bound: how late a machine at work may be


def run_trouble(run: Run, baseline: Run | None, budget_s: float) -> str:
    """Why a run's number cannot be trusted; empty if it can."""
    return run.distrust or (unlike(run, baseline) if baseline else "") or late(run, baseline, budget_s)


def unlike(run: Run, baseline: Run) -> str:
    """Which difference of its probe is far above that of the baseline, which is rounding alone; empty if none is."""
    rows = baseline.probe.get("rows") or 1
    by_chance = 6 * baseline.probe.get("last_abs_nats", 0.0) / rows**0.5  # of a mean of as many differences with a sign
    for name, least in LEAST_CHANGE.items():
        found, usual = abs(run.probe.get(name, 0.0)), abs(baseline.probe.get(name, 0.0))
        if not found <= max(least, 10 * usual, by_chance):
            where = "its predictions at the edge of the probe change when the target tokens are hidden"
            return f"{where} ({name} {found:.5f}; the baseline's {usual:.5f})"
    return ""


def like_rounding(run: Run, baseline: Run | None) -> bool:
    """Whether a run is distrusted for differences that two kernels make, so that it is scored once more; the baseline too.

    On a CPU one process of some hundred computed in another way: last_abs_nats 0.0014 in the place of 0.0000002, measured.
    """
    if not (run.distrust or unlike(run, baseline or replace(run, probe={}))) or not run.probe:
        return False
    return all(abs(run.probe.get(name, math.inf)) < most for name, most in ROUNDING.items())


def late(run: Run, baseline: Run | None, budget_s: float) -> str:
    """Which bound on time a run exceeds; empty if none. The bounds are the budget and the times of the night's baseline."""
    if run.clock_seconds is None:
        return "its clock was never started"
    if run.saving_seconds is None:
        return "run.finish never said that the training was over"
    trained, slack = run.metrics.get("training_seconds") or 0.0, slack_s(budget_s, baseline or run)
    if trained > budget_s + slack:
        return f"trained {trained:.1f} s of {budget_s:g} s: its last step took far longer than the others; was the machine busy?"
    if baseline is None:
        return ""
    outside = run.clock_seconds - min(run.look_seconds or baseline.look_seconds, look_limit_s(baseline))
    if outside > budget_s + slack:
        return f"trained for {outside:.1f} s by the agent's watch; the budget is {budget_s:g} s"
    if trained and abs(outside - trained) > slack:
        return f"says that it trained {trained:.1f} s, and the agent's watch {outside:.1f} s"
    if run.saving_seconds > (limit := saving_limit_s(run, baseline)):
        return f"took {run.saving_seconds:.1f} s from the end of its training to its exit; {limit:.1f} s are allowed"
    if run.startup_seconds > (limit := startup_limit_s(baseline, budget_s)):
        return f"started for {run.startup_seconds:.0f} s; {limit:.0f} s are allowed, the baseline took {baseline.startup_seconds:.0f} s"
    for part, usual in baseline.parts.items():
        factor = 1.5 if part.startswith("load") else 2.0
        if run.parts.get(part, 0.0) > (limit := factor * usual + LEAST_SLACK_S):
            return f"scoring took {run.parts[part]:.1f} s for its part `{part}`; {limit:.1f} s are allowed, the baseline took {usual:.1f} s"
    return ""


def slack_s(budget_s: float, baseline: Run) -> float:
    """Seconds by which a training may exceed its budget: 1 %, and a step of the baseline."""
    trained = baseline.metrics.get("training_seconds") or 0.0
    step = trained / (baseline.metrics.get("num_steps") or 1)
    return max(LEAST_SLACK_S, 0.01 * budget_s) + min(step, 0.01 * budget_s)


def look_limit_s(baseline: Run) -> float:
    """Seconds that a run may take to open the rows and to look at its model, between the line and the clock."""
    return 2 * baseline.look_seconds + LEAST_SLACK_S


def startup_limit_s(baseline: Run, budget_s: float) -> float:
    """Seconds that a run may take until its clock starts: it could train there on other text that lies about."""
    return 1.5 * baseline.startup_seconds + min(30.0, max(15.0, 0.1 * budget_s))


def saving_limit_s(run: Run, baseline: Run) -> float:
    """Seconds that a run may take to save its weights: twice the baseline's, by bytes up to MOST_GROWTH times as many."""
    growth = min(MOST_GROWTH, max(1.0, (run.weights_bytes or 0) / (baseline.weights_bytes or math.inf)))
    return 2 * growth * (baseline.saving_seconds or 0.0) + LEAST_SLACK_S


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
