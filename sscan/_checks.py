"""Shapes and dtypes of an op's arguments: one table, checked from left to right; the first failure raises.

Checks read metadata only (dtypes, shapes, strides), so that they neither wait for a GPU nor need to be made twice.
"""

import functools
import itertools
import math
import operator
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from sscan import _arrays
from sscan._arrays import Array

Found = TypeVar("Found")
Arguments = TypeVar("Arguments", bound=Any)  # a named tuple of arrays

REMEMBERED = 4096  # of each check; more kinds of calls than that are no kinds but noise
signatures = itertools.count()


def remembered(check: Callable[..., Found]) -> Callable[..., Found]:
    """``check(op, arrays, *options)``, made once for all arrays of the same metadata; it must look at nothing else.

    What it found must hold no array.
    """
    known: dict[Any, Found] = {}

    @functools.wraps(check)
    def recall(op: str, arrays: tuple[Any, ...], *options: Any) -> Found:
        metadata = _arrays.metadata(arrays)
        assert metadata is not None, "views are their own views"
        key = (op, *options, *metadata)
        found = known.get(key)
        if found is None:
            found = check(op, arrays, *options)
            _remember(known, key, found)
        return found

    return recall


def required(op: str, **arrays: Any) -> None:
    """TypeError for an array that is None and may not be."""
    for name, array in arrays.items():
        if array is None:
            raise TypeError(f"{op}: {name} is required, got None")


def entered(
    check: Callable[..., Found], always: tuple[str, ...], writes: tuple[str, ...] = ()
) -> Callable[..., tuple[_arrays.Caller, Any, Found]]:
    """``check(op, views, *options)`` of a named tuple of arrays as they came: (caller, views, what it found).

    It is remembered, and so is that the arrays of a call could be entered: then a known call costs one look at the
    metadata of its arrays, and their views. ``always`` names what every call has, ``writes`` what is updated in place.
    """
    recall = remembered(check)
    known: dict[Any, tuple[_arrays.Caller, bool, Found]] = {}

    @functools.wraps(check)
    def enter(op: str, arrays: Any, *options: Any) -> tuple[_arrays.Caller, Any, Found]:
        metadata = _arrays.metadata(arrays)
        key = None if metadata is None else (op, *options, *metadata)
        remembered_call = known.get(key)
        if remembered_call is not None:
            caller, are_views, found = remembered_call
            return caller, arrays if are_views else arrays._make(_arrays.views(arrays)), found
        required(op, **{name: getattr(arrays, name) for name in always})
        caller, made = _arrays.enter(op, writes=writes, **arrays._asdict())
        views = arrays._make(made)
        for name in writes:
            _separate(op, name, getattr(views, name))
        found = recall(op, views, *options)
        if key is not None:
            _remember(known, key, (caller, all(map(operator.is_, views, arrays)), found))
        return caller, views, found

    return enter


def _separate(op: str, name: str, array: Any) -> None:
    """ValueError if elements of an array may share memory: two of them would be updated in one place.

    Told by the strides alone: from the shortest on, each must lead past all that the ones before it reach.
    """
    reach = array.itemsize
    for stride, size in sorted((abs(stride), size) for stride, size in zip(array.strides, array.shape, strict=True)):
        if size > 1 and stride < reach and 0 not in array.shape:
            raise ValueError(
                f"{op}: {name} is updated in place and must not overlap itself, got shape {tuple(array.shape)} with "
                f"strides of {tuple(array.strides)} bytes"
            )
        reach += (size - 1) * stride


def apart(op: str, arguments: Any, name: str) -> None:
    """ValueError if the array of this name, which is updated in place, shares memory with another; on the host."""
    written = getattr(arguments, name)
    for other, array in zip(arguments._fields, arguments, strict=True):
        if array is None or array is written or (array.base is None and written.base is not array):  # has its own
            continue
        if np.shares_memory(written, array):
            raise ValueError(f"{op}: {name} is updated in place and must not share memory with {other}")


