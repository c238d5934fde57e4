"""The foreign function: XLA calls it, it runs an op of sscan on XLA's memory.

XLA runs it on threads of its own, several at once, and on a GPU ahead of what is computed there: nothing here waits.
"""

import contextlib
import ctypes
import functools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

import sscan
from sscan import _arrays
from sscan._arrays import Array
from sscan.jax import _frame
from sscan.jax._frame import Region

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
        return json.dumps(self)


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


class Memory(NamedTuple):
    """An argument as the ops take it: a view, and what makes results where XLA wants them."""

    view: Any
    caller: _arrays.Caller


_arrays._known[Memory] = _arrays.Library(
    lambda op, name, memory: memory.caller, lambda memory: memory.view, lambda op, memory, arguments: None
)


def _run(call: Call, arguments: list[Any], results: list[Any], device: str, empty: Callable[..., Any]) -> None:
    """The op on these views, its results in those."""
    free = list(results)

    def result_or_workspace(shape: tuple[int, ...], dtype: Any) -> Any:
        size = math.prod(shape)
        for number, array in enumerate(free):
            if array.size == size and array.dtype == dtype:
                return free.pop(number).reshape(shape)
        return empty(shape, dtype)

    caller = _arrays.Caller("XLA", device, result_or_workspace, lambda result: result)
    given = {name: Memory(view, caller) for name, view in zip(call.names, arguments, strict=True) if name}
    if call.op in UPDATES:  # XLA has put what is updated where it wants the result
        given[UPDATES[call.op]] = Memory(free.pop(), caller)
    made = getattr(sscan, call.op)(**given, **dict(call.options))
    made = [x for x in (made if isinstance(made, tuple) else (made,)) if x is not None]
    # Results of which the dtype had to be changed, or that took the place of another one, are copied.
    elsewhere = [(x.copy(), place) for x, place in zip(made, results, strict=False) if _address(x) != _address(place)]
    for x, place in elsewhere:
        place[...] = x


def _address(array: Any) -> int:
    if array.size == 0:
        return 0
    address: int = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    return address


# --- memory as arrays -------------------------------------------------------------------------------------------------

_memory_view = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_view.argtypes, _memory_view.restype = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int), ctypes.py_object
_WRITEABLE = 0x200


def _on_cpu(region: Region) -> Array:
    address, dtype, shape = region
    size = math.prod(shape) * dtype.itemsize
    return np.ndarray(shape, dtype, _memory_view(address, size, _WRITEABLE)) if size else np.empty(shape, dtype)


def _execute_on_cpu(frame: Any) -> None:
    call = _call(_frame.text(frame), "cpu")
    arguments, results = (list(map(_on_cpu, _frame.regions(x))) for x in (frame.arguments, frame.results))
    _run(call, arguments, results, "cpu", np.empty)


def _on_gpu(cupy: Any, device: int, region: Region) -> Any:
    address, dtype, shape = region
    size = math.prod(shape) * dtype.itemsize
    memory = cupy.cuda.UnownedMemory(address, size, None, device)  # XLA holds it until its stream is done with it
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


@contextlib.contextmanager
def _surroundings(cuda: Any, device: int, handle: int) -> Iterator[None]:
    stream = cuda.Stream.from_external(_arrays._Stream(handle)) if handle else cuda.Stream.null
    with cuda.Device(device), stream:
        yield


def _execute_on_gpu(frame: Any) -> None:
    call = _call(_frame.text(frame), "cuda")
    cupy = _arrays._import_cupy(call.op)
    arguments, results = _frame.regions(frame.arguments), _frame.regions(frame.results)
    # XLA numbers its devices by itself: memory knows best which one it is on.
    address = next((region.address for region in (*arguments, *results) if region.address), 0)
    runtime = cupy.cuda.runtime
    device = runtime.pointerGetAttributes(address).device if address else runtime.getDevice()
    with _surroundings(cupy.cuda, device, _frame.stream(frame)):
        inputs, outputs = ([_on_gpu(cupy, device, region) for region in x] for x in (arguments, results))
        _run(call, inputs, outputs, f"cuda:{device}", cupy.empty)


# --- registration -----------------------------------------------------------------------------------------------------


def _handler(execute: Callable[[Any], None]) -> Any:
    """A function for XLA, to which every exception is an error that JAX raises again."""

    def handle(pointer: Any) -> Any:
        frame = pointer.contents
        try:
            if not _frame.answer_metadata(frame):
                execute(frame)
        except _frame.XLAError as failure:
            return failure.pointer
        except (TypeError, ValueError) as failure:
            return _frame.error(frame, _frame.INVALID_ARGUMENT, str(failure))
        except BaseException as failure:  # one that left this function would be lost
            return _frame.error(frame, _frame.INTERNAL, f"{type(failure).__name__}: {failure}")
        return None

    return _frame.HANDLER(handle)


_HANDLERS = {"cpu": _handler(_execute_on_cpu), "CUDA": _handler(_execute_on_gpu)}  # held as long as the process runs


def target(op: str) -> str:
    """The name that XLA knows an op by."""
    return f"sscan.{op}"


def register() -> None:
    """Make every op known to XLA."""
    for op in OPS:
        for platform, handler in _HANDLERS.items():
            jax.ffi.register_ffi_target(target(op), jax.ffi.pycapsule(handler), platform)
