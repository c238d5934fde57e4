"""Ops along the last axis take arrays of any rank >= 1; their kernels see (rows, size)."""

from typing import Any

import numpy as np

from sscan import _checks
from sscan._arrays import Array


def same(op: str, **arrays: Any) -> None:
    """ValueError unless all arrays (None is left out) have the shape of the first, of at least one axis."""
    (first, array), *others = arrays.items()
    if array.ndim == 0:
        raise ValueError(f"{op}: {first} must have at least one axis, got shape ()")
    for name, other in others:
        if other is not None and other.shape != array.shape:
            raise ValueError(f"{op}: {name} must have the shape of {first}, {array.shape}, got {other.shape}")


def rows(array: Array | None) -> Array | None:
    """The array as (rows, size); copied if its leading axes do not merge into one, or if its last axis is strided."""
    if array is None:
        return None
    count = int(np.prod(array.shape[:-1], dtype=np.int64))
    return _checks.time_contiguous(array.reshape(count, array.shape[-1]))
