"""How much of a night the device waits for the model: thinking while a run trains, against thinking in line.

    python tests/bench_thinking.py [EXPERIMENTS]

A local server thinks for 80 % of a run's time; one proposal in five is kept, and one keep in eight breaks the edit that waits.
"""

import sys
import tempfile
from pathlib import Path

from conftest import make_checkout, rows_of
from messages_server import MessagesServer
from test_claude import reply

STEP_S, RUN_S = 3.3, 20.0  # the stub takes six steps


def script():
    """Discards with every fifth reply a keep: a smaller width; every fortieth edit leans on the line that a keep changes."""
    count, width = 0, 64

    def answer(body):
        nonlocal count, width
        count += 1
        source = body["messages"][0]["content"].split("# train.py of the incumbent")[1]
        now = next(line for line in source.split("\n") if line.startswith("        width="))
        if count % 5 == 0:
            width -= 1
            return reply(f"narrower {count}", (now, f"        width={width},"))
        line = now if count % 40 == 6 else "        beta=0.8,"
        return reply(f"idea {count}", (line, f"{line}\n        idea={count},"))

    return [answer]


def night(experiments: int, ahead: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder, MessagesServer(script(), think_s=0.8 * RUN_S) as server:
        checkout = make_checkout(Path(folder) / "checkout", Path(folder) / "cache", stub=True)
        checkout.slow(STEP_S)
        program = checkout.folder / "agent.py"
        if not ahead:
            text = program.read_text()
            assert "in_hand = proposer.inline or" in text
            program.write_text(text.replace("in_hand = proposer.inline or", "in_hand = True or"))
        flags = ("--tag", "t", "--profile", "cpu", "--experiments", str(experiments))
        process = checkout.start(*flags, ANTHROPIC_API_KEY="k", ANTHROPIC_BASE_URL=server.url)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        rows = rows_of(checkout, "result")[1:]
        busy = sum(row["run_seconds"] + row["scoring_seconds"] for row in rows)
        idle = sum(row["idle_seconds"] for row in rows)
        missed = [row["idle_seconds"] for row in rows if row["missed"]]
        keeps = sum(row["verdict"] == "keep" for row in rows)
        each = sorted(row["idle_seconds"] for row in rows if not row["missed"])
        return {
            "busy_s": busy,
            "idle_s": idle,
            "median_s": each[len(each) // 2],
            "most_s": each[-1],
            "missed": len(missed),
            "missed_s": sum(missed),
            "keeps": keeps,
        }


def main() -> None:
    experiments = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    for name, ahead in (("while training", True), ("in line", False)):
        facts = night(experiments, ahead)
        share = facts["idle_s"] / (facts["idle_s"] + facts["busy_s"])
        rest = (facts["idle_s"] - facts["missed_s"]) / (facts["idle_s"] + facts["busy_s"])
        print(
            f"thinking {name:15}: idle {facts['idle_s']:.1f} s, {share:.1%} of the night; without the {facts['missed']} misses "
            f"after a keep {rest:.1%} (median {facts['median_s']:.2f} s, at most {facts['most_s']:.2f} s); {facts['keeps']} keeps in "
            f"{experiments}"
        )


if __name__ == "__main__":
    main()
