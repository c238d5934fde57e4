"""Stages of the backward selective scan, in the order in which its kernel calls them, and what they work on.

Every stage is made for a ``Cut`` and is a device function of all threads of a block. Groups of arrays come first: they
say who has what.
"""

import math
from typing import Any, NamedTuple

from sscan.cuda._math import number_functions
from sscan.cuda._primitives import (
    SharedMemory,
    converge,
    local_array,
    reader,
    select,
    shared_get,
    shared_reader,
    shared_set,
    shared_writer,
    shuffle_xor,
    synchronize_warp,
    writer,
)
from sscan.cuda._target import device
from sscan.cuda._unroll import unroll
from sscan.cuda.kernels._matrices import Matrices
from sscan.cuda.kernels._scan import (
    BLOCK,
    CHECKPOINT,
    LANES,
    WARP_CHANNELS,
    Row,
    Variant,
    across,
    lane_of,
    lane_total,
    rates_of_states,
    reals_of_channels,
    row_of,
    steps_of_state,
)
from sscan.cuda.kernels._waves import QUAD
from sscan.cuda.kernels.selective_scan_prefix import parts_passer

TILE = CHECKPOINT
QUADS = TILE // QUAD
# Numbers from one step and from one quad of B to the next in shared memory: threads, which stage two steps of a state
# each, meet no other of their warp in a memory bank.
STEP_SIZE, QUAD_SIZE = 24, 100


class Cut(NamedTuple):
    """How the work is cut: what a stage is made for."""

    v: Variant
    rows: int  # channels of a lane
    warps: int

    @property
    def threads(self):
        return 32 * self.warps

    @property
    def apart(self):
        """Channels from one of a lane's rows to the next, in shared memory."""
        return WARP_CHANNELS * self.warps

    @property
    def channels(self):
        return self.apart * self.rows

    @property
    def warp_states(self):
        """States of a warp at one step."""
        return self.rows * WARP_CHANNELS * BLOCK


# --- who has what -----------------------------------------------------------------------------------------------------


class Waves(NamedTuple):
    """One thing for each array along time."""

    dy: Any
    u: Any
    delta: Any
    z: Any


class Addresses(NamedTuple):
    """Where memory of one number or more for each state or channel begins; sums are over a part."""

    A: Any
    B: Any  # if constant, as C
    C: Any
    checkpoints: Any  # of the block's channels in this part
    dlast_state: Any
    part_starts: Any
    part_sums: Any
    carried: Any  # what goes from tile to tile, if there are many blocks of states
    A_sums: Any
    B_sums: Any
    C_sums: Any
    D_sums: Any
    bias_sums: Any
    dinitial_state: Any


class Lane(NamedTuple):
    """The states that a thread walks with: the same ones of each of its rows."""

    thread: Any
    lane: Any  # of the four of a channel
    row: Any  # its first row, in the block
    channel: Any  # of that row
    upper: Any  # the bits of ``lane``
    odd: Any
    turned: Any  # whether its states are
    matrix: Any  # where they are in a step of B and C in shared memory
    order: Any  # of the quads of its channels there, against bank conflicts


class Tile(NamedTuple):
    """A tile in shared memory, [channel][step]."""

    steps: Any  # step sizes; at the end du
    inputs: Any  # u
    dy: Any  # before the gate
    slopes: Any  # of softplus; at the end ddelta
    gates: Any  # dy times the slope of the gate; at the end dz
    keep: Any  # [step]: 0 where a new sequence starts
    skips: Any  # [channel]: D


class Totals(NamedTuple):
    """Sums for dD and dbias: [row] over a tile, in registers; [row][total, what is lost][thread] in shared memory."""

    D: Any
    bias: Any


class Sums(NamedTuple):
    """Sums over states: [row] of a quad, in registers; [channel][step] of blocks of states so far, in shared memory."""

    y: Any  # C h
    u: Any  # B g
    steps: Any  # A a h g


class States(NamedTuple):
    """What a lane has of its states in registers: [row][state]."""

    rate: Any  # A
    per_A: Any
    B: Any  # if constant, as C
    C: Any
    h: Any
    g: Any
    dA: Any
    dB: Any
    dC: Any


class Quad(NamedTuple):
    """A quad of one row between its way forward and its way back, in registers: [step] or [step][state]."""

    d: Any  # step sizes
    x: Any  # u
    e: Any  # dy
    keep: Any
    before: Any  # the state before a step
    a: Any  # its decay
    a_h: Any  # their product
    dB: Any  # of all rows
    dC: Any


