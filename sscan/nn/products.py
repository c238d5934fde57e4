"""Matrix products; those of NumPy arrays on sscan's own threads, with BLAS kept to one.

OpenBLAS' threads spin while they wait for each other. Where another process wants some of a core, all wait for the one
that lost it, and a product takes many times as long as on one thread. Ours take parts from a common list: who loses a
core holds up one part, and the others do the rest.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import ThreadpoolController

from sscan.nn.autodiff import Array, array_module

if TYPE_CHECKING:
    from collections.abc import Iterator

# Parts follow from sizes alone, so no result depends on the number of threads.
LEAST_WORK = 1 << 22  # multiplications: 0.1 ms, or 1.5 ms if each reads a weight of its own; waking a thread takes 0.05
LEAST_WIDTH = 256  # rows or columns: BLAS rearranges the whole other operand for every part


def matmul(a: Array, b: Array) -> Array:
    """a @ b over the last two axes; the axes before them broadcast. Half precision is multiplied in float32."""
    xp, dtype = array_module(a), np.result_type(a.dtype, b.dtype)
    if xp is np:
        if dtype.itemsize > 2:
            return _matmul_in_parts(a, b, dtype)
        return _matmul_in_parts(a.astype(np.float32), b.astype(np.float32), np.dtype(np.float32)).astype(dtype)
    if dtype.itemsize > 2:
        return xp.matmul(a, b)
    # CuPy 14 multiplies matrices in half precision, but stacks of them only in float32 (float16) or not at all.
    leading, a, b = broadcast_stacks(a, b)
    result = xp.empty((*leading, a.shape[-2], b.shape[-1]), dtype)
    for index in np.ndindex(*leading):
        a[index].dot(b[index], result[index])
    return result


def broadcast_stacks(a: Array, b: Array) -> tuple[tuple[int, ...], Array, Array]:
    """The common shape of all axes but the last two, and a and b stretched to it."""
    xp, leading = array_module(a), np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return leading, *(xp.broadcast_to(stack, leading + stack.shape[-2:]) for stack in (a, b))


def _matmul_in_parts(a: Array, b: Array, dtype: np.dtype[Any]) -> Array:
    leading, stack_a, stack_b = broadcast_stacks(a, b)
    rows, columns = a.shape[-2], b.shape[-1]
    work, width = rows * a.shape[-1] * columns, max(rows, columns)
    with one_blas_thread:
        if a.shape[-1] != b.shape[-2] or work * np.prod(leading) < 2 * LEAST_WORK:
            return np.matmul(a, b)
        from sscan.cpu import _parallel

        result = np.empty((*leading, rows, columns), dtype)
        count = max(1, min(work // LEAST_WORK, width // LEAST_WIDTH))
        cuts = [slice(width * i // count, width * (i + 1) // count) for i in range(count)]
        by_rows = rows >= columns
        parts = [
            (stack_a[i][cut], stack_b[i], result[i][cut])
            if by_rows
            else (stack_a[i], stack_b[i][:, cut], result[i][:, cut])
            for i in np.ndindex(*leading)
            for cut in cuts
        ]
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

    def _scopes(self) -> list[tuple[int, int]]:
        """For each library the thread whose limit it is; 0 where one limit is for the whole process."""
        here = threading.get_ident()
        return [(i, here if _has_limits_of_threads(library) else 0) for i, library in enumerate(self.libraries)]

    def __enter__(self) -> None:
        with self.lock:
            for scope in self._scopes():
                library = self.libraries[scope[0]]
                times, before = self.inside.get(scope, (0, 0))
                if not times:
                    before = library.get_num_threads()
                    _set(library, 1)
                self.inside[scope] = times + 1, before

    def __exit__(self, *exception: object) -> None:
        with self.lock:
            for scope in self._scopes():
                times, before = self.inside.pop(scope)
                if times > 1:
                    self.inside[scope] = times - 1, before
                else:
                    _set(self.libraries[scope[0]], before)

    def after_fork(self) -> None:
        """In a child nobody is inside, whatever other threads of its parent did."""
        self.lock = threading.Lock()
        for (i, thread), (_, before) in self.inside.items():
            if not thread:
                _set(self.libraries[i], before)
        self.inside.clear()


def _has_limits_of_threads(library: Any) -> bool:
    return library.internal_api == "mkl" or getattr(library, "threading_layer", "") == "openmp"


def _set(library: Any, count: int) -> None:
    library.set_num_threads(count)
    if library.internal_api == "openblas":  # which from now on listens to this thread only
        library.clear_controlling_thread()


one_blas_thread = _OneBlasThread()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=one_blas_thread.after_fork)
