"""The functions of mamba_ssm for Mamba-1, with its arguments in its order."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from sscan.torch import causal_conv1d, rms_norm, selective_scan
from sscan.torch import selective_state_update as one_step
from sscan.torch._block import applied, applied_back, mamba_inner
from sscan.torch._library import autocast_dtype, check_tensors, without_autocast

if TYPE_CHECKING:
    from collections.abc import Iterable

Tensor = Any


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor = None,
    z: Tensor = None,
    delta_bias: Tensor = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """The selective scan: :func:`sscan.torch.selective_scan`, with inputs of several dtypes.

    u, delta, z (batch, dim, length) and varying B and C are taken in the widest dtype among them, the others in that of
    the arithmetic; y has u's dtype. Differentiable for every input, and through the last state too. Autocast does not
    change it, as it does not change the original.
    """
    check_tensors(
        "selective_scan_fn",
        {"u": u, "delta": delta, "A": A, "B": B, "C": C},
        {"D": D, "z": z, "delta_bias": delta_bias},
    )
    wide = _widest(x for x in (u, delta, z, B, C) if x is not None and x.ndim > 2)
    real = torch.promote_types(wide, torch.float32)
    number = torch.promote_types(real, torch.complex64) if A.is_complex() else real
    B, C = (x.to(number if x.ndim == 2 or x.is_complex() else wide) for x in (B, C))
    u_, delta, z = (None if x is None else x.to(wide) for x in (u, delta, z))
    D, delta_bias = (None if x is None else x.to(real) for x in (D, delta_bias))
    with without_autocast(u):
        made: Any = selective_scan(u_, delta, A.to(number), B, C, D, z, delta_bias, delta_softplus, return_last_state)
    y, *last_state = made if return_last_state else (made,)
    return (y.to(u.dtype), *last_state) if return_last_state else y.to(u.dtype)


def _widest(tensors: Iterable[Tensor]) -> Any:
    """The dtype that holds all of these tensors, complex ones left out."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors if not x.is_complex()))


class SelectiveScanFn:
    """The autograd function of the original, as far as it is called: ``SelectiveScanFn.apply``."""

    apply = staticmethod(selective_scan_fn)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor = None,
    z: Tensor = None,
    delta_bias: Tensor = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """``selective_scan_fn`` in PyTorch alone, one step after the other, to compare with: slow."""
    real = torch.promote_types(u.dtype, torch.float32)
    number = torch.promote_types(real, torch.complex64) if A.is_complex() else real
    x, step, A = u.to(real), delta.to(real), A.to(number)
    if delta_bias is not None:
        step = step + delta_bias.to(real)[:, None]
    if delta_softplus:
        step = functional.softplus(step)
    B, C = (_each_channel(matrix, A, u.shape[2]) for matrix in (B, C))
    decay, entering = torch.exp(step[:, :, None] * A[:, :, None]), (step * x)[:, :, None] * B
    state, states = torch.zeros_like(entering[..., 0]), []
    for t in range(u.shape[2]):
        state = decay[..., t] * state + entering[..., t]
        states.append(state)
    y = (C * torch.stack(states, -1)).sum(2)
    y = 2 * y.real if A.is_complex() else y
    if D is not None:
        y = y + D.to(real)[:, None] * x
    if z is not None:
        y = y * functional.silu(z.to(real))
    return (y.to(u.dtype), state) if return_last_state else y.to(u.dtype)


