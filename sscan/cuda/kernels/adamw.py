"""AdamW and the clipping of gradients on the GPU: several parameters in a launch, each number read and written once.

A block has ``EACH * THREADS`` numbers of one parameter; neighbouring threads have neighbours. What changes from step to
step is read from memory, so that a CUDA graph of a step stays right.
"""

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._primitives import (
    as_real,
    block_index,
    local_array,
    reader,
    select,
    shared_array,
    shared_get,
    shared_set,
    square_root,
    synchronize,
    thread_index,
    writer,
)
from sscan.cuda._target import device
from sscan.cuda.adamw import EACH, THREADS
from sscan.cuda.kernels._warp import WARP, lane_sum

WARPS = THREADS // WARP


def block_sum():
    """The shared array of ``total``, and ``total(shared, x)``: the sum of float64 numbers over a block."""
    within = lane_sum(WARP)

    @device
    def total(shared, x):
        x = within(x)
        shared_set(shared, thread_index() >> 5, x)
        synchronize()
        x = shared_get(shared, 0)
        for warp in range(1, WARPS):
            x = x + shared_get(shared, warp)
        return x

    return shared_array(WARPS, np.dtype(np.float64)), total


def squares(real):
    """partials[block] = the sum of squares of the numbers of a block, in float64."""
    real, wide = np.dtype(real), np.dtype(np.float64)
    read, write = reader(real, wide, 1), writer(wide, wide, 1)
    one_number, (make_shared, total), zero = local_array(1, wide), block_sum(), wide.type(0)

    def kernel(
        partials, gradient, size, first, gradient1, size1, first1, gradient2, size2, first2, gradient3, size3, first3
    ):
        """Of each gradient, its size and the first block that has it."""
        block = block_index()
        if block >= first1:
            gradient, size, first = gradient1, size1, first1
        if block >= first2:
            gradient, size, first = gradient2, size2, first2
        if block >= first3:
            gradient, size, first = gradient3, size3, first3
        x, shared = one_number(), make_shared()
        start = (block - first) * EACH * THREADS + thread_index()
        square = zero
        for k in range(EACH):
            read(x, gradient, start + k * THREADS, size - (start + k * THREADS))
            square = square + x[0] * x[0]
        x[0] = total(shared, square)
        write(partials, block, x, select(thread_index() == 0, 1, 0))

    return kernel, Shape(THREADS, 6)


def norm(real):
    """norm = the root of the sum of ``count`` partials, and scale = max_norm / norm, at most 1; one block."""
    real, wide = np.dtype(real), np.dtype(np.float64)
    read, write, write_scale = reader(wide, wide, 1), writer(wide, wide, 1), writer(real, wide, 1)
    one_number, (make_shared, total), zero, one = local_array(1, wide), block_sum(), wide.type(0), wide.type(1)

    def kernel(partials, norm, scale, count, max_norm):
        x, shared = one_number(), make_shared()
        square = zero
        for first in range(0, count, THREADS):
            read(x, partials, first + thread_index(), count - (first + thread_index()))
            square = square + x[0]
        whole = square_root(total(shared, square))
        here = select(thread_index() == 0, 1, 0)
        x[0] = whole
        write(norm, 0, x, here)
        most = as_real(max_norm)
        x[0] = select(whole > most, most / whole, select(whole == whole, one, whole))  # NaN stays NaN
        write_scale(scale, 0, x, here)

    return kernel, Shape(THREADS, 1)


