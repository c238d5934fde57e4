"""The selective scan. A block walks along time with 32 channels, and with them shares each tile of B and C.

Four lanes are a channel, each with up to four of its states in registers; a warp is 8 channels. The inputs
along time come in tiles of 32 steps: all threads read them 16 bytes at a time, prepare step sizes once for each channel
and step, and leave them in shared memory, from where lanes walk the steps one by one. Sums over states go through the
lanes of a channel (``across``). More than 16 states are walked in blocks of 16, tile by tile.
"""

from typing import NamedTuple

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
    shifted_reader,
    shifted_widener,
    shuffle_xor,
    stored_array,
    stored_reader,
    synchronize,
    thread_index,
    widener,
    writer,
)
from sscan.cuda._target import device
from sscan.cuda._unroll import unroll
from sscan.cuda.kernels._segments import part_of, read_integer, segment
from sscan.cuda.kernels._waves import QUAD, wave_tile
from sscan.cuda.kernels.selective_scan_through import behind

LANES = 4  # of a channel
WARP_CHANNELS = 32 // LANES
BLOCK = 16  # states that B and C are staged for at a time
TILE = 32  # steps between barriers; between sums over states there are QUAD
QUADS = TILE // QUAD
ROW = TILE + 4  # reals from one channel to the next in shared memory: 4 more, against bank conflicts
AHEAD = 32  # bytes of the ends of parts that a lane reads at once, for each of its states
QUAD_SIZE = QUAD * BLOCK + 4  # numbers from one quad of B to the next
CHECKPOINT = 16  # steps between checkpoints; x >> 4 is x // CHECKPOINT
BLOCKS = {"float32": 5, "float64": 3, "complex64": 3, "complex128": 2}  # of 4 warps, at once on a multiprocessor


class Variant(NamedTuple):
    """What the kernels are specialised for. dtypes by name."""

    storage: str  # of the inputs along time
    number: str  # of A and the states
    B: str  # storage of its reals; "" if it is constant
    C: str
    zoh: bool
    gated: bool  # whether there is a z
    order: str  # of the arrays along time: "rows" whose channels lie ``length`` apart, "spread" rows, or "columns"
    together: bool  # whether four steps, in columns four channels, can be read by one instruction
    matrix_order: str  # of varying B and C: "rows", or "columns" whose states are neighbours
    matrices_together: bool
    states: int  # of a lane: 1, 2 or 4
    many: bool  # whether there is more than one block of states
    resets: bool  # whether there is a seq_idx


@device
def place(index, channel_blocks, blocks_of_group, channels_of_group, channels):
    """(part, group, number among the blocks of channels, first channel, channel after the last) of a block."""
    part = quotient(index, channel_blocks)
    block = index - part * channel_blocks
    group = quotient(block, blocks_of_group)
    first = group * channels_of_group + (block - group * blocks_of_group) * channels
    return part, group, block, first, (group + 1) * channels_of_group


@device
def chunk_of(number, begin, length, cu_seqlens):
    """Number of a segment's first checkpoint: rows have all that fit, packed sequences one more than needed each."""
    if cu_seqlens == 0:
        return number * ((length + CHECKPOINT - 1) >> 4)
    return (begin >> 4) + number


# Shared memory serves eight neighbouring threads at a time, twice as fast if they ask for two pieces of 16 bytes as if
# for four. So the lanes of a channel are counted by the first and the fourth bit of a thread's number, not by the first
# two: eight neighbours then read two pieces of B, and two of C.


@device
def lane_of(thread):
    """Which of the lanes of its channel a thread is."""
    return (thread & 1) | ((thread >> 2) & 2)


@device
def row_of(thread):
    """Which channel of the block a thread has states of."""
    return ((thread >> 1) & 3) | ((thread >> 2) & -4)


@device
def lane_total(x):
    """The sum over the lanes of a channel, in all of them."""
    x = x + shuffle_xor(x, 1)
    return x + shuffle_xor(x, 8)


