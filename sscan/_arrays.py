"""Array libraries: views of the caller's arrays in, results in the caller's library out.

The only file that knows them. A library is looked up in ``sys.modules``: whoever passes a tensor has it. CuPy alone is
imported, when the first array of another library arrives that lies on a GPU.
"""

import contextlib
import functools
import importlib
import itertools
import math
import operator
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ParamSpec, Protocol, TypeVar

import ml_dtypes
import numpy as np

from sscan import _recording

Array = np.ndarray[Any, Any]


class AnyArray(Protocol):
    """An array of any library, as a checker of types sees it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


MaybeArray = AnyArray | None

# In signatures of ops a result has the type of one argument. To a checker NumPy's arrays have dtypes and axes too;
# where those of the result are not the argument's, there is a second signature, with dtypes alone.
ArrayT = TypeVar("ArrayT", bound=AnyArray)
StoredT = TypeVar("StoredT", bound=np.generic)
NumberT = TypeVar("NumberT", bound=np.generic)

INSTALL_CUDA = 'pip install "sscan[cuda13]", or "sscan[cuda12]" if the driver is older than CUDA 13'


@dataclass(frozen=True, slots=True)
class Caller:
    """Where the arrays of a call came from: ``empty`` makes results that ``leave`` takes back there without a copy."""

    library: str
    device: str  # "cpu" or "cuda:0", with the number that CUDA knows the device by
    empty: Callable[[tuple[int, ...], Any], Any]
    leave: Callable[[Any], Any]


Seen = tuple[list[Any], list[Any], list[int], int]


@dataclass(frozen=True, slots=True)
class Planning:
    """What is asked of a library whose calls on a GPU are planned, see ``_plans``."""

    # Of all arguments: what the call depends on, which of them are arrays, their addresses and their device; None if
    # there is anything about them that is to be looked at each time.
    seen: Callable[[tuple[Any, ...]], "Seen | None"]
    stream: Callable[[int], int | None]  # the current one of a device; None if that is not the current device
    address: Callable[[Any], int]
    # Of a result and the arrays: what makes memory for another one, of nothing or of the array at that place.
    like: Callable[[Any, list[Any]], tuple[Callable[..., Any], int | None]]
    workspace: Callable[[int, int], Callable[[], Any]]  # of a size in bytes and a device: what makes it


@dataclass(frozen=True, slots=True)
class Library:
    """What is asked of an array library."""

    caller: Callable[[str, str, Any], Caller]  # of (op, name, array); TypeError if the array cannot be read
    view: Callable[[Any], Any]  # of an array that has a caller
    surroundings: Callable[..., contextlib.AbstractContextManager[Any] | None]  # of (op, its array, all arguments)
    metadata: Callable[[tuple[Any, ...]], list[Any] | None] | None = None  # see below
    known_view: Callable[[Any], Any] | None = None  # of an array whose metadata an op knows, if that takes less
    planning: Planning | None = None


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
        library = _known.get(type(array)) or _library_of(op, name, array)
        here = library.caller(op, name, array)
        if caller is None:
            caller, first = here, name
        elif here is not caller and (here.library, here.device) != (caller.library, caller.device):
            raise TypeError(
                f"{op}: all arrays must come from one library and device; {first} is a {caller.library} array on "
                f"{caller.device}, {name} is a {here.library} array on {here.device}"
            )
        view = library.view(array)
        if writes and name in writes:
            _check_updatable(op, name, array, here, view)
        views.append(view)
    assert caller is not None, "every op has a required array"
    return caller, tuple(views)


def on_gpu(array: Any) -> bool:
    """Whether it is an array of CuPy, as kernels on a GPU take them."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


def array_module(array: Any) -> Any:
    """The module whose functions work on an array of NumPy or CuPy, found without importing either."""
    name = type(array).__module__.partition(".")[0]
    if name == "builtins":
        raise TypeError(f"expected an array of NumPy or CuPy, or a Tensor, got {type(array).__name__}: {array!r:.50}")
    return sys.modules[name]


