"""Measure sscan on a GPU and compare it with the bars, the card's copy bandwidth, PyTorch and mamba_ssm, in one run.

    python bench/measure/compare_gpu.py --out bench/results/cuda-DATE.md [--only scans,ops,...]

Every section checks results before it times. Exit code 1 if a check fails or a section cannot be run.
"""

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import cupy
import gpu_peers
import numpy as np
from accuracy import error, exact, results
from gpu_problems import call_of, cotangent, on_host, ops, scan_problem, size_of, update_call, update_problem
from gpu_timing import (
    IN_A_ROW,
    REPEATS,
    copy_bandwidth,
    free_memory,
    host_microseconds,
    milliseconds,
    milliseconds_in_graph,
    peak_memory,
    poisoned_memory,
    sets_for,
)

import sscan
from sscan import reference
from sscan.cuda import _launch
from sscan.tasks.task import RunOptions
from sscan.tasks.text import Text
from sscan.tasks.training import TrainingRun

Shape = tuple[int, int, int]


class Bar(NamedTuple):
    """Picoseconds per point by (forward, backward), and what mamba_ssm took for the same, in one dtype."""

    forward: float
    backward: float
    mamba_forward: float
    mamba_backward: float


BARS: dict[Shape, dict[str, Bar]] = {
    (8, 5120, 2048): {"float32": Bar(6.8, 24, 34.0, 78.5), "bfloat16": Bar(6.6, 24, 17.2, 67.1)},
    (64, 1536, 512): {"float32": Bar(6.8, 24, 35.0, 80.5), "bfloat16": Bar(6.6, 24, 15.8, 62.6)},
    (8, 1536, 2048): {"float32": Bar(8.0, 28, 34.7, 80.8), "bfloat16": Bar(8.0, 28, 17.6, 69.0)},
    (1, 5120, 8192): {"float32": Bar(12.5, 37, 38.0, 86), "bfloat16": Bar(12.5, 37, 21.1, 77)},
    (1, 1536, 2048): {"float32": Bar(16, 44, 38.7, 96), "bfloat16": Bar(16, 44, 18.7, 93)},
    (1, 64, 1048576): {"float32": Bar(13.5, 37, 176, 354), "bfloat16": Bar(13.5, 37, 148, 345)},
}
REPORTED: Shape = (8, 1536, 2048)  # float64, complex64
UNFUSED: Shape = (8, 1536, 512)
HOST_BAR = 25  # microseconds
ROUNDINGS = 64  # by which results may differ beyond three times the error of the plain reference
CHECKED_LENGTH = 8192  # the reference walks through time in Python: longer results are left to tests/gpu


class Report:
    """Lines that are printed and written as they come, and what went wrong."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.lines, self.failures = path, list[str](), list[str]()

    def add(self, *lines: str) -> None:
        print("\n".join(lines), flush=True)
        self.lines += lines
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("\n".join(self.lines) + "\n", encoding="utf-8")

    def table(self, *columns: str) -> None:
        self.add("", "| " + " | ".join(columns) + " |", "| --- |" + " --- |" * (len(columns) - 1))

    def row(self, *cells: Any) -> None:
        self.add("| " + " | ".join(str(cell) for cell in cells) + " |")

    def fail(self, message: str) -> None:
        self.failures.append(message)
        self.add("", f"FAILED: {message}")


# --- About the machine ------------------------------------------------------------------------------------------------


def version_of(*packages: str) -> str:
    """The version of the first of these that is installed."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "absent"


def smi(fields: str) -> str:
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as failure:
        return f"unknown ({type(failure).__name__})"


def clocks_while_busy() -> str:
    """Of the multiprocessors and the memory, while a second of copies runs."""
    source, target = cupy.full(4 * 10**9, 1, cupy.uint8), cupy.empty(4 * 10**9, cupy.uint8)
    for _ in range(600):  # the launch queue holds about 1000
        target.data.copy_from_device_async(source.data, source.nbytes)
    clocks = smi("clocks.sm,clocks.mem,clocks.max.sm,power.draw")
    cupy.cuda.Device().synchronize()
    return clocks


