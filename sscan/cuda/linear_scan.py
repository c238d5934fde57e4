"""The recurrence h_t = a_t h_{t-1} + b_t on the GPU: how rows are laid out over threads, and the launches."""

import numpy as np

from sscan.cuda import _launch
from sscan.cuda._launch import Kernel

THREADS = 128  # of a block: for one long row, or for several short ones
STEPS = {  # of a thread: 16 or 32 bytes
    "float16": 8, "bfloat16": 8, "float32": 4, "float64": 4, "complex64": 4, "complex128": 2
}  # fmt: skip
ENOUGH, WANTED = 2, 8  # lines for each multiprocessor: fewer rows are cut along time, into about as many parts
SHORTEST = 4  # chunks of a part


def layout(rows, length, steps):
    """Threads of a row, parts of each row, and chunks of a part.

    Short rows share a block. Rows are cut if there are fewer than ``ENOUGH`` for each multiprocessor, which then reads
    them twice, but with all multiprocessors.
    """
    if length <= 8 * steps:
        return 8, 1, 1
    if length <= 4 * 32 * steps:
        return 32, 1, -(-length // (32 * steps))
    chunks, processors = -(-length // (THREADS * steps)), _launch.processors()
    if rows >= ENOUGH * processors:
        return THREADS, 1, chunks
    parts = max(1, min(-(-WANTED * processors // rows), chunks // SHORTEST))
    chunks = -(-chunks // parts)
    return THREADS, -(-length // (chunks * THREADS * steps)), chunks


def _row(array):
    """Distance of rows in elements."""
    return array.strides[0] // array.itemsize


def _states(a, b, initial, reverse, adjoint, shape):
    """The state that every part ends in, (rows, parts); None if rows are not cut."""
    (rows, length), (width, parts, chunks) = a.shape, shape
    if parts == 1:
        return None
    dtype = a.dtype if a.dtype.kind == "c" else np.float64 if a.dtype == np.float64 else np.float32
    ends = _launch.empty((3, rows, parts), dtype)
    together = _launch.aligned(STEPS[a.dtype.name], a, b)
    _launch.launch(
        Kernel("linear_scan", "totals", (a.dtype.name, width, together, reverse, adjoint)), rows * parts,
        a, b, ends[0], ends[1], rows, length, parts, chunks, _row(a), _row(b),
    )  # fmt: skip
    linear_scan_forward(ends[0], ends[1], initial, reverse, ends[2])
    return ends[2]


def _blocks(rows, shape):
    width, parts, _ = shape
    return -(-rows * parts * width // THREADS)


def linear_scan_forward(a, b, initial_state, reverse, h):
    """Fill h from a and b, all (rows, length) of one storage dtype with unit stride along time.

    initial_state (rows,) is contiguous, in the accumulation dtype; None is zero.
    """
    rows, length = a.shape
    if not rows or not length:
        return
    name = a.dtype.name
    shape = width, parts, chunks = layout(rows, length, STEPS[name])
    states = _states(a, b, initial_state, reverse, False, shape)
    _launch.launch(
        Kernel("linear_scan", "forward", (name, width, _launch.aligned(STEPS[name], a, b, h), reverse)),
        _blocks(rows, shape), a, b, initial_state, states, h, rows, length, parts, chunks, _row(a), _row(b), _row(h),
    )  # fmt: skip


def linear_scan_backward(dh, a, h, initial_state, reverse, da, db, dinitial_state):
    """Fill da, db and dinitial_state (None: not wanted); arrays as in ``linear_scan_forward``."""
    rows, length = a.shape
    name = a.dtype.name
    shape = width, parts, chunks = layout(rows, length, STEPS[name])
    states = _states(a, dh, None, not reverse, True, shape)
    together = _launch.aligned(STEPS[name], dh, a, h, da, db)
    _launch.launch(
        Kernel("linear_scan", "backward", (name, width, together, reverse)), _blocks(rows, shape),
        dh, a, h, initial_state, states, da, db, dinitial_state, rows, length, parts, chunks,
        _row(dh), _row(a), _row(h), _row(da), _row(db),
    )  # fmt: skip
