"""sscan.jax: every op under JAX's transformations, against the same op on NumPy arrays."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    _ALSO,
    _OUTPUTS,
    _UPDATED,
    CASES,
    DIFFERENTIABLE,
    Arguments,
    Array,
    Case,
    backward,
    case_of,
    conv_problem,
    conv_update_problem,
    convolution_problem,
    cotangents,
    discretize_problem,
    error_of,
    forward,
    kernel_problem,
    linear_scan_problem,
    norm_problem,
    scan_problem,
    update_problem,
)
from jax import export

import sscan
import sscan.jax
from sscan import _arrays, _backends
from sscan.jax import _frame, _handler, _shapes

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def double_precision(wanted: bool) -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", wanted)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def of_double(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.name in ("float64", "complex128", "int64")


def split(arguments: Arguments) -> tuple[dict[str, Array], dict[str, Any]]:
    """The arrays, and the other arguments."""
    arrays = {name: x for name, x in arguments.items() if isinstance(x, np.ndarray)}
    return arrays, {name: x for name, x in arguments.items() if name not in arrays}


def outputs_of(case: Case, arrays: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Results of sscan.jax by name."""
    results = getattr(sscan.jax, case.op)(**arrays, **options, **_ALSO.get(case.op, {}))
    return dict(zip(_OUTPUTS[case.op], results if isinstance(results, tuple) else (results,), strict=False))


