"""The matrices of a diagonal state space, real or complex, and what they start as."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan._arrays import array_module
from sscan.models.arguments import check_integer, check_number
from sscan.nn import ops
from sscan.nn.mamba import log_of_one_to_n
from sscan.nn.modules import Draw, Module, Parameter, constant, normal, ones, zeros

if TYPE_CHECKING:
    from sscan.nn.autodiff import Array, Tensor

INITIAL = ("real", "lin", "half", "random")


class StateMatrix(Module):
    """The diagonal A = -exp(log) + i imag of every channel: its real part is always negative.

    ==========  ===================  =======  ===============================================
    `initial`   A_n, n = 0, 1, ...   field    where
    ==========  ===================  =======  ===============================================
    "real"      -(n + 1)             real     S4D-Real, Mamba's; section 3.6 of the paper
    "lin"       -1/2 + i n pi        complex  S4D-Lin; with `imaginary` = 1 as the paper has it
    "half"      -1/2                 real     Table 8
    "random"    -exp(Normal(0, 1))   real     Table 8, with the sign that keeps the state finite
    ==========  ===================  =======  ===============================================

    Parameters
    ----------
    dim, d_state : int
        Channels, and real numbers in the state of each. A complex state of d_state / 2 numbers stands for itself and
        its conjugate, of which the output is twice the real part: it is as large as a real one.
    initial : {"real", "lin", "half", "random"}
    imaginary : float, optional
        Of A_1, for "lin" alone; pi if it is left out.
    dtype : dtype
    max_lr : float
        As of :class:`sscan.nn.Parameter`.
    """

    def __init__(
        self,
        dim: int,
        d_state: int,
        initial: str,
        imaginary: float | None = None,
        dtype: Any = np.float32,
        *,
        max_lr: float = math.inf,
    ) -> None:
        check_integer("StateMatrix", "dim", dim)
        check_integer("StateMatrix", "d_state", d_state)
        if initial not in INITIAL:
            raise ValueError(f"StateMatrix: initial must be one of {', '.join(INITIAL)}, got {initial!r}")
        self.is_complex = initial == "lin"
        if imaginary is not None:
            check_number("StateMatrix", "imaginary", imaginary)
            if not self.is_complex:
                raise ValueError(f"StateMatrix: imaginary = {imaginary} is for a complex A, and {initial!r} is real")
        if self.is_complex and d_state % 2:
            raise ValueError(f"StateMatrix: d_state must be even for a complex state, got {d_state}")
        self.shape = dim, d_state // 2 if self.is_complex else d_state
        self.log = Parameter(self.shape, _log_of(initial), dtype, decay=False, max_lr=max_lr)
        self.imag: Parameter | None = None
        if self.is_complex:
            self.imag = Parameter(
                self.shape, _multiples(math.pi if imaginary is None else imaginary), dtype, decay=False, max_lr=max_lr
            )

    def __call__(self) -> Tensor:
        """A (dim, d_state), or complex (dim, d_state / 2)."""
        real = -ops.exp(self.log)
        return real if self.imag is None else ops.complex_of(real, self.imag)

    def ones(self) -> Array:
        """A matrix B that is one everywhere, of A's shape and dtype."""
        dtype = np.result_type(self.log.dtype, np.complex64) if self.is_complex else self.log.dtype
        return array_module(self.log.data).ones(self.shape, dtype)


class FixedMatrix(Module):
    """A matrix B or C that does not depend on the input, real or complex as the given A is; (dim, d_state) numbers.

    Parameters
    ----------
    A : StateMatrix
    one : bool, default False
        Whether it starts as ones, or is drawn from a normal distribution of mean square 1.
    """

    def __init__(self, A: StateMatrix, one: bool = False) -> None:
        draw = ones if one else normal(math.sqrt(0.5) if A.is_complex else 1.0)
        self.real = Parameter(A.shape, draw, A.log.dtype)
        self.imag = Parameter(A.shape, zeros if one else draw, A.log.dtype) if A.is_complex else None

    def __call__(self) -> Tensor:
        """The matrix, of A's shape and dtype."""
        return self.real if self.imag is None else ops.complex_of(self.real, self.imag)


def _log_of(initial: str) -> Draw:
    """The logarithm of minus the real part of A."""
    if initial == "real":
        return log_of_one_to_n
    return normal(1.0) if initial == "random" else constant(math.log(0.5))


def _multiples(imaginary: float) -> Draw:
    return functools.partial(_multiples_of, imaginary)


def _multiples_of(imaginary: float, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.broadcast_to(imaginary * np.arange(shape[1]), shape)
