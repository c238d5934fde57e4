"""The tables of the paper that are run here: its numbers, and what each of its rows is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sscan.tasks.induction import SMALL as SMALL_INDUCTION
from sscan.tasks.induction import Induction, InductionOptions
from sscan.tasks.selective_copying import SMALL as SMALL_COPYING
from sscan.tasks.selective_copying import SelectiveCopying, SelectiveCopyingOptions
from sscan.tasks.task import LayeredOptions
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
    unit: str = "accuracy, %"
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
        expected = "one of " + ", ".join(of) if any(of) else "left out, as there is only one"
        raise ValueError(f"{what} must be {expected}, got {name!r}")
    return of[name]


# Table 1. S4 is S4D with a complex state. The paper's architecture "no gate" is the block of the S4 repository. Hyena,
# which it lists as H3's architecture with another layer, is the model of that name.


def _of(layer: str, **arguments: Any) -> dict[str, Any]:
    return {"layers": ({"layer": layer, **arguments},)}


_COPYING = {"small": SMALL_COPYING, "paper": SelectiveCopyingOptions(precision="bfloat16")}


def _by_age(layer: str, **arguments: Any) -> dict[str, dict[str, Any]]:
    """A layer with Hyena's filter, which wants to know how long sequences are."""
    return {
        scale: _of(layer, **arguments, length=options.memorised + options.tokens) for scale, options in _COPYING.items()
    }


TABLE_1 = Table(
    "table1",
    "Table 1, Selective Copying",
    ("architecture", "layer"),
    SelectiveCopying,
    _COPYING,
    (
        Row("s4", ("no gate", "S4"), {"accuracy": 0.183}, _of("ungated", inner="s4")),
        Row("s6", ("no gate", "S6"), {"accuracy": 0.970}, _of("ungated", inner="s6")),
        Row("h3-s4", ("H3", "S4"), {"accuracy": 0.570}, _of("h3", inner="s4")),
        Row("h3-hyena", ("H3", "Hyena"), {"accuracy": 0.301}, {}, _by_age("hyena")),
        Row("h3-s6", ("H3", "S6"), {"accuracy": 0.997}, _of("h3", inner="s6", taps=4)),
        Row("mamba-s4", ("Mamba", "S4"), {"accuracy": 0.564}, _of("gated", inner="s4")),
        Row("mamba-hyena", ("Mamba", "Hyena"), {"accuracy": 0.284}, {}, _by_age("gated", inner="hyena")),
        Row("mamba-s6", ("Mamba", "S6"), {"accuracy": 0.998}),
    ),
    {"noise": {}, "total": {"length_is": "total"}},
)

# Tables 6 to 10. A block of Mamba has 6 d_model^2 numbers, H3 with an MLP twice as many, so there are half of these.

_ABLATIONS = {
    "small": LayeredOptions(d_model=32, n_layer=2, length=128, batch=8, lr=1e-2, steps=300, minutes=None),
    "paper": LayeredOptions(
        d_model=320, n_layer=12, length=1024, batch=32, lr=3e-3, steps=3000, minutes=None, precision="bfloat16"
    ),
}


def _ablation(name: str, title: str, columns: tuple[str, ...], *rows: Row) -> Table:
    return Table(
        name, title, columns, Ablation, _ABLATIONS, rows, shown="{:.4g}".format,
        higher_is_better=False, headings={"perplexity": "perplexity", "bits_per_byte": "bits per byte"},
    )  # fmt: skip


def _row(name: str, cells: tuple[str, ...], perplexity: float, layer: str, **arguments: Any) -> Row:
    return Row(name, cells, {"perplexity": perplexity}, _of(layer, **arguments))