def header(report: Report) -> None:
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    versions = {
        "Python": platform.python_version(), "sscan": sscan.__version__, "NumPy": np.__version__,
        "CuPy": cupy.__version__, "numba-cuda": version_of("numba-cuda"),
        "NVVM": version_of("nvidia-nvvm", "nvidia-cuda-nvvm", "nvidia-cuda-nvcc"),
        "nvJitLink": version_of("nvidia-nvjitlink"), "torch": version_of("torch"),
        "mamba_ssm": version_of("mamba-ssm"),
    }  # fmt: skip
    driver = cupy.cuda.runtime.driverGetVersion()
    report.add(
        f"# {datetime.now(timezone.utc):%Y-%m-%d}, {properties['name'].decode()}", "",
        f"Driver {smi('driver_version')} (CUDA {driver // 1000}.{driver % 1000 // 10}), "
        f"{properties['multiProcessorCount']} multiprocessors; SM clock, memory clock, highest SM clock and power "
        f"while copying: {clocks_while_busy()}.", "",
        ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; kernels {_launch.cache_folder().name.removeprefix('cuda-')}.", "",
        f"Medians of {REPEATS} times of {IN_A_ROW} calls in a row by CUDA events; inputs that would fit into the L2 "
        "cache are taken in turn from several sets.",
    )  # fmt: skip


# --- Correctness ------------------------------------------------------------------------------------------------------


def forward_and_backward(problem: dict[str, Any], dy: Any) -> dict[str, Any]:
    """y and all gradients, in memory that was NaN before."""
    with poisoned_memory():
        y, last_state, checkpoints = sscan.selective_scan_forward(**problem)
        gradients = sscan.selective_scan_backward(dy, **problem, checkpoints=checkpoints)
    made = {"y": y, "last_state": last_state, **gradients._asdict()}
    return {name: x for name, x in made.items() if x is not None}


def errors(got: dict[str, Any], problem: dict[str, Any], dy: Any) -> list[str]:
    """What is wrong with results, by the reference in float64 and its own errors in the problem's dtypes."""
    wide = exact({**problem, "dy": dy})
    expected = results(reference, {k: x for k, x in wide.items() if k != "dy"}, wide["dy"])
    plain = results(reference, problem, dy)
    wrong = []
    for name, x in got.items():
        found, allowed = error(x, expected[name]), 3 * error(plain[name], expected[name]) + ROUNDINGS
        if not found <= allowed:
            wrong.append(f"{name} off by {found:.0f} eps, allowed {allowed:.0f}")
    return wrong


def check_small(dtype: str, is_complex: bool = False) -> list[str]:
    wrong = []
    for shape in ((2, 96, 200), (1, 33, 1001)):
        problem = scan_problem(shape, dtype, is_complex=is_complex)
        dy = cotangent(problem)
        got = on_host(forward_and_backward(problem, dy))
        wrong += [f"{shape} {dtype}: {line}" for line in errors(got, on_host(problem), dy.get())]
    return wrong


