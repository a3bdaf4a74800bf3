"""A model as the researcher, whoever serves it: what a reply means, whose turn it is, outages that are waited out aloud."""

import math
import random
import re
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from constants import Problem, write_atomically
from lab.propose.ahead import History, Proposer
from lab.propose.prompt import (
    DIVIDER,
    HISTORY_LINES,
    REPLACE,
    REPLY_FORM,
    SEARCH,
    request_text,
    schedule_of,
    system_text,
    to_mend,
)
from lab.propose.tune import Tune
from lab.record.night import Night, read_checkout
from lab.records import DESCRIPTION_CHARS, Proposal, Rejected, clean, one_line

MAX_BOUNCES = 3  # objections to one idea; then the numeric search takes its turn
QUOTED_CHARS = 300  # of a reply that is no proposal, such as a program's complaint
REPLY_CHARS = 40_000  # of a reply that is sent back with an objection
LEAST_LINES = 10  # of the history, where the context is small
MAX_DRAWS = 8  # of the numeric search that are refused; then the model is asked all the same
PATIENCE_S = 60.0  # longest pause between two attempts if the server names none
OUTAGE_REMINDER_S = 3_600.0  # between two lines about an outage, the first at its third failure
BLOCK = re.compile(rf"^{SEARCH}[ \t]*\n(.*?)^{DIVIDER}[ \t]*\n(.*?)^{REPLACE}[ \t]*$", re.MULTILINE | re.DOTALL)
BESIDE_DOTS = re.compile(
    r"(the )?(rest|remainder|existing|remaining|other|unchanged|previous|same|omitted)\b[\w ]{0,40}"
)
ALONE = re.compile(
    r"(existing|same|unchanged) code|(the )?(rest|remainder) of (the )?(code|file|class|function|method|script|model|loop|module)|"
    r"((the )?(rest|remainder)( of [\w ]{1,30})?|(existing|remaining|other) [\w ]{1,30}) ((stays|remains|is|are) )?"
    r"(unchanged|the same|as is|as before|as above|omitted|here)|unchanged|(same )?as before"
)
MARK = re.compile(rf"^({SEARCH}|{REPLACE})[ \t]*$", re.MULTILINE)


class LostIdea(Rejected):
    """There is no reply to this request, and asking again would bring none."""


# ---------------------------------------------------------------------------
# A reply


