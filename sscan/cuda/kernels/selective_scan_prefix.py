"""State passing: from the carries of parts of time to the state that enters what follows, their prefix.

The *carry* of a part is the state that it ends in when it starts from zero, and the sum of its step sizes: exp(A sum)
is what it leaves of a state that enters it. Backward the gradient of a state is passed in the same way, from the last
part to the first. Parts are walked one by one. There is little to compute: what takes time is waiting for memory, so
several parts are read at once.
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

AHEAD = 128  # bytes of carries that a thread of ``prefix`` reads at once
AHEAD_OF_LANE = 32  # and a lane of the scan, for each of its states


@cache
def state_passer(number):
    """``pass_state(state, total, rate, end)``: the state after a part, from that before it and the part's carry.

    ``total`` is the sum of its step sizes, ``end`` what it ends in from zero.

    The decay is applied in two halves, finite wherever its product with a number is. A state of zero stays zero.
    """
    f, is_zero = number_functions(number), zero_test(number)
    product, decay, choose, half = f.product, f.decay, f.choose, f.one / 2

    @device
    def pass_state(state, total, rate, end):
        a = decay(half * total, rate)
        return choose(is_zero(state), end, product(a, product(a, state)) + end)

    return pass_state


def parts_passer(number, states, back):
    """``pass_parts``: the states of a lane, or their gradients on the way back, past some parts.

    NVVM writes out the loops over parts that are read at once, all but the two of complex128.
    """
    f, real, ahead = number_functions(number), real_of(number), AHEAD_OF_LANE // number.itemsize
    read_end, read_sum = reader(real, number, states, True, False), reader(real, real, 1, False, False)
    one_end, one_sum = local_array(states, number), local_array(1, real)
    some_ends, some_sums = local_array(ahead * states, number), local_array(ahead, real)
    choose, conj, zero, infinite, pass_state = f.choose, f.conj, f.zero, real.type(np.inf), state_passer(number)

    @device
    def pass_parts(h, rate, part_ends, part_sums, first, apart, count, padded, n, alive):
        """``count`` parts, whose numbers begin at ``first`` and lie ``apart``."""
        end, total, ends, sums = one_end(), one_sum(), some_ends(), some_sums()
        for k0 in range(0, count, ahead):
            for k in unroll(ahead, ahead < 4):
                at, valid = first + (k0 + k) * apart, select(k0 + k < count, alive, 0 * alive)
                read_end(end, part_ends, at * padded + n, valid)
                read_sum(total, part_sums, at, valid)
                for j in range(states):
                    ends[k * states + j] = end[j]
                sums[k] = total[0]
            for k in unroll(ahead, ahead < 4):
                ended = sums[k] == infinite  # a sequence, in this part
                for j in range(states):
                    own_rate = conj(rate[j]) if back else rate[j]  # whose decay is the conjugate of that of A
                    after = pass_state(h[j], select(ended, zero, sums[k]), own_rate, ends[k * states + j])
                    h[j] = choose(ended, ends[k * states + j], after)

    return pass_parts


def prefix(number):
    """The state after all parts and, where there is room for it behind a channel's states, the sum of their steps.

    A thread has one state of one channel.
    """
    number, real = np.dtype(number), real_of(np.dtype(number))
    f, reals, size = number_functions(number), planes(number), real.itemsize
    rate_of, conj, choose, zero, pass_state = f.rate, f.conj, f.choose, f.zero, state_passer(number)
    one_number, one_real = local_array(1, number), local_array(1, real)
    ahead = AHEAD // number.itemsize
    heavy = real == np.float64  # its exponential is a polynomial: NVVM would leave even short loops as they are
    numbers, steps = local_array(ahead, number), local_array(ahead, real)
    read_number, write_number = reader(real, number, 1), writer(real, number, 1)
    read_real, write_real = reader(real, real, 1), writer(real, real, 1)
    nothing = number.type(0)

    def kernel(
        A, ends, sums, entering, added, out, parts, channels, dim, state, row_step, first, part_step,
        end_width, sum_width, out_width, back,
    ):  # fmt: skip
        """A, ``entering`` and ``added``, which comes after all parts, are contiguous.

        Steps count channels, from the first part that is walked. Widths are reals from one channel to the next. They
        need be no multiples of a number: numbers are addressed by reals.
        """
        h, x, s, own, totals = one_number(), one_number(), one_real(), numbers(), steps()
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
        for begin in range(0, parts, ahead):
            for k in unroll(ahead, heavy):
                part = at + min(begin + k, parts - 1) * part_step
                read_number(x, ends + size * (part * end_width + reals * n), 0, 1)
                read_real(s, sums, part * sum_width, 1)
                there = begin + k < parts  # else it takes no time, and adds nothing
                own[k], totals[k] = choose(there, x[0], nothing), select(there, s[0], zero)
            for k in unroll(ahead, heavy):
                h[0] = pass_state(h[0], totals[k], rate, own[k])
                total = total + totals[k]
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
