"""The selective scan on the CPU: forward, backward with recomputed states, and the carries of a split along time.

A *segment* is a stretch of one sequence that is scanned on its own, from one row of ``initial_state`` (or from zero): a batch
row, a packed sequence, or a part of a split sequence (``segments``, see sscan/_segments.py). A *block* is 16 channels of one
group, one per vector lane. Time advances in chunks of ``CHUNK`` steps: delta and u of a chunk are converted, transposed to
time-major and put through softplus once; then a few states at a time stay in registers and walk over the chunk.
"""

import functools
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from sscan.cpu._parallel import kernel, run, take
from sscan.cpu._tiles import TILE, View, read_numbers, read_row, start, view, write_row
from sscan.cpu._vector import (
    conj,
    constant,
    flush_subnormals,
    fma,
    get,
    lane_sums,
    load,
    load_wide,
    prefetch,
    put,
    real_dot,
    repeat,
    restore_environment,
    scratch,
    splat,
    spread,
    states_per_step,
    store,
    store_wide,
    transpose,
)
from sscan.cpu._vector_math import decay, decay_and_change, psi, rate, sigmoid, softplus


CHUNK = 64


@register_jitable
def load_delta(DL, DU, U, tile, u, delta, delta_bias, delta_softplus, zoh, at_u, at_delta, d0, rows, steps):
    """Time-major delta after bias and softplus, and delta u (u alone under zoh), of one chunk; rows of u as they are."""
    zero = splat(tile.dtype.type(0))
    for t in range(0, steps, TILE):
        count = min(TILE, steps - t)
        for r in range(rows):
            here = at_delta + r * delta.row + t * delta.item
            prefetch(here + CHUNK * delta.item)
            dl = read_row(zero, delta, here, count) + splat(delta_bias[d0 + r])
            here = at_u + r * u.row + t * u.item
            prefetch(here + CHUNK * u.item)
            x = read_row(zero, u, here, count)
            if delta_softplus:
                dl = softplus(dl)
            store(U, TILE * (t + r), x)
            store(tile, TILE * r, dl)
            store(tile, 256 + TILE * r, x if zoh else dl * x)
        transpose(tile, 0, TILE, DL, TILE * t, TILE)
        transpose(tile, 256, TILE, DU, TILE * t, TILE)


def reals(array):
    """A flat array's real numbers: itself, or its interleaved real and imaginary parts. Only inside compiled code."""
    raise NotImplementedError


@overload(reals)
def _reals(array):
    if not isinstance(array.dtype, types.Complex):
        return lambda array: array
    scalar = np.float64 if array.dtype == types.complex128 else np.float32
    return lambda array: array.view(scalar)


def twice_conj(c):
    """C as the kernels keep it: y = Re(conj(C') h), so 2 conj(C) if complex, C if real. Only inside compiled code."""
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
def load_numbers(numbers, source, batch, group, state, time, steps):
    """numbers[CHUNK n + t] = B or C of one chunk, in the accumulation dtype."""
    flat = reals(numbers)
    ratio = flat.size // numbers.size
    for n in range(state):
        read_numbers(flat, ratio * CHUNK * n, source, start(source, batch, group, n, ratio * time), ratio * steps)


