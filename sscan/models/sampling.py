"""Choosing the next token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from sscan.models.arguments import check_integer, check_number

if TYPE_CHECKING:
    from collections.abc import Sequence

Array: TypeAlias = Any


class Sampler:
    """Draws tokens from logits in host memory.

    Parameters
    ----------
    temperature : float >= 0
        Divides the logits; 0 takes the most likely token.
    top_k : int >= 1, optional
        Only the k most likely tokens (and those that tie with the k-th).
    top_p : float in (0, 1], optional
        Only the most likely tokens that together reach probability p, after temperature and `top_k`.
    min_p : float in [0, 1], optional
        Only tokens of at least this share of the largest probability, after temperature and before `top_p`.
    repetition_penalty : float > 0
        Divides the positive logits, and multiplies the negative ones, of tokens that were seen before.
    seed : int or Generator

    Raises
    ------
    TypeError, ValueError
        If one is out of its range.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | np.random.Generator = 0,
    ) -> None:
        given: Any = temperature
        if isinstance(given, str) or not given >= 0:
            raise ValueError(f"temperature must be at least 0, got {given!r}")
        if top_k is not None:
            check_integer("Sampler", "top_k", top_k)
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        if min_p is not None and not 0 <= min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {min_p}")
        check_number("Sampler", "repetition_penalty", repetition_penalty, positive=True)
        if not isinstance(seed, np.random.Generator):
            check_integer("Sampler", "seed", seed, 0)
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.repetition_penalty = repetition_penalty
        self.rng = np.random.default_rng(seed)

    @property
    def filters(self) -> tuple[float, int | None, float | None, float | None]:
        """temperature, top_k, top_p and min_p."""
        return self.temperature, self.top_k, self.top_p, self.min_p

    def __call__(self, logits: Array, seen: Sequence[Sequence[int]] | None = None) -> Array:
        """Tokens (batch,), int64, for logits (batch, vocabulary) of any floating dtype.

        `seen` are the tokens before, of each row, which `repetition_penalty` is for.

        Raises
        ------
        FloatingPointError
            If a logit is NaN or plus infinity, or all of a row are minus infinity.
        """
        with np.errstate(invalid="ignore"):
            largest = logits.max(axis=1).astype(np.float64)  # NaN if any is
        if not np.isfinite(largest).all():
            raise FloatingPointError("the model's logits are NaN or infinite; its parameters are broken")
        if self.temperature == 0 and (seen is None or self.repetition_penalty == 1):
            return logits.argmax(axis=1)
        values = self._penalised(logits, seen)
        if self.temperature == 0:
            return values.argmax(axis=1)
        cumulated = np.cumsum(self._probabilities(values), axis=1)
        drawn = self.rng.random((len(cumulated), 1)) * cumulated[:, -1:]
        return (cumulated > drawn).argmax(axis=1)

    def probabilities(self, logits: Array, seen: Sequence[Sequence[int]] | None = None) -> Array:
        """What is drawn from at a temperature above 0: (batch, vocabulary), float64.

        Parameters
        ----------
        logits : (batch, vocabulary)
        seen : sequence of sequences of int, optional
            The tokens of each row so far, for the penalty on their repetition.
        """
        return self._probabilities(self._penalised(logits, seen))

    def _penalised(self, logits: Array, seen: Sequence[Sequence[int]] | None) -> Array:
        values = logits.astype(np.float64)
        if self.repetition_penalty != 1 and seen is not None:
            for row, tokens in zip(values, seen, strict=True):
                ids = np.unique(np.asarray(tokens, np.int64))
                ids = ids[ids < row.size]  # what is never drawn may have been read
                row[ids] = np.where(
                    row[ids] > 0, row[ids] / self.repetition_penalty, row[ids] * self.repetition_penalty
                )
        return values

    def _probabilities(self, values: Array) -> Array:
        with np.errstate(over="ignore"):  # of a tiny temperature, which leaves the largest alone
            values = (values - values.max(axis=1, keepdims=True)) / self.temperature
        if self.top_k is not None and self.top_k < values.shape[1]:
            smallest = np.partition(values, -self.top_k, axis=1)[:, -self.top_k, None]
            values[values < smallest] = -np.inf
        if self.min_p:
            values[values < np.log(self.min_p)] = -np.inf  # the largest is 0
        probabilities = np.exp(values)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        if self.top_p is not None and self.top_p < 1:
            for row in probabilities:
                _keep_nucleus(row, self.top_p)
            probabilities /= probabilities.sum(axis=1, keepdims=True)
        return probabilities


def _keep_nucleus(row: Array, p: float) -> None:
    """Zero all but the most likely that together reach p."""
    # Those of at most (1 - p) / size add up to 1 - p at most, so the others reach p; few are left to be sorted.
    likely = np.flatnonzero(row > (1 - p) / row.size)
    order = likely[np.argsort(-row[likely], kind="stable")]
    ordered = row[order]
    kept = order[np.cumsum(ordered) - ordered < p]  # what is before them does not reach p yet
    values = row[kept]
    row[:] = 0
    row[kept] = values
