"""Continuing prompts: ``generate``, the same for every model."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from sscan.models.arguments import check_integer
from sscan.models.sampling import Sampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sscan.models.config import MambaConfig
    from sscan.models.states import States

Array: TypeAlias = Any

PLACES = 8  # rows that are decoded at once are a multiple of it, see `_places`
AHEAD = 16  # steps that a GPU may be given before anybody looks at their tokens
PIECE = 4096  # tokens of a prompt that are read at once, so that memory does not grow with its length


class Model(Protocol):
    """What generation asks of a language model; ids and logits are NumPy arrays."""

    config: MambaConfig

    def new_states(self, batch: int) -> States:
        """The states before the first token."""

    def _prefill_on_host(self, ids: Array, states: States) -> tuple[Array, States]:
        """Logits (batch, vocabulary) after ids (batch, length), and the states there."""

    def _step_on_host(self, ids: Array, states: States) -> Array:
        """Logits after one token each, ids (batch,); the states are updated in place."""

    def _decoder(self, states: States, drawn: int, sampler: Sampler) -> Any:
        """Steps of these states with draws as this sampler's on the model's device, or None: see :class:`_OnHost`."""


class GenerationMixin:
    """``generate`` of a language model that is a :class:`Model`."""

    def generate(
        self: Any,
        prompts: Any,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        *,
        eos: int | Sequence[int] | None = None,
        stop: Sequence[str] = (),
        tokenizer: Any = None,
        streamer: Callable[[int, int], object] | None = None,
        seed: int = 0,
        batch: int | None = None,
        vocab_size: int | None = None,
    ) -> list[Array]:
        """Continue prompts.

        No prompt is padded: each is read by itself, through the scan, and a prompt that equals the one before is not
        read again. Then `batch` sequences are decoded at once, one token each, at a cost that does not depend on how
        long they are; when one has ended, the next prompt takes its place. So sequences do not see each other. Their
        last bits may depend on how many rows a matrix product has, and on nothing else: above one, that number is
        rounded up to a multiple of 8, with rows that nobody reads. With ``batch=1``, or with the same `batch`, a
        sequence is the same, bit for bit, alone and among any others.

        Parameters
        ----------
        prompts : array of int, (length,) or (batch, length), or a sequence of sequences of int
            At least one token each.
        max_new_tokens : int
            Number of tokens to generate for each at most.
        temperature, top_k, top_p, min_p, repetition_penalty
            See :class:`sscan.models.Sampler`; temperature 0 takes the most likely token. Tokens of the prompt count as
            seen.
        eos : int or sequence of int, optional
            Tokens that end a sequence.
        stop : sequence of str
            Texts that end a sequence, with the token that completes one of them.
        tokenizer : optional
            Its ``decode(ids)`` is what `stop` is looked for in.
        streamer : callable, optional
            Called with the number of the prompt and the token, for each as soon as it is known.
        seed : int
            Sequence i draws from a generator of its own, of seed + i. Which, is a matter of the device: on a GPU tokens
            are drawn there, as a rule.
        batch : int, optional
            How many are decoded at once; without it all of them. 1 is fastest for one sequence.
        vocab_size : int, optional
            Tokens from this one on are never drawn; without it those that are not in the configuration's vocabulary,
            which the embedding's padding is. At most that of the embedding, its padding included.

        Returns
        -------
        list of array of int64
            The new tokens of each prompt, with the one that ended it.

        Raises
        ------
        TypeError, ValueError
            For arguments that are not as above.
        FloatingPointError
            If a logit is NaN or infinite: the model is broken.
        """
        listed = prompts_of(prompts, self.config.padded_vocab_size)
        check_integer("generate", "max_new_tokens", max_new_tokens, 0)
        check_integer("generate", "seed", seed, 0)
        drawn = self.config.vocab_size if vocab_size is None else vocab_size
        for name, value in {"batch": len(listed) or 1 if batch is None else batch, "vocab_size": drawn}.items():
            check_integer("generate", name, value)
        if drawn > (most := self.config.padded_vocab_size):
            raise ValueError(f"generate: vocab_size must be at most the model's {most}, padding included, got {drawn}")
        ending = _Ending(max_new_tokens, eos, stop, tokenizer)
        if (beyond := max(ending.tokens, default=0)) >= most:
            raise ValueError(f"generate: eos must be tokens below {most}, padding included, got {beyond}")
        rows = [
            _Row(i, prompt, Sampler(temperature, top_k, top_p, min_p, repetition_penalty, seed + i), seed + i, ending)
            for i, prompt in enumerate(listed)
        ]
        if max_new_tokens:
            ahead = AHEAD if streamer is None else 1
            for row, token in _stream(self, rows, _places(batch or len(rows)), drawn, ahead):
                if streamer is not None:
                    streamer(row.index, token)
        return [np.array(row.new, np.int64) for row in rows]


def _places(batch: int) -> int:
    """How many rows are decoded at once, so that it does not matter in which a sequence is.

    BLAS works through the rows of a product in groups of a few, and through what is left over in another way.
    """
    return batch if batch == 1 else -(-batch // PLACES) * PLACES


def prompts_of(prompts: Any, rows: int) -> list[list[int]]:
    """Prompts as lists of token ids, of an embedding with this many rows.

    Raises
    ------
    TypeError, ValueError
        If they are not one prompt or a sequence of prompts, of integers in range, at least one each.
    """
    if isinstance(prompts, str):
        raise TypeError("generate: prompts must be token ids, got a text; a tokenizer makes them of it")
    listed = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if not hasattr(listed, "__len__"):
        raise TypeError(f"generate: prompts must be token ids, or sequences of them, got {type(prompts).__name__}")
    listed = list(listed)
    if listed and not hasattr(listed[0], "__len__"):
        listed = [listed]
    checked = []
    for i, prompt in enumerate(listed):
        try:
            ids = np.asarray(prompt.tolist() if hasattr(prompt, "tolist") else prompt)
        except ValueError as error:  # NumPy's, about inhomogeneous shapes
            raise TypeError(f"generate: prompt {i} must be integers, got some that are sequences of them") from error
        if ids.ndim != 1 or not ids.size:
            raise ValueError(f"generate: prompt {i} must be one token or more in one axis, got shape {ids.shape}")
        if ids.dtype.kind not in "iu":
            raise TypeError(f"generate: prompt {i} must be integers, got {ids.dtype}")
        if ids.min() < 0 or ids.max() >= rows:
            raise ValueError(f"generate: prompt {i} must be tokens in [0, {rows}), got {ids.min()} to {ids.max()}")
        checked.append(ids.tolist())
    return checked


@dataclass(frozen=True)
class _Ending:
    """When a sequence ends."""

    max_new_tokens: int
    eos: int | Sequence[int] | None
    stop: Sequence[str]
    tokenizer: Any

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise TypeError(f"generate: stop must be a sequence of texts, got the text {self.stop!r}")
        if self.stop and self.tokenizer is None:
            raise ValueError("generate: stop is looked for in text, so it needs a tokenizer")
        if not all(self.stop):
            raise ValueError("generate: stop must not be an empty text")
        for token in self.tokens:
            check_integer("generate", "eos", token, 0)

    @property
    def tokens(self) -> Sequence[int]:
        """Those that end a sequence."""
        return () if self.eos is None else self.eos if hasattr(self.eos, "__len__") else (self.eos,)  # type: ignore[return-value]

    def is_reached(self, new: list[int]) -> bool:
        if len(new) >= self.max_new_tokens or new[-1] in self.tokens:
            return True
        if not self.stop:
            return False
        longest = max(len(text.encode()) for text in self.stop)  # a token is a byte or more
        tail = self.tokenizer.decode(new[-longest - 8 :])
        return any(text in tail for text in self.stop)


class _Row:
    """A prompt and what has been made of it."""

    def __init__(self, index: int, prompt: list[int], sampler: Sampler, seed: int, ending: _Ending) -> None:
        self.index, self.prompt, self.sampler, self.seed, self.ending = index, prompt, sampler, seed, ending
        self.new: list[int] = []

    def draw(self, logits: Array) -> int:
        seen = None if self.sampler.repetition_penalty == 1 else [self.prompt + self.new]
        return int(self.sampler(logits[None], seen)[0])

    def take(self, token: int) -> int:
        """The next token; below 0 it says that there is none."""
        if token < 0:
            raise FloatingPointError("the model's logits are NaN or infinite; its parameters are broken")
        self.new.append(token)
        return token

    @property
    def is_done(self) -> bool:
        return self.ending.is_reached(self.new)


class _OnHost:
    """Steps whose tokens are drawn on the host, as a decoder on a device draws them there."""

    def __init__(self, model: Model, states: States, drawn: int) -> None:
        self.model, self.states, self.drawn = model, states, drawn
        self.tokens, self.rows = np.zeros(states.batch, np.int64), dict[int, _Row]()

    def put(self, place: int, row: _Row) -> None:
        """A row whose last token is not read yet, and whose state is in its place."""
        self.rows[place], self.tokens[place] = row, row.new[-1]

    def steps(self, count: int) -> Iterator[Array]:
        """The next tokens (batch,) of ``count`` steps, or fewer; those of rows that are done are any."""
        logits = self.model._step_on_host(self.tokens, self.states)
        for place, row in self.rows.items():
            if not row.is_done:
                self.tokens[place] = row.draw(logits[place, : self.drawn])
        yield self.tokens


def _stream(model: Model, rows: Sequence[_Row], batch: int, drawn: int, ahead: int) -> Iterator[tuple[_Row, int]]:
    """Every row with each of its tokens, as soon as it is known."""
    waiting, places = deque(rows), dict[int, _Row]()
    read, states = _Reader(model), model.new_states(batch)
    decoder: Any = None
    while waiting or places:
        for place in range(batch):
            while place not in places and waiting:
                row = waiting.popleft()
                logits, after = read(row.prompt)
                yield row, row.take(row.draw(logits[0, :drawn]))
                if not row.is_done:
                    if decoder is None:
                        decoder = model._decoder(states, drawn, row.sampler) or _OnHost(model, states, drawn)
                    states.put([place], after)
                    decoder.put(place, row)
                    places[place] = row
        if places:
            most = max(row.ending.max_new_tokens - len(row.new) for row in places.values())
            for tokens in decoder.steps(min(ahead, most)):
                for place, row in list(places.items()):
                    yield row, row.take(int(tokens[place]))
                    if row.is_done:
                        del places[place]


class _Reader:
    """Reads prompts; one that equals the last is not read again."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.last: list[int] | None = None
        self.result: Any = None

    def __call__(self, prompt: list[int]) -> tuple[Array, States]:
        if prompt != self.last:
            states = self.model.new_states(1)
            for start in range(0, len(prompt), PIECE):
                logits, states = self.model._prefill_on_host(
                    np.array([prompt[start : start + PIECE]], np.int64), states
                )
            self.last, self.result = prompt, (logits, states)
        return self.result  # type: ignore[no-any-return]
