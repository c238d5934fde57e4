"""The functions of VMamba's extension module ``selective_scan_cuda_core``: a scan without a gate."""

from __future__ import annotations

from typing import Any

import torch

from sscan.compat import selective_scan_cuda


def fwd(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, delta_bias: Any, delta_softplus: bool, nrows: int
) -> list[Any]:
    """``[out, x]``, see :func:`sscan.compat.selective_scan_cuda.fwd`; ``nrows`` was for the kernel's speed."""
    return selective_scan_cuda.fwd(u, delta, A, B, C, D, None, delta_bias, delta_softplus)


def bwd(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, delta_bias: Any, dout: Any, x: Any, delta_softplus: bool,
    nrows: int,
) -> list[Any]:  # fmt: skip
    """``[du, ddelta, dA, dB, dC, dD, ddelta_bias]``, each in the dtype of its argument; dout may be of a wider one."""
    wide = torch.promote_types(u.dtype, dout.dtype)
    waves = [t.to(wide) if t.ndim > 2 else t for t in (u, delta, B, C)]
    u_, delta_, B_, C_ = waves
    gradients = selective_scan_cuda.bwd(
        u_, delta_, A, B_, C_, D, None, delta_bias, dout.to(wide), x, None, None, delta_softplus, False
    )
    arguments = (u, delta, A, B, C, D, delta_bias)
    return [g if g is None else g.to(t.dtype) for g, t in zip(gradients, arguments, strict=True)]
