"""The fused norms of mamba_ssm (``ops.triton.layer_norm``), with its arguments in its order."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sscan.torch import rms_norm
from sscan.torch._library import check_tensors

Tensor = Any


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor = None,
    x1: Tensor = None,
    weight1: Tensor = None,
    bias1: Tensor = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """The norm, over the last axis, of the sum of x, x1 and the residual stream; with ``prenorm`` also that sum.

    x is first multiplied by ``rowscale``, one number a row, and dropped out, as is x1. y has the dtype of x; the sum
    that of ``residual``, without one float32 if ``residual_in_fp32`` and else that of x. With ``weight1`` there is a
    second y, of that weight and ``bias1``. An RMS norm without dropout, rowscale, x1 and biases is one kernel.

    Raises
    ------
    NotImplementedError
        For ``return_dropout_mask``.
    ValueError
        For ``rowscale`` and x1 together.
    """
    op = "rms_norm_fn" if is_rms_norm else "layer_norm_fn"
    check_tensors(
        op,
        {"x": x, "weight": weight},
        {"bias": bias, "residual": residual, "x1": x1, "weight1": weight1, "bias1": bias1, "rowscale": rowscale},
    )
    if return_dropout_mask:
        raise NotImplementedError(f"{op}: return_dropout_mask is not there")
    if x1 is not None and rowscale is not None:
        raise ValueError(f"{op}: rowscale must not be given together with x1")
    dtype = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    total = _dropped(x, rowscale, dropout_p)
    if x1 is not None:
        total = _wide(total) + _dropped(x1, None, dropout_p)
    if is_rms_norm and residual is not None:
        y, total = rms_norm(total, weight, residual, eps)
    else:
        total = total if residual is None else _wide(total) + residual
        y = _normalised(total, weight, eps, is_rms_norm)
    made = [_biased(y, bias, x)]
    if weight1 is not None:
        made.append(_biased(_normalised(total, weight1, eps, is_rms_norm), bias1, x))
    if prenorm:
        made.append(total.to(dtype))
    return made[0] if len(made) == 1 else tuple(made)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _dropped(x: Tensor, rowscale: Tensor, dropout_p: float) -> Tensor:
    if rowscale is not None:
        x = _wide(x) * rowscale[..., None]
    return functional.dropout(_wide(x), dropout_p) if dropout_p > 0 else x


def _normalised(x: Tensor, weight: Tensor, eps: float, is_rms_norm: bool) -> Tensor:
    if is_rms_norm:
        return rms_norm(x, weight, eps=eps)
    x = _wide(x)
    return functional.layer_norm(x, x.shape[-1:], weight.to(x.dtype), eps=eps)


def _biased(y: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return (y if bias is None else _wide(y) + bias).to(x.dtype)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor = None,
    x1: Tensor = None,
    weight1: Tensor = None,
    bias1: Tensor = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """``layer_norm_fn`` with the RMS norm: no mean is subtracted."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, True,
        return_dropout_mask,
    )  # fmt: skip


class RMSNorm(nn.Module):  # type: ignore[misc]
    """``rms_norm_fn`` as a module, with a weight that begins with ones and no bias.

    Parameters
    ----------
    hidden_size : int
        Size of the last axis.
    eps : float
        Is added to the mean square.
    dropout_p : float
        Of the input, while training.
    device, dtype
        Of the weight.
    """

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Ones again."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor = None, prenorm: bool = False, residual_in_fp32: bool = False) -> Any:
        """See :func:`layer_norm_fn`."""
        return rms_norm_fn(
            x, self.weight, self.bias, residual, eps=self.eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
        )  # fmt: skip
