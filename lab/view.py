"""The terminal: a header, a line for each experiment, a live line for the running one, the closing summary."""

import os
import re
import time
from functools import partial
from pathlib import Path

import constants
from constants import counted
from lab.machine import speed_advice, speed_text
from lab.measure.files import folder_bytes
from lab.progress import save_progress
from lab.propose.claude import Claude
from lab.propose.model import Researcher
from lab.propose.prompt import OPERATORS, beside_text, step_text
from lab.record.journal import night_runs
from lab.record.night import Night
from lab.records import Result, Run, change_of, log_tail, one_line, pace_of, pace_text, uneven

STYLES = {"keep": "green", "discard": "", "crash": "red", "invalid": "magenta"}


class Lane:
    """What the terminal shows of one run at a time: of this process, or of one of several workers."""

    def __init__(self, view: "View", worker: int | None):
        self.view, self.worker, self.title, self.phase, self.since, self.active = view, worker, "", "", 0.0, False
        self.lines = list  # () -> the last lines of the run's log

    def begin(self, title: str, folder: Path | None) -> None:
        """folder: of the run; None if another process says what its log ends with."""
        self.title, self.since, self.active = one_line(title), time.perf_counter(), True
        self.lines = partial(log_tail, folder / "run.log") if folder else list
        self.enter("starting")

    def enter(self, phase: str) -> None:
        self.phase = phase
        if not self.view.live:
            expected = self.view.expected_s(phase)
            about = f" (about {expected:.0f} s)" if expected else ""
            who = "" if self.worker is None else f"worker {self.worker}: "
            title = f": {self.title}" if phase == "starting" else ""
            self.view.say(f"{'':6}{who}{phase}{about}{title}")

    def end(self) -> None:
        self.active = False
        if self.view.live:
            self.view.live.refresh()  # else what is printed next draws its last frame once more

    @property
    def text(self) -> str:
        """Elapsed bar, loss, tokens a second."""
        line = next((line for line in reversed(self.lines()) if "tok/s" in line), "")
        match = re.search(r"step +(\d{1,9}) +(\d{1,3}\.\d)% +loss ([\d.naif]{1,9}) +([\d,]{1,15}) tok/s", line)
        if match and self.phase == "training":
            done = min(1.0, float(match[2]) / 100)  # the run says so: it may say anything
            return f"{'━' * round(20 * done):─<20} {done:4.0%}  loss {match[3]}  {match[4]} tok/s"
        return self.phase


