"""The ops of sscan on tensors, with gradients: arguments, shapes, dtypes and errors are those of :mod:`sscan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from sscan import _checks
from sscan.causal_conv1d import _is_silu
from sscan.selective_scan import _is_zoh
from sscan.torch import _registered

if TYPE_CHECKING:
    from torch import Tensor

    from sscan.selective_scan import Discretization


def _needs_gradient(*tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, *, return_last_state: Literal[True],
    initial_state: Tensor | None = None, seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None, discretization: Discretization = "mamba",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: Literal[False] = False, *,
    initial_state: Tensor | None = None, seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None, discretization: Discretization = "mamba",
) -> Tensor: ...  # fmt: skip


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False, *,
    initial_state: Tensor | None = None, seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None, discretization: Discretization = "mamba",
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    discretization: Discretization = "mamba",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`sscan.selective_scan` with gradients for u, delta, A, B, C, D, z, delta_bias and initial_state.

    The last state carries gradients too. While they are recorded, checkpoints are kept: length * state / 32 numbers
    for each channel on the CPU and length * state / 16 on a GPU. On the CPU, calls with ``seq_idx`` or ``cu_seqlens``
    keep none and run the forward a second time. Under autocast, u, delta, z and varying B and C are cast to its dtype.
    """
    delta_softplus = _checks.boolean("selective_scan", "delta_softplus", delta_softplus)
    return_last_state = _checks.boolean("selective_scan", "return_last_state", return_last_state)
    _is_zoh("selective_scan", discretization)
    recorded = _needs_gradient(u, delta, A, B, C, D, z, delta_bias, initial_state)
    y, last_state, _ = _registered.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, cu_seqlens,
        delta_softplus, discretization, return_last_state, recorded,
    )  # fmt: skip
    return (y, last_state) if return_last_state else y


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    *,
    A_log: bool = False,
) -> Tensor:
    """:func:`sscan.selective_state_update`, which ``torch.compile`` takes; ``state`` is updated in place.

    It has no gradient: tensors that require one raise a TypeError, except under ``torch.no_grad()``.
    """
    dt_softplus = _checks.boolean("selective_state_update", "dt_softplus", dt_softplus)
    A_log = _checks.boolean("selective_state_update", "A_log", A_log)
    return _registered.selective_state_update(
        state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dt_softplus, A_log
    )


@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    initial_state: Tensor | None = None, *, return_final_state: Literal[True], seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    initial_state: Tensor | None = None, return_final_state: Literal[False] = False, seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor: ...  # fmt: skip


@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    initial_state: Tensor | None = None, return_final_state: bool = False, seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`sscan.causal_conv1d` with gradients for x, weight, bias and initial_state.

    The final state carries gradients too. Under autocast, x is cast to its dtype.
    """
    _is_silu("causal_conv1d", activation)
    return_final_state = _checks.boolean("causal_conv1d", "return_final_state", return_final_state)
    y, final_state = _registered.causal_conv1d(
        x, weight, bias, initial_state, seq_idx, cu_seqlens, activation, return_final_state
    )
    return (y, final_state) if return_final_state else y


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """:func:`sscan.causal_conv1d_update`, which ``torch.compile`` takes; ``conv_state`` is updated in place.

    It has no gradient: tensors that require one raise a TypeError, except under ``torch.no_grad()``.
    """
    _is_silu("causal_conv1d_update", activation)
    return _registered.causal_conv1d_update(x, conv_state, weight, bias, activation)


@overload
def rms_norm(x: Tensor, weight: Tensor, residual: None = None, eps: float = 1e-5) -> Tensor: ...


@overload
def rms_norm(x: Tensor, weight: Tensor, residual: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = 1e-5
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`sscan.rms_norm` with gradients for x, weight and residual; residual_out carries them too."""
    y, residual_out = _registered.rms_norm(x, weight, residual, eps)
    return y if residual is None else (y, residual_out)


def linear_scan(a: Tensor, b: Tensor, initial_state: Tensor | None = None, reverse: bool = False) -> Tensor:
    """:func:`sscan.linear_scan` with gradients for a, b and initial_state."""
    return _registered.linear_scan(a, b, initial_state, reverse)


def discretize(delta: Tensor, A: Tensor, B: Tensor, method: str = "zoh") -> tuple[Tensor, Tensor]:
    """:func:`sscan.discretize` with gradients for delta, A and B."""
    A_bar, B_bar = _registered.discretize(delta, A, B, method)
    return A_bar, B_bar


def ssm_kernel(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, length: int, method: str = "zoh") -> Tensor:
    """:func:`sscan.ssm_kernel` with gradients for delta, A, B and C."""
    return _registered.ssm_kernel(delta, A, B, C, length, method)


def ssm_convolution(u: Tensor, kernel: Tensor) -> Tensor:
    """:func:`sscan.ssm_convolution` with gradients for u and kernel."""
    return _registered.ssm_convolution(u, kernel)
