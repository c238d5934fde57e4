"""What a call on a GPU allocates and launches, while somebody wants to know: see ``_plans``."""

import threading
from typing import Any


class Address(int):
    """An address inside of an allocation, which a kernel takes like any integer."""

    __slots__ = ()


class Recording:
    """The allocations and launches of one call, in order. What is held here is not given to somebody else meanwhile."""

    def __init__(self) -> None:
        self.allocations: list[tuple[int, int, Any]] = []  # address, size in bytes, and what holds it
        self.launches: list[tuple[Any, int, tuple[Any, ...]]] = []  # kernel or product, blocks, arguments
        self.repeatable = True


class _Current(threading.local):
    """The recording of this thread."""

    recording: Recording | None = None


current = _Current()


def allocated(array: Any, address: int, size: int) -> None:
    """Note memory that a call got for its results or for work."""
    if current.recording is not None:
        current.recording.allocations.append((address, size, array))


def launched(what: Any, blocks: int, arguments: tuple[Any, ...]) -> None:
    """Note the launch of a kernel, or a matrix product, which has no blocks."""
    if current.recording is not None:
        current.recording.launches.append((what, blocks, arguments))


def not_repeatable() -> None:
    """Note that a call does more than launch kernels of ``sscan.cuda``."""
    if current.recording is not None:
        current.recording.repeatable = False
