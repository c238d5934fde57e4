"""Causal depthwise convolution along time: the short convolution in front of the scan, and its decoding step."""

from functools import partial
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast, overload

import numpy as np

from sscan import _arrays, _backends, _checks, _plans
from sscan._arrays import AnyArray, ArrayT, MaybeArray


class CausalConv1dGradients(NamedTuple):
    """Gradients of `causal_conv1d`, each in the shape and dtype of its argument; None where that was None."""

    dx: Any
    dweight: Any
    dbias: Any
    dinitial_state: Any


class _Arguments(NamedTuple):
    x: Any
    weight: Any
    bias: Any
    initial_state: Any
    seq_idx: Any
    cu_seqlens: Any
    dy: Any = None
    dfinal_state: Any = None


class _Plan(NamedTuple):
    """What the checks found out about a call: which copies to make, its sizes, and the dtype of arithmetic."""

    copies: dict[str, np.dtype[Any]]
    batch: int
    length: int
    sequences: int
    dtype: np.dtype[Any]


def _is_silu(op: str, activation: str | None) -> bool:
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation must be None or 'silu', got {activation!r}")
    return activation == "silu"


@partial(_checks.entered, always=("x", "weight"))
def _checked(op: str, a: _Arguments) -> _Plan:
    wave, rows = "batch, dim, length", "batch" if a.cu_seqlens is None else "sequences"
    size = _checks.sizes(
        op, x=(a.x, wave), weight=(a.weight, "dim, width"), bias=(a.bias, "dim"),
        seq_idx=(a.seq_idx, "batch, length"), cu_seqlens=(a.cu_seqlens, "sequences+1"),
        initial_state=(a.initial_state, f"{rows}, dim, width-1"), dy=(a.dy, wave),
        dfinal_state=(a.dfinal_state, f"{rows}, dim, width-1"),
    )  # fmt: skip
    if size["width"] < 1:
        raise ValueError(f"{op}: weight must have shape (dim, width) with width >= 1, got {a.weight.shape}")
    dtype = _checks.accumulation(_checks.storage(op, x=a.x, dy=a.dy))
    parameters = ("weight", "bias", "initial_state", "dfinal_state")
    copies = _checks.needed(
        x=_checks.time_copy(a.x), dy=_checks.time_copy(a.dy),
        **{name: _checks.parameter_copy(op, name, getattr(a, name), dtype) for name in parameters},
    )  # fmt: skip
    return _Plan(copies, size["batch"], size["length"], size.get("sequences", size["batch"]), dtype)


def _copied(kernels: ModuleType, a: _Arguments, plan: _Plan) -> tuple[_Arguments, bool]:
    """The arguments as the kernels take them, and whether they take x as it is although its channels are neighbours."""
    last = kernels.channels_last(a.x, a.weight.shape[1])
    copies = {name: dtype for name, dtype in plan.copies.items() if not (last and name in ("x", "dy"))}
    return _checks.copied(a, copies), last


def _empty_wave(caller: _arrays.Caller, x: Any, last: bool) -> Any:
    """Memory for an array like x, with the same neighbours."""
    if not last:
        return caller.empty(x.shape, x.dtype)
    batch, dim, length = x.shape
    return caller.empty((batch, length, dim), x.dtype).transpose(0, 2, 1)


@overload
def causal_conv1d(
    x: ArrayT, weight: AnyArray, bias: MaybeArray = None, activation: str | None = None,
    initial_state: MaybeArray = None, *, return_final_state: Literal[True], seq_idx: MaybeArray = None,
    cu_seqlens: MaybeArray = None,
) -> tuple[ArrayT, ArrayT]: ...  # fmt: skip


@overload
def causal_conv1d(
    x: ArrayT, weight: AnyArray, bias: MaybeArray = None, activation: str | None = None,
    initial_state: MaybeArray = None, return_final_state: Literal[False] = False, seq_idx: MaybeArray = None,
    cu_seqlens: MaybeArray = None,
) -> ArrayT: ...  # fmt: skip


@overload
def causal_conv1d(
    x: ArrayT, weight: AnyArray, bias: MaybeArray = None, activation: str | None = None,
    initial_state: MaybeArray = None, return_final_state: bool = False, seq_idx: MaybeArray = None,
    cu_seqlens: MaybeArray = None,
) -> ArrayT | tuple[ArrayT, ArrayT]: ...  # fmt: skip