def check_channels(shape: Shape, dtype: str) -> list[str]:
    """Three channels of the full size, of which B's and C's gradients, sums over all channels, are not checked."""
    problem = scan_problem(shape, dtype)
    dy, channels = cotangent(problem), [0, shape[1] // 2, shape[1] - 1]
    got = forward_and_backward(problem, dy)
    unfinished = [name for name, x in got.items() if not bool(cupy.isfinite(x.astype(cupy.float32)).all())]
    if unfinished:
        return [f"{shape} {dtype}: {', '.join(unfinished)} not finite"]

    def part(values: dict[str, Any]) -> dict[str, Any]:
        waves = {"u", "delta", "z", "y", "last_state", "du", "ddelta", "dz"}
        parameters = {"A", "D", "delta_bias", "dA", "dD", "ddelta_bias"}
        kept = {name: x[:, channels] for name, x in values.items() if name in waves}
        kept |= {name: x[channels] for name, x in values.items() if name in parameters}
        return kept

    some = on_host({**{k: x for k, x in problem.items() if k in ("B", "C", "delta_softplus")}, **part(problem)})
    return [f"{shape} {dtype}: {line}" for line in errors(on_host(part(got)), some, dy[:, channels].get())]


def checks(report: Report) -> None:
    wrong = [line for dtype in ("float32", "bfloat16", "float64") for line in check_small(dtype)]
    wrong += check_small("float32", is_complex=True)
    for shape in BARS:
        if shape[2] <= CHECKED_LENGTH:
            for dtype in ("float32", "bfloat16"):
                wrong += check_channels(shape, dtype)
                free_memory()
    for line in wrong:
        report.fail(line)
    if not wrong:
        report.add("", "Results and gradients agree with the reference in float64, in memory that was NaN before.")


# --- The selective scan -----------------------------------------------------------------------------------------------


class Times(NamedTuple):
    """Picoseconds per (batch, dim, time) point."""

    forward: float
    keeping: float  # forward with checkpoints
    backward: float


def scan_times(shape: Shape, dtype: str, is_complex: bool = False) -> Times:
    first = scan_problem(shape, dtype, is_complex=is_complex)
    sets = [first, *(scan_problem(shape, dtype, seed, is_complex) for seed in range(1, sets_for(size_of(first))))]
    dys = [cotangent(problem) for problem in sets]
    kept = [sscan.selective_scan_forward(**problem)[2] for problem in sets]

    def backward(i: int) -> Callable[[], Any]:
        return lambda: sscan.selective_scan_backward(dys[i], **sets[i], checkpoints=kept[i])

    calls = (
        [lambda p=p: sscan.selective_scan(**p) for p in sets],
        [lambda p=p: sscan.selective_scan_forward(**p) for p in sets],
        [backward(i) for i in range(len(sets))],
    )
    points = shape[0] * shape[1] * shape[2]
    return Times(*(1e9 * milliseconds(each) / points for each in calls))


def scans(report: Report) -> None:
    mamba = gpu_peers.mamba_ssm()
    report.add(
        "",
        "## Selective scan: picoseconds per point",
        "",
        "N = 16, with D, z, bias and softplus. In brackets: the bar.",
    )
    here = ("mamba_ssm here, forward / backward",) if mamba else ()
    report.table("(batch, dim, length)", "dtype", "forward", "with checkpoints", "backward given them",
                 "published mamba_ssm, forward / backward", *here)  # fmt: skip
    for shape, bars in BARS.items():
        for dtype, bar in bars.items():
            times = scan_times(shape, dtype)
            free_memory()
            also = (mamba_times(mamba, shape, dtype),) if mamba else ()
            forward, backward = (
                f"{taken:.2f} ({limit}){' **missed**' if taken > limit else ''}"
                for taken, limit in ((times.forward, bar.forward), (times.backward, bar.backward))
            )
            report.row(
                shape, dtype, forward, f"{times.keeping:.2f}", backward,
                f"{bar.mamba_forward} / {bar.mamba_backward}", *also,
            )  # fmt: skip
    for name, dtype, is_complex in (("float64", "float64", False), ("complex64 A", "float32", True)):
        times = scan_times(REPORTED, dtype, is_complex)
        report.row(REPORTED, name, f"{times.forward:.2f}", f"{times.keeping:.2f}", f"{times.backward:.2f}",
                   "-", *("-" for _ in here))  # fmt: skip
        free_memory()


def mamba_times(mamba: Callable[[Any], gpu_peers.Pair], shape: Shape, dtype: str) -> str:
    import torch

    forward, backward = mamba(scan_problem(shape, dtype))
    points = shape[0] * shape[1] * shape[2]
    cell = " / ".join(f"{1e9 * milliseconds([call]) / points:.1f}" for call in (forward, backward))
    del forward, backward
    free_memory()
    torch.cuda.empty_cache()
    return cell


def unfused(report: Report) -> None:
    import torch

    problem = scan_problem(UNFUSED)
    forward, backward = gpu_peers.torch_unfused(problem)
    dy = cotangent(problem)
    y, made = forward().cpu().numpy(), sscan.selective_scan_backward(dy, **problem)
    if not np.abs(y - sscan.selective_scan(**problem).get()).max() <= 1e-3 * np.abs(y).max():
        report.fail(f"y differs from PyTorch's at {UNFUSED}")
    for name, gradient in backward().items():
        expected, got = gradient.cpu().numpy(), getattr(made, f"d{name}").get()
        if not np.abs(got - expected).max() <= 1e-3 * max(1.0, np.abs(expected).max()):
            report.fail(f"d{name} differs from PyTorch's at {UNFUSED}")
    times = [milliseconds([call], repeats=7, in_a_row=1) for call in (forward, backward)]
    del forward, backward
    torch.cuda.empty_cache()
    ours, points = scan_times(UNFUSED, "float32"), UNFUSED[0] * UNFUSED[1] * UNFUSED[2]
    report.add(
        "",
        "## PyTorch's unfused scan",
        "",
        f"All decays in memory, a loop over time; {UNFUSED}, float32. 7 times of 1 call.",
    )
    report.table("ps per point", "forward", "backward")
    report.row("torch", *(f"{1e9 * t / points:.0f}" for t in times))
    report.row("sscan", f"{ours.forward:.2f}", f"{ours.backward:.2f}")


# --- The other ops ----------------------------------------------------------------------------------------------------


def check_ops() -> list[str]:
    """Each op on the GPU against the same call on the CPU in float64, at a small shape."""
    normal = np.random.default_rng(0).standard_normal
    x, w, b = normal((2, 8, 130), np.float32), normal((8, 4), np.float32), normal(8, np.float32)
    decay = 1 / (1 + np.exp(-x))
    A = -np.tile(np.arange(1, 17, dtype=np.float32), (8, 1))
    B = normal((2, 16, 130), np.float32)
    step = {name: normal((4, 8), np.float32) for name in ("x", "dt", "z")}
    step |= {"state": normal((4, 8, 16), np.float32), **{n: normal((4, 16), np.float32) for n in "BC"}}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("causal_conv1d", {"x": x, "weight": w, "bias": b, "activation": "silu"}),
        ("causal_conv1d_backward", {"dy": x[::-1].copy(), "x": x, "weight": w, "bias": b, "activation": "silu"}),
        ("rms_norm", {"x": x, "weight": x[0, 0], "residual": decay}),
        ("rms_norm_backward", {"dy": decay, "x": x, "weight": x[0, 0], "residual": decay, "dresidual_out": x}),
        ("linear_scan", {"a": decay, "b": x}),
        ("linear_scan_backward", {"dh": x, "a": decay, "h": x}),
        ("discretize", {"delta": decay, "A": A, "B": B, "method": "zoh"}),
        ("selective_state_update", {**step, "A": A, "D": b, "dt_bias": b, "dt_softplus": True}),
    ]
    wrong = []
    for op, arguments in cases:
        there = {k: cupy.asarray(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
        expected = getattr(reference, op)(**exact(arguments))
        with poisoned_memory():
            got = getattr(sscan, op)(**there)
        pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else ((got, expected),)
        for i, (one, other) in enumerate(pairs):
            if one is not None and not error(one.get(), np.asarray(other)) <= ROUNDINGS:
                wrong.append(f"{op}: result {i} differs")
    return wrong


def others(report: Report, bandwidth: float) -> None:
    for line in check_ops():
        report.fail(line)

    def cells(calls: list[Any]) -> tuple[str, str]:
        """Milliseconds, and bytes per second with their share of the copy bandwidth."""
        took = milliseconds([call.run for call in calls])
        rate = calls[0].bytes / (1e-3 * took)
        return f"{took:.3f}", f"{rate / 1e9:.0f} ({100 * rate / bandwidth:.0f} %)"

    report.add("", "## Other ops: bytes that must be moved over time", "",
               f"In brackets the share of the copy bandwidth, {bandwidth / 1e9:.0f} GB/s.")  # fmt: skip
    report.table("op", "forward, ms", "GB/s", "backward, ms", "GB/s")
    for dtype in ("float32", "bfloat16"):
        for op in ops(dtype):
            forward, backward = op.make(0)
            more = [op.make(seed) for seed in range(1, sets_for(forward.bytes))]
            backwards = [] if backward is None else [backward, *(pair[1] for pair in more)]
            columns = (*cells([forward, *(pair[0] for pair in more)]), *(cells(backwards) if backwards else ("-", "-")))
            report.row(op.name, *columns)
            del forward, backward, more, backwards
            free_memory()


def decoding(report: Report, bandwidth: float) -> None:
    layers = 64
    report.add("", "## Decoding: selective_state_update, microseconds per step of a layer", "",
               f"dim 5120, N = 16, states in float32; {layers} layers' states and weights in turn. In a CUDA graph of "
               "all layers the host does not count.")  # fmt: skip
    report.table("batch", "dtype", "called one by one", "in a graph", "GB/s in a graph")
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 8, 64):
            calls = [update_call(batch, 5120, dtype, seed) for seed in range(layers)]
            one_by_one = 1e3 * milliseconds([call.run for call in calls], in_a_row=layers)
            graphed = 1e3 * milliseconds_in_graph([call.run for call in calls])
            rate = calls[0].bytes / (1e-6 * graphed)
            report.row(batch, dtype, f"{one_by_one:.2f}", f"{graphed:.2f}",
                       f"{rate / 1e9:.0f} ({100 * rate / bandwidth:.0f} %)")  # fmt: skip
            del calls
            free_memory()


# --- Memory, host, training -------------------------------------------------------------------------------------------


def memory(report: Report) -> None:
    report.add("", "## Memory beyond the inputs, as a multiple of them", "",
               "Forward and backward, results and checkpoints included; dy is not one of the inputs.")  # fmt: skip
    report.table("(batch, dim, length)", "dtype", "peak", "of it results", "peak of a forward alone")
    for shape in ((8, 5120, 2048), (8, 1536, 2048), (1, 64, 1048576)):
        for dtype in ("float32", "bfloat16"):
            problem = scan_problem(shape, dtype)
            dy, size = cotangent(problem), size_of(problem)

            def both(problem: dict[str, Any] = problem, dy: Any = dy) -> Any:
                y, last_state, checkpoints = sscan.selective_scan_forward(**problem)
                return y, last_state, sscan.selective_scan_backward(dy, **problem, checkpoints=checkpoints)

            (most, left), (alone, _) = peak_memory(both), peak_memory(lambda p=problem: sscan.selective_scan(**p))
            report.row(shape, dtype, f"{most / size:.2f}", f"{left / size:.2f}", f"{alone / size:.2f}")
            del problem, dy, both
            free_memory()


def host(report: Report) -> None:
    report.add("", "## Host time per call on warm arrays, microseconds", "",
               f"Tiny shapes; the bar for selective_scan on CuPy arrays is {HOST_BAR}.")  # fmt: skip
    report.table("call", "CuPy", "PyTorch")
    scan, step = scan_problem((1, 64, 32)), update_problem(1, 64, "float32")
    for op, arguments in (("selective_scan", scan), ("selective_state_update", step)):
        report.row(
            op, *(f"{host_microseconds(call_of(op, given).run):.1f}" for given in (arguments, in_torch(arguments)))
        )


def in_torch(arguments: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {k: torch.from_dlpack(x).clone() if isinstance(x, cupy.ndarray) else x for k, x in arguments.items()}


# What is trained, and the bar of a step in milliseconds: the model of `sscan train` as it comes, and wider ones, which
# must not take longer in bfloat16 than in float32.
TRAINED: dict[str, tuple[dict[str, Any], float | None]] = {
    "sscan train": ({}, 2.0),
    "256": ({"d_model": 256, "n_layer": 4, "length": 1024, "batch": 8, "lr": 2e-3}, None),
    "768": ({"d_model": 768, "n_layer": 4, "length": 1024, "batch": 8, "lr": 1e-3}, None),
}


def training(report: Report) -> None:
    """Steps of `sscan train`, CUDA graphs, beside the same steps called from Python."""
    report.add("", "## Training step of the language model, bytes; AdamW, forward, backward and update, loss read")
    report.table(
        "model", "precision", "ms, as a graph", "ms, called", "bar", "tokens per second", "loss after 23 steps"
    )
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("the rain it raineth every day, and the wind and the rain.\n" * 4000, encoding="utf-8")
        for name, (changes, bar) in TRAINED.items():
            taken: dict[str, float] = {}
            for precision in ("float32", "bfloat16"):
                task = Text(RunOptions(**{**changes, "steps": 1000, "precision": precision}), [text])
                (taken[precision], losses), (called, expected) = (steps_of(task, graph) for graph in (True, False))
                limit = bar or (taken["float32"] if name == "768" else None)
                verdict = f"{limit:.2f}{' **missed**' if taken[precision] > limit else ''}" if limit else ""
                rate = task.options.batch * task.options.length / taken[precision]
                report.row(
                    name, precision, f"{taken[precision]:.2f}", f"{called:.2f}", verdict, f"{1e3 * rate:.0f}",
                    f"{task.in_unit(losses[-1]):.3f}",
                )  # fmt: skip
                if losses != expected:
                    report.fail(f"training {name} in {precision}: other losses as a graph")
                if not losses[-1] < losses[0]:
                    report.fail(f"training {name} in {precision} does not learn")


def steps_of(task: Any, graph: bool) -> tuple[float, list[float]]:
    """Milliseconds of a step and the losses of 23."""
    run = TrainingRun(task, cupy)
    if not graph:
        run._captured = run._update
    run.warm_up()
    times = []
    for _ in range(23):
        start = time.perf_counter()
        run.step()  # reads the loss, so it waits for the GPU
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times[3:])), run.losses


