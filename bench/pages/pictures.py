"""Draw the pictures of the documentation that show what lies in bench/results: ``python bench/pages/pictures.py``.

speed.svg, memory.svg, block.svg, figure8.svg and memory-125m.svg in docs/pictures, the last two of the newest files of
figure8.py and memory_125m.py; those of the experiments and of the trained model are drawn by report_experiments.py and
report_training.py, and those of notebooks by notebooks.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from sscan.models import MambaConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
SPEED = ROOT / "bench" / "results" / "cuda-2026-11-29.md"
MEMORY = ROOT / "bench" / "results" / "memory-2026-11-30.md"
OURS, THEIRS = "#0e7c86", "#b7b7b7"
# Ours are dark; the first name that a line begins with counts.
LINES = {
    "scan, N 16": (OURS, "-"), "scan, N 4": (OURS, "--"), "two Mamba": (OURS, "-"), "unfused": ("#e0a458", "-"),
    "FFT": ("#a68fc4", "-"), "attention, flash": ("#555555", "-"), "attention, cuDNN": ("#555555", "--"),
    "attention + MLP, flash": ("#555555", "-"), "attention + MLP, cuDNN": ("#555555", "--"),
}  # fmt: skip


def rows(page: Path, columns: int) -> list[list[str]]:
    """The cells of a page's tables whose first is a shape and that have so many columns."""
    lines = re.findall(r"^\| \(\d.*\|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found = [row for row in cells if len(row) == columns]
    assert found, f"{page} has no table of {columns} columns"
    return found


def first_number(cell: str) -> float:
    return float(re.match(r"[\d.]+", cell)[0])


def speeds() -> dict[tuple[str, str], tuple[float, float, float, float]]:
    """Picoseconds a point by shape and dtype: ours and theirs forward, ours and theirs backward.

    Of rows that come twice the first counts: the page begins with what was measured again.
    """
    found: dict[tuple[str, str], tuple[float, float, float, float]] = {}
    for shape, dtype, forward, _, backward, published in rows(SPEED, 6):
        theirs = [float(number) for number in published.split("/")]
        numbers = first_number(forward), theirs[0], first_number(backward), theirs[1]
        found.setdefault((shape, dtype), numbers)
    return found


def draw_speed(shown: str = "float32") -> Figure:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    shapes = {shape: numbers for (shape, dtype), numbers in speeds().items() if dtype == shown}
    for i, (axes, title) in enumerate(zip(figure.subplots(1, 2, sharey=True), ("forward", "backward"), strict=True)):
        for offset, color, label, which in ((-0.2, OURS, "sscan", 0), (0.2, THEIRS, "mamba_ssm", 1)):
            values = [numbers[2 * i + which] for numbers in shapes.values()]
            bars = axes.barh([y + offset for y in range(len(shapes))], values, 0.38, color=color, label=label)
            axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
        axes.set_yticks(range(len(shapes)), shapes)
        axes.set(title=title, xlabel="picoseconds for a point of (batch, dim, length)")
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.axes[1].legend(frameon=False, loc="center right")
    return figure


def draw_memory() -> Figure:
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    training, reading = figure.subplots(1, 2)
    table = rows(MEMORY, 4)
    lengths = [int(re.findall(r"\d+", shape)[2]) for shape, *_ in table]
    for column, color, label in ((3, THEIRS, "an array of all states"), (2, OURS, "sscan, forward and backward")):
        training.plot(lengths, [float(row[column]) for row in table], "o-", color=color, label=label)
    training.set(title="the scan, 256 channels, 16 states", ylabel="MB beyond the inputs")
    config = MambaConfig(d_model=768, n_layer=24)
    d_inner, _ = config.block.sizes(config.d_model)
    state = config.n_layer * d_inner * (config.block.d_state + config.block.d_conv - 1) * 4 / 1e6
    long = [2**k for k in range(10, 21, 2)]
    keys_and_values = [2 * config.n_layer * config.d_model * length * 4 / 1e6 for length in long]
    reading.plot(long, keys_and_values, "o-", color=THEIRS, label="keys and values of attention")
    reading.plot(long, [state] * len(long), "o-", color=OURS, label="states of Mamba")
    reading.set(title="what a model remembers of a text, 768 x 24", ylabel="MB, float32")
    for axes in (training, reading):
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel="length")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def newest(name: str, results: Path = ROOT / "bench" / "results") -> dict[str, Any]:
    """What the last NAME-DATE.json holds."""
    found = sorted(results.glob(f"{name}-[0-9]*.json"))
    if not found:
        raise FileNotFoundError(f"{results} has no {name}-DATE.json; python bench/run.py gpu --only {name} writes it")
    record: dict[str, Any] = json.loads(found[-1].read_text(encoding="utf-8"))
    return record


