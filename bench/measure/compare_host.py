"""Measure what a call costs the host, on CuPy arrays and from PyTorch, beside a bare ``autograd.Function``.

    python bench/measure/compare_host.py [--out bench/results/host-DATE.md] [--profile]

Tiny problems, on which the host takes longer than the GPU; and the Mamba module, eager, under bfloat16 autocast, with
the memory that it keeps and needs. Calls are made once before, so that nothing is compiled, and results are compared
with the CPU's before they are timed. Exit code 1 if one is wrong; bars that are missed are listed.
"""

import argparse
import cProfile
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy
import torch
from compare_gpu import Report, header, in_torch
from gpu_problems import scan_problem, update_problem
from gpu_timing import host_microseconds

import sscan
import sscan.torch
from sscan import nn

Run = Callable[[], Any]
SHAPE = (1, 64, 32)


class Bare(torch.autograd.Function):  # type: ignore[misc]
    """As many tensors as the scan, and nothing but memory for the results: what no op in Python can do without."""

    @staticmethod
    def forward(ctx: Any, u: Any, *inputs: Any) -> Any:
        ctx.save_for_backward(u, *inputs)
        return torch.empty_like(u)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def leaves_of(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.requires_grad_() if isinstance(x, torch.Tensor) else x for name, x in in_torch(arguments).items()}


def both_ways(forward: Run, leaves: list[Any], dy: Any) -> Run:
    return lambda: torch.autograd.grad(forward(), leaves, dy)


def calls() -> dict[str, tuple[Run, float]]:
    """Calls, and their bars in microseconds or, below 10, in times of the bare Function's."""
    scan, step = scan_problem(SHAPE), update_problem(1, 64, "float32")
    leaves, tensors, next_one = leaves_of(scan), in_torch(scan), in_torch(step)
    given = [leaves["u"], *(x for name, x in leaves.items() if name not in ("u", "delta_softplus"))]
    dy = torch.ones_like(tensors["u"])
    x, weight, bias = (torch.randn(size, device="cuda", requires_grad=True) for size in ((1, 64, 32), (64, 4), (64,)))
    state = torch.zeros(1, 64, 4, device="cuda")
    rows, scale = torch.randn(8, 64, device="cuda", requires_grad=True), torch.ones(64, device="cuda")
    u, d = cupy.asarray(dy), cupy.ones((64, 4), "float32")
    return {
        "bare Function, forward": (lambda: Bare.apply(*given), 0),
        "bare Function, forward and backward": (both_ways(lambda: Bare.apply(*given), given, dy), 0),
        "selective_scan, CuPy": (lambda: sscan.selective_scan(**scan), 15),
        "selective_scan, PyTorch, not recorded": (lambda: sscan.torch.selective_scan(**tensors), 0),
        "selective_scan, PyTorch, forward": (lambda: sscan.torch.selective_scan(**leaves), 2.5),
        "selective_scan, PyTorch, forward and backward": (
            both_ways(lambda: sscan.torch.selective_scan(**leaves), given, dy), 1.4,
        ),
        "selective_state_update, CuPy": (lambda: sscan.selective_state_update(**step), 0),
        "selective_state_update, PyTorch": (lambda: sscan.torch.selective_state_update(**next_one), 0),
        "causal_conv1d, CuPy": (lambda: sscan.causal_conv1d(u, d, None, "silu"), 0),
        "causal_conv1d, PyTorch, forward": (lambda: sscan.torch.causal_conv1d(x, weight, bias, "silu"), 0),
        "causal_conv1d, PyTorch, forward and backward": (
            both_ways(lambda: sscan.torch.causal_conv1d(x, weight, bias, "silu"), [x, weight, bias], dy), 0,
        ),
        "causal_conv1d_update, PyTorch": (
            torch.no_grad()(lambda: sscan.torch.causal_conv1d_update(dy[..., 0], state, weight, bias, "silu")), 0,
        ),
        "rms_norm, PyTorch, forward and backward": (
            both_ways(lambda: sscan.torch.rms_norm(rows, scale), [rows], torch.ones_like(rows)), 0,
        ),
    }  # fmt: skip


