"""The operations of sscan on tensors: forward and backward are the library's own, this file connects them.

Arguments, shapes, dtypes and errors are those of the functions of the same names in :mod:`sscan`; which of the
arguments are differentiable is said here.
"""

from __future__ import annotations

from typing import Any, Literal, overload

from sscan._arrays import array_module
from sscan.causal_conv1d import causal_conv1d as causal_conv1d_forward
from sscan.causal_conv1d import causal_conv1d_backward
from sscan.linear_scan import linear_scan as linear_scan_forward
from sscan.linear_scan import linear_scan_backward
from sscan.nn import ops
from sscan.nn.autodiff import Array, Operand, Tensor, defvjp_all, primitive
from sscan.rms_norm import rms_norm as rms_norm_forward
from sscan.rms_norm import rms_norm_backward
from sscan.selective_scan import selective_scan_backward, selective_scan_forward
from sscan.ssm import ssm_convolution as ssm_convolution_forward
from sscan.ssm import ssm_convolution_backward, ssm_kernel_backward
from sscan.ssm import ssm_kernel as ssm_kernel_forward


def _or_zeros(gradient: Array | None, output: Array) -> Array:
    return array_module(output).zeros_like(output) if gradient is None else gradient


# Selective scan


@primitive
def _selective_scan(
    u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array, z: Array, delta_bias: Array, initial_state: Array,
    **options: Any,
) -> Any:  # fmt: skip
    return selective_scan_forward(u, delta, A, B, C, D, z, delta_bias, initial_state=initial_state, **options)


def _selective_scan_vjp(
    g: tuple[Array | None, ...], out: tuple[Array, ...],
    u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array, z: Array, delta_bias: Array, initial_state: Array,
    **options: Any,
) -> Any:  # fmt: skip
    y, _, checkpoints = out
    return selective_scan_backward(
        _or_zeros(g[0], y), u, delta, A, B, C, D, z, delta_bias,
        dlast_state=g[1], initial_state=initial_state, checkpoints=checkpoints, **options,
    )  # fmt: skip


defvjp_all(_selective_scan, _selective_scan_vjp)


