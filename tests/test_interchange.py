"""Array libraries: PyTorch and JAX on the CPU, anything with DLPack, GPUs played on the CPU, what is refused."""

from __future__ import annotations

import collections
import contextlib
import inspect
import operator
import sys
import types
from typing import TYPE_CHECKING, Any

import device_double
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from cases import DIFFERENTIABLE, Array, Case, backward, case_of, check_backward, check_forward, cotangents, forward
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import sscan
import sscan.cpu
from sscan import _arrays, _backends, _checks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OP = "selective_scan"


# --- PyTorch and JAX as lanes of the conformance suite ----------------------------------------------------------------


def to_torch(x: Array) -> torch.Tensor:
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.copy().view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x.copy())  # PyTorch knows no read-only tensors


def from_torch(x: Any) -> Array:
    assert isinstance(x, torch.Tensor)
    if x.dtype is torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def from_jax(x: Any) -> Array:
    assert isinstance(x, jax.Array)
    return np.asarray(x)


class Lane:
    """The ops of sscan, called with another library's arrays, for a suite that knows NumPy's."""

    def __init__(self, there: Callable[[Array], Any], back: Callable[[Any], Array]) -> None:
        self._there, self._back = there, back

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            given = {k: self._there(x) if isinstance(x, np.ndarray) else x for k, x in arguments.items()}
            return self._numpy(getattr(sscan, name)(**given))

        return call

    def _numpy(self, result: Any) -> Any:
        if isinstance(result, tuple):
            parts = [self._numpy(x) for x in result]
            return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
        return None if result is None else self._back(result)


@contextlib.contextmanager
def double_in_jax(wanted: bool) -> Iterator[None]:
    """JAX's default is to have no float64 at all."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", wanted)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


LANES = {"torch": Lane(to_torch, from_torch), "jax": Lane(jnp.asarray, from_jax)}
lanes = pytest.mark.parametrize("library", LANES)
SCANS = ["base", "float64", "float16", "bfloat16", "zoh everything", "complex groups, complex arrays",
         "complex bfloat16", "constant B and C", "cu_seqlens with empty sequences", "length 0", "batch 0"]  # fmt: skip
LANE_CASES = [case_of(OP, name) for name in SCANS]
LANE_CASES += [case_of(op, name) for op in ("causal_conv1d", "rms_norm") for name in ("base", "float64", "bfloat16")]
LANE_CASES += [case_of("linear_scan", name) for name in ("initial state", "complex64", "bfloat16")]
LANE_CASES += [case_of("discretize", "zoh"), case_of("ssm_kernel", "zoh"), case_of("ssm_convolution", "base")]


@pytest.mark.parametrize("case", LANE_CASES, ids=lambda case: f"{case.op}: {case.name}")
@lanes
def test_conforms(library: str, case: Case) -> None:
    """Forward and backward obey the tolerance rule, in the caller's library and dtypes."""
    with double_in_jax(case.name == "float64"):
        check_forward(LANES[library], case)
        if case.op in DIFFERENTIABLE:
            check_backward(LANES[library], case)


@pytest.mark.parametrize("name", ["base", "bfloat16", "complex", "indices"])
@pytest.mark.parametrize("strided", [False, True])
def test_torch_state_is_updated_in_place(name: str, strided: bool) -> None:
    case = case_of("selective_state_update", name)
    given = {k: to_torch(x) if isinstance(x, np.ndarray) else x for k, x in case.arguments().items()}
    if strided:
        given["state"] = given["state"].transpose(1, 2).contiguous().transpose(1, 2)
    address = given["state"].data_ptr()
    y = sscan.selective_state_update(**given)
    expected = forward(sscan, case.op, case.arguments())
    np.testing.assert_array_equal(from_torch(y), expected["y"])
    np.testing.assert_array_equal(from_torch(given["state"]), expected["state"])
    assert given["state"].data_ptr() == address


def test_torch_conv_state_is_updated_in_place() -> None:
    case = case_of("causal_conv1d_update", "base")
    given = {k: to_torch(x) if isinstance(x, np.ndarray) else x for k, x in case.arguments().items()}
    y = sscan.causal_conv1d_update(**given)
    expected = forward(sscan, case.op, case.arguments())
    np.testing.assert_array_equal(from_torch(y), expected["y"])
    np.testing.assert_array_equal(from_torch(given["conv_state"]), expected["conv_state"])


