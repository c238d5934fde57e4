"""One sequence over several devices: ops inside of ``shard_map`` over a mesh axis along which time is split.

Every device holds one part of the steps, of the same length, in the order of the axis. What crosses from device to
device is of the size of states, never of sequences; gradients go the same way back.
"""

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from sscan.jax import ops
from sscan.jax.ops import Input
from sscan.selective_scan import Discretization


@overload
def selective_scan(
    u: Input, delta: Input, A: Input, B: Input, C: Input, D: Input | None = None, z: Input | None = None,
    delta_bias: Input | None = None, delta_softplus: bool = False, *, return_last_state: Literal[True],
    axis_name: str, initial_state: Input | None = None, discretization: Discretization = "mamba",
) -> tuple[jax.Array, jax.Array]: ...  # fmt: skip


@overload
def selective_scan(
    u: Input, delta: Input, A: Input, B: Input, C: Input, D: Input | None = None, z: Input | None = None,
    delta_bias: Input | None = None, delta_softplus: bool = False, return_last_state: Literal[False] = False, *,
    axis_name: str, initial_state: Input | None = None, discretization: Discretization = "mamba",
) -> jax.Array: ...  # fmt: skip


@overload
def selective_scan(
    u: Input, delta: Input, A: Input, B: Input, C: Input, D: Input | None = None, z: Input | None = None,
    delta_bias: Input | None = None, delta_softplus: bool = False, return_last_state: bool = False, *,
    axis_name: str, initial_state: Input | None = None, discretization: Discretization = "mamba",
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
    axis_name: str,
    initial_state: Input | None = None,
    discretization: Discretization = "mamba",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """:func:`sscan.jax.selective_scan` of a sequence whose steps are split over the devices of a mesh axis.

    Every part is scanned from zero for the state at its end; those and the sums of the step sizes are gathered, and
    give the state that each part starts from, with which it is scanned again. So the work is twice that of one device
    with the same part.

    Parameters
    ----------
    u, delta, z : (batch, dim, length of a part)
        The device's part.
    B, C
        The device's part if they vary, the same on all devices if they are constant.
    A, D, delta_bias, initial_state
        The same on all devices. The initial state is that of the whole sequence.
    axis_name : str
        The axis of the mesh.

    Returns
    -------
    y : (batch, dim, length of a part)
        The device's part, or ``(y, last_state)`` with the state after the whole sequence, the same on all devices.
    """
    options: dict[str, Any] = {"delta_softplus": delta_softplus, "discretization": discretization}
    _, end = ops.selective_scan(u, delta, A, B, C, delta_bias=delta_bias, return_last_state=True, **options)
    if initial_state is None:
        initial_state = jnp.zeros_like(end)
    steps = _total_step(delta, delta_bias, delta_softplus, A.real.dtype)
    decays = jnp.exp(jnp.moveaxis(jax.lax.all_gather(steps, axis_name), 0, -1)[:, :, None] * A[:, :, None])
    ends = jnp.moveaxis(jax.lax.all_gather(end, axis_name), 0, -1)
    after = ops.linear_scan(decays, ends, initial_state)  # the state after each part
    before = jnp.concatenate([initial_state[..., None], after[..., :-1]], -1)
    own = jax.lax.dynamic_index_in_dim(before, jax.lax.axis_index(axis_name), -1, keepdims=False)
    y, state = ops.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, return_last_state=True, initial_state=own, **options
    )
    return (y, _of_last(state, axis_name)) if return_last_state else y


def _total_step(delta: Any, delta_bias: Any, delta_softplus: bool, dtype: Any) -> Any:
    """The step size of a whole part, (batch, dim)."""
    steps = delta.astype(dtype)
    if delta_bias is not None:
        steps = steps + delta_bias[:, None]
    return jnp.sum(jax.nn.softplus(steps) if delta_softplus else steps, -1)


def _devices(axis_name: str) -> int:
    """How many devices the axis has."""
    return jax.lax.psum(1, axis_name)  # type: ignore[no-any-return]


def _of_last(x: Any, axis_name: str) -> Any:
    """What the last device has, on all of them."""
    is_last = jax.lax.axis_index(axis_name) == _devices(axis_name) - 1
    return jax.lax.psum(jnp.where(is_last, x, 0), axis_name)


@overload
def causal_conv1d(
    x: Input, weight: Input, bias: Input | None = None, activation: str | None = None,
    initial_state: Input | None = None, *, return_final_state: Literal[True], axis_name: str,
) -> tuple[jax.Array, jax.Array]: ...  # fmt: skip


@overload
def causal_conv1d(
    x: Input, weight: Input, bias: Input | None = None, activation: str | None = None,
    initial_state: Input | None = None, return_final_state: Literal[False] = False, *, axis_name: str,
) -> jax.Array: ...  # fmt: skip


@overload
def causal_conv1d(
    x: Input, weight: Input, bias: Input | None = None, activation: str | None = None,
    initial_state: Input | None = None, return_final_state: bool = False, *, axis_name: str,
) -> jax.Array | tuple[jax.Array, jax.Array]: ...  # fmt: skip


def causal_conv1d(
    x: Input,
    weight: Input,
    bias: Input | None = None,
    activation: str | None = None,
    initial_state: Input | None = None,
    return_final_state: bool = False,
    *,
    axis_name: str,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """:func:`sscan.jax.causal_conv1d` of a sequence whose steps are split over the devices of a mesh axis.

    The last width - 1 inputs of every part go to the next device.

    Parameters
    ----------
    x : (batch, dim, length of a part)
        The device's part, of at least width - 1 steps.
    weight, bias, initial_state
        The same on all devices. The initial state is that of the whole sequence.
    axis_name : str
        The axis of the mesh.

    Returns
    -------
    y : (batch, dim, length of a part)
        The device's part, or ``(y, final_state)`` with the state after the whole sequence, the same on all devices.

    Raises
    ------
    ValueError
        If parts are shorter than width - 1.
    """
    kept, length = weight.shape[1] - 1, x.shape[2]
    if length < kept:
        raise ValueError(f"causal_conv1d: parts must have at least width - 1 = {kept} steps, got {length}")
    next_device = [(number, number + 1) for number in range(_devices(axis_name) - 1)]
    state = jax.lax.ppermute(x[:, :, length - kept :], axis_name, next_device)
    if initial_state is not None:
        state = jnp.where(jax.lax.axis_index(axis_name) == 0, initial_state, state)
    y, final_state = ops.causal_conv1d(x, weight, bias, activation, state, return_final_state=True)
    return (y, _of_last(final_state, axis_name)) if return_final_state else y