def wrong() -> list[str]:
    """What differs from the CPU's results when calls are repeated, with other values in other memory."""
    found = []
    for seed in (1, 2, 3):
        problem = scan_problem(SHAPE, seed=seed)
        host = {k: x.get() if isinstance(x, cupy.ndarray) else x for k, x in problem.items()}
        exact = torch.from_numpy(sscan.selective_scan(**host))
        leaves = leaves_of(problem)
        got = {
            "CuPy": torch.from_dlpack(sscan.selective_scan(**problem)), "PyTorch": sscan.torch.selective_scan(**leaves)
        }  # fmt: skip
        for library, y in got.items():
            if not torch.allclose(y.detach().cpu(), exact, rtol=1e-4, atol=1e-5):
                found.append(f"selective_scan of {library} arrays, call {seed}")
    return found


def profile(name: str, run: Run) -> None:
    with cProfile.Profile() as seen:
        for _ in range(500):
            run()
    torch.cuda.synchronize()
    print(f"--- {name}, of 500 calls")
    pstats.Stats(seen).sort_stats("tottime").print_stats(22)


def tiny(report: Report, profiled: bool) -> None:
    report.add("", "## One call on tiny arrays, microseconds of the host")
    report.table("call", "us", "bar")
    bare: dict[bool, float] = {}
    for name, (run, bar) in calls().items():
        taken = host_microseconds(run)
        if name.startswith("bare"):
            bare["backward" in name] = taken
        limit = bar if bar > 10 else bar * bare["backward" in name] if bar else 0
        verdict = f"{limit:.1f}{' **missed**' if taken > limit else ''}" if bar else ""
        report.row(name, f"{taken:.1f}", verdict)
        if profiled:
            profile(name, run)


# --- The module -------------------------------------------------------------------------------------------------------

MODULES = {
    (768, 8): (2.4, 3.62),
    (768, 1): (1.5, 3.03),
    (2560, 8): (0, 14.05),
}  # (d_model, batch): bar, mamba_ssm's, ms
LENGTH = 2048


def eager_milliseconds(
    run: Run, wait: Callable[[Any], Any] = lambda _: torch.cuda.synchronize(), repeats: int = 9, calls: int = 10
) -> float:
    """Of one of several calls in a row; ``wait`` waits for the result of the last one."""
    for _ in range(5):
        wait(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls - 1):
            run()
        wait(run())
        times.append(1e3 * (time.perf_counter() - start) / calls)
    return statistics.median(times)


def module(d_model: int, batch: int, fast: bool) -> tuple[Run, Run]:
    torch.manual_seed(0)
    mamba = sscan.torch.Mamba(d_model, use_fast_path=fast, device="cuda")
    x = torch.randn(batch, LENGTH, d_model, device="cuda", requires_grad=True)
    dy = torch.randn_like(x, dtype=torch.bfloat16)
    inputs = [x, *mamba.parameters()]

    def forward() -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            return mamba(x)

    return forward, lambda: torch.autograd.grad(forward(), inputs, dy)


