"""Functions by element, sums and joins of sscan.nn on a GPU: the formulas that NumPy has, in every layout."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np
import pytest
import test_cuda_elementwise as emulated

from sscan.cuda import elementwise
from sscan.nn import Tensor, ops, products

DTYPES = pytest.mark.parametrize("dtype", emulated.DTYPES)


def check(name: str, arrays: list[Any], like: Any) -> None:
    """As in the emulator, into an array that lies as another one does."""
    out = cupy.empty_like(put(like))
    elementwise.compute(name, [put(a) for a in arrays], out)
    emulated.assert_close(name, arrays, out.get())


def put(array: Any) -> Any:
    """The array on the GPU, with its strides; of one without memory for all of them, what is seen of it."""
    whole = array if array.base is None or 0 in array.strides else array.base
    if whole is array or whole.dtype != array.dtype or array.size == 0:
        return cupy.asarray(array)
    first = (array.ctypes.data - whole.ctypes.data) // array.itemsize
    flat = cupy.asarray(whole).ravel(order="K")
    if min(array.strides) < 0:
        return cupy.asarray(array)
    return cupy.lib.stride_tricks.as_strided(flat[first:], array.shape, array.strides)


@DTYPES
@pytest.mark.parametrize("name", emulated.FUNCTIONS)
@pytest.mark.parametrize("shape", [(3, 4, 1024), (2, 77), (1 << 20,), ()])
def test_values(name: str, dtype: Any, shape: tuple[int, ...]) -> None:
    arrays = emulated.arguments(name, *shape, dtype=dtype)
    check(name, arrays, arrays[0])


@pytest.mark.parametrize("name", emulated.LAYOUTS)
def test_layouts(name: str) -> None:
    for arrays in (emulated.LAYOUTS[name](), emulated.LAYOUTS[name]()[::-1]):
        for like in (arrays[0], np.empty(arrays[0].shape, arrays[0].dtype)):
            check("multiply", list(arrays), like)


@DTYPES
@pytest.mark.parametrize("axes", [(0,), (0, 1), (0, 2), (1, 2), (2,)])
def test_sums(dtype: Any, axes: tuple[int, ...]) -> None:
    array = emulated.numbers(6, 100, 130, dtype=dtype)
    got = products.sum_over(cupy.asarray(array), axes).get()
    kept = [n for axis, n in enumerate(array.shape) if axis not in axes]
    expected = array.astype(np.float64).sum(axis=axes)
    np.testing.assert_allclose(
        got.reshape(kept), expected, atol=1e-6 * np.abs(array.astype(np.float64)).sum(axis=axes).max()
    )


@DTYPES
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_joins(dtype: Any, axis: int) -> None:
    parts = [emulated.numbers(4, 8, 24, dtype=dtype, seed=seed) for seed in range(3)]
    parts[1] = np.ascontiguousarray(parts[1].take([0, 2, 3], axis))
    got = ops.concatenate([Tensor(cupy.asarray(part)) for part in parts], axis).data
    np.testing.assert_array_equal(got.get(), np.concatenate(parts, axis))
    for part, again in zip(parts, ops.split(Tensor(got), [part.shape[axis] for part in parts], axis % 3), strict=True):
        np.testing.assert_array_equal(again.data.get(), part)