def boolean(op: str, name: str, value: Any) -> bool:
    """An option that is either on or off; TypeError for anything else, since a string is neither."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{op}: {name} must be True or False, got {reprlib.repr(value)}")
    return bool(value)


def _remember(known: dict[Any, Any], key: Any, found: Any) -> None:
    if len(known) >= REMEMBERED:
        known.clear()
    known[key] = found


# All but the first are held by float32.
STORAGE = tuple(np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))


def sizes(op: str, **arguments: tuple[Any, str]) -> dict[str, int]:
    """Sizes of the symbols in the arguments' shapes.

    Each argument is an array (or None) and its shape in symbols: ``u=(u, "batch, dim, length")``. A symbol takes the
    size of its first appearance; ``width-1`` and ``2*length`` are understood. Several shapes, of different rank, are
    separated by ``|``. Raises ValueError with the argument, the shape expected and the shape that came.
    """
    known: dict[str, int] = {}
    for name, (array, forms) in arguments.items():
        if array is None:
            continue
        shapes = _shapes(forms)
        fitting = next((shape for shape in shapes if len(shape) == array.ndim), None)
        bound = None if fitting is None else _bound(known, fitting, array.shape)
        if bound is None:
            expected = " or ".join(_spelled(shape, known) for shape in ([fitting] if fitting else shapes))
            raise ValueError(f"{op}: {name} must have shape {expected}, got {array.shape}")
        known = bound
    return known


@functools.cache
def _shapes(forms: str) -> list[list[str]]:
    return [[symbol.strip() for symbol in form.split(",") if symbol.strip()] for form in forms.split("|")]


def _bound(known: dict[str, int], symbols: list[str], shape: tuple[int, ...]) -> dict[str, int] | None:
    """The known sizes and those that a shape adds, or None if it does not fit."""
    bound = dict(known)
    for symbol, size in zip(symbols, shape, strict=True):
        factor, name, offset = _parsed(symbol)
        if name not in bound and factor == 1 and size >= offset:
            bound[name] = size - offset
        if _evaluated(symbol, bound) != size:
            return None
    return bound


@functools.cache
def _parsed(symbol: str) -> tuple[int, str, int]:
    match = re.fullmatch(r"(?:(\d+)\*)?([a-z_]+)([+-]\d+)?", symbol)
    assert match, f"not a size: {symbol}"
    return int(match[1] or 1), match[2], int(match[3] or 0)


def _evaluated(symbol: str, known: dict[str, int]) -> int | None:
    factor, name, offset = _parsed(symbol)
    return factor * known[name] + offset if name in known else None


def _spelled(symbols: list[str], known: dict[str, int]) -> str:
    """The symbols, and behind them what is known of their sizes: ``(dim, state) = (4, state)``."""
    values = [_evaluated(symbol, known) for symbol in symbols]
    sizes = [symbol if value is None else str(value) for symbol, value in zip(symbols, values, strict=True)]
    spelled, filled = (f"({', '.join(x)}{',' if len(x) == 1 else ''})" for x in (symbols, sizes))
    return spelled if sizes == symbols else f"{spelled} = {filled}"


def check_groups(op: str, name: str, groups: int, dim: int) -> None:
    """ValueError unless so many groups of B or C can share the channels."""
    if groups == 0 or dim % groups:
        raise ValueError(f"{op}: {name}'s groups must divide dim = {dim}, got {groups}")


def storage(op: str, **arrays: Array | None) -> np.dtype[Any]:
    """The one floating dtype of these arrays; TypeError if there are two, or one that is not stored."""
    (first, array), *others = [(name, array) for name, array in arrays.items() if array is not None]
    dtype: np.dtype[Any] = array.dtype
    if dtype not in STORAGE:
        raise TypeError(f"{op}: {first} must have dtype {', '.join(t.name for t in STORAGE)}; got {dtype}")
    for name, other in others:
        if other.dtype != dtype:
            raise TypeError(f"{op}: {name} must have the dtype of {first}, {dtype}; got {other.dtype}")
    return dtype


def accumulation(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of arithmetic, states and parameters: float64 for float64 inputs, else float32."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


# What a kernel cannot read as it is gets copied. The checks say to which dtype, or None: no copy is needed.


def parameter_copy(op: str, name: str, array: Array | None, dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """For a parameter or state, which the kernels take contiguous, writeable and in ``dtype``.

    TypeError if ``dtype`` cannot hold its values: nothing is rounded without being asked.
    """
    if array is None:
        return None
    if array.dtype != dtype:
        held = np.dtype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array.dtype
        if held.kind not in "fc" or not np.can_cast(held, dtype):
            raise TypeError(f"{op}: {name} must have dtype {dtype} (or one that it can hold), got {array.dtype}")
        return dtype
    flags = array.flags
    as_it_is = flags.c_contiguous
    if as_it_is and isinstance(array, np.ndarray):  # CuPy's arrays are always aligned and writeable
        as_it_is = flags.writeable and flags.aligned
    return None if as_it_is else dtype


def time_copy(array: Array | None) -> np.dtype[Any] | None:
    """For an array along time, of which the last axis must not be strided; the other axes may have any strides."""
    if array is None or array.shape[-1] < 2 or array.strides[-1] == array.itemsize:
        return None
    dtype: np.dtype[Any] = array.dtype
    return dtype


def needed(**copies: np.dtype[Any] | None) -> dict[str, np.dtype[Any]]:
    """The copies that must be made, by argument."""
    return {name: dtype for name, dtype in copies.items() if dtype is not None}


def copied(arguments: Arguments, copies: Mapping[str, np.dtype[Any]]) -> Arguments:
    """The arguments, with contiguous copies in the dtypes of ``copies`` in place of those that it names."""
    if not copies:
        return arguments
    made = {name: getattr(arguments, name).astype(dtype, order="C") for name, dtype in copies.items()}
    return arguments._replace(**made)  # type: ignore[no-any-return]


def parameter(op: str, name: str, array: Array | None, dtype: np.dtype[Any]) -> Array | None:
    """A parameter or state as the kernels take it, see ``parameter_copy``."""
    copy = parameter_copy(op, name, array, dtype)
    return array if array is None or copy is None else array.astype(copy, order="C")


def time_contiguous(array: Array | None) -> Array | None:
    """The array, copied if its last axis is strided."""
    return array if array is None or time_copy(array) is None else array.copy()


def by_group(array: Any) -> Any:
    """B or C (batch, state, ...) as (batch, 1, state, ...)."""
    return array.reshape(array.shape[0], 1, *array.shape[1:])


def same_shape(op: str, **arrays: Array | None) -> None:
    """ValueError unless all arrays (None is left out) have the shape of the first, of at least one axis."""
    (first, array), *others = [(name, array) for name, array in arrays.items() if array is not None]
    if array.ndim == 0:
        raise ValueError(f"{op}: {first} must have at least one axis, got shape ()")
    for name, other in others:
        if other.shape != array.shape:
            raise ValueError(f"{op}: {name} must have the shape of {first}, {array.shape}, got {other.shape}")


def rows(array: Array | None) -> Array | None:
    """The array as (rows, size), copied if its leading axes do not merge into one or its last axis is strided."""
    if array is None:
        return None
    if array.ndim != 2:
        array = array.reshape(math.prod(array.shape[:-1]), array.shape[-1])
    return time_contiguous(array)
