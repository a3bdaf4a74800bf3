"""The notebook runs top to bottom, without an edit, on nights of every kind."""

import json
import shutil

import nbclient
import nbformat
import pytest
from conftest import ROOT

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"


def result(number, verdict, bpb):
    metrics = {} if bpb is None else {"training_seconds": 20.0, "startup_seconds": 3.0, "losses": [[1.0, 5.0]]}
    return {
        "event": "result", "number": number, "commit": f"{number:040x}", "val_bpb": bpb, "verdict": verdict,
        "description": f"idea {number} with a description that is rather long", "run_seconds": 24.0,
        "scoring_seconds": None if bpb is None else 9.0, "idle_seconds": None if number == 0 else 0.2, "metrics": metrics,
    }  # fmt: skip


NIGHTS = {
    "zero": [],
    "one": [result(0, "keep", 1.5)],
    "crash only": [result(0, "keep", 1.5)] + [result(i, "crash", None) for i in range(1, 5)],
    "no keep": [result(0, "keep", 1.5)] + [result(i, "discard", 1.5 + i / 10) for i in range(1, 5)],
    "many": [result(0, "keep", 1.5)]
    + [result(i, "keep", 1.5 - i / 1000) if i % 5 == 0 else result(i, ("discard", "crash", "invalid")[i % 3], (1.6, None, 0.9)[i % 3]) for i in range(1, 80)],
}  # fmt: skip


def execute(folder):
    shutil.copy(ROOT / "analysis.ipynb", folder)
    notebook = nbformat.read(folder / "analysis.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return notebook


@pytest.mark.parametrize("kind", NIGHTS)
def test_the_notebook_reads_a_night(tmp_path, kind):
    night = tmp_path / "runs" / "nov23"
    night.mkdir(parents=True)
    rows = [{"event": "night"}, *NIGHTS[kind]]
    (night / "journal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    notebook = execute(tmp_path)
    assert (night / "progress.png").stat().st_size > 5_000
    images = sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
    assert images == (2 if NIGHTS[kind] else 1)


def test_the_notebook_reads_a_plain_results_tsv(tmp_path):
    lines = [
        f"{i:07x}\t{0 if i % 4 == 3 else 1 - i / 1000:.6f}\t44.0\t{('keep', 'discard', 'discard', 'crash')[i % 4]}\tidea {i}\n"
        for i in range(40)
    ]
    (tmp_path / "results.tsv").write_text(HEADER + "".join(lines))
    source = (ROOT / "analysis.ipynb").read_text()
    shutil.copy(ROOT / "analysis.ipynb", tmp_path)
    notebook = nbformat.reads(source, as_version=4)
    notebook.cells[1].source = 'NIGHT = "results.tsv"'
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert (tmp_path / "progress.png").stat().st_size > 5_000


def test_the_notebook_is_committed_without_outputs():
    assert all(not cell.get("outputs") for cell in nbformat.read(ROOT / "analysis.ipynb", as_version=4).cells)
