"""The conformance suite: named problems for every op, the one tolerance rule, and one way to call forward and backward.

A lane (CPU kernels, CUDA, PyTorch, ...) is any namespace with the ops' functions, taking and giving NumPy arrays::

    @pytest.mark.parametrize("case", cases_of("selective_scan"), ids=str)
    def test_conforms(case):
        check_forward(sscan, case)
        check_backward(sscan, case)

Problems come from a seed and are small. Kernels are specialised by accumulation dtype, complex or real, rule and
constant B or C, so the lists change one thing at a time instead of taking products, and float64 is rare.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from sscan import reference

if TYPE_CHECKING:
    from collections.abc import Callable

Array = np.ndarray[Any, Any]
Arguments = dict[str, Any]
Generator = np.random.Generator

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
LENGTHS = (0, 1, 2, 31, 32, 33, 63, 64, 65, 500)


@dataclass(frozen=True)
class Case:
    """One problem: ``arguments()`` are the keyword arguments of ``op`` as read-only NumPy arrays."""

    name: str
    op: str
    build: Callable[[Generator], Arguments]
    state_gradient: bool = True  # whether check_backward also sends a gradient to the second output

    def __str__(self) -> str:
        return self.name

    def arguments(self, seed: int = 0) -> Arguments:
        arguments = self.build(np.random.default_rng([zlib.crc32(f"{self.op} {self.name}".encode()), seed]))
        for value in arguments.values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
        return arguments


# --- Tolerance --------------------------------------------------------------------------------------------------------


def eps_of(dtype: Any) -> float:
    """Machine epsilon of a real or complex dtype, bfloat16 included."""
    dtype = np.dtype(dtype)
    return float(ml_dtypes.finfo(dtype).eps if dtype == DTYPES["bfloat16"] else np.finfo(dtype).eps)


def upcast(arguments: Arguments) -> Arguments:
    """The same stored values in float64 (complex128), or in long double if they are float64 already.

    Long double is what gives float64 lanes an error to be compared with (on platforms where it is only a double, that
    error is zero and float64 lanes get 4 eps).
    """
    return {name: _upcast_array(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}


def _upcast_array(x: Array) -> Array:
    if x.dtype.kind in "biu":
        return x
    wide = np.float64 if x.dtype.itemsize // (2 if x.dtype.kind == "c" else 1) < 8 else np.longdouble
    return x.astype(np.result_type(wide, np.complex64) if x.dtype.kind == "c" else wide)


def error_of(x: Array, exact: Array) -> float:
    """max|x - exact| / max(1, max|exact|), in exact's precision; 0 for empty arrays, nan if x is not finite."""
    if x.shape != exact.shape:
        raise AssertionError(f"shape {x.shape}, expected {exact.shape}")
    if x.size == 0:
        return 0.0
    difference = np.abs(x.astype(exact.dtype) - exact).max() if np.isfinite(x).all() else np.nan
    return float(difference / max(1, np.abs(exact).max()))


def assert_within(
    actual: Array, reference_same_precision: Array, reference64: Array, eps: float, what: str = ""
) -> None:
    """The tolerance rule: at most 3 times the error of the plain reference in the same dtypes, plus 4 eps."""
    error = error_of(actual, reference64)
    bound = 3 * error_of(reference_same_precision, reference64) + 4 * eps
    assert error <= bound, f"{what}: error {error:.3g} exceeds {bound:.3g} ({(error / eps):.1f} eps)"


# --- One way to call every op -----------------------------------------------------------------------------------------

_OUTPUTS = {
    "selective_scan": ("y", "last_state"),
    "selective_state_update": ("y", "state"),
    "discretize": ("A_bar", "B_bar"),
    "linear_scan": ("h",),
    "causal_conv1d": ("y", "final_state"),
    "causal_conv1d_update": ("y", "conv_state"),
    "rms_norm": ("y", "residual_out"),
    "ssm_kernel": ("K",),
    "ssm_convolution": ("y",),
}
_ALSO = {"selective_scan": {"return_last_state": True}, "causal_conv1d": {"return_final_state": True}}
_UPDATED = {"selective_state_update": "state", "causal_conv1d_update": "conv_state"}
DIFFERENTIABLE = tuple(op for op in _OUTPUTS if op not in _UPDATED)


def forward(library: Any, op: str, arguments: Arguments) -> dict[str, Array]:
    """All outputs by name, the updated state of an update op (which works on a copy here) included."""
    arguments = {**arguments, **_ALSO.get(op, {})}
    updated = _UPDATED.get(op)
    if updated:
        arguments[updated] = arguments[updated].copy()
    result = getattr(library, op)(**arguments)
    outputs = result if isinstance(result, tuple) else (result,)
    if updated:
        outputs = (*outputs, arguments[updated])
    return dict(zip(_OUTPUTS[op], outputs, strict=False))


def backward(library: Any, op: str, arguments: Arguments, cotangents: dict[str, Array]) -> dict[str, Array]:
    """All gradients by name (du, dA, ...), without those that are None; ``cotangents`` are dy, dlast_state, ..."""
    if op == "linear_scan":
        arguments = {**arguments, "h": forward(library, op, arguments)["h"]}
        del arguments["b"]
    gradients = getattr(library, f"{op}_backward")(**cotangents, **arguments)
    return {name: g for name, g in gradients._asdict().items() if g is not None}


