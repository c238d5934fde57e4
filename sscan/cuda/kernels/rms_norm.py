"""RMS normalisation of rows, on the GPU.

A *team* of threads owns a row: some lanes of a warp, or a whole block. Thread ``lane`` of ``lanes`` has the groups
``lane, lane + lanes, ...`` of the row, each of up to 16 bytes of x, so that a warp reads contiguous memory. Rows of
up to lanes * groups groups stay in registers between the sum of squares and its use (``forward``, ``backward``); wider
ones are read twice (``forward_wide``, ``backward_wide``).

Memory traffic: forward reads x (and the residual) and writes y (and the sum); backward reads dy, x (and the residual
and its gradient) and writes dx (and dresidual). Everything once; the weight comes from the L1 cache.
"""

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._primitives import (
    as_real,
    block_index,
    dtype_of,
    local_array,
    reader,
    select,
    shared_array,
    shared_get,
    shared_set,
    square_root,
    synchronize,
    thread_index,
    writer,
)
from sscan.cuda._target import device
from sscan.cuda.kernels._warp import WARP, lane_sum
from sscan.cuda.rms_norm import BLOCK, WIDE


def real_of_storage(storage):
    """The dtype of arithmetic."""
    return np.dtype(np.float64 if storage == "float64" else np.float32)


def group_reader(storage, real, group, constant=True):
    """``read(into, address, start, column, size)``: a group of a row from ``column`` on; zeros past ``size``.

    Loads do not depend on the column: what is past the row is read from its start and dropped. So none of them waits
    for another, as loads behind branches would. ``start`` is the row's first element; groups are whole.
    """
    load, zero = reader(dtype_of(storage), real, group, group > 1, constant), real.type(0)

    @device
    def read(into, address, start, column, size):
        inside = column < size
        load(into, address, start + select(inside, column, 0), group)
        for k in range(group):
            into[k] = select(inside, into[k], zero)

    return read


