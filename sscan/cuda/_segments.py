"""What is scanned on its own: batch rows, or sequences packed into one row. Values are never read on the host."""

from typing import Any, NamedTuple

import numpy as np

from sscan._segments import check_packing


class Segments(NamedTuple):
    """``count`` segments of (batch, length); integer arrays are contiguous int64, or None."""

    count: int  # type: ignore[assignment]  # tuples have a method of this name
    batch: int
    length: int
    seq_idx: Any  # (batch, length): the state starts again from zero where it changes
    cu_seqlens: Any  # (count + 1,): borders of the sequences in the one row


def segments(op, batch, length, seq_idx, cu_seqlens):
    """The segments of a call. Raises for arguments that exclude each other or have a wrong dtype.

    The values of ``cu_seqlens`` cannot be checked without waiting for the GPU; kernels clip them to the row.
    """
    check_packing(op, batch, seq_idx, cu_seqlens)
    count = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return Segments(count, batch, length, _int64(seq_idx), _int64(cu_seqlens))


def _int64(array):
    if array is None:
        return None
    array = array.astype(np.int64, copy=False)
    return array if array.flags.c_contiguous else array.copy()
