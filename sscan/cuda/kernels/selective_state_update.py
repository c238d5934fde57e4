"""One decoding step of the selective scan on the GPU.

A block has ``THREADS / lanes`` channels of ``rows`` rows, and ``lanes`` threads for each channel. A thread has, in
every row, ``vectors`` times ``each`` consecutive states, which lie ``lanes * each`` apart. All that it needs is asked
for at once; states are read and written once, A is read once for all of the rows.
"""

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._math import number_functions
from sscan.cuda._primitives import (
    INTEGER_READERS,
    await_previous,
    block_index,
    dtype_of,
    local_array,
    planes,
    prefetch,
    quotient,
    reader,
    real_of,
    select,
    stored_array,
    stored_reader,
    thread_index,
    widener,
    writer,
)
from sscan.cuda._target import device
from sscan.cuda.kernels._warp import lane_sum
from sscan.cuda.selective_state_update import THREADS


@device
def group_of(channel, channels, dim):
    """The group of a channel, ``channels`` of them being in each."""
    return channel * 0 if channels == dim else quotient(channel, channels)


def numbers_asked(storage, number, each, times, together, constant=True):
    """``make()``, ``ask(raw, i, address, index, valid)`` and ``take(into, raw, i)``: ``times`` times ``each`` numbers.

    What is asked for is waited for where it is taken.
    """
    reals = planes(number)
    count = each * reals
    load, widen = stored_reader(storage, count, together, constant=constant), widener(storage, number, each)

    @device
    def ask(raw, i, address, index, valid):
        load(raw, i * count, address, index * reals, valid * reals)

    @device
    def take(into, raw, i):
        widen(into, raw, i * count)

    return stored_array(times * count, storage), ask, take


def slot_reader(slot_bits):
    """``slot_of(slots, row, present, available)``: the row of the state, and whether there is one."""
    read_slot = INTEGER_READERS[slot_bits or 64]

    @device
    def slot_of(slots, row, present, available):
        slot = row
        if slot_bits:
            slot = read_slot(slots, row, present)
        return slot, (present > 0) & (slot >= 0) & (slot < available)

    return slot_of


