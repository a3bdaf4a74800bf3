"""Proposers without a model, and how any proposer is asked: until a proposal passes the screen.

A proposer has a `name`, `inline` (asked between runs, not while one trains), `exhausted` (why it proposes nothing more) and
propose(source, history, feedback) -> Proposal | None, which raises Rejected for a reply that is no proposal; one that is not inline
also has `status` and `spent_usd`, for the live view.
"""

import ast
import random
import time
from dataclasses import replace
from pathlib import Path

from constants import Problem
from lab.journal import read_journal
from lab.night import History, Night
from lab.records import Proposal, Rejected, one_line
from lab.screen import screen

MAX_BOUNCES = 3  # objections to one proposal before it is dropped
MAX_DROPPED, MAX_DROPPED_PAID = 20, 5  # proposals dropped in a row before the night stops; of those that cost money


def propose(night: Night, proposer, history: History, feedback: list[str]) -> Proposal | None:
    """A proposal that passes the screen, journalled; None if the proposer has nothing left. Raises Problem.

    An objection goes back to the proposer as feedback. The background thread may be here.
    """
    parent, refused, feedback = night.incumbent, 0, list(feedback)
    source = night.source(parent) if parent else night.baseline.source
    for _ in range(MAX_DROPPED if proposer.inline else MAX_DROPPED_PAID):
        for _ in range(MAX_BOUNCES + 1):
            start, proposal = time.perf_counter(), None
            asked = replace(history, rejects=history.rejects + refused)
            try:
                proposal = proposer.propose(source, asked, feedback)
                if proposal is None:
                    return None
                screen(proposal.source, night.tried)
            except Rejected as objection:
                feedback, refused = [*feedback, str(objection)], refused + 1
                description = proposal.description if proposal else ""
                night.journal.append(
                    "reject",
                    number=history.number,
                    proposer=proposer.name,
                    reason=str(objection),
                    description=description,
                )
                continue
            proposal = replace(proposal, proposer=proposer.name, parent=parent.number if parent else 0)
            return night.add_proposal(proposal, history.number, seconds=time.perf_counter() - start)
        feedback, last = [], feedback[-1]
    raise Problem(f"the screen refused {refused} proposals in a row, the last with: {last}; the journal has them all")


# ---------------------------------------------------------------------------
# random: key-free local search


class Random:
    """One number at the top of train.py, moved a little: what a researcher has to beat.

    Draws depend on the night's tag, the experiment's number and its rejects alone, so that a night repeats.
    """

    name, inline, exhausted = "random", True, "nothing is left to propose"

    def __init__(self, tag: str, sizes: str):
        self.tag, self.sizes = tag, sizes

    def propose(self, source: str, history: History, feedback: list[str]) -> Proposal | None:
        draw = random.Random(f"{self.tag}/{history.number}/{history.rejects}")
        knobs = numeric_hyperparameters(source, self.sizes)
        if not knobs:
            raise Problem("train.py has no numbers at its top that `random` could move; use another proposer")
        name, node = draw.choice(knobs)
        value, lines = neighbour(node.value, draw), source.split("\n")
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = line[: node.col_offset] + value + line[node.end_col_offset :]
        old = ast.get_source_segment(source, node)
        return Proposal(
            f"{name} {old} -> {value}", "random local search: a neighbouring value may be better", "\n".join(lines)
        )


