"""Scalar functions of the ops, compiled by every target (and callable as plain Python)."""

import math
from typing import Any

from numba.extending import register_jitable


@register_jitable
def softplus(x: Any) -> Any:
    """log(1 + exp(x)), without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


@register_jitable
def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)), without overflow."""
    e = math.exp(-abs(x))
    return (1.0 if x >= 0 else e) / (1.0 + e)


@register_jitable
def silu(x: Any) -> Any:
    """x sigmoid(x)."""
    return x * sigmoid(x)
