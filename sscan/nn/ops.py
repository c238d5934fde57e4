"""The array operations that a model needs, each with its gradient beside it.

They follow NumPy: names, broadcasting, dtype promotion. Python numbers and plain arrays count as constants. In the
gradients, g is the gradient of the result and out the result; that of a complex number is d/dreal + i d/dimag, so what
multiplies it is conjugated.
"""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan._arrays import array_module, on_gpu
from sscan.linear_scan import linear_scan
from sscan.models.arguments import check_integers
from sscan.nn import elementwise, products
from sscan.nn.autodiff import Array, Operand, Primitive, Tensor, defvjp, defvjp_all, move, primitive

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Axis = int | tuple[int, ...] | None


def unbroadcast(gradient: Array, argument: Array) -> Array:
    """Sum `gradient` over the axes along which `argument` was broadcast; shape and dtype of `argument`.

    Of a complex one for a real argument the real part.
    """
    if gradient.dtype.kind == "c" and argument.dtype.kind != "c":
        gradient = gradient.real
    extra = gradient.ndim - argument.ndim
    stretched = [extra + i for i, n in enumerate(argument.shape) if n == 1 and gradient.shape[extra + i] != 1]
    axes = (*range(extra), *stretched)
    if axes:
        gradient = products.sum_over(gradient, axes).reshape(argument.shape)
    return gradient.astype(argument.dtype, copy=False)


def _conj(a: Any) -> Any:
    """The conjugate of an array or a number."""
    if isinstance(a, complex):
        return a.conjugate()
    return a.conj() if hasattr(a, "dtype") and a.dtype.kind == "c" else a


# Arithmetic


@primitive
def add(a: Array, b: Array) -> Array:
    """a + b."""
    return elementwise.add(a, b)


@primitive
def subtract(a: Array, b: Array) -> Array:
    """a - b."""
    return a - b


@primitive
def multiply(a: Array, b: Array) -> Array:
    """a * b."""
    return elementwise.multiply(a, b)


@primitive
def divide(a: Array, b: Array) -> Array:
    """a / b."""
    return a / b


@primitive
def negative(a: Array) -> Array:
    """-a."""
    return -a


@primitive
def power(a: Array, exponent: float) -> Array:
    """a ** exponent, for a constant exponent."""
    return a**exponent


defvjp(add, lambda g, out, a, b: unbroadcast(g, a), lambda g, out, a, b: unbroadcast(g, b))
defvjp(subtract, lambda g, out, a, b: unbroadcast(g, a), lambda g, out, a, b: unbroadcast(-g, b))
defvjp(
    multiply,
    lambda g, out, a, b: unbroadcast(elementwise.multiply(g, _conj(b)), a),
    lambda g, out, a, b: unbroadcast(elementwise.multiply(g, _conj(a)), b),
)
defvjp(
    divide,
    lambda g, out, a, b: unbroadcast(g / _conj(b), a),
    lambda g, out, a, b: unbroadcast(-g * _conj(out / b), b),
)
defvjp(negative, lambda g, out, a: -g)
defvjp(power, lambda g, out, a, exponent: g * _conj(exponent * a ** (exponent - 1)) if exponent else 0 * g)


# Matrix product


@primitive
def matmul(a: Array, b: Array) -> Array:
    """a @ b over the last two axes; the axes before them broadcast. Half precision is multiplied in float32."""
    if a.ndim < 2 or b.ndim < 2:
        raise ValueError(f"matmul: both operands need at least two axes, got shapes {a.shape} and {b.shape}")
    return products.matmul(a, b)


def _matmul_to(argument: Array, a: Array, b: Array) -> Array:
    """a @ b summed to the shape of `argument`; for a matrix, one product of the sum at a time, in float32 at least."""
    if argument.ndim > 2 or a.ndim == b.ndim == 2:
        return unbroadcast(_matmul_as(argument, a, b), argument)
    leading, a, b = products.broadcast_stacks(a, b)
    if on_gpu(a):
        return products.sum_of_products(a, b, argument.dtype)
    total = array_module(a).zeros(argument.shape, np.result_type(a.dtype, b.dtype, np.float32))
    for index in np.ndindex(*leading):
        total += products.matmul(a[index], b[index])
    return unbroadcast(total, argument)


def _matmul_as(argument: Array, a: Array, b: Array) -> Array:
    """a @ b; on a GPU in rows or columns as `argument`, so that what comes before meets arrays that lie alike."""
    rows, columns = argument.strides[-2:]
    if on_gpu(argument) and rows < columns:
        return products.matmul(b.swapaxes(-1, -2), a.swapaxes(-1, -2)).swapaxes(-1, -2)
    return products.matmul(a, b)