def cotangents(outputs: dict[str, Array], seed: int = 0, state_gradient: bool = True) -> dict[str, Array]:
    """Random gradients of the outputs, in their dtypes, named d<output>; without that of the second if not wanted."""
    rng = np.random.default_rng(seed)
    names = list(outputs) if state_gradient else list(outputs)[:1]
    return {f"d{name}": normal(rng, outputs[name].shape, outputs[name].dtype) for name in names}


def check_forward(library: Any, case: Case, seed: int = 0) -> None:
    """The tolerance rule on every output, whose shapes and dtypes must be the reference's."""
    arguments = case.arguments(seed)
    _check(
        forward(library, case.op, arguments),
        forward(reference, case.op, arguments),
        forward(reference, case.op, upcast(arguments)),
        case,
    )


def check_backward(library: Any, case: Case, seed: int = 0) -> None:
    """The tolerance rule on every gradient, whose shapes and dtypes must be the reference's."""
    arguments = case.arguments(seed)
    given = cotangents(forward(reference, case.op, arguments), seed + 1, case.state_gradient)
    _check(
        backward(library, case.op, arguments, given),
        backward(reference, case.op, arguments, given),
        backward(reference, case.op, upcast(arguments), upcast(given)),
        case,
    )


def _check(actual: dict[str, Array], same: dict[str, Array], exact: dict[str, Array], case: Case) -> None:
    assert list(actual) == list(same)
    for name, x in actual.items():
        what = f"{case.op} {case.name}: {name}"
        assert x.dtype == same[name].dtype, f"{what}: dtype {x.dtype}, expected {same[name].dtype}"
        assert_within(np.asarray(x), same[name], exact[name], eps_of(x.dtype), what)


# --- Random arrays ----------------------------------------------------------------------------------------------------


def normal(rng: Generator, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> Array:
    """Standard normal numbers (complex ones for a complex dtype), rounded to ``dtype``."""
    x = rng.standard_normal(shape)
    if np.dtype(dtype).kind == "c":
        x = x + 1j * rng.standard_normal(shape)
    return np.asarray(scale * x).astype(dtype)


def with_layout(x: Array, layout: str) -> Array:
    """The same values in memory that is not C-contiguous."""
    if layout == "strided":
        wide = np.repeat(x, 2, axis=-1)
        return wide[..., ::2]
    if layout == "reversed":
        return np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    if layout == "transposed":
        return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2) if x.ndim > 1 else x
    if layout == "offset":  # one element into a buffer: aligned to the element only
        padded = np.concatenate([x.ravel()[:1], x.ravel()])
        return padded[1:].reshape(x.shape)
    if layout == "broadcast":  # stride 0 along the first axis
        return np.broadcast_to(x[:1], x.shape)
    if layout == "shared":  # stride 0 along the second axis of three
        return np.broadcast_to(x[:, :1], x.shape) if x.ndim == 3 else x
    if layout == "channels first":
        return np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1) if x.ndim > 1 else x
    raise ValueError(layout)


def accumulation_of(dtype: np.dtype[Any], is_complex: bool = False) -> np.dtype[Any]:
    return np.result_type(np.float32, dtype, *([np.complex64] if is_complex else []))


def _A(rng: Generator, dim: int, state: int, dtype: np.dtype[Any], scale: float = 1.0) -> Array:
    """S4D-Real, -(n + 1), or S4D-Lin, -1/2 + i n, each a little different per channel."""
    n = np.arange(state)
    A = -0.5 + 1j * n if dtype.kind == "c" else -(n + 1.0)
    return (scale * A * rng.uniform(0.7, 1.0, (dim, 1))).astype(dtype)


def _matrix(
    rng: Generator, form: str, sizes: tuple[int, int, int, int], storage: np.dtype[Any], of_A: np.dtype[Any]
) -> Array:
    """B or C; form is constant, shared, or a number of groups, and ends in " complex" for complex arrays."""
    batch, dim, length, state = sizes
    kind = form.removesuffix(" complex")
    if kind == "constant":
        return normal(rng, (dim, state), of_A)
    shape = (batch, state, length) if kind == "shared" else (batch, int(kind), state, length)
    if of_A.kind != "c":
        return normal(rng, shape, storage)
    return normal(rng, shape, of_A) if form != kind else normal(rng, (*shape[:-1], 2 * length), storage)


# --- selective_scan ---------------------------------------------------------------------------------------------------


def _step_sizes(rng: Generator, kind: str, shape: tuple[int, ...]) -> Array:
    """Step sizes before bias and softplus."""
    if kind == "usual":
        return rng.normal(0, 0.7, shape)
    if kind == "positive":  # for use without softplus
        return rng.uniform(0.01, 0.5, shape)
    extremes = {"huge": (0.1, 1e4), "zero": (0.1, 0.0), "tiny": (1e-3, 1e-9), "all zero": (0.0, 0.0)}
    if kind in extremes:
        return rng.choice(extremes[kind], shape)
    if kind == "saturating":  # softplus(100) = 100, softplus(-100) = 4e-44
        return rng.choice([-100.0, -20.0, 0.0, 100.0], shape)
    raise ValueError(kind)


