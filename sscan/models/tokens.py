"""Vocabularies: the 256 bytes, the bases of DNA, and what a ``tokenizer.json`` says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from sscan.models.files import check_readable
from sscan.models.pretrained import Source, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Array: TypeAlias = Any
TOKENIZER = "tokenizer.json"
PART, PARTS = 1 << 18, 32  # of a long text: the characters of one at least, and how many are encoded at once


class Bytes:
    """The vocabulary of byte models."""

    size = 256

    def encode(self, text: bytes) -> list[int]:
        """The bytes of a text."""
        return list(text)

    def encode_sized(self, text: bytes) -> tuple[Array, Array]:
        """The tokens of a text, and how many of its bytes each stands for."""
        return np.frombuffer(text, np.uint8).astype(np.int64), np.ones(len(text), np.int64)

    def encode_long(self, text: bytes) -> Array:
        """The bytes of a text, not copied."""
        return np.frombuffer(text, np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        """The text, with a sign in the place of what is none."""
        return bytes(ids).decode(errors="replace")

    def writer(self) -> Callable[[int], bytes]:
        """A function of one token after the other, which returns what each adds to the text."""
        return lambda token: bytes([token])

    def token(self, text: str) -> int | None:
        """The special token of this name: there are none."""
        return None


class Tokens:
    """The vocabulary in a ``tokenizer.json``, through the library ``tokenizers``.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it holds no tokenizer, or there is no such library.
    """

    def __init__(self, path: Path) -> None:
        check_readable(path)
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(f'{path}: the library for it comes with: pip install "sscan[lm]"') from error
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # which is all that the library raises
            raise ValueError(f"{path}: {first_line(error)}") from error
        self._tokenizer.no_truncation()  # which the file may ask for, and which is of no text's length
        self._tokenizer.no_padding()
        self._stream = tokenizers.decoders.DecodeStream
        self.size: int = self._tokenizer.get_vocab_size()

    def encode(self, text: bytes) -> list[int]:
        """The tokens of a text in UTF-8; UnicodeDecodeError if it is not."""
        return list(self._tokenizer.encode(text.decode()).ids)

    def encode_sized(self, text: bytes) -> tuple[Array, Array]:
        """The tokens of a text, and how many of its bytes each stands for; one that begins inside a character, none."""
        characters = text.decode()
        encoding = self._tokenizer.encode(characters)
        starts = np.array([start for start, _ in encoding.offsets], np.int64)
        places = np.cumsum([0, *(len(character.encode()) for character in characters)])
        return np.array(encoding.ids, np.int64), np.diff(places[starts], append=len(text))

    def encode_long(self, text: bytes) -> Array:
        """The tokens of a text to train on, without any that the tokenizer puts at the ends of texts.

        All cores have a part in it, for which the text is cut behind line breaks.
        """
        ids = []
        for group in _groups(text.decode()):
            ids += [np.array(part.ids, np.int32) for part in self._tokenizer.encode_batch(group, False)]
        return np.concatenate([np.zeros(0, np.int32), *ids])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self._tokenizer.decode(list(ids)))

    def writer(self) -> Callable[[int], bytes]:
        """A function of one token after the other, which returns what each adds to the text, in whole characters."""
        stream = self._stream(skip_special_tokens=True)
        return lambda token: (stream.step(self._tokenizer, token) or "").encode()

    def token(self, text: str) -> int | None:
        """The token of this name, if there is one."""
        found = self._tokenizer.token_to_id(text)
        return None if found is None else int(found)


class Bases:
    """The vocabulary of models of DNA: A 7, C 8, G 9, T 10 and N 11, behind seven special tokens.

    Those are the ids of HyenaDNA's tokenizer, which the paper's models use. Case makes no difference, U is read as T,
    and the other letters of IUPAC's code, which stand for some bases, are the unknown token, 6. Texts may be in FASTA:
    lines that begin with ``>`` and white space are left out.
    """

    size = 12
    UNKNOWN, A, C, G, T, N = 6, 7, 8, 9, 10, 11
    COMPLEMENT = np.array([0, 1, 2, 3, 4, 5, UNKNOWN, T, G, C, A, N], np.uint8)  # of each token
    LETTERS = b"??????NACGTN"  # of each token; what is unknown may be any

    def tokens(self, letters: bytes) -> Array:
        """The tokens of letters, as uint8.

        Raises
        ------
        ValueError
            If one stands for no base.
        """
        ids = _TOKEN_OF[np.frombuffer(letters, np.uint8)]
        if not ids.all():
            wrong = letters[int(ids.argmin())]
            raise ValueError(f"{chr(wrong)!r} is no base, nor a letter that stands for some")
        return ids

    def encode(self, text: bytes) -> list[int]:
        """The tokens of a text."""
        return list(self.encode_long(text).tolist())

    def encode_sized(self, text: bytes) -> tuple[Array, Array]:
        """The tokens of a text, each of which is one letter."""
        ids = self.encode_long(text)
        return ids.astype(np.int64), np.ones(ids.size, np.int64)

    def encode_long(self, text: bytes) -> Array:
        """The tokens of a text, as uint8."""
        return self.tokens(b"".join(b"".join(line.split()) for line in text.splitlines() if not line.startswith(b">")))

    def decode(self, ids: Sequence[int]) -> str:
        """The letters of tokens."""
        return bytes(self.LETTERS[token] for token in ids).decode()

    def writer(self) -> Callable[[int], bytes]:
        """A function of one token after the other, which returns the letter of each."""
        return lambda token: self.LETTERS[token : token + 1]

    def token(self, text: str) -> int | None:
        """The special token of this name: none has one."""
        return None


_TOKEN_OF = np.zeros(256, np.uint8)  # of each letter; 0 for what is none
_TOKEN_OF[list(b"ACGTNU")] = Bases.A, Bases.C, Bases.G, Bases.T, Bases.N, Bases.T
_TOKEN_OF[list(b"RYSWKMBDHV")] = Bases.UNKNOWN
_TOKEN_OF[ord("a") : ord("z") + 1] = _TOKEN_OF[ord("A") : ord("Z") + 1]

Vocabulary = Bytes | Bases | Tokens


def _groups(text: str) -> Iterator[list[str]]:
    """The text in parts of some lines, several at a time."""
    start = 0
    while start < len(text):
        group: list[str] = []
        while start < len(text) and len(group) < PARTS:
            end = text.find("\n", start + PART) + 1 or len(text)
            group.append(text[start:end])
            start = end
        yield group


def tokenizer_file(tokenizer: str | Path) -> Path:
    """The file that is meant: it, or the one in a folder or on the hub.

    Raises
    ------
    OSError, ValueError
        If there is none.
    """
    path = Path(tokenizer)
    return path if path.is_file() else Source(tokenizer).require(TOKENIZER)


def vocabulary_of(model: str | Path, size: int, tokenizer: str | Path | None = None) -> Vocabulary:
    """What the tokens of a model mean.

    Parameters
    ----------
    model : str or Path
        The model's folder, or name on the hub, whose ``tokenizer.json`` it is.
    size : int
        Of the model's vocabulary: if there is no such file, 256 are bytes and 12 are bases.
    tokenizer : str or Path, optional
        Another file, folder or name on the hub.

    Raises
    ------
    OSError, ValueError
        As :class:`Tokens`; also if there is no file and the model is none of bytes, or the file has more tokens.
    """
    found = Source(model).find(TOKENIZER) if tokenizer is None else tokenizer_file(tokenizer)
    if found is None:
        for vocabulary in (Bytes(), Bases()):
            if size == vocabulary.size:
                return vocabulary
        raise ValueError(f"{model} has a vocabulary of {size}, not the 256 bytes, and no {TOKENIZER}")
    tokens = Tokens(found)
    if tokens.size > size:
        raise ValueError(f"{found} has {tokens.size} tokens, more than the {size} of the model")
    return tokens
