"""The selective scan, backward: as the forward, but walked from the last tile to the first.

A *tile* is what lies between two checkpoints, 16 steps, four quads. The kernel walks the tiles from the last to the
first, and in each it

- reads the tile's u, delta, dy and z, and B and C (``read_tile``);
- prepares them in shared memory (``prepare_tile``);
- sweeps from the tile's checkpoint to its last quad, and keeps the state at the start of each (``sweep``);
- walks the quads from the last to the first, each ``forward_quad`` once more for its states and decays, and
  ``backward_quad`` for g, the gradient of the state, and everything that is a product with it;
- leaves the sums over states of each quad where the inputs were (``settle``);
- writes the sums over channels, dB and dC (``write_matrices``), and du, ddelta and dz (``write_tile``).

A lane has the same states of ``rows`` channels, so what it reads of B and C serves all of them, and what it adds to dB
and dC is summed over them before lanes exchange anything.

Sums over states, for du, ddelta and dz, go across the lanes of a channel. Sums over channels, dB and dC, go across the
channels of a warp, then over the warps of the block, and are written once for each block and step; ``sum_matrices``
adds up the blocks.

Of two lanes that exchange sums each sends what the other one keeps, and to pick that takes as long as to add it up. So
the lanes of the second half of a warp have their states *turned*: the second half of them comes first. Then all lanes
keep their first half and send the rest. They read B and C from copies that are turned as well.
"""

from typing import Any, NamedTuple

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._math import number_functions
from sscan.cuda._primitives import (
    SharedMemory,
    anew,
    block_index,
    dtype_of,
    local_array,
    quotient,
    reader,
    real_of,
    select,
    shared_get,
    shared_reader,
    shared_set,
    synchronize,
    thread_index,
    writer,
)
from sscan.cuda._target import device
from sscan.cuda._unroll import unroll
from sscan.cuda.kernels._backward import (
    QUAD_SIZE,
    QUADS,
    STEP_SIZE,
    TILE,
    Addresses,
    Cut,
    Waves,
    block_carriers,
    channel_totals,
    lane_arrays,
    lane_places,
    matrix_sums_writer,
    part_beginner,
    part_ender,
    quads_walker,
    shared_arrays,
    state_sweep,
    states_reader,
    tile_preparer,
    tile_reader,
    tile_writer,
)
from sscan.cuda.kernels._matrices import Matrices, matrix_tile, matrix_tiles
from sscan.cuda.kernels._scan import (
    BLOCK,
    LANES,
    Sizes,
    Variant,
    places,
    quads_of_tile,
    rates_of_states,
    reals_of_channels,
    sequence_markers,
    step_sizes,
)
from sscan.cuda.kernels._waves import QUAD, wave_tile
from sscan.cuda.kernels.selective_scan import SHIPPED