def scan_problem(
    rng: Generator,
    *,
    batch: int = 2,
    dim: int = 20,
    length: int = 70,
    state: int = 8,
    dtype: str = "float32",
    is_complex: bool = False,
    B: str = "shared",
    C: str = "shared",
    A_scale: float = 1.0,
    delta: str = "usual",
    D: bool = True,
    z: bool = True,
    delta_bias: bool = True,
    delta_softplus: bool = True,
    initial_state: bool = False,
    seq_idx: str | None = None,
    cu_seqlens: tuple[int, ...] | None = None,
    discretization: str = "mamba",
    layout: str | None = None,
    but: tuple[str, ...] = (),
) -> Arguments:
    """Keyword arguments of selective_scan; those named in ``but`` do not have the layout."""
    storage = DTYPES[dtype]
    real, of_A = accumulation_of(storage), accumulation_of(storage, is_complex)
    sizes, shape = (batch, dim, length, state), (batch, dim, length)
    arguments: Arguments = {
        "u": normal(rng, shape, storage),
        "delta": _step_sizes(rng, delta, shape).astype(storage),
        "A": _A(rng, dim, state, of_A, A_scale),
        "B": _matrix(rng, B, sizes, storage, of_A),
        "C": _matrix(rng, C, sizes, storage, of_A),
        "delta_softplus": delta_softplus,
        "discretization": discretization,
    }
    if D:
        arguments["D"] = normal(rng, (dim,), real)
    if z:
        arguments["z"] = normal(rng, shape, storage)
    if delta_bias:
        low, high = (-4.0, 0.0) if delta_softplus else (0.0, 0.5)  # step sizes of 0.02 to 0.7
        arguments["delta_bias"] = rng.uniform(low, high, dim).astype(real)
    if initial_state:
        sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
        arguments["initial_state"] = normal(rng, (sequences, dim, state), of_A)
    if layout:
        arrays = {k: x for k, x in arguments.items() if isinstance(x, np.ndarray) and k not in but}
        arguments |= {k: with_layout(x, layout) for k, x in arrays.items()}
    if seq_idx:
        arguments["seq_idx"] = sequence_numbers(batch, length, seq_idx)
    if cu_seqlens:
        arguments["cu_seqlens"] = np.array(cu_seqlens, np.int32)
    return arguments


