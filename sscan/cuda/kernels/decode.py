"""One decoding step of a Mamba language model on the GPU, in the phases of ``sscan.cpu.decode``.

It is bound by reading the weights and by the time between launches, so a kernel does with its products at once what it
can: norm before them, convolution, addition to the residual stream behind them. While the kernel before it ends, it
sends for its weights, as far as the L2 cache.

*Few rows* of a batch: a warp has some rows of a weight, lane by lane in pieces of up to 16 bytes, which are all asked
for before anything else, and multiplies them with every row of the batch. All arithmetic is float32 (float64).

*Tiles*, for more rows of weights in half precision: the tensor cores multiply 16 rows of a weight with 8 of the batch.
Warps share a tile's columns (``splits``) or have tiles of their own (``tiles``). What is multiplied is in half
precision then, everything else as above.
"""

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._math import real_functions
from sscan.cuda._primitives import (
    INTEGER_READERS,
    as_real,
    await_previous,
    block_index,
    dtype_of,
    fma,
    local_array,
    matrix_multiplier,
    prefetch,
    product_adder,
    quotient,
    reader,
    select,
    shared_array,
    shared_get,
    shared_set,
    stored_array,
    stored_reader,
    synchronize,
    thread_index,
    widener,
    writer,
)
from sscan.cuda._target import device
from sscan.cuda._unroll import unroll
from sscan.cuda.decode import COLUMNS, PIECE, ROWS, THREADS, WARP
from sscan.cuda.kernels._warp import lane_sum
from sscan.cuda.kernels.causal_conv1d import element_reader, element_writer, real_of_storage
from sscan.cuda.kernels.rms_norm import reciprocal_root

read_token = INTEGER_READERS[64]
LINE = 128  # bytes that come together


def piece_reader(storage, real, each, whole, constant=True):
    """``read(into, address, start, column, size)``: a piece of a row from ``column`` on; zeros past ``size``.

    What is past the row is read from its start and dropped, so that no load stands behind a branch. ``whole``: nothing
    is past it. ``start`` is the row's first element.
    """
    load, zero = reader(dtype_of(storage), real, each, each > 1, constant), real.type(0)

    @device
    def read(into, address, start, column, size):
        if whole:
            load(into, address, start + column, each)
        else:
            inside = column < size
            load(into, address, start + select(inside, column, 0), each)
            for k in range(each):
                into[k] = select(inside, into[k], zero)

    return read