@overload
def selective_scan(
    u: Operand, delta: Operand, A: Operand, B: Operand, C: Operand, D: Operand | None = None, z: Operand | None = None,
    delta_bias: Operand | None = None, delta_softplus: bool = False, *, return_last_state: Literal[True],
    initial_state: Operand | None = None, seq_idx: Array | None = None, cu_seqlens: Array | None = None,
    discretization: str = "mamba",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def selective_scan(
    u: Operand, delta: Operand, A: Operand, B: Operand, C: Operand, D: Operand | None = None, z: Operand | None = None,
    delta_bias: Operand | None = None, delta_softplus: bool = False, return_last_state: Literal[False] = False, *,
    initial_state: Operand | None = None, seq_idx: Array | None = None, cu_seqlens: Array | None = None,
    discretization: str = "mamba",
) -> Tensor: ...  # fmt: skip


@overload
def selective_scan(
    u: Operand, delta: Operand, A: Operand, B: Operand, C: Operand, D: Operand | None = None, z: Operand | None = None,
    delta_bias: Operand | None = None, delta_softplus: bool = False, return_last_state: bool = False, *,
    initial_state: Operand | None = None, seq_idx: Array | None = None, cu_seqlens: Array | None = None,
    discretization: str = "mamba",
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def selective_scan(
    u: Operand,
    delta: Operand,
    A: Operand,
    B: Operand,
    C: Operand,
    D: Operand | None = None,
    z: Operand | None = None,
    delta_bias: Operand | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Operand | None = None,
    seq_idx: Array | None = None,
    cu_seqlens: Array | None = None,
    discretization: str = "mamba",
) -> Any:
    """:func:`sscan.selective_scan` on tensors: y, or (y, last_state), both differentiable.

    Every array but `seq_idx` and `cu_seqlens` may require a gradient.
    """
    y, last_state, _ = _selective_scan.apply(
        u, delta, A, B, C, D, z, delta_bias, initial_state,
        delta_softplus=delta_softplus, seq_idx=seq_idx, cu_seqlens=cu_seqlens, discretization=discretization,
    )  # fmt: skip
    return (y, last_state) if return_last_state else y


# Linear scan


@primitive
def _linear_scan(a: Array, b: Array, initial_state: Array, reverse: bool) -> Array:
    return linear_scan_forward(a, b, initial_state, reverse)


defvjp_all(
    _linear_scan,
    lambda g, h, a, b, initial_state, reverse: linear_scan_backward(g, a, h, initial_state, reverse),
)


def linear_scan(a: Operand, b: Operand, initial_state: Operand | None = None, reverse: bool = False) -> Tensor:
    """:func:`sscan.linear_scan` on tensors; a, b and `initial_state` may require a gradient."""
    return _linear_scan(a, b, initial_state, reverse)


# Causal convolution


@primitive
def _causal_conv1d(x: Array, weight: Array, bias: Array, initial_state: Array, **options: Any) -> Any:
    return causal_conv1d_forward(x, weight, bias, initial_state=initial_state, return_final_state=True, **options)


def _causal_conv1d_vjp(
    g: tuple[Array | None, ...], out: tuple[Array, ...],
    x: Array, weight: Array, bias: Array, initial_state: Array, **options: Any,
) -> Any:  # fmt: skip
    dy = _or_zeros(g[0], out[0])
    return causal_conv1d_backward(dy, x, weight, bias, initial_state=initial_state, dfinal_state=g[1], **options)


defvjp_all(_causal_conv1d, _causal_conv1d_vjp)


@overload
def causal_conv1d(
    x: Operand, weight: Operand, bias: Operand | None = None, activation: str | None = None,
    initial_state: Operand | None = None, *, return_final_state: Literal[True],
    seq_idx: Array | None = None, cu_seqlens: Array | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def causal_conv1d(
    x: Operand, weight: Operand, bias: Operand | None = None, activation: str | None = None,
    initial_state: Operand | None = None, return_final_state: Literal[False] = False,
    seq_idx: Array | None = None, cu_seqlens: Array | None = None,
) -> Tensor: ...  # fmt: skip


@overload
def causal_conv1d(
    x: Operand, weight: Operand, bias: Operand | None = None, activation: str | None = None,
    initial_state: Operand | None = None, return_final_state: bool = False,
    seq_idx: Array | None = None, cu_seqlens: Array | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def causal_conv1d(
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    activation: str | None = None,
    initial_state: Operand | None = None,
    return_final_state: bool = False,
    seq_idx: Array | None = None,
    cu_seqlens: Array | None = None,
) -> Any:
    """:func:`sscan.causal_conv1d` on tensors: y, or (y, final_state), both differentiable.

    x, weight, bias and `initial_state` may require a gradient.
    """
    y, final_state = _causal_conv1d.apply(
        x, weight, bias, initial_state, activation=activation, seq_idx=seq_idx, cu_seqlens=cu_seqlens
    )
    return (y, final_state) if return_final_state else y


# RMS norm


@primitive
def _rms_norm(x: Array, weight: Array, residual: Array, eps: float) -> Any:
    return rms_norm_forward(x, weight, residual, eps)


def _rms_norm_vjp(g: Any, out: Any, x: Array, weight: Array, residual: Array, eps: float) -> Any:
    if residual is None:
        return rms_norm_backward(g, x, weight, None, eps)
    return rms_norm_backward(_or_zeros(g[0], out[0]), x, weight, residual, eps, dresidual_out=g[1])


defvjp_all(_rms_norm, _rms_norm_vjp)


@overload
def rms_norm(x: Operand, weight: Operand, residual: None = None, eps: float = 1e-5) -> Tensor: ...


@overload
def rms_norm(x: Operand, weight: Operand, residual: Operand, eps: float = 1e-5) -> tuple[Tensor, Tensor]: ...


def rms_norm(x: Operand, weight: Operand, residual: Operand | None = None, eps: float = 1e-5) -> Any:
    """:func:`sscan.rms_norm` on tensors: y, or with a residual (y, residual_out); all three may require a gradient."""
    return _rms_norm.apply(x, weight, residual, eps)


# The time-invariant system


@primitive
def _ssm_kernel(delta: Array, A: Array, B: Array, C: Array, length: int, method: str) -> Array:
    return ssm_kernel_forward(delta, A, B, C, length, method)


@primitive
def _ssm_convolution(u: Array, kernel: Array) -> Array:
    return ssm_convolution_forward(u, kernel)


defvjp_all(_ssm_kernel, lambda g, out, *arguments: ssm_kernel_backward(g, *arguments))
defvjp_all(_ssm_convolution, lambda g, out, u, kernel: ssm_convolution_backward(g, u, kernel))


def ssm_kernel(delta: Operand, A: Operand, B: Operand, C: Operand, length: int, method: str = "zoh") -> Tensor:
    """:func:`sscan.ssm_kernel` on tensors; delta, A, B and C may require a gradient."""
    return _ssm_kernel(delta, A, B, C, length, method)


def ssm_convolution(u: Operand, kernel: Operand) -> Tensor:
    """:func:`sscan.ssm_convolution` on tensors; both may require a gradient."""
    return _ssm_convolution(u, kernel)


def with_skip(kernel: Tensor, D: Tensor) -> Tensor:
    """The kernel (dim, length) of the convolution with `kernel` plus D u, for D (dim,): the input now gets D more."""
    return ops.concatenate([kernel[:, :1] + D.reshape(-1, 1), kernel[:, 1:]], axis=1)
