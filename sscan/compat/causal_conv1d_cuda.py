"""The functions behind the autograd functions of causal_conv1d, as those of others call them.

They are in its module ``cpp_functions``, and in the extension module ``causal_conv1d_cuda`` of releases 1.2 to 1.4.
"""

from __future__ import annotations

from typing import Any

import torch

from sscan.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update


def causal_conv1d_fwd_function(
    x: Any, weight: Any, bias: Any, seq_idx: Any, initial_states: Any, final_states_out: Any, silu_activation: bool
) -> Any:
    """The convolution; ``final_states_out`` is written to if it is given."""
    activation = "silu" if silu_activation else None
    with torch.no_grad():
        if final_states_out is None:
            return causal_conv1d_fn(x, weight, bias, seq_idx, initial_states, activation=activation)
        return causal_conv1d_fn(x, weight, bias, seq_idx, initial_states, True, final_states_out, activation)[0]


def causal_conv1d_bwd_function(
    x: Any, weight: Any, bias: Any, dout: Any, seq_idx: Any, initial_states: Any, dfinal_states: Any, dx: Any,
    return_dinitial_states: bool, silu_activation: bool,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """``(dx, dweight, dbias, dinitial_states)``; the last is None unless it is asked for. dx is written to if given."""
    given = [x, weight, bias, initial_states if return_dinitial_states else None]
    with torch.enable_grad():
        x_, weight_, bias_, before = leaves = [None if t is None else t.detach().requires_grad_() for t in given]
        before = before if return_dinitial_states else initial_states
        activation = "silu" if silu_activation else None
        results = causal_conv1d_fn(x_, weight_, bias_, seq_idx, before, True, activation=activation)
        cotangents = (dout, torch.zeros_like(results[1]) if dfinal_states is None else dfinal_states)
        made = iter(torch.autograd.grad(results, [t for t in leaves if t is not None], cotangents))
    found = [None if t is None else next(made) for t in leaves]
    if dx is not None:
        found[0] = dx.copy_(found[0])
    return found[0], found[1], found[2], found[3]


def causal_conv1d_update_function(
    x: Any, conv_state: Any, weight: Any, bias: Any, silu_activation: bool, cache_seqlens: Any, conv_state_indices: Any
) -> Any:
    """The convolution of the next tokens."""
    activation = "silu" if silu_activation else None
    return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
