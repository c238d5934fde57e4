"""The selective scan, forward. A block walks along time with 32 channels, and with them shares each tile of B and C.

Four lanes are a channel, each with up to four of its states in registers; a warp is 8 channels. A *tile* is 32 steps,
eight quads. The kernel walks from the first tile to the last, and in each it

- prepares the tile in shared memory: step sizes and inputs, once for each channel and step (``prepare_tile``);
- asks for z, and for the next tile, which is on its way while this one is walked (``read_next``);
- walks the steps one by one (``walk``): h = a h + B_bar u, y = C h;
- writes y through skip and gate (``write_tile``).

Sums over states go across the lanes of a channel (``settle``). More than 16 states are walked in blocks of 16, tile by
tile.
"""

from typing import Any, NamedTuple

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._math import number_functions
from sscan.cuda._primitives import (
    SharedMemory,
    anew,
    converge,
    dtype_of,
    local_array,
    reader,
    select,
    shared_get,
    shared_reader,
    shared_set,
    synchronize,
    thread_index,
    writer,
)
from sscan.cuda._target import device
from sscan.cuda._unroll import unroll
from sscan.cuda.kernels._matrices import Matrices, matrix_tiles
from sscan.cuda.kernels._scan import (
    BLOCK,
    CHECKPOINT,
    LANES,
    WARP_CHANNELS,
    Row,
    Sizes,
    Variant,
    across,
    lane_of,
    places,
    quads_of_tile,
    rates_of_states,
    reals_of_channels,
    row_of,
    sequence_markers,
    step_sizes,
    steps_of_state,
)
from sscan.cuda.kernels._waves import QUAD, wave_tile
from sscan.cuda.kernels.selective_scan_prefix import parts_passer

TILE = 32  # steps between barriers; between sums over states there are QUAD
QUADS = TILE // QUAD
ROW = TILE + 4  # reals from one channel to the next in shared memory: 4 more, against bank conflicts
QUAD_SIZE = QUAD * BLOCK + 4  # numbers from one quad of B to the next
BLOCKS = {"float32": 5, "float64": 3, "complex64": 3, "complex128": 2}  # of 4 warps, at once on a multiprocessor


class Cut(NamedTuple):
    """How the work is cut: what a stage is made for."""

    v: Variant
    warps: int
    outputs: bool  # y, or only the ends of parts

    @property
    def threads(self):
        """Of a block."""
        return 32 * self.warps

    @property
    def channels(self):
        """Of a block."""
        return WARP_CHANNELS * self.warps

    @property
    def gated(self):
        """Whether z is read."""
        return self.v.gated and self.outputs

    @property
    def varying_C(self):
        """Whether C is read step by step."""
        return self.v.varying_C and self.outputs

    @property
    def constant_C(self):
        """Whether it is read once."""
        return not self.v.varying_C and self.outputs

    @property
    def beside(self):
        """Whether D u has an array of its own, beside that of y: for complex128 shared memory is too small."""
        return self.v.number != "complex128"


# --- who has what -----------------------------------------------------------------------------------------------------


class Waves(NamedTuple):
    """One thing for each array along time."""

    u: Any
    delta: Any
    z: Any
    y: Any


class Addresses(NamedTuple):
    """Where memory of one number or more for each state or channel begins."""

    A: Any
    B: Any  # if constant, as C
    C: Any
    initial_state: Any
    last_state: Any
    checkpoints: Any  # of the lane's channel in this part
    carried: Any  # states that go from tile to tile, if there are many blocks of them
    part_ends: Any
    part_sums: Any


class Lane(NamedTuple):
    """The states that a thread walks with."""

    lane: Any  # of the four of a channel
    row: Any  # the channel, in the block
    channel: Any  # and in all
    upper: Any  # the bits of ``lane``
    odd: Any


class States(NamedTuple):
    """What a lane has of its states in registers: [state]."""

    h: Any
    rate: Any  # A
    per_A: Any
    B: Any  # if they vary, of a step
    C: Any


