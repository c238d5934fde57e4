"""Checks of what models, optimisers and runs are made of: the first wrong value raises, by its name."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def check_integer(owner: str, name: str, value: Any, least: int = 1) -> None:
    """TypeError unless the value is an integer (a bool is none), ValueError unless it is in [least, 2^63)."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{owner}: {name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {value}")
    if int(value) >= 1 << 63:
        raise ValueError(f"{owner}: {name} must be below 2^63, got more")


def check_number(owner: str, name: str, value: Any, *, positive: bool = False) -> None:
    """TypeError unless the value is a real number, ValueError unless it is finite and at least, or above, zero."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    number = float(value)
    if not math.isfinite(number) or number < 0 or (positive and not number):
        raise ValueError(f"{owner}: {name} must be finite and {'above' if positive else 'at least'} 0, got {value}")


def check_flag(owner: str, name: str, value: Any) -> None:
    """TypeError unless the value is True or False: other things count as one of them, but seldom as the one meant."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be True or False, got {value!r}")


def check_integers(owner: str, name: str, array: Any) -> None:
    """TypeError unless it is an array of integers."""
    dtype = getattr(array, "dtype", None)
    if dtype is None or dtype.kind not in "iu":
        raise TypeError(f"{owner}: {name} must be integers, got {dtype or type(array).__name__}")


def check_floats(owner: str, name: str, array: Any, *axes: str | int) -> None:
    """TypeError unless it is an array or tensor of floating-point numbers, ValueError unless it has these axes.

    Axes are sizes, or names of what may have any size; "..." in front stands for any number of others.
    """
    dtype: Any = getattr(array, "dtype", None)
    if not (kind := getattr(dtype, "kind", "")) or kind not in "fV":  # V is bfloat16
        of = f"{type(array).__module__}.{type(array).__name__}".removeprefix("builtins.")
        given = dtype if kind else of  # a tensor of PyTorch is no array of NumPy or CuPy
        raise TypeError(f"{owner}: {name} must be an array of floating-point numbers, got {given}")
    shape, last = tuple(array.shape), axes[1:] if axes[:1] == ("...",) else axes
    sizes = shape[len(shape) - len(last) :]
    fits = len(shape) >= len(last) if last != axes else len(shape) == len(last)
    if not fits or any(axis != size for axis, size in zip(last, sizes, strict=True) if not isinstance(axis, str)):
        raise ValueError(f"{owner}: {name} must have shape ({', '.join(map(str, axes))}), got {shape}")
