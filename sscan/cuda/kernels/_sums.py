"""Sums over what blocks left behind, in an order that depends on the shape only."""

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._primitives import (
    await_previous,
    block_index,
    dtype_of,
    local_array,
    reader,
    select,
    shared_array,
    shared_get,
    shared_set,
    synchronize,
    thread_index,
    writer,
)
from sscan.cuda._sums import MOST_SHARES, READS, THREADS


def over_parts(real, storage, shares):
    """sums[i] = the sum of parts[p, i] over p: of ``shares`` threads each sums every ``shares``-th part."""
    real, columns, reads = np.dtype(real), THREADS // shares, READS
    read, write = reader(real, real, 1), writer(dtype_of(storage), real, 1)
    one_number, make_shared = local_array(1, real), shared_array(THREADS, real)
    zero = real.type(0)

    def kernel(
        count, parts, sums, size, first_block, parts1, sums1, size1, block1, parts2, sums2, size2, block2, parts3,
        sums3, size3, block3, parts4, sums4, size4, block4,
    ):  # fmt: skip
        """Reals throughout: of each pair, parts (count, size) and sums (size,), and the first block that has it."""
        await_previous()
        block = block_index()
        if block >= block1:
            parts, sums, size, first_block = parts1, sums1, size1, block1
        if block >= block2:
            parts, sums, size, first_block = parts2, sums2, size2, block2
        if block >= block3:
            parts, sums, size, first_block = parts3, sums3, size3, block3
        if block >= block4:
            parts, sums, size, first_block = parts4, sums4, size4, block4
        x, shared = one_number(), make_shared()
        column, share = thread_index() & (columns - 1), thread_index() // columns
        i = (block - first_block) * columns + column
        total = zero
        for first in range(0, count, shares * reads):
            for k in range(reads):  # unrolled: that many reads are under way at once
                part = first + k * shares + share
                read(x, parts, part * size + i, select(part < count, size - i, 0))
                total = total + x[0]
        if shares > 1:
            shared_set(shared, thread_index(), total)
            synchronize()
            total = shared_get(shared, column)
            for k in range(1, shares):
                total = total + shared_get(shared, k * columns + column)
        x[0] = total
        write(sums, i, x, select(share == 0, size - i, 0))

    return kernel, Shape(THREADS, 2)


def shipped():
    """Kernels that stand for all."""
    keys = ("float32", "bfloat16", MOST_SHARES), ("float32", "float32", 1), ("float64", "float64", 2)
    return [Kernel("_sums", "over_parts", key) for key in keys]
