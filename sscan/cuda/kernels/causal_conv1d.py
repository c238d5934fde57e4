"""The causal depthwise convolution on the GPU.

``forward`` and ``backward``, for small widths: a warp owns a channel and goes through tiles of it in time. Each lane
has one group of consecutive steps, 16 aligned bytes. What the taps see before the group (and, backward, the gradients
after it) the lanes get from their neighbours, the first (last) ones from the tile that the warp had before. The next
tile is asked for before this one is worked on. Rows that do not begin or end at a whole group begin with a group that
is partly outside, and end with one; their steps are read and written one by one. Sums for dweight stay in registers
until the warp is done.

Memory traffic: forward reads x and writes y, backward reads dy and x and writes dx, everything once.

A *mask* says which inputs a step does not see because they belong to another sequence, by a table of *ages*: how many
inputs before a step are of its sequence, at most width - 1 (``seq_idx``: those before the row count, as the initial
state is of the first sequence). With "states", a table has the number of each step's sequence too, and taps that reach
before a sequence read its initial state.

``*_wide`` is for any width: a thread owns a step and loops over the taps.
"""

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._math import real_functions
from sscan.cuda._primitives import (
    INTEGER_READERS,
    as_real,
    await_previous,
    block_index,
    converge,
    dtype_of,
    fma,
    local_array,
    quotient,
    reader,
    select,
    shuffle_from,
    stored_array,
    stored_reader,
    thread_index,
    widener,
    writer,
)
from sscan.cuda._target import device
from sscan.cuda.causal_conv1d import AGES, BLOCK, BLOCK_OF_STEP, CHANNEL_BITS, CHANNELS, STEPS, WARP
from sscan.cuda.kernels._segments import segment
from sscan.cuda.kernels._warp import lane_sum

read_integer = INTEGER_READERS[64]


def real_of_storage(storage):
    """The dtype of arithmetic."""
    return np.dtype(np.float64 if storage == "float64" else np.float32)


def element_reader(storage, real, constant=True):
    """``read(address, index, valid)``: one number, 0 unless ``valid``."""
    load, numbers = reader(dtype_of(storage), real, 1, constant=constant), local_array(1, real)

    @device
    def read(address, index, valid):
        value = numbers()
        load(value, address, index, select(valid, 1, 0))
        return value[0]

    return read


def element_writer(storage, real):
    """``write(address, index, x, valid)``: one number, if ``valid``."""
    store, numbers = writer(dtype_of(storage), real, 1), local_array(1, real)

    @device
    def write(address, index, x, valid):
        value = numbers()
        value[0] = x
        store(address, index, value, select(valid, 1, 0))

    return write


def activations(real, silu):
    """``activate(x)`` and ``slope(x)``, its derivative."""
    sigmoid, one = real_functions(real).sigmoid, real.type(1)

    @device
    def silu_of(x):
        return x * sigmoid(x)

    @device
    def silu_slope(x):
        s = sigmoid(x)
        return s * fma(x, one - s, one)

    return (silu_of, silu_slope) if silu else (device(lambda x: x), device(lambda x: one))


# --- small widths ----------------------------------------------------------------------------------------------------


# Steps are counted from the start of a warp's part of a row, in 32 bits, since those of 64 are two instructions each.
# Groups that begin from `low` to `high` are all inside of the row.
short = np.int32
FAR = short(1 << 30)


def whole_groups(ends):
    """Whether the group at step ``t`` is inside of the row; none is partly outside at its begin without ``ends``."""
    return device((lambda t, low, high: (t >= low) & (t <= high)) if ends else (lambda t, low, high: t <= high))


@device
def borders(start, length, group):
    """``low`` and ``high`` of a part that begins at step ``start`` of a row, unless ``length`` is 0."""
    left = length - start
    left = select(left > 0, select(left < FAR, short(left), FAR), short(-FAR))
    return select(start == 0, short(0), short(-FAR)), short(left - group)


def group_reader(storage, real, group, ends):
    """``make()``, ``ask(raw, address, t, ahead, low, high)`` and ``take(into, raw)``: a group of a row.

    It lies ``ahead`` steps behind that of step ``t``, which ``address`` is of. If it is not all inside of the row, it
    is 0. What is asked for is waited for where it is taken.
    """
    dtype, whole = dtype_of(storage), whole_groups(ends)
    if group == 1:
        load_one = reader(dtype, real, 1)

        @device
        def ask_one(raw, address, t, ahead, low, high):
            load_one(raw, address, ahead, select(whole(short(t + ahead), low, high), 1, 0))

        @device
        def take_one(into, raw):
            into[0] = raw[0]

        return local_array(1, real), ask_one, take_one
    load, widen = stored_reader(dtype, group, True), widener(dtype, real, group)

    @device
    def ask(raw, address, t, ahead, low, high):
        load(raw, 0, address, ahead, select(whole(short(t + ahead), low, high), group, 0))

    @device
    def take(into, raw):
        widen(into, raw, 0)

    return stored_array(group, dtype), ask, take


