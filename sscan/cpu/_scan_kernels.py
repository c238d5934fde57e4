"""Kernels of the selective scan: forward, backward with recomputed states, and carries of a split along time.

A *segment* is a stretch of one sequence that is scanned on its own (sscan/_segments.py). A *block* is 16 channels of one
group, one per vector lane. Time advances in chunks: delta and u of a chunk are converted, transposed to time-major and put
through softplus once; then a few states at a time stay in registers and walk over the chunk.

Names in capitals are scratch memory of one task. Time-major scratch holds 16 lanes for each step of the chunk, row-major
scratch 16 steps for each row of a tile. ``padded`` is the number of states, rounded up to whole wide numbers; the states
that this adds have A = B = C = 0. A complex C is kept as 2 conj(C), so that y = Re(conj(C) h) in both cases.
"""

import functools
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from sscan.cpu._parallel import kernel, take
from sscan.cpu._tiles import TILE, read_numbers, read_row, start, write_row
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

CHUNK = 64  # steps that stay in cache while the states walk over them
CHECKPOINT = 32  # the same when states are kept for the backward: their distance, and the backward's chunk

# --- pieces of both kernels ------------------------------------------------------------------------------------------


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
def load_parameters(R, I, BS, CS, at, A, B_constant, C_constant, zoh, B_varies, C_varies, d0, rows):
    """Scaled A, 1 / A (zoh only) and constant B and C of one block, into scratch at offset ``at``; other lanes are kept."""
    for n in range(A.shape[1]):
        for r in range(rows):
            if zoh:
                put(R, at, n, r, rate(nonzero(A[d0 + r, n])))
                put(I, at, n, r, 1 / nonzero(A[d0 + r, n]))
            else:
                put(R, at, n, r, rate(A[d0 + r, n]))
            if not B_varies:
                put(BS, at, n, r, B_constant[d0 + r, n])
            if not C_varies:
                put(CS, at, n, r, twice_conj(C_constant[d0 + r, n]))


@register_jitable
def load_numbers(numbers, chunk, source, batch, group, state, time, steps):
    """numbers[chunk n + t] = B or C of one chunk in the accumulation dtype."""
    flat = reals(numbers)
    ratio = flat.size // numbers.size
    for n in range(state):
        read_numbers(flat, ratio * chunk * n, source, start(source, batch, group, n, ratio * time), ratio * steps)


@register_jitable
def load_delta(DL, DU, DR, UR, tile, u, delta, delta_bias, delta_softplus, zoh, at_u, at_delta, d0, rows, steps, ahead):
    """One chunk of one block: delta after bias and softplus and delta u (u alone under zoh), time-major; delta and u, row-major.

    Rows are read one by one; functions of their elements are taken of several rows at a time, whose latencies overlap.
    """
    zero = splat(tile.dtype.type(0))
    for t in range(0, steps, TILE):
        count = min(TILE, steps - t)
        for r in range(rows):
            here = at_delta + r * delta.row + t * delta.item
            prefetch(here + ahead * delta.item)
            store(DR, TILE * (t + r), read_row(zero, delta, here, count) + splat(delta_bias[d0 + r]))
            here = at_u + r * u.row + t * u.item
            prefetch(here + ahead * u.item)
            store(UR, TILE * (t + r), read_row(zero, u, here, count))
        for r in range(rows, TILE):
            store(DR, TILE * (t + r), zero)
            store(UR, TILE * (t + r), zero)
        for k in range(0, TILE * TILE, TILE * states_per_step(tile)):
            dl, x = load_wide(DR, TILE * t + k), load_wide(UR, TILE * t + k)
            if delta_softplus:
                dl = softplus(dl)
            store_wide(DR, TILE * t + k, dl)
            store_wide(tile, k, x if zoh else dl * x)
        transpose(DR, TILE * t, TILE, DL, TILE * t, TILE)
        transpose(tile, 0, TILE, DU, TILE * t, TILE)


