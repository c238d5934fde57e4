"""What the Mamba block is made with beside its convolution and its scan, in two ways.

``OPS`` are PyTorch's. ``LAUNCHES``, on a GPU, start kernels of sscan and products of cuBLAS and nothing else, so that a
block of them is one plan (see ``sscan._plans``): PyTorch takes 10 to 40 microseconds to start an op from Python, of
which a block's forward and backward have a hundred, and a plan 4 for a launch.
"""

from __future__ import annotations

import importlib
from functools import cache, partial, wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sscan import _plans
from sscan._arrays import TORCH, numpy_dtype
from sscan.torch._library import is_plain_call

if TYPE_CHECKING:
    from collections.abc import Callable


class Arithmetic(NamedTuple):
    """What a block is made with beside convolution and scan: ops of PyTorch, or kernels, of which a plan is made."""

    bmm: Callable[[Any, Any], Any]  # a @ b of stacks of matrices; by LAUNCHES of matrices too
    add_bmm: Callable[[Any, Any, Any], Any]  # out + a @ b, in place
    weight_gradient: Callable[[list[Any], Any, Any], Any]  # see ``_weight_gradient``
    joined: Callable[[Any, Any, Any, Any], Any]  # the product of the first two, and the others, along the channels
    cast: Callable[[list[Any], list[Any]], list[Any]]  # tensors (or None) in these dtypes
    diagonal: Callable[[Any], Any]  # A of A_log
    diagonal_backward: Callable[[Any, Any], Any]  # the gradient of A_log from that of A, and A


def _bmm(a: Any, b: Any) -> Any:
    """a @ b of stacks of matrices, of plain tensors that nobody differentiates.

    On the CPU it is made on the threads of the kernels. PyTorch's spin while they wait for each other and for more to
    do, so that where cores are few or busy the kernels wait for those and those for the kernels.
    """
    if not _is_wide_on_cpu(a):
        return torch.bmm(a, b)
    from sscan.nn.products import matmul

    return torch.from_numpy(matmul(TORCH.view(a), TORCH.view(b)))


def _add_bmm(out: Any, a: Any, b: Any) -> Any:
    """out + a @ b, in place, likewise."""
    return out.add_(_bmm(a, b)) if _is_wide_on_cpu(a) else out.baddbmm_(a, b)


def _exp(x: Any) -> Any:
    """exp of a few numbers, likewise: on the thread that asks."""
    return torch.from_numpy(np.exp(TORCH.view(x))) if _is_wide_on_cpu(x) else torch.exp(x)


def _is_wide_on_cpu(x: Any) -> bool:
    return bool(x.is_cpu) and x.dtype in (torch.float32, torch.float64)


def _weight_gradient(douts: list[Any], x: Any, dtype: Any) -> Any:
    """Of a projection of x to what has these gradients, (batch, channels, length) all, in a dtype.

    Of several gradients, rows of the weight come in their order.
    """
    gradients = [_bmm(dout, x.mT).sum(0, dtype=dtype) for dout in douts]
    return gradients[0] if len(gradients) == 1 else torch.cat(gradients)


def _joined(weight: Any, x: Any, *others: Any) -> Any:
    return torch.cat([_bmm(weight.expand(x.shape[0], -1, -1), x), *others], 1)


def cast(tensors: list[Any], dtypes: list[Any]) -> list[Any]:
    return [x if x is None or x.dtype is dtype else x.to(dtype) for x, dtype in zip(tensors, dtypes, strict=True)]


def diagonal(A_log: Any, exp: Any = torch.exp) -> Any:
    """A of the scan: always negative, so that no state grows by itself."""
    return -exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


OPS = Arithmetic(_bmm, _add_bmm, _weight_gradient, _joined, cast, partial(diagonal, exp=_exp), lambda dA, A: dA.mul_(A))


# --- launches ---------------------------------------------------------------------------------------------------------

# Of a block with more rows or more numbers along time a GPU has long enough to do, and PyTorch frees what is done with.
MOST_ROWS, MOST_NUMBERS = 64, 1 << 25
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_planned(tensors: Any, dtype: Any, return_states: bool) -> bool:
    """Whether a block of these tensors, with its products in a dtype, is made by ``LAUNCHES``.

    On a GPU, without what they do not have: biases of the projections, a mask, and states that are rounded to halves.
    """
    hidden, in_proj_weight, in_proj_bias, *_ = tensors
    stored = hidden.dtype
    return bool(
        hidden.is_cuda and (dtype is None or dtype is stored)
        and in_proj_bias is None and tensors[8] is None and tensors[16] is None
        and not (return_states and stored is not torch.float32)
        and all(tensors[i].dtype is stored or (dtype and tensors[i].dtype is torch.float32) for i in (1, 5, 6, 7))
        and hidden.shape[0] <= MOST_ROWS
        and 0 < hidden.shape[0] * hidden.shape[1] * in_proj_weight.shape[0] <= 2 * MOST_NUMBERS
        and are_cublas(stored)
    )  # fmt: skip


