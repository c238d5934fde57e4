"""The order of integers on the GPU, as a part of a CUDA graph, in which CuPy's sorting waits for the GPU."""

import numpy as np

from sscan.cuda import _launch
from sscan.cuda._launch import Kernel

TILE = 256
LARGEST = 1 << 24  # integers that float32 tells apart
MANY = 1 << 18  # of which sorting takes less


def stable_order(integers):
    """The order (count,), int64, in which integers (count,) rise, equal ones as they came; all less than ``LARGEST``.

    int32 or int64, contiguous. Everyone is compared with everyone.
    """
    order = _launch.empty(integers.shape, np.int64)
    (count,) = integers.shape
    kernel = Kernel("order", "places", (8 * integers.itemsize,))
    _launch.launch(kernel, -(-count // TILE), integers, order, count)
    return order