def _each_channel(matrix: Tensor, A: Tensor, length: int) -> Tensor:
    """B or C, in any of its forms, as (batch or 1, dim or 1, state, length or 1) in the dtype of A."""
    if matrix.ndim == 2:
        return matrix.to(A.dtype)[None, :, :, None]
    if A.is_complex() and not matrix.is_complex():
        matrix = torch.view_as_complex(matrix.to(A.real.dtype).unflatten(-1, (length, 2)).contiguous())
    matrix = matrix.to(A.dtype)
    return matrix[:, None] if matrix.ndim == 3 else matrix.repeat_interleave(A.shape[0] // matrix.shape[1], 1)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    A: Tensor,
    B: Tensor = None,
    C: Tensor = None,
    D: Tensor = None,
    delta_bias: Tensor = None,
    B_proj_bias: Tensor = None,
    C_proj_bias: Tensor = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor = None,
    c_rms_weight: Tensor = None,
    dt_rms_weight: Tensor = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """The Mamba block behind its input projection, xz (batch, 2 * d_inner, length): (batch, length, d_model).

    conv1d_weight is (d_inner, 1, d_conv). B and C that are given do not depend on the input: (d_inner, state), or
    varying as the scan takes them. ``checkpoint_lvl=1``, for B and C of the input and without norms, keeps nothing but
    the inputs for the backward; 0 and the other cases keep the inputs of every op. The norms are over the states of B
    and C and over the channels of the step size, behind its projection.

    Raises
    ------
    ValueError
        For another ``checkpoint_lvl``, and for a bias or norm of a B or C that is given.
    """
    check_tensors(
        "mamba_inner_fn",
        {
            "xz": xz, "conv1d_weight": conv1d_weight, "x_proj_weight": x_proj_weight,
            "delta_proj_weight": delta_proj_weight, "out_proj_weight": out_proj_weight, "A": A,
        },
        {
            "conv1d_bias": conv1d_bias, "out_proj_bias": out_proj_bias, "B": B, "C": C, "D": D,
            "delta_bias": delta_bias, "B_proj_bias": B_proj_bias, "C_proj_bias": C_proj_bias,
            "b_rms_weight": b_rms_weight, "c_rms_weight": c_rms_weight, "dt_rms_weight": dt_rms_weight,
        },
    )  # fmt: skip
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"mamba_inner_fn: checkpoint_lvl must be 0 or 1, got {checkpoint_lvl!r}")
    xz, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias = _as_autocast(
        xz, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias
    )
    x, z = (xz if xz.stride(-1) == 1 else xz.contiguous()).chunk(2, 1)
    conv1d_weight = conv1d_weight.squeeze(1)
    extras = (B, C, B_proj_bias, C_proj_bias, b_rms_weight, c_rms_weight, dt_rms_weight)
    if checkpoint_lvl == 1 and not A.is_complex() and all(extra is None for extra in extras):
        out, _, _ = mamba_inner(
            x, z, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, D,
            delta_bias, None, None, None, None, None, delta_softplus, False,
        )  # fmt: skip
        return out
    u = causal_conv1d(x, conv1d_weight, conv1d_bias, "silu")
    x_dbl = applied(x_proj_weight, u)
    rank, rows = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    dt, of_B, of_C = x_dbl[:, :rank], x_dbl[:, rank : rank + rows], x_dbl[:, x_dbl.shape[1] - rows :]
    delta = _normalised(applied(delta_proj_weight, dt), dt_rms_weight, b_c_dt_rms_eps)
    B = _matrix("B", B, of_B, B_proj_bias, b_rms_weight, b_c_dt_rms_eps, A)
    C = _matrix("C", C, of_C, C_proj_bias, c_rms_weight, b_c_dt_rms_eps, A)
    y = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return applied_back(out_proj_weight, out_proj_bias, y)


class MambaInnerFn:
    """The autograd function of the original, as far as it is called: ``MambaInnerFn.apply``."""

    apply = staticmethod(mamba_inner_fn)


def _as_autocast(xz: Tensor, *weights: Tensor) -> list[Tensor]:
    """The input in autocast's dtype, if there is one, and the weights of the projections in that of the input."""
    dtype = autocast_dtype(xz)
    xz = xz if dtype is None else xz.to(dtype)
    return [xz, *(None if weight is None else weight.to(xz.dtype) for weight in weights)]


