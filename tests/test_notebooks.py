"""The notebooks in docs/notebooks: they run, at small sizes, and their pages are of the notebooks as they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import notebooks
import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parent.parent
Names = dict[str, Any]


def learns(*losses: str) -> Callable[[Names], bool]:
    return lambda names: all(np.mean(names[loss][-3:]) < 0.95 * names[loss][0] for loss in losses)


# What each runs with, beside what it asserts itself, and what must hold in the end.
SMALL: dict[str, tuple[Names, Callable[[Names], bool]]] = {
    "flax_equinox": ({"steps": 25, "batch": 4, "length": 44}, learns("in_flax", "in_equinox")),
    "induction_heads": (
        {"steps": 8, "d_model": 8, "longest": 128},
        lambda names: [*names["accuracy"]] == [64, 128] and len(names["run"].losses) == 8,
    ),
    "language_model": (
        {"steps": 12, "d_model": 16, "batch": 2, "length": 32},
        lambda names: learns("losses")(names) and 0 < names["bits"] < 8 and len(names["made"]) == 160,
    ),
    "selective_scan": ({}, lambda names: names["after"] > 100 * names["before"]),
    "vmamba": ({"dim": 3, "height": 4, "width": 3}, lambda names: names["merged"].shape == (2, 3, 4, 3)),
}


def test_every_notebook_is_run() -> None:
    assert [path.stem for path in notebooks.NOTEBOOKS] == sorted(SMALL)


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parameters, holds = SMALL[path.stem]
    names, shown = notebooks.run(path, parameters)
    assert holds(names)
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert sum(len(figures) for _, figures in shown) == page.count("](../pictures/")
    assert sum(bool(printed) for printed, _ in shown) == page.count("\n```text\n")


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)
def test_a_page_is_of_its_notebook(path: Path) -> None:
    """Its text and code, in order; `python bench/pages/notebooks.py` writes it anew."""
    page, at = path.with_suffix(".md").read_text(encoding="utf-8"), 0
    for part in notebooks.skeleton(path):
        found = page.find(part, at)
        assert found >= 0, f"docs/notebooks/{path.stem}.md lacks: {part}"
        at = found + len(part)
    for name in notebooks.pictures(page):
        assert (ROOT / "docs" / "pictures" / name).is_file(), name


def test_every_page_is_behind_the_door_to_learn() -> None:
    page = (ROOT / "docs" / "learn.md").read_text(encoding="utf-8")
    assert [path.stem for path in notebooks.NOTEBOOKS if f"(notebooks/{path.stem}.md)" not in page] == []


def test_parameters_must_be_there(tmp_path: Path) -> None:
    notebook = tmp_path / "notebook.py"
    notebook.write_text('# %% tags=["parameters"]\nsteps = 3\n\n# %%\ndone = steps\ndone\n')
    assert notebooks.run(notebook, {"steps": 1})[1][1] == ("1\n", [])
    with pytest.raises(AssertionError, match="no parameters"):
        notebooks.run(notebook, {"step": 1})
    notebook.write_text("# %%\nsteps = 3\n")
    with pytest.raises(AssertionError, match="has no cell of parameters"):
        notebooks.run(notebook, {"steps": 1})
