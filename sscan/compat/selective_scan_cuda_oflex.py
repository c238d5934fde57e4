"""The functions of VMamba's extension module ``selective_scan_cuda_oflex``, whose output may be float32."""

from __future__ import annotations

from typing import Any

import torch

from sscan.compat import selective_scan_cuda_core
from sscan.compat.selective_scan_cuda_core import bwd

__all__ = ["bwd", "fwd"]


def fwd(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, delta_bias: Any, delta_softplus: bool, nrows: int,
    out_float: bool,
) -> list[Any]:  # fmt: skip
    """``[out, x]``; with ``out_float`` out is float32, and not rounded before."""
    if out_float:
        wide = torch.promote_types(u.dtype, torch.float32)
        u, delta, B, C = (t.to(wide) if t.ndim > 2 else t for t in (u, delta, B, C))
    return selective_scan_cuda_core.fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows)
