"""The causal depthwise convolution on the CPU: forward, backward with the sum recomputed, one decoding step.

Segments (sscan/_segments.py) are cut into *parts* of at most ``PART`` steps, so that one long row is shared by all
threads. A part reads the few inputs before it (and, backward, the few gradients after it) on its own, so parts do not
depend on each other. A *bundle* is a run of parts, together about as long as one; a task is one bundle of some
channels. How problems are cut depends on their shape and segments only.

A part is walked in chunks that stay in the nearest cache: inputs are converted to the accumulation dtype once, and
every tap then multiplies the same numbers, read one further along.
"""

import numpy as np
from numba.extending import register_jitable

from sscan.cpu._parallel import kernel, run, take
from sscan.cpu._rows import write_numbers
from sscan.cpu._tiles import TILE, read_numbers, start, view, write_row
from sscan.cpu._vector import (
    constant,
    fma,
    lane_sums,
    load,
    load_wide,
    prefetch,
    repeat,
    scratch,
    splat,
    states_per_step,
    store,
    store_wide,
)
from sscan.cpu._vector_math import sigmoid

CHUNK = 1024
PART = 4 * CHUNK
TASK = 8 * PART  # numbers in a task: less is not worth waking a second thread
STEP_BLOCKS = 256  # of a decoding step: 4096 channels take some ten microseconds

# Columns of the table of parts: batch row, first step and number of steps of the segment; first step within the segment
# and number of steps of the part; rows of the initial and the final state, -1 for none.
BATCH, BEGIN, LENGTH, FROM, STEPS, INITIAL, FINAL = range(7)


