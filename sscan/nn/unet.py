"""The U-Net of the paper's audio models: layers at several rates, of which the lower ones see more at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan._arrays import array_module
from sscan.models.arguments import check_floats, check_integer
from sscan.nn import ops
from sscan.nn.autodiff import Tensor, no_grad
from sscan.nn.layers import BLOCKS, new_layers, plain_layers
from sscan.nn.modules import Linear, ResidualBlock, RMSNorm
from sscan.nn.recurrent import Recurrent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sscan.nn.autodiff import Array, Operand


class Stage(Recurrent):
    """x + layer(RMSNorm(x)), one layer after the other. The sum is rounded to the dtype of x at the end only."""

    def __init__(self, width: int, layers: Sequence[dict[str, Any]], n_layer: int, dtype: Any) -> None:
        made = new_layers("UNet", layers, BLOCKS, width, n_layer, dtype)
        self.layers = [ResidualBlock(RMSNorm(width, dtype=dtype, seed=None), layer) for layer in made]

    def __call__(self, hidden: Operand, seq_idx: Array | None = None) -> Tensor:
        """Apply the stage to sequences from their beginnings."""
        return self._run(hidden, lambda i, layer, x: layer(x, seq_idx))

    def extend(self, hidden: Operand, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """The output for the continuation `hidden` of sequences; one state for each layer."""
        ends = list(state)

        def mix(i: int, layer: Any, x: Tensor) -> Tensor:
            x, ends[i] = layer.extend(x, state[i])
            return x

        return self._run(hidden, mix), ends

    @no_grad()
    def step(self, hidden: Operand, state: list[Any]) -> Tensor:
        """The output for one token, `hidden` (batch, width)."""
        return self._run(hidden, lambda i, layer, x: layer.step(x, state[i]))

    def _run(self, x: Operand, mix: Callable[[int, Any, Tensor], Tensor]) -> Tensor:
        dtype = x.dtype  # type: ignore[union-attr]
        stream, hidden = ops.astype(x, np.result_type(dtype, np.float32)), x
        for i, block in enumerate(self.layers):
            hidden, stream = block.norm(hidden, stream) if i else (block.norm(hidden), stream)
            hidden = mix(i, block.mixer, hidden)
        return (stream + hidden).astype(dtype)

    def new_state(self, batch: int) -> list[Any]:
        """Those of the layers, for `batch` sequences."""
        return [block.mixer.new_state(batch) for block in self.layers]


@dataclass
class LevelState:
    """Where sequences stand at one rate.

    Attributes
    ----------
    before, after : list
        States of the two stages.
    inner : LevelState or list
        That of what runs at the lower rate.
    waiting : Tensor
        (batch, at, width) behind the first stage: what has come of the low step under way.
    ready : Tensor
        (batch, pool - at, width): what the low step before has made for the rest of this one.
    """

    before: list[Any]
    inner: Any
    after: list[Any]
    waiting: Tensor
    ready: Tensor


class Level(Recurrent):
    """One rate of a :class:`UNet` and, inside of it, all that are lower."""

    def __init__(
        self, width: int, outer: Sequence[dict[str, Any]], centre: Sequence[dict[str, Any]], pool: Sequence[int],
        n_layer: int, dtype: Any,
    ) -> None:  # fmt: skip
        self.factor, self.multiple = pool[0], math.prod(pool)
        self.before = Stage(width, outer, n_layer, dtype)
        self.pool = Linear(self.factor * width, 2 * width, True, dtype, seed=None)
        self.inner: Level | Stage = (
            Level(2 * width, outer, centre, pool[1:], n_layer, dtype)
            if pool[1:]
            else Stage(2 * width, centre, n_layer, dtype)
        )
        self.unpool = Linear(2 * width, self.factor * width, True, dtype, seed=None)
        self.after = Stage(width, outer, n_layer, dtype)

    def __call__(self, hidden: Operand, seq_idx: Array | None = None) -> Tensor:
        """Apply it to sequences from their beginnings, whose length is a multiple of all pools together.

        Raises
        ------
        ValueError
            If it is another.
        NotImplementedError
            For packed sequences, which need not begin where a low step does.
        """
        if seq_idx is not None:
            raise NotImplementedError("UNet: takes no packed sequences (seq_idx)")
        self._check(hidden)
        length = hidden.shape[1]  # type: ignore[union-attr]
        if length % self.multiple:
            raise ValueError(f"UNet: length must be a multiple of {self.multiple}, got {length}")
        x = self.before(hidden)
        up = self._up(self.inner(self._down(x)))
        return self.after(x + ops.concatenate([self._nothing(x), up], axis=1)[:, :length])

    def extend(self, hidden: Operand, state: LevelState) -> tuple[Tensor, LevelState]:
        """The output for the continuation `hidden` of sequences, and where they stand; `state` is where they stood."""
        self._check(hidden)
        x, before = self.before.extend(hidden, state.before)
        length, inner = x.shape[1], state.inner
        waiting, ready = ops.concatenate([state.waiting.astype(x.dtype), x], axis=1), state.ready.astype(x.dtype)
        whole = waiting.shape[1] // self.factor * self.factor
        if whole:
            low, inner = self.inner.extend(self._down(waiting[:, :whole]), inner)
            ready = ops.concatenate([ready, self._up(low)], axis=1)
        y, after = self.after.extend(x + ready[:, :length], state.after)
        return y, LevelState(before, inner, after, waiting[:, whole:], ready[:, length:])

    @no_grad()
    def step(self, hidden: Operand, state: LevelState) -> Tensor:
        """The output for one token, `hidden` (batch, width); `state` is updated in place.

        The lower rates take their step with the last token of a group.
        """
        x = self.before.step(hidden, state.before)
        y = self.after.step(x + state.ready[:, 0].astype(x.dtype), state.after)
        state.ready = state.ready[:, 1:]
        state.waiting = ops.concatenate([state.waiting.astype(x.dtype), x[:, None]], axis=1)
        if state.waiting.shape[1] == self.factor:
            low = self.inner.step(self._down(state.waiting)[:, 0], state.inner)
            state.waiting, state.ready = state.waiting[:, self.factor :], self._up(low[:, None])
        return y

    def new_state(self, batch: int) -> LevelState:
        """The state before the first token of `batch` sequences: zeros."""
        width, dtype = self.pool.weight.shape[0] // 2, self.pool.weight.dtype
        nothing = Tensor(array_module(self.pool.weight.data).zeros((batch, self.factor, width), dtype))
        return LevelState(
            self.before.new_state(batch), self.inner.new_state(batch), self.after.new_state(batch),
            nothing[:, :0], nothing,
        )  # fmt: skip

    def _check(self, hidden: Operand) -> None:
        check_floats("UNet", "hidden", hidden, "batch", "length", self.pool.weight.shape[0] // 2)

    def _down(self, x: Tensor) -> Tensor:
        """To the lower rate: the channels of `factor` neighbours beside each other, mixed."""
        batch, length, width = x.shape
        return self.pool(x.reshape(batch, length // self.factor, self.factor * width))

    def _up(self, low: Tensor) -> Tensor:
        """Back again: each step becomes `factor` neighbours."""
        batch, length, width = low.shape
        return self.unpool(low).reshape(batch, length * self.factor, width // 2)

    def _nothing(self, x: Tensor) -> Array:
        """What stands in for the lower rates before their first step is complete."""
        batch, _, width = x.shape
        return array_module(x.data).zeros((batch, self.factor, width), x.dtype)


class UNet(Level):
    """SaShiMi's U-Net of any layers, as the paper has it for audio: (batch, length, d_model) to the same, causal.

    With ``f = pool[0]`` it is, from the outside in::

        x = before(hidden)                       `blocks` times `outer`, d_model wide
        low = inner(W_down [x_0 ... x_{f-1}])    the same at 1/f of the rate, twice as wide; in the middle `centre`
        y = after(x + shift(W_up low))           `blocks` times `outer`

    Each low step is made of f neighbours, and serves the f *after* them: the shift is by one step of the low rate, so
    that no output sees what is to come. The first f get zeros from below.

    Parameters
    ----------
    d_model : int
    outer, centre : sequence of str or dict
        Layers, as of :class:`sscan.nn.SequenceConfig`, without nested ones; `centre` is `outer` if it is left out.
    blocks : int
        How often a stage repeats them.
    pool : sequence of int
        By how much the rate falls, from level to level, each of which is twice as wide.
    n_layer, dtype, seed
        As of :class:`sscan.nn.Mamba`; `n_layer` is multiplied by the number of layers inside.

    Raises
    ------
    TypeError, ValueError
        If a value is wrong.
    """

    def __init__(
        self,
        d_model: int,
        outer: Sequence[str | dict[str, Any]] = ("mamba",),
        centre: Sequence[str | dict[str, Any]] | None = None,
        *,
        blocks: int = 8,
        pool: Sequence[int] = (4, 4),
        n_layer: int = 1,
        dtype: Any = np.float32,
        seed: int | np.random.Generator | None = 0,
    ) -> None:
        check_integer("UNet", "d_model", d_model)
        check_integer("UNet", "blocks", blocks)
        if not isinstance(pool, (list, tuple)) or not pool:
            raise TypeError(f"UNet: pool must be a list of integers, got {pool!r}")
        for factor in pool:
            check_integer("UNet", "pool", factor)
        outside = plain_layers("UNet", "outer", outer, BLOCKS) * blocks
        middle = outside if centre is None else plain_layers("UNet", "centre", centre, BLOCKS) * blocks
        layers = 2 * len(pool) * len(outside) + len(middle)
        super().__init__(d_model, outside, middle, pool, n_layer * layers, dtype)
        if seed is not None:
            self.initialise(seed)
