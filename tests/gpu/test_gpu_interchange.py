"""CuPy, PyTorch and JAX arrays on a GPU: where memory lies, on which stream work is done, what waits for what."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import cupy
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from cases import DIFFERENTIABLE, Array, Case, case_of, check_backward, check_forward
from test_interchange import LANE_CASES, OP, Lane, double_in_jax, from_torch, to_torch

import sscan
from sscan import _arrays

if TYPE_CHECKING:
    from collections.abc import Callable

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
EVERYTHING = {"return_last_state": True}


def to_jax(x: Array) -> Any:
    return jax.device_put(x, jax.devices("gpu")[0])


def from_jax(x: Any) -> Array:
    assert isinstance(x, jax.Array)
    assert {device.platform for device in x.devices()} == {"gpu"}
    return np.asarray(x)


def from_cuda_tensor(x: Any) -> Array:
    assert x.is_cuda
    return from_torch(x.cpu())


def from_cupy(x: Any) -> Array:
    assert type(x) is cupy.ndarray
    return x.get()


THERE = {"cupy": cupy.asarray, "torch": lambda x: to_torch(x).cuda(), "jax": to_jax}
BACK = {"cupy": from_cupy, "torch": from_cuda_tensor, "jax": from_jax}
LANES = {library: Lane(THERE[library], BACK[library]) for library in THERE}
libraries = pytest.mark.parametrize("library", THERE)


def given(library: str, case: Case) -> dict[str, Any]:
    return {k: THERE[library](x) if isinstance(x, np.ndarray) else x for k, x in case.arguments().items()}


def scanned(library: str, name: str = "base") -> Array:
    return BACK[library](sscan.selective_scan(**given(library, case_of(OP, name))))


@pytest.mark.parametrize("case", LANE_CASES, ids=lambda case: f"{case.op}: {case.name}")
@libraries
def test_conforms(library: str, case: Case) -> None:
    """Forward and backward obey the tolerance rule, in the caller's library and dtypes."""
    with double_in_jax(case.name == "float64"):
        check_forward(LANES[library], case)
        if case.op in DIFFERENTIABLE:
            check_backward(LANES[library], case)


# --- Memory -----------------------------------------------------------------------------------------------------------


@_arrays.follows_caller
def entered(x: Any) -> tuple[Any, Any, Any]:
    """The view of x as the ops see it, a result made for its caller, and the same given back."""
    caller, (view,) = _arrays.enter("entered", x=x)
    result = caller.empty((2, 3), view.dtype)
    result.fill(7)
    return view, result, caller.leave(result)


TORCH_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_tensors_are_viewed_where_they_lie(dtype: torch.dtype) -> None:
    """In and out, contiguous or not."""
    tensor = torch.arange(24, device="cuda").reshape(2, 3, 4).to(dtype)
    for x in (tensor, tensor[:, 1:], tensor.transpose(0, 2), tensor[..., ::2]):
        view, result, left = entered(x)
        assert type(view) is cupy.ndarray
        assert view.data.ptr == x.data_ptr()
        assert view.shape == tuple(x.shape)
        assert view.strides == tuple(s * x.element_size() for s in x.stride())
        np.testing.assert_array_equal(view.get(), from_cuda_tensor(x))
        assert (left.dtype, left.device, tuple(left.shape)) == (x.dtype, x.device, (2, 3))
        assert left.data_ptr() == result.data.ptr
        assert (left == 7).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "complex64", "int32"])
def test_jax_arrays_are_viewed_where_they_lie(dtype: str) -> None:
    x = to_jax(np.arange(24).reshape(2, 3, 4).astype(jnp.dtype(dtype)))
    view, result, left = entered(x)
    assert type(view) is cupy.ndarray
    assert view.data.ptr == x.unsafe_buffer_pointer()
    np.testing.assert_array_equal(view.get(), np.asarray(x))
    assert left.dtype == x.dtype
    assert left.devices() == x.devices()
    assert left.unsafe_buffer_pointer() == result.data.ptr
    assert (np.asarray(left) == 7).all()


