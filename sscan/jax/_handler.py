"""The foreign function: XLA calls it, it runs an op of sscan on XLA's memory.

XLA runs it on threads of its own, several at once, and on a GPU ahead of what is computed there: nothing here waits.
"""

import ctypes
import functools
import json
import math
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

import sscan
from sscan import _arrays, _recording
from sscan.jax import _frame
from sscan.jax._frame import Region
from sscan.jax._gate import Gate

UPDATES = {"selective_state_update": "state", "causal_conv1d_update": "conv_state"}
OPS = tuple(name for name in sscan.__all__ if name.islower())


class Call(NamedTuple):
    """What a call says besides its arrays."""

    op: str
    names: tuple[str, ...]  # of the arrays, in order
    options: tuple[tuple[str, Any], ...]
    checkpoints: str = ""  # the kind of device whose checkpoints it makes or takes

    @property
    def text(self) -> str:
        return json.dumps(self, default=lambda number: number.item())  # options may be NumPy's numbers


@functools.lru_cache(4096)
def _call(text: bytes, kind: str) -> Call:
    """The call that a handler makes for kernels of this kind: with checkpoints only if they are its own."""
    op, names, options, checkpoints = json.loads(text)
    names, options = tuple(names), tuple((name, value) for name, value in options)
    if checkpoints not in ("", kind):
        names = tuple("" if name == "checkpoints" else name for name in names)
        if op == "selective_scan_forward":
            op, options = "selective_scan", (*options, ("return_last_state", True))
    return Call(op, names, options)


# --- XLA's memory as arrays of a library, for `_arrays` ---------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """An argument or a result; no tuple, which to ``_plans`` is several results."""

    region: Region
    device: str


_memory_view = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_view.argtypes, _memory_view.restype = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int), ctypes.py_object
_WRITEABLE = 0x200


def _view(memory: Memory) -> Any:
    (address, dtype, shape), device = memory.region, memory.device
    size = math.prod(shape) * dtype.itemsize
    if device == "cpu":
        return np.ndarray(shape, dtype, _memory_view(address, size, _WRITEABLE)) if size else np.empty(shape, dtype)
    cupy = sys.modules["cupy"]  # XLA holds the memory until its stream is done with it
    unowned = cupy.cuda.UnownedMemory(address, size, None, int(device.removeprefix("cuda:")))
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(unowned, 0))


class _Results(threading.local):
    """Results that the op of this thread has not asked for yet."""

    left: tuple[Memory, ...] = ()


_results = _Results()


def _place(shape: tuple[int, ...], dtype: Any) -> Memory | None:
    """XLA's memory for a result of this size and dtype, if there is any left."""
    size = math.prod(shape)
    for number, memory in enumerate(_results.left):
        if memory.region.dtype == dtype and math.prod(memory.region.shape) == size:
            _results.left = _results.left[:number] + _results.left[number + 1 :]
            return memory
    return None