def shared_arrays(cut):
    """``make()``: tile, totals, sums of blocks of states before, B and C, and the states at the start of each quad.

    These are [quad][warp][row][state]. When a quad is done its sums for dB and dC, [step][B or C][state], lie there.
    """
    v, memory, tile = cut.v, SharedMemory(), cut.channels * TILE
    number, real, copies = v.dtype, v.real, 2 if v.states > 1 else 1
    make_steps, make_inputs, make_dy, make_slopes = (memory.array(tile, real) for _ in range(4))
    make_gates, make_keep = memory.array(tile if v.gated else 1, real), memory.array(TILE, real)
    make_skips = memory.array(cut.channels, real)
    make_D, make_bias = (memory.array(2 * cut.rows * cut.threads, real) for _ in range(2))
    make_B, make_C = (memory.array(copies * QUADS * QUAD_SIZE, number) for _ in range(2))
    make_starts = memory.array(QUADS * cut.warps * cut.warp_states, number)
    make_u, make_step, make_y = (memory.array(tile if v.many else 1, real) for _ in range(3))

    @device
    def make():
        tile = Tile(make_steps(), make_inputs(), make_dy(), make_slopes(), make_gates(), make_keep(), make_skips())
        totals, before = Totals(make_D(), make_bias()), Sums(make_y(), make_u(), make_step())
        return tile, totals, before, Matrices(make_B(), make_C()), make_starts()

    return make


def lane_arrays(cut):
    """``make()``: what a lane has of its states, of a quad, and of sums over a tile."""
    number, real = cut.v.dtype, cut.v.real
    of_states, of_rows = local_array(cut.rows * cut.v.states, number), local_array(cut.rows, real)
    of_quad, of_steps = local_array(QUAD * cut.v.states, number), local_array(QUAD, real)

    @device
    def make():
        own = States(
            of_states(), of_states(), of_states(), of_states(), of_states(), of_states(), of_states(), of_states(),
            of_states(),
        )  # fmt: skip
        quad = Quad(
            of_steps(), of_steps(), of_steps(), of_steps(), of_quad(), of_quad(), of_quad(), of_quad(), of_quad()
        )
        return own, quad, Totals(of_rows(), of_rows())

    return make


def lane_places(cut, waves):
    """``lane_at``: who a thread is. ``row_at``: its states of one row and block of states."""
    states, turned, channel_of = cut.v.states, cut.v.states > 1, waves.channel_of
    apart = QUAD // cut.rows if cut.v.order == "columns" else cut.apart

    @device
    def lane_at(thread, place):
        lane, row, second = lane_of(thread), row_of(thread), (thread & 16) != 0
        matrix = lane * states + (select(second, QUADS * QUAD_SIZE, 0 * thread) if turned else 0)
        return Lane(
            thread, lane, row, place.channel + channel_of(row), (lane & 2) != 0, (lane & 1) != 0, second, matrix,
            (row >> 1) & (QUADS - 1),
        )  # fmt: skip

    @device
    def row_at(lane, r, block, place, sizes):
        channel, n = lane.channel + r * apart, block * LANES * states + lane.lane * states
        alive = select(channel < place.channel_end, states, 0 * channel)
        return Row(channel, n, channel * sizes.state + n, select(alive > 0, sizes.state - n, 0 * channel), alive)

    return lane_at, row_at


# --- a tile on its way to shared memory -------------------------------------------------------------------------------


def tile_reader(v, waves):
    """``read_tile``: a thread's quads, as they lie in memory. All at once: whoever waits for one waits for all."""
    gated, count, known, past, read, at = v.gated, waves.count, waves.known, waves.past, waves.read, waves.at

    @device
    def read_tile(held, arrays, first, strides, quads, place, t):
        for p in unroll(count):
            valid = known(p, quads.channel, place.channel_end, place.steps - t - quads.step)
            before = past(t + quads.step, quads.channel, place.begin)
            read(held.delta, p, arrays.delta, at(first.delta, p, t, strides.delta), valid, before)
            read(held.u, p, arrays.u, at(first.u, p, t, strides.u), valid, before)
            read(held.dy, p, arrays.dy, at(first.dy, p, t, strides.dy), valid, before)
            if gated:
                read(held.z, p, arrays.z, at(first.z, p, t, strides.z), valid, before)

    return read_tile


def tile_preparer(v, waves):
    """``prepare_tile``: step sizes, u, dy before the gate, and the slopes of softplus and gate, to shared memory."""
    f, gated, heavy, of_steps = number_functions(v.dtype), v.gated, v.heavy, local_array(QUAD, v.real)
    softplus, sigmoid, zero, one = f.softplus, f.sigmoid, f.zero, f.one
    count, widen, put, inside, parameter_of = waves.count, waves.widen, waves.put, waves.inside, waves.parameter_of

    @device
    def prepare_tile(tile, held, arrays, first, strides, quads, place, t, bias, delta_softplus):
        d, x, e, z = of_steps(), of_steps(), of_steps(), of_steps()
        for p in unroll(count):
            widen(d, held.delta, p, arrays.delta, first.delta, strides.delta)
            widen(x, held.u, p, arrays.u, first.u, strides.u)
            widen(e, held.dy, p, arrays.dy, first.dy, strides.dy)
            if gated:
                widen(z, held.z, p, arrays.z, first.z, strides.z)
            put(tile.inputs, quads.slot, p, x)
            for i in unroll(QUAD, heavy):
                size = d[i] + bias[parameter_of(p, i)]
                slope = one
                if delta_softplus != 0:
                    slope = sigmoid(size)
                    size = softplus(size)
                there = inside(p, i, place.steps - t - quads.step)  # past the end nothing moves
                d[i], x[i] = select(there, size, zero), select(there, slope, zero)
            put(tile.steps, quads.slot, p, d)
            put(tile.slopes, quads.slot, p, x)
            if gated:
                for i in unroll(QUAD, heavy):
                    gate = sigmoid(z[i])
                    x[i] = e[i] * (gate * (one + z[i] * (one - gate)))
                    e[i] = e[i] * (z[i] * gate)
                put(tile.gates, quads.slot, p, x)
            put(tile.dy, quads.slot, p, e)

    return prepare_tile


