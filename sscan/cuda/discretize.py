"""Discretisation on the GPU: how states, steps and channels are laid out over threads, and the launches."""

from sscan.cuda import _launch, _sums
from sscan.cuda._launch import Kernel

THREADS = 128
WANTED = 8  # blocks for each multiprocessor: channels are divided among more blocks until there are about as many
FORWARD_LEAST, BACKWARD_LEAST = 4, 8  # channels of a block


def _layout(state, number, *arrays):
    """Threads that share a step's states, and consecutive states of each: 16 bytes of reals, else 1."""
    each = 1 if number.kind == "c" else 16 // number.itemsize
    if not _launch.aligned(each, *arrays):
        each = 1
    lanes = 1
    while lanes < 32 and lanes * each < state:
        lanes *= 2
    return lanes, each


def _grid(batch, length, state, channels_of_all_groups, lanes, each, least):
    """Channels of a block, blocks that divide a group, blocks along time, blocks along the states, and all blocks."""
    groups, channels = channels_of_all_groups
    times, tiles = -(-length // (THREADS // lanes)), -(-state // (lanes * each))
    others = batch * groups * times * tiles
    parts = min(-(-channels // least), -(-WANTED * _launch.processors() // max(1, others)))
    per_block = -(-channels // max(1, parts))
    parts = -(-channels // max(1, per_block))
    return per_block, parts, times, tiles, others * parts


def _strides(delta, B):
    """delta's distances of batch rows and channels in elements; B's of batch rows, groups and states in reals."""
    size = B.itemsize // (2 if B.dtype.kind == "c" else 1)
    of_B = [step // size for step in B.strides[:3]] if B.ndim == 4 else (0, 0, 0)
    return (delta.strides[0] // delta.itemsize, delta.strides[1] // delta.itemsize, *of_B)


def _stored(array):
    """Name of the reals that an array holds."""
    return {"complex64": "float32", "complex128": "float64"}.get(array.dtype.name, array.dtype.name)


def discretize_forward(delta, A, B, method, A_bar, B_bar):
    """Fill A_bar and B_bar, contiguous (batch, dim, length, state) arrays of A's dtype.

    delta (batch, dim, length) and a varying B (batch, groups, state, length) are in a storage dtype, with unit stride
    along time; B's last axis counts reals if A is complex. A and a constant B (dim, state) are contiguous.
    """
    batch, dim, length, state = A_bar.shape
    if not A_bar.size:
        return
    varies = B.ndim == 4
    groups = B.shape[1] if varies else 1
    lanes, each = _layout(state, A.dtype, A, None if varies else B, A_bar, B_bar)
    per_block, _, _, _, blocks = _grid(batch, length, state, (groups, dim // groups), lanes, each, FORWARD_LEAST)
    key = (delta.dtype.name, A.dtype.name, method, varies, _stored(B), lanes, each)
    _launch.launch(
        Kernel("discretize", "forward", key), blocks, delta, A, B, A_bar, B_bar,
        dim, length, state, groups, dim // groups, per_block, *_strides(delta, B),
    )  # fmt: skip


def discretize_backward(dA_bar, dB_bar, delta, A, B, method, ddelta, dA, dB):
    """Fill ddelta, dA and dB, all contiguous; arrays as in ``discretize_forward``."""
    batch, dim, length, state = dA_bar.shape
    varies = B.ndim == 4
    groups = B.shape[1] if varies else 1
    lanes, each = _layout(state, A.dtype, A, None if varies else B, dA_bar, dB_bar)
    per_block, parts, times, tiles, blocks = _grid(
        batch, length, state, (groups, dim // max(1, groups)), lanes, each, BACKWARD_LEAST
    )
    real = _stored(A)
    # Sums that one block cannot finish are finished by a second kernel; the others go where they belong.
    sums_A = _launch.empty((batch * times, dim, state), A.dtype)
    whole_delta, whole_B = tiles == 1, varies and parts == 1
    parts_delta = ddelta if whole_delta else _launch.empty((tiles, batch, dim, length), real)
    parts_B = dB
    if not whole_B:
        parts_B = _launch.empty((parts, batch, groups, state, length) if varies else sums_A.shape, A.dtype)
    key = (
        delta.dtype.name, A.dtype.name, method, varies, _stored(B), _stored(parts_delta), _stored(parts_B), lanes, each,
    )  # fmt: skip
    _launch.launch(
        Kernel("discretize", "backward", key), blocks, dA_bar, dB_bar, delta, A, B, parts_delta, sums_A, parts_B,
        batch, dim, length, state, groups, dim // max(1, groups), per_block, *_strides(delta, B),
    )  # fmt: skip
    _sums.over_parts((sums_A, dA))
    if not whole_delta:
        _sums.over_parts((parts_delta, ddelta))
    if not whole_B:
        _sums.over_parts((parts_B, dB))
