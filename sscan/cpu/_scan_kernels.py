"""Kernels of the selective scan: forward, backward with recomputed states, and the carries of a split along time.

A *segment* is a stretch of one sequence that is scanned on its own (sscan/_segments.py). A *block* is 16 channels of
one group, one per vector lane. Time advances in chunks: delta and u of a chunk are converted, transposed to
time-major and put through softplus once; then a few states at a time stay in registers and walk over the chunk.

Names in capitals are scratch memory of one thread. Time-major scratch holds 16 lanes for each step of the chunk,
row-major scratch 16 steps for each row of a tile. ``padded`` is the number of states, rounded up to whole wide
numbers; the states that this adds have A = -1 and B = C = 0. A complex C is kept as 2 conj(C), so that
y = Re(conj(C) h) in both cases. A block with fewer than 16 channels has lanes that read zeros and are never written.
"""

import functools
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from sscan.cpu._parallel import kernel, take
from sscan.cpu._tiles import TILE, View, read_numbers, read_row, start, write_row
from sscan.cpu._vector import (
    conj,
    constant,
    first,
    flush_subnormals,
    fma,
    get,
    imaginary,
    lane_sums,
    lanes_of,
    load,
    load_wide,
    prefetch,
    put,
    real_dot,
    reals,
    repeat,
    restore_environment,
    scratch,
    splat,
    spread,
    states_per_step,
    store,
    store_wide,
    transpose,
    write,
)
from sscan.cpu._vector_math import decay, decay_and_change, psi, rate, sigmoid, softplus

CHUNK = 128  # steps that stay in cache while the states walk over them
CHECKPOINT = 32  # the same when states are kept for the backward: their distance, and the backward's chunk
SQUARE = TILE * TILE
GONE = {4: 120.0, 8: 800.0}  # by bytes of a number: exp of minus this leaves nothing of any state

PADDING_RATE = -1  # of the states that fill up a wide number: with 0 for A an infinite step would make NaN of them

# Merged into the kernel before types are inferred: what is constant in the kernel is constant in the loop.
inlined = numba.njit(inline="always")


class Waves(NamedTuple):
    """What is given for every step of every channel, and for every channel."""

    u: View
    delta: View
    z: View
    D: np.ndarray
    delta_bias: np.ndarray
    delta_softplus: bool


class Block(NamedTuple):
    """Up to 16 channels of a batch row: their group, the first one's number in it and in all, and how many they are."""

    batch: int
    group: int
    row: int
    channel: int
    rows: int


class Chunk(NamedTuple):
    """Scratch for one chunk: delta and delta u (u under zoh) time-major, delta and u row-major, three tiles."""

    DL: np.ndarray
    DU: np.ndarray
    DR: np.ndarray
    UR: np.ndarray
    tiles: np.ndarray


class Matrices(NamedTuple):
    """Scratch for B and C, and for the sums for dB and dC.

    Where they vary B and C are those of one chunk, [state][step], and the sums [step][state][channel]. Where they are
    constant all are [state][channel], of the blocks of a task one after another.
    """

    B: np.ndarray
    C: np.ndarray
    dB: np.ndarray
    dC: np.ndarray


class States(NamedTuple):
    """Scratch of the forward for the states of a block, [state][channel]: they, and A in two forms."""

    H: np.ndarray
    R: np.ndarray
    I: np.ndarray


# --- pieces of several kernels ---------------------------------------------------------------------------------------


@register_jitable
def block_of(number, batch, groups, dim):
    """The block of that number among all of a batch row, group by group."""
    per_group = dim // groups
    blocks = (per_group + TILE - 1) // TILE
    group, row = number // blocks, number % blocks * TILE
    return Block(batch, group, row, group * per_group + row, min(TILE, per_group - row))


@register_jitable
def at(source, block, time):
    """Address of a block's first channel at a step."""
    return start(source, block.batch, block.group, block.row, time)


@register_jitable
def padded_to(state, step):
    return (state + step - 1) // step * step


@register_jitable
def chunk_scratch(chunk, dtype):
    tiles = scratch(3 * SQUARE, dtype)
    tiles[:] = 0
    size = chunk * TILE
    return Chunk(scratch(size, dtype), scratch(size, dtype), scratch(size, dtype), scratch(size, dtype), tiles)


def twice_conj(c):
    """C as the kernels keep it: 2 conj(C) if complex, C if real. Only inside compiled code."""
    raise NotImplementedError


@overload(twice_conj)
def _twice_conj(c):
    if isinstance(c, types.Complex):
        return lambda c: 2 * c.conjugate()
    return lambda c: c


@register_jitable
def nonzero(A):
    """A, or a number too small to matter: zero-order hold divides by it."""
    return A if abs(A) > 1e-20 else A - A + 1e-20


