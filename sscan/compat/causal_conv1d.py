"""The functions of causal_conv1d."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from sscan.torch import causal_conv1d
from sscan.torch import causal_conv1d_update as one_token
from sscan.torch._library import check_tensors, without_autocast


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
    :func:`sscan.causal_conv1d`'s. Steps with a negative seq_idx are padding: their y is 0, and nothing depends on
    them. Differentiable, and the same under autocast. ``final_states_out`` is written to, outside of autograd.
    """
    check_tensors(
        "causal_conv1d_fn",
        {"x": x, "weight": weight},
        {
            "bias": bias, "seq_idx": seq_idx, "initial_states": initial_states, "final_states_out": final_states_out,
        },
    )  # fmt: skip
    padding = None if seq_idx is None else (seq_idx < 0)[:, None]
    if padding is not None:
        x = x.masked_fill(padding, 0)
    with without_autocast(x):
        made: Any = causal_conv1d(
            x, weight, bias, _activation(activation), initial_states, return_final_states, seq_idx
        )
    y, *final_states = made if return_final_states else (made,)
    y = y if padding is None else y.masked_fill(padding, 0)
    if not return_final_states:
        return y
    if final_states_out is None:
        return y, final_states[0]
    with torch.no_grad():
        return y, final_states_out.copy_(final_states[0])


def causal_conv1d_ref(
    x: Any,
    weight: Any,
    bias: Any = None,
    initial_states: Any = None,
    return_final_states: bool = False,
    final_states_out: Any = None,
    activation: str | None = None,
) -> Any:
    """``causal_conv1d_fn`` in PyTorch alone, to compare with."""
    (dim, width), real = weight.shape, torch.promote_types(x.dtype, weight.dtype)
    before = x.new_zeros((x.shape[0], dim, width - 1)) if initial_states is None else initial_states.to(x.dtype)
    whole = torch.cat([before, x], -1)
    bias = None if bias is None else bias.to(real)
    total = functional.conv1d(whole.to(real), weight.to(real)[:, None], bias, groups=dim)
    y = (total if _activation(activation) is None else functional.silu(total)).to(x.dtype)
    if not return_final_states:
        return y
    final_states = whole[..., whole.shape[-1] - (width - 1) :]
    return y, final_states if final_states_out is None else final_states_out.copy_(final_states)


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
    check_tensors(
        "causal_conv1d_update",
        {"x": x, "conv_state": conv_state, "weight": weight},
        {"bias": bias, "cache_seqlens": cache_seqlens, "conv_state_indices": conv_state_indices},
    )
    if conv_state_indices is not None:
        return _some_rows(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    if x.ndim == 3:
        return _several_tokens(x, conv_state, weight, bias, _activation(activation), cache_seqlens)
    if cache_seqlens is None:
        return one_token(x, conv_state, weight, bias, _activation(activation))
    return causal_conv1d_update(x[..., None], conv_state, weight, bias, activation, cache_seqlens)[..., 0]


def causal_conv1d_update_ref(
    x: Any, conv_state: Any, weight: Any, bias: Any = None, activation: str | None = None, cache_seqlens: Any = None
) -> Any:
    """``causal_conv1d_update`` in PyTorch alone, one token after the other, to compare with."""
    if x.ndim == 2:
        return causal_conv1d_update_ref(x[..., None], conv_state, weight, bias, activation, cache_seqlens)[..., 0]
    kept, past = conv_state.shape[-1], weight.shape[1] - 1
    rows, outs = torch.arange(x.shape[0], device=x.device)[:, None], []
    for t, token in enumerate(x.unbind(-1)):
        if cache_seqlens is None:
            window = conv_state[..., kept - past :]
        else:
            places = (cache_seqlens[:, None] + t + torch.arange(-past, 0, device=x.device)) % kept
            window = conv_state[rows, :, places].mT
        outs.append(causal_conv1d_ref(token[..., None], weight, bias, window, activation=activation))
        if cache_seqlens is None:
            conv_state.copy_(torch.cat([conv_state[..., 1:], token[..., None].to(conv_state.dtype)], -1))
        else:
            conv_state[rows[:, 0], :, (cache_seqlens + t) % kept] = token.to(conv_state.dtype)
    return torch.cat(outs, -1)


def causal_conv1d_varlen_states(x: Any, cu_seqlens: Any, state_len: int) -> Any:
    """The last ``state_len`` inputs of each of the packed sequences, newest last; zeros before those that are shorter.

    x (tokens, dim), cu_seqlens (sequences + 1,): (sequences, dim, state_len). Not differentiable.
    """
    check_tensors("causal_conv1d_varlen_states", {"x": x, "cu_seqlens": cu_seqlens}, {})
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    places = ends + torch.arange(-state_len, 0, device=x.device)
    if len(x) == 0:
        return x.new_zeros((len(ends), x.shape[1], state_len))
    return x.detach()[places.clamp(min=0)].masked_fill((places < starts)[..., None], 0).mT


def causal_conv1d_varlen_states_ref(x: Any, cu_seqlens: Any, state_len: int) -> Any:
    """``causal_conv1d_varlen_states``, one sequence after the other."""
    borders = cu_seqlens.tolist()
    ends = [x[max(start, end - state_len) : end].detach().mT for start, end in zip(borders, borders[1:], strict=False)]
    return torch.stack([functional.pad(states, (state_len - states.shape[1], 0)) for states in ends])


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