# --- what a lane has of its states ------------------------------------------------------------------------------------


def rows_of_states(v):
    """``turn`` states to how a lane has them, or back; ``put_row`` and ``get_row`` of what it has."""
    choose, states, half = number_functions(v.dtype).choose, v.states, v.states // 2

    @device
    def turn(values, turned):
        for j in range(half):
            low, high = values[j], values[j + half]
            values[j], values[j + half] = choose(turned, high, low), choose(turned, low, high)

    @device
    def put_row(into, r, values):
        for j in range(states):
            into[r * states + j] = values[j]

    @device
    def get_row(values, of, r):
        for j in range(states):
            values[j] = of[r * states + j]

    return turn, put_row, get_row


def part_beginner(cut, row_at):
    """``begin_part``: sums from zero, and g at the part's end, of the last state and of what the parts after it carry.

    Of many blocks of states only the last stays in registers.
    """
    v, NS, rows, many = cut.v, cut.v.states, cut.rows, cut.v.many
    numbers, none, read_numbers = local_array(NS, v.dtype), v.dtype.type(0), reader(v.real, v.dtype, NS)
    read_rates, pass_parts = rates_of_states(v.dtype, NS, v.zoh), parts_passer(v.dtype, NS, True)
    (turn, put_row, _), (_, save, _), (_, read_constants) = rows_of_states(v), state_carriers(v), parameter_readers(v)

    @device
    def begin_row(own, r, row, lane, place, sizes, memory):
        rate, per_A, g = numbers(), numbers(), numbers()
        read_rates(rate, per_A, memory.A, row.at, row.valid)
        for j in range(NS):
            own.dA[r * NS + j] = none
            own.dB[r * NS + j] = none
            own.dC[r * NS + j] = none
            g[j] = none
        if memory.dlast_state != 0:
            read_numbers(g, memory.dlast_state, place.segment * sizes.dim * sizes.state + row.at, row.valid)
        after = place.parts - 1 - place.part
        last = (place.number + after) * sizes.dim + row.channel
        pass_parts(
            g, rate, memory.part_starts, memory.part_sums, last, -sizes.dim, after, sizes.padded, row.n, row.alive
        )
        turn(rate, lane.turned)
        turn(per_A, lane.turned)
        turn(g, lane.turned)
        put_row(own.rate, r, rate)
        put_row(own.per_A, r, per_A)
        put_row(own.g, r, g)

    @device
    def begin_part(own, lane, place, sizes, memory):
        for block in range(sizes.blocks if many else 1):
            for r in unroll(rows):
                row = row_at(lane, r, block, place, sizes)
                begin_row(own, r, row, lane, place, sizes, memory)
                if many:
                    save(own, r, row, place, sizes, memory)
                else:
                    read_constants(own, r, row, lane, memory)

    return begin_part


def parameter_readers(v):
    """``read_own_rates`` and ``read_constants``: A, and B and C if they are constant, of one row."""
    f, number, NS = number_functions(v.dtype), v.dtype, v.states
    constant_B, constant_C = not v.varying_B, not v.varying_C
    conj, times, shares = f.conj, f.times, f.shares
    numbers, read_numbers = local_array(NS, number), reader(v.real, number, NS)
    read_rates, (turn, put_row, _) = rates_of_states(number, NS, v.zoh), rows_of_states(v)

    @device
    def read_own_rates(own, r, row, lane, memory):
        rate, per_A = numbers(), numbers()
        read_rates(rate, per_A, memory.A, row.at, row.valid)
        turn(rate, lane.turned)
        turn(per_A, lane.turned)
        put_row(own.rate, r, rate)
        put_row(own.per_A, r, per_A)

    @device
    def read_constants(own, r, row, lane, memory):
        b, c = numbers(), numbers()
        if constant_B:
            read_numbers(b, memory.B, row.at, row.valid)
            turn(b, lane.turned)
            put_row(own.B, r, b)
        if constant_C:
            read_numbers(c, memory.C, row.at, row.valid)
            turn(c, lane.turned)
            for j in range(NS):
                own.C[r * NS + j] = times(conj(c[j]), shares)

    return read_own_rates, read_constants


