"""How a block that reads in both directions is made of two that read in one; the same in every framework."""

from __future__ import annotations

from typing import Any

# What the two directions have in common, and how their results become one.
SHARED = ("all", "projections", "nothing")
JOINED = ("sum", "concatenation")


def check_directions(shared: Any, join: Any) -> None:
    """ValueError for what is none of :data:`SHARED` or :data:`JOINED`."""
    for name, value, choices in (("shared", shared, SHARED), ("join", join, JOINED)):
        if value not in choices:
            raise ValueError(
                f"BidirectionalMamba: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
            )
