"""A stand-in for CuPy: arrays that keep apart from NumPy's, in a module that offers NumPy's functions on them.

It catches what would fail or wait on a GPU: NumPy functions given device arrays, host and device arrays mixed, and
values read by the host, which are counted in `reads`. The ops of sscan take these arrays through DLPack, as those of a
library in host memory, so in every dtype but bfloat16.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import numpy as np
import scipy.special

reads = 0  # how often the host has waited for a value


class ndarray:
    """An array in what counts as device memory."""

    __array_ufunc__ = None

    def __init__(self, array: Any, dtype: Any = None, memory: Any = None) -> None:
        """Of an array; or, as CuPy's, of a shape in memory of which ``memory.mem`` is told."""
        self.host = np.asarray(array) if memory is None else memory.mem.host
        self.memory = None if memory is None else memory.mem

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a device array does not become a NumPy array by itself")

    def __array_function__(self, function: Any, *_: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} was given a device array")

    def __array_namespace__(self, **_: Any) -> Any:
        return sys.modules[__name__]

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        return self.host.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.host.__dlpack_device__()

    def __getattr__(self, name: str) -> Any:
        if name in ("tolist", "tobytes") or name.startswith("__array"):
            raise AttributeError(name)
        attribute = getattr(self.host, name)
        return on_device(attribute) if callable(attribute) else to_device(attribute)

    def __len__(self) -> int:
        return len(self.host)

    def __getitem__(self, index: Any) -> Any:
        return to_device(self.host[from_device(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.host[from_device(index)] = from_device(value)

    def get(self) -> Any:
        """The array in host memory."""
        global reads
        reads += 1
        return self.host.copy()

    def item(self) -> Any:
        """The value of a single element, on the host."""
        return self.get().item()

    __bool__, __int__, __float__ = (lambda self, t=t: t(self.item()) for t in (bool, int, float))
    __hash__ = None  # type: ignore[assignment]


def from_device(value: Any) -> Any:
    """NumPy arrays for device arrays, inside of containers too; TypeError for what lies in host memory."""
    if isinstance(value, ndarray):
        return value.host
    if isinstance(value, np.ndarray):
        raise TypeError("a NumPy array meets a device array")
    if isinstance(value, (tuple, list)):
        return type(value)(from_device(item) for item in value)
    return value


def to_device(value: Any) -> Any:
    """Device arrays for NumPy arrays and scalars, inside of containers too."""
    if isinstance(value, (np.ndarray, np.generic)):
        return ndarray(value)
    return type(value)(to_device(item) for item in value) if isinstance(value, (tuple, list)) else value


def on_device(function: Any) -> Any:
    """The function of NumPy on device arrays."""

    def call(*arguments: Any, **options: Any) -> Any:
        options = {name: from_device(value) for name, value in options.items()}
        return to_device(function(*from_device(arguments), **options))

    return call


def asarray(value: Any, dtype: Any = None) -> ndarray:
    """To the device, if it is not there."""
    return value if isinstance(value, ndarray) and dtype in (None, value.dtype) else array(value, dtype)


def array(value: Any, dtype: Any = None) -> ndarray:
    """A copy on the device."""
    return ndarray(np.array(value.host if isinstance(value, ndarray) else value, dtype))


def from_dlpack(value: Any) -> ndarray:
    """The memory of another library's array."""
    return ndarray(np.from_dlpack(value))


def erf(value: Any) -> Any:
    """What CuPy has in `cupyx.scipy.special`."""
    return on_device(scipy.special.erf)(value)


def __getattr__(name: str) -> Any:
    return on_device(getattr(np, name))


def _operators() -> None:
    """All but the comparisons in three forms, `a + b`, `b + a` and `a += b`, the last in place."""
    for name in ("add", "sub", "mul", "truediv", "pow", "matmul", "and", "or"):
        binary, in_place = getattr(operator, f"__{name}__"), getattr(operator, f"__i{name}__")

        def update(self: Any, other: Any, in_place: Any = in_place) -> Any:
            self.host = in_place(self.host, from_device(other))
            return self

        setattr(ndarray, f"__{name}__", on_device(binary))
        setattr(ndarray, f"__r{name}__", on_device(lambda a, b, binary=binary: binary(b, a)))
        setattr(ndarray, f"__i{name}__", update)
    for name in ("lt", "le", "eq", "ne", "gt", "ge", "neg", "invert"):
        setattr(ndarray, f"__{name}__", on_device(getattr(operator, f"__{name}__")))


_operators()