def test_cupy_arrays_are_taken_as_they_are() -> None:
    x = cupy.zeros((3, 4), BFLOAT16)[:, ::2]
    view, result, left = entered(x)
    assert view is x
    assert left is result


@pytest.mark.parametrize("how", ["conj", "neg"])
def test_lazy_tensors(how: str) -> None:
    x = torch.complex(torch.ones(4), torch.arange(4.0)).cuda().conj()
    x = x if how == "conj" else x.imag
    assert x.is_conj() or x.is_neg()
    np.testing.assert_array_equal(entered(x)[0].get(), x.cpu().resolve_conj().resolve_neg().numpy())


def test_results_are_in_pytorchs_memory() -> None:
    """And go back to it; CuPy's pool is not used, for workspace neither."""
    arguments = given("torch", case_of(OP, "initial state"))
    sscan.selective_scan(**arguments)
    pool, before = cupy.get_default_memory_pool(), torch.cuda.memory_allocated()
    used, total = pool.used_bytes(), pool.total_bytes()
    y = sscan.selective_scan(**arguments)
    taken = torch.cuda.memory_allocated() - before
    assert taken >= y.numel() * y.element_size()
    assert (pool.used_bytes(), pool.total_bytes()) == (used, total)
    del y
    assert torch.cuda.memory_allocated() == before


# --- Streams ----------------------------------------------------------------------------------------------------------

SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""
CYCLES = 400_000_000  # a fifth of a second


def test_cupys_stream_is_used_and_not_waited_for() -> None:
    """The input becomes right late in the stream; on another stream NaN would be read."""
    expected, arguments = scanned("cupy"), given("cupy", case_of(OP, "base"))
    spin, right = cupy.RawKernel(SPIN, "spin"), arguments["u"].copy()
    stream = cupy.cuda.Stream(non_blocking=True)  # which does not wait for the copies just made
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        arguments["u"].fill(np.nan)
        sscan.selective_scan(**arguments)  # memory for this stream
        spin((1,), (1,), (np.int64(CYCLES),))
        arguments["u"][...] = right
        y = sscan.selective_scan(**arguments)
        assert not stream.done
        np.testing.assert_array_equal(y.get(), expected)


