"""DNA to be continued, base by base: the paper's pretraining of section 4.3, on the records of FASTA files."""

from __future__ import annotations

import hashlib
import lzma
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan.models.arguments import check_flag, check_number
from sscan.models.config import MambaConfig
from sscan.models.files import content_of
from sscan.nn import MambaLM, SequenceConfig, no_grad
from sscan.tasks.backoff import BackoffModel
from sscan.tasks.evaluation import IGNORED
from sscan.tasks.scoring import nats_of_bases
from sscan.tasks.sequences import BASES, is_base, read_fasta, reverse_complement
from sscan.tasks.task import LANGUAGE_MODELS, LayeredOptions, Task, check_origin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from sscan.tasks.sequences import Record, Tokens
    from sscan.tasks.task import Model, ModelConfig

Regions = list[tuple[int, int]]

SEGMENT = 1 << 17  # what the paper's data is cut into first
FIRST_LENGTH = 1 << 10  # of the warmup
HELD_OUT = 0.1  # the share of every record, at its end, that no model is trained on
MEASURED_BATCHES = 16  # of held-out windows
HIGHEST_ORDER = 12  # of Markov models
# Blocks of a Transformer, each with about as many parameters as two of Mamba.
TRANSFORMER = ({"layer": "attention", "heads": 2, "positions": "rotary"}, {"layer": "glu", "expand": 10 / 3})


@dataclass(frozen=True)
class DNAOptions(LayeredOptions):
    """The paper's model and recipe for contexts of any length (sections 4.3 and E.3), with fewer tokens a step.

    A step has `batch` windows of `length` tokens. Before, in a `length_warmup` of so many epochs each, it has more and
    shorter windows: of 1024 tokens, then of twice as many, and so on. With `reverse_complement` every other window, by
    chance, is read from the other strand. Records that are named in `held_out` are not trained on; if none is, that is
    the last tenth of each.
    """

    d_model: int = 128
    n_layer: int = 12
    length: int = 1024
    batch: int = 8
    lr: float = 8e-3
    length_warmup: float = 2.0
    reverse_complement: bool = True
    held_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("run", "length_warmup", self.length_warmup)
        check_flag("run", "reverse_complement", self.reverse_complement)
        names: Any = self.held_out
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"run: held_out must be names of records, got {names!r}")
        object.__setattr__(self, "held_out", tuple(names))


