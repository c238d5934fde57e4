"""Cross-entropy that holds one block of rows at a time.

For a row of logits v and its target k the loss is log(sum_j exp(v_j)) - v_k, in nats, averaged over the rows whose
target is not `ignore_index`. Its gradient is (softmax(v) - onehot(k)) / rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sscan._arrays import array_module
from sscan.models.arguments import check_integers
from sscan.nn.autodiff import Array, Operand, Tensor, defvjp_all, move, needs_gradient, primitive
from sscan.nn.products import matmul

if TYPE_CHECKING:
    from collections.abc import Iterator

# Of logits: small enough to stay in a CPU's second-level cache between the passes over them, and large enough to fill a
# GPU with each.
BLOCK_BYTES, BLOCK_BYTES_GPU = 1 << 21, 1 << 28


def cross_entropy(logits: Operand, targets: Array, ignore_index: int = -100) -> Tensor:
    """Mean cross-entropy of logits (..., classes) against integer targets (...): a scalar.

    Beside the logits themselves, the forward holds one block of rows, the backward one block and the gradient of the
    logits. Accumulates in float32 (float64 for float64 logits). Targets in host memory are brought to where the logits
    are. Nothing waits for a GPU. Rows whose target is `ignore_index` do not count.

    Raises
    ------
    TypeError, ValueError
        If the targets are not integers, not of the shape of the rows, or not a class. Values in GPU memory are not
        looked at, because that would have to wait for the GPU.
    """
    logits = logits if isinstance(logits, Tensor) else Tensor(logits)
    _check_targets("cross_entropy", targets, logits.shape, ignore_index)
    return _cross_entropy(logits, move(targets, array_module(logits.data)), ignore_index)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Array, ignore_index: int = -100) -> Tensor:
    """``cross_entropy(hidden @ weight.T, targets)`` without ever holding the logits.

    `hidden` is (..., width), `weight` (classes, width), `targets` (...). Logits exist for one block of rows at a time.
    When a gradient will be needed, it is computed in the same pass, in the buffer of the logits, so that the backward
    only scales it: the memory is that of the two gradients, whatever the number of classes. Rows whose target is
    `ignore_index` do not count.

    Raises
    ------
    TypeError, ValueError
        As :func:`cross_entropy`.
    """
    _check_targets("linear_cross_entropy", targets, (*hidden.shape[:-1], weight.shape[0]), ignore_index)
    targets, differentiate = move(targets, array_module(hidden.data)), needs_gradient(hidden, weight)
    return _linear_cross_entropy.apply(hidden, weight, targets, ignore_index, differentiate)[0]  # type: ignore[no-any-return]


def _check_targets(name: str, targets: Array, logits_shape: tuple[int, ...], ignore_index: int) -> None:
    check_integers(name, "targets", targets)
    if tuple(targets.shape) != logits_shape[:-1]:
        raise ValueError(f"{name}: targets must have shape {logits_shape[:-1]}, got {tuple(targets.shape)}")
    if not isinstance(targets, np.ndarray):
        return
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= logits_shape[-1]))
    if wrong.any():
        expected = f"in [0, {logits_shape[-1]}) or {ignore_index}"
        raise ValueError(f"{name}: targets must be {expected}, got {int(targets[wrong][0])}")


def _blocks(rows: Array, classes: int) -> Iterator[slice]:
    size = max(1, (BLOCK_BYTES if isinstance(rows, np.ndarray) else BLOCK_BYTES_GPU) // (4 * max(classes, 1)))
    return (slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size))


def _accumulation_dtype(array: Array) -> type:
    return np.float64 if array.dtype == np.float64 else np.float32


def _softmax_and_loss(logits: Array, targets: Array, counted: Array) -> Array:
    """Overwrite some rows of logits by their softmax; return the sum of their losses."""
    xp = array_module(logits)
    largest = logits.max(axis=1, keepdims=True)
    logits -= largest
    chosen = xp.take_along_axis(logits, xp.where(counted, targets, 0)[:, None], axis=1)[:, 0]
    xp.exp(logits, out=logits)
    normaliser = logits.sum(axis=1, keepdims=True)
    logits /= normaliser
    return xp.where(counted, xp.log(normaliser)[:, 0] - chosen, 0).sum()


def _softmax_to_gradient(softmax: Array, targets: Array, counted: Array, scale: Array) -> None:
    """Overwrite softmax by scale (softmax - onehot(target)), and by zero in rows that do not count."""
    xp = array_module(softmax)
    softmax[xp.arange(len(targets)), xp.where(counted, targets, 0)] -= 1
    softmax *= xp.where(counted, scale, 0)[:, None].astype(softmax.dtype)


@primitive
def _cross_entropy(logits: Array, targets: Array, ignore_index: int) -> Array:
    rows, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    counted = targets != ignore_index
    total = array_module(logits).zeros((), _accumulation_dtype(logits))
    for block in _blocks(rows, rows.shape[1]):
        total += _softmax_and_loss(rows[block].astype(total.dtype), targets[block], counted[block])
    return total / _divisor(counted, total.dtype)


def _cross_entropy_vjp(g: Array, out: Array, logits: Array, targets: Array, ignore_index: int) -> tuple[Array]:
    rows, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    counted = targets != ignore_index
    scale = g / _divisor(counted, out.dtype)
    dlogits = array_module(logits).empty_like(rows)
    for block in _blocks(rows, rows.shape[1]):
        softmax = rows[block].astype(out.dtype)
        _softmax_and_loss(softmax, targets[block], counted[block])
        _softmax_to_gradient(softmax, targets[block], counted[block], scale)
        dlogits[block] = softmax
    return (dlogits.reshape(logits.shape),)


@primitive
def _linear_cross_entropy(
    hidden: Array, weight: Array, targets: Array, ignore_index: int, differentiate: bool
) -> tuple[Array, Array | None, Array | None]:
    """The loss and, if asked for, its gradients with respect to hidden and weight."""
    xp = array_module(hidden)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    counted = targets != ignore_index
    total = xp.zeros((), _accumulation_dtype(hidden))
    wide_weight = weight.astype(total.dtype, copy=False)
    scale = 1 / _divisor(counted, total.dtype)
    dhidden = xp.empty_like(rows) if differentiate else None
    dweight = xp.zeros(weight.shape, total.dtype) if differentiate else None
    for block in _blocks(rows, len(weight)):
        wide_rows = rows[block].astype(total.dtype, copy=False)
        logits = matmul(wide_rows, wide_weight.T)
        total += _softmax_and_loss(logits, targets[block], counted[block])
        if dhidden is not None:
            _softmax_to_gradient(logits, targets[block], counted[block], scale)
            dhidden[block] = matmul(logits, wide_weight)
            dweight += matmul(logits.T, wide_rows)
    if dhidden is not None and dweight is not None:
        dhidden, dweight = dhidden.reshape(hidden.shape), dweight.astype(weight.dtype, copy=False)
    return total * scale, dhidden, dweight


def _divisor(counted: Array, dtype: Any) -> Array:
    """Number of rows that count, or one if none does."""
    return array_module(counted).maximum(counted.sum(), 1).astype(dtype)


defvjp_all(_cross_entropy, _cross_entropy_vjp)
defvjp_all(
    _linear_cross_entropy,
    lambda g, out, hidden, weight, *rest: (out[1] * g[0].astype(out[1].dtype), out[2] * g[0].astype(out[2].dtype)),
)