def test_pytorchs_stream_is_used_and_not_waited_for() -> None:
    expected, arguments = scanned("torch"), given("torch", case_of(OP, "base"))
    right, stream = arguments["u"].clone(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        arguments["u"].fill_(torch.nan)
        sscan.selective_scan(**arguments)
        torch.cuda._sleep(CYCLES)
        arguments["u"].copy_(right)
        y = sscan.selective_scan(**arguments)
        assert not stream.query()
        np.testing.assert_array_equal(from_cuda_tensor(y), expected)
    assert cupy.cuda.get_current_stream().ptr == 0


def test_backward_and_update_do_not_wait() -> None:
    """They never ask for a value on the GPU, packed sequences and slots included."""
    packed, step = case_of(OP, "cu_seqlens"), case_of("selective_state_update", "indices")
    scan, update = given("torch", packed), given("torch", step)
    dy, stream = torch.randn_like(scan["u"]), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        sscan.selective_scan_backward(dy, **scan)
        sscan.selective_state_update(**update)
        torch.cuda._sleep(CYCLES)
        sscan.selective_scan_backward(dy, **scan)
        sscan.selective_state_update(**update)
        assert not stream.query()
    stream.synchronize()


def test_jax_is_waited_for_on_the_gpu() -> None:
    """Inputs that JAX is still computing, and computations of JAX on the result."""

    @jax.jit
    def late(u: Any) -> Any:
        square = jnp.ones((4096, 4096), jnp.float32) / 4096
        return u + 0 * jax.lax.fori_loop(0, 100, lambda _, x: x @ square, square)[0, 0]

    expected, arguments = scanned("jax"), given("jax", case_of(OP, "base"))
    late(arguments["u"]).block_until_ready()
    u = late(arguments["u"])
    y = sscan.selective_scan(**{**arguments, "u": u}) * 2
    np.testing.assert_array_equal(np.asarray(y), 2 * expected)


def test_jax_does_not_reuse_what_is_still_read() -> None:
    """Temporary inputs, whose memory JAX would fill with NaN on its own stream."""
    expected, arguments = scanned("jax"), given("jax", case_of(OP, "base"))
    spin, results = cupy.RawKernel(SPIN, "spin"), []
    for _ in range(20):
        spin((1,), (1,), (np.int64(CYCLES // 100),))
        results.append(
            sscan.selective_scan(**{k: x + 0 if isinstance(x, jax.Array) else x for k, x in arguments.items()})
        )
        for x in arguments.values():
            if isinstance(x, jax.Array):
                jnp.full(x.shape, jnp.nan, x.dtype).block_until_ready()
    for y in results:
        np.testing.assert_array_equal(np.asarray(y), expected)


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def test_capture_with_cupy() -> None:
    arguments = given("cupy", case_of(OP, "initial state"))
    first, second = arguments["u"].copy(), arguments["u"] * 2
    expected = [sscan.selective_scan(**{**arguments, "u": u}).get() for u in (first, second)]
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        sscan.selective_scan(**arguments, **EVERYTHING)  # warm: memory for this stream
        stream.begin_capture()
        y, _ = sscan.selective_scan(**arguments, **EVERYTHING)
        graph = stream.end_capture()
        for u, y_expected in zip((first, second), expected, strict=True):
            arguments["u"][...] = u
            graph.launch(stream)
            np.testing.assert_array_equal(y.get(), y_expected)


def test_capture_with_pytorch() -> None:
    arguments = given("torch", case_of(OP, "initial state"))
    first, second = arguments["u"].clone(), arguments["u"] * 2
    expected = [sscan.selective_scan(**{**arguments, "u": u}) for u in (first, second)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = sscan.selective_scan(**arguments, **EVERYTHING)
    for u, y_expected in zip((first, second), expected, strict=True):
        arguments["u"].copy_(u)
        graph.replay()
        assert torch.equal(y, y_expected)


# --- Threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_two_threads(library: str) -> None:
    """Each on a stream of its own, with other arrays, of another kind."""
    names, failures = ("base", "bfloat16", "complex"), []
    expected = {name: scanned(library, name) for name in names}

    def work(turn: int) -> None:
        try:
            stream = cupy.cuda.Stream(non_blocking=True) if library == "cupy" else torch.cuda.Stream()
            with stream if library == "cupy" else torch.cuda.stream(stream):
                for i in range(30):
                    name = names[(i + turn) % len(names)]
                    np.testing.assert_array_equal(scanned(library, name), expected[name])
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


# --- What is refused --------------------------------------------------------------------------------------------------


def test_host_and_gpu_do_not_mix() -> None:
    on_gpu = given("torch", case_of(OP, "base"))
    with pytest.raises(TypeError, match="u is a PyTorch array on cuda:0, C is a PyTorch array on cpu"):
        sscan.selective_scan(**{**on_gpu, "C": on_gpu["C"].cpu()})
    with pytest.raises(TypeError, match="u is a PyTorch array on cpu, B is a PyTorch array on cuda:0"):
        sscan.selective_scan(**{k: x.cpu() if k != "B" and torch.is_tensor(x) else x for k, x in on_gpu.items()})


@pytest.mark.parametrize(("library", "other"), [("cupy", "torch"), ("torch", "jax"), ("jax", "cupy")])
def test_libraries_do_not_mix(library: str, other: str) -> None:
    label = {"cupy": "CuPy", "torch": "PyTorch", "jax": "JAX"}
    case = case_of(OP, "base")
    mixed = {**given(library, case), "C": given(other, case)["C"]}
    expected = f"u is a {label[library]} array on cuda:0, C is a {label[other]} array on cuda:0"
    with pytest.raises(TypeError, match=expected):
        sscan.selective_scan(**mixed)


def test_tensor_that_requires_grad() -> None:
    arguments = given("torch", case_of(OP, "base"))
    arguments["A"].requires_grad_()
    with pytest.raises(TypeError, match=r"A requires grad.*use sscan\.torch"):
        sscan.selective_scan(**arguments)
    with torch.no_grad():
        np.testing.assert_array_equal(from_cuda_tensor(sscan.selective_scan(**arguments)), scanned("torch"))


@pytest.mark.parametrize("op", ["selective_state_update", "causal_conv1d_update"])
def test_jax_arrays_are_not_written(op: str) -> None:
    arguments = given("jax", case_of(op, "base"))
    name = "state" if op == "selective_state_update" else "conv_state"
    before = np.asarray(arguments[name])
    with pytest.raises(TypeError, match=f"{name} is updated in place and must be writeable, got a read-only JAX array"):
        getattr(sscan, op)(**arguments)
    np.testing.assert_array_equal(np.asarray(arguments[name]), before)


# --- Updates in place -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "bfloat16", "complex", "indices"])
@pytest.mark.parametrize("layout", ["as it is", "transposed", "every second", "rows of a larger one"])
@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_state_is_updated_in_place(library: str, layout: str, name: str) -> None:
    case = case_of("selective_state_update", name)
    arguments = given(library, case)
    state, empty = arguments["state"], cupy.empty if library == "cupy" else torch.empty
    options = {"dtype": state.dtype} | ({"device": "cuda"} if library == "torch" else {})
    rows, dim, count = state.shape
    if layout != "as it is":
        made = {
            "transposed": lambda: empty((rows, count, dim), **options).swapaxes(1, 2),
            "every second": lambda: empty((rows, dim, 2 * count), **options)[..., ::2],
            "rows of a larger one": lambda: empty((2 * rows, dim + 1, count), **options)[1::2, 1:],
        }[layout]()
        made[...] = state
        state = arguments["state"] = made
    y = sscan.selective_state_update(**arguments)
    expected = updated(case, library)
    np.testing.assert_array_equal(BACK[library](y), expected["y"])
    np.testing.assert_array_equal(BACK[library](state), expected["state"])


STATES = {"selective_state_update": "state", "causal_conv1d_update": "conv_state"}


def updated(case: Case, library: str) -> dict[str, Array]:
    """What an update of contiguous arrays gives, after it has passed the tolerance rule."""
    arguments, state = given(library, case), STATES[case.op]
    y = BACK[library](getattr(sscan, case.op)(**arguments))
    results = {"y": y, state: BACK[library](arguments[state])}

    def update(**on_host: Any) -> Array:
        on_host[state][...] = results[state]
        return y

    check_forward(SimpleNamespace(**{case.op: update}), case)
    return results


@pytest.mark.parametrize("name", ["base", "bfloat16"])
@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_conv_state_is_updated_in_place(library: str, name: str) -> None:
    case = case_of("causal_conv1d_update", name)
    arguments = given(library, case)
    wide = arguments["conv_state"].repeat(2, -1) if library == "cupy" else arguments["conv_state"].repeat(1, 1, 2)
    arguments["conv_state"] = wide[..., : wide.shape[-1] // 2] if library == "torch" else wide[..., ::2]
    y = sscan.causal_conv1d_update(**arguments)
    expected = updated(case, library)
    np.testing.assert_array_equal(BACK[library](y), expected["y"])
    np.testing.assert_array_equal(BACK[library](arguments["conv_state"]), expected["conv_state"])


# --- More than one GPU, where there is --------------------------------------------------------------------------------

if cupy.cuda.runtime.getDeviceCount() > 1:

    def second(x: Array) -> Any:
        with cupy.cuda.Device(1):
            return cupy.asarray(x)

    SECOND: dict[str, Callable[[Array], Any]] = {
        "cupy": second,
        "torch": lambda x: to_torch(x).to("cuda:1"),
        "jax": lambda x: jax.device_put(x, jax.devices("gpu")[1]),
    }

    @libraries
    def test_arrays_on_another_than_the_current_gpu(library: str) -> None:
        check_forward(Lane(SECOND[library], BACK[library]), case_of(OP, "base"))
        assert cupy.cuda.runtime.getDevice() == 0

    @libraries
    def test_arrays_on_two_gpus(library: str) -> None:
        arguments = given(library, case_of(OP, "base"))
        arguments["B"] = SECOND[library](BACK[library](arguments["B"]))
        with pytest.raises(TypeError, match=r"on cuda:0, B is a .* array on cuda:1"):
            sscan.selective_scan(**arguments)
