"""The ops as compositions of torch operations and ``linear_scan``, all differentiable any number of times.

Slow and large in memory. They serve second derivatives: the gradient of an op's backward is taken from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from sscan.torch._fakes import accumulation, number_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Composition = Callable[..., tuple[Any, ...]]


def gradients(op: Composition, cotangents: Sequence[Any], inputs: Sequence[Any], *others: Any) -> Sequence[Any]:
    """The gradients of a composition with respect to its inputs (None left out), with a graph of their own."""
    wanted = [x for x in inputs if x is not None]
    found = _grad(op(*inputs, *others), cotangents, wanted, create_graph=True)
    return [torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(wanted, found, strict=True)]


def pulled_back(function: Composition, inputs: Sequence[Any], options: Any, cotangents: Sequence[Any]) -> list[Any]:
    """Gradients of ``function(*inputs, *options)``, in the graph of the inputs if gradients are recorded.

    None for what is no input, is of integers, or does not matter. The function sees aliases of the inputs, at which
    the way back ends; an alias of an input that requires grad is connected to it, for derivatives of higher order.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [_alias(x) for x in inputs]
        wanted = [x for x in aliases if x is not None and x.requires_grad]
        found = iter(_grad(function(*aliases, *options), cotangents, wanted, create_graph))
    return [next(found) if x is not None and x.requires_grad else None for x in aliases]


def _grad(outputs: Sequence[Any], cotangents: Sequence[Any], wanted: Sequence[Any], create_graph: bool) -> Any:
    """The gradients of those outputs that have a graph and a cotangent, which may be none."""
    pairs = [
        (output, given)
        for output, given in zip(outputs, cotangents, strict=True)
        if given is not None and output.requires_grad
    ]
    if not pairs:
        return [None] * len(wanted)
    results, given = zip(*pairs, strict=True)
    return torch.autograd.grad(results, wanted, given, create_graph=create_graph, allow_unused=True)


def _alias(x: Any) -> Any:
    if x is None or not (x.is_floating_point() or x.is_complex()):
        return x
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


# --- The linear scan --------------------------------------------------------------------------------------------------


def linear_scan_backward(dh: Any, a: Any, h: Any, initial_state: Any, reverse: bool) -> tuple[Any, ...]:
    """The formulas of docs/maths.md."""
    number = a.dtype if a.is_complex() else accumulation(a)
    dh_, a_, h_ = (x.to(number) for x in (dh, a, h))
    first = torch.zeros_like(a_[..., :1])
    if reverse:
        following, before = torch.cat([first, a_[..., :-1]], -1), [h_[..., 1:]]
    else:
        following, before = torch.cat([a_[..., 1:], first], -1), [h_[..., :-1]]
    db = torch.ops.sscan.linear_scan(following.conj(), dh_, None, not reverse)
    start = first if initial_state is None else initial_state.to(number)[..., None] + first
    before.insert(len(before) if reverse else 0, start)
    da = db * torch.cat(before, -1).conj()
    made = [da.to(a.dtype), db.to(a.dtype)]
    if initial_state is not None:
        border = slice(-1, None) if reverse else slice(0, 1)
        made.append((db * a_.conj())[..., border].sum(-1).to(initial_state.dtype))
    return tuple(made)


# --- The selective scan -----------------------------------------------------------------------------------------------


class _Moment(torch.autograd.Function):  # type: ignore[misc]
    """The integral of x^m exp(x p) over x from 0 to 1: (exp(p) - 1) / p for m = 0, and the next is its derivative."""

    @staticmethod
    def forward(ctx: Any, p: Any, m: int) -> Any:
        ctx.save_for_backward(p)
        ctx.m = m
        small = p.abs() < 2
        near, term = torch.full_like(p, 1 / (m + 1)), torch.ones_like(p)
        for k in range(1, 25):  # 2^25 / 25! is below the rounding of float64
            term = term * p / k
            near = near + term / (m + 1 + k)
        large = torch.where(small, torch.ones_like(p), p)
        far = (torch.exp(large) - 1) / large
        for k in range(1, m + 1):
            far = (torch.exp(large) - k * far) / large
        return torch.where(small, near, far)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        (p,) = ctx.saved_tensors
        return gradient * _Moment.apply(p, ctx.m + 1).conj(), None


