"""The causal depthwise convolution on the GPU of arrays whose channels are neighbours in memory.

A thread has ``group`` neighbouring channels, which come in one access, and walks through ``chunk`` steps, a few in a
*turn*; those of the next turn are asked for before these are worked on. What the taps see, and backward the gradients,
stay in a window in registers. Most turns are *whole*: no step of them, nor of the next one, has to be looked at for
where it lies, which would take as long as the work. Masks and states are those of ``causal_conv1d``.

Memory traffic: forward reads x and writes y, backward reads dy and x and writes dx, everything once but the width - 1
steps before (and after) a chunk.
"""

from typing import Any, NamedTuple

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._primitives import (
    INTEGER_READERS,
    ask_now,
    await_previous,
    block_index,
    dtype_of,
    fma,
    in_all_lanes,
    local_array,
    quotient,
    reader,
    select,
    stored_array,
    stored_reader,
    thread_index,
    widener,
    writer,
)
from sscan.cuda._target import device
from sscan.cuda._unroll import unroll
from sscan.cuda.causal_conv1d import AGES, BLOCK, TURN
from sscan.cuda.kernels.causal_conv1d import activations, element_reader, element_writer, real_of_storage, short

read_integer = INTEGER_READERS[64]


class Row(NamedTuple):
    """What is known of a thread's batch row and channels, apart from what comes in turns."""

    ages: Any
    age_row: Any  # of the row's first step, in ages
    sequences: Any
    initial_state: Any
    dfinal_state: Any
    state: Any  # of the first channel, in states, unless sequences have their own
    length: Any
    batch: Any
    dim: Any
    d: Any


class Forward(NamedTuple):
    """One thing for each array along time: addresses of a turn's first step, or bytes from one step to the next."""

    x: Any
    y: Any


class Backward(NamedTuple):
    """The same for the backward; the address in dx is of width - 1 steps before."""

    x: Any
    dy: Any
    dx: Any


class Left(NamedTuple):
    """What is left of a chunk in the backward: steps to be ``looked`` at, beyond its end too, and its ``own``.

    And how many steps the dx of its ``first`` step is away.
    """

    looked: Any
    own: Any
    first: Any


def place(group):
    """``of_thread(dim, chunks, bits)``: batch row, chunk and first channel of a thread.

    2^bits threads are neighbours along the channels.
    """

    @device
    def of_thread(dim, chunks, bits):
        across = group << bits
        blocks = (dim + across - 1) // across
        own = block_index() * (BLOCK >> bits) + (thread_index() >> bits)
        rest = quotient(own, blocks)
        batch = quotient(rest, chunks)
        d = (own - rest * blocks) * across + (thread_index() & ((1 << bits) - 1)) * group
        return batch, rest - batch * chunks, d

    return of_thread


def steps_reader(storage, real, group):
    """``make()``, ``ask(raw, address, step, left)``, ``ask_all`` and ``take(into, first, raw)``: channels of a turn.

    Its steps are ``step`` bytes apart. Those that are not ``left`` are 0; to ask for all takes less. What is asked for
    is waited for where it is taken.
    """
    dtype, numbers = dtype_of(storage), local_array(group, real)
    load, widen = stored_reader(dtype, group, True), widener(dtype, real, group)

    @device
    def ask(raw, address, step, left):
        for i in range(TURN):
            load(raw, i * group, address + i * step, 0, select(left > i, group, 0))

    @device
    def ask_all(raw, address, step):
        for i in range(TURN):
            load(raw, i * group, address + i * step, 0, group)

    @device
    def take(into, first, raw):
        values = numbers()
        for i in range(TURN):
            widen(values, raw, i * group)
            for c in range(group):
                into[(first + i) * group + c] = values[c]

    return stored_array(TURN * group, dtype), ask, ask_all, take