@_plans.planned
def causal_conv1d(
    x: Any,
    weight: Any,
    bias: Any = None,
    activation: str | None = None,
    initial_state: Any = None,
    return_final_state: bool = False,
    seq_idx: Any = None,
    cu_seqlens: Any = None,
) -> Any:
    """Causal convolution of each channel with its filter, y_t = act(bias + sum_k weight_k x_{t - (width - 1) + k}).

    The convolution of the Mamba block (Figure 3 of the paper). ``weight[:, -1]`` meets the current token. Inputs before
    the first are those of ``initial_state``, or zeros.

    Parameters
    ----------
    x : array (batch, dim, length)
        float64, float32, float16 or bfloat16. Copied only if its last axis is strided; on a GPU not even then if its
        channels are neighbours, as in the transpose of (batch, length, dim): y has them as neighbours too.
    weight : array (dim, width)
        width >= 1. Like `bias` and `initial_state` of any floating dtype that the accumulation dtype holds: float64 for
        float64 x, else float32.
    bias : array (dim,), optional
    activation : None or "silu"
        silu(v) = v / (1 + exp(-v)), applied to the sum.
    initial_state : array (batch, dim, width - 1), optional
        The inputs before the first, newest last; (sequences, dim, width - 1) with `cu_seqlens`.
    return_final_state : bool
        Also return the last width - 1 inputs of the (last) sequence of each row, the initial state included.
    seq_idx : integer array (batch, length), optional
        Numbers of packed sequences. Where they change, the window starts again from zeros; the initial state belongs to
        the first sequence of a row.
    cu_seqlens : integer array (sequences + 1,), optional
        Borders 0 = c_0 <= c_1 <= ... = length of sequences packed into a batch of 1. Not together with `seq_idx`.

    Returns
    -------
    y : array (batch, dim, length)
        In the library and dtype of x.
    final_state : array like initial_state
        Only if `return_final_state`; in the dtype of x.

    Raises
    ------
    ValueError
        A shape, activation or border does not fit.
    TypeError
        A dtype does not fit; arrays of different libraries or devices; a tensor that requires grad.

    Notes
    -----
    Sums are formed in the accumulation dtype and rounded once. y_t is the same, bit for bit, whatever follows t, and
    for every run and number of threads.
    """
    op = "causal_conv1d"
    silu = _is_silu(op, activation)
    caller, a, plan = _checked(op, _Arguments(x, weight, bias, initial_state, seq_idx, cu_seqlens))
    kernels = _backends.for_device(op, caller.device)
    a, last = _copied(kernels, a, plan)
    segments = kernels.segments(op, plan.batch, plan.length, a.seq_idx, a.cu_seqlens)
    y, final_state = _empty_wave(caller, a.x, last), None
    if _checks.boolean(op, "return_final_state", return_final_state):
        dim, width = a.weight.shape
        final_state = caller.empty((plan.sequences, dim, width - 1), plan.dtype)
    kernels.causal_conv1d_forward(a.x, a.weight, a.bias, silu, segments, a.initial_state, y, final_state)
    if final_state is None:
        return caller.leave(y)
    return caller.leave(y), caller.leave(final_state.astype(y.dtype, copy=False))


@_plans.planned
def causal_conv1d_backward(
    dy: Any,
    x: Any,
    weight: Any,
    bias: Any = None,
    activation: str | None = None,
    initial_state: Any = None,
    seq_idx: Any = None,
    cu_seqlens: Any = None,
    dfinal_state: Any = None,
) -> CausalConv1dGradients:
    """Gradients of `causal_conv1d` from those of y and (optionally) of its final state.

    With g_t = dy_t act'(sum_t), the sum recomputed: dx_s = sum_k weight_k g_{s + (width - 1) - k} over the steps of the
    same sequence, dweight_k = sum_t g_t x_{t - (width - 1) + k}, dbias = sum_t g_t.

    Parameters
    ----------
    dy : array (batch, dim, length)
        In the dtype of x.
    x, weight, bias, activation, initial_state, seq_idx, cu_seqlens
        As given to `causal_conv1d`.
    dfinal_state : array like the final state, optional

    Returns
    -------
    CausalConv1dGradients
        (dx, dweight, dbias, dinitial_state).

    Raises
    ------
    ValueError, TypeError
        As `causal_conv1d`.

    Notes
    -----
    Sums over batch and time are formed in the accumulation dtype as partial sums of fixed stretches, added in a fixed
    order: the result is the same, bit for bit, for every run and number of threads.
    """
    op = "causal_conv1d_backward"
    silu = _is_silu(op, activation)
    _checks.required(op, dy=dy)
    caller, given, plan = _checked(
        op, _Arguments(x, weight, bias, initial_state, seq_idx, cu_seqlens, dy, dfinal_state)
    )
    kernels = _backends.for_device(op, caller.device)
    a, last = _copied(kernels, given, plan)
    segments = kernels.segments(op, plan.batch, plan.length, a.seq_idx, a.cu_seqlens)
    inputs = ("x", "weight", "bias", "initial_state")
    parameters = (a.weight, a.bias, a.initial_state)
    gradients = [
        _empty_wave(caller, a.x, last),
        *(None if like is None else caller.empty(like.shape, like.dtype) for like in parameters),
    ]
    kernels.causal_conv1d_backward(
        a.dy, a.x, a.weight, a.bias, silu, segments, a.initial_state, a.dfinal_state, *gradients
    )
    return CausalConv1dGradients(
        *(
            None if gradient is None else caller.leave(gradient.astype(getattr(given, name).dtype, copy=False))
            for gradient, name in zip(gradients, inputs, strict=True)
        )
    )


