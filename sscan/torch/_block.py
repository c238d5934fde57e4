"""The Mamba block as one op, ``sscan::mamba``; without its input projection, ``sscan::mamba_inner``.

For its backward a block keeps its input, what the input projection makes of it, x and z, and A, which is small: the
rest is made again there, the checkpoints of the scan included, which in float32 are as large as x and z in half
precision. PyTorch's compiler sees one op, so it cannot decide to keep more.
"""

from __future__ import annotations

from typing import Any

import torch

import sscan
from sscan.torch import ops
from sscan.torch._arithmetic import LAUNCHES, OPS, Arithmetic, diagonal, is_planned, planned
from sscan.torch._composed import pulled_back
from sscan.torch._library import Saved, cast_under_autocast, define, differentiate, for_each

_ARGUMENTS = """
    Tensor x, Tensor z, Tensor conv_weight, Tensor? conv_bias, Tensor x_proj_weight, Tensor dt_proj_weight,
    Tensor out_proj_weight, Tensor? out_proj_bias, Tensor A, Tensor? D, Tensor? delta_bias, Tensor? conv_state,
    Tensor? ssm_state, Tensor? seq_idx, Tensor? cu_seqlens, Tensor? mask, bool delta_softplus, bool return_states
"""
_DIFFERENTIABLE = 13  # of the arguments, the first
_OF_BLOCK = """
    Tensor hidden, Tensor in_proj_weight, Tensor? in_proj_bias, Tensor conv_weight, Tensor? conv_bias,
    Tensor x_proj_weight, Tensor dt_proj_weight, Tensor out_proj_weight, Tensor? out_proj_bias, Tensor A_log, Tensor? D,
    Tensor? delta_bias, Tensor? conv_state, Tensor? ssm_state, Tensor? seq_idx, Tensor? cu_seqlens, Tensor? mask,
"""
_DIFFERENTIABLE_OF_BLOCK = 14
_PROJECTIONS = (0, 1, 2, 5, 6, 7, 8)  # of a block's arguments, what is multiplied or added in the input's dtype
_PARAMETERS = (3, 4, 10, 11, 12, 13)  # what convolution and scan take in float32 at least, states among it


