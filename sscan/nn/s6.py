"""S6: the selective state space (Algorithm 2 of the paper) by itself, and each part of its selection for itself."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from sscan._arrays import array_module
from sscan.models.arguments import check_floats, check_integer
from sscan.nn import ops
from sscan.nn.autodiff import Tensor
from sscan.nn.mamba import inverse_softplus_of_log_uniform
from sscan.nn.modules import Linear, Parameter, at_least_float32, ones
from sscan.nn.recurrent import Recurrent
from sscan.nn.s4d import log_uniform
from sscan.nn.sequence_ops import selective_scan
from sscan.nn.state_matrix import FixedMatrix, StateMatrix

if TYPE_CHECKING:
    from collections.abc import Collection

    from sscan.nn.autodiff import Array, Operand
    from sscan.nn.recurrent import State

SELECTIVE = ("delta", "B", "C")


class S6(Recurrent):
    """h_t = A_bar_t h_{t-1} + B_bar_t u_t, y_t = C_t h_t + D u_t in every channel: (batch, dim, length) to the same.

    delta_t = softplus(W_2 W_1 u_t + bias), B_t = W_B u_t and C_t = W_C u_t; A_bar_t = exp(delta_t A), and B_bar_t =
    delta_t B_t, or zero-order hold. It is what stands inside of :class:`sscan.nn.Mamba`, with the choices of the
    paper's ablations (Tables 7 to 10).

    Parameters
    ----------
    dim, d_state : int
        Channels, and real numbers in the state of each.
    dt_rank : int or "auto"
        Rows of W_1; "auto" is ceil(dim / 16). An integer takes a delta that depends on the input.
    dt_min, dt_max : float
        The step size starts log-uniform between them.
    selective : collection of {"delta", "B", "C"}
        What depends on the input. A delta that does not is softplus(bias), a B or C that does not is a parameter
        (dim, d_state) instead of a projection of the same size.
    A, imaginary
        The initial A, see :class:`sscan.nn.StateMatrix`.
    discretization : {"mamba", "zoh"}
        The rule of the scan, see :func:`sscan.selective_scan`.
    dtype, seed
        As of :class:`sscan.nn.Mamba`.
    """

    time: ClassVar[int] = 2

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        dt_rank: int | Literal["auto"] = "auto",
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        selective: Collection[str] = SELECTIVE,
        A: str = "real",
        imaginary: float | None = None,
        discretization: str = "mamba",
        dtype: Any = np.float32,
        seed: int | np.random.Generator | None = 0,
    ) -> None:
        if isinstance(selective, str) or not set(selective) <= set(SELECTIVE):
            raise ValueError(f"S6: selective must be some of {', '.join(SELECTIVE)}, got {selective!r}")
        check_integer("S6", "dim", dim)
        check_integer("S6", "d_state", d_state)
        if dt_rank != "auto":
            check_integer("S6", "dt_rank", dt_rank, 0)
            if "delta" not in selective:
                raise ValueError(f"S6: dt_rank = {dt_rank} is for a selective delta, and selective is {selective!r}")
        if discretization not in ("mamba", "zoh"):
            raise ValueError(f"S6: discretization must be 'mamba' or 'zoh', got {discretization!r}")
        log_uniform("S6", dt_min, dt_max)
        self.discretization = discretization
        wide = at_least_float32("S6", dtype)
        rank = 0 if "delta" not in selective else math.ceil(dim / 16) if dt_rank == "auto" else dt_rank
        self.sizes = rank, d_state * ("B" in selective), d_state * ("C" in selective)

        self.x_proj = Linear(dim, sum(self.sizes), False, dtype, seed=None)
        self.dt_proj = Linear(rank, dim, True, dtype, seed=None)
        bias = inverse_softplus_of_log_uniform(dt_min, dt_max, 0.0)
        self.dt_proj.bias = Parameter((dim,), bias, dtype, decay=False)
        self.A = StateMatrix(dim, d_state, A, imaginary, wide)
        self.B = None if "B" in selective else FixedMatrix(self.A, one=True)
        self.C = None if "C" in selective else FixedMatrix(self.A)
        self.D = Parameter((dim,), ones, wide, decay=False)
        if seed is not None:
            self.initialise(seed)

    def __call__(self, u: Operand, seq_idx: Array | None = None) -> Tensor:
        """Apply the system to sequences from their beginnings; `seq_idx` as of every layer that is recurrent."""
        return self._scan(u, None, seq_idx)[0]

    def extend(self, u: Operand, state: State) -> tuple[Tensor, State]:
        """The output for the continuation `u` of sequences, and the state at its end, both differentiable."""
        y, last = self._scan(u, state[0], None)
        return y, (last,)

    def _scan(self, u: Operand, state: Tensor | None, seq_idx: Array | None) -> tuple[Tensor, Tensor]:
        check_floats("S6", "u", u, "batch", self.A.shape[0], "length")
        dt, B, C = ops.split(self.x_proj.channel_first(u), self.sizes, axis=1)
        delta = ops.matmul(self.dt_proj.weight_like(dt), dt)
        bias = self.dt_proj.bias
        assert bias is not None
        y, last = selective_scan(
            u, delta, self.A(), self._along_time(B) if self.B is None else self.B(),
            self._along_time(C) if self.C is None else self.C(), self.D, None, bias.astype(self.D.dtype), True,
            return_last_state=True, initial_state=state, seq_idx=seq_idx, discretization=self.discretization,
        )  # fmt: skip
        return y, last

    def _along_time(self, projected: Tensor) -> Tensor:
        """B or C as the scan takes it; the parts of complex ones stand beside each other along time."""
        if not self.A.is_complex:
            return projected
        batch, size, length = projected.shape
        return projected.reshape(batch, size // 2, 2, length).swapaxes(2, 3).reshape(batch, size // 2, 2 * length)

    def new_state(self, batch: int) -> State:
        """The state before the first token: zeros (batch, dim, d_state), or half as many complex ones."""
        return (Tensor(array_module(self.D.data).zeros((batch, *self.A.shape), self.A.ones().dtype)),)
