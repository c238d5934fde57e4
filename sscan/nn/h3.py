"""H3 (Dao et al. 2023): an inner layer between two multiplications, the closest relative of the Mamba block."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan.models.arguments import check_floats, check_integer
from sscan.nn import ops
from sscan.nn.inner import inner_layer
from sscan.nn.mamba import DepthwiseConvolution
from sscan.nn.modules import Linear
from sscan.nn.recurrent import Recurrent, State

if TYPE_CHECKING:
    from sscan.nn.autodiff import Array, Operand, Tensor


class H3(Recurrent):
    """W_out (q * inner(conv(k) * v)), (batch, length, d_model) to the same; * of two sequences is by element.

    q, k and v are projections of the input. conv is a causal convolution of each channel: the shift state space of the
    original is one with as many taps as it has states.

    Parameters
    ----------
    d_model : int
    inner : {"s4", "s6", "hyena"}
        :class:`sscan.nn.S4D`, as in the original, :class:`sscan.nn.S6` or :class:`sscan.nn.HyenaFilter`.
    taps : int
        Of the convolution.
    n_layer, dtype, seed
        As of :class:`sscan.nn.Mamba`.
    **options
        Further arguments of the inner layer.
    """

    def __init__(
        self,
        d_model: int,
        inner: str = "s4",
        *,
        taps: int = 64,
        n_layer: int = 1,
        dtype: Any = np.float32,
        seed: int | np.random.Generator | None = 0,
        **options: Any,
    ) -> None:
        check_integer("H3", "d_model", d_model)
        check_integer("H3", "n_layer", n_layer)
        check_integer("H3", "taps", taps)
        self.d_model = d_model
        self.in_proj = Linear(d_model, 3 * d_model, True, dtype, seed=None)
        self.conv1d = DepthwiseConvolution(d_model, taps, True, dtype, seed=None)
        self.inner = inner_layer("H3", inner, d_model, dtype, options)
        self.out_proj = Linear(d_model, d_model, True, dtype, scale=1 / math.sqrt(n_layer), seed=None)
        if seed is not None:
            self.initialise(seed)

    def __call__(self, hidden: Operand, seq_idx: Array | None = None) -> Tensor:
        """Apply the layer to sequences from their beginnings; `seq_idx` as of the inner layer."""
        q, kv, _ = self._before(hidden, None, seq_idx)
        return self._after(q, self.inner(kv, seq_idx))

    def extend(self, hidden: Operand, state: State) -> tuple[Tensor, State]:
        """The output for the continuation `hidden` of sequences, and the state at its end, both differentiable."""
        q, kv, conv = self._before(hidden, state[0], None)
        y, inner = self.inner.extend(kv, state[1:])
        return self._after(q, y), (conv, *inner)

    def _before(self, hidden: Operand, conv: Tensor | None, seq_idx: Array | None) -> tuple[Tensor, Tensor, Tensor]:
        check_floats("H3", "hidden", hidden, "batch", "length", self.d_model)
        qkv = self.in_proj.channel_first(ops.swapaxes(hidden, 1, 2))
        q, k, v = ops.split(qkv, (self.d_model,) * 3, axis=1)
        k, conv = self.conv1d(k, None, conv, seq_idx)
        return q, k * v, conv

    def _after(self, q: Tensor, y: Tensor) -> Tensor:
        return self.out_proj(ops.swapaxes(q * y, 1, 2))

    def new_state(self, batch: int) -> State:
        """The states of the convolution and of the inner layer before the first token of `batch` sequences."""
        return (self.conv1d.new_state(batch), *self.inner.new_state(batch))