def seen_by(real, width, group, mask):
    """``tap(X, i, k, c, age, initial_state, state, head)``: what tap k of channel c sees at a step i of the window."""
    read, halo, zero = element_reader(real.name, real), width - 1, real.type(0)
    ages_seen = tuple(real.type(j) for j in range(width))
    masked, states = mask != "", mask == "states"

    @device
    def tap(X, i, k, c, age, initial_state, state, head):
        value = X[(i + k) * group + c]
        if masked:
            value = select(age >= ages_seen[halo - k], value, zero)
        if states:
            value = value + read(initial_state, state + c * halo + k, head & (age < ages_seen[halo - k]))
        return value

    return tap


def window_starter(storage, real, width, group, mask):
    """``start(X, x, row, x_time, begin, inside, initial_state, state)``: the steps before a chunk."""
    halo, states = width - 1, mask == "states"
    load, numbers = reader(dtype_of(storage), real, group, True), local_array(group, real)
    read = element_reader(real.name, real)

    @device
    def start(X, x, row, x_time, begin, inside, initial_state, state):
        values = numbers()
        for m in range(halo):
            t = begin - halo + m
            load(values, x, row + t * x_time, select(inside & (t >= 0), group, 0))
            for c in range(group):
                X[m * group + c] = values[c]
                if (initial_state != 0) & (not states):
                    X[m * group + c] = values[c] + read(initial_state, state + c * halo + halo + t, inside & (t < 0))

    return start


def taps_reader(real, width, group):
    """``read_taps(W, b, weight, bias, d, inside)``: the weights and biases of a thread's channels."""
    read, zero = element_reader(real.name, real), real.type(0)

    @device
    def read_taps(W, b, weight, bias, d, inside):
        for c in range(group):
            for k in range(width):
                W[k * group + c] = read(weight, (d + c) * width + k, inside)
            b[c] = zero
            if bias != 0:
                b[c] = read(bias, d + c, inside)

    return read_taps


def sequence_reader(real, width, mask):
    """``age_of(row, t, valid)`` of a step, and where its sequence begins.

    ``first_state(row, age, t, wanted)``: where the initial state is whose inputs the taps of a step reach, and whether
    they reach it; only with "states".
    """
    read_age, halo, oldest, integer = element_reader(AGES, real), width - 1, real.type(width - 1), np.int64
    masked, states = mask != "", mask == "states"

    @device
    def age_of(row, t, valid):
        return read_age(row.ages, row.age_row + t, valid) if masked else oldest

    @device
    def first_state(row, age, t, wanted):
        if not states:
            return row.state, row.d < 0
        head = wanted & (age < oldest)
        sequence = read_integer(row.sequences, t, select(head, 1, 0))
        return (sequence * row.dim + row.d) * halo + integer(age), head

    return age_of, first_state


def forward_turn(storage, width, group, silu, mask, whole):
    """``turn(X, W, b, Y, raw, at, step, left, t, row)``: y at the steps from t on that are left.

    If the turn is ``whole``, all of them are, and those of the next turn, too.
    """
    real, halo = real_of_storage(storage), width - 1
    tap, (age_of, first_state) = seen_by(real, width, group, mask), sequence_reader(real, width, mask)
    _, ask, ask_all, take = steps_reader(storage, real, group)
    write, (activate, _) = writer(dtype_of(storage), real, group, True), activations(real, silu)

    @device
    def turn(X, W, b, Y, raw, at, step, left, t, row):
        take(X, halo, raw)
        if whole:
            ask_all(raw, at.x + TURN * step.x, step.x)
            ask_now()
        else:
            ask(raw, at.x + TURN * step.x, step.x, short(left - TURN))
        for i in unroll(TURN):
            there = whole | (left > i)
            age = age_of(row, t + i, there)
            state, head = first_state(row, age, t + i, there)
            for c in range(group):
                total = b[c]
                for k in range(width):
                    total = fma(W[k * group + c], tap(X, i, k, c, age, row.initial_state, state, head), total)
                Y[c] = activate(total)
            write(at.y + i * step.y, 0, Y, select(there, group, 0))

    return turn