def _block(causal_conv1d: Any, selective_scan: Any, bmm: Any) -> Any:
    """The block behind its input projection, of these three operations."""

    def block(
        x: Any, z: Any, conv_weight: Any, conv_bias: Any, x_proj_weight: Any, dt_proj_weight: Any, out_proj_weight: Any,
        out_proj_bias: Any, A: Any, D: Any, delta_bias: Any, conv_state: Any, ssm_state: Any, seq_idx: Any,
        cu_seqlens: Any, mask: Any, delta_softplus: bool, return_states: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        u = causal_conv1d(x, conv_weight, conv_bias, "silu", conv_state, return_states, seq_idx, cu_seqlens)
        u, conv_state = u if return_states else (u, None)
        u = masked(u, mask)
        dt, B, C = projections(u, x_proj_weight, dt_proj_weight, A, bmm)
        y = selective_scan(
            u, applied(dt_proj_weight, dt, bmm=bmm), A, B, C, D, z, delta_bias, delta_softplus, return_states,
            initial_state=ssm_state, seq_idx=seq_idx, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        y, ssm_state = y if return_states else (y, None)
        return applied_back(out_proj_weight, out_proj_bias, y, bmm), conv_state, ssm_state

    return block


# Of ops that are differentiable any number of times, for second derivatives.
_composed_block = _block(ops.causal_conv1d, ops.selective_scan, torch.bmm)


def masked(u: Any, mask: Any) -> Any:
    """What the convolution made, with zeros at the steps where the mask (batch, length) is 0."""
    return u if mask is None else u * mask[:, None].to(u.dtype)


def projections(u: Any, x_proj_weight: Any, dt_proj_weight: Any, A: Any, bmm: Any) -> Any:
    """dt (batch, dt_rank, length), and B and C (batch, state, length), as views of one product."""
    (_, dt_rank), (_, state) = dt_proj_weight.shape, A.shape
    return torch.split_with_sizes(applied(x_proj_weight, u, bmm=bmm), [dt_rank, state, state], 1)


# Products with the weights keep (batch, channels, length): a batched product reads an expanded or transposed operand
# where it is, while matmul would fold batch and length and leave the kernels a strided last axis, to be copied.


def applied(weight: Any, x: Any, bias: Any = None, bmm: Any = torch.bmm) -> Any:
    """weight x + bias along the channels: (batch, in, length) to (batch, out, length)."""
    weight = weight.expand(x.shape[0], -1, -1)
    return bmm(weight, x) if bias is None else torch.baddbmm(bias[:, None], weight, x)


def applied_back(weight: Any, bias: Any, y: Any, bmm: Any = torch.bmm) -> Any:
    """The same with the channels last: (batch, in, length) to (batch, length, out)."""
    weight = weight.t().expand(y.shape[0], -1, -1)
    return bmm(y.mT, weight) if bias is None else torch.baddbmm(bias, y.mT, weight)


def _fake(*arguments: Any) -> tuple[Any, ...]:
    x, _, conv_weight, _, _, _, out_proj_weight, _, A, *_, cu_seqlens, _, _, return_states = arguments
    batch, d_inner, length = x.shape
    out, sequences = x.new_empty((batch, length, out_proj_weight.shape[0])), batch
    if not return_states:
        return out, x.new_empty(0), x.new_empty(0)
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
    return (
        out,
        x.new_empty((sequences, d_inner, conv_weight.shape[1] - 1)),
        A.new_empty((sequences, *A.shape)),
    )


def _inner_gradients(
    by: Arithmetic, dtypes: Any, dout: Any, dconv_state: Any, dssm_state: Any,
    x: Any, z: Any, conv_weight: Any, conv_bias: Any, x_proj_weight: Any, dt_proj_weight: Any, out_proj_weight: Any,
    out_proj_bias: Any, A: Any, D: Any, delta_bias: Any, conv_state: Any, ssm_state: Any, seq_idx: Any,
    cu_seqlens: Any, mask: Any, delta_softplus: bool, return_states: bool,
) -> list[Any]:  # fmt: skip
    """Gradients of what a block is made of, those of the weights of x_proj, dt_proj and out_proj in these dtypes."""
    u = sscan.causal_conv1d(x, conv_weight, conv_bias, "silu", conv_state, False, seq_idx, cu_seqlens)
    u = masked(u, mask)
    dt, B, C = projections(u, x_proj_weight, dt_proj_weight, A, by.bmm)
    scanned = (u, applied(dt_proj_weight, dt, bmm=by.bmm), A, B, C, D, z, delta_bias, delta_softplus)
    packing = {"initial_state": ssm_state, "seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
    y, _, checkpoints = sscan.selective_scan_forward(*scanned, **packing)
    dy = applied(out_proj_weight.t(), dout.mT, bmm=by.bmm)
    dout_proj_weight = by.weight_gradient([dout.mT], y, dtypes[2])
    del y
    scan = sscan.selective_scan_backward(dy, *scanned, dlast_state=dssm_state, checkpoints=checkpoints, **packing)
    del dy, checkpoints
    dx_dbl = by.joined(dt_proj_weight.t(), scan.ddelta, scan.dB, scan.dC)
    du = by.add_bmm(scan.du, x_proj_weight.t().expand(x.shape[0], -1, -1), dx_dbl)
    conv = sscan.causal_conv1d_backward(
        masked(du, mask), x, conv_weight, conv_bias, "silu", conv_state, seq_idx, cu_seqlens, dconv_state
    )
    return [
        conv.dx, scan.dz, conv.dweight, conv.dbias, by.weight_gradient([dx_dbl], u, dtypes[0]),
        by.weight_gradient([scan.ddelta], dt, dtypes[1]), dout_proj_weight,
        None if out_proj_bias is None else dout.sum((0, 1)), scan.dA, scan.dD, scan.ddelta_bias,
        conv.dinitial_state, scan.dinitial_state,
    ]  # fmt: skip


def _backward_kernel(*arguments: Any) -> list[Any]:
    dtypes = [weight.dtype for weight in arguments[7:10]]
    return [gradient for gradient in _inner_gradients(OPS, dtypes, *arguments) if gradient is not None]


def _backward_fake(dout: Any, dconv_state: Any, dssm_state: Any, *arguments: Any) -> list[Any]:
    return [like.new_empty(like.shape) for like in arguments[:_DIFFERENTIABLE] if like is not None]


# (out, conv_state, ssm_state): what the block makes of x and z, and the states that it ends with, empty unless they are
# asked for. Shapes are those of the block's parameters: x and z (batch, d_inner, length), conv_weight
# (d_inner, d_conv), out (batch, length, d_model). The weights of the projections have the dtype of x. Where the mask
# (batch, length) is 0, nothing enters the scan.
_inner = _block(sscan.causal_conv1d, sscan.selective_scan, OPS.bmm)
mamba_inner = define(f"mamba_inner({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _inner, _fake)
mamba_inner_backward = define(
    f"mamba_inner_backward(Tensor dout, Tensor? dconv_state, Tensor? dssm_state, {_ARGUMENTS}) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
)


def _saved(inputs: Any, outputs: Any) -> Saved:
    *tensors, delta_softplus, return_states = inputs
    return Saved(tensors, (delta_softplus, return_states), () if return_states else outputs[1:])


def _gradients(cotangents: Any, tensors: Any, options: Any) -> Any:
    inputs, packing = tensors[:_DIFFERENTIABLE], tensors[_DIFFERENTIABLE:]
    if torch.is_grad_enabled():  # there will be second derivatives
        return pulled_back(_composed_block, inputs, (*packing, *options), cotangents)
    dout, *dstates = cotangents
    if dout is None:
        x, out_proj_weight = inputs[0], inputs[6]
        dout = x.new_zeros((x.shape[0], x.shape[2], out_proj_weight.shape[0]))
    return for_each(mamba_inner_backward(dout, *dstates, *tensors, *options), inputs)


differentiate(mamba_inner, _saved, _gradients)
cast_under_autocast(
    mamba_inner, "x", "z", "x_proj_weight", "dt_proj_weight", "out_proj_weight", "out_proj_bias", axes=1
)


# --- With the input projection ----------------------------------------------------------------------------------------


def _lowered(tensors: Any, dtype: Any, cast: Any) -> list[Any]:
    """A block's tensors as its parts take them, those of the projections in a dtype, if one is given."""
    lowered = list(tensors)
    dtypes = {i: torch.promote_types(tensors[i].dtype, torch.float32) for i in _PARAMETERS if tensors[i] is not None}
    if dtype is not None:
        dtypes.update((i, dtype) for i in _PROJECTIONS)
    made = cast([tensors[i] for i in dtypes], list(dtypes.values()))
    for i, x in zip(dtypes, made, strict=True):
        lowered[i] = x
    return lowered


def _of_inner(lowered: Any, xz: Any, A: Any) -> tuple[Any, ...]:
    """Tensors of ``mamba_inner`` from those of the block and the product of its input projection."""
    x, z = xz.chunk(2, 1)
    return x, z, lowered[3].squeeze(1), *lowered[4:9], A, *lowered[10:]


def _forward(by: Arithmetic, *arguments: Any) -> tuple[Any, ...]:
    """(out, conv_state, ssm_state, xz, A): the block, and what its backward starts from."""
    *tensors, dtype, return_states = arguments
    lowered = _lowered(tensors, dtype, by.cast)
    hidden, weight, bias = lowered[:3]
    xz, A = applied(weight, hidden.mT, bias, by.bmm), by.diagonal(tensors[9])
    inner = _block(sscan.causal_conv1d, sscan.selective_scan, by.bmm)
    return *inner(*_of_inner(lowered, xz, A), True, return_states), xz, A


def _mamba(*arguments: Any) -> tuple[Any, ...]:
    *tensors, dtype, return_states = arguments
    if is_planned(tensors, dtype, return_states):
        made: tuple[Any, ...] = _planned_forward(*tensors, dtype is not None, return_states)
        return made
    return _forward(OPS, *arguments)


@planned
def _planned_forward(*arguments: Any) -> tuple[Any, ...]:
    """``_forward`` by launches alone, of which further calls of the kind are made; hidden has the dtype of products."""
    hidden, *rest, cast, return_states = arguments
    return _forward(LAUNCHES, hidden, *rest, hidden.dtype if cast else None, return_states)


def _composed_mamba(*arguments: Any) -> tuple[Any, ...]:
    *tensors, dtype, return_states = arguments
    lowered = _lowered(tensors, dtype, OPS.cast)
    hidden, weight, bias = lowered[:3]
    xz, A = applied(weight, hidden.mT, bias), diagonal(tensors[9])
    made: tuple[Any, ...] = _composed_block(*_of_inner(lowered, xz, A), True, return_states)
    return made


def _mamba_fake(*arguments: Any) -> tuple[Any, ...]:
    *tensors, dtype, return_states = arguments
    hidden, weight = tensors[0], tensors[1]
    xz = hidden.new_empty((hidden.shape[0], weight.shape[0], hidden.shape[1]), dtype=dtype or hidden.dtype)
    x, z = (xz.new_empty((xz.shape[0], xz.shape[1] // 2, xz.shape[2])) for _ in range(2))
    A_log = tensors[9]
    A = A_log.new_empty(A_log.shape, dtype=torch.promote_types(A_log.dtype, torch.float32))
    inner = (x, z, tensors[3].new_empty((x.shape[1], tensors[3].shape[2])), *tensors[4:9], A, *tensors[10:])
    out, *states = _fake(*inner, True, return_states)
    return out, *(states if return_states else [hidden.new_empty(0), hidden.new_empty(0)]), xz, A


def _backward(by: Arithmetic, *arguments: Any) -> tuple[Any, ...]:
    """Gradients of a block's tensors, None where there is no tensor."""
    *cotangents, xz, A = arguments[:5]
    *tensors, dtype, return_states = arguments[5:]
    lowered = _lowered(tensors, dtype, by.cast)
    hidden, weight, bias = lowered[:3]
    inner = (*cotangents, *_of_inner(lowered, xz, A), True, return_states)
    dx, dz, dconv_weight, *rest = _inner_gradients(by, [x.dtype for x in tensors[5:8]], *inner)
    half = weight.shape[0] // 2
    dhidden = applied_back(weight[:half].t(), None, dx, by.bmm)
    by.add_bmm(dhidden, dz.mT, weight[half:].expand(dz.shape[0], -1, -1))
    gradients = [
        dhidden, by.weight_gradient([dx, dz], hidden.mT, tensors[1].dtype),
        None if bias is None else torch.cat([d.sum((0, 2)) for d in (dx, dz)]), dconv_weight.unsqueeze(1),
        *rest[:5], by.diagonal_backward(rest[5], A), *rest[6:],
    ]  # fmt: skip
    given = tensors[:_DIFFERENTIABLE_OF_BLOCK]
    return tuple(by.cast(gradients, [None if x is None else x.dtype for x in given]))


def _mamba_backward_kernel(*arguments: Any) -> list[Any]:
    dout, *rest, dtype, return_states = arguments
    if is_planned(rest[4:], dtype, return_states):
        dout = dout.contiguous()  # of a sum it is one number
        made = _planned_backward(dout, *rest, dtype is not None, return_states)
    else:
        made = _backward(OPS, *arguments)
    return [gradient for gradient in made if gradient is not None]


@planned
def _planned_backward(*arguments: Any) -> tuple[Any, ...]:
    """``_backward`` likewise."""
    dout, *rest, cast, return_states = arguments
    return _backward(LAUNCHES, dout, *rest, dout.dtype if cast else None, return_states)


mamba = define(
    f"mamba({_OF_BLOCK} ScalarType? dtype, bool return_states) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _mamba,
    _mamba_fake,
)
mamba_backward = define(
    f"""mamba_backward(Tensor dout, Tensor? dconv_state, Tensor? dssm_state, Tensor xz, Tensor A, {_OF_BLOCK}
    ScalarType? dtype, bool return_states) -> Tensor[]""",
    _mamba_backward_kernel,
    lambda dout, dconv_state, dssm_state, xz, A, *arguments: [
        like.new_empty(like.shape) for like in arguments[:_DIFFERENTIABLE_OF_BLOCK] if like is not None
    ],
)


def _mamba_saved(inputs: Any, outputs: Any) -> Saved:
    *tensors, dtype, return_states = inputs
    *states, xz, A = outputs[1:]
    return Saved((xz, A, *tensors), (dtype, return_states), (xz, A, *(() if return_states else states)))


def _mamba_gradients(cotangents: Any, tensors: Any, options: Any) -> Any:
    xz, A, *tensors = tensors
    inputs, packing = tensors[:_DIFFERENTIABLE_OF_BLOCK], tensors[_DIFFERENTIABLE_OF_BLOCK:]
    dout, dconv_state, dssm_state = cotangents[:3]
    if torch.is_grad_enabled():  # there will be second derivatives
        return pulled_back(_composed_mamba, inputs, (*packing, *options), (dout, dconv_state, dssm_state))
    if dout is None:
        dout = xz.new_zeros((xz.shape[0], xz.shape[2], inputs[7].shape[0]))
    return for_each(mamba_backward(dout, dconv_state, dssm_state, xz, A, *tensors, *options), inputs)


differentiate(mamba, _mamba_saved, _mamba_gradients)


# --- One token --------------------------------------------------------------------------------------------------------


@planned
def planned_step(
    x: Any, in_proj_weight: Any, conv_weight: Any, conv_bias: Any, x_proj_weight: Any, dt_proj_weight: Any,
    out_proj_weight: Any, A_log: Any, D: Any, delta_bias: Any, conv_state: Any, ssm_state: Any,
) -> Any:  # fmt: skip
    """A block's output (batch, d_model) for one token x of each row, by launches alone; states are updated in place."""
    x, z = LAUNCHES.bmm(x, in_proj_weight.t()).chunk(2, 1)
    x = sscan.causal_conv1d_update(x, conv_state, conv_weight.squeeze(1), conv_bias, "silu")
    (_, dt_rank), (_, state) = dt_proj_weight.shape, A_log.shape
    dt, B, C = LAUNCHES.bmm(x, x_proj_weight.t()).split([dt_rank, state, state], 1)
    dt = LAUNCHES.bmm(dt, dt_proj_weight.t())
    y = sscan.selective_state_update(ssm_state, x, dt, A_log, B, C, D, z, delta_bias, True, A_log=True)
    return LAUNCHES.bmm(y, out_proj_weight.t())
