"""Matrix products; those of NumPy arrays on sscan's own threads, with BLAS kept to one.

OpenBLAS' threads spin while they wait for each other. Where another process wants some of a core, all wait for the one
that lost it, and a product takes many times as long as on one thread. Ours take parts from a common list: who loses a
core holds up one part, and the others do the rest.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from threadpoolctl import ThreadpoolController

from sscan._arrays import array_module, on_gpu
from sscan.nn import elementwise

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sscan.nn.autodiff import Array

# Parts follow from sizes alone, so no result depends on the number of threads.
LEAST_WORK = 1 << 22  # multiplications: 0.1 ms, or 1.5 ms if each reads a weight of its own; waking a thread takes 0.05
LEAST_WIDTH = 256  # rows or columns: BLAS rearranges the whole other operand for every part
HALVES = {np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)}
FEW = 8  # rows that are not worth a copy of the other operand in float32
LEAST_COPY = 1 << 15  # numbers in half precision that NumPy does not convert as fast


def matmul(a: Array, b: Array) -> Array:
    """a @ b over the last two axes; the axes before them broadcast. Half precision is multiplied in float32."""
    xp, dtype = array_module(a), np.result_type(a.dtype, b.dtype)
    if xp is np:
        if a.dtype.itemsize > 2 and b.dtype.itemsize > 2:
            return _matmul_in_parts(a, b, dtype)
        wide = np.result_type(dtype, np.float32)
        few = wide == np.float32 and a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] and len(a) <= FEW
        if few and b.dtype.itemsize == 2 and b.flags.f_contiguous and b.size >= LEAST_COPY:
            return _times_rows(a, b.T, dtype)
        return cast(_matmul_in_parts(cast(a, wide), cast(b, wide), wide), dtype)
    if not on_gpu(a):
        return xp.matmul(a, b).astype(dtype, copy=False)
    from sscan.cuda import _products

    return _products.matmul(a.astype(dtype, copy=False), b.astype(dtype, copy=False))  # type: ignore[no-untyped-call]


def sum_of_products(a: Array, b: Array, dtype: Any) -> Array:
    """The sum over all axes but the last two of a @ b, for arrays on a GPU."""
    from sscan.cuda import _products

    common = np.result_type(a.dtype, b.dtype)
    return _products.sum_of(a.astype(common, copy=False), b.astype(common, copy=False), dtype)  # type: ignore[no-untyped-call]


def sum_over(array: Array, axes: tuple[int, ...]) -> Array:
    """The sum over these axes, of half precision in float32."""
    wide = np.result_type(array.dtype, np.float32)  # NumPy would add up half precision as it is
    rest = [i for i in range(array.ndim) if i not in axes]
    if not (on_gpu(array) and array.dtype.kind != "c" and array.size >= LEAST_COPY and len(rest) == 1):
        return array.sum(axis=axes, dtype=wide)
    # Products with ones read as fast as memory allows; CuPy adds up the first axes at a fifth of that.
    before, behind = (math.prod(array.shape[: rest[0]]), math.prod(array.shape[rest[0] + 1 :]))
    if behind == 1:
        row = array_module(array).ones((1, before), array.dtype)
        return sum_of_products(row, array.reshape(before, array.shape[rest[0]]), wide)
    column = array_module(array).ones((behind, 1), array.dtype)
    return sum_of_products(array.reshape(before, array.shape[rest[0]], behind), column, wide)


def cast(array: Array, dtype: Any) -> Array:
    """The array in another dtype, itself if it is in that already."""
    dtypes = {array.dtype, np.dtype(dtype)}
    converts = len(dtypes) == 2 and dtypes - HALVES == {np.dtype(np.float32)}
    if not converts or array.size < LEAST_COPY:
        return array.astype(dtype, copy=False)
    if on_gpu(array):
        return elementwise.compute("copy", [array], array_module(array).empty_like(array, dtype))
    if array_module(array) is not np:
        return array.astype(dtype, copy=False)
    from sscan.cpu.half_precision import convert

    return convert(array if array.flags.forc else np.ascontiguousarray(array), dtype)


def _times_rows(a: Array, matrix: Array, dtype: np.dtype[Any]) -> Array:
    """a @ matrix^T of few rows, in a dtype of its own; the matrix, in half precision, is read as it lies."""
    from sscan.cpu.half_precision import matrix_times_vectors

    result = np.empty((len(a), len(matrix)), dtype)
    matrix_times_vectors(matrix, a, result)
    return result


def broadcast_stacks(a: Array, b: Array) -> tuple[tuple[int, ...], Array, Array]:
    """The common shape of all axes but the last two, and a and b stretched to it."""
    xp, leading = array_module(a), np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return leading, *(xp.broadcast_to(stack, leading + stack.shape[-2:]) for stack in (a, b))


def _matmul_in_parts(a: Array, b: Array, dtype: np.dtype[Any]) -> Array:
    rows, columns = a.shape[-2], b.shape[-1]
    if a.shape[-1] != b.shape[-2] or max(a.size * columns, b.size * rows) < 2 * LEAST_WORK:
        with one_blas_thread:
            return np.matmul(a, b)
    from sscan.cpu import _parallel

    leading, a, b = broadcast_stacks(a, b)
    result = np.empty((*leading, rows, columns), dtype)
    width, by_rows = max(rows, columns), rows >= columns
    count = max(1, min(rows * a.shape[-1] * columns // LEAST_WORK, width // LEAST_WIDTH))
    cuts = [slice(width * i // count, width * (i + 1) // count) for i in range(count)]
    parts = [
        (a[i][cut], b[i], result[i][cut]) if by_rows else (a[i], b[i][:, cut], result[i][:, cut])
        for i in np.ndindex(*leading)
        for cut in cuts
    ]
    with one_blas_thread:
        _parallel.run(_multiply, len(parts), iter(parts))
    return result


def _multiply(counter: Array, tasks: int, parts: Iterator[tuple[Array, Array, Array]]) -> None:
    """Form products until none is left; several threads share `parts`."""
    with one_blas_thread:
        for a, b, result in parts:
            np.matmul(a, b, out=result)


class _OneBlasThread:
    """While a thread is inside, BLAS works on it alone; when all have left, again on as many threads as before.

    threadpoolctl's own context managers look at every library again each time, and leave OpenBLAS on one thread for
    ever when the first of two threads to come is the first to leave.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside: dict[tuple[int, int], tuple[int, int]] = {}  # (library, thread): how often, and threads before

    @functools.cached_property
    def libraries(self) -> list[Any]:
        """The BLAS libraries that are loaded, NumPy's among them."""
        return list(ThreadpoolController().select(user_api="blas").lib_controllers)

    @functools.cached_property
    def limits_are_of_threads(self) -> list[bool]:
        """For each library: whether the thread that sets its limit sets its own, or that of the process."""
        return [
            library.internal_api == "mkl" or getattr(library, "threading_layer", "") == "openmp"
            for library in self.libraries
        ]

    def _scopes(self) -> list[tuple[int, int]]:
        """Each library, with the thread whose limit it is; 0 for the process."""
        here = threading.get_ident()
        return [(i, here * of_threads) for i, of_threads in enumerate(self.limits_are_of_threads)]

    def __enter__(self) -> None:
        with self.lock:
            for scope in self._scopes():
                times, before = self.inside.get(scope, (0, 0))
                if not times:
                    before = self.libraries[scope[0]].get_num_threads()
                    self._set(scope[0], 1, before)
                self.inside[scope] = times + 1, before

    def __exit__(self, *exception: object) -> None:
        with self.lock:
            for scope in self._scopes():
                times, before = self.inside.pop(scope)
                if times > 1:
                    self.inside[scope] = times - 1, before
                else:
                    self._set(scope[0], before, 1)

    def _set(self, i: int, count: int, before: int) -> None:
        library = self.libraries[i]
        if count != before:
            library.set_num_threads(count)
            if library.internal_api == "openblas":  # which from now on listens to this thread only
                library.clear_controlling_thread()

    def after_fork(self) -> None:
        """In a child nobody is inside, whatever other threads of its parent did."""
        self.lock = threading.Lock()
        for (i, thread), (_, before) in self.inside.items():
            if not thread:
                self._set(i, before, 1)
        self.inside.clear()


one_blas_thread = _OneBlasThread()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=one_blas_thread.after_fork)