def cut(segments, has_initial, has_final):
    """The table of parts, the borders of the bundles in it, and the channels of a task."""
    pieces = np.maximum(1, -(-segments[:, 2] // PART))
    batch, begin, length, initial, final = np.repeat(segments, pieces, axis=0).T
    offset = PART * (np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces))
    steps = np.minimum(PART, length - offset)
    none = np.full_like(initial, -1)
    columns = [batch, begin, length, offset, steps, initial if has_initial else none, final if has_final else none]
    cost = steps + TILE  # also counts what an empty part costs
    bundle = (np.cumsum(cost) - cost) // PART
    borders = np.append(np.flatnonzero(np.diff(bundle, prepend=-1)), len(bundle))
    channels = max(8, TASK // max(1, min(PART, cost.sum())))
    return np.ascontiguousarray(np.stack(columns, axis=1)), borders, channels


@register_jitable
def load_window(X, at, x, address, t0, count, halo, initial_state, initial, d):
    """X[at + k] = the k-th input from step t0 on, -halo <= k < count; before step 0 the initial state, or zeros."""
    inside = min(halo, t0)
    for k in range(halo - inside):
        X[at - halo + k] = initial_state[initial, d, t0 + k] if initial >= 0 else X.dtype.type(0)
    read_numbers(X, at - inside, x, address - inside * x.item, inside)
    read_numbers(X, at, x, address, count)


@register_jitable
def ask_for(x, address, count):
    """Ask memory for what comes ``count`` elements after an address, as many again: the next chunk or the next row."""
    for at in range(address + count * x.item, address + 2 * count * x.item, 64):
        prefetch(at)


@register_jitable
def weighted(X, at, weight, bias, d):
    """The sums of the taps of a vector of steps, whose inputs begin at X[at]: before the activation."""
    like, halo = load_wide(X, 0), weight.shape[1] - 1
    total = repeat(splat(bias[d]), like)
    for k in range(weight.shape[1]):
        total = fma(repeat(splat(weight[d, k]), like), load_wide(X, at - halo + k), total)
    return total


@kernel
def forward(counter, tasks, x, y, weight, bias, silu, parts, bundles, channels, initial_state, final_state):
    """One task: ``channels`` channels of one bundle. The last part of a segment writes its final state."""
    dim, width = weight.shape
    blocks = (dim + channels - 1) // channels
    halo = width - 1
    at = (halo + TILE - 1) // TILE * TILE
    Y = scratch(CHUNK, weight.dtype)
    X = scratch(at + CHUNK + TILE, weight.dtype)
    X[:] = 0
    wide = states_per_step(X) * TILE
    while True:
        task = take(counter)
        if task >= tasks:
            break
        bundle, d0 = task // blocks, task % blocks * channels
        for d in range(d0, min(d0 + channels, dim)):
            for p in range(bundles[bundle], bundles[bundle + 1]):
                length, offset, initial, final = parts[p, LENGTH], parts[p, FROM], parts[p, INITIAL], parts[p, FINAL]
                batch, begin = parts[p, BATCH], parts[p, BEGIN]
                end = offset + parts[p, STEPS]
                for t0 in range(offset, end, CHUNK):
                    steps = min(CHUNK, end - t0)
                    here = start(x, batch, 0, d, begin + t0)
                    load_window(X, at, x, here, t0, steps, halo, initial_state, initial, d)
                    there = start(y, batch, 0, d, begin + t0)
                    ask_for(x, here, steps)
                    ask_for(y, there, steps)
                    for t in range(0, steps, wide):
                        total = weighted(X, at + t, weight, bias, d)
                        if silu:
                            total = total * sigmoid(total)
                        store_wide(Y, t, total)
                    write_numbers(Y, 0, y, there, steps)
                if final >= 0 and end == length:
                    here = start(x, batch, 0, d, begin + length)
                    load_window(X, at, x, here, length, 0, halo, initial_state, initial, d)
                    for k in range(halo):
                        final_state[final, d, k] = X[at - halo + k]


# --- backward --------------------------------------------------------------------------------------------------------
# X are the inputs of a chunk and of what its taps see before and after it, G the gradients of the sums before the
# activation, S the sums for dweight and, last, for dbias: a vector for each, whose lanes are added up at the end.


@register_jitable
def through_activation(G, X, at, weight, bias, d, count):
    """G = dy times the slope of the activation, of ``count`` steps."""
    wide = states_per_step(X) * TILE
    for t in range(0, count, wide):
        total = weighted(X, at + t, weight, bias, d)
        s, one = sigmoid(total), constant(total, 1.0)
        store_wide(G, t, load_wide(G, t) * (s * fma(total, one - s, one)))


@register_jitable
def spread_back(DX, G, weight, d, steps):
    """dx of a chunk: each input is in the sums of its own step and of the ``width - 1`` after it."""
    like, halo, wide = load_wide(G, 0), weight.shape[1] - 1, states_per_step(G) * TILE
    for t in range(0, steps, wide):
        total = repeat(splat(weight.dtype.type(0)), like)
        for k in range(weight.shape[1]):
            total = fma(repeat(splat(weight[d, k]), like), load_wide(G, t + halo - k), total)
        store_wide(DX, t, total)


@register_jitable
def add_sums(S, G, X, at, width, steps):
    """What a chunk adds to the sums for dweight and dbias."""
    wide = states_per_step(X) * TILE
    for k in range(width):
        total = load_wide(S, k * wide)
        for t in range(0, steps, wide):
            total = fma(load_wide(G, t), load_wide(X, at - (width - 1) + t + k), total)
        store_wide(S, k * wide, total)
    total = load_wide(S, width * wide)
    for t in range(0, steps, wide):
        total = total + load_wide(G, t)
    store_wide(S, width * wide, total)


@register_jitable
def add_final(DX, dfinal_state, final, d, first, steps):
    """What the final state gives to dx of its inputs; the chunk is ``first`` steps past the first of these."""
    for k in range(dfinal_state.shape[2]):
        t = k - first
        if t >= 0 and t < steps:
            DX[t] += dfinal_state[final, d, k]


@register_jitable
def store_initial(dinitial_state, initial, dfinal_state, final, G, weight, d, length):
    """The gradient of the initial state: of the first steps, and of the final state if that goes back so far."""
    for i in range(weight.shape[1] - 1):
        g = weight.dtype.type(0)
        for k in range(i + 1):
            g += weight[d, k] * G[i - k]
        if final >= 0 and i >= length:
            g += dfinal_state[final, d, i - length]
        dinitial_state[initial, d, i] = g


@register_jitable
def store_sums(partials, bundle, d, S, F):
    """The lanes of the sums of a channel, added up; F is scratch."""
    wide, sums = states_per_step(S) * TILE, partials.shape[2]
    for k in range(sums):
        total = splat(S.dtype.type(0))
        for lane in range(0, wide, TILE):
            total = total + load(S, k * wide + lane)
        store(F, k * TILE, total)
    for k0 in range(0, sums, TILE):
        store(S, k0, lane_sums(F, k0 * TILE, TILE))
    for k in range(sums):
        partials[bundle, d, k] = S[k]


@kernel
def backward(
    counter, tasks, dy, x, dx, weight, bias, silu, parts, bundles, channels, initial_state, dfinal_state,
    dinitial_state, partials,
):  # fmt: skip
    """One task: ``channels`` channels of one bundle, whose sums for dweight and dbias are partials[bundle, d].

    G is needed ``width - 1`` steps past the chunk, where it is computed again by whoever owns those steps. X and G are
    zero past what was read: the sums run over whole vectors.
    """
    dim, width = weight.shape
    blocks = (dim + channels - 1) // channels
    halo = width - 1
    at = (halo + TILE - 1) // TILE * TILE
    DX = scratch(CHUNK, weight.dtype)
    wide = states_per_step(DX) * TILE
    X, G = scratch(2 * at + CHUNK + 2 * wide, weight.dtype), scratch(at + CHUNK + 2 * wide, weight.dtype)
    sums = (width + TILE) // TILE * TILE  # width + 1 in whole vectors
    S, F = scratch(sums * wide, weight.dtype), scratch(sums * TILE, weight.dtype)
    F[:] = 0
    X[:] = 0
    while True:
        task = take(counter)
        if task >= tasks:
            break
        bundle, d0 = task // blocks, task % blocks * channels
        for d in range(d0, min(d0 + channels, dim)):
            S[:] = 0
            for p in range(bundles[bundle], bundles[bundle + 1]):
                length, offset, initial, final = parts[p, LENGTH], parts[p, FROM], parts[p, INITIAL], parts[p, FINAL]
                batch, begin = parts[p, BATCH], parts[p, BEGIN]
                end = offset + parts[p, STEPS]
                for t0 in range(offset, max(end, offset + 1), CHUNK):  # also once for an empty segment: its states
                    steps = min(CHUNK, end - t0)
                    count = min(steps + halo, length - t0)
                    here, of_dy = start(x, batch, 0, d, begin + t0), start(dy, batch, 0, d, begin + t0)
                    there = start(dx, batch, 0, d, begin + t0)
                    load_window(X, at, x, here, t0, count, halo, initial_state, initial, d)
                    X[at + count : at + count + wide] = 0
                    read_numbers(G, 0, dy, of_dy, count)
                    ask_for(x, here, steps)
                    ask_for(dy, of_dy, steps)
                    ask_for(dx, there, steps)
                    if silu:
                        through_activation(G, X, at, weight, bias, d, count)
                    G[count : steps + halo + wide] = 0
                    spread_back(DX, G, weight, d, steps)
                    add_sums(S, G, X, at, width, steps)
                    if final >= 0:
                        add_final(DX, dfinal_state, final, d, t0 - (length - halo), steps)
                    if initial >= 0 and t0 == 0:
                        store_initial(dinitial_state, initial, dfinal_state, final, G, weight, d, length)
                    write_numbers(DX, 0, dx, there, steps)
            store_sums(partials, bundle, d, S, F)


@kernel
def update(counter, tasks, x, y, conv_state, weight, bias, silu):
    """One task: ``STEP_BLOCKS`` times 16 channels of a batch row, whose states nobody else touches."""
    dim, width = weight.shape
    batches, _, kept = conv_state.shape
    blocks = (dim + TILE - 1) // TILE
    X, Y = scratch(TILE, weight.dtype), scratch(TILE, weight.dtype)
    Y[:] = 0
    while True:
        task = take(counter)
        if task >= tasks:
            break
        for block in range(task * STEP_BLOCKS, min((task + 1) * STEP_BLOCKS, batches * blocks)):
            batch, d0 = block // blocks, block % blocks * TILE
            rows = min(TILE, dim - d0)
            read_numbers(X, 0, x, start(x, batch, 0, 0, d0), rows)
            for r in range(rows):
                total = bias[d0 + r] + weight[d0 + r, width - 1] * X[r]
                for k in range(width - 1):
                    total += weight[d0 + r, k] * conv_state[batch, d0 + r, kept - width + 1 + k]
                for k in range(kept - 1):
                    conv_state[batch, d0 + r, k] = conv_state[batch, d0 + r, k + 1]
                if kept > 0:
                    conv_state[batch, d0 + r, kept - 1] = X[r]
                Y[r] = total
            total = load(Y, 0)
            write_row(y, start(y, batch, 0, 0, d0), rows, total * sigmoid(total) if silu else total)


# --- what the ops call -----------------------------------------------------------------------------------------------


def _or_empty(states, weight):
    return np.empty((0, 0, 0), weight.dtype) if states is None else states


def _or_zeros(bias, weight):
    return np.zeros(len(weight), weight.dtype) if bias is None else bias


def channels_last(x, width):
    """Whether x is taken as it is because its channels are neighbours in memory: never, it is copied."""
    return False


def causal_conv1d_forward(x, weight, bias, silu, segments, initial_state, y, final_state):
    """Fill y and final_state (unless None) from x, both (batch, dim, length) with unit stride along time.

    weight, bias (or None) and states (or None) are contiguous, in the accumulation dtype.
    """
    parts, bundles, channels = cut(segments, initial_state is not None, final_state is not None)
    run(
        forward, (len(bundles) - 1) * -(-len(weight) // channels), view(x), view(y), weight, _or_zeros(bias, weight),
        silu, parts, bundles, channels, _or_empty(initial_state, weight), _or_empty(final_state, weight),
    )  # fmt: skip


@np.errstate(all="ignore")  # sums of partial sums may overflow, as those that kernels form
def causal_conv1d_backward(
    dy, x, weight, bias, silu, segments, initial_state, dfinal_state, dx, dweight, dbias, dinitial_state
):
    """Fill dx, dweight, dbias and dinitial_state (unless None); arrays as in ``causal_conv1d_forward``."""
    dim, width = weight.shape
    parts, bundles, channels = cut(segments, initial_state is not None, dfinal_state is not None)
    partials = np.empty((len(bundles) - 1, dim, width + 1), weight.dtype)
    run(
        backward, len(partials) * -(-dim // channels), view(dy), view(x), view(dx), weight, _or_zeros(bias, weight),
        silu, parts, bundles, channels, _or_empty(initial_state, weight), _or_empty(dfinal_state, weight),
        _or_empty(dinitial_state, weight), partials,
    )  # fmt: skip
    sums = partials.sum(axis=0)
    dweight[...] = sums[:, :width]
    if dbias is not None:
        dbias[...] = sums[:, width]


def causal_conv1d_update(x, conv_state, weight, bias, silu, y):
    """Fill y (batch, dim) from x and shift it into conv_state (batch, dim, kept).

    conv_state, weight and bias (or None) are in any storage dtype that the accumulation dtype holds; the last axis of
    each has unit stride.
    """
    x = x if x.strides[1] == x.itemsize else np.ascontiguousarray(x)
    dtype = np.float64 if x.dtype == np.float64 else np.float32
    state, weight = (np.require(array, dtype, ["C", "A", "W"]) for array in (conv_state, weight))
    bias = _or_zeros(None if bias is None else np.require(bias, dtype, ["C", "A", "W"]), weight)
    blocks = len(x) * -(-len(weight) // TILE)
    run(update, -(-blocks // STEP_BLOCKS), view(x[:, None]), view(y[:, None]), state, weight, bias, silu)
    if state is not conv_state:
        conv_state[...] = state