def team_memory(real, lanes):
    """The shared array of ``team_sums``."""
    return shared_array(4 * max(1, lanes // WARP), real)


def team_sums(lanes):
    """``total(memory, turn, x, y)``: sums of x and of y over a team, the same in all its threads.

    One barrier is enough if ``turn`` alternates between 0 and 1. ``memory`` is a ``team_memory``.
    """
    warps, within = lanes // WARP, lane_sum(min(lanes, WARP))

    @device
    def of_lanes(memory, turn, x, y):
        return within(x), within(y)

    @device
    def of_block(memory, turn, x, y):
        first, own = 2 * warps * turn, 2 * warps * turn + 2 * (thread_index() >> 5)
        x, y = within(x), within(y)
        shared_set(memory, own, x)
        shared_set(memory, own + 1, y)
        synchronize()
        x, y = shared_get(memory, first), shared_get(memory, first + 1)
        for warp in range(1, warps):
            x = x + shared_get(memory, first + 2 * warp)
            y = y + shared_get(memory, first + 2 * warp + 1)
        return x, y

    return of_block if warps > 1 else of_lanes


def reciprocal_root(real):
    """``f(x)`` = 1 / sqrt(x), correctly rounded twice."""
    one = real.type(1)

    @device
    def f(x):
        return one / square_root(x)

    return f


def team_threads(lanes):
    """Threads of a block."""
    return BLOCK if lanes <= WARP else lanes


def forward(storage, residual, lanes, groups, group):
    """One row for each team; ``residual`` is its dtype, "" if there is none."""
    real, threads = real_of_storage(storage), team_threads(lanes)
    read_x, read_residual = group_reader(storage, real, group), group_reader(residual or storage, real, group)
    read_weight = group_reader(real.name, real, group)
    write_y, write_sum = (writer(dtype_of(name), real, group, group > 1) for name in (storage, real.name))
    registers, numbers = local_array(groups * group, real), local_array(group, real)
    memory, total, inverse_root = team_memory(real, lanes), team_sums(lanes), reciprocal_root(real)
    zero, single, has_residual, by_block = real.type(0), real.type, residual != "", lanes > WARP
    shift, teams = (lanes - 1).bit_length(), threads // lanes

    def kernel(
        x, weight, residual, y, residual_out, eps, inverse_size, rows, size, x_stride, residual_stride, y_stride,
        sum_stride,
    ):  # fmt: skip
        shared, s, values = memory(), registers(), numbers()
        if by_block:
            row, lane, length = block_index(), thread_index(), size
        else:
            row, lane = block_index() * teams + (thread_index() >> shift), thread_index() & (lanes - 1)
            length = select(row < rows, size, 0)
            row = select(row < rows, row, 0)
        for i in range(groups):
            read_x(values, x, row * x_stride, (i * lanes + lane) * group, length)
            for k in range(group):
                s[i * group + k] = values[k]
        if has_residual:
            for i in range(groups):
                read_residual(values, residual, row * residual_stride, (i * lanes + lane) * group, length)
                for k in range(group):
                    s[i * group + k] = s[i * group + k] + values[k]
        square = zero
        for i in range(groups * group):
            square = square + s[i] * s[i]
        square, _ = total(shared, 0, square, zero)
        scale = inverse_root(square * single(as_real(inverse_size)) + single(as_real(eps)))
        for i in range(groups):
            column = (i * lanes + lane) * group
            if has_residual:
                for k in range(group):
                    values[k] = s[i * group + k]
                write_sum(residual_out, row * sum_stride + column, values, length - column)
            read_weight(values, weight, 0, column, length)
            for k in range(group):
                values[k] = s[i * group + k] * scale * values[k]
            write_y(y, row * y_stride + column, values, length - column)

    return kernel, Shape(threads, max(1, 768 // threads))


def backward(storage, residual, gradient, lanes, groups, group):
    """Every ``partials``-th row for each team, whose sum for dweight is its row of partials.

    ``residual`` and ``gradient`` are the dtypes of the residual and of the gradient of residual_out, "" without. Both
    sums over a row, of s^2 and of g s, are formed at once.
    """
    real, threads = real_of_storage(storage), team_threads(lanes)
    read_x, read_residual = group_reader(storage, real, group), group_reader(residual or storage, real, group)
    read_gradient = group_reader(gradient or storage, real, group)
    read_weight = group_reader(real.name, real, group, constant=False)  # or it would be kept in registers
    write_dx = writer(dtype_of(storage), real, group, group > 1)
    write_dresidual = writer(dtype_of(residual or storage), real, group, group > 1)
    write_partial = writer(real, real, group, group > 1)
    registers, numbers = local_array(groups * group, real), local_array(group, real)
    memory, total, inverse_root = team_memory(real, lanes), team_sums(lanes), reciprocal_root(real)
    zero, single, by_block = real.type(0), real.type, lanes > WARP
    has_residual, has_gradient = residual != "", gradient != ""
    shift, teams, numbers_each = (lanes - 1).bit_length(), threads // lanes, groups * group

    def kernel(
        dy, x, weight, residual, dresidual_out, dx, dresidual, partials, eps, inverse_size, rows, size, all_teams,
        turns, dy_stride, x_stride, residual_stride, gradient_stride, dx_stride, dresidual_stride,
    ):  # fmt: skip
        shared, s, d, dw, values = memory(), registers(), registers(), registers(), numbers()
        if by_block:
            first, lane = block_index(), thread_index()
        else:
            first, lane = block_index() * teams + (thread_index() >> shift), thread_index() & (lanes - 1)
        for i in range(numbers_each):
            dw[i] = zero
        for turn in range(turns):
            row = first + turn * all_teams
            inside = (row < rows) & (first < all_teams)
            length = select(inside, size, 0)
            row = select(inside, row, 0)
            for i in range(groups):
                read_x(values, x, row * x_stride, (i * lanes + lane) * group, length)
                for k in range(group):
                    s[i * group + k] = values[k]
            for i in range(groups):
                read_x(values, dy, row * dy_stride, (i * lanes + lane) * group, length)
                for k in range(group):
                    d[i * group + k] = values[k]
            if has_residual:
                for i in range(groups):
                    read_residual(values, residual, row * residual_stride, (i * lanes + lane) * group, length)
                    for k in range(group):
                        s[i * group + k] = s[i * group + k] + values[k]
            square, dot = zero, zero
            for i in range(groups):
                read_weight(values, weight, 0, (i * lanes + lane) * group, length)
                for k in range(group):
                    square = square + s[i * group + k] * s[i * group + k]
                    dot = dot + d[i * group + k] * values[k] * s[i * group + k]
            square, dot = total(shared, turn & 1, square, dot)
            share = single(as_real(inverse_size))
            scale = inverse_root(square * share + single(as_real(eps)))
            scale = select(inside, scale, zero)  # 0 without a row, even where eps is 0
            mean = dot * scale * share
            for i in range(groups):
                column = (i * lanes + lane) * group
                read_weight(values, weight, 0, column, length)
                for k in range(group):
                    n, g = s[i * group + k] * scale, d[i * group + k] * values[k]
                    dw[i * group + k] = dw[i * group + k] + d[i * group + k] * n
                    d[i * group + k] = scale * (g - n * mean)
                if has_gradient:
                    read_gradient(values, dresidual_out, row * gradient_stride, column, length)
                    for k in range(group):
                        d[i * group + k] = d[i * group + k] + values[k]
                for k in range(group):
                    values[k] = d[i * group + k]
                write_dx(dx, row * dx_stride + column, values, length - column)
                if has_residual:
                    write_dresidual(dresidual, row * dresidual_stride + column, values, length - column)
        for i in range(groups):
            column = (i * lanes + lane) * group
            for k in range(group):
                values[k] = dw[i * group + k]
            write_partial(partials, first * size + column, values, select(first < all_teams, size - column, 0))

    return kernel, Shape(threads, 1)


def forward_wide(storage, residual, group):
    """One row for each block, read twice."""
    real = real_of_storage(storage)
    read_x, read_residual = group_reader(storage, real, group), group_reader(residual or storage, real, group)
    read_weight = group_reader(real.name, real, group)
    write_y, write_sum = (writer(dtype_of(name), real, group, group > 1) for name in (storage, real.name))
    numbers = local_array(group, real)
    memory, total, inverse_root = team_memory(real, WIDE), team_sums(WIDE), reciprocal_root(real)
    zero, single, has_residual, step = real.type(0), real.type, residual != "", WIDE * group

    def kernel(
        x, weight, residual, y, residual_out, eps, inverse_size, rows, size, x_stride, residual_stride, y_stride,
        sum_stride,
    ):  # fmt: skip
        shared, s, values = memory(), numbers(), numbers()
        row = block_index()
        square = zero
        for base in range(0, size, step):
            column = base + thread_index() * group
            read_x(s, x, row * x_stride, column, size)
            if has_residual:
                read_residual(values, residual, row * residual_stride, column, size)
                for k in range(group):
                    s[k] = s[k] + values[k]
            for k in range(group):
                square = square + s[k] * s[k]
        square, _ = total(shared, 0, square, zero)
        scale = inverse_root(square * single(as_real(inverse_size)) + single(as_real(eps)))
        for base in range(0, size, step):
            column = base + thread_index() * group
            read_x(s, x, row * x_stride, column, size)
            if has_residual:
                read_residual(values, residual, row * residual_stride, column, size)
                for k in range(group):
                    s[k] = s[k] + values[k]
                write_sum(residual_out, row * sum_stride + column, s, size - column)
            read_weight(values, weight, 0, column, size)
            for k in range(group):
                values[k] = s[k] * scale * values[k]
            write_y(y, row * y_stride + column, values, size - column)

    return kernel, Shape(WIDE, 2)


def backward_wide(storage, residual, gradient, group):
    """As ``backward``, rows read twice; the block adds to its row of partials, which only it uses, in memory."""
    real = real_of_storage(storage)
    read_x, read_residual = group_reader(storage, real, group), group_reader(residual or storage, real, group)
    read_gradient, read_weight = group_reader(gradient or storage, real, group), group_reader(real.name, real, group)
    write_dx = writer(dtype_of(storage), real, group, group > 1)
    write_dresidual = writer(dtype_of(residual or storage), real, group, group > 1)
    write_partial = writer(real, real, group, group > 1)
    read_partial = reader(real, real, group, group > 1, constant=False)
    numbers = local_array(group, real)
    memory, total, inverse_root = team_memory(real, WIDE), team_sums(WIDE), reciprocal_root(real)
    zero, single, step = real.type(0), real.type, WIDE * group
    has_residual, has_gradient = residual != "", gradient != ""

    def kernel(
        dy, x, weight, residual, dresidual_out, dx, dresidual, partials, eps, inverse_size, rows, size, all_teams,
        turns, dy_stride, x_stride, residual_stride, gradient_stride, dx_stride, dresidual_stride,
    ):  # fmt: skip
        shared, s, d, dw, values = memory(), numbers(), numbers(), numbers(), numbers()
        first = block_index()
        for turn in range(turns):
            row = first + turn * all_teams
            length = size if row < rows else 0
            square, dot = zero, zero
            for base in range(0, length, step):
                column = base + thread_index() * group
                read_x(s, x, row * x_stride, column, length)
                read_x(d, dy, row * dy_stride, column, length)
                if has_residual:
                    read_residual(values, residual, row * residual_stride, column, length)
                    for k in range(group):
                        s[k] = s[k] + values[k]
                read_weight(values, weight, 0, column, length)
                for k in range(group):
                    square = square + s[k] * s[k]
                    dot = dot + d[k] * values[k] * s[k]
            square, dot = total(shared, turn & 1, square, dot)
            share = single(as_real(inverse_size))
            scale = inverse_root(square * share + single(as_real(eps)))
            mean = dot * scale * share
            for base in range(0, length, step):
                column = base + thread_index() * group
                read_x(s, x, row * x_stride, column, length)
                read_x(d, dy, row * dy_stride, column, length)
                if has_residual:
                    read_residual(values, residual, row * residual_stride, column, length)
                    for k in range(group):
                        s[k] = s[k] + values[k]
                read_partial(dw, partials, first * size + column, select(column < length, turn * group, 0))
                read_weight(values, weight, 0, column, length)
                for k in range(group):
                    n, g = s[k] * scale, d[k] * values[k]
                    dw[k] = dw[k] + d[k] * n
                    d[k] = scale * (g - n * mean)
                write_partial(partials, first * size + column, dw, length - column)
                if has_gradient:
                    read_gradient(values, dresidual_out, row * gradient_stride, column, length)
                    for k in range(group):
                        d[k] = d[k] + values[k]
                write_dx(dx, row * dx_stride + column, d, length - column)
                if has_residual:
                    write_dresidual(dresidual, row * dresidual_stride + column, d, length - column)

    return kernel, Shape(WIDE, 1)


def shipped():
    """The kernels that CI compiles: every dtype and option once."""
    forwards = [
        ("float32", "", 160, 4, 4), ("float32", "float16", 16, 4, 4), ("float32", "float32", 4, 8, 1),
        ("float16", "", 512, 2, 8), ("bfloat16", "float32", 160, 2, 8), ("float64", "float64", 32, 2, 2),
    ]  # fmt: skip
    backwards = [
        ("float32", "", "", 160, 4, 4), ("float32", "bfloat16", "float16", 384, 4, 4), ("float16", "", "", 96, 8, 1),
        ("bfloat16", "float32", "float32", 160, 2, 8), ("float64", "float64", "", 384, 2, 2),
    ]  # fmt: skip
    wide = [("float32", "", 4), ("bfloat16", "float32", 8)]
    return [
        *(Kernel("rms_norm", "forward", key) for key in forwards),
        *(Kernel("rms_norm", "backward", key) for key in backwards),
        *(Kernel("rms_norm", "forward_wide", key) for key in wide),
        *(Kernel("rms_norm", "backward_wide", (key[0], key[1], key[1], key[2])) for key in wide),
    ]
