"""Text as a sequence of bytes: reading it, cutting it into windows, and a baseline that counts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sscan.models.files import check_readable
from sscan.nn import no_grad

if TYPE_CHECKING:
    from pathlib import Path

    from sscan.nn import MambaLM

Bytes = npt.NDArray[np.uint8]
HELD_OUT = 0.1  # the share of a text, at its end, that no model is trained on
IGNORED = -100


def read_text(path: Path) -> Bytes:
    """The bytes of a text file.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is empty, no regular file, or contains a NUL byte, which no text does.
    """
    check_readable(path)
    data = np.fromfile(path, np.uint8)
    if not data.size:
        raise ValueError(f"{path} is empty")
    if not data.all():
        raise ValueError(f"{path} is not text: byte {int(data.argmin())} is NUL")
    return data


def held_out_start(data: Bytes) -> int:
    """Where the held-out tail begins."""
    return data.size - int(data.size * HELD_OUT)


def random_windows(data: Bytes, batch: int, length: int, seed: int, step: int) -> tuple[Any, Any]:
    """Inputs and targets (batch, length): windows of `data` that depend on the seed and the step only."""
    starts = np.random.default_rng([seed, step]).integers(0, data.size - length, batch)
    windows = data[starts[:, None] + np.arange(length + 1)].astype(np.int32)
    return windows[:, :-1], windows[:, 1:]


def overlapping_windows(data: Bytes, start: int, length: int) -> tuple[Any, Any]:
    """Inputs and targets (windows, length) in which each byte from `start` on is a target that counts exactly once.

    Windows advance by half their length and only the second half counts, so every byte is predicted from at least
    length / 2 bytes before it, the first ones from bytes before `start`. Windows of one byte advance by one.
    """
    half = max(length // 2, 1)
    first = np.arange(start - 1 - (length - half), data.size - 1 - (length - half), half)
    places = first[:, None] + np.arange(length + 1)
    windows = data[np.clip(places, 0, data.size - 1)].astype(np.int32)
    counts = (np.arange(length) >= length - half) & (places[:, 1:] < data.size)
    return windows[:, :-1], np.where(counts, windows[:, 1:], IGNORED)


def bits_per_byte(model: MambaLM, data: Bytes, start: int, length: int, batch: int) -> float:
    """Mean of -log2 p over the bytes from `start` on, by windows of `length`."""
    inputs, targets = overlapping_windows(data, start, length)
    nats = 0.0
    with no_grad():
        for i in range(0, len(inputs), batch):
            rows = targets[i : i + batch]
            nats += model.loss(inputs[i : i + batch], rows).item() * int((rows != IGNORED).sum())
    return nats / math.log(2) / (data.size - start)


class BackoffModel:
    """Byte model of some order that backs off: interpolated Witten-Bell smoothing of n-gram counts.

    With the context c of k bytes seen n(c) times, followed by T(c) different bytes, and c' the context without its
    first byte::

        p(b | c) = (n(c b) + T(c) p(b | c')) / (n(c) + T(c)),   below order 0: p(b) = 1 / 256

    and p(b | c) = p(b | c') if c was never seen. The probabilities of all 256 bytes add up to one.
    """

    def __init__(self, data: Bytes, order: int = 2) -> None:
        self.order = order
        self.tables = [_Counts(data, k) for k in range(order + 1)]

    def probabilities(self, data: Bytes, start: int) -> npt.NDArray[np.float64]:
        """p of every byte of `data` from `start` (at least the order) on, given the bytes before it."""
        p = np.full(data.size - start, 1 / 256)
        for table in self.tables:
            p = table.interpolate(_codes(data, start, table.order), p)
        return p

    def bits_per_byte(self, data: Bytes, start: int) -> float:
        """Mean of -log2 p over the bytes from `start` on."""
        return float(-np.log2(self.probabilities(data, start)).mean())


class _Counts:
    """How often each context of `order` bytes was followed by each byte."""

    def __init__(self, data: Bytes, order: int) -> None:
        self.order = order
        self.codes, self.counts = np.unique(_codes(data, order, order), return_counts=True)
        self.contexts, first = np.unique(self.codes >> 8, return_index=True)
        self.totals = np.add.reduceat(self.counts, first)
        self.kinds = np.diff(np.append(first, self.codes.size))

    def interpolate(self, codes: npt.NDArray[np.int64], p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Probabilities for contexts and bytes, from those of the order below."""
        count = _look_up(self.codes, self.counts, codes)
        total, kinds = (_look_up(self.contexts, values, codes >> 8) for values in (self.totals, self.kinds))
        seen = total > 0
        return np.where(seen, (count + kinds * p) / np.where(seen, total + kinds, 1), p)


def _codes(data: Bytes, start: int, order: int) -> npt.NDArray[np.int64]:
    """Each byte from `start` on and the `order` bytes before it, as one number with the byte in its lowest digit."""
    codes = np.zeros(data.size - start, np.int64)
    for back in range(order, -1, -1):
        codes = codes << 8 | data[start - back : data.size - back]
    return codes


def _look_up(keys: npt.NDArray[Any], values: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The value of each wanted key, or 0 where there is none; keys are sorted."""
    place = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.where(keys[place] == wanted, values[place], 0)