def assert_same(found: dict[str, Any], expected: dict[str, Array]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype, name
        assert np.array_equal(np.asarray(found[name]), x), name


def conjugated(arrays: dict[str, Array]) -> dict[str, Array]:
    """Gradients in JAX's convention, or back."""
    return {name: x.conj() if x.dtype.kind == "c" else x for name, x in arrays.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}: {case.name}")
def test_values_and_gradients_are_those_of_the_core(case: Case) -> None:
    arguments = case.arguments()
    arrays, options = split(arguments)
    with double_precision(any(map(of_double, arrays.values()))):
        expected = forward(sscan, case.op, arguments)
        if case.op in _UPDATED:
            assert_same(jax.jit(lambda x: outputs_of(case, x, options))(arrays), expected)
            return
        given = cotangents(expected, 1)
        differentiable = {name: x for name, x in arrays.items() if x.dtype.kind not in "iu"}
        others = {name: x for name, x in arrays.items() if name not in differentiable}

        @jax.jit
        def values_and_gradients(differentiable: Any, given: Any) -> Any:
            values, pull_back = jax.vjp(lambda x: outputs_of(case, {**x, **others}, options), differentiable)
            return values, pull_back(given)[0]

        values, gradients = values_and_gradients(differentiable, {k[1:]: x for k, x in conjugated(given).items()})
        assert_same(values, expected)
        found = {f"d{name}": x for name, x in gradients.items()}
        expected = conjugated(backward(sscan, case.op, arguments, given))
        assert_same({name: found[name].astype(x.dtype) for name, x in expected.items()}, expected)


# --- vmap -------------------------------------------------------------------------------------------------------------

PROBLEMS = 3
EVERYTHING = "everything"
SMALL = {"batch": 2, "dim": 4, "length": 9, "state": 3, "dtype": "float64", "initial_state": True}
FULL_CONVOLUTION = {"batch": 2, "dim": 4, "length": 9, "dtype": "float64", "initial_state": True}
VMAPS: dict[str, tuple[str, Any, str]] = {
    "scan": ("selective_scan", partial(scan_problem, **SMALL), EVERYTHING),
    "scan, waves": ("selective_scan", partial(scan_problem, **SMALL), "u delta z"),
    "scan, a parameter": ("selective_scan", partial(scan_problem, **SMALL), "A"),
    "scan, constant B, zoh": (
        "selective_scan", partial(scan_problem, **SMALL, B="constant", discretization="zoh"), "B C u",
    ),
    "scan, groups": ("selective_scan", partial(scan_problem, **SMALL, B="2", C="2"), EVERYTHING),
    "scan, other groups": ("selective_scan", partial(scan_problem, **SMALL, B="2"), "u C"),
    "scan, complex": ("selective_scan", partial(scan_problem, **SMALL, is_complex=True), EVERYTHING),
    "scan, seq_idx": ("selective_scan", partial(scan_problem, **SMALL, seq_idx="int32"), "u B D"),
    "scan, each seq_idx": ("selective_scan", partial(scan_problem, **SMALL, seq_idx="int32"), "u seq_idx"),
    "scan, cu_seqlens": (
        "selective_scan", partial(scan_problem, **SMALL | {"batch": 1}, cu_seqlens=(0, 4, 9)), "u delta initial_state",
    ),
    "linear scan": ("linear_scan", partial(linear_scan_problem, dtype="float64", initial_state=True), EVERYTHING),
    "linear scan, one": ("linear_scan", partial(linear_scan_problem, dtype="float64"), "a"),
    "convolution": ("causal_conv1d", partial(conv_problem, **FULL_CONVOLUTION), EVERYTHING),
    "convolution, weight": ("causal_conv1d", partial(conv_problem, **FULL_CONVOLUTION), "weight"),
    "convolution, x": ("causal_conv1d", partial(conv_problem, **FULL_CONVOLUTION, seq_idx="int32"), "x"),
    "norm": ("rms_norm", partial(norm_problem, dtype="float64", residual="float64"), EVERYTHING),
    "norm, x": ("rms_norm", partial(norm_problem, dtype="float64", residual="float64"), "x residual"),
    "discretize": ("discretize", partial(discretize_problem, dtype="float64", dim=4, length=5), EVERYTHING),
    "discretize, lti": ("discretize", partial(discretize_problem, dtype="float64", dim=4, lti=True), "delta"),
    "kernel": ("ssm_kernel", partial(kernel_problem, dtype="float64", length=9), EVERYTHING),
    "fft": ("ssm_convolution", partial(convolution_problem, dtype="float64"), EVERYTHING),
    "fft, u": ("ssm_convolution", partial(convolution_problem, dtype="float64"), "u"),
    "step": ("selective_state_update", partial(update_problem, dtype="float64"), EVERYTHING),
    "step, state": ("selective_state_update", partial(update_problem, dtype="float64"), "state"),
    "convolution step": ("causal_conv1d_update", partial(conv_update_problem, dtype="float64"), "conv_state x"),
}  # fmt: skip


@pytest.mark.parametrize("name", VMAPS)
def test_vmap(name: str) -> None:
    """Values, gradients of each problem, and their sums where problems share an array."""
    op, build, mapped = VMAPS[name]
    case = Case(name, op, build)
    problems = [split(case.arguments(seed)) for seed in range(PROBLEMS)]
    shared, options = problems[0]
    names = set(shared) if mapped == EVERYTHING else set(mapped.split())
    axes = {n: 0 if n in names else None for n in shared}
    single = [{n: arrays[n] if n in names else x for n, x in shared.items()} for arrays, _ in problems]
    stacked = {n: np.stack([arrays[n] for arrays in single]) if n in names else x for n, x in shared.items()}
    expected = [forward(sscan, op, {**arrays, **options}) for arrays in single]

    def values(arrays: Any) -> Any:
        return outputs_of(case, arrays, options)

    def values_and_gradients(function: Any, arrays: Any, given: Any) -> Any:
        floating = {n: x for n, x in arrays.items() if x.dtype.kind != "i"}
        found, pull_back = jax.vjp(lambda x: function({**arrays, **x}), floating)
        return found, {f"d{n}": x for n, x in pull_back(given)[0].items()}

    with double_precision(True):
        several = jax.vmap(values, (axes,))
        together = {n: np.stack([x[n] for x in expected]) for n in expected[0]}
        if op in _UPDATED:
            assert_close(jax.jit(several)(stacked), together)
            return
        given = [cotangents(x, seed) for seed, x in enumerate(expected)]
        in_jax = {n[1:]: np.stack([conjugated(x)[n] for x in given]) for n in given[0]}
        gradients = [conjugated(backward(sscan, op, {**x, **options}, g)) for x, g in zip(single, given, strict=True)]
        each = {n: np.stack([g[n] for g in gradients]) for n in gradients[0]}
        summed = {n: g if n[1:] in names else g.sum(0) for n, g in each.items()}
        found, found_gradients = jax.jit(jax.vmap(partial(values_and_gradients, values), (axes, 0)))(stacked, in_jax)
        assert_close(found, together)
        assert_close(found_gradients, each)
        found, found_gradients = jax.jit(partial(values_and_gradients, several))(stacked, in_jax)
        assert_close(found, together)
        assert_close(found_gradients, summed)


def assert_close(found: dict[str, Any], expected: dict[str, Array]) -> None:
    """To the rounding of sums in another order, in double precision."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert error_of(np.asarray(found[name]), x) < 1e-13, name


@pytest.mark.parametrize("op", dict.fromkeys(case.op for case in CASES))
def test_vmap_over_an_empty_axis(op: str) -> None:
    """Every result and gradient has the axis too."""
    case = next(case for case in CASES if case.op == op)
    arrays, options = split(case.arguments())
    expected = forward(sscan, op, {**arrays, **options})
    none = {name: np.zeros((0, *x.shape), x.dtype) for name, x in arrays.items()}
    with double_precision(any(map(of_double, arrays.values()))):
        for transformed in (jax.vmap, lambda function: jax.jit(jax.vmap(function))):
            found = transformed(lambda arrays: outputs_of(case, arrays, options))(none)
            assert_same(found, {name: np.zeros((0, *x.shape), x.dtype) for name, x in expected.items()})
        if op not in _UPDATED:
            floating = {name: x for name, x in none.items() if x.dtype.kind != "i"}
            rest = {name: x for name, x in arrays.items() if name not in floating}
            loss = loss_of(lambda arrays: outputs_of(case, {**arrays, **rest}, options))
            assert_same(jax.vmap(jax.grad(loss))(floating), floating)


# --- other transformations --------------------------------------------------------------------------------------------


def scan_case(**changes: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    return split(Case("transformed", "selective_scan", partial(scan_problem, **changes)).arguments())


def loss_of(function: Any) -> Any:
    """The sum of squares of all results, as a function of the arrays."""
    return lambda *arrays: sum(jnp.sum(jnp.abs(x) ** 2) for x in jax.tree.leaves(function(*arrays)))


def test_value_and_grad_and_checkpoint() -> None:
    arrays, options = scan_case(initial_state=True)
    loss = loss_of(partial(scanned, options))
    value, gradients = jax.value_and_grad(loss)(arrays)  # not compiled as a whole
    again, recomputed = jax.jit(jax.value_and_grad(jax.checkpoint(loss)))(arrays)
    assert float(value) == pytest.approx(float(again), rel=1e-6)
    assert_same(recomputed, {name: np.asarray(x) for name, x in gradients.items()})


def scanned(options: dict[str, Any], arrays: dict[str, Any]) -> Any:
    return sscan.jax.selective_scan(**arrays, **options, return_last_state=True)


def test_options_of_numpy() -> None:
    arrays, options = split(case_of("ssm_kernel", "zoh").arguments())
    found = sscan.jax.ssm_kernel(**arrays, **options | {"length": np.int64(options["length"])})
    assert np.array_equal(found, sscan.ssm_kernel(**arrays, **options))


def test_chunks_in_lax_scan() -> None:
    """The state carried through a loop, values and gradients."""
    arrays, options = scan_case(dtype="float64", length=60, initial_state=True)
    waves = ("u", "delta", "z", "B", "C")

    def in_chunks(arrays: Any) -> Any:
        parameters = {name: x for name, x in arrays.items() if name not in (*waves, "initial_state")}
        chunks = {name: jnp.stack(jnp.split(arrays[name], 3, -1)) for name in waves}

        def step(state: Any, chunk: Any) -> Any:
            y, state = scanned(options, {**parameters, **chunk, "initial_state": state})
            return state, y

        state, y = jax.lax.scan(step, arrays["initial_state"], chunks)
        return jnp.concatenate(list(y), -1), state

    with double_precision(True):
        expected = jax.jit(jax.value_and_grad(loss_of(partial(scanned, options))))(arrays)
        found = jax.jit(jax.value_and_grad(loss_of(in_chunks)))(arrays)
        assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-13)
        assert_close(found[1], {name: np.asarray(x) for name, x in expected[1].items()})


def test_decoding_in_lax_scan() -> None:
    """One step after the other is the scan; the state is updated where it lies."""
    arrays, options = scan_case(dtype="float64", length=10, initial_state=True)

    def decode(arrays: Any) -> Any:
        def step(state: Any, t: Any) -> Any:
            y, state = sscan.jax.selective_state_update(
                state, t["u"], t["delta"], arrays["A"], t["B"], t["C"], arrays["D"], t["z"], arrays["delta_bias"], True
            )
            return state, y

        steps = {name: jnp.moveaxis(arrays[name], -1, 0) for name in ("u", "delta", "z", "B", "C")}
        state, y = jax.lax.scan(step, arrays["initial_state"], steps)
        return {"y": jnp.moveaxis(y, 0, -1), "last_state": state}

    with double_precision(True):
        assert_close(jax.jit(decode)(arrays), forward(sscan, "selective_scan", {**arrays, **options}))


def test_only_custom_calls_and_no_copies() -> None:
    """At the natural layout nothing is done to the arrays before, between and after the calls."""
    arrays, options = scan_case()

    def results_and_gradients(arrays: Any, given: Any) -> Any:
        y, pull_back = jax.vjp(lambda x: sscan.jax.selective_scan(**x, **options), arrays)
        return y, pull_back(given)

    for function, given, calls in (
        (lambda arrays: sscan.jax.selective_scan(**arrays, **options), (arrays,), 1),
        (results_and_gradients, (arrays, arrays["u"]), 2),
    ):
        text = jax.jit(function).lower(*given).compile().as_text()
        made = re.findall(r"^ +(?:ROOT )?%\S+ = .*? ([a-z-]+)\(", text, re.MULTILINE)
        assert made.count("custom-call") == calls
        assert set(made) <= {"parameter", "custom-call", "get-tuple-element", "tuple"}


def test_state_is_updated_in_donated_memory() -> None:
    arguments = case_of("selective_state_update", "base").arguments()
    state, arrays, options = jnp.array(arguments["state"]), *split(arguments)
    del arrays["state"]
    step = jax.jit(lambda state, arrays: sscan.jax.selective_state_update(state, **arrays, **options), donate_argnums=0)
    address = state.unsafe_buffer_pointer()
    _, updated = step(state, arrays)
    assert updated.unsafe_buffer_pointer() == address
    assert_same({"state": updated}, {"state": forward(sscan, "selective_state_update", arguments)["state"]})


@pytest.mark.parametrize("op", [op for op in DIFFERENTIABLE if op != "ssm_kernel"])  # has workspaces as its gradients
def test_results_are_made_in_the_memory_of_xla(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels write there themselves: nothing is copied."""
    found = []

    def watched(*arrays: Any) -> bool:
        found.append(_is_at(*arrays))
        return found[-1]

    _is_at = _handler._is_at
    monkeypatch.setattr(_handler, "_is_at", watched)
    arrays, options = split(next(case for case in CASES if case.op == op).arguments())
    call = partial(getattr(sscan.jax, op), **options, **_ALSO.get(op, {}))
    jax.block_until_ready(jax.grad(loss_of(lambda x: call(**x)))(arrays))
    assert len(found) > 2
    assert all(found)


ENDING = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
import sscan.jax

u = np.random.default_rng(0).standard_normal((2, 64, 20000)).astype(np.float32)
A, B = -np.ones((64, 16), np.float32), np.ones((2, 16, 20000), np.float32)
scan = jax.jit(lambda u: sscan.jax.selective_scan(u, abs(u), A, B, B))
before = np.asarray(scan(u))
"""


@pytest.mark.parametrize(
    "end",
    [
        "results = [scan(u + i) for i in range(8)]",
        "for i in range(8): scan(u + i)",  # which nobody waits for
        "import atexit; atexit.register(lambda: print((scan(u) == before).all()))",
    ],
    ids=["kept", "dropped", "at exit"],
)  # fmt: skip
def test_a_process_ends_with_calls_in_flight(end: str) -> None:
    run = subprocess.run([sys.executable, "-c", ENDING + end], capture_output=True, text=True, check=False, timeout=200)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert run.stdout.split() == (["True"] if "atexit" in end else [])


def test_calls_after_the_end_are_refused() -> None:
    """By an atexit handler that was registered before JAX's own."""
    late = """
import atexit

def late():
    try:
        print(scan(u)[0, 0, 0])
    except Exception as error:
        print(error)

atexit.register(late)
"""
    command = [sys.executable, "-c", late + ENDING]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert "sscan.jax: Python is ending" in run.stdout, run.stdout + run.stderr


def test_threads_share_a_compiled_function() -> None:
    arrays, options = scan_case(length=200)
    compiled = jax.jit(partial(scanned, options))
    expected = [np.asarray(x) for x in compiled(arrays)]
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: compiled(arrays), range(40)):
            assert all(map(np.array_equal, found, expected))


