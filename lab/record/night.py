"""A night's folder: journal, resume, recording, results.tsv. The journal is the record; everything else is derived from it."""

import math
import os
import re
import stat
import threading
from collections.abc import Callable
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

import constants
from constants import Problem, Settings, write_atomically
from lab.measure import cache
from lab.measure.child import interrupts
from lab.measure.files import remove
from lab.measure.place import HARNESS, Place
from lab.measure.run import RESULT_BYTES, measure_at
from lab.record.git import Repository
from lab.record.journal import Journal
from lab.records import MERGE, Proposal, Result, Rivals, Run, clean, log_tail, one_line, run_of, sha256, trouble

STUCK_AFTER = 15  # experiments without a keep before a new direction is asked for
MAX_MENDED = 2  # attempts to mend one crashed idea
OWN_BYTES, OWN_LINES = 64_000, 6  # of a run's log, to find the lines that are train.py's own
USUAL = re.compile(r"profile \w+, |step +\d+ |<<autoresearch|attention: ")  # lines of every run
CRASHING_AFTER = 10  # crashes in a row before another direction is asked for


# ---------------------------------------------------------------------------
# The night


@dataclass(frozen=True)
class History:
    """The night as a proposer sees it."""

    number: int  # of the experiment to propose
    rejects: int  # proposals for it that were refused
    results: list[Result]
    sources: dict[int, str]  # train.py of each
    logs: dict[int, str]  # of the last ones: the end of the log of a crash, else what train.py printed of its own
    settings: Settings
    running: tuple[Proposal, ...] = ()  # what trains meanwhile
    noise: str = ""  # how far the baseline's two seeds lie apart
    notes: str = ""  # what the model wrote for itself
    to_mend: Result | None = None  # the last experiment, if it deserves another attempt
    more: int | None = None  # about how many experiments follow this one; None: until it is stopped
    stuck: bool = False
    crashing: bool = False  # nothing but crashes came of late