def sequence_numbers(batch: int, length: int, dtype: str) -> Array:
    """Other borders in every row: adjacent ones, one at the last step, a number used twice, none at all in row 1."""
    numbers = np.zeros((batch, length), dtype)
    for row in range(batch):
        if row != 1:
            for value, border in (
                (1, length // 7 + row),
                (2, length // 7 + row + 1),
                (0, length // 2),
                (-1, length - 1),
            ):
                numbers[row, border:] = value
    return numbers


_RAW = {"delta": "positive", "delta_bias": False, "delta_softplus": False}
_PACKED = {"batch": 1, "initial_state": True}

SCANS: dict[str, dict[str, Any]] = {
    "base": {},
    # options absent and present
    "without D": {"D": False},
    "without z": {"z": False},
    "without delta_bias": {"delta_bias": False},
    "without softplus": {"delta": "positive", "delta_bias": False, "delta_softplus": False},
    "bias without softplus": {"delta": "positive", "delta_softplus": False},
    "bare": {**_RAW, "D": False, "z": False},
    "initial state": {"initial_state": True},
    # dtypes
    "float64": {"dtype": "float64", "initial_state": True},
    "float16": {"dtype": "float16", "initial_state": True},
    "bfloat16": {"dtype": "bfloat16", "initial_state": True},
    # sizes
    **{f"length {length}": {"length": length, "dim": 5, "initial_state": True} for length in LENGTHS},
    **{f"length {length} bfloat16": {"length": length, "dim": 17, "dtype": "bfloat16"} for length in (0, 1, 33)},
    **{f"length {length} float16": {"length": length, "dim": 17, "dtype": "float16"} for length in (1, 65)},
    **{f"state {n}": {"state": n, "length": 33, "A_scale": min(1, 16 / n)} for n in (1, 4, 16, 17, 64, 256)},
    **{f"dim {dim}": {"dim": dim, "length": 33} for dim in (1, 5, 16, 17, 40)},
    "batch 0": {"batch": 0, "initial_state": True},
    "batch 1": {"batch": 1},
    "batch 5": {"batch": 5, "length": 33},
    # forms of B and C
    "groups 1": {"B": "1", "C": "1"},
    "groups 2": {"B": "2", "C": "2"},
    "groups 2, 17 states": {"B": "2", "C": "2", "dim": 34, "state": 17, "length": 33},
    "groups dim": {"B": "20", "C": "20", "length": 33},
    "groups differ": {"B": "2", "C": "shared"},
    "groups bfloat16": {"B": "2", "C": "2", "dtype": "bfloat16"},
    "constant B": {"B": "constant"},
    "constant C": {"C": "constant"},
    "constant B and C": {"B": "constant", "C": "constant"},
    "constant B, groups in C": {"B": "constant", "C": "2", "dim": 34},
    "constant B and C float16": {"B": "constant", "C": "constant", "dtype": "float16"},
    "constant B and C, length 0": {"B": "constant", "C": "constant", "length": 0, "initial_state": True},
    # packed sequences
    "seq_idx": {"seq_idx": "int32"},
    "seq_idx int64, initial state": {"seq_idx": "int64", "initial_state": True, "length": 131},
    "seq_idx bfloat16": {"seq_idx": "int32", "dtype": "bfloat16", "initial_state": True},
    "seq_idx constant B": {"seq_idx": "int32", "B": "constant", "initial_state": True},
    "cu_seqlens": {"batch": 1, "cu_seqlens": (0, 13, 45, 70)},
    "cu_seqlens with empty sequences": {**_PACKED, "cu_seqlens": (0, 0, 13, 13, 14, 45, 70, 70)},
    "cu_seqlens one sequence": {**_PACKED, "cu_seqlens": (0, 70)},
    "cu_seqlens only empty": {**_PACKED, "length": 0, "cu_seqlens": (0, 0, 0)},
    "cu_seqlens groups": {**_PACKED, "B": "2", "C": "2", "cu_seqlens": (0, 1, 33, 70)},
    # the zoh rule
    "zoh": {"discretization": "zoh"},
    "zoh everything": {"discretization": "zoh", "initial_state": True, "seq_idx": "int32", "B": "2", "C": "2"},
    "zoh bfloat16": {"discretization": "zoh", "dtype": "bfloat16"},
    "zoh constant B and C": {"discretization": "zoh", "B": "constant", "C": "constant"},
    "zoh bare": {**_RAW, "discretization": "zoh", "D": False, "z": False, "state": 17},
    "zoh tiny delta": {**_RAW, "discretization": "zoh", "delta": "tiny"},
    "zoh zero delta": {**_RAW, "discretization": "zoh", "delta": "zero", "initial_state": True},
    "zoh huge delta": {**_RAW, "discretization": "zoh", "delta": "huge", "initial_state": True},
    "zoh saturating softplus": {"discretization": "zoh", "delta": "saturating"},
    "zoh A to -256": {"discretization": "zoh", "state": 16, "A_scale": 16.0},
    # complex A
    "complex": {"is_complex": True},
    "complex arrays": {"is_complex": True, "B": "shared complex", "C": "shared complex"},
    "complex mixed forms": {"is_complex": True, "B": "shared complex", "C": "2"},
    "complex groups": {"is_complex": True, "B": "2", "C": "2", "initial_state": True},
    "complex groups, complex arrays": {"is_complex": True, "B": "2 complex", "C": "2 complex"},
    "complex constant B": {"is_complex": True, "B": "constant"},
    "complex constant C": {"is_complex": True, "C": "constant"},
    "complex constant B and C": {"is_complex": True, "B": "constant", "C": "constant"},
    "complex bare": {**_RAW, "is_complex": True, "D": False, "z": False},
    "complex seq_idx": {"is_complex": True, "seq_idx": "int32", "initial_state": True},
    "complex cu_seqlens": {**_PACKED, "is_complex": True, "cu_seqlens": (0, 13, 13, 45, 70)},
    "complex float64": {"is_complex": True, "dtype": "float64", "length": 33},
    "complex bfloat16": {"is_complex": True, "dtype": "bfloat16"},
    "complex float16": {"is_complex": True, "dtype": "float16"},
    **{f"complex state {n}": {"is_complex": True, "state": n, "length": 33} for n in (1, 17)},
    **{f"complex length {n}": {"is_complex": True, "length": n, "initial_state": True} for n in (0, 1, 65)},
    "complex zoh": {"is_complex": True, "discretization": "zoh", "initial_state": True},
    "complex zoh tiny delta": {**_RAW, "is_complex": True, "discretization": "zoh", "delta": "tiny"},
    "complex zoh constant B": {"is_complex": True, "discretization": "zoh", "B": "constant"},
    # memory layouts
    **{
        f"{layout} memory": {"layout": layout}
        for layout in ("strided", "reversed", "transposed", "offset", "broadcast", "shared", "channels first")
    },
    # On a GPU transposed memory is read as it lies: by fours or one by one, in blocks of 8, 16 or 32 channels.
    "transposed memory bfloat16": {"layout": "transposed", "dtype": "bfloat16", "initial_state": True},
    "transposed memory float64": {"layout": "transposed", "dtype": "float64", "length": 33, "state": 4},
    "transposed memory 21 channels": {"layout": "transposed", "dim": 21, "dtype": "float16", "state": 3},
    "transposed memory 40 channels": {"layout": "transposed", "dim": 40, "seq_idx": "int32"},
    "transposed memory 40 states": {"layout": "transposed", "state": 40, "dim": 34, "length": 33, "A_scale": 0.4},
    "transposed memory groups": {"layout": "transposed", "B": "5", "C": "5", "dtype": "bfloat16"},
    "transposed memory groups of 12": {"layout": "transposed", "B": "2", "C": "2", "dim": 24},
    "transposed memory but B": {"layout": "transposed", "but": ("B",)},
    "transposed memory but delta and C": {"layout": "transposed", "but": ("delta", "C"), "initial_state": True},
    "transposed memory but u": {"layout": "transposed", "but": ("u",)},
    "transposed memory cu_seqlens": {**_PACKED, "layout": "transposed", "cu_seqlens": (0, 13, 13, 45, 70)},
    "shared memory bfloat16": {"layout": "shared", "dtype": "bfloat16", "length": 64, "but": ("u", "B", "C")},
    "groups of 8": {"B": "4", "C": "4", "dim": 32, "length": 64, "state": 16, "initial_state": True},
    "groups of 16": {"B": "2", "C": "2", "dim": 32, "length": 64, "dtype": "bfloat16", "seq_idx": "int32"},
    "groups of 3": {"B": "7", "C": "shared", "dim": 21, "state": 17, "length": 33},
    "strided memory bfloat16": {"layout": "strided", "dtype": "bfloat16", "initial_state": True},
    "transposed memory complex": {"layout": "transposed", "is_complex": True, "B": "shared complex", "C": "2"},
    "strided memory constant B and C": {"layout": "strided", "B": "constant", "C": "constant"},
    # extreme values
    "huge delta": {**_RAW, "delta": "huge", "initial_state": True},
    "zero delta": {**_RAW, "delta": "zero", "initial_state": True},
    "all zero delta": {**_RAW, "delta": "all zero", "initial_state": True},
    "saturating softplus": {"delta": "saturating", "initial_state": True},
    "A to -256": {"state": 16, "A_scale": 16.0, "initial_state": True},
    "A zero": {"A_scale": 0.0, "initial_state": True},
}


# --- The other ops ----------------------------------------------------------------------------------------------------


def update_problem(
    rng: Generator,
    *,
    batch: int = 3,
    dim: int = 20,
    state: int = 8,
    dtype: str = "float32",
    is_complex: bool = False,
    groups: int | None = None,
    D: bool = True,
    z: bool = True,
    dt: str = "usual",
    dt_bias: bool = True,
    dt_softplus: bool = True,
    state_dtype: str | None = None,
    indices: tuple[int, ...] | None = None,
    layout: str | None = None,
    A_log: bool = False,
    vectors: str | None = None,
) -> Arguments:
    """Keyword arguments of selective_state_update; ``vectors`` is the dtype of D and dt_bias."""
    storage = DTYPES[dtype]
    real, of_A = accumulation_of(storage), accumulation_of(storage, is_complex)
    slots = batch if indices is None else max(indices, default=0) + 3
    shape = (batch, state) if groups is None else (batch, groups, state)
    matrix_dtype = of_A if is_complex else storage
    arguments: Arguments = {
        "x": normal(rng, (batch, dim), storage),
        "dt": _step_sizes(rng, dt, (batch, dim)).astype(storage),
        "A": _A(rng, dim, state, of_A),
        "B": normal(rng, shape, matrix_dtype),
        "C": normal(rng, shape, matrix_dtype),
        "dt_softplus": dt_softplus,
    }
    if D:
        arguments["D"] = normal(rng, (dim,), real)
    if z:
        arguments["z"] = normal(rng, (batch, dim), storage)
    if dt_bias:
        arguments["dt_bias"] = rng.uniform(-4, 0, dim).astype(real)
    if A_log:
        arguments |= {"A": np.log(-arguments["A"]), "A_log": True}
    if vectors:
        arguments |= {name: arguments[name].astype(DTYPES[vectors]) for name in ("D", "dt_bias")}
    if layout:
        arguments = {k: with_layout(x, layout) if isinstance(x, np.ndarray) else x for k, x in arguments.items()}
    arguments["state"] = normal(rng, (slots, dim, state), DTYPES[state_dtype] if state_dtype else of_A)
    if indices is not None:
        arguments["state_batch_indices"] = np.array(indices, np.int32)
    return arguments


UPDATES: dict[str, dict[str, Any]] = {
    "base": {},
    "without D": {"D": False},
    "without z": {"z": False},
    "without dt_bias": {"dt_bias": False},
    "without softplus": {"dt": "positive", "dt_softplus": False},
    "bare": {"D": False, "z": False, "dt": "positive", "dt_bias": False, "dt_softplus": False},
    "float64": {"dtype": "float64"},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 state": {"dtype": "bfloat16", "state_dtype": "bfloat16"},
    "groups 2": {"groups": 2},
    "groups dim": {"groups": 20},
    "complex": {"is_complex": True},
    "complex groups": {"is_complex": True, "groups": 2},
    **{f"state {n}": {"state": n} for n in (1, 17, 256)},
    **{f"dim {dim}": {"dim": dim} for dim in (1, 17, 40)},
    "batch 0": {"batch": 0},
    "indices": {"indices": (4, 0, 2)},
    "indices with skipped rows": {"indices": (-1, 3, -1)},
    "all rows skipped": {"indices": (-1, -1, -1)},
    "saturating softplus": {"dt": "saturating"},
    "huge dt": {"dt": "huge", "dt_bias": False, "dt_softplus": False},
    "strided memory": {"layout": "strided"},
    "transposed memory": {"layout": "transposed"},
    "logarithm of A": {"A_log": True},
    "logarithm of A, float64": {"A_log": True, "dtype": "float64"},
    "bfloat16 with vectors of its own": {"dtype": "bfloat16", "vectors": "bfloat16", "A_log": True},
    "float32 with vectors in float16": {"vectors": "float16"},
    "strided vectors in bfloat16": {"dtype": "bfloat16", "vectors": "bfloat16", "layout": "strided"},
}


def discretize_problem(
    rng: Generator,
    *,
    method: str = "zoh",
    lti: bool = False,
    batch: int = 2,
    dim: int = 6,
    length: int = 17,
    state: int = 5,
    dtype: str = "float32",
    is_complex: bool = False,
    B: str = "shared",
    delta: str = "positive",
    layout: str | None = None,
) -> Arguments:
    """Keyword arguments of discretize."""
    storage = DTYPES[dtype]
    of_A = accumulation_of(storage, is_complex)
    shape = (dim,) if lti else (batch, dim, length)
    arguments: Arguments = {
        "delta": _step_sizes(rng, delta, shape).astype(storage),
        "A": _A(rng, dim, state, of_A),
        "B": _matrix(rng, "constant" if lti else B, (batch, dim, length, state), storage, of_A),
    }
    if layout:
        arguments = {name: with_layout(x, layout) for name, x in arguments.items()}
    return {**arguments, "method": method}


_METHODS = ("zoh", "mamba", "bilinear", "euler")
DISCRETIZATIONS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in _METHODS},
    **{f"{method} lti": {"method": method, "lti": True} for method in _METHODS},
    **{f"{method} complex": {"method": method, "is_complex": True} for method in _METHODS},
    **{f"{method} lti complex": {"method": method, "lti": True, "is_complex": True} for method in _METHODS},
    **{f"zoh {dtype}": {"dtype": dtype} for dtype in ("float64", "float16", "bfloat16")},
    **{f"zoh {form} B": {"B": form} for form in ("constant", "1", "2", "6")},
    **{f"zoh complex {form} B": {"B": form, "is_complex": True} for form in ("constant", "2", "shared complex")},
    **{f"zoh {delta} delta": {"delta": delta} for delta in ("zero", "tiny", "huge")},
    **{f"zoh complex {delta} delta": {"delta": delta, "is_complex": True} for delta in ("zero", "tiny")},
    **{f"zoh length {length}": {"length": length} for length in (0, 1)},
    "zoh batch 0": {"batch": 0},
    "zoh state 1": {"state": 1},
    "zoh strided memory": {"layout": "strided"},
}


def linear_scan_problem(
    rng: Generator,
    *,
    shape: tuple[int, ...] = (2, 20, 70),
    dtype: str = "float32",
    a: str = "decay",
    initial_state: bool = False,
    reverse: bool = False,
    layout: str | None = None,
) -> Arguments:
    """Keyword arguments of linear_scan; dtype may be complex."""
    storage = DTYPES[dtype] if dtype in DTYPES else np.dtype(dtype)
    factors = rng.uniform(0.3, 1.0, shape) if a == "decay" else rng.choice([-0.9, 0.0, 1.0], shape)
    if storage.kind == "c":
        factors = factors * np.exp(1j * rng.uniform(-np.pi, np.pi, shape))
    arguments: Arguments = {"a": factors.astype(storage), "b": normal(rng, shape, storage)}
    if initial_state:
        arguments["initial_state"] = normal(rng, shape[:-1], accumulation_of(storage))
    if layout:
        arguments = {name: with_layout(x, layout) for name, x in arguments.items()}
    return {**arguments, "reverse": reverse}


LINEAR_SCANS: dict[str, dict[str, Any]] = {
    "base": {},
    "initial state": {"initial_state": True},
    "reverse": {"reverse": True},
    "reverse, initial state": {"reverse": True, "initial_state": True},
    "signs and zeros": {"a": "signs", "initial_state": True},
    **{d: {"dtype": d, "initial_state": True} for d in ("float64", "float16", "bfloat16", "complex64", "complex128")},
    "complex64 reverse": {"dtype": "complex64", "reverse": True, "initial_state": True},
    **{f"length {length}": {"shape": (2, 3, length), "initial_state": True} for length in LENGTHS},
    **{f"length {n} reverse": {"shape": (3, n), "initial_state": True, "reverse": True} for n in (0, 1, 65)},
    "one axis": {"shape": (70,)},
    "one axis, initial state": {"shape": (70,), "initial_state": True},
    "four axes": {"shape": (2, 3, 5, 33), "initial_state": True},
    "batch 0": {"shape": (0, 5, 33), "initial_state": True},
    **{f"{layout} memory": {"layout": layout} for layout in ("strided", "reversed", "transposed", "offset")},
}


def conv_problem(
    rng: Generator,
    *,
    batch: int = 2,
    dim: int = 20,
    length: int = 70,
    width: int = 4,
    dtype: str = "float32",
    bias: bool = True,
    activation: str | None = "silu",
    initial_state: bool = False,
    seq_idx: str | None = None,
    cu_seqlens: tuple[int, ...] | None = None,
    layout: str | None = None,
) -> Arguments:
    """Keyword arguments of causal_conv1d."""
    storage = DTYPES[dtype]
    arguments: Arguments = {
        "x": normal(rng, (batch, dim, length), storage),
        "weight": normal(rng, (dim, width), storage, 0.5),
    }
    if bias:
        arguments["bias"] = normal(rng, (dim,), storage)
    if initial_state:
        sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
        arguments["initial_state"] = normal(rng, (sequences, dim, width - 1), storage)
    if layout:
        arguments = {name: with_layout(x, layout) for name, x in arguments.items()}
    if seq_idx:
        arguments["seq_idx"] = sequence_numbers(batch, length, seq_idx)
    if cu_seqlens:
        arguments["cu_seqlens"] = np.array(cu_seqlens, np.int32)
    return {**arguments, "activation": activation}


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "without bias": {"bias": False},
    "without activation": {"activation": None},
    "bare": {"bias": False, "activation": None},
    "initial state": {"initial_state": True},
    **{dtype: {"dtype": dtype, "initial_state": True} for dtype in ("float64", "float16", "bfloat16")},
    **{f"width {width}": {"width": width, "initial_state": True} for width in (1, 2, 3, 5, 8)},
    **{f"length {length}": {"length": length, "dim": 5, "initial_state": True} for length in (*LENGTHS, 3, 4)},
    **{f"length {length} without state": {"length": length, "dim": 5} for length in (0, 1, 3)},
    **{f"dim {dim}": {"dim": dim} for dim in (1, 16, 17)},
    "batch 0": {"batch": 0, "initial_state": True},
    "seq_idx": {"seq_idx": "int32"},
    "seq_idx, initial state": {"seq_idx": "int64", "initial_state": True},
    "seq_idx, width 8": {"seq_idx": "int32", "initial_state": True, "width": 8},
    "seq_idx, length 5": {"seq_idx": "int32", "initial_state": True, "width": 8, "length": 5},
    "cu_seqlens": {"batch": 1, "cu_seqlens": (0, 13, 45, 70)},
    "cu_seqlens with empty sequences": {**_PACKED, "cu_seqlens": (0, 0, 13, 13, 14, 16, 70, 70)},
    "cu_seqlens bfloat16": {**_PACKED, "cu_seqlens": (0, 2, 45, 70), "dtype": "bfloat16"},
    **{
        f"{layout} memory": {"layout": layout}
        for layout in ("strided", "reversed", "transposed", "offset", "broadcast")
    },
}