def is_planned_step(tensors: Any) -> bool:
    """Whether a step is, of the input and the weights of four projections."""
    hidden, *weights = tensors
    return bool(
        hidden.is_cuda and hidden.numel() and all(x.dtype is hidden.dtype for x in weights)
        and is_plain_call() and not torch.is_autocast_enabled("cuda") and are_cublas(hidden.dtype)
    )  # fmt: skip


def are_cublas(dtype: Any) -> bool:
    """Whether products in a dtype may be made as cuBLAS makes them when it is not told otherwise."""
    if dtype not in _DTYPES:
        return False
    of = torch.backends.cuda.matmul
    if dtype is torch.float32:
        return of.fp32_precision not in ("tf32", "bf16")
    if dtype is torch.bfloat16:
        return bool(of.allow_bf16_reduced_precision_reduction)
    return bool(of.allow_fp16_reduced_precision_reduction and not of.allow_fp16_accumulation)


def planned(op: Callable[..., Any]) -> Callable[..., Any]:
    """An op made by ``LAUNCHES``, of tensors of which the first is never None, as one plan.

    Its products in a CUDA graph that is recorded work in memory of that graph: that of cuBLAS is shared with whatever
    runs beside the graph.
    """
    repeated = _plans.planned(op)

    @wraps(op)
    def call(first: Any, *rest: Any) -> Any:
        if not torch.cuda.is_current_stream_capturing():
            return repeated(first, *rest)
        products = _cuda("_products")
        with products.working_in(_view(_empty(first, (products.WORKSPACE,), torch.uint8))):
            return repeated(first, *rest)

    return call


_view: Any = TORCH.known_view


@cache
def _cuda(name: str) -> Any:
    """A module of kernels: imported once one is to be launched."""
    return importlib.import_module(f"sscan.cuda.{name}")


def _empty(like: Any, shape: Any, dtype: Any) -> Any:
    caller = TORCH.caller("Mamba", "hidden_states", like)
    return caller.leave(caller.empty(tuple(shape), numpy_dtype(dtype)))


def _launched_bmm(a: Any, b: Any) -> Any:
    return _product(_empty(a, (*a.shape[:-1], b.shape[-1]), a.dtype), a, b)


def _product(out: Any, a: Any, b: Any, added: bool = False) -> Any:
    if (*a.shape[:-1], b.shape[-1]) != tuple(out.shape) or (*a.shape[:-2], a.shape[-1]) != tuple(b.shape[:-1]):
        raise RuntimeError(f"Mamba: matrices {tuple(a.shape)} and {tuple(b.shape)} cannot be multiplied")
    _cuda("_products").into(_view(out), _view(a), _view(b), added)
    return out


def _launched_weight_gradient(douts: list[Any], x: Any, dtype: Any) -> Any:
    """Of each row of the batch in float32, then summed."""
    (batch, columns, _), rows = x.shape, sum(dout.shape[1] for dout in douts)
    gradient = _empty(x, (rows, columns), dtype)
    parts = gradient[None] if batch == 1 else _empty(x, (batch, rows, columns), torch.float32)
    for place, dout in zip(parts.split([dout.shape[1] for dout in douts], 1), douts, strict=True):
        _product(place, dout, x.mT)
    if batch > 1:
        _cuda("_sums").over_parts((_view(parts), _view(gradient)))
    return gradient


def _launched_joined(weight: Any, x: Any, *others: Any) -> Any:
    batch, _, length = x.shape
    rows = [weight.shape[0], *(other.shape[1] for other in others)]
    joined = _empty(x, (batch, sum(rows), length), x.dtype)
    first, *rest = joined.split(rows, 1)
    _product(first, weight.expand(batch, -1, -1), x)
    _cuda("block").copy(*[(_view(other), _view(place)) for other, place in zip(others, rest, strict=True)])
    return joined


def _launched_cast(tensors: list[Any], dtypes: list[Any]) -> list[Any]:
    made = list(tensors)
    pairs: dict[Any, list[Any]] = {}
    for i, (x, dtype) in enumerate(zip(tensors, dtypes, strict=True)):
        if x is not None and x.dtype is not dtype:
            made[i] = _empty(x, x.shape, dtype)
            pairs.setdefault((x.dtype, dtype), []).append((_view(x.contiguous()), _view(made[i])))
    for those in pairs.values():
        for start in range(0, len(those), _cuda("block").MOST):
            _cuda("block").copy(*those[start : start + _cuda("block").MOST])
    return made


def _launched_diagonal(A_log: Any) -> Any:
    (A_log,) = _launched_cast([A_log], [torch.promote_types(A_log.dtype, torch.float32)])
    A = _empty(A_log, A_log.shape, A_log.dtype)
    _cuda("block").diagonal(_view(A_log.contiguous()), _view(A))
    return A


def _launched_diagonal_backward(dA: Any, A: Any) -> Any:
    dA_log = _empty(A, A.shape, A.dtype)
    _cuda("block").diagonal_backward(_view(dA), _view(A), _view(dA_log))
    return dA_log


LAUNCHES = Arithmetic(
    _launched_bmm, partial(_product, added=True), _launched_weight_gradient, _launched_joined, _launched_cast,
    _launched_diagonal, _launched_diagonal_backward,
)  # fmt: skip