def phase_of(storage, group):
    """``phase(address, row)``: the steps of a row's first group that are before the row."""
    shift, most = dtype_of(storage).itemsize.bit_length() - 1, group - 1

    @device
    def phase(address, row):
        return ((address >> shift) + row) & most

    return phase


def ends_of_rows(storage, real, group):
    """``add(into, address, t, low, high)`` and ``write(address, t, values, low, high)``: groups partly outside.

    ``address`` is of step ``t``.
    """
    read_one, write_one = element_reader(storage, real), element_writer(storage, real)

    @device
    def inside(t, k, low, high):
        return ((t < low) | (t > high)) & (t + k >= low) & (t + k < high + group)

    @device
    def add(into, address, t, low, high):
        for k in range(group):
            into[k] = into[k] + read_one(address, k, inside(t, k, low, high))

    @device
    def write(address, t, values, low, high):
        for k in range(group):
            write_one(address, k, values[k], inside(t, k, low, high))

    return add, write


def neighbours(group, halo):
    """``before(window, previous, lane)`` and ``after(window, following, lane)``: a window beyond the lane's own group.

    Before: window[:halo] of window[halo:]; after: window[group:] of window[:group]. The groups that the first lanes
    look back to, and the last ones forward, are those of the last and first lanes in another tile.
    """

    @device
    def before(window, previous, lane):
        for m in range(1, halo + 1):
            back = (m + group - 1) // group
            k = back * group - m
            value = select(lane >= WARP - back, previous[k], window[halo + k])
            window[halo - m] = shuffle_from(value, (lane - back) & (WARP - 1))

    @device
    def after(window, following, lane):
        for j in range(halo):
            ahead = 1 + j // group
            k = j % group
            value = select(lane < ahead, following[k], window[k])
            window[group + j] = shuffle_from(value, (lane + ahead) & (WARP - 1))

    return before, after


def tap_of(real, width, mask):
    """``tap(X, age, j, k, initial_state, state, head)``: what tap k sees at a lane's step j, by the step's age."""
    read, halo, zero = element_reader(real.name, real), width - 1, real.type(0)
    ages_seen = tuple(real.type(j) for j in range(width))
    masked, states = mask != "", mask == "states"

    @device
    def tap(X, age, j, k, initial_state, state, head):
        value = X[j + k]
        if masked:
            value = select(age >= ages_seen[halo - k], value, zero)
        if states:
            value = value + read(initial_state, state + k, head & (age < ages_seen[halo - k]))
        return value

    return tap


def initial_adder(real, halo, group):
    """``add_initial``: the initial state to the groups before the first step, of the first tile and the one before."""
    read, tile_steps = element_reader(real.name, real), WARP * group

    @device
    def add_initial(V, P, initial_state, state_row, t):
        for k in range(group):
            at = t + k
            V[k] = V[k] + read(initial_state, state_row + halo + at, (at >= -halo) & (at < 0))
            at = t + k - tile_steps
            P[k] = P[k] + read(initial_state, state_row + halo + at, (at >= -halo) & (at < 0))

    return add_initial


def sums_of_taps(real, width, mask):
    """``first_state``: where the taps of a step find the initial state of its sequence, and whether they look there.

    ``weighted``: the sum of a lane's step j before the activation.
    """
    halo, states, tap = width - 1, mask == "states", tap_of(real, width, mask)
    oldest, integer = real.type(halo), np.int64

    @device
    def first_state(age, at, steps, sequences, wanted, dim, d):
        state, head = d, d < 0
        if states:
            head = wanted & (age < oldest) & (at >= 0) & (at < steps)
            sequence = read_integer(sequences, at, select(head, 1, 0))
            state = (sequence * dim + d) * halo + integer(age)
        return state, head

    @device
    def weighted(X, W, b, age, j, initial_state, state, head):
        total = b
        for k in range(width):
            total = fma(W[k], tap(X, age, j, k, initial_state, state, head), total)
        return total

    return first_state, weighted


@device
def place(dim):
    """(part, channel, whether there is one) of a warp."""
    blocks = (dim + CHANNELS - 1) >> CHANNEL_BITS
    part = quotient(block_index(), blocks)
    d = (block_index() - part * blocks) * CHANNELS + (thread_index() >> 5)
    return part, select(d < dim, d, 0), d < dim


def taps_reader(real, width):
    """``read_taps``: a channel's weights, and its bias."""
    read, zero = element_reader(real.name, real), real.type(0)

    @device
    def read_taps(W, weight, bias, d):
        for k in range(width):
            W[k] = read(weight, d * width + k, True)
        b = zero
        if bias != 0:
            b = read(bias, d, True)
        return b

    return read_taps


