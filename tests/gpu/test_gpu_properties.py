"""The properties of test_selective_scan.py on a GPU, and those that only a GPU has: streams, graphs, its memory."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np
import pytest
import test_selective_scan
from cases import Array, case_of, cotangents, eps_of, error_of
from test_gpu_conformance import gpu, to_gpu
from test_selective_scan import problem_of

import sscan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OP = "selective_scan"
KINDS = pytest.mark.parametrize("kind", ["float32", "bfloat16 zoh", "float32 complex", "float64"])
SHAPES = pytest.mark.parametrize(
    "sizes", [{"batch": 3, "dim": 70, "length": 150}, {"batch": 1, "length": 1000}], ids=str
)

# The tests that ask a CPU lane for the same bits along another path. Kernels for other alignments and lengths are other
# machine code on a GPU, whose compiler may contract other products and sums: there a few eps are allowed.
CLOSE = (
    "test_split_and_carry_is_the_whole",
    "test_lengths_around_chunks",
    "test_seq_idx_is_separate_runs",
    "test_cu_seqlens_is_separate_runs",
    "test_ignored_tokens_can_be_deleted",
    "test_large_delta_resets_under_mamba_where_B_is_zero",
    "test_interleaved_is_complex_arrays",
    "test_groups",
    "test_groups_are_separate_systems",
)
AS_THEY_ARE = (
    "test_causality",
    "test_checkpoints_change_no_bit",
    "test_linear_in_u_B_and_C",
    "test_zero_delta_leaves_the_state_alone",
    "test_large_delta_resets_under_zoh",
    "test_refinement",
    "test_theorem_1",
    "test_lti_scan_is_convolution",
    "test_small_delta_keeps_its_digits_in_float32",
    "test_gradients_where_delta_is_zero",
    "test_a_million_extreme_steps",
    "test_finite_for_all_finite_inputs",
    "test_complex_state_is_a_rotation_with_decay",
    "test_complex_without_imaginary_parts_is_real_with_halved_C",
    "test_constant_is_broadcast_varying",
    "test_adjoint_identity",
    "test_gradients_are_derivatives",
    "test_absent_inputs_have_no_gradient",
    "test_errors",
    "test_errors_of_packed_states",
    "test_errors_of_backward",
)
globals().update({name: getattr(test_selective_scan, name) for name in CLOSE + AS_THEY_ARE})


def assert_close(x: Array, y: Array, what: str = "") -> None:
    assert (x.dtype, x.shape) == (y.dtype, y.shape), what
    wide = y.astype(np.result_type(y.dtype, np.complex128)) if y.dtype.kind == "c" else y.astype(np.float64)
    error = error_of(x, wide)
    assert error <= 8 * eps_of(x.dtype), f"{what}: {error / eps_of(x.dtype):.1f} eps"


@pytest.fixture(scope="module", autouse=True)
def on_gpu() -> Iterator[None]:
    """The tests of that file call ``sscan``; here that is the GPU lane."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_selective_scan, "sscan", gpu)
        yield


@pytest.fixture(autouse=True)
def with_its_tolerance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.function.__name__ in CLOSE:
        monkeypatch.setattr(test_selective_scan, "assert_identical", assert_close)
        monkeypatch.setattr(test_selective_scan, "NEAR", 8)  # as assert_close


# --- Bits -------------------------------------------------------------------------------------------------------------


