"""Audio to be continued, sample by sample: the paper's section 4.4, on recordings of one channel."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan.models.arguments import check_integer
from sscan.models.files import content_of, read_object, write_atomically
from sscan.nn import SequenceConfig, SequenceModel
from sscan.nn.autodiff import to_numpy
from sscan.tasks.backoff import BackoffModel
from sscan.tasks.evaluation import evaluate
from sscan.tasks.linear_prediction import LinearPrediction, flac_bits_per_sample
from sscan.tasks.recordings import compress, read_recording
from sscan.tasks.task import Recipe, RunOptions, Task, check_origin
from sscan.tasks.text import MEASURED_BATCHES, held_out_start, mean_nats, random_windows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sscan.models.sampling import Sampler
    from sscan.tasks.recordings import Levels
    from sscan.tasks.task import Model

LEVELS = 256
FILE = "audio.json"  # beside a model: what its tokens are
PIECE = 1 << 14  # samples that are read at once where states are carried along

# What the stages of the U-Net repeat; the paper's names of Figure 10 and Table 5.
BLOCKS: dict[str, list[dict[str, Any]]] = {
    "mamba": [{"layer": "mamba"}],
    "mamba-complex": [{"layer": "gated", "inner": "s6", "A": "lin"}],
    "mamba-s4": [{"layer": "gated", "inner": "s4"}],
    "s4": [{"layer": "ungated", "inner": "s4"}, {"layer": "mlp", "expand": 2}],
}


@dataclass(frozen=True)
class AudioOptions(RunOptions):
    """A U-Net with two pools of `pool` each, of which every stage has `n_layer` blocks.

    `block` and `centre` are one of ``BLOCKS``; None is the centre's for the same as elsewhere. `length` is a
    multiple of both pools together. The paper has 8 or 15 blocks a stage, a width of 64 or 96 and a rate of 2e-3
    (section E.4); the defaults are what two CPU cores train in minutes.
    """

    d_model: int = 24
    n_layer: int = 1
    length: int = 2048
    batch: int = 4
    lr: float = 8e-3
    minutes: float | None = 10.0
    block: str = "mamba"
    centre: str | None = None
    pool: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("run", "pool", self.pool)
        for name in ("block", "centre"):
            value = getattr(self, name)
            if value not in BLOCKS and not (name == "centre" and value is None):
                raise ValueError(f"run: {name} must be one of {', '.join(BLOCKS)}, got {value!r}")
        if self.length % self.pool**2:
            raise ValueError(f"run: length must be a multiple of {self.pool**2}, got {self.length}")


class Audio(Task):
    """A model of recordings, as mu-law levels (:func:`sscan.tasks.recordings.compress`).

    Parameters
    ----------
    options : AudioOptions
    recordings : sequence of Path
        WAV or FLAC files. They are joined in an order that their content decides, and the last tenth of all samples is
        held out: with many files those are other files.
    rate : int, optional
        What to resample them to; without it they must be of one rate.

    Attributes
    ----------
    data : array of uint8
        The levels.
    held_out : int
        Where in `data` those begin that are not trained on.
    rate : int
        Samples a second.

    Raises
    ------
    OSError, ValueError
        As :func:`sscan.tasks.recordings.read_recording`; also if their rates differ, or they are too short for a
        window.
    """

    name = "audio"
    unit = "bits/sample"
    goal = "bits_per_sample"
    goal_is = "bits per sample"
    tokens_are = "samples"
    layers_are = "blocks a stage of a U-Net"
    Options = AudioOptions
    recipe = Recipe(weight_decay=0.1, betas=(0.9, 0.95), warmup=0.1, final=1e-5, clip=0.1)  # section E.4

    def __init__(self, options: AudioOptions, recordings: Sequence[Path], rate: int | None = None) -> None:
        super().__init__(options)
        self.options: AudioOptions = options
        self.recordings = list(recordings)
        if rate is not None:
            check_integer("run", "rate", rate)
        parts: list[Levels] = []
        rates: list[int] = []
        for path in self.recordings:
            samples, found = read_recording(path, rate)
            parts.append(compress(samples))
            rates.append(found)
            if found != rates[0]:
                raise ValueError(f"{path}: has {found} Hz, those before have {rates[0]}; --rate makes them one")
        self.rate = rates[0]
        parts.sort(key=lambda part: hashlib.sha256(part.data).digest())
        self.data = np.concatenate(parts)
        self.held_out = held_out_start(self.data)
        self._sha256 = hashlib.sha256(self.data.data).hexdigest()
        if self.held_out <= options.length + 1 or self.held_out == self.data.size:
            raise ValueError(f"{self._files}: {self.data.size} samples are too short for windows of {options.length}")

    @property
    def _files(self) -> str:
        more = f" and {len(self.recordings) - 1} more" if len(self.recordings) > 1 else ""
        return f"{self.recordings[0]}{more}"

    def model_config(self) -> SequenceConfig:
        """The U-Net between an embedding of the levels and a head."""
        options = self.options
        unet = {
            "layer": "unet", "outer": BLOCKS[options.block], "centre": BLOCKS[options.centre or options.block],
            "blocks": options.n_layer, "pool": [options.pool] * 2,
        }  # fmt: skip
        return SequenceConfig(options.d_model, LEVELS, (unet,), tie_embeddings=False)

    def batch(self, step: int) -> tuple[Any, Any]:
        """Windows from anywhere in the training part."""
        options = self.options
        return random_windows(self.data[: self.held_out], options.batch, options.length, options.seed, step)

    def in_unit(self, nats: float) -> float:
        """Bits."""
        return nats / math.log(2)

    def measure(self, model: Model) -> dict[str, float]:
        """Bits per sample of windows that are spread evenly over the held-out part, always the same."""
        return {self.goal: self._bits_of_windows(model, MEASURED_BATCHES * self.options.batch)}

    def final(self, model: Model) -> dict[str, float]:
        """Those of all of it."""
        return {self.goal: self._bits_of_windows(model)}

    def _bits_of_windows(self, model: Model, most: int | None = None) -> float:
        return self.in_unit(mean_nats(model, self.data, self.held_out, self.options.length, self.options.batch, most))

    def compared(self, model: Model, progress: Callable[[float], object] = lambda share: None) -> dict[str, float]:
        """Bits per sample of what is held out: by the model, by linear prediction, FLAC and counting.

        The model reads windows as in training, of which the second halves count, and all of it with its states.
        """
        name, rest = self.options.block, self.data[self.held_out :]
        seen = self.data[: self.held_out]
        carried = evaluate(model, rest.astype(np.int64), np.ones(rest.size, np.int64), progress=progress, piece=PIECE)
        return {
            f"{name}, windows of {self.options.length}": self._bits_of_windows(model),
            f"{name}, states carried along": carried.bits_a_byte,
            "linear prediction": LinearPrediction(seen).bits_per_sample(self.data, self.held_out),
            "FLAC": flac_bits_per_sample(rest, self.rate),
            "order-2 back-off": BackoffModel(seen).bits_per_byte(self.data, self.held_out),
        }

    def described(self) -> dict[str, str]:
        """How much there is."""
        seconds, held_out = self.data.size / self.rate, (self.data.size - self.held_out) / self.rate
        return {"audio": f"{self._files}: {seconds:,.1f} s at {self.rate} Hz, {held_out:,.1f} s of them held out"}

    def save_model(self, model: Model, folder: Path) -> None:
        """Write the model, and beside it what its tokens are."""
        super().save_model(model, folder)
        content = json.dumps({"rate": self.rate, "coding": "mu-law"})
        write_atomically(folder / FILE, lambda new: new.write_text(content))

    @property
    def files(self) -> Sequence[Path]:
        """What the data were read from."""
        return self.recordings

    def about(self) -> dict[str, Any]:
        """Where the files are, their rate, and a digest of what is in them."""
        return asdict(_Origin([str(path.resolve()) for path in self.recordings], self.rate, self._sha256))

    @classmethod
    def again(  # type: ignore[override]  # of what may be given, each task has its own
        cls, options: AudioOptions, about: dict[str, Any], checkpoint: Path, *,
        recordings: Sequence[Path] | None = None, rate: int | None = None,
    ) -> Audio:  # fmt: skip
        """The task of a run; files may lie elsewhere now, but must hold the same.

        Raises
        ------
        OSError, ValueError
            If they cannot be read, or are others.
        """
        with content_of(checkpoint):
            origin = _Origin(**about)
        if rate not in (None, origin.rate):
            raise ValueError(f"{checkpoint.parent} was trained with rate = {origin.rate}, not {rate}")
        task = cls(options, [Path(path) for path in recordings or origin.recordings], origin.rate)
        if task._sha256 != origin.sha256:
            raise ValueError(f"{checkpoint.parent} was trained on other audio than {task._files}")
        return task


@dataclass(frozen=True)
class _Origin:
    """What a run keeps of its data."""

    recordings: list[str]
    rate: int
    sha256: str

    def __post_init__(self) -> None:
        check_origin("recordings", self.recordings, self.sha256)
        check_integer("run", "rate", self.rate)


# Continuing


def open_audio_model(folder: Path, dtype: Any = np.float32) -> tuple[SequenceModel, int]:
    """A model that :meth:`Audio.save_model` wrote, and the rate of its samples.

    Raises
    ------
    OSError, ValueError
        If the files cannot be read, or are not those of such a model.
    """
    values = read_object(folder / FILE)
    with content_of(folder / FILE):
        if values.keys() != {"rate", "coding"} or values["coding"] != "mu-law":
            raise ValueError(f"must say the rate and that the coding is mu-law, got {values}")
        check_integer("audio", "rate", values["rate"])
    model = SequenceModel.from_pretrained(folder, dtype)
    if model.config.vocab_size != LEVELS:
        raise ValueError(f"{folder}: a model of audio has {LEVELS} tokens, got {model.config.vocab_size}")
    return model, values["rate"]


def continued(
    model: SequenceModel, prompt: Levels, count: int, sampler: Sampler, progress: Callable[[float], object]
) -> Levels:
    """The prompt, one level at least, and `count` new ones, each drawn from what the model makes of all before it."""
    levels, states = np.empty(prompt.size + count, np.uint8), model.new_states(1)
    levels[: prompt.size] = prompt
    for start in range(0, prompt.size, PIECE):
        logits, states = model.prefill(prompt[None, start : start + PIECE].astype(np.int64), states)
    for at in range(prompt.size, levels.size):
        levels[at] = sampler(to_numpy(logits))[0]
        logits = model.step(levels[at : at + 1].astype(np.int64), states)
        progress((at + 1 - prompt.size) / count)
    return levels
