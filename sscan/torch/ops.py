"""The ops of sscan on tensors, with gradients: arguments, shapes, dtypes and errors are those of :mod:`sscan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sscan import _checks
from sscan.causal_conv1d import _is_silu
from sscan.selective_scan import _is_zoh
from sscan.torch import _registered

if TYPE_CHECKING:
    from sscan.selective_scan import Discretization


def _needs_gradient(*tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)


def selective_scan(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Any = None,
    seq_idx: Any = None,
    cu_seqlens: Any = None,
    discretization: Discretization = "mamba",
) -> Any:
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
    state: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
    state_batch_indices: Any = None,
    *,
    A_log: bool = False,
) -> Any:
    """:func:`sscan.selective_state_update`, which ``torch.compile`` takes; ``state`` is updated in place.

    It has no gradient: tensors that require one raise a TypeError, except under ``torch.no_grad()``.
    """
    dt_softplus = _checks.boolean("selective_state_update", "dt_softplus", dt_softplus)
    A_log = _checks.boolean("selective_state_update", "A_log", A_log)
    return _registered.selective_state_update(
        state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dt_softplus, A_log
    )


def causal_conv1d(
    x: Any,
    weight: Any,
    bias: Any = None,
    activation: str | None = None,
    initial_state: Any = None,
    return_final_state: bool = False,
    seq_idx: Any = None,
    cu_seqlens: Any = None,
) -> Any:
    """:func:`sscan.causal_conv1d` with gradients for x, weight, bias and initial_state.

    The final state carries gradients too. Under autocast, x is cast to its dtype.
    """
    _is_silu("causal_conv1d", activation)
    return_final_state = _checks.boolean("causal_conv1d", "return_final_state", return_final_state)
    y, final_state = _registered.causal_conv1d(
        x, weight, bias, initial_state, seq_idx, cu_seqlens, activation, return_final_state
    )
    return (y, final_state) if return_final_state else y


def causal_conv1d_update(x: Any, conv_state: Any, weight: Any, bias: Any = None, activation: str | None = None) -> Any:
    """:func:`sscan.causal_conv1d_update`, which ``torch.compile`` takes; ``conv_state`` is updated in place.

    It has no gradient: tensors that require one raise a TypeError, except under ``torch.no_grad()``.
    """
    _is_silu("causal_conv1d_update", activation)
    return _registered.causal_conv1d_update(x, conv_state, weight, bias, activation)


def rms_norm(x: Any, weight: Any, residual: Any = None, eps: float = 1e-5) -> Any:
    """:func:`sscan.rms_norm` with gradients for x, weight and residual; residual_out carries them too."""
    y, residual_out = _registered.rms_norm(x, weight, residual, eps)
    return y if residual is None else (y, residual_out)


def linear_scan(a: Any, b: Any, initial_state: Any = None, reverse: bool = False) -> Any:
    """:func:`sscan.linear_scan` with gradients for a, b and initial_state."""
    return _registered.linear_scan(a, b, initial_state, reverse)


def discretize(delta: Any, A: Any, B: Any, method: str = "zoh") -> Any:
    """:func:`sscan.discretize` with gradients for delta, A and B."""
    return _registered.discretize(delta, A, B, method)


def ssm_kernel(delta: Any, A: Any, B: Any, C: Any, length: int, method: str = "zoh") -> Any:
    """:func:`sscan.ssm_kernel` with gradients for delta, A, B and C."""
    return _registered.ssm_kernel(delta, A, B, C, length, method)


def ssm_convolution(u: Any, kernel: Any) -> Any:
    """:func:`sscan.ssm_convolution` with gradients for u and kernel."""
    return _registered.ssm_convolution(u, kernel)
