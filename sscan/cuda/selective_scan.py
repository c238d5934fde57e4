"""The selective scan on the GPU: which kernels, how many blocks, and the split along time if channels are few."""

import math
from typing import Any, NamedTuple

import numpy as np

from sscan.cuda import _launch, _prefix, _sums, _workspace
from sscan.cuda._launch import Kernel

LANES, CHECKPOINT, TILE = 4, 16, 32  # as in kernels/selective_scan.py
RESIDENT, RESIDENT_BACKWARD = 20, 16  # warps that a multiprocessor runs at once, of float32
# Steps of a scan that take as long as to walk past a part, for the state that a later one starts from.
WALKED, WALKED_BACKWARD = 4, 1
FEW, WAVES = 16, 3  # packed sequences, so few that they may leave a GPU half empty; and then how often it is filled
WARP_CHANNELS = 8
ROWS = 2  # channels of a lane in the backward kernel, of float32, if that leaves enough blocks


class Geometry(NamedTuple):
    """How a problem is laid out in blocks of so many warps."""

    dim: int
    state: int
    length: int
    channel_blocks: int
    blocks_of_group: int
    channels_of_group: int
    states: int  # of a lane
    state_blocks: int
    parts: int
    part_length: int
    warps: int

    @property
    def dims(self):
        """The first six, which kernels take in this order."""
        return self[:6]

    @property
    def padded(self):
        """States of a channel, as checkpoints and ends have them."""
        return self.states * LANES * self.state_blocks


