"""Gradients against central differences."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan._arrays import array_module
from sscan.nn.autodiff import Array, Tensor, no_grad, to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable


def check_gradients(function: Callable[..., Any], *tensors: Tensor, tolerance: float = 1e-6, seed: int = 0) -> float:
    """Compare the gradients of `function` with central differences, element by element.

    The outputs are contracted with random weights w to f = sum <w, output>; for every element x the difference
    ``(8 (f(x + h) - f(x - h)) - (f(x + 2h) - f(x - 2h))) / 12h`` with ``h = 5e-5 max(1, |x|)`` must agree with the
    gradient up to ``tolerance * max(1, max |difference|)``.

    Parameters
    ----------
    function : callable
        Takes the tensors, returns a tensor or a tuple of tensors.
    *tensors : Tensor
        float64, requiring a gradient. Their arrays are perturbed in place and restored; `grad` is overwritten.
    tolerance : float, default 1e-6
    seed : int, default 0
        Of the weights w.

    Returns
    -------
    float
        The largest error found, relative to ``max(1, max |difference|)``.

    Raises
    ------
    AssertionError
        Naming the tensor and the element with the largest error.
    """
    for i, tensor in enumerate(tensors):
        if tensor.dtype != np.float64 or not getattr(tensor, "requires_grad", False):
            what = f"a {type(tensor).__name__} of {tensor.dtype}"
            what += " that requires none" if tensor.dtype == np.float64 else ""
            raise TypeError(f"check_gradients: tensor {i} must be float64 and require a gradient, got {what}")
        tensor.grad = None
    rng = np.random.default_rng(seed)
    outputs = _as_tuple(function(*tensors))
    weights = [array_module(o.data).asarray(rng.standard_normal(o.shape)) for o in outputs]

    def weighted() -> Tensor:
        terms = [(o * w).sum() for o, w in zip(_as_tuple(function(*tensors)), weights, strict=True)]
        total: Tensor = functools.reduce(operator.add, terms)
        return total

    weighted().backward()
    worst = 0.0
    for i, tensor in enumerate(tensors):
        expected = _central_differences(lambda: weighted().item(), tensor.data)
        got = np.zeros(tensor.shape) if tensor.grad is None else to_numpy(tensor.grad)
        if not expected.size:
            continue
        error = np.abs(got - expected) / max(1.0, float(np.abs(expected).max()))
        place = np.unravel_index(int(error.argmax()), error.shape)
        if not error[place] <= tolerance:
            raise AssertionError(
                f"check_gradients: tensor {i} at {tuple(map(int, place))}: gradient {got[place]:.10g}, "
                f"central difference {expected[place]:.10g}, error {error[place]:.2e}"
            )
        worst = max(worst, float(error[place]))
    return worst


def _central_differences(function: Callable[[], float], array: Array) -> Array:
    differences = np.zeros(array.shape)
    with no_grad():
        for index in np.ndindex(*array.shape):
            middle = float(array[index])
            step = 5e-5 * max(1.0, abs(middle))
            for offset, factor in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
                array[index] = middle + offset * step
                differences[index] += factor * function() / (12 * step)
            array[index] = middle
    return differences


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
