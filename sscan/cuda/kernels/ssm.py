"""The kernel of the time-invariant system on the GPU, from powers of A_bar.

A block has ``CHUNK`` steps of one channel; a thread those that lie ``THREADS`` apart, so that neighbours write side by
side. For every state the thread's first power is formed by squaring, the others by multiplication.
"""

from functools import cache

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._math import number_functions
from sscan.cuda._primitives import (
    block_index,
    local_array,
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
from sscan.cuda.kernels._warp import WARP, lane_sum
from sscan.cuda.ssm import CHUNK, THREADS

STEPS = CHUNK // THREADS


@cache
def _powers(number):
    """``powers(a, chunk)`` = (a to the thread's first step of a chunk, a^THREADS)."""
    number = np.dtype(number)
    f, one = number_functions(number), number.type(1)
    product, choose = f.product, f.choose
    thread_bits, step_bits = THREADS.bit_length() - 1, STEPS.bit_length() - 1

    @device
    def powers(a, chunk):
        thread, power = thread_index(), one
        for bit in range(thread_bits):
            power = choose(((thread >> bit) & 1) == 1, product(power, a), power)
            a = product(a, a)
        step = a
        for _ in range(step_bits):
            a = product(a, a)
        while chunk > 0:
            if chunk & 1:
                power = product(power, a)
            a = product(a, a)
            chunk = chunk >> 1
        return power, step

    return powers


def kernel_forward(number):
    """K[d, k] = Re sum_n C[d, n] B_bar[d, n] A_bar[d, n]^k, twice that for complex numbers."""
    number, real = np.dtype(number), real_of(number)
    f, powers = number_functions(number), _powers(number)
    product, times, real_part, shares, zero = f.product, f.times, f.real_part, f.shares, real.type(0)
    one_number, one_real, totals = local_array(1, number), local_array(1, real), local_array(STEPS, real)
    read, write = reader(real, number, 1), writer(real, real, 1)

    def kernel(A_bar, B_bar, C, K, dim, length, state):
        a, b, c, x, total = one_number(), one_number(), one_number(), one_real(), totals()
        d, chunk = block_index() % dim, block_index() // dim
        first = chunk * CHUNK + thread_index()
        for k in range(STEPS):
            total[k] = zero
        for n in range(state):
            read(a, A_bar, d * state + n, 1)
            read(b, B_bar, d * state + n, 1)
            read(c, C, d * state + n, 1)
            power, step = powers(a[0], chunk)
            power = product(times(product(c[0], b[0]), shares), power)
            for k in range(STEPS):
                total[k] = total[k] + real_part(power)
                power = product(power, step)
        for k in range(STEPS):
            x[0] = total[k]
            write(K, d * length + first + THREADS * k, x, length - first - THREADS * k)

    return kernel, Shape(THREADS, 8 if real == np.float32 else 4)


def kernel_backward(number):
    """sums[chunk, 0 and 1, d, n] = a chunk's sums over k of dK_k a^k and of (k + 1) dK_{k+1} a^k."""
    number, real = np.dtype(number), real_of(number)
    f, powers, total_of, to_real = number_functions(number), _powers(number), lane_sum(WARP), real.type
    product, times, zero, warps = f.product, f.times, number.type(0), THREADS // WARP
    one_number, one_real, registers = local_array(1, number), local_array(1, real), local_array(STEPS, real)
    read, read_real, write = reader(real, number, 1), reader(real, real, 1), writer(real, number, 1)
    make_shared = shared_array(4 * warps, number)

    def kernel(dK, A_bar, sums, dim, length, state):
        a, x, G, E, shared = one_number(), one_real(), registers(), registers(), make_shared()
        d, chunk = block_index() % dim, block_index() // dim
        first = chunk * CHUNK + thread_index()
        for k in range(STEPS):
            at = first + THREADS * k
            read_real(x, dK, d * length + at, length - at)
            G[k] = x[0]
            read_real(x, dK, d * length + at + 1, length - at - 1)
            E[k] = x[0] * to_real(at + 1)
        for n in range(state):
            read(a, A_bar, d * state + n, 1)
            power, step = powers(a[0], chunk)
            value, slope = zero, zero
            for k in range(STEPS):
                value, slope = value + times(power, G[k]), slope + times(power, E[k])
                power = product(power, step)
            slot = (n & 1) * 2 * warps  # two buffers: one barrier a state is enough
            shared_set(shared, slot + 2 * (thread_index() // WARP), total_of(value))
            shared_set(shared, slot + 2 * (thread_index() // WARP) + 1, total_of(slope))
            synchronize()
            for i in range(2):
                total = shared_get(shared, slot + i)
                for w in range(1, warps):
                    total = total + shared_get(shared, slot + 2 * w + i)
                a[0] = total
                write(sums, ((chunk * 2 + i) * dim + d) * state + n, a, select(thread_index() == 0, 1, 0))

    return kernel, Shape(THREADS, 4 if real == np.float32 else 2)


def kernel_gradients(number):
    """dA_bar, dB_bar and dC from the sums of all chunks, one state for each thread."""
    number, real = np.dtype(number), real_of(number)
    f, one_number, zero = number_functions(number), local_array(1, number), number.type(0)
    product, times, conj, shares = f.product, f.times, f.conj, f.shares
    read, write = reader(real, number, 1), writer(real, number, 1)

    def kernel(sums, B_bar, C, dA_bar, dB_bar, dC, chunks, size):
        b, c, x = one_number(), one_number(), one_number()
        i = block_index() * THREADS + thread_index()
        value, slope = zero, zero
        for chunk in range(chunks):
            read(x, sums, 2 * chunk * size + i, size - i)
            value = value + x[0]
            read(x, sums, (2 * chunk + 1) * size + i, size - i)
            slope = slope + x[0]
        value, slope = times(value, shares), times(slope, shares)
        read(b, B_bar, i, size - i)
        read(c, C, i, size - i)
        x[0] = conj(product(product(c[0], b[0]), slope))
        write(dA_bar, i, x, size - i)
        x[0] = conj(product(c[0], value))
        write(dB_bar, i, x, size - i)
        x[0] = conj(product(b[0], value))
        write(dC, i, x, size - i)

    return kernel, Shape(THREADS, 4)


def shipped():
    """All kernels of single precision, complex ones of double."""
    factories = ("kernel_forward", "kernel_backward", "kernel_gradients")
    return [Kernel("ssm", name, (number,)) for number in ("float32", "complex64", "complex128") for name in factories]
