"""RMS normalisation on the CPU: a row is converted once and stays in the nearest cache between its two passes.

Arrays are (rows, size) with unit stride along a row; ``weight`` is padded with zeros to whole wide vectors.
"""

import functools
import math

import numpy as np
from numba.extending import register_jitable

from sscan.cpu._parallel import kernel, run, take
from sscan.cpu._rows import write_numbers
from sscan.cpu._tiles import ABSENT, TILE, read_numbers, start, view
from sscan.cpu._vector import constant, fma, load, load_wide, repeat, scratch, splat, states_per_step, store, store_wide

# Numbers in a task. Backward, a task also writes a row of dweight's partial sums, so it has at least 16 rows.
TASK, BACKWARD_TASK, BACKWARD_ROWS = 1 << 14, 1 << 15, 16


@register_jitable
def load_sum(S, R, x, residual, row, size):
    """S = x + residual of one row; R is scratch. Returns S's sum of squares as a wide vector."""
    wide = states_per_step(S) * TILE
    read_numbers(S, 0, x, start(x, 0, 0, row, 0), size)
    if residual.address:
        read_numbers(R, 0, residual, start(residual, 0, 0, row, 0), size)
    total = constant(load_wide(S, 0), 0.0)
    for k in range(0, size, wide):
        s = load_wide(S, k)
        if residual.address:
            s = s + load_wide(R, k)
            store_wide(S, k, s)
        total = fma(s, s, total)
    return total


@register_jitable
def total_of(x, lanes):
    """Sum of the lanes of a wide vector in a fixed order; ``lanes`` is scratch for it."""
    store_wide(lanes, 0, x)
    narrow = load(lanes, 0)
    for k in range(1, states_per_step(lanes)):
        narrow = narrow + load(lanes, k * TILE)
    store(lanes, 0, narrow)
    total = lanes[0]
    for k in range(1, TILE):
        total += lanes[k]
    return total


@register_jitable
def inverse_root(S, total, eps, size, limits):
    """(r, scale) = 1 / sqrt(mean(S^2) + eps) twice, from the sum of squares.

    If that has left its ``limits``, S is divided by a number of its size: what r S is stays as it was, and scale is r
    over that number. A row of zeros without eps, and what is not finite, are left alone.
    """
    one, size = S.dtype.type(1), S.dtype.type(size)
    x = total / size + eps
    if limits[0] <= x <= limits[1]:
        r = one / math.sqrt(x)
        return r, r
    most = math.sqrt(eps)
    for k in range(len(S)):
        most = max(most, abs(S[k]))
    if not (most > 0 and most <= limits[1]):
        return one / math.sqrt(x), one / math.sqrt(x)
    square = S.dtype.type(0)
    for k in range(len(S)):
        S[k] /= most
        square += S[k] * S[k]
    r = one / math.sqrt(square / size + eps / most / most)
    return r, r / most


@kernel
def forward(counter, tasks, x, residual, y, residual_out, weight, eps, rows, size, per_task, limits):
    """One task: ``per_task`` rows."""
    S, R = scratch(len(weight), weight.dtype), scratch(len(weight), weight.dtype)
    wide = states_per_step(S) * TILE
    Y, lanes = scratch(len(weight), weight.dtype), scratch(wide, weight.dtype)
    S[:] = 0  # what lies past the row stays zero
    R[:] = 0
    while True:
        task = take(counter)
        if task >= tasks:
            break
        for row in range(task * per_task, min((task + 1) * per_task, rows)):
            total = total_of(load_sum(S, R, x, residual, row, size), lanes)
            if residual_out.address:
                write_numbers(S, 0, residual_out, start(residual_out, 0, 0, row, 0), size)
            r = repeat(splat(inverse_root(S, total, eps, size, limits)[0]), load_wide(S, 0))
            for k in range(0, size, wide):
                store_wide(Y, k, load_wide(S, k) * r * load_wide(weight, k))
            write_numbers(Y, 0, y, start(y, 0, 0, row, 0), size)