@functools.cache
def forward_kernel(zoh: bool, B_varies: bool, C_varies: bool) -> Any:
    """The forward kernel of one discretisation rule and one form of B and C."""

    @kernel
    def forward(
        counter, tasks, u, delta, z, B, C, y, A, B_constant, C_constant, D, delta_bias, delta_softplus, groups,
        segments, initial_state, last_state, checkpoints,
    ):  # fmt: skip
        """One task: one block of one segment."""
        environment = flush_subnormals()
        dim, state = A.shape
        per_group = dim // groups
        blocks = (per_group + TILE - 1) // TILE
        step = states_per_step(A)
        padded = (state + step - 1) // step * step
        zero = splat(D.dtype.type(0))
        tile = scratch(512, D.dtype)
        tile[:] = 0  # lanes past the last row
        DL, DU = scratch(CHUNK * TILE, D.dtype), scratch(CHUNK * TILE, D.dtype)
        Y, U = scratch(CHUNK * TILE, D.dtype), scratch(CHUNK * TILE, D.dtype)
        H, R, I = scratch(padded * TILE, A.dtype), scratch(padded * TILE, A.dtype), scratch(padded * TILE, A.dtype)
        BS, CS = scratch(padded * (CHUNK if B_varies else TILE), A.dtype), scratch(
            padded * (CHUNK if C_varies else TILE), A.dtype
        )
        BS[:] = 0
        CS[:] = 0
        while True:
            task = take(counter)
            if task >= tasks:
                break
            segment, block = task // (groups * blocks), task % (groups * blocks)
            group, r0 = block // blocks, block % blocks * TILE
            rows = min(TILE, per_group - r0)
            d0 = group * per_group + r0
            batch, begin, length = segments[segment, 0], segments[segment, 1], segments[segment, 2]
            initial, final, chunk0 = segments[segment, 3], segments[segment, 4], segments[segment, 5]
            H[:] = 0
            R[:] = 0
            I[:] = 0
            for n in range(state):
                for r in range(rows):
                    if zoh:
                        put(R, 0, n, r, rate(nonzero(A[d0 + r, n])))
                        put(I, 0, n, r, 1 / nonzero(A[d0 + r, n]))
                    else:
                        put(R, 0, n, r, rate(A[d0 + r, n]))
                    if initial >= 0:
                        put(H, 0, n, r, initial_state[initial, d0 + r, n])
                    if not B_varies:
                        put(BS, 0, n, r, B_constant[d0 + r, n])
                    if not C_varies:
                        put(CS, 0, n, r, twice_conj(C_constant[d0 + r, n]))
            for t0 in range(0, length, CHUNK):
                steps = min(CHUNK, length - t0)
                time = begin + t0
                if checkpoints.shape[0]:
                    to = ((chunk0 + t0 // CHUNK) * groups * blocks + block) * padded * TILE
                    for n in range(0, padded, step):
                        store_wide(checkpoints, to + n * TILE, load_wide(H, n * TILE))
                at_u, at_y = start(u, batch, group, r0, time), start(y, batch, group, r0, time)
                at_z = start(z, batch, group, r0, time)
                at_delta = start(delta, batch, group, r0, time)
                load_delta(DL, DU, U, tile, u, delta, delta_bias, delta_softplus, zoh, at_u, at_delta, d0, rows, steps)
                if B_varies:
                    load_numbers(BS, B, batch, group, state, time, steps)
                if C_varies:
                    load_numbers(CS, C, batch, group, state, time, steps)
                    for k in range(CS.size):
                        CS[k] = twice_conj(CS[k])
                for n in range(0, padded, step):
                    h, r = load_wide(H, n * TILE), load_wide(R, n * TILE)
                    if zoh:
                        i = load_wide(I, n * TILE)
                    for t in range(steps):
                        dl, du = repeat(load(DL, t * TILE), h), repeat(load(DU, t * TILE), h)
                        if B_varies:
                            b = spread(BS, n * CHUNK + t, CHUNK)
                        else:
                            b = load_wide(BS, n * TILE)
                        if C_varies:
                            c = spread(CS, n * CHUNK + t, CHUNK)
                        else:
                            c = load_wide(CS, n * TILE)
                        if zoh:
                            a, change = decay_and_change(dl, r)
                            h = fma(a, h, change * i * (b * du))
                        else:
                            h = fma(decay(dl, r), h, b * du)
                        before = load(Y, t * TILE) if n > 0 else zero
                        store(Y, t * TILE, real_dot(c, h, before))
                    store_wide(H, n * TILE, h)
                for t in range(0, steps, TILE):
                    count = min(TILE, steps - t)
                    transpose(Y, TILE * t, TILE, tile, 0, TILE)
                    for r in range(rows):
                        x = fma(splat(D[d0 + r]), load(U, TILE * (t + r)), load(tile, TILE * r))
                        if z.address:
                            here = at_z + r * z.row + t * z.item
                            prefetch(here + CHUNK * z.item)
                            gate = read_row(zero, z, here, count)
                            x = x * (gate * sigmoid(gate))
                        here = at_y + r * y.row + t * y.item
                        prefetch(here + CHUNK * y.item)
                        write_row(y, here, count, x)
            if final >= 0:
                for n in range(state):
                    for r in range(rows):
                        last_state[final, d0 + r, n] = get(H, 0, n, r)
        restore_environment(environment)

    return forward
