"""Which species is it? Windows of aligned genomes, told apart by the last token: section 4.3.3 of the paper."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan.models.config import MambaConfig
from sscan.models.files import content_of, write_atomically
from sscan.nn import MambaLM
from sscan.nn.autodiff import to_numpy
from sscan.tasks.evaluation import IGNORED
from sscan.tasks.sequences import BASES, is_base, read_maf
from sscan.tasks.task import Recipe, RunOptions, Task, check_origin

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from sscan.tasks.sequences import AlignedRow, Tokens
    from sscan.tasks.task import Model

    Block = dict[str, AlignedRow]
    Features = npt.NDArray[np.float64]

HELD_OUT = 0.2  # the share of the blocks, the last in order of position, that no model is trained on
EXAMPLES = 64  # held-out windows of each species that are measured on the way
FINAL_EXAMPLES = 256  # and at the end
REGRESSED = 1000  # windows of each species that the regressions are fitted to
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # of which theirs is the one that does best on what is held out
ITERATIONS = 300
NAMES_FILE = "species.json"


@dataclass(frozen=True)
class SpeciesOptions(RunOptions):
    """The paper's recipe for telling the great apes apart (section E.3.4): ten epochs of 1024 steps.

    `species` are the ones to tell apart, as they are called in the alignment; without them, all that are in it.
    """

    d_model: int = 128
    n_layer: int = 12
    length: int = 1024
    batch: int = 64
    lr: float = 1e-4
    steps: int | None = 10 * 1024
    minutes: float | None = None
    species: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        names: Any = self.species
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"run: species must be names, got {names!r}")
        object.__setattr__(self, "species", tuple(names))


class Species(Task):
    """Windows of which the species is to be told: the head reads the last token, and has a row for each species.

    The bases of each species are those of the aligned blocks behind each other, in the order of the blocks in the first
    row's genome. The last fifth of them is held out: no locus is on both sides.

    Parameters
    ----------
    options : SpeciesOptions
    maf : sequence of Path
        Alignments.
    pretrained : Path, optional
        A model of `sscan train dna` to begin with.

    Raises
    ------
    OSError, ValueError
        As :func:`sscan.tasks.sequences.read_maf`; also if there are no two species, or too few bases for a window, or
        the model is another.
    """

    name = "species"
    unit = "bits"
    goal = "error"
    goal_is = "share of mistakes"
    tokens_are = "bases"
    Options = SpeciesOptions
    recipe = Recipe(weight_decay=0.1, betas=(0.9, 0.95), warmup=0.5, final=1e-6, clip=1.0)

    def __init__(self, options: SpeciesOptions, maf: Sequence[Path], pretrained: Path | None = None) -> None:
        super().__init__(options)
        self.options: SpeciesOptions = options
        self.maf, self.pretrained = list(maf), pretrained
        blocks = [block for path in self.maf for block in read_maf(path)]
        self.species = list(options.species) or sorted({row.species for block in blocks for row in block})
        if not 2 <= len(self.species) <= BASES.size:
            raise ValueError(f"{self.maf[0]}: 2 to {BASES.size} species can be told apart, got {len(self.species)}")
        training, held_out = split_blocks(blocks, self.species)
        self.blocks = len(training), len(held_out)
        self.training, self.held_out = (
            [np.concatenate([np.zeros(0, np.uint8), *(block[name].tokens for block in part)]) for name in self.species]
            for part in (training, held_out)
        )
        shortest = min(tokens.size for tokens in (*self.training, *self.held_out))
        if shortest < options.length:
            raise ValueError(
                f"{self.maf[0]}: blocks with one row of each of {', '.join(self.species)} have {shortest} bases, "
                f"too few for windows of {options.length}"
            )
        digest = hashlib.sha256()
        for tokens in (*self.training, *self.held_out):
            digest.update(tokens.data)
        self._sha256 = digest.hexdigest()

    def model_config(self) -> MambaConfig:
        """That of `sscan train dna`, but for a head of its own."""
        options = self.options
        return MambaConfig(
            options.d_model, options.n_layer, BASES.size, pad_vocab_size_multiple=8, tie_embeddings=False
        )

    def new_model(self) -> Model:
        """The pretrained model, or one with initial values; the head has initial values."""
        model = super().new_model()
        if self.pretrained is None:
            return model
        pretrained = MambaLM.from_pretrained(self.pretrained)
        expected = dataclasses.replace(model.config, tie_embeddings=pretrained.config.tie_embeddings)
        if pretrained.config != expected:
            raise ValueError(f"{self.pretrained}: expected a model of {expected}, got {pretrained.config}")
        model.load_state_dict({**pretrained.state_dict(), "lm_head.weight": model.lm_head.weight.data})
        return model

    def batch(self, step: int) -> tuple[Any, Any]:
        """Windows from anywhere in the training blocks of species drawn by chance; the last target is the species."""
        options = self.options
        rng = np.random.default_rng([options.seed, step])
        kinds = rng.integers(0, len(self.species), options.batch)
        windows = [_drawn(self.training[kind], options.length, rng) for kind in kinds]
        targets = np.full((options.batch, options.length), IGNORED, np.int32)
        targets[:, -1] = kinds
        return np.stack(windows).astype(np.int32), targets

    def in_unit(self, nats: float) -> float:
        """Bits of a species."""
        return nats / math.log(2)

    def measure(self, model: Model) -> dict[str, float]:
        """The share of mistakes in some held-out windows, spread evenly and always the same."""
        return {self.goal: self._error(model, EXAMPLES)}

    def final(self, model: Model) -> dict[str, float]:
        """The share of mistakes in more of them."""
        return {self.goal: self._error(model, FINAL_EXAMPLES)}

    def compared(self, model: Model, progress: Callable[[float], object] = lambda share: None) -> dict[str, float]:
        """Shares of mistakes in the same windows: of the model, of regressions on counts, and by chance."""
        found = {"Mamba": self._error(model, FINAL_EXAMPLES)}
        for name, features in (("6-mers", six_mers), ("GC content", gc_content)):
            found[name] = self.regression_error(features)
        return {**found, "chance": 1 - 1 / len(self.species)}

    def _error(self, model: Model, examples: int) -> float:
        windows, kinds = self._held_out_windows(examples)
        told = []
        for start in range(0, kinds.size, self.options.batch):
            part = windows[start : start + self.options.batch].astype(np.int32)
            logits, _ = model.prefill(part, model.new_states(len(part)))
            told.append(to_numpy(logits)[:, : len(self.species)].argmax(axis=1))
        return float((np.concatenate(told) != kinds).mean())

    def _held_out_windows(self, examples: int) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """So many windows of each species, or as many as do not overlap; and which species each is of."""
        length, windows, kinds = self.options.length, [], []
        for kind, tokens in enumerate(self.held_out):
            count = min(examples, tokens.size // length)
            for place in np.linspace(0, tokens.size - length, count).astype(int):
                windows.append(tokens[place : place + length])
                kinds.append(kind)
        return np.stack(windows), np.array(kinds)

    def regression_error(self, features: Callable[[Tokens], Features]) -> float:
        """The share of mistakes of a logistic regression on features of training windows."""
        rng = np.random.default_rng(self.options.seed)
        kinds = np.repeat(np.arange(len(self.species)), REGRESSED)
        seen = features(np.stack([_drawn(self.training[kind], self.options.length, rng) for kind in kinds]))
        windows, wanted = self._held_out_windows(FINAL_EXAMPLES)
        asked = features(windows)
        mean, deviation = seen.mean(axis=0), np.maximum(seen.std(axis=0), 1e-12)
        seen, asked = (seen - mean) / deviation, (asked - mean) / deviation
        errors = []
        for penalty in PENALTIES:
            weights, bias = logistic_regression(seen, kinds, penalty)
            errors.append(float(((asked @ weights + bias).argmax(axis=1) != wanted).mean()))
        return min(errors)

    def save_model(self, model: Model, folder: Path) -> None:
        """Write the model, and which species the rows of its head are."""
        super().save_model(model, folder)
        text = json.dumps(self.species) + "\n"
        write_atomically(folder / NAMES_FILE, lambda new: new.write_text(text, encoding="utf-8"))

    def described(self) -> dict[str, str]:
        """The species, and what is held out."""
        bases = sum(tokens.size for tokens in (*self.training, *self.held_out))
        return {
            "species": f"{', '.join(self.species)}: {bases:,} bases",
            "blocks": f"{self.blocks[0]:,} to train on, {self.blocks[1]:,} at other places held out",
        }

    @property
    def files(self) -> Sequence[Path]:
        """What the data were read from."""
        return self.maf

    def about(self) -> dict[str, Any]:
        """Where the files are, and a digest of what is in them."""
        return asdict(_Origin([str(path.resolve()) for path in self.maf], self._sha256))

    @classmethod
    def again(  # type: ignore[override]  # of what may be given, each task has its own
        cls, options: SpeciesOptions, about: dict[str, Any], checkpoint: Path, *, maf: Sequence[Path] | None = None
    ) -> Species:
        """The task of a run; files may lie elsewhere now, but must hold the same.

        Raises
        ------
        OSError, ValueError
            If they cannot be read, or are others.
        """
        with content_of(checkpoint):
            origin = _Origin(**about)
        task = cls(options, [Path(path) for path in maf or origin.maf])
        if task._sha256 != origin.sha256:
            raise ValueError(f"{checkpoint.parent} was trained on another alignment than {task.maf[0]}")
        return task


@dataclass(frozen=True)
class _Origin:
    """What a run keeps of its data."""

    maf: list[str]
    sha256: str

    def __post_init__(self) -> None:
        check_origin("maf", self.maf, self.sha256)


def split_blocks(blocks: Sequence[Sequence[AlignedRow]], species: Sequence[str]) -> tuple[list[Block], list[Block]]:
    """Blocks to train on, and blocks that are held out, by their places in the genome of the first block's first row.

    None to train on overlaps there with one that is held out. Blocks without exactly one row of each species, and of
    that genome, are left out.
    """
    genome = next(block[0].species for block in blocks if block)
    names = {*species, genome}
    whole: list[Block] = []
    for block in blocks:
        rows = [row for row in block if row.species in names]
        if len(rows) == len(names) == len({row.species for row in rows}):
            whole.append({row.species: row for row in rows})
    whole.sort(key=lambda block: (block[genome].record, block[genome].start))
    border = len(whole) - int(len(whole) * HELD_OUT)
    held_out = whole[border:]
    if not held_out:
        return whole, []
    first = held_out[0][genome]
    training = [
        block for block in whole[:border] if block[genome].record != first.record or block[genome].end <= first.start
    ]
    return training, held_out


def _drawn(tokens: Tokens, length: int, rng: np.random.Generator) -> Tokens:
    """A window from anywhere."""
    start = int(rng.integers(0, tokens.size - length + 1))
    return tokens[start : start + length]


# Regressions on counts


def gc_content(windows: Tokens) -> Features:
    """The share of G and C among the bases of windows (count, length): (count, 1)."""
    strong = ((windows == BASES.G) | (windows == BASES.C)).sum(axis=1)
    return np.asarray(strong / np.maximum(is_base(windows).sum(axis=1), 1))[:, None]


def six_mers(windows: Tokens) -> Features:
    """How often each word of six bases stands in windows (count, length): (count, 4096)."""
    found = np.zeros((len(windows), 4**6))
    for row, window in zip(found, windows, strict=True):
        words = np.lib.stride_tricks.sliding_window_view(window, 6)
        codes = (words[is_base(words).all(axis=1)] - np.uint8(BASES.A)).astype(np.int64) @ 4 ** np.arange(6)
        row += np.bincount(codes, minlength=4**6)
    return found


def logistic_regression(x: Features, kinds: npt.NDArray[np.int64], penalty: float) -> tuple[Features, Features]:
    """Weights (features, classes) and biases that make the kinds of x likely: p = softmax(x W + b).

    What is minimised is the mean of -log p, and penalty / 2 times the squares of the weights.
    """
    from scipy.optimize import minimize  # longer than all else that a command imports
    from scipy.special import logsumexp

    classes = int(kinds.max()) + 1
    wanted = np.eye(classes)[kinds]

    def loss(flat: Features) -> tuple[float, Features]:
        weights, bias = flat[classes:].reshape(-1, classes), flat[:classes]
        scores = x @ weights + bias
        log_p = scores - logsumexp(scores, axis=1, keepdims=True)
        errors = (np.exp(log_p) - wanted) / len(x)
        value = -(log_p * wanted).sum() / len(x) + penalty / 2 * (weights**2).sum()
        return float(value), np.concatenate([errors.sum(axis=0), (x.T @ errors + penalty * weights).ravel()])

    start = np.zeros((x.shape[1] + 1) * classes)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS}).x
    return found[classes:].reshape(-1, classes), found[:classes]
