"""Norms as modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn

from sscan.torch.ops import rms_norm

if TYPE_CHECKING:
    from torch import Tensor


class RMSNorm(nn.Module):  # type: ignore[misc]
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def __init__(self, width: int, eps: float = 1e-5, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    @overload
    def forward(self, x: Tensor, residual: None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The normalised x; with a residual (the normalised sum, the sum), added and kept in float32 (float64)."""
        return rms_norm(x, self.weight, residual, self.eps)
