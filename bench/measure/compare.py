"""Print a table: sscan's selective scan against its peers on this machine, in one run, correctness first.

    python bench/measure/compare.py [--prototype FOLDER] [--quick] [--out FILE]

Medians of wall-clock milliseconds. Each candidate has a process of its own, since the workers of OpenMP and of OpenBLAS
spin for a while behind a call and would take a core from whoever runs next in theirs. The repetitions of all alternate,
so that a busy moment hits all of them, with a pause in between for the same reason.
"""

import argparse
import contextlib
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import ml_dtypes
import numba
import numpy as np
import peers
from problems import SHAPES, scan_problem

from sscan.cpu._parallel import threads

PAUSE = 0.25  # seconds between two calls, until the last one's workers sleep
BUDGET = 4.0  # seconds of repetitions for one candidate at one shape
PROTOTYPE, FOLDER = "prototype, kernels alone", "SSCAN_PROTOTYPE"
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


Shape = tuple[int, int, int]
CANDIDATES: dict[str, Callable[[Shape], peers.Pair]] = {
    "sscan": lambda shape: peers.ours(scan_problem(shape)),
    "sscan, zoh": lambda shape: peers.ours(scan_problem(shape), discretization="zoh"),
    "sscan, bfloat16": lambda shape: peers.ours(scan_problem(shape, ml_dtypes.bfloat16)),
    "sscan, kernels alone": lambda shape: peers.kernels_alone(scan_problem(shape)),
    "sscan, kernels alone, zoh": lambda shape: peers.kernels_alone(scan_problem(shape), discretization="zoh"),
    PROTOTYPE: lambda shape: peers.prototype(Path(os.environ[FOLDER]))(scan_problem(shape)),
    "jax.lax.scan, jitted": lambda shape: peers.jax_lax_scan(scan_problem(shape)),
    "torch formula": lambda shape: peers.torch_formula(scan_problem(shape)),
    "NumPy reference": lambda shape: peers.numpy_reference(scan_problem(shape)),
}
IN_PYTHON = "torch formula", "NumPy reference"


def candidate(connection: Any, name: str, shape: Shape) -> None:
    """A process: checks a candidate, then answers the number of a column with the seconds of a call of it."""
    functions = CANDIDATES[name](shape)
    expected = CANDIDATES["sscan, zoh" if "zoh" in name else "sscan"](shape)
    for function, other in zip(functions, expected, strict=True):  # also compiles
        check(f"{name} at {shape}", function(), other(), 0.1 if "bfloat16" in name else 1e-3)
    connection.send(None)
    while (column := connection.recv()) is not None:
        start = time.perf_counter()
        functions[column]()
        connection.send(time.perf_counter() - start)


@contextlib.contextmanager
def processes(names: list[str], shape: Shape) -> Iterator[dict[str, Any]]:
    """A connection to each candidate, which is ready."""
    spawn, connections, children = multiprocessing.get_context("spawn"), {}, []
    try:
        for name in names:
            connections[name], theirs = spawn.Pipe()
            child = spawn.Process(target=candidate, args=(theirs, name, shape), daemon=True)
            child.start()
            theirs.close()  # so that a child that fails ends the wait
            children.append(child)
            connections[name].recv()
        yield connections
    finally:
        for child in children:
            child.terminate()
            child.join()


def medians(connections: dict[str, Any], column: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of each; a slow candidate is repeated less often."""
    times: dict[str, list[float]] = {name: [] for name in connections}
    for _ in range(rounds):
        for name, connection in connections.items():
            if not times[name] or sum(times[name]) + times[name][-1] < BUDGET:
                time.sleep(PAUSE)
                connection.send(column)
                times[name].append(connection.recv())
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def rows(shape: Shape, names: list[str], rounds: int) -> list[str]:
    """The table's lines for one shape."""
    names = [name for name in names if shape[2] <= SLOW or name not in IN_PYTHON]
    with processes(names, shape) as connections:
        columns = [medians(connections, column, rounds) for column in (0, 1)]
    return [
        f"| {shape} | {name} | " + " | ".join(f"{c[name]:.1f} ({c[name] / c['sscan']:.2f}x)" for c in columns) + " |"
        for name in names
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prototype", type=Path, help="folder with nb_vec.py and nb_vec_bwd.py")
    parser.add_argument("--quick", action="store_true", help="leave out the slow peers")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    left_out = {*(IN_PYTHON if arguments.quick else ()), *(() if arguments.prototype else (PROTOTYPE,))}
    names = [name for name in CANDIDATES if name not in left_out]
    if arguments.prototype:
        os.environ[FOLDER] = str(arguments.prototype.resolve())  # for the processes
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
        more = rows(shape, names, arguments.rounds)
        print("\n".join(more), flush=True)
        lines += more
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
