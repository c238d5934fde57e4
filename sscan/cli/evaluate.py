"""``sscan evaluate``: measure how well a model predicts a text."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from sscan.cli._arguments import add_device, path, positive_int
from sscan.cli._failures import mistakes
from sscan.cli._models import add_model, add_tokenizer, model_and_vocabulary

if TYPE_CHECKING:
    import argparse


def add_to(commands: Any) -> None:
    """Add the command to those that there are."""
    parser = commands.add_parser("evaluate", help="measure how well a model predicts a text")
    parser.set_defaults(command=_evaluate)
    add_model(parser)
    add_tokenizer(parser)
    add_device(parser)
    parser.add_argument("--text", type=path, metavar="FILE", required=True, help="text to predict")
    parser.add_argument(
        "--window", type=positive_int, metavar="N",
        help="cut it into windows of N tokens, whose second halves count (default: carry the state along)",
    )  # fmt: skip
    parser.add_argument(
        "--stride", type=positive_int, metavar="N", help="let windows begin every N tokens; the last N count"
    )


def _evaluate(options: argparse.Namespace) -> int:
    from sscan.tasks.evaluation import evaluate
    from sscan.tasks.progress import Phase
    from sscan.tasks.text import read_text

    with mistakes():
        model, vocabulary = model_and_vocabulary(options)
        with Phase("reading", sys.stderr):
            ids, sizes = vocabulary.encode_sized(read_text(options.text).tobytes())
        with Phase("evaluating", sys.stderr) as phase:
            result = evaluate(model, ids, sizes, options.window, options.stride, phase)
    how = "the state carried along"
    if options.window is not None:
        how = f"windows of {options.window}" + (f" every {options.stride}" if options.stride else ", second halves")
    print(f"text        {options.text}: {sizes.sum():,} bytes, {ids.size:,} tokens")
    print(f"counted     {result.tokens:,} tokens, {result.bytes:,} bytes; {how}")
    print(f"nats        {result.nats_a_token:.4f} a token")
    print(f"perplexity  {result.perplexity:.4f}")
    print(f"bits        {result.bits_a_byte:.4f} a byte")
    return 0
