"""The time-invariant system of Algorithm 1: its convolution kernel, and the convolution through the FFT."""

from typing import Any, NamedTuple, cast, overload

import numpy as np
import numpy.typing as npt

from sscan import _arrays, _backends, _checks
from sscan._arrays import AnyArray, Array, ArrayT
from sscan.discretize import _checked as _checked_system
from sscan.discretize import _Problem


class SSMKernelGradients(NamedTuple):
    """Gradients of `ssm_kernel`, each in the shape and dtype of its argument."""

    ddelta: Any
    dA: Any
    dB: Any
    dC: Any


class SSMConvolutionGradients(NamedTuple):
    """Gradients of `ssm_convolution`, each in the shape and dtype of its argument."""

    du: Any
    dkernel: Any


def _checked(op: str, delta: Array, A: Array, B: Array, C: Array, length: int, method: str) -> tuple[_Problem, Array]:
    """The system as `discretize`'s kernels take it, and C."""
    if isinstance(length, bool) or not isinstance(length, (int, np.integer)):
        raise TypeError(f"{op}: length must be an integer, got {type(length).__name__}")
    if length < 0:
        raise ValueError(f"{op}: length must be at least 0, got {length}")
    _checks.sizes(op, delta=(delta, "dim"), A=(A, "dim, state"), B=(B, "dim, state"), C=(C, "dim, state"))
    system = _checked_system(op, delta, A, B, method)
    return system, cast(Array, _checks.parameter(op, "C", C, system.A.dtype))


def _discretized(caller: _arrays.Caller, kernels: Any, system: _Problem, method: str) -> tuple[Array, Array]:
    A_bar, B_bar = (caller.empty(system.selective, system.A.dtype) for _ in range(2))
    kernels.discretize_forward(system.delta, system.A, system.B, method, A_bar, B_bar)
    return A_bar.reshape(system.shape), B_bar.reshape(system.shape)


@overload
def ssm_kernel(
    delta: npt.NDArray[Any], A: npt.NDArray[Any], B: npt.NDArray[Any], C: npt.NDArray[Any], length: int,
    method: str = "zoh",
) -> npt.NDArray[Any]: ...  # fmt: skip


@overload
def ssm_kernel(
    delta: ArrayT, A: AnyArray, B: AnyArray, C: AnyArray, length: int, method: str = "zoh"
) -> ArrayT: ...  # fmt: skip


@_arrays.follows_caller
def ssm_kernel(delta: Any, A: Any, B: Any, C: Any, length: int, method: str = "zoh") -> Any:
    """Convolution kernel K = (C B_bar, C A_bar B_bar, ..., C A_bar^(length - 1) B_bar) of equation (3a).

    With A_bar, B_bar of `discretize`. For a complex A, K_k = 2 Re(sum_n C_n A_bar_n^k B_bar_n).

    Parameters
    ----------
    delta : array (dim,)
        Step sizes, in the unit of 1 / A. float64, float32, float16 or bfloat16.
    A, B, C : array (dim, state)
        Real or complex, in the accumulation dtype: float64 (complex128) for float64 delta, else float32 (complex64).
    length : int
    method : {"zoh", "mamba", "bilinear", "euler"}

    Returns
    -------
    K : array (dim, length)
        Real, in the accumulation dtype, in the library of delta.

    Raises
    ------
    ValueError
        A shape does not fit, the length is negative, or the method is unknown.
    TypeError
        A dtype does not fit; arrays of different libraries or devices; a tensor that requires grad.

    Notes
    -----
    Powers are formed by repeated multiplication, 16 steps at a time, and from scratch every 4096 steps. The same bit
    for bit in every run and for every number of threads.
    """
    op = "ssm_kernel"
    _checks.required(op, delta=delta, A=A, B=B, C=C)
    caller, (delta, A, B, C) = _arrays.enter(op, delta=delta, A=A, B=B, C=C)
    kernels = _backends.for_device(op, caller.device)
    system, C = _checked(op, delta, A, B, C, length, method)
    A_bar, B_bar = _discretized(caller, kernels, system, method)
    K = caller.empty((len(A), length), _checks.accumulation(system.delta.dtype))
    kernels.ssm_kernel_forward(A_bar, B_bar, C, K)
    return caller.leave(K)


