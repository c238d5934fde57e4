"""Root-mean-square normalisation over the last axis, with the residual stream added on the way in."""

from typing import Any, NamedTuple, cast, overload

import numpy as np
import numpy.typing as npt

from sscan import _arrays, _backends, _checks, _plans
from sscan._arrays import AnyArray, Array, ArrayT, StoredT


class RMSNormGradients(NamedTuple):
    """Gradients of `rms_norm`, each in the shape and dtype of its argument; None where that was None."""

    dx: Any
    dweight: Any
    dresidual: Any


def _weight(op: str, x: Array, weight: Array, eps: Any, **also: Array | None) -> Array:
    """The weight in the accumulation dtype of x, after the checks; ``also`` are arrays of the shape of x."""
    _checks.same_shape(op, x=x, **also)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: weight must have shape (size,) = {x.shape[-1:]}, got {weight.shape}")
    if not isinstance(eps, (float, int, np.floating, np.integer)):
        raise TypeError(f"{op}: eps must be a real number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps!r}")
    dtype = _checks.accumulation(_checks.storage(op, x=x, dy=also.get("dy")))
    return cast(Array, _checks.parameter(op, "weight", weight, dtype))


def _stream(op: str, name: str, array: Array | None, dtype: np.dtype[Any]) -> Array | None:
    """A residual stream as (rows, size): in its own dtype, which kernels in float32 read as it is."""
    if array is None or (dtype == np.float32 and array.dtype in _checks.STORAGE[1:]):
        return _checks.rows(array)
    return _checks.rows(_checks.parameter(op, name, array, dtype))


@overload
def rms_norm(x: ArrayT, weight: AnyArray, residual: None = None, eps: float = 1e-5) -> ArrayT: ...


@overload
def rms_norm(
    x: npt.NDArray[StoredT], weight: npt.NDArray[Any], residual: npt.NDArray[Any], eps: float = 1e-5
) -> tuple[npt.NDArray[StoredT], npt.NDArray[Any]]: ...


@overload
def rms_norm(x: ArrayT, weight: AnyArray, residual: AnyArray, eps: float = 1e-5) -> tuple[ArrayT, ArrayT]: ...


@_plans.planned
def rms_norm(x: Any, weight: Any, residual: Any = None, eps: float = 1e-5) -> Any:
    """Normalisation y = s / sqrt(mean(s^2) + eps) * weight over the last axis, of s = x or s = x + residual.

    Parameters
    ----------
    x : array (..., size)
        float64, float32, float16 or bfloat16. Copied only if its last axis is strided or its other axes do not merge.
    weight : array (size,)
        Of any floating dtype that the accumulation dtype holds: float64 for float64 x, else float32.
    residual : array like x, optional
        The residual stream, in any floating dtype that the accumulation dtype holds.
    eps : float
        At least 0.

    Returns
    -------
    y : array like x
        In the library and dtype of x.
    residual_out : array like x
        x + residual in the accumulation dtype, not rounded further; only with `residual`.

    Raises
    ------
    ValueError
        A shape does not fit; eps is negative.
    TypeError
        A dtype does not fit; arrays of different libraries or devices; a tensor that requires grad.

    Notes
    -----
    Arithmetic is in the accumulation dtype. The result is the same, bit for bit, for every run and number of threads.
    On the CPU rows may be of any size; on a GPU the mean of their squares must fit the accumulation dtype.
    Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467, eq. (4).
    """
    op = "rms_norm"
    _checks.required(op, x=x, weight=weight)
    caller, (x, weight, residual) = _arrays.enter(op, x=x, weight=weight, residual=residual)
    kernels = _backends.for_device(op, caller.device)
    weight = _weight(op, x, weight, eps, residual=residual)
    y = caller.empty(x.shape, x.dtype)
    residual_out = None if residual is None else caller.empty(x.shape, weight.dtype)
    kernels.rms_norm_forward(
        _checks.rows(x), weight, _stream(op, "residual", residual, weight.dtype), float(eps),
        _checks.rows(y), _checks.rows(residual_out),
    )  # fmt: skip
    return caller.leave(y) if residual_out is None else (caller.leave(y), caller.leave(residual_out))


@_plans.planned
def rms_norm_backward(
    dy: Any, x: Any, weight: Any, residual: Any = None, eps: float = 1e-5, dresidual_out: Any = None
) -> RMSNormGradients:
    """Gradients of `rms_norm` from those of y and (optionally) of residual_out.

    With r = 1 / sqrt(mean(s^2) + eps), n = r s and g = dy weight: ds = r (g - n mean(g n)) + dresidual_out is the
    gradient of x and of the residual, and dweight = sum dy n.

    Parameters
    ----------
    dy : array like x
        In the dtype of x.
    x, weight, residual, eps
        As given to `rms_norm`.
    dresidual_out : array like x, optional
        In any floating dtype that the accumulation dtype holds.

    Returns
    -------
    RMSNormGradients
        (dx, dweight, dresidual).

    Raises
    ------
    ValueError, TypeError
        As `rms_norm`; ValueError too if `dresidual_out` comes without `residual`.

    Notes
    -----
    dweight is formed in the accumulation dtype as partial sums of fixed groups of rows, added in a fixed order.
    """
    op = "rms_norm_backward"
    _checks.required(op, dy=dy, x=x, weight=weight)
    caller, views = _arrays.enter(op, dy=dy, x=x, weight=weight, residual=residual, dresidual_out=dresidual_out)
    kernels = _backends.for_device(op, caller.device)
    dy, x, given_weight, residual, dresidual_out = views
    if residual is None and dresidual_out is not None:
        raise ValueError(f"{op}: dresidual_out is the gradient of an output that exists only with a residual")
    weight = _weight(op, x, given_weight, eps, dy=dy, residual=residual, dresidual_out=dresidual_out)
    dx, dweight, dresidual = caller.empty(x.shape, x.dtype), caller.empty(weight.shape, weight.dtype), None
    if residual is not None:  # kernels in float64 write float64 only
        dresidual = caller.empty(x.shape, weight.dtype if x.dtype == np.float64 else residual.dtype)
    kernels.rms_norm_backward(
        _checks.rows(dy), _checks.rows(x), weight, _stream(op, "residual", residual, weight.dtype), float(eps),
        _stream(op, "dresidual_out", dresidual_out, weight.dtype), _checks.rows(dx), dweight, _checks.rows(dresidual),
    )  # fmt: skip
    return RMSNormGradients(
        caller.leave(dx),
        caller.leave(dweight.astype(given_weight.dtype, copy=False)),
        None if dresidual is None else caller.leave(dresidual.astype(residual.dtype, copy=False)),
    )
