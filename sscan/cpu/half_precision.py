"""What NumPy is slow at in half precision: conversions, and products of a matrix with few vectors."""

from typing import Any

import numpy as np

from sscan.cpu._parallel import kernel, run, take
from sscan.cpu._products import TILES, products
from sscan.cpu._tiles import TILE, View, padded, read_row, view, write_row
from sscan.cpu._vector import STORAGE, load, scratch, splat, write

TASK = 1 << 15  # numbers of a task


@kernel
def copy(counter, tasks, source, destination, count, zero):
    """One task: ``TASK`` numbers of flat arrays, rounded to the dtype that they are written in."""
    like = splat(zero)
    while True:
        task = take(counter)
        if task >= tasks:
            break
        for k in range(task * TASK, min((task + 1) * TASK, count), TILE):
            size = min(TILE, count - k)
            numbers = read_row(like, source, source.address + k * source.item, size)
            write_row(destination, destination.address + k * destination.item, size, numbers)


@kernel
def multiply(counter, tasks, matrix, rows, count, vectors, batch, out, per_task):
    """One task: ``per_task`` times 16 rows of the matrix, an (address, storage), with all vectors."""
    tile, out_rows = scratch(TILES, vectors.dtype), scratch(TILE * batch, vectors.dtype)
    tile[:] = 0
    while True:
        task = take(counter)
        if task >= tasks:
            break
        for r in range(task * per_task * TILE, min((task + 1) * per_task * TILE, rows), TILE):
            here = min(TILE, rows - r)
            products(out_rows, tile, vectors, batch, matrix, r, here, count)
            for b in range(batch):
                write(out.address + b * out.row + r * out.item, here, out.item, out.storage, load(out_rows, b * TILE))


def convert(array: Any, dtype: Any) -> Any:
    """A copy of an array that lies in memory without gaps, in whatever order of its axes, in another storage dtype."""
    result = np.empty_like(array, dtype)
    flat = [View(a.ctypes.data, 0, 0, 0, a.itemsize, STORAGE[a.dtype]) for a in (array, result)]
    run(copy, -(-array.size // TASK), *flat, array.size, np.float32(0))
    return result


def matrix_times_vectors(matrix: Any, vectors: Any, out: Any) -> None:
    """out (n, rows) = vectors (n, count) times the rows of a contiguous matrix (rows, count), which is read once."""
    rows, count = matrix.shape
    whole = np.zeros((len(vectors), padded(count)), np.float32)
    whole[:, :count] = vectors
    per_task = max(1, TASK // max(1, TILE * count))
    run(
        multiply, -(-rows // (TILE * per_task)), (matrix.ctypes.data, STORAGE[matrix.dtype]), rows, count,
        whole.reshape(-1), len(vectors), view(out[None]), per_task,
    )  # fmt: skip