def parse_reply(text: str, source: str) -> tuple[Proposal, str | None]:
    """(proposal against `source`, new notes or None) of a reply in REPLY_FORM, the last one in the text.

    Raises Rejected, saying what is wrong with it.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # a lone one would move all later line numbers
    drafts = [match.start() for match in re.finditer(r"^DESCRIPTION:", text, re.MULTILINE)]
    begun = [begin for begin, end in pairwise([*drafts, len(text)]) if MARK.search(text[begin:end])]
    text = text[(begun or drafts)[-1] :] if drafts else text  # what comes after the blocks may be a recap
    source = source if source.endswith("\n") else f"{source}\n"
    blocks = list(BLOCK.finditer(text))
    rest = BLOCK.sub("", text).partition("\nNOTES:")[0]
    if MARK.search(rest) or any(MARK.search(block[1] + block[2]) for block in blocks):
        raise Rejected(f"a SEARCH/REPLACE block has no `{DIVIDER}` or no end.\n{REPLY_FORM}")
    if not blocks:
        words = one_line(text)
        said = f'; it says "{words}"' if 0 < len(words) <= QUOTED_CHARS else ""
        raise Rejected(f"the reply has no SEARCH/REPLACE block{said}.\n{REPLY_FORM}")
    head, tail = text[: blocks[0].start()], text[blocks[-1].end() :]
    title = re.search(r"^DESCRIPTION:[ \t]*(\S.*)$", head, re.MULTILINE)
    if not title:
        raise Rejected(f"the reply has no DESCRIPTION line before its first block.\n{REPLY_FORM}")
    why = re.search(r"^HYPOTHESIS:\s*(.*)", head, re.MULTILINE | re.DOTALL)
    why = clean(why[1].replace("```", "").strip())[:2000] if why else ""
    notes = re.search(r"^NOTES:(.*)", tail, re.MULTILINE | re.DOTALL)
    notes = "".join(re.findall(r"\S+\s*", notes[1].replace("```", ""))[:400]).strip()[:4_000] if notes else None
    for number, block in enumerate(blocks, 1):
        source = replaced(source, block[1], block[2], number)
    return Proposal(clean(title[1].strip())[:DESCRIPTION_CHARS], why, source), notes


def replaced(source: str, search: str, replacement: str, number: int) -> str:
    """The source with the lines `search` replaced. Raises Rejected unless they occur exactly once, as whole lines."""
    if not search.strip():
        raise Rejected(f"block {number}: its SEARCH part is empty")
    text = f"\n{source}"
    count = len(re.findall(f"(?=\n{re.escape(search)})", text))
    if count != 1:
        raise Rejected(
            f"block {number}: its SEARCH lines match {count} times, not once; copy whole lines exactly:\n{search}"
        )
    for line in set(replacement.split("\n")) - set(search.split("\n")):
        if stands_for_others(line):
            raise Rejected(
                f"block {number}: the line `{line.strip()}` stands for lines that it leaves out; write them, or search for fewer"
            )
    return text.replace(f"\n{search}", f"\n{replacement}", 1)[1:]


def stands_for_others(line: str) -> bool:
    """Whether a line is a placeholder: dots alone, a comment of dots and such a word, or one that says nothing else."""
    line = line.strip()
    if not line.startswith(("#", "//")) or len(line) > 120:
        return line in ("...", "\u2026")
    body = line.lstrip("#/ ").strip("([{}]) ")
    words = body.strip(" .,:;!-=*()[]{}\u2026").lower()
    dots = any(body.startswith(mark) or body.endswith(mark) for mark in ("...", "\u2026"))
    return bool((dots and (not words or BESIDE_DOTS.fullmatch(words))) or ALONE.fullmatch(words))


def first_line(text: str) -> str:
    return one_line(text.partition("\n")[0]).rstrip(".:;")


# ---------------------------------------------------------------------------
# Who is asked, and what for


class Researcher(Proposer):
    """Asks a model for one proposal at a time, and the numeric search at the turns that program.md gives to it.

    A subclass has `name`, `spent_usd` and ask(system, number) -> str | None: the reply to `turns`, None if it might cost
    too much. It raises LostIdea, or Problem if going on is of no use. Called from the background thread; the live view shows `status`.
    """

    def __init__(self, night: Night, here: Path):
        self.night, self.here, self.lines = night, here, HISTORY_LINES
        self.instructions, self.instructions_trouble = read_checkout(here, "program.md"), ""
        self.schedule = schedule_of(self.instructions)
        self.turns: list[dict] = []  # of the idea in hand: request, reply, objection, reply ...
        self.source, self.number = "", 0  # that they are about
        self.status, self.lost, self.reminded = "", None, -math.inf

    def operator(self, number: int) -> str:
        """Whose turn experiment `number` is. What became wrong with program.md during the night changes nothing, and is said once."""
        trouble = ""
        try:
            program = read_checkout(self.here, "program.md")
            self.schedule, self.instructions = schedule_of(program), program
        except Problem as problem:
            trouble = str(problem)
        if trouble and trouble != self.instructions_trouble:
            self.night.say(f"{first_line(trouble)}; its last good text is used")
        self.instructions_trouble = trouble
        return self.schedule[(number - 1) % len(self.schedule)]

    def between_runs(self, number: int) -> bool:
        return self.operator(number) == "tune"

    def propose(self, source: str, history: History, feedback: list[str]) -> Proposal | None:
        """None if the next call might cost too much. Raises Rejected for a reply that is no proposal, Problem if going on is of no use."""
        operator = self.operator(history.number)
        if operator != "tune" and len(feedback) > MAX_BOUNCES and self.lost != history.number:
            self.lose(history.number, feedback[-1])
        if (operator == "tune" or self.lost == history.number) and len(feedback) <= MAX_BOUNCES + MAX_DRAWS:
            self.turns = []
            try:
                return Tune().propose(source, history, feedback)
            except Problem:  # it has no numbers any more
                operator = "improve"
        if feedback and self.turns and (self.source, self.number) == (source, history.number):
            self.night.say(f"a reply of {self.name} cannot be run, it is asked again: {first_line(feedback[-1])}")
            objection = f"That cannot be run: {feedback[-1]}\n\nThe whole reply again, mended."
            self.turns.append({"role": "user", "content": objection})
        else:
            missed = f"Your last proposal was not run: {feedback[-1]}" if feedback else ""
            self.request = partial(request_text, source, history, operator, missed)
            self.turns = [{"role": "user", "content": self.request(self.lines)}]
            self.source, self.number = source, history.number
        profile = self.night.settings.profile.name
        try:
            text = self.ask(
                system_text(self.instructions, self.night.folder / "harness", profile, source), history.number
            )
        except LostIdea as reason:
            self.lose(history.number, str(reason))
            raise
        if text is None:
            return None
        self.turns.append({"role": "assistant", "content": text[-REPLY_CHARS:] or "(empty)"})
        proposal, notes = parse_reply(text, source)
        if notes is not None:
            write_atomically(self.night.folder / "notes.md", clean(notes) + "\n")
        mended = to_mend(history)
        return replace(proposal, operator=operator, mends=mended and mended.number)

    def shorten_history(self) -> bool:
        """Halves the experiments that a request shows one by one, also of the one in hand; False if they are few."""
        if self.lines <= LEAST_LINES:
            return False
        self.lines = max(LEAST_LINES, self.lines // 2)
        self.turns[0] = {"role": "user", "content": self.request(self.lines)}
        return True

    def lose(self, number: int, reason: str) -> None:
        """Gives the turn of experiment `number` to the numeric search, aloud."""
        self.turns, self.lost, self.status = [], number, ""
        self.night.say(f"an idea of {self.name} is lost: {first_line(reason)}; the numeric search takes this turn")

    def open_call(self, number: int, model: str, usd: float | None = None) -> dict:
        """Journals an attempt before it is made, at the most that it may cost."""
        self.rest_if_stopped()
        call = {"id": len(self.night.journal.of("call")), "number": number, "model": model}
        self.night.journal.append("call", **call, tokens={}, usd=usd, at_least=True)
        self.status = "thinking"
        return call

    def rest_if_stopped(self) -> None:
        """The background thread makes no further attempt once the agent is about to end."""
        while self.night.stop.is_set():
            time.sleep(1.0)

    def wait_out(self, failures: int, reason: str, delay: float | None = None) -> None:
        """After the attempt that failed: a line at the third and each hour, and a pause."""
        delay = delay or min(PATIENCE_S, 2.0 ** min(failures, 6)) * random.uniform(0.5, 1.0)
        self.status = f"{one_line(reason)[:60]}, again in {delay:.0f} s"
        if failures == 3 or (failures > 3 and time.perf_counter() - self.reminded > OUTAGE_REMINDER_S):
            self.reminded = time.perf_counter()
            self.night.say(f"waiting for {self.name}: {one_line(reason)}")
        time.sleep(delay)
