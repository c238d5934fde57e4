"""One sequence over several devices: ops on tensors of which every rank of a process group has a part along time.

The parts lie in the order of ranks and may differ in length; a part may have no steps at all. What crosses from rank to
rank is of the size of a state, (batch, dim, state), once in the forward and once in the backward. Every rank must make
the same calls in the same order, as for all collectives, and go back through all of them or none: a gradient may have
to pass through a rank that wants none for itself. So results require grad on every rank wherever gradients are
recorded, whatever its inputs.

Gradients of what every rank has (A, D, biases, weights, constant B and C) are those of its part: their sum over the
ranks is the gradient for the sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

import sscan
from sscan.torch import _fakes, ops
from sscan.torch._library import _lowered, autocast_dtype, check_tensors, or_zeros

if TYPE_CHECKING:
    from torch import Tensor

    from sscan.selective_scan import Discretization

# One name is deprecated in PyTorch 2.13, the other does not exist before.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


def _place(op: str, group: Any, initial_state: Any) -> tuple[int, int]:
    """The process's rank in the group, and how many there are; ValueError if it may not make this call."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(f"{op}: group must contain this process, got one that does not")
    if rank > 0 and initial_state is not None:
        raise ValueError(f"{op}: initial_state belongs to the first rank of the group, got one on rank {rank}")
    return rank, size


def _gathered(x: Any, group: Any, size: int) -> Any:
    """The tensors of all ranks, which are contiguous, one after the other along a new first axis."""
    found = x.new_empty((size, *x.shape))
    _all_gather(found.flatten(0, 1), x, group=group)
    return found


def _marker(x: Any) -> Any:
    """An input without elements that requires grad: what it goes into requires grad on every rank."""
    return torch.empty(0, device=x.device, requires_grad=True)


