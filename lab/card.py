"""The card as nvidia-smi describes it: what is free, who uses it, and the wait for a card that is full."""

import math
import os
import re
import subprocess
import time

from lab.records import OutOfTime, clean

SMI_LIMIT_S = 20.0  # one answer of nvidia-smi: without its daemon it takes seconds, on a broken driver for ever
CARD_CONTEXT_MB = 1_024  # memory of the card that a process takes besides its tensors
CARD_PATIENCE_S = 10.0  # how long a card may take to give back the memory of a process that ended
CARD_INTERVAL_S = 2.0  # between two looks at a card that is full
CARD_REMINDER_S = 1_800.0  # between two lines that say so


def ask_card(query: str) -> list[list[float | str | None]]:
    """What nvidia-smi answers about the card that runs take, a list for each line; none if it is not there, or does not answer.

    query="gpu=memory.free" -> [[10240.0]]; a field that is no number on this machine ("[N/A]") is None, a text stays one.
    """
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = ["nvidia-smi", "-i", card, f"--query-{query}", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace"
        )
        output, _ = process.communicate(timeout=SMI_LIMIT_S)
    except OSError:
        return []
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: one that hangs in the driver does not go
        process.stdout.close()
        return []
    lines = [line.split(", ") for line in output.splitlines() if line.strip()]
    return [list(map(field_of, line)) for line in lines] if process.returncode == 0 else []


def field_of(text: str) -> float | str | None:
    try:
        return float(text)
    except ValueError:
        return None if re.fullmatch(r"\[.*\]|N/A|", text.strip()) else clean(text.strip())


def free_card_mb() -> float | None:
    """Free memory of the card that runs take, in MiB; None if nobody says."""
    answer = ask_card("gpu=memory.free")
    free = answer[0][0] if answer else None
    return free if isinstance(free, float) else None


def card_users() -> list[str]:
    """The processes that compute on the card that runs take, as `name (pid 17)`."""
    users = ((pid, " ".join(map(str, name))) for pid, *name in ask_card("compute-apps=pid,process_name"))
    return [f"{name} (pid {pid:.0f})" for pid, name in users if isinstance(pid, float)]


def wait_for_card(needed_mb: float, say, give_up=lambda: False) -> None:
    """Wait until `needed_mb` are free on the card, or nobody says how much is. Say every half hour what holds the rest.

    Raises OutOfTime once give_up() is true.
    """
    began, said_at = time.perf_counter(), -math.inf
    while (free := free_card_mb()) is not None and free < needed_mb:
        now = time.perf_counter()
        if now - began > CARD_PATIENCE_S and now - said_at > CARD_REMINDER_S:
            said_at = now
            users = "; ".join(card_users()) or "nvidia-smi lists no process"
            say(
                f"waiting: {free:,.0f} MB of the card are free, a run needs {needed_mb:,.0f}; end what holds the rest: {users}"
            )
        if give_up():
            raise OutOfTime("waiting for the card")
        time.sleep(CARD_INTERVAL_S)
