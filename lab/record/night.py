"""A night's folder: journal, resume, recording, results.tsv. The journal is the record; everything else is derived from it."""

import os
import re
import stat
import threading
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from pathlib import Path

import constants
from constants import Problem, write_atomically
from lab.measure.files import remove
from lab.measure.place import HARNESS, Place
from lab.measure.run import RESULT_BYTES, measure_at, settle_cache
from lab.record.git import Repository
from lab.record.journal import Journal
from lab.records import (
    Proposal,
    References,
    Result,
    Run,
    Verdict,
    clean,
    fingerprint,
    log_tail,
    of_row,
    one_line,
    run_trouble,
    runs_of,
    sha256,
    uneven,
)

OWN_BYTES, OWN_LINES = 64_000, 6  # of a run's log, to find the lines that are train.py's own
USUAL = re.compile(r"profile \w+, |step +\d+ |<<autoresearch|attention: ")  # lines of every run


# ---------------------------------------------------------------------------
# The night


@dataclass
class Night(Place):
    """An opened night. It runs nothing itself. agent.py sets sandbox, say and until, lab/record/start.py confirm."""

    journal: Journal
    repository: Repository
    baseline: Proposal
    _: KW_ONLY
    confirm: bool = False  # whether a win is measured on the second seed too
    tried: dict[str, str] = field(default_factory=dict)  # fingerprint of each program: what became of it
    results: list[Result] = field(default_factory=list)
    adding: threading.Lock = field(default_factory=threading.Lock)  # while a proposal or a run gets its id
    deciding: threading.Lock = field(default_factory=threading.Lock)  # one verdict after the other

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
        runs = [run for run in self.runs.values() if run.source == first.source]
        runs = [first, *(run for run in runs if not run.crash and run.saving_seconds is not None)]
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
    def references(self) -> References:
        """The runs that bound a new one and that it has to beat, as of now."""
        return References(self.baseline_run, self.incumbent and self.incumbent.run)

    def source(self, number: int) -> str:
        """train.py of an experiment."""
        return self.repository.source(self.results[number].commit)

    # --- runs and proposals

    def begun(self, running: list[Proposal]) -> int:
        """How many experiments have a result or are among `running`, of which some may just have been recorded."""
        return len({result.proposal for result in self.results} | {proposal.id for proposal in running})

    @property
    def runs(self) -> dict[int, Run]:
        return runs_of(self.journal.rows)

    @property
    def baseline_second(self) -> float | None:
        """The baseline's val_bpb on the second seed; None if it was not measured there."""
        if not self.keeps:
            return None
        first = self.keeps[0].run
        found = self.runs_on(first.source, constants.CONFIRM_SEED)
        # The first that is even, else the first: a busy machine had it run again.
        even = min(found, key=lambda run: uneven(run, first), default=None)
        return even and even.val_bpb

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

    def runs_on(self, source: str, seed: int) -> list[Run]:
        """Those of this source (its sha256) and seed that count: they are not repeated."""
        return [
            run for run in self.runs.values() if (run.source, run.seed) == (source, seed) and not self.run_trouble(run)
        ]

    def run_trouble(self, run: Run) -> str:
        """Why a run's number does not count; empty if it does."""
        return run.crash or run_trouble(run, self.baseline_run, self.settings.budget_s)

    def add_proposal(self, proposal: Proposal, number: int, **more) -> Proposal:
        """Journals a proposal for experiment `number`, with its id. Any thread may."""
        with self.adding:
            proposal = replace(proposal, id=len({row["id"] for row in self.journal.of("proposal")}))
            self.journal.append("proposal", number=number, **asdict(proposal), **more)
        return proposal

    @property
    def open_proposals(self) -> list[Proposal]:
        """Those with neither a result nor a reject, oldest first. The last row of each counts."""
        used = {row["proposal"] for row in self.journal.of("result", "reject") if "proposal" in row}
        rows = {row["id"]: row for row in self.journal.of("proposal")}
        return [of_row(Proposal, row) for id, row in sorted(rows.items()) if id not in used]

    def unused_proposal(self, proposer: str, running: list[Proposal]) -> Proposal | None:
        """The first open one of this proposer that does not run."""
        ids = {proposal.id for proposal in running}
        own = (proposal for proposal in self.open_proposals if proposal.proposer == proposer)
        return next((proposal for proposal in own if proposal.id not in ids), None)

    def add_run(self, run: Run) -> Run:
        """Journals a run, whether it counts or not; returns it with its id. Any thread may."""
        with self.adding:
            run = replace(run, id=len(self.journal.of("run")))
            self.journal.append("run", **vars(run))
        return run

    @property
    def notes(self) -> str:
        """What the model wrote for itself."""
        path = self.folder / "notes.md"
        return path.read_text() if path.exists() else ""

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

    def record(self, proposal: Proposal, run: Run, verdict: Verdict, second: tuple[Run, Run] | None = None) -> Result:
        """Commit the experiment, append its row, move the refs, write results.tsv: in this order a stop loses nothing."""
        best, parent, kept = self.incumbent, self.parent_of(proposal), verdict.word == "keep"
        title = f"{one_line(proposal.description)} ({verdict.word}, {run.number or 'no number'})"
        message = "\n".join((title, "", clean(proposal.hypothesis), verdict.reason)).strip()
        files = {"train.py": proposal.source}
        if parent is None:  # the branch reproduces: it holds the rules that the night runs under
            files |= {place: (self.folder / "harness" / name).read_text() for name, place in HARNESS.items()}
        commit = self.repository.commit(parent.commit if parent else self.settings.head, files, message)
        settle_cache(self.folder, run.source, kept)
        result = Result(
            len(self.results), parent and parent.number, proposal.id, proposal.description, proposal.hypothesis, proposal.operator,
            proposal.mends, verdict, run, second, commit, fingerprint(proposal.source),
        )  # fmt: skip
        self.journal.append("result", **result.row(), sandbox=self.tier)
        if kept:
            self.repository.move(self.branch, commit, best.commit if best else None)
        self.repository.git("update-ref", self.ref(result.number), commit)
        self.remember(result)
        self.write_results_tsv()
        self.tidy()
        return result

    def parent_of(self, proposal: Proposal) -> Result | None:
        """The experiment that a proposal was made on; None for the baseline."""
        return None if proposal.parent is None else self.results[proposal.parent]

    def remove_files(self, source: str) -> None:
        """Removes what was made of a program that will not be an experiment."""
        settle_cache(self.folder, sha256(source), kept=False)
        remove(self.arrived(sha256(source)))

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
        """Where the files of a run of a source (its sha256) lie until it is judged: meanwhile others may run, also after a stop."""
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
            if (path.name == "result.json" and small) or (path.name == "model.pt" and last is best):
                path.chmod(0o644)  # whatever the child set
            else:
                remove(path)
        nats = self.run_folder(last.number) / "nats.npy"
        if last is best and nats.exists():
            os.replace(nats, self.folder / nats.name)
        nats.unlink(missing_ok=True)
        for earlier in self.keeps[:-1]:
            (self.run_folder(earlier.number) / "out" / "model.pt").unlink(missing_ok=True)

    def recover(self) -> None:
        """Makes refs, view and folders agree with the journal after a stop at any instant. Raises Problem."""
        self.repository.refuse_checked_out(self.branch)
        runs = self.runs
        for row in self.journal.of("result"):
            self.remember(Result.of(row, runs))
        refs, keeps = self.repository.refs(self.tag), self.keeps
        for result in self.results:
            if refs.get(self.ref(result.number)) != result.commit:
                self.repository.git("update-ref", self.ref(result.number), result.commit)
        if keeps and refs.get(self.branch) != keeps[-1].commit:
            self.repository.move(self.branch, keeps[-1].commit, keeps[-2].commit if len(keeps) > 1 else None)
        if self.results:
            self.tidy()
        awaited = {sha256(proposal.source)[:16] for proposal in self.open_proposals}
        for left in (*self.folder.glob("cache-*"), *self.folder.glob("arrived-*")):
            if left.name.partition("-")[2] not in awaited:
                remove(left)
        self.write_results_tsv()


def read_checkout(here: Path, name: str) -> str:
    """A file of the checkout. Raises Problem."""
    try:
        return (here / name).read_text(encoding="utf-8-sig")  # Python takes a byte order mark too
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"{name} cannot be read ({error}); run: git checkout -- {name}") from None


def measure(night: Night, make_run, source: str, seed: int, title: str, fresh: bool = False) -> Run:
    """Trains and scores a program on a seed: the one way to do so. Blocks; any thread may. Raises Problem, Stopped, OutOfTime.

    make_run(source, seed, title) -> Run is made here or by a fleet. A (source, seed) whose run counts stands in the journal and is
    not repeated, unless `fresh`.
    """
    known = [] if fresh else night.runs_on(sha256(source), seed)
    return known[0] if known else night.add_run(make_run(source, seed, title))


def make_run_here(night: Night, view, source: str, seed: int, title: str) -> Run:
    """A run on this process's device, in the folder of the experiment that it may become."""
    folder = night.run_folder(len(night.results)) if seed == constants.SEED else night.folder / "second"
    run = measure_at(night, view, folder, source, seed, title, night.references)
    if seed == constants.SEED:
        remove(night.arrived(run.source))
        if folder.exists():
            os.replace(folder, night.arrived(run.source))
    return run
