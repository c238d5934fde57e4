"""The CUDA kernels of the selective scan, run by the emulator."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import emulator
import numpy as np
import pytest
from cases import Arguments, Case, Generator, cases_of, check_backward, check_forward, scan_problem
from emulator import emulated

from sscan.cuda import selective_scan

if TYPE_CHECKING:
    from collections.abc import Iterator

CASES = cases_of("selective_scan")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Factories of the kernels that were launched, and numbers of blocks."""
    seen: list[tuple[str, int]] = []
    run = emulator.launch

    def launch(kernel: Any, blocks: int, *arguments: Any) -> None:
        seen.append((kernel.factory, blocks))
        run(kernel, blocks, *arguments)

    monkeypatch.setattr(emulator, "launch", launch)
    return seen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case) -> None:
    check_forward(emulated, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case: Case) -> None:
    check_backward(emulated, case)


# --- Split along time -------------------------------------------------------------------------------------------------

FEW = {"batch": 1, "dim": 5, "length": 200, "state": 4, "initial_state": True}
SPLIT: dict[str, dict[str, Any]] = {
    "base": {},
    "length 1000": {"length": 1000, "seq_idx": "int32"},
    "no initial state": {"initial_state": False},
    "length not a multiple of anything": {"length": 239},
    "seq_idx": {"seq_idx": "int32"},
    "seq_idx, 17 states": {"seq_idx": "int64", "state": 17},
    "64 states, slow decay": {"state": 64, "A_scale": 0.01},
    "cu_seqlens": {"cu_seqlens": (0, 3, 200)},
    "complex, seq_idx": {"is_complex": True, "seq_idx": "int32"},
    "zoh": {"discretization": "zoh"},
    "float64, constant B": {"dtype": "float64", "B": "constant"},
    "bfloat16, constant C": {"dtype": "bfloat16", "C": "constant"},
    "constant B and C, no gate": {"B": "constant", "C": "constant", "z": False},
    "constant B and C, 1000 steps": {"B": "constant", "C": "constant", "z": False, "length": 1000},
    "groups": {"B": "2", "C": "2", "dim": 6},
    "no decay": {"A_scale": 0.0},
}


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts from 32 steps on."""
    selective_scan._plans.clear()
    monkeypatch.setattr(selective_scan, "SHORTEST", 32)
    yield
    selective_scan._plans.clear()


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("name", SPLIT)
def test_few_channels_are_split_along_time(name: str, launches: list[tuple[str, int]]) -> None:
    case = Case(f"split, {name}", "selective_scan", partial(scan_problem, **{**FEW, **SPLIT[name]}))
    check_forward(emulated, case)
    check_backward(emulated, case)
    assert {"ends", "forward", "starts", "backward"} <= {factory for factory, _ in launches}


def test_parts_have_a_least_length(launches: list[tuple[str, int]]) -> None:
    """The first part of a row is computed as the whole row would be; the parts after it agree to rounding."""
    arguments = scan_problem(np.random.default_rng(0), **{**FEW, "length": 1000})
    y = emulated.selective_scan(**arguments)
    (_, ends), (_, blocks) = launches
    assert (ends, blocks) == (6, 7), "parts of at least 128 steps"
    first = {k: x[..., :128] if k in ("u", "delta", "B", "C", "z") else x for k, x in arguments.items()}
    np.testing.assert_array_equal(y[..., :128], emulated.selective_scan(**first))
    assert len(launches) == 3, "what is short is not cut"


# --- More than 16 states ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"state": 17, "seq_idx": "int32", "initial_state": True, "B": "2", "C": "2"},
        {"state": 64, "initial_state": True, "dtype": "bfloat16"},
        {"state": 33, "B": "constant", "C": "constant", "initial_state": True, "discretization": "zoh"},
        {"state": 20, "is_complex": True, "B": "constant", "seq_idx": "int32", "initial_state": True},
        {"state": 64, "batch": 1, "initial_state": True, "cu_seqlens": (0, 13, 13, 40)},
        {"state": 18, "dtype": "float64", "C": "constant", "z": False},
    ],
    ids=str,
)
def test_many_states(changes: dict[str, Any]) -> None:
    scale = min(1, 16 / changes["state"])
    problem = partial(scan_problem, **{"dim": 6, "length": 40, "A_scale": scale, **changes})
    case = Case(f"{changes}", "selective_scan", problem)
    check_forward(emulated, case)
    check_backward(emulated, case)


# --- Access by vectors or one by one ----------------------------------------------------------------------------------


def moved(rng: Generator, **changes: Any) -> Arguments:
    """A problem whose arrays along time are not aligned to more than an element."""
    return scan_problem(rng, layout="offset", **changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_whether_memory_is_aligned_or_not(dtype: str) -> None:
    changes = {"dim": 5, "length": 64, "dtype": dtype, "initial_state": True}
    y, y_moved = (
        emulated.selective_scan(**make(np.random.default_rng(0), **changes)) for make in (scan_problem, moved)
    )
    np.testing.assert_array_equal(y, y_moved)
