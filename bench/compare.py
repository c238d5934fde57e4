"""Print a table: sscan's selective scan against its peers on this machine, in one run, correctness first.

    python bench/compare.py [--prototype FOLDER] [--quick] [--save FILE]

Medians of wall-clock milliseconds; the repetitions of all candidates alternate, so that a busy moment hits all of them.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import ml_dtypes
import numba
import numpy as np
import peers
from problems import SHAPES, scan_problem

from sscan.cpu._parallel import threads

BUDGET = 4.0  # seconds of repetitions for one candidate at one shape
SLOW = 4096  # the peers that loop over time in Python sit out longer sequences


def close(actual: Any, expected: Any, tolerance: float) -> bool:
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return bool(np.abs(actual - expected).max() <= tolerance * max(1.0, np.abs(expected).max()))


def check(name: str, result: Any, expected: Any, tolerance: float) -> None:
    """Raise AssertionError unless y, and the gradients if there are any, are those of the first candidate."""
    if isinstance(result, tuple):
        (y, gradients), (expected_y, expected_gradients) = result, expected
        assert close(y, expected_y, tolerance), f"{name}: y differs"
        for key, gradient in expected_gradients.items():
            assert close(gradients[key], gradient, tolerance), f"{name}: d{key} differs"
    else:
        assert close(result, expected, tolerance), f"{name}: y differs"


def medians(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each; a slow candidate is repeated less often."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, function in candidates.items():
            if not times[name] or sum(times[name]) + times[name][-1] < BUDGET:
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def candidates_at(shape: tuple[int, int, int], with_prototype: Any, quick: bool) -> dict[str, peers.Pair]:
    problem = scan_problem(shape)
    candidates = {"sscan": peers.ours(problem)}
    candidates["sscan, zoh"] = peers.ours(problem, discretization="zoh")
    candidates["sscan, bfloat16"] = peers.ours(scan_problem(shape, ml_dtypes.bfloat16))
    candidates["sscan, kernels alone"] = peers.kernels_alone(problem)
    candidates["sscan, kernels alone, zoh"] = peers.kernels_alone(problem, discretization="zoh")
    if with_prototype is not None:
        candidates["prototype, kernels alone"] = with_prototype(problem)
    candidates["jax.lax.scan, jitted"] = peers.jax_lax_scan(problem)
    if not quick and shape[2] <= SLOW:
        candidates["torch formula"] = peers.torch_formula(problem)
        candidates["NumPy reference"] = peers.numpy_reference(problem)
    return candidates


def rows(shape: tuple[int, int, int], with_prototype: Any, quick: bool, rounds: int) -> list[str]:
    """The table's lines for one shape."""
    candidates = candidates_at(shape, with_prototype, quick)
    columns = []
    for column in (0, 1):
        functions = {name: pair[column] for name, pair in candidates.items() if pair[column] is not None}
        expected = functions["sscan"]()
        for name, function in functions.items():
            result = function()  # also compiles
            if "zoh" not in name:  # another rule, other values
                check(f"{name} at {shape}", result, expected, 0.1 if "bfloat16" in name else 1e-3)
        columns.append(medians(functions, rounds))
    lines = []
    for name in candidates:
        cells = [f"{column[name]:.1f} ({column[name] / column['sscan']:.2f}x)" for column in columns]
        lines.append(f"| {shape} | {name} | {cells[0]} | {cells[1]} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prototype", type=Path, help="folder with nb_vec.py and nb_vec_bwd.py")
    parser.add_argument("--quick", action="store_true", help="leave out the slow peers")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    with_prototype = peers.prototype(arguments.prototype) if arguments.prototype else None
    lines = [
        (
            f"{datetime.now(timezone.utc):%Y-%m-%d}, {platform.machine()}, {threads()} threads, "
            f"Python {platform.python_version()}, NumPy {np.__version__}, Numba {numba.__version__}"
        ),
        "",
        "| (batch, dim, length) | | forward, ms (over sscan) | forward + backward, ms (over sscan) |",
        "| --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    for shape in SHAPES:
        more = rows(shape, with_prototype, arguments.quick, arguments.rounds)
        print("\n".join(more), flush=True)
        lines += more
    if arguments.save:
        arguments.save.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
