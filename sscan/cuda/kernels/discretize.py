"""Discretisation on the GPU: A_bar = f(z) and B_bar = Delta s(z) B with z = Delta A.

A block has ``THREADS / lanes`` steps of one batch row, ``lanes`` threads for each step and ``each`` consecutive states
for each thread, and walks over channels of one group: B is read once, dB is summed in registers, and what is written
for a channel lies together in memory.
"""

from functools import cache

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._math import number_functions
from sscan.cuda._primitives import (
    block_index,
    complex_number,
    dtype_of,
    local_array,
    planes,
    reader,
    real_of,
    select,
    shared_array,
    shared_get,
    shared_set,
    synchronize,
    thread_index,
    writer,
)
from sscan.cuda._target import device
from sscan.cuda.discretize import THREADS
from sscan.cuda.kernels._warp import WARP, lane_sum


@cache
def discretized(number, method):
    """``rule(delta, A)`` = (A_bar, B_bar / B)."""
    number = np.dtype(number)
    f, one, half = number_functions(number), number.type(1), real_of(number).type(0.5)
    times, product, inverse, nonzero, rate = f.times, f.product, f.inverse, f.nonzero, f.rate
    decay, decay_and_change = f.decay, f.decay_and_change

    @device
    def zoh(delta, A):
        A = nonzero(A)
        A_bar, change = decay_and_change(delta, rate(A))
        return A_bar, product(change, inverse(A))

    @device
    def mamba(delta, A):
        return decay(delta, rate(A)), times(one, delta)

    @device
    def bilinear(delta, A):
        half_z = times(A, delta * half)
        inverted = inverse(one - half_z)
        return product(one + half_z, inverted), times(inverted, delta)

    @device
    def euler(delta, A):
        return one + times(A, delta), times(one, delta)

    return {"zoh": zoh, "mamba": mamba, "bilinear": bilinear, "euler": euler}[method]


@cache
def derivatives(number, method):
    """``rule(delta, A)`` = f'(z), s'(z), d(Delta s(Delta A)) / dDelta and Delta s(z)."""
    number = np.dtype(number)
    f, one, zero, half = number_functions(number), number.type(1), number.type(0), real_of(number).type(0.5)
    times, product, inverse, nonzero, rate, psi = f.times, f.product, f.inverse, f.nonzero, f.rate, f.psi
    decay, decay_and_change = f.decay, f.decay_and_change

    @device
    def zoh(delta, A):
        away = nonzero(A)
        A_bar, change = decay_and_change(delta, rate(away))
        return A_bar, psi(times(A, delta), A_bar, change), A_bar, product(change, inverse(away))

    @device
    def mamba(delta, A):
        return decay(delta, rate(A)), zero, one, times(one, delta)

    @device
    def bilinear(delta, A):
        inverted = inverse(one - times(A, delta * half))
        square = product(inverted, inverted)
        return square, times(square, half), square, times(inverted, delta)

    @device
    def euler(delta, A):
        return one, zero, one, times(one, delta)

    return {"zoh": zoh, "mamba": mamba, "bilinear": bilinear, "euler": euler}[method]


@cache
def _reals_as_number(storage, number):
    """``read(address, index, valid)``: the number at ``index`` reals from an address, 0 unless valid."""
    number, real = np.dtype(number), real_of(number)
    count, reals = planes(number), local_array(planes(number), real)
    read = reader(dtype_of(storage), real, count)

    @device
    def read_real(address, index, valid):
        x = reals()
        read(x, address, index, valid)
        return x[0]

    @device
    def read_complex(address, index, valid):
        x = reals()
        read(x, address, index, select(valid, 2, 0))
        return complex_number(x[0], x[1])

    return read_complex if count == 2 else read_real


@cache
def _number_as_reals(storage, number):
    """``write(address, index, x, valid)``, the inverse of ``_reals_as_number``."""
    number, real = np.dtype(number), real_of(number)
    count, reals = planes(number), local_array(planes(number), real)
    write = writer(dtype_of(storage), real, count)

    @device
    def write_real(address, index, x, valid):
        values = reals()
        values[0] = x
        write(address, index, values, valid)

    @device
    def write_complex(address, index, x, valid):
        values = reals()
        values[0], values[1] = x.real, x.imag
        write(address, index, values, select(valid, 2, 0))

    return write_complex if count == 2 else write_real


