"""The notebook runs top to bottom, without an edit, on nights of every kind."""

import json

import nbclient
import nbformat
import pytest
from conftest import ROOT

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"


def result(number, verdict, bpb, **more):
    metrics = (
        {}
        if bpb is None
        else {"training_seconds": 20.0, "startup_seconds": 3.0, "losses": [[1.0, 10, 5.0], [19.0, 99, 2.0]]}
    )
    return {
        "event": "result", "number": number, "parent": None if number == 0 else 0, "commit": f"{number:040x}", "source": f"{number:064x}",
        "val_bpb": bpb, "test_bpb": bpb and bpb + 0.02, "verdict": verdict, "reason": "", "operator": "improve",
        "description": f"idea {number} with a description that is rather long", "run_seconds": 24.0, "proposal": number, "second": None,
        "scoring_seconds": None if bpb is None else 9.0, "idle_seconds": None if number == 0 else 0.2, "metrics": metrics, **more,
    }  # fmt: skip


def run(seed, source, bpb):
    return {
        "event": "run", "source": source, "seed": seed, "val_bpb": bpb, "run_seconds": 24.0, "scoring_seconds": 9.0, "idle_seconds": 0.1,
        "metrics": {"training_seconds": 20.0},
    }  # fmt: skip


def proposal(number, source):
    return {"event": "proposal", "id": number, "source": source}


BASELINE = result(0, "keep", 1.5)
MANY = [BASELINE] + [
    result(i, "keep", 1.5 - i / 10_000) if i % 25 == 0 else result(i, ("discard", "crash", "invalid")[i % 3], (1.6 - i / 9_000, None, 0.9)[i % 3])
    for i in range(1, 1000)
]  # fmt: skip
AFTERMATH = [  # of a night that Claude proposed, that was checked and ablated
    {"event": "call", "id": 0, "tokens": {}, "usd": 0.9, "at_least": True},
    {"event": "call", "id": 0, "tokens": {"input": 9000, "output": 800}, "usd": 0.07, "at_least": False},
    proposal(0, "a\nb\nc\n"), proposal(1, "a\nB\nc\nd\n"),
    *(run(seed, BASELINE["source"], 1.5 + seed / 10_000) for seed in (1, 2, 101, 102)), run(2, f"{1:064x}", 1.4804),
    {"event": "check", "seeds": 2, "baseline": [1.52, 1.53], "incumbent": [1.51, 1.5], "claimed": 0.02, "mean": 0.02, "welch": [0.01, 0.03]},
    {"event": "ablate", "incumbent": [1.5], "rows": [{"number": 1, "word": "carries weight", "test_bpb": 1.52}]},
]  # fmt: skip
STRANGE = "$\\frac{1$ <b>bold</b>"  # no formula, no markup: a model wrote it
NIGHTS = {  # rows, and how many pictures there are of them
    "zero": ([], 1),
    "one": ([BASELINE], 3),
    "crash only": ([BASELINE] + [result(i, "crash", None) for i in range(1, 5)], 4),
    "no baseline": ([result(0, "crash", None)], 2),
    "no keep": ([BASELINE] + [result(i, "discard", 1.5 + i / 10) for i in range(1, 5)], 4),
    "one thousand": (MANY, 4),
    "checked": (
        [
            BASELINE,
            result(1, "keep", 1.48, description=STRANGE, second=[1.4804, 1.5002]),
            result(2, "discard", 1.481, description=STRANGE),
            *AFTERMATH,
        ],
        5,
    ),
}


def execute(folder, choice=None):
    notebook = nbformat.read(ROOT / "analysis.ipynb", as_version=4)
    if choice:
        notebook.cells[1].source = choice
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    return notebook


def pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


def said(notebook) -> str:
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.mark.parametrize("kind", NIGHTS)
def test_the_notebook_reads_a_night(tmp_path, kind):
    night, (rows, count) = tmp_path / "runs" / "nov23", NIGHTS[kind]
    night.mkdir(parents=True)
    lines = [json.dumps(row) for row in ({"event": "night"}, *rows)]
    (night / "journal.jsonl").write_text("\n".join(lines) + '\n{"event": "res')  # one is being written
    notebook = execute(tmp_path)
    assert (night / "progress.png").stat().st_size > 5_000
    assert "<b>bold" not in json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert pictures(notebook) == count
    assert "results.tsv has no" not in said(notebook)
    if kind == "checked":
        text = said(notebook)
        table = next(cell for cell in notebook.cells if "gain on seed 2" in cell.source and cell.get("outputs"))
        assert "0.019800" in table.outputs[0]["data"]["text/html"] and "-1 +2" in table.outputs[0]["data"]["text/html"]
        assert "noise: the baseline on two seeds 1.500000 and 1.500200, 0.000200 apart" in text
        assert "better than the baseline" in text and "$0.07" in text and "9,000 input, 800 output tokens" in text


def test_the_notebook_reads_a_plain_results_tsv(tmp_path):
    verdicts = ("keep", "discard", "discard", "crash")
    lines = [
        f"{i:07x}\t{0 if i % 4 == 3 else 1 - i / 1000:.6f}\t44.0\t{verdicts[i % 4]}\tidea {i}\n" for i in range(40)
    ]
    (tmp_path / "results.tsv").write_text(HEADER + "".join(lines))
    notebook = execute(tmp_path, 'NIGHT = "results.tsv"')
    assert (tmp_path / "results.png").stat().st_size > 5_000 and pictures(notebook) == 2
    assert "39 experiments after the baseline\n9 keep, 20 discard, 10 crash" in said(notebook)


@pytest.mark.parametrize(
    "text", ["", "not a table\n", HEADER.replace("status", "verdict") + "a\tb\tc\td\te\n", "a\tb\n" * 3 + "a\tb\tc\n"]
)
def test_another_file_is_named_as_such(tmp_path, text):
    (tmp_path / "other.tsv").write_text(text)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match=r"other\.tsv is no results\.tsv"):
        execute(tmp_path, 'NIGHT = "other.tsv"')


def test_the_notebook_is_committed_without_outputs():
    assert all(not cell.get("outputs") for cell in nbformat.read(ROOT / "analysis.ipynb", as_version=4).cells)
