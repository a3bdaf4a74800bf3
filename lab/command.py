"""Any program as the researcher: the prompt on its standard input, the reply on its standard output."""

import os
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

from constants import Problem
from lab import git
from lab.child import end_all, started_for
from lab.night import Night
from lab.records import clean, log_tail
from lab.researcher import Researcher

LIMIT_S = 1_800.0  # for one reply
REPLY_BYTES = 10**6  # the program is ended at more
SERVED_HERE = {"ollama"}  # programs whose model takes the card that trains: they are asked between runs


class Command(Researcher):
    """Starts the program for each reply, as the user, in an empty folder; it alone gets the keys."""

    name, exhausted, spent_usd = "command", "nothing is left to propose", 0.0

    def __init__(self, night: Night, here: Path, command: str, secrets: dict[str, str]):
        self.words, self.secrets = words_of(command), secrets
        if shutil.which(self.words[0]) is None:
            raise Problem(f"{self.words[0]} is not installed, or no program; --command takes one, such as 'claude -p'")
        super().__init__(night, here)

    def inline(self, number: int) -> bool:
        served_here = Path(self.words[0]).name in SERVED_HERE and self.night.settings.device == "cuda"
        return served_here or super().inline(number)

    def ask(self, system: list[str], number: int) -> str:
        """The reply, through outages, however long."""
        words = {"user": "", "assistant": "# Your earlier reply\n\n"}
        prompt = "\n\n".join([*system, *(words[turn["role"]] + turn["content"] for turn in self.turns)])
        failures = 0
        while True:
            call, start = self.open_call(number, Path(self.words[0]).name), time.perf_counter()
            reply, trouble = self.run(prompt)
            more = {"error": trouble} if trouble else {"stop": "end", "reply": reply}
            self.night.journal.append(
                "call", **call, tokens={}, usd=None, at_least=False, seconds=time.perf_counter() - start, **more
            )
            if not trouble:
                self.status = ""
                return reply
            failures += 1
            self.wait_out(failures, trouble)

    def run(self, prompt: str) -> tuple[str, str]:
        """(reply, why there is none) of one start of the program. None of its processes is left."""
        place = str(self.night.folder / "command")
        environment, end = (
            {**os.environ, **self.secrets, "AUTORESEARCH_RUN": place},
            partial(end_all, partial(started_for, place)),
        )
        with tempfile.TemporaryDirectory() as folder, open(Path(folder, "errors"), "w+b") as errors:
            (Path(folder) / "empty").mkdir()
            with git.spawning:
                process = subprocess.Popen(
                    self.words, cwd=Path(folder, "empty"), env=environment, start_new_session=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                )  # fmt: skip
                git.running.add(process.pid)
            late = threading.Timer(LIMIT_S, end)
            writer = threading.Thread(target=write_and_close, args=(process.stdin, prompt.encode()), daemon=True)
            try:
                late.start()
                writer.start()
                output = process.stdout.read(REPLY_BYTES)
                if len(output) < REPLY_BYTES:
                    process.wait()
            finally:
                in_time = late.is_alive()
                late.cancel()
                end()
                process.wait()
                process.stdout.close()
                git.running.discard(process.pid)
            lines = log_tail(Path(folder, "errors"))
        reply = clean(output.replace(b"\r\n", b"\n"))
        if not in_time:
            return "", f"no reply within {LIMIT_S:.0f} s"
        if process.returncode and len(output) < REPLY_BYTES:
            return "", f"exit status {process.returncode}: {(lines or reply.strip().split(chr(10)))[-1][:200]}"
        return reply, "" if reply.strip() else "it printed nothing"


def words_of(command: str) -> list[str]:
    """The program and its arguments. Raises Problem."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise Problem(f"--command {command!r} cannot be read: {error}") from None
    if not words:
        raise Problem("--command takes a program and its arguments, such as 'claude -p'")
    return words


def write_and_close(stream, data: bytes) -> None:
    try:
        with stream:
            stream.write(data)
    except OSError:  # it did not read to the end
        pass
