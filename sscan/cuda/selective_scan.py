"""The selective scan on the GPU: which kernels, how many blocks, and the split along time of a call with few channels."""

from typing import Any, NamedTuple

import numpy as np

from sscan.cuda import _launch
from sscan.cuda._launch import Kernel

CHANNELS, LANES, CHECKPOINT, TILE = 32, 4, 16, 32  # as in kernels/selective_scan.py
RESIDENT = 4  # blocks that a multiprocessor runs at once, about
SHORTEST = 128  # steps in a part


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
    def padded(self):
        """States of a channel, as checkpoints and ends have them."""
        return self.states * LANES * self.state_blocks


def geometry(segments, groups, A, processors):
    """The layout. Segments are cut along time if their blocks would leave multiprocessors idle.

    Then they are cut into as many parts as fill the GPU once, of at least ``SHORTEST`` steps: a part costs its
    exponentials twice, so a GPU that is busy already is left alone.
    """
    dim, state = A.shape
    channels_of_group = dim // groups
    blocks_of_group = -(-channels_of_group // CHANNELS)
    states, block_states = states_of_lane(state)
    blocks = segments.count * groups * blocks_of_group
    parts = 1
    if 0 < blocks < processors:
        average = segments.length // (segments.count if segments.cu_seqlens is not None else 1)
        parts = max(1, min(RESIDENT * processors // blocks, average // SHORTEST))
    part_length = -(-segments.length // (parts * TILE)) * TILE
    parts = max(1, -(-segments.length // max(1, part_length)))
    return Geometry(
        dim, state, segments.length, groups * blocks_of_group, blocks_of_group, channels_of_group, states,
        -(-state // block_states), parts, part_length,
    )  # fmt: skip


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
    states, block_states = states_of_lane(A.shape[1])
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


class Prepared(NamedTuple):
    """A problem in the form that all kernels of the scan take."""

    layout: Geometry
    variant: tuple
    waves: tuple[Any, ...]  # u, delta, z and what came along
    B: Any
    C: Any
    matrices: tuple[int, ...]  # strides of B and C


def prepared(segments, groups, inputs, *also):
    """``also`` are more arrays along time: results and gradients."""
    A = inputs.A
    layout = geometry(segments, groups, A, _launch.processors())
    u, delta, z = (in_rows(x) for x in (inputs.u, inputs.delta, inputs.z))
    also = tuple(in_rows(x) for x in also)
    B, C = as_reals(inputs.B, A.dtype), as_reals(inputs.C, A.dtype)
    quad = 4 * (2 if A.dtype.kind == "c" else 1)
    together = (
        segments.cu_seqlens is None
        and _launch.aligned(4, u, delta, z, *also)
        and all(x.ndim == 2 or _launch.aligned(quad, x) for x in (B, C))
    )
    variant = (
        u.dtype.name, A.dtype.name, B.dtype.name if B.ndim == 4 else "", C.dtype.name if C.ndim == 4 else "",
        inputs.zoh, z is not None, together, layout.states, layout.state_blocks > 1, segments.seq_idx is not None,
    )  # fmt: skip
    matrices = (*matrix_strides(B, groups), *matrix_strides(C, groups))
    return Prepared(layout, variant, (u, delta, z, *also), B, C, matrices)


def batch_stride(wave):
    """Reals from one batch row to the next."""
    return 0 if wave is None else wave.strides[0] // wave.itemsize


def selective_scan_forward(segments, groups, inputs, initial_state, y, last_state, checkpoints):
    """Fill y, last_state and checkpoints (unless None).

    ``inputs`` has the attributes u, delta, A, B, C, D, z, delta_bias, delta_softplus and zoh; B and C are
    (dim, state) or (batch, groups or 1, state, length).
    """
    p = prepared(segments, groups, inputs, y)
    layout, (u, delta, z, y) = p.layout, p.waves
    count, A = segments.count, inputs.A
    states = (count, layout.parts, layout.dim, layout.padded)
    carry = _launch.empty(states, A.dtype) if layout.state_blocks > 1 else None
    ends, sums = None, None
    if layout.parts > 1:
        ends, sums = _launch.empty(states, A.dtype), _launch.empty(states[:3], A.real.dtype)

    def launch(factory, parts, initial_state, y, last_state, checkpoints):
        _launch.launch(
            Kernel("selective_scan", factory, p.variant), count * parts * layout.channel_blocks,
            u, delta, A, p.B, p.C, inputs.D, z, inputs.delta_bias, int(inputs.delta_softplus), initial_state, y,
            last_state, checkpoints, carry, ends, sums, segments.seq_idx, segments.cu_seqlens, layout.dim,
            layout.state, layout.length, layout.channel_blocks, layout.blocks_of_group, layout.channels_of_group,
            layout.parts, parts, layout.part_length, layout.state_blocks, batch_stride(u), batch_stride(delta),
            batch_stride(z), batch_stride(y), *p.matrices,
        )  # fmt: skip

    if layout.parts > 1:
        launch("ends", layout.parts - 1, None, None, None, None)
    launch("forward", layout.parts, initial_state, y, last_state, checkpoints)
