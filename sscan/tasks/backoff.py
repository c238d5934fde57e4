"""A baseline that counts: how well a sequence can be predicted from the few symbols before each."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
TABLE_BITS = 26  # of a context and what follows it: up to so many, counts lie in a table of all that there may be


class BackoffModel:
    """Byte model of some order that backs off: interpolated Witten-Bell smoothing of n-gram counts.

    With the context c of k bytes seen n(c) times, followed by T(c) different bytes, and c' the context without its
    first byte::

        p(b | c) = (n(c b) + T(c) p(b | c')) / (n(c) + T(c)),   below order 0: p(b) = 1 / 256

    and p(b | c) = p(b | c') if c was never seen. The probabilities of all 256 bytes add up to one. Symbols of fewer
    `bits`, as the 2 of a base, are bytes below 2^bits, of which there are so many less; bits (order + 1) is 63 at most.
    """

    def __init__(self, data: Bytes, order: int = 2, bits: int = 8) -> None:
        self.order, self.bits = order, bits
        self.tables = [_Counts(data, k, bits) for k in range(order + 1)]

    def probabilities(self, data: Bytes, start: int, order: int | None = None) -> npt.NDArray[np.float64]:
        """p of every byte of `data` from `start` (at least the order) on, given the bytes before it.

        With an `order` those are the probabilities of the model of that order, which is inside of this one.
        """
        p = np.full(data.size - start, 1 / (1 << self.bits))
        for table in self.tables[: None if order is None else order + 1]:
            p = table.interpolate(_codes(data, start, table.order, self.bits), p)
        return p

    def bits_per_byte(self, data: Bytes, start: int, order: int | None = None) -> float:
        """Mean of -log2 p over the bytes from `start` on."""
        return float(-np.log2(self.probabilities(data, start, order)).mean())


class _Counts:
    """How often each context of `order` bytes was followed by each byte."""

    def __init__(self, data: Bytes, order: int, bits: int) -> None:
        self.order, self.bits = order, bits
        self.codes: Any = None  # those that were seen, and their contexts; None: all
        self.contexts: Any = None
        codes, width = _codes(data, order, order, bits), bits * (order + 1)
        if width <= TABLE_BITS:
            self.counts = np.bincount(codes, minlength=1 << width)
            followed = self.counts.reshape(-1, 1 << bits)
            self.totals, self.kinds = followed.sum(axis=1), np.count_nonzero(followed, axis=1)
        else:
            self.codes, self.counts = np.unique(codes, return_counts=True)
            self.contexts, first = np.unique(self.codes >> bits, return_index=True)
            self.totals = np.add.reduceat(self.counts, first)
            self.kinds = np.diff(np.append(first, self.codes.size))

    def interpolate(self, codes: npt.NDArray[np.int64], p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Probabilities for contexts and bytes, from those of the order below."""
        count = _look_up(self.codes, self.counts, codes)
        total, kinds = (_look_up(self.contexts, values, codes >> self.bits) for values in (self.totals, self.kinds))
        seen = total > 0
        return np.where(seen, (count + kinds * p) / np.where(seen, total + kinds, 1), p)


def _codes(data: Bytes, start: int, order: int, bits: int) -> npt.NDArray[np.int64]:
    """Each byte from `start` on and the `order` bytes before it, as one number with the byte in its lowest digit."""
    codes = np.zeros(data.size - start, np.int64)
    for back in range(order, -1, -1):
        codes <<= bits
        codes |= data[start - back : data.size - back]
    return codes


def _look_up(keys: Any, values: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The value of each wanted key, or 0 where there is none; keys are sorted, or None if they are all numbers."""
    if keys is None:
        return np.asarray(values[wanted])
    place = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.where(keys[place] == wanted, values[place], 0)