def state_carriers(v):
    """``read_h`` from a checkpoint; ``save`` and ``restore`` what goes from tile to tile of many blocks of states."""
    number, NS, constant_B, constant_C = v.dtype, v.states, not v.varying_B, not v.varying_C
    numbers, (turn, put_row, get_row) = local_array(NS, number), rows_of_states(v)
    read_together, write_together = reader(v.real, number, NS, True, False), writer(v.real, number, NS, True)

    @device
    def read_h(own, r, row, turned, place, sizes, memory, t):
        h = numbers()
        at = ((t >> 4) * sizes.dim + row.channel - place.channel) * sizes.padded + row.n
        read_together(h, memory.checkpoints, at, row.alive)
        turn(h, turned)
        put_row(own.h, r, h)

    @device
    def carried_at(row, place, sizes):
        """Where g is; dA, dB and dC follow, each ``dim * padded`` from the one before."""
        return (place.number * 4 * sizes.dim + row.channel) * sizes.padded + row.n

    @device
    def save_one(of, r, row, carried, at):
        x = numbers()
        get_row(x, of, r)
        write_together(carried, at, x, row.alive)

    @device
    def restore_one(into, r, row, carried, at):
        x = numbers()
        read_together(x, carried, at, row.alive)
        put_row(into, r, x)

    @device
    def save(own, r, row, place, sizes, memory):
        at, apart = carried_at(row, place, sizes), sizes.dim * sizes.padded
        save_one(own.g, r, row, memory.carried, at)
        save_one(own.dA, r, row, memory.carried, at + apart)
        if constant_B:
            save_one(own.dB, r, row, memory.carried, at + 2 * apart)
        if constant_C:
            save_one(own.dC, r, row, memory.carried, at + 3 * apart)

    @device
    def restore(own, r, row, place, sizes, memory):
        at, apart = carried_at(row, place, sizes), sizes.dim * sizes.padded
        restore_one(own.g, r, row, memory.carried, at)
        restore_one(own.dA, r, row, memory.carried, at + apart)
        if constant_B:
            restore_one(own.dB, r, row, memory.carried, at + 2 * apart)
        if constant_C:
            restore_one(own.dC, r, row, memory.carried, at + 3 * apart)

    return read_h, save, restore


def states_reader(cut, row_at):
    """``read_states``: h at the tile's start, of the only block of states."""
    rows, (read_h, _, _) = cut.rows, state_carriers(cut.v)

    @device
    def read_states(own, lane, turned, place, sizes, memory, t):
        for r in unroll(rows):
            read_h(own, r, row_at(lane, r, 0, place, sizes), turned, place, sizes, memory, t)

    return read_states


def block_carriers(cut, row_at):
    """``begin_block`` and ``end_block`` of many blocks of states, in each tile: from memory, and back to it."""
    rows, (read_own_rates, read_constants) = cut.rows, parameter_readers(cut.v)
    read_h, save, restore = state_carriers(cut.v)

    @device
    def begin_block(own, block, lane, place, sizes, memory, t):
        for r in unroll(rows):
            row = row_at(lane, r, block, place, sizes)
            read_h(own, r, row, lane.turned, place, sizes, memory, t)
            read_own_rates(own, r, row, lane, memory)
            read_constants(own, r, row, lane, memory)
            restore(own, r, row, place, sizes, memory)

    @device
    def end_block(own, block, lane, place, sizes, memory):
        for r in unroll(rows):
            save(own, r, row_at(lane, r, block, place, sizes), place, sizes, memory)

    return begin_block, end_block


# --- the walk ---------------------------------------------------------------------------------------------------------


def quad_places(cut):
    """Where a quad of one of a lane's rows is: in ``Tile``, and its states among those of all quads and warps."""
    apart, warps, warp_states, states = cut.apart, cut.warps, cut.warp_states, cut.v.states

    @device
    def in_tile(lane, r, q):
        return (lane.row + r * apart) * TILE + ((q ^ lane.order) << 2)

    @device
    def in_starts(lane, r, q):
        return (q * warps + (lane.thread >> 5)) * warp_states + r * 32 * states + (lane.thread & 31) * states

    return in_tile, in_starts


