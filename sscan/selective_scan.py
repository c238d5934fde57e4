"""The selective scan (Algorithm 2 of Mamba, arXiv 2312.00752): S6, forward and backward."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from sscan import _arrays, _backends, _checks, _plans
from sscan._arrays import AnyArray, Array, ArrayT, MaybeArray, NumberT, StoredT

Discretization = Literal["mamba", "zoh"]


class SelectiveScanGradients(NamedTuple):
    """Gradients of a scalar with respect to the inputs of ``selective_scan``; None where there was no input.

    They are du, ddelta, dA, dB, dC, dD, dz, ddelta_bias and dinitial_state, each with the shape and dtype of its input,
    parameters and states with those of the accumulation. The gradient of a complex input x is dL/dRe(x) + i dL/dIm(x),
    PyTorch's convention.
    """

    du: Any
    ddelta: Any
    dA: Any
    dB: Any
    dC: Any
    dD: Any
    dz: Any
    ddelta_bias: Any
    dinitial_state: Any


# Takes what a part of a sequence hands on, and gives what the parts before it do: see ``selective_scan_forward``.
StatePassing = Callable[[Any], Any]


@overload
def selective_scan(
    u: npt.NDArray[StoredT], delta: AnyArray, A: npt.NDArray[NumberT], B: AnyArray, C: AnyArray, D: MaybeArray = None,
    z: MaybeArray = None, delta_bias: MaybeArray = None, delta_softplus: bool = False, *,
    return_last_state: Literal[True], initial_state: MaybeArray = None, seq_idx: MaybeArray = None,
    cu_seqlens: MaybeArray = None, discretization: Discretization = "mamba",
) -> tuple[npt.NDArray[StoredT], npt.NDArray[NumberT]]: ...  # fmt: skip


@overload
def selective_scan(
    u: ArrayT, delta: AnyArray, A: AnyArray, B: AnyArray, C: AnyArray, D: MaybeArray = None,
    z: MaybeArray = None, delta_bias: MaybeArray = None, delta_softplus: bool = False, *,
    return_last_state: Literal[True], initial_state: MaybeArray = None, seq_idx: MaybeArray = None,
    cu_seqlens: MaybeArray = None, discretization: Discretization = "mamba",
) -> tuple[ArrayT, ArrayT]: ...  # fmt: skip


@overload
def selective_scan(
    u: ArrayT, delta: AnyArray, A: AnyArray, B: AnyArray, C: AnyArray, D: MaybeArray = None,
    z: MaybeArray = None, delta_bias: MaybeArray = None, delta_softplus: bool = False,
    return_last_state: Literal[False] = False, *, initial_state: MaybeArray = None, seq_idx: MaybeArray = None,
    cu_seqlens: MaybeArray = None, discretization: Discretization = "mamba",
) -> ArrayT: ...  # fmt: skip


@overload
def selective_scan(
    u: ArrayT, delta: AnyArray, A: AnyArray, B: AnyArray, C: AnyArray, D: MaybeArray = None,
    z: MaybeArray = None, delta_bias: MaybeArray = None, delta_softplus: bool = False,
    return_last_state: bool = False, *, initial_state: MaybeArray = None, seq_idx: MaybeArray = None,
    cu_seqlens: MaybeArray = None, discretization: Discretization = "mamba",
) -> ArrayT | tuple[ArrayT, ArrayT]: ...  # fmt: skip


@_plans.planned
def selective_scan(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Any = None,
    seq_idx: Any = None,
    cu_seqlens: Any = None,
    discretization: Discretization = "mamba",
) -> Any:
    """Selective scan: a linear recurrence whose step size and input and output matrices vary with time.

    For every batch row and channel, with the step size Delta = softplus(delta + delta_bias), or the bare sum without
    ``delta_softplus`` (equations 2 and 4 and Algorithm 2 of the paper)::

        h_t = exp(Delta_t A) h_{t-1} + B_bar_t u_t        (one number for each state)
        y_t = (sum of C_t h_t over the states + D u_t) silu(z_t)

    ``discretization="mamba"``, which released checkpoints use, has B_bar = Delta B; ``"zoh"`` has
    B_bar = (exp(Delta A) - 1) / A * B. With a complex A, the sum over the states is 2 Re(sum of C_t h_t): the states
    stand for themselves and their conjugates.

    Parameters
    ----------
    u, delta, z : (batch, dim, length)
        Input, step size (in the unit of 1 / A) and gate, all float64, float32, float16 or bfloat16. z may be None.
    A : (dim, state)
        Real or complex, in the accumulation dtype: float64 (complex128) for float64 inputs, else float32 (complex64).
    B, C : (dim, state), (batch, state, length) or (batch, groups, state, length)
        Constant, in A's dtype, or varying, in u's dtype; each on its own. A group serves dim / groups consecutive
        channels. With a complex A: complex arrays, or varying real ones whose last axis interleaves real and
        imaginary parts (2 * length).
    D, delta_bias : (dim,)
        In the (real) accumulation dtype, or None.
    delta_softplus : bool
        Whether the step size goes through softplus.
    return_last_state : bool
        Whether the state after the last step is returned too.
    initial_state : (batch, dim, state)
        In A's dtype; None is zero. With ``cu_seqlens`` (sequences, dim, state).
    seq_idx : (batch, length)
        Integers: a new sequence starts, from a zero state, wherever they change. The initial state belongs to the first
        sequence of a row, the last state to its last one.
    cu_seqlens : (sequences + 1,)
        Integers from 0 up to length: borders of sequences packed into a batch of one.
    discretization : {"mamba", "zoh"}
        The rule for B.

    Returns
    -------
    y : (batch, dim, length)
        In u's dtype, or ``(y, last_state)`` with last_state (batch, dim, state), (sequences, dim, state) with
        ``cu_seqlens``, in A's dtype.

    Raises
    ------
    ValueError
        For shapes that do not agree, and values out of range.
    TypeError
        For dtypes or libraries that do not fit, and for tensors whose gradient would be lost.

    Notes
    -----
    Arithmetic is in the accumulation dtype throughout; results are rounded once. They are the same bit for bit in every
    run and for every number of threads; a row alone may round otherwise than in a batch. Memory beyond the results: a
    few kilobytes for each thread. Inputs may have any strides; one with a strided last axis is copied. On a GPU none is
    that was transposed from (batch, length, dim): if u was, so are y and the gradients of u, delta and z, and whatever
    of delta, z and dy was not is copied; B and C may have been transposed from (batch, length, state). No input is
    written.
    """
    given = _Arguments(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, cu_seqlens)
    problem = _prepare("selective_scan", given, delta_softplus, discretization)
    if _checks.boolean("selective_scan", "return_last_state", return_last_state):
        return problem.run(None, problem.empty_last_state())
    y, _ = problem.run(None, None)
    return y


@_plans.planned
def selective_scan_forward(
    u: ArrayT,
    delta: AnyArray,
    A: AnyArray,
    B: AnyArray,
    C: AnyArray,
    D: MaybeArray = None,
    z: MaybeArray = None,
    delta_bias: MaybeArray = None,
    delta_softplus: bool = False,
    *,
    initial_state: MaybeArray = None,
    seq_idx: MaybeArray = None,
    cu_seqlens: MaybeArray = None,
    discretization: Discretization = "mamba",
    return_last_state: bool = True,
    keep_checkpoints: bool = True,
    state_passing: StatePassing | None = None,
) -> tuple[ArrayT, Any, Any]:
    """``selective_scan`` for autodiff layers and for parts of a sequence: ``(y, last_state, checkpoints)``.

    The checkpoints are states at regular intervals, which ``selective_scan_backward`` starts from: length * state / 32
    numbers for each channel on the CPU. Their layout belongs to the backend. What is not asked for is None.

    Parameters
    ----------
    return_last_state, keep_checkpoints : bool, default True
        Whether these two are asked for.
    state_passing : callable, optional
        For a part of a sequence whose other parts are elsewhere. It is called once, with the *carry* of this part,
        (batch, dim, reals + 1) in the real accumulation dtype: of each channel the state that the part ends in when
        nothing but ``initial_state`` enters it, complex ones as pairs of reals, and last the sum of its step sizes. It
        returns the carries of all parts before this one, (parts, batch, dim, reals + 1) in the order of time, or None
        if this is the first.

    Notes
    -----
    The other parameters are those of :func:`sscan.selective_scan`. A part leaves exp(A * sum of the step sizes) of a
    state that enters it. Where the backend cuts sequences along time anyway, a carry is found on the way; where it
    does not, it costs up to two thirds of a forward.
    """
    given = _Arguments(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, cu_seqlens)
    problem = _prepare("selective_scan", given, delta_softplus, discretization)
    parts = None
    if state_passing is not None:
        problem, parts = problem.with_prefix(state_passing)
    kept = _checks.boolean("selective_scan", "keep_checkpoints", keep_checkpoints)
    ended = _checks.boolean("selective_scan", "return_last_state", return_last_state)
    checkpoints = problem.empty_checkpoints() if kept else None
    y, last_state = problem.run(checkpoints, problem.empty_last_state() if ended else None, parts)
    return y, last_state, None if checkpoints is None else problem.caller.leave(checkpoints)


@_plans.planned
def selective_scan_backward(
    dy: Any,
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    *,
    dlast_state: Any = None,
    initial_state: Any = None,
    seq_idx: Any = None,
    cu_seqlens: Any = None,
    discretization: Discretization = "mamba",
    checkpoints: Any = None,
    state_passing: StatePassing | None = None,
) -> SelectiveScanGradients:
    """Gradients of ``selective_scan`` from those of its results, by hand (docs/maths.md).

    Parameters
    ----------
    dy : (batch, dim, length)
        Gradient with respect to y, in u's dtype.
    dlast_state : (batch, dim, state) or (sequences, dim, state)
        Gradient with respect to the last state, in A's dtype; None is zero.
    checkpoints : optional
        What ``selective_scan_forward`` returned for the same inputs; without it the forward is run again. Copied if not
        contiguous.
    state_passing : callable, optional
        As for ``selective_scan_forward``, for the way back: a carry has the gradient at the start of the part when
        nothing but ``dlast_state`` enters it at its end, and those of all parts behind this one are returned. Needs
        checkpoints.

    Notes
    -----
    The other parameters are those of :func:`sscan.selective_scan`. Between checkpoints the states are recomputed.
    Sums over batch, time and channels are taken in a fixed order: the results are the same bit for bit in every run.
    """
    _checks.required("selective_scan_backward", dy=dy)
    given = _Arguments(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, cu_seqlens, dy, dlast_state)
    problem = _prepare("selective_scan_backward", given, delta_softplus, discretization)
    parts = None
    if state_passing is not None:
        if checkpoints is None:
            raise ValueError("selective_scan_backward: state_passing needs checkpoints, got None")
        problem, parts = problem.with_prefix(state_passing, back=True)
    if checkpoints is None:
        checkpoints = problem.empty_checkpoints()
        problem.run(checkpoints, None)
    else:
        checkpoints = problem.checked_checkpoints(checkpoints)
    return problem.run_backward(checkpoints, parts)


class _Arguments(NamedTuple):
    """The arrays of a call as they came, or copied where the kernels cannot read them so.

    The first ones have gradients, in the order of ``SelectiveScanGradients``.
    """

    u: Any
    delta: Any
    A: Any
    B: Any
    C: Any
    D: Any
    z: Any
    delta_bias: Any
    initial_state: Any
    seq_idx: Any
    cu_seqlens: Any
    dy: Any = None
    dlast_state: Any = None


class _Inputs(NamedTuple):
    """What every kernel of the scan reads. B and C have the shapes that they came in; see ``by_group``.

    Calls of one ``signature`` agree in all that may decide how kernels are launched, but for the addresses of arrays
    and which results are asked for: in library, device, options, which arguments there are (initial_state, dy and
    dlast_state too), and their dtypes, shapes and strides.
    """

    u: Array
    delta: Array
    A: Array
    B: Array
    C: Array
    D: Array | None
    z: Array | None
    delta_bias: Array | None
    delta_softplus: bool
    zoh: bool
    signature: int

    def by_group(self) -> "_Inputs":
        """These inputs with B and C as (dim, state) or (batch, groups or 1, state, length)."""
        three = {name: x for name, x in (("B", self.B), ("C", self.C)) if x.ndim == 3}
        return self._replace(**{name: _checks.by_group(x) for name, x in three.items()}) if three else self


class _Plan(NamedTuple):
    """What the checks found out about a call."""

    copies: dict[str, np.dtype[Any]]
    batch: int
    length: int
    groups: int
    sequences: int
    signature: int


class _Problem(NamedTuple):
    """A checked call."""

    caller: _arrays.Caller
    backend: ModuleType
    arguments: _Arguments
    inputs: _Inputs
    groups: int
    segments: Any
    sequences: int

    def _empty_wave(self) -> Any:
        """Memory for an array along time like u, with the same neighbours."""
        u = self.inputs.u
        if _checks.time_copy(u) is None:
            return self.caller.empty(u.shape, u.dtype)
        batch, dim, length = u.shape
        return self.caller.empty((batch, length, dim), u.dtype).transpose(0, 2, 1)

    def _checkpoints_shape(self) -> Any:
        a, (dim, state) = self.arguments, self.inputs.A.shape
        return self.backend.checkpoints_shape(
            a.u.shape[0], dim, a.u.shape[2], state, self.groups, self.inputs.A.dtype, a.seq_idx is not None,
            None if a.cu_seqlens is None else self.sequences, self.segments,
        )  # fmt: skip

    def empty_checkpoints(self) -> Any:
        return self.caller.empty(self._checkpoints_shape(), self.inputs.A.dtype)

    def checked_checkpoints(self, checkpoints: Any) -> Any:
        """Checkpoints that came from outside as the kernels take them; ValueError if they are those of other inputs."""
        op, shape, dtype = "selective_scan_backward", self._checkpoints_shape(), self.inputs.A.dtype
        view = self._view(op, "checkpoints", checkpoints)
        if (view.shape, view.dtype) != (shape, dtype):
            raise ValueError(
                f"{op}: checkpoints must be those of selective_scan_forward for the same inputs, "
                f"{dtype} of shape {shape}, got {view.dtype} of shape {view.shape}"
            )
        return _checks.parameter(op, "checkpoints", view, dtype)

    def _view(self, op: str, name: str, array: Any) -> Any:
        """The view of an array that came late; TypeError if it is of another library or device than the others."""
        here, (view,) = _arrays.enter(op, **{name: array})
        if (here.library, here.device) != (self.caller.library, self.caller.device):
            raise TypeError(
                f"{op}: {name} must be a {self.caller.library} array on {self.caller.device}, as the other arrays, got "
                f"a {here.library} array on {here.device}"
            )
        return view

    def empty_last_state(self) -> Any:
        A = self.inputs.A
        return self.caller.empty((self.sequences, *A.shape), A.dtype)

    def run(self, checkpoints: Any, last_state: Any, parts: Any = None) -> tuple[Any, Any]:
        """y and the last state in the caller's library; the last state is left out if there is no memory for it."""
        y = self._empty_wave()
        self.backend.selective_scan_forward(
            self.segments, self.groups, self.inputs, self.arguments.initial_state, y, last_state, checkpoints, parts
        )
        return self.caller.leave(y), None if last_state is None else self.caller.leave(last_state)

    def with_prefix(self, state_passing: StatePassing, *, back: bool = False) -> tuple["_Problem", Any]:
        """The problem with what enters it from the parts around it; and what the backend need not find again."""
        a, (dim, state), number = self.arguments, self.inputs.A.shape, self.inputs.A.dtype
        op, real = "selective_scan" + "_backward" * back, _checks.accumulation(a.u.dtype)
        if a.seq_idx is not None or a.cu_seqlens is not None:
            raise ValueError(f"{op}: state_passing goes with neither seq_idx nor cu_seqlens")
        name, entering = ("dlast_state", a.dlast_state) if back else ("initial_state", a.initial_state)
        carry = self.caller.empty((a.u.shape[0], dim, state * (number.itemsize // real.itemsize) + 1), real)
        summary = self.backend.selective_scan_backward_summary if back else self.backend.selective_scan_summary
        parts = summary(self.segments, self.groups, self.inputs, *((a.dy,) if back else ()), entering, carry)
        found = state_passing(self.caller.leave(carry))
        if found is None:
            return self, parts
        carries = self._view(op, "the result of state_passing", found)
        if carries.shape[1:] != carry.shape or carries.dtype != real or not carries.flags.c_contiguous:
            raise ValueError(
                f"{op}: state_passing must return contiguous carries, {real} of shape (parts, "
                f"{str(carry.shape)[1:]}, got {carries.dtype} of shape {carries.shape}"
            )
        prefix = self.caller.empty((a.u.shape[0], dim, state), number)
        self.backend.selective_scan_prefix(self.inputs.A, carries, back, entering, prefix)
        return self._replace(arguments=a._replace(**{name: prefix})), parts

    def run_backward(self, checkpoints: Any, parts: Any) -> SelectiveScanGradients:
        empty, leave, arguments = self.caller.empty, self.caller.leave, self.arguments
        given = arguments[: len(SelectiveScanGradients._fields)]
        made = SelectiveScanGradients(*[None if x is None else empty(x.shape, x.dtype) for x in given])
        if _checks.time_copy(arguments.u) is not None:  # u lies in columns, and so does what lies along it
            wave = self._empty_wave
            made = made._replace(du=wave(), ddelta=wave(), dz=None if arguments.z is None else wave())
        self.backend.selective_scan_backward(
            self.segments, self.groups, self.inputs, checkpoints, arguments.dy, arguments.dlast_state, made, parts
        )
        return SelectiveScanGradients(*[None if x is None else leave(x) for x in made])


def _is_zoh(op: str, discretization: str) -> bool:
    if discretization not in ("mamba", "zoh"):
        raise ValueError(f'{op}: discretization must be "mamba" or "zoh", got {discretization!r}')
    return discretization == "zoh"


def _needed_copies(backend: ModuleType, a: _Arguments, copies: dict[str, np.dtype[Any]]) -> dict[str, np.dtype[Any]]:
    """The copies without those of arrays along time that the backend takes with neighbouring channels or states."""
    kept = ["u", "delta", "z", "dy"] if "u" in copies and backend.in_columns(a.u) else []
    if a.A.dtype.kind != "c":
        kept += [name for name, x in (("B", a.B), ("C", a.C)) if x.ndim > 2 and backend.in_columns(x)]
    return {name: dtype for name, dtype in copies.items() if name not in kept}


def _prepare(op: str, given: _Arguments, delta_softplus: bool, discretization: str) -> _Problem:
    zoh = _is_zoh(op, discretization)
    softplus = _checks.boolean(op, "delta_softplus", delta_softplus)
    caller, a, plan = _checked(op, given, softplus, zoh)
    backend = _backends.for_device(op, caller.device)
    if plan.copies:
        a = _checks.copied(a, _needed_copies(backend, a, plan.copies))
    segments = backend.segments(op, plan.batch, plan.length, a.seq_idx, a.cu_seqlens)
    inputs = _Inputs(a.u, a.delta, a.A, a.B, a.C, a.D, a.z, a.delta_bias, softplus, zoh, plan.signature)
    return _Problem(caller, backend, a, inputs, plan.groups, segments, plan.sequences)


@partial(_checks.entered, always=("u", "delta", "A", "B", "C"))
def _checked(op: str, a: _Arguments, delta_softplus: bool, zoh: bool) -> _Plan:
    is_complex = a.A.dtype.kind == "c"
    sizes = _check_shapes(op, a, is_complex)
    copies = _check_dtypes(op, a, is_complex)
    groups = max(sizes.get("groups", 1), sizes.get("groups_of_c", 1))
    return _Plan(
        copies, sizes["batch"], sizes["length"], groups, sizes.get("sequences", sizes["batch"]),
        next(_checks.signatures),
    )  # fmt: skip


def _check_shapes(op: str, a: _Arguments, is_complex: bool) -> dict[str, int]:
    wave = "batch, dim, length"
    interleaved = {name: is_complex and x.ndim > 2 and x.dtype.kind != "c" for name, x in (("B", a.B), ("C", a.C))}
    varying = {name: "2*length" if interleaved[name] else "length" for name in ("B", "C")}
    states = "batch, dim, state" if a.cu_seqlens is None else "sequences, dim, state"
    sizes = _checks.sizes(
        op,
        u=(a.u, wave), delta=(a.delta, wave), A=(a.A, "dim, state"),
        B=(a.B, f"dim, state | batch, state, {varying['B']} | batch, groups, state, {varying['B']}"),
        C=(a.C, f"dim, state | batch, state, {varying['C']} | batch, groups_of_c, state, {varying['C']}"),
        D=(a.D, "dim"), z=(a.z, wave), delta_bias=(a.delta_bias, "dim"),
        seq_idx=(a.seq_idx, "batch, length"), cu_seqlens=(a.cu_seqlens, "sequences+1"),
        initial_state=(a.initial_state, states), dy=(a.dy, wave), dlast_state=(a.dlast_state, states),
    )  # fmt: skip
    if sizes["state"] == 0:
        raise ValueError(f"{op}: A must have at least one state, got shape {a.A.shape}")
    groups, others = sizes.get("groups", 1), sizes.get("groups_of_c", 1)
    if 1 not in (groups, others) and groups != others:
        raise ValueError(f"{op}: C must have B's {groups} groups, or one, got {others}")
    for name, count in (("B", groups), ("C", others)):
        _checks.check_groups(op, name, count, sizes["dim"])
    return sizes


def _check_dtypes(op: str, a: _Arguments, is_complex: bool) -> dict[str, np.dtype[Any]]:
    """Check the dtypes; the copies that must be made, by argument."""
    stored = _checks.storage(op, u=a.u, delta=a.delta, z=a.z, dy=a.dy)
    real = _checks.accumulation(stored)
    number = np.result_type(real, np.complex64) if is_complex else real
    copies = {name: _checks.time_copy(getattr(a, name)) for name in ("u", "delta", "z", "dy")}
    for name, array in (("B", a.B), ("C", a.C)):
        if array.ndim == 2:
            if is_complex and array.dtype.kind != "c":
                raise TypeError(f"{op}: {name} must be complex because A is and it is constant, got {array.dtype}")
            copies[name] = _checks.parameter_copy(op, name, array, number)
        elif array.dtype != (number if array.dtype.kind == "c" and is_complex else stored):
            expected = f"dtype {stored} (interleaved) or {number}" if is_complex else f"the dtype of u, {stored}"
            raise TypeError(f"{op}: {name} must have {expected}; got {array.dtype}")
        else:
            copies[name] = _checks.time_copy(array)
    for name in ("A", "initial_state", "dlast_state"):
        copies[name] = _checks.parameter_copy(op, name, getattr(a, name), number)
    for name in ("D", "delta_bias"):
        copies[name] = _checks.parameter_copy(op, name, getattr(a, name), real)
    return _checks.needed(**copies)
