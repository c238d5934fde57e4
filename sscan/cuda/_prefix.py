"""What becomes of a state on its way through stretches of time: what is launched, and where the stretches lie."""

import functools
from typing import NamedTuple

from sscan.cuda import _launch
from sscan.cuda._launch import Kernel

THREADS = 128


class Plan(NamedTuple):
    """How stretches are walked."""

    kernel: Kernel
    blocks: int
    sums: int  # bytes from the first end to the first sum of step sizes
    numbers: tuple[int, ...]


def over_parts(number, rows, parts, dim, state, padded, back):
    """The plan from ends (rows, parts, dim, padded), and behind them sums (rows, parts, dim), to a passage."""
    sums = rows * parts * dim * padded * number.itemsize
    widths = reals_of(number) * padded, 1, reals_of(number) * state + 1
    return planned(number, (rows, dim, state), parts, (parts * dim, dim), sums, widths, back)


@functools.lru_cache(4096)
def over_passages(number, stretches, rows, dim, state, back):
    """The plan from passages (stretches, rows, dim, reals + 1) to states (rows, dim, state)."""
    width = reals_of(number) * state
    widths = width + 1, width + 1, width
    return planned(number, (rows, dim, state), stretches, (dim, rows * dim), state * number.itemsize, widths, back)


def reals_of(number):
    """Reals of a number of a dtype."""
    return 2 if number.kind == "c" else 1


def planned(number, shape, stretches, steps, sums, widths, back):
    """The plan for states of a shape.

    ``steps`` are channels from row to row and from stretch to stretch, ``widths`` reals from channel to channel in
    ends, sums and results.
    """
    (rows, dim, state), (row_step, stretch_step) = shape, steps
    first, step = ((stretches - 1) * stretch_step, -stretch_step) if back else (0, stretch_step)
    numbers = stretches, rows * dim, dim, state, row_step, first, step, *widths, int(back)
    kernel = Kernel("selective_scan_prefix", "prefix", (number.name,))
    return Plan(kernel, -(-rows * dim * state // THREADS), sums, numbers)


def launch(plan, A, ends, entering, added, out):
    """Fill ``out``; what enters and is added to the end, (rows, dim, state), is None for zero."""
    sums = _launch.address(ends) + plan.sums
    _launch.launch(plan.kernel, plan.blocks, A, ends, sums, entering, added, out, *plan.numbers)