def forward(storage, width, group, silu, mask):
    """A thread writes its channels at the steps of its chunk."""
    real, halo = real_of_storage(storage), width - 1
    of_thread, start = place(group), window_starter(storage, real, width, group, mask)
    (make_raw, ask, _, _), read_taps = steps_reader(storage, real, group), taps_reader(real, width, group)
    window, taps, numbers = (local_array(n * group, real) for n in (halo + TURN, width, 1))
    whole_turn, turn = (forward_turn(storage, width, group, silu, mask, whole) for whole in (True, False))
    shift = dtype_of(storage).itemsize.bit_length() - 1

    @device
    def move_on(X, at, step, left, t):
        for m in range(halo * group):
            X[m] = X[TURN * group + m]
        return Forward(at.x + TURN * step.x, at.y + TURN * step.y), short(left - TURN), t + TURN

    def kernel(
        x, y, weight, bias, initial_state, ages, sequences, batches, dim, length, chunks, chunk, bits, x_batch, x_time,
        y_batch, y_time,
    ):  # fmt: skip
        await_previous()
        X, W, b, Y, raw = window(), taps(), numbers(), numbers(), make_raw()
        batch, own, d = of_thread(dim, chunks, bits)
        inside, t = (d < dim) & (batch < batches), own * chunk
        row = Row(ages, batch * length, sequences, initial_state, 0, (batch * dim + d) * halo, length, batch, dim, d)
        x_row, y_row = batch * x_batch + d, batch * y_batch + d
        at = Forward(x + ((x_row + t * x_time) << shift), y + ((y_row + t * y_time) << shift))
        step = Forward(x_time << shift, y_time << shift)
        left = short(select(inside, select(t + chunk < length, chunk, length - t), 0))
        ask(raw, at.x, step.x, left)
        start(X, x, x_row, x_time, t, inside, initial_state, row.state)
        read_taps(W, b, weight, bias, d, inside)
        while not in_all_lanes(left <= 0):
            turn(X, W, b, Y, raw, at, step, left, t, row)
            at, left, t = move_on(X, at, step, left, t)
            while in_all_lanes(left >= 2 * TURN):
                whole_turn(X, W, b, Y, raw, at, step, left, t, row)
                at, left, t = move_on(X, at, step, left, t)

    return kernel, Shape(BLOCK, (5 if mask == "" else 4) if real.itemsize == 4 and width <= 4 else 3)


def sum_gradients(real, width, group, silu, mask):
    """``of_sums(G, DW, db, X, W, b, i, age, own, initial_state, state, head)``: at step i of the window.

    The gradients of y in G become those of the sums in front of the activation. If the step is of the thread's ``own``
    chunk, they add to those of weight and bias.
    """
    tap, halo, zero = seen_by(real, width, group, mask), width - 1, real.type(0)
    _, slope = activations(real, silu)

    @device
    def of_sums(G, DW, db, X, W, b, i, age, own, initial_state, state, head):
        for c in range(group):
            total = b[c]
            for k in range(width):
                total = fma(W[k * group + c], tap(X, i, k, c, age, initial_state, state, head), total)
            g = G[(halo + i) * group + c] * slope(total)
            G[(halo + i) * group + c] = g
            g = select(own, g, zero)
            for k in range(width):
                seen = tap(X, i, k, c, age, initial_state, state, head)
                DW[k * group + c] = fma(g, seen, DW[k * group + c])
            db[c] = db[c] + g

    return of_sums


def final_adder(real, width, group, mask):
    """``add(E, A, i, s, there, row)``: to the gradient of the input at step s, what comes from a final state it is in.

    Step s is width - 1 steps before step i of the window.
    """
    halo, ages_seen, integer = width - 1, tuple(real.type(j) for j in range(width)), np.int64
    read, read_age = element_reader(real.name, real), element_reader(AGES, real)
    masked, states = mask != "", mask == "states"

    @device
    def add(E, A, i, s, there, row):
        final, index, number = s < 0, s * 0, row.batch
        if states:
            before = there
            for k in range(1, width):
                turns = A[i + k] < ages_seen[k]
                final, index = final | (before & turns), select(before & turns, halo - k, index)
                before = before & (A[i + k] >= ages_seen[k])
            final = final & there
            number = read_integer(row.sequences, s, select(final, 1, 0))
        else:
            index = s - (row.length - halo)
            final = (index >= 0) & there
            if masked:
                last_age = read_age(row.ages, row.age_row + row.length - 1, final)
                final = final & (integer(last_age) >= halo - 1 - index)
        state = (number * row.dim + row.d) * halo + index
        for c in range(group):
            E[c] = E[c] + read(row.dfinal_state, state + c * halo, final)

    return add


