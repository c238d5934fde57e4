"""Hyena of order 2 (Poli et al. 2023), and its long convolution, whose filter is a function of the age of an input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sscan._arrays import array_module
from sscan.models.arguments import check_floats, check_integer, check_number
from sscan.nn import ops
from sscan.nn.autodiff import Array, Operand, Tensor
from sscan.nn.mamba import DepthwiseConvolution
from sscan.nn.modules import Linear, Module, Parameter, at_least_float32, constant, normal
from sscan.nn.recurrent import Stateless
from sscan.nn.sequence_ops import ssm_convolution, with_skip

FEATURES = 5  # of an age: itself, and cosine and sine of two frequencies
TARGET, FAST, SLOW = 0.01, 0.3, 1.5  # what windows fall to, and after which share of the longest age


class HyenaFilter(Stateless):
    """y = K * u + D u in every channel, (batch, dim, length) to the same, with an implicit filter K of any length.

    ``K_t = MLP(features(t)) (exp(-|d| t) + shift)`` for the age t of an input as a share of `length`. The features are
    t and exp(-2 pi i f t) for two frequencies f; the MLP has sines for activations, sin(w (W x + b)); ``|d|`` ranges
    over the channels so that windows fall to 0.01 between 0.3 and 1.5 of `length`.

    Parameters
    ----------
    dim : int
    length : int
        The longest age. Longer sequences are read with the same function continued, on which it is not trained.
    width, depth : int
        Of the MLP: the size of its hidden layers, and how many there are behind the first.
    frequency : float
        The initial w of every unit.
    shift : float
        What is left of the oldest input.
    dtype : dtype
        Of the parameters, float32 at least.
    seed : int, Generator or None
        As of :class:`sscan.nn.Mamba`.

    Notes
    -----
    The convolution is formed through the FFT, on a GPU too, where a CUDA graph keeps the work memory of its FFTs. The
    features are not trained: that is what the 69 million parameters of the paper's Table 11 are. Hyena is from "Hyena
    Hierarchy", section 3.
    """

    def __init__(
        self,
        dim: int,
        length: int = 1024,
        *,
        width: int = 64,
        depth: int = 2,
        frequency: float = 10.0,
        shift: float = 0.05,
        dtype: Any = np.float32,
        seed: int | np.random.Generator | None = 0,
    ) -> None:
        check_integer("HyenaFilter", "dim", dim)
        check_integer("HyenaFilter", "length", length, 2)
        check_integer("HyenaFilter", "width", width)
        check_integer("HyenaFilter", "depth", depth, 0)
        check_number("HyenaFilter", "frequency", frequency)
        check_number("HyenaFilter", "shift", shift)
        self.dim, self.length, self.shift = dim, length, shift
        wide = at_least_float32("HyenaFilter", dtype)
        self.hidden = [_Sine(n, width, frequency, wide) for n in (FEATURES, *(width,) * depth)]
        self.last = Linear(width, dim, False, wide, seed=None)
        self.D = Parameter((dim,), normal(1.0), wide, decay=False)
        if seed is not None:
            self.initialise(seed)

    def __call__(self, u: Operand, seq_idx: Array | None = None) -> Tensor:
        """Apply the filter to sequences from their beginnings; it cannot be told of several in a row."""
        if seq_idx is not None:
            raise ValueError("HyenaFilter: a convolution with one filter cannot keep packed sequences apart (seq_idx)")
        check_floats("HyenaFilter", "u", u, "batch", self.dim, "length")
        return ssm_convolution(u, with_skip(self.kernel(u.shape[2]), self.D))  # type: ignore[union-attr]

    def kernel(self, length: int) -> Tensor:
        """K (dim, length)."""
        xp, dtype = array_module(self.D.data), self.D.dtype
        age = xp.arange(length, dtype=dtype)[:, None] / (self.length - 1)
        angle = age * xp.linspace(2e-4 * math.pi, 2 * math.pi, 2, dtype=dtype)
        x = Tensor(xp.concatenate([age, xp.cos(angle), -xp.sin(angle)], axis=1))
        for layer in self.hidden:
            x = layer(x)
        rates = xp.linspace(math.log(TARGET) / SLOW, math.log(TARGET) / FAST, self.dim, dtype=dtype)
        window = xp.exp(age * rates) + self.shift
        return ops.swapaxes(self.last(x) * window, 0, 1)


class _Sine(Module):
    """sin(frequency (W x + b)), with a frequency for every unit."""

    def __init__(self, in_features: int, out_features: int, frequency: float, dtype: Any) -> None:
        self.linear = Linear(in_features, out_features, True, dtype, seed=None)
        self.frequency = Parameter((out_features,), constant(frequency), dtype, decay=False)

    def __call__(self, x: Tensor) -> Tensor:
        return ops.sin(self.linear(x) * self.frequency)


class Hyena(Stateless):
    """y = W_out (x_2 * filter(x_1 * v)), (batch, length, d_model) to the same.

    v, x_1 and x_2 are projections of the input behind a causal convolution of each channel with three taps; * of two
    sequences is by element, and the filter is :class:`HyenaFilter`.

    Parameters
    ----------
    d_model : int
    length : int
        The longest age of an input, as of the filter.
    n_layer, dtype, seed
        As of :class:`sscan.nn.Mamba`.
    **filter
        Further arguments of :class:`HyenaFilter`.
    """

    def __init__(
        self,
        d_model: int,
        length: int = 1024,
        *,
        n_layer: int = 1,
        dtype: Any = np.float32,
        seed: int | np.random.Generator | None = 0,
        **filter: Any,
    ) -> None:
        check_integer("Hyena", "d_model", d_model)
        check_integer("Hyena", "n_layer", n_layer)
        self.in_proj = Linear(d_model, 3 * d_model, True, dtype, seed=None)
        self.conv1d = DepthwiseConvolution(3 * d_model, 3, True, dtype, seed=None)
        self.filter = HyenaFilter(d_model, length, **filter, dtype=dtype, seed=None)
        self.out_proj = Linear(d_model, d_model, True, dtype, scale=1 / math.sqrt(n_layer), seed=None)
        if seed is not None:
            self.initialise(seed)

    def __call__(self, hidden: Operand, seq_idx: Array | None = None) -> Tensor:
        """Apply the layer to sequences from their beginnings; they cannot be packed."""
        check_floats("Hyena", "hidden", hidden, "batch", "length", self.filter.dim)
        x, _ = self.conv1d(self.in_proj.channel_first(ops.swapaxes(hidden, 1, 2)), seq_idx=seq_idx)
        v, first, second = ops.split(x, (self.filter.dim,) * 3, axis=1)
        return self.out_proj(ops.swapaxes(second * self.filter(first * v, seq_idx), 1, 2))