def backward(rows, warps, blocks, *key):
    """Gradients, with ``rows`` channels in each lane and ``warps`` warps in a block.

    Grid: blocks of ``rows * warps * 8`` channels, parts, segments. Two barriers a tile and block of states. Reads u,
    delta, z and dy once, checkpoints once; writes du, ddelta and dz once, and one number of dB and dC for every block
    of channels, step and state.
    """
    cut = Cut(Variant(*key), rows, warps)
    v, many, spread, matrix_count, varying = cut.v, cut.v.many, cut.v.spread, cut.v.matrices, cut.v.matrices > 0
    mark_sequences, states_apart, number_size = sequence_markers(v, TILE), LANES * v.states, v.dtype.itemsize
    waves = wave_tile(v, dtype_of(v.storage), v.real, cut.threads, cut.channels, TILE, TILE, swizzled=True)
    stored, address, first_of = waves.stored, waves.address, waves.start
    place_of, (lane_at, row_at) = places(cut.channels), lane_places(cut, waves)
    make_shared, make_own = shared_arrays(cut), lane_arrays(cut)
    quads_at, parameters_of = quads_of_tile(v, waves)
    sizes_of_matrices = TILE, cut.threads, STEP_SIZE, QUAD_SIZE, v.states // 2
    make_matrices, matrix_address, start_matrices, read_matrices, stage_matrices = matrix_tiles(
        v, v.varying_B, v.varying_C, False, *sizes_of_matrices
    )
    begin_part, end_part = part_beginner(cut, row_at), part_ender(cut, row_at)
    begin_block, end_block = block_carriers(cut, row_at)
    read_tile, prepare_tile, write_tile = tile_reader(v, waves), tile_preparer(v, waves), tile_writer(v, waves)
    (begin_totals, begin_tile, add_totals), read_states = channel_totals(cut, row_at), states_reader(cut, row_at)
    sweep, walk_quads, write_matrices = state_sweep(cut), quads_walker(cut), matrix_sums_writer(cut)

    @device
    def firsts_of(quads, strides):
        return Waves(
            first_of(quads.channel, quads.step, strides.dy), first_of(quads.channel, quads.step, strides.u),
            first_of(quads.channel, quads.step, strides.delta), first_of(quads.channel, quads.step, strides.z),
        )  # fmt: skip

    def kernel(
        dy, u, delta, A, B, C, D, z, delta_bias, delta_softplus, checkpoints, dlast_state, du, ddelta, dz,
        matrix_sums, A_sums, B_sums, C_sums, D_sums, bias_sums, dinitial_state, carried, part_starts, part_sums,
        seq_idx, cu_seqlens, dim, state, length, channel_blocks, blocks_of_group, channels_of_group, parts, part_length,
        sequences, state_blocks, dy_batch, u_batch, delta_batch, z_batch, dy_stride, u_stride, delta_stride, z_stride,
        results_stride, B_batch, B_group, B_stride, C_batch, C_group, C_stride,
    ):  # fmt: skip
        if not spread:
            dy_stride, u_stride, delta_stride, z_stride, results_stride = length, length, length, length, length
        place = place_of(
            channel_blocks, blocks_of_group, channels_of_group, parts, parts, part_length, length, sequences, cu_seqlens
        )
        sizes = Sizes(dim, state, state_blocks, states_apart * state_blocks if many else states_apart)
        checkpoints += number_size * (place.checkpoint * dim + place.channel) * sizes.padded
        memory = Addresses(
            A, B, C, checkpoints, dlast_state, part_starts, part_sums, carried, A_sums, B_sums, C_sums, D_sums,
            bias_sums, dinitial_state,
        )  # fmt: skip
        # where the block's share of each array begins: the same for all threads, who add what is theirs tile by tile
        strides, matrix_strides = Waves(dy_stride, u_stride, delta_stride, z_stride), Matrices(B_stride, C_stride)
        arrays = Waves(
            address(dy, dy_batch, dy_stride, place), address(u, u_batch, u_stride, place),
            address(delta, delta_batch, delta_stride, place), address(z, z_batch, z_stride, place),
        )  # fmt: skip
        matrices = matrix_address(B, C, Matrices(B_batch, C_batch), Matrices(B_group, C_group), matrix_strides, place)
        results = address(0, dim * length, results_stride, place)
        if varying:
            first = (place.row * channel_blocks + place.block) * length + place.begin
            matrix_sums += number_size * first * matrix_count * sizes.padded

        thread = thread_index()
        lane = lane_at(thread, place)
        tile, totals, sums_before, staged, starts = make_shared()
        own, quad, of_tile = make_own()
        held, held_matrices = Waves(stored(), stored(), stored(), stored()), make_matrices()
        begin_totals(tile, totals, lane, place, sizes, D)
        begin_part(own, lane, place, sizes, memory)

        tiles = (place.steps + TILE - 1) >> 4
        for back in range(tiles):
            t = (tiles - 1 - back) * TILE
            now = anew(thread)  # made of this, what a tile needs once does not take registers in between
            quads = quads_at(now, place)
            matrices_here = start_matrices(matrices, matrix_strides, now)
            firsts = firsts_of(quads, strides)
            read_tile(held, arrays, firsts, strides, quads, place, t)
            bias = parameters_of(delta_bias, quads, place)
            if not many:
                read_matrices(held_matrices, matrices_here, matrix_strides, 0, state, t, place.steps - t, thread)
                read_states(own, lane_at(now, place), lane.turned, place, sizes, memory, t)
            prepare_tile(tile, held, arrays, firsts, strides, quads, place, t, bias, delta_softplus)
            mark_sequences(tile.keep, seq_idx, place, length, t, thread)
            begin_tile(of_tile)

            for block in range(state_blocks if many else 1):
                n0 = block * states_apart
                if many:
                    read_matrices(held_matrices, matrices_here, matrix_strides, n0, state, t, place.steps - t, thread)
                stage_matrices(staged, held_matrices, matrices_here, matrix_strides, n0, thread)
                if many:
                    begin_block(own, block, lane, place, sizes, memory, t)
                synchronize()
                sweep(own, starts, tile, staged, lane)
                walk_quads(own, quad, starts, tile, staged, sums_before, of_tile, lane, block, state_blocks)
                if many:
                    end_block(own, block, lane, place, sizes, memory)
                synchronize()
                if varying:
                    write_matrices(matrix_sums, starts, anew(thread), t, place.steps, block, sizes)
                if many and block < state_blocks - 1:
                    synchronize()

            now = anew(thread)
            add_totals(totals, of_tile, now)
            quads = quads_at(now, place)
            write_tile(tile, du + results, ddelta + results, dz + results, results_stride, quads, place, t)

        end_part(own, totals, lane_at(anew(thread), place), place, sizes, memory)

    return kernel, Shape(cut.threads, blocks)


