"""RMS normalisation on the GPU. Arrays are (rows, size) with unit stride along a row; ``weight`` is contiguous."""

import functools
from typing import NamedTuple

from sscan.cuda import _launch
from sscan.cuda._launch import Kernel
from sscan.cuda._sums import over_parts

BLOCK, WARP = 128, 32  # threads of a block that has several rows; of a warp
WARPS = (2, 3, 4, 5, 6, 8, 10, 12, 14, 16)  # of a block that has one row in registers
WIDE = 512  # threads of a block with a row that does not fit
NUMBERS = {4: 16, 8: 4}  # of a row, by the size of one, that a thread keeps in registers; half one by one
RESIDENT = 384  # threads of a block of `backward` at most: 168 registers for each
USUAL = 480  # threads of `backward` on a multiprocessor
LEAST_ROWS = 4  # for each row of partial sums


class Plan(NamedTuple):
    """The kernel for a kind of arrays, how many rows a block works on at once, and its threads."""

    kernel: Kernel
    teams: int
    threads: int


@functools.lru_cache(maxsize=1024)
def _plan(direction, size, together, dtype, *others):
    """``others`` are the dtypes of the arrays that may be missing; ``together``: 16 bytes at a time."""
    group = 16 // dtype.itemsize if together else 1
    names = (dtype.name, *("" if other is None else other.name for other in others))
    numbers, limit = NUMBERS[max(4, dtype.itemsize)], RESIDENT if direction == "backward" else WIDE
    lanes, groups = _team(-(-size // group), numbers // group if together else numbers // 2, limit)
    if not lanes:
        return Plan(Kernel("rms_norm", f"{direction}_wide", (*names, group)), 1, WIDE)
    threads = max(BLOCK, lanes) if lanes <= WARP else lanes
    return Plan(Kernel("rms_norm", direction, (*names, lanes, groups, group)), threads // lanes, threads)


def _team(count, most, limit):
    """Threads for a row of ``count`` groups, and how many each has, at most ``most``; 0 if the row is too wide."""
    sizes = (*(2**k for k in range(WARP.bit_length())), *(WARP * warps for warps in WARPS))
    lanes = next((n for n in sizes if n * most >= count and n <= limit), 0)
    return lanes, lanes and -(-count // lanes)


def _dtype(array):
    return None if array is None else array.dtype


def _stride(array):
    """Numbers from a row to the next."""
    return 0 if array is None else array.strides[0] // array.itemsize


def _is_aligned(x, *others):
    return _launch.aligned(16 // x.itemsize, x, *others)


def rms_norm_forward(x, weight, residual, eps, y, residual_out):
    """Fill y and residual_out (unless None) from x and residual (or None), all (rows, size)."""
    rows, size = x.shape
    if not size:
        return
    together = _is_aligned(x, weight, residual, y, residual_out)
    plan = _plan("forward", size, together, x.dtype, _dtype(residual))
    _launch.launch(
        plan.kernel, -(-rows // plan.teams), x, weight, residual, y, residual_out, _launch.bits(eps),
        _launch.bits(1 / size), rows, size, _stride(x), _stride(residual), _stride(y), _stride(residual_out),
    )  # fmt: skip


def rms_norm_backward(dy, x, weight, residual, eps, dresidual_out, dx, dweight, dresidual):
    """Fill dx, dweight and dresidual (unless None), all but dweight (rows, size)."""
    rows, size = x.shape
    if not size:
        return
    together = _is_aligned(x, dy, weight, residual, dresidual_out, dx, dresidual)
    plan = _plan("backward", size, together, x.dtype, _dtype(residual), _dtype(dresidual_out))
    most = _launch.processors() * max(1, USUAL // plan.threads) * plan.teams
    teams = min(-(-rows // LEAST_ROWS), most)
    partials = _launch.empty((teams, size), weight.dtype)
    _launch.launch(
        plan.kernel, -(-teams // plan.teams), dy, x, weight, residual, dresidual_out, dx, dresidual, partials,
        _launch.bits(eps), _launch.bits(1 / size), rows, size, teams, -(-rows // max(1, teams)), _stride(dy),
        _stride(x), _stride(residual), _stride(dresidual_out), _stride(dx), _stride(dresidual),
    )  # fmt: skip
    over_parts((partials, dweight))
