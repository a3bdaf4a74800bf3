"""The notebook runs top to bottom, without an edit, on nights of every kind."""

import json

import nbclient
import nbformat
from conftest import ROOT

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"


def run(id, seed, source, bpb):
    metrics = {} if bpb is None else {"training_seconds": 20.0, "losses": [[1.0, 10, 5.0], [19.0, 99, 2.0]]}
    return {
        "event": "run", "id": id, "seed": seed, "source": f"{source:064x}", "val_bpb": bpb, "test_bpb": bpb and bpb + 0.02, "metrics": metrics,
        "run_seconds": 24.0, "scoring_seconds": bpb and 9.0, "idle_seconds": 0.2 if id else None,
    }  # fmt: skip


def experiment(number, verdict, bpb, description="", second=None):
    """The rows of a run and of its result."""
    description = description or f"idea {number} with a description that is rather long"
    return [run(number, 1, number, bpb), {
        "event": "result", "number": number, "run": number, "proposal": number, "parent": 0 if number else None, "commit": f"{number:040x}",
        "verdict": verdict, "reason": "", "description": description, "operator": "improve", "second": second,
    }]  # fmt: skip


BASELINE, MANY = experiment(0, "keep", 1.5), []
for i in range(1, 1000):
    other = ("discard", "crash", "invalid")[i % 3], (1.6 - i / 9_000, None, 0.9)[i % 3]
    MANY += experiment(i, "keep", 1.5 - i / 10_000) if i % 25 == 0 else experiment(i, *other)
AFTERMATH = [  # of a night that Claude proposed, that was checked and ablated
    {"event": "call", "id": 0, "tokens": {}, "usd": 0.9, "at_least": True},
    {"event": "call", "id": 0, "tokens": {"input": 9000, "output": 800}, "usd": 0.07, "at_least": False},
    {"event": "proposal", "id": 0, "source": "a\nb\nc\n"}, {"event": "proposal", "id": 1, "source": "a\nB\nc\nd\n"},
    *(run(1000 + seed, seed, 0, 1.5 + seed / 10_000) for seed in (2, 101, 102)), run(1001, 2, 1, 1.4804),
    {"event": "check", "seeds": 2, "baseline": [1.52, 1.53], "incumbent": [1.51, 1.5], "claimed": 0.02, "mean": 0.02, "welch": [0.01, 0.03], "word": "better than the baseline"},
    {"event": "ablate", "incumbent": [1.5], "rows": [{"number": 1, "word": "carries weight", "test_bpb": 1.52}]},
]  # fmt: skip
STRANGE = "$\\frac{1$ <b>bold</b>"  # no formula, no markup: a model wrote it
NIGHTS = {  # rows, and how many pictures there are of them
    "zero": ([], 1),
    "crash only": (BASELINE + [row for i in range(1, 5) for row in experiment(i, "crash", None)], 4),
    "no baseline": (experiment(0, "crash", None), 2),
    "no keep": (BASELINE + [row for i in range(1, 5) for row in experiment(i, "discard", 1.5 + i / 10)], 4),
    "one thousand": (BASELINE + MANY, 4),
    "checked": (
        [*BASELINE, *experiment(1, "keep", 1.48, STRANGE, second=[1001, 1002]), *experiment(2, "discard", 1.481, STRANGE), *AFTERMATH],
        5,
    ),
}  # fmt: skip


def execute(*places):
    """The notebook, run in one kernel after the other in each (folder, text of its first code cell or None)."""
    parts = []
    for folder, choice in places:
        cells = nbformat.read(ROOT / "analysis.ipynb", as_version=4).cells
        if choice:
            cells[1].source = choice
        fresh = f"%reset -f\nimport os, sys; os.chdir({str(folder)!r}); sys.path.insert(0, {str(ROOT)!r})"
        parts.append([nbformat.v4.new_code_cell(fresh), *cells])
        for number, cell in enumerate(parts[-1]):
            cell.id = f"cell-{len(parts)}-{number}"
    whole = nbformat.v4.new_notebook(cells=[cell for cells in parts for cell in cells])
    nbclient.NotebookClient(whole, timeout=120, kernel_name="python3", allow_errors=True).execute()
    return [[output for cell in cells for output in cell.get("outputs", [])] for cells in parts]