def test_on_four_devices() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", Path(__file__).with_name("jax_devices.py")],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout


# --- the handler for GPUs, without one --------------------------------------------------------------------------------


class Current:
    """A device or stream that counts how often it is the current one."""

    def __init__(self, name: Any, entered: list[Any]) -> None:
        self.name, self.entered = name, entered

    def __enter__(self) -> None:
        self.entered.append(self.name)

    def __exit__(self, *_: Any) -> None:
        self.entered.remove(self.name)


def test_gpu_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA's device and stream are the current ones, its memory is not copied; the kernels are those of the CPU here."""
    entered: list[Any] = []
    during: list[Any] = []
    cuda = SimpleNamespace(
        runtime=SimpleNamespace(
            getDeviceCount=lambda: 2,
            getDevice=lambda: next(iter(entered), 0),
            pointerGetAttributes=lambda _: SimpleNamespace(device=1),
        ),
        get_current_stream=lambda: SimpleNamespace(ptr=entered[-1]),
        Device=lambda number: Current(number, entered),
        UnownedMemory=lambda address, size, owner, device: (address, size, device),
        MemoryPointer=lambda memory, offset: memory,
    )

    def ndarray(shape: Any, dtype: Any, memory: Any) -> Array:
        address, _, device = memory
        assert device == 1
        return _handler._view(_handler.Memory(_frame.Region(address, np.dtype(dtype), shape), "cpu"))

    def kernels(op: str, device: str) -> Any:
        during.append((op, device, list(entered)))
        return _backends._package("cpu")

    arrays, options = scan_case(dim=13)
    compiled = jax.jit(partial(scanned, options)).lower(arrays).compile()
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, ndarray=ndarray, empty=np.empty))
    monkeypatch.setattr(_frame, "stream", lambda frame: 77)
    monkeypatch.setattr(_arrays, "external_stream", lambda handle: Current(handle, entered))
    monkeypatch.setattr(_backends, "for_device", kernels)
    monkeypatch.setitem(_handler.EXECUTE, "cpu", _handler.EXECUTE["CUDA"])
    found = dict(zip(("y", "last_state"), compiled(arrays), strict=True))
    assert_same(found, forward(sscan, "selective_scan", {**arrays, **options}))
    assert during[0] == ("selective_scan", "cuda:1", [1, 77])
    assert entered == []


