"""Measure the kernels around the scan on a GPU, beside their bars and what causal_conv1d and mamba_ssm take.

    python bench/measure/compare_small.py --out bench/results/cuda-small-DATE.md

Every kind of call is compared with the CPU's result before it is timed, in CUDA graphs of calls on inputs that take
turns. The peers' times were measured on an H200 in November 2026 (causal_conv1d 1.6.1, mamba_ssm 2.3.2, for sm_90).
Exit code 1 if a result is wrong; bars that are missed are listed.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cupy
import numpy as np
from compare_gpu import Report, header
from gpu_problems import DTYPES, Normals
from gpu_timing import copy_bandwidth, free_memory, milliseconds_in_graph, sets_for

import sscan

IN_GRAPH = 24  # calls in a CUDA graph, about
ROUNDINGS = 8  # by which results may differ from the CPU's, which sums in another order


class Peer(NamedTuple):
    """A problem, the microseconds that a peer takes for one call after the other, and by how much to be faster."""

    problem: dict[str, Any]
    theirs: tuple[float, ...]
    bar: float


def convolution_of(
    shape: tuple[int, int, int],
    forward: float,
    both: float,
    dtype: str = "bfloat16",
    width: int = 4,
    last: bool = False,
) -> Peer:
    problem = {"shape": shape, "dtype": dtype, "width": width, "channels": "last" if last else "first"}
    return Peer(problem, (forward, both), 1.0 if last else 1.1)


CONVOLUTIONS = [
    convolution_of((8, 5120, 2048), 85.6, 237.5),
    convolution_of((8, 5120, 2048), 165.3, 410.2, "float32"),
    convolution_of((8, 1536, 2048), 27.9, 77.0),
    convolution_of((8, 1536, 2048), 52.2, 130.9, "float32"),
    convolution_of((1, 1536, 2048), 5.0, 15.1),
    convolution_of((8, 1536, 1000), 14.6, 48.2),
    convolution_of((8, 1536, 777), 22.2, 71.5),
    convolution_of((64, 1536, 512), 92.2, 304.6),
    convolution_of((1, 64, 1048576), 661.5, 1493.3),
    convolution_of((256, 1536, 64), 354.8, 1268.9),
    convolution_of((8, 1536, 2048), 27.8, 74.8, width=3),
    convolution_of((8, 1536, 2048), 27.5, 72.6, width=2),
    convolution_of((8, 5120, 2048), 104.7, 353.8, last=True),
    convolution_of((8, 5120, 2048), 199.3, 555.8, "float32", last=True),
    convolution_of((8, 1536, 2048), 34.8, 116.3, last=True),
    convolution_of((8, 1536, 2048), 65.5, 181.8, "float32", last=True),
    convolution_of((1, 1536, 2048), 6.2, 17.9, last=True),
    convolution_of((64, 1536, 512), 63.3, 255.4, last=True),
]
CONVOLUTION_STEPS = [
    Peer({"batch": batch, "dim": 5120, "dtype": dtype}, (theirs,), 1.1)
    for batch, dtype, theirs in (
        (1, "bfloat16", 1.84), (1, "float32", 1.87), (64, "bfloat16", 6.20), (64, "float32", 9.54),
        (256, "bfloat16", 16.70), (256, "float32", 29.91),
    )
]  # fmt: skip
SCAN_STEPS = [
    Peer({"batch": batch, "dim": dim, "states": states, "dtype": dtype, "state": state}, (theirs,), 1.1)
    for dim, states, batch, dtype, state, theirs in (
        (5120, 16, 1, "bfloat16", "float32", 1.63), (5120, 16, 1, "float32", "float32", 1.84),
        (5120, 16, 16, "bfloat16", "float32", 5.44), (5120, 16, 16, "float32", "float32", 5.89),
        (5120, 16, 64, "bfloat16", "float32", 14.47), (5120, 16, 64, "bfloat16", "bfloat16", 13.74),
        (5120, 16, 64, "float32", "float32", 15.13), (5120, 16, 256, "bfloat16", "float32", 51.21),
        (5120, 16, 256, "bfloat16", "bfloat16", 49.7), (5120, 16, 256, "float32", "float32", 53.56),
        (5120, 128, 1, "bfloat16", "float32", 4.56), (5120, 128, 1, "float32", "float32", 4.23),
        (5120, 128, 16, "bfloat16", "float32", 29.04), (5120, 128, 16, "float32", "float32", 26.23),
        (5120, 128, 64, "bfloat16", "float32", 106.21), (5120, 128, 64, "bfloat16", "bfloat16", 105.95),
        (5120, 128, 64, "float32", "float32", 97.34), (5120, 128, 256, "bfloat16", "float32", 420.8),
        (5120, 128, 256, "bfloat16", "bfloat16", 414.83), (5120, 128, 256, "float32", "float32", 384.14),
        (1536, 16, 1, "bfloat16", "float32", 1.49), (1536, 16, 64, "bfloat16", "float32", 5.95),
        (1536, 16, 64, "float32", "float32", 6.27), (1536, 16, 256, "bfloat16", "float32", 16.88),
    )
]  # fmt: skip


# --- Problems: calls on arrays of a seed, on the GPU or the host ------------------------------------------------------


def convolution(shape: tuple[int, int, int], dtype: str, width: int, channels: str, seed: int = 0) -> dict[str, Any]:
    normal, (batch, dim, length) = Normals(seed), shape

    def wave() -> Any:
        made = normal(shape if channels == "first" else (batch, length, dim), DTYPES[dtype])
        return made if channels == "first" else made.transpose(0, 2, 1)

    return {"x": wave(), "weight": normal((dim, width), np.float32), "bias": normal((dim,), np.float32), "dy": wave()}


def convolve(a: dict[str, Any]) -> tuple[Any, ...]:
    return (sscan.causal_conv1d(a["x"], a["weight"], a["bias"], "silu"),)


def convolve_back(a: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(sscan.causal_conv1d_backward(a["dy"], a["x"], a["weight"], a["bias"], "silu")[:3])


def convolution_step(batch: int, dim: int, dtype: str, seed: int = 0) -> dict[str, Any]:
    normal, storage = Normals(seed), DTYPES[dtype]
    shapes = {"x": (batch, dim), "conv_state": (batch, dim, 4), "weight": (dim, 4), "bias": (dim,)}
    return {name: normal(shape, storage) for name, shape in shapes.items()}


def convolve_next(a: dict[str, Any]) -> tuple[Any, ...]:
    return sscan.causal_conv1d_update(**a, activation="silu"), a["conv_state"]


def scan_step(batch: int, dim: int, states: int, dtype: str, state: str, seed: int = 0) -> dict[str, Any]:
    normal, storage = Normals(seed), DTYPES[dtype]
    waves = {name: normal((batch, dim), storage) for name in ("x", "dt", "z")}
    matrices = {name: normal((batch, states), storage) for name in "BC"}
    own = {"A": -cupy.exp(normal((dim, states), np.float32)), "D": normal((dim,), np.float32)}
    return {
        "state": normal((batch, dim, states), DTYPES[state]), **waves, **own, **matrices,
        "dt_bias": normal((dim,), np.float32),
    }  # fmt: skip


def scan_next(a: dict[str, Any]) -> tuple[Any, ...]:
    return sscan.selective_state_update(**a, dt_softplus=True), a["state"]


Call = Callable[[dict[str, Any]], tuple[Any, ...]]


def wrong(call: Call, arrays: dict[str, Any]) -> list[str]:
    """What differs from the CPU's result."""
    on_host = {name: x.get() for name, x in arrays.items()}
    found = []
    for i, (got, expected) in enumerate(zip(call(arrays), call(on_host), strict=True)):
        exact = np.asarray(expected, np.float64)
        error = np.abs(got.get().astype(np.float64) - exact).max() / max(1.0, np.abs(exact).max())
        eps = 2.0**-8 if expected.dtype.itemsize == 2 else 2.0**-23
        if not error <= ROUNDINGS * eps:
            found.append(f"result {i} of {call.__name__} is off by {error:.1e}")
    return found


