"""Several runs at once on a GPU, each a thread with a stream and a CUDA graph, are the runs one by one."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import cupy
from test_reproduce import SMALLEST, TINIER

from sscan.tasks.reproduce import jobs, results, run_all
from sscan.tasks.tables import TABLES

if TYPE_CHECKING:
    from pathlib import Path


def test_runs_at_once_are_the_runs_one_by_one(tmp_path: Path) -> None:
    """Every row of two tables, with steps enough for a graph of each to be recorded and launched."""
    for name in ("table1", "table11"):
        todo = jobs(TABLES[name], "small", [], [], [], [0], TINIER | SMALLEST[name] | {"steps": 12, "evaluations": 3})
        found = []
        for at_once in (1, 4):
            out = tmp_path / f"{name}-{at_once}"
            out.mkdir()
            assert run_all(todo, out, cupy, [], at_once, (), io.StringIO()) == {}
            made = results(out, TABLES[name], "small")
            found.append({result["name"]: (result["curve"], result["measures"]) for result in made})
        assert len(found[0]) == len(todo)
        assert found[0] == found[1]
