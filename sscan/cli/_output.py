"""What commands write: text while it is generated, of which a terminal obeys nothing."""

from __future__ import annotations

import codecs
import sys
import unicodedata
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SAMPLE_TOKENS = 400
TEMPERATURE = 0.8  # of texts
NOT_DRAWN = 'not drawn, for want of matplotlib; it comes with: pip install "sscan[plot]"'


class Continuations:
    """Writes the prompt and what is generated behind it, as soon as it is known, for one sample after the other.

    What may be the beginning of a text that ends it is held back until it is known not to be. Until there is something
    to watch, standard error says what is going on; where the text goes elsewhere, also how much of `tokens` is made.
    """

    def __init__(
        self, prompt: bytes, writer: Callable[[], Callable[[int], bytes]], write: Callable[[bytes], object],
        tokens: int, stop: Sequence[bytes] = (),
    ) -> None:  # fmt: skip
        from sscan.tasks.progress import Phase

        self.prompt, self.writer, self.write, self.tokens, self.stop = prompt, writer, write, tokens, stop
        self.sample, self.made, self.held = -1, 0, b""
        self.phase = Phase("reading the prompt", sys.stderr)

    def __enter__(self) -> Continuations:
        self.phase.__enter__()
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self.phase.close()
        if kind is None:
            if self.sample < 0:
                self._begin()
            self._put(self.held + b"\n")

    def __call__(self, sample: int, token: int) -> None:
        """The next token of a sample."""
        self.phase.title = "generating"
        if sys.stdout.isatty():
            self.phase.close()
        while self.sample < sample:
            self._begin()
        self._add(self.to_bytes(token))
        self.made += 1
        self.phase(self.made / self.tokens)

    def _add(self, part: bytes) -> None:
        """Write what cannot belong to a text that ends the sample, and hold the rest."""
        self.held += part
        ends = [self.held.find(text) for text in self.stop if text in self.held]
        if ends:
            self.held = self.held[: min(ends)]
            return
        kept = max((n for text in self.stop for n in range(1, len(text)) if self.held.endswith(text[:n])), default=0)
        self._put(self.held[: len(self.held) - kept])
        self.held = self.held[len(self.held) - kept :]

    def _begin(self) -> None:
        """Go on to the next sample."""
        if self.sample >= 0:
            self._put(self.held + b"\n\n")
        self.sample, self.held = self.sample + 1, b""
        self.to_bytes = self.writer()
        self._put(self.prompt)

    def _put(self, part: bytes) -> None:
        self.write(part)
        sys.stdout.flush()


def text_writer(stream: TextIO) -> Callable[[bytes], object]:
    """Writes bytes as text, each character when it is complete; a terminal shows control characters and obeys none."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    encoding, is_terminal = stream.encoding or "utf-8", stream.isatty()

    def write(data: bytes) -> None:
        text = decoder.decode(data)
        if is_terminal:
            text = "".join(map(_visible, text))
        stream.write(text.encode(encoding, "replace").decode(encoding))

    return write


def _visible(character: str) -> str:
    r"""The character, or for one that would move the cursor, ring or change colours, its number as in ``\x1b``."""
    is_control = unicodedata.category(character) == "Cc" and character not in "\n\t"
    return f"\\x{ord(character):02x}" if is_control else character
