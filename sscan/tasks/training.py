"""A training run of any task, which can stop at any step and go on exactly."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic

import numpy as np

from sscan._arrays import array_module
from sscan.models.arguments import check_number
from sscan.models.files import content_of, open_arrays, parse_object, save_arrays
from sscan.nn import AdamW, capture, clip_gradients, decay_groups, no_grad
from sscan.nn.autodiff import move
from sscan.tasks.task import CHANGEABLE, TaskT

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sscan.nn import Tensor
    from sscan.tasks.task import Model, RunOptions, Task

STATE_FILE = "training.safetensors"


class TrainingRun(Generic[TaskT]):
    """A task, its model, the optimiser, and how far they are.

    Parameters
    ----------
    task : Task
    array_module : module
        numpy, or cupy to train on its current GPU. A run may change between them when it is saved and continued.
    model : MambaLM or SequenceModel, optional
        To go on with; a new one if it is left out.

    Attributes
    ----------
    losses : list of float
        Training loss of every step so far, in nats.
    measures : list of (int, float)
        Numbers of steps, and what the task's goal was after them.
    seconds : float
        Time spent in steps so far, over all sessions.
    """

    def __init__(self, task: TaskT, array_module: Any = np, model: Model | None = None) -> None:
        self.task, self.options, recipe = task, task.options, task.recipe
        self.model = model or task.new_model()
        self.model.to(array_module)
        self.optimiser = AdamW(decay_groups(self.model, recipe.weight_decay), betas=recipe.betas)
        self._captured = capture(self._update)
        self._made: tuple[int, Any] | None = None
        self.losses: list[float] = []
        self.measures: list[tuple[int, float]] = []
        self.seconds = 0.0

    @property
    def progress(self) -> float:
        """The share of the run that is done, from 0 to 1."""
        if self.options.steps is not None:
            return min(len(self.losses) / self.options.steps, 1.0)
        return min(self.seconds / (60 * (self.options.minutes or math.inf)), 1.0)

    @property
    def done(self) -> bool:
        """Whether nothing is left to do: it is at its end, or at its target."""
        target = self.options.target
        return self.progress >= 1 or (target is not None and bool(self.measures) and self.measures[-1][1] <= target)

    @property
    def best(self) -> tuple[int, float] | None:
        """The smallest of the measures, and its step; the first of equals."""
        return min(self.measures, key=lambda measure: measure[1], default=None)

    def warm_up(self) -> None:
        """Compile every kernel that a step needs, and change nothing."""
        self._gradients(*self._batch(0))
        self.model.zero_grad()

    def step(self) -> None:
        """One update of the parameters.

        Raises
        ------
        FloatingPointError
            If the loss is not finite any more; the parameters are those from before the step.
        """
        start = time.perf_counter()
        self.optimiser.lr = self.task.recipe.rate(self.progress, self.options.lr)
        self.optimiser.advance()
        number = len(self.losses)
        result = self._captured(*self._batch(number))
        self._make(number + 1)  # while a GPU is at work
        loss = float(result)
        try:
            self._check_loss(loss)
        except FloatingPointError:
            self.optimiser.steps -= 1
            raise
        self.losses.append(loss)
        self.seconds += time.perf_counter() - start

    def _batch(self, step: int) -> tuple[Any, Any]:
        """Inputs and targets of a step, where the model is."""
        inputs, targets = self._make(step)
        xp = array_module(self.model.parameters()[0].data)
        return move(inputs, xp), move(targets, xp)

    def _make(self, step: int) -> tuple[Any, Any]:
        """The task's batch of a step, made once."""
        if self._made is None or self._made[0] != step:
            self._made = step, self.task.batch(step)
        return self._made[1]

    def _update(self, inputs: Any, targets: Any) -> Any:
        """One update of the parameters, unless the loss, which is returned, is not finite."""
        loss = self._gradients(inputs, targets)
        with np.errstate(all="ignore"):  # what comes of it is checked by the next step or `save`
            clip_gradients(self.model.parameters(), self.task.recipe.clip)
            self.optimiser.update(loss)
        return loss.data

    def _gradients(self, inputs: Any, targets: Any) -> Tensor:
        self.model.zero_grad()
        with np.errstate(all="ignore"):
            loss = self.model.loss(inputs, targets)
            loss.backward()
        return loss

    def evaluate(self) -> dict[str, float]:
        """What the task measures of the model now.

        Raises
        ------
        FloatingPointError
            If one of the measures is not finite.
        """
        with np.errstate(all="ignore"):
            found = self.task.measure(self.model)
        for value in found.values():
            self._check_loss(value)
        self.measures.append((len(self.losses), found[self.task.goal]))
        return found

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
        self._check_parameters()
        with no_grad(), np.errstate(all="ignore"):  # no step has noticed yet what the last update did
            self._check_loss(self.model.loss(*self._batch(len(self.losses))).item())
        self.task.save_model(self.model, folder)
        about = {
            "task": self.task.name,
            "options": dataclasses.asdict(self.options),
            "about": self.task.about(),
            "seconds": self.seconds,
        }
        arrays = {f"model.{name}": p.data for name, p in self.model.named_parameters()}
        arrays |= {f"optimiser.{name}": array for name, array in self.optimiser.state_dict().items()}
        arrays["losses"] = np.array(self.losses, np.float64)
        arrays["measures"] = np.array(self.measures, np.float64).reshape(-1, 2)
        save_arrays(folder / STATE_FILE, arrays, {"run": json.dumps(about)})

    def save_best(self, folder: Path) -> None:
        """Write the model, for use; raises as :meth:`save`."""
        self._check_parameters()
        self.task.save_model(self.model, folder)

    def _check_parameters(self) -> None:
        for name, parameter in self.model.named_parameters():
            if not array_module(parameter.data).isfinite(parameter.data).all():
                raise FloatingPointError(f"{name} is not finite after {len(self.losses)} steps; try a smaller --lr")

    @classmethod
    def load(
        cls, folder: Path, task: type[TaskT], array_module: Any = np, changes: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> TrainingRun[TaskT]:  # fmt: skip
        """Continue a saved run on the data that it was started with.

        Parameters
        ----------
        folder : Path
        task : type of Task
            The task that it is a run of.
        array_module : module
            As of the class.
        changes : mapping, optional
            Options that were given anew. Those of the model and its data must be the saved ones; those in `CHANGEABLE`
            may differ.
        **given
            To the task's `again`.

        Raises
        ------
        OSError
            If the file, or the data, cannot be read.
        ValueError
            If the data or an option differs from the saved one, or the file holds no run of the task; the message names
            the file.
        """
        path = folder / STATE_FILE
        saved = Saved.read(path, task)
        for name, value in (changes or {}).items():
            before = getattr(saved.options, name)
            if name not in CHANGEABLE and value != before:
                raise ValueError(f"{folder} was trained with {name} = {before}, not {value}")
        options = dataclasses.replace(saved.options, **(changes or {}))
        made = task.again(options, saved.about, path, **given)
        with open_arrays(path) as file:
            model = made.read_model(path, file)
            names = [name for name in file.keys() if not name.startswith("model.")]  # noqa: SIM118
            arrays = {name: file.get_tensor(name) for name in names}
        run = cls(made, array_module, model)
        run.seconds = saved.seconds
        with content_of(path):
            run._load_progress(arrays)
        return run

    def _load_progress(self, arrays: dict[str, Any]) -> None:
        """Take over the losses, the measures and the state of the optimiser."""
        losses, measures = (arrays.pop(name, np.zeros(())) for name in ("losses", "measures"))
        if losses.ndim != 1 or losses.dtype != np.float64:
            raise ValueError("losses must be a list of float64 numbers")
        if measures.shape[1:] != (2,) or measures.dtype != np.float64:
            raise ValueError("measures must be pairs of float64 numbers")
        unknown = [name for name in arrays if not name.startswith("optimiser.")]
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}")
        self.optimiser.load_state_dict({name.removeprefix("optimiser."): array for name, array in arrays.items()})
        if self.optimiser.steps != losses.size:
            raise ValueError(f"holds {losses.size} losses, but the optimiser has made {self.optimiser.steps} steps")
        if not np.isfinite(measures).all() or not ((measures[:, 0] > 0) & (measures[:, 0] <= losses.size)).all():
            raise ValueError("measures must be numbers, of steps that were made")
        self.losses = losses.tolist()
        self.measures = [(int(step), float(value)) for step, value in measures]


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says about its run beside the arrays."""

    task: str
    options: RunOptions
    about: dict[str, Any]
    seconds: float

    @classmethod
    def read(cls, path: Path, task: type[Task]) -> Saved:
        """Of a run of the task; raises as :meth:`TrainingRun.load`."""
        with open_arrays(path) as file:
            return cls._from_json((file.metadata() or {}).get("run", ""), task)

    @classmethod
    def _from_json(cls, text: str, task: type[Task]) -> Saved:
        if not text:
            raise ValueError("holds no training run")
        values = parse_object(text)
        if values.keys() != {"task", "options", "about", "seconds"}:
            raise ValueError("its description of the run is not complete, or of another version of sscan")
        if values["task"] != task.name:
            raise ValueError(f"holds a run of the task {values['task']!r}, not {task.name!r}")
        for name in ("options", "about"):
            if not isinstance(values[name], dict):
                raise TypeError(f"run: {name} must be an object, got {values[name]!r}")
        check_number("run", "seconds", values["seconds"])
        return cls(**{**values, "options": task.Options(**values["options"])})