def forward(storage, width, group, ends, silu, mask):
    """A warp has ``tiles_of_part`` tiles of one row. ``ends``: groups may be partly outside of their rows."""
    real, halo, tile_steps = real_of_storage(storage), width - 1, WARP * group
    back, phase, read_taps = -(-halo // group), phase_of(storage, group), taps_reader(real, width)
    make_raw, ask, take = group_reader(storage, real, group, ends)
    add_ends, write_ends = ends_of_rows(storage, real, group)
    before, _ = neighbours(group, halo)
    add_initial, (first_state, weighted) = initial_adder(real, halo, group), sums_of_taps(real, width, mask)
    read_age, write = element_reader(AGES, real), writer(dtype_of(storage), real, group, group > 1)
    window, numbers, taps = local_array(halo + group, real), local_array(group, real), local_array(width, real)
    (activate, _), oldest, masked, states = activations(real, silu), real.type(halo), mask != "", mask == "states"
    whole, shift = whole_groups(ends), dtype_of(storage).itemsize.bit_length() - 1
    tile_bytes = tile_steps << shift

    @device
    def work(
        raw, X, V, P, Y, W, b, x_at, y_at, t, low, high, turns, begins, at_end, start, steps, d, dim, lane, ages,
        age_row, sequences, initial_state, state_row,
    ):  # fmt: skip
        """A tile: what was asked for is taken, the tile after the next asked for, y written, and P set for the next."""
        take(V, raw)
        if ends:
            if begins | at_end:
                add_ends(V, x_at, t, low, high)
        if turns > 2:
            ask(raw, x_at, t, 2 * tile_steps, low, high)
        if (initial_state != 0) & begins & (not states):
            add_initial(V, P, initial_state, state_row, t)
        for k in range(group):
            X[halo + k] = V[k]
        before(X, P, lane)
        converge()
        for j in range(group):
            age, at = oldest, start + np.int64(t) + j
            if masked:
                age = read_age(ages, age_row + at, (at >= 0) & (at < steps))
            state, head = first_state(age, at, steps, sequences, True, dim, d)
            Y[j] = activate(weighted(X, W, b, age, j, initial_state, state, head))
        write(y_at, 0, Y, select(whole(t, low, high), group, 0))
        if ends:
            if begins | at_end:
                write_ends(y_at, t, Y, low, high)
        for k in range(group):
            P[k] = V[k]

    def kernel(
        x, y, weight, bias, initial_state, ages, sequences, dim, length, tiles, parts, tiles_of_part, x_batch, x_dim,
        y_batch, y_dim,
    ):  # fmt: skip
        await_previous()
        X, V, P, Y, W, raw, following = window(), numbers(), numbers(), numbers(), taps(), make_raw(), make_raw()
        lane, (rest, d, inside) = thread_index() & (WARP - 1), place(dim)
        batch, steps = quotient(rest, parts), select(inside, length, 0)
        first = (rest - batch * parts) * tiles_of_part
        start = first * tile_steps
        low, high = borders(start, steps, group)
        tiles_left, t = short(min(tiles - first, FAR)), short(lane * group)
        turns, begins = min(short(tiles_of_part), tiles_left), first == 0
        last_two = short(turns - tiles_left + 2)  # turns of the row's last two tiles: this and less
        row, y_row, state_row = batch * x_batch + d * x_dim, batch * y_batch + d * y_dim, (batch * dim + d) * halo
        if ends:
            t = short(t - phase(x, row))
        x_at, y_at = x + ((row + start + t) << shift), y + ((y_row + start + t) << shift)
        ask(raw, x_at, t, -tile_steps, low, select((lane >= WARP - back) & (first > 0), high, short(-FAR)))
        take(P, raw)
        ask(raw, x_at, t, 0, low, high)
        if turns > 1:
            ask(following, x_at, t, tile_steps, low, high)
        b, age_row = read_taps(W, weight, bias, d), batch * length
        while turns > 0:
            work(
                raw, X, V, P, Y, W, b, x_at, y_at, t, low, high, turns, begins, turns <= last_two, start, steps, d, dim,
                lane, ages, age_row, sequences, initial_state, state_row,
            )  # fmt: skip
            begins, turns, t = False, short(turns - 1), short(t + tile_steps)
            x_at, y_at = x_at + tile_bytes, y_at + tile_bytes
            if turns > 0:
                work(
                    following, X, V, P, Y, W, b, x_at, y_at, t, low, high, turns, False, turns <= last_two, start,
                    steps, d, dim, lane, ages, age_row, sequences, initial_state, state_row,
                )  # fmt: skip
                turns, t = short(turns - 1), short(t + tile_steps)
                x_at, y_at = x_at + tile_bytes, y_at + tile_bytes

    lean = real.itemsize == 4 and width <= 4 and not masked
    return kernel, Shape(CHANNELS * WARP, 10 if lean else 4)


def final_gradients(real, width, mask):
    """``of_packed`` and ``of_row``: what dfinal_state adds to dx of the last steps of a sequence, or of a row."""
    halo, masked, integer = width - 1, mask != "", np.int64
    read, read_age = element_reader(real.name, real), element_reader(AGES, real)
    ages_seen = tuple(real.type(j) for j in range(width))

    @device
    def of_packed(dfinal_state, sequences, A, j, at, steps, dim, d):
        last_one, ahead, index = at < 0, (at >= 0) & (at < steps), at * 0
        for k in range(1, width):
            turns = A[j + k] < ages_seen[k]
            last_one = last_one | (ahead & turns)
            index = select(ahead & turns, halo - k, index)
            ahead = ahead & (A[j + k] >= ages_seen[k])
        last_one = last_one & (at >= 0)
        state = read_integer(sequences, at, select(last_one, 1, 0)) * dim + d
        return read(dfinal_state, state * halo + index, last_one)

    @device
    def of_row(dfinal_state, state_row, ages, age_row, at, steps, length):
        index = at - (length - halo)
        last_one = (index >= 0) & (at >= 0) & (at < steps)
        if masked:
            last_age = read_age(ages, age_row + length - 1, last_one)
            last_one = last_one & (integer(last_age) >= halo - 1 - index)
        return read(dfinal_state, state_row + index, last_one)

    return of_packed, of_row


def gradients_of_steps(real, width, group, silu, mask):
    """Of a lane's steps: ``read_ages``, ``gradients_of_sums`` and what they add to the gradients of weights and inputs.

    ``add_gradients`` adds to DW, one number for each tap, and gives dbias. ``gradients_of_inputs`` makes dx, of the
    gradients G of the sums that an input is in and of dfinal_state.
    """
    halo, tile_steps, masked, states = width - 1, WARP * group, mask != "", mask == "states"
    (_, slope), tap = activations(real, silu), tap_of(real, width, mask)
    first_state, weighted = sums_of_taps(real, width, mask)
    read_age, (of_packed, of_row) = element_reader(AGES, real), final_gradients(real, width, mask)
    zero, oldest, ages_seen = real.type(0), real.type(halo), tuple(real.type(j) for j in range(width))

    @device
    def spread_back(G, W, A, j):
        total = zero
        for k in range(width):
            g = G[j + k]
            if masked:
                g = select(A[j + k] >= ages_seen[k], g, zero)
            total = fma(W[halo - k], g, total)
        return total

    @device
    def read_ages(A, ages, age_row, t, steps):
        for j in range(group + halo):
            A[j] = oldest
            if masked:
                A[j] = read_age(ages, age_row + t + j, (t + j >= 0) & (t + j < steps))

    @device
    def gradients_of_sums(G, E, X, A, W, b, t, steps, sequences, initial_state, dim, d):
        for j in range(group):
            state, head = first_state(A[j], t + j, steps, sequences, initial_state != 0, dim, d)
            G[j] = E[j] * slope(weighted(X, W, b, A[j], j, initial_state, state, head))

    @device
    def add_gradients(DW, db, G, X, A, t, steps, sequences, initial_state, dim, d):
        for j in range(group):
            state, head = first_state(A[j], t + j, steps, sequences, initial_state != 0, dim, d)
            for k in range(width):
                DW[k] = fma(G[j], tap(X, A[j], j, k, initial_state, state, head), DW[k])
            db = db + G[j]
        return db

    @device
    def gradients_of_inputs(
        E, G, A, W, dfinal_state, sequences, ages, age_row, state_row, t, tile, steps, length, dim, d
    ):
        for j in range(group):
            total = spread_back(G, W, A, j)
            if dfinal_state != 0:
                if states:
                    total = total + of_packed(dfinal_state, sequences, A, j, t + j, steps, dim, d)
                elif (tile + 2) * tile_steps > length - halo:
                    total = total + of_row(dfinal_state, state_row, ages, age_row, t + j, steps, length)
            E[j] = total

    return read_ages, gradients_of_sums, add_gradients, gradients_of_inputs


def backward(storage, width, group, ends, silu, mask):
    """A warp has ``tiles_of_part`` tiles of each of ``rows_of_part`` rows of a channel, and goes from late to early.

    If there are tiles after those, it begins with one of them, for the gradients that its own look forward to.
    """
    real, halo, tile_steps = real_of_storage(storage), width - 1, WARP * group
    back, phase, read_taps = -(-halo // group), phase_of(storage, group), taps_reader(real, width)
    make_raw, ask, take = group_reader(storage, real, group, ends)
    add_ends, write_ends = ends_of_rows(storage, real, group)
    before, after = neighbours(group, halo)
    read_ages, gradients_of_sums, add_gradients, gradients_of_inputs = gradients_of_steps(
        real, width, group, silu, mask
    )
    write_dx, write = writer(dtype_of(storage), real, group, group > 1), element_writer(real.name, real)
    window, numbers, taps = local_array(halo + group, real), local_array(group, real), local_array(width, real)
    add_initial, zero = initial_adder(real, halo, group), real.type(0)
    sum_over_warp, masked, states = lane_sum(WARP), mask != "", mask == "states"
    whole, shift = whole_groups(ends), dtype_of(storage).itemsize.bit_length() - 1
    tile_bytes = tile_steps << shift

    def kernel(
        dy, x, dx, weight, bias, initial_state, dfinal_state, ages, sequences, dweight, dbias, batches, dim, length,
        tiles, parts, tiles_of_part, rows_of_part, dy_batch, dy_dim, x_batch, x_dim, dx_batch, dx_dim,
    ):  # fmt: skip
        await_previous()
        X, G, A, V, P, N, E = window(), window(), window(), numbers(), numbers(), numbers(), numbers()
        W, DW, raw, raw_before, raw_dy = taps(), taps(), make_raw(), make_raw(), make_raw()
        lane, (part, d, inside) = thread_index() & (WARP - 1), place(dim)
        steps, db = select(inside, length, 0), zero
        for k in range(width):
            DW[k] = zero
        rows = quotient(part, parts)
        first, rows = (part - rows * parts) * tiles_of_part, rows * rows_of_part
        start, tiles_left = first * tile_steps, short(min(tiles - first, FAR))
        count, (low, high) = min(short(tiles_of_part), tiles_left), borders(start, steps, group)
        latest, begin = (
            min(count, short(tiles_left - 1)),
            select(first == 0, short(0), short(-1)),
        )  # the row's first tile
        lookers = select(lane >= WARP - back, high, short(-FAR))
        b = read_taps(W, weight, bias, d)
        for batch in range(rows, min(rows + rows_of_part, batches)):
            row, dy_row, age_row = batch * x_batch + d * x_dim, batch * dy_batch + d * dy_dim, batch * length
            dx_row, state_row = batch * dx_batch + d * dx_dim, (batch * dim + d) * halo
            t = short(latest * tile_steps + lane * group)
            if ends:
                t = short(t - phase(x, row))
            x_at, dy_at, dx_at = (
                x + ((row + start + t) << shift),
                dy + ((dy_row + start + t) << shift),
                dx + ((dx_row + start + t) << shift),
            )
            wanted = select((lane < back) | (latest < count), high, short(-FAR))
            ask(raw, x_at, t, 0, low, wanted)
            ask(raw_dy, dy_at, t, 0, low, wanted)
            ask(raw_before, x_at, t, -tile_steps, low, select(latest > begin, lookers, short(-FAR)))
            for k in range(group):
                N[k] = zero
            tile = latest
            while tile >= 0:
                take(V, raw)
                take(E, raw_dy)
                take(P, raw_before)
                if ends:
                    if (tile == begin) | (short(tile + 2) >= tiles_left):
                        add_ends(V, x_at, t, low, high)
                        add_ends(E, dy_at, t, low, high)
                if tile > 0:
                    ask(raw, x_at, t, -tile_steps, low, high)
                    ask(raw_dy, dy_at, t, -tile_steps, low, high)
                    ask(
                        raw_before, x_at, t, -2 * tile_steps, low, select(short(tile - 1) > begin, lookers, short(-FAR))
                    )
                if (initial_state != 0) & (tile == begin) & (not states):
                    add_initial(V, P, initial_state, state_row, t)
                for k in range(group):
                    X[halo + k] = V[k]
                before(X, P, lane)
                converge()
                at = start + np.int64(t)
                read_ages(A, ages, age_row, at, steps)
                gradients_of_sums(G, E, X, A, W, b, at, steps, sequences, initial_state, dim, d)
                after(G, N, lane)
                converge()
                if tile < count:
                    db = add_gradients(DW, db, G, X, A, at, steps, sequences, initial_state, dim, d)
                    gradients_of_inputs(
                        E, G, A, W, dfinal_state, sequences, ages, age_row, state_row, at, first + tile, steps, length,
                        dim, d,
                    )  # fmt: skip
                    write_dx(dx_at, 0, E, select(whole(t, low, high), group, 0))
                    if ends:
                        if (tile == begin) | (short(tile + 2) >= tiles_left):
                            write_ends(dx_at, t, E, low, high)
                for k in range(group):
                    N[k] = G[k]
                tile, t = short(tile - 1), short(t - tile_steps)
                x_at, dy_at, dx_at = x_at - tile_bytes, dy_at - tile_bytes, dx_at - tile_bytes
        for k in range(width):
            write(dweight, (part * dim + d) * width + k, sum_over_warp(DW[k]), inside & (lane == 0))
        if dbias != 0:
            write(dbias, part * dim + d, sum_over_warp(db), inside & (lane == 0))

    lean = real.itemsize == 4 and width <= 4 and not masked
    return kernel, Shape(CHANNELS * WARP, (7 if group <= 4 else 6) if lean else 3 if real.itemsize == 4 else 2)


# --- tables and states -----------------------------------------------------------------------------------------------


def tables(storage):
    """A thread writes the age of one step, in ``storage``, and the number of its sequence."""
    write = writer(dtype_of(storage), np.float32, 1)
    write_bits, single = element_writer("float64", np.dtype(np.float64)), np.float32
    numbers = local_array(1, np.float32)

    def kernel(ages, sequences, seq_idx, cu_seqlens, count, rounds, length, width, blocks):
        row, t = block_index() // blocks, block_index() % blocks * BLOCK + thread_index()
        inside, age, value = select(t < length, 1, 0), t * 0, numbers()
        if seq_idx != 0:
            own = read_integer(seq_idx, row * length + t, inside)
            same = t < length
            for j in range(1, width):
                reachable = (t < length) & (t >= j)
                other = read_integer(seq_idx, row * length + t - j, select(reachable, 1, 0))
                same = same & ((other == own) | (t < j))
                age = age + select(same, 1, 0)
        else:
            low, high = t * 0, t * 0 + count
            for _ in range(rounds):  # the last border that is not after t
                middle = (low + high) >> 1
                right = read_integer(cu_seqlens, middle, inside) <= t
                low, high = select(right, middle, low), select(right, high, middle)
            age = t - read_integer(cu_seqlens, low, inside)
            age = select(age < 0, 0, select(age < width, age, width - 1))
            if sequences != 0:
                write_bits(sequences, t, as_real(low), t < length)
        value[0] = single(age)
        write(ages, row * length + t, value, inside)

    return kernel, Shape(BLOCK, 4)


def final_states(storage, ages_storage):
    """A thread has a channel of one sequence."""
    real = real_of_storage(storage)
    read_x, read, write = (
        element_reader(storage, real),
        element_reader(real.name, real),
        element_writer(real.name, real),
    )
    read_age, zero, integer = element_reader(ages_storage, real), real.type(0), np.int64

    def kernel(x, initial_state, final_state, ages, cu_seqlens, dim, length, width, x_batch, x_dim, x_time):
        blocks, halo = (dim + BLOCK - 1) // BLOCK, width - 1
        number, d = block_index() // blocks, block_index() % blocks * BLOCK + thread_index()
        row, begin, steps = segment(number, length, cu_seqlens)
        seen = d * 0 + halo
        if (ages != 0) & (steps > 0):
            seen = integer(read_age(ages, row * length + length - 1, d < dim))
        state = (number * dim + d) * halo
        for m in range(halo):
            p = steps - halo + m
            value = zero
            if p >= 0:
                value = read_x(x, row * x_batch + d * x_dim + (begin + p) * x_time, d < dim)
            elif initial_state != 0:
                value = read(initial_state, state + halo + p, d < dim)
            write(final_state, state + m, select(seen >= halo - 1 - m, value, zero), d < dim)

    return kernel, Shape(BLOCK, 4)


def initial_gradients(storage, ages_storage, silu):
    """A thread has a channel of one sequence, and adds what each of its first steps sends to the initial state."""
    real = real_of_storage(storage)
    read_x, read, write = (
        element_reader(storage, real),
        element_reader(real.name, real),
        element_writer(real.name, real),
    )
    read_sum, read_age = element_reader(real.name, real, constant=False), element_reader(ages_storage, real)
    (_, slope), zero, integer = activations(real, silu), real.type(0), np.int64

    def kernel(
        dy, x, weight, bias, initial_state, dfinal_state, dinitial_state, ages, cu_seqlens, dim, length, width,
        dy_batch, dy_dim, dy_time, x_batch, x_dim, x_time,
    ):  # fmt: skip
        blocks, halo = (dim + BLOCK - 1) // BLOCK, width - 1
        number, d = block_index() // blocks, block_index() % blocks * BLOCK + thread_index()
        row, begin, steps = segment(number, length, cu_seqlens)
        inside = d < dim
        state, x_row, dy_row = (number * dim + d) * halo, row * x_batch + d * x_dim, row * dy_batch + d * dy_dim
        for m in range(halo):
            total = zero
            if (dfinal_state != 0) & (m >= steps):
                seen = inside
                if (ages != 0) & (steps > 0):
                    age = integer(read_age(ages, row * length + length - 1, inside))
                    seen = inside & (age >= steps - 1 - (m - halo))
                total = read(dfinal_state, state + m - steps, seen)
            write(dinitial_state, state + m, total, inside)
        for a in range(min(halo, steps)):
            age = d * 0 + halo
            if ages != 0:
                age = integer(read_age(ages, row * length + a, inside))
            total = zero
            if bias != 0:
                total = read(bias, d, inside)
            for k in range(width):
                p, seen = a - (halo - k), inside & (age >= halo - k)
                if p >= 0:
                    value = read_x(x, x_row + (begin + p) * x_time, seen)
                else:
                    value = read(initial_state, state + halo + p, seen)
                total = total + read(weight, d * width + k, inside) * value
            g = read_x(dy, dy_row + (begin + a) * dy_time, inside) * slope(total)
            for m in range(a, halo):
                w = read(weight, d * width + m - a, inside & (age >= halo - (m - a)))
                write(dinitial_state, state + m, read_sum(dinitial_state, state + m, inside) + w * g, inside)

    return kernel, Shape(BLOCK, 4)


# --- any width -------------------------------------------------------------------------------------------------------


def tap_reader(storage, ages_storage, mask):
    """``age(...)`` of a step and ``tap(...)``, the number that a tap sees.

    Ages are looked up only with a mask; without one every step sees all that there is.
    """
    real = real_of_storage(storage)
    read_x, read, read_age = (element_reader(name, real) for name in (storage, real.name, ages_storage))
    masked, states, integer = mask != "", mask == "states", np.int64

    @device
    def age_of(ages, at, halo, inside):
        age = at * 0 + halo
        if masked:
            age = integer(read_age(ages, at, inside))
        return age

    @device
    def tap(x, row, initial_state, state, t, age, halo, k, inside):
        """What tap k sees at step t; ``state`` is where the initial state of the step's sequence begins."""
        seen = inside & (age >= halo - k)
        value = read_x(x, row + t + k - halo, seen & (t + k >= halo))
        if initial_state != 0:
            if states:
                value = value + read(initial_state, state + age + k, inside & (age < halo - k))
            else:
                value = value + read(initial_state, state + t + k, seen & (t + k < halo))
        return value

    return age_of, tap


def wide_sum(storage, ages_storage, silu, mask, gradient):
    """A thread has a step: y or, with ``gradient``, the gradient of the sum before the activation."""
    real = real_of_storage(storage)
    read_x, read = element_reader(storage, real), element_reader(real.name, real)
    write = element_writer(real.name if gradient else storage, real)
    age_of, tap = tap_reader(storage, ages_storage, mask)
    (activate, slope), zero, states = activations(real, silu), real.type(0), mask == "states"

    def kernel(
        dy, x, y, weight, bias, initial_state, ages, sequences, dim, length, width, blocks, dy_batch, dy_dim, x_batch,
        x_dim, y_batch, y_dim,
    ):  # fmt: skip
        row, t = block_index() // blocks, block_index() % blocks * BLOCK + thread_index()
        batch, d = row // dim, row % dim
        inside, halo = t < length, width - 1
        age = age_of(ages, batch * length + t, halo, inside)
        number = t * 0 + batch
        if states:
            number = read_integer(sequences, t, select(inside, 1, 0))
        total = zero
        if bias != 0:
            total = read(bias, d, inside)
        for k in range(width):
            value = tap(
                x, batch * x_batch + d * x_dim, initial_state, (number * dim + d) * halo, t, age, halo, k, inside
            )
            total = total + read(weight, d * width + k, inside) * value
        if gradient:
            total = read_x(dy, batch * dy_batch + d * dy_dim + t, inside) * slope(total)
        else:
            total = activate(total)
        write(y, batch * y_batch + d * y_dim + t, total, inside)

    return kernel, Shape(BLOCK, 4)


def wide_dx(storage, ages_storage, mask):
    """A thread has a step, and looks at the steps after it until one is of another sequence."""
    real = real_of_storage(storage)
    read, write = element_reader(real.name, real), element_writer(storage, real)
    (age_of, _), zero, states = tap_reader(storage, ages_storage, mask), real.type(0), mask == "states"

    def kernel(gradients, dx, weight, dfinal_state, ages, sequences, dim, length, width, blocks, dx_batch, dx_dim):
        row, t = block_index() // blocks, block_index() % blocks * BLOCK + thread_index()
        batch, d = row // dim, row % dim
        inside, halo, total = t < length, width - 1, zero
        ahead, last, index = t < length, t < 0, t * 0
        for j in range(width):
            there = ahead & (t + j < length)
            age = age_of(ages, batch * length + t + j, halo, there)
            ahead, before = there & (age >= j), ahead
            w = read(weight, d * width + halo - j, ahead)
            total = total + w * read(gradients, row * length + t + j, ahead)
            ends = before & select(ahead, t < 0, inside)
            if not states:
                ends = ends & (t + j == length)  # only the last sequence of a row has a final state
            last, index = last | ends, select(ends, halo - j, index)
        if dfinal_state != 0:
            number = t * 0 + batch
            if states:
                number = read_integer(sequences, t, select(inside, 1, 0))
            total = total + read(dfinal_state, (number * dim + d) * halo + index, last)
        write(dx, batch * dx_batch + d * dx_dim + t, total, inside)

    return kernel, Shape(BLOCK, 4)


def wide_dweight(storage, ages_storage, mask):
    """A warp sums over ``STEPS`` steps of a channel, for one tap after another."""
    real = real_of_storage(storage)
    read, write, sum_over_warp = element_reader(real.name, real), element_writer(real.name, real), lane_sum(WARP)
    (age_of, tap), zero, states = tap_reader(storage, ages_storage, mask), real.type(0), mask == "states"

    def kernel(gradients, x, initial_state, ages, sequences, dweight, dbias, dim, length, width, parts, x_batch, x_dim):
        blocks, halo = (dim + CHANNELS - 1) // CHANNELS, width - 1
        d, rest = block_index() % blocks * CHANNELS + (thread_index() >> 5), block_index() // blocks
        batch, begin, lane = rest // parts, rest % parts * STEPS, thread_index() & (WARP - 1)
        for k in range(width + 1):  # the last is the bias
            total = zero
            for t0 in range(begin, min(begin + STEPS, length), WARP):
                t = t0 + lane
                inside = (d < dim) & (t < length)
                g = read(gradients, (batch * dim + d) * length + t, inside)
                if k < width:
                    age = age_of(ages, batch * length + t, halo, inside)
                    number = t * 0 + batch
                    if states:
                        number = read_integer(sequences, t, select(inside, 1, 0))
                    g = g * tap(
                        x, batch * x_batch + d * x_dim, initial_state, (number * dim + d) * halo, t, age, halo, k,
                        inside,
                    )  # fmt: skip
                total = total + g
            total = sum_over_warp(total)
            if k < width:
                write(dweight, (rest * dim + d) * width + k, total, (d < dim) & (lane == 0))
            elif dbias != 0:
                write(dbias, rest * dim + d, total, (d < dim) & (lane == 0))

    return kernel, Shape(CHANNELS * WARP, 4)


# --- one step --------------------------------------------------------------------------------------------------------


def update(storage, of_state, of_weight, width, kept, together, silu):
    """A thread has a channel of a batch row. ``together``: a channel's state is read and written in one access."""
    real = real_of_storage(storage)
    read_x, write_y = element_reader(storage, real), element_writer(storage, real)
    read_state, write_state = (
        reader(dtype_of(of_state), real, kept, together, constant=False),
        writer(dtype_of(of_state), real, kept, together),
    )
    read_weight, read_bias = reader(dtype_of(of_weight), real, width), element_reader(of_weight, real)
    states, taps, zero = local_array(kept + 1, real), local_array(width, real), real.type(0)
    activate, _ = activations(real, silu)

    def kernel(x, state, weight, bias, y, batches, dim, x_batch, x_dim, state_batch, state_dim):
        await_previous()
        S, W = states(), taps()
        i = block_index() * BLOCK_OF_STEP + thread_index()
        batch = quotient(i, dim)
        d, inside = i - batch * dim, batch < batches
        at = batch * state_batch + d * state_dim
        read_state(S, state, at, select(inside, kept, 0))
        read_weight(W, weight, d * width, select(inside, width, 0))
        S[kept] = read_x(x, batch * x_batch + d * x_dim, inside)
        total = zero
        if bias != 0:
            total = read_bias(bias, d, inside)
        for k in range(width):
            total = fma(W[k], S[kept - (width - 1) + k], total)
        write_y(y, i, activate(total), inside)
        for m in range(kept):
            S[m] = S[m + 1]
        write_state(state, at, S, select(inside, kept, 0))

    return kernel, Shape(BLOCK_OF_STEP, 4)


def shipped():
    """The kernels that CI compiles: every dtype and option once."""
    return [
        Kernel("causal_conv1d", "forward", ("float32", 4, 4, False, True, "")),
        Kernel("causal_conv1d", "forward", ("bfloat16", 4, 8, True, True, "")),
        Kernel("causal_conv1d", "forward", ("bfloat16", 4, 8, True, True, "ages")),
        Kernel("causal_conv1d", "forward", ("float16", 8, 8, True, False, "")),
        Kernel("causal_conv1d", "forward", ("float64", 3, 1, False, True, "states")),
        Kernel("causal_conv1d", "backward", ("float32", 4, 4, False, True, "ages")),
        Kernel("causal_conv1d", "backward", ("float32", 3, 1, False, False, "")),
        Kernel("causal_conv1d", "backward", ("bfloat16", 4, 8, True, True, "")),
        Kernel("causal_conv1d", "backward", ("bfloat16", 4, 8, True, True, "states")),
        Kernel("causal_conv1d", "backward", ("float16", 8, 8, False, True, "")),
        Kernel("causal_conv1d", "backward", ("float64", 4, 2, True, True, "states")),
        Kernel("causal_conv1d", "tables", ("float16",)),
        Kernel("causal_conv1d", "final_states", ("bfloat16", "float16")),
        Kernel("causal_conv1d", "initial_gradients", ("float32", "float16", True)),
        Kernel("causal_conv1d", "wide_sum", ("float16", "float16", True, "states", True)),
        Kernel("causal_conv1d", "wide_dx", ("bfloat16", "float16", "ages")),
        Kernel("causal_conv1d", "wide_dweight", ("float32", "float32", "states")),
        Kernel("causal_conv1d", "update", ("bfloat16", "bfloat16", "bfloat16", 4, 4, True, True)),
        Kernel("causal_conv1d", "update", ("float32", "float32", "bfloat16", 4, 3, False, True)),
    ]