class OfStarts(NamedTuple):
    """One thing for each array along time that ``starts`` reads."""

    dy: Any
    delta: Any
    z: Any


def starts(warps, *key):
    """The gradient that a part hands on to the one before it when it gets none from the one after it.

    And the sum of its step sizes, infinite if a sequence starts in it. Of the last ``launched_parts``: all, or all but
    the first. Reads delta, dy and z once.
    """
    cut = Cut(Variant(*key), 1, warps)
    v, many, spread, varying_C = cut.v, cut.v.many, cut.v.spread, cut.v.varying_C
    states, states_apart, none, zero = v.states, LANES * v.states, v.dtype.type(0), v.real.type(0)
    waves = wave_tile(v, dtype_of(v.storage), v.real, cut.threads, cut.channels, TILE, TILE, swizzled=True)
    stored, address, first_of, (lane_at, row_at) = waves.stored, waves.address, waves.start, lane_places(cut, waves)
    place_of, (quads_at, parameters_of) = places(cut.channels, without_first=True), quads_of_tile(v, waves)
    numbers, write_together = local_array(states, v.dtype), writer(v.real, v.dtype, states, True)
    read_own, walk_back, prepare = parameters_of_starts(v), back_walker(v), dy_preparer(v, waves)
    mark_sequences, (_, write_real) = sequence_markers(v, TILE), reals_of_channels(v.real)
    memory = SharedMemory()
    steps_array, dy_array = (memory.array(cut.channels * TILE, v.real) for _ in range(2))
    keep_array, C_array = memory.array(TILE, v.real), memory.array(QUADS * QUAD_SIZE, v.dtype)
    C_part, address_C, start_C, read_C, stage_C = matrix_tile(
        v, dtype_of(v.C or v.storage), True, False, TILE, cut.threads, STEP_SIZE, QUAD_SIZE
    )

    def kernel(
        dy, delta, A, C, z, delta_bias, delta_softplus, part_starts, part_sums, seq_idx, cu_seqlens, dim, state, length,
        channel_blocks, blocks_of_group, channels_of_group, parts, launched_parts, part_length, sequences, state_blocks,
        dy_batch, delta_batch, z_batch, dy_stride, delta_stride, z_stride, C_batch, C_group, C_stride,
    ):  # fmt: skip
        if not spread:
            dy_stride, delta_stride, z_stride = length, length, length
        place = place_of(
            channel_blocks, blocks_of_group, channels_of_group, parts, launched_parts, part_length, length, sequences,
            cu_seqlens,
        )  # fmt: skip
        sizes = Sizes(dim, state, state_blocks, states_apart * state_blocks if many else states_apart)
        thread = thread_index()
        lane, quads = lane_at(thread, place), quads_at(thread, place)
        strides = OfStarts(dy_stride, delta_stride, z_stride)
        arrays = OfStarts(
            address(dy, dy_batch, dy_stride, place), address(delta, delta_batch, delta_stride, place),
            address(z, z_batch, z_stride, place),
        )  # fmt: skip
        firsts = OfStarts(
            first_of(quads.channel, quads.step, dy_stride), first_of(quads.channel, quads.step, delta_stride),
            first_of(quads.channel, quads.step, z_stride),
        )  # fmt: skip
        if varying_C:
            C = start_C(
                address_C(C, place.row * C_batch + place.group * C_group, place.begin, C_stride), C_stride, thread
            )
        bias, held = parameters_of(delta_bias, quads, place), OfStarts(stored(), stored(), stored())
        steps_tile, dy_tile, keep, C_tile, C_held = steps_array(), dy_array(), keep_array(), C_array(), C_part()
        g, rate, c = numbers(), numbers(), numbers()
        tiles = (place.steps + TILE - 1) >> 4
        for block in range(state_blocks if many else 1):
            row = row_at(lane, 0, block, place, sizes)
            read_own(rate, c, A, C, row)
            for j in range(states):
                g[j] = none
            total = zero
            for back in range(tiles):
                t = (tiles - 1 - back) * TILE
                prepare(steps_tile, dy_tile, held, arrays, firsts, strides, quads, place, t, bias, delta_softplus)
                mark_sequences(keep, seq_idx, place, length, t, thread)
                if varying_C:
                    read_C(C_held, C, block * states_apart, C_stride, state, t, place.steps - t, thread)
                    stage_C(C_tile, C_held, C, block * states_apart, C_stride, thread)
                synchronize()
                total = total + walk_back(g, rate, c, steps_tile, dy_tile, keep, C_tile, lane)
                synchronize()
            at = place.number * dim + row.channel
            write_together(part_starts, at * sizes.padded + row.n, g, row.alive)
            write_real(part_sums, at, total, select(lane.lane == 0, row.alive, 0 * thread))

    return kernel, Shape(cut.threads, 16 // warps)


def dy_preparer(v, waves):
    """``prepare``: read step sizes and dy of a tile, of which a thread has one quad, and put them to shared memory."""
    f, gated, heavy, of_steps = number_functions(v.dtype), v.gated, v.number != "float32", local_array(QUAD, v.real)
    known, read, at, widen, put = waves.known, waves.read, waves.at, waves.widen, waves.put
    sigmoid, sized = f.sigmoid, step_sizes(v, waves, heavy)

    @device
    def prepare(steps_tile, dy_tile, held, arrays, first, strides, quads, place, t, bias, delta_softplus):
        d, e, z, ahead, before = of_steps(), of_steps(), of_steps(), place.steps - t - quads.step, t + quads.step
        valid = known(0, quads.channel, place.channel_end, ahead)
        read(held.delta, 0, arrays.delta, at(first.delta, 0, t, strides.delta), valid, before)
        read(held.dy, 0, arrays.dy, at(first.dy, 0, t, strides.dy), valid, before)
        if gated:
            read(held.z, 0, arrays.z, at(first.z, 0, t, strides.z), valid, before)
        widen(d, held.delta, 0, arrays.delta, first.delta, strides.delta)
        widen(e, held.dy, 0, arrays.dy, first.dy, strides.dy)
        if gated:
            widen(z, held.z, 0, arrays.z, first.z, strides.z)
        sized(d, bias, 0, ahead, delta_softplus)
        if gated:
            for i in unroll(QUAD, heavy):
                e[i] = e[i] * (z[i] * sigmoid(z[i]))
        put(steps_tile, quads.slot, 0, d)
        put(dy_tile, quads.slot, 0, e)

    return prepare


def parameters_of_starts(v):
    """``read_own``: A as ``decay`` takes it, and C if it is constant, of a lane's states."""
    f, states, varying_C, numbers = number_functions(v.dtype), v.states, v.varying_C, local_array(v.states, v.dtype)
    times, conj, shares = f.times, f.conj, f.shares
    read_numbers, read_rates = reader(v.real, v.dtype, states), rates_of_states(v.dtype, states, False)

    @device
    def read_own(rate, c, A, C, row):
        read_rates(rate, numbers(), A, row.at, row.valid)
        if not varying_C:
            read_numbers(c, C, row.at, row.valid)
            for j in range(states):
                c[j] = times(conj(c[j]), shares)

    return read_own


def back_walker(v):
    """``walk_back``: g = conj(a) (C dy + g) from a tile's last step to its first. Gives the sum of step sizes."""
    states, resets, varying_C, heavy = v.states, v.resets, v.varying_C, v.number != "float32"
    f, of_steps, infinite = number_functions(v.dtype), local_array(QUAD, v.real), v.real.type(np.inf)
    product, times, conj, decay, zero, one = f.product, f.times, f.conj, f.decay, f.zero, f.one
    load_quad, load_numbers = shared_reader(v.real, QUAD), shared_reader(v.dtype, states)

    @device
    def walk_back(g, rate, c, steps_tile, dy_tile, keep_tile, C_tile, lane):
        d, e, keep, total = of_steps(), of_steps(), of_steps(), zero
        for back in unroll(QUADS, not heavy):
            q = QUADS - 1 - back
            at = lane.row * TILE + ((q ^ lane.order) << 2)
            load_quad(d, steps_tile, at)
            load_quad(e, dy_tile, at)
            if resets:
                load_quad(keep, keep_tile, q * QUAD)
            for i_ in unroll(QUAD, heavy):
                i = QUAD - 1 - i_
                if varying_C:
                    load_numbers(c, C_tile, q * QUAD_SIZE + i * STEP_SIZE + lane.lane * states)
                for j in range(states):
                    a = decay(d[i], rate[j])
                    if resets:
                        a = times(a, keep[i])
                    g[j] = product(conj(a), times(c[j], e[i]) + g[j])
                total = total + d[i]
                if resets:
                    total = select(keep[i] < one, infinite, total)  # a sequence starts
        return total

    return walk_back


def sum_matrices(storage, number, of_C):
    """dB and dC, or one of them: sums over blocks of channels, turned from [step][state] to [state][step].

    Grid: tiles of 32 steps, blocks of 16 states, groups, batch rows, matrices. Reads every partial sum once. What is
    called dC was staged as 2 conj(C) if it is complex; ``of_C``: the first matrix is.
    """
    storage, number = dtype_of(storage), dtype_of(number)
    f, real, steps_of_block, threads = number_functions(number), real_of(number), 32, 128
    times, conj, shares, none = f.times, f.conj, f.shares, number.type(0)
    four_numbers = local_array(4, number)
    read_four, write_four = reader(real, number, 4, True), writer(storage, number, 4)
    row = steps_of_block + 1
    number_tile = SharedMemory().array(BLOCK * row, number)

    def kernel(
        sums, gradient, second, stride, padded, length, state, blocks, channel_blocks, groups, tiles, state_blocks,
        first_of_second,
    ):  # fmt: skip
        """``sums`` (batch, channel_blocks, length, stride), of which each matrix has ``padded``."""
        index, offset, turned = block_index(), 0, of_C
        if index >= first_of_second:
            index, offset, turned, gradient = index - first_of_second, padded, True, second
        rest = quotient(index, tiles)
        tile, group = index - rest * tiles, quotient(rest, state_blocks)
        block, batch = rest - group * state_blocks, quotient(group, groups)
        group = group - batch * groups
        thread, t0, n0 = thread_index(), tile * steps_of_block, block * BLOCK
        t, n = t0 + (thread >> 2), n0 + (thread & 3) * 4
        x, total, shared = four_numbers(), four_numbers(), number_tile()
        known = select((t < length) & (n < padded), 4, 0 * thread)
        for k in range(4):
            total[k] = none
        at = ((batch * channel_blocks + group * blocks) * length + t) * stride + offset + n
        for block in range(blocks):
            read_four(x, sums, at + block * length * stride, known)
            for k in range(4):
                total[k] = total[k] + x[k]
        for k in range(4):
            shared_set(shared, ((thread & 3) * 4 + k) * row + (thread >> 2), total[k])
        synchronize()
        n, t = thread >> 3, (thread & 7) * 4
        for k in range(4):
            x[k] = shared_get(shared, n * row + t + k)
            if turned:
                x[k] = times(conj(x[k]), shares)
        at = ((batch * groups + group) * state + n0 + n) * length + t0 + t
        write_four(gradient, at, x, select(n0 + n < state, length - t0 - t, 0 * thread))

    return kernel, Shape(threads, 8)


def shipped():
    """Kernels that stand for all, with the shapes that ``backward_shape`` gives them.

    Variants of the forward, but of what takes a quarter of a minute or more to compile only one of a kind.
    """
    shapes = {"complex64": (1, 4, 3), "float64": (1, 2, 4), "complex128": (1, 2, 3)}
    heaviest = Variant(
        "float64", "float64", "float64", "float64", True, True, "rows", True, "rows", True, 2, True, True
    )  # fmt: skip
    variants = (*SHIPPED[:3], *SHIPPED[4:7], SHIPPED[11], SHIPPED[10], *SHIPPED[12:], heaviest)
    cut = (SHIPPED[0], SHIPPED[3], SHIPPED[6], SHIPPED[7], SHIPPED[10], SHIPPED[13])
    matrices = (("float32", "float32", False), ("bfloat16", "complex64", True), ("float64", "complex128", False))
    # for few blocks, for time in parts, and for groups of few channels
    shaped = [(*shape, *SHIPPED[0]) for shape in ((1, 4, 4), (2, 2, 6), (1, 1, 16), (1, 2, 8))]
    shaped += [(*shapes.get(v.number, (1, 4, 3) if v.many or v.zoh else (2, 4, 3)), *v) for v in variants]
    return [
        *(Kernel("selective_scan_backward", "backward", key) for key in reversed(shaped)),
        *(Kernel("selective_scan_backward", "starts", (2 if v.storage == "float64" else 4, *v)) for v in cut),
        *(Kernel("selective_scan_backward", "sum_matrices", key) for key in matrices),
    ]
