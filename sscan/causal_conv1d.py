"""Causal depthwise convolution along time: the short convolution in front of the scan, and its decoding step."""

from typing import Any, NamedTuple

import numpy as np

from sscan import _arrays, _backends, _checks
from sscan._arrays import Array
from sscan._segments import segments as table_of_segments


class CausalConv1dGradients(NamedTuple):
    """Gradients of `causal_conv1d`, each in the shape and dtype of its argument; None where that was None."""

    dx: Any
    dweight: Any
    dbias: Any
    dinitial_state: Any


class _Problem(NamedTuple):
    """Checked arguments as the kernels take them; the last is the dtype of arithmetic."""

    x: Array
    weight: Array
    bias: Array | None
    silu: bool
    initial_state: Array | None
    segments: Array
    dtype: np.dtype[Any]


def _is_silu(op: str, activation: str | None) -> bool:
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation must be None or 'silu', got {activation!r}")
    return activation == "silu"


def _checked(op: str, views: tuple[Any, ...], activation: str | None, **outputs: tuple[Any, str]) -> _Problem:
    """``outputs`` are gradients that came in, and their shapes."""
    x, weight, bias, initial_state, seq_idx, cu_seqlens = views
    rows = "batch" if cu_seqlens is None else "sequences"
    size = _checks.sizes(
        op, x=(x, "batch, dim, length"), weight=(weight, "dim, width"), bias=(bias, "dim"),
        seq_idx=(seq_idx, "batch, length"), cu_seqlens=(cu_seqlens, "sequences+1"),
        initial_state=(initial_state, f"{rows}, dim, width-1"),
        **{name: (array, shape.replace("rows", rows)) for name, (array, shape) in outputs.items()},
    )  # fmt: skip
    if size["width"] < 1:
        raise ValueError(f"{op}: weight must have shape (dim, width) with width >= 1, got {weight.shape}")
    dtype = _checks.accumulation(_checks.storage(op, x=x, dy=outputs.get("dy", (None, ""))[0]))
    silu = _is_silu(op, activation)
    table = table_of_segments(op, size["batch"], size["length"], seq_idx, cu_seqlens)
    parameters = {"weight": weight, "bias": bias, "initial_state": initial_state}
    weight, bias, initial_state = (_checks.parameter(op, name, p, dtype) for name, p in parameters.items())
    return _Problem(_checks.time_contiguous(x), weight, bias, silu, initial_state, table, dtype)  # type: ignore[arg-type]


def _state_rows(problem: _Problem, cu_seqlens: Any) -> int:
    """How many rows the states have: one for each batch row or packed sequence."""
    return problem.x.shape[0] if cu_seqlens is None else len(problem.segments)


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
        float64, float32, float16 or bfloat16. Copied only if its last axis is strided.
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
    caller, views = _arrays.enter(
        op, x=x, weight=weight, bias=bias, initial_state=initial_state, seq_idx=seq_idx, cu_seqlens=cu_seqlens
    )
    kernels = _backends.for_device(op, caller.device)
    problem = _checked(op, views, activation)
    y, final_state = caller.empty(problem.x.shape, problem.x.dtype), None
    if return_final_state:
        dim, width = problem.weight.shape
        final_state = caller.empty((_state_rows(problem, cu_seqlens), dim, width - 1), problem.dtype)
    kernels.causal_conv1d_forward(
        problem.x, problem.weight, problem.bias, problem.silu, problem.segments, problem.initial_state, y, final_state
    )
    if final_state is None:
        return caller.leave(y)
    return caller.leave(y), caller.leave(final_state.astype(y.dtype, copy=False))


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
    caller, (dy, dfinal_state, *views) = _arrays.enter(
        op, dy=dy, dfinal_state=dfinal_state, x=x, weight=weight, bias=bias, initial_state=initial_state,
        seq_idx=seq_idx, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    kernels = _backends.for_device(op, caller.device)
    given = {"dy": (dy, "batch, dim, length"), "dfinal_state": (dfinal_state, "rows, dim, width-1")}
    problem = _checked(op, tuple(views), activation, **given)
    dfinal_state = _checks.parameter(op, "dfinal_state", dfinal_state, problem.dtype)
    dx, dweight = caller.empty(problem.x.shape, problem.x.dtype), np.empty_like(problem.weight)
    dbias, dinitial_state = (None if p is None else np.empty_like(p) for p in (problem.bias, problem.initial_state))
    kernels.causal_conv1d_backward(
        _checks.time_contiguous(dy), problem.x, problem.weight, problem.bias, problem.silu, problem.segments,
        problem.initial_state, dfinal_state, dx, dweight, dbias, dinitial_state,
    )  # fmt: skip
    return CausalConv1dGradients(
        caller.leave(dx),
        *(
            None if gradient is None else caller.leave(gradient.astype(array.dtype, copy=False))
            for gradient, array in zip((dweight, dbias, dinitial_state), views[1:4], strict=True)
        ),
    )


def causal_conv1d_update(x: Any, conv_state: Any, weight: Any, bias: Any = None, activation: str | None = None) -> Any:
    """One step of `causal_conv1d`, for decoding: y of one token, and the state moved on by it.

    Parameters
    ----------
    x : array (batch, dim)
        float64, float32, float16 or bfloat16.
    conv_state : array (batch, dim, kept), kept >= width - 1
        The inputs so far, newest last; shifted in place to end with x. float32, float16 or bfloat16 (float64 only with
        float64 x). Updated without a copy if it is contiguous and in the accumulation dtype.
    weight, bias, activation
        As given to `causal_conv1d`.

    Returns
    -------
    y : array (batch, dim)
        In the library and dtype of x.

    Raises
    ------
    ValueError, TypeError
        As `causal_conv1d`; TypeError too if `conv_state` is read-only.
    """
    op = "causal_conv1d_update"
    caller, (x, state, weight, bias) = _arrays.enter(
        op, x=x, conv_state=conv_state, weight=weight, bias=bias, writes=("conv_state",)
    )
    kernels = _backends.for_device(op, caller.device)
    shapes = {"x": (x, "batch, dim"), "conv_state": (state, "batch, dim, kept"), "weight": (weight, "dim, width")}
    size = _checks.sizes(op, **shapes, bias=(bias, "dim"))
    if not 1 <= size["width"] <= size["kept"] + 1:
        raise ValueError(
            f"{op}: conv_state must have shape (batch, dim, kept) with kept >= width - 1 and weight (dim, width) with "
            f"width >= 1, got {state.shape} and {weight.shape}"
        )
    dtype = _checks.accumulation(_checks.storage(op, x=x))
    silu = _is_silu(op, activation)
    own = _checks.parameter(op, "conv_state", state, dtype)
    parameters = (_checks.parameter(op, name, p, dtype) for name, p in (("weight", weight), ("bias", bias)))
    y = caller.empty(x.shape, x.dtype)
    kernels.causal_conv1d_update(_checks.time_contiguous(x), own, *parameters, silu, y)
    if own is not state:
        state[...] = own
    return caller.leave(y)
