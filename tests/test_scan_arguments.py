"""Lists of arguments that are repeated, from public functions to kernels: documented once, and the same everywhere."""

from __future__ import annotations

import fnmatch
import inspect
import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import sscan
import sscan.jax
import sscan.torch
import sscan.torch.distributed
from sscan import reference
from sscan.cuda import _launch
from sscan.cuda._launch import Kernel
from sscan.cuda.kernels import _backward, _matrices, _scan, selective_scan, selective_scan_backward

if TYPE_CHECKING:
    from collections.abc import Callable

ARGUMENTS = inspect.signature(sscan.selective_scan).parameters
# Functions with the same arguments, and those of them that they lack and have beside them.
TWINS: dict[Callable[..., Any], tuple[str, str]] = {
    sscan.selective_scan_forward: ("", "keep_checkpoints state_passing"),
    sscan.selective_scan_backward: ("return_last_state", "dy dlast_state checkpoints state_passing"),
    reference.selective_scan: ("", ""),
    reference.selective_scan_backward: ("return_last_state", "dy dlast_state"),
    sscan.torch.selective_scan: ("", ""),
    sscan.torch.distributed.selective_scan: ("seq_idx cu_seqlens", "group"),
    sscan.jax.selective_scan: ("", ""),
}


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: f"{twin.__module__}.{twin.__name__}")
def test_arguments_of_the_scan_are_the_same_everywhere(twin: Callable[..., Any]) -> None:
    lacking, beside = (set(names.split()) for names in TWINS[twin])
    parameters = inspect.signature(twin).parameters
    assert set(parameters) == ARGUMENTS.keys() - lacking | beside
    positional = [name for name, x in ARGUMENTS.items() if name in parameters and x.kind is x.POSITIONAL_OR_KEYWORD]
    in_order = [name for name in parameters if name in positional and name != "return_last_state"]
    assert in_order == [name for name in positional if name != "return_last_state"]
    for name in parameters.keys() - beside - {"return_last_state"}:
        assert parameters[name].default == ARGUMENTS[name].default, name
        assert parameters[name].kind == ARGUMENTS[name].kind, name


V = selective_scan.SHIPPED[0]
KERNELS = {
    "forward": Kernel("selective_scan", "forward", (4, *V)),
    "starts": Kernel("selective_scan_backward", "starts", (4, *V)),
    "backward": Kernel("selective_scan_backward", "backward", (2, 4, 3, *V)),
}


def kernel_parameters(name: str) -> list[str]:
    function, _ = _launch.build(KERNELS[name])
    return list(inspect.signature(function).parameters)


def test_parameters_of_kernels_are_documented_once() -> None:
    rows = re.findall(r"^    (\S+(?: \S+)*)  +\S", _scan.__doc__ or "", re.MULTILINE)
    documented = [name for row in rows for name in row.split()]
    assert len(documented) == len(set(documented)) > 30
    found = {parameter for name in KERNELS for parameter in kernel_parameters(name)}
    matches = {name: [pattern for pattern in documented if fnmatch.fnmatch(name, pattern)] for name in found}
    assert all(len(patterns) == 1 for patterns in matches.values()), matches
    assert {pattern for (pattern,) in matches.values()} == set(documented)


def test_parameters_that_kernels_share_are_in_one_order() -> None:
    lists = [kernel_parameters(name) for name in KERNELS]
    for one in lists:
        for other in lists:
            assert [name for name in one if name in other] == [name for name in other if name in one]


# --- Stages -----------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
SOURCES = [inspect.getsource(m) for m in (_scan, _matrices, _backward, selective_scan, selective_scan_backward)]


@pytest.mark.parametrize(("table", "kernel"), [(0, "forward"), (1, "backward")])
def test_kernels_are_the_stages_of_their_page(table: int, kernel: str) -> None:
    """Every stage of the page's table is a device function, and the kernel calls them in the table's order."""
    tables = PAGE.read_text(encoding="utf-8").split("| stage | what it does |")[1:]
    assert len(tables) == 2
    stages = re.findall(r"^\| `(\w+)` \|", tables[table].split("\n\n")[0], re.MULTILINE)
    assert len(stages) >= 7
    for stage in stages:
        name = {"stage_matrices": "stage"}.get(stage, stage)  # of both B and C
        assert any(f"    @device\n    def {name}(" in source for source in SOURCES), stage
    body = inspect.getsource(_launch.build(KERNELS[kernel])[0])
    called = {stage: body.find(f"{stage}(") for stage in stages}
    own = [stage for stage in stages if called[stage] >= 0]
    assert len(own) >= 7
    assert all(called[one] < called[next_one] for one, next_one in pairwise(own)), called
