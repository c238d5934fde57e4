"""Baselines for audio: linear prediction whose residual an entropy coder takes, and FLAC, which is that too."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt

from sscan.tasks.recordings import SILENCE, Levels, compress, expand, soundfile

ORDER = 32
RECENT, LOUDNESS = 16, 24  # residuals that say how large the next will be, and how many sizes are told apart
DISTANCES = 16  # of a prediction from silence that are told apart


class LinearPrediction:
    """The next level, as a weighted sum of the 32 samples before it, and how far off that is.

    The weights are those of least squares over the training data (autocorrelation method); the prediction is rounded to
    a level. The difference from it is coded with its frequencies in the training data, given how large the last 16 were
    on average and how far from silence the prediction is: what an ideal coder needs, with nothing said of the tables.
    """

    def __init__(self, levels: Levels) -> None:
        from scipy.linalg import solve_toeplitz

        x = expand(levels)
        lags = np.array([x[: max(x.size - k, 0)] @ x[k:] for k in range(ORDER + 1)])
        lags[0] += 1e-9 * (lags[0] + 1)  # so that there is a solution for silence, too
        self.weights = solve_toeplitz(lags[:-1], lags[1:])
        self.counts = np.full((LOUDNESS, DISTANCES, 511), 0.5)
        np.add.at(self.counts, self._coded(levels), 1)

    def _coded(self, levels: Levels) -> tuple[npt.NDArray[np.int64], ...]:
        """Which table codes each level, and the place in it."""
        from scipy.signal import lfilter

        predicted = compress(np.clip(lfilter([0.0, *self.weights], [1.0], expand(levels)), -1, 1)).astype(np.int64)
        residuals = levels - predicted
        sums = np.concatenate([np.zeros(RECENT + 1, np.int64), np.cumsum(np.abs(residuals))])
        recent = (sums[RECENT:-1] - sums[: -1 - RECENT]) / RECENT  # of those before each
        loudness = np.minimum(3 * np.log2(1 + recent), LOUDNESS - 1).astype(np.int64)
        distance = np.abs(2 * predicted - 255) * DISTANCES // 256
        return loudness, distance, residuals + 255

    def bits_per_sample(self, levels: Levels, start: int) -> float:
        """Mean of -log2 p over the levels from `start` on."""
        p = self.counts / self.counts.sum(axis=-1, keepdims=True)
        return float(-np.log2(p[self._coded(levels)][start:]).mean())


def flac_bits_per_sample(levels: Levels, rate: int) -> float:
    """The size of a FLAC file of the levels, which are its 8-bit samples, for each of them."""
    file = io.BytesIO()
    shifted = ((levels.astype(np.int16) - SILENCE) * 256).astype(np.int16)  # of which 8 bits are written
    soundfile().write(file, shifted, rate, subtype="PCM_S8", format="FLAC", compression_level=1.0)
    return 8 * len(file.getvalue()) / levels.size
