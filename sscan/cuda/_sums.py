"""Sums over what blocks left behind."""

import functools
import math

from sscan.cuda import _launch
from sscan.cuda._launch import Kernel

COLUMNS, SHARES = 32, 16  # of a block: sums, and threads for each
MOST = 5  # pairs of one launch


def over_parts(*pairs):
    """Of up to ``MOST`` pairs (parts, sums): sums = the sum of parts over its first axis, all in one launch.

    All arrays are contiguous, parts have one length and one real type, sums one storage; complex ones are pairs of
    reals.
    """
    (parts, sums), *_ = pairs
    kernel, tables, blocks = _kernel(parts.dtype, sums.dtype), [], 0
    for of_parts, of_sums in pairs:
        size = math.prod(of_parts.shape[1:]) * (2 if of_parts.dtype.kind == "c" else 1)
        tables += [of_parts, of_sums, size, blocks]
        blocks += -(-size // COLUMNS)
    _launch.launch(kernel, blocks, parts.shape[0], *tables, *(None, None, 0, blocks) * (MOST - len(pairs)))


@functools.cache
def _kernel(of_parts, of_sums):
    real = f"float{8 * of_parts.itemsize // (2 if of_parts.kind == 'c' else 1)}"
    return Kernel("_sums", "over_parts", (real, real if of_sums.kind == "c" else of_sums.name))
