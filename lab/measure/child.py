"""One child process: started in a session of its own, watched, and ended with all that it started."""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from constants import CLOCK_MARK, FINISH_MARK, TEXT_LINE, Problem
from lab.measure.files import DISK_FLOOR_BYTES, OUT_BYTES, folder_bytes, free_bytes
from lab.records import Stopped, clean, log_tail

MEMORY_FLOOR = 0.04  # share of the machine's memory that is left when a child during which most of it went is ended
KILL_PATIENCE_S = 20.0  # how long a process may take to go after kill -9: a driver that writes out, a full disk
LOG_LIMIT_BYTES = 16 * 2**20  # a run that prints more is ended
LOG_HEAD_BYTES, LOG_TAIL_BYTES = 64_000, 192_000  # what is kept of it
PHASES = (  # of a run: what it prints at the end of each, and why it is ended if it outlasts the limit
    (CLOCK_MARK.encode(), "time-out after {:.0f} s, before its clock started"),
    (FINISH_MARK.encode(), "time-out, {:.0f} s after its clock started"),
    (None, "time-out, {:.0f} s after it said that it was trained"),
)
ONE_PHASE = ((None, "time-out after {:.0f} s"),)  # of a child without a clock


# The pids of our own git processes and researchers: nobody takes them for a run's.
spawning, running = threading.Lock(), set()


# ---------------------------------------------------------------------------
# A child


@dataclass(frozen=True)
class Child:
    """What is started, and for which run folder."""

    argv: list[str]
    environment: dict[str, str]
    folder: Path  # out/ in it is the working folder


@dataclass(frozen=True)
class Exit:
    crash: str  # why it failed, or why we ended it; else empty
    seconds: float  # start to exit
    # from the line that starts its clock to FINISH_MARK, else to its exit; None without that line
    clock_seconds: float | None
    saving_seconds: float | None  # from FINISH_MARK to its exit; None without that mark


def run_child(
    command: Child, log: Path, limits_s: tuple[float, ...], on_clock=None, stop: threading.Event | None = None
) -> Exit:
    """Runs a child to its end or the limit of a phase. None of its processes is left; `log` has its output, cut to head and tail.

    With on_clock it has three PHASES: a child that prints CLOCK_MARK waits, on_clock() is called, then it gets TEXT_LINE. A child that
    prints over LOG_LIMIT_BYTES, fills its folder with over OUT_BYTES or the disk, or takes the machine's memory, is ended too.
    Raises Stopped, the child ended, once `stop` is set.
    """
    import psutil

    phases, process, looked, read, why = PHASES if on_clock else ONE_PHASE, None, 0.0, 0, ""
    memory = psutil.virtual_memory().available
    with open(log, "w+b") as output:
        start = end = time.perf_counter()
        began = [start]  # each phase so far
        try:
            process = subprocess.Popen(
                command.argv, cwd=command.folder / "out", env=command.environment, stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.PIPE if on_clock else subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            while not why:
                if stop and stop.is_set():
                    raise Stopped
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.05)
                end, size = time.perf_counter(), os.fstat(output.fileno()).st_size
                (mark, too_long), limit_s = phases[len(began) - 1], limits_s[len(began) - 1]
                if mark and size > read:
                    begin = max(0, read - len(mark))
                    fresh = os.pread(output.fileno(), min(size - begin, LOG_LIMIT_BYTES), begin)
                    read = size
                    if mark in fresh and len(began) == 2:
                        began.append(end)
                    elif mark in fresh:
                        on_clock()
                        read = os.fstat(output.fileno()).st_size + len(FINISH_MARK)
                        began.append(time.perf_counter())
                        with contextlib.suppress(OSError):  # it has ended
                            os.write(process.stdin.fileno(), TEXT_LINE.encode())
                if process.returncode is not None:
                    break
                if end - began[-1] > limit_s:
                    why = too_long.format(limit_s)
                elif size > LOG_LIMIT_BYTES:
                    why = f"printed over {LOG_LIMIT_BYTES / 2**20:.0f} MB"
                elif end - looked > 2.0:
                    looked, why = end, exhausted(command.folder, memory)
        finally:
            if process is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if process.stdin:
                    process.stdin.close()
                end_processes(str(command.folder))
        trim(output)
    seconds = [after - before for before, after in itertools.pairwise([*began, end])]  # of each phase
    clock_s, saving_s, *_ = [*seconds[1:], None, None]
    return Exit(why or crash_reason(process.returncode, log), end - start, clock_s, saving_s)


