"""S4D: the time-invariant state space with a diagonal A (Gu et al. 2022), with which Mamba's is compared."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sscan._arrays import array_module
from sscan.models.arguments import check_floats, check_integer, check_number
from sscan.nn import ops
from sscan.nn.autodiff import Tensor
from sscan.nn.modules import Parameter, at_least_float32, normal
from sscan.nn.recurrent import Recurrent
from sscan.nn.sequence_ops import selective_scan, ssm_convolution, ssm_kernel, with_skip
from sscan.nn.state_matrix import FixedMatrix, StateMatrix

if TYPE_CHECKING:
    from sscan.nn.autodiff import Array, Operand
    from sscan.nn.modules import Draw
    from sscan.nn.recurrent import State


MAX_LR = 1e-3  # of step size and A, as S4 is trained


class S4D(Recurrent):
    """h_t = A_bar h_{t-1} + B_bar u_t, y_t = C h_t + D u_t in every channel: (batch, dim, length) to the same.

    A_bar = exp(delta A) and B_bar = (A_bar - 1) / A: zero-order hold of B = 1. Of a complex state y is 2 Re(C h) + D u.
    Nothing depends on the input, so y is the convolution of u with K_k = C A_bar^k B_bar, plus D u, and is formed so,
    through the FFT. Where a state enters, and in packed rows, it is a scan with a constant step size, the same up to
    rounding.

    Step size, A and D are exempt from weight decay, and the learning rate of step size and A is at most 1e-3.

    Parameters
    ----------
    dim, d_state : int
        Channels, and real numbers in the state of each.
    A, imaginary
        The initial A, see :class:`sscan.nn.StateMatrix`.
    dt_min, dt_max : float
        The step size of a channel starts log-uniform between them.
    dtype : dtype
        Of the parameters, float32 at least.
    seed : int, Generator or None
        As of :class:`sscan.nn.Mamba`.
    """

    time: ClassVar[int] = 2

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        *,
        A: str = "lin",
        imaginary: float | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dtype: Any = np.float32,
        seed: int | np.random.Generator | None = 0,
    ) -> None:
        check_integer("S4D", "dim", dim)
        wide = at_least_float32("S4D", dtype)
        self.log_delta = Parameter((dim,), log_uniform("S4D", dt_min, dt_max), wide, decay=False, max_lr=MAX_LR)
        self.A = StateMatrix(dim, d_state, A, imaginary, wide, max_lr=MAX_LR)
        self.C = FixedMatrix(self.A)
        self.D = Parameter((dim,), normal(1.0), wide, decay=False)
        if seed is not None:
            self.initialise(seed)

    def __call__(self, u: Operand, seq_idx: Array | None = None) -> Tensor:
        """Apply the system to sequences from their beginnings; `seq_idx` as of every layer that is recurrent."""
        check_floats("S4D", "u", u, "batch", self.A.shape[0], "length")
        if seq_idx is not None:
            return self._scan(u, None, seq_idx)[0]
        kernel = ssm_kernel(ops.exp(self.log_delta), self.A(), self.A.ones(), self.C(), u.shape[2])  # type: ignore[union-attr]
        return ssm_convolution(u, with_skip(kernel, self.D))

    def extend(self, u: Operand, state: State) -> tuple[Tensor, State]:
        """The output for the continuation `u` of sequences, and the state at its end, both differentiable."""
        check_floats("S4D", "u", u, "batch", self.A.shape[0], "length")
        y, last = self._scan(u, state[0], None)
        return y, (last,)

    def _scan(self, u: Operand, state: Tensor | None, seq_idx: Array | None) -> tuple[Tensor, Tensor]:
        data = u.data if isinstance(u, Tensor) else u
        nothing = array_module(data).zeros_like(data)  # what the input adds to the step size
        y, last = selective_scan(
            u, nothing, self.A(), self.A.ones(), self.C(), self.D, None, ops.exp(self.log_delta),
            return_last_state=True, initial_state=state, seq_idx=seq_idx, discretization="zoh",
        )  # fmt: skip
        return y, last

    def new_state(self, batch: int) -> State:
        """The state before the first token: zeros (batch, dim, d_state), or half as many complex ones."""
        return (Tensor(array_module(self.D.data).zeros((batch, *self.A.shape), self.A.ones().dtype)),)


def log_uniform(owner: str, low: float, high: float) -> Draw:
    """Logarithms of numbers that are log-uniform on [low, high]; the owner's dt_min and dt_max."""
    check_number(owner, "dt_min", low, positive=True)
    check_number(owner, "dt_max", high, positive=True)
    if low > high:
        raise ValueError(f"{owner}: dt_min must be at most dt_max, got {low} and {high}")
    return functools.partial(_uniform_between, math.log(low), math.log(high))


def _uniform_between(low: float, high: float, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.uniform(low, high, shape)