def test_a_request_that_xla_refuses_is_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no CUDA stream on the CPU."""
    arrays, options = scan_case(dim=13)
    compiled = jax.jit(partial(scanned, options)).lower(arrays).compile()
    monkeypatch.setitem(_handler.EXECUTE, "cpu", _frame.stream)
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.block_until_ready(compiled(arrays))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": np.zeros((2, 20, 69), np.float32)}, ValueError, r"^selective_scan: delta must have shape .*, got"),
        ({"u": np.zeros((2, 20, 70), np.int32)}, TypeError, r"^selective_scan: u must have dtype .* got int32"),
        ({"z": np.zeros((2, 20, 70), np.float16)}, TypeError, r"^selective_scan: z must have the dtype of u"),
        ({"discretization": "euler"}, ValueError, r'^selective_scan: discretization must be "mamba" or "zoh"'),
        ({"seq_idx": np.zeros((2, 70), np.float32)}, TypeError, r"^selective_scan: seq_idx must be integers"),
        ({"A": "a"}, TypeError, r"'A'"),
    ],
)
def test_bad_input_fails_while_it_is_traced(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arrays, options = scan_case()
    with pytest.raises(error, match=message):
        sscan.jax.selective_scan(**arrays | options | change)
    if "A" not in change:
        arrays, options = split(arrays | options | change)
        with pytest.raises(error, match=message):
            jax.jit(partial(scanned, options)).trace(arrays)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x, option: sscan.jax.selective_scan(x, x, x[0], x, x, delta_softplus=option), "delta_softplus"),
        (lambda x, option: sscan.jax.linear_scan(x, x, reverse=option), "reverse"),
        (lambda x, option: sscan.jax.rms_norm(x, x[0, 0], eps=option), "eps"),
        (lambda x, option: sscan.jax.causal_conv1d(x, x[0], activation=option), "activation"),
        (lambda x, option: sscan.jax.ssm_kernel(x[0, :, 0], x[0], x[0], x[0], option), "length"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_traced_options_are_refused(call: Any, name: str) -> None:
    x = np.ones((2, 4, 4), np.float32)
    for given, run in ((jnp.asarray(1), call), (1, jax.jit(call)), (np.array([1]), call), ([1], call)):
        with pytest.raises(TypeError, match=rf"^\w+: {name} must be known while JAX traces, got"):
            run(x, given)


@pytest.mark.parametrize("backward", [False, True])
def test_symbolic_shapes_are_refused(backward: bool) -> None:
    (rows,) = export.symbolic_shape("rows")
    norm = partial(sscan.jax.rms_norm, weight=np.ones(5, np.float32))
    function = jax.grad(loss_of(norm)) if backward else norm
    with pytest.raises(
        ValueError, match=r"^rms_norm: x must have a shape of numbers, got the symbolic one \(rows, 5\)"
    ):
        export.export(jax.jit(function))(jax.ShapeDtypeStruct((rows, 5), np.float32))


def test_bad_values_are_an_error_of_jax() -> None:
    arrays, options = scan_case(batch=1, cu_seqlens=(0, 30, 69))
    with pytest.raises(jax.errors.JaxRuntimeError, match="selective_scan: cu_seqlens must rise from 0 to length = 70"):
        jax.block_until_ready(jax.jit(partial(scanned, options))(arrays))


@pytest.mark.parametrize("error", [MemoryError("no more"), KeyboardInterrupt()])
def test_any_exception_is_an_error_of_jax(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    arrays, options = scan_case(dim=3)
    compiled = jax.jit(partial(scanned, options)).lower(arrays).compile()
    monkeypatch.setattr(sscan, "selective_scan", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match=type(error).__name__):
        jax.block_until_ready(compiled(arrays))


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
def test_other_platforms_are_refused(platform: str) -> None:
    arrays, options = scan_case()
    traced = jax.jit(partial(scanned, options)).trace(arrays)
    with pytest.raises(NotImplementedError, match=f"selective_scan runs on the platforms cpu and cuda, got {platform}"):
        traced.lower(lowering_platforms=(platform,))
    text = traced.lower(lowering_platforms=("cpu", "cuda")).as_text()
    assert text.count("@sscan.selective_scan") == 1


def test_second_derivatives_are_refused() -> None:
    arrays, options = scan_case()
    loss = loss_of(partial(scanned, options))
    with pytest.raises(NotImplementedError, match="selective_scan has no second derivative"):
        jax.grad(loss_of(jax.grad(loss)))(arrays)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (arrays,), (arrays,))
    step, options = split(case_of("selective_state_update", "base").arguments())
    with pytest.raises(NotImplementedError, match="selective_state_update has no derivative"):
        jax.grad(loss_of(lambda x: sscan.jax.selective_state_update(**x, **options)))(step)


def test_checkpoints_of_other_kernels_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was traced on a machine with a GPU runs on its CPU too."""
    arrays, options = scan_case(dim=19)
    expected = forward(sscan, "selective_scan", {**arrays, **options})
    given = cotangents(expected)
    monkeypatch.setattr(_shapes, "platform", lambda: "cuda")
    compiled = jax.jit(lambda *x: jax.vjp(partial(scanned, options), x[0])[1](x[1])[0])
    traced = compiled.lower(arrays, tuple(given.values())).compile()
    assert "f32[10,19,8]" in traced.as_text()  # what the GPU's kernels save
    found = traced(arrays, tuple(given.values()))
    assert_same({f"d{n}": x for n, x in found.items()}, backward(sscan, "selective_scan", {**arrays, **options}, given))
