"""A thousand stub experiments in one process: does the agent grow, leak or slow down?

    python tests/bench_soak.py [EXPERIMENTS]

Samples the agent from outside: resident memory, open descriptors, zombie children, and from the journal its own time
between two runs. Then times the replay of a journal of 10,000 rows.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from conftest import NIGHT, STUB, make_checkout, rows_of

import agent


def facts_of(pid: int) -> tuple[float, int, int]:
    """(resident MB, descriptors, zombies among its children) of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    memory = int(status.split("VmRSS:")[1].split()[0]) / 1024
    zombies = 0
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = entry.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        zombies += state == "Z" and int(parent) == pid
    return memory, len(os.listdir(f"/proc/{pid}/fd")), zombies


def main() -> None:
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as folder:
        checkout = make_checkout(Path(folder) / "checkout", Path(folder) / "cache", stub=True)
        checkout.agent(*NIGHT, "--experiments", "1")
        old = "width=64," if "width=64," in STUB else sys.exit("the stub has no width=64")
        replay = Path(folder) / "ideas.jsonl"  # different programs, each as good as the first
        with open(replay, "w") as file:
            for number in range(1, wanted + 1):
                edit = {"search": f"        {old}", "replace": f"        {old}\n        idea={number},"}
                row = {"event": "result", "number": number, "verdict": "discard", "edits": [edit]}
                file.write(
                    json.dumps(row | {"description": f"idea {number} " * 5, "hypothesis": "because " * 20}) + "\n"
                )
        with open(Path(folder) / "output", "w") as output:
            process = checkout.start("--tag", "t", "--replay", str(replay), "--experiments", str(wanted), stdout=output)
            journal, said = checkout.folder / "runs" / "t" / "journal.jsonl", 0
            print("experiment   memory MB  descriptors  zombies")
            while process.poll() is None:
                time.sleep(0.2)
                done = journal.read_bytes().count(b'{"event": "result"')
                if done >= said + 100 and process.poll() is None:
                    said = done - done % 100
                    print(f"{done:10d}  {'  '.join(f'{value:10.1f}' for value in facts_of(process.pid))}", flush=True)
        print("exit status", process.returncode)
        results = rows_of(checkout, "result")
        for at in (10, 100, len(results) - 1):
            some = sorted(row["idle_seconds"] for row in results[max(3, at - 9) : at + 1])
            print(f"agent's own time before experiment {at}: median {some[len(some) // 2]:.3f} s")
        rows = journal.read_text().splitlines(keepends=True)
        journal.write_text("".join((rows * (1 + 10_000 // len(rows)))[:10_000]))
        start = time.perf_counter()
        count = len(agent.read_journal(journal)[0])
        print(f"replay of {count:,} journal rows: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
