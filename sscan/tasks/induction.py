"""Induction Heads: a symbol that stood behind a trigger once is to be said when the trigger comes again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan.models.arguments import check_integer, check_number
from sscan.nn import no_grad
from sscan.nn.autodiff import to_numpy
from sscan.tasks.evaluation import IGNORED
from sscan.tasks.synthetic import Synthetic
from sscan.tasks.task import LayeredOptions, Recipe

if TYPE_CHECKING:
    from sscan.tasks.task import Model, ModelConfig

EXAMPLES = 64  # of each length that is measured
LONGER = 16  # times the length that is trained on: what is measured on the way, beside that length
SHORTEST = 64  # of the lengths that are measured in the end
TOKENS_AT_ONCE = 1 << 16
PAIRS_AT_ONCE = 1 << 22  # of tokens: attention keeps a score for each in every head


@dataclass(frozen=True)
class InductionOptions(LayeredOptions):
    """The paper's model and steps for Table 11 (sections 4.1 and E.1).

    Sequences of `length` tokens consist of `symbols` kinds, and of a trigger that comes twice: at a random place, with
    the symbol behind it that is asked for, and at the end. The first place is anywhere, or one of the first `front`.
    The learning rate is constant, or falls along half a cosine to `final`, with which longer sequences come out right.
    In the end lengths are measured from 64 on to `longest`, each twice the one before.
    """

    d_model: int = 64
    n_layer: int = 2
    length: int = 256
    batch: int = 8
    lr: float = 1e-3
    steps: int | None = 204_800
    minutes: float | None = None
    evaluations: int = 100
    dt_rank: int = 16
    symbols: int = 16
    front: int | None = None
    final: float | None = None
    longest: int = 1 << 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("run", "length", self.length, 3)
        check_integer("run", "dt_rank", self.dt_rank)
        check_integer("run", "symbols", self.symbols, 2)
        check_integer("run", "longest", self.longest, SHORTEST)
        if self.front is not None:
            check_integer("run", "front", self.front)
        if self.final is not None:
            check_number("run", "final", self.final)


# What two CPU cores learn in minutes, well enough for sequences many times as long.
SMALL = InductionOptions(d_model=32, length=64, batch=16, lr=5e-3, final=1e-5, steps=5000, evaluations=10)


class Induction(Synthetic):
    """The task: accuracy at the length that is trained on, and at others."""

    name = "induction"
    Options = InductionOptions

    def __init__(self, options: InductionOptions) -> None:
        super().__init__(options)
        self.options: InductionOptions = options
        self.recipe = Recipe(weight_decay=0.0, betas=(0.9, 0.999), warmup=0.0, final=options.final, clip=math.inf)

    def model_config(self) -> ModelConfig:
        """One token for each symbol, and the last for the trigger."""
        return self.options.config(self.options.symbols + 1, tie_embeddings=False, dt_rank=self.options.dt_rank)

    def batch(self, step: int) -> tuple[Any, Any]:
        """New sequences; only what follows their ends is a target."""
        options = self.options
        ids, answers = self.sequences(np.random.default_rng([options.seed, step]), options.batch, options.length)
        targets = np.full(ids.shape, IGNORED, np.int32)
        targets[:, -1] = answers
        return ids, targets

    def sequences(self, rng: np.random.Generator, count: int, length: int) -> tuple[Any, Any]:
        """Sequences (count, length), and what follows their ends."""
        options, rows = self.options, np.arange(count)
        ids = rng.integers(0, options.symbols, (count, length), np.int32)
        places = rng.integers(0, min(length - 2, options.front or length), count)
        ids[rows, places] = ids[:, -1] = options.symbols
        return ids, ids[rows, places + 1]

    def measure(self, model: Model) -> dict[str, float]:
        """Accuracies, and the largest share of mistakes."""
        lengths = (self.options.length, LONGER * self.options.length)
        found = {f"accuracy_{length}": self.accuracy(model, length) for length in lengths}
        return {self.goal: 1 - min(found.values()), **found}

    def final(self, model: Model) -> dict[str, float]:
        """Accuracies by length."""
        lengths = (SHORTEST << k for k in range((self.options.longest // SHORTEST).bit_length()))
        return {str(length): self.accuracy(model, length) for length in lengths}

    def accuracy(self, model: Model, length: int, count: int = EXAMPLES) -> float:
        """The share of right answers at a length, for sequences that are always the same.

        They are read in parts, with the states carried along, so any length fits; models without states read a few
        sequences at a time, the fewer the longer these are.
        """
        ids, answers = self.sequences(np.random.default_rng(length), count, length)
        try:
            states = model.new_states(count)
        except NotImplementedError:
            said = self._said_to_whole(model, ids)
        else:
            said = self._said_to_parts(model, ids, states)
        return float((said == answers).mean())

    def _said_to_parts(self, model: Any, ids: Any, states: Any) -> Any:
        part = max(TOKENS_AT_ONCE // len(ids), 1)
        for start in range(0, ids.shape[1], part):
            logits, states = model.prefill(ids[:, start : start + part], states)
        return to_numpy(logits).argmax(axis=-1)

    @no_grad()
    def _said_to_whole(self, model: Any, ids: Any) -> Any:
        rows = max(PAIRS_AT_ONCE // ids.shape[1] ** 2, 1)
        parts = [model(ids[start : start + rows]).data[:, -1] for start in range(0, len(ids), rows)]
        return np.concatenate([to_numpy(part).argmax(axis=-1) for part in parts])
