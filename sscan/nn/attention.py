"""Causal attention with several heads, and what it can know of positions."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from sscan._arrays import array_module, on_gpu
from sscan._segments import check_packing
from sscan.models.arguments import check_floats, check_integer
from sscan.nn import ops
from sscan.nn.autodiff import Array, Operand, Tensor, recomputed
from sscan.nn.modules import Linear
from sscan.nn.recurrent import Stateless

BLOCK = 1024  # queries whose scores are held at once, or fewer:
SCORES, SCORES_ON_GPU = 1 << 26, 1 << 28  # of all rows and heads together
BASE = 10000.0  # of the wavelengths of positions
SCALE, GAMMA = 512.0, 0.4  # of xPos: over SCALE tokens the first pair falls to GAMMA / (1 + GAMMA), the last hardly


class Attention(Stateless):
    """W_out softmax(q k^T / sqrt(d) + causal mask) v in every head: (batch, length, d_model) to the same.

    Parameters
    ----------
    d_model, heads : int
        d = d_model / heads, an even number.
    positions : {"none", "rotary", "xpos"}
        "rotary" (Su et al. 2021) turns every pair of numbers of q and k by an angle that grows with the position, so
        that products depend on differences of positions; "xpos" (Sun et al. 2022) also lets the products of a pair fall
        with the distance, the faster the quicker it turns. Absolute positions belong to the embedding, see
        :class:`sscan.nn.SequenceConfig`.
    n_layer, dtype, seed
        As of :class:`sscan.nn.Mamba`.

    Notes
    -----
    Scores are held for 1024 queries at a time, or for fewer if there are more than 2^26 of them, on a GPU 2^28. If that
    is in several blocks, the backward forms them again, so memory grows linearly with the length. Positions are counted
    from the first query of a block, which changes no product and keeps the factors of xPos in range.
    """

    def __init__(
        self,
        d_model: int,
        heads: int = 8,
        *,
        positions: str = "none",
        n_layer: int = 1,
        dtype: Any = np.float32,
        seed: int | np.random.Generator | None = 0,
    ) -> None:
        check_integer("Attention", "d_model", d_model)
        check_integer("Attention", "heads", heads)
        check_integer("Attention", "n_layer", n_layer)
        if d_model % (2 * heads):
            raise ValueError(f"Attention: d_model must be a multiple of 2 heads, got {d_model} for {heads} heads")
        if positions not in ("none", "rotary", "xpos"):
            raise ValueError(f"Attention: positions must be one of none, rotary, xpos, got {positions!r}")
        self.heads, self.width, self.positions = heads, d_model // heads, positions
        self.in_proj = Linear(d_model, 3 * d_model, True, dtype, seed=None)
        self.out_proj = Linear(d_model, d_model, True, dtype, scale=1 / math.sqrt(n_layer), seed=None)
        if seed is not None:
            self.initialise(seed)

    def __call__(self, hidden: Operand, seq_idx: Array | None = None) -> Tensor:
        """Apply the layer to sequences from their beginnings; with `seq_idx` no token sees another sequence's.

        A sequence is a run of equal numbers, as everywhere.
        """
        check_floats("Attention", "hidden", hidden, "batch", "length", self.heads * self.width)
        batch, length, d_model = hidden.shape  # type: ignore[union-attr]
        runs = None if seq_idx is None else _runs(seq_idx, batch, length)
        qkv = self.in_proj(hidden).reshape(batch, length, 3 * self.heads, self.width).swapaxes(1, 2)
        q, k, v = ops.split(qkv, (self.heads,) * 3, axis=1)
        scores = SCORES_ON_GPU if on_gpu(q.data) else SCORES
        y = self._in_blocks(q, k, v, runs, max(min(BLOCK, scores // max(batch * self.heads * length, 1)), 1))
        return self.out_proj(y.swapaxes(1, 2).reshape(batch, length, d_model))

    def _in_blocks(self, q: Tensor, k: Tensor, v: Tensor, runs: Array | None, queries: int) -> Tensor:
        """What all queries see, so many at a time."""
        length = q.shape[2]
        if length <= queries:
            return self._block(slice(0, length), runs, q, k, v) if length else v
        parts = []
        for start in range(0, length, queries):
            rows = slice(start, min(start + queries, length))
            block = functools.partial(self._block, rows, runs)
            parts.append(recomputed(block, q[:, :, rows], k[:, :, : rows.stop], v[:, :, : rows.stop]))
        return ops.concatenate(parts, axis=2)

    def _block(self, rows: slice, runs: Array | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the queries of these rows see of the keys up to the last of them."""
        xp = array_module(q.data)
        keys = xp.arange(rows.stop) - rows.start
        queries = keys[rows.start :]
        unseen = queries[:, None] < keys
        if runs is not None:
            unseen = unseen | (runs[:, rows, None] != runs[:, None, : rows.stop])[:, None]
        scores = ops.matmul(self._turned(q, queries, 1), self._turned(k, keys, -1).swapaxes(2, 3))
        mask = xp.where(unseen, -np.inf, 0).astype(np.float32)
        return ops.matmul(ops.softmax(scores * self.width**-0.5 + mask).astype(v.dtype), v)

    def _turned(self, x: Tensor, positions: Array, sign: int) -> Tensor:
        """Queries (sign 1) or keys (-1), with their positions in them."""
        if self.positions == "none":
            return x
        xp, half = array_module(x.data), self.width // 2
        share = xp.arange(half, dtype=np.float64) / half
        angle = positions[:, None] * BASE**-share
        fade = ((share + GAMMA) / (1 + GAMMA)) ** (sign * positions[:, None] / SCALE) if self.positions == "xpos" else 1
        cos, sin = ((f(angle) * fade).astype(np.result_type(x.dtype, np.float32)) for f in (xp.cos, xp.sin))
        a, b = ops.split(x, (half, half), axis=3)
        return ops.concatenate([a * cos - b * sin, a * sin + b * cos], axis=3).astype(x.dtype)


def _runs(seq_idx: Array, batch: int, length: int) -> Array:
    """Numbers of the runs in each row."""
    if seq_idx.shape != (batch, length):
        raise ValueError(f"Attention: seq_idx must have shape (batch, length) = {(batch, length)}, got {seq_idx.shape}")
    check_packing("Attention", batch, seq_idx, None)
    runs = array_module(seq_idx).zeros((batch, length), np.int64)
    runs[:, 1:] = (seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(axis=1)
    return runs