@dataclass
class Night(Place):
    """An opened night. It runs nothing itself. agent.py sets sandbox, say and out_of_time, lab/record/start.py confirm."""

    journal: Journal
    repository: Repository
    baseline: Proposal
    _: KW_ONLY
    confirm: bool = False  # whether a win is measured on the second seed too
    left_s: Callable[[], float] = lambda: math.inf  # until --hours are used up
    # how many experiments the limits leave room for; None: no limit
    about_left: Callable[[], int | None] = lambda: None
    tried: dict[str, str] = field(default_factory=dict)  # fingerprint of each program: what became of it
    results: list[Result] = field(default_factory=list)
    adding: threading.Lock = field(default_factory=threading.Lock)  # while a proposal gets its id

    @property
    def tag(self) -> str:
        return self.settings.tag

    @property
    def branch(self) -> str:
        return f"refs/heads/autoresearch/{self.tag}"

    def ref(self, number: int) -> str:
        return f"refs/autoresearch/{self.tag}/{number:04d}"

    def run_folder(self, number: int) -> Path:
        return self.folder / f"{number:04d}"

    @property
    def keeps(self) -> list[Result]:
        return [result for result in self.results if result.verdict.word == "keep"]

    @property
    def incumbent(self) -> Result | None:
        return next(reversed(self.keeps), None)

    @property
    def baseline_run(self) -> Run | None:
        """The baseline's run with the shortest times of all runs of it: bounds hang on them, and a machine may be busy.

        But for its start-up, which is that of a cold start.
        """
        if not self.results:
            return None
        first = self.results[0].run
        others = [run_of(row) for row in self.journal.of("run") if row["source"] == first.source]
        runs = [first, *(run for run in others if not run.crash and run.saving_seconds is not None)]
        if first.saving_seconds is None:
            return first
        quick, saving = min(runs, key=lambda run: run.look_seconds), min(run.saving_seconds for run in runs)
        parts = {name: min(run.parts[name] for run in runs if name in run.parts) for name in first.parts}
        metrics = first.metrics | {"training_seconds": quick.metrics.get("training_seconds")}
        whole = first.startup_seconds + quick.clock_seconds + saving
        return replace(
            first, metrics=metrics, run_seconds=whole, clock_seconds=quick.clock_seconds, saving_seconds=saving, parts=parts
        )  # fmt: skip

    @property
    def rivals(self) -> Rivals:
        """The runs that bound a new one and that it has to beat, as of now."""
        return Rivals(self.baseline_run, self.incumbent and self.incumbent.run)

    def source(self, result: Result) -> str:
        return self.repository.source(result.commit)

    # --- runs and proposals

    @property
    def baseline_second(self) -> float | None:
        """The baseline's val_bpb on the second seed; None if it was not measured there."""
        first = self.results[0].run.source if self.results else ""
        second = first, constants.CONFIRM_SEED
        found = [row["val_bpb"] for row in self.journal.of("run") if (row["source"], row["seed"]) == second]
        return found[-1] if found else None  # the last: on a busy machine it was measured again

    @property
    def noise(self) -> float | None:
        """How far the baseline's two seeds lie apart, in bpb; None if it was run on one."""
        return None if self.baseline_second is None else abs(self.results[0].run.val_bpb - self.baseline_second)

    @property
    def noise_text(self) -> str:
        """The same in words; empty if it was run on one."""
        if self.baseline_second is None:
            return ""
        first, second = self.results[0].run.val_bpb, self.baseline_second
        return f"the baseline on two seeds: {first:.6f} and {second:.6f}, {self.noise:.6f} apart"

    def known_run(self, source: str, seed: int) -> Run | None:
        """A run of this source (its sha256) and seed that counts: it is not repeated."""
        rows = [row for row in self.journal.of("run", "result") if (row["source"], row["seed"]) == (source, seed)]
        runs = (run_of(row) for row in rows)
        return next((run for run in runs if self.counts(run)), None)

    def trouble(self, run: Run) -> str:
        """Why a run's number does not count; empty if it does."""
        return run.crash or trouble(run, self.baseline_run, self.settings.budget_s)

    def counts(self, run: Run) -> bool:
        return not self.trouble(run)

    def add_proposal(self, proposal: Proposal, number: int, **more) -> Proposal:
        """Journals a proposal for experiment `number`, with its id. Any thread may."""
        with self.adding:
            proposal = replace(proposal, id=len({row["id"] for row in self.journal.of("proposal")}))
            self.journal.append("proposal", number=number, **asdict(proposal), **more)
        return proposal

    @property
    def used(self) -> set[int]:
        """The ids of the proposals that have a result or a reject."""
        return {row["proposal"] for row in self.journal.of("result", "reject") if "proposal" in row}

    def unused_proposal(self, proposer: str, running: list[Proposal]) -> Proposal | None:
        """The first proposal of this proposer, or merge, with neither a result nor a reject, that does not run either.

        The last row of each counts.
        """
        used = self.used | {proposal.id for proposal in running}
        rows = {row["id"]: row for row in self.journal.of("proposal")}
        own = (row for id, row in sorted(rows.items()) if id not in used)
        return next((proposal_of(row) for row in own if row["proposer"] == proposer or row["operator"] == MERGE), None)

    def lacking(self) -> Result | None:
        """The first keep that the incumbent lacks and that nobody tried to add: the winner was made before it. None with one worker."""
        done = {result.number for result in self.ancestry}
        done |= {row["mends"] for row in self.journal.of("proposal") if row["operator"] == MERGE}
        return next((keep for keep in self.keeps if keep.number not in done), None)

    @property
    def ancestry(self) -> list[Result]:
        """The experiments whose changes the incumbent holds, from the baseline on: with one worker the keeps."""
        chain, number = [], self.incumbent.number
        while number is not None:
            chain.append(self.results[number])
            number = chain[-1].parent
        return chain[::-1]

    def add_run(self, run: Run) -> None:
        """Journals a run, if it counts: it is not repeated."""
        if self.counts(run):
            self.journal.append("run", number=len(self.results), **vars(run))

    def history(self, running: list[Proposal] = ()) -> History:
        """What the next proposal needs to know; `running` are the experiments that train meanwhile."""
        results, number = self.results, len(self.results) + len(running)
        notes, last, left = self.folder / "notes.md", results[-STUCK_AFTER:], self.about_left()
        crashing = only_crashes(results, CRASHING_AFTER)
        return History(
            number=number,
            rejects=sum(row["number"] == number for row in self.journal.of("reject")),
            results=list(results),
            sources={result.number: self.source(result) for result in results},
            logs={result.number: self.log_of(result) for result in results[-5:]},
            settings=self.settings,
            running=tuple(running),
            noise=self.noise_text,
            notes=notes.read_text() if notes.exists() else "",
            to_mend=None if crashing else to_mend(results, running),
            more=None if left is None else max(0, left - 1 - len(running)),
            stuck=len(last) == STUCK_AFTER and not any(result.verdict.word == "keep" for result in last),
            crashing=crashing,
        )

    def log_of(self, result: Result) -> str:
        """The end of a crash's log; of another run what only it printed."""
        failed = "score.log" if result.run.crash.startswith("scoring") else "run.log"
        log = self.run_folder(result.number) / failed
        if result.verdict.word == "crash":
            return "\n".join(log_tail(log)[-20:])
        lines = log_tail(log, OWN_BYTES)
        end = max((i for i, line in enumerate(lines) if line == "---"), default=None)  # the summary of a run follows
        return "\n".join([line for line in lines[:end] if not USUAL.match(line)][-OWN_LINES:])

    # --- recording

    def record(self, result: Result, source: str) -> Result:
        """Commit the experiment, append its row, move the refs, write results.tsv: in this order a stop loses nothing.

        Returns the result with its commit.
        """
        best, word = self.incumbent, result.verdict.word
        title = f"{one_line(result.description)} ({word}, {result.run.number or 'no number'})"
        stale = (
            f"made on experiment {result.parent}, before {result.rival} was kept"
            if result.parent != result.rival
            else ""
        )
        message = "\n".join((title, "", clean(result.hypothesis), result.verdict.reason, stale)).strip()
        onto = best if word == "keep" or best is None else self.results[result.parent]
        files = {"train.py": source}
        if best is None:  # the branch reproduces: it holds the rules that the night runs under
            files |= {place: (self.folder / "harness" / name).read_text() for name, place in HARNESS.items()}
        with interrupts.held():
            commit = self.repository.commit(onto.commit if onto else self.settings.head, files, message)
            cache.settle(self.folder, result.run.source, word == "keep")
            result = replace(result, commit=commit)
            self.journal.append("result", **result.row(), sandbox=self.tier)
            if word == "keep":
                self.repository.move(self.branch, commit, best.commit if best else None)
            self.repository.git("update-ref", self.ref(result.number), commit)
            self.remember(result)
            self.write_results_tsv()
            self.tidy()
        return result

    def remember(self, result: Result) -> None:
        number = result.run.number or "missing"
        outcome = f"experiment {result.number}, {result.verdict.word}, val_bpb {number}: {result.description}"
        self.tried[result.fingerprint] = outcome
        self.results.append(result)

    def write_results_tsv(self) -> None:
        """results.tsv: five columns for people and plotting scripts; a number that does not exist is empty."""
        lines = ["commit\tval_bpb\tmemory_gb\tstatus\tdescription"]
        for result in self.results:
            megabytes = result.run.metrics.get("peak_vram_mb")
            memory = "" if megabytes is None else f"{megabytes / 1024:.1f}"
            lines.append(
                "\t".join(
                    (result.commit[:7], result.run.number, memory, result.verdict.word, one_line(result.description))
                )
            )
        write_atomically(self.folder / "results.tsv", "\n".join(lines) + "\n")

    def arrived(self, source: str) -> Path:
        """Where the files of a worker's run of a source (its sha256) lie until its experiment has a number."""
        return self.folder / f"arrived-{source[:16]}"

    def tidy(self) -> None:
        """Keeps of the last run's output its result.json, and the weights of the incumbent only."""
        last, best = self.results[-1], self.incumbent
        if self.arrived(last.run.source).exists():
            remove(self.run_folder(last.number))
            os.replace(self.arrived(last.run.source), self.run_folder(last.number))
        remove(self.run_folder(last.number) / "cache")
        for path in (self.run_folder(last.number) / "out").glob("*"):
            info = path.lstat()
            small = stat.S_ISREG(info.st_mode) and info.st_size <= RESULT_BYTES
            if not (path.name == "result.json" and small) and not (last is best and path.name == "model.pt"):
                remove(path)
            elif path.name in ("model.pt", "result.json"):
                path.chmod(0o644)  # whatever the child set
        nats = self.run_folder(last.number) / "nats.npy"
        if last is best and nats.exists():
            os.replace(nats, self.folder / nats.name)
        nats.unlink(missing_ok=True)
        for earlier in self.keeps[:-1]:
            (self.run_folder(earlier.number) / "out" / "model.pt").unlink(missing_ok=True)

    def recover(self) -> None:
        """Makes refs, view and folders agree with the journal after a stop at any instant. Raises Problem."""
        self.repository.refuse_checked_out(self.branch)
        for row in self.journal.of("result"):
            self.remember(Result.of(row))
        refs, keeps = self.repository.refs(self.tag), self.keeps
        for result in self.results:
            if refs.get(self.ref(result.number)) != result.commit:
                self.repository.git("update-ref", self.ref(result.number), result.commit)
        at = refs.get(self.branch)
        if keeps and at != keeps[-1].commit:
            before = keeps[-2].commit if len(keeps) > 1 else None
            if at != before:
                how = f"git update-ref {self.branch} {keeps[-1].commit}"
                where = f"autoresearch/{self.tag} is at {str(at)[:9]}, not at the last keep {keeps[-1].commit[:9]}"
                raise Problem(f"{where}; run: {how}, or start another night with --tag NEW")
            self.repository.move(self.branch, keeps[-1].commit, before)
        if self.results:
            self.tidy()
        used = self.used
        open_ones = {sha256(row["source"])[:16] for row in self.journal.of("proposal") if row["id"] not in used}
        for left in (*self.folder.glob("cache-*"), *self.folder.glob("arrived-*")):
            if left.name.partition("-")[2] not in open_ones:
                remove(left)
        self.write_results_tsv()


