"""Any program as the researcher: the prompt on its standard input, the reply on its standard output."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from constants import Problem
from lab.measure.child import end_all, running, spawning, started_for
from lab.propose.model import LostIdea, Researcher
from lab.record.night import Night
from lab.records import RUN_AGAIN, clean, one_line

LIMIT_S = 1_800.0  # for one reply
REPLY_BYTES = 10**6  # the program is ended at more
MAX_FAILURES = 10  # of one idea, before the numeric search takes its turn
SERVED_HERE = {"ollama"}  # programs whose model takes the card or the cores that train: they are asked between runs


class Command(Researcher):
    """Starts the program for each reply, as the user, in an empty folder; it alone gets the keys."""

    name, spent_usd = "command", 0.0

    def __init__(self, night: Night, here: Path, command: str, secrets: dict[str, str]):
        self.words, self.secrets, self.place = words_of(command), secrets, str(night.folder / "command")
        self.program, self.replied = Path(self.words[0]).name, any(row.get("stop") for row in night.journal.of("call"))
        super().__init__(night, here)

    def between_runs(self, number: int) -> bool:
        return self.program in SERVED_HERE or super().between_runs(number)

    def ask(self, system: list[str], number: int) -> str:
        """The reply, through outages. Raises LostIdea after ten failures, Problem after three of a program that has never replied."""
        words, failures = {"user": "", "assistant": "# Your earlier reply\n\n"}, 0
        prompt = "\n\n".join([*system, *(words[turn["role"]] + turn["content"] for turn in self.turns)])
        while True:
            call, start = self.open_call(number, self.program), time.perf_counter()
            reply, trouble = self.run(prompt)
            self.rest_if_stopped()
            more = {"error": trouble} if trouble else {"stop": "end", "reply": reply}
            seconds = time.perf_counter() - start
            self.night.journal.append("call", **call, tokens={}, usd=None, at_least=False, seconds=seconds, **more)
            if not trouble:
                self.status, self.replied = "", True
                return reply
            failures += 1
            if failures >= 3 and not self.replied:
                raise Problem(
                    f"{self.program} failed {failures} times and never replied: {trouble}; mend --command, {RUN_AGAIN}"
                )
            if failures >= MAX_FAILURES:
                self.shorten_history()
                raise LostIdea(trouble)
            self.wait_out(failures, trouble)

    def run(self, prompt: str) -> tuple[str, str]:
        """(reply, why there is none) of one start of the program. None of its processes is left."""
        guard = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []  # it ends when we do
        environment = {**os.environ, **self.secrets, "AUTORESEARCH_RUN": self.place}
        with (
            TemporaryDirectory(ignore_cleanup_errors=True) as empty,
            TemporaryFile() as asked,
            TemporaryFile() as output,
            TemporaryFile() as errors,
        ):
            asked.write(prompt.encode())
            asked.seek(0)
            try:
                with spawning:
                    process = subprocess.Popen(
                        [*guard, *self.words], cwd=empty, env=environment, stdin=asked, stdout=output, stderr=errors, start_new_session=True,
                    )  # fmt: skip
                    running.add(process.pid)
            except OSError as error:
                return "", f"it cannot be started: {error.strerror}"
            size, late, deadline = 0, False, time.perf_counter() + LIMIT_S
            try:
                while process.poll() is None and size < REPLY_BYTES and not late:
                    time.sleep(0.1)
                    size, late = os.fstat(output.fileno()).st_size, time.perf_counter() > deadline
                status = process.returncode
            finally:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                end_all(partial(started_for, self.place))
                process.wait()
                running.discard(process.pid)
            reply, message = (last_of(file) for file in (output, errors))
        if late:
            return "", f"no reply within {LIMIT_S:.0f} s"
        if status:
            return "", f"exit status {status}: {self.masked(telling((message or reply).splitlines()))[:200]}"
        return reply, "" if reply else "it printed nothing"

    def masked(self, text: str) -> str:
        """Without the keys and the program's arguments but a model's name, which a complaint about them may repeat."""
        named = {model for flag, model in pairwise(self.words) if flag in ("-m", "--model")}
        for secret in (
            *self.secrets.values(),
            *(word for word in self.words[1:] if len(word) > 7 and word not in named),
        ):
            text = text.replace(secret, "...")
        return text


def telling(lines: list[str]) -> str:
    """The last line that names an error, else the last: under a stack trace stands nothing that helps."""
    raised = [line for line in lines if re.match(r"\S*Error\b", line)]
    named = [line for line in lines if re.search(r"error\b", line, re.IGNORECASE) and not line.startswith("    at ")]
    return one_line((raised or named or lines or [""])[-1])


def last_of(file) -> str:
    """The end of what a program printed, as plain lines."""
    size = os.fstat(file.fileno()).st_size
    return clean(os.pread(file.fileno(), REPLY_BYTES, max(0, size - REPLY_BYTES))).strip()


def words_of(command: str) -> list[str]:
    """The program and its arguments. Raises Problem."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise Problem(f"--command {command!r} cannot be read: {error}") from None
    program = shutil.which(words[0]) if words else None
    if program is None:
        raise Problem(
            f"--command: {words[:1] or 'nothing'} is no program that is installed; it takes one, such as 'claude -p'"
        )
    return [os.path.abspath(program), *words[1:]]