class View:
    """On a terminal a live line for each run; with redirected output a plain line for each phase of it."""

    def __init__(self, night: Night, proposer, shown: list[Result], workers: int = 0):
        """shown: the finished experiments whose lines are printed at the start. workers: if they train, not this process."""
        from rich.console import Console
        from rich.live import Live

        class Terminal(Console):
            def on_broken_pipe(self):
                raise  # rich would end the program without a word

        self.night, self.proposer, self.shown, self.console = night, proposer, shown, Terminal(highlight=False)
        live = self.console.is_terminal and not self.console.is_dumb_terminal
        if not self.console.is_terminal:
            self.console.width = 240
        self.lanes = [Lane(self, i + 1) for i in range(workers)] or [Lane(self, None)]
        moving = Live(get_renderable=self.render, console=self.console, refresh_per_second=2, transient=True)
        self.live = moving if live else None

    def __enter__(self):
        self.console.print(f"night {self.night.tag}: {self.night.settings.text}", markup=False)
        self.say(f"sandbox: {self.night.tier}, branch autoresearch/{self.night.tag}")
        if self.proposer:
            memory = "  memory" if self.night.settings.device == "cuda" else ""
            self.say("change, tokens: compared with the best at that time")
            self.say(f"{'no.':>4}  {'val_bpb':>9}  {'change':>9}  {'tokens':>6}  {'verdict':8}{memory}  description")
        for result in self.shown:
            self.finished(result)
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exc):
        if self.live:
            self.live.stop()

    def note(self, line: str, style: str = "") -> None:
        """Prints a line beside the experiments, whole."""
        self.say(f"{'':6}{line}", style, wrap=True)

    def say(self, line: str, style: str = "", wrap: bool = False) -> None:
        """Prints a line, cut at the terminal's width unless it may wrap."""
        from rich.text import Text

        self.console.print(Text(line, style=style), no_wrap=not wrap, overflow="fold" if wrap else "ellipsis")

    def expected_s(self, phase: str) -> float | None:
        """How long a phase will take, by the last run that counted; None for the first."""
        if phase == "training":
            return self.night.settings.budget_s
        last = next((run for run in reversed(self.night.runs.values()) if not self.night.run_trouble(run)), None)
        if last is None:
            return None
        return last.scoring_seconds if phase == "scoring" else last.startup_seconds

    def finished(self, result: Result) -> None:
        """The line of a finished experiment, and the reason of its verdict; after the baseline, what the night runs on."""
        word, bpb = result.verdict.word, result.run.val_bpb
        other = None if result.parent is None else self.night.results[result.parent].run
        pace, number = pace_text(result.run, other) if other else "", result.run.number or "-"
        change = f"{bpb - other.val_bpb:+.6f}" if other and bpb is not None else "-"
        memory, megabytes = "", result.run.metrics.get("peak_vram_mb")
        if self.night.settings.device == "cuda":
            memory = f"{'-' if megabytes is None else f'{megabytes / 1024:.1f} GB':>8}"
        text = one_line(result.description)
        self.say(
            f"{result.number:4d}  {number:>9}  {change:>9}  {pace or '-':>6}  {word:8}{memory}  {text}", STYLES[word]
        )
        notes = [one_line(result.verdict.reason)] if result.verdict.reason and result.number else []
        if word == "keep" and result.number and self.night.noise:
            notes.append(f"the baseline's two seeds are {self.night.noise:.6f} apart")
        if notes:
            self.note("; ".join(notes), STYLES[word])
        if word == "keep" and other and (doubt := pace_doubt(result.run, other)):
            self.note(doubt)
        if other and self.proposer and self.proposer.name == "try":
            self.note(beside_text(result.run, other, self.night.settings.budget_s))
            for line in self.night.log_of(result).splitlines():
                self.note(f"it printed: {line}")
        if result.number == 0 and word == "keep":
            metrics = result.run.metrics
            self.note(speed_text(self.night.settings, metrics))
            if metrics.get("step_ms"):
                self.note(f"a step of its warm-up: {step_text(metrics)}")
            if advice := speed_advice(self.night.settings, metrics.get("backend")):
                self.say(f"warning: {advice}", "yellow")

    def render(self):
        """A line for each run: number or worker, what it does, seconds, description; and what the researcher does."""
        from rich.text import Text

        lines = []
        for lane in self.lanes:
            if lane.active:
                who = f"{len(self.night.results):4d}" if lane.worker is None else f"{'w':>3}{lane.worker}"
                lines.append([who, lane.text, f"{time.perf_counter() - lane.since:.0f} s", lane.title])
        if lines and isinstance(self.proposer, Researcher):
            money = f"${self.proposer.spent_usd:.2f}" if self.proposer.spent_usd else ""
            lines[-1][3:3] = filter(None, (self.proposer.status, money))
        width = self.console.width - 3  # room for ^C, which would push the line where nobody erases it
        return Text("\n".join("  ".join(line)[:width] for line in lines), style="cyan")


def pace_doubt(run: Run, other: Run) -> str:
    """What a large difference in tokens means for a keep; empty if there is none."""
    if not uneven(run, other):
        return ""
    program, busy = ("faster", "the earlier run") if pace_of(run, other) > 0 else ("slower", "this run")
    return f"{pace_text(run, other)} tokens: the program is {program}, or the machine was busy during {busy}"


