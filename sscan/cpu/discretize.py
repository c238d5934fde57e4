"""Discretisation on the CPU: A_bar = f(z) and B_bar = Delta s(z) B with z = Delta A, 16 states at a time.

Arrays are selective: delta (batch, dim, length), results (batch, dim, length, state). A task walks over ``STEPS`` steps
of one batch row; a varying B is transposed there once, so that a vector holds 16 states of one step.
"""

import numpy as np
from numba.extending import overload, register_jitable

from sscan.cpu._parallel import kernel, run, take
from sscan.cpu._rows import (
    SQUARE,
    lanes,
    load_lanes,
    rates,
    read_lanes,
    reals_per,
    store_lanes,
    transpose_lanes,
    write_lanes,
)
from sscan.cpu._tiles import TILE, read_numbers, start, view, write_row
from sscan.cpu._vector import Complex, conj, constant, imag, lane_sums, real, scratch, splat, store
from sscan.cpu._vector_math import decay, decay_and_change, minus_absolute, psi, where_negative

STEPS, CHANNELS = 64, 16  # a task; backward it has all channels of a group, if B varies
METHODS = {"zoh": 0, "mamba": 1, "bilinear": 2, "euler": 3}


def nonzero(A):
    """A, or a number too small to matter where that is nearer to zero. Only inside compiled code."""
    raise NotImplementedError


@overload(nonzero)
def _nonzero(A):
    element = A.part.element if isinstance(A, Complex) else A.element
    tiny = 1e-100 if element.bitwidth == 64 else 1e-15  # the squares are numbers too

    def nonzero_lanes(A):
        inside = minus_absolute(real(A)) + minus_absolute(imag(A)) + constant(A, tiny)
        return where_negative(inside, A, A - A + constant(A, tiny))

    return nonzero_lanes


@register_jitable
def discretized(method, delta, A, one):
    """A_bar, and B_bar / B; the methods numbered as in ``METHODS``."""
    z = A * delta
    half = z * constant(z, 0.5)
    if method == 0:
        A_bar, change = decay_and_change(delta, rates(nonzero(A)))
        return A_bar, change / nonzero(A)
    if method == 1:
        return decay(delta, rates(A)), one * delta
    if method == 2:
        inverse = one / (one - half)
        return (one + half) * inverse, inverse * delta
    return one + z, one * delta


@register_jitable
def derivatives(method, delta, A, one):
    """f'(z), s'(z), d(Delta s(Delta A))/dDelta and Delta s(z)."""
    z = A * delta
    if method == 0:
        A_bar, change = decay_and_change(delta, rates(nonzero(A)))
        return A_bar, psi(z, A_bar, change), A_bar, change / nonzero(A)
    if method == 1:
        return decay(delta, rates(A)), one - one, one, one * delta
    if method == 2:
        inverse = one / (one - z * constant(z, 0.5))
        square = inverse * inverse
        return square, square * constant(z, 0.5), square, inverse * delta
    return one, one - one, one, one * delta


