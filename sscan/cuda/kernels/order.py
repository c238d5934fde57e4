"""The order of integers, for which nothing is sorted: the place of each is how many come before it.

A thread has one of them and looks at all, which a block has in shared memory, ``TILE`` at a time.
"""

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._primitives import (
    INTEGER_READERS,
    as_real,
    block_index,
    local_array,
    select,
    shared_array,
    shared_get,
    shared_set,
    synchronize,
    thread_index,
    writer,
)
from sscan.cuda.order import TILE

TOGETHER = 8  # looked at between two turns of the loop


def places(bits):
    """order[place of i] = i. Integers have so many bits, and are less than 2^24 in size."""
    single, double = np.float32, np.dtype(np.float64)
    read, write_bits = INTEGER_READERS[bits], writer(double, double, 1)
    make_shared, one_number, none = shared_array(TILE, np.dtype(single)), local_array(1, double), single(2.0**25)

    def kernel(integers, order, count):
        shared, bits_of_place = make_shared(), one_number()
        i = block_index() * TILE + thread_index()
        own, place = single(read(integers, i, select(i < count, 1, 0))), i * 0
        for first in range(0, count, TILE):
            j = first + thread_index()
            synchronize()
            shared_set(
                shared, thread_index(), select(j < count, single(read(integers, j, select(j < count, 1, 0))), none)
            )
            synchronize()
            here = select(count - first < TILE, count - first, TILE)
            for start in range(0, here, TOGETHER):
                for k in range(TOGETHER):
                    other = shared_get(shared, start + k)
                    before = (other < own) | ((other == own) & (first + start + k < i))
                    place = place + select(before, 1, 0)
        bits_of_place[0] = as_real(i)
        write_bits(order, place, bits_of_place, select(i < count, 1, 0))

    return kernel, Shape(TILE, 4)


def shipped():
    """Kernels that stand for all."""
    return [Kernel("order", "places", (bits,)) for bits in (32, 64)]
