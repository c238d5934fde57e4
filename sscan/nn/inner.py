"""The layers that stand inside of the paper's architectures, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sscan.nn.hyena import HyenaFilter
from sscan.nn.s4d import S4D
from sscan.nn.s6 import S6

if TYPE_CHECKING:
    from collections.abc import Mapping

INNER: dict[str, type[S6 | S4D | HyenaFilter]] = {"s6": S6, "s4": S4D, "hyena": HyenaFilter}


def inner_layer(owner: str, inner: str, dim: int, dtype: Any, options: Mapping[str, Any]) -> S6 | S4D | HyenaFilter:
    """The inner layer of an architecture, (batch, dim, length) to the same, without initial values yet."""
    if inner not in INNER:
        raise ValueError(f"{owner}: inner must be one of {', '.join(INNER)}, got {inner!r}")
    return INNER[inner](dim, **options, dtype=dtype, seed=None)
