"""The next proposal: who is asked, until one passes the screen, beside the runs; and a person's own train.py."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from constants import Problem
from lab.propose.screen import screen
from lab.record.night import Night
from lab.records import DESCRIPTION_CHARS, Proposal, Rejected, Result, fingerprint, one_line


@dataclass(frozen=True)
class History:
    """A night at one moment, as a proposer sees it; all that only grows it asks of the night."""

    night: Night
    results: tuple[Result, ...]
    running: tuple[Proposal, ...] = ()  # what trains meanwhile and has no result
    more: int | None = None  # about how many experiments follow this one; None: until it is stopped

    @property
    def number(self) -> int:
        """Of the experiment to propose."""
        return len(self.results) + len(self.running)

    @property
    def rejects(self) -> int:
        """Proposals for it that were refused."""
        return sum(row["number"] == self.number for row in self.night.journal.of("reject"))

    @property
    def incumbent(self) -> Result | None:
        """What the proposal is made on; None while the baseline trains."""
        return next((result for result in reversed(self.results) if result.verdict.word == "keep"), None)


class Proposer:
    """Who proposes. A subclass has a `name` and propose(source, history, feedback) -> Proposal | None, which raises Rejected for what is none."""

    exhausted = "nothing is left to propose"  # why it proposes nothing more, once propose() has returned None
    max_rejects = 20  # proposals for one experiment that may be refused before the night stops

    def between_runs(self, number: int) -> bool:
        """Whether it is asked for that experiment between runs, not while one trains."""
        return True


def propose(night: Night, proposer: Proposer, history: History, feedback: list[str]) -> Proposal | None:
    """A proposal that passes the screen, journalled; None if the proposer has nothing left. Raises Problem.

    An objection goes back to the proposer as feedback. The background thread may be here.
    """
    parent, refused, feedback = history.incumbent, 0, list(feedback)
    source = night.source(parent.number) if parent else night.baseline.source
    while refused < proposer.max_rejects:
        start, proposal = time.perf_counter(), None
        try:
            proposal = proposer.propose(source, history, feedback)
            if proposal is None:
                return None
            screen(proposal.source, night.tried)
        except Rejected as objection:
            feedback, refused = [*feedback, str(objection)], refused + 1
            night.journal.append(
                "reject", number=history.number, proposer=proposer.name, reason=str(objection),
                description=proposal.description if proposal else "",
            )  # fmt: skip
            continue
        proposal = replace(proposal, proposer=proposer.name, parent=parent.number if parent else 0)
        return night.add_proposal(proposal, history.number, seconds=time.perf_counter() - start)
    raise Problem(f"{refused} proposals in a row were refused, the last with: {feedback[-1]}; the journal has them all")


class Proposals:
    """The next proposal of a night, made by a daemon thread while experiments train: Ctrl-C never waits for a reply."""

    def __init__(self, night: Night, proposer, left: Callable[[list[Proposal]], int | None]):
        """left(running): about how many more experiments may begin while these run; None: no limit."""
        self.night, self.proposer, self.left, self.thread = night, proposer, left, None
        self.made, self.error, self.exhausted, self.feedback = None, None, False, []

    def take(self, running: list[Proposal]) -> Proposal | None:
        """The next one, on top of the present incumbent; None while it is being made, and once nothing is left (`exhausted`).

        Raises what stopped the proposer, when nothing runs any more.
        """
        night, name = self.night, self.proposer.name
        if not night.incumbent:
            return None if running or night.results else night.baseline
        if self.thread and not self.thread.is_alive():
            self.thread = None
        number = night.begun(running)
        prepared = self.made if name == "try" else night.unused_proposal(name, running)
        self.made = None
        if prepared:
            try:
                with night.deciding:
                    return rebased(night, prepared, number)
            except Rejected as refused:
                reason = f"no longer applies: {refused}"
                night.journal.append(
                    "reject", number=number, proposer=name, proposal=prepared.id, reason=reason,
                    description=prepared.description,
                )  # fmt: skip
                night.remove_files(prepared.source)
                self.feedback.append(f"{prepared.description}: {reason}")
        if self.error and not running:
            raise self.error
        if not (self.thread or self.error or self.exhausted):
            self.begin(running)
        return None

    def pause(self) -> None:
        """Waits until it is made, with nothing else to do, or until the night or --hours end."""
        while self.thread and self.thread.is_alive() and not (self.night.stop.is_set() or self.night.out_of_time):
            self.thread.join(0.05)

    def ahead(self, running: list[Proposal]) -> None:
        """Begins to make the one after these, if there is room for it, the proposer is asked while they train, and none waits."""
        if self.left(running) == 0:
            return
        waits = self.thread or self.night.unused_proposal(self.proposer.name, running)
        if not waits and not self.proposer.between_runs(self.night.begun(running)):
            self.begin(running)

    def begin(self, running: list[Proposal]) -> None:
        left, feedback, results = self.left(running), self.feedback, tuple(self.night.results)
        more, recorded = None if left is None else max(0, left - 1), {result.proposal for result in results}
        history = History(
            self.night, results, tuple(proposal for proposal in running if proposal.id not in recorded), more
        )

        def body():
            try:
                self.made = propose(self.night, self.proposer, history, feedback)
                self.exhausted = self.made is None
            except BaseException as error:
                self.error = error
                if isinstance(error, Problem) and running:
                    self.night.say(f"nothing more is proposed: {one_line(str(error))}; what runs now is finished first")

        self.made, self.feedback = None, []
        self.thread = threading.Thread(target=body, daemon=True)
        self.thread.start()


def rebased(night: Night, proposal: Proposal, number: int) -> Proposal:
    """The proposal on top of the present incumbent, taken note of as one that runs now.

    Raises Rejected if it does not merge, or is no longer new.
    """
    best = night.incumbent
    stale = proposal.parent != best.number
    if stale:
        base, ours, old = night.source(proposal.parent), night.source(best.number), proposal.source
        source = night.repository.merge(base, ours, old)
        proposal = replace(proposal, source=source, parent=best.number)
    screen(proposal.source, night.tried)
    if stale:  # what will run stands in the journal: the last row of a proposal counts
        night.journal.append("proposal", number=number, **vars(proposal))
        night.remove_files(old)
    night.tried[fingerprint(proposal.source)] = f"an experiment that runs now: {proposal.description}"
    return proposal


# ---------------------------------------------------------------------------
# try: the checkout's train.py


class Try(Proposer):
    """One proposal: the checkout's train.py, as a person or a coding agent left it."""

    name, exhausted = "try", "tried"

    def __init__(self, description: str, hypothesis: str, source: str):
        self.description = one_line(description)[:DESCRIPTION_CHARS]
        self.hypothesis, self.source, self.proposed = one_line(hypothesis)[:2_000], source, False

    def propose(self, source: str, history: History, feedback: list[str]) -> Proposal | None:
        if feedback:
            raise Problem(f"train.py was not run: {feedback[-1]}")
        if self.proposed:
            return None
        if source == self.source:
            raise Problem("train.py is the night's incumbent, unchanged; edit it, then run the same command")
        self.proposed = True
        return Proposal(self.description, self.hypothesis, self.source)
