"""A night's journal, which is its record: rows of JSON, appended whole or not at all; and the questions that rows alone answer."""

import contextlib
import itertools
import json
import os
import threading
import time
from datetime import datetime
from pathlib import Path

import constants
from constants import Problem
from lab.records import Run, runs_of

FORMAT = 7
REVIEWS = {"check", "ablate"}  # the arguments of starts that train for no experiment


# ---------------------------------------------------------------------------
# Journal


def read_journal(path: Path) -> tuple[list[dict], int]:
    """(rows, length in bytes of the whole ones): a last line that a kill cut short is no row. Raises Problem."""
    raw = path.read_bytes() if path.exists() else b""
    whole = raw[: raw.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or "event" not in row:
            raise Problem(f"{path} line {number} is damaged; restore it from a backup, or use --tag NEW")
        rows.append(row)
    if rows and rows[0]["event"] != "night":
        raise Problem(f"{path} lacks its first line; restore it from a backup, or use --tag NEW")
    if any(row["event"] == "night" and row.get("format") != FORMAT for row in rows):
        raise Problem(f"{path} has the format of an earlier version; start another night with --tag NEW")
    return rows, len(whole)


class Journal:
    """An append-only file of JSON lines, flushed and fsynced; `rows` is its content. Threads may append."""

    def __init__(self, path: Path):
        self.path, self.began, self.lock = path, time.perf_counter(), threading.Lock()
        self.rows, length = read_journal(path)
        if path.exists() and path.stat().st_size > length:
            print(f"dropped a torn last line of {path}: {path.stat().st_size - length} bytes")
            os.truncate(path, length)

    def append(self, event: str, **fields) -> dict:
        """Writes one row, or nothing: a disk that is full leaves no part of it behind."""
        at = datetime.now().astimezone().isoformat(timespec="milliseconds")
        with self.lock, open(self.path, "ab") as file:
            row = {"event": event, "at": at, "uptime": round(time.perf_counter() - self.began, 3), **fields}
            length = file.seek(0, os.SEEK_END)
            try:
                file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            except BaseException:  # a full disk, Ctrl-C
                with contextlib.suppress(OSError):  # what closing would write once more
                    file.close()
                os.truncate(self.path, length)
                raise
            self.rows.append(row)
        return row

    def of(self, *events: str) -> list[dict]:
        return [row for row in self.rows if row["event"] in events]


# ---------------------------------------------------------------------------
# What the rows of a night say about its starts, its time and its money


def last_start(rows: list[dict]) -> dict:
    """The arguments of a night's last start; of a --check, an --ablate or a --try only if there was no other."""
    starts = [row["arguments"] for row in rows if row["event"] == "night"]
    others = [start for start in starts if not (REVIEWS | {"attempt"}) & set(start)]
    return (others or starts or [{}])[-1]


def has_ended(rows: list[dict]) -> bool:
    """Whether a night's last start, --check and --ablate aside, came to an end of its own."""
    words = [
        row["event"]
        for row in rows
        if row["event"] == "end" or (row["event"] == "night" and not REVIEWS & set(row["arguments"]))
    ]
    return words[-1:] == ["end"]


def night_runs(rows: list[dict]) -> list[Run]:
    """All that was trained for the night itself: on its seed and on the second one; --check and --ablate have others."""
    return [run for run in runs_of(rows).values() if run.seed in (constants.SEED, constants.CONFIRM_SEED)]


def seconds_of_earlier_starts(rows: list[dict]) -> float:
    """Seconds that earlier starts of this night were at work, by the monotonic clock of each. --check and --ablate do not count."""
    starts = [i for i, row in enumerate(rows) if row["event"] == "night"]
    return sum(
        rows[following - 1]["uptime"]
        for start, following in itertools.pairwise(starts)
        if not REVIEWS & set(rows[start]["arguments"])
    )


def spent_usd(rows: list[dict], bound: bool = False) -> float:
    """Dollars of all calls, as reported; with `bound` what they may have cost at most, cut ones at their worst case.

    The last row of each call's id counts.
    """
    calls = {row["id"]: row for row in rows if row["event"] == "call"}
    return sum((row.get("bound_usd") if bound else None) or row["usd"] or 0.0 for row in calls.values())
