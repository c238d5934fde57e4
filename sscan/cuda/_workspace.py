"""Workspaces of a call in one allocation: kernels take their addresses, which cost less than arrays."""

from typing import NamedTuple

import numpy as np

from sscan._recording import Address
from sscan.cuda import _launch

ALIGNMENT = 256  # bytes, as of what allocators give
_BYTE = np.dtype(np.uint8)


class Layout(NamedTuple):
    """Where workspaces of so many bytes start in the memory of all; None where there is none."""

    sizes: tuple[int, ...]
    starts: tuple[int | None, ...]
    total: int


def layout(*sizes):
    """Workspaces one after the other; of 0 bytes: none."""
    starts, total = [], 0
    for size in sizes:
        starts.append(total if size else None)
        total += -(-size // ALIGNMENT) * ALIGNMENT
    return Layout(sizes, tuple(starts), total)


def take(layout):
    """Memory, to be held until the last launch that uses it, and the addresses of the workspaces in it."""
    if not layout.total:
        return None, layout.starts
    memory = _launch.empty(layout.total, _BYTE)
    base = _launch.address(memory)
    return memory, [None if start is None else Address(base + start) for start in layout.starts]