def state_sweep(cut):
    """``sweep``: from the state at the tile's start to those at the start of each quad, which go to ``starts``."""
    v, NS, rows, zoh, resets, heavy = cut.v, cut.v.states, cut.rows, cut.v.zoh, cut.v.resets, cut.v.heavy
    product, varying_B = number_functions(v.dtype).product, v.varying_B
    numbers, of_steps = local_array(NS, v.dtype), local_array(QUAD, v.real)
    load_quad, load_numbers = shared_reader(v.real, QUAD), shared_reader(v.dtype, NS)
    store_numbers = shared_writer(v.dtype, NS)
    step, (in_tile, in_starts) = steps_of_state(v), quad_places(cut)

    @device
    def sweep(own, starts, tile, matrices, lane):
        h, b, d, x, keep = numbers(), numbers(), of_steps(), of_steps(), of_steps()
        for q in unroll(QUADS, not heavy):
            for r in unroll(rows):
                for j in range(NS):
                    h[j] = own.h[r * NS + j]
                store_numbers(starts, in_starts(lane, r, q), h)
            if q < QUADS - 1:
                if resets:
                    load_quad(keep, tile.keep, q * QUAD)
                for r in unroll(rows):
                    load_quad(d, tile.steps, in_tile(lane, r, q))
                    load_quad(x, tile.inputs, in_tile(lane, r, q))
                    for i in unroll(QUAD, heavy):
                        if varying_B:
                            load_numbers(b, matrices.B, q * QUAD_SIZE + i * STEP_SIZE + lane.matrix)
                        for j in range(NS):
                            k = r * NS + j
                            B = b[j] if varying_B else own.B[k]
                            a, added = step(d[i], x[i] if zoh else d[i] * x[i], own.rate[k], own.per_A[k], B, keep[i])
                            own.h[k] = product(a, own.h[k]) + added

    return sweep


def quad_forward(cut):
    """``forward_quad``: a quad of row r once more from the state at its start.

    Leaves the states and decays of every step in ``quad`` and adds to dC. Gives y of the lane's step.
    """
    v, NS, zoh, heavy = cut.v, cut.v.states, cut.v.zoh, cut.v.heavy
    varying_B, varying_C = v.varying_B, v.varying_C
    f, numbers, of_steps = number_functions(v.dtype), local_array(NS, v.dtype), local_array(QUAD, v.real)
    product, times, overlap, zero = f.product, f.times, f.overlap, f.zero
    load_quad, load_numbers = shared_reader(v.real, QUAD), shared_reader(v.dtype, NS)
    step, (in_tile, in_starts) = steps_of_state(v), quad_places(cut)

    @device
    def forward_quad(quad, own, r, q, starts, tile, matrices, lane):
        h, b, c, of_y = numbers(), numbers(), numbers(), of_steps()
        load_numbers(h, starts, in_starts(lane, r, q))
        load_quad(quad.d, tile.steps, in_tile(lane, r, q))
        load_quad(quad.x, tile.inputs, in_tile(lane, r, q))
        load_quad(quad.e, tile.dy, in_tile(lane, r, q))
        for i in unroll(QUAD, heavy):
            at = q * QUAD_SIZE + i * STEP_SIZE + lane.matrix
            if varying_B:
                load_numbers(b, matrices.B, at)
            if varying_C:
                load_numbers(c, matrices.C, at)
            y = zero
            for j in range(NS):
                k, m = r * NS + j, i * NS + j
                x, B = quad.x[i] if zoh else quad.d[i] * quad.x[i], b[j] if varying_B else own.B[k]
                a, added = step(quad.d[i], x, own.rate[k], own.per_A[k], B, quad.keep[i])
                quad.a[m], quad.before[m], quad.a_h[m] = a, h[j], product(a, h[j])
                h[j] = quad.a_h[m] + added
                y = y + overlap(c[j] if varying_C else own.C[k], h[j])
                if varying_C:
                    quad.dC[m] = quad.dC[m] + times(h[j], quad.e[i])
                else:
                    own.dC[k] = own.dC[k] + times(h[j], quad.e[i])
            of_y[i] = y
        return across(of_y, lane.upper, lane.odd)

    return forward_quad


def quad_backward(cut):
    """``backward_quad``: the same quad back, with g, the gradient of the state after a step and then of that before it.

    Adds to dA and dB. Gives the sums over states for u and for the step size, of the lane's step.
    """
    v, NS, zoh, heavy = cut.v, cut.v.states, cut.v.zoh, cut.v.heavy
    varying_B, varying_C = v.varying_B, v.varying_C
    f, numbers, of_steps = number_functions(v.dtype), local_array(NS, v.dtype), local_array(QUAD, v.real)
    product, times, overlap, conj, zero = f.product, f.times, f.overlap, f.conj, f.zero
    overlap_with_rate, load_numbers, hold = f.overlap_with_rate, shared_reader(v.dtype, NS), hold_gradients(v)

    @device
    def backward_quad(quad, own, r, q, matrices, lane):
        b, c, of_u, of_size = numbers(), numbers(), of_steps(), of_steps()
        for i_ in unroll(QUAD, heavy):
            i = QUAD - 1 - i_
            at = q * QUAD_SIZE + i * STEP_SIZE + lane.matrix
            if varying_B:
                load_numbers(b, matrices.B, at)
            if varying_C:
                load_numbers(c, matrices.C, at)
            u_total, size_total, d = zero, zero, quad.d[i]
            for j in range(NS):
                k, m = r * NS + j, i * NS + j
                B = b[j] if varying_B else own.B[k]
                g = times(c[j] if varying_C else own.C[k], quad.e[i]) + own.g[k]  # forward: y = C h
                of_a = product(conj(quad.a_h[m]), g)  # forward: h = a h + B_bar u
                own.dA[k] = own.dA[k] + times(of_a, d)
                if zoh:
                    of_B, of_A, of_u_, of_size_ = hold(quad, i, m, own.rate[k], own.per_A[k], B, g)
                    u_total, size_total = u_total + of_u_, size_total + of_size_
                    own.dA[k] = own.dA[k] + of_A
                else:
                    size_total = size_total + overlap_with_rate(own.rate[k], of_a)
                    u_total = u_total + overlap(B, g)
                    of_B = times(g, d * quad.x[i])
                if varying_B:
                    quad.dB[m] = quad.dB[m] + of_B
                else:
                    own.dB[k] = own.dB[k] + of_B
                own.g[k] = product(conj(quad.a[m]), g)
            of_u[i], of_size[i] = u_total, size_total
        return across(of_u, lane.upper, lane.odd), across(of_size, lane.upper, lane.odd)

    return backward_quad


