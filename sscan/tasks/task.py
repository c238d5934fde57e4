"""What there is to say of anything that a model is trained on, and how it is trained on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

import ml_dtypes
import numpy as np

from sscan.models.arguments import check_integer, check_number
from sscan.models.pretrained import weights_in
from sscan.nn import MambaConfig, MambaLM, SequenceConfig, SequenceModel, warmup_cosine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sscan.models.tokens import Vocabulary

Model: TypeAlias = MambaLM | SequenceModel
ModelConfig: TypeAlias = MambaConfig | SequenceConfig

PRECISIONS: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Recipe:
    """How parameters are changed: AdamW, and a learning rate that follows :func:`sscan.nn.warmup_cosine`.

    Attributes
    ----------
    weight_decay : float
        Of the parameters that decay.
    betas : tuple of float
        Of the moments.
    warmup : float
        The share of the run in which the rate rises.
    final : float or None
        The rate at the end; None is the highest.
    clip : float
        The highest norm of all gradients together; infinity clips nothing.
    """

    weight_decay: float
    betas: tuple[float, float]
    warmup: float
    final: float | None
    clip: float

    def rate(self, progress: float, peak: float) -> float:
        """The learning rate at a share of the run."""
        return warmup_cosine(progress, peak, peak if self.final is None else self.final, self.warmup)


# Section E.2, the improved recipe.
LANGUAGE_MODELS = Recipe(weight_decay=0.1, betas=(0.9, 0.95), warmup=0.1, final=1e-5, clip=1.0)


@dataclass(frozen=True)
class RunOptions:
    """What decides the course of a run, beside the data.

    The learning rate follows the share of the run that is done: of `steps`, or if that is None of `minutes` that steps
    have taken. Only a run of a number of steps is the same again, bit for bit. `precision` is the dtype of the
    activations; parameters and the state of the optimiser are always float32. So many `evaluations` are spread evenly
    over the run; it ends early when one of them finds the task's goal at `target` or below.
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
    evaluations: int = 10
    target: float | None = None

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer", "length", "batch", "evaluations"):
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
        if self.target is not None:
            check_number("run", "target", self.target)


@dataclass(frozen=True)
class LayeredOptions(RunOptions):
    """Options of a run whose model need not be a Mamba language model.

    `layers` are those of one block, as :class:`sscan.nn.SequenceConfig` takes them, and so are `positions`; the model
    has `n_layer` times as many. None is a Mamba language model of `n_layer` blocks.
    """

    layers: tuple[dict[str, Any], ...] | None = None
    positions: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            checked = SequenceConfig(self.d_model, 1, self.layers, positions=self.positions)
            object.__setattr__(self, "layers", checked.layers)
        elif self.positions != "none":
            raise ValueError(f"run: positions need layers, got {self.positions!r} without")

    def config(self, vocab_size: int, *, tie_embeddings: bool, **ssm_cfg: Any) -> ModelConfig:
        """What the model is, with so many tokens; `ssm_cfg` is of a Mamba language model."""
        if self.layers is None:
            return MambaConfig(
                self.d_model, self.n_layer, vocab_size, ssm_cfg, pad_vocab_size_multiple=1,
                tie_embeddings=tie_embeddings,
            )  # fmt: skip
        layers = self.layers * self.n_layer
        return SequenceConfig(self.d_model, vocab_size, layers, positions=self.positions, tie_embeddings=tie_embeddings)


def check_origin(name: str, files: Any, sha256: Any) -> None:
    """TypeError unless what a checkpoint says of its data is a list of file names, under `name`, and a digest."""
    if not isinstance(files, list) or not files or not all(isinstance(path, str) for path in files):
        raise TypeError(f"run: {name} must be a list of file names, got {files!r}")
    if not isinstance(sha256, str):
        raise TypeError(f"run: sha256 must be a string, got {sha256!r}")


# May be others when a run goes on: they decide when it ends and what is said of it, not what has been.
CHANGEABLE = ("steps", "minutes", "evaluations", "target")
TaskT = TypeVar("TaskT", bound="Task")


class Task(ABC):
    """Something to train a model on.

    Attributes
    ----------
    name : str
        Under which checkpoints remember it.
    unit : str
        In which losses are shown.
    goal : str
        The one of the measures that is to become small.
    goal_is : str
        What that is, in words.
    tokens_are, layers_are : str
        What the tokens are, and what `n_layer` counts in a model that is no Mamba language model, in words.
    vocabulary : Vocabulary
        What they mean, if a model continues sequences of them: then there is a `prompt`.
    recipe : Recipe
    Options : type of RunOptions
        With the task's default configuration.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    goal: ClassVar[str]
    goal_is: ClassVar[str] = ""
    tokens_are: str = "tokens"
    layers_are: ClassVar[str] = "blocks"
    vocabulary: Vocabulary
    recipe: Recipe
    Options: ClassVar[type[RunOptions]] = RunOptions

    def __init__(self, options: RunOptions) -> None:
        self.options = options

    @abstractmethod
    def model_config(self) -> ModelConfig:
        """What the model is."""

    @abstractmethod
    def batch(self, step: int) -> tuple[Any, Any]:
        """Inputs and targets of a step, as NumPy arrays that depend on the options and the step only."""

    @abstractmethod
    def in_unit(self, nats: float) -> float:
        """A loss as it is shown."""

    @abstractmethod
    def measure(self, model: Model) -> dict[str, float]:
        """How well a model does on what it is not trained on, the goal among others."""

    def final(self, model: Model) -> dict[str, float]:
        """What a finished run has come to, as a table shows it; the goal need not be among it."""
        return self.measure(model)

    def compared(self, model: Model, progress: Callable[[float], object] = lambda share: None) -> dict[str, float]:
        """What the goal is for all that is held out, for the model and for simpler ones.

        `progress` is called with the share that is done of what takes long.
        """
        return {}

    def described(self) -> dict[str, str]:
        """What there is to say of the data: titles and lines."""
        return {}

    @property
    def files(self) -> Sequence[Path]:
        """What the data were read from."""
        return ()

    def prompt(self) -> Any:
        """Held-out tokens to be continued by a trained model, if that is what it does."""
        return None

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What a checkpoint must hold, beside the options, for :meth:`again`; JSON."""

    @classmethod
    @abstractmethod
    def again(cls: type[TaskT], options: Any, about: dict[str, Any], checkpoint: Path, **given: Any) -> TaskT:
        """The task of a run, of which `checkpoint` is the file that options and about were read from."""

    def new_model(self) -> Model:
        """A model with initial values."""
        config, precision = self.model_config(), PRECISIONS[self.options.precision]
        model: Model = model_class(config)(config, seed=self.options.seed, activation_dtype=precision)
        return model

    def read_model(self, path: Path, file: Any) -> Model:
        """The model in an opened checkpoint."""
        config, precision = self.model_config(), PRECISIONS[self.options.precision]
        weights = weights_in(path, file, config, "model.")
        model: Model = model_class(config).of_weights(config, weights, activation_dtype=precision)
        return model

    def save_model(self, model: Model, folder: Path) -> None:
        """Write the model for use."""
        model.save_pretrained(folder)


def model_class(config: ModelConfig) -> Any:
    """What a configuration is of."""
    return MambaLM if isinstance(config, MambaConfig) else SequenceModel