def view(array: Any) -> Any:
    """The view of an array of which ``enter`` need not know: one that an op made for another."""
    library = _known.get(type(array)) or _find_library(array)
    assert library is not None, "ops make arrays of libraries"
    return library.view(array)


def _check_updatable(op: str, name: str, array: Any, here: Caller, view: Any) -> None:
    """TypeError if what is written to the view would fail, or be lost because it had to be a copy."""
    if here.library == "JAX" or (here.device == "cpu" and not view.flags.writeable):
        raise TypeError(f"{op}: {name} is updated in place and must be writeable, got a read-only {here.library} array")
    if here.library == "NumPy" and not array.dtype.isnative:
        raise TypeError(f"{op}: {name} is updated in place and must be in native byte order, got {array.dtype.str}")
    if here.library == "PyTorch" and (array.is_conj() or array.is_neg()):
        raise TypeError(f"{op}: {name} is updated in place and must not be a lazily conjugated or negated tensor")


def metadata(arrays: tuple[Any, ...]) -> list[Any] | None:
    """All that ``enter`` and checks may depend on, as something to look up: never values, never addresses.

    None for arrays that must be entered and checked one by one.
    """
    library = _known.get(type(arrays[0])) or _find_library(arrays[0])
    if library is None or library.metadata is None:
        return None
    try:
        return library.metadata(arrays)
    except (AttributeError, ValueError, RuntimeError):  # arrays of two libraries, sparse ones
        return None


