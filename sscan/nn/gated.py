"""The paper's architectures around an inner layer: with Mamba's gate, and with none."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan.models.arguments import check_floats, check_integer, check_number
from sscan.nn import ops
from sscan.nn.inner import inner_layer
from sscan.nn.mamba import DepthwiseConvolution
from sscan.nn.modules import Linear
from sscan.nn.recurrent import Recurrent, State
from sscan.nn.s6 import SELECTIVE

if TYPE_CHECKING:
    from sscan.nn.autodiff import Array, Operand, Tensor


class Gated(Recurrent):
    """Mamba's architecture around any inner layer: W_out (inner(SiLU(conv(x))) * SiLU(z)), [x; z] = W_in hidden.

    With ``inner="s6"`` it is :class:`sscan.nn.Mamba`, with other names of parameters, and slower.

    Parameters
    ----------
    d_model : int
    inner : {"s6", "s4", "hyena"}
        :class:`sscan.nn.S6`, :class:`sscan.nn.S4D` or :class:`sscan.nn.HyenaFilter`.
    d_conv, expand, conv_bias, bias, n_layer, dtype, seed
        As of :class:`sscan.nn.Mamba`.
    **options
        Further arguments of the inner layer. A dt_rank "auto" is ceil(d_model / 16), as Mamba has it.
    """

    def __init__(
        self,
        d_model: int,
        inner: str = "s6",
        *,
        d_conv: int = 4,
        expand: float = 2,
        conv_bias: bool = True,
        bias: bool = False,
        n_layer: int = 1,
        dtype: Any = np.float32,
        seed: int | np.random.Generator | None = 0,
        **options: Any,
    ) -> None:
        check_integer("Gated", "d_model", d_model)
        check_integer("Gated", "n_layer", n_layer)
        check_integer("Gated", "d_conv", d_conv)
        check_number("Gated", "expand", expand, positive=True)
        of_input = "delta" in options.get("selective", SELECTIVE)  # the step size
        if inner == "s6" and of_input and options.get("dt_rank", "auto") == "auto":
            options["dt_rank"] = math.ceil(d_model / 16)
        self.d_inner = int(expand * d_model)
        self.in_proj = Linear(d_model, 2 * self.d_inner, bias, dtype, seed=None)
        self.conv1d = DepthwiseConvolution(self.d_inner, d_conv, conv_bias, dtype, seed=None)
        self.inner = inner_layer("Gated", inner, self.d_inner, dtype, options)
        self.out_proj = Linear(self.d_inner, d_model, bias, dtype, scale=1 / math.sqrt(n_layer), seed=None)
        if seed is not None:
            self.initialise(seed)

    def __call__(self, hidden: Operand, seq_idx: Array | None = None) -> Tensor:
        """Apply the block to sequences from their beginnings; `seq_idx` as of the inner layer."""
        x, z, _ = self._branches(hidden, None, seq_idx)
        return self._joined(self.inner(x, seq_idx), z)

    def extend(self, hidden: Operand, state: State) -> tuple[Tensor, State]:
        """The output for the continuation `hidden` of sequences, and the state at its end, both differentiable."""
        x, z, conv = self._branches(hidden, state[0], None)
        y, inner = self.inner.extend(x, state[1:])
        return self._joined(y, z), (conv, *inner)

    def _branches(self, hidden: Operand, conv: Tensor | None, seq_idx: Array | None) -> tuple[Tensor, Tensor, Tensor]:
        check_floats("Gated", "hidden", hidden, "batch", "length", self.in_proj.weight.shape[1])
        xz = self.in_proj.channel_first(ops.swapaxes(hidden, 1, 2))
        x, z = ops.split(xz, (self.d_inner, self.d_inner), axis=1)
        x, conv = self.conv1d(x, "silu", conv, seq_idx)
        return x, z, conv

    def _joined(self, y: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(ops.swapaxes(y * ops.silu(z), 1, 2))

    def new_state(self, batch: int) -> State:
        """The states of the convolution and of the inner layer before the first token of `batch` sequences."""
        return (self.conv1d.new_state(batch), *self.inner.new_state(batch))


class Ungated(Recurrent):
    """The architecture of S4 ("no gate" in Table 1): a * sigmoid(b), [a; b] = W GELU(inner(hidden)) + bias.

    No multiplication meets the input itself.

    Parameters
    ----------
    d_model, inner
        As of :class:`Gated`.
    n_layer, dtype, seed
        As of :class:`sscan.nn.Mamba`.
    **options
        Further arguments of the inner layer.
    """

    def __init__(
        self,
        d_model: int,
        inner: str = "s6",
        *,
        n_layer: int = 1,
        dtype: Any = np.float32,
        seed: int | np.random.Generator | None = 0,
        **options: Any,
    ) -> None:
        check_integer("Ungated", "d_model", d_model)
        check_integer("Ungated", "n_layer", n_layer)
        self.inner = inner_layer("Ungated", inner, d_model, dtype, options)
        self.out_proj = Linear(d_model, 2 * d_model, True, dtype, scale=1 / math.sqrt(n_layer), seed=None)
        if seed is not None:
            self.initialise(seed)

    def __call__(self, hidden: Operand, seq_idx: Array | None = None) -> Tensor:
        """Apply the block to sequences from their beginnings; `seq_idx` as of the inner layer."""
        return self._mixed(self.inner(self._channels_first(hidden), seq_idx))

    def extend(self, hidden: Operand, state: State) -> tuple[Tensor, State]:
        """The output for the continuation `hidden` of sequences, and the state at its end, both differentiable."""
        y, state = self.inner.extend(self._channels_first(hidden), state)
        return self._mixed(y), state

    def _channels_first(self, hidden: Operand) -> Tensor:
        check_floats("Ungated", "hidden", hidden, "batch", "length", self.out_proj.weight.shape[1])
        return ops.swapaxes(hidden, 1, 2)

    def _mixed(self, y: Tensor) -> Tensor:
        y = self.out_proj(ops.swapaxes(ops.gelu(y), 1, 2))
        width = y.shape[2] // 2
        a, b = ops.split(y, (width, width), axis=2)
        return a * ops.sigmoid(b)

    def new_state(self, batch: int) -> State:
        """The state of the inner layer before the first token of `batch` sequences."""
        state: State = self.inner.new_state(batch)
        return state