# --- The selective scan -----------------------------------------------------------------------------------------------


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, *, return_last_state: Literal[True],
    initial_state: Tensor | None = None, discretization: Discretization = "mamba", group: Any = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: Literal[False] = False, *,
    initial_state: Tensor | None = None, discretization: Discretization = "mamba", group: Any = None,
) -> Tensor: ...  # fmt: skip


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False, *,
    initial_state: Tensor | None = None, discretization: Discretization = "mamba", group: Any = None,
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
    discretization: Discretization = "mamba",
    group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`sscan.torch.selective_scan` of a sequence whose steps are split over the ranks of a process group.

    Parameters
    ----------
    u, delta, z : (batch, dim, length of the part)
        The rank's part, and so for B and C if they vary. Batch, dim, dtypes and options are the same on all ranks.
    A, D, delta_bias
        The same on all ranks, and so B and C if they are constant.
    initial_state : (batch, dim, state)
        The state before the sequence, on the first rank only.
    return_last_state : bool
        Whether the state at the end of the rank's part is returned too. On the last rank it is that of the sequence.
    group : torch.distributed.ProcessGroup
        None is the default group.

    Returns
    -------
    y : (batch, dim, length of the part)
        The rank's part, or ``(y, last_state)``. All carry gradients, through the other ranks too.

    Raises
    ------
    ValueError, TypeError
        As :func:`sscan.selective_scan`; ValueError too for an initial_state on another rank than the first.

    Notes
    -----
    A rank finds what its part does to the state that enters it, exchanges that with the others, and scans its part once
    it knows the state. Where one device would cut its part along time anyway (few channels, many steps), that is no
    more work; where it would not, the forward costs up to two thirds more on a GPU, and the backward a third. Gradients
    of second order do not exist.
    """
    op = "selective_scan"
    rank, size = _place(op, group, initial_state)
    if size == 1:
        return ops.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state,
            initial_state=initial_state, discretization=discretization,
        )  # fmt: skip
    check_tensors(
        op,
        {"u": u, "delta": delta, "A": A, "B": B, "C": C},
        {"D": D, "z": z, "delta_bias": delta_bias, "initial_state": initial_state},
    )
    u, delta, z, B, C = _under_autocast(u, delta, z, B, C)
    across = _Across(group, rank, size)
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    options: dict[str, Any] = {"delta_softplus": delta_softplus, "discretization": discretization}
    if torch.is_grad_enabled():
        y, last_state = _SelectiveScan.apply(across, options, _marker(u), *inputs, initial_state)
    else:
        y, last_state, _ = sscan.selective_scan_forward(
            *inputs, **options, initial_state=initial_state, keep_checkpoints=False, state_passing=across.before
        )
    return (y, last_state) if return_last_state else y


def _under_autocast(u: Any, *others: Any) -> list[Any]:
    """The tensors, and what varies with time in the dtype of autocast, if there is one."""
    dtype = autocast_dtype(u)
    lowered = (x is not None and x.ndim >= 3 and dtype is not None for x in (u, *others))
    return [_lowered(x, u.device.type, dtype) if low else x for x, low in zip((u, *others), lowered, strict=True)]


class _Across:
    """How carries get from rank to rank."""

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size

    def before(self, carry: Any) -> Any:
        """The carries of the ranks before this one."""
        found = _gathered(carry, self.group, self.size)
        return found[: self.rank] if self.rank > 0 else None

    def after(self, carry: Any) -> Any:
        """The carries of the ranks after this one."""
        found = _gathered(carry, self.group, self.size)
        return found[self.rank + 1 :] if self.rank < self.size - 1 else None


class _SelectiveScan(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, across: _Across, options: Any, marker: Any, *arguments: Any) -> tuple[Any, Any]:
        *inputs, initial_state = arguments
        y, last_state, checkpoints = sscan.selective_scan_forward(
            *inputs, **options, initial_state=initial_state, state_passing=across.before
        )
        ctx.across, ctx.options = across, options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments, checkpoints)
        return y, last_state

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Any, dlast_state: Any) -> tuple[Any, ...]:
        *inputs, initial_state, checkpoints = ctx.saved_tensors
        gradients = sscan.selective_scan_backward(
            or_zeros(dy, inputs[0]), *inputs, **ctx.options, dlast_state=dlast_state, initial_state=initial_state,
            checkpoints=checkpoints, state_passing=ctx.across.after,
        )  # fmt: skip
        return None, None, None, *gradients


# --- The convolution --------------------------------------------------------------------------------------------------


@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    initial_state: Tensor | None = None, *, return_final_state: Literal[True], group: Any = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    initial_state: Tensor | None = None, return_final_state: Literal[False] = False, *, group: Any = None,
) -> Tensor: ...  # fmt: skip


@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    initial_state: Tensor | None = None, return_final_state: bool = False, *, group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    *,
    group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`sscan.torch.causal_conv1d` of a sequence whose steps are split over the ranks of a process group.

    The width - 1 inputs before a part come from the ranks before it.

    Parameters
    ----------
    x : (batch, dim, length of the part)
        The rank's part, of any length. Batch, dim and dtype are the same on all ranks.
    weight, bias, activation
        The same on all ranks.
    initial_state : (batch, dim, width - 1)
        The inputs before the sequence, on the first rank only.
    return_final_state : bool
        Whether the last width - 1 inputs up to the end of the part are returned too.
    group : torch.distributed.ProcessGroup
        None is the default group.

    Returns
    -------
    y : (batch, dim, length of the part)
        The rank's part, or ``(y, final_state)``. All carry gradients, through the other ranks too.

    Raises
    ------
    ValueError, TypeError
        As :func:`sscan.causal_conv1d`; ValueError too for an initial_state on another rank than the first.
    """
    op = "causal_conv1d"
    rank, size = _place(op, group, initial_state)
    check_tensors(op, {"x": x, "weight": weight}, {"bias": bias, "initial_state": initial_state})
    _fakes.check_together(op, x=x, weight=weight, bias=bias, initial_state=initial_state)
    _fakes.checked_convolution(x, weight, bias, initial_state, None, None)  # before any rank waits for another one
    if size == 1 or weight.shape[1] == 1 or 0 in x.shape[:2]:
        return ops.causal_conv1d(x, weight, bias, activation, initial_state, return_final_state)
    (x,) = _under_autocast(x)
    halo = _Halo(group, rank, size, weight.shape[1] - 1)
    if torch.is_grad_enabled():
        y, final_state = _CausalConv1d.apply(halo, activation, _marker(x), x, weight, bias, initial_state)
    else:
        before, _ = halo.before(x, initial_state)
        y, final_state = sscan.causal_conv1d(x, weight, bias, activation, before, True)
    return (y, final_state) if return_final_state else y


