"""The causal depthwise convolution on the GPU.

``forward`` and ``backward``, for small widths: a warp owns a channel and goes through tiles of it in time. Each lane
has ``span`` consecutive steps of a tile, up to two groups of 16 bytes, and reads the groups before them (and, backward,
after them) a second time, which its neighbours have just brought into the L1 cache. Backward, a lane also computes
again the few gradients after its steps; sums for dweight stay in registers until the warp is done.

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
    block_index,
    dtype_of,
    fma,
    local_array,
    reader,
    select,
    thread_index,
    writer,
)
from sscan.cuda._target import device
from sscan.cuda.causal_conv1d import AGES, BLOCK, CHANNELS, STEPS, TILES, WARP, span_of
from sscan.cuda.kernels._segments import segment
from sscan.cuda.kernels._warp import lane_sum

read_integer = INTEGER_READERS[64]


def real_of_storage(storage):
    """The dtype of arithmetic."""
    return np.dtype(np.float64 if storage == "float64" else np.float32)


def window_reader(storage, real, group, before, count):
    """``read(into, address, row, t, length)``: ``count`` groups, the first ``before`` of them before step t.

    ``row`` is the row's first element. Steps outside 0 ... length are 0. Loads do not depend on that: what is outside
    is read from the row's start and dropped. So none of them waits for another, as loads behind branches would.
    """
    load, numbers, zero = reader(dtype_of(storage), real, group, group > 1), local_array(group, real), real.type(0)

    @device
    def read(into, address, row, t, length):
        values = numbers()
        for i in range(count):
            at = t + (i - before) * group
            inside = (at >= 0) & (at < length)
            load(values, address, row + select(inside, at, 0), group)
            for k in range(group):
                into[i * group + k] = select(inside, values[k], zero)

    return read


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


def forward(storage, width, group, silu, mask):
    """A warp has up to ``TILES`` tiles of one row."""
    real, span, halo = real_of_storage(storage), span_of(group, mask), width - 1
    before = -(-halo // group)
    groups = span // group
    start = before * group
    read_x = window_reader(storage, real, group, before, before + groups)
    read_ages = window_reader(AGES, real, group, 0, groups)
    read, write = element_reader(real.name, real), writer(dtype_of(storage), real, group, group > 1)
    window, ages_of, taps = local_array(start + span, real), local_array(span, real), local_array(width, real)
    numbers, (activate, _), zero, integer = local_array(group, real), activations(real, silu), real.type(0), np.int64
    ages_seen = tuple(real.type(j) for j in range(width))
    masked, states = mask != "", mask == "states"

    def kernel(
        x, y, weight, bias, initial_state, ages, sequences, dim, length, tiles, parts, x_batch, x_dim, y_batch, y_dim
    ):
        X, A, W, values = window(), ages_of(), taps(), numbers()
        blocks = (dim + CHANNELS - 1) // CHANNELS
        d, rest = block_index() % blocks * CHANNELS + (thread_index() >> 5), block_index() // blocks
        batch, first = rest // parts, rest % parts * TILES
        steps, d = select(d < dim, length, 0), select(d < dim, d, 0)
        for k in range(width):
            W[k] = read(weight, d * width + k, True)
        b = zero
        if bias != 0:
            b = read(bias, d, True)
        for tile in range(first, min(first + TILES, tiles)):
            t = (tile * WARP + (thread_index() & (WARP - 1))) * span
            read_x(X, x, batch * x_batch + d * x_dim, t, steps)
            if masked:
                read_ages(A, ages, batch * length, t, steps)
            if (initial_state != 0) & (tile == 0) & (not states):
                for m in range(halo):
                    state = read(initial_state, (batch * dim + d) * halo + t + m, t + m < halo)
                    X[start - halo + m] = X[start - halo + m] + state
            for i in range(span):
                total = b
                if states:
                    head = (A[i] < ages_seen[halo]) & (t + i < steps)
                    age = integer(A[i])
                    state = (read_integer(sequences, t + i, select(head, 1, 0)) * dim + d) * halo + age
                for k in range(width):
                    value = X[start + i + k - halo]
                    if masked:
                        value = select(A[i] >= ages_seen[halo - k], value, zero)
                    if states:
                        value = value + read(initial_state, state + k, head & (A[i] < ages_seen[halo - k]))
                    total = fma(W[k], value, total)
                values[i % group] = activate(total)
                if i % group == group - 1:
                    at = t + i - (group - 1)
                    write(y, batch * y_batch + d * y_dim + at, values, steps - at)

    return kernel, Shape(CHANNELS * WARP, 32 // real.itemsize)


def backward(storage, width, group, silu, mask):
    """A warp has up to ``TILES`` tiles of the tiles of all rows, which are counted row by row."""
    real, span, halo = real_of_storage(storage), span_of(group, mask), width - 1
    before = -(-halo // group)
    groups = span // group
    start, known = before * group, span + before * group
    read_x = window_reader(storage, real, group, before, before + groups + before)
    read_dy = window_reader(storage, real, group, 0, groups + before)
    read_ages = window_reader(AGES, real, group, 0, groups + before)
    read, write_dx = element_reader(real.name, real), writer(dtype_of(storage), real, group, group > 1)
    write, read_age = element_writer(real.name, real), element_reader(AGES, real)
    window, gradients, numbers = local_array(start + known, real), local_array(known, real), local_array(group, real)
    taps, sum_over_warp = local_array(width, real), lane_sum(WARP)
    (_, slope), zero, integer = activations(real, silu), real.type(0), np.int64
    ages_seen = tuple(real.type(j) for j in range(width))
    masked, states = mask != "", mask == "states"

    def kernel(
        dy, x, dx, weight, bias, initial_state, dfinal_state, ages, sequences, dweight, dbias, batches, dim, length,
        tiles, dy_batch, dy_dim, x_batch, x_dim, dx_batch, dx_dim,
    ):  # fmt: skip
        X, G, A, W, DW, V, values = window(), gradients(), gradients(), taps(), taps(), taps(), numbers()
        blocks = (dim + CHANNELS - 1) // CHANNELS
        d, part = block_index() % blocks * CHANNELS + (thread_index() >> 5), block_index() // blocks
        inside, lane = d < dim, thread_index() & (WARP - 1)
        steps, d = select(inside, length, 0), select(inside, d, 0)
        for k in range(width):
            W[k] = read(weight, d * width + k, True)
            DW[k] = zero
        b, db = zero, zero
        if bias != 0:
            b = read(bias, d, True)
        batch, tile = part * TILES // tiles, part * TILES % tiles
        for _ in range(min(TILES, batches * tiles - part * TILES)):
            t = (tile * WARP + lane) * span
            read_x(X, x, batch * x_batch + d * x_dim, t, steps)
            read_dy(G, dy, batch * dy_batch + d * dy_dim, t, steps)
            if masked:
                read_ages(A, ages, batch * length, t, steps)
            if (initial_state != 0) & (tile == 0) & (not states):
                for m in range(halo):
                    state = read(initial_state, (batch * dim + d) * halo + t + m, t + m < halo)
                    X[start - halo + m] = X[start - halo + m] + state
            for i in range(span + halo):
                total = b
                if states:
                    head = (initial_state != 0) & (A[i] < ages_seen[halo]) & (t + i < steps)
                    age = integer(A[i])
                    state = (read_integer(sequences, t + i, select(head, 1, 0)) * dim + d) * halo + age
                for k in range(width):
                    value = X[start + i + k - halo]
                    if masked:
                        value = select(A[i] >= ages_seen[halo - k], value, zero)
                    if states:
                        value = value + read(initial_state, state + k, head & (A[i] < ages_seen[halo - k]))
                    total = fma(W[k], value, total)
                    V[k] = value
                G[i] = G[i] * slope(total)
                if i < span:
                    for k in range(width):
                        DW[k] = fma(G[i], V[k], DW[k])
                    db = db + G[i]
            for i in range(span):
                total = zero
                for j in range(width):
                    g = G[i + j]
                    if masked:
                        g = select(A[i + j] >= ages_seen[j], g, zero)
                    total = fma(W[halo - j], g, total)
                if dfinal_state != 0:
                    if states:
                        last, ahead, index = t + i < 0, t + i < steps, t * 0
                        for j in range(1, width):
                            ends = A[i + j] < ages_seen[j]
                            last, index = last | (ahead & ends), select(ahead & ends, halo - j, index)
                            ahead = ahead & (A[i + j] >= ages_seen[j])
                        state = read_integer(sequences, t + i, select(last, 1, 0)) * dim + d
                        total = total + read(dfinal_state, state * halo + index, last)
                    elif (tile + 1) * (WARP * span) > length - halo:
                        index = t + i - (length - halo)
                        last = (index >= 0) & (t + i < steps)
                        if masked:
                            last_age = read_age(ages, batch * length + length - 1, True)
                            last = last & (integer(last_age) >= halo - 1 - index)
                        total = total + read(dfinal_state, (batch * dim + d) * halo + index, last)
                values[i % group] = total
                if i % group == group - 1:
                    at = t + i - (group - 1)
                    write_dx(dx, batch * dx_batch + d * dx_dim + at, values, steps - at)
            tile += 1
            if tile == tiles:
                tile = 0
                batch += 1
        for k in range(width):
            write(dweight, (part * dim + d) * width + k, sum_over_warp(DW[k]), inside & (lane == 0))
        if dbias != 0:
            write(dbias, part * dim + d, sum_over_warp(db), inside & (lane == 0))

    return kernel, Shape(CHANNELS * WARP, 16 // real.itemsize)


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

    def kernel(x, initial_state, final_state, ages, cu_seqlens, dim, length, width, x_batch, x_dim):
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
                value = read_x(x, row * x_batch + d * x_dim + begin + p, d < dim)
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
        dy_batch, dy_dim, x_batch, x_dim,
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
                    value = read_x(x, x_row + begin + p, seen)
                else:
                    value = read(initial_state, state + halo + p, seen)
                total = total + read(weight, d * width + k, inside) * value
            g = read_x(dy, dy_row + begin + a, inside) * slope(total)
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


def update(storage, silu):
    """A thread has a channel of a batch row; the state is shifted from its oldest input on."""
    real = real_of_storage(storage)
    read_x, write_y = element_reader(storage, real), element_writer(storage, real)
    read, write = element_reader(real.name, real), element_writer(real.name, real)
    read_state = element_reader(real.name, real, constant=False)
    (activate, _), zero = activations(real, silu), real.type(0)

    def kernel(x, state, weight, bias, y, dim, width, kept, x_batch, y_batch):
        blocks = (dim + BLOCK - 1) // BLOCK
        batch, d = block_index() // blocks, block_index() % blocks * BLOCK + thread_index()
        inside, here, unused = d < dim, (batch * dim + d) * kept, kept - (width - 1)
        total = zero
        if bias != 0:
            total = read(bias, d, inside)
        newest = read_x(x, batch * x_batch + d, inside)
        for m in range(kept):
            value = read_state(state, here + m, inside)
            if m >= unused:
                total = total + read(weight, d * width + m - unused, inside) * value
            if m > 0:
                write(state, here + m - 1, value, inside)
        if kept > 0:
            write(state, here + kept - 1, newest, inside)
        total = total + read(weight, d * width + width - 1, inside) * newest
        write_y(y, batch * y_batch + d, activate(total), inside)

    return kernel, Shape(BLOCK, 4)


def shipped():
    """The kernels that CI compiles: every dtype and option once."""
    return [
        Kernel("causal_conv1d", "forward", ("float32", 4, 4, True, "")),
        Kernel("causal_conv1d", "forward", ("bfloat16", 4, 8, True, "ages")),
        Kernel("causal_conv1d", "forward", ("float16", 8, 8, False, "")),
        Kernel("causal_conv1d", "forward", ("float64", 3, 1, True, "states")),
        Kernel("causal_conv1d", "backward", ("float32", 4, 4, True, "ages")),
        Kernel("causal_conv1d", "backward", ("float32", 3, 1, False, "")),
        Kernel("causal_conv1d", "backward", ("bfloat16", 4, 8, True, "states")),
        Kernel("causal_conv1d", "backward", ("float16", 8, 8, True, "")),
        Kernel("causal_conv1d", "backward", ("float64", 4, 2, True, "states")),
        Kernel("causal_conv1d", "tables", ("float16",)),
        Kernel("causal_conv1d", "final_states", ("bfloat16", "float16")),
        Kernel("causal_conv1d", "initial_gradients", ("float32", "float16", True)),
        Kernel("causal_conv1d", "wide_sum", ("float16", "float16", True, "states", True)),
        Kernel("causal_conv1d", "wide_dx", ("bfloat16", "float16", "ages")),
        Kernel("causal_conv1d", "wide_dweight", ("float32", "float32", "states")),
        Kernel("causal_conv1d", "update", ("bfloat16", True)),
    ]
