"""Arrays of the caller, as kernels see them: strided views of any storage dtype, 16 elements at a time."""

from typing import Any, NamedTuple

import numpy as np
from numba.extending import register_jitable

from sscan.cpu._vector import STORAGE, read, splat, store, write

TILE = 16


@register_jitable
def pieces(count, size):
    """How many pieces of ``size`` it takes."""
    return (count + size - 1) // size


@register_jitable
def padded(count: int) -> int:
    """A number of numbers in whole vectors."""
    return pieces(count, TILE) * TILE


class View(NamedTuple):
    """A (batch, groups, rows, length) array, contiguous along time: address and byte strides; address 0: absent."""

    address: int
    batch: int
    group: int
    row: int
    item: int
    storage: int


ABSENT = View(0, 0, 0, 0, 0, 0)
_PARTS: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(np.complex64): np.dtype(np.float32),
    np.dtype(np.complex128): np.dtype(np.float64),
}


def view(array: np.ndarray | None, groups: int = 1) -> View:
    """View a (batch, rows, length) array, its rows cut into groups, or a (batch, groups, rows, length) one.

    The last axis must be contiguous. A complex array is seen as its interleaved real and imaginary parts. The view does
    not keep the array alive.
    """
    if array is None:
        return ABSENT
    dtype = _PARTS.get(array.dtype, array.dtype)
    *outer, row = array.strides[:-1]
    batch, group = outer if len(outer) == 2 else (outer[0], row * (array.shape[1] // groups))
    return View(array.ctypes.data, batch, group, row, dtype.itemsize, STORAGE[dtype])


@register_jitable
def start(source, batch, group, row, time):
    """Address of one element."""
    return source.address + batch * source.batch + group * source.group + row * source.row + time * source.item


@register_jitable
def read_row(like, source, address, count):
    """16 consecutive elements as a vector like ``like``; only the first ``count`` are read, the others are zero."""
    return read(like, address, count, source.item, source.storage)


@register_jitable
def write_row(destination, address, count, x):
    """Write the first ``count`` lanes of a vector."""
    write(address, count, destination.item, destination.storage, x)


@register_jitable
def read_numbers(row, offset, source, address, count):
    """row[offset + k] = the k-th of ``count`` elements from ``address`` on; zeros up to a multiple of 16."""
    like = splat(row.dtype.type(0))
    for k in range(0, count, TILE):
        store(row, offset + k, read_row(like, source, address + k * source.item, min(TILE, count - k)))