def draw_figure8(record: dict[str, Any]) -> Figure:
    """Milliseconds by length: kernels above, blocks below."""
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    ways = ("forward", "forward and backward")
    for row, kind in zip(figure.subplots(2, 2, sharex=True, sharey="row"), ("kernel", "block"), strict=True):
        for axes, way in zip(row, ways, strict=True):
            lines: dict[str, list[tuple[int, float]]] = {}
            for found in record["measurements"]:
                if (found["kind"], found["way"]) == (kind, way) and "ms" in found:
                    lines.setdefault(found["name"], []).append((found["length"], found["ms"]))
            for name, points in lines.items():
                color, style = next(look for start, look in LINES.items() if name.startswith(start))
                axes.plot(*zip(*points, strict=True), style, color=color, marker="o", markersize=3, label=name)
            axes.set_xscale("log", base=2)
            axes.set(yscale="log", title=f"{kind}, {way}")
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"milliseconds, {record['device']}")
        row[0].legend(frameon=False, fontsize=8)
    for axes in figure.axes[2:]:
        axes.set_xlabel("length")
    return figure


def draw_memory_125m(record: dict[str, Any]) -> Figure:
    """GB at most in a step of training, by batch and by length; solid: all kept, dashed: layers and loss made again."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    of_batch = f"length {record['length']:,}"
    for axes, by, title in zip(figure.subplots(1, 2), ("batch", "length"), (of_batch, "batch 1"), strict=True):
        for name, color in (("Transformer", THEIRS), ("Mamba", OURS)):
            for way, style in (("all kept", "o-"), ("layers and loss again", "o--")):
                points = [
                    (row[by], row["peak"] / 1e9) for row in record["measurements"]
                    if (row["by"], row["name"], row["way"]) == (by, name, way) and "peak" in row
                ]  # fmt: skip
                assert points, f"the record has no peak of {name}, {way}, by {by}"
                axes.plot(*zip(*points, strict=True), style, color=color, markersize=4, label=f"{name}, {way}")
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel=by, title=f"training, {title}", ylabel="GB at most")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def draw_block() -> Figure:
    figure = Figure(figsize=(7.5, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.5, 15.5), ylim=(0.4, 6.4))
    axes.axis("off")
    boxes = {
        "in_proj": (1.0, 3.2), "conv1d\nSiLU": (4.0, 4.6), "selective\nscan": (9.6, 4.6), "x_proj": (5.4, 2.9),
        "dt_proj\nsoftplus": (8.0, 2.9), "SiLU": (8.0, 1.0), "×": (12.0, 3.2), "out_proj": (13.8, 3.2),
    }  # fmt: skip
    for name, (x, y) in boxes.items():
        scan = "scan" in name
        box = {"boxstyle": "round,pad=0.5", "facecolor": OURS if scan else "white", "edgecolor": OURS}
        axes.text(x, y, name, ha="center", va="center", fontsize=10, color="white" if scan else "black", bbox=box)
    arrow(axes, (-0.4, 3.2), (0.2, 3.2))
    arrow(axes, (1.6, 3.7), (3.1, 4.5), "x")
    arrow(axes, (1.6, 2.7), (7.3, 1.0), "z")
    arrow(axes, (4.9, 4.7), (8.6, 4.7), "u")
    arrow(axes, (4.7, 4.0), (5.1, 3.4))
    arrow(axes, (6.1, 2.9), (7.0, 2.9), "dt")
    arrow(axes, (5.9, 3.4), (8.6, 4.4), "B, C")
    arrow(axes, (8.6, 3.5), (9.2, 4.0), "delta", (0.65, -0.1))
    arrow(axes, (9.7, 6.2), (9.7, 5.3), "A, D", (0.6, 0))
    arrow(axes, (10.6, 4.6), (11.8, 3.6), "y")
    arrow(axes, (8.6, 1.0), (11.8, 2.8))
    arrow(axes, (12.3, 3.2), (12.9, 3.2))
    arrow(axes, (14.7, 3.2), (15.3, 3.2))
    return figure


def arrow(axes: Axes, start: Any, end: Any, text: str = "", shift: tuple[float, float] = (0, 0.25)) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#555555"}, annotation_clip=False)
    middle = (start[0] + end[0]) / 2 + shift[0], (start[1] + end[1]) / 2 + shift[1]
    axes.text(*middle, text, ha="center", fontsize=9, color="#333333")


def main() -> None:
    mpl.rcParams.update({"svg.hashsalt": "sscan", "font.size": 9})
    for name, draw in {"speed": draw_speed, "memory": draw_memory, "block": draw_block}.items():
        draw().savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
    for name, draw_record in {"figure8": draw_figure8, "memory-125m": draw_memory_125m}.items():
        draw_record(newest(name)).savefig(PICTURES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