def views(arrays: tuple[Any, ...]) -> list[Any]:
    """What ``enter`` makes of arrays whose metadata it has seen before."""
    library = _known[type(arrays[0])]
    view = library.known_view or library.view
    return [None if x is None else view(x) for x in arrays]


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def follows_caller(op: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """An op during which CuPy's current device, stream and allocator are those of the caller's first array.

    Everything inside can so use CuPy's current ones, and every result is in order with the caller's own work.
    """

    @functools.wraps(op)
    def following(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if args and type(args[0]) is np.ndarray:
            return op(*args, **kwargs)
        for array in itertools.chain(args, kwargs.values()):
            library = _known.get(type(array)) or _find_library(array)
            if library is not None:
                surroundings = library.surroundings(op.__name__, array, (args, kwargs))
                if surroundings is None:
                    break
                with surroundings:
                    return op(*args, **kwargs)
        return op(*args, **kwargs)

    return following


def planning(first: Any) -> Planning | None:
    """How a call with this first argument is planned, if it may be."""
    library = _known.get(type(first)) or _find_library(first)
    return None if library is None else library.planning


_PLAIN = frozenset({bool, int, float, str, type(None)})  # the types of options that are what they are equal to

# --- which library an array is of -------------------------------------------------------------------------------------

_known: dict[type, Library] = {}  # the types of arrays met so far


def _library_of(op: str, name: str, array: Any) -> Library:
    library = _find_library(array)
    if library is None:
        raise TypeError(
            f"{op}: {name} must be a NumPy, CuPy, PyTorch or JAX array, or offer DLPack; got {type(array).__name__}"
        )
    return library


def _find_library(array: Any) -> Library | None:
    for module_name, type_name, library in _LIBRARIES:
        module = sys.modules.get(module_name)
        if module is not None and isinstance(array, getattr(module, type_name, ())):
            if library is NUMPY and type(array) is not np.ndarray:
                return library  # anybody's class, which is not to be kept alive
            return _known.setdefault(type(array), library)
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return _known.setdefault(type(array), DLPACK)
    return None


def register(kind: type, library: Library) -> None:
    """Take arrays of a type, which no array library has."""
    _known[kind] = library


def _itself(array: Any) -> Any:
    return array


def _nothing(op: str, array: Any, arguments: Any) -> None:
    """No surroundings: the op runs where the caller is."""


# --- NumPy ------------------------------------------------------------------------------------------------------------


def _numpy_metadata(arrays: tuple[Any, ...]) -> list[Any] | None:
    found: list[Any] = []
    for x in arrays:
        if x is None:
            found.append(None)
        elif type(x) is np.ndarray:
            found.append((x.dtype, x.shape, x.strides, x.flags.num))
        else:
            return None
    return found


_NUMPY_CALLER = Caller("NumPy", "cpu", np.empty, _itself)


def _numpy_caller(op: str, name: str, array: Any) -> Caller:
    if type(array) is not np.ndarray and isinstance(array, (np.ma.MaskedArray, np.matrix)):
        raise TypeError(
            f"{op}: {name} must be a plain array, whose elements all count and which may have any number of axes; "
            f"got {type(array).__name__}"
        )
    return _NUMPY_CALLER


def _numpy_view(array: Array) -> Array:
    """A plain array, in native byte order."""
    plain = array if type(array) is np.ndarray else array.view(np.ndarray)
    return plain if plain.dtype.isnative else plain.astype(plain.dtype.newbyteorder("="))


# --- CuPy, in which the arrays of all libraries are viewed on a GPU ---------------------------------------------------


def import_cupy(op: str) -> ModuleType:
    """CuPy, for arrays of other libraries; RuntimeError if it is not installed or finds no GPU."""
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise RuntimeError(f"{op}: arrays on a GPU need CuPy, which is installed by: {INSTALL_CUDA}") from error
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(f"{op}: CuPy cannot use the GPU: {error}") from error
    return cupy


def _cupy_caller(op: str, name: str, array: Any) -> Caller:
    return _cupy_on(array.data.device_id)


def _cupy_metadata(arrays: tuple[Any, ...]) -> list[Any]:
    return [None if x is None else (type(x), x.dtype, x.shape, x.strides, x.data.device_id) for x in arrays]


def _empty_on_gpu(shape: tuple[int, ...], dtype: Any) -> Any:
    array = sys.modules["cupy"].empty(shape, dtype)
    _recording.allocated(array, array.data.ptr, array.nbytes)
    return array


def _cupy_seen(arguments: tuple[Any, ...]) -> Seen | None:
    kind, device = sys.modules["cupy"].ndarray, arguments[0].data.device_id
    key: list[Any] = [device]
    arrays: list[Any] = []
    addresses: list[int] = []
    for x in arguments:
        if type(x) is kind:
            memory = x.data
            address = memory.ptr
            if not address or memory.device_id != device:
                return None
            arrays.append(x)
            addresses.append(address)
            key += x.dtype, x.shape, x.strides, address % 16
        elif type(x) in _PLAIN:
            key += type(x), x
        else:
            return None
    return key, arrays, addresses, device


def _cupy_stream(device: int) -> int | None:
    cuda = sys.modules["cupy"].cuda
    return cuda.get_current_stream().ptr if device == cuda.runtime.getDevice() else None


def _cupy_like(result: Any, arrays: list[Any]) -> tuple[Callable[..., Any], None]:
    order = sorted(range(result.ndim), key=lambda axis: -result.strides[axis])
    make = functools.partial(sys.modules["cupy"].ndarray, tuple(result.shape[axis] for axis in order), result.dtype)
    if order == list(range(result.ndim)):
        return make, None
    back = [order.index(axis) for axis in range(result.ndim)]
    return lambda: make().transpose(back), None


def _cupy_workspace(size: int, device: int) -> Callable[[], Any]:
    return functools.partial(sys.modules["cupy"].ndarray, size, np.uint8)


@functools.cache
def _cupy_on(device: int) -> Caller:
    return Caller("CuPy", f"cuda:{device}", _empty_on_gpu, _itself)


def _cupy_surroundings(op: str, array: Any, arguments: Any) -> contextlib.AbstractContextManager[Any] | None:
    cuda = sys.modules["cupy"].cuda
    device = array.data.device_id
    return None if device == cuda.runtime.getDevice() else cuda.Device(device)


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def _torch_caller(op: str, name: str, tensor: Any) -> Caller:
    check_tensor(op, name, tensor)
    if not _has_memory(tensor):
        kind = "on meta" if tensor.is_meta else "without memory (freed, fake, or inside a transformation)"
        raise TypeError(f"{op}: {name} must be a dense tensor on cpu or cuda, got one {kind}")
    if tensor.requires_grad and sys.modules["torch"].is_grad_enabled():
        raise TypeError(
            f"{op}: {name} requires grad, which this function would lose; use sscan.torch or torch.no_grad()"
        )
    if has_tangent(tensor):
        raise TypeError(f"{op}: {name} has a tangent, which would be lost: there are no forward-mode derivatives")
    return _torch_on(tensor.device.type, tensor.device.index)


def check_tensor(op: str, name: str, tensor: Any) -> None:
    """TypeError for a tensor that kernels cannot read, whether it has data or only says what they would be like."""
    if tensor.layout is not sys.modules["torch"].strided:
        kind = f"a {str(tensor.layout).removeprefix('torch.')} one"
    elif tensor.is_nested:
        kind = "a nested one"
    elif tensor.is_quantized:
        kind = "a quantized one"
    elif tensor.device.type not in ("cpu", "cuda", "meta"):
        kind = f"one on {tensor.device}"
    elif str(tensor.dtype).removeprefix("torch.") not in _TORCH_DTYPES:
        raise TypeError(f"{op}: {name} has the dtype {tensor.dtype}, which is not supported")
    else:
        return
    raise TypeError(f"{op}: {name} must be a dense tensor on cpu or cuda, got {kind}")


_TORCH_DTYPES = {
    "float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool",
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
}  # fmt: skip


def _has_memory(tensor: Any) -> bool:
    """Whether what the tensor says of itself lies at its address.

    NumPy would give memory of its own for an address of 0, and nobody has written that. A storage may have been freed,
    and tensors that are fake, zero by definition, wrapped by a transformation or of a class with a dispatch of its own
    never had one.
    """
    dispatch = sys.modules["torch"]._C
    if dispatch._dispatch_keys(tensor).has(dispatch.DispatchKey.Python):
        return False
    try:
        return bool(tensor.data_ptr()) or not tensor.numel()
    except RuntimeError:
        return False


@functools.cache
def _torch_on(kind: str, device: int | None) -> Caller:
    if kind == "cpu":
        return Caller("PyTorch", "cpu", np.empty, _leave_to_torch)
    empty = functools.partial(_empty_tensor, sys.modules["torch"].device(kind, device))
    return Caller("PyTorch", f"cuda:{device}", empty, _leave_tensor)


def _leave_to_torch(result: Array) -> Any:
    torch: Any = sys.modules["torch"]
    if result.dtype == ml_dtypes.bfloat16:  # which torch.from_numpy does not know
        return torch.from_numpy(result.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(result)


class TensorView:
    """A tensor on a GPU as kernels take it: its address, and how it lies there.

    Whatever else is asked is asked of a CuPy array, which takes as long to make as a kernel to launch.
    """

    __slots__ = ("ptr", "tensor")

    def __init__(self, tensor: Any) -> None:
        self.tensor, self.ptr = tensor, tensor.data_ptr()

    @property
    def data(self) -> "TensorView":
        """What has the address, as ``data`` of CuPy's arrays."""
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(self.tensor.shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.tensor.ndim  # type: ignore[no-any-return]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.tensor.itemsize  # type: ignore[no-any-return]

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from one element of each axis to the next."""
        size = self.tensor.itemsize
        return tuple(size * step for step in self.tensor.stride())

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's."""
        return numpy_dtype(self.tensor.dtype)

    def astype(self, dtype: Any, order: str = "K", copy: bool = True) -> Any:
        """Itself, or a CuPy array."""
        return self if not copy and dtype == self.dtype else _torch_view(self.tensor).astype(dtype, order, copy=copy)

    def transpose(self, *axes: int) -> "TensorView":
        """The axes in another order."""
        return TensorView(self.tensor.permute(axes))

    def __getattr__(self, name: str) -> Any:
        return getattr(_torch_view(self.tensor), name)

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: Any) -> Any:
        return _torch_view(self.tensor)[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        _torch_view(self.tensor)[index] = value


def _empty_tensor(device: Any, shape: tuple[int, ...], dtype: Any) -> TensorView:
    view = TensorView(sys.modules["torch"].empty(shape, dtype=_torch_dtype(dtype), device=device))
    _recording.allocated(view, view.ptr, view.tensor.nbytes)
    return view


def _torch_seen(arguments: tuple[Any, ...]) -> Seen | None:
    torch: Any = sys.modules["torch"]
    first = arguments[0]
    if not first.is_cuda or torch.autograd.forward_ad._current_level >= 0:
        return None
    tensor, parameter, lost = torch.Tensor, torch.nn.Parameter, torch.is_grad_enabled()
    device = first.get_device()
    key: list[Any] = [device]
    arrays: list[Any] = []
    addresses: list[int] = []
    for x in arguments:
        kind = type(x)
        if kind is tensor or kind is parameter:
            address = x.data_ptr()
            if (
                not address or x.get_device() != device or x.is_neg() or (lost and x.requires_grad)
                or ((dtype := x.dtype).is_complex and x.is_conj())
            ):  # fmt: skip
                return None
            arrays.append(x)
            addresses.append(address)
            key += dtype, x.shape, x.is_contiguous() or x.stride(), address % 16
        elif kind in _PLAIN:
            key += kind, x
        else:
            return None
    return key, arrays, addresses, device


def _torch_stream(device: int) -> int | None:
    dispatch = sys.modules["torch"]._C
    return dispatch._cuda_getCurrentRawStream(device) if device == dispatch._cuda_getDevice() else None


def _torch_like(result: Any, arrays: list[Any]) -> tuple[Callable[..., Any], int | None]:
    torch: Any = sys.modules["torch"]
    made = {"dtype": result.dtype, "device": result.device}
    if not result.is_contiguous():
        return functools.partial(torch.empty_strided, result.shape, result.stride(), **made), None
    for place, x in enumerate(arrays):
        if (x.dtype, x.shape) == (result.dtype, result.shape) and x.is_contiguous():
            return torch.empty_like, place  # which takes half the time
    return functools.partial(torch.empty, result.shape, **made), None


def _torch_workspace(size: int, device: int) -> Callable[[], Any]:
    torch: Any = sys.modules["torch"]
    return functools.partial(torch.empty, size, dtype=torch.uint8, device=torch.device("cuda", device))


def _leave_tensor(result: Any) -> Any:
    if type(result) is TensorView:
        return result.tensor
    torch: Any = sys.modules["torch"]
    return torch.utils.dlpack.from_dlpack(result.__dlpack__(stream=-1))  # a bare capsule: CuPy's stream is PyTorch's


@functools.cache
def numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """NumPy's, for one of PyTorch that has passed ``check_tensor``."""
    name = str(dtype).removeprefix("torch.")
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


@functools.cache
def _torch_dtype(dtype: Any) -> Any:
    return getattr(sys.modules["torch"], np.dtype(dtype).name)


def has_tangent(tensor: Any) -> bool:
    """Whether forward-mode derivatives are being made with respect to the tensor."""
    forward = sys.modules["torch"].autograd.forward_ad
    return forward._current_level >= 0 and forward.unpack_dual(tensor).tangent is not None


def _torch_metadata(arrays: tuple[Any, ...]) -> list[Any] | None:
    torch: Any = sys.modules["torch"]
    if torch.autograd.forward_ad._current_level >= 0:
        return None
    lost = torch.is_grad_enabled()
    found: list[Any] = []
    for x in arrays:
        if x is None:
            found.append(None)
            continue
        address = x.data_ptr()
        if (lost and x.requires_grad) or x.is_conj() or x.is_neg() or (not address and x.numel()):
            return None
        found.append((type(x), x.dtype, x.shape, x.stride(), x.device, address % x.element_size()))
    return found


def _torch_view(tensor: Any) -> Any:
    torch: Any = sys.modules["torch"]
    if tensor.requires_grad or tensor.is_conj() or tensor.is_neg():
        tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_cuda:  # a bare capsule: CuPy's stream is PyTorch's, there is nothing to wait for
        return sys.modules["cupy"].from_dlpack(torch.utils.dlpack.to_dlpack(tensor))
    if tensor.dtype is torch.bfloat16:
        return np.from_dlpack(_Lent(tensor.view(torch.int16))).view(ml_dtypes.bfloat16)
    return np.from_dlpack(_Lent(tensor))


class _Lent:
    """A tensor that NumPy asks for its memory.

    ``Tensor.numpy`` would keep the storage from being resized, for ever; a capsule leaves the tensor as it was, as FSDP
    needs it.
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __dlpack__(
        self, *, stream: None = None, max_version: Any = None, dl_device: Any = None, copy: Any = None
    ) -> Any:
        return sys.modules["torch"]._C._to_dlpack_versioned(self.tensor)  # NumPy makes the unversioned read-only

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # kDLCPU


def _known_tensor(tensor: Any) -> Any:
    return TensorView(tensor) if tensor.is_cuda else _torch_view(tensor)


def _torch_surroundings(op: str, tensor: Any, arguments: Any) -> contextlib.AbstractContextManager[Any] | None:
    return _torch_device(op, tensor.device.index) if tensor.device.type == "cuda" else None


@contextlib.contextmanager
def _torch_device(op: str, device: int) -> Iterator[None]:
    """PyTorch's current stream on the device, and memory from its allocator."""
    cuda = import_cupy(op).cuda
    handle = sys.modules["torch"].cuda.current_stream(device).cuda_stream
    with cuda.Device(device), external_stream(handle), cuda.using_allocator(_torch_allocator()):
        yield


@functools.lru_cache
def external_stream(handle: int) -> Any:
    """A stream of another library, by its handle, as CuPy's."""
    stream = sys.modules["cupy"].cuda.Stream
    return stream.from_external(_Stream(handle)) if handle else stream.null


@dataclass(frozen=True, slots=True)
class _Stream:
    """A stream by its handle, in the form that CuPy takes."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


@functools.cache
def _torch_allocator() -> Callable[[int], Any]:
    cuda, empty, byte = sys.modules["cupy"].cuda, sys.modules["torch"].empty, sys.modules["torch"].uint8

    def allocate(size: int) -> Any:
        tensor = empty(size, dtype=byte, device="cuda")  # PyTorch's current device, stream and pool: CuPy's
        return cuda.MemoryPointer(cuda.UnownedMemory(tensor.data_ptr(), size, tensor, tensor.device.index), 0)

    return allocate


# --- JAX --------------------------------------------------------------------------------------------------------------


def _jax_caller(op: str, name: str, array: Any) -> Caller:
    if isinstance(array, sys.modules["jax"].core.Tracer):
        raise TypeError(
            f"{op}: {name} is traced by a JAX transformation (jit, grad, vmap); use sscan.jax inside of them"
        )
    devices = array.devices()
    platforms = {device.platform for device in devices}
    if platforms == {"cpu"}:
        return _JAX_ON_CPU
    if platforms != {"gpu"} or len(devices) > 1:
        places = ", ".join(sorted(map(str, devices)))
        raise TypeError(f"{op}: {name} must be on the cpu or on one gpu, got {places}")
    return _jax_on(array.__dlpack_device__()[1])


def _leave_to_jax(result: Array) -> Any:
    return sys.modules["jax"].device_put(result, may_alias=True)


def _empty_on_cache_line(shape: tuple[int, ...], dtype: Any) -> Array:
    """Memory that JAX takes over as it is: it copies what does not start at a multiple of 64 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    aligned: Array = memory[start : start + size].view(dtype).reshape(shape)
    return aligned


_JAX_ON_CPU = Caller("JAX", "cpu", _empty_on_cache_line, _leave_to_jax)


@functools.cache
def _jax_on(device: int) -> Caller:
    return Caller("JAX", f"cuda:{device}", _empty_on_gpu, sys.modules["jax"].numpy.from_dlpack)


def _jax_view(array: Any) -> Any:
    """The view; on a GPU, CuPy's stream waits for what JAX still has to do for it (DLPack's protocol for streams)."""
    return np.asarray(array) if _jax_platform(array) == "cpu" else sys.modules["cupy"].from_dlpack(array)


def _jax_platform(array: Any) -> str:
    return next(iter(array.devices())).platform  # type: ignore[no-any-return]


def _jax_surroundings(op: str, array: Any, arguments: Any) -> contextlib.AbstractContextManager[Any] | None:
    if isinstance(array, sys.modules["jax"].core.Tracer) or _jax_platform(array) != "gpu":
        return None
    return _jax_device(op, array.__dlpack_device__()[1], arguments)


_running: deque[tuple[Any, Any]] = deque()  # an event of CuPy's stream, and the arguments that are read until then


@contextlib.contextmanager
def _jax_device(op: str, device: int, arguments: Any) -> Iterator[None]:
    """CuPy's current stream on the device, and the arguments kept until the GPU has read them.

    JAX gives the memory of an array that nobody holds to its next computation, on a stream that does not wait for
    CuPy's. So an event marks the end of the call in CuPy's stream, and a later call lets go of what is done.
    """
    cuda = import_cupy(op).cuda
    with cuda.Device(device):
        try:
            yield
        finally:
            event = cuda.Event(disable_timing=True)
            event.record()
            _running.append((event, arguments))
            _let_go()


def _let_go() -> None:
    for _ in range(len(_running)):
        oldest = _running.popleft()
        if not oldest[0].done:
            _running.appendleft(oldest)
            return


# --- other libraries --------------------------------------------------------------------------------------------------


def _dlpack_caller(op: str, name: str, array: Any) -> Caller:
    kind, _ = array.__dlpack_device__()
    if kind != 1:  # kDLCPU
        raise TypeError(f"{op}: {name} must be in CPU memory, got DLPack device type {kind}")
    library = type(array).__module__.partition(".")[0]
    namespace = array.__array_namespace__() if hasattr(array, "__array_namespace__") else np
    return Caller(library, "cpu", np.empty, namespace.from_dlpack)


# ----------------------------------------------------------------------------------------------------------------------

NUMPY = Library(_numpy_caller, _numpy_view, _nothing, _numpy_metadata)
TORCH = Library(
    _torch_caller, _torch_view, _torch_surroundings, _torch_metadata, _known_tensor,
    Planning(_torch_seen, _torch_stream, operator.methodcaller("data_ptr"), _torch_like, _torch_workspace),
)  # fmt: skip
JAX = Library(_jax_caller, _jax_view, _jax_surroundings)
CUPY = Library(
    _cupy_caller, _itself, _cupy_surroundings, _cupy_metadata,
    planning=Planning(_cupy_seen, _cupy_stream, operator.attrgetter("data.ptr"), _cupy_like, _cupy_workspace),
)  # fmt: skip
DLPACK = Library(_dlpack_caller, np.from_dlpack, _nothing)

_LIBRARIES = (
    ("numpy", "ndarray", NUMPY),
    ("torch", "Tensor", TORCH),
    ("jax", "Array", JAX),
    ("cupy", "ndarray", CUPY),
)
