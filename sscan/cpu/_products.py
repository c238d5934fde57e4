"""Products of a matrix, as it is stored, with vectors in scratch: bound by reading the matrix.

A row is read from its beginning to its end before the next one is: one stream, which the processor follows by itself.
"""

from numba import types
from numba.extending import intrinsic, overload, register_jitable

from sscan.cpu._tiles import TILE, padded
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


def _row_products(code):
    """(products of a stored row with one vector, with four of them), which give the same bits."""

    @intrinsic
    def fetch(typingctx, like, address):
        def codegen(context, builder, sig, args):
            return _stored_as(builder, _at(builder, args[1]), code, like.element)

        return like(like, types.intp), codegen

    item = ITEMS[code]

    @register_jitable
    def with_one(x, at, row, count):
        zero, whole = splat(x.dtype.type(0)), count - count % STEP
        s0, s1, s2, s3 = zero, zero, zero, zero
        for k in range(0, whole, STEP):
            here = row + k * item
            s0 = fma(fetch(zero, here), load(x, at + k), s0)
            s1 = fma(fetch(zero, here + TILE * item), load(x, at + k + TILE), s1)
            s2 = fma(fetch(zero, here + 2 * TILE * item), load(x, at + k + 2 * TILE), s2)
            s3 = fma(fetch(zero, here + 3 * TILE * item), load(x, at + k + 3 * TILE), s3)
        for k in range(whole, count, TILE):
            w = read(zero, row + k * item, min(TILE, count - k), item, code)
            s0 = fma(w, load(x, at + k), s0)
        return (s0 + s1) + (s2 + s3)

    @register_jitable
    def with_four(x, a, stride, row, count):
        zero, whole = splat(x.dtype.type(0)), count - count % STEP
        b, c, d = a + stride, a + 2 * stride, a + 3 * stride
        a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
        c0, c1, c2, c3, d0, d1, d2, d3 = zero, zero, zero, zero, zero, zero, zero, zero
        for k in range(0, whole, STEP):
            w = fetch(zero, row + k * item)
            a0, b0 = fma(w, load(x, a + k), a0), fma(w, load(x, b + k), b0)
            c0, d0 = fma(w, load(x, c + k), c0), fma(w, load(x, d + k), d0)
            w, j = fetch(zero, row + (k + TILE) * item), k + TILE
            a1, b1 = fma(w, load(x, a + j), a1), fma(w, load(x, b + j), b1)
            c1, d1 = fma(w, load(x, c + j), c1), fma(w, load(x, d + j), d1)
            w, j = fetch(zero, row + (k + 2 * TILE) * item), k + 2 * TILE
            a2, b2 = fma(w, load(x, a + j), a2), fma(w, load(x, b + j), b2)
            c2, d2 = fma(w, load(x, c + j), c2), fma(w, load(x, d + j), d2)
            w, j = fetch(zero, row + (k + 3 * TILE) * item), k + 3 * TILE
            a3, b3 = fma(w, load(x, a + j), a3), fma(w, load(x, b + j), b3)
            c3, d3 = fma(w, load(x, c + j), c3), fma(w, load(x, d + j), d3)
        for k in range(whole, count, TILE):
            w = read(zero, row + k * item, min(TILE, count - k), item, code)
            a0, b0 = fma(w, load(x, a + k), a0), fma(w, load(x, b + k), b0)
            c0, d0 = fma(w, load(x, c + k), c0), fma(w, load(x, d + k), d0)
        return (a0 + a1) + (a2 + a3), (b0 + b1) + (b2 + b3), (c0 + c1) + (c2 + c3), (d0 + d1) + (d2 + d3)

    return with_one, with_four


def _products(code):
    """``products`` for one storage dtype."""
    with_one, with_four = _row_products(code)
    item = ITEMS[code]

    @register_jitable
    def of_storage(out, tiles, x, batch, address, rows, count):
        stride, size = padded(count), TILE * TILE
        for b in range(0, batch - 3, 4):
            for r in range(rows):
                p, q, s, t = with_four(x, b * stride, stride, address + r * count * item, count)
                store(tiles, TILE * r, p)
                store(tiles, TILE * r + size, q)
                store(tiles, TILE * r + 2 * size, s)
                store(tiles, TILE * r + 3 * size, t)
            for k in range(4):
                store(out, TILE * (b + k), lane_sums(tiles, k * size, TILE))
        for b in range(batch - batch % 4, batch):
            for r in range(rows):
                store(tiles, TILE * r, with_one(x, b * stride, address + r * count * item, count))
            store(out, TILE * b, lane_sums(tiles, 0, TILE))

    return of_storage


_float32, _float16, _bfloat16, _float64 = (_products(code) for code in (FLOAT32, FLOAT16, BFLOAT16, FLOAT64))


def _stored_products(out, tiles, x, batch, address, rows, count, storage):
    """``products`` by address and storage."""
    raise NotImplementedError


@overload(_stored_products)
def _of_any_storage(out, tiles, x, batch, address, rows, count, storage):
    def double(out, tiles, x, batch, address, rows, count, storage):
        _float64(out, tiles, x, batch, address, rows, count)

    def single(out, tiles, x, batch, address, rows, count, storage):
        if storage == FLOAT32:
            _float32(out, tiles, x, batch, address, rows, count)
        elif storage == BFLOAT16:
            _bfloat16(out, tiles, x, batch, address, rows, count)
        else:
            _float16(out, tiles, x, batch, address, rows, count)

    return double if x.dtype == types.float64 else single


TILES = 4 * TILE * TILE  # scratch of `products`


@register_jitable
def products(out, tiles, x, batch, matrix, row, rows, count):
    """The products of ``rows`` <= 16 rows of a matrix, from ``row`` on, with each of ``batch`` vectors.

    ``matrix`` is (address, storage) of rows of ``count`` numbers, one behind the other. The vectors lie behind each
    other in x, whole ones with zeros behind their numbers; those of the results in ``out``, of which the lanes behind
    ``rows`` mean nothing. ``tiles`` is scratch.
    """
    address = matrix[0] + row * count * ITEMS[matrix[1]]
    _stored_products(out, tiles, x, batch, address, rows, count, matrix[1])