def pictures(outputs) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


def said(outputs) -> str:
    return "".join(output.get("text", "") for output in outputs)


def errors(outputs) -> list[str]:
    return [output.evalue for output in outputs if output.output_type == "error"]


def test_the_notebook_reads_nights_of_every_kind(tmp_path):
    for kind, (rows, _) in NIGHTS.items():
        night = tmp_path / kind / "runs" / "nov23"
        night.mkdir(parents=True)
        lines = [json.dumps(row) for row in ({"event": "night"}, *rows)]
        (night / "journal.jsonl").write_text("\n".join(lines) + '\n{"event": "res')  # one is being written
    done = dict(zip(NIGHTS, execute(*((tmp_path / kind, None) for kind in NIGHTS)), strict=True))
    for kind, outputs in done.items():
        assert errors(outputs) == [], kind
        assert (tmp_path / kind / "runs" / "nov23" / "progress.png").stat().st_size > 5_000, kind
        assert "<b>bold" not in json.dumps(outputs)
        assert pictures(outputs) == NIGHTS[kind][1], kind
        assert "results.tsv has no" not in said(outputs)
    text = said(done["checked"])
    tables = "".join(output.get("data", {}).get("text/html", "") for output in done["checked"])
    assert "gain on seed 2" in tables and "0.019800" in tables and "-1 +2" in tables
    assert "noise: the baseline on two seeds 1.500000 and 1.500200, 0.000200 apart" in text
    assert "better than the baseline" in text and "$0.07" in text and "9,000 input, 800 output tokens" in text


NO_RESULTS = ["", HEADER.replace("status", "verdict") + "a\tb\tc\td\te\n"]


def test_the_notebook_reads_results_tsv_of_other_programs_and_names_what_is_none(tmp_path):
    """A tab in a description, Latin-1, a byte order mark, another system's line ends, no number; a line that cannot be read is named."""
    verdicts = ("keep", "discard", "discard", "crash")
    plain = [
        f"{i:07x}\t{0 if i % 4 == 3 else 1 - i / 1000:.6f}\t44.0\t{verdicts[i % 4]}\tidea {i}\n" for i in range(40)
    ]
    (tmp_path / "results.tsv").write_text(HEADER + "".join(plain))
    lines = "a\t1.0\t44\tkeep\tbaseline\nb\tN/A\tN/A\tcrash\ttabs\there\tand caf\u00e9\nc\t0.9\t44\tkeep\tbetter\n"
    (tmp_path / "latin.tsv").write_bytes((HEADER + lines).encode("latin-1"))
    (tmp_path / "other.tsv").write_bytes((HEADER + lines).replace("\n", "\r\n").encode("utf-8-sig"))
    (tmp_path / "short.tsv").write_text(HEADER + lines + "d\t0.9\n")
    for i, text in enumerate(NO_RESULTS):
        (tmp_path / f"none{i}.tsv").write_text(text)
    names = ["results", "latin", "other", "short", *(f"none{i}" for i in range(len(NO_RESULTS)))]
    outputs, *read, short, none0, none1 = execute(*((tmp_path, f'NIGHT = "{name}.tsv"') for name in names))
    assert errors(outputs) == []
    assert (tmp_path / "results.png").stat().st_size > 5_000 and pictures(outputs) == 2
    assert "39 experiments after the baseline\n9 keep, 20 discard, 10 crash" in said(outputs)
    for other in read:
        assert errors(other) == [] and "2 experiments after the baseline\n1 keep, 0 discard, 1 crash" in said(other)
    assert "short.tsv, line 5: 2 fields, and the first line names 5" in errors(short)[0]
    for i, other in enumerate((none0, none1)):
        assert f"none{i}.tsv is no results.tsv" in errors(other)[0]


def test_the_notebook_is_committed_without_outputs():
    assert all(not cell.get("outputs") for cell in nbformat.read(ROOT / "analysis.ipynb", as_version=4).cells)