@device
def across(values, upper, odd):
    """Sum four values over the four lanes of a channel; lane g gets the sum of value g."""
    sent, kept = select(upper, values[0], values[2]), select(upper, values[2], values[0])
    x = kept + shuffle_xor(sent, 8)
    sent, kept = select(upper, values[1], values[3]), select(upper, values[3], values[1])
    y = kept + shuffle_xor(sent, 8)
    return select(odd, y, x) + shuffle_xor(select(odd, x, y), 1)


def readers(number, states, zoh, tile):
    """Small device functions that all kernels of the scan need."""
    f, real = number_functions(number), real_of(number)
    one_real, read_real, write_one = local_array(1, real), reader(real, real, 1, False, False), writer(real, real, 1)
    read_numbers = reader(real, number, states)
    nonzero, inverse, rate_of, zero, one, choose = f.nonzero, f.inverse, f.rate, f.zero, f.one, f.choose
    padding = number.type(-1)  # for states that are not there: an infinite step makes 0 of them, and times 0 it is NaN

    @device
    def parameter(address, index, end):
        """A real at an address, 0 where that is 0 or the index is not below ``end``."""
        value = one_real()
        value[0] = zero
        if address != 0:
            read_real(value, address, index, end - index)
        return value[0]

    @device
    def write_real(address, index, number, valid):
        value = one_real()
        value[0] = number
        write_one(address, index, value, valid)

    @device
    def rates(rate, per_A, A, index, valid):
        """A as ``decay`` takes it, and 1 / A."""
        read_numbers(rate, A, index, valid)
        for j in range(states):
            value = rate[j]
            if zoh:
                value = choose(j < valid, nonzero(value), padding)
                per_A[j] = inverse(value)
            rate[j] = rate_of(value)

    @device
    def kept(seq_idx, at_row, t, steps, thread):
        """1, or 0 where a new sequence starts: for the step of the tile from t on that the thread has."""
        i = thread & (tile - 1)
        known = select(i < steps, 1, 0 * thread)
        here = read_integer(seq_idx, at_row + t + i, known)
        before = read_integer(seq_idx, at_row + t + i - 1, select(t + i > 0, known, 0 * thread))
        return select((here == before) | (t + i == 0), one, zero)

    return parameter, write_real, rates, kept


def past_parts(number, states, back):
    """Device function: what becomes of a state on its way through parts, or of its gradient on the way back.

    A few parts are read at once: there is nothing else to do until they are there. NVVM writes out the loops over them,
    all but the two of complex128.
    """
    f, real, ahead = number_functions(number), real_of(number), AHEAD // number.itemsize
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


def forward(warps, *key):
    """y, the last state and, if there is memory for them, checkpoints."""
    return scan(warps, Variant(*key), False)


def ends(warps, *key):
    """The state that each part but the last ends in when it starts from zero, and the sum of its step sizes."""
    return scan(warps, Variant(*key), True)


