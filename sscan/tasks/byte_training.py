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

from sscan.models.arguments import check_integer, check_number
from sscan.models.files import content_of, open_arrays, parse_object, save_arrays
from sscan.models.pretrained import weights_in
from sscan.nn import AdamW, MambaConfig, MambaLM, Tensor, capture, clip_gradients, decay_groups, no_grad, warmup_cosine
from sscan.nn.autodiff import array_module, move
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

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer", "length", "batch"):
            check_integer("run", name, getattr(self, name))
        check_integer("run", "seed", self.seed, 0)
        check_number("run", "lr", self.lr, positive=True)
        if self.steps is not None:
            check_integer("run", "steps", self.steps)
        elif self.minutes is None:
            raise ValueError("run: either steps or minutes must be given")
        if self.minutes is not None:
            check_number("run", "minutes", self.minutes, positive=True)
        if self.precision not in PRECISIONS:
            raise ValueError(f"run: precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

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
    model : MambaLM, optional
        To go on with; a new one if it is left out.

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

    def __init__(self, options: RunOptions, text: Path, array_module: Any = np, model: MambaLM | None = None) -> None:
        self.options = options
        self.text = text
        self.data = read_text(text)
        self.held_out = held_out_start(self.data)
        if self.held_out <= options.length + 1:
            raise ValueError(f"{text} is too short: {self.data.size} bytes for windows of {options.length}")
        activation_dtype = PRECISIONS[options.precision]
        self.model = model or MambaLM(options.model_config(), seed=options.seed, activation_dtype=activation_dtype)
        self.model.to(array_module)
        self.optimiser = AdamW(decay_groups(self.model, weight_decay=0.1))
        self.losses: list[float] = []
        self.seconds = 0.0
        self._captured = capture(self._update)

    @property
    def progress(self) -> float:
        """The share of the run that is done, from 0 to 1."""
        if self.options.steps is not None:
            return min(len(self.losses) / self.options.steps, 1.0)
        return min(self.seconds / (60 * (self.options.minutes or math.inf)), 1.0)

    def warm_up(self) -> None:
        """Compile every kernel that a step needs, and change nothing."""
        self._gradients(*self._windows(0))
        self.model.zero_grad()

    def step(self) -> None:
        """One update of the parameters.

        Raises
        ------
        FloatingPointError
            If the loss is not finite any more; the parameters are those from before the step.
        """
        start = time.perf_counter()
        self.optimiser.lr = warmup_cosine(self.progress, self.options.lr)
        self.optimiser.advance()
        loss = float(self._captured(*self._windows(len(self.losses))))
        try:
            self._check_loss(loss)
        except FloatingPointError:
            self.optimiser.steps -= 1
            raise
        self.losses.append(loss / math.log(2))
        self.seconds += time.perf_counter() - start

    def _windows(self, step: int) -> tuple[Any, Any]:
        """Inputs and targets of a step, where the model is."""
        options, xp = self.options, array_module(self.model.parameters()[0].data)
        windows = random_windows(self.data[: self.held_out], options.batch, options.length, options.seed, step)
        return move(windows[0], xp), move(windows[1], xp)

    def _update(self, inputs: Any, targets: Any) -> Any:
        """One update of the parameters, unless the loss, which is returned, is not finite."""
        loss = self._gradients(inputs, targets)
        with np.errstate(all="ignore"):  # what comes of it is checked by the next step or `save`
            clip_gradients(self.model.parameters(), 1.0)
            self.optimiser.update(loss)
        return loss.data

    def _gradients(self, inputs: Any, targets: Any) -> Tensor:
        self.model.zero_grad()
        with np.errstate(all="ignore"):
            loss = self.model.loss(inputs, targets)
            loss.backward()
        return loss

    def _check_loss(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {len(self.losses)}; try a smaller --lr")

    def save(self, folder: Path) -> None:
        """Write the model, for use, and the state of the run, to continue it; the latter is one file, so never torn.

        Raises
        ------
        FloatingPointError
            If the last update has left parameters or a loss that are not finite. Nothing is written then.
        OSError
            If the files cannot be written; older ones stay whole.
        """
        self._check()
        self.model.save_pretrained(folder)
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

    def _check(self) -> None:
        """FloatingPointError if the model is of no use any more, which no step has noticed after the last update."""
        for name, parameter in self.model.named_parameters():
            if not array_module(parameter.data).isfinite(parameter.data).all():
                raise FloatingPointError(f"{name} is not finite after {len(self.losses)} steps; try a smaller --lr")
        with no_grad(), np.errstate(all="ignore"):
            self._check_loss(self.model.loss(*self._windows(len(self.losses))).item())

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
        OSError
            If the file, or the text, cannot be read.
        ValueError
            If the text or an option differs from the saved one, or the file holds no training run; the message names
            the file.
        """
        path = folder / STATE_FILE
        with open_arrays(path) as file:
            saved = _Saved.from_json((file.metadata() or {}).get("run", ""))
            precision = PRECISIONS[saved.options.precision]
            config = saved.options.model_config()
            model = MambaLM.of_weights(config, weights_in(path, file, config, "model."), activation_dtype=precision)
            names = [name for name in file.keys() if not name.startswith("model.")]  # noqa: SIM118
            arrays = {name: file.get_tensor(name) for name in names}
        for name, value in changes.items():
            before = getattr(saved.options, name)
            if name not in ("steps", "minutes") and value != before:
                raise ValueError(f"{folder} was trained with {name} = {before}, not {value}")
        options = dataclasses.replace(saved.options, **changes)
        run = cls(options, Path(saved.text) if text is None else text, array_module, model)
        if run._digest() != saved.text_sha256:
            raise ValueError(f"{folder} was trained on another text than {run.text}")
        run.seconds = saved.seconds
        with content_of(path):
            run._load_progress(arrays)
        return run

    def _load_progress(self, arrays: dict[str, Any]) -> None:
        """Take over the losses and the state of the optimiser."""
        losses = arrays.pop("losses", np.zeros((0, 0)))
        if losses.ndim != 1 or losses.dtype != np.float64:
            raise ValueError("losses must be a list of float64 numbers")
        unknown = [name for name in arrays if not name.startswith("optimiser.")]
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}")
        self.optimiser.load_state_dict({name.removeprefix("optimiser."): array for name, array in arrays.items()})
        if self.optimiser.steps != losses.size:
            raise ValueError(f"holds {losses.size} losses, but the optimiser has made {self.optimiser.steps} steps")
        self.losses = losses.tolist()


@dataclass(frozen=True)
class _Saved:
    """What a file says about its run beside the arrays."""

    options: RunOptions
    seconds: float
    text: str
    text_sha256: str

    @classmethod
    def from_json(cls, text: str) -> _Saved:
        if not text:
            raise ValueError("holds no training run")
        values = parse_object(text)
        if values.keys() != {"options", "seconds", "text", "text_sha256"} or not isinstance(values["options"], dict):
            raise ValueError("its description of the run is not complete")
        check_number("run", "seconds", values["seconds"])
        for name in ("text", "text_sha256"):
            if not isinstance(values[name], str):
                raise TypeError(f"run: {name} must be a string, got {values[name]!r}")
        return cls(**{**values, "options": RunOptions(**values["options"])})
