"""The picture of a night: every experiment, and the best so far. Drawn when a night ends, and by analysis.ipynb.

matplotlib is imported on use. A result is a dict with number, verdict, val_bpb, test_bpb (None where there is none) and description.
"""

import logging
import statistics
from itertools import pairwise
from pathlib import Path

COLOURS = {  # Okabe and Ito: told apart by the colour-blind too; the markers differ as well
    "baseline": "#000000", "keep": "#0072B2", "discard": "#BBBBBB", "crash": "#D55E00", "invalid": "#CC79A7", "test": "#009E73",
}  # fmt: skip
MARKERS = {"baseline": "D", "keep": "o", "discard": "o", "crash": "x", "invalid": "s"}
SIZE = (11, 5.5)  # inches
LABELS = 25  # keeps that are named at most
LABEL_CHARS = 46


def save_progress(path: Path, results: list[dict], title: str) -> None:
    """Writes the picture, without a display. Raises ImportError, OSError."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it says when it looks for fonts
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE)
    draw_progress(figure.subplots(), results, title)
    figure.savefig(path, dpi=120)


def draw_progress(axes, results: list[dict], title: str, seeds: list[float] = ()) -> None:
    """Each experiment as a dot, the best so far as a line; what lies beyond an edge is an arrow there.

    seeds: the baseline's val_bpb on its seeds; from three on they are a grey band, mean and two standard deviations.
    """
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="experiment", ylabel="val_bpb (lower is better)", xticks=[])
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    kept = [result for result in results if result["verdict"] == "keep"]
    numbers = [result["val_bpb"] for result in results if result["val_bpb"] is not None]
    if not numbers:
        axes.text(0.5, 0.5, "no experiment has a number yet", ha="center", va="center", transform=axes.transAxes)
        return
    start, tests = numbers[0], [result for result in kept if result["test_bpb"] is not None]
    low = min([start, *(result["val_bpb"] for result in kept), *(result["test_bpb"] for result in tests)])
    top = start + 0.5 * max(start - low, 0.01 * start)
    if len(seeds) > 2:
        mean, noise = statistics.mean(seeds), statistics.stdev(seeds)
        low, top = min(low, mean - 2 * noise), max(top, mean + 2.2 * noise)
        look = dict(color="#000000", alpha=0.07, lw=0)
        axes.axhspan(mean - 2 * noise, mean + 2 * noise, **look, label=f"baseline on {len(seeds)} seeds")
    top = max([top, *(result["test_bpb"] for result in tests)])
    top += 0.03 * (top - low)
    bottom, end = low - 0.22 * (top - low), results[-1]["number"] + 0.5
    axes.set(ylim=(bottom, top), xlim=(-0.2 * end - 0.5, 1.01 * end))
    if kept:
        steps = [(result["number"], result["val_bpb"]) for result in kept]
        steps.append((end, kept[-1]["val_bpb"]))
        axes.step(*zip(*steps, strict=True), where="post", color=COLOURS["keep"], lw=1.6, zorder=2, label="best so far")
    for kind, marker in MARKERS.items():
        own = [result for result in results if kind_of(result) == kind]
        seen = [result for result in own if result["val_bpb"] is not None]
        look = dict(c=COLOURS[kind], s=12 if len(results) > 300 else 28, zorder=3)
        inside = [(r["number"], r["val_bpb"]) for r in seen if bottom <= r["val_bpb"] <= top]
        if own:
            label = kind if kind == "baseline" else f"{len(own)} {kind}"
            axes.scatter(*(zip(*inside, strict=True) if inside else ([], [])), marker=marker, label=label, **look)
        below = [r["number"] for r in seen if r["val_bpb"] < bottom]
        above = [r["number"] for r in own if r["val_bpb"] is None or r["val_bpb"] > top]
        for there, edge, arrow in ((above, top, "x" if kind == "crash" else "^"), (below, bottom, "v")):
            axes.scatter(there, [edge] * len(there), marker=arrow, clip_on=False, **look)
    if tests:
        points = [result["number"] for result in tests], [result["test_bpb"] for result in tests]
        axes.plot(*points, "d", ms=5, mfc="none", color=COLOURS["test"], zorder=3, label="test, baseline and keeps")
    above = dict(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=8, columnspacing=1.2, handlelength=1.4)
    axes.legend(**above, frameon=False, fontsize=9)  # it hides no experiment there
    axes.set_xticks([tick for tick in MaxNLocator(9, integer=True).tick_values(0, end) if 0 <= tick <= end])
    axes.figure.tight_layout()
    label_keeps(axes, kept)


def kind_of(result: dict) -> str:
    """The verdict; of experiment 0, if it was kept, `baseline`."""
    return "baseline" if result["number"] == 0 and result["verdict"] == "keep" else result["verdict"]


def label_keeps(axes, kept: list[dict]) -> None:
    """Names the last keep and those with most gain to their lower left, where no experiment can be: none was that good before."""
    gains = {after["number"]: before["val_bpb"] - after["val_bpb"] for before, after in pairwise(kept)}
    named = sorted(kept[1:], key=lambda result: (result is not kept[-1], -gains[result["number"]]))[: LABELS + 1]
    to_pixels, to_data = axes.transData, axes.transData.inverted()
    boxes, corner = [], axes.transAxes.transform((0, 0))
    for result in named:
        x, y = to_pixels.transform((result["number"], result["val_bpb"])) - (12, 9)
        words = f"{result['number']:.0f}  {result['description']}"
        words = words if len(words) <= LABEL_CHARS else words[: LABEL_CHARS - 1] + "…"
        note = axes.text(*to_data.transform((x, y)), words, ha="right", va="center", fontsize=8, parse_math=False)
        while note.get_window_extent().x0 < corner[0] + 10 and len(words) > 8:
            words = words.removesuffix("…")[:-1] + "…"
            note.set_text(words)
        while True:
            note.set_position(to_data.transform((x, y)))
            box = note.get_window_extent().expanded(1.06, 1)
            hit = [other for other in boxes if box.overlaps(other)]
            if not hit:
                break
            y = min(other.y0 for other in hit) - 1 - (box.y1 - box.y0) / 2
        if box.y0 < corner[1]:
            note.remove()
            continue
        boxes.append(box)
        end = to_data.transform((x + 2, y))
        line = [end[0], result["number"]], [end[1], result["val_bpb"]]
        axes.plot(*line, color=COLOURS["keep"], lw=0.5, alpha=0.6, zorder=1)