def _empty(device: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """Memory for a result: XLA's, else, and for workspaces, from the usual allocator."""
    memory = _place(shape, dtype)
    if memory is None:
        array = (np if device == "cpu" else sys.modules["cupy"]).empty(shape, dtype)
    else:
        array = _view(memory).reshape(shape)
    _recording.allocated(array, _address(array), array.nbytes)
    return array


@functools.cache
def _caller(device: str) -> _arrays.Caller:
    return _arrays.Caller("XLA", device, functools.partial(_empty, device), lambda result: result)


def _metadata(arrays: tuple[Any, ...]) -> list[Any]:
    return [None if x is None else (x.device, x.region[1:]) for x in arrays]


def _seen(arguments: tuple[Any, ...]) -> _arrays.Seen | None:
    device = arguments[0].device
    if device == "cpu":
        return None
    key: list[Any] = [device]
    arrays: list[Any] = []
    addresses: list[int] = []
    for x in arguments:
        if type(x) is Memory:
            address, dtype, shape = x.region
            if not address:
                return None
            arrays.append(x)
            addresses.append(address)
            key += dtype, shape, address % 16
        else:  # an option: an attribute of the call
            key += type(x), x
    return key, arrays, addresses, int(device.removeprefix("cuda:"))


def _address(array: Any) -> int:
    if type(array) is Memory:
        return array.region.address
    address: int = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    return address


_of_cupy: Any = _arrays.CUPY.planning


def _like(result: Any, arrays: list[Any]) -> tuple[Callable[..., Any], int | None]:
    """Of results in the order of XLA's, so that each gets the one that is its own."""
    shape, dtype = result.shape, result.dtype
    otherwise, _ = _of_cupy.like(result, arrays)
    return lambda: _place(shape, dtype) or otherwise(), None


_arrays.register(
    Memory,
    _arrays.Library(
        lambda op, name, memory: _caller(memory.device), _view, lambda op, memory, arguments: None, _metadata,
        planning=_arrays.Planning(_seen, _of_cupy.stream, _address, _like, _of_cupy.workspace),
    ),
)  # fmt: skip


# --- the call ---------------------------------------------------------------------------------------------------------


def _run(call: Call, arguments: list[Memory], results: list[Memory]) -> None:
    """The op on these arguments, its results in that memory."""
    given = {name: memory for name, memory in zip(call.names, arguments, strict=True) if name}
    if call.op in UPDATES:  # XLA has put what is updated where it wants the result
        given[UPDATES[call.op]] = results.pop()
    _results.left = tuple(results)
    try:
        made = getattr(sscan, call.op)(**given, **dict(call.options))
    finally:
        _results.left = ()
    made = [x for x in (made if isinstance(made, tuple) else (made,)) if x is not None]
    # Results of which the dtype had to be changed, or that took the place of another one, are copied.
    elsewhere = [(x, place) for x, place in zip(made, results, strict=False) if not _is_at(x, place)]
    for x, place in [(_arrays.view(x).copy(), place) for x, place in elsewhere]:
        _view(place)[...] = x


def _is_at(array: Any, place: Memory) -> bool:
    return array is place or not math.prod(place.region.shape) or _address(array) == place.region.address


def _memory(regions: list[Region], device: str) -> list[Memory]:
    return [Memory(region, device) for region in regions]


def _execute_on_cpu(frame: Any) -> None:
    call = _call(_frame.text(frame), "cpu")
    _run(call, _memory(_frame.regions(frame.arguments), "cpu"), _memory(_frame.regions(frame.results), "cpu"))


def _execute_on_gpu(frame: Any) -> None:
    call = _call(_frame.text(frame), "cuda")
    cuda = _arrays.import_cupy(call.op).cuda
    arguments, results = _frame.regions(frame.arguments), _frame.regions(frame.results)
    # XLA numbers its devices by itself: memory knows best which one it is on.
    address = next((region.address for region in (*arguments, *results) if region.address), 0)
    device = cuda.runtime.pointerGetAttributes(address).device if address else cuda.runtime.getDevice()
    with cuda.Device(device), _arrays.external_stream(_frame.stream(frame)):
        _run(call, _memory(arguments, f"cuda:{device}"), _memory(results, f"cuda:{device}"))


# --- registration -----------------------------------------------------------------------------------------------------


EXECUTE: dict[str, Callable[[Any], None]] = {"cpu": _execute_on_cpu, "CUDA": _execute_on_gpu}  # by XLA's platform


def _handler(platform: str) -> Any:
    """A function for XLA, to which every exception is an error that JAX raises again."""

    def handle(pointer: Any) -> Any:
        frame = pointer.contents
        try:
            if not _frame.answer_metadata(frame):
                EXECUTE[platform](frame)
        except _frame.XLAError as failure:
            return failure.pointer
        except (TypeError, ValueError) as failure:
            return _frame.error(frame, _frame.INVALID_ARGUMENT, str(failure))
        except BaseException as failure:  # one that left this function would be lost
            return _frame.error(frame, _frame.INTERNAL, f"{type(failure).__name__}: {failure}")
        return None

    return _frame.HANDLER(handle)


_GATES = {platform: Gate(_handler(platform)) for platform in EXECUTE}


def target(op: str) -> str:
    """The name that XLA knows an op by."""
    return f"sscan.{op}"


def register() -> None:
    """Make every op known to XLA."""
    for op in OPS:
        for platform, gate in _GATES.items():
            jax.ffi.register_ffi_target(target(op), jax.ffi.pycapsule(gate.function), platform)
