"""One sequence on all GPUs of the host (``sscan.torch.distributed``, NCCL) beside the same on one of them.

    python bench/measure/bench_context_parallel.py [--out FILE.md]

Milliseconds of a call: medians of wall-clock times over several calls in a row, of the slowest rank, the GPUs waited
for at the end; called from Python, and replayed as a CUDA graph, which takes the host's time away. Results and
gradients are checked against those of one GPU first; exit code 1 if they differ by more than rounding. ``--device cpu
--length 4096`` tries it out without a GPU, on two processes and gloo.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import problems
import torch
import torch.distributed as dist
from torch_graph import WAYS

import sscan.torch
from sscan.torch import distributed

if TYPE_CHECKING:
    from collections.abc import Callable

CASES = (
    ((1, 64, 2**20), "float32"), ((1, 64, 2**20), "bfloat16"),  # few channels
    ((1, 1536, 2**20), "bfloat16"),  # those of a model of 130 million parameters
    ((1, 5120, 2**13), "bfloat16"),  # many, and not many steps
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ERRORS = {"float32": 1e-4, "bfloat16": 2e-2}  # relative to the largest number of an array
REPEATS, IN_A_ROW, LONG = 9, 10, 5e-3  # seconds of a call that is not repeated in a row


def problem_of(shape: tuple[int, int, int], dtype: Any, device: Any) -> tuple[dict[str, Any], Any]:
    """The same arguments and gradient of y on every rank."""
    batch, dim, length = shape
    draw = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Any:
        return torch.randn(size, generator=draw, device=device).to(dtype)

    small = problems.scan_problem((1, dim, 1))
    arguments = {name: torch.from_numpy(small[name]).to(device) for name in ("A", "D", "delta_bias")}
    arguments |= {"u": normal(*shape), "delta": 0.5 * normal(*shape), "z": normal(*shape)}
    arguments |= {name: normal(batch, problems.STATE, length) for name in "BC"}
    return {name: x.requires_grad_() for name, x in arguments.items()}, normal(*shape)


def part_of(x: Any, rank: int, size: int) -> Any:
    """The rank's share of an array along time, in memory of its own; anything else as it is."""
    return x.detach().chunk(size, -1)[rank].contiguous().requires_grad_(x.requires_grad) if x.ndim > 2 else x


def forward_and_backward(op: Any, arguments: dict[str, Any], dy: Any) -> dict[str, Any]:
    y = op(**arguments, delta_softplus=True)
    gradients = torch.autograd.grad(y, list(arguments.values()), dy)
    return {"y": y, **{f"d{name}": x for name, x in zip(arguments, gradients, strict=True)}}


def forward(op: Any, arguments: dict[str, Any]) -> Any:
    with torch.no_grad():
        return op(**arguments, delta_softplus=True)


def worst_error(found: dict[str, Any], whole: dict[str, Any], rank: int, size: int) -> float:
    """The largest difference from one device, relative to the largest number of the array, on any rank."""
    errors = []
    for name, x in whole.items():
        x, mine = x.detach(), found[name].detach().clone()
        if x.ndim < 3:  # every rank has its part's share of the gradient
            dist.all_reduce(mine)
        scale = max(1.0, float(x.abs().max()))
        errors.append(float((mine - part_of(x, rank, size)).abs().max()) / scale)
    worst = torch.tensor(max(errors), device=whole["y"].device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


def milliseconds(call: Callable[[], Any], device: Any, *, together: bool) -> float:
    """Median time of a call; of the slowest rank, if all make it together."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times, in_a_row = [], 1
    for number in range(REPEATS + 2):  # two warm up
        if together:
            dist.barrier()
        wait()
        start = time.perf_counter()
        for _ in range(in_a_row):
            call()
        wait()
        taken = torch.tensor((time.perf_counter() - start) / in_a_row, device=device)
        if together:
            dist.all_reduce(taken, dist.ReduceOp.MAX)
        if number == 1:
            in_a_row = IN_A_ROW if float(taken) < LONG else 1
        elif number > 1:
            times.append(1e3 * float(taken))
    return statistics.median(times)


def measured(shape: tuple[int, int, int], dtype: str, device: Any, rank: int, size: int) -> list[str]:
    """Rows of the table, the same on all ranks but for the times of one device, which are the first rank's."""
    arguments, dy = problem_of(shape, DTYPES[dtype], device)
    mine = {name: part_of(x, rank, size) for name, x in arguments.items()}
    my_dy = part_of(dy, rank, size)
    one, all_of_them = sscan.torch.selective_scan, distributed.selective_scan
    error = worst_error(
        forward_and_backward(all_of_them, mine, my_dy), forward_and_backward(one, arguments, dy), rank, size
    )
    if not error <= ERRORS[dtype]:
        raise SystemExit(f"{shape} {dtype}: differs from one device by {error:.2g}")
    calls = {
        "forward": (lambda: forward(one, arguments), lambda: forward(all_of_them, mine)),
        "forward + backward": (
            lambda: forward_and_backward(one, arguments, dy),
            lambda: forward_and_backward(all_of_them, mine, my_dy),
        ),
    }
    rows = []
    for name, (alone, together) in calls.items():
        for way, prepared in WAYS.items():
            if way and device.type != "cuda":
                continue
            single = milliseconds(prepared(alone), device, together=False) if rank == 0 else 0.0
            dist.barrier()
            several = milliseconds(prepared(together), device, together=True)
            rows.append(
                f"| {shape} | {dtype} | {name}{way} | {single:.3f} | {several:.3f} | {single / several:.2f} "
                f"| {error:.1e} |"
            )
    return rows


def run(rank: int, size: int, meeting: str, kind: str, length: int | None, out: Path | None) -> None:
    device, options, backend = torch.device(kind), {}, "gloo"
    if kind == "cuda":
        device, backend = torch.device(kind, rank), "nccl"
        torch.cuda.set_device(device)
        options = {"device_id": device}
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=size, **options)
    where = torch.cuda.get_device_name(device) if kind == "cuda" else "CPU"
    lines = [
        f"One sequence on {size} x {where}, PyTorch {torch.__version__}, {problems.STATE} states, D, z, bias, softplus",
        "",
        f"| (batch, dim, length) | dtype | | one, ms | {size}, ms | speed-up | error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for shape, dtype in CASES if length is None else [((1, 64, length), dtype) for dtype in DTYPES]:
        lines += measured(shape, dtype, device, rank, size)
    if rank == 0:
        print("\n".join(lines))
        if out is not None:
            out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--length", type=int, help="of 64 channels, in place of all shapes")
    given = parser.parse_args()
    size = torch.cuda.device_count() if given.device == "cuda" else 2
    if size < 2:
        print(f"needs two GPUs, found {size}")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, f"file://{folder}/meeting", given.device, given.length, given.out)
        torch.multiprocessing.spawn(run, arguments, nprocs=size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
