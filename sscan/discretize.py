"""From a continuous system to a recurrence: what a step of size delta makes of A and B."""

from typing import Any, NamedTuple, cast, overload

import numpy as np
import numpy.typing as npt

from sscan import _arrays, _backends, _checks, _plans
from sscan._arrays import AnyArray, Array, ArrayT, NumberT

METHODS = ("zoh", "mamba", "bilinear", "euler")


class DiscretizeGradients(NamedTuple):
    """Gradients of `discretize`, each in the shape and dtype of its argument."""

    ddelta: Any
    dA: Any
    dB: Any


class _Problem(NamedTuple):
    """Checked arguments as the kernels take them, and the shape of the results for the caller and for the kernels."""

    delta: Array
    A: Array
    B: Array
    shape: tuple[int, ...]
    selective: tuple[int, int, int, int]


def _checked(op: str, delta: Array, A: Array, B: Array, method: str) -> _Problem:
    if method not in METHODS:
        raise ValueError(f"{op}: method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    lti = delta.ndim == 1
    is_complex = A.dtype.kind == "c"
    time = "2*length" if is_complex and B.dtype.kind != "c" else "length"
    matrix = "dim, state" if lti else f"dim, state | batch, state, {time} | batch, groups, state, {time}"
    size = _checks.sizes(op, delta=(delta, "dim | batch, dim, length"), A=(A, "dim, state"), B=(B, matrix))
    _checks.check_groups(op, "B", size.get("groups", 1), size["dim"])
    varying_real = B.ndim > 2 and B.dtype.kind != "c"
    real = _checks.accumulation(_checks.storage(op, delta=delta, B=B if varying_real else None))
    dtype = np.result_type(real, np.complex64) if is_complex else real
    if not varying_real:
        B = cast(Array, _checks.parameter(op, "B", B, dtype))
    if B.ndim == 3:
        B = _checks.by_group(B)
    A = cast(Array, _checks.parameter(op, "A", A, dtype))
    selective = (size.get("batch", 1), size["dim"], size.get("length", 1), size["state"])
    times = delta.reshape(selective[:3]) if lti else delta
    delta, B = (cast(Array, _checks.time_contiguous(array)) for array in (times, B))
    return _Problem(delta, A, B, A.shape if lti else selective, selective)


@overload
def discretize(
    delta: npt.NDArray[Any], A: npt.NDArray[NumberT], B: npt.NDArray[Any], method: str = "zoh"
) -> tuple[npt.NDArray[NumberT], npt.NDArray[NumberT]]: ...


@overload
def discretize(delta: ArrayT, A: AnyArray, B: AnyArray, method: str = "zoh") -> tuple[ArrayT, ArrayT]: ...


@_plans.planned
def discretize(delta: Any, A: Any, B: Any, method: str = "zoh") -> Any:
    r"""Discretisation A_bar = f(delta A), B_bar = delta s(delta A) B of h' = A h + B x.

    ============  =============================  =============================
    method        f(z)                           s(z)
    ============  =============================  =============================
    ``zoh``       exp(z)                         (exp(z) - 1) / z
    ``mamba``     exp(z)                         1
    ``bilinear``  (1 + z/2) / (1 - z/2)          1 / (1 - z/2)
    ``euler``     1 + z                          1
    ============  =============================  =============================

    ``zoh`` is the zero-order hold, equation (4) of the paper; ``mamba`` is what released checkpoints use, B by Euler.

    Parameters
    ----------
    delta : array (dim,) or (batch, dim, length)
        Step sizes, in the unit of 1 / A: of a time-invariant system, or selective. float64, float32, float16 or
        bfloat16.
    A : array (dim, state)
        Real or complex, in the accumulation dtype: float64 (complex128) for float64 delta, else float32 (complex64).
    B : array (dim, state), (batch, state, length) or (batch, groups, state, length)
        Constant, in the dtype of A, or (selective) varying, in the dtype of delta. A group serves dim / groups
        consecutive channels. With a complex A: complex arrays, or varying real ones whose last axis interleaves real
        and imaginary parts (2 * length).
    method : {"zoh", "mamba", "bilinear", "euler"}

    Returns
    -------
    A_bar, B_bar : array (dim, state) or (batch, dim, length, state)
        In the library of delta and the dtype of A. `selective_scan` never forms them.

    Raises
    ------
    ValueError
        A shape does not fit, or the method is unknown.
    TypeError
        A dtype does not fit; arrays of different libraries or devices; a tensor that requires grad.

    Notes
    -----
    (exp(z) - 1) / z is accurate for every z, and 1 where z is 0. The same bit for bit in every run and for every number
    of threads.
    """
    op = "discretize"
    _checks.required(op, delta=delta, A=A, B=B)
    caller, (delta, A, B) = _arrays.enter(op, delta=delta, A=A, B=B)
    kernels = _backends.for_device(op, caller.device)
    problem = _checked(op, delta, A, B, method)
    A_bar, B_bar = (caller.empty(problem.selective, problem.A.dtype) for _ in range(2))
    kernels.discretize_forward(problem.delta, problem.A, problem.B, method, A_bar, B_bar)
    return caller.leave(A_bar.reshape(problem.shape)), caller.leave(B_bar.reshape(problem.shape))


@_plans.planned
def discretize_backward(
    dA_bar: Any, dB_bar: Any, delta: Any, A: Any, B: Any, method: str = "zoh"
) -> DiscretizeGradients:
    """Gradients of `discretize` from those of A_bar and B_bar, by the chain rule through z = delta A.

    Complex gradients are those of PyTorch: dL = Re(conj(g) dx).

    Parameters
    ----------
    dA_bar, dB_bar : array (dim, state) or (batch, dim, length, state)
        In the dtype of A; copied if they are not contiguous.
    delta, A, B, method
        As given to `discretize`.

    Returns
    -------
    DiscretizeGradients
        (ddelta, dA, dB).

    Raises
    ------
    ValueError, TypeError
        As `discretize`.

    Notes
    -----
    Sums over batch, time and channels are formed in the accumulation dtype in an order that depends on the shape only.
    """
    op = "discretize_backward"
    _checks.required(op, dA_bar=dA_bar, dB_bar=dB_bar, delta=delta, A=A, B=B)
    caller, (delta, A, B, *cotangents) = _arrays.enter(op, delta=delta, A=A, B=B, dA_bar=dA_bar, dB_bar=dB_bar)
    kernels = _backends.for_device(op, caller.device)
    problem = _checked(op, delta, A, B, method)
    outputs = []
    for name, gradient in zip(("dA_bar", "dB_bar"), cotangents, strict=True):
        if gradient.shape != problem.shape:
            raise ValueError(f"{op}: {name} must have shape {problem.shape}, got {gradient.shape}")
        outputs.append(cast(Array, _checks.parameter(op, name, gradient, problem.A.dtype)).reshape(problem.selective))
    ddelta, dA, dB = (caller.empty(array.shape, array.dtype) for array in (problem.delta, problem.A, problem.B))
    kernels.discretize_backward(*outputs, problem.delta, problem.A, problem.B, method, ddelta, dA, dB)
    return DiscretizeGradients(
        caller.leave(ddelta.reshape(delta.shape)),
        caller.leave(dA.astype(A.dtype, copy=False)),
        caller.leave(dB.reshape(B.shape).astype(B.dtype, copy=False)),
    )