def conv_update_problem(
    rng: Generator, *, kept: int | None = None, stored: dict[str, str] | None = None, **changes: Any
) -> Arguments:
    """Keyword arguments of causal_conv1d_update; ``kept`` is the state's width, ``stored`` dtypes of parameters."""
    arguments = conv_problem(rng, **{"length": 1, "initial_state": True, **changes})
    state, x = arguments.pop("initial_state"), arguments["x"]
    if kept is not None:
        state = normal(rng, (*state.shape[:2], kept), state.dtype)
    made = {**arguments, "x": x[..., 0], "conv_state": state}
    return made | {name: made[name].astype(dtype) for name, dtype in (stored or {}).items()}


CONVOLUTION_UPDATES: dict[str, dict[str, Any]] = {
    "base": {},
    "without bias": {"bias": False},
    "without activation": {"activation": None},
    **{dtype: {"dtype": dtype} for dtype in ("float64", "float16", "bfloat16")},
    **{f"width {width}": {"width": width} for width in (1, 2, 5)},
    "state of width": {"kept": 4},
    "wide state": {"kept": 7},
    "very wide state": {"kept": 40},
    **{
        f"{dtype}, all in it": {
            "dtype": dtype,
            "kept": 4,
            "dim": 24,
            "stored": dict.fromkeys(("conv_state", "weight", "bias"), dtype),
        }
        for dtype in ("float16", "bfloat16")
    },
    "bfloat16, state in float16": {"dtype": "bfloat16", "kept": 4, "stored": {"conv_state": "float16"}},
    "bias in another dtype": {"dtype": "bfloat16", "stored": {"bias": "bfloat16"}},
    "float64, parameters in float32": {"dtype": "float64", "stored": dict.fromkeys(("weight", "bias"), "float32")},
    "width 1, wide state": {"width": 1, "kept": 3},
    "batch 0": {"batch": 0},
    "strided memory": {"layout": "strided"},
}


