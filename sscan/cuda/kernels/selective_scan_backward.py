"""The selective scan, backward: as the forward, but walked from the last tile to the first.

A tile is what lies between two checkpoints, 16 steps. From its checkpoint a sweep finds the state at the start of each
quad of steps; the quads are then walked from the last to the first, each forward once more for its states and decays,
and backward for g, the gradient of the state. A lane has the same four states of ``rows`` channels, so that what it
reads of B and C serves all of them and what it adds to dB and dC is summed over them before lanes exchange anything.

Sums over states (for du, ddelta and dz) go across the lanes of a channel. Sums over channels (dB and dC) go across the
channels of a warp, then over the warps of the block, and are written once for each block and step; ``sum_matrices``
adds up the blocks.

Lanes that exchange sums send what the other one keeps, and to pick that takes as long as to add it up. So the lanes of
the second half of a warp have their states *turned*, the second half of them first: then all keep their first half and
send the rest. They read B and C from copies that are turned as well.
"""

import math

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._math import number_functions
from sscan.cuda._primitives import (
    SharedMemory,
    anew,
    block_index,
    converge,
    dtype_of,
    local_array,
    planes,
    quotient,
    reader,
    real_of,
    select,
    shared_get,
    shared_reader,
    shared_set,
    shared_writer,
    shuffle_xor,
    synchronize,
    synchronize_warp,
    thread_index,
    writer,
)
from sscan.cuda._target import device
from sscan.cuda._unroll import unroll
from sscan.cuda.kernels._segments import part_of, segment
from sscan.cuda.kernels._waves import QUAD, wave_tile
from sscan.cuda.kernels.selective_scan import (
    BLOCK,
    CHECKPOINT,
    LANES,
    SHIPPED,
    WARP_CHANNELS,
    Variant,
    across,
    chunk_of,
    lane_of,
    lane_total,
    matrix_tile,
    past_parts,
    place,
    readers,
    row_of,
)

TILE = CHECKPOINT
QUADS = TILE // QUAD
# Numbers from one step and from one quad of B to the next in shared memory: threads, which stage two steps of a state
# each, meet no other of their warp in a memory bank.
STEP_SIZE, QUAD_SIZE = 24, 100