@_arrays.follows_caller
def ssm_kernel_backward(
    dK: Any, delta: Any, A: Any, B: Any, C: Any, length: int, method: str = "zoh"
) -> SSMKernelGradients:
    """Gradients of `ssm_kernel` from that of K.

    With S_n = sum_k dK_k A_bar_n^k and its derivative S'_n: dC = conj(B_bar S), dB_bar = conj(C S), dA_bar =
    conj(C B_bar S'), twice that for a complex A; then those of `discretize`. Complex gradients are those of PyTorch.

    Parameters
    ----------
    dK : array (dim, length)
        In the dtype of K.
    delta, A, B, C, length, method
        As given to `ssm_kernel`.

    Returns
    -------
    SSMKernelGradients
        (ddelta, dA, dB, dC).

    Raises
    ------
    ValueError, TypeError
        As `ssm_kernel`.
    """
    op = "ssm_kernel_backward"
    _checks.required(op, dK=dK, delta=delta, A=A, B=B, C=C)
    caller, (given, *system_views) = _arrays.enter(op, dK=dK, delta=delta, A=A, B=B, C=C)
    kernels = _backends.for_device(op, caller.device)
    delta, A, B, C = system_views
    system, C_ = _checked(op, delta, A, B, C, length, method)
    if given.shape != (len(A), length):
        raise ValueError(f"{op}: dK must have shape (dim, length) = {(len(A), length)}, got {given.shape}")
    dK_ = cast(Array, _checks.parameter(op, "dK", given, _checks.accumulation(system.delta.dtype)))
    dA_bar, dB_bar, dC = (caller.empty(C_.shape, C_.dtype) for _ in range(3))
    kernels.ssm_kernel_backward(dK_, *_discretized(caller, kernels, system, method), C_, dA_bar, dB_bar, dC)
    gradients = [caller.empty(array.shape, array.dtype) for array in (system.delta, system.A, system.B)]
    cotangents = (gradient.reshape(system.selective) for gradient in (dA_bar, dB_bar))
    kernels.discretize_backward(*cotangents, system.delta, system.A, system.B, method, *gradients)
    results = zip((*gradients, dC), system_views, strict=True)
    return SSMKernelGradients(*(caller.leave(g.reshape(x.shape).astype(x.dtype, copy=False)) for g, x in results))


def _convolution(op: str, u: Array, kernel: Array, dy: Array | None = None) -> Array:
    """The kernel in the accumulation dtype of u, after the checks."""
    shape = "batch, dim, length"
    _checks.sizes(op, u=(u, shape), kernel=(kernel, "dim, length"), dy=(dy, shape))
    dtype = _checks.accumulation(_checks.storage(op, u=u, dy=dy))
    return cast(Array, _checks.parameter(op, "kernel", kernel, dtype))


@_arrays.follows_caller
def ssm_convolution(u: ArrayT, kernel: AnyArray) -> ArrayT:
    """Causal convolution y_t = sum_{k <= t} K_k u_{t-k} of equation (3b), through the FFT.

    Parameters
    ----------
    u : array (batch, dim, length)
        float64, float32, float16 or bfloat16.
    kernel : array (dim, length)
        Of any real dtype that the accumulation dtype holds: float64 for float64 u, else float32.

    Returns
    -------
    y : array (batch, dim, length)
        In the library and dtype of u.

    Raises
    ------
    ValueError
        Shapes do not agree.
    TypeError
        A dtype does not fit; arrays of different libraries or devices; a tensor that requires grad.

    Notes
    -----
    Transforms are in the accumulation dtype, over channels padded to at least 2 length, so nothing wraps around.
    Errors are relative to the largest values of a channel, and causality holds up to such errors. The same bit for bit
    in every run and for every number of threads.
    """
    op = "ssm_convolution"
    _checks.required(op, u=u, kernel=kernel)
    caller, (inputs, filters) = _arrays.enter(op, u=u, kernel=kernel)
    kernels = _backends.for_device(op, caller.device)
    filters = _convolution(op, inputs, filters)
    y = caller.empty(inputs.shape, inputs.dtype)
    kernels.ssm_convolution_forward(inputs, filters, y)
    return cast(ArrayT, caller.leave(y))


@_arrays.follows_caller
def ssm_convolution_backward(dy: Any, u: Any, kernel: Any) -> SSMConvolutionGradients:
    """Gradients of `ssm_convolution`: du_s = sum_k K_k dy_{s+k}, dK_k = sum over batch and t of dy_t u_{t-k}.

    Parameters
    ----------
    dy : array (batch, dim, length)
        In the dtype of u.
    u, kernel
        As given to `ssm_convolution`.

    Returns
    -------
    SSMConvolutionGradients
        (du, dkernel).

    Raises
    ------
    ValueError, TypeError
        As `ssm_convolution`.
    """
    op = "ssm_convolution_backward"
    _checks.required(op, dy=dy, u=u, kernel=kernel)
    caller, (dy, u, given) = _arrays.enter(op, dy=dy, u=u, kernel=kernel)
    kernels = _backends.for_device(op, caller.device)
    kernel = _convolution(op, u, given, dy)
    du, dkernel = caller.empty(u.shape, u.dtype), caller.empty(kernel.shape, kernel.dtype)
    kernels.ssm_convolution_backward(dy, u, kernel, du, dkernel)
    return SSMConvolutionGradients(caller.leave(du), caller.leave(dkernel.astype(given.dtype, copy=False)))
