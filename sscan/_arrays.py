"""Array libraries: views of the caller's arrays in, results in the caller's library out.

The only file that knows them. A library is looked up in ``sys.modules``, never imported: whoever passes a tensor has
it.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Caller:
    """Where the arrays of a call came from: ``empty`` makes results that ``leave`` takes back there without a copy."""

    library: str
    device: str  # "cpu" or "cuda"
    leave: Callable[[Any], Any]
    empty: Callable[[tuple[int, ...], Any], Any] = np.empty


def enter(op: str, *, writes: tuple[str, ...] = (), **arrays: Any) -> tuple[Caller, tuple[Any, ...]]:
    """The caller, and zero-copy views (NumPy on the CPU, CuPy on a GPU) of its arrays in order; None stays None.

    Arguments named in ``writes`` are to be changed in place. Raises TypeError for things that are not arrays, arrays of
    two libraries or devices, tensors whose gradient would be lost, tracers, and arrays in ``writes`` that are
    read-only or have no memory that could be viewed as it is.
    """
    caller, first = None, ""
    views: list[Any] = []
    for name, array in arrays.items():
        if array is None:
            views.append(None)
            continue
        here, view = _recognise(op, name, array)
        if caller is None:
            caller, first = here, name
        if (here.library, here.device) != (caller.library, caller.device):
            raise TypeError(
                f"{op}: all arrays must come from one library and device; {first} is a {caller.library} array on "
                f"{caller.device}, {name} is a {here.library} array on {here.device}"
            )
        if name in writes:
            _check_updatable(op, name, array, here, view)
        views.append(view)
    assert caller is not None, "every op has a required array"
    return caller, tuple(views)


def _check_updatable(op: str, name: str, array: Any, here: Caller, view: Any) -> None:
    """TypeError if what is written to the view would fail, or be lost because it had to be a copy."""
    if here.library == "JAX" or (here.device == "cpu" and not view.flags.writeable):
        raise TypeError(f"{op}: {name} is updated in place and must be writeable, got a read-only {here.library} array")
    if here.library == "NumPy" and view is not array:
        raise TypeError(f"{op}: {name} is updated in place and must be in native byte order, got {array.dtype.str}")
    if here.library == "PyTorch" and (array.is_conj() or array.is_neg()):
        raise TypeError(f"{op}: {name} is updated in place and must not be a lazily conjugated or negated tensor")


def _recognise(op: str, name: str, array: Any) -> tuple[Caller, Any]:
    if isinstance(array, np.ndarray):
        return Caller("NumPy", "cpu", lambda result: result), _native(array)
    for library, type_name, recognise in (
        ("torch", "Tensor", _torch),
        ("jax", "Array", _jax),
        ("cupy", "ndarray", _cupy),
    ):
        module = sys.modules.get(library)
        if module is not None and isinstance(array, getattr(module, type_name, ())):
            return recognise(op, name, array, module)
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return _dlpack(op, name, array)
    raise TypeError(
        f"{op}: {name} must be a NumPy, CuPy, PyTorch or JAX array, or offer DLPack; got {type(array).__name__}"
    )


def _native(array: Array) -> Array:
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _torch(op: str, name: str, tensor: Any, torch: Any) -> tuple[Caller, Any]:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{op}: {name} requires grad, which this function would lose; use sscan.torch or torch.no_grad()"
        )
    if tensor.device.type == "cuda":
        return Caller("PyTorch", "cuda", torch.from_dlpack), tensor
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor on cpu or cuda, got {tensor.layout} on {tensor.device}")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    half = tensor.dtype is torch.bfloat16  # which NumPy, and so Tensor.numpy, has only through ml_dtypes
    view = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if half else tensor.numpy()

    def leave(result: Array) -> Any:
        if result.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(result.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(result)

    return Caller("PyTorch", "cpu", leave), view


def _jax(op: str, name: str, array: Any, jax: Any) -> tuple[Caller, Any]:
    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            f"{op}: {name} is traced by a JAX transformation (jit, grad, vmap); use sscan.jax inside of them"
        )
    platforms = {device.platform for device in array.devices()}
    if platforms == {"gpu"}:
        return Caller("JAX", "cuda", jax.numpy.from_dlpack), array
    if platforms != {"cpu"}:
        raise TypeError(f"{op}: {name} must be on cpu or gpu, got {', '.join(sorted(platforms))}")

    def leave(result: Array) -> Any:
        return jax.device_put(result, may_alias=True)

    return Caller("JAX", "cpu", leave, _empty_on_cache_line), np.asarray(array)


def _empty_on_cache_line(shape: tuple[int, ...], dtype: Any) -> Array:
    """Memory that JAX takes over as it is: it copies what does not start at a multiple of 64 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    aligned: Array = memory[start : start + size].view(dtype).reshape(shape)
    return aligned


def _cupy(op: str, name: str, array: Any, cupy: Any) -> tuple[Caller, Any]:
    return Caller("CuPy", "cuda", lambda result: result), array


def _dlpack(op: str, name: str, array: Any) -> tuple[Caller, Any]:
    kind, _ = array.__dlpack_device__()
    if kind != 1:  # kDLCPU
        raise TypeError(f"{op}: {name} must be in CPU memory, got DLPack device type {kind}")
    library = type(array).__module__.partition(".")[0]
    namespace = array.__array_namespace__() if hasattr(array, "__array_namespace__") else np
    return Caller(library, "cpu", namespace.from_dlpack), np.from_dlpack(array)
