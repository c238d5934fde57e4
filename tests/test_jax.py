"""sscan.jax: every op under JAX's transformations, against the same op on NumPy arrays."""

from __future__ import annotations

from contextlib import contextmanager
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
    cotangents,
    forward,
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