def _matrix(name: str, given: Tensor, made: Tensor, bias: Tensor, norm: Tensor, eps: float, A: Tensor) -> Tensor:
    """B or C for the scan: as given, or what the projection made of the input, (batch, rows, length)."""
    if given is not None:
        if bias is not None or norm is not None:
            raise ValueError(f"mamba_inner_fn: {name} is given, so it must not have a bias or a norm of its projection")
        return given
    if bias is not None:
        made = made + bias.to(made.dtype)[:, None]
    if A.is_complex():  # rows are the real and imaginary part of each state: to be neighbours in time
        made = made.unflatten(1, (A.shape[1], 2)).transpose(2, 3).flatten(2)
    return _normalised(made, norm, eps)


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The RMS norm over the channels of (batch, channels, length)."""
    return x if weight is None else rms_norm(x.mT, weight, eps=eps).mT


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    A: Tensor,
    B: Tensor = None,
    C: Tensor = None,
    D: Tensor = None,
    delta_bias: Tensor = None,
    B_proj_bias: Tensor = None,
    C_proj_bias: Tensor = None,
    delta_softplus: bool = True,
) -> Tensor:
    """``mamba_inner_fn`` in PyTorch alone, to compare with: slow."""
    x, z = xz.chunk(2, 1)
    x = functional.conv1d(
        x, conv1d_weight, conv1d_bias, padding=conv1d_weight.shape[2] - 1, groups=conv1d_weight.shape[0]
    )
    u = functional.silu(x[..., : xz.shape[2]])
    x_dbl = x_proj_weight @ u
    rank, rows = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    B = _matrix("B", B, x_dbl[:, rank : rank + rows], B_proj_bias, None, 0.0, A)
    C = _matrix("C", C, x_dbl[:, x_dbl.shape[1] - rows :], C_proj_bias, None, 0.0, A)
    y = selective_scan_ref(u, delta_proj_weight @ x_dbl[:, :rank], A, B, C, D, z, delta_bias, delta_softplus)
    return functional.linear(y.mT, out_proj_weight, out_proj_bias)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor = None,
    z: Tensor = None,
    dt_bias: Tensor = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor = None,
) -> Tensor:
    """One step of the scan; state (batch, dim, state), or (batch, heads, dim, state), is updated in place.

    With heads x, dt and z are (batch, heads, dim), A (heads, dim, state), D and dt_bias (heads, dim). x, dt, z, B and C
    are taken in the widest dtype among them; y has that of x. Not differentiable.
    """
    check_tensors(
        "selective_state_update",
        {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C},
        {"D": D, "z": z, "dt_bias": dt_bias, "state_batch_indices": state_batch_indices},
    )
    wide = _widest(t for t in (x, dt, z, B, C) if t is not None)
    with torch.no_grad():
        x_, dt, z, B, C = (None if t is None else t if t.is_complex() else t.to(wide) for t in (x, dt, z, B, C))
        if state.ndim == 3:
            return one_step(state, x_, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices).to(x.dtype)
        rows = state.flatten(1, 2)
        x_, dt, z = (None if t is None else t.flatten(1, 2) for t in (x_, dt, z))
        A, D, dt_bias = (None if t is None else t.flatten(0, 1) for t in (A, D, dt_bias))
        y = one_step(rows, x_, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
        _, heads, dim, _ = state.shape
        if heads > 1 and dim > 1 and state.stride(1) != dim * state.stride(2):  # they did not merge without a copy
            state.copy_(rows.view_as(state))
        return y.view_as(x).to(x.dtype)


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor = None,
    z: Tensor = None,
    dt_bias: Tensor = None,
    dt_softplus: bool = False,
) -> Tensor:
    """``selective_state_update`` in PyTorch alone, to compare with."""
    real = torch.promote_types(x.dtype, torch.float32)
    step = dt.to(real) if dt_bias is None else dt.to(real) + dt_bias.to(real)
    step = (functional.softplus(step) if dt_softplus else step)[..., None]
    B, C = (_each_row(matrix, state) for matrix in (B, C))
    h = torch.exp(step * A) * state + step * B * x[..., None]
    state.copy_(h)
    y = (h * C).sum(-1)
    y = 2 * y.real if y.is_complex() else y
    if D is not None:
        y = y + D * x
    return (y if z is None else y * functional.silu(z.to(real))).to(x.dtype)


def _each_row(matrix: Tensor, state: Tensor) -> Tensor:
    """B or C, (batch, state) or (batch, groups, state), beside a state (batch, heads or dim, ..., state)."""
    if matrix.ndim == 2:
        matrix = matrix[:, None]
    matrix = matrix.to(torch.promote_types(state.dtype, torch.float32))
    matrix = matrix.repeat_interleave(state.shape[1] // matrix.shape[1], 1)
    return matrix if state.ndim == 3 else matrix[:, :, None]


@dataclass
class InferenceParams:
    """Where a generation is, and the states of its layers, as ``Mamba.forward`` takes them.

    Attributes
    ----------
    max_seqlen, max_batch_size : int
        How much there will be at most.
    seqlen_offset : int
        How many tokens there have been.
    batch_size_offset : int
        Is not looked at.
    key_value_memory_dict : dict
        The states of each layer, by its ``layer_idx``.
    lengths_per_sample : tensor, optional
        How many tokens there have been in each row, for whoever wants to keep that.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin again; the layers begin with new states when they see a ``seqlen_offset`` of 0."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()