def norm_problem(
    rng: Generator,
    *,
    shape: tuple[int, ...] = (2, 7, 40),
    dtype: str = "float32",
    residual: str | None = None,
    eps: float | None = None,
    scale: float = 1.0,
    layout: str | None = None,
) -> Arguments:
    """Keyword arguments of rms_norm; ``residual`` is its dtype."""
    arguments: Arguments = {
        "x": normal(rng, shape, DTYPES[dtype], scale),
        "weight": normal(rng, shape[-1:], DTYPES[dtype]),
    }
    if residual:
        arguments["residual"] = normal(rng, shape, DTYPES[residual], scale)
    if layout:
        arguments = {name: with_layout(x, layout) for name, x in arguments.items()}
    return arguments if eps is None else {**arguments, "eps": eps}


NORMS: dict[str, dict[str, Any]] = {
    "base": {},
    "residual": {"residual": "float32"},
    **{dtype: {"dtype": dtype} for dtype in ("float64", "float16", "bfloat16")},
    "float64 residual": {"dtype": "float64", "residual": "float64"},
    "float64, float32 residual": {"dtype": "float64", "residual": "float32"},
    "bfloat16, float32 residual": {"dtype": "bfloat16", "residual": "float32"},
    "bfloat16 residual": {"dtype": "bfloat16", "residual": "bfloat16"},
    **{f"width {n}": {"shape": (3, n), "residual": "float32"} for n in (1, 16, 17, 1000)},
    "one axis": {"shape": (40,)},
    "four axes": {"shape": (2, 3, 5, 40), "residual": "float32"},
    "batch 0": {"shape": (0, 7, 40), "residual": "float32"},
    "large eps": {"eps": 0.5},
    "small values": {"scale": 1e-6},
    "large values": {"scale": 1e6, "residual": "float32"},
    "zeros": {"scale": 0.0},
    "strided memory": {"layout": "strided", "residual": "float32"},
    "transposed memory": {"layout": "transposed", "residual": "float32"},
}


