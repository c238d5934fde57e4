"""The conformance suite and bit-identity on a GPU, with CuPy arrays."""

from __future__ import annotations

from typing import Any

import cases
import cupy
import numpy as np
import pytest
from cases import DIFFERENTIABLE, Array, Case, backward, cases_of, check_backward, check_forward, cotangents, forward
from state_passing_cases import NUMBERS, PROBLEMS, check_pieces, check_prefix

import sscan


def to_gpu(x: Array) -> Any:
    """A CuPy array with the values, the strides and the alignment of a NumPy array."""
    if x.size == 0:
        return cupy.empty(x.shape, x.dtype)
    offsets = [(n - 1) * step for n, step in zip(x.shape, x.strides, strict=True)]
    before = -sum(o for o in offsets if o < 0)
    extent = before + sum(o for o in offsets if o > 0) + x.itemsize
    shift = (x.ctypes.data - before) % 64
    memory = np.zeros(shift + extent, np.uint8)
    interface = {"data": (x.ctypes.data - before, False), "shape": (extent,), "typestr": "|u1", "version": 3}
    memory[shift:] = np.asarray(type("Bytes", (), {"__array_interface__": interface, "owner": x})())
    base = cupy.asarray(memory)
    return cupy.ndarray(x.shape, x.dtype, memptr=base.data + shift + before, strides=x.strides)


class OnGPU:
    """sscan's functions on NumPy arrays, by way of the GPU."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(sscan, name)

        def call(*arguments: Any, **options: Any) -> Any:
            there = {key: to_gpu(x) if isinstance(x, np.ndarray) else x for key, x in options.items()}
            result = function(*(to_gpu(x) if isinstance(x, np.ndarray) else x for x in arguments), **there)
            for key, x in options.items():
                if isinstance(x, np.ndarray) and x.flags.writeable:  # what an update op changed
                    x[...] = there[key].get()
            if isinstance(result, tuple):
                values = [None if x is None else x.get() for x in result]
                return type(result)(*values) if hasattr(result, "_fields") else tuple(values)
            return result.get()

        return call


gpu = OnGPU()
EVERY = [pytest.param(case, id=f"{op}-{case}") for op in cases._OUTPUTS for case in cases_of(op)]
EVERY_GRADIENT = [pytest.param(case, id=f"{op}-{case}") for op in DIFFERENTIABLE for case in cases_of(op)]


@pytest.mark.parametrize("case", EVERY)
def test_conforms(case: Case) -> None:
    check_forward(gpu, case)


@pytest.mark.parametrize("case", EVERY_GRADIENT)
def test_gradients_conform(case: Case) -> None:
    check_backward(gpu, case)


@pytest.mark.parametrize("case", EVERY_GRADIENT)
def test_two_runs_agree_bit_for_bit(case: Case) -> None:
    arguments = case.arguments()
    outputs = forward(gpu, case.op, arguments)
    given = cotangents(outputs, 1, case.state_gradient)
    first, second = (backward(gpu, case.op, arguments, given) for _ in range(2))
    for name, x in {**outputs, **first}.items():
        again = {**forward(gpu, case.op, arguments), **second}[name]
        assert x.tobytes() == again.tobytes(), name


@pytest.mark.parametrize("name", PROBLEMS)
def test_pieces_conform(name: str) -> None:
    check_pieces(name, (1000, 0, 7, 300), to_gpu, cupy.asnumpy)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("number", NUMBERS)
def test_prefix_of_carries(number: str, count: int, back: bool) -> None:
    check_prefix(number, count, back, to_gpu, cupy.asnumpy)
