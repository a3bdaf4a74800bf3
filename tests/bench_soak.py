"""A thousand stub experiments in one process: does the agent grow, leak or slow down?

    python tests/bench_soak.py [EXPERIMENTS] [--claude]

Samples the agent from outside: resident memory, open descriptors, zombie children, and from the journal its own time
between two runs. Then times the replay of a journal of 10,000 rows. With --claude a local server proposes, at once, while
runs of 1.2 s last, and the size of the prompt is shown too.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from conftest import NIGHT, STUB, make_checkout, rows_of
from messages_server import MessagesServer
from test_claude import numbered

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


def prompt_characters(request: dict) -> int:
    return sum(len(part["text"]) for part in request["system"]) + len(request["messages"][0]["content"])


def main() -> None:
    numbers, claude = [int(word) for word in sys.argv[1:] if word.isdecimal()], "--claude" in sys.argv
    wanted = numbers[0] if numbers else 1000
    with tempfile.TemporaryDirectory() as folder, MessagesServer([numbered()]) as server:
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
        if claude:
            checkout.slow(0.2)
        flags = ("--profile", "cpu") if claude else ("--replay", str(replay))
        keys = dict(ANTHROPIC_API_KEY="k", ANTHROPIC_BASE_URL=server.url) if claude else {}
        tag = "c" if claude else "t"
        with open(Path(folder) / "output", "w") as output:
            process = checkout.start("--tag", tag, *flags, "--experiments", str(wanted), stdout=output, **keys)
            journal, said = checkout.folder / "runs" / tag / "journal.jsonl", 0
            print("experiment   memory MB  descriptors  zombies")
            while process.poll() is None:
                time.sleep(0.2)
                done = journal.read_bytes().count(b'{"event": "result"') if journal.exists() else 0
                if done >= said + 100 and process.poll() is None:
                    said = done - done % 100
                    sizes = f"  prompt {prompt_characters(server.requests[-1]):,} characters" if claude else ""
                    print(f"{done:10d}  {'  '.join(f'{v:10.1f}' for v in facts_of(process.pid))}{sizes}", flush=True)
        print("exit status", process.returncode)
        results = rows_of(checkout, "result", tag)
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
