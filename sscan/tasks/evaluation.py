"""How well a model predicts a text: nats a token, perplexity, bits a byte."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan.nn import linear_cross_entropy, no_grad

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sscan.nn import MambaLM, SequenceModel

PIECE = 1024  # tokens of a text that are read at once
AT_ONCE = 4096  # tokens of windows that are
IGNORED = -100


@dataclass(frozen=True)
class Evaluation:
    """The sum of -log p over the tokens that count.

    Attributes
    ----------
    nats : float
    tokens : int
        How many they are.
    bytes : int
        How many bytes they stand for.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def nats_a_token(self) -> float:
        """Mean of -log p."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """The number of equally likely tokens that would be as hard to guess."""
        return math.exp(min(self.nats_a_token, 700.0))

    @property
    def bits_a_byte(self) -> float:
        """What an ideal coder would need for the text with this model, for each byte."""
        return self.nats / math.log(2) / self.bytes


def evaluate(
    model: MambaLM | SequenceModel,
    ids: Any,
    sizes: Any,
    window: int | None = None,
    stride: int | None = None,
    progress: Callable[[float], object] = lambda share: None,
    piece: int = PIECE,
) -> Evaluation:
    """Evaluate a model on a text.

    Parameters
    ----------
    model : MambaLM or SequenceModel
        One whose layers have states.
    ids : array of int (tokens,)
        The text.
    sizes : array of int (tokens,)
        Number of bytes of each token.
    window, stride : int, optional
        Without them every token but the first is predicted from all tokens before it: the state is carried along. With
        a window the text is cut into windows of that many tokens, each read from an empty state, and only what comes
        after their middle counts, so that nothing is predicted from too little; the rest that fills no window is left
        out. This is what llama.cpp prints. With a stride, windows begin every `stride` tokens, and in each the last
        `stride` count; in the first one all but the first token. Where windows do not overlap, the first token of
        each is predicted from nothing, and does not count.
    progress : callable
        Called with the share that is done.
    piece : int
        How many tokens of a text, or of a window, are read at once.

    Raises
    ------
    ValueError
        If the text or a window is too short, or the stride longer than the window.
    """
    if stride is not None and (window is None or stride > window):
        given = "no window" if window is None else f"a window of {window}"
        raise ValueError(f"stride needs a window of as many tokens at least, got a stride of {stride} and {given}")
    least = 3 if stride is None else 2  # which predict something
    if window is not None and window < least:
        raise ValueError(f"window must be at least {least} tokens, got {window}")
    spans = list(_spans(len(ids), window, stride))
    if not any(end > counts for _, counts, end in spans):
        needed = window if window is not None and stride is None else 2  # else the last window may be shorter
        raise ValueError(f"the text is too short: it has {len(ids)} tokens, and needs {needed}")
    nats, tokens, size = 0.0, 0, 0
    for group in _groups(spans):
        inputs = np.stack([ids[start : end - 1] for start, _, end in group])
        counted = np.stack([np.arange(start + 1, end) >= counts for start, counts, end in group])
        targets = np.where(counted, np.stack([ids[start + 1 : end] for start, _, end in group]), IGNORED)
        for piece_nats, done in _nats(model, inputs, targets, piece):
            nats += piece_nats
            progress((group[-1][0] + done) / len(ids))
        for _, counts, end in group:
            tokens, size = tokens + end - counts, size + int(sizes[counts:end].sum())
    return Evaluation(nats, tokens, size)


def _spans(length: int, window: int | None, stride: int | None) -> Iterator[tuple[int, int, int]]:
    """Where what is read begins, where it begins to count as predicted, and where it ends."""
    if window is None:
        yield 0, 1, length
    elif stride is None:
        for start in range(0, length - window + 1, window):
            yield start, start + window // 2 + 1, start + window
    else:
        counted = 1
        for start in range(0, length, stride):
            end = min(start + window, length)
            counted = max(counted, start + 1)
            if end > counted:
                yield start, counted, end
            counted = end


def _groups(spans: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Neighbours of one length, as many as are read at once."""
    for length, found in itertools.groupby(spans, lambda span: span[2] - span[0]):
        alike, most = list(found), max(1, AT_ONCE // length)
        yield from (alike[i : i + most] for i in range(0, len(alike), most))


def _nats(model: MambaLM | SequenceModel, ids: Any, targets: Any, size: int) -> Iterator[tuple[float, int]]:
    """The sum over the targets of some rows that count, piece by piece, and how much of a row is read by then."""
    states = model.new_states(len(ids))
    for at in range(0, ids.shape[1], size):
        piece, wanted = ids[:, at : at + size], targets[:, at : at + size]
        with no_grad():
            hidden, states = model.backbone.extend(piece, states)
            mean = linear_cross_entropy(hidden, model.lm_head.weight, wanted).item()
        yield mean * int((wanted != IGNORED).sum()), at + piece.shape[1]