@register_jitable
def load_rates(R, I, offset, A, zoh, block):
    """A as ``decay`` takes it and, for zero-order hold, its reciprocal."""
    for n in range(A.shape[1]):
        for r in range(block.rows):
            value = nonzero(A[block.channel + r, n]) if zoh else A[block.channel + r, n]
            put(R, offset, n, r, rate(value))
            if zoh:
                put(I, offset, n, r, 1 / value)


@register_jitable
def load_constant(S, offset, constants, block, is_C):
    """A constant B or C of one block."""
    for n in range(constants.shape[1]):
        for r in range(block.rows):
            value = constants[block.channel + r, n]
            put(S, offset, n, r, twice_conj(value) if is_C else value)


@register_jitable
def load_constants(matrices, offset, B_constant, C_constant, B_varies, C_varies, block):
    """B and C of one block, those that are constant."""
    if not B_varies:
        load_constant(matrices.B, offset, B_constant, block, False)
    if not C_varies:
        load_constant(matrices.C, offset, C_constant, block, True)


@register_jitable
def load_varying(S, chunk, source, block, state, time, steps, is_C):
    """S[chunk n + t] = B or C of one chunk in the accumulation dtype."""
    flat = reals(S)
    ratio = flat.size // S.size
    for n in range(state):
        here = start(source, block.batch, block.group, n, ratio * time)
        read_numbers(flat, ratio * chunk * n, source, here, ratio * steps)
    if is_C:
        for k in range(S.size):
            S[k] = twice_conj(S[k])


@register_jitable
def load_matrices(matrices, chunk, B, C, B_varies, C_varies, block, state, time, steps):
    """B and C of one chunk, those that vary."""
    if B_varies:
        load_varying(matrices.B, chunk, B, block, state, time, steps, False)
    if C_varies:
        load_varying(matrices.C, chunk, C, block, state, time, steps, True)


@register_jitable
def move_states(S, offset, states, row, block, into_scratch):
    """Copy a block's part of one row of a (rows, dim, state) array into scratch, or back."""
    for r in range(block.rows):
        for n in range(states.shape[2]):
            if into_scratch:
                put(S, offset, n, r, states[row, block.channel + r, n])
            else:
                states[row, block.channel + r, n] = get(S, offset, n, r)


@register_jitable
def load_delta(chunk, waves, zoh, block, time, steps, ahead, span):
    """Fill a chunk's scratch, and ask for the chunk that is ``ahead`` steps further on.

    Of a row ``span`` steps are read before the next row: all that there are, unless a chunk is short and many blocks
    take turns at it. Functions of elements are taken of several rows at a time, whose latencies overlap.
    """
    u, delta, DR, UR, tile = waves.u, waves.delta, chunk.DR, chunk.UR, chunk.tiles
    zero = splat(tile.dtype.type(0))
    at_u, at_delta = at(u, block, time), at(delta, block, time)
    for t0 in range(0, steps, span):
        for r in range(block.rows):
            bias = splat(waves.delta_bias[block.channel + r])
            for t in range(t0, min(t0 + span, steps), TILE):
                here = at_delta + r * delta.row + t * delta.item
                prefetch(here + ahead * delta.item)
                store(DR, TILE * (t + r), read_row(zero, delta, here, min(TILE, steps - t)) + bias)
                here = at_u + r * u.row + t * u.item
                prefetch(here + ahead * u.item)
                store(UR, TILE * (t + r), read_row(zero, u, here, min(TILE, steps - t)))
    for t in range(0, steps, TILE):
        for r in range(block.rows, TILE):
            store(DR, TILE * (t + r), zero)
            store(UR, TILE * (t + r), zero)
        for k in range(0, SQUARE, TILE * states_per_step(tile)):
            dl, x = load_wide(DR, TILE * t + k), load_wide(UR, TILE * t + k)
            if waves.delta_softplus:
                dl = softplus(dl)
            store_wide(DR, TILE * t + k, dl)
            store_wide(tile, k, x if zoh else dl * x)
        transpose(DR, TILE * t, TILE, chunk.DL, TILE * t, TILE)
        transpose(tile, 0, TILE, chunk.DU, TILE * t, TILE)


# --- forward ---------------------------------------------------------------------------------------------------------


@register_jitable
def forward_scratch(padded, chunk, number, B_varies, C_varies):
    """Scratch for the states of a block, and for B and C."""
    size = padded * TILE
    own = States(scratch(size, number), scratch(size, number), scratch(size, number))
    B = scratch(padded * (chunk if B_varies else TILE), number)
    C = scratch(padded * (chunk if C_varies else TILE), number)
    B[:] = 0
    C[:] = 0
    own.R[:] = PADDING_RATE
    own.I[:] = 0
    return own, Matrices(B, C, B[:0], C[:0])


