"""What torch.library costs: sscan.torch.selective_scan beside a bare autograd.Function on the same kernels.

The last line is beside the core's function, which knows nothing of gradients.

Host time per call, in microseconds, at a size where the kernels' work does not count. On the CPU, or with
`--device cuda` on a GPU: `python bench/measure/bench_torch_overhead.py`.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

import torch

import sscan
import sscan.torch

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS, ROUNDS = 50, 100


class Bare(torch.autograd.Function):
    """The least that a selective scan with gradients can cost in Python."""

    @staticmethod
    def forward(ctx: Any, u: Any, delta: Any, A: Any, B: Any, C: Any) -> Any:
        y, _, checkpoints = sscan.selective_scan_forward(u, delta, A, B, C, delta_softplus=True)
        ctx.save_for_backward(u, delta, A, B, C, checkpoints)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        u, delta, A, B, C, checkpoints = ctx.saved_tensors
        found = sscan.selective_scan_backward(dy, u, delta, A, B, C, delta_softplus=True, checkpoints=checkpoints)
        return found[:5]


def microseconds(*functions: Callable[[], Any], synchronize: Callable[[], Any]) -> list[float]:
    """The least over rounds of each function's time per call; they take turns."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for function, found in zip(functions, times, strict=True):
            synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                function()
            found.append((time.perf_counter() - start) / CALLS * 1e6)
            synchronize()
    return [min(found) for found in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    torch.manual_seed(0)
    u, delta = torch.randn(2, 1, 8, 16, device=device)
    B, C = torch.randn(2, 1, 4, 16, device=device)
    A, dy = -torch.rand(8, 4, device=device), torch.randn(1, 8, 16, device=device)
    inputs = (u, delta, A, B, C)
    leaves = [x.clone().requires_grad_() for x in inputs]

    def ours(*inputs: Any) -> Any:
        return sscan.torch.selective_scan(*inputs, delta_softplus=True)

    def core() -> None:
        sscan.selective_scan(*inputs, delta_softplus=True)

    def step(op: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(op(*leaves), leaves, dy)

    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    pairs = {
        "forward, no gradient": (lambda: Bare.apply(*inputs), lambda: ours(*inputs)),
        "forward, recorded": (lambda: Bare.apply(*leaves), lambda: ours(*leaves)),
        "forward + backward": (step(Bare.apply), step(ours)),
        "beside sscan's": (core, lambda: ours(*inputs)),
    }
    for name, (bare, library) in pairs.items():
        bare(), library()
        least, taken = microseconds(bare, library, synchronize=synchronize)
        print(f"{name:22} bare {least:7.1f} us   sscan.torch {taken:7.1f} us   ratio {taken / least:.2f}")


if __name__ == "__main__":
    main()
