"""What NumPy is slow at in half precision: conversions from and to float32, and products of a matrix with few vectors."""

from typing import Any

import numpy as np

from sscan.cpu._parallel import kernel, run, take
from sscan.cpu._products import products
from sscan.cpu._tiles import TILE, View, read_row, view, write_row
from sscan.cpu._vector import STORAGE, scratch, splat, write

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
def multiply(counter, tasks, matrix, rows, count, vectors, stride, out, per_task):
    """One task: ``per_task`` times 16 rows of the matrix, an (address, storage), with all vectors."""
    tile = scratch(TILE * TILE, vectors.dtype)
    tile[:] = 0
    while True:
        task = take(counter)
        if task >= tasks:
            break
        for r in range(task * per_task * TILE, min((task + 1) * per_task * TILE, rows), TILE):
            here = min(TILE, rows - r)
            for i in range(len(vectors) // stride):
                total = products(tile, vectors, i * stride, matrix, r, here, count)
                write(out.address + i * out.row + r * out.item, here, out.item, out.storage, total)


def convert(array: Any, dtype: Any) -> Any:
    """A copy of an array that lies in memory without gaps, in whatever order of its axes, in another storage dtype."""
    result = np.empty_like(array, dtype)
    flat = [View(a.ctypes.data, 0, 0, 0, a.itemsize, STORAGE[a.dtype]) for a in (array, result)]
    run(copy, -(-array.size // TASK), *flat, array.size, np.float32(0))
    return result


def matrix_times_vectors(matrix: Any, vectors: Any, out: Any) -> None:
    """out (n, rows) = vectors (n, count) times the rows of a contiguous matrix (rows, count), which is read once."""
    rows, count = matrix.shape
    padded = np.zeros((len(vectors), -(-count // TILE) * TILE), np.float32)
    padded[:, :count] = vectors
    per_task = max(1, TASK // max(1, TILE * count))
    run(
        multiply, -(-rows // (TILE * per_task)), (matrix.ctypes.data, STORAGE[matrix.dtype]), rows, count,
        padded.reshape(-1), padded.shape[1], view(out[None]), per_task,
    )  # fmt: skip
