"""One decoding step of the selective scan on the CPU: 16 states of a channel at a time, where they lie."""

import numpy as np

from sscan.cpu._parallel import kernel, run, take
from sscan.cpu._rows import lanes, rates, read_lanes, reals_per, write_lanes
from sscan.cpu._tiles import ABSENT, TILE, read_row, start, view, write_row
from sscan.cpu._vector import (
    constant,
    flush_subnormals,
    fma,
    lane_sums,
    real,
    restore_environment,
    scratch,
    splat,
    store,
)
from sscan.cpu._vector_math import decay, sigmoid, softplus

TASK = 1 << 16  # states in a task: less is not worth waking a second thread


@kernel
def update(
    counter, tasks, state, slots, x, dt, z, B, C, y, A, D, dt_bias, dt_softplus, like_A, sizes, per_task
):  # fmt: skip
    """One task: ``per_task`` blocks, each 16 channels of one row, whose states in slot ``slots[row]`` nobody else has.

    ``sizes`` is (dim, state, groups of B, groups of C); ``like_A`` is an empty array of A's dtype. States are read and
    written once.
    """
    dim, count, groups_B, groups_C = sizes
    blocks = (dim + TILE - 1) // TILE
    nothing = lanes(like_A.dtype.type(0))
    ratio = reals_per(nothing)
    none = real(nothing)
    tile, T = scratch(TILE * TILE, like_A.real.dtype), scratch(2 * TILE, like_A.real.dtype)
    tile[:] = 0  # lanes past the last channel
    environment = flush_subnormals()
    while True:
        task = take(counter)
        if task >= tasks:
            break
        for block in range(task * per_task, min((task + 1) * per_task, len(slots) * blocks)):
            row, d0 = block // blocks, block % blocks * TILE
            rows, slot = min(TILE, dim - d0), slots[row]
            if slot < 0:
                write_row(y, start(y, row, 0, 0, d0), rows, none)
                continue
            u, step = (
                read_row(none, x, start(x, row, 0, 0, d0), rows),
                read_row(none, dt, start(dt, row, 0, 0, d0), rows),
            )
            if dt_bias.address:
                step = step + read_row(none, dt_bias, start(dt_bias, 0, 0, 0, d0), rows)
            if dt_softplus:
                step = softplus(step)
            store(T, 0, step)
            store(T, TILE, step * u)
            for r in range(rows):
                group_B, group_C = (d0 + r) * groups_B // dim, (d0 + r) * groups_C // dim
                delta, delta_u, total = splat(T[r]), splat(T[TILE + r]), none
                for n in range(0, count, TILE):
                    size, here = min(TILE, count - n), start(state, slot, 0, d0 + r, ratio * n)
                    a = read_lanes(nothing, A, start(A, 0, 0, d0 + r, ratio * n), size)
                    b = read_lanes(nothing, B, start(B, row, 0, group_B, ratio * n), size)
                    c = read_lanes(nothing, C, start(C, row, 0, group_C, ratio * n), size)
                    h = fma(decay(delta, rates(a)), read_lanes(nothing, state, here, size), b * delta_u)
                    write_lanes(state, here, size, h)
                    total = total + real(c * h)
                store(tile, TILE * r, total)
            total = lane_sums(tile, 0, TILE) * constant(none, float(ratio))  # complex: 2 Re
            if D.address:
                total = fma(read_row(none, D, start(D, 0, 0, 0, d0), rows), u, total)
            if z.address:
                gate = read_row(none, z, start(z, row, 0, 0, d0), rows)
                total = total * (gate * sigmoid(gate))
            write_row(y, start(y, row, 0, 0, d0), rows, total)
    restore_environment(environment)


def _row(vector):
    return ABSENT if vector is None else view(vector[None, None])


def _rows(array):
    return ABSENT if array is None else view(array[:, None])


def selective_state_update(state, slots, x, dt, A, B, C, D, z, dt_bias, dt_softplus, A_log, y):
    """Fill y (batch, dim), and update the rows ``slots`` of state in place; a negative slot gives y = 0.

    ``slots`` (batch,) is of int32 or int64; None is 0, 1, 2, ...

    All arrays have unit stride along their last axis. state (slots, dim, state), x, dt, z and y (batch, dim), B and C
    (batch, groups, state) are of any storage dtype of one accumulation dtype; A (dim, state) in that, D and
    dt_bias in one that it holds. With ``A_log``, A is log(-A).
    """
    A = -np.exp(A) if A_log else A
    dim, count = A.shape
    slots = np.arange(len(x)) if slots is None else np.array(slots, np.int64)
    per_task = max(1, TASK // max(1, TILE * count))
    blocks = len(x) * -(-dim // TILE)
    run(
        update, -(-blocks // per_task), view(state), slots, _rows(x), _rows(dt), _rows(z), view(B), view(C), _rows(y),
        view(A[None]), _row(D), _row(dt_bias), dt_softplus, np.empty(0, A.dtype),
        (dim, count, B.shape[1], C.shape[1]), per_task,
    )  # fmt: skip