@register_jitable
def load_matrix(like, T, B, batch, group, state, t0, steps):
    """16 steps of 16 states in each tile of T, time-major: tile (t // 16) blocks + n // 16, of ``blocks`` along n."""
    blocks = (state + TILE - 1) // TILE
    for t in range(0, steps, TILE):
        for n in range(blocks * TILE):
            tile = (t // TILE * blocks + n // TILE) * SQUARE
            count = min(TILE, steps - t) if n < state else 0
            at = start(B, batch, group, n, reals_per(like) * (t0 + t))
            store_lanes(T, tile + n % TILE * TILE, read_lanes(like, B, at, count))
        for n in range(blocks):
            transpose_lanes(like, T, (t // TILE * blocks + n) * SQUARE, (t // TILE * blocks + n) * SQUARE)


@kernel
def forward(counter, tasks, delta, A, B, A_bar, B_bar, like_A, method, varies, sizes):
    """One task: ``CHANNELS`` channels of ``STEPS`` steps of one batch row."""
    nothing, one = lanes(like_A.dtype.type(0)), lanes(like_A.dtype.type(1))
    _, dim, length, state, groups = sizes
    times, channels = (length + STEPS - 1) // STEPS, (dim + CHANNELS - 1) // CHANNELS
    blocks = (state + TILE - 1) // TILE
    ratio = reals_per(nothing)
    T, DL = scratch(STEPS // TILE * blocks * SQUARE, like_A.real.dtype), scratch(STEPS, like_A.real.dtype)
    while True:
        task = take(counter)
        if task >= tasks:
            break
        batch, t0, d0 = task // channels // times, task // channels % times * STEPS, task % channels * CHANNELS
        steps, loaded = min(STEPS, length - t0), -1
        for d in range(d0, min(d0 + CHANNELS, dim)):
            group = d * groups // dim
            if varies and group != loaded:
                load_matrix(nothing, T, B, batch, group, state, t0, steps)
                loaded = group
            read_numbers(DL, 0, delta, start(delta, batch, 0, d, t0), steps)
            for n in range(0, state, TILE):
                count = min(TILE, state - n)
                a = read_lanes(nothing, A, start(A, 0, 0, d, ratio * n), count)
                b = nothing if varies else read_lanes(nothing, B, start(B, 0, 0, d, ratio * n), count)
                for t in range(steps):
                    if varies:
                        b = load_lanes(nothing, T, (t // TILE * blocks + n // TILE) * SQUARE + t % TILE * TILE)
                    x, y = discretized(method, splat(DL[t]), a, one)
                    at = ratio * ((t0 + t) * state + n)
                    write_lanes(A_bar, start(A_bar, batch, 0, d, at), count, x)
                    write_lanes(B_bar, start(B_bar, batch, 0, d, at), count, y * b)


@kernel
def backward(
    counter, tasks, dA_bar, dB_bar, delta, A, B, ddelta, dA, dB, like_A, method, varies, sizes, channels
):  # fmt: skip
    """One task: ``channels`` channels (a whole group if B varies) of ``STEPS`` steps of one batch row.

    Its sums over time are row (batch, time) of dA and, if B is constant, of dB; a varying dB is summed over channels.
    """
    nothing, one = lanes(like_A.dtype.type(0)), lanes(like_A.dtype.type(1))
    _, dim, length, state, _ = sizes
    times, parts, blocks = (length + STEPS - 1) // STEPS, (dim + channels - 1) // channels, (state + TILE - 1) // TILE
    ratio = reals_per(nothing)
    T, S = scratch(STEPS // TILE * blocks * SQUARE, like_A.real.dtype), scratch(STEPS * TILE, like_A.real.dtype)
    dT, DL = scratch(len(T), like_A.real.dtype), scratch(STEPS, like_A.real.dtype)
    while True:
        task = take(counter)
        if task >= tasks:
            break
        row, part = task // parts, task % parts
        batch, t0, d0 = row // times, row % times * STEPS, part * channels
        steps = min(STEPS, length - t0)
        dT[:] = 0
        if varies:
            load_matrix(nothing, T, B, batch, part, state, t0, steps)
        for d in range(d0, min(d0 + channels, dim)):
            read_numbers(DL, 0, delta, start(delta, batch, 0, d, t0), steps)
            S[:] = 0
            for n in range(0, state, TILE):
                count = min(TILE, state - n)
                a = read_lanes(nothing, A, start(A, 0, 0, d, ratio * n), count)
                b = nothing if varies else read_lanes(nothing, B, start(B, 0, 0, d, ratio * n), count)
                sum_A, sum_B = nothing, nothing
                for t in range(steps):
                    here = (t // TILE * blocks + n // TILE) * SQUARE + t % TILE * TILE
                    if varies:
                        b = load_lanes(nothing, T, here)
                    at = ratio * ((t0 + t) * state + n)
                    gA = read_lanes(nothing, dA_bar, start(dA_bar, batch, 0, d, at), count)
                    gB = read_lanes(nothing, dB_bar, start(dB_bar, batch, 0, d, at), count)
                    step = splat(DL[t])
                    df, ds, dstep, scale = derivatives(method, step, a, one)
                    change = gA * conj(df * a) + gB * conj(dstep * b)
                    store(S, TILE * t, load_lanes(real(nothing), S, TILE * t) + real(change))
                    sum_A = sum_A + (gA * conj(df) + gB * conj(ds * step * b)) * step
                    if varies:
                        store_lanes(dT, here, load_lanes(nothing, dT, here) + gB * conj(scale))
                    else:
                        sum_B = sum_B + gB * conj(scale)
                write_lanes(dA, start(dA, row, 0, d, ratio * n), count, sum_A)
                if not varies:
                    write_lanes(dB, start(dB, row, 0, d, ratio * n), count, sum_B)
            for t in range(0, steps, TILE):
                x = lane_sums(S, TILE * t, TILE)
                write_row(ddelta, start(ddelta, batch, 0, d, t0 + t), min(TILE, steps - t), x)
        if varies:
            for t in range(0, steps, TILE):
                for n in range(0, state, TILE):
                    tile = (t // TILE * blocks + n // TILE) * SQUARE
                    transpose_lanes(nothing, dT, tile, tile)
                    for k in range(min(TILE, state - n)):
                        at = start(dB, batch, part, n + k, ratio * (t0 + t))
                        write_lanes(dB, at, min(TILE, steps - t), load_lanes(nothing, dT, tile + k * TILE))


# --- what the ops call -----------------------------------------------------------------------------------------------


def _matrix(B):
    """B: (dim, state), or (batch, groups, state, length)."""
    return view(B[None]) if B.ndim == 2 else view(B)


def _flat(array):
    """A contiguous (batch, dim, length, state) array, seen with its last two axes as one."""
    return view(array.reshape(*array.shape[:2], array.shape[2] * array.shape[3]))


def discretize_forward(delta, A, B, method, A_bar, B_bar):
    """Fill A_bar and B_bar, contiguous (batch, dim, length, state) arrays of A's dtype.

    delta (batch, dim, length) and a varying B (batch, groups, state, length) are in a storage dtype, with unit stride
    along time; B's last axis counts reals if A is complex. A and a constant B (dim, state) are contiguous.
    """
    batch, dim, length, state = A_bar.shape
    sizes = (batch, dim, length, state, B.shape[1] if B.ndim == 4 else 1)
    run(
        forward, batch * -(-length // STEPS) * -(-dim // CHANNELS), view(delta), view(A[None]), _matrix(B),
        _flat(A_bar), _flat(B_bar), A.reshape(-1)[:0], METHODS[method], B.ndim == 4, sizes,
    )  # fmt: skip


@np.errstate(all="ignore")  # sums of partial sums may overflow, as those that kernels form
def discretize_backward(dA_bar, dB_bar, delta, A, B, method, ddelta, dA, dB):
    """Fill ddelta, dA and dB; arrays as in ``discretize_forward``."""
    batch, dim, length, state = dA_bar.shape
    varies = B.ndim == 4
    channels = dim // B.shape[1] if varies else CHANNELS
    sums = np.empty((1 if varies else 2, batch * -(-length // STEPS), dim, state), A.dtype)
    run(
        backward, sums.shape[1] * -(-dim // channels), _flat(dA_bar), _flat(dB_bar), view(delta), view(A[None]),
        _matrix(B), view(ddelta), view(sums[0]), _matrix(dB) if varies else view(sums[1]), A.reshape(-1)[:0],
        METHODS[method], varies, (batch, dim, length, state, 1), channels,
    )  # fmt: skip
    sums[0].sum(axis=0, out=dA)
    if not varies:
        sums[1].sum(axis=0, out=dB)
