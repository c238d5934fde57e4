"""A training run of a byte-level language model that can stop at any step and go on exactly."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sscan.nn import AdamW, MambaConfig, MambaLM, clip_gradients, decay_groups, warmup_cosine
from sscan.nn.checkpoint import load_arrays, save_arrays, save_model
from sscan.tasks.byte_text import held_out_start, random_windows, read_text

STATE_FILE = "training.safetensors"
PRECISIONS: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class RunOptions:
    """What decides the course of a run, beside the text.

    The learning rate follows the share of the run that is done: of `steps`, or if that is None of `minutes`. Only a run
    of a number of steps is the same again, bit for bit. `precision` is the dtype of the activations; parameters and the
    state of the optimiser are always float32.
    """

    d_model: int = 96
    n_layer: int = 6
    length: int = 256
    batch: int = 4
    lr: float = 1.2e-2
    seed: int = 0
    steps: int | None = None
    minutes: float | None = 2.0
    precision: str = "float32"

    def model_config(self) -> MambaConfig:
        """The model: one token per byte."""
        return MambaConfig(self.d_model, self.n_layer, vocab_size=256)


class TrainingRun:
    """A model, its optimiser, and how far they are.

    Parameters
    ----------
    options : RunOptions
    text : Path
    array_module : module
        numpy, or cupy to train on its current GPU. A run may change between them when it is saved and continued.

    Attributes
    ----------
    text : Path
        The text, read when the run is made.
    held_out : int
        Where in `data`, the bytes of the text, the tail begins that is not trained on.
    losses : list of float
        Training loss of every step so far, in bits per byte.
    seconds : float
        Time spent in steps so far, over all sessions.
    """

    def __init__(self, options: RunOptions, text: Path, array_module: Any = np) -> None:
        self.options = options
        self.text = text
        self.data = read_text(text)
        self.held_out = held_out_start(self.data)
        if self.held_out <= options.length + 1:
            raise ValueError(f"{text} is too short: {self.data.size} bytes for windows of {options.length}")
        activation_dtype = PRECISIONS[options.precision]
        self.model = MambaLM(options.model_config(), seed=options.seed, activation_dtype=activation_dtype)
        self.model.to(array_module)
        self.optimiser = AdamW(decay_groups(self.model, weight_decay=0.1))
        self.losses: list[float] = []
        self.seconds = 0.0

    @property
    def progress(self) -> float:
        """The share of the run that is done, from 0 to 1."""
        if self.options.steps is not None:
            return min(len(self.losses) / self.options.steps, 1.0)
        return min(self.seconds / (60 * (self.options.minutes or math.inf)), 1.0)

    def warm_up(self) -> None:
        """Compile every kernel that a step needs, and change nothing."""
        self._gradients(0)
        self.model.zero_grad()

    def step(self) -> None:
        """One update of the parameters.

        Raises
        ------
        FloatingPointError
            If the loss is not finite any more; the parameters are those from before the step.
        """
        start = time.perf_counter()
        step = len(self.losses)
        loss = self._gradients(step)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}; try a smaller --lr")
        clip_gradients(self.model.parameters(), 1.0)
        self.optimiser.lr = warmup_cosine(self.progress, self.options.lr)
        self.optimiser.step()
        self.losses.append(loss / math.log(2))
        self.seconds += time.perf_counter() - start

    def _gradients(self, step: int) -> float:
        options = self.options
        inputs, targets = random_windows(self.data[: self.held_out], options.batch, options.length, options.seed, step)
        self.model.zero_grad()
        loss = self.model.loss(inputs, targets)
        loss.backward()
        return loss.item()

    def save(self, folder: Path) -> None:
        """Write the model, for use, and the state of the run, to continue it; the latter is one file, so never torn."""
        save_model(self.model, folder)
        about = {
            "options": dataclasses.asdict(self.options),
            "seconds": self.seconds,
            "text": str(self.text.resolve()),
            "text_sha256": self._digest(),
        }
        arrays = {f"model.{name}": p.data for name, p in self.model.named_parameters()}
        arrays |= {f"optimiser.{name}": array for name, array in self.optimiser.state_dict().items()}
        arrays["losses"] = np.array(self.losses, np.float64)
        save_arrays(folder / STATE_FILE, arrays, {"run": json.dumps(about)})

    def _digest(self) -> str:
        return hashlib.sha256(self.data.tobytes()).hexdigest()

    @classmethod
    def load(cls, folder: Path, text: Path | None = None, array_module: Any = np, **changes: Any) -> TrainingRun:
        """Continue a saved run on the text that it was started with.

        Parameters
        ----------
        folder : Path
        text : Path, optional
            Where the text is now, if not where it was.
        array_module : module
            As of the class.
        **changes
            Options that were given anew. Those of the model and its data must be the saved ones; `steps` and `minutes`
            may differ, to make the run longer.

        Raises
        ------
        ValueError
            If the text or an option differs from the saved one, or the file holds no training run.
        """
        arrays, metadata = load_arrays(folder / STATE_FILE)
        if "run" not in metadata:
            raise ValueError(f"{folder / STATE_FILE} holds no training run")
        about = json.loads(metadata["run"])
        options = RunOptions(**about["options"])
        for name, value in changes.items():
            if name not in ("steps", "minutes") and value != getattr(options, name):
                raise ValueError(f"{folder} was trained with {name} = {getattr(options, name)}, not {value}")
        run = cls(dataclasses.replace(options, **changes), Path(about["text"]) if text is None else text, array_module)
        if run._digest() != about["text_sha256"]:
            raise ValueError(f"{folder} was trained on another text than {run.text}")
        run.model.load_state_dict(_part(arrays, "model."))
        run.optimiser.load_state_dict(_part(arrays, "optimiser."))
        run.losses, run.seconds = arrays["losses"].tolist(), about["seconds"]
        return run


def _part(arrays: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
