"""Text to be continued: files as one sequence of bytes or tokens, whose last part is held out."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sscan.models.config import MambaConfig
from sscan.models.files import check_readable, content_of, write_atomically
from sscan.models.tokens import TOKENIZER, Bytes, Tokens
from sscan.nn import no_grad
from sscan.tasks.backoff import BackoffModel
from sscan.tasks.evaluation import IGNORED
from sscan.tasks.task import LANGUAGE_MODELS, LayeredOptions, RunOptions, Task, check_origin

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from sscan.tasks.task import Model, ModelConfig

HELD_OUT = 0.1  # the share of a text, at its end, that no model is trained on
MEASURED_BATCHES = 16  # of held-out windows; their loss costs as much as five steps


class Text(Task):
    """A language model of texts.

    Parameters
    ----------
    options : RunOptions
    texts : sequence of Path
        Files, which are joined as they are. The last tenth of their bytes is held out.
    tokenizer : Path, optional
        A ``tokenizer.json``; without it a token is a byte.

    Attributes
    ----------
    tokens_are : str
        "bytes" or "tokens".
    bytes : array of uint8
        The text.
    held_out_bytes : int
        How many of them, at the end, are held out.
    data : array of integers
        The tokens.
    held_out : int
        Where in `data` those begin that are not trained on.

    Raises
    ------
    OSError
        If a file cannot be read.
    ValueError
        If one is no text, or with a tokenizer not in UTF-8; if the text is too short for one window.
    """

    name = "text"
    unit = "bits/byte"
    goal = "bits_per_byte"
    goal_is = "bits per byte"
    recipe = LANGUAGE_MODELS

    def __init__(self, options: RunOptions, texts: Sequence[Path], tokenizer: Path | None = None) -> None:
        super().__init__(options)
        self.texts = list(texts)
        self.bytes = np.concatenate([read_text(path, utf8=tokenizer is not None) for path in self.texts])
        self._sha256 = hashlib.sha256(self.bytes.data).hexdigest()
        start = held_out_start(self.bytes)
        self.vocabulary = Bytes()
        self.tokens_are, self._tokenizer = "bytes", None
        if tokenizer is not None:
            self.vocabulary = Tokens(tokenizer)
            self.tokens_are, self._tokenizer = "tokens", tokenizer.read_bytes()
            start += _rest_of_character(self.bytes[start : start + 4])
        self.held_out_bytes = self.bytes.size - start
        parts = [self.vocabulary.encode_long(part.tobytes()) for part in (self.bytes[:start], self.bytes[start:])]
        self.data, self.held_out = np.concatenate(parts), int(parts[0].size)
        if self.held_out <= options.length + 1 or self.held_out == self.data.size:
            name = self.texts[0] if len(self.texts) == 1 else "the text"
            raise ValueError(f"{name} is too short: {self.data.size} {self.tokens_are} for windows of {options.length}")
        if self.data.max() >= self.vocabulary.size:
            raise ValueError(f"{tokenizer}: token {self.data.max()} is beyond its size of {self.vocabulary.size}")

    def model_config(self) -> ModelConfig:
        """One token of the model for each of the vocabulary."""
        return MambaConfig(self.options.d_model, self.options.n_layer, vocab_size=self.vocabulary.size)

    def batch(self, step: int) -> tuple[Any, Any]:
        """Windows from anywhere in the training part."""
        options = self.options
        return random_windows(self.data[: self.held_out], options.batch, options.length, options.seed, step)

    def in_unit(self, nats: float) -> float:
        """Bits per byte, if the tokens stand for as many bytes as those of the whole training part do."""
        return nats / math.log(2) * (self.held_out / (self.bytes.size - self.held_out_bytes))

    def measure(self, model: Model) -> dict[str, float]:
        """Bits per byte of windows that are spread evenly over the held-out part, always the same."""
        return {self.goal: self.held_out_bits(model, MEASURED_BATCHES * self.options.batch)}

    def held_out_bits(self, model: Model, most: int | None = None) -> float:
        """Bits per byte of the held-out part, or of so many windows at most of it."""
        nats = mean_nats(model, self.data, self.held_out, self.options.length, self.options.batch, most)
        return nats / math.log(2) * ((self.data.size - self.held_out) / self.held_out_bytes)

    def compared(self, model: Model, progress: Callable[[float], object] = lambda share: None) -> dict[str, float]:
        """Bits per byte of all of the held-out part, of the model and of byte models that back off."""
        start = self.bytes.size - self.held_out_bytes
        counted = BackoffModel(self.bytes[:start], 4)
        orders = {f"order-{k} back-off": counted.bits_per_byte(self.bytes, start, k) for k in (2, 4)}
        return {"Mamba": self.held_out_bits(model), **orders}

    def described(self) -> dict[str, str]:
        """How much text, and how many tokens that are no bytes."""
        more = f" and {len(self.texts) - 1} more" if len(self.texts) > 1 else ""
        size, tokens = self.bytes.size, self.data.size
        lines = {"text": f"{self.texts[0]}{more}: {size:,} bytes, the last {self.held_out_bytes:,} of them held out"}
        if self.tokens_are != "bytes":
            lines["tokens"] = f"{tokens:,} of {self.vocabulary.size:,} kinds, {size / tokens:.2f} bytes each"
        return lines

    def prompt(self) -> npt.NDArray[Any]:
        """The beginning of what is held out."""
        return self.data[self.held_out : self.held_out + 64]

    def save_model(self, model: Model, folder: Path) -> None:
        """Write the model, and its tokenizer beside it."""
        super().save_model(model, folder)
        if self._tokenizer is not None:
            content = self._tokenizer
            write_atomically(folder / TOKENIZER, lambda new: new.write_bytes(content))

    @property
    def files(self) -> Sequence[Path]:
        """What the data were read from."""
        return self.texts

    def about(self) -> dict[str, Any]:
        """Where the files are, and digests of what is in them."""
        return asdict(
            _Origin(
                [str(path.resolve()) for path in self.texts],
                self._sha256,
                None if self._tokenizer is None else hashlib.sha256(self._tokenizer).hexdigest(),
            )
        )

    @classmethod
    def again(  # type: ignore[override]  # of what may be given, each task has its own
        cls, options: RunOptions, about: dict[str, Any], checkpoint: Path, *, texts: Sequence[Path] | None = None,
        tokenizer: Path | None = None,
    ) -> Text:  # fmt: skip
        """The task of a run; texts and tokenizer may lie elsewhere now, but must be the same.

        Raises
        ------
        OSError, ValueError
            If they cannot be read, or are others.
        """
        with content_of(checkpoint):
            origin = _Origin(**about)
        folder = checkpoint.parent
        if origin.tokenizer_sha256 is None and tokenizer is not None:
            raise ValueError(f"{folder} was trained on bytes, without a tokenizer")
        if origin.tokenizer_sha256 is not None:
            tokenizer = tokenizer or folder / TOKENIZER
        task = cls(options, [Path(text) for text in texts or origin.texts], tokenizer)
        found = _Origin(**task.about())
        if found.sha256 != origin.sha256:
            raise ValueError(f"{folder} was trained on another text than {', '.join(map(str, task.texts))}")
        if found.tokenizer_sha256 != origin.tokenizer_sha256:
            raise ValueError(f"{folder} was trained with another tokenizer than {tokenizer}")
        return task


class Ablation(Text):
    """A language model of any layers, on texts by bytes: what the paper's Tables 6 to 10 compare."""

    name = "ablation"
    Options = LayeredOptions

    def model_config(self) -> ModelConfig:
        """One token of the model for each byte."""
        assert isinstance(self.options, LayeredOptions)
        return self.options.config(self.vocabulary.size, tie_embeddings=True)

    def final(self, model: Model) -> dict[str, float]:
        """Bits per byte of all of the held-out part."""
        return {self.goal: self.held_out_bits(model)}


