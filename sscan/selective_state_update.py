"""One step of the selective scan, for decoding at constant cost and memory."""

from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np

from sscan import _backends, _checks, _plans
from sscan._arrays import AnyArray, Array, ArrayT, MaybeArray


class _Arguments(NamedTuple):
    state: Any
    x: Any
    dt: Any
    A: Any
    B: Any
    C: Any
    D: Any
    z: Any
    dt_bias: Any
    state_batch_indices: Any


@partial(_checks.entered, always=("state", "x", "dt", "A", "B", "C"), writes=("state",))
def _checked(op: str, a: _Arguments, A_log: bool) -> dict[str, np.dtype[Any]]:
    """The copies to make, by argument."""
    matrix = "batch, state | batch, groups, state"
    size = _checks.sizes(
        op, x=(a.x, "batch, dim"), dt=(a.dt, "batch, dim"), A=(a.A, "dim, state"),
        state=(a.state, "slots, dim, state"), B=(a.B, matrix), C=(a.C, matrix), D=(a.D, "dim"), z=(a.z, "batch, dim"),
        dt_bias=(a.dt_bias, "dim"), state_batch_indices=(a.state_batch_indices, "batch"),
    )  # fmt: skip
    _checks.check_groups(op, "B", size.get("groups", 1), size["dim"])
    is_complex = a.A.dtype.kind == "c"
    if is_complex and A_log:
        raise TypeError(f"{op}: A must be real to be given by its logarithm, got {a.A.dtype}")
    matrices = {} if is_complex else {"B": a.B, "C": a.C}
    real = _checks.accumulation(_checks.storage(op, x=a.x, dt=a.dt, z=a.z, **matrices))
    of_A = np.result_type(real, np.complex64) if is_complex else real
    slots = _slots_copy(op, a.state_batch_indices, size["batch"], size["slots"])
    return _checks.needed(
        state_batch_indices=slots, A=_checks.parameter_copy(op, "A", a.A, of_A),
        D=_vector_copy(op, "D", a.D, real), dt_bias=_vector_copy(op, "dt_bias", a.dt_bias, real),
        B=_matrix_copy(op, "B", a.B, of_A), C=_matrix_copy(op, "C", a.C, of_A), state=_state_copy(op, a.state, of_A),
        x=_checks.time_copy(a.x), dt=_checks.time_copy(a.dt), z=_checks.time_copy(a.z),
    )  # fmt: skip


def _vector_copy(op: str, name: str, array: Array | None, real: np.dtype[Any]) -> np.dtype[Any] | None:
    """For D or dt_bias, which kernels in float32 read in their own dtype."""
    copy = _checks.parameter_copy(op, name, array, real)
    if array is None or real != np.float32 or array.dtype not in _checks.STORAGE:
        return copy
    return None if array.flags.c_contiguous else array.dtype


def _slots_copy(op: str, indices: Array | None, batch: int, available: int) -> np.dtype[Any] | None:
    """For the row of the state that each row of x owns, which the kernels take contiguous, in int32 or int64."""
    if indices is None:
        if available != batch:
            raise ValueError(f"{op}: state must have one row for each of x, {batch}, got {available}")
        return None
    if indices.dtype.kind not in "iu":
        raise TypeError(f"{op}: state_batch_indices must be integers, got {indices.dtype}")
    return None if indices.dtype in (np.int32, np.int64) and indices.flags.c_contiguous else np.dtype(np.int64)


def _matrix_copy(op: str, name: str, array: Array, of_A: np.dtype[Any]) -> np.dtype[Any] | None:
    if of_A.kind == "c" and array.dtype.kind != "c":
        raise TypeError(f"{op}: {name} must be complex, like A, got {array.dtype}")
    return _checks.parameter_copy(op, name, array, of_A) if of_A.kind == "c" else _checks.time_copy(array)


