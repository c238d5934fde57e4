"""The selective scan on the GPU: which kernels, how many blocks, and the split along time if channels are few."""

from typing import Any, NamedTuple

import numpy as np

from sscan.cuda import _launch
from sscan.cuda._launch import Kernel
from sscan.cuda._sums import over_parts

CHANNELS, LANES, CHECKPOINT, TILE = 32, 4, 16, 32  # as in kernels/selective_scan.py
RESIDENT, RESIDENT_BACKWARD = 5, 4  # blocks that a multiprocessor runs at once, of float32
SHORTEST = 128  # steps in a part


WARP_CHANNELS = 8
ROWS = 2  # channels of a lane in the backward kernel, of float32, if that leaves enough blocks


class Geometry(NamedTuple):
    """How a problem is laid out in blocks."""

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
    blocks_of_group = -(-channels_of_group // CHANNELS)
    states, block_states = states_of_lane(state)
    parts, part_length = parts_of(segments, groups * blocks_of_group, RESIDENT)
    return Geometry(
        dim, state, segments.length, groups * blocks_of_group, blocks_of_group, channels_of_group, states,
        -(-state // block_states), parts, part_length,
    )  # fmt: skip


def parts_of(segments, channel_blocks, resident):
    """Into how many parts segments are cut along time, and the steps of a part.

    Cutting costs every exponential of the recurrence once more, so a GPU that is half full is left alone. Otherwise as
    many parts of at least ``SHORTEST`` steps are made as blocks are ``resident`` on all multiprocessors at once.
    """
    blocks, fill = segments.count * channel_blocks, resident * _launch.processors()
    parts = 1
    if 0 < 2 * blocks <= fill:
        average = segments.length // (segments.count if segments.cu_seqlens is not None else 1)
        parts = max(1, min(fill // blocks, average // SHORTEST))
    part_length = -(-segments.length // (parts * TILE)) * TILE
    return max(1, -(-segments.length // max(1, part_length))), part_length


def states_of_lane(state):
    """States of a lane, and of the four lanes of a channel."""
    states = 1 if state <= LANES else 2 if state <= 2 * LANES else 4
    return states, LANES * states


def chunks_of(segments):
    """How many checkpoints a channel has."""
    if segments.cu_seqlens is None:
        return segments.count * -(-segments.length // CHECKPOINT)
    return segments.length // CHECKPOINT + segments.count


def empty_checkpoints(segments, groups, A):
    """Memory for the states at the start of every 16th step of every segment."""
    block_states = states_of_lane(A.shape[1])[1]
    padded = -(-A.shape[1] // block_states) * block_states
    return _launch.empty((chunks_of(segments), A.shape[0], padded), A.dtype)


def in_rows(wave):
    """An array along time whose channels lie ``length`` apart, as the kernels want it: itself or a copy."""
    if wave is None or wave.shape[1] < 2 or wave.strides[1] == wave.shape[2] * wave.itemsize:
        return wave
    return wave.copy()


def as_reals(matrix, of_A):
    """Varying B or C of a complex scan as its interleaved parts; every other one as it is."""
    if matrix.ndim == 2 or of_A.kind != "c":
        return matrix
    real = np.dtype(f"f{of_A.itemsize // 2}")
    if matrix.dtype.kind == "c":
        return matrix.view(real)
    odd = any(step % (2 * matrix.itemsize) for step in matrix.strides[:-1])
    return matrix.copy() if odd else matrix


def matrix_strides(matrix, groups):
    """Strides of batch row, group and state, in stored reals."""
    if matrix.ndim == 2:
        return 0, 0, 0
    batch, group, state = (step // matrix.itemsize for step in matrix.strides[:3])
    return batch, group if matrix.shape[1] == groups else 0, state


class Plan(NamedTuple):
    """What the metadata of a call decide."""

    layout: Geometry
    copies: bool  # whether an array must be copied first
    variant: tuple
    strides: tuple[int, ...]  # of B and C


def planned(segments, groups, inputs, along):
    """The plan, made from shapes, strides, dtypes and addresses."""
    A, B, C = inputs.A, as_reals(inputs.B, inputs.A.dtype), as_reals(inputs.C, inputs.A.dtype)
    copied = any(in_rows(x) is not x for x in along) or (B.dtype, C.dtype) != (inputs.B.dtype, inputs.C.dtype)
    along = [in_rows(x) for x in along]
    layout = geometry(segments, groups, A)
    quad = 4 * (2 if A.dtype.kind == "c" else 1)
    together = (
        segments.cu_seqlens is None
        and _launch.aligned(4, *along)
        and all(x.ndim == 2 or _launch.aligned(quad, x) for x in (B, C))
    )
    variant = (
        inputs.u.dtype.name, A.dtype.name, B.dtype.name if B.ndim == 4 else "", C.dtype.name if C.ndim == 4 else "",
        inputs.zoh, inputs.z is not None, together, layout.states, layout.state_blocks > 1,
        segments.seq_idx is not None,
    )  # fmt: skip
    copies = copied or B is not inputs.B or C is not inputs.C
    return Plan(layout, copies, variant, (*matrix_strides(B, groups), *matrix_strides(C, groups)))


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


def batch_stride(wave):
    """Reals from one batch row to the next."""
    return 0 if wave is None else wave.strides[0] // wave.itemsize


class ForwardPlan(NamedTuple):
    """How a forward call is launched."""

    copies: bool  # as in Plan
    layout: Geometry
    ends: Kernel
    forward: Kernel
    blocks: int  # for each part
    dims: tuple[int, ...]  # kernels take these, the number of parts that they scan, and ``rest``
    rest: tuple[int, ...]


def planned_forward(segments, groups, inputs, along):
    """The plan of a forward call, with u, delta, z and y along time."""
    plan = planned(segments, groups, inputs.by_group(), along)
    layout = plan.layout
    strides = (*(batch_stride(in_rows(x)) for x in along), *plan.strides)
    return ForwardPlan(
        plan.copies, layout, Kernel("selective_scan", "ends", plan.variant),
        Kernel("selective_scan", "forward", plan.variant), segments.count * layout.channel_blocks,
        (*layout.dims, layout.parts), (layout.part_length, layout.state_blocks, *strides),
    )  # fmt: skip


def selective_scan_forward(segments, groups, inputs, initial_state, y, last_state, checkpoints):
    """Fill y, last_state and checkpoints (unless None).

    ``inputs`` has the attributes u, delta, A, B, C, D, z, delta_bias, delta_softplus, zoh and signature; B and C
    come in any of their shapes: only their addresses matter here.
    """
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, _, _ = inputs
    plan = plan_of(segments, groups, inputs, (u, delta, z, y), planned_forward)
    if plan.copies:
        u, delta, z, B, C = in_rows(u), in_rows(delta), in_rows(z), as_reals(B, A.dtype), as_reals(C, A.dtype)
    layout, parts = plan.layout, plan.layout.parts
    carry = ends = sums = None
    if layout.state_blocks > 1 or parts > 1:
        states = (segments.count, parts, layout.dim, layout.padded)
        carry = _launch.empty(states, A.dtype) if layout.state_blocks > 1 else None
        if parts > 1:
            ends, sums = _launch.empty(states, A.dtype), _launch.empty(states[:3], A.real.dtype)
    if parts > 1:
        _launch.launch(
            plan.ends, (parts - 1) * plan.blocks, u, delta, A, B, C, None, z, delta_bias, int(delta_softplus), None,
            None, None, None, carry, ends, sums, segments.seq_idx, segments.cu_seqlens, *plan.dims, parts - 1,
            *plan.rest,
        )  # fmt: skip
    _launch.launch(
        plan.forward, parts * plan.blocks, u, delta, A, B, C, D, z, delta_bias, int(delta_softplus), initial_state, y,
        last_state, checkpoints, carry, ends, sums, segments.seq_idx, segments.cu_seqlens, *plan.dims, parts,
        *plan.rest,
    )  # fmt: skip


def backward_shape(A, blocks_of_channels, many):
    """(rows, warps, blocks on a multiprocessor) for the backward kernel: registers and shared memory decide."""
    real = A.dtype.itemsize // (2 if A.dtype.kind == "c" else 1)
    if real == 8:
        return (1, 2, 4 if A.dtype.kind != "c" else 3)
    if A.dtype.kind == "c" or many:
        return (1, 4, 3)
    return (ROWS, 4, 3) if blocks_of_channels(ROWS * 4 * WARP_CHANNELS) >= 2 * _launch.processors() else (1, 4, 4)


def selective_scan_backward(segments, groups, inputs, checkpoints, dy, dlast_state, gradients):
    """Fill ``gradients``, with the attributes du, ddelta, ... and dinitial_state; those of what was None are None."""
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, _, _ = inputs
    du, ddelta, dz = gradients.du, gradients.ddelta, gradients.dz
    plan = plan_of(segments, groups, inputs, (u, delta, z, dy, du, ddelta, dz))
    if plan.copies:
        u, delta, z, dy = (in_rows(x) for x in (u, delta, z, dy))
        B, C = as_reals(B, A.dtype), as_reals(C, A.dtype)
    layout, count, varying_B, varying_C = plan.layout, segments.count, B.ndim == 4, C.ndim == 4
    real = A.real.dtype
    many = layout.state_blocks > 1

    def blocks_of_channels(channels):
        return count * groups * -(-layout.channels_of_group // channels)

    rows, warps, resident = backward_shape(A, blocks_of_channels, many)
    channels = rows * warps * WARP_CHANNELS
    blocks_of_group = -(-layout.channels_of_group // channels)
    channel_blocks = groups * blocks_of_group
    parts, part_length = parts_of(segments, channel_blocks, RESIDENT_BACKWARD)
    batch, matrices = u.shape[0], varying_B + varying_C
    starts, sums = None, None
    if parts > 1:
        starts = _launch.empty((count, parts, layout.dim, layout.padded), A.dtype)
        sums = _launch.empty((count, parts, layout.dim), real)
        start_blocks = -(-layout.channels_of_group // (warps * WARP_CHANNELS))
        _launch.launch(
            Kernel("selective_scan_backward", "starts", (warps, *plan.variant)),
            count * (parts - 1) * groups * start_blocks, dy, delta, A, C, z, delta_bias,
            int(delta_softplus), starts, sums, segments.seq_idx, segments.cu_seqlens, layout.dim, layout.state,
            layout.length, groups * start_blocks, start_blocks, layout.channels_of_group, parts, part_length,
            layout.state_blocks, batch_stride(dy), batch_stride(delta), batch_stride(z), *plan.strides[3:],
        )  # fmt: skip
    shape = (count * parts, layout.dim, layout.state)
    A_sums = _launch.empty(shape, A.dtype)
    B_sums = None if varying_B else _launch.empty(shape, A.dtype)
    C_sums = None if varying_C else _launch.empty(shape, A.dtype)
    D_sums = None if gradients.dD is None else _launch.empty(shape[:2], real)
    bias_sums = None if gradients.ddelta_bias is None else _launch.empty(shape[:2], real)
    stride = matrices * layout.padded
    matrix_sums = _launch.empty((batch, channel_blocks, layout.length, stride), A.dtype) if matrices else None
    carry = _launch.empty((count * parts, 4, layout.dim, layout.padded), A.dtype) if many else None
    _launch.launch(
        Kernel("selective_scan_backward", "backward", (rows, warps, resident, *plan.variant)),
        count * parts * channel_blocks, dy, u, delta, A, B, C, D, z, delta_bias,
        int(delta_softplus), checkpoints, dlast_state, du, ddelta, dz, matrix_sums, A_sums, B_sums, C_sums,
        D_sums, bias_sums, gradients.dinitial_state, carry, starts, sums, segments.seq_idx, segments.cu_seqlens,
        layout.dim, layout.state, layout.length, channel_blocks, blocks_of_group, layout.channels_of_group, parts,
        part_length, layout.state_blocks, batch_stride(dy), batch_stride(u), batch_stride(delta),
        batch_stride(z), *plan.strides,
    )  # fmt: skip
    sums_of = (
        (A_sums, gradients.dA), (D_sums, gradients.dD), (bias_sums, gradients.ddelta_bias), (B_sums, gradients.dB),
        (C_sums, gradients.dC),
    )  # fmt: skip
    over_parts(*(pair for pair in sums_of if pair[0] is not None))
    dB, dC = gradients.dB if varying_B else None, gradients.dC if varying_C else None
    if dB is None or dC is None or (dB.dtype, dB.shape) == (dC.dtype, dC.shape):
        sum_blocks(matrix_sums, dB, dC, A, layout, channel_blocks)
    else:
        sum_blocks(matrix_sums, dB, None, A, layout, channel_blocks)
        sum_blocks(matrix_sums, None, dC, A, layout, channel_blocks)


def sum_blocks(sums, dB, dC, A, layout, channel_blocks):
    """dB and dC (batch, groups or 1, state, length), if not None, from the sums of the blocks of channels."""
    matrices = [x for x in (dB, dC) if x is not None]
    if not matrices:
        return
    (batch, groups), dtype = matrices[0].shape[:2], matrices[0].dtype
    tiles, state_blocks, stride = -(-layout.length // 32), -(-layout.state // 16), sums.shape[3]
    only_C = dB is None and stride == layout.padded  # so it comes first
    each = batch * groups * state_blocks * tiles
    storage = dtype.name if dtype.kind != "c" else A.real.dtype.name
    _launch.launch(
        Kernel("selective_scan_backward", "sum_matrices", (storage, A.dtype.name, only_C and A.dtype.kind == "c")),
        each * len(matrices), sums, dC if only_C else dB, dC, stride, layout.padded, layout.length, layout.state,
        channel_blocks // groups, channel_blocks, groups, tiles, state_blocks, 0 if dB is None and not only_C else each,
    )  # fmt: skip
