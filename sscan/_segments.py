"""Packed sequences, batches and parts of a split sequence are one thing to the CPU's kernels: a table of segments.

A segment is a stretch of one batch row that is scanned on its own. Its row in the table: batch row, first step,
number of steps, row of ``initial_state`` to start from (-1: zero), row of ``last_state`` to write (-1: none).
"""

import functools
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def segments(op: str, batch: int, length: int, seq_idx: Array | None, cu_seqlens: Array | None) -> Array:
    """The table of a call, int64 (segments, 5), in order of batch row and time.

    seq_idx (batch, length): the state starts again from zero where it changes. cu_seqlens (sequences + 1,): borders of
    sequences packed into one batch row, each with its own initial and last state. Raises ValueError on bad values.
    """
    check_packing(op, batch, seq_idx, cu_seqlens)
    if cu_seqlens is not None:
        return _packed(op, length, cu_seqlens)
    return _whole(batch, length) if seq_idx is None or length == 0 else _cut(seq_idx)


def check_packing(op: str, batch: int, seq_idx: Any, cu_seqlens: Any) -> None:
    """ValueError for arguments that exclude each other, TypeError for wrong dtypes; values are not looked at."""
    if seq_idx is not None and cu_seqlens is not None:
        raise ValueError(f"{op}: give seq_idx or cu_seqlens, not both")
    for name, array in (("seq_idx", seq_idx), ("cu_seqlens", cu_seqlens)):
        if array is not None and array.dtype.kind not in "iu":
            raise TypeError(f"{op}: {name} must be integers, got {array.dtype}")
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"{op}: cu_seqlens needs a batch of 1, got {batch}")


@functools.lru_cache
def _whole(batch: int, length: int) -> Array:
    rows = np.arange(batch)
    return np.stack([rows, 0 * rows, np.full(batch, length), rows, rows], axis=1).astype(np.int64)


def _packed(op: str, length: int, cu_seqlens: Array) -> Array:
    falls = np.flatnonzero(cu_seqlens[1:] < cu_seqlens[:-1])
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != length or len(falls):
        got = f"{cu_seqlens[0]} to {cu_seqlens[-1]}"
        if len(falls):
            got = f"{cu_seqlens[falls[0]]} before {cu_seqlens[falls[0] + 1]}, at {falls[0]}"
        raise ValueError(f"{op}: cu_seqlens must rise from 0 to length = {length}, got {got}")
    borders = cu_seqlens.astype(np.int64)
    sequences = np.arange(len(borders) - 1)
    return np.stack([0 * sequences, borders[:-1], np.diff(borders), sequences, sequences], axis=1)


def _cut(seq_idx: Array) -> Array:
    batch, length = seq_idx.shape
    starts = np.ones((batch, length), bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    row, begin = np.nonzero(starts)
    ends = np.append(begin[1:], 0)
    ends[np.append(row[1:] != row[:-1], True)] = length
    first = begin == 0
    last = ends == length
    return np.stack([row, begin, ends - begin, np.where(first, row, -1), np.where(last, row, -1)], axis=1)
