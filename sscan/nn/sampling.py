"""Choosing the next token."""

from __future__ import annotations

import numpy as np

from sscan.nn.arguments import check_integer
from sscan.nn.autodiff import Array, to_numpy


class Sampler:
    """Draws tokens from logits.

    Parameters
    ----------
    temperature : float >= 0
        Divides the logits; 0 takes the most likely token.
    top_k : int >= 1, optional
        Only the k most likely tokens (and those that tie with the k-th).
    top_p : float in (0, 1], optional
        Only the most likely tokens that together reach probability p, after temperature and `top_k`.
    seed : int or Generator

    Raises
    ------
    ValueError
        If one is out of its range.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | np.random.Generator = 0,
    ) -> None:
        if not temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        if top_k is not None:
            check_integer("Sampler", "top_k", top_k)
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.rng = np.random.default_rng(seed)

    def __call__(self, logits: Array) -> Array:
        """Tokens (batch,), int64 on the host, for logits (batch, vocabulary).

        Raises
        ------
        FloatingPointError
            If a logit is NaN or plus infinity, or all of a row are minus infinity.
        """
        logits = to_numpy(logits)
        with np.errstate(invalid="ignore"):
            largest = logits.max(axis=1).astype(np.float64)  # NaN if any is
        if not np.isfinite(largest).all():
            raise FloatingPointError("the model's logits are NaN or infinite; its parameters are broken")
        if self.temperature == 0:
            return logits.argmax(axis=1)
        cumulated = np.cumsum(self.probabilities(logits), axis=1)
        drawn = self.rng.random((len(cumulated), 1)) * cumulated[:, -1:]
        return (cumulated > drawn).argmax(axis=1)

    def probabilities(self, logits: Array) -> Array:
        """What is drawn from at a temperature above 0: (batch, vocabulary), float64."""
        values = to_numpy(logits).astype(np.float64)
        with np.errstate(over="ignore"):  # of a tiny temperature, which leaves the largest alone
            values = (values - values.max(axis=1, keepdims=True)) / self.temperature
        if self.top_k is not None and self.top_k < values.shape[1]:
            smallest = np.partition(values, -self.top_k, axis=1)[:, -self.top_k, None]
            values[values < smallest] = -np.inf
        probabilities = np.exp(values)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        if self.top_p is not None:
            order = np.argsort(-probabilities, axis=1, kind="stable")
            ordered = np.take_along_axis(probabilities, order, axis=1)
            ordered[np.cumsum(ordered, axis=1) - ordered >= self.top_p] = 0  # what is before it already reaches p
            np.put_along_axis(probabilities, order, ordered, axis=1)
            probabilities /= probabilities.sum(axis=1, keepdims=True)
        return probabilities
