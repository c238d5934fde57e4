"""Selective Copying: symbols that stand anywhere among noise are to be said in their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan.models.arguments import check_integer
from sscan.nn import no_grad
from sscan.nn.autodiff import to_numpy
from sscan.tasks.evaluation import IGNORED
from sscan.tasks.synthetic import Synthetic
from sscan.tasks.task import LayeredOptions, Recipe

if TYPE_CHECKING:
    from sscan.tasks.task import Model, ModelConfig

NOISE = 0
EXAMPLES, FINAL_EXAMPLES = 128, 1024  # sequences that are measured on the way, and in the end
LENGTHS_ARE = ("noise", "total")


@dataclass(frozen=True)
class SelectiveCopyingOptions(LayeredOptions):
    """The paper's model and data for Table 1 (sections 4.1 and E.1), with a rate that it takes fewer steps with.

    A sequence is noise, 0, with `tokens` symbols, 1 to `symbols`, at places in it of which every choice is equally
    likely; then as many markers, where the symbols are to be said in their order. The paper's generator was not
    published. What is closest to it, the Copying data of the S4 repository, counts as `length` only the noise
    (`length_is` "noise"), and has 14 symbols, which make 16 tokens with noise and marker; with "total" the length is
    that of the whole sequence, markers included.

    The paper trains for 400,000 steps at a constant rate of 1e-4. Here the rate rises for a tenth of the run and falls
    along half a cosine, and gradients are clipped to a norm of 1.
    """

    d_model: int = 64
    n_layer: int = 2
    length: int = 4096
    batch: int = 64
    lr: float = 1e-3
    steps: int | None = 40_000
    minutes: float | None = None
    evaluations: int = 100
    tokens: int = 16
    symbols: int = 14
    length_is: str = "noise"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("run", "tokens", self.tokens)
        check_integer("run", "symbols", self.symbols, 2)
        if self.length_is not in LENGTHS_ARE:
            raise ValueError(f"run: length_is must be one of {', '.join(LENGTHS_ARE)}, got {self.length_is!r}")
        if self.length_is == "total" and self.length < 2 * self.tokens:
            raise ValueError(f"run: length must be at least 2 tokens = {2 * self.tokens}, got {self.length}")

    @property
    def memorised(self) -> int:
        """How many tokens come before the markers."""
        return self.length - self.tokens if self.length_is == "total" else self.length + self.tokens


# What two CPU cores learn in some minutes: fewer symbols in shorter sequences.
SMALL = SelectiveCopyingOptions(
    d_model=32, length=256, batch=32, lr=5e-3, steps=3000, evaluations=30, tokens=4, symbols=6
)


class SelectiveCopying(Synthetic):
    """The task: the share of right symbols."""

    name = "selective-copying"
    recipe = Recipe(weight_decay=0.0, betas=(0.9, 0.999), warmup=0.1, final=1e-5, clip=1.0)
    Options = SelectiveCopyingOptions

    def __init__(self, options: SelectiveCopyingOptions) -> None:
        super().__init__(options)
        self.options: SelectiveCopyingOptions = options

    def model_config(self) -> ModelConfig:
        """One token for noise, one for each symbol, and the last for the marker."""
        return self.options.config(self.options.symbols + 2, tie_embeddings=False)

    def batch(self, step: int) -> tuple[Any, Any]:
        """New sequences; only what is said at the markers is a target."""
        options = self.options
        ids, symbols = self.sequences(np.random.default_rng([options.seed, step]), options.batch)
        targets = np.full(ids.shape, IGNORED, np.int32)
        targets[:, options.memorised :] = symbols
        return ids, targets

    def sequences(self, rng: np.random.Generator, count: int) -> tuple[Any, Any]:
        """Sequences (count, memorised + tokens), and the symbols in them (count, tokens)."""
        options = self.options
        symbols = rng.integers(1, options.symbols + 1, (count, options.tokens), np.int32)
        ids = np.full((count, options.memorised + options.tokens), NOISE, np.int32)
        np.put_along_axis(ids, distinct_places(rng, count, options.tokens, options.memorised), symbols, axis=1)
        ids[:, options.memorised :] = options.symbols + 1
        return ids, symbols

    def measure(self, model: Model) -> dict[str, float]:
        """The share of right symbols, and that of mistakes."""
        accuracy = self.accuracy(model)
        return {self.goal: 1 - accuracy, "accuracy": accuracy}

    def final(self, model: Model) -> dict[str, float]:
        """The share of right symbols, of more of them."""
        return {"accuracy": self.accuracy(model, FINAL_EXAMPLES)}

    def accuracy(self, model: Model, count: int = EXAMPLES) -> float:
        """The share of right symbols in sequences that are always the same, whatever the run's seed."""
        options = self.options
        ids, symbols = self.sequences(np.random.default_rng(options.length), count)
        right = 0
        for start in range(0, count, options.batch):
            with no_grad():
                logits = model(ids[start : start + options.batch])[:, options.memorised :].data
            right += int((to_numpy(logits).argmax(axis=-1) == symbols[start : start + options.batch]).sum())
        return right / int(symbols.size)


def distinct_places(rng: np.random.Generator, rows: int, count: int, below: int) -> Any:
    """`count` different numbers below `below` for each row, ascending; every set of them is equally likely.

    The way of Floyd: the i-th is drawn among one more number than the one before it, and if it has been drawn already
    the number that is new takes its place.
    """
    places = np.full((rows, count), -1)
    for i, new in enumerate(range(below - count, below)):
        drawn = rng.integers(0, new + 1, rows)
        places[:, i] = np.where((places == drawn[:, None]).any(axis=1), new, drawn)
    return np.sort(places, axis=1)