# --- Views, not copies ------------------------------------------------------------------------------------------------


class Minimal:
    """What the DLPack protocol asks for, and no more."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class WithNamespace(Minimal):
    """The same, with a library that its results go back to."""

    def __array_namespace__(self) -> Any:
        return types.SimpleNamespace(from_dlpack=torch.from_dlpack)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_viewed_where_they_lie(dtype: torch.dtype) -> None:
    """In and out, contiguous or not."""
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype)
    for x in (tensor, tensor[:, 1:], tensor.transpose(0, 2), tensor[..., ::2]):
        caller, (view,) = _arrays.enter("op", x=x)
        assert (caller.library, caller.device) == ("PyTorch", "cpu")
        assert view.ctypes.data == x.data_ptr()
        assert view.shape == tuple(x.shape)
        assert view.strides == tuple(s * x.element_size() for s in x.stride())
        np.testing.assert_array_equal(view, from_torch(x))
        result = np.ascontiguousarray(view)
        left = caller.leave(result)
        assert left.dtype is dtype
        assert left.data_ptr() == result.ctypes.data


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "complex64", "int32"])
def test_jax_arrays_are_viewed_where_they_lie(dtype: str) -> None:
    """They are read-only, and read as that; a result comes back with its dtype."""
    x = jnp.arange(24, dtype=dtype).reshape(2, 3, 4)
    caller, (view,) = _arrays.enter("op", x=x)
    assert (caller.library, caller.device) == ("JAX", "cpu")
    assert view.ctypes.data == x.unsafe_buffer_pointer()
    assert not view.flags.writeable
    left = caller.leave(view.copy())
    assert isinstance(left, jax.Array)
    assert left.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(left), view)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.complex64, np.int32])
def test_dlpack_arrays_are_viewed_where_they_lie(dtype: Any) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    for source in (array, array[:, 1:], array.transpose(), array[..., ::2]):
        caller, (view,) = _arrays.enter("op", x=Minimal(source))
        assert caller.device == "cpu"
        assert view.ctypes.data == source.ctypes.data
        assert view.strides == source.strides
        assert isinstance(caller.leave(array), np.ndarray)
    caller, (view,) = _arrays.enter("op", x=WithNamespace(array))
    left = caller.leave(array)
    assert isinstance(left, torch.Tensor)
    assert left.data_ptr() == view.ctypes.data == array.ctypes.data


def test_dlpack_arrays_are_scanned() -> None:
    arguments = case_of(OP, "base").arguments()
    expected = sscan.selective_scan(**arguments)
    for kind, result in ((Minimal, np.ndarray), (WithNamespace, torch.Tensor)):
        wrapped = {k: kind(x) if isinstance(x, np.ndarray) else x for k, x in arguments.items()}  # read-only arrays
        y = sscan.selective_scan(**wrapped)
        assert isinstance(y, result)
        np.testing.assert_array_equal(np.asarray(y), expected)


def test_torch_layouts() -> None:
    """Transposed, sliced and expanded tensors, and lazily conjugated or negated ones."""
    arguments = case_of(OP, "complex arrays").arguments()
    expected = sscan.selective_scan(**arguments)
    given = {k: to_torch(x) if isinstance(x, np.ndarray) else x for k, x in arguments.items()}
    given["u"] = given["u"].transpose(1, 2).contiguous().transpose(1, 2)
    given["delta"] = torch.stack([given["delta"], given["delta"]], dim=-1)[..., 0]
    given["B"] = given["B"].conj().clone(memory_format=torch.contiguous_format).conj()
    given["D"] = torch.complex(given["D"], -given["D"]).conj().imag
    assert given["B"].is_conj()
    assert given["D"].is_neg()
    np.testing.assert_array_equal(from_torch(sscan.selective_scan(**given)), expected)
    given["D"] = given["D"][:1].expand(20)
    assert given["D"].stride() == (0,)
    expected = sscan.selective_scan(**{**arguments, "D": np.full(20, arguments["D"][0])})
    np.testing.assert_array_equal(from_torch(sscan.selective_scan(**given)), expected)


def test_numpy_arrays_of_the_other_byte_order() -> None:
    arguments = case_of(OP, "base").arguments()
    swapped = {**arguments, "u": arguments["u"].astype(arguments["u"].dtype.newbyteorder())}
    np.testing.assert_array_equal(sscan.selective_scan(**swapped), sscan.selective_scan(**arguments))


# --- What would lose a gradient is refused ----------------------------------------------------------------------------


def torch_problem() -> dict[str, Any]:
    arguments = case_of(OP, "base").arguments()
    return {k: to_torch(x) if isinstance(x, np.ndarray) else x for k, x in arguments.items()}


@pytest.mark.parametrize("name", ["u", "A", "D"])
def test_tensor_that_requires_grad(name: str) -> None:
    given = torch_problem()
    expected = sscan.selective_scan(**given)
    given[name] = torch.nn.Parameter(given[name])
    with pytest.raises(TypeError, match=rf"^selective_scan: {name} requires grad.*use sscan\.torch"):
        sscan.selective_scan(**given)
    with torch.no_grad():
        y = sscan.selective_scan(**given)
    assert torch.equal(y, expected)
    assert not y.requires_grad
    given[name] = given[name].detach()
    assert torch.equal(sscan.selective_scan(**given), expected)


def jax_problem() -> dict[str, Any]:
    arguments = case_of(OP, "base").arguments()
    return {k: jnp.asarray(x) if isinstance(x, np.ndarray) else x for k, x in arguments.items()}


TRANSFORMATIONS: dict[str, Callable[..., Any]] = {
    "jit": jax.jit,
    "grad": lambda function: jax.grad(lambda u: function(u).sum()),
    "vmap": lambda function: lambda u: jax.vmap(function)(u[None]),
}


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_jax_tracers(transformation: str) -> None:
    given = jax_problem()
    u = given.pop("u")
    with pytest.raises(TypeError, match=r"^selective_scan: u is traced by a JAX transformation.*use sscan\.jax"):
        TRANSFORMATIONS[transformation](lambda u: sscan.selective_scan(u, **given))(u)


# --- Mixed, unknown and absent ----------------------------------------------------------------------------------------


def test_mixed_libraries() -> None:
    given = torch_problem()
    given["A"] = given["A"].numpy()
    message = (
        r"^selective_scan: all arrays must come from one library and device; "
        r"u is a PyTorch array on cpu, A is a NumPy array on cpu$"
    )
    with pytest.raises(TypeError, match=message):
        sscan.selective_scan(**given)
    given = jax_problem() | {"delta_bias": torch.zeros(20)}
    with pytest.raises(TypeError, match="u is a JAX array on cpu, delta_bias is a PyTorch array on cpu"):
        sscan.selective_scan(**given)
    given = case_of(OP, "base").arguments()
    with pytest.raises(TypeError, match="u is a NumPy array on cpu, z is a test_interchange array on cpu"):
        sscan.selective_scan(**{**given, "z": Minimal(given["z"])})


class Subclass(torch.Tensor):
    pass


def freed(x: Any) -> Any:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def fake(x: Any) -> Any:
    with FakeTensorMode() as mode:
        return mode.from_tensor(x)


REFUSED = {
    "on meta": lambda x: x.to("meta"),
    "a sparse_coo": lambda x: x.to_sparse(),
    "a quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "a nested": lambda x: torch.nested.nested_tensor(list(x)),
    "without memory: freed": freed,
    "without memory: fake": fake,
    "without memory: zero": lambda x: torch._efficientzerotensor(x.shape),
    "without memory: of a class of its own": lambda x: TwoTensor(x, x),
}


@pytest.mark.filterwarnings("ignore:.*quantiz:UserWarning")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_tensors_that_kernels_cannot_read(kind: str) -> None:
    """NumPy would give a tensor without memory some of its own, with whatever lies there."""
    given = torch_problem()
    sscan.selective_scan(**given)
    given["u"] = REFUSED[kind](given["u"])
    what = kind.partition(":")[0]
    expected = f"^selective_scan: u must be a dense tensor on cpu or cuda, got (one {what}|{what} one)"
    with pytest.raises(TypeError, match=expected):
        sscan.selective_scan(**given)


def test_a_tensor_is_viewed_as_it_lies() -> None:
    """Every dtype and layout, without a copy and writeable; and the tensor may be resized afterwards."""
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.bool, torch.uint16, torch.int64):
        whole = torch.arange(24).reshape(2, 3, 4).to(dtype)
        for tensor in (whole, whole[:, ::2, 1:].mT, whole[:, :1].expand(2, 5, 4), whole[:0], whole[1, 2, 3]):
            view = _arrays.view(tensor)
            assert np.array_equal(view.astype(complex), tensor.to(torch.complex128).numpy())
            assert view.flags.writeable
            if tensor.numel():
                assert view.ctypes.data == tensor.data_ptr()
        assert np.shares_memory(_arrays.view(whole.as_subclass(Subclass)), view)
        view.fill(1)
        assert whole[1, 2, 3] == 1
        del view
        whole.resize_(1000)


@pytest.mark.parametrize("value", [3.0, [1.0, 2.0], "u", object()], ids=["float", "list", "str", "object"])
def test_things_that_are_no_arrays(value: Any) -> None:
    given = {**case_of(OP, "base").arguments(), "delta": value}
    expected = "^selective_scan: delta must be a NumPy, CuPy, PyTorch or JAX array, or offer DLPack; got "
    with pytest.raises(TypeError, match=f"{expected}{type(value).__name__}$"):
        sscan.selective_scan(**given)


def test_dlpack_arrays_in_other_memory() -> None:
    class Elsewhere(Minimal):
        def __dlpack_device__(self) -> Any:
            return 10, 0  # kDLROCM

    with pytest.raises(TypeError, match=r"^op: x must be in CPU memory, got DLPack device type 10$"):
        _arrays.enter("op", x=Elsewhere(np.zeros(3)))


# --- GPUs, as far as they can be played on the CPU --------------------------------------------------------------------

INSTALLATION = r'pip install "sscan\[cuda13\]", or "sscan\[cuda12\]"'


class Cuda:
    """What sscan asks of ``cupy.cuda``; ``now`` says what is current."""

    def __init__(self) -> None:
        self.now = {"device": 0, "stream": 0, "allocator": "CuPy's"}
        self.runtime = types.SimpleNamespace(
            getDevice=lambda: self.now["device"], getDeviceCount=lambda: 2, CUDARuntimeError=ZeroDivisionError
        )

    def _set(self, name: str, value: Any) -> Any:
        return _Current(self.now, name, value)

    def Device(self, device: int) -> Any:
        return self._set("device", device)

    @property
    def Stream(self) -> Any:
        return types.SimpleNamespace(
            null=self._set("stream", 0), from_external=lambda stream: self._set("stream", stream.__cuda_stream__()[1])
        )

    class UnownedMemory:
        """The memory of a tensor."""

        def __init__(self, address: int, size: int, owner: torch.Tensor, device: int) -> None:
            assert (address, size) == (owner.data_ptr(), owner.nbytes)
            self.host, self.device = owner.as_subclass(torch.Tensor).numpy(), device

    def MemoryPointer(self, memory: Any, offset: int) -> Any:
        assert offset == 0
        return types.SimpleNamespace(mem=memory)

    def using_allocator(self, allocator: Any) -> Any:
        return self._set("allocator", allocator)


class _Current:
    """What is made current again and again, as CuPy's streams are."""

    def __init__(self, now: dict[str, Any], name: str, value: Any) -> None:
        self.now, self.name, self.value, self.before = now, name, value, list[Any]()

    def __enter__(self) -> None:
        self.before.append(self.now[self.name])
        self.now[self.name] = self.value

    def __exit__(self, *_: object) -> None:
        self.now[self.name] = self.before.pop()