def given(kind: str, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A problem with an initial state on the GPU, and gradients of both its results."""
    problem = problem_of(kind, **{"initial_state": True, **changes})
    weights = cotangents(test_selective_scan.scan(problem))
    return on_device(problem), on_device(weights)


def on_device(values: dict[str, Any]) -> dict[str, Any]:
    return {name: to_gpu(x) if isinstance(x, np.ndarray) else x for name, x in values.items()}


def everything(problem: dict[str, Any], weights: dict[str, Any]) -> list[Any]:
    """y, the last state and all gradients, on the GPU."""
    y, last_state, checkpoints = sscan.selective_scan_forward(**problem)
    gradients = sscan.selective_scan_backward(**weights, **problem, checkpoints=checkpoints)
    return [y, last_state, *(g for g in gradients if g is not None)]


def bits(arrays: list[Any]) -> list[bytes]:
    return [x.get().tobytes() for x in arrays]


@KINDS
@SHAPES
def test_runs_are_identical(kind: str, sizes: dict[str, int]) -> None:
    """Also where time is split, and in memory that is not fresh."""
    problem, weights = given(kind, **sizes)
    expected = bits(everything(problem, weights))
    for _ in range(5):
        assert bits(everything(problem, weights)) == expected


@KINDS
@SHAPES
def test_no_input_is_written_and_every_output_is(kind: str, sizes: dict[str, int]) -> None:
    problem, weights = given(kind, **sizes)
    inputs = [x for x in (problem | weights).values() if isinstance(x, cupy.ndarray)]
    before, expected = bits(inputs), bits(everything(problem, weights))

    def poisoned(size: int) -> Any:
        memory = pool.malloc(size)
        memory.memset_async(0xFF, size)
        return memory

    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(poisoned):
        assert bits(everything(problem, weights)) == expected
    assert bits(inputs) == before


@KINDS
@pytest.mark.parametrize("t", [1, 127, 128, 640, 999])
def test_causality_where_time_is_split(kind: str, t: int) -> None:
    """Bit for bit: the number of parts depends on the length, never on values."""
    problem, weights = given(kind, batch=1, length=1000)
    late = dict(problem)
    for name in test_selective_scan.TIMED:
        if problem[name].ndim > 2:
            late[name] = cupy.concatenate([problem[name][..., :t], -problem[name][..., t:]], axis=-1)
    y, changed = sscan.selective_scan(**problem), sscan.selective_scan(**late)
    assert bits([y[..., :t].copy()]) == bits([changed[..., :t].copy()])
    other = {**weights, "dy": cupy.concatenate([-weights["dy"][..., :t], weights["dy"][..., t:]], axis=-1)}
    first, second = (sscan.selective_scan_backward(**w, **problem) for w in (weights, other))
    for name in ("du", "ddelta", "dz"):
        a, b = (getattr(g, name)[..., t:].copy() for g in (first, second))
        assert bits([a]) == bits([b]), name


@KINDS
@pytest.mark.parametrize("k", [1, 128, 499, 1000, 1999])
def test_split_anywhere_where_time_is_split(kind: str, k: int) -> None:
    """The whole, cut into parts by the library, is the two pieces that the caller cuts, and so are its gradients."""
    length = 2000
    problem = problem_of(kind, batch=1, length=length, initial_state=True)
    scan, gradients = test_selective_scan.scan, test_selective_scan.gradients
    first, second = (test_selective_scan.at(problem, s) for s in (slice(0, k), slice(k, None)))
    whole, before = scan(problem), scan(first)
    second["initial_state"] = before["last_state"]
    after = scan(second)
    assert_close(np.concatenate([before["y"], after["y"]], axis=-1), whole["y"])
    assert_close(after["last_state"], whole["last_state"])
    weights = cotangents(whole)
    late = gradients(second, {"dy": weights["dy"][..., k:], "dlast_state": weights["dlast_state"]})
    early = gradients(first, {"dy": weights["dy"][..., :k], "dlast_state": late["dinitial_state"]})
    for name, expected in gradients(problem, weights).items():
        if name == "dinitial_state":
            joined = early[name]
        elif expected.ndim > 2 and expected.shape[-1] in (length, 2 * length):
            joined = np.concatenate([early[name], late[name]], axis=-1)
        else:
            joined = early[name] + late[name]
        wide = np.complex128 if expected.dtype.kind == "c" else np.float64
        assert error_of(joined, expected.astype(wide)) <= 40 * eps_of(expected.dtype), name


# --- Streams and graphs -----------------------------------------------------------------------------------------------


@KINDS
@SHAPES
def test_other_streams_give_the_same_bits(kind: str, sizes: dict[str, int]) -> None:
    problem, weights = given(kind, **sizes)
    expected = bits(everything(problem, weights))
    cupy.cuda.Device().synchronize()
    streams = [cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream()]
    results = []
    for stream in streams:
        with stream:
            results.append(everything(problem, weights))
    for stream, result in zip(streams, results, strict=True):
        with stream:
            assert bits(result) == expected


def check_graph(run: Callable[[], list[Any]], inputs: dict[str, Any]) -> None:
    """A captured run, replayed on other values in the same memory, gives the bits of an eager one on them."""
    original = {name: x.copy() for name, x in inputs.items()}
    changed = {name: -x for name, x in original.items()}

    def fill(values: dict[str, Any]) -> None:
        for name, x in values.items():
            inputs[name][...] = x

    expected = []
    for values in (changed, original):
        fill(values)
        expected.append(bits(run()))
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        run()  # warm: memory for this stream
        stream.begin_capture()
        results = run()
        graph = stream.end_capture()
        for _ in range(2):
            for values, wanted in zip((changed, original), expected, strict=True):
                fill(values)
                graph.launch(stream)
                assert bits(results) == wanted


@KINDS
@SHAPES
def test_graphs_of_forward_and_backward(kind: str, sizes: dict[str, int]) -> None:
    problem, weights = given(kind, **sizes)
    check_graph(lambda: everything(problem, weights), {"u": problem["u"], "dy": weights["dy"]})


@pytest.mark.parametrize("name", ["cu_seqlens", "seq_idx bfloat16", "state 256", "constant B and C"])
def test_graphs_of_other_options(name: str) -> None:
    arguments = case_of(OP, name).arguments()
    problem = on_device(arguments)
    weights = on_device(cotangents(test_selective_scan.scan(arguments)))
    check_graph(lambda: everything(problem, weights), {"u": problem["u"], "dy": weights["dy"]})


@pytest.mark.parametrize(
    ("op", "case", "name", "cotangents"),
    [
        ("causal_conv1d", "base", "x", ("dy",)),
        ("rms_norm", "base", "x", ("dy",)),
        ("discretize", "zoh", "B", ("dA_bar", "dB_bar")),
    ],
    ids=["causal_conv1d", "rms_norm", "discretize"],
)
def test_graphs_of_other_ops(op: str, case: str, name: str, cotangents: tuple[str, ...]) -> None:
    arguments = on_device(case_of(op, case).arguments())

    def results() -> tuple[Any, ...]:
        made = getattr(sscan, op)(**arguments)
        return made if isinstance(made, tuple) else (made,)

    given = {key: x + 1 for key, x in zip(cotangents, results(), strict=True)}

    def run() -> list[Any]:
        gradients = getattr(sscan, f"{op}_backward")(**given, **arguments)
        return [*results(), *(g for g in gradients if g is not None)]

    check_graph(run, {name: arguments[name]})


def test_graph_of_linear_scan() -> None:
    arguments = on_device(case_of("linear_scan", "base").arguments())

    def run() -> list[Any]:
        h = sscan.linear_scan(**arguments)
        return [h, *(g for g in sscan.linear_scan_backward(h, arguments["a"], h) if g is not None)]

    check_graph(run, {"b": arguments["b"]})


def test_graph_of_a_decoding_step() -> None:
    """A graph that is replayed moves the state on, as the same number of calls does."""
    case = case_of("selective_state_update", "bfloat16")
    arguments, graphed = on_device(case.arguments()), on_device(case.arguments())
    eager = [sscan.selective_state_update(**arguments).get().tobytes() for _ in range(4)]
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        state = graphed["state"].copy()
        sscan.selective_state_update(**graphed)  # warm
        graphed["state"][...] = state
        stream.begin_capture()
        y = sscan.selective_state_update(**graphed)
        graph = stream.end_capture()
        for expected in eager:
            graph.launch(stream)
            assert y.get().tobytes() == expected
        assert graphed["state"].get().tobytes() == arguments["state"].get().tobytes()


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d", "rms_norm", "linear_scan", "discretize"])
def test_host_and_gpu_do_not_mix(op: str) -> None:
    arguments = case_of(op, "zoh" if op == "discretize" else "base").arguments()
    first, second = [name for name, x in arguments.items() if isinstance(x, np.ndarray)][:2]
    mixed = {**on_device(arguments), second: arguments[second]}
    expected = f"{op}: .*{first} is a CuPy array on cuda:0, {second} is a NumPy array on cpu"
    with pytest.raises(TypeError, match=expected):
        getattr(sscan, op)(**mixed)


def test_out_of_memory_passes_through_and_harms_nothing() -> None:
    """18 TB for y, from inputs with strides of 0."""
    problem, weights = given("float32")
    expected = bits(everything(problem, weights))
    batch, dim, length = 2**12, 2**18, 2**12
    wave = cupy.broadcast_to(cupy.ones((1, 1, length), np.float32), (batch, dim, length))
    B = cupy.broadcast_to(cupy.ones((1, 1, length), np.float32), (batch, 1, length))
    A = -cupy.ones((dim, 1), np.float32)
    for call in (sscan.selective_scan, sscan.selective_scan_forward):
        with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
            call(wave, wave, A, B, B)
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
        sscan.selective_scan_backward(wave, wave, wave, A, B, B)
    assert bits(everything(problem, weights)) == expected


# --- Compiled kernels -------------------------------------------------------------------------------------------------

ASSEMBLED = """
import hashlib
from sscan.cuda import _launch
kernel = _launch.Kernel("rms_norm", "forward", ("float32", "", 160, 4, 4))
cubin, log = _launch.assemble(_launch.compile_ptx(kernel)[0], (9, 0))
assert " bytes spill stores" in log, log
print(hashlib.sha256(cubin).hexdigest())
"""


def test_a_kernel_that_another_process_assembled_before_is_the_same() -> None:
    """The assembler has a cache of its own on machines with a driver."""
    runs = [subprocess.run([sys.executable, "-c", ASSEMBLED], check=True, stdout=subprocess.PIPE) for _ in range(3)]
    assert len({run.stdout for run in runs}) == 1