def kernel_problem(rng: Generator, *, length: int = 70, **changes: Any) -> Arguments:
    """Keyword arguments of ssm_kernel; the parameters are those of an LTI discretisation, in accumulation dtype."""
    arguments = discretize_problem(rng, lti=True, **changes)
    return {**arguments, "C": normal(rng, arguments["A"].shape, arguments["A"].dtype), "length": length}


KERNELS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in _METHODS[:3]},
    **{f"{method} complex": {"method": method, "is_complex": True} for method in _METHODS[:3]},
    "euler": {"method": "euler", "delta": "tiny"},
    "zoh float64": {"dtype": "float64"},
    **{f"zoh length {length}": {"length": length} for length in (0, 1, 2, 65, 500)},
    **{f"zoh complex length {length}": {"length": length, "is_complex": True} for length in (0, 1)},
    **{f"zoh {delta} delta": {"delta": delta} for delta in ("zero", "huge")},
    "zoh state 64": {"state": 64},
    "zoh strided memory": {"layout": "strided"},
}


def convolution_problem(
    rng: Generator,
    *,
    batch: int = 2,
    dim: int = 6,
    length: int = 70,
    dtype: str = "float32",
    layout: str | None = None,
) -> Arguments:
    """Keyword arguments of ssm_convolution, with a kernel that decays."""
    storage = DTYPES[dtype]
    decay = np.exp(-rng.uniform(0.01, 0.3, (dim, 1)) * np.arange(length))
    arguments: Arguments = {
        "u": normal(rng, (batch, dim, length), storage),
        "kernel": (decay * rng.standard_normal((dim, length))).astype(accumulation_of(storage)),
    }
    return {name: with_layout(x, layout) for name, x in arguments.items()} if layout else arguments