class Kernels:
    """The kernels of sscan.cpu on the stand-in's memory; ``calls`` are what was current at each call."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.calls = cuda, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            self.calls.append((name, dict(self.cuda.now)))
            return getattr(sscan.cpu, name)(*(self._host(x) for x in arguments))

        return run

    def _host(self, x: Any) -> Any:
        if isinstance(x, _arrays.TensorView):
            x = _arrays.view(x.tensor)
        if isinstance(x, device_double.ndarray):
            return x.host
        return type(x)(*(self._host(part) for part in x)) if isinstance(x, tuple) else x


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """The stand-in for CuPy with two GPUs."""
    cuda = Cuda()
    place = property(lambda self: types.SimpleNamespace(device_id=vars(self).get("device", 0), ptr=0, mem=self.memory))
    monkeypatch.setitem(sys.modules, "cupy", device_double)
    monkeypatch.setattr(device_double, "cuda", cuda, raising=False)
    monkeypatch.setattr(device_double.ndarray, "data", place, raising=False)
    monkeypatch.setattr(_arrays, "_known", {})
    for made_of_cupy in (_arrays._torch_allocator, _arrays.external_stream):
        made_of_cupy.cache_clear()
    return cuda


@pytest.fixture
def kernels(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    kernels, package = Kernels(cuda), _backends._package
    monkeypatch.setattr(_backends, "_package", lambda kind: kernels if kind == "cuda" else package(kind))
    return kernels


def on_gpu(array: Array, device: int = 0) -> Any:
    array = device_double.ndarray(array.copy())
    array.device = device  # type: ignore[attr-defined]
    return array


GPU = Lane(on_gpu, operator.attrgetter("host"))
GPU_CASES = [*LANE_CASES, case_of(OP, "without D"), case_of(OP, "without delta_bias"), case_of(OP, "seq_idx")]
GPU_CASES += [case_of(op, "base") for op in ("selective_state_update", "causal_conv1d_update")]
GPU_CASES += [case_of("selective_state_update", name) for name in ("indices", "complex")]


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: f"{case.op}: {case.name}")
@pytest.mark.usefixtures("kernels")
def test_nothing_waits_for_the_gpu(case: Case) -> None:
    """Every op on CuPy's arrays: NumPy's results, no NumPy function on the way, and no value read by the host."""
    expected = forward(sscan, case.op, case.arguments())
    reads = device_double.reads
    given = {k: on_gpu(x) if isinstance(x, np.ndarray) else x for k, x in case.arguments().items()}
    actual = forward(sscan, case.op, given)
    gradients = {}
    if case.op in DIFFERENTIABLE:
        dy = cotangents(expected)
        gradients = backward(sscan, case.op, given, {k: on_gpu(x) for k, x in dy.items()})
        expected |= backward(sscan, case.op, case.arguments(), dy)
    assert device_double.reads == reads
    results = actual | gradients
    assert results.keys() == expected.keys()
    for name, x in results.items():
        assert isinstance(x, device_double.ndarray), name
        assert x.dtype == expected[name].dtype
        np.testing.assert_array_equal(x.host, expected[name], err_msg=name)


@pytest.mark.usefixtures("kernels")
def test_strided_state_on_a_gpu() -> None:
    """The state cannot be updated where it lies; which rows were, the host does not ask."""
    arguments = case_of("selective_state_update", "indices").arguments()
    expected = forward(sscan, "selective_state_update", arguments)
    given = {k: on_gpu(x) for k, x in arguments.items() if isinstance(x, np.ndarray)} | {"dt_softplus": True}
    assert given.keys() == arguments.keys()
    state = given["state"].host
    given["state"].host = np.ascontiguousarray(state.swapaxes(1, 2)).swapaxes(1, 2)
    given["state_batch_indices"].host = given["state_batch_indices"].host.astype(np.int16)
    reads = device_double.reads
    y = sscan.selective_state_update(**given)
    assert device_double.reads == reads
    np.testing.assert_array_equal(y.host, expected["y"])
    np.testing.assert_array_equal(given["state"].host, expected["state"])


def cupy_problem(**devices: int) -> dict[str, Any]:
    arguments = case_of(OP, "base").arguments()
    return {k: on_gpu(x, devices.get(k, 0)) if isinstance(x, np.ndarray) else x for k, x in arguments.items()}


def test_arrays_on_two_gpus(kernels: Kernels) -> None:
    with pytest.raises(TypeError, match="u is a CuPy array on cuda:0, B is a CuPy array on cuda:1"):
        sscan.selective_scan(**cupy_problem(B=1))
    with pytest.raises(TypeError, match="u is a CuPy array on cuda:0, C is a NumPy array on cpu"):
        sscan.selective_scan(**{**cupy_problem(), "C": case_of(OP, "base").arguments()["C"]})
    assert not [name for name, _ in kernels.calls if name != "segments"]


def test_the_arrays_device_is_current(kernels: Kernels, cuda: Cuda) -> None:
    """During the call, and not after it, even if it fails."""
    given = cupy_problem(**dict.fromkeys(cupy_problem(), 1))
    sscan.selective_scan(**given)
    assert [now["device"] for _, now in kernels.calls] == [1, 1]
    assert cuda.now["device"] == 0
    with pytest.raises(ValueError, match="u must have shape"):
        sscan.selective_scan(**given | {"u": given["D"]})


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda:1"))  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]


def test_mixed_devices() -> None:
    given = torch_problem()
    given["B"] = given["B"].as_subclass(OnCuda)
    with pytest.raises(TypeError, match="u is a PyTorch array on cpu, B is a PyTorch array on cuda:1"):
        sscan.selective_scan(**given)


def cuda_problem() -> dict[str, Any]:
    return {k: x.as_subclass(OnCuda) if isinstance(x, torch.Tensor) else x for k, x in torch_problem().items()}


def test_pytorch_is_followed(kernels: Kernels, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device, stream and memory are PyTorch's during the call; views and results are no copies."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=100 + device))
    seen: list[int] = []

    def view(capsule: Any) -> Any:
        array = torch.from_dlpack(capsule).numpy()
        seen.append(array.ctypes.data)
        return on_gpu_at(array)

    def on_gpu_at(array: Array) -> Any:
        made = device_double.ndarray(array)
        made.device = 1  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(device_double, "from_dlpack", view)
    made: list[torch.Tensor] = []
    empty = torch.empty

    def empty_on_gpu(shape: Any, *, dtype: torch.dtype, device: Any) -> torch.Tensor:
        assert device in ("cuda", torch.device("cuda:1"))  # the current one, for workspaces
        made.append(empty(shape, dtype=dtype).as_subclass(OnCuda))
        return made[-1]

    monkeypatch.setattr(torch, "empty", empty_on_gpu)
    given = cuda_problem()
    y = sscan.selective_scan(**given)
    assert [x is y for x in made] == [True]
    assert torch.equal(y, sscan.selective_scan(**torch_problem()))
    # the stand-in's kernels view results, of which real ones want the address
    assert seen == [x.data_ptr() for x in (*given.values(), y) if isinstance(x, torch.Tensor)]
    assert torch.equal(y, sscan.selective_scan(**given)), "not the same when the call is known"
    del kernels.calls[2:], made[1:]
    assert [(now["device"], now["stream"]) for _, now in kernels.calls] == [(1, 101), (1, 101)]
    assert cuda.now == {"device": 0, "stream": 0, "allocator": "CuPy's"}
    workspace = kernels.calls[-1][1]["allocator"](64)
    assert (len(made), made[-1].shape, made[-1].dtype) == (2, (64,), torch.uint8)
    assert workspace.mem.host.ctypes.data == made[-1].data_ptr()


@pytest.mark.parametrize("dtype", [np.float32, np.complex64, ml_dtypes.bfloat16])
def test_how_a_tensor_lies(dtype: Any) -> None:
    """What kernels ask of a tensor on a GPU is answered without an array of CuPy."""
    array = np.zeros((3, 4, 5), dtype).swapaxes(0, 1)[..., ::2]
    tensor = torch.zeros(3, 4, 5, dtype=getattr(torch, np.dtype(dtype).name)).transpose(0, 1)[..., ::2]
    view = _arrays.TensorView(tensor)
    assert (view.shape, view.strides, view.ndim) == (array.shape, array.strides, array.ndim)
    assert (view.dtype, view.itemsize, len(view)) == (array.dtype, array.itemsize, len(array))
    assert view.data.ptr == tensor.data_ptr()
    assert view.astype(array.dtype, copy=False) is view
    assert view.astype(np.complex128)[0, 1, 2] == 0  # by an array


def test_jax_arrays_are_kept_until_they_are_read(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event says when; nothing waits for it."""

    class Event:
        def __init__(self, disable_timing: bool) -> None:
            self.device, self.done = None, False
            events.append(self)

        def record(self) -> None:
            self.device = cuda.now["device"]

    def kept() -> list[Any]:
        return [arguments for _, arguments in _arrays._running]

    events: list[Any] = []
    monkeypatch.setattr(cuda, "Event", Event, raising=False)
    monkeypatch.setattr(_arrays, "_running", collections.deque())
    for arguments in ("first", "second"):
        with _arrays._jax_device("op", 1, arguments):
            assert cuda.now["device"] == 1
            assert arguments not in kept()
    assert [event.device for event in events] == [1, 1]
    assert kept() == ["first", "second"]
    events[0].done = True
    with pytest.raises(KeyError), _arrays._jax_device("op", 0, "third"):  # what was launched runs, whatever else fails
        raise KeyError
    assert kept() == ["second", "third"]
    assert cuda.now["device"] == 0


