"""Sixty random kill -9 and sixty random Ctrl-C over a night of stub experiments: `python tests/bench_kills.py [KILLS]`.

After each: no acknowledged row is lost or changed, none is damaged. At the end the night equals one that nobody disturbed, and no lock
of git is left.
"""

import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from conftest import NIGHT, make_checkout, rows_of, story

EXPERIMENTS = "40"


def disturbed(folder: Path, kills: int, number: int, undisturbed) -> None:
    checkout = make_checkout(folder / "checkout", folder / "cache", stub=True)
    draw, done, acknowledged = random.Random(1), 0, []
    journal = checkout.folder / "runs" / "t" / "journal.jsonl"
    checkout.agent(*NIGHT, "--experiments", "1")
    while done < kills:
        process, starts = checkout.start("--tag", "t", "--experiments", EXPERIMENTS), len(rows_of(checkout, "night"))
        while len(rows_of(checkout, "night")) == starts and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.5))
        done += process.poll() is None
        process.send_signal(number)
        process.communicate(timeout=60)
        raw = journal.read_bytes()
        whole = [json.loads(line) for line in raw[: raw.rfind(b"\n") + 1].splitlines()]
        results = [row for row in whole if row["event"] == "result"]
        assert results[: len(acknowledged)] == acknowledged
        acknowledged = results
    checkout.agent("--tag", "t", "--experiments", EXPERIMENTS)
    assert story(checkout) == undisturbed and not list(checkout.folder.rglob("*.lock"))
    name, count = signal.Signals(number).name, len(acknowledged)
    print(f"{done} times {name}: nothing lost, {count} results when the last one came", flush=True)


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    with tempfile.TemporaryDirectory() as name:
        for place in ("calm", "kill", "interrupt"):
            (Path(name) / place).mkdir()
        calm = make_checkout(Path(name) / "calm" / "checkout", Path(name) / "calm" / "cache", stub=True)
        calm.agent(*NIGHT, "--experiments", EXPERIMENTS)
        disturbed(Path(name) / "kill", kills, signal.SIGKILL, story(calm))
        disturbed(Path(name) / "interrupt", kills, signal.SIGINT, story(calm))


if __name__ == "__main__":
    main()