def across_channels(number, states, varying_B, varying_C):
    """Device functions: sum dB and dC of a quad, [step][state] in each lane, over the channels of a warp.

    ``exchange``: lanes exchange halves of what they hold until ``states`` numbers of B or of C are left, ``into``.
    These are two steps of the first half of the lane's states, or of a single state one step. ``put`` takes them to
    [step][B or C][state] in shared memory.
    """
    choose = number_functions(number).choose
    matrices = int(varying_B) + int(varying_C)
    half = max(1, states // 2)
    size = 2 * states  # of what is left of a matrix after the first exchange
    of_both, of_step, store = local_array(2 * size, number), local_array(half, number), shared_writer(number, half)

    @device
    def exchange(into, of_B, of_C, thread):
        x = of_both()
        second, matrix, odd = (thread & 16) != 0, (thread & 2) != 0, (thread & 4) != 0
        for k in range(size):
            if states > 1:
                at = k // half * states + k % half
                if varying_B:
                    x[k] = of_B[at] + shuffle_xor(of_B[at + half], 16)
                if varying_C:
                    x[size + k] = of_C[at] + shuffle_xor(of_C[at + half], 16)
            else:
                if varying_B:
                    sent, kept = choose(second, of_B[k], of_B[k + 2]), choose(second, of_B[k + 2], of_B[k])
                    x[k] = kept + shuffle_xor(sent, 16)
                if varying_C:
                    sent, kept = choose(second, of_C[k], of_C[k + 2]), choose(second, of_C[k + 2], of_C[k])
                    x[size + k] = kept + shuffle_xor(sent, 16)
        for k in range(size):
            if varying_B and varying_C:
                sent, kept = choose(matrix, x[k], x[size + k]), choose(matrix, x[size + k], x[k])
                x[k] = kept + shuffle_xor(sent, 2)
            elif varying_C:
                x[k] = x[size + k]
        for k in range(states):
            sent, kept = choose(odd, x[k], x[k + states]), choose(odd, x[k + states], x[k])
            into[k] = kept + shuffle_xor(sent, 4)
            if not (varying_B and varying_C):
                into[k] = into[k] + shuffle_xor(into[k], 2)

    @device
    def put(tile, at, sums, lane, thread):
        values = of_step()
        second, odd, matrix = (thread >> 4) & 1, (thread >> 2) & 1, (thread >> 1) & (matrices - 1)
        for k in unroll(states // half):
            for j in range(half):
                values[j] = sums[k * half + j]
            if states > 1:
                store(tile, at + ((2 * odd + k) * matrices + matrix) * BLOCK + lane * states + second * half, values)
            else:
                store(tile, at + ((2 * second + odd) * matrices + matrix) * BLOCK + lane, values)

    return exchange, put


def backward(rows, warps, blocks, *key):
    """Gradients, with ``rows`` channels in each lane and ``warps`` warps in a block.

    Grid: blocks of ``rows * warps * 8`` channels, parts, segments. Two barriers a tile and block of states. Reads u,
    delta, z and dy once, checkpoints once; writes du, ddelta and dz once, and one number of dB and dC for every block
    of channels, step and state.
    """
    v = Variant(*key)
    storage, number = dtype_of(v.storage), dtype_of(v.number)
    f, real, NS = number_functions(number), real_of(number), v.states
    zoh, gated, resets, many, spread = v.zoh, v.gated, v.resets, v.many, v.order != "rows"
    varying_B, varying_C = v.B != "", v.C != ""
    # exponentials that are polynomials: NVVM would leave even short loops as they are
    heavy = zoh or number != np.float32
    constant_B, constant_C = not varying_B, not varying_C
    varying = varying_B or varying_C
    matrices = int(varying_B) + int(varying_C)
    threads, channels, apart = 32 * warps, WARP_CHANNELS * warps * rows, WARP_CHANNELS * warps
    softplus, sigmoid, decay, decay_and_change, psi = f.softplus, f.sigmoid, f.decay, f.decay_and_change, f.psi
    product, times, choose, overlap, conj = f.product, f.times, f.choose, f.overlap, f.conj
    overlap_with_rate, of_rate, shares = f.overlap_with_rate, f.of_rate, f.shares
    zero, one, ln2 = f.zero, f.one, real.type(math.log(2))
    none, turned = number.type(0), NS // 2

    waves = wave_tile(v, storage, real, threads, channels, TILE, TILE, swizzled=True)
    own_quad, start, at_wave, known, inside = waves.own, waves.start, waves.at, waves.known, waves.inside
    parameter_of, parameter_channel, channel_of = waves.parameter_of, waves.parameter_channel, waves.channel_of
    slot, put_quad, get_quad, count, parameters = waves.slot, waves.put, waves.get, waves.count, waves.parameters
    past, stored, read, widen, write = waves.past, waves.stored, waves.read, waves.widen, waves.write
    of_rows, of_steps, one_number = local_array(rows, real), local_array(QUAD, real), local_array(NS, number)
    of_channels, channels_apart = local_array(parameters, real), QUAD // rows if v.order == "columns" else apart
    rows_of_numbers, quad_of_numbers = local_array(rows * NS, number), local_array(QUAD * NS, number)
    four_numbers = local_array(4, number)
    read_numbers, write_numbers = reader(real, number, NS), writer(real, number, NS)
    read_own, write_own = reader(real, number, NS, True, False), writer(real, number, NS, True)
    write_four = writer(real, number, 4, True)
    load_quad = shared_reader(real, QUAD)
    load_numbers, store_numbers = shared_reader(number, NS), shared_writer(number, NS)
    load_four = shared_reader(number, 4)
    # numbers of a warp at the start of a quad; afterwards its sums, [step][B or C][state], which are no more
    own_size = rows * WARP_CHANNELS * BLOCK
    memory = SharedMemory()
    steps_array, inputs_array, dy_array, slope_array = (memory.array(channels * TILE, real) for _ in range(4))
    gate_array, keep_array = memory.array(channels * TILE if gated else 1, real), memory.array(TILE, real)
    skip_array = memory.array(channels, real)
    D_array, bias_array = (memory.array(2 * rows * threads, real) for _ in range(2))
    B_array, C_array = (memory.array((2 if turned else 1) * QUADS * QUAD_SIZE, number) for _ in range(2))
    own_array = memory.array(QUADS * warps * own_size, number)
    u_array, step_array, y_array = (memory.array(channels * TILE if many else 1, real) for _ in range(3))
    stored_B, stored_C = dtype_of(v.B or v.storage), dtype_of(v.C or v.storage)
    sizes = TILE, threads, STEP_SIZE, QUAD_SIZE, turned
    B_part, start_B, read_B, stage_B = matrix_tile(v, stored_B, False, False, *sizes)
    C_part, start_C, read_C, stage_C = matrix_tile(v, stored_C, True, False, *sizes)
    parameter, write_real, rates, kept = readers(number, NS, zoh, TILE)
    walk = past_parts(number, NS, True)
    exchange, put = across_channels(number, NS, varying_B, varying_C)
    states_apart, size_of, number_size = LANES * NS, storage.itemsize, number.itemsize
    per_number, B_size, C_size = planes(number), stored_B.itemsize, stored_C.itemsize
    matrix_columns = v.matrix_order == "columns"

    @device
    def moved(size, u, rate, per_A, B, keep):
        """What a step leaves of a state, and what it adds: the factor a and B_bar u."""
        if zoh:
            a, change = decay_and_change(size, rate)
            into = product(product(change, per_A), times(B, u))
        else:
            a = decay(size, rate)
            into = times(B, size * u)
        if resets:
            a = times(a, keep)
        return a, into

    @device
    def turn(values, second):
        """States as a lane has them, or back again."""
        for j in range(turned):
            low, high = values[j], values[j + turned]
            values[j], values[j + turned] = choose(second, high, low), choose(second, low, high)

    @device
    def accumulate(totals, at, x):
        """Add x to a total so that rounding loses nothing over many tiles (Kahan's sum)."""
        total = shared_get(totals, at)
        x = x - shared_get(totals, at + threads)
        after = total + x
        shared_set(totals, at, after)
        shared_set(totals, at + threads, (after - total) - x)

    def kernel(
        dy, u, delta, A, B, C, D, z, delta_bias, delta_softplus, checkpoints, dlast_state, du, ddelta, dz,
        matrix_sums, A_sums, B_sums, C_sums, D_sums, bias_sums, dinitial_state, carry, part_starts, part_sums, seq_idx,
        cu_seqlens, dim, state, length, channel_blocks, blocks_of_group, channels_of_group, parts, part_length,
        sequences, state_blocks, dy_batch, u_batch, delta_batch, z_batch, dy_stride, u_stride, delta_stride, z_stride,
        results_stride, B_batch, B_group, B_stride, C_batch, C_group, C_stride,
    ):  # fmt: skip
        if not spread:
            dy_stride, u_stride, delta_stride, z_stride, results_stride = length, length, length, length, length
        own, group, channel_block, channel0, channel_end = place(
            block_index(), channel_blocks, blocks_of_group, channels_of_group, channels
        )
        which, part, parts_here, own = part_of(own, parts, parts, length, part_length, sequences, cu_seqlens)
        row, begin, steps = segment(which, length, cu_seqlens)
        first = min(part * part_length, steps)
        chunk = chunk_of(which, begin, length, cu_seqlens) + (first >> 4)
        begin, steps = begin + first, min(part_length, steps - first)
        padded = states_apart * state_blocks if many else states_apart

        thread = thread_index()
        lane, first_row = lane_of(thread), row_of(thread)  # the first of this lane's rows, that lie ``apart``
        upper, odd = (lane & 2) != 0, (lane & 1) != 0
        channel = channel0 + channel_of(first_row)
        _, own_step = own_quad(thread)
        order = (first_row >> 1) & (QUADS - 1)  # of the quads of a channel, against bank conflicts
        warp, own_at, second = thread >> 5, (thread & 31) * NS, (thread & 16) != 0
        of_lane = lane * NS + (select(second, QUADS * QUAD_SIZE, 0 * thread) if turned else 0)
        # where the block's share of each array begins: the same for all threads, who add what is theirs tile by tile
        u_row = u + size_of * (row * u_batch + at_wave(0, 0, begin, u_stride))
        delta_row = delta + size_of * (row * delta_batch + at_wave(0, 0, begin, delta_stride))
        dy_row = dy + size_of * (row * dy_batch + at_wave(0, 0, begin, dy_stride))
        z_row = z + size_of * (row * z_batch + at_wave(0, 0, begin, z_stride))
        B_row, C_row = B + B_size * (row * B_batch + group * B_group), C + C_size * (row * C_batch + group * C_group)
        if matrix_columns:
            B_row, C_row = B_row + B_size * begin * B_stride, C_row + C_size * begin * C_stride
        else:
            B_row, C_row = B_row + B_size * per_number * begin, C_row + C_size * per_number * begin
        own_checkpoints = checkpoints + number_size * (chunk * dim + channel0) * padded
        results = size_of * (row * dim * length + at_wave(0, 0, begin, results_stride))
        if varying:
            at = (row * channel_blocks + channel_block) * length + begin
            matrix_sums += number_size * at * matrices * padded

        steps_tile, inputs_tile, dy_tile, slope_tile = steps_array(), inputs_array(), dy_array(), slope_array()
        gates, keep, skips = gate_array(), keep_array(), skip_array()
        D_totals, bias_totals = D_array(), bias_array()  # of each thread, with what rounding has lost of them
        u_sums, step_sums, y_sums = u_array(), step_array(), y_array()
        B_tile, C_tile, own_states = B_array(), C_array(), own_array()

        rate, per_A, B_own, C_own = rows_of_numbers(), rows_of_numbers(), rows_of_numbers(), rows_of_numbers()
        g, dA, dB, dC = rows_of_numbers(), rows_of_numbers(), rows_of_numbers(), rows_of_numbers()
        numbers, more = one_number(), one_number()
        bias, dD, dbias = of_channels(), of_rows(), of_rows()
        for r in unroll(rows):
            shared_set(skips, first_row + r * apart, parameter(D, channel + r * channels_apart, channel_end))
            for k in range(2):
                shared_set(D_totals, thread + (2 * r + k) * threads, zero)
                shared_set(bias_totals, thread + (2 * r + k) * threads, zero)

        # the gradient that this part begins with, at its end
        for block in range(state_blocks if many else 1):
            n = block * states_apart + lane * NS
            for r in unroll(rows):
                c = channel + r * channels_apart
                alive = select(c < channel_end, NS, 0 * thread)
                valid = select(alive > 0, state - n, 0 * thread)
                rates(numbers, more, A, c * state + n, valid)
                turn(more, second)
                for j in range(NS):
                    per_A[r * NS + j] = more[j]
                    dA[r * NS + j] = none
                    dB[r * NS + j] = none
                    dC[r * NS + j] = none
                    more[j] = none
                if dlast_state != 0:
                    read_numbers(more, dlast_state, (which * dim + c) * state + n, valid)
                after = parts_here - 1 - part
                walk(more, numbers, part_starts, part_sums, (own + after) * dim + c, -dim, after, padded, n, alive)
                turn(numbers, second)
                turn(more, second)
                for j in range(NS):
                    rate[r * NS + j] = numbers[j]
                    g[r * NS + j] = more[j]
                if many:
                    at = ((own * 4) * dim + c) * padded + n
                    write_own(carry, at, more, alive)
                    for k in range(1, 4):
                        for j in range(NS):
                            more[j] = none
                        write_own(carry, at + k * dim * padded, more, alive)
                else:
                    if constant_B:
                        read_numbers(numbers, B, c * state + n, valid)
                        turn(numbers, second)
                        for j in range(NS):
                            B_own[r * NS + j] = numbers[j]
                    if constant_C:
                        read_numbers(numbers, C, c * state + n, valid)
                        turn(numbers, second)
                        for j in range(NS):
                            C_own[r * NS + j] = times(conj(numbers[j]), shares)

        delta_read, u_read, dy_read, z_read = stored(), stored(), stored(), stored()
        B_next, C_next = B_part(), C_part()
        d, x, e, keeps = of_steps(), of_steps(), of_steps(), of_steps()
        b, c_ = one_number(), one_number()
        h = rows_of_numbers()
        a_h, decays, before = quad_of_numbers(), quad_of_numbers(), quad_of_numbers()
        dB_quad, dC_quad = quad_of_numbers(), quad_of_numbers()
        of_y, of_u, of_step = of_steps(), of_steps(), of_steps()
        y_sum, u_sum, step_sum = of_rows(), of_rows(), of_rows()
        four, total = four_numbers(), four_numbers()
        tiles = (steps + TILE - 1) >> 4
        for tile in range(tiles):
            t = (tiles - 1 - tile) * TILE
            ahead = steps - t - own_step
            now = anew(thread)
            own_channel, step = own_quad(now)
            time_channel, at_quad = channel0 + own_channel, slot(own_channel, step)
            B_here, C_here = start_B(B_row, 0, B_stride, 0, now), start_C(C_row, 0, C_stride, 0, now)
            at_checkpoint = ((t >> 4) * dim + channel_of(row_of(now))) * padded + lane_of(now) * NS
            for r in unroll(rows):
                dD[r] = zero
                dbias[r] = zero
            # all that is read of the tile, at once: whoever waits for one thing waits for all
            at_delta, at_u = start(time_channel, step, delta_stride), start(time_channel, step, u_stride)
            at_dy, at_z = start(time_channel, step, dy_stride), start(time_channel, step, z_stride)
            for p in unroll(count):
                valid = known(p, time_channel, channel_end, ahead)
                before_quad = past(steps - ahead, time_channel, begin)
                read(delta_read, p, delta_row, at_wave(at_delta, p, t, delta_stride), valid, before_quad)
                read(u_read, p, u_row, at_wave(at_u, p, t, u_stride), valid, before_quad)
                read(dy_read, p, dy_row, at_wave(at_dy, p, t, dy_stride), valid, before_quad)
                if gated:
                    read(z_read, p, z_row, at_wave(at_z, p, t, z_stride), valid, before_quad)
            for k in unroll(parameters):
                bias[k] = parameter(delta_bias, parameter_channel(k, time_channel), channel_end)
            if not many:
                if varying_B:
                    read_B(B_next, B_here, 0, B_stride, state, t, steps - t, thread)
                if varying_C:
                    read_C(C_next, C_here, 0, C_stride, state, t, steps - t, thread)
                for r in unroll(rows):
                    c = channel0 + channel_of(row_of(now)) + r * channels_apart
                    alive = select(c < channel_end, NS, 0 * thread)
                    read_own(numbers, own_checkpoints, at_checkpoint + r * channels_apart * padded, alive)
                    turn(numbers, second)
                    for j in range(NS):
                        h[r * NS + j] = numbers[j]
            # to shared memory: step sizes, u, dy before the gate, slopes of softplus and of the gate
            for p in unroll(count):
                widen(d, delta_read, p, delta_row, at_delta, delta_stride)
                widen(x, u_read, p, u_row, at_u, u_stride)
                widen(e, dy_read, p, dy_row, at_dy, dy_stride)
                if gated:
                    widen(keeps, z_read, p, z_row, at_z, z_stride)
                put_quad(inputs_tile, at_quad, p, x)
                for i in unroll(QUAD, heavy):
                    size = d[i] + bias[parameter_of(p, i)]
                    slope = one
                    if delta_softplus != 0:
                        slope = sigmoid(size)
                        size = softplus(size)
                    there = inside(p, i, ahead)  # past the end nothing moves
                    d[i], x[i] = select(there, size, zero), select(there, slope, zero)
                put_quad(steps_tile, at_quad, p, d)
                put_quad(slope_tile, at_quad, p, x)
                if gated:
                    for i in unroll(QUAD, heavy):
                        gate = sigmoid(keeps[i])
                        x[i] = e[i] * (gate * (one + keeps[i] * (one - gate)))
                        e[i] = e[i] * (keeps[i] * gate)
                    put_quad(gates, at_quad, p, x)
                put_quad(dy_tile, at_quad, p, e)
            if resets:
                shared_set(keep, thread & (TILE - 1), kept(seq_idx, row * length, begin + t, steps - t, thread))

            for block in range(state_blocks if many else 1):
                n = block * states_apart + lane * NS
                if many:
                    if varying_B:
                        read_B(B_next, B_here, block * states_apart, B_stride, state, t, steps - t, thread)
                    if varying_C:
                        read_C(C_next, C_here, block * states_apart, C_stride, state, t, steps - t, thread)
                if varying_B:
                    stage_B(B_tile, B_next, B_here, block * states_apart, B_stride, thread)
                if varying_C:
                    stage_C(C_tile, C_next, C_here, block * states_apart, C_stride, thread)
                if many:
                    for r in unroll(rows):
                        c = channel + r * channels_apart
                        alive = select(c < channel_end, NS, 0 * thread)
                        at = at_checkpoint + r * channels_apart * padded + block * states_apart
                        read_own(numbers, own_checkpoints, at, alive)
                        turn(numbers, second)
                        for j in range(NS):
                            h[r * NS + j] = numbers[j]
                        valid = select(alive > 0, state - n, 0 * thread)
                        rates(numbers, more, A, c * state + n, valid)
                        turn(numbers, second)
                        turn(more, second)
                        for j in range(NS):
                            rate[r * NS + j] = numbers[j]
                            per_A[r * NS + j] = more[j]
                        if constant_B:
                            read_numbers(numbers, B, c * state + n, valid)
                            turn(numbers, second)
                            for j in range(NS):
                                B_own[r * NS + j] = numbers[j]
                        if constant_C:
                            read_numbers(numbers, C, c * state + n, valid)
                            turn(numbers, second)
                            for j in range(NS):
                                C_own[r * NS + j] = times(conj(numbers[j]), shares)
                        at = ((own * 4) * dim + c) * padded + n
                        read_own(numbers, carry, at, alive)
                        read_own(more, carry, at + dim * padded, alive)
                        for j in range(NS):
                            g[r * NS + j] = numbers[j]
                            dA[r * NS + j] = more[j]
                        if constant_B:
                            read_own(numbers, carry, at + 2 * dim * padded, alive)
                            for j in range(NS):
                                dB[r * NS + j] = numbers[j]
                        if constant_C:
                            read_own(more, carry, at + 3 * dim * padded, alive)
                            for j in range(NS):
                                dC[r * NS + j] = more[j]
                synchronize()

                # the state at the start of each quad
                for q in unroll(QUADS, not heavy):
                    for r in unroll(rows):
                        for j in range(NS):
                            numbers[j] = h[r * NS + j]
                        at = (q * warps + warp) * own_size + r * 32 * NS + own_at
                        store_numbers(own_states, at, numbers)
                    if q < QUADS - 1:
                        if resets:
                            load_quad(keeps, keep, q * QUAD)
                        for r in unroll(rows):
                            load_quad(d, steps_tile, (first_row + r * apart) * TILE + ((q ^ order) << 2))
                            load_quad(x, inputs_tile, (first_row + r * apart) * TILE + ((q ^ order) << 2))
                            for i in unroll(QUAD, heavy):
                                if varying_B:
                                    load_numbers(b, B_tile, q * QUAD_SIZE + i * STEP_SIZE + of_lane)
                                for j in range(NS):
                                    k = r * NS + j
                                    into = B_own[k] if constant_B else b[j]
                                    a, into = moved(d[i], x[i], rate[k], per_A[k], into, keeps[i])
                                    h[k] = product(a, h[k]) + into

                for back in range(QUADS):
                    q = QUADS - 1 - back
                    if resets:
                        load_quad(keeps, keep, q * QUAD)
                    for k in range(QUAD * NS):
                        dB_quad[k] = none
                        dC_quad[k] = none
                    for r in unroll(rows):
                        at = (q * warps + warp) * own_size + r * 32 * NS + own_at
                        load_numbers(numbers, own_states, at)
                        at = (first_row + r * apart) * TILE + ((q ^ order) << 2)
                        load_quad(d, steps_tile, at)
                        load_quad(x, inputs_tile, at)
                        load_quad(e, dy_tile, at)
                        for i in unroll(QUAD, heavy):
                            at = q * QUAD_SIZE + i * STEP_SIZE + of_lane
                            if varying_B:
                                load_numbers(b, B_tile, at)
                            if varying_C:
                                load_numbers(c_, C_tile, at)
                            y = zero
                            for j in range(NS):
                                k, m = r * NS + j, i * NS + j
                                into = B_own[k] if constant_B else b[j]
                                a, into = moved(d[i], x[i], rate[k], per_A[k], into, keeps[i])
                                decays[m] = a
                                before[m] = numbers[j]
                                a_h[m] = product(a, numbers[j])
                                numbers[j] = a_h[m] + into
                                y = y + overlap(C_own[k] if constant_C else c_[j], numbers[j])
                                if varying_C:
                                    dC_quad[m] = dC_quad[m] + times(numbers[j], e[i])
                                else:
                                    dC[k] = dC[k] + times(numbers[j], e[i])
                            of_y[i] = y
                        y_sum[r] = across(of_y, upper, odd)
                        for i_ in unroll(QUAD, heavy):
                            i = QUAD - 1 - i_
                            at = q * QUAD_SIZE + i * STEP_SIZE + of_lane
                            if varying_B:
                                load_numbers(b, B_tile, at)
                            if varying_C:
                                load_numbers(c_, C_tile, at)
                            w, p = zero, zero
                            for j in range(NS):
                                k, m = r * NS + j, i * NS + j
                                g_step = times(C_own[k] if constant_C else c_[j], e[i]) + g[k]
                                into = B_own[k] if constant_B else b[j]
                                after = product(conj(a_h[m]), g_step)
                                dA[k] = dA[k] + times(after, d[i])
                                if zoh:
                                    a, change = decay_and_change(d[i], rate[k])
                                    share = product(change, per_A[k])
                                    w = w + overlap(product(share, into), g_step)
                                    # of the step size: A h + B u is nearly 0 in a steady state, so it comes first
                                    h_before = times(before[m], keeps[i]) if resets else before[m]
                                    rise = product(of_rate(rate[k]), h_before) + times(into, x[i])
                                    p = p + overlap(product(a, rise), g_step)
                                    of_B = times(product(conj(share), g_step), x[i])
                                    of_A = psi(times(of_rate(rate[k]), d[i]), a, change)
                                    of_A = times(of_A, d[i] * d[i] * x[i])
                                    dA[k] = dA[k] + product(conj(product(of_A, into)), g_step)
                                else:
                                    p = p + overlap_with_rate(rate[k], after)
                                    w = w + overlap(into, g_step)
                                    of_B = times(g_step, d[i] * x[i])
                                if varying_B:
                                    dB_quad[m] = dB_quad[m] + of_B
                                else:
                                    dB[k] = dB[k] + of_B
                                g[k] = product(conj(decays[m]), g_step)
                            of_u[i] = w
                            of_step[i] = p
                        u_sum[r] = across(of_u, upper, odd)
                        step_sum[r] = across(of_step, upper, odd)
                    if varying:
                        exchange(more, dB_quad, dC_quad, thread)
                    synchronize_warp()
                    converge()
                    # lane g of a channel has the sums of step g
                    for r in unroll(rows):
                        at = (first_row + r * apart) * TILE + ((q ^ order) << 2) + lane
                        if many:
                            if block > 0:
                                y_sum[r] = y_sum[r] + shared_get(y_sums, at)
                                u_sum[r] = u_sum[r] + shared_get(u_sums, at)
                                step_sum[r] = step_sum[r] + shared_get(step_sums, at)
                            if block < state_blocks - 1:
                                shared_set(y_sums, at, y_sum[r])
                                shared_set(u_sums, at, u_sum[r])
                                shared_set(step_sums, at, step_sum[r])
                        if not many or block == state_blocks - 1:
                            size, input_ = shared_get(steps_tile, at), shared_get(inputs_tile, at)
                            dy_now, skip = shared_get(dy_tile, at), shared_get(skips, first_row + r * apart)
                            of_size = step_sum[r] if zoh else input_ * u_sum[r] + ln2 * step_sum[r]
                            of_size = of_size * shared_get(slope_tile, at)
                            shared_set(slope_tile, at, of_size)
                            shared_set(steps_tile, at, skip * dy_now + (u_sum[r] if zoh else size * u_sum[r]))
                            if gated:
                                shared_set(gates, at, shared_get(gates, at) * (y_sum[r] + skip * input_))
                            dD[r] = dD[r] + dy_now * input_
                            dbias[r] = dbias[r] + of_size
                    if varying:
                        put(own_states, (q * warps + warp) * own_size, more, lane, thread)
                if many:
                    for r in unroll(rows):
                        c = channel + r * channels_apart
                        alive = select(c < channel_end, NS, 0 * thread)
                        at = ((own * 4) * dim + c) * padded + n
                        for j in range(NS):
                            numbers[j] = g[r * NS + j]
                            more[j] = dA[r * NS + j]
                        write_own(carry, at, numbers, alive)
                        write_own(carry, at + dim * padded, more, alive)
                        if constant_B:
                            for j in range(NS):
                                numbers[j] = dB[r * NS + j]
                            write_own(carry, at + 2 * dim * padded, numbers, alive)
                        if constant_C:
                            for j in range(NS):
                                more[j] = dC[r * NS + j]
                            write_own(carry, at + 3 * dim * padded, more, alive)
                synchronize()
                # dB and dC of the block
                if varying:
                    now = anew(thread)
                    for unit0 in range(0, TILE * matrices * 4, threads):
                        unit = (unit0 + now) & (TILE * matrices * 4 - 1)
                        step, rest = unit >> (1 + matrices), unit & (4 * matrices - 1)
                        matrix, states4 = rest >> 2, (rest & 3) * 4
                        at = (step >> 2) * warps * own_size + ((step & 3) * matrices + matrix) * BLOCK + states4
                        for k in range(4):
                            total[k] = none
                        for w_ in range(warps):
                            load_four(four, own_states, at + w_ * own_size)
                            for k in range(4):
                                total[k] = total[k] + four[k]
                        at = ((t + step) * matrices + matrix) * padded + block * states_apart + states4
                        valid = select((t + step < steps) & (states4 < states_apart), 4, 0 * now)
                        write_four(matrix_sums, at, total, valid)
                if many and block < state_blocks - 1:
                    synchronize()

            now = anew(thread)
            own_channel, step = own_quad(now)
            time_channel, at_quad = channel0 + own_channel, slot(own_channel, step)
            at_results = start(time_channel, step, results_stride)
            for r in unroll(rows):
                accumulate(D_totals, now + 2 * r * threads, dD[r])
                accumulate(bias_totals, now + 2 * r * threads, dbias[r])
            for p in unroll(count):
                valid = known(p, time_channel, channel_end, ahead)
                get_quad(d, steps_tile, at_quad, p)
                get_quad(x, slope_tile, at_quad, p)
                if gated:
                    get_quad(e, gates, at_quad, p)
                at = at_wave(at_results, p, t, results_stride)
                write(du + results, at, d, valid)
                write(ddelta + results, at, x, valid)
                if gated:
                    write(dz + results, at, e, valid)

        # sums over the part, and the gradient of the state that it started from
        now = anew(thread)
        lane, channel, second = lane_of(now), channel0 + channel_of(row_of(now)), (now & 16) != 0
        for block in range(state_blocks if many else 1):
            n = block * states_apart + lane * NS
            for r in unroll(rows):
                c = channel + r * channels_apart
                alive = select(c < channel_end, NS, 0 * thread)
                valid = select(alive > 0, state - n, 0 * thread)
                at = (own * dim + c) * state + n
                mine = ((own * 4) * dim + c) * padded + n
                for j in range(NS):
                    numbers[j] = dA[r * NS + j]
                    more[j] = g[r * NS + j]
                if many:
                    read_own(more, carry, mine, alive)
                    read_own(numbers, carry, mine + dim * padded, alive)
                turn(numbers, second)
                turn(more, second)
                write_numbers(A_sums, at, numbers, valid)
                if dinitial_state != 0 and part == 0:
                    write_numbers(dinitial_state, (which * dim + c) * state + n, more, valid)
                if constant_B:
                    for j in range(NS):
                        numbers[j] = dB[r * NS + j]
                    if many:
                        read_own(numbers, carry, mine + 2 * dim * padded, alive)
                    turn(numbers, second)
                    write_numbers(B_sums, at, numbers, valid)
                if constant_C:
                    for j in range(NS):
                        numbers[j] = dC[r * NS + j]
                    if many:
                        read_own(numbers, carry, mine + 3 * dim * padded, alive)
                    for j in range(NS):
                        numbers[j] = times(conj(numbers[j]), shares)
                    turn(numbers, second)
                    write_numbers(C_sums, at, numbers, valid)
        for r in unroll(rows):
            c = channel + r * channels_apart
            one_lane = select((lane == 0) & (c < channel_end), 1, 0 * thread)
            of_D, of_bias = (
                shared_get(D_totals, now + 2 * r * threads),
                shared_get(bias_totals, now + 2 * r * threads),
            )
            if D_sums != 0:
                write_real(D_sums, own * dim + c, lane_total(of_D), one_lane)
            if bias_sums != 0:
                write_real(bias_sums, own * dim + c, lane_total(of_bias), one_lane)

    return kernel, Shape(threads, blocks)


def starts(warps, *key):
    """The gradient that a part hands on to the one before it when it gets none from the one after it.

    And the sum of its step sizes, infinite if a sequence starts in it. Of the last ``launched_parts``: all, or all but
    the first. Reads delta, dy and z once.
    """
    v = Variant(*key)
    storage, number = dtype_of(v.storage), dtype_of(v.number)
    f, real, NS = number_functions(number), real_of(number), v.states
    gated, resets, many, varying_C, spread = v.gated, v.resets, v.many, v.C != "", v.order != "rows"
    threads, channels, heavy = 32 * warps, WARP_CHANNELS * warps, number != np.float32
    softplus, sigmoid, decay = f.softplus, f.sigmoid, f.decay
    product, times, conj, shares = f.product, f.times, f.conj, f.shares
    zero, one, infinite, none = f.zero, f.one, real.type(np.inf), number.type(0)

    waves = wave_tile(v, storage, real, threads, channels, TILE, TILE, swizzled=True)
    own_quad, start, at_wave, known, inside = waves.own, waves.start, waves.at, waves.known, waves.inside
    parameter_of, parameter_channel, channel_of = waves.parameter_of, waves.parameter_channel, waves.channel_of
    slot, put_quad, parameters = waves.slot, waves.put, waves.parameters
    stored, read, widen, of_steps = waves.stored, waves.read, waves.widen, local_array(QUAD, real)
    of_channels = local_array(parameters, real)
    read_numbers, numbers = reader(real, number, NS), local_array(NS, number)
    write_own = writer(real, number, NS, True)
    load_quad, load_numbers = shared_reader(real, QUAD), shared_reader(number, NS)
    memory = SharedMemory()
    steps_array, dy_array = (memory.array(channels * TILE, real) for _ in range(2))
    keep_array, C_array = memory.array(TILE, real), memory.array(QUADS * QUAD_SIZE, number)
    stored_C = dtype_of(v.C or v.storage)
    C_part, start_C, read_C, stage_C = matrix_tile(v, stored_C, True, False, TILE, threads, STEP_SIZE, QUAD_SIZE)
    parameter, write_real, rates, kept = readers(number, NS, False, TILE)
    states_apart, size_of = LANES * NS, storage.itemsize

    def kernel(
        dy, delta, A, C, z, delta_bias, delta_softplus, part_starts, part_sums, seq_idx, cu_seqlens, dim, state, length,
        channel_blocks, blocks_of_group, channels_of_group, parts, launched_parts, part_length, sequences, state_blocks,
        dy_batch, delta_batch, z_batch, dy_stride, delta_stride, z_stride, C_batch, C_group, C_stride,
    ):  # fmt: skip
        if not spread:
            dy_stride, delta_stride, z_stride = length, length, length
        number_of_part, group, _, channel0, channel_end = place(
            block_index(), channel_blocks, blocks_of_group, channels_of_group, channels
        )
        not_launched = parts - launched_parts
        if cu_seqlens != 0:
            number_of_part += not_launched
        which, part, _, number_of_part = part_of(
            number_of_part, parts, launched_parts, length, part_length, sequences, cu_seqlens
        )
        row, begin, steps = segment(which, length, cu_seqlens)
        if cu_seqlens == 0:
            part, number_of_part = part + not_launched, number_of_part + not_launched
        elif part == 0:
            steps = 0  # nobody asks what the first part of a sequence hands on
        first = min(part * part_length, steps)
        begin, steps = begin + first, min(part_length, steps - first)
        padded = states_apart * state_blocks if many else states_apart

        thread = thread_index()
        lane, own_row = lane_of(thread), row_of(thread)
        at_channel, order = own_row * TILE, (own_row >> 1) & (QUADS - 1)
        channel = channel0 + channel_of(own_row)
        alive = select(channel < channel_end, NS, 0 * thread)
        time_channel, step = own_quad(thread)
        at_quad = slot(time_channel, step)
        time_channel += channel0
        at_delta, at_dy = start(time_channel, step, delta_stride), start(time_channel, step, dy_stride)
        at_z = start(time_channel, step, z_stride)
        delta += size_of * (row * delta_batch + at_wave(0, 0, begin, delta_stride))
        dy += size_of * (row * dy_batch + at_wave(0, 0, begin, dy_stride))
        z += size_of * (row * z_batch + at_wave(0, 0, begin, z_stride))
        if varying_C:
            C = start_C(C, row * C_batch + group * C_group, C_stride, begin, thread)
        own = number_of_part * dim + channel
        bias = of_channels()
        for k in unroll(parameters):
            bias[k] = parameter(delta_bias, parameter_channel(k, time_channel), channel_end)
        steps_tile, dy_tile, keep, C_tile, C_next = steps_array(), dy_array(), keep_array(), C_array(), C_part()
        delta_read, dy_read, z_read = stored(), stored(), stored()
        g, rate, unused, c = numbers(), numbers(), numbers(), numbers()
        d, e, keeps = of_steps(), of_steps(), of_steps()
        tiles = (steps + TILE - 1) >> 4
        for block in range(state_blocks if many else 1):
            n = block * states_apart + lane * NS
            valid = select(alive > 0, state - n, 0 * thread)
            rates(rate, unused, A, channel * state + n, valid)
            if not varying_C:
                read_numbers(c, C, channel * state + n, valid)
                for j in range(NS):
                    c[j] = times(conj(c[j]), shares)
            for j in range(NS):
                g[j] = none
            passed = zero
            for tile in range(tiles):
                t = (tiles - 1 - tile) * TILE
                ahead, of_tile = steps - t - step, zero
                valid = known(0, time_channel, channel_end, ahead)
                read(delta_read, 0, delta, at_wave(at_delta, 0, t, delta_stride), valid, t + step)
                read(dy_read, 0, dy, at_wave(at_dy, 0, t, dy_stride), valid, t + step)
                if gated:
                    read(z_read, 0, z, at_wave(at_z, 0, t, z_stride), valid, t + step)
                widen(d, delta_read, 0, delta, at_delta, delta_stride)
                widen(e, dy_read, 0, dy, at_dy, dy_stride)
                if gated:
                    widen(keeps, z_read, 0, z, at_z, z_stride)
                for i in unroll(QUAD, heavy):
                    size = d[i] + bias[parameter_of(0, i)]
                    if delta_softplus != 0:
                        size = softplus(size)
                    d[i] = select(inside(0, i, ahead), size, zero)
                    if gated:
                        e[i] = e[i] * (keeps[i] * sigmoid(keeps[i]))
                put_quad(steps_tile, at_quad, 0, d)
                put_quad(dy_tile, at_quad, 0, e)
                if resets:
                    shared_set(keep, thread & (TILE - 1), kept(seq_idx, row * length, begin + t, steps - t, thread))
                if varying_C:
                    read_C(C_next, C, block * states_apart, C_stride, state, t, steps - t, thread)
                    stage_C(C_tile, C_next, C, block * states_apart, C_stride, thread)
                synchronize()
                for back in unroll(QUADS, not heavy):
                    q = QUADS - 1 - back
                    load_quad(d, steps_tile, at_channel + ((q ^ order) << 2))
                    load_quad(e, dy_tile, at_channel + ((q ^ order) << 2))
                    if resets:
                        load_quad(keeps, keep, q * QUAD)
                    for i_ in unroll(QUAD, heavy):
                        i = QUAD - 1 - i_
                        if varying_C:
                            load_numbers(c, C_tile, q * QUAD_SIZE + i * STEP_SIZE + lane * NS)
                        for j in range(NS):
                            a = decay(d[i], rate[j])
                            if resets:
                                a = times(a, keeps[i])
                            g[j] = product(conj(a), times(c[j], e[i]) + g[j])
                        of_tile = of_tile + d[i]
                        if resets:
                            of_tile = select(keeps[i] < one, infinite, of_tile)
                passed = passed + of_tile
                synchronize()
            write_own(part_starts, own * padded + n, g, alive)
            write_real(part_sums, own, passed, select(lane == 0, alive, 0 * thread))

    return kernel, Shape(threads, 16 // warps)


def sum_matrices(storage, number, of_C):
    """dB and dC, or one of them: sums over blocks of channels, turned from [step][state] to [state][step].

    Grid: tiles of 32 steps, blocks of 16 states, groups, batch rows, matrices. Reads every partial sum once. What is
    called dC was staged as 2 conj(C) if it is complex; ``of_C``: the first matrix is.
    """
    storage, number = dtype_of(storage), dtype_of(number)
    f, real, steps_of_block, threads = number_functions(number), real_of(number), 32, 128
    times, conj, shares, none = f.times, f.conj, f.shares, number.type(0)
    four_numbers = local_array(4, number)
    read_four, write_four = reader(real, number, 4, True), writer(storage, number, 4)
    row = steps_of_block + 1
    number_tile = SharedMemory().array(BLOCK * row, number)

    def kernel(
        sums, gradient, second, stride, padded, length, state, blocks, channel_blocks, groups, tiles, state_blocks,
        first_of_second,
    ):  # fmt: skip
        """``sums`` (batch, channel_blocks, length, stride), of which each matrix has ``padded``."""
        index, offset, turned = block_index(), 0, of_C
        if index >= first_of_second:
            index, offset, turned, gradient = index - first_of_second, padded, True, second
        rest = quotient(index, tiles)
        tile, group = index - rest * tiles, quotient(rest, state_blocks)
        block, batch = rest - group * state_blocks, quotient(group, groups)
        group = group - batch * groups
        thread, t0, n0 = thread_index(), tile * steps_of_block, block * BLOCK
        t, n = t0 + (thread >> 2), n0 + (thread & 3) * 4
        x, total, shared = four_numbers(), four_numbers(), number_tile()
        known = select((t < length) & (n < padded), 4, 0 * thread)
        for k in range(4):
            total[k] = none
        at = ((batch * channel_blocks + group * blocks) * length + t) * stride + offset + n
        for block in range(blocks):
            read_four(x, sums, at + block * length * stride, known)
            for k in range(4):
                total[k] = total[k] + x[k]
        for k in range(4):
            shared_set(shared, ((thread & 3) * 4 + k) * row + (thread >> 2), total[k])
        synchronize()
        n, t = thread >> 3, (thread & 7) * 4
        for k in range(4):
            x[k] = shared_get(shared, n * row + t + k)
            if turned:
                x[k] = times(conj(x[k]), shares)
        at = ((batch * groups + group) * state + n0 + n) * length + t0 + t
        write_four(gradient, at, x, select(n0 + n < state, length - t0 - t, 0 * thread))

    return kernel, Shape(threads, 8)


def shipped():
    """Kernels that stand for all, with the shapes that ``backward_shape`` gives them.

    Variants of the forward, but of what takes a quarter of a minute or more to compile only one of a kind.
    """
    shapes = {"complex64": (1, 4, 3), "float64": (1, 2, 4), "complex128": (1, 2, 3)}
    heaviest = Variant(
        "float64", "float64", "float64", "float64", True, True, "rows", True, "rows", True, 2, True, True
    )  # fmt: skip
    variants = (*SHIPPED[:3], *SHIPPED[4:7], SHIPPED[11], SHIPPED[10], *SHIPPED[12:], heaviest)
    cut = (SHIPPED[0], SHIPPED[3], SHIPPED[6], SHIPPED[7], SHIPPED[10], SHIPPED[13])
    matrices = (("float32", "float32", False), ("bfloat16", "complex64", True), ("float64", "complex128", False))
    # for few blocks, for time in parts, and for groups of few channels
    shaped = [(*shape, *SHIPPED[0]) for shape in ((1, 4, 4), (2, 2, 6), (1, 1, 16), (1, 2, 8))]
    shaped += [(*shapes.get(v.number, (1, 4, 3) if v.many or v.zoh else (2, 4, 3)), *v) for v in variants]
    return [
        *(Kernel("selective_scan_backward", "backward", key) for key in reversed(shaped)),
        *(Kernel("selective_scan_backward", "starts", (2 if v.storage == "float64" else 4, *v)) for v in cut),
        *(Kernel("selective_scan_backward", "sum_matrices", key) for key in matrices),
    ]