defvjp(
    matmul,
    lambda g, out, a, b: _matmul_to(a, g, _conj(b).swapaxes(-1, -2)),
    lambda g, out, a, b: _matmul_to(b, _conj(a).swapaxes(-1, -2), g),
)


# Shape


@primitive
def reshape(a: Array, shape: tuple[int, ...]) -> Array:
    """The elements of a in another shape."""
    return a.reshape(shape)


@primitive
def swapaxes(a: Array, first: int, second: int) -> Array:
    """a with two axes exchanged."""
    return a.swapaxes(first, second)


@primitive
def transpose(a: Array, axes: tuple[int, ...]) -> Array:
    """a with its axes in the order `axes`."""
    return a.transpose(axes)


@primitive
def getitem(a: Array, index: Any) -> Array:
    """a[index] with integers, slices, None and Ellipsis; see :func:`embedding` to look rows up."""
    for part in index if isinstance(index, tuple) else (index,):
        known = part is None or part is Ellipsis or isinstance(part, (int, np.integer, slice))
        if not known or isinstance(part, bool):
            raise TypeError(f"getitem: an index is an integer, a slice, None or ..., not {type(part).__name__}")
    return a[index]


def _getitem_vjp(g: Array, out: Array, a: Array, index: Any) -> Array:
    da = array_module(a).zeros_like(a)
    da[index] = g
    return da


@primitive
def _split(a: Array, sizes: tuple[int, ...], axis: int) -> tuple[Array, ...]:
    if builtins.sum(sizes) != a.shape[axis]:
        raise ValueError(f"split: sizes {tuple(sizes)} must add up to {a.shape[axis]}, the length of axis {axis}")
    return tuple(array_module(a).split(a, list(np.cumsum(sizes)[:-1]), axis))


def _split_vjp(g: tuple[Array | None, ...], out: tuple[Array, ...], a: Array, sizes: Any, axis: int) -> tuple[Array]:
    zeros_like = array_module(a).zeros_like
    return (_join([zeros_like(o) if part is None else part for part, o in zip(g, out, strict=True)], axis),)


@primitive
def _concatenate(*arrays: Array, axis: int) -> Array:
    return _join(arrays, axis)


def _join(arrays: Sequence[Array], axis: int) -> Array:
    """The arrays one after the other."""
    xp, axis = array_module(arrays[0]), axis % arrays[0].ndim
    alike = {(array.shape[:axis], array.shape[axis + 1 :], array.dtype) for array in arrays}
    if len(alike) > 1 or not all(map(elementwise.has_kernels, arrays)):
        return xp.concatenate(arrays, axis)
    (before, behind, dtype), ends = alike.pop(), np.cumsum([array.shape[axis] for array in arrays])
    out = xp.empty((*before, int(ends[-1]), *behind), dtype)
    for array, end in zip(arrays, ends, strict=True):
        place = slice(int(end) - array.shape[axis], int(end))
        elementwise.compute("copy", [array], out[(*(slice(None),) * axis, place)])
    return out


defvjp(reshape, lambda g, out, a, shape: g.reshape(a.shape))
defvjp(swapaxes, lambda g, out, a, first, second: g.swapaxes(first, second))
defvjp(transpose, lambda g, out, a, axes: g.transpose(tuple(int(i) for i in np.argsort([x % a.ndim for x in axes]))))
defvjp(getitem, _getitem_vjp)
defvjp_all(_split, _split_vjp)
defvjp_all(
    _concatenate,
    lambda g, out, *arrays, axis: array_module(g).split(g, list(np.cumsum([a.shape[axis] for a in arrays])[:-1]), axis),
)


def split(a: Operand, sizes: Sequence[int], axis: int = 0) -> tuple[Tensor, ...]:
    """Views of consecutive parts of `a` along `axis`, of the given sizes."""
    of_parts = isinstance(sizes, (tuple, list)) and all(isinstance(n, (int, np.integer)) and n >= 0 for n in sizes)
    if not of_parts:
        raise TypeError(f"split: sizes must be integers of at least 0, one for each part, got {sizes!r}")
    return _split.apply(a, tuple(sizes), axis)  # type: ignore[no-any-return]


def concatenate(tensors: Sequence[Operand], axis: int = 0) -> Tensor:
    """The tensors one after the other along `axis`."""
    if not tensors:
        raise ValueError("concatenate: tensors must be at least one, got none")
    return _concatenate(*tensors, axis=axis)