@cache
def _block(lanes, each):
    """``place(sizes...)``: what a block and its threads own."""
    times = THREADS // lanes  # steps

    @device
    def place(length, state, groups, channels, per_block):
        """Batch row, group, part of the group, block along time, first channel and their number, step, state."""
        over_time, over_state = (length + times - 1) // times, (state + lanes * each - 1) // (lanes * each)
        parts = (channels + per_block - 1) // per_block
        block = block_index()
        time, block = block % over_time, block // over_time
        tile, block = block % over_state, block // over_state
        part, block = block % parts, block // parts
        group, batch = block % groups, block // groups
        first = part * per_block
        count = min(per_block, channels - first)
        t, n = time * times + thread_index() // lanes, (tile * lanes + (thread_index() & (lanes - 1))) * each
        return batch, group, part, time, tile, group * channels + first, count, t, n

    return place


def forward(storage, number, method, varies, B_storage, lanes, each):
    """A_bar and B_bar, contiguous (batch, dim, length, state)."""
    number, real = np.dtype(number), real_of(number)
    rule, product, place = discretized(number, method), number_functions(number).product, _block(lanes, each)
    registers, one_real, reals = local_array(each, number), local_array(1, real), planes(number)
    read_delta, read_A = reader(dtype_of(storage), real, 1), reader(real, number, each, True)
    read_B, write = _reals_as_number(B_storage, number), writer(real, number, each, True)

    def kernel(
        delta, A, B, A_bar, B_bar, dim, length, state, groups, channels, per_block,
        delta_batch, delta_dim, B_batch, B_group, B_state,
    ):  # fmt: skip
        """``per_block`` of the ``channels`` of each group; B's distances count reals."""
        a, b, x, y, step = registers(), registers(), registers(), registers(), one_real()
        batch, group, _, _, _, d0, count, t, n = place(length, state, groups, channels, per_block)
        inside = select(t < length, state - n, 0)
        if varies:
            for k in range(each):
                at = batch * B_batch + group * B_group + (n + k) * B_state + reals * t
                b[k] = read_B(B, at, inside > k)
        for i in range(count):
            d = d0 + i
            read_delta(step, delta, batch * delta_batch + d * delta_dim + t, inside)
            read_A(a, A, d * state + n, inside)
            if not varies:
                read_A(b, B, d * state + n, inside)
            for k in range(each):
                x[k], scale = rule(step[0], a[k])
                y[k] = product(scale, b[k])
            at = ((batch * dim + d) * length + t) * state + n
            write(A_bar, at, x, inside)
            write(B_bar, at, y, inside)

    return kernel, Shape(THREADS, 8 if real == np.float32 else 4)


