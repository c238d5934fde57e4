"""Recordings: WAV and FLAC in and out, and as the 256 levels that models continue."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sscan.models.files import check_readable, content_of, write_atomically

if TYPE_CHECKING:
    from pathlib import Path

Samples: TypeAlias = "npt.NDArray[np.float64]"
Levels: TypeAlias = "npt.NDArray[np.uint8]"

MU = 255.0
SILENCE = 128  # the level of 0
SUFFIXES = (".wav", ".flac")
WINDOW = 512  # samples of a column of a spectrogram


def compress(samples: Samples) -> Levels:
    """The mu-law levels, 0 to 255, of samples in [-1, 1].

    They are evenly spaced in ``sign(x) log(1 + 255 |x|) / log(256)``. No level is zero: 127 and 128 are
    the smallest numbers below and above it, -8.6e-5 and 8.6e-5. 0 itself is 128.
    """
    curved = np.sign(samples) * np.log1p(MU * np.abs(samples)) / np.log1p(MU)
    levels: Levels = np.floor((curved + 1) / 2 * MU + 0.5).astype(np.uint8)
    return levels


def expand(levels: npt.NDArray[Any]) -> Samples:
    """The samples that mu-law levels stand for; :func:`compress` gives back each level."""
    curved = 2 * np.asarray(levels, np.float64) / MU - 1
    return np.asarray(np.sign(curved) * np.expm1(np.abs(curved) * np.log1p(MU)) / MU)


def soundfile() -> Any:
    """The library that reads and writes; ValueError says how to get it."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: its own library cannot be loaded
        raise ValueError(f'soundfile is not there ({error}); it comes with: pip install "sscan[audio]"') from error
    return soundfile


def read_recording(path: Path, rate: int | None = None) -> tuple[Samples, int]:
    """The samples of a WAV or FLAC file, whatever their width, in [-1, 1], and their rate.

    Parameters
    ----------
    path : Path
    rate : int, optional
        What to resample them to, with a polyphase filter; what then is beyond [-1, 1] is clipped.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is not audio, empty, torn, of several channels, or has samples that are no numbers in [-1, 1]; the message
        names the file.
    """
    library = soundfile()
    check_readable(path)
    with content_of(path):
        _check_whole(path)
        try:
            samples, found = library.read(path, dtype="float64", always_2d=True)
        except library.LibsndfileError as error:
            raise ValueError(f"not read as audio: {error.error_string}") from error
        if samples.shape[1] != 1:
            raise ValueError(f"has {samples.shape[1]} channels, expected one")
        samples = samples[:, 0]
        if not samples.size:
            raise ValueError("holds no samples")
        wrong = ~(np.abs(samples) <= 1)
        if wrong.any():
            place = int(wrong.argmax())
            raise ValueError(f"sample {place} is {samples[place]:g}, expected numbers in [-1, 1]")
    if rate is None or rate == found:
        return samples, found
    return _resampled(samples, found, rate), rate


def _check_whole(path: Path) -> None:
    """ValueError for a WAV file that ends too early, of which the library reads what there is. It tells torn FLAC."""
    with path.open("rb") as file:
        kind, announced = file.read(4), int.from_bytes(file.read(4), "little")
    size = path.stat().st_size
    # What a pipe was written to says 2^32 - 1; the last byte may be one that only makes the size even.
    if kind == b"RIFF" and announced != 0xFFFFFFFF and size < announced + 7:
        raise ValueError(f"is torn: {size} of {announced + 8} bytes")


def _resampled(samples: Samples, found: int, rate: int) -> Samples:
    from scipy.signal import resample_poly

    common = math.gcd(found, rate)
    return np.asarray(np.clip(resample_poly(samples, rate // common, found // common), -1, 1))


def write_recording(path: Path, samples: Samples, rate: int) -> None:
    """Write a WAV file of 16 bits."""
    library = soundfile()
    write_atomically(path, lambda new: library.write(new, samples, rate, subtype="PCM_16", format="WAV"))


def draw_spectrogram(path: Path, samples: Samples, rate: int) -> bool:
    """Draw how loud each frequency is at each time, in decibels, as a picture; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    from scipy.signal import spectrogram

    window = min(WINDOW, samples.size)
    frequencies, _, power = spectrogram(samples, rate, nperseg=window, noverlap=window * 3 // 4)
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds", ylabel="Hz")
    decibels = 10 * np.log10(power + 1e-12)
    top = float(decibels.max())
    extent = (0.0, samples.size / rate, float(frequencies[0]), float(frequencies[-1]))
    image = axes.imshow(decibels, origin="lower", aspect="auto", extent=extent, vmin=top - 80, vmax=top)
    figure.colorbar(image, label="dB")
    write_atomically(path, lambda new: figure.savefig(new, format="png", dpi=100))
    return True
