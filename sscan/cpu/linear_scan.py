"""The recurrence h_t = a_t h_{t-1} + b_t on the CPU: 16 lines side by side, a line being a row or a part of one.

Few rows are cut into parts of equal length (but for the last), lines of their own. What a part makes of the state
before it is affine, h -> P h + S: a first pass finds P and S of every part, which are carried from part to part, and a
second pass writes the result. How rows are cut depends on their number and length only. P may leave the range of
numbers where the states do not, so that a part does not end in what the next one started from: then all is done again,
uncut.

Lines advance in tiles of 16 steps, transposed so that a vector holds one step of 16 lines. Where a line is shorter than
its neighbours it is padded with a = 1 and b = 0, which leave the state alone.
"""

import numpy as np
from numba.extending import register_jitable

from sscan.cpu._parallel import kernel, run, take
from sscan.cpu._rows import (
    PLANE,
    SQUARE,
    lanes,
    load_lanes,
    read_lanes,
    reals_per,
    store_lanes,
    transpose_lanes,
    write_lanes,
)
from sscan.cpu._tiles import ABSENT, TILE, start, view
from sscan.cpu._vector import conj, flush_subnormals, fma, prefetch, restore_environment, scratch

ENOUGH_ROWS, LINES, SHORTEST = 64, 256, 256  # rows that are not cut; lines to cut fewer rows into; steps of a part
AHEAD = 4 * TILE  # steps after which what is asked for now is used
TASK = 1 << 15  # numbers in a task: less is not worth waking a second thread


