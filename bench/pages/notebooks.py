"""Run the notebooks in docs/notebooks and write their pages: text, code, and what the code printed and drew.

    python bench/pages/notebooks.py                   # all of them, at full size: some ten minutes on two cores
    python bench/pages/notebooks.py selective_scan    # one

A notebook is a Python file whose cells begin with `# %%`, or `# %% [markdown]` for text, as Jupytext and VS Code read
it. The cell with the tag "parameters" holds its sizes; tests/test_notebooks.py runs it with smaller ones.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
PARAMETERS = 'tags=["parameters"]'


@dataclass(frozen=True)
class Cell:
    """A cell of a notebook: its first line, what that says of it, and the lines below."""

    line: int
    head: str
    source: str

    @property
    def is_text(self) -> bool:
        return "[markdown]" in self.head

    @property
    def text(self) -> str:
        return re.sub(r"^# ?", "", self.source, flags=re.MULTILINE)


def cells(path: Path) -> list[Cell]:
    """The cells of a notebook."""
    text = path.read_text(encoding="utf-8")
    heads = [*re.finditer(r"^# %%(.*)\n", text, re.MULTILINE)]
    assert heads[0].start() == 0, f"{path}: the first line must begin a cell"
    ends = [*(head.start() for head in heads[1:]), len(text)]
    return [
        Cell(text.count("\n", 0, head.end()), head[1], text[head.end() : end].strip("\n"))
        for head, end in zip(heads, ends, strict=True)
    ]


def run(path: Path, parameters: dict[str, Any] | None = None) -> tuple[dict[str, Any], list[tuple[str, list[Any]]]]:
    """The names that a notebook leaves, and of every code cell what it printed and the figures that it drew.

    `parameters` replace values of the cell with that tag.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    namespace: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for cell in cells(path):
        if cell.is_text:
            continue
        shown.append((_printed(cell, path, namespace), [pyplot.figure(i) for i in pyplot.get_fignums()]))
        pyplot.close("all")
        if PARAMETERS in cell.head and parameters:
            unknown = parameters.keys() - namespace.keys()
            assert not unknown, f"{path}: no parameters {unknown}"
            namespace.update(parameters)
            parameters = None
    assert not parameters, f"{path} has no cell of parameters"
    return namespace, shown


def _printed(cell: Cell, path: Path, namespace: dict[str, Any]) -> str:
    """Run a cell; what it printed, and the value of the expression that it may end in."""
    tree = ast.parse("\n" * cell.line + cell.source, str(path))
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(tree, str(path), "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), str(path), "eval"), namespace)
            if value is not None and not type(value).__module__.startswith("matplotlib."):
                print(repr(value))
    return out.getvalue()


def skeleton(path: Path) -> list[str]:
    """What a page has of its notebook itself, cell by cell, in order."""
    return [cell.text if cell.is_text else f"```py\n{cell.source}\n```" for cell in cells(path)]


def pictures(page: str) -> list[str]:
    """The files of the pictures that a page shows."""
    return re.findall(r"\]\(\.\./pictures/([^)]+)\)", page)


def write(path: Path) -> None:
    """Run a notebook and write its page and pictures."""
    _, shown = run(path)
    outputs, numbers = iter(shown), itertools.count(1)
    parts = []
    for cell, part in zip(cells(path), skeleton(path), strict=True):
        parts.append(part)
        if not cell.is_text:
            printed, figures = next(outputs)
            if printed:
                parts.append(f"```text\n{printed.rstrip()}\n```")
            for figure in figures:
                picture = f"{path.stem}-{next(numbers)}.png"
                figure.savefig(FOLDER.parent / "pictures" / picture, dpi=90)
                parts.append(f"![what the cell draws](../pictures/{picture})")
    note = f"*This page is [{path.name}]({path.name}), run by `python bench/pages/notebooks.py {path.stem}`.*"
    path.with_suffix(".md").write_text("\n\n".join([*parts, note]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *(path.stem for path in NOTEBOOKS)])
    for path in [FOLDER / f"{name}.py" for name in parser.parse_args().names] or NOTEBOOKS:
        write(path)
        print(path.with_suffix(".md"))
