"""--replay: the experiments of an earlier night again, one after the other, each merged into the incumbent of this night."""

import math
from dataclasses import replace
from pathlib import Path

from constants import Problem
from lab.propose.ahead import History, Proposer
from lab.record.journal import read_journal
from lab.record.night import Night
from lab.records import Proposal


class Replay(Proposer):
    """The experiments of another night's journal in order: each change is merged into the incumbent of this night."""

    name, exhausted, max_rejects = "replay", "the replay is complete", math.inf  # it comes to an end

    def __init__(self, night: Night, proposals: list[tuple[Proposal, str]]):
        """proposals: each with the source of its parent in its own night."""
        self.night = night
        own = [row for row in night.journal.of("proposal", "reject") if row["proposer"] == self.name]
        rejected = sum(row["event"] == "reject" and "proposal" not in row for row in own)  # at once
        taken = {row["id"] for row in own if row["event"] == "proposal"}
        self.queue = proposals[rejected + len(taken) :]

    def propose(self, source: str, history: History, feedback: list[str]) -> Proposal | None:
        if not self.queue:
            return None
        proposal, base = self.queue.pop(0)
        return replace(proposal, source=self.night.repository.merge(base, source, proposal.source))


TO_REPLAY = "--replay takes a night's tag or its journal, such as runs/nov23/journal.jsonl"


def rows_to_replay(runs: Path, name: str) -> list[dict]:
    """The journal of a night, by its tag or its path. Raises Problem if there is none."""
    path = next((place for place in (runs / name / "journal.jsonl", Path(name)) if place.is_file()), None)
    if path is None:
        raise Problem(f"{name} is no night; {TO_REPLAY}")
    try:
        return read_journal(path)[0]
    except Problem as problem:
        raise Problem(f"{str(problem).partition(';')[0]}; {TO_REPLAY}") from None


def proposals_to_replay(rows: list[dict], kept_only: bool) -> list[tuple[Proposal, str]]:
    """(proposal, its parent's source) of the experiments of a night. Raises Problem if there are none."""
    sources = {row["id"]: row["source"] for row in rows if row["event"] == "proposal"}
    results = [row for row in rows if row["event"] == "result"]
    of_number = {row["number"]: sources[row["proposal"]] for row in results}
    wanted = [row for row in results[1:] if row["verdict"] == "keep" or not kept_only]
    if not wanted:
        what = "kept nothing but its baseline; without --kept all are run" if results[1:] else "has no experiments"
        raise Problem(f"the night to replay {what}; {TO_REPLAY}")
    return [
        (Proposal(row["description"], row["hypothesis"], of_number[row["number"]]), of_number[row["parent"]])
        for row in wanted
    ]