class Tile(NamedTuple):
    """A tile in shared memory, [channel][step]."""

    steps: Any  # step sizes
    inputs: Any  # delta u, under zero-order hold u
    y: Any
    skips: Any  # D u
    keep: Any  # [step]: 0 where a new sequence starts


def shared_arrays(cut):
    """``make()``: a tile, and B and C of it."""
    memory, real, size = SharedMemory(), cut.v.real, cut.channels * ROW
    make_steps, make_inputs, make_y = (memory.array(size, real) for _ in range(3))
    make_skips = memory.array(size if cut.beside else 1, real)
    make_B, make_C = (memory.array(QUADS * QUAD_SIZE, cut.v.dtype) for _ in range(2))
    make_keep = memory.array(TILE, real)

    @device
    def make():
        tile = Tile(make_steps(), make_inputs(), make_y(), make_skips(), make_keep())
        return tile, Matrices(make_B(), make_C())

    return make


def lane_places(cut, waves):
    """``lane_at``: who a thread is. ``row_at``: its states of one block of them."""
    states, channel_of = cut.v.states, waves.channel_of

    @device
    def lane_at(thread, place):
        lane, row = lane_of(thread), row_of(thread)
        return Lane(lane, row, place.channel + channel_of(row), (lane & 2) != 0, (lane & 1) != 0)

    @device
    def row_at(lane, block, place, sizes):
        n, alive = (block * LANES + lane.lane) * states, select(lane.channel < place.channel_end, states, 0 * lane.lane)
        valid = select(alive > 0, sizes.state - n, 0 * n)
        return Row(lane.channel, n, lane.channel * sizes.state + n, valid, alive)

    return lane_at, row_at


# --- a tile on its way to shared memory, and back ---------------------------------------------------------------------


def tile_readers(cut, waves):
    """A thread's quads, as they lie in memory: ``read_first`` those of the first tile, ``read_next`` of the next one.

    z is read in its own tile, when there are registers for it.
    """
    gated, count, known, known_next, past = cut.gated, waves.count, waves.known, waves.known_next, waves.past
    read, at = waves.read, waves.at

    @device
    def read_first(held, arrays, first, strides, quads, place):
        for p in unroll(count):
            valid = known(p, quads.channel, place.channel_end, place.steps - quads.step)
            before = past(quads.step, quads.channel, place.begin)
            read(held.delta, p, arrays.delta, at(first.delta, p, 0, strides.delta), valid, before)
            read(held.u, p, arrays.u, at(first.u, p, 0, strides.u), valid, before)

    @device
    def read_next(held, arrays, first, strides, quads, place, t):
        for p in unroll(count):
            valid = known(p, quads.channel, place.channel_end, place.steps - t - quads.step)
            if gated:
                before = past(t + quads.step, quads.channel, place.begin)
                read(held.z, p, arrays.z, at(first.z, p, t, strides.z), valid, before)
            valid = known_next(valid, p, quads.channel, place.channel_end, place.steps - t - quads.step)
            before = t + quads.step + TILE
            read(held.delta, p, arrays.delta, at(first.delta, p, t + TILE, strides.delta), valid, before)
            read(held.u, p, arrays.u, at(first.u, p, t + TILE, strides.u), valid, before)

    return read_first, read_next


