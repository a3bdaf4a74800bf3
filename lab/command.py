"""Any program as the researcher: the prompt on its standard input, the reply on its standard output."""

import os
import shlex
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from constants import Problem
from lab import git
from lab.child import end_all, started_for
from lab.night import Night
from lab.records import clean
from lab.researcher import Researcher

LIMIT_S = 1_800.0  # for one reply
REPLY_BYTES = 10**6  # the program is ended at more
SERVED_HERE = {"ollama"}  # programs whose model takes the card that trains: they are asked between runs


class Command(Researcher):
    """Starts the program for each reply, as the user, in an empty folder; it alone gets the keys."""

    name, exhausted, spent_usd = "command", "nothing is left to propose", 0.0

    def __init__(self, night: Night, here: Path, command: str, secrets: dict[str, str]):
        self.words, self.secrets, self.place = words_of(command), secrets, str(night.folder / "command")
        self.program = Path(self.words[0]).name
        super().__init__(night, here)

    def between_runs(self, number: int) -> bool:
        return (self.program in SERVED_HERE and self.night.settings.device == "cuda") or super().between_runs(number)

    def ask(self, system: list[str], number: int) -> str:
        """The reply, through outages, however long."""
        words, failures = {"user": "", "assistant": "# Your earlier reply\n\n"}, 0
        prompt = "\n\n".join([*system, *(words[turn["role"]] + turn["content"] for turn in self.turns)])
        while True:
            call, start = self.open_call(number, self.program), time.perf_counter()
            reply, trouble = self.run(prompt)
            more = {"error": trouble} if trouble else {"stop": "end", "reply": reply}
            seconds = time.perf_counter() - start
            self.night.journal.append("call", **call, tokens={}, usd=None, at_least=False, seconds=seconds, **more)
            if not trouble:
                self.status = ""
                return reply
            failures += 1
            self.wait_out(failures, trouble)

    def run(self, prompt: str) -> tuple[str, str]:
        """(reply, why there is none) of one start of the program. None of its processes is left."""
        guard = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []  # it ends when we do
        environment = {**os.environ, **self.secrets, "AUTORESEARCH_RUN": self.place}
        with (
            TemporaryDirectory() as empty,
            TemporaryFile() as asked,
            TemporaryFile() as output,
            TemporaryFile() as errors,
        ):
            asked.write(prompt.encode())
            asked.seek(0)
            with git.spawning:
                process = subprocess.Popen(
                    [*guard, *self.words], cwd=empty, env=environment, stdin=asked, stdout=output, stderr=errors, start_new_session=True,
                )  # fmt: skip
                git.running.add(process.pid)
            size, late, deadline = 0, False, time.perf_counter() + LIMIT_S
            try:
                while process.poll() is None and size < REPLY_BYTES and not late:
                    time.sleep(0.1)
                    size, late = os.fstat(output.fileno()).st_size, time.perf_counter() > deadline
                status = process.returncode
            finally:
                end_all(partial(started_for, self.place))
                process.wait()
                git.running.discard(process.pid)
            reply, message = (clean(os.pread(file.fileno(), REPLY_BYTES, 0)).strip() for file in (output, errors))
        if late:
            return "", f"no reply within {LIMIT_S:.0f} s"
        if status:
            return "", f"exit status {status}: {(message or reply).split(chr(10))[-1][:200]}"
        return reply, "" if reply else "it printed nothing"


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