def print_summary(night: Night, why: str, proposer, goes_on: bool) -> None:
    """Best, gain, verdicts, where things are, and the next commands."""
    results, best, tag = night.results, night.incumbent, night.tag
    print(f"\n{why}.")
    if not best:
        print("no baseline yet")
        return
    first, last = results[0].run.val_bpb, best.run.val_bpb
    claim = f"best {last:.6f} (experiment {best.number}), gain {first - last:.6f} on the night's seed"
    print(f"baseline {first:.6f}, {claim if best.number else 'nothing better was kept'}")
    if night.noise_text:
        print(night.noise_text)
    words = [result.verdict.word for result in results[1:]]
    print(f"{counted(len(words), 'experiment')}: " + ", ".join(f"{words.count(word)} {word}" for word in STYLES))
    refused = sum(row["proposer"] == proposer.name for row in night.journal.of("reject"))
    if refused:
        print(f"{counted(refused, 'proposal')} could not be run; the journal says why")
    runs = night_runs(night.journal.rows)
    training = sum(run.metrics.get("training_seconds") or 0.0 for run in runs)
    startup = sum(run.run_seconds - (run.clock_seconds or 0.0) for run in runs)
    scoring, idle = sum(run.scoring_seconds or 0.0 for run in runs), sum(run.idle_seconds or 0.0 for run in runs)
    total = sum(run.seconds for run in runs) + idle
    trained = f"{training:.0f} s of {total:.0f} s ({training / total:.0%})"
    print(f"training {trained}, start-up {startup:.0f} s, scoring {scoring:.0f} s, idle {idle:.1f} s")
    for worker in sorted({run.worker for run in runs} - {None}):
        own = [run for run in runs if run.worker == worker]
        busy, waited = sum(run.seconds for run in own), sum(run.idle_seconds or 0.0 for run in own)
        share = f"{busy:.0f} s of {busy + waited:.0f} s ({busy / (busy + waited):.0%})"
        print(f"worker {worker}: {counted(len(own), 'run')}, busy {share}")
    for operator in OPERATORS:
        own = [result for result in results if result.operator == operator]
        kept = [result for result in own if result.verdict.word == "keep"]
        if own:
            gain = -sum(change_of(results, result) for result in kept)
            print(f"{operator}: {counted(len(own), 'experiment')}, {len(kept)} kept, together {gain:.6f}")
    if isinstance(proposer, Claude):
        print(proposer.bill)
    if night.settings.budget_s < constants.COMPILE_FROM_S:
        for result in night.keeps[1:]:
            print(f"experiment {result.number} was kept: {one_line(result.description)}")
            if doubt := pace_doubt(result.run, results[result.parent].run):
                print(doubt)
        print(f"runs of {night.settings.budget_s:g} s show the loop, not a result: their differences are mostly noise")
    place = os.path.relpath(night.folder)
    try:
        points = [result.row() | vars(result.run) for result in results]
        save_progress(night.folder / "progress.png", points, f"night {tag}")
        picture = f"{place}/progress.png"
    except (ImportError, OSError) as error:
        picture = f"could not be drawn: {one_line(str(error))}"
    print(f"this night takes {folder_bytes(night.folder) / 1e6:,.1f} MB in {place}\n")
    print(f"log        {place}/results.tsv")
    print(f"picture    {picture}")
    print("review     analysis.ipynb, in any notebook program")
    print(f"history    git log --oneline HEAD..autoresearch/{tag}")
    if proposer.name == "try":
        print(f"compare    git diff autoresearch/{tag} -- train.py")
        if why == proposer.exhausted and results[-1].verdict.word != "keep":  # one that was cut short must not be lost
            print(f"put back   git checkout autoresearch/{tag} -- train.py")
    elif best.number:
        print(f"take home  git checkout autoresearch/{tag} -- train.py")
    if goes_on:  # the journal does not hold a program's arguments: there may be a key in them
        again = "the same command" if proposer.name == "command" else f"python agent.py --tag {tag}"
        larger = "  (with a larger --experiments or --hours)" if why.endswith(("done", "used up")) else ""
        print(f"go on      {again}{larger}")
    if best.number:
        print(f"verify     python agent.py --check {tag}")
    if tag == "demo":
        print(
            "what now?  python agent.py --proposer tune --budget 60 --hours 1      an hour of this, in runs that mean more"
        )
        print('           python agent.py --try "what I changed"                     train.py as you edit it')
        print("           export ANTHROPIC_API_KEY=... && python agent.py --hours 9  a night with Claude")
