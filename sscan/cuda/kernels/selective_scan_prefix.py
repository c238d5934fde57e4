"""What becomes of a state on its way through stretches of time, or of a gradient on its way back.

A thread has one state of one channel and walks the stretches one by one. There is little to compute: what takes time is
waiting for memory, so that several stretches are read at once.
"""

from functools import cache

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._math import number_functions
from sscan.cuda._prefix import THREADS
from sscan.cuda._primitives import (
    block_index,
    local_array,
    planes,
    quotient,
    reader,
    real_of,
    select,
    thread_index,
    writer,
)
from sscan.cuda._target import device
from sscan.cuda._unroll import unroll
from sscan.cuda.kernels._warp import zero_test

AHEAD = 128  # bytes of stretches that a thread reads at once
AHEAD_OF_LANE = 32  # bytes of the ends of parts that a lane reads at once, for each of its states


@cache
def behind(number):
    """``behind(state, passed, rate, end)``: the state behind a stretch of a sum of step sizes that ends in ``end``.

    The decay is applied in two halves, finite wherever its product with a number is. A state of zero stays zero.
    """
    f, is_zero = number_functions(number), zero_test(number)
    product, decay, choose, half = f.product, f.decay, f.choose, f.one / 2

    @device
    def behind_stretch(state, passed, rate, end):
        a = decay(half * passed, rate)
        return choose(is_zero(state), end, product(a, product(a, state)) + end)

    return behind_stretch


def past_parts(number, states, back):
    """Device function: what becomes of a state on its way through parts, or of its gradient on the way back.

    A few parts are read at once: there is nothing else to do until they are there. NVVM writes out the loops over them,
    all but the two of complex128.
    """
    f, real, ahead = number_functions(number), real_of(number), AHEAD_OF_LANE // number.itemsize
    read_end, read_sum = reader(real, number, states, True, False), reader(real, real, 1, False, False)
    one_end, one_sum = local_array(states, number), local_array(1, real)
    some_ends, some_sums = local_array(ahead * states, number), local_array(ahead, real)
    choose, conj, zero, infinite, walked = f.choose, f.conj, f.zero, real.type(np.inf), behind(number)

    @device
    def walk(h, rate, part_ends, part_sums, first, apart, count, padded, n, alive):
        """``count`` parts, whose numbers begin at ``first`` and lie ``apart``."""
        end, passed, ends, sums = one_end(), one_sum(), some_ends(), some_sums()
        for k0 in range(0, count, ahead):
            for k in unroll(ahead, ahead < 4):
                at, valid = first + (k0 + k) * apart, select(k0 + k < count, alive, 0 * alive)
                read_end(end, part_ends, at * padded + n, valid)
                read_sum(passed, part_sums, at, valid)
                for j in range(states):
                    ends[k * states + j] = end[j]
                sums[k] = passed[0]
            for k in unroll(ahead, ahead < 4):
                ended = sums[k] == infinite  # a sequence, in this part
                for j in range(states):
                    through = conj(rate[j]) if back else rate[j]  # whose decay is the conjugate of that of A
                    after = walked(h[j], select(ended, zero, sums[k]), through, ends[k * states + j])
                    h[j] = choose(ended, ends[k * states + j], after)

    return walk


def prefix(number):
    """The state behind all stretches and, where there is room for it behind a channel's states, their step sizes."""
    number, real = np.dtype(number), real_of(np.dtype(number))
    f, reals, size = number_functions(number), planes(number), real.itemsize
    rate_of, conj, choose, zero, walked = f.rate, f.conj, f.choose, f.zero, behind(number)
    one_number, one_real = local_array(1, number), local_array(1, real)
    ahead = AHEAD // number.itemsize
    heavy = real == np.float64  # its exponential is a polynomial: NVVM would leave even short loops as they are
    numbers, steps = local_array(ahead, number), local_array(ahead, real)
    read_number, write_number = reader(real, number, 1), writer(real, number, 1)
    read_real, write_real = reader(real, real, 1), writer(real, real, 1)
    nothing = number.type(0)

    def kernel(
        A, ends, sums, entering, added, out, stretches, channels, dim, state, row_step, first, stretch_step,
        end_width, sum_width, out_width, back,
    ):  # fmt: skip
        """A, ``entering`` and ``added``, which comes behind all stretches, are contiguous.

        Steps count channels, from the first stretch that is walked. Widths are reals from one channel to the next. They
        need be no multiples of a number: numbers are addressed by reals.
        """
        h, x, s, own, passed = one_number(), one_number(), one_real(), numbers(), steps()
        index, last = block_index() * THREADS + thread_index(), channels * state - 1
        alive = select(index <= last, 1, 0)
        index = select(index <= last, index, last)  # reads without conditions do not wait for each other
        channel = quotient(index, state)
        n, row = index - channel * state, quotient(channel, dim)
        d = channel - row * dim
        at = row * row_step + d + first
        read_number(x, A, d * state + n, 1)
        rate = rate_of(choose(back != 0, conj(x[0]), x[0]))  # exp(conj(A) t) is the conjugate of exp(A t)
        h[0] = nothing
        if entering != 0:
            read_number(h, entering, index, 1)
        total = zero
        for begin in range(0, stretches, ahead):
            for k in unroll(ahead, heavy):
                stretch = at + min(begin + k, stretches - 1) * stretch_step
                read_number(x, ends + size * (stretch * end_width + reals * n), 0, 1)
                read_real(s, sums, stretch * sum_width, 1)
                there = begin + k < stretches  # else it takes no time, and adds nothing
                own[k], passed[k] = choose(there, x[0], nothing), select(there, s[0], zero)
            for k in unroll(ahead, heavy):
                h[0] = walked(h[0], passed[k], rate, own[k])
                total = total + passed[k]
        if added != 0:
            read_number(x, added, index, 1)
            h[0] = h[0] + x[0]
        write_number(out + size * (channel * out_width + reals * n), 0, h, alive)
        if out_width > reals * state:
            s[0] = total
            write_real(out, channel * out_width + reals * state, s, select(n == 0, alive, 0))

    return kernel, Shape(THREADS, 2)


def shipped():
    """Kernels that stand for all: every dtype."""
    return [
        Kernel("selective_scan_prefix", "prefix", (number,))
        for number in ("float32", "float64", "complex64", "complex128")
    ]
