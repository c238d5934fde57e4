"""Random inputs on the GPU for every op, calls on them, and the bytes that a call cannot avoid moving."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cupy
import ml_dtypes
import numpy as np
import problems

import sscan

STATE = problems.STATE
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float64": np.dtype(np.float64)}


class Normals:
    """Standard normal numbers on the GPU, from a seed."""

    def __init__(self, seed: int) -> None:
        self.state = cupy.random.RandomState(seed)

    def __call__(self, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> Any:
        x = self.state.standard_normal(shape, dtype=cupy.float32)
        if scale != 1.0:
            x *= np.float32(scale)
        return x.astype(dtype, copy=False)


def scan_problem(shape: tuple[int, int, int], dtype: str = "float32", seed: int = 0, is_complex: bool = False) -> Any:
    """``problems.scan_problem`` on the GPU; a complex A is that of S4D-Lin, -1/2 + i n, with B and C interleaved."""
    (batch, dim, length), storage, normal = shape, DTYPES[dtype], Normals(seed)
    real = np.dtype(np.float64 if dtype == "float64" else np.float32)
    small = problems.scan_problem((1, dim, 1))
    arguments: dict[str, Any] = {name: cupy.asarray(small[name].astype(real)) for name in ("A", "D", "delta_bias")}
    if is_complex:
        of_A = np.result_type(real, np.complex64)
        arguments["A"] = cupy.asarray(np.tile(-0.5 + 1j * np.arange(STATE), (dim, 1)).astype(of_A))
    of_time = (batch, STATE, 2 * length if is_complex else length)
    arguments |= {"u": normal(shape, storage), "delta": normal(shape, storage, 0.5), "z": normal(shape, storage)}
    arguments |= {"B": normal(of_time, storage), "C": normal(of_time, storage), "delta_softplus": True}
    return arguments


def cotangent(problem: dict[str, Any]) -> Any:
    """A gradient for y."""
    return Normals(1)(problem["u"].shape, problem["u"].dtype)


def on_host(values: dict[str, Any]) -> dict[str, Any]:
    return {name: x.get() if isinstance(x, cupy.ndarray) else x for name, x in values.items()}


def update_problem(batch: int, dim: int, dtype: str, seed: int = 0) -> dict[str, Any]:
    """Arguments of ``selective_state_update`` as a decoding Mamba block gives them."""
    storage, normal = DTYPES[dtype], Normals(seed)
    small = problems.scan_problem((1, dim, 1))
    A, D, dt_bias = (cupy.asarray(small[name]) for name in ("A", "D", "delta_bias"))
    waves = {name: normal((batch, dim), storage, 0.5) for name in ("x", "dt", "z")}
    matrices = {name: normal((batch, STATE), storage) for name in "BC"}
    state = normal((batch, dim, STATE), np.float32)
    return {"state": state, **waves, "A": A, **matrices, "D": D, "dt_bias": dt_bias, "dt_softplus": True}


# --- What is counted in bytes -----------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call without arguments, and the bytes of the arrays that it must read and write once each."""

    run: Callable[[], Any]
    bytes: int


def arrays_in(values: Any) -> Iterator[Any]:
    """The arrays among arguments or results, each once."""
    if isinstance(values, dict):
        values = tuple(values.values())
    for x in values if isinstance(values, tuple) else (values,):
        if hasattr(x, "nbytes"):
            yield x


def size_of(values: Any) -> int:
    return sum(int(x.nbytes) for x in arrays_in(values))


def call_of(op: str, arguments: dict[str, Any], also: int = 0) -> Call:
    """The call of an op of sscan, run once to see how large its results are."""
    function = getattr(sscan, op)
    results = size_of(function(**arguments))
    return Call(lambda: function(**arguments), size_of(arguments) + results + also)


class Op(NamedTuple):
    """A row of the table: what is called, on how many arrays; ``make(seed)`` gives (forward, backward or None)."""

    name: str
    make: Callable[[int], tuple[Call, Call | None]]


def convolution(shape: tuple[int, int, int], dtype: str, width: int = 4) -> Op:
    def make(seed: int) -> tuple[Call, Call]:
        normal, storage = Normals(seed), DTYPES[dtype]
        weights = {"weight": normal((shape[1], width), np.float32, 0.5), "bias": normal((shape[1],), np.float32)}
        arguments = {"x": normal(shape, storage), **weights, "activation": "silu"}
        dy = normal(shape, storage)
        return call_of("causal_conv1d", arguments), call_of("causal_conv1d_backward", {"dy": dy, **arguments})

    return Op(f"causal_conv1d {shape}, width {width}, silu, {dtype}", make)


def norm(shape: tuple[int, int], dtype: str, with_residual: bool) -> Op:
    def make(seed: int) -> tuple[Call, Call]:
        normal, storage = Normals(seed), DTYPES[dtype]
        arguments = {"x": normal(shape, storage), "weight": normal(shape[1:], np.float32)}
        given = {"dy": normal(shape, storage)}
        if with_residual:
            arguments["residual"] = normal(shape, np.float32)
            given["dresidual_out"] = normal(shape, np.float32)
        return call_of("rms_norm", arguments), call_of("rms_norm_backward", {**given, **arguments})

    return Op(f"rms_norm {shape}{', float32 residual' if with_residual else ''}, {dtype}", make)


def recurrence(shape: tuple[int, int], dtype: str) -> Op:
    def make(seed: int) -> tuple[Call, Call]:
        normal, storage = Normals(seed), DTYPES[dtype]
        a = (1 / (1 + cupy.exp(-normal(shape, np.float32)))).astype(storage, copy=False)  # between 0 and 1
        arguments = {"a": a, "b": normal(shape, storage)}
        h = sscan.linear_scan(**arguments)
        backward = call_of("linear_scan_backward", {"dh": normal(shape, storage), "a": a, "h": h})
        return call_of("linear_scan", arguments), backward

    return Op(f"linear_scan {shape}, {dtype}", make)


def discretization(shape: tuple[int, int, int], dtype: str) -> Op:
    def make(seed: int) -> tuple[Call, Call]:
        normal, storage = Normals(seed), DTYPES[dtype]
        batch, dim, length = shape
        A = cupy.asarray(problems.scan_problem((1, dim, 1))["A"])
        delta = (0.01 + 0.1 * cupy.abs(normal(shape, np.float32))).astype(storage, copy=False)
        arguments = {"delta": delta, "A": A, "B": normal((batch, STATE, length), storage), "method": "zoh"}
        given = {name: normal((*shape, STATE), np.float32) for name in ("dA_bar", "dB_bar")}
        return call_of("discretize", arguments), call_of("discretize_backward", {**given, **arguments})

    return Op(f"discretize zoh {(*shape, STATE)}, {dtype}", make)


def ops(dtype: str) -> list[Op]:
    """All that is compared with the copy bandwidth."""
    return [
        convolution((8, 5120, 2048), dtype),
        norm((16384, 2560), dtype, with_residual=False),
        norm((16384, 2560), dtype, with_residual=True),
        norm((16384, 5120), dtype, with_residual=True),
        recurrence((12288, 2048), dtype),
        recurrence((1, 2**24), dtype),
        discretization((8, 1536, 256), dtype),
    ]


def update_call(batch: int, dim: int, dtype: str, seed: int) -> Call:
    arguments = update_problem(batch, dim, dtype, seed)
    return call_of("selective_state_update", arguments, also=int(arguments["state"].nbytes))