@dataclass(frozen=True)
class _Origin:
    """What a run keeps of its text."""

    texts: list[str]
    sha256: str
    tokenizer_sha256: str | None

    def __post_init__(self) -> None:
        check_origin("texts", self.texts, self.sha256)
        if not isinstance(self.tokenizer_sha256, str | None):
            raise TypeError(f"run: tokenizer_sha256 must be a string or null, got {self.tokenizer_sha256!r}")


# Reading


def text_files(paths: Sequence[Path], suffixes: Collection[str] = ()) -> list[Path]:
    """The files, and all below the folders, by name, without those whose names begin with a dot.

    With `suffixes`, in lower case, only those below the folders that end in one of them.

    Raises
    ------
    ValueError
        If there is no file in a folder.
    """
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = (file for file in sorted(path.rglob("*")) if file.is_file())
        visible = [file for file in inside if not any(x.startswith(".") for x in file.relative_to(path).parts)]
        if suffixes:
            visible = [file for file in visible if file.suffix.lower() in suffixes]
        if not visible:
            raise ValueError(f"{path}: no file in this folder{' ends in ' + ' or '.join(suffixes) if suffixes else ''}")
        found += visible
    return found


def read_text(path: Path, *, utf8: bool = False) -> npt.NDArray[np.uint8]:
    """The bytes of a text file.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is empty, no regular file, contains a NUL byte, which no text does, or is not in `utf8` although it must.
    """
    check_readable(path)
    data = np.fromfile(path, np.uint8)
    if not data.size:
        raise ValueError(f"{path} is empty")
    if not data.all():
        raise ValueError(f"{path} is not text: byte {int(data.argmin())} is NUL")
    if utf8:
        try:
            data.tobytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8, as a tokenizer needs it: byte {error.start}") from error
    return data