def proposal_of(row: dict) -> Proposal:
    return Proposal(**{name: row[name] for name in Proposal.__dataclass_fields__})


def to_mend(results: list[Result], running: list[Proposal]) -> Result | None:
    """The model's last idea, if it deserves another attempt and has not got it: a crash twice, an `explore` that lost narrowly once.

    Narrowly: it lost by no more than half of the night's discards did.
    """
    last = next((result for result in reversed(results) if result.operator not in ("tune", MERGE)), None)
    if last is None or not last.operator or last.number in {item.mends for item in (*results, *running)}:
        return None
    if last.verdict.word == "crash":
        attempts, result = 0, last
        while result.mends is not None:
            attempts, result = attempts + 1, results[result.mends]
        return last if attempts < MAX_MENDED else None
    if last.verdict.word == "discard" and last.operator == "explore" and last.mends is None and last.second is None:
        losses = [change_of(results, result) for result in results if result.verdict.word == "discard"]
        return last if change_of(results, last) <= median(losses) else None
    return None


def only_crashes(results: list[Result], count: int) -> bool:
    """Whether the last `count` experiments, and no fewer, all crashed."""
    return [result.verdict.word for result in results[-count:]] == ["crash"] * count


def change_of(results: list[Result], result: Result) -> float | None:
    """val_bpb against the incumbent that it was made on; None without one, or without a number that its verdict believes."""
    if result.parent is None or result.run.val_bpb is None or result.verdict.word not in ("keep", "discard"):
        return None
    return result.run.val_bpb - results[result.parent].run.val_bpb


def read_checkout(here: Path, name: str) -> str:
    """A file of the checkout. Raises Problem."""
    try:
        return (here / name).read_text(encoding="utf-8-sig")  # Python takes a byte order mark too
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"{name} cannot be read ({error}); run: git checkout -- {name}") from None


def measure(night: Night, view, source: str, seed: int, title: str, fresh: bool = False) -> Run:
    """Trains and scores a program on a seed: the one way to do so. Raises Problem, OutOfTime if --hours ends first.

    A (source, seed) whose run counts stands in the journal and is not repeated, unless `fresh`.
    """
    known = None if fresh else night.known_run(sha256(source), seed)
    if known:
        return known
    folder = night.run_folder(len(night.results)) if seed == constants.SEED else night.folder / "trial"
    run = measure_at(night, view, folder, source, seed, title, night.rivals)
    night.add_run(run)
    return run
