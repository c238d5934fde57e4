"""``sscan convert``: write a model in another format."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from sscan.cli._arguments import path
from sscan.cli._failures import mistakes
from sscan.cli._models import add_model

if TYPE_CHECKING:
    import argparse


def add_to(commands: Any) -> None:
    """Add the command to those that there are."""
    parser = commands.add_parser("convert", help="write a model in the format of the original or of transformers")
    parser.set_defaults(command=_convert)
    add_model(parser)
    parser.add_argument("folder", type=path, metavar="FOLDER", help="where to write it")
    parser.add_argument(
        "--format", choices=["original", "transformers"], default="transformers", help="(default transformers)"
    )
    parser.add_argument(
        "--pickle", action="store_true", help="write pytorch_model.bin, which mamba_ssm reads; takes PyTorch"
    )


def _convert(options: argparse.Namespace) -> int:
    from sscan.models.pretrained import convert
    from sscan.tasks.progress import Phase
    from sscan.tasks.task import PRECISIONS

    with mistakes(), Phase("converting", sys.stderr):
        dtype = None if options.dtype is None else PRECISIONS[options.dtype]
        names = convert(options.model, options.folder, options.format, dtype, pickled=options.pickle)
    print(f"written     {options.folder}: {', '.join(names)}")
    return 0