@register_jitable
def move_states(S, size, states, row, d0, per_group, block0, block1, into_scratch):
    """Copy one row of a (rows, dim, state) array into the scratch of some blocks, or back."""
    for block in range(block0, block1):
        for r in range(min(TILE, per_group - block * TILE)):
            d = d0 + block * TILE + r
            for n in range(states.shape[2]):
                if into_scratch:
                    put(S, (block - block0) * size, n, r, states[row, d, n])
                else:
                    states[row, d, n] = get(S, (block - block0) * size, n, r)


# --- forward ---------------------------------------------------------------------------------------------------------


@register_jitable
def store_output(Y, UR, tile, D, z, y, batch, group, r0, d0, time, rows, steps, ahead):
    """Row-major end of a chunk: add D u, multiply by the gate, round and write."""
    zero = splat(tile.dtype.type(0))
    at_y, at_z = start(y, batch, group, r0, time), start(z, batch, group, r0, time)
    for t in range(0, steps, TILE):
        count = min(TILE, steps - t)
        transpose(Y, TILE * t, TILE, tile, 0, TILE)
        for r in range(rows):
            store(tile, TILE * r, fma(splat(D[d0 + r]), load(UR, TILE * (t + r)), load(tile, TILE * r)))
        if z.address != 0:
            for r in range(rows):
                here = at_z + r * z.row + t * z.item
                prefetch(here + ahead * z.item)
                store(tile, TILE * (TILE + r), read_row(zero, z, here, count))
            for k in range(0, TILE * TILE, TILE * states_per_step(tile)):
                gate = load_wide(tile, TILE * TILE + k)
                store_wide(tile, k, load_wide(tile, k) * (gate * sigmoid(gate)))
        for r in range(rows):
            here = at_y + r * y.row + t * y.item
            prefetch(here + ahead * y.item)
            write_row(y, here, count, load(tile, TILE * r))


