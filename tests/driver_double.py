"""The driver as a launch sees it: what a kernel would have been started with, without a GPU."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("blocks", 3 * ctypes.c_uint), ("threads", 3 * ctypes.c_uint), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint),
    )  # fmt: skip


class Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (
        ("id", ctypes.c_uint),
        ("padding", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", 60 * ctypes.c_char),
    )


class Launch(NamedTuple):
    """What ``cuLaunchKernelEx`` was called with."""

    function: int
    blocks: tuple[int, ...]
    threads: tuple[int, ...]
    shared: int
    stream: int
    attributes: list[tuple[int, int]]
    parameters: list[int]


class Driver:
    """``launches`` are those so far; they end with the first of ``statuses``, as long as there are any.

    ``freed`` is for what a launch frees through CuPy.
    """

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.statuses: list[int] = []
        self.freed: list[int] = []

    def cuLaunchKernelEx(self, config: int, function: int, each: None, extra: int) -> int:
        assert each is None
        description = (ctypes.c_void_p * 5).from_address(extra)
        assert (description[0], description[2], description[4]) == (1, 2, None)  # buffer, its size, end
        size = ctypes.c_size_t.from_address(description[3] or 0).value
        values = list((ctypes.c_int64 * (size // 8)).from_address(description[1] or 0))
        given = Config.from_address(config)
        attributes = (Attribute * given.count).from_address(given.attributes or 0)
        self.launches.append(
            Launch(
                function, tuple(given.blocks), tuple(given.threads), given.shared, given.stream or 0,
                [(a.id, a.value) for a in attributes], values,
            )
        )  # fmt: skip
        return self.statuses.pop(0) if self.statuses else 0

    def cuGetErrorString(self, status: int, text: Any) -> None:
        text._obj.value = f"error {status} of the driver".encode()
