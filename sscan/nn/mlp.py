"""Layers that treat every token by itself."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan.models.arguments import check_floats, check_integer, check_number
from sscan.nn import ops
from sscan.nn.modules import Linear
from sscan.nn.recurrent import Pointwise

if TYPE_CHECKING:
    from sscan.nn.autodiff import Array, Operand, Tensor


class MLP(Pointwise):
    """W_out GELU(W_in x + b_in) + b_out, of which the middle is `expand` d_model wide.

    Parameters
    ----------
    d_model : int
    expand : float, default 4
    n_layer, dtype, seed
        As of :class:`sscan.nn.Mamba`.
    """

    def __init__(
        self,
        d_model: int,
        expand: float = 4,
        *,
        n_layer: int = 1,
        dtype: Any = np.float32,
        seed: int | np.random.Generator | None = 0,
    ) -> None:
        check_integer("MLP", "n_layer", n_layer)
        self.width = _width("MLP", d_model, expand)
        self.in_proj = Linear(d_model, self.width, True, dtype, seed=None)
        self.out_proj = Linear(self.width, d_model, True, dtype, scale=1 / math.sqrt(n_layer), seed=None)
        if seed is not None:
            self.initialise(seed)

    def __call__(self, hidden: Operand, seq_idx: Array | None = None) -> Tensor:
        """(..., rows, d_model) to the same; `seq_idx` makes no difference."""
        check_floats("MLP", "hidden", hidden, "...", "rows", self.in_proj.weight.shape[1])
        return self.out_proj(ops.gelu(self.in_proj(hidden)))


class GLU(Pointwise):
    """W_out (a * SiLU(b)) + b_out, [a; b] = W_in x + b_in, each `expand` d_model wide: also called SwiGLU.

    With the default it has as many parameters as :class:`MLP`.

    Parameters
    ----------
    d_model : int
    expand : float, default 8/3
    n_layer, dtype, seed
        As of :class:`sscan.nn.Mamba`.
    """

    def __init__(
        self,
        d_model: int,
        expand: float = 8 / 3,
        *,
        n_layer: int = 1,
        dtype: Any = np.float32,
        seed: int | np.random.Generator | None = 0,
    ) -> None:
        check_integer("GLU", "n_layer", n_layer)
        self.width = _width("GLU", d_model, expand)
        self.in_proj = Linear(d_model, 2 * self.width, True, dtype, seed=None)
        self.out_proj = Linear(self.width, d_model, True, dtype, scale=1 / math.sqrt(n_layer), seed=None)
        if seed is not None:
            self.initialise(seed)

    def __call__(self, hidden: Operand, seq_idx: Array | None = None) -> Tensor:
        """(..., rows, d_model) to the same; `seq_idx` makes no difference."""
        check_floats("GLU", "hidden", hidden, "...", "rows", self.in_proj.weight.shape[1])
        ab = self.in_proj(hidden)
        a, b = ops.split(ab, (self.width, self.width), axis=ab.ndim - 1)
        return self.out_proj(a * ops.silu(b))


def _width(owner: str, d_model: int, expand: float) -> int:
    check_integer(owner, "d_model", d_model)
    check_number(owner, "expand", expand, positive=True)
    return max(1, int(expand * d_model))