# ----------------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the Markdown file here")
    parser.add_argument(
        "--only", help="sections, separated by commas: checks,scans,ops,decoding,memory,host,training,torch"
    )
    given = parser.parse_args()
    report, start = Report(given.out), time.perf_counter()
    header(report)
    bandwidth = copy_bandwidth()
    free_memory()
    report.add("", f"Copy bandwidth: {bandwidth / 1e9:.0f} GB/s, read and written (2 GB on the device).")
    sections: dict[str, Callable[[], None]] = {
        "checks": lambda: checks(report), "scans": lambda: scans(report), "ops": lambda: others(report, bandwidth),
        "decoding": lambda: decoding(report, bandwidth), "memory": lambda: memory(report),
        "host": lambda: host(report), "torch": lambda: unfused(report), "training": lambda: training(report),
    }  # fmt: skip
    chosen = given.only.split(",") if given.only else list(sections)
    for name in chosen:
        began = time.perf_counter()
        try:
            sections[name]()
        except Exception as failure:  # the other sections are still worth their time
            traceback.print_exc()
            report.fail(f"{name}: {type(failure).__name__}: {failure}")
        free_memory()
        print(f"({name}: {time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
    took = time.perf_counter() - start
    report.add(
        "", f"{took:.0f} s in all; " + (f"{len(report.failures)} failures." if report.failures else "nothing failed.")
    )
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