@functools.cache
def forward_kernel(zoh: bool, B_varies: bool, C_varies: bool) -> Any:
    """The forward kernel of one discretisation rule and one form of B and C."""

    @kernel
    def forward(
        counter, tasks, chunk, groups, segments, u, delta, z, B, C, y, A, B_constant, C_constant, D, delta_bias,
        delta_softplus, initial_state, last_state, checkpoints,
    ):  # fmt: skip
        """One task: one block of one segment.

        ``checkpoints`` is empty, or takes the states at the start of each chunk. Without y only last_state is computed.
        """
        environment = flush_subnormals()
        dim, state = A.shape
        per_group = dim // groups
        blocks = (per_group + TILE - 1) // TILE
        step = states_per_step(A)
        padded = (state + step - 1) // step * step
        zero = splat(D.dtype.type(0))
        tile, Y = scratch(2 * TILE * TILE, D.dtype), scratch(chunk * TILE, D.dtype)
        tile[:] = 0
        DL, DU = scratch(chunk * TILE, D.dtype), scratch(chunk * TILE, D.dtype)
        DR, UR = scratch(chunk * TILE, D.dtype), scratch(chunk * TILE, D.dtype)
        H, R, I = scratch(padded * TILE, A.dtype), scratch(padded * TILE, A.dtype), scratch(padded * TILE, A.dtype)
        BS = scratch(padded * (chunk if B_varies else TILE), A.dtype)
        CS = scratch(padded * (chunk if C_varies else TILE), A.dtype)
        BS[:] = 0
        CS[:] = 0
        R[:] = 0
        I[:] = 0
        while True:
            task = take(counter)
            if task >= tasks:
                break
            segment, block = task // (groups * blocks), task % (groups * blocks)
            group, r0 = block // blocks, block % blocks * TILE
            rows, d0 = min(TILE, per_group - r0), group * per_group + r0
            batch, begin, length = segments[segment, 0], segments[segment, 1], segments[segment, 2]
            initial, final, first = segments[segment, 3], segments[segment, 4], segments[segment, 5]
            load_parameters(R, I, BS, CS, 0, A, B_constant, C_constant, zoh, B_varies, C_varies, d0, rows)
            H[:] = 0
            if initial >= 0:
                move_states(
                    H, 0, initial_state, initial, group * per_group, per_group, r0 // TILE, r0 // TILE + 1, True
                )
            for t0 in range(0, length, chunk):
                steps, time = min(chunk, length - t0), begin + t0
                if checkpoints.size > 0:
                    to = ((first + t0 // chunk) * groups * blocks + block) * padded * TILE
                    for n in range(0, padded, step):
                        store_wide(checkpoints, to + n * TILE, load_wide(H, n * TILE))
                at_u, at_delta = start(u, batch, group, r0, time), start(delta, batch, group, r0, time)
                load_delta(
                    DL,
                    DU,
                    DR,
                    UR,
                    tile,
                    u,
                    delta,
                    delta_bias,
                    delta_softplus,
                    zoh,
                    at_u,
                    at_delta,
                    d0,
                    rows,
                    steps,
                    chunk,
                )
                if B_varies:
                    load_numbers(BS, chunk, B, batch, group, state, time, steps)
                if C_varies:
                    load_numbers(CS, chunk, C, batch, group, state, time, steps)
                    for k in range(CS.size):
                        CS[k] = twice_conj(CS[k])
                for n in range(0, padded, step):
                    h, r = load_wide(H, n * TILE), load_wide(R, n * TILE)
                    i = load_wide(I, n * TILE)
                    for t in range(steps):
                        dl, du = repeat(load(DL, t * TILE), h), repeat(load(DU, t * TILE), h)
                        if B_varies:
                            b = spread(BS, n * chunk + t, chunk)
                        else:
                            b = load_wide(BS, n * TILE)
                        if C_varies:
                            c = spread(CS, n * chunk + t, chunk)
                        else:
                            c = load_wide(CS, n * TILE)
                        if zoh:
                            a, change = decay_and_change(dl, r)
                            h = fma(a, h, change * i * (b * du))
                        else:
                            h = fma(decay(dl, r), h, b * du)
                        store(Y, t * TILE, real_dot(c, h, load(Y, t * TILE) if n > 0 else zero))
                    store_wide(H, n * TILE, h)
                if y.address != 0:
                    store_output(Y, UR, tile, D, z, y, batch, group, r0, d0, time, rows, steps, chunk)
            if final >= 0:
                move_states(H, 0, last_state, final, group * per_group, per_group, r0 // TILE, r0 // TILE + 1, False)
        restore_environment(environment)

    return forward


# --- backward --------------------------------------------------------------------------------------------------------


@register_jitable
def load_cotangent(GY, GR, tile, dy, z, at_dy, at_z, rows, steps):
    """dy of one chunk and block, through the gate if there is one, time-major and row-major."""
    zero = splat(tile.dtype.type(0))
    for t in range(0, steps, TILE):
        count = min(TILE, steps - t)
        for r in range(rows):
            here = at_dy + r * dy.row + t * dy.item
            prefetch(here - CHECKPOINT * dy.item)
            store(GR, TILE * (t + r), read_row(zero, dy, here, count))
        for r in range(rows, TILE):
            store(GR, TILE * (t + r), zero)
        if z.address != 0:
            for r in range(rows):
                here = at_z + r * z.row + t * z.item
                prefetch(here - CHECKPOINT * z.item)
                store(tile, TILE * r, read_row(zero, z, here, count))
            for k in range(0, TILE * TILE, TILE * states_per_step(tile)):
                gate = load_wide(tile, k)
                store_wide(GR, TILE * t + k, load_wide(GR, TILE * t + k) * (gate * sigmoid(gate)))
        transpose(GR, TILE * t, TILE, GY, TILE * t, TILE)


@register_jitable
def store_sums(S, step, state, target, ahead, plane, batch, group, time, steps):
    """Sum the lanes of S[t] for each state and step of a chunk into a (batch, groups, state, length) real array or two."""
    flat = reals(S)
    stride = step * (flat.size // S.size)
    for n in range(state):
        here = start(target, batch, group, n, time) + ahead
        for t in range(0, steps, TILE):
            count, lanes = min(TILE, steps - t), t * stride + lanes_of(S, n)
            write(here + t * target.item, count, target.item, target.storage, lane_sums(flat, lanes, stride))
            if imaginary(S) > 0:
                sums = lane_sums(flat, lanes + imaginary(S), stride)
                write(here + plane + t * target.item, count, target.item, target.storage, sums)


@register_jitable
def store_gradients(
    YT, SU, SD, DR, UR, GR, tile, D, delta_bias, delta_softplus, zoh, dy, delta, z, du, ddelta, dz, dD, dbias,
    batch, group, r0, d0, time, rows, steps, sums,
):  # fmt: skip
    """Row-major end of a chunk: du, ddelta and dz from what was summed over the states; adds to the sums for dD and dbias."""
    zero = splat(tile.dtype.type(0))
    at_delta, at_ddelta = start(delta, batch, group, r0, time), start(ddelta, batch, group, r0, time)
    at_du = start(du, batch, group, r0, time)
    for t in range(0, steps, TILE):
        count = min(TILE, steps - t)
        transpose(SU, TILE * t, TILE, tile, 0, TILE)
        transpose(SD, TILE * t, TILE, tile, 256, TILE)
        for r in range(rows):
            here = at_delta + r * delta.row + t * delta.item
            store(tile, 512 + TILE * r, read_row(zero, delta, here, count) + splat(delta_bias[d0 + r]))
        for k in range(0, TILE * TILE, TILE * states_per_step(tile)):
            sum_u, g = load_wide(tile, k), load_wide(tile, 256 + k)
            if not zoh:
                g = fma(sum_u, load_wide(UR, TILE * t + k), g)
                sum_u = sum_u * load_wide(DR, TILE * t + k)
            if delta_softplus:
                g = g * sigmoid(load_wide(tile, 512 + k))
            store_wide(tile, k, sum_u)
            store_wide(tile, 256 + k, g)
        for r in range(rows):
            gy, g = load(GR, TILE * (t + r)), first(load(tile, 256 + TILE * r), count)
            write_row(du, at_du + r * du.row + t * du.item, count, fma(splat(D[d0 + r]), gy, load(tile, TILE * r)))
            write_row(ddelta, at_ddelta + r * ddelta.row + t * ddelta.item, count, g)
            store(dD, sums + TILE * r, fma(gy, load(UR, TILE * (t + r)), load(dD, sums + TILE * r)))
            store(dbias, sums + TILE * r, g + load(dbias, sums + TILE * r))
        if z.address != 0:
            store_gate_gradient(YT, UR, tile, D, dy, z, dz, batch, group, r0, d0, time, t, rows, count)


@register_jitable
def store_gate_gradient(YT, UR, tile, D, dy, z, dz, batch, group, r0, d0, time, t, rows, count):
    """dz of one tile: dy times the output before the gate times the slope of silu."""
    zero = splat(tile.dtype.type(0))
    transpose(YT, TILE * t, TILE, tile, 0, TILE)
    for r in range(rows):
        store(tile, TILE * r, fma(splat(D[d0 + r]), load(UR, TILE * (t + r)), load(tile, TILE * r)))
        store(tile, 256 + TILE * r, read_row(zero, z, start(z, batch, group, r0 + r, time + t), count))
        store(tile, 512 + TILE * r, read_row(zero, dy, start(dy, batch, group, r0 + r, time + t), count))
    for k in range(0, TILE * TILE, TILE * states_per_step(tile)):
        gate = load_wide(tile, 256 + k)
        s, one = sigmoid(gate), constant(gate, 1.0)
        slope = s * fma(gate, one - s, one)
        store_wide(tile, k, load_wide(tile, k) * load_wide(tile, 512 + k) * slope)
    for r in range(rows):
        write_row(dz, start(dz, batch, group, r0 + r, time + t), count, load(tile, TILE * r))


@functools.cache
def backward_kernel(zoh: bool, B_varies: bool, C_varies: bool) -> Any:
    """The backward kernel of one discretisation rule and one form of B and C."""

    @kernel
    def backward(
        counter, tasks, groups, bundles, slices, segments, dy, u, delta, z, B, C, A, B_constant, C_constant, D,
        delta_bias, delta_softplus, checkpoints, dlast_state, du, ddelta, dz, dB, dB_plane, dB_slice, dC, dC_plane,
        dC_slice, dA, dB_constant, dC_constant, dD, dbias, dinitial_state,
    ):  # fmt: skip
        """One task: some blocks of one group (a slice) in some segments (a bundle).

        The task sums dB and dC over its channels and dA, dD, dbias over its segments, always in the same order, and is the
        only one to write that part of the partial sums: slices of dB and dC, bundles of the others.
        """
        environment = flush_subnormals()
        dim, state = A.shape
        per_group = dim // groups
        blocks = (per_group + TILE - 1) // TILE
        most = (blocks + slices - 1) // slices
        step = states_per_step(A)
        padded = (state + step - 1) // step * step
        size = padded * TILE
        T = CHECKPOINT
        zero = splat(D.dtype.type(0))
        tile = scratch(3 * TILE * TILE, D.dtype)
        tile[:] = 0
        DL, DU, GY = scratch(T * TILE, D.dtype), scratch(T * TILE, D.dtype), scratch(T * TILE, D.dtype)
        YT, SU, SD = scratch(T * TILE, D.dtype), scratch(T * TILE, D.dtype), scratch(T * TILE, D.dtype)
        DR, UR, GR = scratch(T * TILE, D.dtype), scratch(T * TILE, D.dtype), scratch(T * TILE, D.dtype)
        HS, AS = scratch((T + 1) * step * TILE, A.dtype), scratch(T * step * TILE, A.dtype)
        WS = scratch(T * step * TILE, A.dtype)
        R, I, AA = scratch(most * size, A.dtype), scratch(most * size, A.dtype), scratch(most * size, A.dtype)
        CARRY, GA = scratch(most * size, A.dtype), scratch(most * size, A.dtype)
        BS = scratch(padded * T if B_varies else most * size, A.dtype)
        CS = scratch(padded * T if C_varies else most * size, A.dtype)
        GB = scratch(T * size if B_varies else most * size, A.dtype)
        GC = scratch(T * size if C_varies else most * size, A.dtype)
        SUM_D, SUM_BIAS = scratch(most * TILE * TILE, D.dtype), scratch(most * TILE * TILE, D.dtype)
        R[:] = 0
        I[:] = 0
        AA[:] = 0
        while True:
            task = take(counter)
            if task >= tasks:
                break
            bundle, group, part = task // (groups * slices), task // slices % groups, task % slices
            block0, block1 = blocks * part // slices, blocks * (part + 1) // slices
            BS[:] = 0
            CS[:] = 0
            GA[:] = 0
            GB[:] = 0
            GC[:] = 0
            SUM_D[:] = 0
            SUM_BIAS[:] = 0
            for block in range(block0, block1):
                rows, d0 = min(TILE, per_group - block * TILE), group * per_group + block * TILE
                at = (block - block0) * size
                load_parameters(R, I, BS, CS, at, A, B_constant, C_constant, zoh, B_varies, C_varies, d0, rows)
                for n in range(state):
                    for r in range(rows):
                        put(AA, at, n, r, A[d0 + r, n])
            for segment in range(len(segments) * bundle // bundles, len(segments) * (bundle + 1) // bundles):
                batch, begin, length = segments[segment, 0], segments[segment, 1], segments[segment, 2]
                initial, final, chunk0 = segments[segment, 3], segments[segment, 4], segments[segment, 5]
                CARRY[:] = 0
                if final >= 0:
                    move_states(CARRY, size, dlast_state, final, group * per_group, per_group, block0, block1, True)
                for t0 in range((length - 1) // T * T, -1, -T):
                    steps, time = min(T, length - t0), begin + t0
                    if B_varies:
                        load_numbers(BS, T, B, batch, group, state, time, steps)
                        GB[:] = 0
                    if C_varies:
                        load_numbers(CS, T, C, batch, group, state, time, steps)
                        GC[:] = 0
                        for k in range(CS.size):
                            CS[k] = twice_conj(CS[k])
                    for block in range(block0, block1):
                        r0, at = block * TILE, (block - block0) * size
                        rows, d0 = min(TILE, per_group - r0), group * per_group + r0
                        at_u, at_dy = start(u, batch, group, r0, time), start(dy, batch, group, r0, time)
                        at_delta, at_z = start(delta, batch, group, r0, time), start(z, batch, group, r0, time)
                        load_delta(
                            DL,
                            DU,
                            DR,
                            UR,
                            tile,
                            u,
                            delta,
                            delta_bias,
                            delta_softplus,
                            zoh,
                            at_u,
                            at_delta,
                            d0,
                            rows,
                            steps,
                            -T,
                        )
                        load_cotangent(GY, GR, tile, dy, z, at_dy, at_z, rows, steps)
                        kept = ((chunk0 + t0 // T) * groups * blocks + group * blocks + block) * size
                        for n in range(0, padded, step):
                            r, i, carry = (
                                load_wide(R, at + n * TILE),
                                load_wide(I, at + n * TILE),
                                load_wide(CARRY, at + n * TILE),
                            )
                            h, ga, aa = (
                                load_wide(checkpoints, kept + n * TILE),
                                load_wide(GA, at + n * TILE),
                                load_wide(AA, at + n * TILE),
                            )
                            store_wide(HS, 0, h)
                            for t in range(steps):
                                dl, du_ = repeat(load(DL, t * TILE), h), repeat(load(DU, t * TILE), h)
                                if B_varies:
                                    b = spread(BS, n * T + t, T)
                                else:
                                    b = load_wide(BS, at + n * TILE)
                                if C_varies:
                                    c = spread(CS, n * T + t, T)
                                else:
                                    c = load_wide(CS, at + n * TILE)
                                if zoh:
                                    a, change = decay_and_change(dl, r)
                                    w = change * i
                                    store_wide(WS, t * step * TILE, w)
                                    h = fma(a, h, w * (b * du_))
                                else:
                                    a = decay(dl, r)
                                    h = fma(a, h, b * du_)
                                store_wide(AS, t * step * TILE, a)
                                store_wide(HS, (t + 1) * step * TILE, h)
                                store(YT, t * TILE, real_dot(c, h, load(YT, t * TILE) if n > 0 else zero))
                            for back in range(steps):
                                t = steps - 1 - back
                                dl, du_ = repeat(load(DL, t * TILE), h), repeat(load(DU, t * TILE), h)
                                gy = repeat(load(GY, t * TILE), h)
                                if B_varies:
                                    b = spread(BS, n * T + t, T)
                                    to_b = (t * padded + n) * TILE
                                else:
                                    b = load_wide(BS, at + n * TILE)
                                    to_b = at + n * TILE
                                if C_varies:
                                    c = spread(CS, n * T + t, T)
                                    to_c = (t * padded + n) * TILE
                                else:
                                    c = load_wide(CS, at + n * TILE)
                                    to_c = at + n * TILE
                                a, before = load_wide(AS, t * step * TILE), load_wide(HS, t * step * TILE)
                                g = fma(c, gy, carry)
                                store_wide(GC, to_c, fma(load_wide(HS, (t + 1) * step * TILE), gy, load_wide(GC, to_c)))
                                carry = g * conj(a)
                                through = carry * conj(before)
                                sum_u = load(SU, t * TILE) if n > 0 else zero
                                sum_d = real_dot(aa, through, load(SD, t * TILE) if n > 0 else zero)
                                if zoh:
                                    w, bu = load_wide(WS, t * step * TILE), b * du_
                                    store_wide(GB, to_b, fma(g * conj(w), du_, load_wide(GB, to_b)))
                                    store(SU, t * TILE, real_dot(b * w, g, sum_u))
                                    store(SD, t * TILE, real_dot(bu, carry, sum_d))
                                    curve = psi(dl * aa, a, w * aa)
                                    ga = fma(through + g * conj(bu * curve) * dl, dl, ga)
                                else:
                                    store_wide(GB, to_b, fma(g, du_, load_wide(GB, to_b)))
                                    store(SU, t * TILE, real_dot(b, g, sum_u))
                                    store(SD, t * TILE, sum_d)
                                    ga = fma(through, dl, ga)
                            store_wide(CARRY, at + n * TILE, carry)
                            store_wide(GA, at + n * TILE, ga)
                        store_gradients(
                            YT, SU, SD, DR, UR, GR, tile, D, delta_bias, delta_softplus, zoh, dy, delta, z, du, ddelta, dz,
                            SUM_D, SUM_BIAS, batch, group, r0, d0, time, rows, steps, (block - block0) * TILE * TILE,
                        )  # fmt: skip
                    if B_varies:
                        store_sums(GB, size, state, dB, part * dB_slice, dB_plane, batch, group, time, steps)
                    if C_varies:
                        store_sums(GC, size, state, dC, part * dC_slice, dC_plane, batch, group, time, steps)
                if initial >= 0:
                    move_states(
                        CARRY, size, dinitial_state, initial, group * per_group, per_group, block0, block1, False
                    )
            move_states(GA, size, dA, bundle, group * per_group, per_group, block0, block1, False)
            if not B_varies:
                move_states(GB, size, dB_constant, bundle, group * per_group, per_group, block0, block1, False)
            if not C_varies:
                move_states(GC, size, dC_constant, bundle, group * per_group, per_group, block0, block1, False)
            for block in range(block0, block1):
                sums = (block - block0) * TILE * TILE
                store(tile, 0, lane_sums(SUM_D, sums, TILE))
                store(tile, TILE, lane_sums(SUM_BIAS, sums, TILE))
                for r in range(min(TILE, per_group - block * TILE)):
                    dD[bundle, group * per_group + block * TILE + r] = tile[r]
                    dbias[bundle, group * per_group + block * TILE + r] = tile[TILE + r]
        restore_environment(environment)

    return backward


# --- carries of a split along time -----------------------------------------------------------------------------------

GONE = {4: 120.0, 8: 800.0}  # by bytes of a number: exp of minus this leaves nothing of any state


@kernel
def reach(counter, tasks, groups, segments, delta, A, delta_bias, delta_softplus, gone, from_end, sums, walked):
    """How far a state is felt: one task walks a block of a segment from its end (or start) until every state is gone.

    Writes the steps walked, and the sum of delta over them; infinity if the walk ended before the segment did. Only softplus
    promises that delta is positive, so that what is gone stays gone; without it the walk is over all of the segment.
    """
    environment = flush_subnormals()
    dim = A.shape[0]
    per_group = dim // groups
    blocks = (per_group + TILE - 1) // TILE
    S, slowest = scratch(TILE * TILE, delta_bias.dtype), np.empty(TILE, delta_bias.dtype)
    zero = splat(delta_bias.dtype.type(0))
    while True:
        task = take(counter)
        if task >= tasks:
            break
        segment, block = task // (groups * blocks), task % (groups * blocks)
        group, r0 = block // blocks, block % blocks * TILE
        rows, d0 = min(TILE, per_group - r0), group * per_group + r0
        batch, begin, length = segments[segment, 0], segments[segment, 1], segments[segment, 2]
        S[:] = 0
        for r in range(rows):
            slowest[r] = -A[d0 + r].real.max()
        done, felt = 0, True
        while done < length and felt:
            steps = min(CHUNK, length - done)
            time = begin + (length - done - steps if from_end else done)
            felt = not delta_softplus
            for r in range(rows):
                at = start(delta, batch, group, r0 + r, time)
                total = load(S, TILE * r)
                for t in range(0, steps, TILE):
                    count = min(TILE, steps - t)
                    dl = read_row(zero, delta, at + t * delta.item, count) + splat(delta_bias[d0 + r])
                    total = total + first(softplus(dl) if delta_softplus else dl, count)
                store(S, TILE * r, total)
                felt = felt or not S[TILE * r : TILE * r + TILE].sum() * slowest[r] > gone
            done += steps
        walked[segment, block] = done
        for r in range(rows):
            sums[segment, d0 + r] = S[TILE * r : TILE * r + TILE].sum() if done == length else np.inf
    restore_environment(environment)


@functools.cache
def carry_kernel(C_varies: bool) -> Any:
    """The kernel for what a segment hands to the one before it in the backward."""

    @kernel
    def carry_back(
        counter, tasks, groups, segments, dy, u, delta, z, C, A, C_constant, delta_bias, delta_softplus, dinitial_state,
    ):  # fmt: skip
        """One task: the gradient of the initial state of one block of one segment, from dy alone."""
        environment = flush_subnormals()
        dim, state = A.shape
        per_group = dim // groups
        blocks = (per_group + TILE - 1) // TILE
        step = states_per_step(A)
        padded = (state + step - 1) // step * step
        tile = scratch(TILE * TILE, delta_bias.dtype)
        DL, DU = scratch(CHUNK * TILE, delta_bias.dtype), scratch(CHUNK * TILE, delta_bias.dtype)
        DR, UR = scratch(CHUNK * TILE, delta_bias.dtype), scratch(CHUNK * TILE, delta_bias.dtype)
        GY, GR = scratch(CHUNK * TILE, delta_bias.dtype), scratch(CHUNK * TILE, delta_bias.dtype)
        CARRY, R = scratch(padded * TILE, A.dtype), scratch(padded * TILE, A.dtype)
        CS = scratch(padded * (CHUNK if C_varies else TILE), A.dtype)
        R[:] = 0
        CS[:] = 0
        while True:
            task = take(counter)
            if task >= tasks:
                break
            segment, block = task // (groups * blocks), task % (groups * blocks)
            group, r0 = block // blocks, block % blocks * TILE
            rows, d0 = min(TILE, per_group - r0), group * per_group + r0
            batch, begin, length = segments[segment, 0], segments[segment, 1], segments[segment, 2]
            load_parameters(R, R, CS, CS, 0, A, C_constant, C_constant, False, True, C_varies, d0, rows)
            CARRY[:] = 0
            for t0 in range((length - 1) // CHUNK * CHUNK, -1, -CHUNK):
                steps, time = min(CHUNK, length - t0), begin + t0
                at_u, at_delta = start(u, batch, group, r0, time), start(delta, batch, group, r0, time)
                load_delta(
                    DL,
                    DU,
                    DR,
                    UR,
                    tile,
                    u,
                    delta,
                    delta_bias,
                    delta_softplus,
                    False,
                    at_u,
                    at_delta,
                    d0,
                    rows,
                    steps,
                    -CHUNK,
                )
                at_dy, at_z = start(dy, batch, group, r0, time), start(z, batch, group, r0, time)
                load_cotangent(GY, GR, tile, dy, z, at_dy, at_z, rows, steps)
                if C_varies:
                    load_numbers(CS, CHUNK, C, batch, group, state, time, steps)
                    for k in range(CS.size):
                        CS[k] = twice_conj(CS[k])
                for n in range(0, padded, step):
                    carry, r = load_wide(CARRY, n * TILE), load_wide(R, n * TILE)
                    for back in range(steps):
                        t = steps - 1 - back
                        if C_varies:
                            c = spread(CS, n * CHUNK + t, CHUNK)
                        else:
                            c = load_wide(CS, n * TILE)
                        a = decay(repeat(load(DL, t * TILE), carry), r)
                        carry = fma(c, repeat(load(GY, t * TILE), carry), carry) * conj(a)
                    store_wide(CARRY, n * TILE, carry)
            move_states(
                CARRY, 0, dinitial_state, segment, group * per_group, per_group, r0 // TILE, r0 // TILE + 1, False
            )
        restore_environment(environment)

    return carry_back
