"""The CUDA kernels of the selective scan, run by the emulator."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from cases import Arguments, Case, Generator, cases_of, check_backward, check_forward, scan_problem

import sscan
from sscan.cuda.kernels import _segments
from sscan.testing import _emulator as emulator
from sscan.testing import emulated

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


@pytest.mark.parametrize("number", ["float32", "complex64"])
@pytest.mark.parametrize("start", [0.0, 1e-30])
def test_a_state_that_grows_on_a_split_row(number: str, start: float) -> None:
    """e^128 for each part is infinite: but of nothing it makes nothing, and of a small state a number."""
    wave, one = np.zeros((1, 1, 200), np.float32), np.ones((1, 1, 200), number)
    problem = {"u": wave, "delta": np.full_like(wave, 4.0), "A": np.ones((1, 1), number), "B": one, "C": one}
    problem["initial_state"] = np.full((1, 1, 1), start, number)
    problem["delta"][..., 32:] = 0 if start else 4.0
    problem["u"][..., -1] = 1
    y, last_state = emulated.selective_scan(**problem, return_last_state=True)
    expected, state = sscan.selective_scan(
        **{k: np.repeat(x, 8, 0) if k != "A" else x for k, x in problem.items()}, return_last_state=True
    )
    np.testing.assert_allclose(y, expected[:1], rtol=1e-3)
    np.testing.assert_allclose(last_state, state[:1], rtol=1e-3)
    dy = np.zeros_like(wave)
    dy[..., 0] = 1
    gradients = emulated.selective_scan_backward(dy, **problem)
    assert all(np.isfinite(x).all() for x in gradients if x is not None)
    assert gradients.ddelta.any() == bool(start)


@pytest.mark.parametrize("name", ["u", "delta"])
def test_what_is_not_finite_stays_in_its_channel(name: str) -> None:
    problem = scan_problem(np.random.default_rng(0), **{**FEW, "A_scale": 30.0})
    problem[name] = problem[name].copy()
    problem[name][0, 1, 3] = np.nan
    y, last_state = emulated.selective_scan(**problem, return_last_state=True)
    others = np.arange(5) != 1
    assert np.isnan(y[0, 1, 3:]).all()
    assert np.isnan(last_state[0, 1]).all()
    assert np.isfinite(y[0, others]).all()
    assert np.isfinite(last_state[0, others]).all()


@pytest.mark.parametrize("state", [4, 5, 17])
def test_an_infinite_step_under_zoh(state: int) -> None:
    """It forgets everything and leaves -B u / A, whatever fills up the lanes of a channel."""
    problem = scan_problem(
        np.random.default_rng(0), batch=1, dim=3, length=40, state=state, discretization="zoh", delta="positive",
        delta_softplus=False, delta_bias=False, D=False, z=False, B="shared", C="shared",
    )  # fmt: skip
    problem["delta"] = problem["delta"].copy()
    problem["delta"][..., 20] = np.inf
    y, last_state = emulated.selective_scan(**problem, return_last_state=True)
    B, C, u = (problem[name][..., 20] for name in "BCu")
    np.testing.assert_allclose(y[..., 20], (-B[:, None] * C[:, None] / problem["A"] * u[..., None]).sum(-1), rtol=1e-4)
    assert np.isfinite(y).all()
    assert np.isfinite(last_state).all()


@pytest.mark.parametrize("name", SPLIT)
def test_few_channels_are_split_along_time(name: str, launches: list[tuple[str, int]]) -> None:
    case = Case(f"split, {name}", "selective_scan", partial(scan_problem, **{**FEW, **SPLIT[name]}))
    check_forward(emulated, case)
    check_backward(emulated, case)
    assert {"ends", "forward", "starts", "backward"} <= {factory for factory, _ in launches}


def test_a_sequence_that_starts_where_a_part_does(launches: list[tuple[str, int]]) -> None:
    """Whether it does is seen in the step before, which is another part's."""

    def problem(rng: Generator) -> Arguments:
        return {**scan_problem(rng, **FEW), "seq_idx": np.arange(FEW["length"], dtype=np.int32)[None] // 32}

    case = Case("a sequence a tile", "selective_scan", problem)
    check_forward(emulated, case)
    check_backward(emulated, case)
    assert {"ends", "starts"} <= {factory for factory, _ in launches}


def test_parts_are_tiles_and_not_too_many(launches: list[tuple[str, int]]) -> None:
    """The first part of a row is computed as the whole row would be; the parts after it agree to rounding."""
    arguments = scan_problem(np.random.default_rng(0), **{**FEW, "length": 1000})
    y = emulated.selective_scan(**arguments)
    (_, ends), (_, blocks) = launches
    assert (ends, blocks) == (10, 11), "11 parts of 96 steps, not 31 of 32: 15^2 < 1000 / 4"
    first = {k: x[..., :32] if k in ("u", "delta", "B", "C", "z") else x for k, x in arguments.items()}
    np.testing.assert_array_equal(y[..., :32], emulated.selective_scan(**first))
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


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16", "dim": 34}, {"B": "4", "C": "4"}], ids=str)
def test_transposed_inputs_are_read_where_they_are(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same results, which lie as u does."""
    arguments = {name: make(np.random.default_rng(0), **{"dim": 20, "length": 64, **changes}) for name, make in (
        ("rows", scan_problem), ("columns", partial(scan_problem, layout="transposed")))}  # fmt: skip
    read: list[Any] = []
    run = emulator.launch

    def launch(kernel: Any, blocks: int, *given: Any) -> None:
        read.extend(x for x in given if isinstance(x, np.ndarray))
        run(kernel, blocks, *given)

    monkeypatch.setattr(emulator, "launch", launch)
    results = {}
    for name, problem in arguments.items():
        y, _, checkpoints = emulated.selective_scan_forward(**problem)
        gradients = emulated.selective_scan_backward(y, **problem, checkpoints=checkpoints)
        results[name] = [y, gradients.du, gradients.ddelta, gradients.dz]
    for rows, columns in zip(results["rows"], results["columns"], strict=True):
        np.testing.assert_array_equal(rows, columns)
        assert columns.swapaxes(1, 2).flags.c_contiguous
    for name in ("u", "delta", "B", "C", "z"):
        assert any(x.ctypes.data == arguments["columns"][name].ctypes.data for x in read), name


def test_parts_of_packed_sequences_are_numbered_one_after_the_other() -> None:
    """Every part of every sequence has one number, whatever their lengths, and numbers left over have no steps."""
    rng, steps_of_part, length = np.random.default_rng(0), 32, 512
    for count in (1, 2, 5, 16):
        borders = np.sort(rng.choice(length + 1, count + 1))
        borders[0], borders[-1] = 0, length
        numbers, device = length // steps_of_part + count, emulator.Emulator(32, [borders])
        part_of = device.rebound(_segments.part_of, {})
        found = [
            part_of(number, numbers, numbers, length, steps_of_part, count, borders.ctypes.data)
            for number in range(numbers)
        ]
        lengths = np.diff(borders)
        expected = [(i, k) for i, n in enumerate(lengths) for k in range(max(1, -(-n // steps_of_part)))]
        assert [(which, part) for which, part, _, _ in found[: len(expected)]] == expected
        assert [number for *_, number in found] == list(range(numbers))
        for which, part, parts, _ in found[: len(expected)]:
            assert parts == max(1, -(-lengths[which] // steps_of_part)) > part
        assert all(
            which == count - 1 and part * steps_of_part >= lengths[-1] for which, part, _, _ in found[len(expected) :]
        )


@pytest.mark.parametrize("borders", [(0, 200), (0, 3, 200), (0, 90, 90, 91, 200), (0, 50, 100, 150, 200)])
def test_few_packed_sequences_are_cut(borders: tuple[int, ...], launches: list[tuple[str, int]]) -> None:
    problem = partial(scan_problem, **{**FEW, "length": borders[-1], "cu_seqlens": borders})
    check_forward(emulated, case := Case(f"cut, {borders}", "selective_scan", problem))
    check_backward(emulated, case)
    assert {"ends", "forward", "starts", "backward"} <= {factory for factory, _ in launches}


def test_wrong_borders_touch_no_memory_of_others() -> None:
    """Results are whatever they are; the emulator finds what lies outside of arrays."""
    problem = scan_problem(np.random.default_rng(0), **{**FEW, "initial_state": False})
    for borders in ((0, 200, 0, 200, 0, 200), (150, 20, -5, 900), (7, 7, 7)):
        packed = {**problem, "cu_seqlens": np.array(borders, np.int64)}
        y, _, checkpoints = emulated.selective_scan_forward(**packed)
        emulated.selective_scan_backward(y, **packed, checkpoints=checkpoints)
