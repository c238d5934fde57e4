"""The tables of the paper that are run here: its numbers, and what each of its rows is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sscan.tasks.induction import SMALL as SMALL_INDUCTION
from sscan.tasks.induction import Induction, InductionOptions
from sscan.tasks.selective_copying import SMALL as SMALL_COPYING
from sscan.tasks.selective_copying import SelectiveCopying, SelectiveCopyingOptions
from sscan.tasks.text import Ablation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sscan.tasks.task import RunOptions, Task

SCALES = ("small", "paper")


def percent(share: float) -> str:
    """A share as it is written in a table of percentages."""
    return f"{100 * share:.1f}".removesuffix(".0")


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes
    ----------
    name : str
    cells : tuple of str
        What the table says of it.
    paper : dict
        The paper's numbers, by measure; text where there is none.
    changes : dict
        Of the table's options, at both scales.
    at_scale : dict
        More of them at one.
    """

    name: str
    cells: tuple[str, ...]
    paper: Mapping[str, float | str]
    changes: Mapping[str, Any] = field(default_factory=dict)
    at_scale: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes
    ----------
    name, title : str
    columns : tuple of str
        What is above the cells of rows.
    task : type of Task
    scales : dict
        The options at each scale.
    rows : tuple of Row
    generators : dict
        Ways to make the data, where the paper does not say which; options that each changes. The first is the one that
        is taken if none is asked for.
    shown : callable
        How a measure is written.
    higher_is_better : bool
    unit, across : str
        What is measured, and over what, for the picture.
    headings : dict
        Of the measures.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    task: type[Task]
    scales: Mapping[str, Any]
    rows: tuple[Row, ...]
    generators: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    shown: Callable[[float], str] = percent
    higher_is_better: bool = True
    unit: str = "accuracy"
    across: str = ""
    headings: Mapping[str, str] = field(default_factory=lambda: {"accuracy": "accuracy, %"})

    @property
    def of_texts(self) -> bool:
        """Whether the task is on texts of the user's."""
        return issubclass(self.task, Ablation)

    def row(self, name: str) -> Row:
        """The row of this name."""
        row: Row = _known(f"{self.name}: row", {row.name: row for row in self.rows}, name)
        return row

    def options(self, row: Row, scale: str, generator: str, **changes: Any) -> RunOptions:
        """Those of a run of a row."""
        base: RunOptions = _known(f"{self.name}: scale", self.scales, scale)
        data = _known(f"{self.name}: generator", self.generators, generator)
        return dataclasses.replace(base, **{**row.changes, **row.at_scale.get(scale, {}), **data, **changes})


def _known(what: str, of: Mapping[str, Any], name: str) -> Any:
    if name not in of:
        raise ValueError(f"{what} must be one of {', '.join(of)}, got {name!r}")
    return of[name]


def _layers(*layers: Any) -> dict[str, Any]:
    return {"layers": tuple({"layer": layer} if isinstance(layer, str) else layer for layer in layers)}


# Table 1. The paper's "no gate" is a layer of the S4 repository, H3 and Mamba are blocks with another inner layer.

TABLE_1 = Table(
    "table1",
    "Table 1, Selective Copying",
    ("architecture", "layer"),
    SelectiveCopying,
    {"small": SMALL_COPYING, "paper": SelectiveCopyingOptions()},
    (Row("mamba-s6", ("Mamba", "S6"), {"accuracy": 0.998}),),
    {"noise": {}, "total": {"length_is": "total"}},
)

# Table 11. Length by length, in percent.

LENGTHS = [str(1 << k) for k in range(6, 21)]


def _by_length(*percent: float | str) -> dict[str, float | str]:
    shown = [value if isinstance(value, str) else value / 100 for value in percent]
    return dict(zip(LENGTHS, shown + ["no memory"] * (len(LENGTHS) - len(shown)), strict=True))


TABLE_11 = Table(
    "table11",
    "Table 11, Induction Heads",
    ("model",),
    Induction,
    {
        "small": dataclasses.replace(SMALL_INDUCTION, longest=1 << 14),
        "paper": InductionOptions(final=1e-5),
    },
    (Row("mamba", ("Mamba",), _by_length(*[100] * 15)),),
    {"anywhere": {}, "front": {"front": 10}},
    across="length",
    headings={length: f"2^{k}" for k, length in enumerate(LENGTHS, start=6)},
)

TABLES = {table.name: table for table in (TABLE_1, TABLE_11)}