def selective_scan(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, initial_state: Any,
    seq_idx: Any, cu_seqlens: Any, delta_softplus: bool, discretization: str,
) -> tuple[Any, ...]:  # fmt: skip
    """``(y, last_state)``; states are (batch, dim, state, length)."""
    real, number = accumulation(u), number_of(u, A)
    x, step, A = u.to(real), delta.to(real), A.to(number)
    if delta_bias is not None:
        step = step + delta_bias.to(real)[:, None]
    if delta_softplus:
        step = functional.softplus(step, threshold=40.0)
    p = step[:, :, None] * A[:, :, None]
    entering = (step * x)[:, :, None] * _by_channel(B, A)
    if discretization == "zoh":
        entering = entering * _Moment.apply(p, 0)
    if cu_seqlens is not None:
        h, last_state = _packed_states(torch.exp(p), entering, initial_state, cu_seqlens.long())
    else:
        h, last_state = _states(torch.exp(p), entering, initial_state, seq_idx)
    v = (_by_channel(C, A) * h).sum(2)
    v = 2 * v.real if A.is_complex() else v
    if D is not None:
        v = v + D.to(real)[:, None] * x
    if z is not None:
        v = v * functional.silu(z.to(real))
    return v.to(u.dtype), last_state


def _by_channel(matrix: Any, A: Any) -> Any:
    """B or C as (batch or 1, dim or 1, state, length or 1), in the dtype of A."""
    if matrix.ndim == 2:
        return matrix.to(A.dtype)[None, :, :, None]
    if A.is_complex() and not matrix.is_complex():
        pairs = matrix.to(A.real.dtype).reshape(*matrix.shape[:-1], matrix.shape[-1] // 2, 2)
        matrix = torch.complex(pairs[..., 0], pairs[..., 1])
    matrix = matrix.to(A.dtype)
    if matrix.ndim == 3:
        return matrix[:, None]
    of_group = A.shape[0] // matrix.shape[1]
    return matrix[:, :, None].expand(-1, -1, of_group, -1, -1).flatten(1, 2)


def _states(decay: Any, entering: Any, initial_state: Any, seq_idx: Any) -> tuple[Any, Any]:
    before = torch.zeros_like(decay[..., 0]) if initial_state is None else initial_state.to(decay.dtype)
    if decay.shape[-1] == 0:
        return entering, before
    if seq_idx is not None:
        same = functional.pad(seq_idx[:, 1:] == seq_idx[:, :-1], (1, 0), value=True)
        decay = decay * same[:, None, None]
    h = torch.ops.sscan.linear_scan(decay, entering, before, False)
    return h, h[..., -1]


def _packed_states(decay: Any, entering: Any, initial_state: Any, borders: Any) -> tuple[Any, Any]:
    if initial_state is None:
        before = torch.zeros(len(borders) - 1, *decay.shape[1:3], dtype=decay.dtype, device=decay.device)
    else:
        before = initial_state.to(decay.dtype)
    length = decay.shape[-1]
    if length == 0:
        return entering, before
    time = torch.arange(length, device=decay.device)
    sequence = torch.searchsorted(borders, time, right=True) - 1
    starts = time == borders[sequence]
    entering = entering + starts * decay * before[sequence].movedim(0, -1)
    h = torch.ops.sscan.linear_scan(decay * ~starts, entering, None, False)
    ends = h[0].movedim(-1, 0)[(borders[1:] - 1).clamp(min=0)]
    empty = borders[1:] == borders[:-1]
    return h, torch.where(empty[:, None, None], before, ends)


# --- The other ops ----------------------------------------------------------------------------------------------------


def causal_conv1d(
    x: Any, weight: Any, bias: Any, initial_state: Any, seq_idx: Any, cu_seqlens: Any, activation: str | None
) -> tuple[Any, ...]:
    """``(y, final_state)``, through the inputs of every window: (rows, dim, times) for each element of the filter."""
    real = accumulation(x)
    (batch, dim, length), width = x.shape, weight.shape[1]
    now = x.to(real)
    time = torch.arange(length, device=x.device)
    rows = torch.arange(batch, device=x.device)
    if cu_seqlens is not None:
        borders = cu_seqlens.long()
        owners = (torch.searchsorted(borders, time, right=True) - 1)[None]
        starts = borders[owners]
        ends, last_starts, last_owners = borders[1:], borders[:-1], torch.arange(len(borders) - 1, device=x.device)
        last_rows = torch.zeros_like(last_owners)
    else:
        starts = torch.zeros(batch, length, dtype=torch.long, device=x.device)
        if seq_idx is not None and length:
            changes = functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
            starts = (changes * time).cummax(1).values
        owners = torch.where(starts == 0, rows[:, None], -1)
        last_starts = starts[:, -1] if length else torch.zeros_like(rows)
        ends, last_rows = torch.full_like(rows, length), rows
        last_owners = torch.where(last_starts == 0, rows, -1)
    before = None if initial_state is None else initial_state.to(real)

    def inputs(rows: Any, times: Any, starts: Any, owners: Any) -> Any:
        """The inputs at ``times`` of sequences that start at ``starts`` and own a row of the initial state, or -1."""
        found = torch.zeros(*times.shape, dim, dtype=real, device=x.device)
        if before is not None and width > 1:
            old = before[owners.clamp(min=0), :, (width - 1 + times - starts).clamp(0, width - 2)]
            found = torch.where((owners >= 0)[..., None], old, found)
        if length:
            found = torch.where((times >= starts)[..., None], now[rows, :, times.clamp(min=0)], found)
        return found.movedim(-1, 1)

    total = torch.zeros_like(now) if bias is None else bias.to(real)[:, None] + torch.zeros_like(now)
    for k in range(width):
        total = total + weight.to(real)[:, k, None] * inputs(rows[:, None], time - (width - 1) + k, starts, owners)
    y = functional.silu(total) if activation == "silu" else total
    lags = torch.arange(-(width - 1), 0, device=x.device)
    final_state = inputs(last_rows[:, None], ends[:, None] + lags, last_starts[:, None], last_owners[:, None])
    return y.to(x.dtype), final_state.to(x.dtype)


def rms_norm(x: Any, weight: Any, residual: Any, eps: float) -> tuple[Any, ...]:
    """``(y, residual_out)``."""
    real = accumulation(x)
    s = x.to(real)
    if residual is not None:
        s = s + residual.to(real)
    y = s * torch.rsqrt((s * s).mean(-1, keepdim=True) + eps) * weight.to(real)
    return y.to(x.dtype), s


def discretize(delta: Any, A: Any, B: Any, method: str) -> tuple[Any, ...]:
    """``(A_bar, B_bar)``."""
    real, A = accumulation(delta), A.to(number_of(delta, A))
    step = delta.to(real)[..., None]
    if delta.ndim == 1:
        p, scale = step * A, step * B.to(A.dtype)
    else:
        p, scale = step * A[:, None], step * _by_channel(B, A).transpose(2, 3)
    if method == "bilinear":
        return (1 + p / 2) / (1 - p / 2), scale / (1 - p / 2)
    A_bar = 1 + p if method == "euler" else torch.exp(p)
    return A_bar, scale * _Moment.apply(p, 0) if method == "zoh" else scale


def ssm_kernel(delta: Any, A: Any, B: Any, C: Any, length: int, method: str) -> tuple[Any, ...]:
    """``(K,)``, from the response of the recurrence to an impulse."""
    A_bar, B_bar = discretize(delta, A, B, method)
    impulse = torch.arange(length, device=A.device) == 0
    start = (C.to(A_bar.dtype) * B_bar)[..., None] * impulse
    h = torch.ops.sscan.linear_scan(A_bar[..., None].expand(start.shape), start, None, False)
    K = h.sum(1)
    return (2 * K.real if K.is_complex() else K,)


def ssm_convolution(u: Any, kernel: Any) -> tuple[Any, ...]:
    """``(y,)``."""
    real = accumulation(u)
    length = u.shape[-1]
    if length == 0:
        return (u * kernel.to(u.dtype),)
    spectra = (torch.fft.rfft(x.to(real), 2 * length) for x in (u, kernel))
    product = next(spectra) * next(spectra)
    return (torch.fft.irfft(product, 2 * length)[..., :length].to(u.dtype),)
