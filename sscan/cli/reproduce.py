"""``sscan reproduce``: run a table of the paper, and show its numbers beside ours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sscan.cli._arguments import add_device, path, positive_float, positive_int
from sscan.cli._devices import array_module
from sscan.cli._failures import Mistake, fail, mistakes
from sscan.cli._output import NOT_DRAWN
from sscan.cli._runs import default_text
from sscan.cli._signals import stop_requests

if TYPE_CHECKING:
    import argparse


def add_to(commands: Any) -> None:
    """Add the command to those that there are."""
    from sscan.tasks.tables import SCALES, TABLES

    parser = commands.add_parser("reproduce", help="run a table of the paper, and show its numbers beside ours")
    parser.set_defaults(command=_reproduce)
    parser.add_argument("table", choices=list(TABLES), metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--rows", nargs="+", metavar="ROW", default=[], help="those to run, in this order (all)")
    parser.add_argument("--scale", choices=SCALES, default=SCALES[0], help="(default %(default)s)")
    parser.add_argument(
        "--generators", nargs="+", metavar="NAME", default=[],
        help="how the data are made where the paper does not say it: " + "; ".join(
            f"{name} {', '.join(table.generators)}" for name, table in TABLES.items() if len(table.generators) > 1
        ) + " (default: the first)",
    )  # fmt: skip
    parser.add_argument(
        "--lr", type=positive_float, nargs="+", metavar="RATE", default=[],
        help="highest learning rates, of which the best is shown for each row (default: the row's own)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", default=[0], help="(default 0)")
    parser.add_argument("--steps", type=positive_int, help="of every run, instead of the scale's")
    parser.add_argument(
        "--text", type=path, nargs="+", metavar="FILE", help="for table6 to table10, as for sscan train"
    )
    add_device(parser)
    parser.add_argument("--at-once", type=positive_int, default=1, metavar="N", help="runs (default %(default)s)")
    parser.add_argument(
        "--minutes", type=positive_float,
        help="begin no step after so many in all (compiling and evaluations are not cut off); the same command goes on",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=path, metavar="DIR", default=Path("runs", "reproduce"), help="(default %(default)s)"
    )


def _reproduce(options: argparse.Namespace) -> int:
    from sscan.tasks.reproduce import Until, finished, jobs, run_all, to_do
    from sscan.tasks.tables import TABLES
    from sscan.tasks.text import text_files

    table, out = TABLES[options.table], options.out
    with mistakes():
        if options.text is not None and not table.of_texts:
            raise Mistake(f"--text: {table.name} is of no text")
        changes = {} if options.steps is None else {"steps": options.steps}
        wanted = jobs(table, options.scale, options.rows, options.generators, options.lr, options.seeds, changes)
        texts = text_files(options.text or [default_text()]) if table.of_texts else []
        todo = to_do(wanted, out, texts)
        xp = array_module(options.device)
        out.mkdir(parents=True, exist_ok=True)
    print(f"{table.title}, {options.scale}: {len(todo)} of {len(wanted)} runs to do", file=sys.stderr, flush=True)
    with stop_requests() as received:
        stop = Until(options.minutes, received)
        failures = run_all(todo, out, xp, texts, options.at_once, stop, sys.stderr)
    _show(options, failures)
    left = sorted({job.name for job in todo} - failures.keys() - finished(out, table, options.scale))
    if received:
        return fail("sscan reproduce: stopped; the same command goes on", 128 + received[0])
    for name, reason in failures.items():
        fail(f"sscan reproduce: {name}: {reason}", 1)
    if left:
        print(f"not finished, and goes on with the same command: {', '.join(left)}", file=sys.stderr)
    return 1 if failures else 0


def _show(options: argparse.Namespace, failures: dict[str, str]) -> None:
    """Print and draw what there is of a table."""
    from sscan.tasks.report import draw, markdown
    from sscan.tasks.reproduce import results
    from sscan.tasks.tables import TABLES

    table = TABLES[options.table]
    found = results(options.out, table, options.scale)
    print(markdown(table, found, failures), flush=True)
    picture = options.out / f"{table.name}-{options.scale}.png"
    print(f"picture     {picture if draw(table, found, picture) else NOT_DRAWN}")
