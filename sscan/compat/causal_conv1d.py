"""The functions of causal_conv1d."""

from __future__ import annotations

from typing import Any

import torch

from sscan.torch import causal_conv1d
from sscan.torch import causal_conv1d_update as one_token


def causal_conv1d_fn(
    x: Any,
    weight: Any,
    bias: Any = None,
    seq_idx: Any = None,
    initial_states: Any = None,
    return_final_states: bool = False,
    final_states_out: Any = None,
    activation: str | None = None,
) -> Any:
    """Causal depthwise convolution, x (batch, dim, length), weight (dim, width).

    As causal_conv1d's, and on the CPU, for any width, strides and combination of the arguments: seq_idx with states is
    :func:`sscan.causal_conv1d`'s. Differentiable, and the same under autocast. ``final_states_out`` is written to,
    outside of autograd.
    """
    with torch.autocast(x.device.type, enabled=False):
        made = causal_conv1d(x, weight, bias, _activation(activation), initial_states, return_final_states, seq_idx)
    if not return_final_states or final_states_out is None:
        return made
    with torch.no_grad():
        return made[0], final_states_out.copy_(made[1])


@torch.no_grad()  # type: ignore[untyped-decorator]
def causal_conv1d_update(
    x: Any,
    conv_state: Any,
    weight: Any,
    bias: Any = None,
    activation: str | None = None,
    cache_seqlens: Any = None,
    conv_state_indices: Any = None,
) -> Any:
    """The convolution of the next token, x (batch, dim), or tokens, (batch, dim, length); conv_state changes in place.

    conv_state (batch, dim, kept), kept >= width - 1, ends with the last input. With ``cache_seqlens`` (batch,) it is a
    ring: the next input goes to column ``cache_seqlens % kept``. With ``conv_state_indices`` (batch,) row b of x has
    row ``conv_state_indices[b]`` of it; a negative one leaves the row out, and its output is 0. Not differentiable.
    """
    if conv_state_indices is not None:
        return _some_rows(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    if x.ndim == 3:
        return _several_tokens(x, conv_state, weight, bias, _activation(activation), cache_seqlens)
    if cache_seqlens is None:
        return one_token(x, conv_state, weight, bias, _activation(activation))
    return causal_conv1d_update(x[..., None], conv_state, weight, bias, activation, cache_seqlens)[..., 0]


def _several_tokens(x: Any, conv_state: Any, weight: Any, bias: Any, activation: str | None, filled: Any) -> Any:
    (_, dim, length), kept, past = x.shape, conv_state.shape[-1], weight.shape[1] - 1
    if kept < past:
        raise ValueError(
            f"causal_conv1d_update: conv_state must keep width - 1 = {past} columns or more, got shape "
            f"{tuple(conv_state.shape)}"
        )
    if filled is None:
        if length == 1:
            return one_token(x[..., 0], conv_state, weight, bias, activation)[..., None]
        y = causal_conv1d(x, weight, bias, activation, conv_state[..., kept - past :])
        conv_state.copy_(torch.cat([conv_state.to(x.dtype), x], -1)[..., length:])
        return y
    before = (filled[:, None] + torch.arange(-past, 0, device=x.device)) % kept
    window = conv_state.gather(2, before[:, None].expand(-1, dim, -1).long())
    y = causal_conv1d(x, weight, bias, activation, window)
    newest = torch.arange(max(length - kept, 0), length, device=x.device)
    places = (filled[:, None] + newest) % kept
    conv_state.scatter_(2, places[:, None].expand(-1, dim, -1).long(), x[..., newest].to(conv_state.dtype))
    return y


def _some_rows(
    x: Any, conv_state: Any, weight: Any, bias: Any, activation: str | None, filled: Any, indices: Any
) -> Any:
    """Without asking the GPU which rows are left out: each of them does once more what the first other one does."""
    wanted = indices >= 0
    source = torch.where(wanted, torch.arange(len(indices), device=x.device), wanted.int().argmax())
    rows = indices.clamp(min=0).long()[source]
    before = conv_state[rows]
    after = before.clone()
    y = causal_conv1d_update(x[source], after, weight, bias, activation, None if filled is None else filled[source])
    conv_state[rows] = torch.where(wanted.any(), after, before)
    return y.masked_fill(~wanted.reshape(-1, *[1] * (y.ndim - 1)), 0)


def _activation(activation: str | None) -> str | None:
    return "silu" if activation == "swish" else activation