@kernel
def backward(
    counter, tasks, dy, x, residual, dresidual_out, dx, dresidual, partials, weight, eps, rows, size, per_task, limits
):  # fmt: skip
    """One task: ``per_task`` rows, whose sum for dweight is partials[task]."""
    S, R = scratch(len(weight), weight.dtype), scratch(len(weight), weight.dtype)
    wide = states_per_step(S) * TILE
    DY, DW = scratch(len(weight), weight.dtype), scratch(len(weight), weight.dtype)
    lanes = scratch(wide, weight.dtype)
    S[:] = 0  # what lies past the row stays zero
    R[:] = 0
    DY[:] = 0
    while True:
        task = take(counter)
        if task >= tasks:
            break
        DW[:] = 0
        for row in range(task * per_task, min((task + 1) * per_task, rows)):
            total = total_of(load_sum(S, R, x, residual, row, size), lanes)
            root, scale = inverse_root(S, total, eps, size, limits)
            r, scales = repeat(splat(root), load_wide(S, 0)), repeat(splat(scale), load_wide(S, 0))
            read_numbers(DY, 0, dy, start(dy, 0, 0, row, 0), size)
            dot = constant(r, 0.0)
            for k in range(0, size, wide):
                dot = fma(load_wide(DY, k) * load_wide(weight, k), load_wide(S, k) * r, dot)
            mean = repeat(splat(total_of(dot, lanes) / weight.dtype.type(size)), r)
            if dresidual_out.address:
                read_numbers(R, 0, dresidual_out, start(dresidual_out, 0, 0, row, 0), size)
            for k in range(0, size, wide):
                n, d = load_wide(S, k) * r, load_wide(DY, k)
                store_wide(DW, k, fma(d, n, load_wide(DW, k)))
                d = scales * (d * load_wide(weight, k) - n * mean)
                if dresidual_out.address:
                    d = d + load_wide(R, k)
                store_wide(DY, k, d)
            write_numbers(DY, 0, dx, start(dx, 0, 0, row, 0), size)
            if dresidual.address:
                write_numbers(DY, 0, dresidual, start(dresidual, 0, 0, row, 0), size)
        for k in range(size):
            partials[task, k] = DW[k]


# --- what the ops call -----------------------------------------------------------------------------------------------


def _view(array):
    return ABSENT if array is None else view(array[None])


def _padded(weight):
    return np.append(weight, np.zeros(-len(weight) % (4 * TILE) or 4 * TILE * (len(weight) == 0), weight.dtype))


@functools.cache
def _limits(dtype):
    """Between which a mean of squares has all of its digits."""
    info = np.finfo(dtype)
    return info.tiny / info.eps, info.max


def rms_norm_forward(x, weight, residual, eps, y, residual_out):
    """Fill y and residual_out (unless None) from x and residual (or None), all (rows, size)."""
    rows, size = x.shape
    per_task = max(1, TASK // max(1, size))
    views = _view(x), _view(residual), _view(y), _view(residual_out)
    eps, limits = weight.dtype.type(eps), _limits(weight.dtype)
    run(forward, -(-rows // per_task), *views, _padded(weight), eps, rows, size, per_task, limits)


@np.errstate(all="ignore")  # sums of partial sums may overflow, as those that kernels form
def rms_norm_backward(dy, x, weight, residual, eps, dresidual_out, dx, dweight, dresidual):
    """Fill dx, dweight and dresidual (unless None), all but dweight (rows, size)."""
    rows, size = x.shape
    per_task = max(BACKWARD_ROWS, BACKWARD_TASK // max(1, size))
    views = (_view(array) for array in (dy, x, residual, dresidual_out, dx, dresidual))
    partials = np.empty((-(-rows // per_task), size), weight.dtype)
    eps, limits = weight.dtype.type(eps), _limits(weight.dtype)
    run(backward, len(partials), *views, partials, _padded(weight), eps, rows, size, per_task, limits)
    partials.sum(axis=0, out=dweight)
