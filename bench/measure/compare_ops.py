"""The ops around the scan on the CPU, beside a copy of as many bytes by as many threads.

    python bench/measure/compare_ops.py [--out FILE]

Bytes are those that a call cannot avoid: its arrays read once, its results written once. Medians of milliseconds, by
turns; results are compared with the plain reference before.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

import sscan
from sscan import reference
from sscan.cpu._parallel import threads

SHAPES = [(1, 1536, 2048), (8, 1536, 512)]
REPEATS, BAR = 31, 1.5
Call = tuple[Callable[[], Any], Callable[[], Any], int]  # the op, its reference, and how many bytes it moves


def calls_at(shape: tuple[int, int, int]) -> dict[str, Call]:
    rng, (_, dim, _) = np.random.default_rng(0), shape

    def normal(*size: int) -> Any:
        return rng.standard_normal(size, np.float32)

    x, dy, decay = normal(*shape), normal(*shape), rng.uniform(0.5, 1, shape).astype(np.float32)
    conv = (x, normal(dim, 4), normal(dim), "silu")
    rows, drows = (np.ascontiguousarray(a.swapaxes(1, 2)) for a in (x, dy))
    norm, h, size = (rows, normal(dim)), sscan.linear_scan(decay, x), x.nbytes

    def pair(name: str, *arguments: Any, arrays: int) -> Call:
        ours, plain = getattr(sscan, name), getattr(reference, name)
        return lambda: ours(*arguments), lambda: plain(*arguments), arrays * size

    return {
        "causal_conv1d": pair("causal_conv1d", *conv, arrays=2),
        "causal_conv1d_backward": pair("causal_conv1d_backward", dy, *conv, arrays=3),
        "rms_norm": pair("rms_norm", *norm, arrays=2),
        "rms_norm_backward": pair("rms_norm_backward", drows, *norm, arrays=3),
        "linear_scan": pair("linear_scan", decay, x, arrays=3),
        "linear_scan_backward": pair("linear_scan_backward", dy, decay, h, arrays=5),
    }


def check(name: str, result: Any, expected: Any) -> None:
    """Raise AssertionError unless the arrays are those of the reference."""
    pairs = zip(result, expected, strict=True) if isinstance(result, tuple) else [(result, expected)]
    for number, (array, other) in enumerate(pairs):
        if other is not None:
            worst = np.abs(array - other).max() / np.abs(other).max()
            assert worst < 1e-4, f"{name}: result {number} is off by {worst}"


def copy_of(size: int, pool: ThreadPoolExecutor) -> Callable[[], Any]:
    """A copy that moves so many bytes, read and written, by all threads."""
    source, target = (np.ones(size // 8, np.float32) for _ in range(2))
    parts = list(zip(np.array_split(source, threads()), np.array_split(target, threads()), strict=True))
    return lambda: list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), parts))


def milliseconds(*calls: Callable[[], Any]) -> list[float]:
    """Medians, by turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(REPEATS):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [1e3 * statistics.median(taken) for taken in times]


def table() -> list[str]:
    lines = [
        f"{datetime.now(timezone.utc):%Y-%m-%d}, {platform.machine()}, {threads()} threads, NumPy {np.__version__},",
        "float32: `python bench/measure/compare_ops.py`",
        "",
        "| (batch, dim, length) | | ms | a copy of as many bytes, ms | times (bar) |",
        "| --- | --- | --- | --- | --- |",
    ]
    with ThreadPoolExecutor(threads()) as pool:
        for shape in SHAPES:
            for name, (call, plain, size) in calls_at(shape).items():
                check(name, call(), plain())
                taken, copied = milliseconds(call, copy_of(size, pool))
                verdict = " **missed**" if taken > BAR * copied else ""
                lines.append(
                    f"| {shape} | {name} | {taken:.2f} | {copied:.2f} | {taken / copied:.2f} ({BAR}){verdict} |"
                )
                print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    given = parser.parse_args()
    lines = table()
    if given.out:
        given.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