def backward(storage, number, method, varies, B_storage, ddelta_storage, dB_storage, lanes, each):
    """Parts of all gradients: sums over a block's steps (dA, constant dB), states (ddelta) or channels (varying dB).

    The sums of channel d over time go from lanes to warps through shared memory while the next channel begins.
    """
    number, real = np.dtype(number), real_of(number)
    rule, place, f = derivatives(number, method), _block(lanes, each), number_functions(number)
    product, times, conj, real_part, zero = f.product, f.times, f.conj, f.real_part, number.type(0)
    registers, one_real, reals = local_array(each, number), local_array(1, real), planes(number)
    one_number = local_array(1, number)
    read_delta, read_A = reader(dtype_of(storage), real, 1), reader(real, number, each, True)
    read_B, write_B = _reals_as_number(B_storage, number), _number_as_reals(dB_storage, number)
    write_delta, write_sum = writer(dtype_of(ddelta_storage), real, 1), writer(real, number, 1)
    over_states, over_times = lane_sum(lanes), lane_sum(WARP // lanes, lanes)
    width, warps, sums = lanes * each, THREADS // WARP, 1 if varies else 2
    make_shared = shared_array(2 * sums * warps * width, number)
    none = real.type(0)

    def kernel(
        dA_bar, dB_bar, delta, A, B, ddelta, dA, dB, batches, dim, length, state, groups, channels, per_block,
        delta_batch, delta_dim, B_batch, B_group, B_state,
    ):  # fmt: skip
        """Fills ddelta (tiles, batch, dim, length), dA (times, dim, state) and, constant, dB of the same shape.

        A varying dB is (parts, batch, groups, state, length).
        """
        a, b, gA, gB, step, x, shared = (
            registers(), registers(), registers(), registers(), one_real(), one_number(), make_shared()
        )  # fmt: skip
        sum_A, sum_B = registers(), registers()
        batch, group, part, time, tile, d0, count, t, n = place(length, state, groups, channels, per_block)
        inside = select(t < length, state - n, 0)
        lane, warp = thread_index() & (lanes - 1), thread_index() // WARP
        for k in range(each):
            sum_B[k] = zero
        if varies:
            for k in range(each):
                at = batch * B_batch + group * B_group + (n + k) * B_state + reals * t
                b[k] = read_B(B, at, inside > k)
        for i in range(count):
            d = d0 + i
            at = ((batch * dim + d) * length + t) * state + n
            read_A(gA, dA_bar, at, inside)
            read_A(gB, dB_bar, at, inside)
            read_delta(step, delta, batch * delta_batch + d * delta_dim + t, inside)
            read_A(a, A, d * state + n, inside)
            if not varies:
                read_A(b, B, d * state + n, inside)
            change = none
            for k in range(each):
                df, ds, dstep, scale = rule(step[0], a[k])
                moved = product(gA[k], conj(product(df, a[k]))) + product(gB[k], conj(product(dstep, b[k])))
                change = change + real_part(moved)
                from_s = product(gB[k], conj(times(product(ds, b[k]), step[0])))
                sum_A[k] = times(product(gA[k], conj(df)) + from_s, step[0])
                dB_here = product(gB[k], conj(scale))
                sum_B[k] = sum_B[k] + dB_here if varies else dB_here
            step[0] = over_states(change)
            valid = select((lane == 0) & (t < length), 1, 0)
            write_delta(ddelta, ((tile * batches + batch) * dim + d) * length + t, step, valid)
            slot = (i & 1) * sums * warps * width  # two buffers: one barrier a channel is enough
            for k in range(each):
                shared_set(shared, slot + warp * width + lane * each + k, over_times(sum_A[k]))
                if not varies:
                    shared_set(shared, slot + (warps + warp) * width + lane * each + k, over_times(sum_B[k]))
            synchronize()
            column = thread_index() & (width - 1)
            over_time = (length + THREADS // lanes - 1) // (THREADS // lanes)
            at = ((batch * over_time + time) * dim + d) * state + tile * width + column
            valid = select(thread_index() < width, state - tile * width - column, 0)
            for s in range(sums):
                total = shared_get(shared, slot + s * warps * width + column)
                for w in range(1, warps):
                    total = total + shared_get(shared, slot + (s * warps + w) * width + column)
                x[0] = total
                write_sum(dA if s == 0 else dB, at, x, valid)
        if varies:
            for k in range(each):
                at = ((part * batches + batch) * groups + group) * state + n + k
                write_B(dB, reals * (at * length + t), sum_B[k], inside > k)

    return kernel, Shape(THREADS, 4 if real == np.float32 and reals == 1 else 3)


def shipped():
    """Kernels that stand for all: every dtype, and every option once."""
    return [
        Kernel("discretize", *rest)
        for rest in (
            ("forward", ("float32", "float32", "zoh", True, "float32", 4, 4)),
            ("forward", ("float16", "float32", "mamba", True, "float16", 32, 1)),
            ("forward", ("bfloat16", "complex64", "bilinear", True, "bfloat16", 16, 1)),
            ("forward", ("float64", "complex128", "zoh", False, "float64", 16, 1)),
            ("forward", ("float64", "float64", "euler", True, "float64", 8, 2)),
            ("backward", ("float32", "float32", "zoh", True, "float32", "float32", "float32", 4, 4)),
            ("backward", ("float16", "float32", "mamba", False, "float32", "float16", "float32", 32, 4)),
            ("backward", ("bfloat16", "complex64", "zoh", True, "bfloat16", "bfloat16", "float32", 16, 1)),
            ("backward", ("float32", "complex64", "bilinear", False, "float32", "float32", "float32", 16, 1)),
            ("backward", ("float64", "complex128", "zoh", True, "float64", "float64", "float64", 16, 1)),
            ("backward", ("float64", "float64", "euler", True, "float64", "float64", "float64", 8, 2)),
        )
    ]
