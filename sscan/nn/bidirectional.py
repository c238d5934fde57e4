"""A Mamba block that reads sequences in both directions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sscan._arrays import array_module
from sscan.models.arguments import check_floats
from sscan.models.bidirectional import check_directions
from sscan.nn import ops
from sscan.nn.mamba import Mamba
from sscan.nn.modules import Module

if TYPE_CHECKING:
    from sscan.nn.autodiff import Array, Operand, Tensor


class BidirectionalMamba(Module):
    """Two Mamba blocks, one of which reads backwards: (batch, length, d_model) to the same, or twice as wide.

    Of hidden vectors h, ``ahead(h)`` and ``reverse(back(reverse(h)))``, where reverse turns time around, are added or
    put side by side.

    Parameters
    ----------
    d_model : int
    shared : {"all", "projections", "nothing"}
        What the directions have in common: every weight (then both are one call, of twice the batch), in_proj and
        out_proj (as in Caduceus and Vim), or nothing.
    join : {"sum", "concatenation"}
        What becomes of the two results; side by side they are (batch, length, 2 d_model).
    dtype, seed
        As of :class:`Mamba`.
    **block
        Further arguments of :class:`Mamba`.
    """

    def __init__(
        self,
        d_model: int,
        *,
        shared: str = "projections",
        join: str = "sum",
        dtype: Any = np.float32,
        seed: int | np.random.Generator | None = 0,
        **block: Any,
    ) -> None:
        check_directions(shared, join)
        self.join = join
        self.ahead = Mamba(d_model, **block, dtype=dtype, seed=None)
        self.back = self.ahead if shared == "all" else Mamba(d_model, **block, dtype=dtype, seed=None)
        if shared == "projections":
            self.back.in_proj, self.back.out_proj = self.ahead.in_proj, self.ahead.out_proj
        if seed is not None:
            self.initialise(seed)

    def __call__(self, hidden: Operand, seq_idx: Array | None = None) -> Tensor:
        """Apply the block to sequences.

        `seq_idx` (batch, length) numbers the sequences packed into a row, none of which sees another, in either
        direction. Padding is a sequence of its own, or what is behind it would begin with it.
        """
        check_floats("BidirectionalMamba", "hidden", hidden, "batch", "length", self.ahead.out_proj.weight.shape[0])
        turned = None if seq_idx is None else seq_idx[:, ::-1]
        if self.back is self.ahead:
            rows = len(hidden)  # type: ignore[arg-type]
            both = None if seq_idx is None else array_module(seq_idx).concatenate([seq_idx, turned])
            out = self.ahead(ops.concatenate([hidden, _reversed(hidden)]), both)
            ahead, back = ops.split(out, (rows, rows))
        else:
            ahead, back = self.ahead(hidden, seq_idx), self.back(_reversed(hidden), turned)
        back = _reversed(back)
        return ahead + back if self.join == "sum" else ops.concatenate([ahead, back], axis=2)


def _reversed(hidden: Operand) -> Tensor:
    """Time turned around."""
    return ops.getitem(hidden, (slice(None), slice(None, None, -1)))