def _state_copy(op: str, state: Array, dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """None if the kernels can update the state where it lies."""
    halves = dtype == np.float32 and state.dtype.name in ("float16", "bfloat16")
    if (state.dtype == dtype or halves) and _checks.time_copy(state) is None:
        return None
    return _checks.parameter_copy(op, "state", state, dtype)


def _check_slots(op: str, slots: Array | None, available: int) -> None:
    """The values, which only the host can look at without waiting for the GPU."""
    if slots is not None and slots.size and slots.max() >= available:
        raise ValueError(f"{op}: state_batch_indices must be below the rows of state, {available}, got {slots.max()}")


def _by_group(array: Array) -> Array:
    """B or C as (batch, groups, state)."""
    return cast(Array, _checks.by_group(array)) if array.ndim == 2 else array


@_plans.planned
def selective_state_update(
    state: AnyArray,
    x: ArrayT,
    dt: AnyArray,
    A: AnyArray,
    B: AnyArray,
    C: AnyArray,
    D: MaybeArray = None,
    z: MaybeArray = None,
    dt_bias: MaybeArray = None,
    dt_softplus: bool = False,
    state_batch_indices: MaybeArray = None,
    *,
    A_log: bool = False,
) -> ArrayT:
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
        is then rounded. Updated where it lies; copied and copied back only if its last axis is strided. Its elements
        must not share memory with each other, nor with other arguments (which is not looked for on a GPU).
    x, dt, z : array (batch, dim)
        Input, step size and gate, all float64, float32, float16 or bfloat16. z may be None.
    A : array (dim, state)
        Real or complex, in the accumulation dtype: float64 (complex128) for float64 x, else float32 (complex64).
    B, C : array (batch, state) or (batch, groups, state)
        In the dtype of x; complex, in the dtype of A, for a complex A. A group serves dim / groups consecutive
        channels.
    D, dt_bias : array (dim,), optional
        Of any floating dtype that the (real) accumulation dtype holds.
    dt_softplus : bool
        Whether the step size goes through softplus.
    state_batch_indices : integer array (batch,), optional
        The row of `state` that each row of x owns. Rows with a negative index are left out, their y is 0. What happens
        to a row of `state` that is named twice is not defined. On a GPU they are not checked: nothing waits for them.
    A_log : bool
        Whether A is given as log(-A), the parameter of a Mamba block: then A = -exp(A) is taken, on the way.

    Returns
    -------
    y : array (batch, dim)
        In the library and dtype of x.

    Raises
    ------
    ValueError
        A shape does not fit; `state` overlaps itself or (on the CPU) another argument; (on the CPU) an index is too
        large.
    TypeError
        A dtype does not fit; `state` is read-only; arrays of different libraries or devices; a tensor that requires
        grad.

    Notes
    -----
    Arithmetic is in the accumulation dtype, y from the state before it is rounded. The same bit for bit in every run
    and for every number of threads; small steps run on the calling thread alone.
    """
    op = "selective_state_update"
    softplus = _checks.boolean(op, "dt_softplus", dt_softplus)
    logarithm = _checks.boolean(op, "A_log", A_log)
    arguments = _Arguments(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    caller, given, copies = _checked(op, arguments, logarithm)
    kernels = _backends.for_device(op, caller.device)
    on_host = caller.device == "cpu"
    if on_host:
        _checks.apart(op, given, "state")
        _check_slots(op, given.state_batch_indices, len(given.state))
    a = _checks.copied(given, copies)
    slots = a.state_batch_indices
    y = caller.empty(a.x.shape, a.x.dtype)
    kernels.selective_state_update(
        a.state, slots, a.x, a.dt, a.A, _by_group(a.B), _by_group(a.C), a.D, a.z, a.dt_bias, softplus, logarithm, y
    )
    if a.state is not given.state:
        # Only the rows that were updated: others belong to other threads. A GPU would have to be asked which they are.
        touched = slice(None) if slots is None or not on_host else slots[slots >= 0]
        given.state[touched] = a.state[touched]
    return cast(ArrayT, caller.leave(y))
