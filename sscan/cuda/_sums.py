"""Sums over what blocks left behind."""

import math

from sscan.cuda import _launch
from sscan.cuda._launch import Kernel

COLUMNS, SHARES = 32, 16  # of a block: sums, and threads for each


def over_parts(parts, sums):
    """sums = the sum of ``parts`` over its first axis, both contiguous; complex ones as pairs of reals."""
    planes = 2 if parts.dtype.kind == "c" else 1
    real = f"float{8 * parts.itemsize // planes}"
    storage = real if sums.dtype.kind == "c" else sums.dtype.name
    size = planes * math.prod(parts.shape[1:])
    blocks = -(-size // COLUMNS)
    _launch.launch(Kernel("_sums", "over_parts", (real, storage)), blocks, parts, sums, parts.shape[0], size)
