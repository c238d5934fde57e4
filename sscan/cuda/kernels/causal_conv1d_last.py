"""The causal depthwise convolution on the GPU of arrays whose channels are neighbours in memory.

A thread has ``group`` neighbouring channels, which come in one access, and walks through ``chunk`` steps, a few at a
time; the next ones are asked for before these are worked on. What the taps see, and backward the gradients, stay in a
window in registers. Masks and states are those of ``causal_conv1d``.

Memory traffic: forward reads x and writes y, backward reads dy and x and writes dx, everything once but the width - 1
steps before (and after) a chunk.
"""

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._primitives import (
    INTEGER_READERS,
    await_previous,
    block_index,
    dtype_of,
    fma,
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
from sscan.cuda.causal_conv1d import AGES, BLOCK
from sscan.cuda.kernels.causal_conv1d import activations, element_reader, element_writer, real_of_storage

read_integer = INTEGER_READERS[64]


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


def steps_reader(storage, real, group, ahead):
    """``make()``, ``ask(raw, i, address, index, valid)`` and ``take(into, at, raw, i)``: the channels at a step."""
    dtype, numbers = dtype_of(storage), local_array(group, real)
    load, widen = stored_reader(dtype, group, True), widener(dtype, real, group)

    @device
    def ask(raw, i, address, index, valid):
        load(raw, i * group, address, index, select(valid, group, 0))

    @device
    def take(into, at, raw, i):
        values = numbers()
        widen(values, raw, i * group)
        for c in range(group):
            into[at + c] = values[c]

    return stored_array(ahead * group, dtype), ask, take


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
    """``age(ages, at, valid)`` of a step, and where its sequence begins.

    ``first_state(age, t, wanted, sequences, state, dim, d)``: where the initial state is whose inputs the taps of a
    step reach, and whether they reach it; only with "states".
    """
    read_age, halo, oldest, integer = element_reader(AGES, real), width - 1, real.type(width - 1), np.int64
    masked, states = mask != "", mask == "states"

    @device
    def age(ages, at, valid):
        return read_age(ages, at, valid) if masked else oldest

    @device
    def first_state(age, t, wanted, sequences, state, dim, d):
        if not states:
            return state, d < 0
        head = wanted & (age < oldest)
        sequence = read_integer(sequences, t, select(head, 1, 0))
        return (sequence * dim + d) * halo + integer(age), head

    return age, first_state


def forward(storage, width, group, silu, mask):
    """A thread writes its channels at the steps of its chunk."""
    real, halo, ahead = real_of_storage(storage), width - 1, 4
    of_thread, tap, start = (
        place(group),
        seen_by(real, width, group, mask),
        window_starter(storage, real, width, group, mask),
    )
    make_raw, ask, take = steps_reader(storage, real, group, ahead)
    read_taps, (age_of, first_state) = taps_reader(real, width, group), sequence_reader(real, width, mask)
    write = writer(dtype_of(storage), real, group, True)
    window, taps, numbers = (local_array(n * group, real) for n in (halo + ahead, width, 1))
    activate, _ = activations(real, silu)

    def kernel(
        x, y, weight, bias, initial_state, ages, sequences, batches, dim, length, chunks, chunk, bits, x_batch, x_time,
        y_batch, y_time,
    ):  # fmt: skip
        await_previous()
        X, W, b, Y, raw = window(), taps(), numbers(), numbers(), make_raw()
        batch, own, d = of_thread(dim, chunks, bits)
        inside, begin = (d < dim) & (batch < batches), own * chunk
        end = select(inside, begin + chunk, 0)
        end = select(end > length, length, end)
        row, y_row, state = batch * x_batch + d, batch * y_batch + d, (batch * dim + d) * halo
        for i in range(ahead):
            ask(raw, i, x, row + (begin + i) * x_time, begin + i < end)
        start(X, x, row, x_time, begin, inside, initial_state, state)
        read_taps(W, b, weight, bias, d, inside)
        for turn in range(chunk // ahead):
            t = begin + turn * ahead
            for i in range(ahead):
                take(X, (halo + i) * group, raw, i)
            for i in range(ahead):
                ask(raw, i, x, row + (t + ahead + i) * x_time, t + ahead + i < end)
            for i in range(ahead):
                age = age_of(ages, batch * length + t + i, t + i < end)
                from_state, head = first_state(age, t + i, t + i < end, sequences, state, dim, d)
                for c in range(group):
                    total = b[c]
                    for k in range(width):
                        total = fma(W[k * group + c], tap(X, i, k, c, age, initial_state, from_state, head), total)
                    Y[c] = activate(total)
                write(y, y_row + (t + i) * y_time, Y, select(t + i < end, group, 0))
            for m in range(halo * group):
                X[m] = X[ahead * group + m]

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


def final_places(real, width, mask):
    """``find(dfinal_state, A, i, s, there, ages, age_row, sequences, length, batch)``.

    Whether the input at step s, which is width - 1 steps before step i of the window, is in a final state, in which
    column, and of which sequence.
    """
    halo, ages_seen, integer = width - 1, tuple(real.type(j) for j in range(width)), np.int64
    read_age, masked, states = element_reader(AGES, real), mask != "", mask == "states"

    @device
    def find(dfinal_state, A, i, s, there, ages, age_row, sequences, length, batch):
        final, index, number = s < 0, s * 0, batch
        if dfinal_state != 0:
            if states:
                before = there
                for k in range(1, width):
                    turns = A[i + k] < ages_seen[k]
                    final, index = final | (before & turns), select(before & turns, halo - k, index)
                    before = before & (A[i + k] >= ages_seen[k])
                final = final & there
                number = read_integer(sequences, s, select(final, 1, 0))
            else:
                index = s - (length - halo)
                final = (index >= 0) & there
                if masked:
                    last_age = read_age(ages, age_row + length - 1, final)
                    final = final & (integer(last_age) >= halo - 1 - index)
        return final, index, number

    return find


def input_gradients(real, width, group, mask):
    """``of_inputs(E, G, A, W, i, dfinal_state, state, index, final)``: at the step in front of what taps see at step i.

    From the gradients of the sums in the window, and of the final state, if the input is in one.
    """
    halo, zero, masked = width - 1, real.type(0), mask != ""
    ages_seen, read = tuple(real.type(j) for j in range(width)), element_reader(real.name, real)

    @device
    def of_inputs(E, G, A, W, i, dfinal_state, state, index, final):
        for c in range(group):
            total = zero
            for k in range(width):
                g = G[(i + k) * group + c]
                if masked:
                    g = select(A[i + k] >= ages_seen[k], g, zero)
                total = fma(W[(halo - k) * group + c], g, total)
            if dfinal_state != 0:
                total = total + read(dfinal_state, state + c * halo + index, final)
            E[c] = total

    return of_inputs


def backward(storage, width, group, silu, mask):
    """A thread writes dx of its channels at the steps of its chunk, and what these add to dweight and dbias.

    It goes on for width - 1 steps after its chunk, whose gradients the last steps of the chunk look forward to.
    """
    real, halo, ahead = real_of_storage(storage), width - 1, 2
    of_thread, start = place(group), window_starter(storage, real, width, group, mask)
    make_raw, ask, take = steps_reader(storage, real, group, ahead)
    read_taps, (age_of, first_state) = taps_reader(real, width, group), sequence_reader(real, width, mask)
    of_sums, find = sum_gradients(real, width, group, silu, mask), final_places(real, width, mask)
    of_inputs, zero, oldest = input_gradients(real, width, group, mask), real.type(0), real.type(halo)
    write, write_sum = writer(dtype_of(storage), real, group, True), element_writer(real.name, real)
    window, taps, numbers = (local_array(n * group, real) for n in (halo + ahead, width, 1))
    of_steps = local_array(halo + ahead, real)

    def kernel(
        dy, x, dx, weight, bias, initial_state, dfinal_state, ages, sequences, dweight, dbias, batches, dim, length,
        chunks, chunk, bits, dy_batch, dy_time, x_batch, x_time, dx_batch, dx_time,
    ):  # fmt: skip
        await_previous()
        X, G, A, W, DW, b, db, E = window(), window(), of_steps(), taps(), taps(), numbers(), numbers(), numbers()
        raw, raw_dy = make_raw(), make_raw()
        batch, own, d = of_thread(dim, chunks, bits)
        inside, begin = (d < dim) & (batch < batches), own * chunk
        end = select(inside, begin + chunk, 0)
        end, last = select(end > length, length, end), select(end + halo > length, length, end + halo)
        last = select(inside, last, 0)
        row, dy_row, dx_row = batch * x_batch + d, batch * dy_batch + d, batch * dx_batch + d
        state = (batch * dim + d) * halo
        for i in range(ahead):
            ask(raw, i, x, row + (begin + i) * x_time, begin + i < last)
            ask(raw_dy, i, dy, dy_row + (begin + i) * dy_time, begin + i < last)
        start(X, x, row, x_time, begin, inside, initial_state, state)
        read_taps(W, b, weight, bias, d, inside)
        for c in range(group):
            db[c] = zero
            for k in range(width):
                DW[k * group + c] = zero
        for m in range(halo):
            A[m] = oldest
            for c in range(group):
                G[m * group + c] = zero
        for turn in range((chunk + halo + ahead - 1) // ahead):
            t = begin + turn * ahead
            for i in range(ahead):
                take(X, (halo + i) * group, raw, i)
                take(G, (halo + i) * group, raw_dy, i)
            for i in range(ahead):
                ask(raw, i, x, row + (t + ahead + i) * x_time, t + ahead + i < last)
                ask(raw_dy, i, dy, dy_row + (t + ahead + i) * dy_time, t + ahead + i < last)
            for i in range(ahead):
                A[halo + i] = age_of(ages, batch * length + t + i, t + i < last)
                wanted = (initial_state != 0) & (t + i < last)
                from_state, head = first_state(A[halo + i], t + i, wanted, sequences, state, dim, d)
                of_sums(G, DW, db, X, W, b, i, A[halo + i], t + i < end, initial_state, from_state, head)
                s = t + i - halo  # the gradient of this step's input is complete
                there = (s >= begin) & (s < end)
                final, index, number = find(
                    dfinal_state, A, i, s, there, ages, batch * length, sequences, length, batch
                )
                of_inputs(E, G, A, W, i, dfinal_state, (number * dim + d) * halo, index, final)
                write(dx, dx_row + s * dx_time, E, select(there, group, 0))
            for m in range(halo * group):
                X[m], G[m] = X[ahead * group + m], G[ahead * group + m]
            for m in range(halo):
                A[m] = A[ahead + m]
        part = batch * chunks + own
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