def test_gpu_arrays_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=rf"^selective_scan: arrays on a GPU need CuPy.*{INSTALLATION}"):
        sscan.selective_scan(**cuda_problem())


def test_gpu_arrays_without_a_driver_for_cupy(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.runtime, "getDeviceCount", lambda: 1 / 0)
    with pytest.raises(RuntimeError, match=r"^selective_scan: CuPy cannot use the GPU: division by zero$"):
        sscan.selective_scan(**cuda_problem())


@pytest.mark.parametrize("absent", ["numba_cuda", "cuda.core"])
@pytest.mark.usefixtures("cuda")
def test_gpu_arrays_without_the_kernels_libraries(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_is_installed", lambda library: library != absent)
    _backends._package.cache_clear()
    with pytest.raises(RuntimeError, match=rf"^selective_scan: arrays on a GPU need {absent}, .*{INSTALLATION}"):
        sscan.selective_scan(**cupy_problem())


def test_a_library_without_its_parent_is_not_installed() -> None:
    assert not _backends._is_installed("no_such_package.core")
    assert _backends._is_installed("numpy.linalg")


# --- What is remembered of a call -------------------------------------------------------------------------------------


def test_checks_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For arrays of one dtype, shape and layout; what differs in any of these is checked anew."""
    made = []
    recall = _checks.remembered(lambda op, arrays, *options: made.append(arrays) or len(made))
    x, y = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    assert recall("op", (x, None), True) == recall("op", (y, None), True) == 1
    read_only = x.copy()
    read_only.flags.writeable = False
    others = [(x, x), (x.astype(np.float64), None), (x[:, :2], None), (np.zeros((2, 6), np.float32)[:, ::2], None),
              (x.T, None), (read_only, None)]  # fmt: skip
    assert [recall("op", arrays, True) for arrays in others] == [2, 3, 4, 5, 6, 7]
    assert [recall("op", (x, None), False), recall("another", (x, None), True)] == [8, 9]
    monkeypatch.setattr(_checks, "REMEMBERED", 9)
    assert recall("op", (y, y), True) == 2
    assert recall("op", (x, x), False) == 10  # the ninth was too many: all are forgotten
    assert recall("op", (x, None), True) == 11


def test_a_failed_check_is_not_remembered() -> None:
    given = case_of(OP, "base").arguments()
    for _ in range(2):
        with pytest.raises(ValueError, match="delta must have shape"):
            sscan.selective_scan(**{**given, "delta": given["D"]})


def test_ops_keep_their_signatures() -> None:
    """The decorator that follows the caller does not show."""
    for name in set(sscan.__all__) - {"SelectiveScanGradients"}:
        op = getattr(sscan, name)
        assert op.__doc__
        assert op.__name__ == name
        assert inspect.signature(op) == inspect.signature(op.__wrapped__)


# --- Updates in place -------------------------------------------------------------------------------------------------


def update_problem(there: Callable[[Array], Any]) -> dict[str, Any]:
    arguments = case_of("selective_state_update", "base").arguments()
    return {k: there(x) if isinstance(x, np.ndarray) else x for k, x in arguments.items()}


def read_only(x: Array) -> Array:
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(("there", "library"), [(read_only, "NumPy"), (jnp.asarray, "JAX")], ids=["NumPy", "JAX"])
def test_read_only_state(there: Callable[[Array], Any], library: str) -> None:
    """JAX arrays are never written."""
    given = update_problem(there)
    before = np.array(given["state"])
    expected = (
        f"^selective_state_update: state is updated in place and must be writeable, got a read-only {library} array$"
    )
    with pytest.raises(TypeError, match=expected):
        sscan.selective_state_update(**given)
    np.testing.assert_array_equal(np.asarray(given["state"]), before)


def test_states_that_cannot_be_viewed() -> None:
    """An update of a copy would be lost."""
    given = update_problem(np.copy)
    given["state"] = given["state"].astype(given["state"].dtype.newbyteorder())
    with pytest.raises(TypeError, match=r"^selective_state_update: state .* must be in native byte order, got >f4$"):
        sscan.selective_state_update(**given)
    arguments = case_of("selective_state_update", "complex").arguments()
    given = {k: to_torch(x) if isinstance(x, np.ndarray) else x for k, x in arguments.items()}
    with pytest.raises(
        TypeError, match=r"^selective_state_update: state .* must not be a lazily conjugated or negated"
    ):
        sscan.selective_state_update(**{**given, "state": given["state"].conj()})