# Reductions


@primitive
def sum(a: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """Sum over an axis, several, or all."""
    return a.sum(axis=axis, keepdims=keepdims)


@primitive
def mean(a: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """Mean over an axis, several, or all."""
    return a.mean(axis=axis, keepdims=keepdims)


def _spread(g: Array, a: Array, axis: Axis, keepdims: bool) -> Array:
    """The gradient of a sum: g repeated along the axes that were summed."""
    xp = array_module(a)
    if axis is not None and not keepdims:
        g = xp.expand_dims(g, axis)
    return xp.broadcast_to(g, a.shape)


defvjp(sum, lambda g, out, a, axis=None, keepdims=False: _spread(g, a, axis, keepdims))
defvjp(mean, lambda g, out, a, axis=None, keepdims=False: _spread(g / (a.size / out.size), a, axis, keepdims))


# Elementwise functions


@primitive
def exp(a: Array) -> Array:
    """e to the power a."""
    return array_module(a).exp(a)


@primitive
def log(a: Array) -> Array:
    """Natural logarithm."""
    return array_module(a).log(a)


@primitive
def tanh(a: Array) -> Array:
    """Hyperbolic tangent."""
    return array_module(a).tanh(a)


@primitive
def sin(a: Array) -> Array:
    """Sine."""
    return array_module(a).sin(a)


@primitive
def softplus(a: Array) -> Array:
    """log(1 + exp(a)), without overflow."""
    return array_module(a).logaddexp(a, a.dtype.type(0))


@primitive
def sigmoid(a: Array) -> Array:
    """1 / (1 + exp(-a)), accurate in both tails."""
    return elementwise.sigmoid(a)


@primitive
def silu(a: Array) -> Array:
    """a sigmoid(a), also called swish."""
    return elementwise.silu(a)


@primitive
def gelu(a: Array) -> Array:
    """a Phi(a), with the distribution function Phi of the standard normal distribution: no approximation of it."""
    return elementwise.gelu(a)


@primitive
def softmax(a: Array) -> Array:
    """exp(a) / sum(exp(a)) along the last axis, in float32 at least; entries of -inf become 0."""
    e = a.astype(_wide(a), copy=False)
    e = array_module(a).exp(e - e.max(axis=-1, keepdims=True))
    return (e / e.sum(axis=-1, keepdims=True)).astype(a.dtype, copy=False)


@primitive
def complex_of(real: Array, imag: Array) -> Array:
    """real + i imag, for two arrays of one shape and dtype. The gradient of a complex array is d/dreal + i d/dimag."""
    return real + imag * np.result_type(imag.dtype, np.complex64).type(1j)


@primitive
def astype(a: Array, dtype: Any) -> Array:
    """a in another dtype; the gradient comes back in its own."""
    return products.cast(a, dtype)


def _wide(a: Array) -> np.dtype[Any]:
    return np.result_type(a.dtype, np.float32)


def _softmax_vjp(g: Array, out: Array, a: Array) -> Array:
    g, p = g.astype(_wide(a), copy=False), out.astype(_wide(a), copy=False)
    return (p * (g - (g * p).sum(axis=-1, keepdims=True))).astype(a.dtype, copy=False)


defvjp(exp, lambda g, out, a: g * _conj(out))
defvjp(log, lambda g, out, a: g / _conj(a))
defvjp(tanh, lambda g, out, a: g * _conj(1 - out * out))
defvjp(sin, lambda g, out, a: g * _conj(array_module(a).cos(a)))
defvjp(softplus, lambda g, out, a: elementwise.multiply(g, elementwise.sigmoid(a)))
defvjp(sigmoid, lambda g, out, a: elementwise.sigmoid_backward(g, out))
defvjp(silu, lambda g, out, a: elementwise.silu_backward(g, a))
defvjp(gelu, lambda g, out, a: elementwise.gelu_backward(g, a))
defvjp(softmax, _softmax_vjp)
defvjp(complex_of, lambda g, out, real, imag: g.real, lambda g, out, real, imag: g.imag)
defvjp(astype, lambda g, out, a, dtype: products.cast(unbroadcast(g, a) if g.dtype.kind == "c" else g, a.dtype))


# Normalisation


@primitive
def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, in float32 at least."""
    return (_standardised(x, eps)[0] * weight + bias).astype(x.dtype, copy=False)


def _standardised(x: Array, eps: float) -> tuple[Array, Array]:
    """x with mean 0 and variance 1 along the last axis, and what it was multiplied by for that."""
    x = x.astype(_wide(x), copy=False)
    x = x - x.mean(axis=-1, keepdims=True)
    scale = ((x * x).mean(axis=-1, keepdims=True) + eps) ** -0.5
    return x * scale, scale


def _layer_norm_vjp(g: Array, out: Array, x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, ...]:
    h, scale = _standardised(x, eps)
    g = g.astype(h.dtype, copy=False)
    dh = g * weight
    dx = (dh - dh.mean(axis=-1, keepdims=True) - h * (dh * h).mean(axis=-1, keepdims=True)) * scale
    return dx.astype(x.dtype, copy=False), unbroadcast(g * h, weight), unbroadcast(g, bias)


defvjp_all(layer_norm, _layer_norm_vjp)


# Look-up


@primitive
def _embedding(weight: Array, indices: Array) -> Array:
    return weight[indices]


def _embedding_vjp(g: Array, out: Array, weight: Array, indices: Array) -> Array:
    xp, ids = array_module(weight), indices.reshape(-1)
    if not ids.size:
        return xp.zeros_like(weight)
    order = _stable_order(ids, len(weight))
    ids = ids[order]
    rows = g.reshape(-1, weight.shape[1])[order].T.astype(np.result_type(g.dtype, np.float32), copy=False)
    # Equal indices stand side by side now. A linear scan that forgets where a new one begins adds up their rows.
    keeps = xp.zeros(ids.shape, rows.dtype)
    keeps[1:] = ids[1:] == ids[:-1]
    sums = linear_scan(xp.broadcast_to(keeps, rows.shape), rows).T
    every = xp.arange(weight.shape[0])
    last = xp.searchsorted(ids, every, side="right") - 1  # of each index; -1, where any row will do, if there is none
    return xp.where((ids[last] == every)[:, None], sums[last], 0).astype(weight.dtype, copy=False)


def _stable_order(ids: Array, count: int) -> Array:
    """The order in which ids below ``count`` rise."""
    if on_gpu(ids):
        from sscan.cuda import order

        if count <= order.LARGEST and ids.dtype.itemsize >= 4 and ids.size < order.MANY:
            return order.stable_order(array_module(ids).ascontiguousarray(ids))  # type: ignore[no-untyped-call]
    return array_module(ids).argsort(ids, kind="stable")


defvjp(_embedding, _embedding_vjp)


def check_indices(indices: Array, rows: int) -> None:
    """TypeError, ValueError for indices that are not of rows; see :func:`embedding`."""
    check_integers("embedding", "indices", indices)
    if isinstance(indices, np.ndarray) and indices.size and not (indices.min() >= 0 and indices.max() < rows):
        raise ValueError(f"embedding: indices must be in [0, {rows}), got {indices.min()} to {indices.max()}")


def embedding(weight: Tensor, indices: Array) -> Tensor:
    """Rows of `weight` (rows, width) by `indices` of any shape: result (*indices.shape, width).

    The gradient adds up the rows of equal index in a fixed order: no one-hot matrix, no atomics, the same bits every
    time. Indices in host memory are brought to where `weight` is.

    Raises
    ------
    TypeError, ValueError
        If the indices are not integers, or not in [0, rows). Values in GPU memory are not looked at, because that would
        have to wait for the GPU.
    """
    check_indices(indices, weight.shape[0])
    return _embedding(weight, move(indices, array_module(weight.data)))


# Operators and methods of Tensor


def _reflected(operation: Primitive[[Array, Array]]) -> Callable[[Tensor, Operand], Tensor]:
    return lambda a, b: operation(b, a)


def _reshape_method(a: Tensor, *shape: Any) -> Tensor:
    """The elements of `a` in the order of memory, in another `shape`: its sizes, or a tuple of them."""
    one = len(shape) == 1 and isinstance(shape[0], (tuple, list))
    return reshape(a, tuple(shape[0]) if one else shape)


Tensor.__add__ = Tensor.__radd__ = add
Tensor.__sub__, Tensor.__rsub__ = subtract, _reflected(subtract)
Tensor.__mul__ = Tensor.__rmul__ = multiply
Tensor.__truediv__, Tensor.__rtruediv__ = divide, _reflected(divide)
Tensor.__matmul__, Tensor.__rmatmul__ = matmul, _reflected(matmul)
Tensor.__neg__, Tensor.__pow__, Tensor.__getitem__ = negative, power, getitem
Tensor.reshape, Tensor.swapaxes, Tensor.astype = _reshape_method, swapaxes, astype
Tensor.sum, Tensor.mean = sum, mean