def input_gradients(real, width, group, mask):
    """``of_inputs(E, G, A, W, i)``: at the step in front of what taps see at step i, of the sums in the window."""
    halo, zero, masked = width - 1, real.type(0), mask != ""
    ages_seen = tuple(real.type(j) for j in range(width))

    @device
    def of_inputs(E, G, A, W, i):
        for c in range(group):
            total = zero
            for k in range(width):
                g = G[(i + k) * group + c]
                if masked:
                    g = select(A[i + k] >= ages_seen[k], g, zero)
                total = fma(W[(halo - k) * group + c], g, total)
            E[c] = total

    return of_inputs


def backward_turn(storage, width, group, silu, mask, whole):
    """``turn(X, G, A, W, b, DW, db, raw, raw_dy, at, step, left, t, row, into_final)``: a turn from step t on.

    If it is ``whole``, all of its steps and of the next one's matter, and none is in a final state.
    """
    real, halo = real_of_storage(storage), width - 1
    of_sums, add_final = sum_gradients(real, width, group, silu, mask), final_adder(real, width, group, mask)
    of_inputs, (age_of, first_state) = input_gradients(real, width, group, mask), sequence_reader(real, width, mask)
    _, ask, ask_all, take = steps_reader(storage, real, group)
    write, numbers = writer(dtype_of(storage), real, group, True), local_array(group, real)

    @device
    def turn(X, G, A, W, b, DW, db, raw, raw_dy, at, step, left, t, row, into_final):
        E = numbers()
        take(X, halo, raw)
        take(G, halo, raw_dy)
        if whole:
            ask_all(raw, at.x + TURN * step.x, step.x)
            ask_all(raw_dy, at.dy + TURN * step.dy, step.dy)
        else:
            ask(raw, at.x + TURN * step.x, step.x, short(left.looked - TURN))
            ask(raw_dy, at.dy + TURN * step.dy, step.dy, short(left.looked - TURN))
        for i in unroll(TURN):
            valid = whole | (left.looked > i)
            A[halo + i] = age_of(row, t + i, valid)
            state, head = first_state(row, A[halo + i], t + i, valid & (row.initial_state != 0))
            of_sums(G, DW, db, X, W, b, i, A[halo + i], whole | (left.own > i), row.initial_state, state, head)
            there = whole | ((left.first <= i) & (left.own > i - halo))
            of_inputs(E, G, A, W, i)  # complete, of the step width - 1 before
            if not whole:
                if into_final:
                    add_final(E, A, i, t + i - halo, there, row)
            write(at.dx + i * step.dx, 0, E, select(there, group, 0))

    return turn