def hold_gradients(v):
    """``hold``: what g adds to dB, dA, du and ddelta under zero-order hold, of one state and step."""
    f, resets = number_functions(v.dtype), v.resets
    product, times, overlap, conj, of_rate = f.product, f.times, f.overlap, f.conj, f.of_rate
    decay_and_change, psi = f.decay_and_change, f.psi

    @device
    def hold(quad, i, m, rate, per_A, B, g):
        d, x = quad.d[i], quad.x[i]
        a, change = decay_and_change(d, rate)
        share = product(change, per_A)  # forward: B_bar = share B
        # of the step size: A h + B u is nearly 0 in a steady state, so it comes first
        before = times(quad.before[m], quad.keep[i]) if resets else quad.before[m]
        rise = product(of_rate(rate), before) + times(B, x)
        of_B = times(product(conj(share), g), x)
        of_A = times(psi(times(of_rate(rate), d), a, change), d * d * x)
        of_A = product(conj(product(of_A, B)), g)
        return of_B, of_A, overlap(product(share, B), g), overlap(product(a, rise), g)

    return hold


# --- sums -------------------------------------------------------------------------------------------------------------


def quad_settler(cut):
    """``settle``: the sums over states of a quad. Lane g of a channel has those of step g.

    When all blocks of states are done they become du, ddelta and dz in shared memory, and add to dD and dbias.
    """
    zoh, gated, many, rows, apart = cut.v.zoh, cut.v.gated, cut.v.many, cut.rows, cut.apart
    ln2, (in_tile, _) = cut.v.real.type(math.log(2)), quad_places(cut)

    @device
    def settle_row(tile, before, y, u, step, r, q, lane, totals, block, blocks):
        at = in_tile(lane, r, q) + lane.lane
        if many:
            if block > 0:
                y = y + shared_get(before.y, at)
                u = u + shared_get(before.u, at)
                step = step + shared_get(before.steps, at)
            if block < blocks - 1:
                shared_set(before.y, at, y)
                shared_set(before.u, at, u)
                shared_set(before.steps, at, step)
        if not many or block == blocks - 1:
            size, x = shared_get(tile.steps, at), shared_get(tile.inputs, at)
            dy, skip = shared_get(tile.dy, at), shared_get(tile.skips, lane.row + r * apart)
            ddelta = step if zoh else x * u + ln2 * step
            ddelta = ddelta * shared_get(tile.slopes, at)
            shared_set(tile.slopes, at, ddelta)
            shared_set(tile.steps, at, skip * dy + (u if zoh else size * u))
            if gated:
                shared_set(tile.gates, at, shared_get(tile.gates, at) * (y + skip * x))
            totals.D[r] = totals.D[r] + dy * x
            totals.bias[r] = totals.bias[r] + ddelta

    @device
    def settle(tile, before, sums, q, lane, totals, block, blocks):
        for r in unroll(rows):
            settle_row(tile, before, sums.y[r], sums.u[r], sums.steps[r], r, q, lane, totals, block, blocks)

    return settle


