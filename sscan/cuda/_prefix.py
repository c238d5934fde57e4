"""State passing: what is launched for the prefix of parts of time, and where their carries lie."""

import functools
from typing import NamedTuple

from sscan.cuda import _launch
from sscan.cuda._launch import Kernel

THREADS = 128


class Plan(NamedTuple):
    """How parts are walked."""

    kernel: Kernel
    blocks: int
    sums: int  # bytes from the first end to the first sum of step sizes
    numbers: tuple[int, ...]


def over_parts(number, rows, parts, dim, state, padded, back):
    """The plan from ends (rows, parts, dim, padded), and behind them sums (rows, parts, dim), to a carry."""
    sums = rows * parts * dim * padded * number.itemsize
    widths = reals_of(number) * padded, 1, reals_of(number) * state + 1
    return planned(number, (rows, dim, state), parts, (parts * dim, dim), sums, widths, back)


@functools.lru_cache(4096)
def over_carries(number, parts, rows, dim, state, back):
    """The plan from carries (parts, rows, dim, reals + 1) to states (rows, dim, state)."""
    width = reals_of(number) * state
    widths = width + 1, width + 1, width
    return planned(number, (rows, dim, state), parts, (dim, rows * dim), state * number.itemsize, widths, back)


def reals_of(number):
    """Reals of a number of a dtype."""
    return 2 if number.kind == "c" else 1


def planned(number, shape, parts, steps, sums, widths, back):
    """The plan for states of a shape.

    ``steps`` are channels from row to row and from part to part, ``widths`` reals from channel to channel in
    ends, sums and results.
    """
    (rows, dim, state), (row_step, part_step) = shape, steps
    first, step = ((parts - 1) * part_step, -part_step) if back else (0, part_step)
    numbers = parts, rows * dim, dim, state, row_step, first, step, *widths, int(back)
    kernel = Kernel("selective_scan_prefix", "prefix", (number.name,))
    return Plan(kernel, -(-rows * dim * state // THREADS), sums, numbers)


def launch(plan, A, ends, entering, added, out):
    """Fill ``out``; what enters and is added to the end, (rows, dim, state), is None for zero."""
    sums = _launch.address(ends) + plan.sums
    _launch.launch(plan.kernel, plan.blocks, A, ends, sums, entering, added, out, *plan.numbers)
