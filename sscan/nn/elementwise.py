"""Functions of arrays by element: on a GPU by sscan's kernels, as fast as memory is read and written.

CuPy's own have a thread for every number, whatever its size, and a kernel for every operator in a formula.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from sscan._arrays import array_module, on_gpu

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


OF_KERNELS = {np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)}


def compute(name: str, arrays: Sequence[Any], out: Any) -> Any:
    """The kernel's function of this name, into `out`, an array of CuPy's, which is returned."""
    from sscan.cuda import elementwise

    elementwise.compute(name, arrays, out)  # type: ignore[no-untyped-call]
    return out


def has_kernels(*arrays: Any) -> bool:
    """Whether there are kernels for these arrays: on a GPU, of one shape and dtype, and not double precision."""
    first = arrays[0]
    of_kernels = on_gpu(first) and first.dtype in OF_KERNELS
    return of_kernels and all(on_gpu(a) and a.shape == first.shape and a.dtype == first.dtype for a in arrays[1:])


def by_kernel(formula: Callable[..., Any]) -> Callable[..., Any]:
    """A formula in whose place there is a kernel of its name, where there are kernels."""

    @functools.wraps(formula)
    def chosen(*arrays: Any) -> Any:
        if has_kernels(*arrays):
            return compute(formula.__name__, arrays, array_module(arrays[0]).empty_like(arrays[0]))
        return formula(*arrays)

    return chosen


@by_kernel
def add(a: Any, b: Any) -> Any:
    """a + b."""
    return a + b


@by_kernel
def multiply(a: Any, b: Any) -> Any:
    """a b."""
    return a * b


@by_kernel
def sigmoid(a: Any) -> Any:
    """1 / (1 + exp(-a)), which itself overflows in the far tail."""
    xp = array_module(a)
    return xp.exp(-xp.logaddexp(-a, a.dtype.type(0)))


@by_kernel
def sigmoid_backward(g: Any, s: Any) -> Any:
    """g times the derivative where the sigmoid is s."""
    return g * (s * (1 - s))


@by_kernel
def silu(a: Any) -> Any:
    """a sigmoid(a)."""
    return a * sigmoid(a)


@by_kernel
def silu_backward(g: Any, a: Any) -> Any:
    """g times the derivative at a."""
    s = sigmoid(a)
    return g * (s + a * s * (1 - s))


@by_kernel
def gelu(a: Any) -> Any:
    """a Phi(a), with the distribution function Phi of the standard normal distribution."""
    return (a * _normal_distribution(a)).astype(a.dtype, copy=False)


@by_kernel
def gelu_backward(g: Any, a: Any) -> Any:
    """g times the derivative at a."""
    wide = a.astype(np.result_type(a.dtype, np.float32), copy=False)
    density = array_module(a).exp(wide * wide / -2) / math.sqrt(2 * math.pi)
    return (g * (_normal_distribution(a) + wide * density)).astype(a.dtype, copy=False)


def _normal_distribution(a: Any) -> Any:
    """(1 + erf(a / sqrt(2))) / 2, with the erf that belongs to the array's library."""
    xp = array_module(a)
    special: Any = importlib.import_module(
        "scipy.special" if xp is np else "cupyx.scipy.special" if on_gpu(a) else xp.__name__
    )
    wide = a.astype(np.result_type(a.dtype, np.float32), copy=False)
    return (1 + special.erf(wide * math.sqrt(0.5))) / 2