def crash_reason(status: int, log: Path) -> str:
    """Why a child failed, as one line: the signal, else the last line that names an exception, else its last; empty if it did not."""
    if status == 0:
        return ""
    number = -status if status < 0 else status - 128  # bubblewrap passes a signal on as 128 + its number
    if number in set(signal.Signals):
        return f"killed by {signal.Signals(number).name}"
    lines = log_tail(log)
    raised = [
        line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception|Problem|Interrupt|Exit)\b|error: ", line)
    ]
    if raised and raised[-1].startswith("torch._dynamo"):  # it quotes what the program raised
        raised += re.findall(r"\bgot (\w+Error\(.*\))", "\n".join(lines))
    return ((raised or lines)[-1].strip() if lines else f"exit status {status}, nothing printed")[:200]


def exhausted(folder: Path, available: int) -> str:
    """What of this machine was used up while a child ran, of which `available` bytes of memory; empty if nothing.

    Not what its processes and its files add up to: memory and space have owners that no list shows, as a file that is deleted and open.
    """
    import psutil

    memory = psutil.virtual_memory()
    taken = available - memory.available
    if folder_bytes(folder) > OUT_BYTES:
        return f"its folder grew over {OUT_BYTES / 2**30:g} GiB"
    if free_bytes(folder) < DISK_FLOOR_BYTES:
        return "the disk was full while it ran"
    if memory.available < MEMORY_FLOOR * memory.total and taken > memory.total / 2:
        return f"{taken / 1e9:.1f} GB of the machine's {memory.total / 1e9:.1f} GB of memory went while it ran"
    return ""


def end_processes(place: str) -> list[int]:
    """Ends what was started for a folder, or folders in it, by its environment, and what has become our child; returns the pids.

    On Linux whatever a run has started becomes our child if its parents end: see constants.guard_this_process(). Raises Problem if one survives.
    """
    return end_all(lambda: [*strays(), *started_for(place)])


def strays() -> list:
    """Our descendants (psutil.Process) but for git's and a researcher's, which are at work beside a run."""
    import psutil

    with spawning:
        own, spared = psutil.Process().children(recursive=True), set(running)
    for process in own:
        if process.pid in spared:
            with contextlib.suppress(psutil.Error):
                spared |= {child.pid for child in process.children(recursive=True)}
    left = []
    for process in own:
        with contextlib.suppress(ProcessLookupError):
            if process.pid not in spared and os.getsid(process.pid) not in running:
                left.append(process)
    return left


def started_for(place: str) -> list:
    """The processes (psutil.Process) whose environment names this folder, or one in it."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            own = process.environ().get("AUTORESEARCH_RUN", "")
            if (own == place or own.startswith(f"{place}/")) and process.pid != os.getpid():
                found.append(process)
    return found


def end_all(which) -> list[int]:
    """Ends what which() lists until that is nothing; returns the pids. Raises Problem if one survives."""
    import psutil

    ended, deadline = set(), time.perf_counter() + KILL_PATIENCE_S
    while left := which():
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
                ended.add(process.pid)
        psutil.wait_procs(left, timeout=1.0)
        if time.perf_counter() > deadline:
            pids = sorted({process.pid for process in left})
            raise Problem(f"processes {pids} of a run do not end, not even by kill -9; the machine may need a reboot")
    return sorted(ended)


def trim(file) -> None:
    """Leaves of a log its head and its tail, as plain text."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size > LOG_HEAD_BYTES + LOG_TAIL_BYTES:
        head = file.read(LOG_HEAD_BYTES)
        file.seek(-LOG_TAIL_BYTES, os.SEEK_END)
        dropped = size - LOG_HEAD_BYTES - LOG_TAIL_BYTES
        text = head + f"\n[{dropped:,} bytes are left out here]\n".encode() + file.read()
    else:
        text = file.read()
    file.seek(0)
    file.write(clean(text).encode())
    file.truncate()