def backward(storage, width, group, silu, mask):
    """A thread writes dx of its channels at the steps of its chunk, and what these add to dweight and dbias.

    It goes on for width - 1 steps after its chunk, whose gradients the last steps of the chunk look forward to.
    """
    real, halo = real_of_storage(storage), width - 1
    of_thread, start = place(group), window_starter(storage, real, width, group, mask)
    (make_raw, ask, _, _), read_taps = steps_reader(storage, real, group), taps_reader(real, width, group)
    window, taps, numbers = (local_array(n * group, real) for n in (halo + TURN, width, 1))
    of_steps, write_sum = local_array(halo + TURN, real), element_writer(real.name, real)
    whole_turn, turn = (backward_turn(storage, width, group, silu, mask, whole) for whole in (True, False))
    shift, anywhere = dtype_of(storage).itemsize.bit_length() - 1, mask == "states"
    zero, oldest = real.type(0), real.type(halo)

    @device
    def is_whole(left):
        return (left.first <= 0) & (left.own >= TURN) & (left.looked >= 2 * TURN)

    @device
    def before_final(dfinal_state, t, length):
        return (dfinal_state == 0) | ((not anywhere) & (t + TURN <= length))

    @device
    def move_on(X, G, A):
        for m in range(halo * group):
            X[m], G[m] = X[TURN * group + m], G[TURN * group + m]
        for m in range(halo):
            A[m] = A[TURN + m]

    @device
    def next_turn(at, step, left, t):
        at = Backward(at.x + TURN * step.x, at.dy + TURN * step.dy, at.dx + TURN * step.dx)
        return at, Left(short(left.looked - TURN), short(left.own - TURN), short(left.first - TURN)), t + TURN

    def kernel(
        dy, x, dx, weight, bias, initial_state, dfinal_state, ages, sequences, dweight, dbias, batches, dim, length,
        chunks, chunk, bits, dy_batch, dy_time, x_batch, x_time, dx_batch, dx_time,
    ):  # fmt: skip
        await_previous()
        X, G, A, W, DW, b, db = window(), window(), of_steps(), taps(), taps(), numbers(), numbers()
        raw, raw_dy = make_raw(), make_raw()
        batch, number, d = of_thread(dim, chunks, bits)
        inside, t = (d < dim) & (batch < batches), number * chunk
        row = Row(
            ages, batch * length, sequences, initial_state, dfinal_state, (batch * dim + d) * halo, length, batch, dim,
            d,
        )  # fmt: skip
        x_row, dy_row, dx_row = batch * x_batch + d, batch * dy_batch + d, batch * dx_batch + d
        at = Backward(
            x + ((x_row + t * x_time) << shift), dy + ((dy_row + t * dy_time) << shift),
            dx + ((dx_row + (t - halo) * dx_time) << shift),
        )  # fmt: skip
        step = Backward(x_time << shift, dy_time << shift, dx_time << shift)
        own = select(t + chunk < length, chunk, length - t)
        looked = select(t + chunk + halo < length, chunk + halo, length - t)
        left = Left(short(select(inside, looked, 0)), short(select(inside, own, -halo)), short(halo))
        ask(raw, at.x, step.x, left.looked)
        ask(raw_dy, at.dy, step.dy, left.looked)
        start(X, x, x_row, x_time, t, inside, initial_state, row.state)
        read_taps(W, b, weight, bias, d, inside)
        for c in range(group):
            db[c] = zero
            for k in range(width):
                DW[k * group + c] = zero
        for m in range(halo):
            A[m] = oldest
            for c in range(group):
                G[m * group + c] = zero
        while not in_all_lanes(left.own <= -halo):
            into_final = not in_all_lanes(before_final(dfinal_state, t, length))
            turn(X, G, A, W, b, DW, db, raw, raw_dy, at, step, left, t, row, into_final)
            move_on(X, G, A)
            at, left, t = next_turn(at, step, left, t)
            while in_all_lanes(is_whole(left) & before_final(dfinal_state, t, length)):
                whole_turn(X, G, A, W, b, DW, db, raw, raw_dy, at, step, left, t, row, False)
                move_on(X, G, A)
                at, left, t = next_turn(at, step, left, t)
        part = batch * chunks + number
        for c in range(group):
            for k in range(width):
                write_sum(dweight, (part * dim + d + c) * width + k, DW[k * group + c], inside)
            if dbias != 0:
                write_sum(dbias, part * dim + d + c, db[c], inside)

    return kernel, Shape(BLOCK, (4 if mask == "" else 3) if real.itemsize == 4 and width <= 4 else 2)


def shipped():
    """The kernels that CI compiles."""
    return [
        Kernel("causal_conv1d_last", "forward", ("bfloat16", 4, 4, True, "")),
        Kernel("causal_conv1d_last", "forward", ("float32", 4, 4, True, "ages")),
        Kernel("causal_conv1d_last", "forward", ("float64", 3, 2, False, "states")),
        Kernel("causal_conv1d_last", "backward", ("bfloat16", 4, 2, True, "")),
        Kernel("causal_conv1d_last", "backward", ("float32", 3, 2, True, "")),
        Kernel("causal_conv1d_last", "backward", ("float16", 4, 2, True, "states")),
        Kernel("causal_conv1d_last", "backward", ("float64", 4, 1, False, "ages")),
    ]
