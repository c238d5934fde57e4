"""What tests of sscan.nn share: a case for every array operation, as a function of tensors and their shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sscan import nn
from sscan.nn import Tensor, ops

if TYPE_CHECKING:
    from collections.abc import Callable


def tensor(*shape: int, seed: int = 0, dtype: Any = np.float64) -> Tensor:
    return Tensor(np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype), requires_grad=True)


@nn.primitive
def _real(z: Any) -> Any:
    """A real function of complex numbers that depends on both of their parts."""
    return z.real * z.real * z.imag + z.imag


nn.defvjp(_real, lambda g, out, z: g * (2 * z.real * z.imag + (z.real * z.real + 1) * 1j))


ELEMENTWISE: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "add": (lambda a, b: a + b, ((2, 3), (3,))),
    "add_number": (lambda a: 2.5 + a + 1, ((2, 3),)),
    "add_array": (lambda a: np.arange(3.0) + a, ((2, 3),)),
    "subtract": (lambda a, b: a - b, ((2, 1), (4, 1, 3))),
    "subtract_from": (lambda a: 1.0 - a, ((3,),)),
    "multiply": (lambda a, b: a * b, ((2, 3), (1, 3))),
    "divide": (lambda a, b: a / (b * b + 1), ((2, 3), (2, 1))),
    "divide_into": (lambda a: 2.0 / (a * a + 1), ((3,),)),
    "negative": (lambda a: -a, ((3,),)),
    "power": (lambda a: a**3, ((3,),)),
    "same_twice": (lambda a: a * a + a, ((3,),)),
    "exp": (ops.exp, ((2, 3),)),
    "log": (lambda a: ops.log(a * a + 0.5), ((2, 3),)),
    "tanh": (ops.tanh, ((2, 3),)),
    "sin": (ops.sin, ((2, 3),)),
    "softplus": (ops.softplus, ((2, 3),)),
    "sigmoid": (ops.sigmoid, ((2, 3),)),
    "silu": (ops.silu, ((2, 3),)),
    "gelu": (ops.gelu, ((2, 3),)),
    "softmax": (ops.softmax, ((2, 3, 4),)),
    "complex_of": (lambda a, b: _real(ops.complex_of(a, b)), ((2, 3), (2, 3))),
    "layer_norm": (lambda x, w, b: ops.layer_norm(x, w, b, 1e-5), ((2, 3, 4), (4,), (4,))),
}
MATRIX = {
    "matrices": (lambda a, b: a @ b, ((2, 3), (3, 4))),
    "weight_left": (lambda a, b: a @ b, ((5, 3), (2, 3, 4))),
    "weight_right": (lambda a, b: a @ b, ((2, 4, 3), (3, 5))),
    "weight_many_axes": (lambda a, b: a @ b, ((5, 3), (2, 2, 3, 4))),
    "batched": (lambda a, b: a @ b, ((2, 4, 3), (2, 3, 5))),
    "broadcast": (lambda a, b: a @ b, ((2, 1, 4, 3), (3, 3, 5))),
    "constant_left": (lambda b: np.ones((2, 3)) @ b, ((3, 2),)),
    "no_columns": (lambda a, b: a @ b, ((5, 0), (2, 0, 4))),
}
SHAPE = {
    "reshape": (lambda a: a.reshape(3, -1), ((2, 3, 2),)),
    "swapaxes": (lambda a, b: a.swapaxes(0, 2) * b, ((2, 3, 2), (2, 1, 2))),
    "transpose": (lambda a: ops.transpose(a, (2, 0, 1)), ((2, 3, 4),)),
    "getitem": (lambda a: a[1:, ..., None, -1], ((3, 2, 2),)),
    "split": (lambda a: ops.split(a, (1, 0, 2), axis=1), ((2, 3),)),
    "split_one_used": (lambda a: ops.split(a, (1, 2), axis=1)[1], ((2, 3),)),
    "concatenate": (lambda a, b: ops.concatenate([a, b, a], axis=1), ((2, 3), (2, 1))),
    "sum": (lambda a: a.sum(), ((2, 3),)),
    "sum_axis": (lambda a: a.sum(axis=(0, 2)), ((2, 3, 4),)),
    "mean_keepdims": (lambda a: a.mean(axis=1, keepdims=True) * a, ((2, 3),)),
    "astype": (lambda a: a.astype(np.float64), ((2,),)),
    "empty": (lambda a: a * 2.0 + a.sum(), ((0, 3),)),
}
IDS = np.array([[4, 0, 4], [1, 4, 0]])
LOOKUP = {
    "embedding": (lambda w: ops.embedding(w, IDS), ((6, 2),)),
    "embedding_of_nothing": (lambda w: ops.embedding(w, IDS[:0]), ((6, 2),)),
}
CASES = {**ELEMENTWISE, **MATRIX, **SHAPE, **LOOKUP}
HOST_CONSTANTS = {"add_array", "constant_left"}  # cases that hold a NumPy array, which tensors elsewhere do not meet

# Layers of a SequenceConfig of width 8
S6 = {"layer": "gated", "d_state": 4}
S4 = {"layer": "ungated", "inner": "s4", "d_state": 4}
H3 = {"layer": "h3", "inner": "s6", "taps": 4, "d_state": 4}
HYENA = {"layer": "hyena", "length": 16, "width": 4}
ATTENTION = {"layer": "attention", "heads": 2, "positions": "rotary"}
EVERY = ("mamba", S6, S4, H3, HYENA, ATTENTION, "mlp", "glu")