def update(storage, state_storage, number, slot_bits, lanes, each, vectors, rows, exact, of_D, of_bias, A_log):
    """y and the new states. ``slot_bits`` are those of an element of ``slots``; 0: rows are slots.

    ``exact``: the threads of a channel have as many states together as there are. ``of_D`` and ``of_bias`` are dtypes.
    ``A_log``: A is log(-A).
    """
    number, real = np.dtype(number), real_of(number)
    f, total_of, slot_of = number_functions(number), lane_sum(lanes), slot_reader(slot_bits)
    product, times, real_part, decay, rate = f.product, f.times, f.real_part, f.decay, f.rate
    softplus, sigmoid, shares, none, one_real = f.softplus, f.sigmoid, f.shares, real.type(0), local_array(1, real)
    numbers, of_rows, together = local_array(each, number), local_array(rows, real), each * number.itemsize == 16
    together = together and number.kind != "c"
    own, kept = dtype_of(storage) if number.kind != "c" else real, dtype_of(state_storage)
    kept = real if kept.kind == "c" else kept
    read_input = reader(dtype_of(storage), real, 1)
    read_skip, read_bias = reader(dtype_of(of_D), real, 1), reader(dtype_of(of_bias), real, 1)
    write_state, write = writer(kept, number, each, together), writer(dtype_of(storage), real, 1)
    make_states, ask_states, take_states = numbers_asked(kept, number, each, rows * vectors, together, constant=False)
    make_matrices, ask_matrices, take_matrices = numbers_asked(own, number, each, rows * vectors, together)
    make_A, ask_A, take_A = numbers_asked(real, number, each, vectors, together)
    unit = real.type(1)
    channels, apart, reals = THREADS // lanes, lanes * each, planes(number)
    of_state, of_matrix, of_A = kept.itemsize * reals, own.itemsize * reals, number.itemsize

    def kernel(
        state, slots, x, dt, z, B, C, y, A, D, dt_bias, dt_softplus, available, batch, dim, count, channels_B,
        channels_C, state_slot, state_dim, x_row, dt_row, z_row, B_row, B_group, C_row, C_group,
    ):  # fmt: skip
        """Rows whose slot is not one of the ``available`` get y = 0 and touch nothing."""
        H, Bs, Cs, As = make_states(), make_matrices(), make_matrices(), make_A()
        h, a, b, c, one, bias, skip = numbers(), numbers(), numbers(), numbers(), one_real(), one_real(), one_real()
        u, delta, gate, total = of_rows(), of_rows(), of_rows(), of_rows()
        over_dim = (dim + channels - 1) // channels
        first = quotient(block_index(), over_dim)
        d = (block_index() - first * over_dim) * channels + thread_index() // lanes
        first, lane, present = first * rows, thread_index() & (lanes - 1), select(d < dim, 1, 0)
        at_B, at_C = group_of(d, channels_B, dim) * B_group, group_of(d, channels_C, dim) * C_group
        for r in range(rows):
            total[r] = none
            row = select((first + r < batch) & (first + r < available), first + r, 0)
            if not slot_bits:  # states may be sent for, the numbers of slots have to be waited for
                prefetch(state + (row * state_slot + (d * state_dim + lane * (count // lanes)) * present) * of_state)
        await_previous()
        for tile in range(1 if exact else (count + vectors * apart - 1) // (vectors * apart)):
            begin = tile * vectors * apart + lane * each
            for r in range(rows):
                row = first + r
                slot, live = slot_of(slots, row, select(row < batch, present, 0), available)
                # Addresses are made once: what is apart by a constant is read relative to them.
                from_state = state + (slot * state_slot + d * state_dim + begin) * of_state
                from_B = B + (row * B_row + at_B + begin) * of_matrix
                from_C = C + (row * C_row + at_C + begin) * of_matrix
                for v in range(vectors):
                    inside = select(live, each if exact else count - (begin + v * apart), 0)
                    ask_states(H, r * vectors + v, from_state, v * apart, inside)
                    ask_matrices(Bs, r * vectors + v, from_B, v * apart, inside)
                    ask_matrices(Cs, r * vectors + v, from_C, v * apart, inside)
            from_A = A + (d * count + begin) * of_A
            for v in range(vectors):
                ask_A(As, v, from_A, v * apart, present * (each if exact else count - (begin + v * apart)))
            if tile == 0:
                read_bias(bias, dt_bias, d, select(dt_bias == 0, 0, present))
                read_skip(skip, D, d, select(D == 0, 0, present))
                for r in range(rows):
                    row = first + r
                    there = select(row < batch, present, 0)
                    read_input(one, x, row * x_row + d, there)
                    u[r] = one[0]
                    read_input(one, z, row * z_row + d, select(z == 0, 0, there))
                    gate[r] = one[0]
                    read_input(one, dt, row * dt_row + d, there)
                    delta[r] = one[0] + bias[0]
                    if dt_softplus:
                        delta[r] = softplus(delta[r])
            for v in range(vectors):
                take_A(a, As, v)
                for k in range(each):
                    a[k] = rate(-decay(unit, rate(a[k])) if A_log else a[k])
                for r in range(rows):
                    take_states(h, H, r * vectors + v)
                    take_matrices(b, Bs, r * vectors + v)
                    take_matrices(c, Cs, r * vectors + v)
                    delta_u = delta[r] * u[r]
                    for k in range(each):
                        h[k] = product(decay(delta[r], a[k]), h[k]) + times(b[k], delta_u)
                        total[r] = total[r] + real_part(product(c[k], h[k]))
                    row = first + r
                    slot, live = slot_of(slots, row, select(row < batch, present, 0), available)
                    from_state = state + (slot * state_slot + d * state_dim + begin) * of_state
                    inside = select(live, each if exact else count - (begin + v * apart), 0)
                    write_state(from_state, v * apart, h, inside)
        for r in range(rows):
            row = first + r
            there = select(row < batch, present, 0)
            slot, live = slot_of(slots, row, there, available)
            sum_of_row = total_of(total[r]) * shares + skip[0] * u[r]
            if z != 0:
                sum_of_row = sum_of_row * (gate[r] * sigmoid(gate[r]))
            one[0] = select(live, sum_of_row, none)
            write(y, row * dim + d, one, select(lane == 0, there, 0))

    return kernel, Shape(THREADS, 5 if real == np.float32 else 2)


def shipped():
    """Kernels that stand for all: every dtype, and every option once."""
    return [
        Kernel("selective_state_update", "update", key)
        for key in (
            ("float32", "float32", "float32", 0, 2, 4, 2, 2, True, "float32", "float32", True),
            ("float16", "float16", "float32", 32, 4, 2, 2, 2, False, "float16", "float32", False),
            ("bfloat16", "float32", "float32", 64, 8, 4, 4, 1, True, "float32", "bfloat16", True),
            ("bfloat16", "bfloat16", "float32", 32, 2, 4, 2, 2, False, "float32", "float32", False),
            ("float64", "float64", "float64", 32, 2, 2, 4, 1, True, "float64", "float64", True),
            ("bfloat16", "complex64", "complex64", 0, 4, 1, 4, 1, True, "float32", "float32", False),
            ("float64", "complex128", "complex128", 64, 4, 1, 4, 1, False, "float64", "float64", False),
        )
    ]
