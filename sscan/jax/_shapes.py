"""What an op would return, from shapes and dtypes alone.

The op itself finds out, on stand-ins for arrays and with kernels that do nothing. So its checks are made while JAX
traces, and say what they always say.
"""

import math
from typing import Any

import jax
import numpy as np

from sscan import _arrays, _backends
from sscan._segments import check_packing

KIND = "shapes"  # the kind of device that stand-ins are on


class Shape:
    """A stand-in for a contiguous array: metadata, and of NumPy's methods those that the ops use."""

    c_contiguous = writeable = True

    def __init__(self, shape: Any, dtype: Any) -> None:
        self.shape, self.dtype = tuple(map(int, shape)), np.dtype(dtype)
        self.ndim, self.itemsize, self.size = len(self.shape), self.dtype.itemsize, math.prod(self.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.itemsize * math.prod(self.shape[axis + 1 :]) for axis in range(self.ndim))

    @property
    def flags(self) -> Any:
        return self

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> "Shape":
        return self

    def __setitem__(self, index: Any, value: Any) -> None:
        pass

    def fill(self, value: Any) -> None:
        pass

    def astype(self, dtype: Any, **options: Any) -> "Shape":
        return Shape(self.shape, dtype)

    def reshape(self, *shape: Any) -> "Shape":
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        return Shape([self.size // math.prod(n for n in shape if n >= 0) if n < 0 else n for n in shape], self.dtype)


def _itself(array: Any) -> Any:
    return array


def _nothing(*arguments: Any) -> None:
    pass


def _metadata(arrays: tuple[Any, ...]) -> list[Any]:
    return [None if x is None else (Shape, x.shape, x.dtype) for x in arrays]


_CALLER = _arrays.Caller("JAX tracers", KIND, Shape, _itself)
_arrays.register(Shape, _arrays.Library(lambda op, name, array: _CALLER, _itself, _nothing, _metadata))
_backends.register(KIND, __name__)


# --- the kernels ------------------------------------------------------------------------------------------------------


def segments(op: str, batch: int, length: int, seq_idx: Any, cu_seqlens: Any) -> None:
    check_packing(op, batch, seq_idx, cu_seqlens)


def platform() -> str:
    """The kernels that checkpoints are made for. Traced code does not know where it will run; elsewhere it needs none.

    See `_handler`.
    """
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def _shape_of_checkpoints(*sizes: Any) -> Any:
    return _backends.for_device("selective_scan", platform()).checkpoints_shape(*sizes)


def checkpoints_shape(*sizes: Any) -> Any:
    """Any shape where it depends on values: then they stay inside of the op."""
    return _shape_of_checkpoints(*sizes) or ()


def keeps_checkpoints(arrays: dict[str, Any]) -> bool:
    """Whether their size is known from shapes, which it may not be if sequences are packed."""
    sequences = 1 if "cu_seqlens" in arrays else None
    return _shape_of_checkpoints(1, 1, 1, 1, 1, np.float32, "seq_idx" in arrays, sequences) is not None


def channels_last(*arrays: Any) -> bool:
    """XLA's arrays are row-major."""
    return False


in_columns = channels_last


def __getattr__(name: str) -> Any:
    if name.endswith(("_forward", "_backward", "_update")):
        return _nothing
    raise AttributeError(name)
