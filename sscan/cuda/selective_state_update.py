"""One decoding step of the selective scan on the GPU: what is launched, and for which arrays."""

import functools

from sscan.cuda import _launch
from sscan.cuda._launch import Kernel

THREADS = 128
STATES = 16  # of a thread, about: enough loads under way, not too many registers


@functools.cache
def _kernel(storage, state_storage, number, slots, count, together, most, *vectors_and_A):
    """The kernel for dtypes, and the rows, ``most`` or fewer, and channels of a block.

    A thread has ``each`` neighbouring states, 16 bytes if possible, at up to four places of each of its rows; at least
    two threads have a channel, so that they read whole sectors of memory. ``vectors_and_A`` are the dtypes of D and
    dt_bias, and whether A is log(-A).
    """
    each = 16 // number.itemsize if together else max(1, 8 // number.itemsize)
    lanes = 2
    while lanes < 32 and 4 * lanes * each < count:
        lanes *= 2
    vectors = min(4, -(-count // (lanes * each)))
    rows = max(1, min(most, STATES // (vectors * each)))
    bits = 0 if slots is None else 8 * slots.itemsize
    key = (
        storage.name,
        state_storage.name,
        number.name,
        bits,
        lanes,
        each,
        vectors,
        rows,
        lanes * each * vectors == count,
        *vectors_and_A,
    )
    return Kernel("selective_state_update", "update", key), rows, THREADS // lanes


def selective_state_update(state, slots, x, dt, A, B, C, D, z, dt_bias, dt_softplus, A_log, y):
    """Fill y (batch, dim), and update the rows ``slots`` of state in place; a negative slot gives y = 0.

    All arrays have unit stride along their last axis. state (slots, dim, state), x, dt, z and y (batch, dim), B and C
    (batch, groups, state) are of any storage dtype of one accumulation dtype; A (dim, state) in that, D and
    dt_bias in one that it holds. With ``A_log``, A is log(-A).
    slots (batch,) is contiguous, int32 or int64; None: row i owns slot i. y is contiguous.
    """
    (dim, count), number, itemsize = A.shape, A.dtype, x.itemsize
    together = number.kind != "c" and _launch.aligned(16 // number.itemsize, state, A, B, C)
    slots_dtype, batch = None if slots is None else slots.dtype, x.shape[0]
    of_vectors = [A.real.dtype.name if vector is None else vector.dtype.name for vector in (D, dt_bias)]
    kernel, rows, channels = _kernel(
        x.dtype, state.dtype, number, slots_dtype, count, together, min(batch, STATES), *of_vectors, A_log
    )
    state_slot, state_dim, _ = state.strides
    B_row, B_group, _ = B.strides
    C_row, C_group, _ = C.strides
    of_state, of_B = state.itemsize, B.itemsize
    _launch.launch(
        kernel, -(-batch // rows) * -(-dim // channels), state, slots, x, dt, z, B, C, y, A, D, dt_bias,
        int(dt_softplus), state.shape[0], batch, dim, count, dim // max(1, B.shape[1]), dim // max(1, C.shape[1]),
        state_slot // of_state, state_dim // of_state, x.strides[0] // itemsize, dt.strides[0] // itemsize,
        0 if z is None else z.strides[0] // itemsize, B_row // of_B, B_group // of_B, C_row // of_B, C_group // of_B,
    )  # fmt: skip