def cut(rows, length):
    """Parts of each row, and their length, a multiple of 16."""
    parts = 1 if rows >= ENOUGH_ROWS or rows == 0 else max(1, min(-(-LINES // rows), length // SHORTEST))
    return parts, -(-length // (parts * TILE)) * TILE


def lines_per_task(part_length):
    """A multiple of 16, so many that a task is worth a thread."""
    return max(1, TASK // (TILE * max(1, part_length))) * TILE


@register_jitable
def place_lines(steps, line0, lines, shape):
    """Steps of up to 16 lines from line0 on; the number of lines."""
    length, parts, part_length = shape
    count = min(TILE, lines - line0)
    for r in range(count):
        steps[r] = max(0, min(part_length, length - (line0 + r) % parts * part_length))
    return count


@register_jitable
def place(places, of, source, line0, count, shape, reals):
    """places[of + r] = where line r of an array begins: once for all of its tiles, as it takes a division."""
    _, parts, part_length = shape
    for r in range(count):
        row, part = (line0 + r) // parts, (line0 + r) % parts
        places[of + r] = start(source, 0, 0, row, reals * part * part_length)


@register_jitable
def load_tile(like, T, to, source, places, of, count, steps, t0, ahead, padding):
    """Tile ``to`` = 16 steps from t0 on, time-major; past the end of line r comes the r-th number at ``padding``.

    Memory is asked for what is read after some more tiles: no processor follows so many lines by itself.
    """
    for r in range(count):
        here = min(TILE, max(0, steps[r] - t0))
        at = places[of + r] + reals_per(like) * t0 * source.item
        prefetch(at + reals_per(like) * ahead * source.item)
        store_lanes(T, to + TILE * r, read_lanes(like, source, at, here))
        for k in range(here, TILE):
            T[to + TILE * r + k] = T[padding + r]
            if reals_per(like) == 2:
                T[to + PLANE + TILE * r + k] = T[padding + PLANE + r]
    transpose_lanes(like, T, to, to)


@register_jitable
def write_tile(like, T, source, destination, places, of, count, steps, t0, ahead):
    """The inverse of ``load_tile``; leaves the tile transposed."""
    transpose_lanes(like, T, source, source)
    for r in range(count):
        here = min(TILE, max(0, steps[r] - t0))
        at = places[of + r] + reals_per(like) * t0 * destination.item
        prefetch(at + reals_per(like) * ahead * destination.item)
        write_lanes(destination, at, here, load_lanes(like, T, source + TILE * r))


@kernel
def scan(counter, tasks, a, b, h, first, last, product, like_a, lines, per_task, shape, descending, adjoint):
    """One task: ``per_task`` lines, from the state ``first`` to ``last``; writes h and the product of a unless absent.

    ``shape`` is (length, parts, part_length); ``descending``: from the last step to the first. ``adjoint``: the
    recurrence is c <- conj(a) (b + c), which carries gradients.
    """
    nothing, one = lanes(like_a.dtype.type(0)), lanes(like_a.dtype.type(1))
    T, steps, places = scratch(5 * SQUARE, like_a.real.dtype), scratch(TILE, np.int64), scratch(3 * TILE, np.int64)
    T[:] = 0
    A, B, H, ONE, ZERO = 0, SQUARE, 2 * SQUARE, 3 * SQUARE, 4 * SQUARE
    of_a, of_b, of_h = 0, TILE, 2 * TILE
    ahead = -AHEAD if descending else AHEAD
    store_lanes(T, ONE, one)
    tiles = shape[2] // TILE
    environment = flush_subnormals()
    while True:
        task = take(counter)
        if task >= tasks:
            break
        for line0 in range(task * per_task, min((task + 1) * per_task, lines), TILE):
            count = place_lines(steps, line0, lines, shape)
            at = reals_per(nothing) * line0
            state, total = read_lanes(nothing, first, start(first, 0, 0, 0, at), count), one
            for of, array in ((of_a, a), (of_b, b), (of_h, h)):
                place(places, of, array, line0, count, shape, reals_per(nothing))
            for i in range(tiles):
                t0 = TILE * (tiles - 1 - i if descending else i)
                load_tile(nothing, T, A, a, places, of_a, count, steps, t0, ahead, ONE)
                load_tile(nothing, T, B, b, places, of_b, count, steps, t0, ahead, ZERO)
                for k in range(TILE):
                    s = TILE * (TILE - 1 - k if descending else k)
                    x, y = load_lanes(nothing, T, A + s), load_lanes(nothing, T, B + s)
                    if adjoint:
                        x = conj(x)
                        state = x * (y + state)
                    else:
                        state = fma(x, state, y)
                    total = total * x
                    store_lanes(T, H + s, state)
                if h.address:
                    write_tile(nothing, T, H, h, places, of_h, count, steps, t0, ahead)
            write_lanes(last, start(last, 0, 0, 0, at), count, state)
            if product.address:
                write_lanes(product, start(product, 0, 0, 0, at), count, total)
    restore_environment(environment)


@kernel
def backward(counter, tasks, dh, a, h, da, db, first, last, before, like_a, lines, per_task, shape, descending):
    """One task: ``per_task`` lines, against the direction of the scan; carries conj(a) G from ``first`` to ``last``.

    db = G = dh + carry, da = G conj(state before the step): the state is read one tile ahead, and ``before`` holds the
    state before each whole line.
    """
    nothing = lanes(like_a.dtype.type(0))
    T, steps, places = scratch(9 * SQUARE, like_a.real.dtype), scratch(TILE, np.int64), scratch(5 * TILE, np.int64)
    T[:] = 0
    A, DH, DA, DB, ONE, ZERO, BEFORE = 0, SQUARE, 2 * SQUARE, 3 * SQUARE, 4 * SQUARE, 5 * SQUARE, 6 * SQUARE
    H, NEXT = 7 * SQUARE, 8 * SQUARE
    of_dh, of_a, of_h, of_da, of_db = 0, TILE, 2 * TILE, 3 * TILE, 4 * TILE
    ahead = -AHEAD if descending else AHEAD
    store_lanes(T, ONE, lanes(like_a.dtype.type(1)))
    tiles = shape[2] // TILE
    towards, edge = (-TILE, PLANE - TILE) if descending else (TILE, 0)  # the step before in the scan's direction
    environment = flush_subnormals()
    while True:
        task = take(counter)
        if task >= tasks:
            break
        for line0 in range(task * per_task, min((task + 1) * per_task, lines), TILE):
            count = place_lines(steps, line0, lines, shape)
            at = reals_per(nothing) * line0
            carry = read_lanes(nothing, first, start(first, 0, 0, 0, at), count)
            store_lanes(T, BEFORE, read_lanes(nothing, before, start(before, 0, 0, 0, at), count))
            for of, array in ((of_dh, dh), (of_a, a), (of_h, h), (of_da, da), (of_db, db)):
                place(places, of, array, line0, count, shape, reals_per(nothing))
            load_tile(
                nothing, T, H, h, places, of_h, count, steps, TILE * (tiles - 1) if descending else 0, ahead, BEFORE
            )
            for i in range(tiles):
                t0 = TILE * (tiles - 1 - i if descending else i)
                load_tile(nothing, T, DH, dh, places, of_dh, count, steps, t0, ahead, ZERO)
                load_tile(nothing, T, A, a, places, of_a, count, steps, t0, ahead, ONE)
                beyond = load_lanes(nothing, T, BEFORE)
                if i + 1 < tiles:
                    load_tile(nothing, T, NEXT, h, places, of_h, count, steps, t0 + towards, ahead, BEFORE)
                    beyond = load_lanes(nothing, T, NEXT + edge)
                for k in range(TILE):
                    s = TILE * (TILE - 1 - k if descending else k)
                    G = load_lanes(nothing, T, DH + s) + carry
                    store_lanes(T, DB + s, G)
                    x = load_lanes(nothing, T, H + s + towards) if k + 1 < TILE else beyond
                    store_lanes(T, DA + s, G * conj(x))
                    carry = conj(load_lanes(nothing, T, A + s)) * G
                write_tile(nothing, T, DA, da, places, of_da, count, steps, t0, ahead)
                write_tile(nothing, T, DB, db, places, of_db, count, steps, t0, ahead)
                H, NEXT = NEXT, H
            write_lanes(last, start(last, 0, 0, 0, at), count, carry)
    restore_environment(environment)


@kernel
def combine(counter, tasks, product, states, backwards):
    """One task: everything. states[row, part] = the state that a part ends in becomes the one that it starts from.

    states[row] has one column more, for where the row starts from; ``backwards``: parts are passed from the last on.
    """
    while take(counter) < tasks:
        rows, parts = product.shape
        for row in range(rows):
            state = states[row, parts]
            for i in range(parts):
                part = parts - 1 - i if backwards else i
                end, states[row, part] = states[row, part], state
                state = product[row, part] * state + end if state != 0 else end


# --- what the ops call -----------------------------------------------------------------------------------------------


def _flat(array):
    return view(array.reshape(1, 1, -1))


def _shapes(rows, length):
    """How rows are laid out, (length, parts, part_length): cut, and as they are."""
    yield length, *cut(rows, length)
    yield length, 1, -(-length // TILE) * TILE


def _starts(a, b, initial, descending, adjoint, shape):
    """The state that every line starts from, (rows, parts), given those that the rows start from."""
    rows, (_, parts, part_length) = len(a), shape
    if parts == 1:
        return initial[:, None]
    per_task = lines_per_task(part_length)
    states, product = np.empty((rows, parts + 1), initial.dtype), np.empty((rows, parts), initial.dtype)
    zeros, last = np.zeros(rows * parts, initial.dtype), np.empty(rows * parts, initial.dtype)
    run(
        scan, -(-rows * parts // per_task), view(a[None]), view(b[None]), ABSENT, _flat(zeros), _flat(last),
        _flat(product), initial[:0], rows * parts, per_task, shape, descending, adjoint,
    )  # fmt: skip
    states[:, :parts], states[:, parts] = last.reshape(rows, parts), initial
    run(combine, 1, product, states, descending)
    return np.ascontiguousarray(states[:, :parts])


@np.errstate(all="ignore")
def _agree(first, last, descending):
    """Whether parts end in what the next ones started from, but for rounding: all (rows, parts).

    They do not if the product of a part has overflown, or has become 0 and would have grown again, and the states
    themselves have not.
    """
    ends, starts = (last[:, 1:], first[:, :-1]) if descending else (last[:, :-1], first[:, 1:])
    largest = np.abs(ends).max(axis=1, initial=0, keepdims=True)
    return bool((np.abs(ends - starts) <= 1e-3 * largest).all())


def linear_scan_forward(a, b, initial_state, reverse, h):
    """Fill h from a and b, all (rows, length) of one storage dtype with unit stride along time.

    initial_state (rows,) is contiguous, in the accumulation dtype.
    """
    for shape in _shapes(*a.shape):
        first, per_task = _starts(a, b, initial_state, reverse, False, shape), lines_per_task(shape[2])
        last = np.empty_like(first)
        run(
            scan, -(-first.size // per_task), view(a[None]), view(b[None]), view(h[None]), _flat(first), _flat(last),
            ABSENT, initial_state[:0], first.size, per_task, shape, reverse, False,
        )  # fmt: skip
        if _agree(first, last, reverse):
            return


def linear_scan_backward(dh, a, h, initial_state, reverse, da, db, dinitial_state):
    """Fill da, db and dinitial_state; arrays as in ``linear_scan_forward``."""
    rows, length = a.shape
    for shape in _shapes(rows, length):
        _, parts, part_length = shape
        first = _starts(a, dh, np.zeros_like(initial_state), not reverse, True, shape)
        before, last, per_task = np.empty_like(first), np.empty_like(first), lines_per_task(part_length)
        for part in range(parts):
            border = min((part + 1) * part_length, length) if reverse else part * part_length - 1
            before[:, part] = h[:, border] if 0 <= border < length else initial_state
        run(
            backward, -(-first.size // per_task), view(dh[None]), view(a[None]), view(h[None]), view(da[None]),
            view(db[None]), _flat(first), _flat(last), _flat(before), initial_state[:0], first.size, per_task,
            shape, not reverse,
        )  # fmt: skip
        dinitial_state[...] = last[:, -1 if reverse else 0]
        if _agree(first, last, not reverse):
            return
