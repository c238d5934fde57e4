"""The command ``sscan``: train models on texts, DNA or audio; continue, evaluate, score and convert; reproduce.

Results go to standard output; progress and errors go to standard error. Exit codes: 0, 1 for a failure that is not the
user's, 2 for a mistake in what was asked for, 128 + signal after an interruption.

Each module whose name has no underscore in front is a command.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

import sscan
from sscan.cli import convert, evaluate, generate, info, kernels, reproduce, score, train
from sscan.cli._arguments import Parser
from sscan.cli._failures import Mistake, discard, fail, line_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if sys.stderr is None:  # closed by who started us
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        return fail("sscan: standard output is closed", 1)
    name = "sscan"
    try:
        try:
            options = _parser().parse_args(arguments)
            name = f"sscan {options.name or ''}".rstrip()
            return options.command(options) or 0
        finally:
            _flush_notices()
            sys.stdout.flush()  # what there is no room for is noticed here, and not when Python has ended
    except Mistake as mistake:
        return fail(f"{name}: {mistake}", 2)
    except KeyboardInterrupt:
        return fail(f"{name}: interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output has left
        discard(sys.stdout)
        return 128 + signal.SIGPIPE
    except OSError as error:
        discard(sys.stdout)
        return fail(f"{name}: {line_of(error)}", 1)
    except FloatingPointError as error:
        return fail(f"{name}: {error}", 1)
    except MemoryError as error:
        return fail(f"{name}: not enough memory{f' ({error})' if str(error) else ''}", 1)


def _flush_notices() -> None:
    """Forget what there is no room for on standard error: a library's notice must not become our exit code."""
    try:
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="sscan", description="Selective state space models (Mamba) in pure Python.")
    parser.add_argument("--version", action="version", version=f"sscan {sscan.__version__}")
    parser.set_defaults(command=lambda options: parser.print_help())
    commands = parser.add_subparsers(dest="name", metavar="command")
    for command in (train, generate, evaluate, score, convert, reproduce, kernels, info):
        command.add_to(commands)
    return parser