def held_out_start(data: npt.NDArray[np.uint8]) -> int:
    """Where the held-out tail begins."""
    return data.size - int(data.size * HELD_OUT)


def _rest_of_character(data: npt.NDArray[np.uint8]) -> int:
    """How many bytes belong to a character in UTF-8 that has begun before."""
    begins = data & 0xC0 != 0x80
    return int(begins.argmax()) if begins.any() else data.size


# Windows


def random_windows(data: npt.NDArray[Any], batch: int, length: int, seed: int, step: int) -> tuple[Any, Any]:
    """Inputs and targets (batch, length): windows of `data` that depend on the seed and the step only."""
    starts = np.random.default_rng([seed, step]).integers(0, data.size - length, batch)
    windows = data[starts[:, None] + np.arange(length + 1)].astype(np.int32)
    return windows[:, :-1], windows[:, 1:]


def overlapping_windows(data: npt.NDArray[Any], start: int, length: int, most: int | None = None) -> tuple[Any, Any]:
    """Inputs and targets (windows, length) in which each token from `start` on is a target that counts exactly once.

    Windows advance by half their length and only the second half counts, so every token is predicted from at least
    length / 2 tokens before it, the first ones from tokens before `start`. Windows of one token advance by one. If
    that makes more than `most` windows, it is every so manieth of them.
    """
    return _cut(data, _places(data.size, start, length, most), length)


def mean_nats(
    model: Model, data: npt.NDArray[Any], start: int, length: int, batch: int, most: int | None = None
) -> float:
    """Mean of -log p over the tokens from `start` on that count in :func:`overlapping_windows`."""
    places = _places(data.size, start, length, most)
    nats, tokens = 0.0, 0
    with no_grad():
        for i in range(0, places.size, batch):
            inputs, targets = _cut(data, places[i : i + batch], length)
            counted = int((targets != IGNORED).sum())
            nats, tokens = nats + model.loss(inputs, targets).item() * counted, tokens + counted
    return nats / tokens


def _half(length: int) -> int:
    """How many tokens count in a window."""
    return max(length // 2, 1)


def _places(size: int, start: int, length: int, most: int | None) -> npt.NDArray[np.int64]:
    """Where windows begin; the first may do so before the data."""
    before = 1 + length - _half(length)
    places = np.arange(start - before, size - before, _half(length))
    return places if most is None else places[:: -(-places.size // most)]


def _cut(data: npt.NDArray[Any], places: npt.NDArray[np.int64], length: int) -> tuple[Any, Any]:
    """Inputs and targets of the windows that begin there."""
    inside = places[:, None] + np.arange(length + 1)
    windows = data[np.clip(inside, 0, data.size - 1)].astype(np.int32)
    counts = (np.arange(length) >= length - _half(length)) & (inside[:, 1:] < data.size)
    return windows[:, :-1], np.where(counts, windows[:, 1:], IGNORED)
