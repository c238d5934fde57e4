"""Products of a matrix, as it is stored, with vectors in scratch: bound by reading the matrix.

A row is read from its beginning to its end before the next one is: one stream, which the processor follows by itself.
"""

from numba import types
from numba.extending import intrinsic, overload, register_jitable

from sscan.cpu._tiles import TILE
from sscan.cpu._vector import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    _at,
    _stored_as,
    fma,
    lane_sums,
    load,
    read,
    splat,
    store,
)

ITEMS = 4, 2, 2, 8  # bytes of an element of each storage dtype
STEP = 4 * TILE  # numbers that a sum takes at once, in four parts: one alone would wait for each addition


def _products(code):
    """``products`` for one storage dtype."""

    @intrinsic
    def fetch(typingctx, like, address):
        def codegen(context, builder, sig, args):
            return _stored_as(builder, _at(builder, args[1]), code, like.element)

        return like(like, types.intp), codegen

    item = ITEMS[code]

    @register_jitable
    def of_storage(tile, x, offset, address, rows, count):
        zero, whole = splat(x.dtype.type(0)), count - count % STEP
        for r in range(rows):
            s0, s1, s2, s3 = zero, zero, zero, zero
            row = address + r * count * item
            for k in range(0, whole, STEP):
                here, at = row + k * item, offset + k
                s0 = fma(fetch(zero, here), load(x, at), s0)
                s1 = fma(fetch(zero, here + TILE * item), load(x, at + TILE), s1)
                s2 = fma(fetch(zero, here + 2 * TILE * item), load(x, at + 2 * TILE), s2)
                s3 = fma(fetch(zero, here + 3 * TILE * item), load(x, at + 3 * TILE), s3)
            for k in range(whole, count, TILE):
                w = read(zero, row + k * item, min(TILE, count - k), item, code)
                s0 = fma(w, load(x, offset + k), s0)
            store(tile, TILE * r, (s0 + s1) + (s2 + s3))
        return lane_sums(tile, 0, TILE)

    return of_storage


_float32, _float16, _bfloat16, _float64 = (_products(code) for code in (FLOAT32, FLOAT16, BFLOAT16, FLOAT64))


def _stored_products(tile, x, offset, address, rows, count, storage):
    """``products`` by address and storage."""
    raise NotImplementedError


@overload(_stored_products)
def _of_any_storage(tile, x, offset, address, rows, count, storage):
    def double(tile, x, offset, address, rows, count, storage):
        return _float64(tile, x, offset, address, rows, count)

    def single(tile, x, offset, address, rows, count, storage):
        if storage == FLOAT32:
            return _float32(tile, x, offset, address, rows, count)
        if storage == BFLOAT16:
            return _bfloat16(tile, x, offset, address, rows, count)
        return _float16(tile, x, offset, address, rows, count)

    return double if x.dtype == types.float64 else single


@register_jitable
def products(tile, x, offset, matrix, row, rows, count):
    """The products of ``rows`` <= 16 rows of a matrix, from ``row`` on, with x from ``offset`` on, as a vector.

    ``matrix`` is (address, storage) of rows of ``count`` numbers, one behind the other; x is zero behind its numbers,
    up to whole vectors; ``tile`` is scratch for 16 vectors.
    """
    address = matrix[0] + row * count * ITEMS[matrix[1]]
    return _stored_products(tile, x, offset, address, rows, count, matrix[1])
