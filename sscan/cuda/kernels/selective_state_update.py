"""One decoding step of the selective scan on the GPU.

A block has ``THREADS / lanes`` channels of one row, ``lanes`` threads for each channel and ``each`` consecutive states
for each thread: all that a thread needs is asked for at once, states are read and written once.
"""

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._math import number_functions
from sscan.cuda._primitives import (
    INTEGER_READERS,
    block_index,
    dtype_of,
    local_array,
    reader,
    real_of,
    select,
    thread_index,
    writer,
)
from sscan.cuda._target import device
from sscan.cuda.kernels._warp import lane_sum
from sscan.cuda.selective_state_update import THREADS


@device
def group_of(channel, channels, dim):
    """The group of a channel, ``channels`` of them being in each."""
    return channel * 0 if channels == dim else channel // channels


def update(storage, state_storage, number, slot_bits, lanes, each):
    """y and the new states. ``slot_bits`` are those of an element of ``slots``; 0: rows are slots."""
    number, real = np.dtype(number), real_of(number)
    f, total_of = number_functions(number), lane_sum(lanes)
    product, times, real_part, decay, rate = f.product, f.times, f.real_part, f.decay, f.rate
    softplus, sigmoid, shares, none, one_real = f.softplus, f.sigmoid, f.shares, real.type(0), local_array(1, real)
    registers = local_array(each, number)
    own = dtype_of(storage) if number.kind != "c" else real
    kept = dtype_of(state_storage)
    kept = real if kept.kind == "c" else kept
    read_input, read_parameter = reader(dtype_of(storage), real, 1), reader(real, real, 1)
    read_A, read_matrix = reader(real, number, each, True), reader(own, number, each, True)
    read_state, write_state = reader(kept, number, each, True, False), writer(kept, number, each, True)
    write, read_slot = writer(dtype_of(storage), real, 1), INTEGER_READERS[slot_bits or 64]
    channels = THREADS // lanes

    def kernel(
        state, slots, x, dt, z, B, C, y, A, D, dt_bias, dt_softplus, available, dim, count, channels_B, channels_C,
        state_slot, state_dim, x_row, dt_row, z_row, B_row, B_group, C_row, C_group,
    ):  # fmt: skip
        """Rows whose slot is not one of the ``available`` get y = 0 and touch nothing."""
        h, a, b, c, u, step, gate = (
            registers(), registers(), registers(), registers(), one_real(), one_real(), one_real()
        )  # fmt: skip
        bias, skip = one_real(), one_real()
        over_dim = (dim + channels - 1) // channels
        row = block_index() // over_dim
        d = block_index() % over_dim * channels + thread_index() // lanes
        lane = thread_index() & (lanes - 1)
        slot = row
        if slot_bits:
            slot = read_slot(slots, row, 1)
        live = (slot >= 0) & (slot < available)
        present = select(live, dim - d, 0)
        at_B = row * B_row + group_of(d, channels_B, dim) * B_group
        at_C = row * C_row + group_of(d, channels_C, dim) * C_group
        read_input(u, x, row * x_row + d, present)
        read_input(step, dt, row * dt_row + d, present)
        read_input(gate, z, row * z_row + d, select(z == 0, 0, present))
        read_parameter(bias, dt_bias, d, select(dt_bias == 0, 0, present))
        read_parameter(skip, D, d, select(D == 0, 0, present))
        delta = step[0] + bias[0]
        if dt_softplus:
            delta = softplus(delta)
        delta_u, total = delta * u[0], none
        for tile in range((count + lanes * each - 1) // (lanes * each)):
            n = (tile * lanes + lane) * each
            inside = select(present > 0, count - n, 0)
            at = slot * state_slot + d * state_dim + n
            read_state(h, state, at, inside)
            read_A(a, A, d * count + n, inside)
            read_matrix(b, B, at_B + n, inside)
            read_matrix(c, C, at_C + n, inside)
            for k in range(each):
                h[k] = product(decay(delta, rate(a[k])), h[k]) + times(b[k], delta_u)
                total = total + real_part(product(c[k], h[k]))
            write_state(state, at, h, inside)
        total = total_of(total) * shares + skip[0] * u[0]
        if z != 0:
            total = total * (gate[0] * sigmoid(gate[0]))
        u[0] = select(live, total, none)
        write(y, row * dim + d, u, select(lane == 0, dim - d, 0))

    return kernel, Shape(THREADS, 6 if real == np.float32 else 4)


def shipped():
    """Kernels that stand for all: every dtype, and every option once."""
    return [
        Kernel("selective_state_update", "update", key)
        for key in (
            ("float32", "float32", "float32", 0, 4, 4),
            ("float16", "float16", "float32", 32, 16, 1),
            ("bfloat16", "float32", "float32", 64, 32, 4),
            ("bfloat16", "bfloat16", "float32", 32, 4, 4),
            ("float64", "float64", "float64", 32, 8, 2),
            ("bfloat16", "complex64", "complex64", 0, 16, 1),
            ("float64", "complex128", "complex128", 64, 16, 1),
        )
    ]
