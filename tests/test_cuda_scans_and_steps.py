"""CUDA kernels of linear_scan, discretize, selective_state_update, ssm and AdamW, run by the emulator."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from cases import (
    DIFFERENTIABLE,
    Case,
    cases_of,
    check_backward,
    check_forward,
    convolution_problem,
    discretize_problem,
    kernel_problem,
    linear_scan_problem,
    update_problem,
    with_layout,
)

from sscan import _backends
from sscan.cuda import adamw, order
from sscan.testing import _emulator as emulator
from sscan.testing import emulated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OPS = ("linear_scan", "discretize", "selective_state_update", "ssm_kernel", "ssm_convolution")
Launches = list[tuple[str, tuple[Any, ...]]]


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """The package of a device is looked up once; here it must be the emulator's, and afterwards the real one again."""
    _backends._package.cache_clear()
    yield
    _backends._package.cache_clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Factories and keys of the kernels that were launched."""
    seen: Launches = []
    run = emulator.launch

    def launch(kernel: Any, blocks: int, *arguments: Any) -> None:
        seen.append((kernel.factory, kernel.key))
        run(kernel, blocks, *arguments)

    monkeypatch.setattr(emulator, "launch", launch)
    return seen


def check(op: str, problem: Callable[..., dict[str, Any]], **changes: Any) -> None:
    case = Case(f"{changes}", op, partial(problem, **changes))
    check_forward(emulated, case)
    if op in DIFFERENTIABLE:
        check_backward(emulated, case)


CASES = [case for op in OPS for case in cases_of(op)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}: {case.name}")
def test_forward(case: Case) -> None:
    check_forward(emulated, case)


DIFFERENTIABLE_CASES = [case for case in CASES if case.op in DIFFERENTIABLE]


@pytest.mark.parametrize("case", DIFFERENTIABLE_CASES, ids=lambda case: f"{case.op}: {case.name}")
def test_gradients(case: Case) -> None:
    check_backward(emulated, case)


# --- linear_scan ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [127, 128, 129, 511, 512, 513, 516, 1024, 1029])
def test_lengths_around_warps_and_chunks(length: int, reverse: bool) -> None:
    check("linear_scan", linear_scan_problem, shape=(9, length), initial_state=True, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("float32", (1, 9001)), ("float32", (3, 8192)), ("bfloat16", (2, 9000)), ("complex64", (1, 5000)),
     ("complex128", (1, 4096)), ("float64", (2, 4097))],
)  # fmt: skip
def test_few_long_rows_are_cut(dtype: str, shape: tuple[int, int], reverse: bool, launches: Launches) -> None:
    check("linear_scan", linear_scan_problem, dtype=dtype, shape=shape, initial_state=True, reverse=reverse)
    cut = [key for factory, key in launches if factory == "totals"]
    assert [adjoint for *_, adjoint in cut] == [False, False, True]  # forward of both checks, and the gradients


@pytest.mark.parametrize("dtype", ["float32", "float16", "complex128"])
@pytest.mark.parametrize("length", [16, 320, 1280, 8192])
def test_the_same_whether_memory_is_aligned_or_not(dtype: str, length: int, launches: Launches) -> None:
    problem = linear_scan_problem(np.random.default_rng(0), shape=(2, length), dtype=dtype, initial_state=True)
    moved = {name: with_layout(problem[name], "offset") for name in ("a", "b")}
    h, h_moved = emulated.linear_scan(**problem), emulated.linear_scan(**{**problem, **moved})
    together = [key[2] for factory, key in launches if factory == "forward" and key[0] == dtype]
    assert {True, False} <= set(together) or dtype == "complex128"  # whose numbers are never in between
    np.testing.assert_array_equal(h, h_moved)


def test_decays_that_overflow_leave_a_state_of_zero_alone() -> None:
    a, b = np.full((1, 3000), 1e30, np.float32), np.zeros((1, 3000), np.float32)
    b[0, -1] = 1
    np.testing.assert_array_equal(emulated.linear_scan(a, b), b)
    a[0, 2000], b[0, 1999] = 0, 1  # what was before a decay of 0 is forgotten
    np.testing.assert_array_equal(emulated.linear_scan(a, b), b)


# --- discretize -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"state": 16, "dim": 40, "B": "2", "length": 65},  # vectors, several blocks for a group
        {"state": 16, "dim": 40, "B": "constant"},
        {"state": 130, "dim": 9},  # several blocks for the states
        {"state": 132, "dim": 9, "B": "constant", "method": "bilinear"},
        {"state": 33, "is_complex": True, "method": "bilinear"},
        {"state": 4, "dtype": "float64", "length": 70},
        {"state": 16, "lti": True, "dim": 40},
        {"state": 16, "dtype": "bfloat16", "B": "2", "batch": 3},
        {"state": 130, "dtype": "float16", "dim": 9},
    ],
    ids=str,
)
def test_layouts_of_discretize(changes: dict[str, Any]) -> None:
    check("discretize", discretize_problem, **changes)


# --- selective_state_update -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [("float32", None), ("float32", "bfloat16"), ("float16", "float16"), ("bfloat16", None)]
)
@pytest.mark.parametrize("state", [16, 64, 132])
def test_update_of_whole_vectors(state: int, dtype: str, state_dtype: str | None, launches: Launches) -> None:
    check(
        "selective_state_update", update_problem, state=state, state_dtype=state_dtype, dim=40, dtype=dtype, groups=2,
        indices=(4, -1, 2),
    )  # fmt: skip
    assert launches[0][1][5] == 4, "a thread has 4 states together"


def test_update_leaves_all_other_rows_alone() -> None:
    problem = update_problem(np.random.default_rng(0), indices=(3, -1, 1), state=16)
    before = problem["state"].copy()
    y = emulated.selective_state_update(**problem)
    changed = [(row != old).any() for row, old in zip(problem["state"], before, strict=True)]
    assert changed == [False, True, False, True, False, False]
    assert y[0].any()
    assert not y[1].any()


# --- ssm --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2047, 2048, 2049, 6145])
def test_kernel_of_several_chunks(length: int) -> None:
    check("ssm_kernel", kernel_problem, length=length, dim=2, state=3, is_complex=length > 2048)


def test_convolution_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sscan.cuda.ssm.BLOCK", 600)
    check("ssm_convolution", convolution_problem, dim=5)


# --- AdamW ------------------------------------------------------------------------------------------------------------

SIZES = ((5,), (3, 700), (1,), (2048,), (4097,), (64, 64), (1024,))  # more than one launch has


def parameters_of(dtype: type, seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    made = [[rng.standard_normal(size).astype(dtype) for _ in range(4)] for size in SIZES]
    return [(value, gradient, m, v**2, number % 2) for number, (value, gradient, m, v) in enumerate(made)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping(dtype: type, max_norm: float) -> None:
    gradients = [row[1] for row in parameters_of(dtype, 0)] + [np.ones(3, np.float32)]
    exact = [g.astype(np.float64) for g in gradients]
    expected = np.sqrt(sum((g * g).sum() for g in exact))
    with emulator.patched():
        norm = adamw.clip(gradients, max_norm)
    np.testing.assert_allclose(norm, expected, rtol=1e-12)
    for got, before in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(got, before * min(1.0, max_norm / expected), rtol=4 * np.finfo(got.dtype).eps)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_clipping_of_what_is_not_finite(bad: float) -> None:
    gradients = [np.ones(3, np.float32), np.array([1, bad], np.float32)]
    with emulator.patched():
        norm = adamw.clip(gradients, 1.0)
    assert not np.isfinite(norm)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("loss", [None, 1.5, np.nan, np.inf])
def test_adamw(dtype: type, loss: float | None) -> None:
    """The equations of ``sscan.nn.AdamW`` in float64; nothing changes for a loss that is not finite."""
    rows = parameters_of(dtype, 1)
    exact = [[x.astype(np.float64) for x in row[:4]] for row in rows]
    rates, correction, decays, (b1, b2), eps = (3e-3, 1e-3), 0.7, (0.9, 1.0), (0.9, 0.95), 1e-8
    factors = {np.dtype(dtype).name: np.array([correction, rates[0], decays[0], rates[1], decays[1]], dtype)}
    value = None if loss is None else np.float32([loss])
    with emulator.patched():
        adamw.update(rows, factors, value, (b1, b2), eps)
    for (p, _, m, v, group), (p0, g, m0, v0) in zip(rows, exact, strict=True):
        if loss is None or np.isfinite(loss):
            m0, v0 = b1 * m0 + (1 - b1) * g, b2 * v0 + (1 - b2) * g * g
            p0 = decays[group] * p0 - rates[group] * m0 / (np.sqrt(v0) / correction + eps)
        for got, expected in ((p, p0), (m, m0), (v, v0)):
            np.testing.assert_allclose(got, expected, rtol=16 * np.finfo(dtype).eps, atol=np.finfo(dtype).eps)


# --- Order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("count", [1, 7, 256, 257, 1000])
def test_order_of_integers(count: int, dtype: type) -> None:
    integers = np.random.default_rng(count).integers(0, 50, count).astype(dtype)
    integers[count // 3 : count // 2] = order.LARGEST - 1
    with emulator.patched():
        found = order.stable_order(integers)
    np.testing.assert_array_equal(found, np.argsort(integers, kind="stable"))