@_plans.planned
def causal_conv1d_update(
    x: ArrayT, conv_state: AnyArray, weight: AnyArray, bias: MaybeArray = None, activation: str | None = None
) -> ArrayT:
    """One step of `causal_conv1d`, for decoding: y of one token, and the state moved on by it.

    Parameters
    ----------
    x : array (batch, dim)
        float64, float32, float16 or bfloat16.
    conv_state : array (batch, dim, kept), kept >= width - 1
        The inputs so far, newest last; shifted in place to end with x. float32, float16 or bfloat16 (float64 only with
        float64 x). Updated where it lies; copied and copied back if its last axis is strided, and on the CPU unless it
        is contiguous and in the accumulation dtype. Its elements must not share memory with each other, nor with other
        arguments (which is not looked for on a GPU).
    weight, bias, activation
        As given to `causal_conv1d`.

    Returns
    -------
    y : array (batch, dim)
        In the library and dtype of x.

    Raises
    ------
    ValueError, TypeError
        As `causal_conv1d`; TypeError too if `conv_state` is read-only, ValueError if it overlaps itself or (on the CPU)
        another argument.
    """
    op = "causal_conv1d_update"
    silu = _is_silu(op, activation)
    caller, given, copies = _checked_step(op, _Step(x, conv_state, weight, bias))
    kernels = _backends.for_device(op, caller.device)
    if caller.device == "cpu":
        _checks.apart(op, given, "conv_state")
    a = _checks.copied(given, copies)
    y = caller.empty(a.x.shape, a.x.dtype)
    kernels.causal_conv1d_update(a.x, a.conv_state, a.weight, a.bias, silu, y)
    if a.conv_state is not given.conv_state:
        given.conv_state[...] = a.conv_state
    return cast(ArrayT, caller.leave(y))


class _Step(NamedTuple):
    x: Any
    conv_state: Any
    weight: Any
    bias: Any


@partial(_checks.entered, always=("x", "conv_state", "weight"), writes=("conv_state",))
def _checked_step(op: str, a: _Step) -> dict[str, np.dtype[Any]]:
    """The copies to make, by argument."""
    size = _checks.sizes(
        op, x=(a.x, "batch, dim"), conv_state=(a.conv_state, "batch, dim, kept"), weight=(a.weight, "dim, width"),
        bias=(a.bias, "dim"),
    )  # fmt: skip
    if not 1 <= size["width"] <= size["kept"] + 1:
        raise ValueError(
            f"{op}: conv_state must have shape (batch, dim, kept) with kept >= width - 1 and weight (dim, width) with "
            f"width >= 1, got {a.conv_state.shape} and {a.weight.shape}"
        )
    dtype = _checks.accumulation(_checks.storage(op, x=a.x))
    copies = {name: _checks.parameter_copy(op, name, getattr(a, name), dtype) for name in a._fields[1:]}
    copies["conv_state"] = _checks.time_copy(a.conv_state)
    if a.bias is None or a.bias.dtype == a.weight.dtype:  # else both in the accumulation dtype
        copies |= {name: _contiguous_copy(getattr(a, name)) for name in ("weight", "bias")}
    return _checks.needed(**copies)


def _contiguous_copy(array: Any) -> np.dtype[Any] | None:
    """For a parameter that the kernels read in its own dtype."""
    return None if array is None or array.flags.c_contiguous else array.dtype