def numeric_hyperparameters(source: str, sizes: str) -> list[tuple[str, ast.Constant]]:
    """(name, node) of the numbers at the top of train.py that serve CONFIGS[sizes]. A zero switches something off and is none.

    They are plain NAME = number, the keywords of that entry, and the defaults of class Config for those that it leaves out.
    """

    def is_number(node) -> bool:
        return (isinstance(node, ast.Constant) and type(node.value) in (int, float)) or (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.Pow)
            and is_number(node.left)
            and is_number(node.right)
        )

    plain, defaults, own = {}, {}, {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            defaults = {field.target.id: field.value for field in node.body if isinstance(field, ast.AnnAssign)}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
            if name.isupper() and is_number(value):
                plain[name] = value
            elif name == "CONFIGS" and isinstance(value, ast.Dict):
                entries = zip(value.keys, value.values, strict=True)
                entry = next((entry for key, entry in entries if getattr(key, "value", None) == sizes), None)
                own = {word.arg: word.value for word in entry.keywords} if isinstance(entry, ast.Call) else {}
    knobs = [(name, node) for name, node in (plain | defaults | own).items() if node is not None and is_number(node)]
    for _, node in knobs:
        node.value = node.value if isinstance(node, ast.Constant) else node.left.value**node.right.value
    return [knob for knob in knobs if knob[1].value]


def neighbour(value: int | float, draw: random.Random) -> str:
    """A nearby value as source text: powers of two double or halve, small integers step, floats scale by up to 2.

    Of a fraction over a half, such as a momentum, the distance to 1 is what scales.
    """
    if isinstance(value, int):
        if value >= 16 and value & (value - 1) == 0:
            return str(draw.choice((value // 2, value * 2)))
        if value >= 16:
            return str(max(1, round(value * draw.choice((0.5, 0.75, 1.25, 1.5)))))
        return str(value + draw.choice((-1, 1)) if value > 1 else value + 1)
    factor = 2 ** draw.choice((-1.0, -0.6, -0.3, 0.3, 0.6, 1.0))
    if 0.5 < value < 1:
        return repr(round(1 - float(f"{(1 - value) * factor:.2g}"), 12))
    scaled = float(f"{value * factor:.2g}")
    return repr(min(scaled, 0.75) if value < 1 else scaled)  # what may be a fraction stays one


WITHOUT_KEY = {
    "random": lambda night: Random(night.tag, night.settings.profile.sizes)
}  # what --proposer takes besides claude


# ---------------------------------------------------------------------------
# replay: the experiments of an earlier night; try: the checkout's train.py


class Replay:
    """The experiments of another night's journal in order: each change is merged into the incumbent of this night."""

    name, inline, exhausted = "replay", True, "the replay is complete"

    def __init__(self, night: Night, proposals: list[tuple[Proposal, str]]):
        """proposals: each with the source of its parent in its own night."""
        self.night = night
        own = [row for row in night.journal.of("proposal", "reject") if row["proposer"] == self.name]
        rejected = sum(row["event"] == "reject" and "proposal" not in row for row in own)  # at once
        self.queue = proposals[rejected + len({row["id"] for row in own if row["event"] == "proposal"}) :]

    def propose(self, source: str, history: History, feedback: list[str]) -> Proposal | None:
        if not self.queue:
            return None
        proposal, base = self.queue.pop(0)
        return replace(proposal, source=self.night.repository.merge(base, source, proposal.source))


TO_REPLAY = "--replay takes a night's tag or its journal, such as runs/nov23/journal.jsonl"


def rows_to_replay(runs: Path, name: str) -> list[dict]:
    """The journal of a night, by its tag, folder or journal. Raises Problem if there is none."""
    places = [runs / name / "journal.jsonl", Path(name) / "journal.jsonl", Path(name)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise Problem(f"{name} is no night; {TO_REPLAY}")
    try:
        return read_journal(path)[0]
    except (Problem, UnicodeDecodeError):
        raise Problem(f"{path} is not a night's journal; {TO_REPLAY}") from None


def proposals_to_replay(rows: list[dict], kept_only: bool) -> list[tuple[Proposal, str]]:
    """(proposal, its parent's source) of the experiments of a night. Raises Problem if there are none."""
    try:
        sources = {row["id"]: row["source"] for row in rows if row["event"] == "proposal"}
        results = [row for row in rows if row["event"] == "result"]
        of_number = {row["number"]: sources[row["proposal"]] for row in results}
        of_id = {row["proposal"]: row for row in results if row["number"] > 0}
        proposals = {row["id"]: row for row in rows if row["event"] == "proposal" and row["id"] in of_id}
    except (TypeError, KeyError):
        raise Problem(f"its rows are not a night's; {TO_REPLAY}") from None
    wanted = [row for row in of_id.values() if row["verdict"] == "keep" or not kept_only]
    if not wanted:
        what = "kept nothing but its baseline; without --kept all are run" if of_id else "has no experiments"
        raise Problem(f"the night to replay {what}; {TO_REPLAY}")
    return [
        (
            Proposal(row["description"], row["hypothesis"], sources[row["proposal"]]),
            of_number[proposals[row["proposal"]]["parent"]],
        )
        for row in wanted
    ]


class Try:
    """One proposal: the checkout's train.py, as a person or a coding agent left it."""

    name, inline, exhausted = "try", True, "tried"

    def __init__(self, description: str, source: str):
        self.description, self.source = one_line(description), source

    def propose(self, source: str, history: History, feedback: list[str]) -> Proposal | None:
        if source == self.source:
            raise Problem("train.py is the night's incumbent, unchanged; edit it, then run the same command")
        if feedback:
            raise Problem(f"train.py was not run: {feedback[-1]}")
        return Proposal(self.description, "", self.source)