class DNA(Task):
    """A language model of DNA.

    Parameters
    ----------
    options : DNAOptions
    fasta : sequence of Path
        FASTA files.

    Attributes
    ----------
    data : array of uint8
        The tokens of all records, one behind the other.
    training, held_out : list of (int, int)
        The regions of it that are trained on, and those that are not.
    stages : list of (int, int)
        Lengths of windows, and after how many steps each begins.

    Raises
    ------
    OSError, ValueError
        As :func:`sscan.tasks.sequences.read_fasta`; also if a region is too short for a window, or a record that is to
        be held out is not there.
    """

    name = "dna"
    unit = "bits/base"
    goal = "bits_per_base"
    goal_is = "bits per base"
    tokens_are = "bases"
    layers_are = "blocks of attention and GLU"
    Options = DNAOptions
    recipe = LANGUAGE_MODELS
    vocabulary = BASES

    def __init__(self, options: DNAOptions, fasta: Sequence[Path]) -> None:
        super().__init__(options)
        self.options: DNAOptions = options
        self.fasta = list(fasta)
        records = [record for path in self.fasta for record in read_fasta(path)]
        self.data = np.concatenate([record.tokens for record in records])
        self.records = len(records)
        self._sha256 = hashlib.sha256(self.data.data).hexdigest()
        self.training, self.held_out = _split(records, options.held_out)
        for regions, kind in ((self.training, "trained on"), (self.held_out, "held out")):
            if not self._pieces(regions, options.length).size:
                raise ValueError(f"{self._files}: what is {kind} is too short for windows of {options.length} bases")
        self.stages = list(self._new_stages())
        if options.steps is not None and options.steps <= self.stages[-1][1]:
            raise ValueError(
                f"run: steps must be more than the {self.stages[-1][1]} of the warmup to length {options.length}, "
                f"got {options.steps}"
            )
        self._epoch: tuple[tuple[int, int], Any] | None = None

    @property
    def _files(self) -> str:
        more = f" and {len(self.fasta) - 1} more" if len(self.fasta) > 1 else ""
        return f"{self.fasta[0]}{more}"

    def model_config(self) -> ModelConfig:
        """The twelve tokens of HyenaDNA's tokenizer, padded to sixteen."""
        options = self.options
        if options.layers is None:
            return MambaConfig(options.d_model, options.n_layer, BASES.size, pad_vocab_size_multiple=8)
        return SequenceConfig(
            options.d_model, BASES.size, options.layers * options.n_layer, positions=options.positions,
            pad_vocab_size_multiple=8,
        )  # fmt: skip

    # Windows

    def batch(self, step: int) -> tuple[Any, Any]:
        """Windows of the training regions: each of an epoch's once, in a random order."""
        stage = sum(begin <= step for _, begin in self.stages) - 1
        length, begin = self.stages[stage]
        rows = self._rows(length)
        first = (step - begin) * rows
        places = np.array([self._place(stage, length, number) for number in range(first, first + rows)])
        rng = np.random.default_rng([self.options.seed, 1, step])
        turned = rng.random(rows) < 0.5 if self.options.reverse_complement else np.zeros(rows, bool)
        return _cut(self.data, places, length, turned)

    def _rows(self, length: int) -> int:
        """How many windows of a length a step has, so that it has the same number of tokens."""
        return max(self.options.batch * self.options.length // length, 1)

    def _place(self, stage: int, length: int, number: int) -> int:
        """Where a window begins, by its number in a stage."""
        if self._epoch is None or self._epoch[0][0] != stage:
            self._training_pieces = self._pieces(self.training, length)
        epoch, index = divmod(number, self._training_pieces.size)
        if self._epoch is None or self._epoch[0] != (stage, epoch):
            rng = np.random.default_rng([self.options.seed, 0, stage, epoch])
            self._epoch = (stage, epoch), rng.permutation(self._training_pieces)
        return int(self._epoch[1][index])

    def _new_stages(self) -> Iterator[tuple[int, int]]:
        length, begin = FIRST_LENGTH, 0
        while length < self.options.length and self.options.length_warmup:
            yield length, begin
            pieces = self._pieces(self.training, length).size
            begin += math.ceil(self.options.length_warmup * pieces / self._rows(length))
            length *= 2
        yield self.options.length, begin

    def _pieces(self, regions: Regions, length: int) -> npt.NDArray[np.int64]:
        """Where the windows of an epoch begin: the paper's, without those of which half are no bases.

        Regions are cut into segments of 2^17, and these into windows that do not overlap. Longer windows are two for
        each segment: one that begins with it and one that ends with it, moved into the region if need be.
        """
        found = []
        for start, end in regions:
            if length <= SEGMENT:
                found.append(np.arange(start, end - length, length))
            elif end - start > length:
                segments = np.arange(start, end - SEGMENT, SEGMENT)
                ends = np.clip(segments + SEGMENT - length, start, end - length - 1)
                found.append(np.unique([np.minimum(segments, end - length - 1), ends]))
        places = np.concatenate([np.zeros(0, np.int64), *found])
        known = [2 * is_base(self.data[place : place + length + 1]).sum() > length for place in places]
        return np.asarray(places[np.array(known, bool)])

    # Results

    def in_unit(self, nats: float) -> float:
        """Bits."""
        return nats / math.log(2)

    def measure(self, model: Model) -> dict[str, float]:
        """Bits per base and perplexity of windows that are spread evenly over the held-out regions."""
        return self._results(*self._nats_of_windows(model, MEASURED_BATCHES * self.options.batch))

    def final(self, model: Model) -> dict[str, float]:
        """Those of all held-out windows."""
        return self._results(*self._nats_of_windows(model))

    def _results(self, nats: float, bases: int) -> dict[str, float]:
        return {self.goal: self.in_unit(nats / bases), "perplexity": math.exp(min(nats / bases, 700.0))}

    def _nats_of_windows(
        self, model: Model, most: int | None = None, progress: Callable[[float], object] = lambda share: None
    ) -> tuple[float, int]:
        """The sum of -log p over the bases of held-out windows, so many at most, and how many they are."""
        options = self.options
        places = self._pieces(self.held_out, options.length)
        places = places if most is None else places[:: -(-places.size // most)]
        nats, bases = 0.0, 0
        for i in range(0, places.size, options.batch):
            some = places[i : i + options.batch]
            inputs, targets = _cut(self.data, some, options.length, np.zeros(some.size, bool))
            counted = int((targets != IGNORED).sum())
            with no_grad():
                nats, bases = nats + model.loss(inputs, targets).item() * counted, bases + counted
            progress((i + some.size) / places.size)
        return nats, bases

    def compared(self, model: Model, progress: Callable[[float], object] = lambda share: None) -> dict[str, float]:
        """Bits per base of what is held out, by the model and by counting and compressing."""
        return {**self.held_out_bits(model, progress), **self.baselines()}

    def held_out_bits(self, model: Model, progress: Callable[[float], object] = lambda share: None) -> dict[str, float]:
        """Bits per base of what is held out: in windows as in training, and of each region as a whole.

        The latter are there if the model has states.
        """
        name = "Mamba" if isinstance(model, MambaLM) else "model"
        nats, bases = self._nats_of_windows(model, progress=lambda share: progress(share / 2))
        found = {f"{name}, windows of {self.options.length}": self.in_unit(nats / bases)}
        if isinstance(model, MambaLM):
            nats, bases, done = 0.0, 0, 0
            letters = sum(end - start for start, end in self.held_out)
            for start, end in self.held_out:
                for part_nats, part_bases, read in nats_of_bases(model, self.data[start:end]):
                    nats, bases = nats + part_nats, bases + part_bases
                    progress((1 + (done + read) / letters) / 2)
                done += end - start
            found[f"{name}, states carried along"] = self.in_unit(nats / bases)
        return found

    def baselines(self) -> dict[str, float]:
        """Bits per base of what is held out, of the Markov model whose order does best there, and of xz."""
        seen, held_out = (_bases(self.data, regions) for regions in (self.training, self.held_out))
        order, bits = best_markov(seen, held_out, both_strands=self.options.reverse_complement)
        compressed = lzma.compress(held_out.tobytes(), preset=9 | lzma.PRESET_EXTREME)
        return {f"Markov of order {order}": bits, "xz": 8 * len(compressed) / held_out.size}

    def described(self) -> dict[str, str]:
        """What is trained on and held out, and how the lengths of windows rise."""
        seen, held_out = (sum(end - start for start, end in regions) for regions in (self.training, self.held_out))
        lines = {
            "DNA": f"{self._files}: {self.data.size:,} letters in {self.records:,} records, {held_out:,} held out",
            "epoch": f"{self._pieces(self.training, self.options.length).size:,} windows of {seen:,} letters",
        }
        if len(self.stages) > 1:
            lines["lengths"] = ", ".join(f"{length} from step {begin:,}" for length, begin in self.stages)
        return lines

    def prompt(self) -> Tokens:
        """The beginning of what is held out."""
        start, end = self.held_out[0]
        return self.data[start : min(start + 64, end)]

    # Going on

    @property
    def files(self) -> Sequence[Path]:
        """What the data were read from."""
        return self.fasta

    def about(self) -> dict[str, Any]:
        """Where the files are, and a digest of what is in them."""
        return asdict(_Origin([str(path.resolve()) for path in self.fasta], self._sha256))

    @classmethod
    def again(  # type: ignore[override]  # of what may be given, each task has its own
        cls, options: DNAOptions, about: dict[str, Any], checkpoint: Path, *, fasta: Sequence[Path] | None = None
    ) -> DNA:
        """The task of a run; files may lie elsewhere now, but must hold the same.

        Raises
        ------
        OSError, ValueError
            If they cannot be read, or are others.
        """
        with content_of(checkpoint):
            origin = _Origin(**about)
        task = cls(options, [Path(path) for path in fasta or origin.fasta])
        if task._sha256 != origin.sha256:
            raise ValueError(f"{checkpoint.parent} was trained on other DNA than {task._files}")
        return task


@dataclass(frozen=True)
class _Origin:
    """What a run keeps of its data."""

    fasta: list[str]
    sha256: str

    def __post_init__(self) -> None:
        check_origin("fasta", self.fasta, self.sha256)


def _split(records: Sequence[Record], held_out: Sequence[str]) -> tuple[Regions, Regions]:
    """The regions that are trained on, and those that are held out, of the records behind each other."""
    for name in held_out:
        if name not in [record.name for record in records]:
            raise ValueError(f"run: held_out must be names of records, got {name!r}")
    training, held = [], []
    start = 0
    for record in records:
        end = start + record.tokens.size
        border = end - int(record.tokens.size * HELD_OUT)
        if held_out:
            border = start if record.name in held_out else end
        training.append((start, border))
        held.append((border, end))
        start = end
    return [(a, b) for a, b in training if a < b], [(a, b) for a, b in held if a < b]


def _cut(
    data: Tokens, places: npt.NDArray[np.int64], length: int, turned: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Inputs and targets of the windows that begin there, some from the other strand; targets are bases."""
    windows = np.stack([data[place : place + length + 1] for place in places])
    windows[turned] = reverse_complement(windows[turned])
    ids = windows.astype(np.int32)
    return ids[:, :-1], np.where(is_base(ids[:, 1:]), ids[:, 1:], np.int32(IGNORED))


# Baselines


def _bases(data: Tokens, regions: Regions) -> Tokens:
    """The bases of regions as numbers from 0 to 3, without what is none."""
    parts = [data[start:end] for start, end in regions]
    return np.concatenate([part[is_base(part)] - np.uint8(BASES.A) for part in parts])


def best_markov(seen: Tokens, held_out: Tokens, *, both_strands: bool) -> tuple[int, float]:
    """The order of the Markov model that predicts held-out bases best, and its bits per base.

    The model backs off (:class:`sscan.tasks.backoff.BackoffModel`). It has seen both strands if the other one has, too.
    """
    if both_strands:
        seen = np.concatenate([seen, 3 - seen[::-1]])
    highest = min(HIGHEST_ORDER, seen.size - 1)
    model = BackoffModel(seen, highest, bits=2)
    joined = np.concatenate([seen[seen.size - highest :], held_out])
    found = [model.bits_per_byte(joined, highest, order) for order in range(highest + 1)]
    order = int(np.argmin(found))
    return order, found[order]