def tile_preparer(cut, waves):
    """``prepare_tile``: step sizes and inputs to shared memory, and D u, which goes past the states."""
    v, outputs, beside, zoh, heavy = cut.v, cut.outputs, cut.beside, cut.v.zoh, cut.v.heavy
    of_quad, sized = local_array(QUAD, v.real), step_sizes(v, waves, heavy)
    count, widen, put, parameter_of = waves.count, waves.widen, waves.put, waves.parameter_of

    @device
    def prepare_tile(tile, held, arrays, first, strides, quads, place, t, bias, skip, delta_softplus):
        d, x, past_states = of_quad(), of_quad(), of_quad()
        for p in unroll(count):
            widen(d, held.delta, p, arrays.delta, first.delta, strides.delta)
            widen(x, held.u, p, arrays.u, first.u, strides.u)
            if outputs:
                for i in unroll(QUAD, heavy):
                    past_states[i] = skip[parameter_of(p, i)] * x[i]
                put(tile.skips if beside else tile.y, quads.slot, p, past_states)
            sized(d, bias, p, place.steps - t - quads.step, delta_softplus)
            if not zoh:
                for i in unroll(QUAD, heavy):
                    x[i] = d[i] * x[i]
            put(tile.steps, quads.slot, p, d)
            put(tile.inputs, quads.slot, p, x)

    return prepare_tile


def tile_writer(cut, waves):
    """``write_tile``: y, with D u and through the gate."""
    gated, beside, heavy, of_quad = cut.gated, cut.beside, cut.v.heavy, local_array(QUAD, cut.v.real)
    count, known, get, widen, write, at = waves.count, waves.known, waves.get, waves.widen, waves.write, waves.at
    sigmoid = number_functions(cut.v.dtype).sigmoid

    @device
    def write_tile(tile, held, arrays, first, strides, quads, place, t):
        ys, x, z = of_quad(), of_quad(), of_quad()
        for p in unroll(count):
            get(ys, tile.y, quads.slot, p)
            if beside:
                get(x, tile.skips, quads.slot, p)
                for i in unroll(QUAD, heavy):
                    ys[i] = ys[i] + x[i]
            if gated:
                widen(z, held.z, p, arrays.z, first.z, strides.z)
                for i in unroll(QUAD, heavy):
                    ys[i] = ys[i] * (z[i] * sigmoid(z[i]))
            valid = known(p, quads.channel, place.channel_end, place.steps - t - quads.step)
            write(arrays.y, at(first.y, p, t, strides.y), ys, valid)

    return write_tile


# --- the states of a lane ---------------------------------------------------------------------------------------------


def state_carriers(cut, row_at):
    """``begin_part`` with the state that it starts from, ``end_part`` with what it ends in.

    Of many blocks of states each is kept in memory between its tiles, and comes to registers by ``begin_block``.
    """
    v, NS, many, outputs = cut.v, cut.v.states, cut.v.many, cut.outputs
    constant_B, constant_C = not v.varying_B, cut.constant_C
    none, number_size, (_, write_real) = v.dtype.type(0), v.dtype.itemsize, reals_of_channels(v.real)
    read_numbers, write_numbers = reader(v.real, v.dtype, NS), writer(v.real, v.dtype, NS)
    read_together, write_together = reader(v.real, v.dtype, NS, True, False), writer(v.real, v.dtype, NS, True)
    read_rates, pass_parts = rates_of_states(v.dtype, NS, v.zoh), parts_passer(v.dtype, NS, False)

    @device
    def carried_at(row, place, sizes):
        return (place.number * sizes.dim + row.channel) * sizes.padded + row.n

    @device
    def read_constants(own, row, memory):
        if constant_B:
            read_numbers(own.B, memory.B, row.at, row.valid)
        if constant_C:
            read_numbers(own.C, memory.C, row.at, row.valid)

    @device
    def end_block(own, row, place, sizes, memory):
        write_together(memory.carried, carried_at(row, place, sizes), own.h, row.alive)

    @device
    def begin_part(own, lane, place, sizes, memory):
        for block in range(sizes.blocks if many else 1):
            row = row_at(lane, block, place, sizes)
            read_rates(own.rate, own.per_A, memory.A, row.at, row.valid)
            for j in range(NS):
                own.h[j] = none
            if outputs:
                if memory.initial_state != 0:
                    read_numbers(
                        own.h, memory.initial_state, place.segment * sizes.dim * sizes.state + row.at, row.valid
                    )
                first = (place.number - place.part) * sizes.dim + row.channel
                pass_parts(
                    own.h, own.rate, memory.part_ends, memory.part_sums, first, sizes.dim, place.part, sizes.padded,
                    row.n, row.alive,
                )  # fmt: skip
            if many:
                end_block(own, row, place, sizes, memory)
            else:
                read_constants(own, row, memory)

    @device
    def begin_block(own, row, place, sizes, memory):
        read_together(own.h, memory.carried, carried_at(row, place, sizes), row.alive)
        read_rates(own.rate, own.per_A, memory.A, row.at, row.valid)
        read_constants(own, row, memory)

    @device
    def write_checkpoint(own, row, sizes, memory, t):
        write_together(memory.checkpoints, (t >> 4) * sizes.dim * sizes.padded + row.n, own.h, row.alive)

    @device
    def end_part(own, lane, place, sizes, memory, total):
        for block in range(sizes.blocks if many else 1):
            row = row_at(lane, block, place, sizes)
            if many:
                read_together(own.h, memory.carried, carried_at(row, place, sizes), row.alive)
            if not outputs:
                write_together(memory.part_ends, carried_at(row, place, sizes), own.h, row.alive)
            elif memory.last_state != 0 and place.part == place.parts - 1:
                last = memory.last_state + number_size * (place.segment * sizes.dim + place.channel) * sizes.state
                write_numbers(last, row.at - place.channel * sizes.state, own.h, row.valid)
        if not outputs:
            one_lane = select(lane.lane == 0, row_at(lane, 0, place, sizes).alive, 0 * lane.lane)
            write_real(memory.part_sums, place.number * sizes.dim + lane.channel, total, one_lane)

    return begin_part, begin_block, end_block, write_checkpoint, end_part


