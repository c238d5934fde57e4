"""The linear recurrence along the last axis: the scan primitive itself."""

import math
from typing import Any, NamedTuple, cast

import numpy as np

from sscan import _arrays, _backends, _checks, _plans
from sscan._arrays import AnyArray, Array, ArrayT, MaybeArray


class LinearScanGradients(NamedTuple):
    """Gradients of `linear_scan`, each in the shape and dtype of its argument; None where that was None."""

    da: Any
    db: Any
    dinitial_state: Any


def _initial(op: str, caller: _arrays.Caller, initial_state: Array | None, **arrays: Array) -> Array | None:
    """The initial state as (rows,) in the accumulation dtype, after the checks on all arguments.

    Zeros if there is none; on a GPU, whose kernels know what None means, None.
    """
    _checks.same_shape(op, **arrays)
    a = arrays["a"]
    dtype = a.dtype
    if dtype in (np.complex64, np.complex128):
        for name, array in arrays.items():
            if array.dtype != dtype:
                raise TypeError(f"{op}: {name} must have the dtype of a, {dtype}; got {array.dtype}")
    else:
        dtype = _checks.accumulation(_checks.storage(op, **{"a": a, **arrays}))
    if initial_state is None:
        return np.zeros(math.prod(a.shape[:-1]), dtype) if caller.device == "cpu" else None
    if initial_state.shape != a.shape[:-1]:
        expected = f"the shape of a without its last axis, {a.shape[:-1]}"
        raise ValueError(f"{op}: initial_state must have {expected}, got {initial_state.shape}")
    return cast(Array, _checks.parameter(op, "initial_state", initial_state, dtype)).reshape(-1)


@_plans.planned
def linear_scan(a: AnyArray, b: ArrayT, initial_state: MaybeArray = None, reverse: bool = False) -> ArrayT:
    """Linear recurrence h_t = a_t h_{t-1} + b_t along the last axis; h_t = a_t h_{t+1} + b_t, if `reverse`.

    What is left of equation (2a) of the paper once A_bar_t and B_bar_t x_t are known.

    Parameters
    ----------
    a, b : array (..., length)
        Of one shape and dtype: float64, float32, float16, bfloat16, complex64 or complex128. Copied only if the last
        axis is strided or the others do not merge into one.
    initial_state : array (...), optional
        The state before the first step (after the last, if `reverse`), of any dtype that the accumulation dtype holds:
        that of a, but float32 for halves. None is zero.
    reverse : bool
        Whether time runs backwards.

    Returns
    -------
    h : array (..., length)
        All states, in the library and dtype of b.

    Raises
    ------
    ValueError
        Shapes do not agree.
    TypeError
        A dtype does not fit; arrays of different libraries or devices; a tensor that requires grad.

    Notes
    -----
    The state stays in the accumulation dtype; h is rounded once. Few long rows are cut along time, in a way that
    depends on the shape only: the result is the same, bit for bit, for every run and number of threads, but a row alone
    may round otherwise than among many. Memory beyond the result is a few numbers for each row, or for each of its
    parts. On the CPU h is finite wherever the recurrence is, step by step; on a GPU products of a must be too, along
    stretches of some hundred steps.
    """
    op = "linear_scan"
    descending = _checks.boolean(op, "reverse", reverse)
    _checks.required(op, a=a, b=b)
    caller, (factors, terms, state) = _arrays.enter(op, a=a, b=b, initial_state=initial_state)
    kernels = _backends.for_device(op, caller.device)
    state = _initial(op, caller, state, a=factors, b=terms)
    h = caller.empty(terms.shape, terms.dtype)
    kernels.linear_scan_forward(_checks.rows(factors), _checks.rows(terms), state, descending, _checks.rows(h))
    return cast(ArrayT, caller.leave(h))


@_plans.planned
def linear_scan_backward(
    dh: Any, a: Any, h: Any, initial_state: Any = None, reverse: bool = False
) -> LinearScanGradients:
    """Gradients of `linear_scan` from those of h, with h as it was returned.

    G_t = dh_t + conj(a_{t+1}) G_{t+1} is the same recurrence the other way; db_t = G_t, da_t = G_t conj(h_{t-1}), and
    conj(a_1) G_1 is the gradient of the initial state. Complex gradients are those of PyTorch: dL = Re(conj(g) dx).

    Parameters
    ----------
    dh, a, h : array (..., length)
        Of one shape and dtype.
    initial_state, reverse
        As given to `linear_scan`.

    Returns
    -------
    LinearScanGradients
        (da, db, dinitial_state).

    Raises
    ------
    ValueError, TypeError
        As `linear_scan`.
    """
    op = "linear_scan_backward"
    descending = _checks.boolean(op, "reverse", reverse)
    _checks.required(op, dh=dh, a=a, h=h)
    caller, (a, dh, h, initial_state) = _arrays.enter(op, a=a, dh=dh, h=h, initial_state=initial_state)
    kernels = _backends.for_device(op, caller.device)
    state = _initial(op, caller, initial_state, a=a, dh=dh, h=h)
    da, db, dstate = (None if x is None else caller.empty(x.shape, x.dtype) for x in (a, a, state))
    kernels.linear_scan_backward(
        _checks.rows(dh), _checks.rows(a), _checks.rows(h), state, descending,
        _checks.rows(da), _checks.rows(db), dstate,
    )  # fmt: skip
    dinitial_state = None
    if initial_state is not None and dstate is not None:
        dinitial_state = caller.leave(dstate.reshape(initial_state.shape).astype(initial_state.dtype, copy=False))
    return LinearScanGradients(caller.leave(da), caller.leave(db), dinitial_state)