def sender(storage, threads):
    """``send_for(weight, row, stop, rows, size, thread)``: rows of a weight, by so many threads; none from ``stop``."""
    itemsize, apart = dtype_of(storage).itemsize, LINE * threads

    @device
    def send_for(weight, row, stop, rows, size, thread):
        count, start = min(rows, stop - row) * size * itemsize, weight + row * size * itemsize
        for turn in range((count + apart - 1) // apart):
            at = turn * apart + thread * LINE
            prefetch(start + select(at < count, at, 0))

    return send_for


# --- few rows of a batch ---------------------------------------------------------------------------------------------


def row_products(storage, source, each, pieces, whole, rows, batch, normed):
    """``products(total, square, weight, row, stop, X, first, count, gain, size)``: a lane's part of products.

    total[r * batch + b] is that of row ``row + r`` of the weight and row ``first + b`` of X, and if ``normed`` X is
    multiplied by ``gain`` and its squares are added up in square[b]. Rows from ``stop`` and ``count`` on are any.
    """
    real = real_of_storage(storage)
    stride, span, zero = max(2, each), WARP * each * pieces, real.type(0)
    make_raw = stored_array(rows * pieces * stride, dtype_of(storage))
    ask, widen = stored_reader(dtype_of(storage), each, each > 1), widener(dtype_of(storage), real, each)
    read_X, read_gain = piece_reader(source, real, each, whole), piece_reader(storage, real, each, whole)
    numbers, add = local_array(each, real), product_adder(real, each)

    @device
    def products(total, square, weight, row, stop, X, first, count, gain, size):
        raw, w, v, g = make_raw(), numbers(), numbers(), numbers()
        lane = thread_index() & (WARP - 1)
        for i in range(rows * batch):
            total[i] = zero
        for b in range(batch):
            square[b] = zero
        for turn in range((size + span - 1) // span):
            begin = turn * span + lane * each
            for r in unroll(rows):
                start = select(row + r < stop, row + r, 0) * size
                for p in unroll(pieces):
                    column = begin + p * WARP * each
                    ask(raw, (r * pieces + p) * stride, weight, start + select(column < size, column, 0), each)
            for p in unroll(pieces):
                column = begin + p * WARP * each
                if normed:
                    read_gain(g, gain, 0, column, size)
                for b in unroll(batch):
                    read_X(v, X, select(first + b < count, first + b, 0) * size, column, size)
                    if normed:
                        add(square, b, v, v)
                        for k in range(each):
                            v[k] = v[k] * g[k]
                    for r in unroll(rows):
                        widen(w, raw, (r * pieces + p) * stride)
                        add(total, r * batch + b, w, v)

    return products


def own_product(real, rows, batch, normed):
    """``own(total, square, inverse_size, eps)``: the product that is this lane's, of ``rows * batch`` <= 32 ones.

    Lane ``r * batch + b`` has that of row r of the weight and row b of the batch, normalised if ``normed``.
    """
    over_warp, inverse_root, zero = lane_sum(WARP), reciprocal_root(real), real.type(0)
    number = real.type

    @device
    def own(total, square, inverse_size, eps):
        lane, value, scale = thread_index() & (WARP - 1), zero, number(1)
        for i in range(rows * batch):
            value = select(lane == i, over_warp(total[i]), value)
        if normed:
            for b in range(batch):
                mean = over_warp(square[b]) * number(as_real(inverse_size))
                scale = select(lane % batch == b, inverse_root(mean + number(as_real(eps))), scale)
        return value * scale

    return own


def convolver(storage, width):
    """``make()``, ``ask(past, state, at, taps, channel, valid)``, ``convolve(past, now, state, at, bias, ...)``.

    The convolution and SiLU of a channel of a row whose newest input is ``now``; inputs move up in the state, which
    lies at ``at``. What the past was is asked for before it is needed.
    """
    real, dtype, kept = real_of_storage(storage), dtype_of(storage), width - 1
    sigmoid, read_bias = real_functions(real).sigmoid, element_reader(storage, real)
    stride, aligned = kept + kept % 2, width + width % 2
    make = stored_array(stride + aligned, dtype)
    ask_state, ask_taps = stored_reader(dtype, max(1, kept), constant=False), stored_reader(dtype, width)
    widen_state, widen_taps = widener(dtype, real, max(1, kept)), widener(dtype, real, width)
    write_state = writer(dtype, real, max(1, kept))
    states, numbers = local_array(width, real), local_array(width, real)

    @device
    def ask(past, state, at, taps, channel, valid):
        if kept > 0:
            ask_state(past, 0, state, at * kept, select(valid, kept, 0))
        ask_taps(past, stride, taps, channel * width, select(valid, width, 0))

    @device
    def convolve(past, now, state, at, bias, channel, valid):
        S, W = states(), numbers()
        widen_taps(W, past, stride)
        total = fma(W[kept], now, read_bias(bias, channel, valid & (bias != 0)))
        if kept > 0:
            widen_state(S, past, 0)
            for k in range(kept):
                total = fma(W[k], S[k], total)
            for k in range(kept - 1):
                S[k] = S[k + 1]
            S[kept - 1] = now
            write_state(state, at * kept, S, select(valid, kept, 0))
        return total * sigmoid(total)

    return make, ask, convolve


def in_projection(storage, each, pieces, whole, rows, batch, width):
    """x and z: norm of the residual stream, in_proj; x goes through convolution and SiLU."""
    real = real_of_storage(storage)
    products = row_products(storage, real.name, each, pieces, whole, rows, batch, True)
    own, read_bias, write = (
        own_product(real, rows, batch, True),
        element_reader(storage, real),
        element_writer(real.name, real),
    )
    make_past, ask_past, convolve = convolver(storage, width)
    totals, squares, warps = local_array(rows * batch, real), local_array(batch, real), THREADS // WARP
    send_for = sender(storage, THREADS)

    def kernel(
        stream, norm, eps, inverse_size, weight, bias, state, taps, conv_bias, x, z, count, model, inner,
    ):  # fmt: skip
        total, square, past = totals(), squares(), make_past()
        over_rows = (2 * inner + rows * warps - 1) // (rows * warps)
        group, lane = quotient(block_index(), over_rows), thread_index() & (WARP - 1)
        row = ((block_index() - group * over_rows) * warps + (thread_index() >> 5)) * rows
        channel, b = row + lane // batch, group * batch + lane % batch
        mine = (lane < rows * batch) & (b < count) & (channel < 2 * inner)
        of_x, at = mine & (channel < inner), b * inner + channel
        of_block = (block_index() - group * over_rows) * warps * rows
        send_for(weight, of_block, 2 * inner, warps * rows, model, thread_index())
        await_previous()
        ask_past(past, state, at, taps, channel, of_x)
        products(total, square, weight, row, 2 * inner, stream, group * batch, count, norm, model)
        value = own(total, square, inverse_size, eps) + read_bias(bias, channel, mine & (bias != 0))
        write(z, at - inner, value, mine & (channel >= inner))
        write(x, at, convolve(past, value, state, at, conv_bias, channel, of_x), of_x)

    return kernel, Shape(THREADS, 4 if batch == 1 else 2)


def projection(storage, source, each, pieces, whole, rows, batch, warps, normed, added):
    """out = X weight^T (of the normalised X), or added to what is there."""
    real = real_of_storage(storage)
    products = row_products(storage, source, each, pieces, whole, rows, batch, normed)
    own, read_bias = own_product(real, rows, batch, normed), element_reader(storage, real)
    read_out, write = element_reader(real.name, real, constant=False), element_writer(real.name, real)
    totals, squares = local_array(rows * batch, real), local_array(batch, real)
    send_for = sender(storage, WARP * warps)

    def kernel(X, norm, eps, inverse_size, weight, bias, out, count, size, height):
        total, square = totals(), squares()
        over_rows = (height + rows * warps - 1) // (rows * warps)
        group, lane = quotient(block_index(), over_rows), thread_index() & (WARP - 1)
        row = ((block_index() - group * over_rows) * warps + (thread_index() >> 5)) * rows
        own_row, b = row + lane // batch, group * batch + lane % batch
        mine = (lane < rows * batch) & (b < count) & (own_row < height)
        of_block = (block_index() - group * over_rows) * warps * rows
        send_for(weight, of_block, height, warps * rows, size, thread_index())
        await_previous()
        products(total, square, weight, row, height, X, group * batch, count, norm, size)
        value = own(total, square, inverse_size, eps) + read_bias(bias, own_row, mine & (bias != 0))
        if added:
            value = value + read_out(out, b * height + own_row, mine)
        write(out, b * height + own_row, value, mine)

    return kernel, Shape(WARP * warps, (16 if batch == 1 else 8) // warps)


# --- what is the same for few and many -------------------------------------------------------------------------------


def embed(storage, each):
    """The rows of the embedding for the tokens, as the residual stream; what is no token is token 0."""
    real = real_of_storage(storage)
    read, write = reader(dtype_of(storage), real, each, each > 1), writer(real, real, each, each > 1)
    numbers = local_array(each, real)

    def kernel(tokens, embedding, stream, count, model, vocabulary):
        await_previous()
        values = numbers()
        across = (model + each - 1) // each
        i = block_index() * THREADS + thread_index()
        b = quotient(i, across)
        column, inside = (i - b * across) * each, b < count
        token = read_token(tokens, b, select(inside, 1, 0))
        token = select((token >= 0) & (token < vocabulary), token, 0)
        read(values, embedding, token * model + column, select(inside, each, 0))
        write(stream, b * model + column, values, select(inside, each, 0))

    return kernel, Shape(THREADS, 8)


def advance(storage, between, of_A, of_D, of_state, lanes, each, vectors, exact, each_dt, pieces, rows, projected):
    """The states and y: dt_proj, softplus, the step of the states, gate.

    ``lanes`` threads have a channel; each has ``vectors`` times ``each`` of its states, and of the weights of its step
    size ``pieces`` times ``each_dt`` at once, in ``rows`` rows of the batch. ``low`` has dt, B and C behind each other.
    ``projected``: ``weight`` is not the weight of dt_proj but its result (batch, inner).
    """
    real = real_of_storage(storage)
    f, total_of = real_functions(real), lane_sum(lanes)
    decay, rate, softplus, sigmoid = f.decay, f.rate, f.softplus, f.sigmoid
    kept, own, zero, unit = dtype_of(of_state), dtype_of(storage), real.type(0), real.type(1)
    bytes_of_A, bytes_of_state, bytes_of_weight = dtype_of(of_A).itemsize, kept.itemsize, own.itemsize
    stride, stride_dt, apart = max(2, each), max(2, each_dt), lanes * each
    make_states, make_A = stored_array(rows * vectors * stride, kept), stored_array(vectors * stride, dtype_of(of_A))
    ask_states, widen_states = stored_reader(kept, each, each > 1, constant=False), widener(kept, real, each)
    ask_A, widen_A = stored_reader(dtype_of(of_A), each, each > 1), widener(dtype_of(of_A), real, each)
    write_states, read_low = writer(kept, real, each, each > 1), reader(real, real, each, each > 1)
    make_dt, ask_dt = stored_array(pieces * stride_dt, own), stored_reader(own, each_dt, each_dt > 1)
    add_dt = product_adder(real, each_dt)
    widen_dt, read_dt = widener(own, real, each_dt), reader(real, real, each_dt, each_dt > 1)
    numbers, numbers_dt, of_rows = local_array(each, real), local_array(each_dt, real), local_array(rows, real)
    read, read_D, read_bias = element_reader(between, real), element_reader(of_D, real), element_reader(storage, real)
    read_delta, write, channels = element_reader(real.name, real), element_writer(between, real), THREADS // lanes

    def kernel(weight, bias, A_log, D, state, x, z, low, y, count, inner, size, rank, z_row):
        H, As, weights = make_states(), make_A(), make_dt()
        h, a, B, C, w, v = numbers(), numbers(), numbers(), numbers(), numbers_dt(), numbers_dt()
        delta, total, u, gate = of_rows(), of_rows(), of_rows(), of_rows()
        over_dim = (inner + channels - 1) // channels
        first = quotient(block_index(), over_dim)
        d = (block_index() - first * over_dim) * channels + thread_index() // lanes
        first, lane, present, width = first * rows, thread_index() & (lanes - 1), d < inner, rank + 2 * size
        here, share = select(present, d, 0), lane * (size // lanes)
        prefetch(A_log + (here * size + share) * bytes_of_A)
        for r in unroll(rows):
            row = select(first + r < count, first + r, 0) * inner + here
            prefetch(state + (row * size + share) * bytes_of_state)
        if rank > 0 and not projected:
            prefetch(weight + here * rank * bytes_of_weight)
        await_previous()
        for n in unroll(vectors):
            at = n * apart + lane * each
            for r in unroll(rows):
                valid = select(present & (first + r < count), each if exact else size - at, 0)
                from_state = ((first + r) * inner + d) * size + at
                ask_states(H, (r * vectors + n) * stride, state, from_state, valid)
            ask_A(As, n * stride, A_log, d * size + at, select(present, each if exact else size - at, 0))
        for r in unroll(rows):
            there = present & (first + r < count)
            u[r] = read(x, (first + r) * inner + d, there)
            gate[r] = read(z, (first + r) * z_row + d, there)
            delta[r] = read_delta(weight, (first + r) * inner + d, there & (lane == 0)) if projected else zero
        for turn in range(0 if projected else (rank + lanes * each_dt * pieces - 1) // (lanes * each_dt * pieces)):
            begin = (turn * lanes * pieces + lane) * each_dt
            for p in unroll(pieces):
                column = begin + p * lanes * each_dt
                ask_dt(weights, p * stride_dt, weight, d * rank + column, select(present & (column < rank), each_dt, 0))
            for r in unroll(rows):
                for p in unroll(pieces):
                    column = begin + p * lanes * each_dt
                    there = (first + r < count) & (column < rank)
                    read_dt(v, low, (first + r) * width + column, select(there, each_dt, 0))
                    widen_dt(w, weights, p * stride_dt)
                    add_dt(delta, r, w, v)
        skip, shift = read_D(D, d, present), read_bias(bias, d, present & (bias != 0))
        for r in unroll(rows):
            delta[r] = softplus(total_of(delta[r]) + shift)
            total[r] = zero
        for n in unroll(vectors):
            at = n * apart + lane * each
            widen_A(a, As, n * stride)
            for k in range(each):
                a[k] = rate(-decay(unit, rate(a[k])))
            for r in unroll(rows):
                there = present & (first + r < count)
                valid = select(there, each if exact else size - at, 0)
                from_low = (first + r) * width + rank + at
                read_low(B, low, from_low, valid)
                read_low(C, low, from_low + size, valid)
                widen_states(h, H, (r * vectors + n) * stride)
                for k in range(each):
                    h[k] = fma(decay(delta[r], a[k]), h[k], B[k] * (delta[r] * u[r]))
                    total[r] = fma(C[k], h[k], total[r])
                write_states(state, ((first + r) * inner + d) * size + at, h, valid)
        for r in unroll(rows):
            value = fma(skip, u[r], total_of(total[r])) * (gate[r] * sigmoid(gate[r]))
            write(y, (first + r) * inner + d, value, present & (first + r < count) & (lane == 0))

    return kernel, Shape(THREADS, {1: 8, 2: 6}.get(rows, 4) if real.itemsize == 4 else 2)


# --- tiles -----------------------------------------------------------------------------------------------------------


def normalise(storage, pieces):
    """X = the normalised rows of the stream, rounded; a warp has a row, ``pieces`` times 4 numbers a lane."""
    real, each = real_of_storage(storage), 4
    read, read_norm = reader(real, real, each, True), reader(dtype_of(storage), real, each, True)
    write, registers, numbers = writer(dtype_of(storage), real, each, True), local_array(4 * pieces, real), 4
    numbers, over_warp, inverse_root = local_array(each, real), lane_sum(WARP), reciprocal_root(real)
    zero, number, warps = real.type(0), real.type, THREADS // WARP

    def kernel(stream, norm, eps, inverse_size, X, count, size):
        await_previous()
        s, values = registers(), numbers()
        row, lane = block_index() * warps + (thread_index() >> 5), thread_index() & (WARP - 1)
        length, square = select(row < count, size, 0), zero
        for p in unroll(pieces):
            column = (p * WARP + lane) * each
            read(values, stream, row * size + column, select(column < length, each, 0))
            for k in range(each):
                s[p * each + k] = values[k]
                square = fma(values[k], values[k], square)
        scale = inverse_root(over_warp(square) * number(as_real(inverse_size)) + number(as_real(eps)))
        for p in unroll(pieces):
            column = (p * WARP + lane) * each
            read_norm(values, norm, column, select(column < length, each, 0))
            for k in range(each):
                values[k] = s[p * each + k] * scale * values[k]
            write(X, row * size + column, values, select(column < length, each, 0))

    return kernel, Shape(THREADS, 4)


def convolution(storage, width):
    """x from the half of in_proj's result that is x: a thread has a channel of a row."""
    real = real_of_storage(storage)
    read, write = element_reader(storage, real), element_writer(storage, real)
    make_past, ask_past, convolve = convolver(storage, width)

    def kernel(xz, state, taps, conv_bias, x, count, inner):
        await_previous()
        past = make_past()
        at = block_index() * THREADS + thread_index()
        b = quotient(at, inner)
        channel, valid = at - b * inner, b < count
        ask_past(past, state, at, taps, channel, valid)
        now = read(xz, b * 2 * inner + channel, valid)
        write(x, at, convolve(past, now, state, at, conv_bias, channel, valid), valid)

    return kernel, Shape(THREADS, 8)


def tile_products(storage, m, splits, tiles, depth, whole):
    """``products(memory, weight, row, stop, X, first, count, size)``, ``output(memory, i)`` and their shared array.

    Products of ``16 * tiles`` rows of a weight from ``row`` on and ``8 * m`` rows of X from ``first`` on. Output i is
    that of row ``i % (16 * tiles)`` and row ``i // (16 * tiles)`` of the batch, a sum over the ``splits``.

    The order of columns within a product is free. So a lane takes 16 bytes, of which two instructions get half each.
    """
    dtype, real = dtype_of(storage), np.dtype(np.float32)
    multiply, zero = matrix_multiplier(dtype), real.type(0)
    make_w, make_x, totals = (
        stored_array(depth * 2 * PIECE, dtype),
        stored_array(m * PIECE, dtype),
        local_array(4 * m, real),
    )
    ask_w, ask_x = stored_reader(dtype, PIECE, True), stored_reader(dtype, PIECE, True)
    memory = shared_array(tiles * splits * 4 * m * WARP, real)
    span, bits, of_tiles = COLUMNS * depth * splits, splits.bit_length() - 1, (ROWS * tiles).bit_length() - 1

    @device
    def products(shared, weight, row, stop, X, first, count, size):
        total, w, x = totals(), make_w(), make_x()
        warp, lane = thread_index() >> 5, thread_index() & (WARP - 1)
        low, b = row + (warp >> bits) * ROWS + (lane >> 2), first + (lane >> 2)
        high = select(low + 8 < stop, low + 8, 0) * size
        low = select(low < stop, low, 0) * size
        for i in range(4 * m):
            total[i] = zero
        for turn in range((size + span - 1) // span):
            begin = turn * span + (warp & (splits - 1)) * depth * COLUMNS + (lane & 3) * PIECE
            for c in unroll(depth):
                column = begin + c * COLUMNS
                column = column if whole else select(column < size, column, 0)
                ask_w(w, 2 * c * PIECE, weight, low + column, PIECE)
                ask_w(w, (2 * c + 1) * PIECE, weight, high + column, PIECE)
            for c in unroll(depth):
                column = begin + c * COLUMNS
                for j in unroll(m):
                    from_row = select(b + 8 * j < count, b + 8 * j, 0) * size
                    ask_x(x, j * PIECE, X, from_row + column, PIECE if whole else select(column < size, PIECE, 0))
                for j in unroll(m):
                    multiply(total, 4 * j, w, 2 * c * PIECE, (2 * c + 1) * PIECE, x, j * PIECE)
                    multiply(total, 4 * j, w, 2 * c * PIECE + 4, (2 * c + 1) * PIECE + 4, x, j * PIECE + 4)
        for i in range(4 * m):
            shared_set(shared, (warp * 4 * m + i) * WARP + lane, total[i])
        synchronize()

    @device
    def output(shared, i):
        row, b = i & ((1 << of_tiles) - 1), i >> of_tiles
        place = 4 * (b >> 3) + 2 * ((row >> 3) & 1) + (b & 1)
        lane, warp, value = 4 * (row & 7) + ((b & 7) >> 1), (row >> 4) * splits, zero
        for s in range(splits):
            value = value + shared_get(shared, ((warp + s) * 4 * m + place) * WARP + lane)
        return value

    return products, output, memory


def tile_threads(m, splits, tiles):
    """Threads of a block, outputs of a tile's block, and how often its threads go through them."""
    threads, outputs = WARP * splits * tiles, ROWS * tiles * 8 * m
    return threads, outputs, -(-outputs // threads)


def in_projection_tiles(storage, m, splits, tiles, depth, whole, width):
    """x and z as ``in_projection``, of a stream that is normalised."""
    real = np.dtype(np.float32)
    products, output, memory = tile_products(storage, m, splits, tiles, depth, whole)
    read_bias, write = element_reader(storage, real), element_writer(storage, real)
    make_past, ask_past, convolve = convolver(storage, width)
    (threads, outputs, turns), height = tile_threads(m, splits, tiles), ROWS * tiles
    send_for = sender(storage, threads)

    def kernel(X, weight, bias, state, taps, conv_bias, x, z, count, model, inner):
        shared, past = memory(), make_past()
        over_rows = (2 * inner + height - 1) // height
        group = quotient(block_index(), over_rows)
        row, first = (block_index() - group * over_rows) * height, group * 8 * m
        send_for(weight, row, 2 * inner, height, model, thread_index())
        await_previous()
        products(shared, weight, row, 2 * inner, X, first, count, model)
        for turn in range(turns):
            i = turn * threads + thread_index()
            i, channel, b = select(i < outputs, i, 0), row + (i & (height - 1)), first + quotient(i, height)
            mine = (turn * threads + thread_index() < outputs) & (b < count) & (channel < 2 * inner)
            of_x, at = mine & (channel < inner), b * inner + channel
            ask_past(past, state, at, taps, channel, of_x)
            value = output(shared, i) + read_bias(bias, channel, mine & (bias != 0))
            write(z, at - inner, value, mine & (channel >= inner))
            write(x, at, convolve(past, value, state, at, conv_bias, channel, of_x), of_x)

    return kernel, Shape(threads, max(1, (384 if m < 8 else 256) // threads))


def projection_tiles(storage, m, splits, tiles, depth, whole, added):
    """out, in float32, = X weight^T, or added to what is there; its first ``columns`` columns also rounded."""
    real = np.dtype(np.float32)
    products, output, memory = tile_products(storage, m, splits, tiles, depth, whole)
    read_bias, read_out = element_reader(storage, real), element_reader(real.name, real, constant=False)
    write, write_rounded = element_writer(real.name, real), element_writer(storage, real)
    (threads, outputs, turns), side = tile_threads(m, splits, tiles), ROWS * tiles
    send_for = sender(storage, threads)

    def kernel(X, weight, bias, out, rounded, columns, count, size, height):
        shared = memory()
        over_rows = (height + side - 1) // side
        group = quotient(block_index(), over_rows)
        row, first = (block_index() - group * over_rows) * side, group * 8 * m
        send_for(weight, row, height, side, size, thread_index())
        await_previous()
        products(shared, weight, row, height, X, first, count, size)
        for turn in range(turns):
            i = turn * threads + thread_index()
            i, own, b = select(i < outputs, i, 0), row + (i & (side - 1)), first + quotient(i, side)
            mine = (turn * threads + thread_index() < outputs) & (b < count) & (own < height)
            value = output(shared, i) + read_bias(bias, own, mine & (bias != 0))
            if added:
                value = value + read_out(out, b * height + own, mine)
            write(out, b * height + own, value, mine)
            write_rounded(rounded, b * columns + own, value, mine & (own < columns))

    return kernel, Shape(threads, max(1, (384 if m < 8 else 256) // threads))


def shipped():
    """Kernels that stand for all: those of 130M in bfloat16, and what is not aligned."""
    return [
        Kernel("decode", factory, key)
        for factory, key in (
            ("embed", ("bfloat16", 4)),
            ("embed", ("float64", 1)),
            ("in_projection", ("bfloat16", 8, 3, True, 2, 1, 4)),
            ("in_projection", ("float32", 4, 6, False, 2, 4, 3)),
            ("in_projection", ("float16", 1, 2, False, 2, 4, 4)),
            ("projection", ("bfloat16", "float32", 8, 6, True, 1, 1, 1, False, False)),
            ("projection", ("bfloat16", "float32", 8, 6, True, 1, 4, 4, False, True)),
            ("projection", ("bfloat16", "float32", 8, 3, True, 4, 4, 4, True, False)),
            ("projection", ("float64", "float64", 2, 4, False, 4, 2, 4, True, False)),
            ("advance", ("bfloat16", "float32", "float32", "float32", "float32", 4, 4, 1, True, 8, 2, 1, False)),
            ("advance", ("bfloat16", "bfloat16", "float32", "float32", "float32", 4, 4, 1, True, 8, 2, 2, False)),
            ("advance", ("bfloat16", "bfloat16", "float32", "float32", "float32", 4, 4, 1, True, 1, 1, 2, True)),
            ("advance", ("float64", "float64", "float64", "float64", "float64", 4, 1, 3, False, 1, 2, 1, False)),
            ("normalise", ("bfloat16", 6)),
            ("convolution", ("float16", 4)),
            ("in_projection_tiles", ("bfloat16", 2, 4, 1, 6, True, 4)),
            ("in_projection_tiles", ("float16", 8, 1, 4, 6, False, 3)),
            ("projection_tiles", ("bfloat16", 2, 8, 1, 6, True, True)),
            ("projection_tiles", ("bfloat16", 8, 1, 4, 6, True, False)),
        )
    ]
