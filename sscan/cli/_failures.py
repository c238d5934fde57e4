"""What is said when a command cannot do what it was asked for."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator


class Mistake(Exception):
    """Something the user asked for cannot be done; the message says what, in one line."""


@contextlib.contextmanager
def mistakes() -> Iterator[None]:
    """Report what goes wrong inside, while reading what the user named, as the user's mistake."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Mistake(line_of(error)) from error
    except (TypeError, ValueError, OverflowError) as error:
        raise Mistake(" ".join(str(error).split())) from error


def line_of(error: OSError) -> str:
    """What went wrong with which file, in one line."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename is not None else reason


def fail(line: str, code: int) -> int:
    """Say the line on standard error, if that takes it, and return the code."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)
    return code


def discard(stream: TextIO) -> None:
    """Let what the stream still holds go nowhere, or Python would try again at its end."""
    with contextlib.suppress(OSError, ValueError):  # a stream of the caller's own has no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