def matrix_tile(v, storage, conjugated, keep, tile, threads, step_size, quad_size, turned=0):
    """B or C on its way to shared memory: every thread has a few consecutive steps of one or more states of a tile.

    In columns it has a few consecutive states of one or more steps. ``make()`` is where ``read`` puts them, from
    ``start``, and ``stage`` takes them from there to [quad][step][state]. C is staged as 2 conj(C) if it is complex, of
    which both y and the gradient of the state are made. If ``turned``, a second copy follows the tile, in which states
    n and n ^ turned have changed places. ``stride`` is that from state to state, in columns from step to step.
    """
    number, columns = dtype_of(v.number), v.matrix_order == "columns"
    count = min(QUAD, tile * BLOCK // threads)  # of neighbours
    groups = (BLOCK if columns else tile) // count
    shift, mask, apart = groups.bit_length() - 1, groups - 1, threads // groups
    pieces = tile * BLOCK // threads // count  # ``apart`` states, in columns steps
    f, per_number, size = number_functions(number), planes(number), storage.itemsize
    reals = count * per_number
    shifted = storage.itemsize == 2 and per_number == 1 and not v.matrices_together and not columns
    held = reals // 2 + 1 if shifted else reals  # of a piece in registers
    make = local_array(pieces * held, np.int32) if shifted else stored_array(pieces * held, storage)
    read_stored = None if shifted else stored_reader(storage, reals, v.matrices_together, keep)
    read_shifted = shifted_reader(storage, reals) if shifted else None
    widen_stored = None if shifted else widener(storage, number, count)
    widen_shifted, numbers = shifted_widener(storage, number, reals) if shifted else None, local_array(count, number)
    store = shared_writer(number, count)
    conj, times, shares, copy = f.conj, f.times, f.shares, tile // QUAD * quad_size

    @device
    def start(address, at, stride, begin, thread):
        """Address of the thread's part in the first tile and block of states."""
        if columns:
            return address + size * (at + (thread & mask) * count + (begin + (thread >> shift)) * stride)
        return address + size * (at + (thread >> shift) * stride + per_number * (begin + (thread & mask) * count))

    @device
    def read(into, address, n0, stride, state, t, steps, thread):
        """``steps`` from t on are there to be read."""
        for k in unroll(pieces):
            if columns:
                known = select(steps - k * apart > (thread >> shift), state - n0 - (thread & mask) * count, 0 * thread)
                read_stored(into, k * held, address, n0 + (t + k * apart) * stride, known)
            else:
                steps_known = per_number * (steps - (thread & mask) * count)
                known = select(n0 + k * apart + (thread >> shift) < state, steps_known, 0 * thread)
                at = (n0 + k * apart) * stride + per_number * t
                if shifted:
                    read_shifted(into, k * held, address, at, known, per_number * (t + (thread & mask) * count))
                else:
                    read_stored(into, k * held, address, at, known)

    @device
    def stage(tile, held_pieces, address, n0, stride, thread):
        values = numbers()
        for k in unroll(pieces):
            if shifted:
                widen_shifted(values, held_pieces, k * held, address, (n0 + k * apart) * stride)
            else:
                widen_stored(values, held_pieces, k * held)
            if columns:
                t = k * apart + (thread >> shift)
                at = (t >> 2) * quad_size + (t & 3) * step_size + (thread & mask) * count
                store(tile, at, values)
                for i in unroll(count if turned else 0):
                    shared_set(tile, copy + ((at + i) ^ turned), values[i])
            else:
                t = (thread & mask) * count
                at = (t >> 2) * quad_size + (t & 3) * step_size + k * apart + (thread >> shift)
                for i in unroll(count):
                    value = values[i]
                    if conjugated:
                        value = times(conj(value), shares)
                    shared_set(tile, at + i * step_size, value)
                    if turned:
                        shared_set(tile, copy + (at ^ turned) + i * step_size, value)

    return make, start, read, stage


def scan(warps, v, ends_only):
    """Kernel of one block of channels in one part of a segment, from its first tile to its last.

    The state that a part starts from is made of the ends of the parts before it: exp(A sum(delta)) is what is left of a
    state after a part, whatever its inputs. Two barriers a tile and block of states. Reads delta, u and z once, B and C
    once for each block of channels. The next tile is read while this one is walked.
    """
    storage, number = dtype_of(v.storage), dtype_of(v.number)
    f, real, NS = number_functions(number), real_of(number), v.states
    zoh, resets, many, spread = v.zoh, v.resets, v.many, v.order != "rows"
    threads, channels = 32 * warps, WARP_CHANNELS * warps
    # exponentials that are polynomials: NVVM would leave even short loops as they are
    heavy = zoh or number != np.float32
    outputs, gated = not ends_only, v.gated and not ends_only
    varying_B, varying_C = v.B != "", v.C != "" and outputs
    constant_B, constant_C = not varying_B, v.C == "" and outputs
    softplus, sigmoid, decay, decay_and_change = f.softplus, f.sigmoid, f.decay, f.decay_and_change
    product, times, overlap, conj = f.product, f.times, f.overlap, f.conj
    zero, one, shares, infinite = f.zero, f.one, f.shares, real.type(np.inf)
    none = number.type(0)

    waves = wave_tile(v, storage, real, threads, channels, TILE, ROW, keep=True)
    own, start, at_wave, known, inside = waves.own, waves.start, waves.at, waves.known, waves.inside
    parameter_of, parameter_channel, channel_of = waves.parameter_of, waves.parameter_channel, waves.channel_of
    slot, put, get, count, parameters = waves.slot, waves.put, waves.get, waves.count, waves.parameters
    known_next, past, stored = waves.known_next, waves.past, waves.stored
    read, widen, write = waves.read, waves.widen, waves.write
    size_of, number_size = storage.itemsize, number.itemsize
    of_channels, of_quad, numbers = local_array(parameters, real), local_array(QUAD, real), local_array(NS, number)
    read_numbers, write_numbers = reader(real, number, NS), writer(real, number, NS)
    read_own, write_own = reader(real, number, NS, True, False), writer(real, number, NS, True)
    load_quad, load_numbers = shared_reader(real, QUAD), shared_reader(number, NS)
    memory = SharedMemory()
    steps_array, inputs_array, y_array = (memory.array(channels * ROW, real) for _ in range(3))
    beside = number != np.complex128  # for which shared memory is too small
    skip_array = memory.array(channels * ROW if beside else 1, real)
    B_array, C_array = (memory.array(QUADS * QUAD_SIZE, number) for _ in range(2))
    keep_array = memory.array(TILE, real)
    stored_B, stored_C = dtype_of(v.B or v.storage), dtype_of(v.C or v.storage)
    B_quad, start_B, read_B, stage_B = matrix_tile(v, stored_B, False, not many, TILE, threads, BLOCK, QUAD_SIZE)
    C_quad, start_C, read_C, stage_C = matrix_tile(v, stored_C, True, not many, TILE, threads, BLOCK, QUAD_SIZE)
    parameter, write_real, rates, kept = readers(number, NS, zoh, TILE)
    walk = past_parts(number, NS, False)
    states_apart = LANES * NS

    @device
    def settle(tile, at, values, upper, odd, block):
        """Leave the sums over states of a quad, one in each lane, in shared memory: those of all blocks so far."""
        total = across(values, upper, odd)
        if many or not beside:
            if block > 0 or not beside:
                total = total + shared_get(tile, at)
        shared_set(tile, at, total)

    def kernel(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, y, last_state, checkpoints, carry,
        part_ends, part_sums, seq_idx, cu_seqlens, dim, state, length, channel_blocks, blocks_of_group,
        channels_of_group, parts, launched_parts, part_length, sequences, state_blocks, u_batch, delta_batch, z_batch,
        y_batch, u_stride, delta_stride, z_stride, y_stride, B_batch, B_group, B_stride, C_batch, C_group, C_stride,
    ):  # fmt: skip
        if not spread:
            u_stride, delta_stride, z_stride, y_stride = length, length, length, length
        number_of_part, group, _, channel0, channel_end = place(
            block_index(), channel_blocks, blocks_of_group, channels_of_group, channels
        )
        which, part, parts_here, number_of_part = part_of(
            number_of_part, parts, launched_parts, length, part_length, sequences, cu_seqlens
        )
        row, begin, steps = segment(which, length, cu_seqlens)
        if ends_only and cu_seqlens != 0 and part >= parts_here - 1:
            steps = 0  # nobody asks what the last part of a sequence ends in
        first = min(part * part_length, steps)
        chunk = chunk_of(which, begin, length, cu_seqlens) + (first >> 4)
        begin, steps = begin + first, min(part_length, steps - first)
        padded = states_apart * state_blocks if many else states_apart

        # a lane has states of one channel, and a thread, along time, a few quads
        thread = thread_index()
        lane, own_row = lane_of(thread), row_of(thread)
        own_channel, at_channel = channel_of(own_row), own_row * ROW
        channel = channel0 + own_channel
        upper, odd = (lane & 2) != 0, (lane & 1) != 0
        alive = select(channel < channel_end, NS, 0 * thread)  # states that can be read and written at once
        time_channel, step = own(thread)
        at_quad = slot(time_channel, step)
        time_channel += channel0
        own_part = number_of_part * dim + channel
        own_checkpoints = checkpoints + number_size * (chunk * dim + channel) * padded
        u += size_of * (row * u_batch + at_wave(0, 0, begin, u_stride))
        delta += size_of * (row * delta_batch + at_wave(0, 0, begin, delta_stride))
        z += size_of * (row * z_batch + at_wave(0, 0, begin, z_stride))
        y += size_of * (row * y_batch + at_wave(0, 0, begin, y_stride))
        if varying_B:
            B = start_B(B, row * B_batch + group * B_group, B_stride, begin, thread)
        if varying_C:
            C = start_C(C, row * C_batch + group * C_group, C_stride, begin, thread)

        steps_tile, inputs_tile, y_tile, skip_tile = steps_array(), inputs_array(), y_array(), skip_array()
        keep = keep_array()
        B_tile, C_tile = B_array(), C_array()
        h, rate, per_A, b, c = numbers(), numbers(), numbers(), numbers(), numbers()
        bias, skip = of_channels(), of_channels()
        for k in unroll(parameters):
            bias[k] = parameter(delta_bias, parameter_channel(k, time_channel), channel_end)
            skip[k] = parameter(D, parameter_channel(k, time_channel), channel_end)

        # the state that this part starts from
        for block in range(state_blocks if many else 1):
            n = block * states_apart + lane * NS
            valid = select(alive > 0, state - n, 0 * thread)
            rates(rate, per_A, A, channel * state + n, valid)
            for j in range(NS):
                h[j] = none
            if outputs:
                if initial_state != 0:
                    read_numbers(h, initial_state, (which * dim + channel) * state + n, valid)
                walk(h, rate, part_ends, part_sums, own_part - part * dim, dim, part, padded, n, alive)
            if many:
                write_own(carry, own_part * padded + n, h, alive)
            else:
                if constant_B:
                    read_numbers(b, B, channel * state + n, valid)
                if constant_C:
                    read_numbers(c, C, channel * state + n, valid)

        delta_next, u_next, z_used = stored(), stored(), stored()
        B_next, C_next = B_quad(), C_quad()
        d, x, keeps, ys, pending = of_quad(), of_quad(), of_quad(), of_quad(), of_quad()
        ahead = steps - step  # steps from this thread's first quad on
        at_delta, at_u = start(time_channel, step, delta_stride), start(time_channel, step, u_stride)
        for p in unroll(count):
            valid, before = known(p, time_channel, channel_end, ahead), past(step, time_channel, begin)
            read(delta_next, p, delta, at_wave(at_delta, p, 0, delta_stride), valid, before)
            read(u_next, p, u, at_wave(at_u, p, 0, u_stride), valid, before)
        if varying_B and not many:
            read_B(B_next, B, 0, B_stride, state, 0, steps, thread)
        if varying_C and not many:
            read_C(C_next, C, 0, C_stride, state, 0, steps, thread)
        kept_steps = steps if checkpoints != 0 else 0  # whose checkpoints are wanted
        passed = zero
        for t in range(0, steps, TILE):
            of_tile = zero  # of the step sizes: a sum of sums rounds less than one of all steps
            now = anew(thread)  # made of this, what a tile needs once does not take registers in between
            first_channel, first_step = own(now)
            first_channel += channel0
            at_delta, at_u = start(first_channel, first_step, delta_stride), start(first_channel, first_step, u_stride)
            at_z, at_y = start(first_channel, first_step, z_stride), start(first_channel, first_step, y_stride)
            # step sizes and inputs of the tile, and what goes past the states, to shared memory
            for p in unroll(count):
                widen(d, delta_next, p, delta, at_delta, delta_stride)
                widen(x, u_next, p, u, at_u, u_stride)
                if outputs:
                    for i in unroll(QUAD, heavy):
                        ys[i] = skip[parameter_of(p, i)] * x[i]
                    put(skip_tile if beside else y_tile, at_quad, p, ys)
                for i in unroll(QUAD, heavy):
                    size = d[i] + bias[parameter_of(p, i)]
                    if delta_softplus != 0:
                        size = softplus(size)
                    d[i] = select(inside(p, i, ahead), size, zero)  # past the end nothing moves
                    if not zoh:
                        x[i] = d[i] * x[i]
                put(steps_tile, at_quad, p, d)
                put(inputs_tile, at_quad, p, x)
            if resets:
                shared_set(keep, thread & (TILE - 1), kept(seq_idx, row * length, begin + t, steps - t, thread))
            for p in unroll(count):
                valid = known(p, time_channel, channel_end, ahead)
                if gated:
                    before = past(steps - ahead, first_channel, begin)
                    read(z_used, p, z, at_wave(at_z, p, t, z_stride), valid, before)
                valid, before = known_next(valid, p, time_channel, channel_end, ahead), steps - ahead + TILE
                read(delta_next, p, delta, at_wave(at_delta, p, t + TILE, delta_stride), valid, before)
                read(u_next, p, u, at_wave(at_u, p, t + TILE, u_stride), valid, before)

            for block in range(state_blocks if many else 1):
                n = block * states_apart + lane * NS
                if many:
                    if varying_B:
                        read_B(B_next, B, block * states_apart, B_stride, state, t, steps - t, thread)
                    if varying_C:
                        read_C(C_next, C, block * states_apart, C_stride, state, t, steps - t, thread)
                if varying_B:
                    stage_B(B_tile, B_next, B, block * states_apart, B_stride, thread)
                if varying_C:
                    stage_C(C_tile, C_next, C, block * states_apart, C_stride, thread)
                if not many:
                    if varying_B:
                        read_B(B_next, B, 0, B_stride, state, t + TILE, steps - t - TILE, thread)
                    if varying_C:
                        read_C(C_next, C, 0, C_stride, state, t + TILE, steps - t - TILE, thread)
                synchronize()
                if many:
                    valid = select(alive > 0, state - n, 0 * thread)
                    read_own(h, carry, own_part * padded + n, alive)
                    rates(rate, per_A, A, channel * state + n, valid)
                    if constant_B:
                        read_numbers(b, B, channel * state + n, valid)
                    if constant_C:
                        read_numbers(c, C, channel * state + n, valid)
                at_steps, at_matrix = at_channel, lane * NS
                for reached in range(0, TILE, CHECKPOINT):  # steps of the tile
                    if outputs:
                        if t + reached < kept_steps:
                            write_own(own_checkpoints, ((t + reached) >> 4) * dim * padded + n, h, alive)
                    for q in unroll(CHECKPOINT // QUAD, not heavy):
                        load_quad(d, steps_tile, at_steps + q * QUAD)
                        load_quad(x, inputs_tile, at_steps + q * QUAD)
                        if resets:
                            load_quad(keeps, keep, reached + q * QUAD)
                        for i in unroll(QUAD, heavy):
                            at = at_matrix + q * QUAD_SIZE + i * BLOCK
                            if varying_B:
                                load_numbers(b, B_tile, at)
                            if varying_C:
                                load_numbers(c, C_tile, at)
                            total = zero
                            for j in range(NS):
                                into = times(b[j], x[i])
                                if zoh:
                                    a, change = decay_and_change(d[i], rate[j])
                                    into = product(product(change, per_A[j]), into)
                                else:
                                    a = decay(d[i], rate[j])
                                if resets:
                                    a = times(a, keeps[i])
                                h[j] = product(a, h[j]) + into
                                if varying_C:
                                    total = total + overlap(c[j], h[j])
                                if constant_C:
                                    total = total + shares * overlap(conj(c[j]), h[j])
                            ys[i] = total
                            if outputs and i == 1 and q > 0:  # the sums of the quad before, while this one is under way
                                settle(y_tile, at_steps + (q - 1) * QUAD + lane, pending, upper, odd, block)
                            if ends_only and (not many or block == 0):
                                of_tile = of_tile + d[i]
                                if resets:
                                    of_tile = select(keeps[i] < one, infinite, of_tile)
                        for i in unroll(QUAD, heavy):
                            pending[i] = ys[i]
                        if outputs and heavy:
                            converge()
                    if outputs:
                        settle(y_tile, at_steps + CHECKPOINT - QUAD + lane, pending, upper, odd, block)
                        converge()
                    at_steps, at_matrix = at_steps + CHECKPOINT, at_matrix + CHECKPOINT // QUAD * QUAD_SIZE
                if many:
                    write_own(carry, own_part * padded + n, h, alive)
                synchronize()

            if outputs:
                for p in unroll(count):
                    get(ys, y_tile, at_quad, p)
                    if beside:
                        get(x, skip_tile, at_quad, p)
                        for i in unroll(QUAD, heavy):
                            ys[i] = ys[i] + x[i]
                    if gated:
                        widen(d, z_used, p, z, at_z, z_stride)
                        for i in unroll(QUAD, heavy):
                            ys[i] = ys[i] * (d[i] * sigmoid(d[i]))
                    valid = known(p, time_channel, channel_end, ahead)
                    write(y, at_wave(at_y, p, t, y_stride), ys, valid)
            passed = passed + of_tile
            ahead -= TILE

        # what it ends in
        for block in range(state_blocks if many else 1):
            n = block * states_apart + lane * NS
            if many:
                read_own(h, carry, own_part * padded + n, alive)
            if ends_only:
                write_own(part_ends, own_part * padded + n, h, alive)
            elif last_state != 0 and part == parts_here - 1:
                block_states = last_state + number_size * (which * dim + channel0) * state
                valid = select(alive > 0, state - n, 0 * thread)
                write_numbers(block_states, own_channel * state + n, h, valid)
        if ends_only:
            write_real(part_sums, own_part, passed, select(lane == 0, alive, 0 * thread))

    blocks = BLOCKS[number.name] if warps == 4 else BLOCKS[number.name] - 1  # a thread has more of B and C
    return kernel, Shape(threads, blocks * 4 // warps)


# Variants that stand for all: every dtype, and every option at least once with real and with complex A.
SHIPPED = (
    Variant("float32", "float32", "float32", "float32", False, True, "rows", True, "rows", True, 4, False, False),
    Variant("float32", "float32", "float32", "float32", False, False, "rows", False, "rows", False, 2, False, True),
    Variant("float32", "float32", "float32", "float32", True, True, "rows", True, "rows", True, 4, False, False),
    Variant("float32", "float32", "", "float32", True, True, "rows", False, "rows", False, 4, True, False),
    Variant("float16", "float32", "float16", "", False, True, "rows", True, "rows", True, 1, False, False),
    Variant("bfloat16", "float32", "bfloat16", "bfloat16", False, True, "rows", True, "rows", True, 4, False, False),
    Variant("bfloat16", "float32", "bfloat16", "bfloat16", False, False, "rows", False, "rows", False, 4, True, True),
    Variant("float64", "float64", "float64", "float64", False, True, "rows", True, "rows", True, 2, True, False),
    Variant("float64", "float64", "", "", True, False, "rows", False, "rows", False, 2, False, True),
    Variant("float32", "complex64", "float32", "float32", False, True, "rows", True, "rows", True, 2, True, False),
    Variant("bfloat16", "complex64", "bfloat16", "", True, True, "rows", True, "rows", True, 2, False, True),
    Variant("float64", "complex128", "float64", "float64", False, True, "rows", True, "rows", True, 1, True, False),
    Variant("float32", "float32", "float32", "float32", False, True, "spread", True, "rows", True, 4, False, False),
    Variant("float32", "float32", "float32", "float32", False, True, "columns", True, "columns", True, 4, False, False),
    Variant("float16", "float32", "float16", "float16", False, True, "columns", False, "rows", False, 4, False, True),
    Variant("bfloat16", "float32", "bfloat16", "bfloat16", False, True, "rows", False, "rows", False, 4, False, False),
)


def shipped():
    """Kernels that stand for all."""
    cut = (SHIPPED[0], SHIPPED[3], SHIPPED[6], SHIPPED[7], SHIPPED[10], SHIPPED[13])
    return [
        *(Kernel("selective_scan", "forward", (4, *v)) for v in SHIPPED),
        *(Kernel("selective_scan", "forward", (warps, *SHIPPED[5])) for warps in (1, 2)),  # for groups of few channels
        *(Kernel("selective_scan", "ends", (4, *v)) for v in cut),
    ]