def _h3_row(name: str, cell: str, perplexity: float, layer: str = "h3", **arguments: Any) -> Row:
    halves = {scale: {"n_layer": options.n_layer // 2} for scale, options in _ABLATIONS.items()}
    layers = ({"layer": layer, **arguments}, {"layer": "mlp"})
    return Row(name, ("H3", cell), {"perplexity": perplexity}, {"layers": layers}, halves)


TABLE_6 = _ablation(
    "table6", "Table 6, architecture and layer", ("architecture", "layer"),
    _h3_row("h3-hyena", "Hyena", 10.24, "hyena"),
    _h3_row("h3-s4-complex", "S4, complex", 10.30, inner="s4", A="lin"),
    _h3_row("h3-s4-real", "S4, real", 10.34, inner="s4", A="real"),
    _h3_row("h3-s6", "S6", 8.95, inner="s6", taps=4),
    _row("mamba-hyena", ("Mamba", "Hyena"), 10.75, "gated", inner="hyena"),
    _row("mamba-s4-complex", ("Mamba", "S4, complex"), 10.54, "gated", inner="s4", A="lin"),
    _row("mamba-s4-real", ("Mamba", "S4, real"), 10.56, "gated", inner="s4", A="real"),
    _row("mamba-s6", ("Mamba", "S6"), 8.69, "mamba"),
)  # fmt: skip


def _selective(perplexity: float, *names: str) -> Row:
    cells = tuple("yes" if name in names else "no" for name in ("delta", "B", "C"))
    return _row("-".join(names) or "none", cells, perplexity, "gated", inner="s6", selective=list(names))


TABLE_7 = _ablation(
    "table7", "Table 7, what is selective", ("delta", "B", "C"),
    _selective(10.93), _selective(10.15, "B"), _selective(9.98, "C"), _selective(9.81, "delta"),
    _selective(8.71, "delta", "B", "C"),
)  # fmt: skip

TABLE_8 = _ablation(
    "table8", "Table 8, the initial A", ("A_n", "field"),
    _row("complex", ("-1/2 + n i", "complex"), 9.16, "gated", inner="s6", A="lin", imaginary=1.0),
    _row("half", ("-1/2", "real"), 8.85, "gated", inner="s6", A="half"),
    _row("real", ("-(n + 1)", "real"), 8.71, "gated", inner="s6", A="real"),
    _row("random", ("-exp(Normal(0, 1))", "real"), 8.71, "gated", inner="s6", A="random"),
)  # fmt: skip

TABLE_9 = _ablation(
    "table9", "Table 9, the rank of delta", ("rank",),
    _row("rank-0", ("none",), 9.12, "mamba", dt_rank=0),
    *(
        _row(f"rank-{rank}", (str(rank),), perplexity, "mamba", dt_rank=rank)
        for rank, perplexity in {1: 8.97, 2: 8.97, 4: 8.91, 8: 8.83, 16: 8.84, 32: 8.80, 64: 8.71}.items()
    ),
)  # fmt: skip

TABLE_10 = _ablation(
    "table10", "Table 10, the size of the state", ("N", "B and C"),
    *(
        _row(f"constant-{n}", (str(n), "constant"), perplexity, "gated", inner="s6", selective=["delta"], d_state=n)
        for n, perplexity in {1: 9.88, 2: 9.86, 4: 9.82, 8: 9.82, 16: 9.81}.items()
    ),
    *(
        _row(f"selective-{n}", (str(n), "selective"), perplexity, "mamba", d_state=n)
        for n, perplexity in {1: 9.73, 2: 9.40, 4: 9.09, 8: 8.84, 16: 8.71}.items()
    ),
)  # fmt: skip

# Table 11. Attention has 8 heads and all but Mamba width 128, a rate of 2e-4 and no decay of it. The paper's Hyena
# learns a feature for every position (69 million numbers); ours continues a function of the position.

LENGTHS = [str(1 << k) for k in range(6, 21)]


def _by_length(*percentages: float) -> dict[str, float | str]:
    shares: list[float | str] = [value / 100 for value in percentages]
    return dict(zip(LENGTHS, shares + ["no memory"] * (len(LENGTHS) - len(shares)), strict=True))


def _baseline(
    name: str, cell: str, paper: dict[str, float | str], steps: int, longest: int, layer: dict[str, Any], **more: Any
) -> Row:
    return Row(
        name, (cell,), paper, {"layers": (layer,), **more},
        {
            "small": {"lr": 2e-3, "longest": 1 << 10},
            "paper": {"d_model": 128, "lr": 2e-4, "final": None, "steps": steps, "longest": longest},
        },
    )  # fmt: skip


TABLE_11 = Table(
    "table11",
    "Table 11, Induction Heads",
    ("model",),
    Induction,
    {
        "small": dataclasses.replace(SMALL_INDUCTION, longest=1 << 14),
        "paper": InductionOptions(final=1e-5),
    },
    (
        _baseline(
            "mha-absolute", "attention, absolute", _by_length(100, 99.6, 100, 58.6, 26.6, 18.8, 9.8, 10.9, 7.8),
            204_800, 1 << 14, {"layer": "attention", "heads": 8}, positions="absolute",
        ),
        _baseline(
            "mha-rotary", "attention, rotary", _by_length(100, 100, 100, 83.6, 31.3, 18.4, 8.6, 9.0, 5.5),
            409_600, 1 << 14, {"layer": "attention", "heads": 8, "positions": "rotary"},
        ),
        _baseline(
            "mha-xpos", "attention, xPos", _by_length(100, 100, 100, 99.6, 67.6, 25.4, 7.0, 9.0, 7.8),
            409_600, 1 << 14, {"layer": "attention", "heads": 8, "positions": "xpos"},
        ),
        _baseline(
            "h3", "H3",
            _by_length(100, 100, 100, 80.9, 39.5, 23.8, 14.8, 8.2, 5.9, 6.6, 8.2, 4.7, 8.2, 6.3, 7.4),
            81_920, 1 << 20, {"layer": "h3"},
        ),
        _baseline(
            "hyena", "Hyena",
            _by_length(97.7, 100, 100, 100, 44.1, 12.5, 6.6, 5.1, 7.0, 5.9, 6.6, 6.6, 5.9, 6.3, 9.8),
            81_920, 1 << 20, {"layer": "hyena"},
        ),
        Row("mamba", ("Mamba",), _by_length(*[100] * 15)),
    ),
    {"anywhere": {}, "front": {"front": 10}},
    across="length",
    headings={length: f"2^{k}" for k, length in enumerate(LENGTHS, start=6)},
)  # fmt: skip

TABLES = {table.name: table for table in (TABLE_1, TABLE_6, TABLE_7, TABLE_8, TABLE_9, TABLE_10, TABLE_11)}