def memory_of(forward: Run, both: Run) -> tuple[float, float]:
    """Megabytes kept for the backward, and at most in use beyond what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = forward()
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    del y
    torch.cuda.reset_peak_memory_stats()
    both()
    return kept / 1e6, (torch.cuda.max_memory_allocated() - before) / 1e6


def modules(report: Report, profiled: bool) -> None:
    report.add("", f"## sscan.torch.Mamba, length {LENGTH}, bfloat16 autocast, eager, milliseconds")
    report.table("d_model, batch", "way", "forward", "forward and backward", "bar", "mamba_ssm", "kept MB", "peak MB")
    for (d_model, batch), (bar, theirs) in MODULES.items():
        for fast in (True, False):
            forward, both = module(d_model, batch, fast)
            taken = eager_milliseconds(both)
            verdict = f"{bar}{' **missed**' if taken > bar else ''}" if bar else ""
            kept, peak = memory_of(forward, both)
            report.row(
                f"{d_model}, {batch}", "fast" if fast else "parts", f"{eager_milliseconds(forward):.3f}",
                f"{taken:.3f}", verdict, theirs, f"{kept:.0f}", f"{peak:.0f}",
            )  # fmt: skip
            if profiled and batch == 1:
                profile(f"Mamba, {d_model}, {batch}, fast {fast}", both)


def steps(report: Report, profiled: bool) -> None:
    report.add("", "## sscan.torch.Mamba.step, eager, microseconds (bar 250; mamba_ssm 358)")
    report.table("d_model, batch, dtype", "us")
    for d_model, batch, dtype in ((768, 1, "bfloat16"), (768, 64, "bfloat16"), (768, 1, "float32")):
        mamba = sscan.torch.Mamba(d_model, device="cuda", dtype=getattr(torch, dtype))
        states = mamba.allocate_inference_cache(batch, 1)
        x = torch.randn(batch, 1, d_model, device="cuda", dtype=getattr(torch, dtype))
        step = torch.no_grad()(lambda m=mamba, x=x, s=states: m.step(x, *s))
        taken = host_microseconds(step)
        report.row(f"{d_model}, {batch}, {dtype}", f"{taken:.1f}{' **missed**' if taken > 250 else ''}")
        if profiled and batch == 1:
            profile(f"step, {dtype}", step)


def without_framework(report: Report) -> None:
    report.add("", "## sscan.nn.Mamba on CuPy, 1 row of 64 steps, float32, microseconds of the host")
    report.table("d_model", "forward", "forward and backward")
    mamba = nn.Mamba(64, seed=0)
    mamba.to(cupy)
    x = nn.Tensor(cupy.ones((1, 64, 64), "float32"), requires_grad=True)

    def both() -> None:
        mamba(x).sum().backward()

    report.row(64, f"{host_microseconds(lambda: mamba(x), 50):.1f}", f"{host_microseconds(both, 50):.1f}")


def with_jax(report: Report) -> None:
    """Compiled calls, each handed over before the one before is computed; what one costs that only multiplies, too."""
    import jax

    import sscan.jax

    given = {name: x.get() if isinstance(x, cupy.ndarray) else x for name, x in scan_problem(SHAPE).items()}
    arrays = {name: jax.numpy.asarray(x) for name, x in given.items() if not isinstance(x, bool)}
    options = {name: x for name, x in given.items() if isinstance(x, bool)}

    def scan(arrays: Any) -> Any:
        return sscan.jax.selective_scan(**arrays, **options)

    calls = {
        "a product": jax.jit(lambda arrays: 2 * arrays["u"]), "selective_scan, forward": jax.jit(scan),
        "selective_scan, forward and backward": jax.jit(jax.grad(lambda arrays: scan(arrays).sum())),
    }  # fmt: skip
    exact = sscan.selective_scan(**given)
    if not abs(calls["selective_scan, forward"](arrays) - exact).max() < 1e-4:
        report.fail("selective_scan of JAX arrays is off")
    report.add("", "## sscan.jax, the same tiny scan, compiled, microseconds of the host")
    report.table("call", "us")
    for name, call in calls.items():
        report.row(name, f"{1e3 * eager_milliseconds(lambda call=call: call(arrays), jax.block_until_ready):.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the report there as well")
    parser.add_argument("--profile", action="store_true", help="print what each call spends its time on")
    options = parser.parse_args()
    report = Report(options.out)
    header(report)
    for fault in wrong():
        report.fail(fault)
    tiny(report, options.profile)
    steps(report, options.profile)
    modules(report, options.profile)
    without_framework(report)
    with_jax(report)
    missed = sum("**missed**" in line for line in report.lines)
    report.add("", f"Rows with a bar that was missed: {missed}.")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