def channel_sums(cut):
    """``sum_channels``: dB and dC of a quad, [step][state] in each lane, over the channels of a warp; ``put_sums``.

    Lanes exchange halves of what they hold until a number of B or of C for each of the lane's states is left: two steps
    of the first half of the states, or of a single state one step. ``put_sums`` takes them to [step][B or C][state].
    """
    v, states, half, size = cut.v, cut.v.states, max(1, cut.v.states // 2), 2 * cut.v.states
    choose, both, varying_B, varying_C = number_functions(v.dtype).choose, v.matrices == 2, v.varying_B, v.varying_C
    of_both, of_step, store = local_array(2 * size, v.dtype), local_array(half, v.dtype), shared_writer(v.dtype, half)
    matrices, warps, warp_states = v.matrices, cut.warps, cut.warp_states

    @device
    def halved(upper, low, high, distance):
        """Of two lanes the upper one keeps the sum of what is high, the other one that of what is low."""
        sent, kept = choose(upper, low, high), choose(upper, high, low)
        return kept + shuffle_xor(sent, distance)

    @device
    def half_of(x, k, second):
        """States are turned, so that the first half is what the other lane sends; a single one is halved by steps."""
        at = k // half * states + k % half
        return x[at] + shuffle_xor(x[at + half], 16) if states > 1 else halved(second, x[k], x[k + 2], 16)

    @device
    def sum_channels(into, of_B, of_C, thread):
        x, second = of_both(), (thread & 16) != 0
        for k in range(size):
            if varying_B:
                x[k] = half_of(of_B, k, second)
            if varying_C:
                x[size + k if both else k] = half_of(of_C, k, second)
        if both:
            for k in range(size):
                x[k] = halved((thread & 2) != 0, x[k], x[size + k], 2)
        for k in range(states):
            into[k] = halved((thread & 4) != 0, x[k], x[k + states], 4)
            if not both:
                into[k] = into[k] + shuffle_xor(into[k], 2)

    @device
    def put_sums(starts, sums, q, lane):
        values, thread = of_step(), lane.thread
        second, odd, matrix = (thread >> 4) & 1, (thread >> 2) & 1, (thread >> 1) & (matrices - 1)
        at = (q * warps + (thread >> 5)) * warp_states
        for k in unroll(states // half):
            for j in range(half):
                values[j] = sums[k * half + j]
            step, n = (2 * odd + k, lane.lane * states + second * half) if states > 1 else (2 * second + odd, lane.lane)
            store(starts, at + (step * matrices + matrix) * BLOCK + n, values)

    return sum_channels, put_sums


def quads_walker(cut):
    """``walk_quads``: the quads of a tile, from the last to the first."""
    v, rows, resets, varying = cut.v, cut.rows, cut.v.resets, cut.v.matrices > 0
    none, size = v.dtype.type(0), QUAD * v.states
    numbers, of_rows = local_array(v.states, v.dtype), local_array(rows, v.real)
    load_quad, forward_quad, backward_quad = shared_reader(v.real, QUAD), quad_forward(cut), quad_backward(cut)
    (sum_channels, put_sums), settle = channel_sums(cut), quad_settler(cut)

    @device
    def walk_quads(own, quad, starts, tile, matrices, before, totals, lane, block, blocks):
        sums, of_matrices = Sums(of_rows(), of_rows(), of_rows()), numbers()
        for back in range(QUADS):
            q = QUADS - 1 - back
            if resets:
                load_quad(quad.keep, tile.keep, q * QUAD)
            for k in range(size):
                quad.dB[k] = none
                quad.dC[k] = none
            for r in unroll(rows):
                sums.y[r] = forward_quad(quad, own, r, q, starts, tile, matrices, lane)
                sums.u[r], sums.steps[r] = backward_quad(quad, own, r, q, matrices, lane)
            if varying:
                sum_channels(of_matrices, quad.dB, quad.dC, lane.thread)
            synchronize_warp()  # the quad's inputs and states are read
            converge()
            settle(tile, before, sums, q, lane, totals, block, blocks)
            if varying:
                put_sums(starts, of_matrices, q, lane)

    return walk_quads


def matrix_sums_writer(cut):
    """``write_matrices``: dB and dC of a tile and block of states, summed over the block's warps."""
    v, threads, warps, warp_states = cut.v, cut.threads, cut.warps, cut.warp_states
    matrices, states_apart, none = v.matrices, LANES * v.states, v.dtype.type(0)
    four_numbers, load_four = local_array(4, v.dtype), shared_reader(v.dtype, 4)
    write_four, pieces = writer(v.real, v.dtype, 4, True), TILE * matrices * 4

    @device
    def write_matrices(matrix_sums, starts, thread, t, steps, block, sizes):
        four, total = four_numbers(), four_numbers()
        for piece0 in range(0, pieces, threads):
            piece = (piece0 + thread) & (pieces - 1)
            step, rest = piece >> (1 + matrices), piece & (4 * matrices - 1)
            matrix, n = rest >> 2, (rest & 3) * 4
            at = (step >> 2) * warps * warp_states + ((step & 3) * matrices + matrix) * BLOCK + n
            for k in range(4):
                total[k] = none
            for warp in range(warps):
                load_four(four, starts, at + warp * warp_states)
                for k in range(4):
                    total[k] = total[k] + four[k]
            at = ((t + step) * matrices + matrix) * sizes.padded + block * states_apart + n
            write_four(matrix_sums, at, total, select((t + step < steps) & (n < states_apart), 4, 0 * thread))

    return write_matrices


def tile_writer(v, waves):
    """``write_tile``: du, ddelta and dz, from where ``settle`` left them."""
    gated, of_steps, count, known, get = v.gated, local_array(QUAD, v.real), waves.count, waves.known, waves.get
    write, at_wave, first_of = waves.write, waves.at, waves.start

    @device
    def write_tile(tile, du, ddelta, dz, stride, quads, place, t):
        d, x, e, first = of_steps(), of_steps(), of_steps(), first_of(quads.channel, quads.step, stride)
        for p in unroll(count):
            get(d, tile.steps, quads.slot, p)
            get(x, tile.slopes, quads.slot, p)
            if gated:
                get(e, tile.gates, quads.slot, p)
            valid = known(p, quads.channel, place.channel_end, place.steps - t - quads.step)
            at = at_wave(first, p, t, stride)
            write(du, at, d, valid)
            write(ddelta, at, x, valid)
            if gated:
                write(dz, at, e, valid)

    return write_tile


def channel_totals(cut, row_at):
    """``begin_totals`` of a part, with D to ``skips``; ``begin_tile`` and ``add_totals`` of a tile."""
    rows, threads, apart, zero = cut.rows, cut.threads, cut.apart, cut.v.real.type(0)
    read_real, _ = reals_of_channels(cut.v.real)

    @device
    def begin_totals(tile, totals, lane, place, sizes, D):
        for r in unroll(rows):
            channel = row_at(lane, r, 0, place, sizes).channel
            shared_set(tile.skips, lane.row + r * apart, read_real(D, channel, place.channel_end))
            for k in range(2):
                shared_set(totals.D, lane.thread + (2 * r + k) * threads, zero)
                shared_set(totals.bias, lane.thread + (2 * r + k) * threads, zero)

    @device
    def begin_tile(of_tile):
        for r in unroll(rows):
            of_tile.D[r] = zero
            of_tile.bias[r] = zero

    @device
    def accumulate(totals, at, x):
        """Rounding loses nothing over many tiles: what it has lost so far lies beside the total (Kahan's sum)."""
        total = shared_get(totals, at)
        x = x - shared_get(totals, at + threads)
        after = total + x
        shared_set(totals, at, after)
        shared_set(totals, at + threads, (after - total) - x)

    @device
    def add_totals(totals, of_tile, thread):
        for r in unroll(rows):
            accumulate(totals.D, thread + 2 * r * threads, of_tile.D[r])
            accumulate(totals.bias, thread + 2 * r * threads, of_tile.bias[r])

    return begin_totals, begin_tile, add_totals


def part_ender(cut, row_at):
    """``end_part``: its sums, and the gradient of the state that it started from."""
    v, NS, rows, threads, many = cut.v, cut.v.states, cut.rows, cut.threads, cut.v.many
    f, varying_B, varying_C = number_functions(v.dtype), v.varying_B, v.varying_C
    conj, times, shares = f.conj, f.times, f.shares
    numbers, write_numbers = local_array(NS, v.dtype), writer(v.real, v.dtype, NS)
    _, write_real = reals_of_channels(v.real)
    (turn, _, get_row), (_, _, restore) = rows_of_states(v), state_carriers(v)

    @device
    def write_row(address, at, of, r, row, lane):
        x = numbers()
        get_row(x, of, r)
        turn(x, lane.turned)
        write_numbers(address, at, x, row.valid)

    @device
    def write_sums(own, r, row, lane, place, sizes, memory):
        at = place.number * sizes.dim * sizes.state + row.at
        write_row(memory.A_sums, at, own.dA, r, row, lane)
        if memory.dinitial_state != 0 and place.part == 0:
            write_row(memory.dinitial_state, place.segment * sizes.dim * sizes.state + row.at, own.g, r, row, lane)
        if not varying_B:
            write_row(memory.B_sums, at, own.dB, r, row, lane)
        if not varying_C:
            for j in range(NS):
                own.dC[r * NS + j] = times(conj(own.dC[r * NS + j]), shares)
            write_row(memory.C_sums, at, own.dC, r, row, lane)

    @device
    def end_part(own, totals, lane, place, sizes, memory):
        for block in range(sizes.blocks if many else 1):
            for r in unroll(rows):
                row = row_at(lane, r, block, place, sizes)
                if many:
                    restore(own, r, row, place, sizes, memory)
                write_sums(own, r, row, lane, place, sizes, memory)
        for r in unroll(rows):
            row = row_at(lane, r, 0, place, sizes)
            one_lane = select((lane.lane == 0) & (row.channel < place.channel_end), 1, 0 * lane.thread)
            of_D = lane_total(shared_get(totals.D, lane.thread + 2 * r * threads))
            of_bias = lane_total(shared_get(totals.bias, lane.thread + 2 * r * threads))
            if memory.D_sums != 0:
                write_real(memory.D_sums, place.number * sizes.dim + row.channel, of_D, one_lane)
            if memory.bias_sums != 0:
                write_real(memory.bias_sums, place.number * sizes.dim + row.channel, of_bias, one_lane)

    return end_part
