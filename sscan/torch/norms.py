"""Norms as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sscan.torch.ops import rms_norm


class RMSNorm(nn.Module):  # type: ignore[misc]
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def __init__(self, width: int, eps: float = 1e-5, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Any, residual: Any = None) -> Any:
        """The normalised x; with a residual (the normalised sum, the sum), added and kept in float32 (float64)."""
        return rms_norm(x, self.weight, residual, self.eps)
