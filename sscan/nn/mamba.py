"""The Mamba block (section 3.4 of the paper), trained through the scan and decoded with a state of constant size."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sscan._arrays import array_module
from sscan.causal_conv1d import causal_conv1d_update
from sscan.models.arguments import check_floats, check_integer
from sscan.models.config import BlockConfig
from sscan.models.states import MambaState
from sscan.nn import ops
from sscan.nn.autodiff import Array, Operand, Tensor, no_grad
from sscan.nn.modules import Linear, Module, Parameter, at_least_float32, constant, ones, uniform
from sscan.nn.sequence_ops import causal_conv1d, selective_scan
from sscan.selective_state_update import selective_state_update

if TYPE_CHECKING:
    from sscan.nn.modules import Draw


class DepthwiseConvolution(Module):
    """A causal convolution of each channel with `width` taps of its own; parameters are named as PyTorch names them."""

    def __init__(
        self,
        channels: int,
        width: int,
        bias: bool = True,
        dtype: Any = np.float32,
        *,
        seed: int | np.random.Generator | None = 0,
    ) -> None:
        draw = uniform(1 / math.sqrt(width))
        self.weight = Parameter((channels, 1, width), draw, dtype)
        self.bias = Parameter((channels,), draw, dtype, decay=False) if bias else None
        if seed is not None:
            self.initialise(seed)

    def __call__(
        self, x: Operand, activation: str | None = None, state: Tensor | None = None, seq_idx: Array | None = None
    ) -> tuple[Tensor, Tensor]:
        """The convolution of x (batch, channels, length) behind the inputs in `state`, and the state at its end."""
        y, state = causal_conv1d(x, *self.taps(), activation, state, return_final_state=True, seq_idx=seq_idx)
        return y, state.astype(self.weight.dtype)

    def taps(self) -> tuple[Tensor, Tensor | None]:
        """Weight (channels, width) and bias."""
        channels, _, width = self.weight.shape
        return self.weight.reshape(channels, width), self.bias

    def new_state(self, batch: int) -> Tensor:
        """The state before the first token: zeros (batch, channels, width - 1)."""
        channels, _, width = self.weight.shape
        return Tensor(array_module(self.weight.data).zeros((batch, channels, width - 1), self.weight.dtype))


class Mamba(Module):
    """A Mamba block: (batch, length, d_model) to the same.

    ==== =========================================================================== ==================================
    1    in_proj; the first half of its rows makes x, the second the gate z          (2 d_inner, d_model)
    2    causal depthwise convolution of x, then SiLU                                (d_inner, 1, d_conv), (d_inner,)
    3    x_proj of x, split into dt, B and C                                         (dt_rank + 2 d_state, d_inner)
    4    dt_proj of dt; its bias is added, and softplus applied, inside the scan     (d_inner, dt_rank), (d_inner,)
    5    selective scan with A = -exp(A_log), plus D x, times SiLU(z)                (d_inner, d_state), (d_inner,)
    6    out_proj                                                                    (d_model, d_inner)
    ==== =========================================================================== ==================================

    Inside the block arrays are (batch, channels, length): the matrix products deliver and take that layout through
    transposed views, and nothing is copied to change it.

    Parameters
    ----------
    d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, bias
        As mamba_ssm names them. d_inner = expand d_model; dt_rank "auto" is ceil(d_model / 16), and 0 makes a step size
        that does not depend on the input. The step size starts log-uniform on [dt_min, dt_max], never below
        `dt_init_floor`; `dt_init` ("random" or "constant") and `dt_scale` set dt_proj.weight.
    discretization : {"mamba", "zoh"}
        The rule of the scan, see :func:`sscan.selective_scan`.
    n_layer : int
        Number of residual blocks in the model: out_proj starts smaller by sqrt(n_layer).
    dtype : dtype
        Of the weights. A_log and D are at least float32 whatever it is. Activations are in the dtype of the input, to
        which the weights of the projections are cast: bfloat16 input and float32 weights make mixed precision, where
        convolution, step size, scan and states keep their float32.
    seed : int, Generator or None
        For the initial values; None leaves the parameters unallocated, see :class:`Parameter`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        *,
        discretization: str = "mamba",
        n_layer: int = 1,
        dtype: Any = np.float32,
        seed: int | np.random.Generator | None = 0,
    ) -> None:
        check_integer("Mamba", "n_layer", n_layer)
        block = BlockConfig(
            d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, bias,
            discretization,
        )  # fmt: skip
        self.d_inner, self.dt_rank = block.sizes(d_model)
        self.d_state, self.d_conv, self.discretization = d_state, d_conv, discretization
        wide = at_least_float32("Mamba", dtype)

        self.in_proj = Linear(d_model, 2 * self.d_inner, bias, dtype, seed=None)
        self.conv1d = DepthwiseConvolution(self.d_inner, d_conv, conv_bias, dtype, seed=None)
        self.x_proj = Linear(self.d_inner, self.dt_rank + 2 * d_state, False, dtype, seed=None)
        self.dt_proj = Linear(self.dt_rank, self.d_inner, True, dtype, seed=None)
        dt_bound = dt_scale / math.sqrt(max(self.dt_rank, 1))
        self.dt_proj.weight.draw = uniform(dt_bound) if dt_init == "random" else constant(dt_bound)
        dt_bias = inverse_softplus_of_log_uniform(dt_min, dt_max, dt_init_floor)
        self.dt_proj.bias = Parameter((self.d_inner,), dt_bias, dtype, decay=False)
        self.A_log = Parameter((self.d_inner, d_state), log_of_one_to_n, wide, decay=False)
        self.D = Parameter((self.d_inner,), ones, wide, decay=False)
        self.out_proj = Linear(self.d_inner, d_model, bias, dtype, scale=1 / math.sqrt(n_layer), seed=None)
        if seed is not None:
            self.initialise(seed)

    def __call__(self, hidden: Operand, seq_idx: Array | None = None) -> Tensor:
        """Apply the block to sequences from their beginnings.

        `seq_idx` (batch, length) numbers the sequences packed into a row: neither the convolution nor the scan sees
        across a change of number.
        """
        return self._mix(hidden, None, seq_idx)[0]

    def extend(self, hidden: Operand, state: MambaState, seq_idx: Array | None = None) -> tuple[Tensor, MambaState]:
        """The output for the continuation `hidden` of sequences, and the state at its end, both differentiable.

        `seq_idx` is that of a call of the block.
        """
        return self._mix(hidden, state, seq_idx)

    def _mix(self, hidden: Operand, state: MambaState | None, seq_idx: Array | None) -> tuple[Tensor, MambaState]:
        check_floats("Mamba", "hidden", hidden, "batch", "length", self.out_proj.weight.shape[0])
        xz = self.in_proj.channel_first(ops.swapaxes(hidden, 1, 2))
        x, z = ops.split(xz, (self.d_inner, self.d_inner), axis=1)
        conv, ssm = (None, None) if state is None else (state.conv, state.ssm)
        x, conv = self.conv1d(x, "silu", conv, seq_idx)
        dt, B, C = ops.split(self.x_proj.channel_first(x), self._dt_B_C, axis=1)
        delta = ops.matmul(self.dt_proj.weight_like(dt), dt)
        y, ssm = selective_scan(
            x, delta, self.A(), B, C, self.D, z, self._delta_bias(), True, return_last_state=True,
            initial_state=ssm, seq_idx=seq_idx, discretization=self.discretization,
        )  # fmt: skip
        return self.out_proj(ops.swapaxes(y, 1, 2)), MambaState(conv, ssm)

    @no_grad()
    def step(self, hidden: Operand, state: MambaState) -> Tensor:
        """One token, hidden (batch, d_model): the output for it; the arrays of `state` are updated in place."""
        check_floats("Mamba.step", "hidden", hidden, "batch", self.out_proj.weight.shape[0])
        if self.discretization != "mamba":  # the rule of selective_state_update
            out, new = self.extend(ops.getitem(hidden, (slice(None), None)), state)
            state.conv.data[...], state.ssm.data[...] = new.conv.data, new.ssm.data
            return out[:, 0]
        x, z = ops.split(self.in_proj(hidden), (self.d_inner, self.d_inner), axis=1)
        weight, bias = self.conv1d.taps()
        x_now = causal_conv1d_update(x.data, state.conv.data, weight.data, None if bias is None else bias.data, "silu")
        dt, B, C = ops.split(self.x_proj(x_now), self._dt_B_C, axis=1)
        delta = ops.matmul(dt, self.dt_proj.weight_like(dt).swapaxes(0, 1))
        y = selective_state_update(
            state.ssm.data, x_now, delta.data, self.A().data, B.data, C.data,
            self.D.data, z.data, self._delta_bias().data, True,
        )  # fmt: skip
        return self.out_proj(y)

    def new_state(self, batch: int) -> MambaState:
        """The state before the first token of `batch` sequences: zeros, where and of what dtypes the parameters are."""
        ssm = array_module(self.D.data).zeros((batch, self.d_inner, self.d_state), self.D.dtype)
        return MambaState(self.conv1d.new_state(batch), Tensor(ssm))

    def A(self) -> Tensor:
        """The diagonal of the state matrix, -exp(A_log): always negative, so that the state never grows by itself."""
        return -ops.exp(self.A_log)

    @property
    def _dt_B_C(self) -> tuple[int, int, int]:
        return self.dt_rank, self.d_state, self.d_state

    def _delta_bias(self) -> Tensor:
        bias = self.dt_proj.bias
        assert bias is not None
        return bias.astype(self.D.dtype)


def log_of_one_to_n(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """A_log such that A = -(1, 2, ..., N) in every channel: S4D-Real."""
    return np.broadcast_to(np.log(np.arange(1, shape[1] + 1)), shape)


def inverse_softplus_of_log_uniform(low: float, high: float, floor: float) -> Draw:
    """A bias whose softplus is log-uniform on [low, high], and at least `floor`."""
    return functools.partial(_inverse_softplus_of_log_uniform, math.log(low), math.log(high), floor)


def _inverse_softplus_of_log_uniform(
    low: float, high: float, floor: float, rng: np.random.Generator, shape: tuple[int, ...]
) -> Array:
    step = np.maximum(np.exp(rng.uniform(low, high, shape)), floor)
    return step + np.log(-np.expm1(-step))
