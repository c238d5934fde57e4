"""Measure the scan on a GPU where shapes or memory are unusual, beside its bars and what mamba_ssm takes.

    python bench/measure/compare_scans.py --out bench/results/cuda-scans-DATE.md

Picoseconds per point of (batch, dim, length), in CUDA graphs of calls on inputs that take turns. Every kind of problem
is compared with the reference in float64 before it is timed. mamba_ssm's times were measured on an H200 in November
2026 (2.3.2, for sm_90); its "forward and backward" goes through autograd. Where it has none, a row is compared with
another one. Exit code 1 if a result is wrong; bars that are missed are listed.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import cupy
import numpy as np
from compare_gpu import Report, errors, forward_and_backward, header
from gpu_problems import DTYPES, Normals, on_host, scan_problem, size_of
from gpu_timing import free_memory, milliseconds_in_graph, sets_for

import sscan
from sscan.cuda import _launch

IN_GRAPH = 12  # calls in a CUDA graph, about
PROCESSES = 16  # that compile
Shape = tuple[int, int, int]


class Row(NamedTuple):
    """A problem, mamba_ssm's picoseconds (0: unknown), and by how much to be faster, of those that are asked for."""

    name: str
    shape: Shape
    dtype: str
    forward: float = 0
    backward: float = 0
    both: float = 0
    bars: dict[str, float] = {}  # noqa: RUF012  # never changed
    layout: str = "rows"
    states: int = 16
    groups: int = 0
    sequences: tuple[int, ...] = ()  # their lengths
    packed_by: str = ""


USUAL: Shape = (8, 1536, 2048)
LAYOUT = {"forward": 2.0, "both": 2.0}
MANY = {"backward": 2.4}
LONG = (5000, 300, 2100, 1700, 4000, 84, 2200, 1000)
ROWS = [
    Row("usual", USUAL, "bfloat16", 17.7, 69.0, 86.7),
    Row("usual", USUAL, "float32", 35.0, 80.6, 116.3),
    Row("(batch, length, dim) transposed", USUAL, "bfloat16", 37.2, 0, 106.3, LAYOUT, "columns"),
    Row("(batch, length, dim) transposed", USUAL, "float32", 56.1, 0, 136.7, LAYOUT, "columns"),
    Row("(batch, length, dim) transposed", (8, 5120, 2048), "bfloat16", 37.1, 0, 104.7, LAYOUT, "columns"),
    Row("(batch, length, dim) transposed", (1, 1536, 2048), "bfloat16", 42.4, 0, 128.4, LAYOUT, "columns"),
    Row("(dim, batch, length) transposed", USUAL, "bfloat16", 17.7, 0, 87.3, LAYOUT, "channels first"),
    Row("delta shared (expand)", USUAL, "bfloat16", 17.5, 0, 86.8, LAYOUT, "shared delta"),
    Row("delta shared (expand)", USUAL, "float32", 34.6, 0, 114.8, LAYOUT, "shared delta"),
    Row("192 groups of 8 channels", USUAL, "bfloat16", 20.9, 82.1, 103.0,
        {"forward": 1.5, "backward": 1.5, "both": 1.5}, groups=192),
    Row("96 groups of 16 channels", USUAL, "bfloat16", groups=96),
    Row("N = 1", USUAL, "bfloat16", 5.0, 12.7, 17.6, {"backward": 1.5}, states=1),
    Row("N = 1", USUAL, "float32", 8.5, 16.9, 25.4, {"backward": 1.5}, states=1),
    Row("N = 32", USUAL, "bfloat16", 31.5, 133.9, 165.3, MANY, states=32),
    Row("N = 64", USUAL, "bfloat16", 59.3, 263.2, 322.3, MANY, states=64),
    Row("N = 64", USUAL, "float32", 121.2, 292.0, 412.6, MANY, states=64),
    Row("N = 128", USUAL, "bfloat16", 115.4, 523.7, 638.2, MANY, states=128),
    Row("length 777", (8, 1536, 777), "bfloat16", 37.1, 108.4, 144.9),
    Row("length 2047", (8, 1536, 2047), "bfloat16", 28.9, 112.5, 141.5),
    Row("length 784", (8, 1536, 784), "bfloat16"),
    *(
        Row("small", shape, dtype)
        for shape in ((8, 128, 256), (1, 768, 1024), (1, 1536, 512), (2, 33, 4096)) for dtype in ("bfloat16", "float32")
    ),
    *(
        Row(f"{name}, by {by}", (1, 1536, 16384), "bfloat16", sequences=lengths, packed_by=by)
        for name, lengths in (("8 sequences", LONG), ("8 equal ones", (2048,) * 8), ("100", (164,) * 99 + (148,)))
        for by in ("seq_idx", "cu_seqlens")
    ),
]  # fmt: skip


