"""What a model of DNA says of sequences: how likely each base is, and what a variant does to that."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan.nn import no_grad
from sscan.nn.autodiff import to_numpy
from sscan.tasks.sequences import BASES, is_base, reverse_complement

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from sscan.tasks.sequences import Record, Tokens
    from sscan.tasks.task import Model

PIECE = 1 << 14  # tokens that are read at once


def log_likelihoods(model: Model, tokens: Tokens) -> Iterator[npt.NDArray[np.float64]]:
    """log p of each token but the first, in nats, given all tokens before it: one piece after the other.

    The states are carried along, so that a sequence may have any length.

    Raises
    ------
    NotImplementedError
        If the model has no states.
    """
    states: Any = model.new_states(1)
    for start in range(0, tokens.size - 1, PIECE):
        piece = tokens[start : start + PIECE + 1].astype(np.int32)
        with no_grad():
            logits, states = model.extend(piece[None, :-1], states)
        scores = to_numpy(logits.data)[0].astype(np.float64)
        scores -= scores.max(axis=1, keepdims=True)
        yield scores[np.arange(piece.size - 1), piece[1:]] - np.log(np.exp(scores).sum(axis=1))


def nats_of_bases(model: Model, tokens: Tokens) -> Iterator[tuple[float, int, int]]:
    """Of one piece after the other: the sum of -log p over its bases, how many they are, how much was read so far."""
    at = 1
    for part in log_likelihoods(model, tokens):
        counts = is_base(tokens[at : at + part.size])
        at += part.size
        yield -float(part[counts].sum()), int(counts.sum()), at


@dataclass(frozen=True)
class Variant:
    """Other letters in the place of some.

    Attributes
    ----------
    record : str
    position : int
        Of the first letter, counted from 1, as in VCF.
    ref, alt : str
        What stands there, and what may stand there instead; one of them at least has a letter.
    """

    record: str
    position: int
    ref: str
    alt: str

    @classmethod
    def parse(cls, text: str) -> Variant:
        """The variant that is written as ``record:position:ref:alt``; ValueError if it is none."""
        found = re.fullmatch(r"(.+):(\d+):([A-Za-z]*):([A-Za-z]*)", text)
        if found is None or found[3].upper() == found[4].upper():
            raise ValueError(f"a variant is record:position:ref:alt, as X:1000:A:G, got {text!r}")
        variant = cls(found[1], int(found[2]), found[3].upper(), found[4].upper())
        for letters in (variant.ref, variant.alt):
            if not is_base(BASES.tokens(letters.encode())).all():
                raise ValueError(f"a variant is of A, C, G and T, got {text!r}")
        return variant

    def __str__(self) -> str:
        return f"{self.record}:{self.position}:{self.ref}:{self.alt}"

    def both(self, record: Record, context: int) -> tuple[Tokens, Tokens]:
        """What is there, with so many letters before and behind it, and the same with the variant.

        Raises
        ------
        ValueError
            If the record has no such place, or other letters there.
        """
        start, ref = self.position - 1, BASES.tokens(self.ref.encode())
        end = start + ref.size
        if start < 0 or end > record.tokens.size:
            raise ValueError(f"{self}: {record.name} has {record.tokens.size} letters")
        if (record.tokens[start:end] != ref).any():
            raise ValueError(f"{self}: {record.name} has {BASES.decode(record.tokens[start:end].tolist())} there")
        before, behind = record.tokens[max(start - context, 0) : start], record.tokens[end : end + context]
        alt = BASES.tokens(self.alt.encode())
        return np.concatenate([before, ref, behind]), np.concatenate([before, alt, behind])


def log_likelihood_ratio(model: Model, ref: Tokens, alt: Tokens, *, both_strands: bool = False) -> float:
    """log p(alt) - log p(ref), in nats; with both strands the mean of what each of them says.

    What counts is every base of the sequences but their first token: a variant may make its own letters less likely,
    or what comes behind them.
    """

    def log_p(tokens: Tokens) -> float:
        return -sum(nats for nats, _, _ in nats_of_bases(model, tokens))

    found = [log_p(alt) - log_p(ref)]
    if both_strands:
        found.append(log_p(reverse_complement(alt)) - log_p(reverse_complement(ref)))
    return float(np.mean(found))
