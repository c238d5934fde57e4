"""The recurrence h_t = a_t h_{t-1} + b_t on the CPU: 16 lines side by side, a line being a row or a part of one.

Few rows are cut into parts of equal length (but for the last), lines of their own. What a part makes of the state
before it is affine, h -> P h + S: a first pass finds P and S of every part, which are carried from part to part, and a
second pass writes the result. How rows are cut depends on their number and length only. P may leave the range of
numbers where the states do not, so that a part does not end in what the next one started from: then all is done again,
uncut.

Lines advance in *chunks* of four tiles of 16 steps, transposed so that a vector holds one step of 16 lines. Where a
line is shorter than its neighbours it is padded with a = 1 and b = 0, which leave the state alone.
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
from sscan.cpu._tiles import ABSENT, TILE, pieces, start, view
from sscan.cpu._vector import conj, flush_subnormals, fma, prefetch, restore_environment, scratch

ENOUGH_ROWS, LINES, SHORTEST = 64, 256, 256  # rows that are not cut; lines to cut fewer rows into; steps of a part
CHUNK = 4  # tiles of a line that are read at once, which are neighbours in memory
STEPS = CHUNK * TILE  # of a chunk
TASK = 1 << 15  # numbers in a task: less is not worth waking a second thread


def cut(rows, length):
    """Parts of each row, and their length, a multiple of 16."""
    parts = 1 if rows >= ENOUGH_ROWS or rows == 0 else max(1, min(-(-LINES // rows), length // SHORTEST))
    return parts, -(-length // (parts * TILE)) * TILE


@register_jitable
def chunk_of(i, length, descending):
    """Where the i-th chunk on the way begins, and how many tiles it has: the only one of an empty line none."""
    last = max(0, pieces(length, STEPS) - 1)
    t0 = STEPS * (last - i if descending else i)
    return t0, min(STEPS, length - t0) // TILE


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
def at_step(like, s):
    """From the beginning of a chunk to its step s, of all lines."""
    return s // TILE * PLANE * reals_per(like) + s % TILE * TILE


@register_jitable
def load_chunk(like, T, to, source, places, of, count, steps, t0, tiles, ahead, padding):
    """Fill ``tiles`` tiles from ``to`` on with the steps from t0 on, time-major; past the end of line r T[padding + r].

    Memory is asked for what the next chunk reads: no processor follows so many lines by itself.
    """
    square, item = PLANE * reals_per(like), source.item * reals_per(like)
    for r in range(count):
        here = min(TILE * tiles, max(0, steps[r] - t0))
        at, whole = places[of + r] + t0 * item, here // TILE
        for i in range(whole):
            prefetch(at + (i * TILE + ahead) * item)
            store_lanes(T, to + i * square + TILE * r, read_lanes(like, source, at + i * TILE * item, TILE))
        if here > whole * TILE:
            rest = read_lanes(like, source, at + whole * TILE * item, here - whole * TILE)
            store_lanes(T, to + whole * square + TILE * r, rest)
        for k in range(here, TILE * tiles):
            empty = to + k // TILE * square + TILE * r + k % TILE
            T[empty] = T[padding + r]
            if reals_per(like) == 2:
                T[empty + PLANE] = T[padding + PLANE + r]
    for i in range(tiles):
        transpose_lanes(like, T, to + i * square, to + i * square)


@register_jitable
def write_chunk(like, T, source, destination, places, of, count, steps, t0, tiles, ahead):
    """The inverse of ``load_chunk``; leaves the tiles transposed."""
    square, item = PLANE * reals_per(like), destination.item * reals_per(like)
    for i in range(tiles):
        transpose_lanes(like, T, source + i * square, source + i * square)
    for r in range(count):
        here = min(TILE * tiles, max(0, steps[r] - t0))
        at, whole = places[of + r] + t0 * item, here // TILE
        for i in range(whole):
            prefetch(at + (i * TILE + ahead) * item)
            write_lanes(destination, at + i * TILE * item, TILE, load_lanes(like, T, source + i * square + TILE * r))
        if here > whole * TILE:
            rest = load_lanes(like, T, source + whole * square + TILE * r)
            write_lanes(destination, at + whole * TILE * item, here - whole * TILE, rest)


@kernel
def scan(counter, tasks, a, b, h, first, last, product, like_a, lines, per_task, shape, descending, adjoint):
    """One task: ``per_task`` lines, from the state ``first`` to ``last``; writes h and the product of a unless absent.

    ``shape`` is (length, parts, part_length); ``descending``: from the last step to the first. ``adjoint``: the
    recurrence is c <- conj(a) (b + c), which carries gradients.
    """
    nothing, one = lanes(like_a.dtype.type(0)), lanes(like_a.dtype.type(1))
    chunk = CHUNK * PLANE * reals_per(nothing)
    T, places = scratch(3 * chunk + 2 * SQUARE, like_a.real.dtype), scratch(3 * TILE, np.int64)
    steps = scratch(TILE, np.int64)
    T[:] = 0
    A, B, H, ONE, ZERO = 0, chunk, 2 * chunk, 3 * chunk, 3 * chunk + SQUARE
    of_a, of_b, of_h = 0, TILE, 2 * TILE
    store_lanes(T, ONE, one)
    chunks, ahead = pieces(shape[2], STEPS), -STEPS if descending else STEPS
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
            for i in range(chunks):
                t0, tiles = chunk_of(i, shape[2], descending)
                load_chunk(nothing, T, A, a, places, of_a, count, steps, t0, tiles, ahead, ONE)
                load_chunk(nothing, T, B, b, places, of_b, count, steps, t0, tiles, ahead, ZERO)
                for k in range(TILE * tiles):
                    s = at_step(nothing, TILE * tiles - 1 - k if descending else k)
                    x, y = load_lanes(nothing, T, A + s), load_lanes(nothing, T, B + s)
                    if adjoint:
                        x = conj(x)
                        state = x * (y + state)
                    else:
                        state = fma(x, state, y)
                    total = total * x
                    store_lanes(T, H + s, state)
                if h.address:
                    write_chunk(nothing, T, H, h, places, of_h, count, steps, t0, tiles, ahead)
            write_lanes(last, start(last, 0, 0, 0, at), count, state)
            if product.address:
                write_lanes(product, start(product, 0, 0, 0, at), count, total)
    restore_environment(environment)


@kernel
def backward(counter, tasks, dh, a, h, da, db, first, last, before, like_a, lines, per_task, shape, descending):
    """One task: ``per_task`` lines, against the direction of the scan; carries conj(a) G from ``first`` to ``last``.

    db = G = dh + carry, da = G conj(state before the step): the state is read one chunk ahead, and ``before`` holds the
    state before each whole line.
    """
    nothing = lanes(like_a.dtype.type(0))
    chunk = CHUNK * PLANE * reals_per(nothing)
    T, places = scratch(6 * chunk + 3 * SQUARE, like_a.real.dtype), scratch(5 * TILE, np.int64)
    steps = scratch(TILE, np.int64)
    T[:] = 0
    A, DH, DA, DB, H, NEXT = 0, chunk, 2 * chunk, 3 * chunk, 4 * chunk, 5 * chunk
    ONE, ZERO, BEFORE = 6 * chunk, 6 * chunk + SQUARE, 6 * chunk + 2 * SQUARE
    of_dh, of_a, of_h, of_da, of_db = 0, TILE, 2 * TILE, 3 * TILE, 4 * TILE
    store_lanes(T, ONE, lanes(like_a.dtype.type(1)))
    chunks, ahead = pieces(shape[2], STEPS), -STEPS if descending else STEPS
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
            t0, tiles = chunk_of(0, shape[2], descending)
            load_chunk(nothing, T, H, h, places, of_h, count, steps, t0, tiles, ahead, BEFORE)
            for i in range(chunks):
                t0, tiles = chunk_of(i, shape[2], descending)
                load_chunk(nothing, T, DH, dh, places, of_dh, count, steps, t0, tiles, ahead, ZERO)
                load_chunk(nothing, T, A, a, places, of_a, count, steps, t0, tiles, ahead, ONE)
                beyond = load_lanes(nothing, T, BEFORE)
                if i + 1 < chunks:
                    then, more = chunk_of(i + 1, shape[2], descending)
                    load_chunk(nothing, T, NEXT, h, places, of_h, count, steps, then, more, ahead, BEFORE)
                    beyond = load_lanes(nothing, T, NEXT + at_step(nothing, TILE * more - 1 if descending else 0))
                for k in range(TILE * tiles):
                    step, towards = (TILE * tiles - 1 - k, -1) if descending else (k, 1)
                    here = at_step(nothing, step)
                    G = load_lanes(nothing, T, DH + here) + carry
                    store_lanes(T, DB + here, G)
                    x = beyond
                    if k + 1 < TILE * tiles:
                        x = load_lanes(nothing, T, H + at_step(nothing, step + towards))
                    store_lanes(T, DA + here, G * conj(x))
                    carry = conj(load_lanes(nothing, T, A + here)) * G
                write_chunk(nothing, T, DA, da, places, of_da, count, steps, t0, tiles, ahead)
                write_chunk(nothing, T, DB, db, places, of_db, count, steps, t0, tiles, ahead)
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
