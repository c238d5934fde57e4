"""Walking along contiguous memory, 16 numbers at a time: rows of a ``View`` out of scratch, and complex numbers."""

from numba import types
from numba.extending import intrinsic, overload, register_jitable

from sscan.cpu._tiles import TILE, read_row, write_row
from sscan.cpu._vector import WIDTH, Complex, _parts, _shuffle, _value, load


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
