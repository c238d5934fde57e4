"""The model that a command is given: how it is named, and where it computes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sscan.cli._arguments import model_name
from sscan.cli._devices import array_module
from sscan.cli._failures import Mistake

if TYPE_CHECKING:
    import argparse

    from sscan.models.tokens import Vocabulary
    from sscan.nn import MambaLM


def add_model(parser: argparse.ArgumentParser) -> None:
    from sscan.tasks.task import PRECISIONS

    parser.add_argument(
        "model", type=model_name, metavar="MODEL", help="folder of a model or of a run, or its name on the hub"
    )
    parser.add_argument("--dtype", choices=PRECISIONS, help="of the parameters (default float32)")


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", type=model_name, metavar="FILE",
        help="tokenizer.json, or a folder or name on the hub that has one (default: the model's; else tokens are "
        "bytes, or bases if there are 12)",
    )  # fmt: skip


def model_and_vocabulary(options: argparse.Namespace) -> tuple[MambaLM, Vocabulary]:
    """The model, where it is to compute, and what its tokens mean."""
    from sscan.models.tokens import vocabulary_of
    from sscan.nn import MambaLM
    from sscan.tasks.audio import FILE
    from sscan.tasks.progress import Phase
    from sscan.tasks.species import NAMES_FILE
    from sscan.tasks.task import PRECISIONS

    xp = array_module(options.device)
    if (Path(options.model) / NAMES_FILE).exists():
        raise Mistake(f"{options.model} tells species apart, and continues nothing")
    if (Path(options.model) / FILE).exists():
        raise Mistake(f"{options.model} is a model of audio, which sscan generate alone can use")
    with Phase("loading", sys.stderr):
        model = MambaLM.from_pretrained(options.model, PRECISIONS[options.dtype or "float32"])
        vocabulary = vocabulary_of(options.model, model.config.vocab_size, options.tokenizer)
        model.to(xp)
    return model, vocabulary