# --- the walk ---------------------------------------------------------------------------------------------------------


def step_walker(cut):
    """``walk_step``: h = a h + B_bar u of one step. Gives y over the states of the lane."""
    v, NS, varying_B, varying_C, constant_C = cut.v, cut.v.states, cut.v.varying_B, cut.varying_C, cut.constant_C
    f, load_numbers, step = number_functions(v.dtype), shared_reader(v.dtype, NS), steps_of_state(v)
    product, overlap, conj, zero, shares = f.product, f.overlap, f.conj, f.zero, f.shares

    @device
    def walk_step(own, d, x, keep, matrices, at):
        if varying_B:
            load_numbers(own.B, matrices.B, at)
        if varying_C:
            load_numbers(own.C, matrices.C, at)
        y = zero
        for j in range(NS):
            a, added = step(d, x, own.rate[j], own.per_A[j], own.B[j], keep)
            own.h[j] = product(a, own.h[j]) + added
            if varying_C:
                y = y + overlap(own.C[j], own.h[j])
            if constant_C:
                y = y + shares * overlap(conj(own.C[j]), own.h[j])
        return y

    return walk_step


def walker(cut):
    """``walk``: the steps from ``reached`` to the next checkpoint. Gives the sum of step sizes, for ends of parts.

    y of a quad is summed over the lanes of a channel (``settle``) while the next quad is under way: lane g then has
    that of step g.
    """
    v, heavy, outputs, resets, many, beside = cut.v, cut.v.heavy, cut.outputs, cut.v.resets, cut.v.many, cut.beside
    one, infinite, walk_step = v.real.type(1), v.real.type(np.inf), step_walker(cut)
    of_quad, load_quad = local_array(QUAD, v.real), shared_reader(v.real, QUAD)

    @device
    def settle(tile, at, values, lane, block):
        """With those of all blocks of states so far."""
        total = across(values, lane.upper, lane.odd)
        if many or not beside:
            if block > 0 or not beside:
                total = total + shared_get(tile.y, at)
        shared_set(tile.y, at, total)

    @device
    def walk(own, tile, matrices, lane, reached, at, at_matrix, block, total):
        d, x, keep, ys, pending = of_quad(), of_quad(), of_quad(), of_quad(), of_quad()
        for q in unroll(CHECKPOINT // QUAD, not heavy):
            load_quad(d, tile.steps, at + q * QUAD)
            load_quad(x, tile.inputs, at + q * QUAD)
            if resets:
                load_quad(keep, tile.keep, reached + q * QUAD)
            for i in unroll(QUAD, heavy):
                ys[i] = walk_step(own, d[i], x[i], keep[i], matrices, at_matrix + q * QUAD_SIZE + i * BLOCK)
                if outputs and i == 1 and q > 0:
                    settle(tile, at + (q - 1) * QUAD + lane.lane, pending, lane, block)
                if not outputs and (not many or block == 0):
                    total = total + d[i]
                    if resets:
                        total = select(keep[i] < one, infinite, total)  # a sequence ended
            for i in unroll(QUAD, heavy):
                pending[i] = ys[i]
            if outputs and heavy:
                converge()
        if outputs:
            settle(tile, at + CHECKPOINT - QUAD + lane.lane, pending, lane, block)
            converge()
        return total

    return walk


# --- the kernels ------------------------------------------------------------------------------------------------------


def forward(warps, *key):
    """y, the last state and, if there is memory for them, checkpoints."""
    return scan(Cut(Variant(*key), warps, True))


def ends(warps, *key):
    """The state that each part but the last ends in when it starts from zero, and the sum of its step sizes."""
    return scan(Cut(Variant(*key), warps, False))


def scan(cut):
    """Kernel of one block of channels in one part of a segment, from its first tile to its last.

    The state that a part starts from is made of the ends of the parts before it: exp(A sum(delta)) is what is left of a
    state after a part, whatever its inputs. Two barriers a tile and block of states. Reads delta, u and z once, B and C
    once for each block of channels.
    """
    v, states, outputs, many, spread = cut.v, cut.v.states, cut.outputs, cut.v.many, cut.v.spread
    states_apart, number_size, zero = LANES * states, v.dtype.itemsize, v.real.type(0)
    mark_sequences = sequence_markers(v, TILE)
    numbers, make_shared = local_array(states, v.dtype), shared_arrays(cut)
    waves = wave_tile(v, dtype_of(v.storage), v.real, cut.threads, cut.channels, TILE, ROW, keep=True)
    stored, address, first_of = waves.stored, waves.address, waves.start
    place_of, (lane_at, row_at) = places(cut.channels, without_last=not outputs), lane_places(cut, waves)
    quads_at, parameters_of = quads_of_tile(v, waves)
    make_matrices, matrix_address, start_matrices, read_matrices, stage_matrices = matrix_tiles(
        v, v.varying_B, cut.varying_C, not many, TILE, cut.threads, BLOCK, QUAD_SIZE
    )
    (read_first, read_next), prepare_tile = tile_readers(cut, waves), tile_preparer(cut, waves)
    begin_part, begin_block, end_block, write_checkpoint, end_part = state_carriers(cut, row_at)
    walk, write_tile = walker(cut), tile_writer(cut, waves)

    @device
    def firsts_of(quads, strides):
        return Waves(
            first_of(quads.channel, quads.step, strides.u), first_of(quads.channel, quads.step, strides.delta),
            first_of(quads.channel, quads.step, strides.z), first_of(quads.channel, quads.step, strides.y),
        )  # fmt: skip

    def kernel(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, y, last_state, checkpoints, carried,
        part_ends, part_sums, seq_idx, cu_seqlens, dim, state, length, channel_blocks, blocks_of_group,
        channels_of_group, parts, launched_parts, part_length, sequences, state_blocks, u_batch, delta_batch, z_batch,
        y_batch, u_stride, delta_stride, z_stride, y_stride, B_batch, B_group, B_stride, C_batch, C_group, C_stride,
    ):  # fmt: skip
        if not spread:
            u_stride, delta_stride, z_stride, y_stride = length, length, length, length
        place = place_of(
            channel_blocks, blocks_of_group, channels_of_group, parts, launched_parts, part_length, length, sequences,
            cu_seqlens,
        )  # fmt: skip
        sizes = Sizes(dim, state, state_blocks, states_apart * state_blocks if many else states_apart)
        lane = lane_at(thread_index(), place)
        first = checkpoints + number_size * (place.checkpoint * dim + lane.channel) * sizes.padded
        memory = Addresses(A, B, C, initial_state, last_state, first, carried, part_ends, part_sums)
        strides, matrix_strides = Waves(u_stride, delta_stride, z_stride, y_stride), Matrices(B_stride, C_stride)
        arrays = Waves(
            address(u, u_batch, u_stride, place), address(delta, delta_batch, delta_stride, place),
            address(z, z_batch, z_stride, place), address(y, y_batch, y_stride, place),
        )  # fmt: skip
        matrices = matrix_address(B, C, Matrices(B_batch, C_batch), Matrices(B_group, C_group), matrix_strides, place)

        thread = thread_index()
        quads, matrices = quads_at(thread, place), start_matrices(matrices, matrix_strides, thread)
        tile, staged = make_shared()
        own = States(numbers(), numbers(), numbers(), numbers(), numbers())
        held, held_matrices = Waves(stored(), stored(), stored(), stored()), make_matrices()
        bias, skip = parameters_of(delta_bias, quads, place), parameters_of(D, quads, place)
        begin_part(own, lane, place, sizes, memory)
        read_first(held, arrays, firsts_of(quads, strides), strides, quads, place)
        if not many:
            read_matrices(held_matrices, matrices, matrix_strides, 0, state, 0, place.steps, thread)
        kept_steps = place.steps if checkpoints != 0 else 0  # whose checkpoints are wanted
        total = zero
        for t in range(0, place.steps, TILE):
            of_tile = zero  # of the step sizes: a sum of sums rounds less than one of all steps
            now = anew(thread)  # made of this, what a tile needs once does not take registers in between
            firsts = firsts_of(quads_at(now, place), strides)
            prepare_tile(tile, held, arrays, firsts, strides, quads, place, t, bias, skip, delta_softplus)
            mark_sequences(tile.keep, seq_idx, place, length, t, thread)
            read_next(held, arrays, firsts, strides, quads, place, t)

            for block in range(state_blocks if many else 1):
                row, n0, left = row_at(lane, block, place, sizes), block * states_apart, place.steps - t
                if many:
                    read_matrices(held_matrices, matrices, matrix_strides, n0, state, t, left, thread)
                stage_matrices(staged, held_matrices, matrices, matrix_strides, n0, thread)
                if not many:
                    read_matrices(held_matrices, matrices, matrix_strides, 0, state, t + TILE, left - TILE, thread)
                synchronize()
                if many:
                    begin_block(own, row, place, sizes, memory)
                at, at_matrix = lane.row * ROW, lane.lane * states
                for reached in range(0, TILE, CHECKPOINT):
                    if outputs:
                        if t + reached < kept_steps:
                            write_checkpoint(own, row, sizes, memory, t + reached)
                    of_tile = walk(own, tile, staged, lane, reached, at, at_matrix, block, of_tile)
                    at, at_matrix = at + CHECKPOINT, at_matrix + CHECKPOINT // QUAD * QUAD_SIZE
                if many:
                    end_block(own, row, place, sizes, memory)
                synchronize()

            if outputs:
                write_tile(tile, held, arrays, firsts, strides, quads, place, t)
            total = total + of_tile
        end_part(own, lane, place, sizes, memory, total)

    blocks = BLOCKS[v.number] if cut.warps == 4 else BLOCKS[v.number] - 1  # a thread has more of B and C
    return kernel, Shape(cut.threads, blocks * 4 // cut.warps)


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
