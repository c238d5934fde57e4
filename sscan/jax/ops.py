"""The ops of sscan on JAX arrays, traced or not, with their gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np

from sscan.jax import _shapes
from sscan.jax._call import alike, call
from sscan.selective_scan import Discretization

Options = tuple[tuple[str, Any], ...]
Arrays = dict[str, Any]
Input: TypeAlias = jax.Array | np.ndarray[Any, Any]


def _compiled(function: Callable[..., Any], op: str) -> Callable[..., Any]:
    """So that an op outside of jit is traced once for its shapes and options."""

    def run(options: Options, arrays: Arrays) -> Any:
        return function(options, alike(arrays))

    run.__name__ = run.__qualname__ = op  # in error messages and profiles
    compiled = jax.jit(run, static_argnums=0, inline=True)

    def checked(options: Options, arrays: Arrays) -> Any:
        for name, value in options:
            if isinstance(value, jax.Array | np.ndarray | list):
                raise TypeError(f"{op}: {name} must be known while JAX traces, got {type(value).__name__}")
        return compiled(options, arrays)

    return checked


def _plain(op: str, options: Options, arrays: Arrays) -> Any:
    return call(op, arrays, **dict(options))


def _differentiable(op: str, backward: Callable[..., Any], forward: Callable[..., Any] | None = None) -> Any:
    """The op as a function of options and arrays, with the gradients of ``backward``, a named tuple.

    ``forward`` gives the results and what else is saved for ``backward``, which takes options, arrays, what was saved,
    and the gradients of the results.
    """

    def save(options: Options, arrays: Arrays) -> Any:
        results, saved = forward(options, arrays) if forward else (_plain(op, options, arrays), None)
        return results, (arrays, saved)

    def pull_back(options: Options, kept: Any, given: Any) -> tuple[Arrays]:
        arrays, saved = kept
        gradients = backward(options, arrays, saved, jax.tree.map(_conjugate, given))
        return ({name: _like(getattr(gradients, f"d{name}", None), x) for name, x in arrays.items()},)

    differentiable = jax.custom_vjp(partial(_plain, op), nondiff_argnums=(0,))
    differentiable.defvjp(save, pull_back)
    return _compiled(differentiable, op)


def _conjugate(gradient: Any) -> Any:
    """From JAX's convention for complex gradients to that of the core, PyTorch's, or back."""
    return jnp.conj(gradient) if jnp.iscomplexobj(gradient) else gradient


def _like(gradient: Any, x: Any) -> Any:
    return None if gradient is None else _conjugate(gradient).astype(x.dtype)


def _given(**arrays: Any) -> Arrays:
    return {name: x for name, x in arrays.items() if x is not None}


# --- selective scan ---------------------------------------------------------------------------------------------------


def _scan_forward(options: Options, arrays: Arrays) -> Any:
    kept, checkpoints = dict(options), None
    both = kept.pop("return_last_state")
    if _shapes.keeps_checkpoints(arrays):
        y, last_state, checkpoints = call("selective_scan_forward", arrays, **kept)
    else:
        y, last_state = call("selective_scan", arrays, return_last_state=True, **kept)
    return (y, last_state) if both else y, checkpoints


def _scan_backward(options: Options, arrays: Arrays, checkpoints: Any, given: Any) -> Any:
    kept = dict(options)
    dy, dlast_state = given if kept.pop("return_last_state") else (given, None)
    given = {"dy": dy, **arrays, "dlast_state": dlast_state, "checkpoints": checkpoints}
    return call("selective_scan_backward", given, **kept)


_selective_scan = _differentiable("selective_scan", _scan_backward, _scan_forward)


@overload
def selective_scan(
    u: Input, delta: Input, A: Input, B: Input, C: Input, D: Input | None = None, z: Input | None = None,
    delta_bias: Input | None = None, delta_softplus: bool = False, *, return_last_state: Literal[True],
    initial_state: Input | None = None, seq_idx: Input | None = None,
    cu_seqlens: Input | None = None, discretization: Discretization = "mamba",
) -> tuple[jax.Array, jax.Array]: ...  # fmt: skip


@overload
def selective_scan(
    u: Input, delta: Input, A: Input, B: Input, C: Input, D: Input | None = None, z: Input | None = None,
    delta_bias: Input | None = None, delta_softplus: bool = False, return_last_state: Literal[False] = False, *,
    initial_state: Input | None = None, seq_idx: Input | None = None,
    cu_seqlens: Input | None = None, discretization: Discretization = "mamba",
) -> jax.Array: ...  # fmt: skip


@overload
def selective_scan(
    u: Input, delta: Input, A: Input, B: Input, C: Input, D: Input | None = None, z: Input | None = None,
    delta_bias: Input | None = None, delta_softplus: bool = False, return_last_state: bool = False, *,
    initial_state: Input | None = None, seq_idx: Input | None = None,
    cu_seqlens: Input | None = None, discretization: Discretization = "mamba",
) -> jax.Array | tuple[jax.Array, jax.Array]: ...  # fmt: skip


def selective_scan(
    u: Input,
    delta: Input,
    A: Input,
    B: Input,
    C: Input,
    D: Input | None = None,
    z: Input | None = None,
    delta_bias: Input | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Input | None = None,
    seq_idx: Input | None = None,
    cu_seqlens: Input | None = None,
    discretization: Discretization = "mamba",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """:func:`sscan.selective_scan` in JAX: y, or (y, last_state), both differentiable.

    Every array but seq_idx and cu_seqlens has a gradient. For the backward the inputs are kept and, unless seq_idx or
    cu_seqlens are given on the CPU, the states at every 32nd step (16th on a GPU). Options are static.
    """
    arrays = _given(
        u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state, seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    options = (
        ("delta_softplus", delta_softplus),
        ("discretization", discretization),
        ("return_last_state", return_last_state),
    )
    return _selective_scan(options, arrays)


_selective_state_update = _compiled(partial(_plain, "selective_state_update"), "selective_state_update")


def selective_state_update(
    state: Input,
    x: Input,
    dt: Input,
    A: Input,
    B: Input,
    C: Input,
    D: Input | None = None,
    z: Input | None = None,
    dt_bias: Input | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Input | None = None,
    *,
    A_log: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """:func:`sscan.selective_state_update` in JAX: y and the new state.

    The new state takes the memory of the old one where JAX can let it: inside of loops, and if it is donated. It has
    no derivative.
    """
    arrays = _given(
        state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, state_batch_indices=state_batch_indices
    )
    found: tuple[Any, Any] = _selective_state_update((("dt_softplus", dt_softplus), ("A_log", A_log)), arrays)
    return found


# --- linear scan ------------------------------------------------------------------------------------------------------


def _linear_forward(options: Options, arrays: Arrays) -> Any:
    h = _plain("linear_scan", options, arrays)
    return h, h


def _linear_backward(options: Options, arrays: Arrays, h: Any, dh: Any) -> Any:
    given = {"dh": dh, "a": arrays["a"], "h": h, "initial_state": arrays.get("initial_state")}
    return call("linear_scan_backward", given, **dict(options))


_linear_scan = _differentiable("linear_scan", _linear_backward, _linear_forward)


def linear_scan(a: Input, b: Input, initial_state: Input | None = None, reverse: bool = False) -> jax.Array:
    """:func:`sscan.linear_scan` in JAX; a, b and initial_state have gradients."""
    return _linear_scan((("reverse", reverse),), _given(a=a, b=b, initial_state=initial_state))


# --- causal convolution -----------------------------------------------------------------------------------------------


def _convolution_backward(options: Options, arrays: Arrays, saved: None, given: Any) -> Any:
    kept = dict(options)
    dy, dfinal_state = given if kept.pop("return_final_state") else (given, None)
    return call("causal_conv1d_backward", {"dy": dy, **arrays, "dfinal_state": dfinal_state}, **kept)


_causal_conv1d = _differentiable("causal_conv1d", _convolution_backward)


@overload
def causal_conv1d(
    x: Input, weight: Input, bias: Input | None = None, activation: str | None = None,
    initial_state: Input | None = None, *, return_final_state: Literal[True], seq_idx: Input | None = None,
    cu_seqlens: Input | None = None,
) -> tuple[jax.Array, jax.Array]: ...  # fmt: skip


@overload
def causal_conv1d(
    x: Input, weight: Input, bias: Input | None = None, activation: str | None = None,
    initial_state: Input | None = None, return_final_state: Literal[False] = False, seq_idx: Input | None = None,
    cu_seqlens: Input | None = None,
) -> jax.Array: ...  # fmt: skip


@overload
def causal_conv1d(
    x: Input, weight: Input, bias: Input | None = None, activation: str | None = None,
    initial_state: Input | None = None, return_final_state: bool = False, seq_idx: Input | None = None,
    cu_seqlens: Input | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]: ...  # fmt: skip


def causal_conv1d(
    x: Input,
    weight: Input,
    bias: Input | None = None,
    activation: str | None = None,
    initial_state: Input | None = None,
    return_final_state: bool = False,
    seq_idx: Input | None = None,
    cu_seqlens: Input | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """:func:`sscan.causal_conv1d` in JAX: y, or (y, final_state), both differentiable.

    x, weight, bias and initial_state have gradients.
    """
    arrays = _given(x=x, weight=weight, bias=bias, initial_state=initial_state, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
    return _causal_conv1d((("activation", activation), ("return_final_state", return_final_state)), arrays)


_causal_conv1d_update = _compiled(partial(_plain, "causal_conv1d_update"), "causal_conv1d_update")


def causal_conv1d_update(
    x: Input, conv_state: Input, weight: Input, bias: Input | None = None, activation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """:func:`sscan.causal_conv1d_update` in JAX: y and the new state; see `selective_state_update`."""
    arrays = _given(x=x, conv_state=conv_state, weight=weight, bias=bias)
    found: tuple[Any, Any] = _causal_conv1d_update((("activation", activation),), arrays)
    return found


# --- RMS norm ---------------------------------------------------------------------------------------------------------


def _norm_backward(options: Options, arrays: Arrays, saved: None, given: Any) -> Any:
    dy, dresidual_out = given if "residual" in arrays else (given, None)
    return call("rms_norm_backward", {"dy": dy, **arrays, "dresidual_out": dresidual_out}, **dict(options))


_rms_norm = _differentiable("rms_norm", _norm_backward)


@overload
def rms_norm(x: Input, weight: Input, residual: None = None, eps: float = 1e-5) -> jax.Array: ...


@overload
def rms_norm(x: Input, weight: Input, residual: Input, eps: float = 1e-5) -> tuple[jax.Array, jax.Array]: ...


def rms_norm(
    x: Input, weight: Input, residual: Input | None = None, eps: float = 1e-5
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """:func:`sscan.rms_norm` in JAX: y, or with a residual (y, residual_out); all three arrays have gradients."""
    return _rms_norm((("eps", eps),), _given(x=x, weight=weight, residual=residual))


# --- time-invariant systems -------------------------------------------------------------------------------------------


def _discretize_backward(options: Options, arrays: Arrays, saved: None, given: Any) -> Any:
    dA_bar, dB_bar = given
    return call("discretize_backward", {"dA_bar": dA_bar, "dB_bar": dB_bar, **arrays}, **dict(options))


_discretize = _differentiable("discretize", _discretize_backward)


def discretize(delta: Input, A: Input, B: Input, method: str = "zoh") -> tuple[jax.Array, jax.Array]:
    """:func:`sscan.discretize` in JAX: A_bar and B_bar; delta, A and B have gradients."""
    found: tuple[Any, Any] = _discretize((("method", method),), _given(delta=delta, A=A, B=B))
    return found


def _kernel_backward(options: Options, arrays: Arrays, saved: None, dK: Any) -> Any:
    return call("ssm_kernel_backward", {"dK": dK, **arrays}, **dict(options))


_ssm_kernel = _differentiable("ssm_kernel", _kernel_backward)


def ssm_kernel(delta: Input, A: Input, B: Input, C: Input, length: int, method: str = "zoh") -> jax.Array:
    """:func:`sscan.ssm_kernel` in JAX; delta, A, B and C have gradients."""
    return _ssm_kernel((("length", length), ("method", method)), _given(delta=delta, A=A, B=B, C=C))


def _fft_backward(options: Options, arrays: Arrays, saved: None, dy: Any) -> Any:
    return call("ssm_convolution_backward", {"dy": dy, **arrays})


_ssm_convolution = _differentiable("ssm_convolution", _fft_backward)


def ssm_convolution(u: Input, kernel: Input) -> jax.Array:
    """:func:`sscan.ssm_convolution` in JAX; u and kernel have gradients."""
    return _ssm_convolution((), _given(u=u, kernel=kernel))