def geometry(segments, groups, A):
    """The layout of the forward kernels."""
    dim, state = A.shape
    channels_of_group = dim // groups
    warps = warps_of(channels_of_group)
    blocks_of_group = -(-channels_of_group // (warps * WARP_CHANNELS))
    states, block_states = states_of_lane(state, A.dtype)
    parts, part_length = parts_of(segments, groups * blocks_of_group, RESIDENT // warps, WALKED)
    return Geometry(
        dim, state, segments.length, groups * blocks_of_group, blocks_of_group, channels_of_group, states,
        -(-state // block_states), parts, part_length, warps,
    )  # fmt: skip


def warps_of(channels_of_group):
    """Warps of a block, which has channels of one group only."""
    return 1 if channels_of_group <= WARP_CHANNELS else 2 if channels_of_group <= 2 * WARP_CHANNELS else 4


def parts_of(segments, channel_blocks, resident, walked):
    """Into how many parts segments are cut along time, and the steps of a part.

    Cutting costs every exponential of the recurrence once more, so a GPU that is half full is left alone. Otherwise as
    many parts are made as blocks are ``resident`` on all multiprocessors at once, but no more than what the last one
    has to walk past is worth.

    A few packed sequences are cut as one row would be, since any of them may be nearly all of it; if they would fill
    the GPU, were they equal, into smaller parts, among which the GPU goes on to the next when it is through with one.
    Parts are then numbered through all sequences, see ``kernels._segments.part_of``, and this is how many numbers there
    may be.
    """
    packed, length, fill = segments.cu_seqlens is not None, segments.length, resident * _launch.processors()
    blocks, parts = (1 if packed else segments.count) * channel_blocks, 1
    if 0 < 2 * blocks <= fill:
        parts = max(1, min(fill // blocks, length // TILE, math.isqrt(length // walked)))
    part_length = rounded_up(length, parts)
    if not packed:
        return max(1, -(-length // max(1, part_length))), part_length
    if 2 * segments.count * channel_blocks > fill:
        if segments.count > FEW:
            return 1, part_length
        part_length = rounded_up(length, max(1, WAVES * fill // blocks))
    return (1 if part_length >= length else length // part_length + segments.count), part_length


def rounded_up(length, parts):
    """Steps of a part, in whole tiles."""
    return -(-length // (parts * TILE)) * TILE


def launched(segments, parts):
    """What is launched for each of the ``parts``: all segments, unless parts are numbered through all of them."""
    return 1 if segments.cu_seqlens is not None and parts > 1 else segments.count


def states_of_lane(state, number):
    """States of a lane, 16 bytes at most, and of the four lanes of a channel."""
    states = min(16 // np.dtype(number).itemsize, 1 if state <= LANES else 2 if state <= 2 * LANES else 4)
    return states, LANES * states


def checkpoints_shape(batch, dim, length, state, groups, number, seq_idx, sequences, segments=None):
    """The shape of checkpoints, the states at the start of every 16th step of every segment.

    Sizes may be symbols. ``sequences`` is how many ``cu_seqlens`` packs, or None; groups, ``seq_idx`` and ``segments``
    matter on the CPU only.
    """
    if sequences is None:
        chunks = batch * -(-length // CHECKPOINT)
    else:
        chunks = length // CHECKPOINT + sequences
    block_states = states_of_lane(state, number)[1]
    return chunks, dim, -(-state // block_states) * block_states


def in_columns(array):
    """Whether an array along time is taken as it is because channels (of B and C: states) are neighbours in memory."""
    return array.strides[-2] == array.itemsize != array.strides[-1] and min(array.shape[-2:]) > 1


def in_order(array, columns):
    """An array along time in rows or columns: itself, if it is, or a copy."""
    size = 0 if array is None or array.ndim == 2 else array.itemsize
    if not size or array.strides[-2 if columns else -1] == size or array.shape[-2 if columns else -1] < 2:
        return array
    return array.swapaxes(-1, -2).copy().swapaxes(-1, -2) if columns else array.copy()


def as_reals(matrix, of_A):
    """Varying B or C of a complex scan as its interleaved parts; every other one as it is."""
    if matrix.ndim == 2 or of_A.kind != "c":
        return matrix
    real = np.dtype(f"f{of_A.itemsize // 2}")
    if matrix.dtype.kind == "c":
        return matrix.view(real)
    odd = any(step % (2 * matrix.itemsize) for step in matrix.strides[:-1])
    return matrix.copy() if odd else matrix


def matrix_strides(matrix, groups, columns):
    """Strides of batch row, group and state (in columns: step), in stored reals."""
    if matrix.ndim == 2:
        return 0, 0, 0
    batch, group, state, time = (step // matrix.itemsize for step in matrix.strides)
    return batch, group if matrix.shape[1] == groups else 0, time if columns else state


class Plan(NamedTuple):
    """What the metadata of a call decide."""

    layout: Geometry
    orders: tuple[bool, bool] | None  # whether waves and matrices lie in columns; None: all is as the kernels take it
    variant: tuple
    strides: tuple[int, ...]  # of B and C
    batches: tuple[int, ...]  # reals from one batch row to the next, of the arrays along time
    apart: tuple[int, ...]  # reals from one channel, in columns step, to the next


def planned(segments, groups, inputs, along):
    """The plan, made from shapes, strides, dtypes and addresses."""
    A, B, C = inputs.A, inputs.B, inputs.C
    varying = [x for x in (B, C) if x.ndim == 4]
    orders = in_columns(inputs.u), A.dtype.kind != "c" and any(map(in_columns, varying))
    given = [*along, B, C]
    *along, B, C = laid_out(orders, A, along, (B, C))
    layout = geometry(segments, groups, A)
    columns, matrix_columns = orders
    axis = 2 if columns else 1
    batches, apart = (tuple(0 if x is None else x.strides[i] // x.itemsize for x in along) for i in (0, axis))
    order = "columns" if columns else "rows"
    waves = [(x, stride) for x, stride in zip(along, apart, strict=True) if x is not None]
    if not columns and any(x.shape[1] > 1 and stride != x.shape[2] for x, stride in waves):
        order = "spread"
    variant = (
        inputs.u.dtype.name, A.dtype.name, B.dtype.name if B.ndim == 4 else "", C.dtype.name if C.ndim == 4 else "",
        inputs.zoh, inputs.z is not None, order, *vectors(segments, orders, layout, A, along, (B, C)), layout.states,
        layout.state_blocks > 1, segments.seq_idx is not None,
    )  # fmt: skip
    copies = any(x is not y for x, y in zip(given, (*along, B, C), strict=True))
    strides = (*matrix_strides(B, groups, matrix_columns), *matrix_strides(C, groups, matrix_columns))
    return Plan(layout, orders if copies else None, variant, strides, batches, apart)


def laid_out(orders, A, waves, matrices):
    """The arrays as the kernels take them: themselves or copies."""
    columns, matrix_columns = orders
    yield from (in_order(x, columns) for x in waves)
    yield from (in_order(as_reals(x, A.dtype), matrix_columns) for x in matrices)


def vectors(segments, orders, layout, A, waves, matrices):
    """Whether four neighbours of a wave can be read by one instruction, and the order and the same of B and C."""
    columns, matrix_columns = orders
    rows_together = segments.cu_seqlens is None  # which may begin anywhere
    of_waves = layout.channels_of_group % 4 == 0 if columns else rows_together
    of_matrices = layout.state % 4 == 0 if matrix_columns else rows_together
    return (
        of_waves and together(columns, 4, waves), "columns" if matrix_columns else "rows",
        of_matrices and together(matrix_columns, 8 if A.dtype.kind == "c" else 4, [x for x in matrices if x.ndim == 4]),
    )  # fmt: skip


def together(columns, count, arrays):
    """Whether groups of ``count`` neighbours start at whole groups."""
    return _launch.aligned(count, *(x.swapaxes(-1, -2) if columns and x is not None else x for x in arrays))


_plans: dict[Any, Any] = {}


def plan_of(segments, groups, inputs, along, make=planned):
    """The plan of a call with the arrays ``along`` time: made once for a signature and an alignment."""
    addresses, address = 0, _launch.address
    for x in (*along, inputs.B, inputs.C):
        if x is not None:
            addresses |= address(x)
    key = make, inputs.signature, addresses % 16
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) > 4096:
            _plans.clear()
        plan = _plans[key] = make(segments, groups, inputs, along)
    return plan


class ForwardPlan(NamedTuple):
    """How a forward call is launched."""

    orders: tuple[bool, bool] | None  # as in Plan
    parts: int
    ends: Kernel
    forward: Kernel
    blocks: int  # for each part
    workspaces: _workspace.Layout  # states between tiles; ends and sums of parts
    dims: tuple[int, ...]  # kernels take these, the number of parts that they scan, and ``rest``
    rest: tuple[int, ...]


def planned_forward(segments, groups, inputs, along):
    """The plan of a forward call, with u, delta, z and y along time."""
    plan = planned(segments, groups, inputs.by_group(), along)
    layout = plan.layout
    strides, kernel = (*plan.batches, *plan.apart, *plan.strides), (layout.warps, *plan.variant)
    count, A = launched(segments, layout.parts), inputs.A
    channels = count * layout.parts * layout.dim
    states, split, carried = channels * layout.padded * A.itemsize, layout.parts > 1, layout.state_blocks > 1
    workspaces = _workspace.layout(carried * states, split * states, split * channels * A.real.itemsize)
    return ForwardPlan(
        plan.orders, layout.parts, Kernel("selective_scan", "ends", kernel),
        Kernel("selective_scan", "forward", kernel), count * layout.channel_blocks,
        workspaces, (*layout.dims, layout.parts), (layout.part_length, segments.count, layout.state_blocks, *strides),
    )  # fmt: skip


def selective_scan_forward(segments, groups, inputs, initial_state, y, last_state, checkpoints, known_parts):
    """Fill y, last_state and checkpoints (unless None).

    ``inputs`` has the attributes u, delta, A, B, C, D, z, delta_bias, delta_softplus, zoh and signature; B and C
    come in any of their shapes: only their addresses matter here. ``known_parts`` are the sums and ends of parts, if
    there was a summary.
    """
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, _, _ = inputs
    plan = plan_of(segments, groups, inputs, (u, delta, z, y), planned_forward)
    if plan.orders is not None:
        u, delta, z, B, C = laid_out(plan.orders, A, (u, delta, z), (B, C))
    parts = plan.parts
    memory, (carried, ends, sums) = _workspace.take(plan.workspaces)
    if known_parts is not None:
        sums, ends = known_parts
    elif parts > 1:
        _launch.launch(
            plan.ends, (parts - 1) * plan.blocks, u, delta, A, B, C, None, z, delta_bias, int(delta_softplus), None,
            None, None, None, carried, ends, sums, segments.seq_idx, segments.cu_seqlens, *plan.dims, parts - 1,
            *plan.rest,
        )  # fmt: skip
    _launch.launch(
        plan.forward, parts * plan.blocks, u, delta, A, B, C, D, z, delta_bias, int(delta_softplus), initial_state, y,
        last_state, checkpoints, carried, ends, sums, segments.seq_idx, segments.cu_seqlens, *plan.dims, parts,
        *plan.rest,
    )  # fmt: skip
    del memory  # held until here


class SummaryPlan(NamedTuple):
    """How a carry is found: the ends of all parts, each from zero, and then their prefix."""

    call: Any  # the plan of the forward or backward that follows
    carried: _workspace.Layout  # states, between tiles
    size: int  # of the ends of parts and behind them the sums of their step sizes, in reals
    dtype: Any
    prefix: _prefix.Plan


def summary_plan(plan, count, A, padded, carried, back):
    """The plan of a summary from that of the call that follows it; ``carried`` is the size of states between tiles."""
    (dim, state), real = A.shape, A.real.dtype
    size = count * plan.parts * dim * (padded * A.itemsize // real.itemsize + 1)
    prefix = _prefix.over_parts(A.dtype, count, plan.parts, dim, state, padded, back)
    return SummaryPlan(plan, _workspace.layout(carried), size, real, prefix)


def finished_summary(plan, A, ends, entering, carry):
    """Fill the carry; the parts for the call that follows, None if there is only one."""
    _prefix.launch(plan.prefix, A, ends, entering, None, carry)
    return (_launch.address(ends) + plan.prefix.sums, ends) if plan.call.parts > 1 else None


def planned_summary(segments, groups, inputs, along):
    """The plan of a summary, with u, delta and z along time."""
    plan = planned_forward(segments, groups, inputs, (*along, None))
    padded = geometry(segments, groups, inputs.A).padded
    return summary_plan(plan, segments.count, inputs.A, padded, plan.workspaces.sizes[0], False)


def selective_scan_summary(segments, groups, inputs, initial_state, carry):
    """Fill carry (batch, dim, reals + 1), as ``selective_scan_forward`` hands it on; the forward's ``known_parts``.

    All parts are walked here, the last one too, each from zero.
    """
    u, delta, A, B, C, _, z, delta_bias, delta_softplus, _, _ = inputs
    summary = plan_of(segments, groups, inputs, (u, delta, z), planned_summary)
    plan = summary.call
    if plan.orders is not None:
        u, delta, z, B, C = laid_out(plan.orders, A, (u, delta, z), (B, C))
    memory, (carried,) = _workspace.take(summary.carried)
    ends = _launch.empty(summary.size, summary.dtype)
    _launch.launch(
        plan.ends, plan.parts * plan.blocks, u, delta, A, B, C, None, z, delta_bias, int(delta_softplus), None, None,
        None, None, carried, ends, _launch.address(ends) + summary.prefix.sums, None, None, *plan.dims, plan.parts,
        *plan.rest,
    )  # fmt: skip
    del memory  # held until here
    return finished_summary(summary, A, ends, initial_state, carry)


def backward_shape(A, zoh, many, segments, warps, channel_blocks):
    """(rows, warps, blocks on a multiprocessor) for the backward kernel: registers and shared memory decide.

    ``channel_blocks`` says how many blocks of so many channels there are, ``warps`` how many the channels of a group
    need.
    """
    real = A.dtype.itemsize // (2 if A.dtype.kind == "c" else 1)
    if real == 8:
        return (1, min(warps, 2), (4 if A.dtype.kind != "c" else 3) * 2 // min(warps, 2))
    if A.dtype.kind == "c" or many or zoh:
        return (1, warps, 12 // warps)
    if warps < 4:
        return (1, warps, 16 // warps)
    if segments.count * channel_blocks(ROWS * 4 * WARP_CHANNELS) >= 2 * _launch.processors():
        return (ROWS, 4, 3)
    blocks = channel_blocks(4 * WARP_CHANNELS)
    split = parts_of(segments, blocks, RESIDENT_BACKWARD // 4, WALKED_BACKWARD)[0] > 1
    return (ROWS, 2, 6) if split else (1, 4, 4)


class BackwardPlan(NamedTuple):
    """How a backward call is launched."""

    orders: tuple[bool, bool] | None  # as in Plan
    parts: int
    workspaces: _workspace.Layout
    starts: Kernel
    starts_blocks: int  # for each part
    starts_dims: tuple[int, ...]  # the kernel takes these, the number of parts that it walks, and ``starts_rest``
    starts_rest: tuple[int, ...]
    backward: Kernel
    blocks: int
    numbers: tuple[int, ...]
    over_parts: _sums.Plan  # for the gradients of A, D, delta_bias, B and C in this order
    matrices: tuple[tuple[Kernel, int, tuple[int, ...]], ...]  # kernel, blocks, numbers of launches for dB and dC
    C_first: bool  # they take dC in place of dB


def planned_backward(segments, groups, inputs, along):
    """The plan of a backward call, with u, delta, z, dy, du, ddelta and dz along time."""
    inputs = inputs.by_group()
    plan = planned(segments, groups, inputs, along)
    layout, A = plan.layout, inputs.A
    dim, state, length, padded = layout.dim, layout.state, layout.length, layout.padded
    varying_B, varying_C = inputs.B.ndim == 4, inputs.C.ndim == 4

    def blocks_in_group(channels):
        return -(-layout.channels_of_group // channels)

    rows, warps, resident = backward_shape(
        A, inputs.zoh, layout.state_blocks > 1, segments, layout.warps,
        lambda channels: groups * blocks_in_group(channels),
    )  # fmt: skip
    starts_blocks, blocks = blocks_in_group(warps * WARP_CHANNELS), blocks_in_group(rows * warps * WARP_CHANNELS)
    parts, part_length = parts_of(segments, groups * blocks, RESIDENT_BACKWARD // 4, WALKED_BACKWARD)
    (u, delta, z, dy), (u_apart, delta_apart, z_apart, dy_apart) = plan.batches[:4], plan.apart[:4]
    of_parts = layout.channels_of_group, parts
    sizes, count = (part_length, segments.count, layout.state_blocks), launched(segments, parts)

    all_parts, number, real = count * parts, A.itemsize, A.real.itemsize
    stride = (varying_B + varying_C) * padded
    constant_B, constant_C = (dim * state * (not x) for x in (varying_B, varying_C))
    of_D, of_bias = (0 if x is None else dim for x in (inputs.D, inputs.delta_bias))
    split, carried = parts > 1, layout.state_blocks > 1
    workspaces = _workspace.layout(
        split * all_parts * dim * padded * number, split * all_parts * dim * real,
        carried * all_parts * 4 * dim * padded * number,
        segments.batch * groups * blocks * length * stride * number, all_parts * dim * state * number,
        all_parts * constant_B * number, all_parts * constant_C * number, all_parts * of_D * real,
        all_parts * of_bias * real,
    )  # fmt: skip
    reals = number // real
    return BackwardPlan(
        plan.orders, parts, workspaces,
        Kernel("selective_scan_backward", "starts", (warps, *plan.variant)),
        count * groups * starts_blocks,
        (dim, state, length, groups * starts_blocks, starts_blocks, *of_parts),
        (*sizes, dy, delta, z, dy_apart, delta_apart, z_apart, *plan.strides[3:]),
        Kernel("selective_scan_backward", "backward", (rows, warps, resident, *plan.variant)),
        all_parts * groups * blocks,
        (
            dim, state, length, groups * blocks, blocks, *of_parts, *sizes, dy, u, delta, z, dy_apart, u_apart,
            delta_apart, z_apart, dim if in_columns(inputs.u) else length, *plan.strides,
        ),
        _sums.planned(
            all_parts, A.dtype, A.dtype, reals * dim * state, of_D, of_bias, reals * constant_B, reals * constant_C
        ),
        tuple(sums_of_matrices(inputs, layout, groups * blocks, stride)), not varying_B,
    )  # fmt: skip


def sums_of_matrices(inputs, layout, channel_blocks, stride):
    """(kernel, blocks, numbers) of the launches that sum dB and dC, if these vary, over the blocks of channels.

    One for both, unless they differ in dtype or shape.
    """
    A, B, C = inputs.A, inputs.B, inputs.C
    varying = [x for x in (B, C) if x.ndim == 4]
    together = len(varying) == 2 and (B.dtype, B.shape) == (C.dtype, C.shape)
    tiles, state_blocks = -(-layout.length // 32), -(-layout.state // 16)
    for i, matrix in enumerate(varying[:1] if together else varying):
        (batch, groups), dtype = matrix.shape[:2], matrix.dtype
        storage = dtype.name if dtype.kind != "c" else A.real.dtype.name
        of_C = B.ndim == 2 and A.dtype.kind == "c"
        each = batch * groups * state_blocks * tiles
        yield (
            Kernel("selective_scan_backward", "sum_matrices", (storage, A.dtype.name, of_C)),
            2 * each if together else each,
            (
                stride, layout.padded, layout.length, layout.state, channel_blocks // groups, channel_blocks, groups,
                tiles, state_blocks, 0 if i else each,
            ),
        )  # fmt: skip


def selective_scan_backward(segments, groups, inputs, checkpoints, dy, dlast_state, gradients, known_parts):
    """Fill ``gradients``, with the attributes du, ddelta, ... and dinitial_state; those of what was None are None.

    ``known_parts`` are the sums and starts of parts, if there was a summary.
    """
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, _, _ = inputs
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state = gradients
    plan = plan_of(segments, groups, inputs, (u, delta, z, dy, du, ddelta, dz), planned_backward)
    if plan.orders is not None:
        u, delta, z, dy, B, C = laid_out(plan.orders, A, (u, delta, z, dy), (B, C))
    softplus, (_, _, _, seq_idx, cu_seqlens) = int(delta_softplus), segments
    memory, addresses = _workspace.take(plan.workspaces)
    starts, sums, carried, matrix_sums, A_sums, B_sums, C_sums, D_sums, bias_sums = addresses
    if known_parts is not None:
        sums, starts = known_parts
    elif plan.parts > 1:
        _launch.launch(
            plan.starts, (plan.parts - 1) * plan.starts_blocks, dy, delta, A, C, z, delta_bias, softplus, starts, sums,
            seq_idx, cu_seqlens, *plan.starts_dims, plan.parts - 1, *plan.starts_rest,
        )  # fmt: skip
    _launch.launch(
        plan.backward, plan.blocks, dy, u, delta, A, B, C, D, z, delta_bias, softplus, checkpoints, dlast_state, du,
        ddelta, dz, matrix_sums, A_sums, B_sums, C_sums, D_sums, bias_sums, dinitial_state, carried, starts, sums,
        seq_idx, cu_seqlens, *plan.numbers,
    )  # fmt: skip
    _sums.launch(
        plan.over_parts, (A_sums, dA), (D_sums, dD), (bias_sums, ddelta_bias), (B_sums, dB), (C_sums, dC)
    )  # fmt: skip
    for kernel, blocks, numbers in plan.matrices:
        _launch.launch(kernel, blocks, matrix_sums, dC if plan.C_first else dB, dC, *numbers)
    del memory  # held until here


def planned_backward_summary(segments, groups, inputs, along):
    """The plan of a backward summary, with u, delta, z and dy along time."""
    plan = planned_backward(segments, groups, inputs, along)
    return summary_plan(plan, segments.count, inputs.A, geometry(segments, groups, inputs.A).padded, 0, True)


def selective_scan_backward_summary(segments, groups, inputs, dy, dlast_state, carry):
    """Fill carry (batch, dim, reals + 1) for the way back; the backward's ``known_parts``.

    All parts are walked here, the first one too, each as if nothing entered at its end.
    """
    u, delta, A, _, C, _, z, delta_bias, delta_softplus, _, _ = inputs
    summary = plan_of(segments, groups, inputs, (u, delta, z, dy), planned_backward_summary)
    plan = summary.call
    if plan.orders is not None:
        delta, z, dy, C = laid_out(plan.orders, A, (delta, z, dy), (C,))
    starts = _launch.empty(summary.size, summary.dtype)
    _launch.launch(
        plan.starts, plan.parts * plan.starts_blocks, dy, delta, A, C, z, delta_bias, int(delta_softplus), starts,
        _launch.address(starts) + summary.prefix.sums, None, None, *plan.starts_dims, plan.parts, *plan.starts_rest,
    )  # fmt: skip
    return finished_summary(summary, A, starts, dlast_state, carry)


def selective_scan_prefix(A, carries, back, entering, states):
    """Fill states (batch, dim, state) with the prefix of all carries, plus ``entering``, which comes after them.

    Carries are (parts, batch, dim, reals + 1). All arrays are contiguous; A (dim, state) has the states' dtype,
    carries that of their reals. ``entering`` may be None.
    """
    parts, rows, dim, _ = carries.shape
    plan = _prefix.over_carries(A.dtype, parts, rows, dim, A.shape[1], back)
    _prefix.launch(plan, A, carries, None, entering, states)
