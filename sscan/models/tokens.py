"""Vocabularies: the 256 bytes, and what a ``tokenizer.json`` says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from sscan.models.files import check_readable
from sscan.models.pretrained import Source, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Array: TypeAlias = Any
TOKENIZER = "tokenizer.json"


class Bytes:
    """The vocabulary of byte models."""

    size = 256

    def encode(self, text: bytes) -> list[int]:
        """The bytes of a text."""
        return list(text)

    def encode_sized(self, text: bytes) -> tuple[Array, Array]:
        """The tokens of a text, and how many of its bytes each stands for."""
        return np.frombuffer(text, np.uint8).astype(np.int64), np.ones(len(text), np.int64)

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


Vocabulary = Bytes | Tokens


def vocabulary_of(model: str | Path, size: int, tokenizer: str | Path | None = None) -> Vocabulary:
    """What the tokens of a model mean.

    Parameters
    ----------
    model : str or Path
        The model's folder, or name on the hub, whose ``tokenizer.json`` it is.
    size : int
        Of the model's vocabulary: 256 are bytes, if there is no such file.
    tokenizer : str or Path, optional
        Another file, folder or name on the hub.

    Raises
    ------
    OSError, ValueError
        As :class:`Tokens`; also if there is no file and the model is none of bytes, or the file has more tokens.
    """
    if tokenizer is not None:
        path = Path(tokenizer)
        found: Path | None = path if path.is_file() else Source(tokenizer).require(TOKENIZER)
    else:
        found = Source(model).find(TOKENIZER)
    if found is None:
        if size != Bytes.size:
            raise ValueError(f"{model} has a vocabulary of {size}, not the 256 bytes, and no {TOKENIZER}")
        return Bytes()
    tokens = Tokens(found)
    if tokens.size > size:
        raise ValueError(f"{found} has {tokens.size} tokens, more than the {size} of the model")
    return tokens