class _Halo:
    """The way of the last ``kept`` inputs from rank to rank, and of their gradients back.

    A part may have fewer steps than that and hand on what it got. How many it has, no other rank knows: so the count
    goes with the inputs, and stays on the device.
    """

    def __init__(self, group: Any, rank: int, size: int, kept: int) -> None:
        self.group, self.rank, self.size, self.kept = group, rank, size, kept

    def before(self, x: Any, initial_state: Any) -> tuple[Any, Any]:
        """The inputs before the rank's part, None for zeros, and how many of its own each rank hands on."""
        kept, number = self.kept, _fakes.accumulation(x)
        own = x[..., max(0, x.shape[2] - kept) :].to(number)
        if self.rank == 0:  # all are its own, those before the sequence too
            start = x.new_zeros((*x.shape[:2], kept)) if initial_state is None else initial_state
            own = torch.cat([start.to(number), own], -1)[..., -kept:]
        sent = own.new_full((*x.shape[:2], kept + 1), own.shape[2])  # the count, behind the inputs
        sent[..., : own.shape[2]] = own
        found = _gathered(sent, self.group, self.size)
        counts = found[..., -1].flatten(1)[:, :1].long()  # without elements if x has none, as then has all else
        if self.rank == 0:
            return initial_state, counts
        state, steps = found[0, ..., :kept], torch.arange(kept, device=x.device)
        for other in range(1, self.rank):
            state = torch.cat([state, found[other, ..., :kept]], -1).index_select(-1, steps + counts[other])
        return state, counts

    def behind(self, gradient: Any, counts: Any) -> Any:
        """The gradient of what the rank hands on; ``gradient`` is that of what it got, from its own results."""
        found = _gathered(gradient, self.group, self.size)
        steps = torch.arange(self.kept, device=found.device)
        total = torch.zeros_like(found[0])
        for other in range(self.size - 1, self.rank, -1):
            handed = torch.cat([torch.zeros_like(total), total], -1)
            total = found[other] + handed.index_select(-1, self.kept + steps - counts[other])
        return total


class _CausalConv1d(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, halo: _Halo, activation: str | None, marker: Any, x: Any, weight: Any, bias: Any, initial_state: Any
    ) -> tuple[Any, Any]:
        before, counts = halo.before(x, initial_state)
        y, final_state = sscan.causal_conv1d(x, weight, bias, activation, before, True)
        ctx.halo, ctx.activation = halo, activation
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, before, counts)
        return y, final_state

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Any, dfinal_state: Any) -> tuple[Any, ...]:
        x, weight, bias, before, counts = ctx.saved_tensors
        halo = ctx.halo
        dy = or_zeros(dy, x)
        dx, dweight, dbias, dbefore = sscan.causal_conv1d_backward(
            dy, x, weight, bias, ctx.activation, before, dfinal_state=dfinal_state
        )
        sent = dy.new_zeros((*x.shape[:2], halo.kept), dtype=_fakes.accumulation(x)) if halo.rank == 0 else dbefore
        handed_on = halo.behind(sent, counts)
        own = min(x.shape[2], halo.kept)
        dx[..., x.shape[2] - own :] += handed_on[..., halo.kept - own :]
        if halo.rank > 0:
            dbefore = None
        elif dbefore is not None:
            dbefore[..., own:] += handed_on[..., : halo.kept - own]
        return None, None, None, dx, dweight, dbias, dbefore
