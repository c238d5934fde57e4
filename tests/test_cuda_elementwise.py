"""Functions by element on the GPU, in the emulator: numbers, layouts, and what lies beside the arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from scipy.special import expit, ndtr

from sscan.cuda import elementwise
from sscan.nn import elementwise as formulas
from sscan.testing import _emulator as emulator

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def density(x: Any) -> Any:
    return np.exp(-x * x / 2) / np.sqrt(2 * np.pi)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "copy": lambda a: a,
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * b,
    "sigmoid": expit,
    "sigmoid_backward": lambda g, s: g * s * (1 - s),
    "silu": lambda a: a * expit(a),
    "silu_backward": lambda g, a: g * expit(a) * (1 + a * (1 - expit(a))),
    "gelu": lambda a: a * ndtr(a),
    "gelu_backward": lambda g, a: g * (ndtr(a) + a * density(a)),
}


def numbers(*shape: int, dtype: Any, seed: int = 0) -> Any:
    """With both tails of every function in it."""
    return np.asarray(6 * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def arguments(name: str, *shape: int, dtype: Any) -> list[Any]:
    """As many as the function takes."""
    return [numbers(*shape, dtype=dtype, seed=seed) for seed in range(1 + (name in elementwise.FUNCTIONS_OF_TWO))]


def assert_close(name: str, arrays: list[Any], out: Any) -> None:
    """Element by element, to a few roundings of the result and of what it is a sum of."""
    expected = FUNCTIONS[name](*(a.astype(np.float64) for a in arrays))
    of_sum = np.abs(arrays[0].astype(np.float64)) + 1
    if name in ("silu_backward", "gelu_backward"):  # g times what a multiplies: 1 - sigmoid(a), the density
        of_sum *= np.abs(arrays[1].astype(np.float64)) + 1
    error = np.abs(out.astype(np.float64) - expected)
    bound = 4 * float(ml_dtypes.finfo(out.dtype).eps) * np.abs(expected) + 4e-7 * of_sum
    assert (error <= bound).all(), f"{name}: {error.max()}"


def check(name: str, arrays: list[Any], out: Any) -> None:
    with emulator.patched():
        elementwise.compute(name, arrays, out)
    assert_close(name, arrays, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(3, 4, 1024), (2, 77), ()])
def test_values(name: str, dtype: Any, shape: tuple[int, ...]) -> None:
    check(name, arguments(name, *shape, dtype=dtype), np.empty(shape, dtype))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_far_tails_and_what_is_no_number(name: str) -> None:
    a = np.array([0, 1e-30, -1e-30, 90, -90, 1e4, -1e4], np.float32)
    count = 2 if name in elementwise.FUNCTIONS_OF_TWO else 1
    check(name, [a] * count if name != "sigmoid_backward" else [a, expit(a)], np.empty_like(a))
    out = np.zeros(2, np.float32)
    with emulator.patched():
        elementwise.compute(name, [np.array([np.nan, 1], np.float32)] * count, out)
    assert np.isnan(out[0])
    assert not np.isnan(out[1])


@pytest.mark.parametrize("of", DTYPES)
@pytest.mark.parametrize("to", DTYPES)
def test_casts(of: Any, to: Any) -> None:
    a = numbers(5, 48, dtype=of)
    out = np.empty(a.shape, to)
    with emulator.patched():
        elementwise.compute("copy", [a], out)
    np.testing.assert_array_equal(out, a.astype(to))


def halves(size: int) -> tuple[Any, Any]:
    """The two parts of an array (2, 6, size) along its middle axis."""
    whole = numbers(2, 6, size, dtype=np.float16)
    return whole[:, :3], whole[:, 3:]


LAYOUTS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "parts of rows": lambda: halves(32),
    "parts of rows that are not aligned": lambda: halves(9),
    "both transposed": lambda: (numbers(4, 24, dtype=np.float16).T, numbers(4, 24, dtype=np.float16, seed=1).T),
    "one transposed": lambda: (numbers(4, 24, dtype=np.float16), numbers(24, 4, dtype=np.float16).T),
    "every second": lambda: (numbers(4, 48, dtype=np.float16)[:, ::2], numbers(4, 24, dtype=np.float16)),
    "backwards": lambda: (numbers(4, 24, dtype=np.float16)[:, ::-1], numbers(4, 24, dtype=np.float16)),
    "one row for all": lambda: (
        numbers(4, 24, dtype=np.float16), np.broadcast_to(numbers(24, dtype=np.float16), (4, 24)),
    ),
    "one number for all": lambda: (numbers(4, 24, dtype=np.float16), np.broadcast_to(np.float16(3), (4, 24))),
    "rows that do not merge": lambda: (
        numbers(3, 5, 2, 16, dtype=np.float16)[:, :4], numbers(3, 4, 2, 16, dtype=np.float16),
    ),
    "planes that do not merge": lambda: (
        numbers(3, 5, 6, 16, dtype=np.float16)[:, :4, :3], numbers(3, 4, 3, 16, dtype=np.float16),
    ),
    "axes of one": lambda: (numbers(1, 4, 1, 24, dtype=np.float16)[:, ::2], numbers(1, 2, 1, 24, dtype=np.float16)),
    "an odd address": lambda: (numbers(97, dtype=np.float16)[1:], numbers(96, dtype=np.float16)),
    "nothing": lambda: (numbers(4, 0, dtype=np.float16), numbers(4, 0, dtype=np.float16)),
}  # fmt: skip


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, swapped: bool) -> None:
    a, b = LAYOUTS[name]()[:: -1 if swapped else 1]
    before = a.copy(), b.copy()
    check("multiply", [a, b], np.empty_like(a))
    check("multiply", [a, b], np.empty(a.shape, a.dtype))
    np.testing.assert_array_equal(a, before[0])
    np.testing.assert_array_equal(b, before[1])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("sizes", [(1, 3), (3, 1), (8, 16)])
def test_into_a_part(axis: int, sizes: tuple[int, int]) -> None:
    """Nothing is written beside it."""
    shape = [4, 8, 8]
    shape[axis] = sum(sizes)
    whole = np.full(shape, 7, ml_dtypes.bfloat16)
    before, behind = np.split(whole, [sizes[0]], axis)
    check("silu", [numbers(*behind.shape, dtype=whole.dtype)], behind)
    assert (before == 7).all()


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "copy"])
def test_formulas_are_the_same_functions(name: str) -> None:
    arrays = arguments(name, 50, dtype=np.float64)
    if name == "sigmoid_backward":
        arrays[1] = expit(arrays[1])
    np.testing.assert_allclose(getattr(formulas, name)(*arrays), FUNCTIONS[name](*arrays), rtol=1e-12, atol=1e-15)
