"""The next proposal: who is asked, until one passes the screen, beside the runs; and a person's own train.py.

A proposer has a `name`, between_runs(number) (whether it is asked for that experiment between runs, not while one trains), `exhausted` (why
it proposes nothing more) and propose(source, history, feedback) -> Proposal | None, which raises Rejected for what is no proposal. It may
have `max_rejects`, how many of its proposals in a row may be refused, in the place of MAX_REJECTS.
"""

import threading
import time
from dataclasses import replace

from constants import SEED, Problem
from lab.propose.screen import fingerprint, screen
from lab.record.night import History, Night
from lab.records import DESCRIPTION_CHARS, MERGE, OutOfTime, Proposal, Rejected, one_line, sha256

MAX_REJECTS = 20  # proposals for one experiment that are refused before the night stops


def propose(night: Night, proposer, history: History, feedback: list[str]) -> Proposal | None:
    """A proposal that passes the screen, journalled; None if the proposer has nothing left. Raises Problem.

    An objection goes back to the proposer as feedback. The background thread may be here.
    """
    parent, refused, feedback = night.incumbent, 0, list(feedback)
    source = night.source(parent) if parent else night.baseline.source
    while refused < getattr(proposer, "max_rejects", MAX_REJECTS):
        start, proposal = time.perf_counter(), None
        asked = replace(history, rejects=history.rejects + refused)
        try:
            proposal = proposer.propose(source, asked, feedback)
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

    def __init__(self, night: Night, proposer):
        self.night, self.proposer, self.thread = night, proposer, None
        self.made, self.error, self.exhausted, self.feedback = None, None, False, []

    def take(self, running: list[Proposal]) -> Proposal | None:
        """The next one, on top of the present incumbent; None while it is being made, and once nothing is left (`exhausted`).

        Raises what stopped the proposer, when nothing runs any more.
        """
        night, name = self.night, self.proposer.name
        if not night.results:
            return None if running else night.baseline
        if self.thread and not self.thread.is_alive():
            self.thread, self.exhausted = None, self.made is None and not self.error
        number = len(night.results) + len(running)
        prepared = self.made if name == "try" else self.merge(number) or night.unused_proposal(name, running)
        if prepared:
            try:
                return self.rebase(prepared, number)
            except Rejected as refused:
                reason = f"no longer applies: {refused}"
                night.journal.append(
                    "reject", number=number, proposer=name, proposal=prepared.id, reason=reason,
                    description=prepared.description,
                )  # fmt: skip
                self.feedback.append(f"{prepared.description}: {reason}")
        if self.error and not running:
            raise self.error
        if not (self.thread or self.error or self.exhausted):
            self.begin(running)
        return None

    def pause(self, give_up) -> None:
        """Waits until it is made, with nothing else to do. Raises OutOfTime once give_up() is true."""
        while self.thread and self.thread.is_alive():
            if give_up():
                raise OutOfTime("waiting for a proposal")
            self.thread.join(0.05)

    def ahead(self, running: list[Proposal]) -> None:
        """Begins to make the one after these, if the proposer is asked while they train and none waits."""
        number = len(self.night.results) + len(running)
        waits = self.thread or self.night.unused_proposal(self.proposer.name, running)
        if not waits and not self.proposer.between_runs(number):
            self.begin(running)

    def begin(self, running: list[Proposal]) -> None:
        history, feedback = self.night.history(running), self.feedback

        def body():
            try:
                self.made = propose(self.night, self.proposer, history, feedback)
            except BaseException as error:
                self.error = error
                if isinstance(error, Problem) and running:
                    self.night.say(
                        f"{'':6}nothing more is proposed: {one_line(str(error))}; what runs now is finished first"
                    )

        self.made, self.feedback = None, []
        self.thread = threading.Thread(target=body, daemon=True)
        self.thread.start()

    def rebase(self, proposal: Proposal, number: int) -> Proposal:
        """The proposal on top of the present incumbent, unless it was trained already and a kill came before its verdict.

        Raises Rejected if it does not merge, or is no longer new.
        """
        night, best = self.night, self.night.incumbent
        stale = proposal.parent != best.number
        if stale and night.known_run(sha256(proposal.source), SEED):
            stale = fingerprint(proposal.source) in night.tried  # a keep that is to be merged, not one that was cut off
        if stale:
            base = night.source(night.results[proposal.parent])
            source = night.repository.merge(base, night.source(best), proposal.source)
            proposal = replace(proposal, source=source, parent=best.number)
        screen(proposal.source, night.tried)
        if stale:  # what will run stands in the journal: the last row of a proposal counts
            night.journal.append("proposal", number=number, **vars(proposal))
        return proposal

    def merge(self, number: int) -> Proposal | None:
        """A keep that the incumbent lacks, as a proposal: the winner was made before it, and ended after it."""
        lacking = self.night.lacking()
        if lacking is None:
            return None
        description = f"experiment {lacking.number} on top of {self.night.incumbent.number}: {lacking.description}"
        proposal = Proposal(description, lacking.hypothesis, self.night.source(lacking), MERGE, lacking.number)
        proposal = replace(proposal, proposer=self.proposer.name, parent=lacking.parent)
        return self.night.add_proposal(proposal, number)


# ---------------------------------------------------------------------------
# try: the checkout's train.py


class Try:
    """One proposal: the checkout's train.py, as a person or a coding agent left it."""

    name, exhausted = "try", "tried"

    def __init__(self, description: str, hypothesis: str, source: str):
        self.description = one_line(description)[:DESCRIPTION_CHARS]
        self.hypothesis, self.source = one_line(hypothesis)[:2_000], source

    def between_runs(self, number: int) -> bool:
        return True

    def propose(self, source: str, history: History, feedback: list[str]) -> Proposal | None:
        if source == self.source:
            raise Problem("train.py is the night's incumbent, unchanged; edit it, then run the same command")
        if feedback:
            raise Problem(f"train.py was not run: {feedback[-1]}")
        return Proposal(self.description, self.hypothesis, self.source)