def microseconds(call: Call, problem: Callable[[int], dict[str, Any]]) -> float:
    """Median of a call in a CUDA graph; inputs take turns, so that they come from memory."""
    size = sum(x.nbytes for x in problem(0).values())
    sets = [problem(seed) for seed in range(min(IN_GRAPH, max(4, sets_for(size))))]
    calls = [lambda a=a: call(a) for a in sets] * max(1, IN_GRAPH // len(sets))
    time = 1e3 * milliseconds_in_graph(calls)
    free_memory()
    return time


def section(report: Report, title: str, peers: list[Peer], make: Callable[..., dict[str, Any]], *calls: Call) -> None:
    """A table of these problems; the last figure is of all calls together, as the peers' are."""
    report.add("", f"## {title}")
    for dtype in sorted({peer.problem["dtype"] for peer in peers}):
        small = {**next(peer.problem for peer in peers if peer.problem["dtype"] == dtype), "dtype": dtype}
        sizes = [{"batch": 3, "dim": 264}] if "batch" in small else [{"shape": (2, 40, n)} for n in (2048, 777, 3)]
        for changes in sizes:
            for call in calls:
                for fault in wrong(call, make(**{**small, **changes})):
                    report.fail(f"{title}, {dtype}, {changes}: {fault}")
    report.table("problem", *(f"{call.__name__} us, theirs, ratio (bar)" for call in calls))
    for peer in peers:
        times = [microseconds(call, lambda seed, p=peer.problem: make(**p, seed=seed)) for call in calls]
        until_here = [sum(times[: i + 1]) for i in range(len(times))]
        cells = []
        for time, theirs in zip(until_here, peer.theirs, strict=True):
            missed = "" if theirs / time >= peer.bar else " **missed**"
            cells.append(f"{time:.2f}, {theirs}, {theirs / time:.2f} ({peer.bar}){missed}")
        report.row(", ".join(str(x) for x in peer.problem.values()), *cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the report there as well")
    report = Report(parser.parse_args().out)
    header(report)
    report.add("", f"Copy bandwidth: {copy_bandwidth() / 1e12:.2f} TB/s. The second figure of a convolution is forward")
    report.add("and backward together. Ratios: theirs over ours.")
    section(report, "Convolution", CONVOLUTIONS, convolution, convolve, convolve_back)
    section(report, "Step of the convolution", CONVOLUTION_STEPS, convolution_step, convolve_next)
    section(report, "Step of the scan", SCAN_STEPS, scan_step, scan_next)
    missed = sum("**missed**" in line for line in report.lines)
    report.add("", f"Rows with a bar that was missed: {missed}.")
    for failure in report.failures:
        report.add(f"- {failure}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
