"""Walking along contiguous memory, 16 numbers at a time, real or complex.

A *lanes* value is 16 real numbers (a narrow ``Vector``) or 16 complex ones (a ``Complex`` of two of them). Views see
complex arrays as interleaved reals, so an offset along a row counts ``reals_per(like)`` elements for each number.
"""

from numba import types
from numba.extending import intrinsic, overload, register_jitable

from sscan.cpu._tiles import TILE, read_row, write_row
from sscan.cpu._vector import (
    WIDTH,
    Complex,
    _parts,
    _shuffle,
    _value,
    complex_,
    constant,
    imag,
    load,
    real,
    splat,
    store,
    transpose,
)
from sscan.cpu._vector_math import LOG2_E


@register_jitable
def write_numbers(row, offset, destination, address, count):
    """Round row[offset + k] to the k-th of ``count`` consecutive elements from ``address`` on."""
    for k in range(0, count, TILE):
        write_row(destination, address + k * destination.item, min(TILE, count - k), load(row, offset + k))


@intrinsic
def _deinterleave(typingctx, low, high):
    """16 complex numbers from the 32 reals re, im, re, im, ... that two narrow vectors hold."""
    result = Complex(low)

    def codegen(context, builder, sig, args):
        even = list(range(0, 2 * WIDTH, 2))
        planes = [_shuffle(builder, *args, [lane + part for lane in even]) for part in (0, 1)]
        return _value(context, builder, result, *planes)

    return result(low, high), codegen


@intrinsic
def _interleave(typingctx, x):
    """The inverse of ``_deinterleave``: a pair of narrow vectors."""

    def codegen(context, builder, sig, args):
        re, im = _parts(context, builder, x, args[0])
        lanes = [lane for k in range(WIDTH) for lane in (k, WIDTH + k)]
        halves = [_shuffle(builder, re, im, half) for half in (lanes[:WIDTH], lanes[WIDTH:])]
        return context.make_tuple(builder, sig.return_type, halves)

    return types.UniTuple(x.part, 2)(x), codegen


def read_lanes(like, source, address, count):
    """``count`` <= 16 consecutive numbers, then zeros; complex ones if ``like`` is. Only inside compiled code."""
    raise NotImplementedError


def write_lanes(destination, address, count, x):
    """Write the first ``count`` lanes of a narrow vector or complex number. Only inside compiled code."""
    raise NotImplementedError


@overload(read_lanes)
def _read_lanes(like, source, address, count):
    if not isinstance(like, Complex):
        return read_row

    def read_complex(like, source, address, count):
        low = read_row(_real_part(like), source, address, min(2 * count, TILE))
        high = read_row(_real_part(like), source, address + TILE * source.item, max(2 * count - TILE, 0))
        return _deinterleave(low, high)

    return read_complex


@overload(write_lanes)
def _write_lanes(destination, address, count, x):
    if not isinstance(x, Complex):
        return write_row

    def write_complex(destination, address, count, x):
        low, high = _interleave(x)
        write_row(destination, address, min(2 * count, TILE), low)
        write_row(destination, address + TILE * destination.item, max(2 * count - TILE, 0), high)

    return write_complex


@intrinsic
def _real_part(typingctx, x):
    def codegen(context, builder, sig, args):
        return _parts(context, builder, x, args[0])[0]

    return x.part(x), codegen


def lanes(number):
    """A real or complex scalar in all 16 lanes. Only inside compiled code."""
    raise NotImplementedError


def reals_per(like):
    """How many elements of a view one number takes: 2 if complex. Only inside compiled code."""
    raise NotImplementedError


def rates(A):
    """``_vector_math.rate`` of lanes. Only inside compiled code."""
    raise NotImplementedError


@overload(lanes)
def _lanes(number):
    if isinstance(number, types.Complex):
        return lambda number: complex_(splat(number.real), splat(number.imag))
    return lambda number: splat(number)  # noqa: PLW0108 (an intrinsic is no overload)


@overload(reals_per)
def _reals_per(like):
    count = 2 if isinstance(like, Complex) else 1
    return lambda like: count


@overload(rates)
def _rates(A):
    if isinstance(A, Complex):
        return lambda A: complex_(real(A) * constant(A, LOG2_E), imag(A))
    return lambda A: A * constant(A, LOG2_E)


# --- tiles of 16 rows by 16 numbers in real scratch: the real plane, then the imaginary one ---------------------------

PLANE = TILE * TILE
SQUARE = 2 * PLANE  # scratch that a tile takes


def load_lanes(like, tile, offset):
    """The 16 numbers at ``offset``. Only inside compiled code."""
    raise NotImplementedError


def store_lanes(tile, offset, x):
    """The inverse of ``load_lanes``. Only inside compiled code."""
    raise NotImplementedError


def transpose_lanes(like, tile, source, destination):
    """Transpose the tile at offset ``source`` into the one at ``destination``. Only inside compiled code."""
    raise NotImplementedError


@overload(load_lanes)
def _load_lanes(like, tile, offset):
    if isinstance(like, Complex):
        return lambda like, tile, offset: complex_(load(tile, offset), load(tile, offset + PLANE))
    return lambda like, tile, offset: load(tile, offset)


@overload(store_lanes)
def _store_lanes(tile, offset, x):
    def store_complex(tile, offset, x):
        store(tile, offset, real(x))
        store(tile, offset + PLANE, imag(x))

    def store_real(tile, offset, x):
        store(tile, offset, x)

    return store_complex if isinstance(x, Complex) else store_real


@overload(transpose_lanes)
def _transpose_lanes(like, tile, source, destination):
    def transpose_complex(like, tile, source, destination):
        transpose(tile, source, TILE, tile, destination, TILE)
        transpose(tile, source + PLANE, TILE, tile, destination + PLANE, TILE)

    def transpose_real(like, tile, source, destination):
        transpose(tile, source, TILE, tile, destination, TILE)

    return transpose_complex if isinstance(like, Complex) else transpose_real