def scale(real):
    """Every gradient times a number in memory."""
    real = np.dtype(real)
    read, read_scale, write = reader(real, real, 1, constant=False), reader(real, real, 1), writer(real, real, 1)
    numbers, one_number = local_array(EACH, real), local_array(1, real)

    def kernel(
        factor, gradient, size, first, gradient1, size1, first1, gradient2, size2, first2, gradient3, size3, first3
    ):
        block = block_index()
        if block >= first1:
            gradient, size, first = gradient1, size1, first1
        if block >= first2:
            gradient, size, first = gradient2, size2, first2
        if block >= first3:
            gradient, size, first = gradient3, size3, first3
        x, one, values = one_number(), one_number(), numbers()
        read_scale(one, factor, 0, 1)
        start = (block - first) * EACH * THREADS + thread_index()
        for k in range(EACH):
            read(x, gradient, start + k * THREADS, size - (start + k * THREADS))
            values[k] = x[0]
        for k in range(EACH):
            x[0] = values[k] * one[0]
            write(gradient, start + k * THREADS, x, size - (start + k * THREADS))

    return kernel, Shape(THREADS, 6)


def update(real):
    """The step of AdamW for every number: see ``sscan.nn.AdamW``.

    ``factors`` are sqrt(1 - b2^t), and of each group of parameters lr / (1 - b1^t) and 1 - lr weight_decay; ``group``
    is the place of these. Nothing changes if the loss at ``loss`` (address 0: there is none) is not finite.
    """
    real, loss_type = np.dtype(real), np.dtype(np.float32)
    read, read_changed, read_loss = (
        reader(real, real, 1),
        reader(real, real, 1, constant=False),
        reader(loss_type, real, 1),
    )
    write, single, one_number, numbers = writer(real, real, 1), real.type, local_array(1, real), local_array(EACH, real)
    zero = single(0)

    def kernel(
        factors, loss, beta1, rest1, beta2, rest2, eps,
        value, gradient, m, v, size, group, first, value1, gradient1, m1, v1, size1, group1, first1,
        value2, gradient2, m2, v2, size2, group2, first2, value3, gradient3, m3, v3, size3, group3, first3,
    ):  # fmt: skip
        block = block_index()
        if block >= first1:
            value, gradient, m, v, size, group, first = value1, gradient1, m1, v1, size1, group1, first1
        if block >= first2:
            value, gradient, m, v, size, group, first = value2, gradient2, m2, v2, size2, group2, first2
        if block >= first3:
            value, gradient, m, v, size, group, first = value3, gradient3, m3, v3, size3, group3, first3
        x, ps, gs, ms, vs = one_number(), numbers(), numbers(), numbers(), numbers()
        read_loss(x, loss, 0, select(loss == 0, 0, 1))
        size = select(x[0] - x[0] == zero, size, 0)
        read(x, factors, 0, 1)
        correction = x[0]
        read(x, factors, group, 1)
        rate = x[0]
        read(x, factors, group + 1, 1)
        decay = x[0]
        b1, c1, b2, c2 = single(as_real(beta1)), single(as_real(rest1)), single(as_real(beta2)), single(as_real(rest2))
        start = (block - first) * EACH * THREADS + thread_index()
        for k in range(EACH):  # all are asked for before one is needed
            i, valid = start + k * THREADS, size - (start + k * THREADS)
            read_changed(x, value, i, valid)
            ps[k] = x[0]
            read(x, gradient, i, valid)
            gs[k] = x[0]
            read_changed(x, m, i, valid)
            ms[k] = x[0]
            read_changed(x, v, i, valid)
            vs[k] = x[0]
        for k in range(EACH):
            i, valid = start + k * THREADS, size - (start + k * THREADS)
            new_m = ms[k] * b1 + gs[k] * c1
            new_v = vs[k] * b2 + gs[k] * gs[k] * c2
            x[0] = new_m
            write(m, i, x, valid)
            x[0] = new_v
            write(v, i, x, valid)
            x[0] = ps[k] * decay - new_m / (square_root(new_v) / correction + single(as_real(eps))) * rate
            write(value, i, x, valid)

    return kernel, Shape(THREADS, 4 if real.itemsize == 4 else 3)


def shipped():
    """Kernels that stand for all."""
    factories = ("squares", "norm", "scale", "update")
    return [Kernel("adamw", factory, (real,)) for factory in factories for real in ("float32", "float64")]
