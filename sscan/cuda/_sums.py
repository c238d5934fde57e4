"""Sums over what blocks left behind."""

import functools
import math

from sscan.cuda import _launch
from sscan.cuda._launch import Kernel

COLUMNS, SHARES = 32, 16  # of a block: sums, and threads for each


def over_parts(parts, sums):
    """sums = the sum of ``parts`` over its first axis, both contiguous; complex ones as pairs of reals."""
    kernel, planes = _kernel(parts.dtype, sums.dtype)
    size = planes * math.prod(parts.shape[1:])
    _launch.launch(kernel, -(-size // COLUMNS), parts, sums, parts.shape[0], size)


@functools.cache
def _kernel(of_parts, of_sums):
    """The kernel for parts and sums of these dtypes, and how many reals it takes a number for."""
    planes = 2 if of_parts.kind == "c" else 1
    real = f"float{8 * of_parts.itemsize // planes}"
    storage = real if of_sums.kind == "c" else of_sums.name
    return Kernel("_sums", "over_parts", (real, storage)), planes
