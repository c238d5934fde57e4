"""A Mamba block that reads sequences in both directions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sscan.models.bidirectional import check_directions
from sscan.torch.mamba import Mamba

if TYPE_CHECKING:
    from torch import Tensor


class BidirectionalMamba(nn.Module):  # type: ignore[misc]
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
    device, dtype
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
        device: Any = None,
        dtype: Any = None,
        **block: Any,
    ) -> None:
        check_directions(shared, join)
        super().__init__()
        self.join = join
        self.ahead = Mamba(d_model, **block, device=device, dtype=dtype)
        self.back = self.ahead if shared == "all" else Mamba(d_model, **block, device=device, dtype=dtype)
        if shared == "projections":
            self.back.in_proj, self.back.out_proj = self.ahead.in_proj, self.ahead.out_proj

    def forward(self, hidden_states: Tensor, *, seq_idx: Tensor | None = None) -> Tensor:
        """Apply the block to sequences, ``hidden_states`` (batch, length, d_model).

        ``seq_idx`` (batch, length) numbers the sequences packed into a row, none of which sees another, in either
        direction. Padding is a sequence of its own, or what is behind it would begin with it.
        """
        turned = None if seq_idx is None else seq_idx.flip(1)
        if self.back is self.ahead:
            both = None if seq_idx is None else torch.cat([seq_idx, turned])
            ahead, back = self.ahead(torch.cat([hidden_states, hidden_states.flip(1)]), seq_idx=both).chunk(2)
        else:
            ahead, back = self.ahead(hidden_states, seq_idx=seq_idx), self.back(hidden_states.flip(1), seq_idx=turned)
        back = back.flip(1)
        return ahead + back if self.join == "sum" else torch.cat([ahead, back], 2)