def problem_of(row: Row, shape: Shape, seed: int = 0) -> tuple[dict[str, Any], Any]:
    """Arguments of a scan as a row describes them, in another shape, and a gradient for y."""
    (batch, dim, length), storage, normal = shape, DTYPES[row.dtype], Normals(seed + 1000)
    problem = scan_problem(shape, row.dtype, seed)
    if row.states != 16:
        of_time = (batch, row.states, length)
        problem["A"] = -cupy.exp(normal((dim, row.states), np.float32, 0.5))
        problem |= {name: normal(of_time, storage, (16 / row.states) ** 0.5) for name in "BC"}
    if row.groups:
        problem |= {name: normal((batch, min(row.groups, dim // 8), row.states, length), storage) for name in "BC"}
    if row.layout == "shared delta":
        problem["delta"] = cupy.broadcast_to(problem["delta"][:, :1], shape)
    dy = normal(shape, storage)
    if row.sequences:
        borders = np.cumsum((0, *row.sequences)) * length // sum(row.sequences)
        if row.packed_by == "cu_seqlens":
            problem["cu_seqlens"] = cupy.asarray(borders, np.int64)
        else:
            problem["seq_idx"] = cupy.asarray(np.repeat(np.arange(len(row.sequences)), np.diff(borders))[None])
    axes = {"columns": (0, 2, 1), "channels first": (1, 0, 2)}.get(row.layout)
    if axes is not None:
        names = ("u", "delta", "z", "B", "C") if row.layout == "columns" else ("u", "delta", "z")
        problem |= {name: cupy.ascontiguousarray(problem[name].transpose(axes)).transpose(axes) for name in names}
        dy = cupy.ascontiguousarray(dy.transpose(axes)).transpose(axes)
    return problem, dy


def small(row: Row) -> Shape:
    """A shape in which the row is checked."""
    return min(2, row.shape[0]), 72, 200 + row.shape[2] % 8


def wrong(row: Row) -> list[str]:
    problem, dy = problem_of(row, small(row))
    got = on_host(forward_and_backward(problem, dy))
    return [f"{row.name} {row.dtype}: {line}" for line in errors(got, on_host(problem), dy.get())]


def calls_of(row: Row) -> dict[str, list[Callable[[], Any]]]:
    """Forward, backward and both, on several sets of inputs."""
    first = problem_of(row, row.shape)
    sets = [first, *(problem_of(row, row.shape, seed) for seed in range(1, min(IN_GRAPH, sets_for(size_of(first[0])))))]

    def both(problem: dict[str, Any], dy: Any) -> Any:
        y, _, kept = sscan.selective_scan_forward(**problem)
        return y, sscan.selective_scan_backward(dy, **problem, checkpoints=kept)

    kept = [sscan.selective_scan_forward(**problem)[2] for problem, _ in sets]
    calls: dict[str, list[Callable[[], Any]]] = {
        "forward": [lambda p=p: sscan.selective_scan(**p) for p, _ in sets],
        "backward": [
            lambda p=p, dy=dy, k=k: sscan.selective_scan_backward(dy, **p, checkpoints=k)
            for (p, dy), k in zip(sets, kept, strict=True)
        ],
        "both": [lambda p=p, dy=dy: both(p, dy) for p, dy in sets],
    }
    return {name: each * max(1, IN_GRAPH // len(each)) for name, each in calls.items()}


def picoseconds(row: Row) -> dict[str, float]:
    points = row.shape[0] * row.shape[1] * row.shape[2]
    times = {}
    for name, calls in calls_of(row).items():
        times[name] = 1e9 * milliseconds_in_graph(calls) / points
        free_memory()
    return times


def compile_kernels(rows: list[Row]) -> None:
    """All kernels that the rows launch, by several processes: they are kept on disk."""
    seen: dict[Any, None] = {}
    with mock.patch.object(_launch, "launch", lambda kernel, *_: seen.setdefault(kernel)):
        for row in rows:
            for shape in (small(row), row.shape):
                forward_and_backward(*problem_of(row, shape))
                free_memory()
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(_launch.cached, capability=_launch.capability_of(0)), seen))


def cells(row: Row, times: dict[str, float]) -> list[str]:
    made = []
    for name, theirs in (("forward", row.forward), ("backward", row.backward), ("both", row.both)):
        cell, bar = f"{times[name]:.1f}", row.bars.get(name)
        if theirs:
            cell += f", {theirs}, {theirs / times[name]:.2f}"
        if bar is not None:
            cell += f" ({bar})" + ("" if theirs / times[name] >= bar else " **missed**")
        made.append(cell)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the report there as well")
    parser.add_argument("--only", default="", help="rows whose names contain one of these, separated by commas")
    given = parser.parse_args()
    rows = [row for row in ROWS if any(part in row.name for part in given.only.split(","))]
    compile_kernels(rows)
    report = Report(given.out)
    header(report)
    for row in rows:
        for line in wrong(row):
            report.fail(line)
    kinds = ("forward", "backward", "both")
    report.table("problem", "shape, dtype", *(f"{name} ps, theirs, ratio (bar)" for name in kinds))
    for row in rows:
        report.row(row.name, f"{row.shape} {row.dtype}", *cells(row, picoseconds(row)))
        free_memory()
    report.add("", f"Rows with a bar that was missed: {sum('**missed**' in line for line in report.lines)}.")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