@register_jitable
def begin_segment(own, A, zoh, initial_state, initial, block):
    """A and the initial state of a block."""
    load_rates(own.R, own.I, 0, A, zoh, block)
    own.H[:] = 0
    if initial >= 0:
        move_states(own.H, 0, initial_state, initial, block, True)


@register_jitable
def keep_states(checkpoints, number, H):
    """Copy the states of a block to a checkpoint."""
    for n in range(0, H.size, TILE * states_per_step(H)):
        store_wide(checkpoints, number * H.size + n, load_wide(H, n))


@inlined
def walk(own, matrices, inputs, Y, padded, chunk, steps, zoh, B_varies, C_varies):
    """h = a h + B_bar u, y = C h over one chunk, a few states at a time; Y sums over the states."""
    # out of the named tuples first: each time an array is taken from one, its references are counted
    (H, R, I), BS, CS, DL, DU = own, matrices.B, matrices.C, inputs.DL, inputs.DU
    zero = splat(Y.dtype.type(0))
    for n in range(0, padded, states_per_step(H)):
        h, r, i = load_wide(H, n * TILE), load_wide(R, n * TILE), load_wide(I, n * TILE)
        for t in range(steps):
            dl, du = repeat(load(DL, t * TILE), h), repeat(load(DU, t * TILE), h)
            b = spread(BS, n * chunk + t, chunk) if B_varies else load_wide(BS, n * TILE)
            c = spread(CS, n * chunk + t, chunk) if C_varies else load_wide(CS, n * TILE)
            if zoh:
                a, change = decay_and_change(dl, r)
                h = fma(a, h, change * i * (b * du))
            else:
                h = fma(decay(dl, r), h, b * du)
            store(Y, t * TILE, real_dot(c, h, load(Y, t * TILE) if n > 0 else zero))
        store_wide(H, n * TILE, h)


@register_jitable
def store_output(Y, chunk, waves, y, block, time, steps, ahead):
    """Row-major end of a chunk: add D u, multiply by the gate, round and write. Takes the place of delta and u."""
    z, tile, result, gate = waves.z, chunk.tiles, chunk.UR, chunk.DR
    zero = splat(tile.dtype.type(0))
    at_y, at_z = at(y, block, time), at(z, block, time)
    if z.address != 0:
        for r in range(block.rows):
            for t in range(0, steps, TILE):
                here = at_z + r * z.row + t * z.item
                prefetch(here + ahead * z.item)
                store(gate, TILE * (t + r), read_row(zero, z, here, min(TILE, steps - t)))
    for t in range(0, steps, TILE):
        transpose(Y, TILE * t, TILE, tile, 0, TILE)
        for r in range(block.rows):
            skip, here = splat(waves.D[block.channel + r]), TILE * (t + r)
            store(result, here, fma(skip, load(result, here), load(tile, TILE * r)))
        if z.address != 0:
            for k in range(TILE * t, TILE * t + SQUARE, TILE * states_per_step(tile)):
                v = load_wide(gate, k)
                store_wide(result, k, load_wide(result, k) * (v * sigmoid(v)))
    for r in range(block.rows):
        for t in range(0, steps, TILE):
            here = at_y + r * y.row + t * y.item
            prefetch(here + ahead * y.item)
            write_row(y, here, min(TILE, steps - t), load(result, TILE * (t + r)))


