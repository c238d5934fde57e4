"""What sscan is compared with on a GPU: each makes a forward and a backward function of a problem of CuPy arrays.

The forward gives y; the backward gives the gradients of ``peers.DIFFERENTIABLE`` by autograd, from a y that is kept.
"""

from collections.abc import Callable
from typing import Any

import peers
from gpu_problems import cotangent

Pair = tuple[Callable[[], Any], Callable[[], Any]]


def tensors_of(problem: dict[str, Any]) -> dict[str, Any]:
    """Copies of the arrays as PyTorch tensors that want gradients."""
    import torch

    return {name: torch.from_dlpack(problem[name]).clone().requires_grad_() for name in peers.DIFFERENTIABLE}


def by_autograd(scan: Callable[[dict[str, Any]], Any], problem: dict[str, Any]) -> Pair:
    import torch

    arrays, dy = tensors_of(problem), torch.from_dlpack(cotangent(problem)).clone()
    y, inputs = scan(arrays), [arrays[name] for name in peers.DIFFERENTIABLE]

    def forward() -> Any:
        with torch.no_grad():
            return scan(arrays)

    def backward() -> Any:
        gradients = torch.autograd.grad(y, inputs, dy, retain_graph=True)
        return dict(zip(peers.DIFFERENTIABLE, gradients, strict=True))

    return forward, backward


def torch_unfused(problem: dict[str, Any]) -> Pair:
    """The formula in PyTorch, step by step."""
    return by_autograd(peers.torch_scan, problem)


def mamba_ssm() -> Callable[[dict[str, Any]], Pair] | None:
    """The official CUDA extension, if it is installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None

    def scan(a: dict[str, Any]) -> Any:
        return selective_scan_fn(**a, delta_softplus=True)

    return lambda problem: by_autograd(scan, problem)
