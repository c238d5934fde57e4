"""What arguments may be, and how wrong ones are refused."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from sscan.cli._failures import fail


class Parser(argparse.ArgumentParser):
    texts_by = ""  # the option by which files are given that somebody may put in the place of a task

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file)  # argparse's own keeps to itself that there is no room for it

    def error(self, message: str) -> NoReturn:
        if self.texts_by and message.startswith("argument task: "):
            message += f"; texts are given with {self.texts_by}"
        sys.exit(fail(f"{self.prog}: {message} (try {self.prog} --help)", 2))


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def number(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


def path(text: str) -> Path:
    if not text:  # which Path takes for the current folder
        raise ValueError
    return Path(text)


def model_name(text: str) -> str:
    return str(path(text)) and text


# What argparse calls them in "invalid ... value".
positive_int.__name__, positive_float.__name__ = "positive integer", "positive number"
model_name.__name__ = "path"


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default %(default)s)")
