"""One step of the selective scan, for decoding at constant cost and memory."""

from typing import Any, cast

import numpy as np

from sscan import _arrays, _backends, _checks
from sscan._arrays import Array


def _slots(op: str, indices: Array | None, batch: int, available: int) -> Array:
    """Which row of the state each row of x owns, as the kernels take it."""
    if indices is None:
        if available != batch:
            raise ValueError(f"{op}: state must have one row for each of x, {batch}, got {available}")
        return np.arange(batch)
    if indices.dtype.kind not in "iu":
        raise TypeError(f"{op}: state_batch_indices must be integers, got {indices.dtype}")
    slots = indices.astype(np.int64)
    if slots.size and slots.max() >= available:
        raise ValueError(f"{op}: state_batch_indices must be below the rows of state, {available}, got {slots.max()}")
    return slots


def _matrix(op: str, name: str, array: Array, of_A: np.dtype[Any]) -> Array:
    """B or C as (batch, groups, state)."""
    grouped = array[:, None] if array.ndim == 2 else array
    if of_A.kind == "c" and array.dtype.kind != "c":
        raise TypeError(f"{op}: {name} must be complex, like A, got {array.dtype}")
    return cast(Array, _checks.parameter(op, name, grouped, of_A) if of_A.kind == "c" else _unit_stride(grouped))


def _unit_stride(array: Array | None) -> Array | None:
    return _checks.time_contiguous(array)


def _own_state(op: str, state: Array, dtype: np.dtype[Any]) -> Array:
    """The state itself if the kernels can update it where it lies, else a copy in their dtype."""
    halves = dtype == np.float32 and state.dtype.name in ("float16", "bfloat16")
    if (state.dtype == dtype or halves) and (state.shape[-1] < 2 or state.strides[-1] == state.itemsize):
        return state
    return cast(Array, _checks.parameter(op, "state", state, dtype))


def selective_state_update(
    state: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
    state_batch_indices: Any = None,
) -> Any:
    r"""One step of `selective_scan` under its "mamba" rule; `state` is updated in place.

    .. math::
        h \leftarrow \exp(\Delta A) \, h + \Delta B x, \qquad y = (C h + D x) \, \mathrm{silu}(z)

    for every row and channel (equation 2 and Algorithm 2 of the paper, at one time). With ``dt_softplus``,
    :math:`\Delta = \log(1 + \exp(\mathrm{dt} + \mathrm{dt\_bias}))`, else the sum itself. For a complex A,
    :math:`y = 2 \mathrm{Re}(C h)` before D and z.

    Parameters
    ----------
    state : array (batch, dim, state), or (slots, dim, state) with `state_batch_indices`
        In the accumulation dtype (complex for complex A) or, for a real A, float16 or bfloat16, to which the new state
        is then rounded. Updated where it lies; copied and copied back only if its last axis is strided.
    x, dt, z : array (batch, dim)
        Input, step size and gate, all float64, float32, float16 or bfloat16. z may be None.
    A : array (dim, state)
        Real or complex, in the accumulation dtype: float64 (complex128) for float64 x, else float32 (complex64).
    B, C : array (batch, state) or (batch, groups, state)
        In the dtype of x; complex, in the dtype of A, for a complex A. A group serves dim / groups consecutive
        channels.
    D, dt_bias : array (dim,), optional
        In the (real) accumulation dtype.
    dt_softplus : bool
        Whether the step size goes through softplus.
    state_batch_indices : integer array (batch,), optional
        The row of `state` that each row of x owns. Rows with a negative index are left out, their y is 0. What happens
        to a row of `state` that is named twice is not defined.

    Returns
    -------
    y : array (batch, dim)
        In the library and dtype of x.

    Raises
    ------
    ValueError
        A shape does not fit, or an index is too large.
    TypeError
        A dtype does not fit; `state` is read-only; arrays of different libraries or devices; a tensor that requires
        grad.

    Notes
    -----
    Arithmetic is in the accumulation dtype, y from the state before it is rounded. The same bit for bit in every run
    and for every number of threads; small steps run on the calling thread alone.
    """
    op = "selective_state_update"
    caller, views = _arrays.enter(
        op, state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias,
        state_batch_indices=state_batch_indices, writes=("state",),
    )  # fmt: skip
    kernels = _backends.for_device(op, caller.device)
    state, x, dt, A, B, C, D, z, dt_bias, indices = views
    matrix = "batch, state | batch, groups, state"
    size = _checks.sizes(
        op, x=(x, "batch, dim"), dt=(dt, "batch, dim"), A=(A, "dim, state"), state=(state, "slots, dim, state"),
        B=(B, matrix), C=(C, matrix), D=(D, "dim"), z=(z, "batch, dim"), dt_bias=(dt_bias, "dim"),
        state_batch_indices=(indices, "batch"),
    )  # fmt: skip
    if size["dim"] % size.get("groups", 1):
        raise ValueError(f"{op}: groups must divide dim = {size['dim']}, got {size['groups']}")
    is_complex = A.dtype.kind == "c"
    real = _checks.accumulation(_checks.storage(op, x=x, dt=dt, z=z, **({} if is_complex else {"B": B, "C": C})))
    of_A = np.result_type(real, np.complex64) if is_complex else real
    slots = _slots(op, indices, size["batch"], size["slots"])
    A, D, dt_bias = (
        _checks.parameter(op, name, array, dtype)
        for name, array, dtype in (("A", A, of_A), ("D", D, real), ("dt_bias", dt_bias, real))
    )
    B, C = _matrix(op, "B", B, of_A), _matrix(op, "C", C, of_A)
    own, y = _own_state(op, state, of_A), caller.empty(x.shape, x.dtype)
    kernels.selective_state_update(
        own, slots, _unit_stride(x), _unit_stride(dt), A, B, C, D, _unit_stride(z), dt_bias, bool(dt_softplus), y
    )
    if own is not state:
        touched = slots[slots >= 0]
        state[touched] = own[touched]
    return caller.leave(y)