SSM_CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "base": {},
    **{dtype: {"dtype": dtype} for dtype in ("float64", "float16", "bfloat16")},
    **{f"length {length}": {"length": length} for length in LENGTHS},
    "dim 17": {"dim": 17},
    "batch 0": {"batch": 0},
    "strided memory": {"layout": "strided"},
    "transposed memory": {"layout": "transposed"},
}


# --- The list ---------------------------------------------------------------------------------------------------------


def _cases(op: str, problem: Callable[..., Arguments], changes: dict[str, dict[str, Any]]) -> list[Case]:
    return [Case(name, op, partial(problem, **change)) for name, change in changes.items()]


CASES: list[Case] = [
    *_cases("selective_scan", scan_problem, SCANS),
    Case("no gradient on the last state", "selective_scan", partial(scan_problem, initial_state=True), False),
    *_cases("selective_state_update", update_problem, UPDATES),
    *_cases("discretize", discretize_problem, DISCRETIZATIONS),
    *_cases("linear_scan", linear_scan_problem, LINEAR_SCANS),
    *_cases("causal_conv1d", conv_problem, CONVOLUTIONS),
    Case("no gradient on the final state", "causal_conv1d", partial(conv_problem, initial_state=True), False),
    *_cases("causal_conv1d_update", conv_update_problem, CONVOLUTION_UPDATES),
    *_cases("rms_norm", norm_problem, NORMS),
    Case("no gradient on residual_out", "rms_norm", partial(norm_problem, residual="float32"), False),
    *_cases("ssm_kernel", kernel_problem, KERNELS),
    *_cases("ssm_convolution", convolution_problem, SSM_CONVOLUTIONS),
]


def cases_of(op: str) -> list[Case]:
    """All cases of one op, to parametrise a test with (ids=str)."""
    return [case for case in CASES if case.op == op]


def case_of(op: str, name: str) -> Case:
    """One case by its name."""
    (case,) = (case for case in CASES if (case.op, case.name) == (op, name))
    return case
