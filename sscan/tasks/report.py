"""The paper's numbers beside ours: Markdown, and a picture."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan.models.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from sscan.tasks.tables import Row, Table


def markdown(table: Table, results: Sequence[Mapping[str, Any]], failures: Mapping[str, str] | None = None) -> str:
    """The table with the paper's numbers and ours, a line for each generator and seed.

    The first column has the names of the rows, as ``--rows`` takes them. Where there is one measure the paper's stands
    in a column beside ours, else in a line above. Of several learning rates the lines are of the best, and all are
    named. What was not run says so, and so does what is not finished or
    has failed.
    """
    measures = list(table.headings)
    of_paper, of_ours = (measures, measures) if table.across else (measures[:1], measures[-1:])
    names = (
        ["", *table.headings.values()]
        if table.across
        else [f"paper: {table.headings[of_paper[0]]}", "ours, by", table.headings[of_ours[0]]]
    )
    head = ["row", *table.columns, *names, "rate (tried)", "steps", "minutes"]
    lines = [head, ["---"] * len(head)]
    for row in table.rows:
        paper = [_shown(table, row.paper.get(measure)) for measure in of_paper]
        ours = list(_ours(table, of_ours, [result for result in results if result["row"] == row.name]))
        if table.across:
            lines.append([row.name, *row.cells, "paper", *paper, "", "", ""])
            lines += [["", *[""] * len(row.cells), *cells] for cells in ours]
        else:
            first = [row.name, *row.cells, *paper]
            lines += [[*([""] * len(first) if i else first), *cells] for i, cells in enumerate(ours)]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return text + "".join(f"\n{name} failed: {reason}\n" for name, reason in (failures or {}).items())


def _ours(table: Table, measures: Sequence[str], results: Sequence[Mapping[str, Any]]) -> Iterable[list[str]]:
    """The cells of our lines of a row, behind those that are the paper's."""
    if not results:
        yield ["not run", *[""] * len(measures), "", "", ""]
    for generator in table.generators:
        of = [result for result in results if result["generator"] == generator]
        tried = _tried(of)
        for result in best_rate(table, of):
            options, values = result["options"], result["measures"]
            yield [
                " ".join(filter(None, (generator, f"seed {options['seed']}"))) + ", not finished" * (not values),
                *(_shown(table, values.get(measure)) for measure in measures),
                f"{options['lr']:g} ({tried})",
                f"{result['steps']:,}",
                f"{result['seconds'] / 60:.1f}",
            ]


def _tried(results: Sequence[Mapping[str, Any]]) -> str:
    """The learning rates of results, those that the best was not chosen from behind the others."""
    among = compared(results)
    others = {result["options"]["lr"] for result in results} - among.keys()
    shown = [", ".join(f"{rate:g}" for rate in sorted(rates)) for rates in (among, others)]
    return "; not compared: ".join(filter(None, shown))


def compared(results: Sequence[Mapping[str, Any]]) -> dict[float, list[Mapping[str, Any]]]:
    """Results by learning rate, of the rates that have a seed in common: that which most rates were run with.

    Unfinished runs are among them only if there are no others.
    """
    rates: dict[float, list[Mapping[str, Any]]] = {}
    for result in [r for r in results if r["finished"]] or results:
        rates.setdefault(result["options"]["lr"], []).append(result)
    counts = Counter(seed for of in rates.values() for seed in _seeds(of))
    most = max(counts, key=counts.__getitem__, default=None)
    return {rate: of for rate, of in rates.items() if most in _seeds(of)}


def best_rate(table: Table, results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The results at the learning rate whose mean is best, over the seeds that all :func:`compared` rates share."""
    rates = compared(results).values()
    shared = set.intersection(*map(_seeds, rates)) if rates else set()

    def goodness(of: list[Mapping[str, Any]]) -> float:
        values = [v for result in of if result["options"]["seed"] in shared for v in result["measures"].values()]
        return float(np.mean(values)) * (1 if table.higher_is_better else -1) if values else -np.inf

    return max(rates, key=goodness, default=[])


def _seeds(results: Sequence[Mapping[str, Any]]) -> set[int]:
    return {result["options"]["seed"] for result in results}


def _shown(table: Table, value: float | str | None) -> str:
    """A cell."""
    return table.shown(value) if isinstance(value, float) else value or ""


def draw(table: Table, results: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Write a picture: bars, or curves where there are several measures. False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    figure.suptitle(f"{table.title}, scale {results[0]['scale']}" if results else table.title)
    if table.across:
        _draw_curves(figure, table, results)
    else:
        _draw_bars(figure, table, results)
    write_atomically(path, lambda new: figure.savefig(new, format="png", dpi=150))
    return True


def _means(table: Table, results: Sequence[Mapping[str, Any]], row: Row) -> dict[str, float]:
    """Our measures of a row: means over the seeds at the best rate, of the first generator that was run."""
    for generator in table.generators:
        of = [r for r in results if r["row"] == row.name and r["generator"] == generator and r["finished"]]
        chosen = best_rate(table, of)
        if chosen:
            return {m: float(np.mean([r["measures"][m] for r in chosen])) for m in chosen[0]["measures"]}
    return {}


def _draw_bars(figure: Any, table: Table, results: Sequence[Mapping[str, Any]]) -> None:
    """Paper and ours for each row; two panels where they are measured in different units."""
    panels = figure.subplots(1, len(table.headings), sharey=True, squeeze=False)[0]
    paper, ours = ([of(row) for row in table.rows] for of in (lambda row: row.paper, partial(_means, table, results)))
    for panel, (measure, heading) in zip(panels, table.headings.items(), strict=True):
        for shift, label, rows in ((-0.2, "paper", paper), (0.2, "ours", ours)):
            bars = [(place + shift, values[measure]) for place, values in enumerate(rows) if measure in values]
            if bars:
                panel.barh(*zip(*bars, strict=True), 0.4, label=label)
                panel.legend()
        if not table.higher_is_better:  # zero is far from all of them
            panel.set_xlim(left=0.95 * min((bar.get_width() for bar in panel.patches), default=0))
        panel.set(xlabel=heading)
        panel.xaxis.set_major_formatter(lambda value, place: table.shown(value))
    panels[0].set_yticks(range(len(table.rows)), [" ".join(row.cells) for row in table.rows])
    panels[0].invert_yaxis()


def _draw_curves(figure: Any, table: Table, results: Sequence[Mapping[str, Any]]) -> None:
    """Ours by measure, and the paper's dashed."""
    measures = list(table.headings)
    axes = figure.add_subplot(xlabel=table.across, ylabel=table.unit)
    for i, row in enumerate(table.rows):
        for style, label, values in (("--", "paper", row.paper), ("-", "ours", _means(table, results, row))):
            points = [(j, values[m]) for j, m in enumerate(measures) if isinstance(values.get(m), float)]
            if points:
                label = f"{' '.join(row.cells)}, {label}"
                axes.plot(*zip(*points, strict=True), style, color=f"C{i}", marker=".", label=label)
    axes.set_xticks(range(len(measures)), list(table.headings.values()))
    axes.yaxis.set_major_formatter(lambda value, place: table.shown(value))
    axes.legend(fontsize="small")
