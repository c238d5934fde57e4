"""sscan.jax: every op under JAX's transformations, against the same op on NumPy arrays."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import pytest
from cases import (
    _ALSO,
    _OUTPUTS,
    _UPDATED,
    CASES,
    Arguments,
    Array,
    Case,
    backward,
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

import sscan
import sscan.jax

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

    with double_precision(True):
        found = jax.jit(jax.vmap(values, (axes,)))(stacked)
        assert_close(found, {n: np.stack([x[n] for x in expected]) for n in expected[0]})
        if op in _UPDATED:
            return
        given = [cotangents(x, seed) for seed, x in enumerate(expected)]
        in_jax = {n[1:]: np.stack([conjugated(x)[n] for x in given]) for n in given[0]}
        gradients = [conjugated(backward(sscan, op, {**x, **options}, g)) for x, g in zip(single, given, strict=True)]
        each = {n: np.stack([g[n] for g in gradients]) for n in gradients[0]}

        def pulled_back(function: Any, arrays: Any, given: Any) -> Any:
            floating = {n: x for n, x in arrays.items() if x.dtype.kind != "i"}
            return jax.vjp(lambda x: function({**arrays, **x}), floating)[1](given)[0]

        found = jax.jit(jax.vmap(partial(pulled_back, values), (axes, 0)))(stacked, in_jax)
        assert_close({f"d{n}": x for n, x in found.items()}, each)
        found = jax.jit(partial(pulled_back, jax.vmap(values, (axes,))))(stacked, in_jax)
        assert_close(
            {f"d{n}": x for n, x in found.items()}, {n: g if n[1:] in names else g.sum(0) for n, g in each.items()}
        )


def assert_close(found: dict[str, Any], expected: dict[str, Array]) -> None:
    """To the rounding of sums in another order, in double precision."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert error_of(np.asarray(found[name]), x) < 1e-13, name