@functools.cache
def forward_kernel(zoh: bool, B_varies: bool, C_varies: bool) -> Any:
    """The forward kernel of one discretisation rule and one form of B and C."""

    @kernel
    def forward(
        counter, tasks, chunk, groups, segments, waves, B, C, y, A, B_constant, C_constant, initial_state, last_state,
        checkpoints,
    ):  # fmt: skip
        """One task: one block of one segment.

        ``checkpoints`` is empty, or takes the states at the start of each chunk. Without y only last_state is computed.
        """
        (dim, state), blocks = A.shape, tasks // len(segments)
        padded = padded_to(state, states_per_step(A))
        inputs, Y = chunk_scratch(chunk, waves.D.dtype), scratch(chunk * TILE, waves.D.dtype)
        own, matrices = forward_scratch(padded, chunk, A.dtype, B_varies, C_varies)
        environment = flush_subnormals()
        while True:
            task = take(counter)
            if task >= tasks:
                break
            batch, begin, length, initial, final, first_chunk = segments[task // blocks]
            block = block_of(task % blocks, batch, groups, dim)
            begin_segment(own, A, zoh, initial_state, initial, block)
            load_constants(matrices, 0, B_constant, C_constant, B_varies, C_varies, block)
            for t0 in range(0, length, chunk):
                steps, time = min(chunk, length - t0), begin + t0
                if checkpoints.size > 0:
                    keep_states(checkpoints, (first_chunk + t0 // chunk) * blocks + task % blocks, own.H)
                load_delta(inputs, waves, zoh, block, time, steps, chunk, chunk)
                load_matrices(matrices, chunk, B, C, B_varies, C_varies, block, state, time, steps)
                walk(own, matrices, inputs, Y, padded, chunk, steps, zoh, B_varies, C_varies)
                if y.address != 0:
                    store_output(Y, inputs, waves, y, block, time, steps, chunk)
            if final >= 0:
                move_states(own.H, 0, last_state, final, block, False)
        restore_environment(environment)

    return forward


# --- backward --------------------------------------------------------------------------------------------------------


class Adjoint(NamedTuple):
    """Scratch of the backward for one chunk of one block.

    Time-major: the cotangent, the output before D and gate, the sums over the states for du and ddelta; the cotangent
    row-major; for the few states in registers, by step: the state before, the decay, and zero-order hold's factor of B.
    """

    GY: np.ndarray
    YT: np.ndarray
    SU: np.ndarray
    SD: np.ndarray
    GR: np.ndarray
    HS: np.ndarray
    AS: np.ndarray
    WS: np.ndarray


class Channels(NamedTuple):
    """Scratch of the backward for the blocks of a task, one after another: A in three forms, carry, sum for dA."""

    R: np.ndarray
    I: np.ndarray
    AA: np.ndarray
    CARRY: np.ndarray
    GA: np.ndarray


@register_jitable
def adjoint_scratch(step, dtype, number):
    size, wide = CHECKPOINT * TILE, step * CHECKPOINT * TILE
    return Adjoint(
        scratch(size, dtype), scratch(size, dtype), scratch(size, dtype), scratch(size, dtype), scratch(size, dtype),
        scratch(wide + step * TILE, number), scratch(wide, number), scratch(wide, number),
    )  # fmt: skip


@register_jitable
def backward_scratch(padded, most, number, B_varies, C_varies):
    """Scratch for up to ``most`` blocks of a task, and for B and C and their gradients."""
    size, every = padded * TILE, most * padded * TILE
    own = Channels(
        scratch(every, number), scratch(every, number), scratch(every, number), scratch(every, number),
        scratch(every, number),
    )  # fmt: skip
    of_B = (padded * CHECKPOINT, CHECKPOINT * size) if B_varies else (every, every)
    of_C = (padded * CHECKPOINT, CHECKPOINT * size) if C_varies else (every, every)
    matrices = Matrices(
        scratch(of_B[0], number), scratch(of_C[0], number), scratch(of_B[1], number), scratch(of_C[1], number)
    )
    own.R[:] = PADDING_RATE
    own.I[:] = 0
    own.AA[:] = 0
    return own, matrices


@register_jitable
def begin_task(own, matrices, D_SUM, BIAS_SUM):
    """What a task sums begins with zero, and what no block fills stays so."""
    matrices.B[:] = 0
    matrices.C[:] = 0
    matrices.dB[:] = 0
    matrices.dC[:] = 0
    own.GA[:] = 0
    D_SUM[:] = 0
    BIAS_SUM[:] = 0


@register_jitable
def load_cotangent(GY, GR, tile, waves, dy, block, time, steps):
    """dy of one chunk and block, through the gate if there is one, time-major and row-major."""
    zero, z = splat(tile.dtype.type(0)), waves.z
    at_dy, at_z = at(dy, block, time), at(z, block, time)
    for t in range(0, steps, TILE):
        count = min(TILE, steps - t)
        for r in range(block.rows):
            here = at_dy + r * dy.row + t * dy.item
            prefetch(here - CHECKPOINT * dy.item)
            store(GR, TILE * (t + r), read_row(zero, dy, here, count))
        for r in range(block.rows, TILE):
            store(GR, TILE * (t + r), zero)
        if z.address != 0:
            for r in range(block.rows):
                here = at_z + r * z.row + t * z.item
                prefetch(here - CHECKPOINT * z.item)
                store(tile, TILE * r, read_row(zero, z, here, count))
            for k in range(0, SQUARE, TILE * states_per_step(tile)):
                gate = load_wide(tile, k)
                store_wide(GR, TILE * t + k, load_wide(GR, TILE * t + k) * (gate * sigmoid(gate)))
        transpose(GR, TILE * t, TILE, GY, TILE * t, TILE)


@inlined
def recompute(h, n, own, here, matrices, inputs, adjoint, steps, zoh, B_varies, C_varies):
    """The states of one chunk again from its checkpoint h, and what the way back needs of every step."""
    BS, CS, DL, DU = matrices.B, matrices.C, inputs.DL, inputs.DU
    YT, HS, AS, WS = adjoint.YT, adjoint.HS, adjoint.AS, adjoint.WS
    r, i, zero = load_wide(own.R, here), load_wide(own.I, here), splat(YT.dtype.type(0))
    size = states_per_step(HS) * TILE
    store_wide(HS, 0, h)
    for t in range(steps):
        dl, du = repeat(load(DL, t * TILE), h), repeat(load(DU, t * TILE), h)
        b = spread(BS, n * CHECKPOINT + t, CHECKPOINT) if B_varies else load_wide(BS, here)
        c = spread(CS, n * CHECKPOINT + t, CHECKPOINT) if C_varies else load_wide(CS, here)
        if zoh:
            a, change = decay_and_change(dl, r)
            store_wide(WS, t * size, change * i)
            h = fma(a, h, change * i * (b * du))
        else:
            a = decay(dl, r)
            h = fma(a, h, b * du)
        store_wide(AS, t * size, a)
        store_wide(HS, (t + 1) * size, h)
        store(YT, t * TILE, real_dot(c, h, load(YT, t * TILE) if n > 0 else zero))


@inlined
def walk_back(n, size, own, here, matrices, inputs, adjoint, steps, zoh, B_varies, C_varies):
    """The adjoint recurrence G_t = C_t dy_t + a_{t+1} G_{t+1} over one chunk, and its part in every gradient."""
    (BS, CS, GB, GC), DL, DU = matrices, inputs.DL, inputs.DU
    GY, SU, SD, HS, AS, WS = adjoint.GY, adjoint.SU, adjoint.SD, adjoint.HS, adjoint.AS, adjoint.WS
    zero, wide = splat(SU.dtype.type(0)), states_per_step(HS) * TILE
    carry, ga, aa = load_wide(own.CARRY, here), load_wide(own.GA, here), load_wide(own.AA, here)
    for back in range(steps):
        t = steps - 1 - back
        dl, gy = repeat(load(DL, t * TILE), carry), repeat(load(GY, t * TILE), carry)
        du = repeat(load(DU, t * TILE), carry)
        at_b = t * size + n * TILE if B_varies else here
        at_c = t * size + n * TILE if C_varies else here
        b = spread(BS, n * CHECKPOINT + t, CHECKPOINT) if B_varies else load_wide(BS, here)
        c = spread(CS, n * CHECKPOINT + t, CHECKPOINT) if C_varies else load_wide(CS, here)
        # forward: y = C h
        g = fma(c, gy, carry)
        store_wide(GC, at_c, fma(load_wide(HS, (t + 1) * wide), gy, load_wide(GC, at_c)))
        # forward: h = a h + B_bar u
        a = load_wide(AS, t * wide)
        carry = g * conj(a)
        of_a = carry * conj(load_wide(HS, t * wide))  # conj(a h) G, the product and not h less its input
        sum_u = load(SU, t * TILE) if n > 0 else zero
        sum_d = real_dot(aa, of_a, load(SD, t * TILE) if n > 0 else zero)
        if zoh:
            w, bu = load_wide(WS, t * wide), b * du
            store_wide(GB, at_b, fma(g * conj(w), du, load_wide(GB, at_b)))
            store(SU, t * TILE, real_dot(b * w, g, sum_u))
            store(SD, t * TILE, real_dot(bu, carry, sum_d))
            ga = fma(of_a + g * conj(bu * psi(dl * aa, a, w * aa)) * dl, dl, ga)
        else:
            store_wide(GB, at_b, fma(g, du, load_wide(GB, at_b)))
            store(SU, t * TILE, real_dot(b, g, sum_u))
            store(SD, t * TILE, sum_d)
            ga = fma(of_a, dl, ga)
    store_wide(own.CARRY, here, carry)
    store_wide(own.GA, here, ga)


@register_jitable
def store_gradients(adjoint, chunk, waves, zoh, du, ddelta, D_SUM, BIAS_SUM, sums, block, time, steps):
    """Row-major end of a chunk: du and ddelta from the sums over the states; adds to the sums for dD and dbias."""
    delta, tile = waves.delta, chunk.tiles
    zero = splat(tile.dtype.type(0))
    at_delta, at_du, at_ddelta = at(delta, block, time), at(du, block, time), at(ddelta, block, time)
    for t in range(0, steps, TILE):
        count = min(TILE, steps - t)
        transpose(adjoint.SU, TILE * t, TILE, tile, 0, TILE)
        transpose(adjoint.SD, TILE * t, TILE, tile, SQUARE, TILE)
        for r in range(block.rows):
            before = read_row(zero, delta, at_delta + r * delta.row + t * delta.item, count)
            store(tile, 2 * SQUARE + TILE * r, before + splat(waves.delta_bias[block.channel + r]))
        for k in range(0, SQUARE, TILE * states_per_step(tile)):
            sum_u, g = load_wide(tile, k), load_wide(tile, SQUARE + k)
            if not zoh:
                g = fma(sum_u, load_wide(chunk.UR, TILE * t + k), g)
                sum_u = sum_u * load_wide(chunk.DR, TILE * t + k)
            if waves.delta_softplus:
                g = g * sigmoid(load_wide(tile, 2 * SQUARE + k))
            store_wide(tile, k, sum_u)
            store_wide(tile, SQUARE + k, g)
        for r in range(block.rows):
            gy, x = load(adjoint.GR, TILE * (t + r)), load(chunk.UR, TILE * (t + r))
            g = first(load(tile, SQUARE + TILE * r), count)
            skip = splat(waves.D[block.channel + r])
            write_row(du, at_du + r * du.row + t * du.item, count, fma(skip, gy, load(tile, TILE * r)))
            write_row(ddelta, at_ddelta + r * ddelta.row + t * ddelta.item, count, g)
            store(D_SUM, sums + TILE * r, fma(gy, x, load(D_SUM, sums + TILE * r)))
            store(BIAS_SUM, sums + TILE * r, g + load(BIAS_SUM, sums + TILE * r))


@register_jitable
def store_gate_gradient(YT, chunk, waves, dy, dz, block, time, steps):
    """dz of one chunk: dy times the output before the gate times the slope of silu."""
    z, tile = waves.z, chunk.tiles
    zero = splat(tile.dtype.type(0))
    at_dy, at_z, at_dz = at(dy, block, time), at(z, block, time), at(dz, block, time)
    for t in range(0, steps, TILE):
        count = min(TILE, steps - t)
        transpose(YT, TILE * t, TILE, tile, 0, TILE)
        for r in range(block.rows):
            skip = splat(waves.D[block.channel + r])
            store(tile, TILE * r, fma(skip, load(chunk.UR, TILE * (t + r)), load(tile, TILE * r)))
            store(tile, SQUARE + TILE * r, read_row(zero, z, at_z + r * z.row + t * z.item, count))
            store(tile, 2 * SQUARE + TILE * r, read_row(zero, dy, at_dy + r * dy.row + t * dy.item, count))
        for k in range(0, SQUARE, TILE * states_per_step(tile)):
            gate = load_wide(tile, SQUARE + k)
            s, one = sigmoid(gate), constant(gate, 1.0)
            store_wide(tile, k, load_wide(tile, k) * load_wide(tile, 2 * SQUARE + k) * (s * fma(gate, one - s, one)))
        for r in range(block.rows):
            write_row(dz, at_dz + r * dz.row + t * dz.item, count, load(tile, TILE * r))


@register_jitable
def slice_offset(sums, part):
    """Bytes from the first slice of dB or dC to this one."""
    return sums[2] + (part - 1) * sums[3] if part > 0 else 0


@register_jitable
def store_lane_sums(S, size, state, target, offset, plane, block, time, steps):
    """Sum the lanes of S for each state and step of a chunk into one or two (batch, groups, state, length) planes."""
    flat = reals(S)
    stride = size * (flat.size // S.size)
    for n in range(state):
        here = start(target, block.batch, block.group, n, time) + offset
        for t in range(0, steps, TILE):
            count, lanes, to = min(TILE, steps - t), t * stride + lanes_of(S, n), here + t * target.item
            write(to, count, target.item, target.storage, lane_sums(flat, lanes, stride))
            if imaginary(S) > 0:
                write(to + plane, count, target.item, target.storage, lane_sums(flat, lanes + imaginary(S), stride))


@register_jitable
def load_blocks(own, matrices, A, B_constant, C_constant, zoh, B_varies, C_varies, groups, block0, block1, size):
    """What a task's blocks need of A, and of B and C where they are constant."""
    for number in range(block0, block1):
        block, offset = block_of(number, 0, groups, A.shape[0]), (number - block0) * size
        load_rates(own.R, own.I, offset, A, zoh, block)
        for n in range(A.shape[1]):
            for r in range(block.rows):
                put(own.AA, offset, n, r, A[block.channel + r, n])
        load_constants(matrices, offset, B_constant, C_constant, B_varies, C_varies, block)


@register_jitable
def move_blocks(S, size, states, row, groups, block0, block1, into_scratch):
    """``move_states`` for the blocks of a task."""
    for number in range(block0, block1):
        block = block_of(number, 0, groups, states.shape[1])
        move_states(S, (number - block0) * size, states, row, block, into_scratch)


@register_jitable
def store_channel_sums(S, sums, row, groups, block0, block1):
    """sums[row, channel] = the sum of the channel's 16 lanes."""
    for number in range(block0, block1):
        block = block_of(number, 0, groups, sums.shape[1])
        total = lane_sums(S, (number - block0) * SQUARE, TILE)
        store(S, (number - block0) * SQUARE, total)
        for r in range(block.rows):
            sums[row, block.channel + r] = S[(number - block0) * SQUARE + r]


@register_jitable
def store_matrix_gradients(matrices, dB, dC, B_varies, C_varies, part, block, size, state, time, steps):
    """dB and dC of one chunk, those of what varies, to a slice of their sums."""
    if B_varies:
        store_lane_sums(matrices.dB, size, state, dB[0], slice_offset(dB, part), dB[1], block, time, steps)
    if C_varies:
        store_lane_sums(matrices.dC, size, state, dC[0], slice_offset(dC, part), dC[1], block, time, steps)


@functools.cache
def backward_kernel(zoh: bool, B_varies: bool, C_varies: bool) -> Any:
    """The backward kernel of one discretisation rule and one form of B and C."""

    @kernel
    def backward(
        counter, tasks, groups, bundles, slices, segments, waves, B, C, dy, A, B_constant, C_constant, checkpoints,
        dlast_state, du, ddelta, dz, dB, dC, dA, dB_constant, dC_constant, dD, dbias, dinitial_state,
    ):  # fmt: skip
        """One task: some blocks of one group (a slice) in some segments (a bundle).

        The task sums dB and dC over its channels and dA, dD, dbias over its segments, always in the same order, and
        is the only one to write that part of the partial sums: slices of dB and dC (a view of the first one, the stride
        of planes, the offset of the second slice and the stride of those behind it), bundles of the others.
        """
        (dim, state), step, T = A.shape, states_per_step(A), CHECKPOINT
        blocks = (dim // groups + TILE - 1) // TILE
        padded, most = padded_to(state, step), (blocks + slices - 1) // slices
        size = padded * TILE
        inputs, adjoint = chunk_scratch(T, waves.D.dtype), adjoint_scratch(step, waves.D.dtype, A.dtype)
        own, matrices = backward_scratch(padded, most, A.dtype, B_varies, C_varies)
        D_SUM, BIAS_SUM = scratch(most * SQUARE, waves.D.dtype), scratch(most * SQUARE, waves.D.dtype)
        environment = flush_subnormals()
        while True:
            task = take(counter)
            if task >= tasks:
                break
            bundle, group, part = task // (groups * slices), task // slices % groups, task % slices
            block0, block1 = group * blocks + blocks * part // slices, group * blocks + blocks * (part + 1) // slices
            begin_task(own, matrices, D_SUM, BIAS_SUM)
            load_blocks(own, matrices, A, B_constant, C_constant, zoh, B_varies, C_varies, groups, block0, block1, size)
            for segment in range(len(segments) * bundle // bundles, len(segments) * (bundle + 1) // bundles):
                batch, begin, length, initial, final, first_chunk = segments[segment]
                own.CARRY[:] = 0
                if final >= 0:
                    move_blocks(own.CARRY, size, dlast_state, final, groups, block0, block1, True)
                for t0 in range((length - 1) // T * T, -1, -T):
                    steps, time, block = min(T, length - t0), begin + t0, block_of(block0, batch, groups, dim)
                    load_matrices(matrices, T, B, C, B_varies, C_varies, block, state, time, steps)
                    if B_varies:
                        matrices.dB[:] = 0
                    if C_varies:
                        matrices.dC[:] = 0
                    for number in range(block0, block1):
                        block, offset = block_of(number, batch, groups, dim), (number - block0) * size
                        kept = ((first_chunk + t0 // T) * groups * blocks + number) * size
                        load_delta(inputs, waves, zoh, block, time, steps, -T, TILE)
                        load_cotangent(adjoint.GY, adjoint.GR, inputs.tiles, waves, dy, block, time, steps)
                        for n in range(0, padded, step):
                            here, h = offset + n * TILE, load_wide(checkpoints, kept + n * TILE)
                            recompute(h, n, own, here, matrices, inputs, adjoint, steps, zoh, B_varies, C_varies)
                            walk_back(n, size, own, here, matrices, inputs, adjoint, steps, zoh, B_varies, C_varies)
                        sums = (number - block0) * SQUARE
                        store_gradients(
                            adjoint, inputs, waves, zoh, du, ddelta, D_SUM, BIAS_SUM, sums, block, time, steps
                        )
                        if waves.z.address != 0:
                            store_gate_gradient(adjoint.YT, inputs, waves, dy, dz, block, time, steps)
                    block = block_of(block0, batch, groups, dim)
                    store_matrix_gradients(matrices, dB, dC, B_varies, C_varies, part, block, size, state, time, steps)
                if initial >= 0:
                    move_blocks(own.CARRY, size, dinitial_state, initial, groups, block0, block1, False)
            move_blocks(own.GA, size, dA, bundle, groups, block0, block1, False)
            if not B_varies:
                move_blocks(matrices.dB, size, dB_constant, bundle, groups, block0, block1, False)
            if not C_varies:
                move_blocks(matrices.dC, size, dC_constant, bundle, groups, block0, block1, False)
            store_channel_sums(D_SUM, dD, bundle, groups, block0, block1)
            store_channel_sums(BIAS_SUM, dbias, bundle, groups, block0, block1)
        restore_environment(environment)

    return backward


# --- carries of a split along time -----------------------------------------------------------------------------------


@kernel
def reach(counter, tasks, groups, segments, waves, A, gone, from_end, sums, walked):
    """How far a state is felt: one task walks a block of a segment from its end (or start) until every state is gone.

    Writes the steps walked, and the sum of delta over them; infinity if the walk ended before the segment did. Only
    softplus promises that delta is positive, so that what is gone stays gone; without it the walk is over all of the
    segment.
    """
    delta, dtype = waves.delta, waves.D.dtype
    blocks = tasks // len(segments)
    S, slowest = scratch(SQUARE, dtype), np.empty(TILE, dtype)
    zero = splat(dtype.type(0))
    environment = flush_subnormals()
    while True:
        task = take(counter)
        if task >= tasks:
            break
        segment = task // blocks
        batch, begin, length = segments[segment, 0], segments[segment, 1], segments[segment, 2]
        block = block_of(task % blocks, batch, groups, A.shape[0])
        S[:] = 0
        for r in range(block.rows):
            slowest[r] = -A[block.channel + r].real.max()
        done, felt = 0, True
        while done < length and felt:
            steps = min(CHUNK, length - done)
            here = at(delta, block, begin + (length - done - steps if from_end else done))
            felt = not waves.delta_softplus
            for r in range(block.rows):
                total = load(S, TILE * r)
                for t in range(0, steps, TILE):
                    count = min(TILE, steps - t)
                    dl = read_row(zero, delta, here + r * delta.row + t * delta.item, count)
                    dl = dl + splat(waves.delta_bias[block.channel + r])
                    total = total + first(softplus(dl) if waves.delta_softplus else dl, count)
                store(S, TILE * r, total)
                felt = felt or not S[TILE * r : TILE * r + TILE].sum() * slowest[r] > gone
            done += steps
        walked[segment, task % blocks] = done
        for r in range(block.rows):
            sums[segment, block.channel + r] = S[TILE * r : TILE * r + TILE].sum() if done == length else np.inf
    restore_environment(environment)


@functools.cache
def carry_kernel(C_varies: bool) -> Any:
    """The kernel for what a segment hands to the one before it in the backward."""

    @kernel
    def carry_back(counter, tasks, groups, segments, waves, C, dy, A, C_constant, dinitial_state):
        """One task: the gradient of the initial state of one block of one segment, from dy alone."""
        (dim, state), step, dtype = A.shape, states_per_step(A), waves.D.dtype
        padded, blocks = padded_to(state, step), tasks // len(segments)
        chunk, GY, GR = chunk_scratch(CHUNK, dtype), scratch(CHUNK * TILE, dtype), scratch(CHUNK * TILE, dtype)
        CARRY, R = scratch(padded * TILE, A.dtype), scratch(padded * TILE, A.dtype)
        CS = scratch(padded * (CHUNK if C_varies else TILE), A.dtype)
        R[:] = 0
        CS[:] = 0
        environment = flush_subnormals()
        while True:
            task = take(counter)
            if task >= tasks:
                break
            segment = task // blocks
            batch, begin, length = segments[segment, 0], segments[segment, 1], segments[segment, 2]
            block = block_of(task % blocks, batch, groups, dim)
            load_rates(R, R, 0, A, False, block)
            if not C_varies:
                load_constant(CS, 0, C_constant, block, True)
            CARRY[:] = 0
            for t0 in range((length - 1) // CHUNK * CHUNK, -1, -CHUNK):
                steps, time = min(CHUNK, length - t0), begin + t0
                load_delta(chunk, waves, False, block, time, steps, -CHUNK, CHUNK)
                load_cotangent(GY, GR, chunk.tiles, waves, dy, block, time, steps)
                if C_varies:
                    load_varying(CS, CHUNK, C, block, state, time, steps, True)
                for n in range(0, padded, step):
                    carry, r = load_wide(CARRY, n * TILE), load_wide(R, n * TILE)
                    for back in range(steps):
                        t = steps - 1 - back
                        c = spread(CS, n * CHUNK + t, CHUNK) if C_varies else load_wide(CS, n * TILE)
                        a = decay(repeat(load(chunk.DL, t * TILE), carry), r)
                        carry = fma(c, repeat(load(GY, t * TILE), carry), carry) * conj(a)
                    store_wide(CARRY, n * TILE, carry)
            move_states(CARRY, 0, dinitial_state, segment, block, False)
        restore_environment(environment)

    return carry_back
