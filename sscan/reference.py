"""The definition: every op of sscan and its gradient in plain NumPy, sequential in time.

Read it beside the paper (Gu and Dao, "Mamba", arXiv 2312.00752v2): each function states the equation it computes and
then loops. It imports nothing of ours, so it cannot share a bug with the kernels, and it is the yardstick of the tests
twice: float64 inputs give the exact values, and float32, float16 or bfloat16 inputs give what plain arithmetic in the
same storage and accumulation dtypes can reach.

Conventions
-----------
dtypes
    Arithmetic and states are in float32, or float64 when the inputs are. Outputs have the dtype of the activations and
    a gradient has the dtype of its input.
complex A
    ``state`` complex numbers stand for ``2 * state`` real ones in conjugate pairs, so ``y = 2 Re(sum_n C_n h_n)``.
complex gradients
    As in PyTorch: the gradient ``g`` of a real loss satisfies ``dL = Re(conj(g) dx)``.
analytic continuation
    All forward functions accept complex activations, which is how the tests differentiate them by complex steps; only a
    complex ``A`` means a complex system.

Arguments are taken as valid: the public ops check them. No input is written, except by the ``update`` functions.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Iterator

Array = npt.NDArray[Any]


# --- Dtypes -----------------------------------------------------------------------------------------------------------


def accumulation_dtype(*arrays: Array | None) -> np.dtype[Any]:
    """The dtype arithmetic is done in: at least float32, and wide enough for every array given (complex if one is)."""
    return np.result_type(np.float32, *(x.dtype for x in arrays if x is not None))


def _cast_like(gradient: Array, x: Array) -> Array:
    """A gradient in the dtype of the input ``x`` it belongs to (real inputs have real gradients)."""
    real = np.iscomplexobj(gradient) and not np.iscomplexobj(x)
    return np.asarray(gradient.real if real else gradient, x.dtype)


# --- Scalar functions: stable for every finite argument, real or complex ----------------------------------------------


def sigmoid(v: Array) -> Array:
    """1 / (1 + exp(-v)), through exp of a number whose real part is never positive."""
    positive = v.real >= 0
    e = np.exp(np.where(positive, -v, v))
    result: Array = np.where(positive, 1, e) / (1 + e)
    return result


def softplus(v: Array) -> Array:
    """``log(1 + exp(v)) = max(v, 0) + log1p(exp(-|v|))``; its derivative is ``sigmoid``."""
    positive = v.real >= 0
    return np.where(positive, v, 0) + np.log1p(np.exp(np.where(positive, -v, v)))


def silu(v: Array) -> Array:
    """The gate of the block, v sigmoid(v)."""
    return v * sigmoid(v)


def silu_derivative(v: Array) -> Array:
    """Derivative s (1 + v (1 - s)) of silu, with s = sigmoid(v)."""
    s = sigmoid(v)
    result: Array = s * (1 + v * (1 - s))
    return result


def expm1(z: Array) -> Array:
    """exp(z) - 1 without cancellation; z = p + iq gives (expm1(p) cos q - 2 sin^2(q/2)) + i exp(p) sin q."""
    p, q = z.real, z.imag
    result: Array = np.expm1(p)
    if np.iscomplexobj(z):
        result = result * np.cos(q) - 2 * np.sin(q / 2) ** 2 + 1j * (np.exp(p) * np.sin(q))
    return result


def phi1(z: Array) -> Array:
    """Factor expm1(z) / z of the zero-order hold; 1 + z/2 + z^2/6 + z^3/24 near 0."""
    near = np.abs(z) < 1e-4
    small, large = np.where(near, z, 0), np.where(near, 1, z)  # neither branch meets an argument it cannot take
    return np.where(near, 1 + small * (1 / 2 + small * (1 / 6 + small / 24)), expm1(large) / large)


# psi(z) = sum_k (k + 1) / (k + 2)! z^k; the first term left out is below 1e-17 for |z| < 1
_PSI_SERIES = [(k + 1) / float(np.prod(np.arange(1.0, k + 3))) for k in range(18)]


def psi(z: Array) -> Array:
    """Derivative (z exp(z) - expm1(z)) / z^2 = (exp(z) - phi1(z)) / z of phi1; 1/2 + z/3 + z^2/8 + ... near 0."""
    near = np.abs(z) < 1
    small, large = np.where(near, z, 0), np.where(near, 1, z)
    series = np.zeros_like(z)
    for coefficient in reversed(_PSI_SERIES):
        series = series * small + coefficient
    return np.where(near, series, (np.exp(large) - phi1(large)) / large)


# --- B and C: constant (dim, state), shared (batch, state, length) or grouped (batch, groups, state, length) ----------


def _as_matrix(M: Array, A: Array, dtype: np.dtype[Any]) -> Array:
    """B or C in ``dtype``; with complex A a real varying one interleaves (re, im) along its last axis."""
    result = M.astype(dtype)
    if np.iscomplexobj(A) and not np.iscomplexobj(M) and M.ndim > 2:
        result = result[..., 0::2] + 1j * result[..., 1::2]
    return result


def _as_matrix_gradient(dM: Array, M: Array) -> Array:
    """Adjoint of `_as_matrix`: the gradient in the form and dtype of the array that was given."""
    if dM.shape != M.shape:
        dM = np.stack([dM.real, dM.imag], axis=-1).reshape(M.shape)
    return _cast_like(dM, M)


def spread(M: Array, dim: int) -> Array:
    """B or C as every channel sees it: (batch or 1, dim, length or 1, state)."""
    if M.ndim == 2:
        return M[None, :, None, :]
    grouped = M[:, None] if M.ndim == 3 else M
    return np.repeat(grouped.swapaxes(2, 3), dim // grouped.shape[1], axis=1)


def gather(dM: Array, M: Array) -> Array:
    """Adjoint of `spread`: sums (batch, dim, length, state) back to the form of ``M``."""
    if M.ndim == 2:
        total: Array = dM.sum(axis=(0, 2))
        return total
    batch, dim, length, state = dM.shape
    groups = 1 if M.ndim == 3 else M.shape[1]
    total = dM.reshape(batch, groups, dim // groups, length, state).sum(axis=2).swapaxes(2, 3)
    return total[:, 0] if M.ndim == 3 else total


def _at(M: Array, t: int) -> Array:
    """The part of B or C (or of its gradient) that step t uses, as a view."""
    return M if M.ndim == 2 else M[..., t : t + 1]


# --- Discretisation (2.2): every rule is A_bar = f(z), B_bar = Delta s(z) B with z = Delta A --------------------------


class DiscretizeGradients(NamedTuple):
    """What `discretize_backward` returns."""

    ddelta: Array
    dA: Array
    dB: Array


def rule(z: Array, method: str) -> tuple[Array, Array]:
    """f(z) and s(z): A_bar = f(z), B_bar = Delta s(z) B.

    zoh, eq. (4)    exp(z)                     expm1(z) / z
    mamba           exp(z)                     1                 (A by zero-order hold, B by Euler)
    bilinear        (1 + z/2) / (1 - z/2)      1 / (1 - z/2)
    euler           1 + z                      1
    """
    if method == "zoh":
        return np.exp(z), phi1(z)
    if method == "mamba":
        return np.exp(z), np.ones_like(z)
    if method == "bilinear":
        return (1 + z / 2) / (1 - z / 2), 1 / (1 - z / 2)
    if method == "euler":
        return 1 + z, np.ones_like(z)
    raise ValueError(f"discretization must be 'zoh', 'mamba', 'bilinear' or 'euler', got {method!r}")


def rule_derivatives(z: Array, method: str) -> tuple[Array, Array, Array]:
    """f'(z), s'(z) and d(Delta s(Delta A))/dDelta = s(z) + z s'(z), the last in closed form (for zoh it is exp(z))."""
    if method == "zoh":
        return np.exp(z), psi(z), np.exp(z)
    if method == "mamba":
        return np.exp(z), np.zeros_like(z), np.ones_like(z)
    if method == "bilinear":
        square = 1 / (1 - z / 2) ** 2
        return square, square / 2, square
    return np.ones_like(z), np.zeros_like(z), np.ones_like(z)


def _aligned(delta: Array, A: Array, B: Array) -> tuple[Array, Array, Array]:
    """delta, A and B in accumulation dtype with axes that broadcast: (dim, state) or (batch, dim, length, state)."""
    dtype = accumulation_dtype(delta, A, B)
    delta, A, B = delta.astype(accumulation_dtype(delta)), A.astype(dtype), _as_matrix(B, A, dtype)
    if delta.ndim == 1:
        return delta[:, None], A, B
    return delta[..., None], A[:, None, :], spread(B, A.shape[0])


def discretize(delta: Array, A: Array, B: Array, method: str = "zoh") -> tuple[Array, Array]:
    """A_bar = f(Delta A), B_bar = Delta s(Delta A) B (eq. 4 for zoh).

    LTI: delta (dim,), A and B (dim, state) give (dim, state). Selective: delta (batch, dim, length) and any form of B
    give (batch, dim, length, state).
    """
    delta, A, B = _aligned(delta, A, B)
    A_bar, s = rule(delta * A, method)
    return A_bar, delta * s * B


def discretize_backward(
    dA_bar: Array, dB_bar: Array, delta: Array, A: Array, B: Array, method: str = "zoh"
) -> DiscretizeGradients:
    """Gradients of `discretize`, by the chain rule through z = Delta A."""
    step, A_, B_ = _aligned(delta, A, B)
    z = step * A_
    _, s = rule(z, method)
    df, ds, dstep = rule_derivatives(z, method)
    dz = dA_bar * df.conj() + dB_bar * (step * ds * B_).conj()
    ddelta = (dA_bar * (df * A_).conj() + dB_bar * (dstep * B_).conj()).sum(axis=-1)
    dA, dB = dz * step, dB_bar * (step * s).conj()
    if delta.ndim == 3:
        dA, dB = dA.sum(axis=(0, 2)), gather(dB, B)
    return DiscretizeGradients(_cast_like(ddelta, delta), _cast_like(dA, A), _as_matrix_gradient(dB, B))


# --- The recurrence alone ---------------------------------------------------------------------------------------------


class LinearScanGradients(NamedTuple):
    """What `linear_scan_backward` returns; None where the input was None."""

    da: Array
    db: Array
    dinitial_state: Array | None


def linear_scan(a: Array, b: Array, initial_state: Array | None = None, reverse: bool = False) -> Array:
    """h_t = a_t h_{t-1} + b_t along the last axis (reverse: h_t = a_t h_{t+1} + b_t), h in the dtype of b."""
    if reverse:
        return linear_scan(a[..., ::-1], b[..., ::-1], initial_state)[..., ::-1]
    dtype = accumulation_dtype(a, b, initial_state)
    a_, h_all = a.astype(dtype), np.empty(b.shape, dtype)
    h = np.zeros(b.shape[:-1], dtype) if initial_state is None else initial_state.astype(dtype)
    for t in range(b.shape[-1]):
        h = a_[..., t] * h + b[..., t].astype(dtype)
        h_all[..., t] = h
    return h_all.astype(b.dtype)


def linear_scan_backward(
    dh: Array, a: Array, h: Array, initial_state: Array | None = None, reverse: bool = False
) -> LinearScanGradients:
    """G_t = dh_t + conj(a_{t+1}) G_{t+1}; db_t = G_t, da_t = G_t conj(h_{t-1}), dh_0 = conj(a_1) G_1."""
    if reverse:
        da, db, dinitial = linear_scan_backward(dh[..., ::-1], a[..., ::-1], h[..., ::-1], initial_state)
        return LinearScanGradients(da[..., ::-1], db[..., ::-1], dinitial)
    dtype = accumulation_dtype(dh, a, h, initial_state)
    dh, a_ = dh.astype(dtype), a.astype(dtype)
    first = np.zeros(a.shape[:-1], dtype) if initial_state is None else initial_state.astype(dtype)
    da, db = np.empty(a.shape, dtype), np.empty(a.shape, dtype)
    carry = np.zeros(a.shape[:-1], dtype)
    for t in reversed(range(a.shape[-1])):
        G = dh[..., t] + carry
        db[..., t] = G
        da[..., t] = G * (h[..., t - 1].astype(dtype) if t > 0 else first).conj()
        carry = a_[..., t].conj() * G
    dinitial_state = None if initial_state is None else _cast_like(carry, initial_state)
    return LinearScanGradients(_cast_like(da, a), _cast_like(db, h), dinitial_state)


# --- Packed sequences: states are reset at borders, nothing leaks -----------------------------------------------------


def sequence_starts(seq_idx: Array | None, batch: int, length: int) -> npt.NDArray[np.bool_]:
    """(batch, length), true at every t > 0 where a new sequence begins: seq_idx[t] != seq_idx[t - 1]."""
    starts = np.zeros((batch, length), np.bool_)
    if seq_idx is not None:
        starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return starts


def _spans(cu_seqlens: Array | None, length: int) -> list[tuple[slice, slice]]:
    """(rows of the states, times) of the runs that do not see each other: one of everything, or one per sequence."""
    if cu_seqlens is None:
        return [(slice(None), slice(0, length))]
    borders = [int(c) for c in cu_seqlens]
    return [(slice(s, s + 1), slice(i, j)) for s, (i, j) in enumerate(pairwise(borders))]


# --- Selective scan (Algorithm 2) -------------------------------------------------------------------------------------


class SelectiveScanGradients(NamedTuple):
    """What `selective_scan_backward` returns; None where the input was None."""

    du: Array
    ddelta: Array
    dA: Array
    dB: Array
    dC: Array
    dD: Array | None
    dz: Array | None
    ddelta_bias: Array | None
    dinitial_state: Array | None


class _System(NamedTuple):
    """What the recurrence reads, in accumulation dtype and after bias and softplus; also holds its gradients."""

    u: Array
    delta: Array
    A: Array
    B: Array
    C: Array
    initial_state: Array

    def part(self, rows: slice, times: slice) -> _System:
        """Views of one run."""
        B, C = (M if M.ndim == 2 else M[..., times] for M in (self.B, self.C))
        return _System(self.u[..., times], self.delta[..., times], self.A, B, C, self.initial_state[rows])


def _system(
    u: Array, step: Array, A: Array, B: Array, C: Array, initial_state: Array | None, cu_seqlens: Array | None
) -> _System:
    dtype = accumulation_dtype(u, step, A, B, C, initial_state)
    sequences = u.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    state = np.zeros((sequences, *A.shape), dtype) if initial_state is None else initial_state.astype(dtype)
    u_ = u.astype(accumulation_dtype(u))
    return _System(u_, step, A.astype(dtype), _as_matrix(B, A, dtype), _as_matrix(C, A, dtype), state)


def _step_size(delta: Array, delta_bias: Array | None, delta_softplus: bool) -> tuple[Array, Array]:
    """Delta_t = softplus(delta + bias) (Algorithm 2's tau), and its derivative sigmoid(delta + bias)."""
    v = delta.astype(accumulation_dtype(delta))
    if delta_bias is not None:
        v = v + delta_bias[:, None]
    return (softplus(v), sigmoid(v)) if delta_softplus else (v, np.ones_like(v))


def _recurrence(system: _System, starts: Array, method: str) -> Iterator[tuple[int, Array, Array]]:
    """Eq. (2a), h_t = A_bar_t h_{t-1} + B_bar_t u_t; yields t, the h_{t-1} that was used (0 after a reset) and h_t."""
    u, delta, A, B, _, h = system
    for t in range(u.shape[2]):
        delta_t, u_t = delta[:, :, t, None], u[:, :, t, None]
        B_t = spread(_at(B, t), A.shape[0])[:, :, 0]
        A_bar, s = rule(delta_t * A, method)
        h_previous = np.where(starts[:, t, None, None], 0, h)
        h = A_bar * h_previous + delta_t * s * B_t * u_t
        yield t, h_previous, h


def _read_out(C_t: Array, h: Array, is_complex: bool) -> Array:
    """Eq. (2b), y_t = C_t h_t, or 2 Re(C_t h_t) where h stands for conjugate pairs."""
    y: Array = (C_t * h).sum(axis=-1)
    return 2 * y.real if is_complex else y


def selective_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Array | None = None,
    seq_idx: Array | None = None,
    cu_seqlens: Array | None = None,
    discretization: str = "mamba",
) -> Array | tuple[Array, Array]:
    """Algorithm 2: h_t = A_bar_t h_{t-1} + B_bar_t u_t, y_t = (C_t h_t + D u_t) silu(z_t).

    u, delta, z (batch, dim, length); A (dim, state); B, C any form above; D, delta_bias (dim,); states
    (batch, dim, state), or (sequences, dim, state) with cu_seqlens. Any rule of `discretize` is accepted here.
    """
    step, _ = _step_size(delta, delta_bias, delta_softplus)
    system = _system(u, step, A, B, C, initial_state, cu_seqlens)
    starts = sequence_starts(seq_idx, u.shape[0], u.shape[2])
    is_complex = np.iscomplexobj(A)
    y, last_state = np.empty(u.shape, accumulation_dtype(u)), system.initial_state.copy()
    for rows, times in _spans(cu_seqlens, u.shape[2]):
        run, y_run = system.part(rows, times), y[..., times]
        for t, _, h in _recurrence(run, starts[:, times], discretization):
            y_run[..., t] = _read_out(spread(_at(run.C, t), A.shape[0])[:, :, 0], h, is_complex)
            last_state[rows] = h
    if D is not None:
        y = y + D[:, None] * system.u
    if z is not None:
        y = y * silu(z.astype(y.dtype))
    y = y.astype(u.dtype)
    return (y, last_state) if return_last_state else y


def _recurrence_backward(run: _System, grad: _System, starts: Array, method: str, dy: Array, G: Array) -> Array:
    """Adjoint of `_recurrence` and `_read_out` (3.3): adds to ``grad`` and returns the scan's own output y.

    ``G`` is the gradient of the last state. Going back in time, G_t = C_t dy_t + A_bar_{t+1} G_{t+1} (conjugates where
    complex), and every gradient is G_t times the derivative of A_bar_t h_{t-1} + B_bar_t u_t. The product with h_{t-1}
    is formed as such: h_t - B_bar_t u_t would cancel where the input dominates.
    """
    dim, is_complex = run.A.shape[0], np.iscomplexobj(run.A)
    y = np.empty(dy.shape, dy.dtype)
    for t, h_previous, h in reversed(list(_recurrence(run, starts, method))):
        delta_t, u_t, dy_t = run.delta[:, :, t, None], run.u[:, :, t, None], dy[:, :, t, None]
        B_t, C_t = (spread(_at(M, t), dim)[:, :, 0] for M in (run.B, run.C))
        y[..., t] = _read_out(C_t, h, is_complex)
        dy_t = 2 * dy_t if is_complex else dy_t
        G = G + C_t.conj() * dy_t
        z = delta_t * run.A
        A_bar, s = rule(z, method)
        df, ds, dstep = rule_derivatives(z, method)
        G_h, G_Bu = G * h_previous.conj(), G * (B_t * u_t).conj()
        grad.u[..., t] = (G * (delta_t * s * B_t).conj()).sum(axis=-1).real
        grad.delta[..., t] = (G_h * (df * run.A).conj() + G_Bu * dstep.conj()).sum(axis=-1).real
        grad.A[...] += (delta_t * (G_h * df.conj() + G_Bu * delta_t * ds.conj())).sum(axis=0)
        for M, dM in ((grad.B, G * (delta_t * s * u_t).conj()), (grad.C, dy_t * h.conj())):
            _at(M, t)[...] += gather(dM[:, :, None], M)
        G = np.where(starts[:, t, None, None], 0, A_bar.conj() * G)
    grad.initial_state[...] = G
    return y


def selective_scan_backward(
    dy: Array,
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    *,
    dlast_state: Array | None = None,
    initial_state: Array | None = None,
    seq_idx: Array | None = None,
    cu_seqlens: Array | None = None,
    discretization: str = "mamba",
) -> SelectiveScanGradients:
    """Gradients of `selective_scan` from those of y and (optionally) of the last state (3.3). Keeps every state."""
    step, slope = _step_size(delta, delta_bias, delta_softplus)
    system = _system(u, step, A, B, C, initial_state, cu_seqlens)
    starts = sequence_starts(seq_idx, u.shape[0], u.shape[2])
    grad = _System(*(np.zeros_like(x) for x in system))
    dlast = np.zeros_like(system.initial_state) if dlast_state is None else dlast_state.astype(system.A.dtype)

    dy = dy.astype(system.u.dtype)
    gate = None if z is None else z.astype(dy.dtype)
    d_ungated = dy if gate is None else dy * silu(gate)
    y = np.empty_like(dy)
    for rows, times in _spans(cu_seqlens, u.shape[2]):
        run, grad_run, dy_run = system.part(rows, times), grad.part(rows, times), d_ungated[..., times]
        y[..., times] = _recurrence_backward(run, grad_run, starts[:, times], discretization, dy_run, dlast[rows])
    du, ddelta = grad.u, grad.delta * slope
    if D is not None:
        y, du = y + D[:, None] * system.u, du + D[:, None] * d_ungated
    return SelectiveScanGradients(
        du=_cast_like(du, u),
        ddelta=_cast_like(ddelta, delta),
        dA=_cast_like(grad.A, A),
        dB=_as_matrix_gradient(grad.B, B),
        dC=_as_matrix_gradient(grad.C, C),
        dD=None if D is None else _cast_like((d_ungated * system.u).sum(axis=(0, 2)), D),
        dz=None if z is None or gate is None else _cast_like(dy * y * silu_derivative(gate), z),
        ddelta_bias=None if delta_bias is None else _cast_like(ddelta.sum(axis=(0, 2)), delta_bias),
        dinitial_state=None if initial_state is None else _cast_like(grad.initial_state, initial_state),
    )


def selective_state_update(
    state: Array,
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Array | None = None,
    *,
    A_log: bool = False,
) -> Array:
    """One step of Algorithm 2 under the mamba rule; ``state`` (batch or slots, dim, state) is updated in place.

    x, dt, z (batch, dim); B, C (batch, state) or (batch, groups, state). Row i uses the slot state_batch_indices[i];
    a negative index skips the row and gives y = 0. With ``A_log``, A is log(-A).
    """
    A = -np.exp(A) if A_log else A
    slots = np.arange(x.shape[0]) if state_batch_indices is None else state_batch_indices
    rows = np.flatnonzero(slots >= 0)
    u, delta, B, C = (v[rows][..., None] for v in (x, dt, B, C))
    gate = None if z is None else z[rows][..., None]
    y_rows, h = selective_scan(u, delta, A, B, C, D, gate, dt_bias, dt_softplus, True, initial_state=state[slots[rows]])
    y = np.zeros_like(x)
    y[rows], state[slots[rows]] = y_rows[..., 0], h.astype(state.dtype)
    return y


# --- Causal depthwise convolution -------------------------------------------------------------------------------------


class CausalConv1dGradients(NamedTuple):
    """What `causal_conv1d_backward` returns; None where the input was None."""

    dx: Array
    dweight: Array
    dbias: Array | None
    dinitial_state: Array | None


def _window(x: Array, weight: Array, initial_state: Array | None) -> Array:
    """The inputs with the width - 1 that came before them (zeros if not given), in accumulation dtype."""
    dtype = accumulation_dtype(x, weight)
    before = np.zeros((*x.shape[:2], weight.shape[1] - 1)) if initial_state is None else initial_state
    return np.concatenate([before.astype(dtype), x.astype(dtype)], axis=2)


def _same_sequence(starts: Array, width: int) -> tuple[list[Array], Array]:
    """Which inputs of the window are seen: by tap k at each t, and by the final state; the initial state is run 0."""
    batch, length = starts.shape
    run = np.concatenate([np.zeros((batch, width - 1), np.int64), np.cumsum(starts, axis=1)], axis=1)
    taps = [(run[:, k : k + length] == run[:, width - 1 :])[:, None] for k in range(width)]
    return taps, (run[:, length:] == run[:, -1:])[:, None]


def _conv_runs(
    x: Array, weight: Array, initial_state: Array | None, seq_idx: Array | None, cu_seqlens: Array | None
) -> Iterator[tuple[slice, slice, Array, list[Array], Array]]:
    """(rows, times, window, what each tap sees, what the final state sees) for every run."""
    starts = sequence_starts(seq_idx, x.shape[0], x.shape[2])
    for rows, times in _spans(cu_seqlens, x.shape[2]):
        before = None if initial_state is None else initial_state[rows]
        yield rows, times, _window(x[..., times], weight, before), *_same_sequence(starts[:, times], weight.shape[1])


def _conv_sum(window: Array, taps: list[Array], weight: Array, bias: Array | None) -> Array:
    """Before the activation: bias + sum_k weight_k x_{t - (width - 1) + k}."""
    length = window.shape[2] - weight.shape[1] + 1
    y = np.zeros((*window.shape[:2], length), window.dtype)
    for k, seen in enumerate(taps):
        y = y + weight[:, k, None] * np.where(seen, window[..., k : k + length], 0)
    return y if bias is None else y + bias[:, None]


def _conv_states(x: Array, weight: Array, cu_seqlens: Array | None, dtype: np.dtype[Any]) -> Array:
    sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return np.zeros((sequences, x.shape[1], weight.shape[1] - 1), dtype)


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    activation: str | None = None,
    initial_state: Array | None = None,
    return_final_state: bool = False,
    seq_idx: Array | None = None,
    cu_seqlens: Array | None = None,
) -> Array | tuple[Array, Array]:
    """y_t = act(bias + sum_k weight_k x_{t - (width - 1) + k}), per channel; weight[:, -1] meets the current token.

    x (batch, dim, length), weight (dim, width); states (batch or sequences, dim, width - 1) are the last inputs of the
    (last) sequence, zeros where it is shorter.
    """
    y, final_state = np.empty_like(x), _conv_states(x, weight, cu_seqlens, x.dtype)
    for rows, times, window, taps, kept in _conv_runs(x, weight, initial_state, seq_idx, cu_seqlens):
        total = _conv_sum(window, taps, weight, bias)
        y[..., times] = (silu(total) if activation == "silu" else total).astype(x.dtype)
        final_state[rows] = np.where(kept, window[..., total.shape[2] :], 0).astype(x.dtype)
    return (y, final_state) if return_final_state else y


def causal_conv1d_backward(
    dy: Array,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    activation: str | None = None,
    initial_state: Array | None = None,
    seq_idx: Array | None = None,
    cu_seqlens: Array | None = None,
    dfinal_state: Array | None = None,
) -> CausalConv1dGradients:
    """Gradients of `causal_conv1d`: each tap sends dy back to the input it saw."""
    dtype = accumulation_dtype(x, weight)
    dx, dweight, dbias = np.zeros(x.shape, dtype), np.zeros(weight.shape, dtype), np.zeros(weight.shape[0], dtype)
    dinitial_state = _conv_states(x, weight, cu_seqlens, dtype)
    for rows, times, window, taps, kept in _conv_runs(x, weight, initial_state, seq_idx, cu_seqlens):
        total = _conv_sum(window, taps, weight, bias)
        dtotal = dy[..., times].astype(dtype) * (silu_derivative(total) if activation == "silu" else 1)
        dwindow, length = np.zeros_like(window), total.shape[2]
        for k, seen in enumerate(taps):
            dwindow[..., k : k + length] += weight[:, k, None] * np.where(seen, dtotal, 0)
            dweight[:, k] += (dtotal * np.where(seen, window[..., k : k + length], 0)).sum(axis=(0, 2))
        if dfinal_state is not None:
            dwindow[..., length:] += np.where(kept, dfinal_state[rows].astype(dtype), 0)
        dbias += dtotal.sum(axis=(0, 2))
        dinitial_state[rows], dx[..., times] = np.split(dwindow, [weight.shape[1] - 1], axis=2)
    return CausalConv1dGradients(
        dx=_cast_like(dx, x),
        dweight=_cast_like(dweight, weight),
        dbias=None if bias is None else _cast_like(dbias, bias),
        dinitial_state=None if initial_state is None else _cast_like(dinitial_state, initial_state),
    )


def causal_conv1d_update(
    x: Array, conv_state: Array, weight: Array, bias: Array | None = None, activation: str | None = None
) -> Array:
    """One token x (batch, dim); ``conv_state`` (batch, dim, >= width - 1) is shifted in place, newest last."""
    window = np.concatenate([conv_state, x[..., None].astype(conv_state.dtype)], axis=2)
    before = window[..., conv_state.shape[2] - weight.shape[1] + 1 : -1]
    y = causal_conv1d(x[..., None], weight, bias, activation, before)
    conv_state[...] = window[..., 1:]
    return np.asarray(y)[..., 0]


# --- RMSNorm ----------------------------------------------------------------------------------------------------------


class RMSNormGradients(NamedTuple):
    """What `rms_norm_backward` returns; None where the input was None."""

    dx: Array
    dweight: Array
    dresidual: Array | None


def _residual_sum(x: Array, residual: Array | None) -> Array:
    total = x.astype(accumulation_dtype(x, residual))
    return total if residual is None else total + residual.astype(total.dtype)


def rms_norm(x: Array, weight: Array, residual: Array | None = None, eps: float = 1e-5) -> Array | tuple[Array, Array]:
    """Returns y = s / sqrt(mean(s^2) + eps) * weight over the last axis, s = x + residual (also returned, if given)."""
    s = _residual_sum(x, residual)
    y = (s / np.sqrt((s * s).mean(axis=-1, keepdims=True) + eps) * weight.astype(s.dtype)).astype(x.dtype)
    return y if residual is None else (y, s)


def rms_norm_backward(
    dy: Array,
    x: Array,
    weight: Array,
    residual: Array | None = None,
    eps: float = 1e-5,
    dresidual_out: Array | None = None,
) -> RMSNormGradients:
    """With r = 1 / sqrt(mean(s^2) + eps), n = s r, g = dy weight: ds = r (g - n mean(g n)), dweight = sum dy n."""
    s = _residual_sum(x, residual)
    r = 1 / np.sqrt((s * s).mean(axis=-1, keepdims=True) + eps)
    n, dy = s * r, dy.astype(s.dtype)
    g = dy * weight.astype(s.dtype)
    ds = r * (g - n * (g * n).mean(axis=-1, keepdims=True))
    if dresidual_out is not None:
        ds = ds + dresidual_out.astype(s.dtype)
    dweight = (dy * n).sum(axis=tuple(range(x.ndim - 1)))
    dresidual = None if residual is None else _cast_like(ds, residual)
    return RMSNormGradients(_cast_like(ds, x), _cast_like(dweight, weight), dresidual)


# --- The LTI system (Algorithm 1): delta (dim,), A, B, C (dim, state) -------------------------------------------------


class SSMKernelGradients(NamedTuple):
    """What `ssm_kernel_backward` returns."""

    ddelta: Array
    dA: Array
    dB: Array
    dC: Array


class SSMConvolutionGradients(NamedTuple):
    """What `ssm_convolution_backward` returns."""

    du: Array
    dkernel: Array


def ssm_recurrence(u: Array, delta: Array, A: Array, B: Array, C: Array, method: str = "zoh") -> Array:
    """Eqs. (2a), (2b) with parameters that do not change: u (batch, dim, length) to y of the same shape."""
    A_bar, B_bar = discretize(delta, A, B, method)
    h, y = np.zeros((u.shape[0], *A.shape), B_bar.dtype), np.empty_like(u)
    for t in range(u.shape[2]):
        h = A_bar * h + B_bar * u[:, :, t, None].astype(accumulation_dtype(u))
        y[..., t] = _read_out(C, h, np.iscomplexobj(A)).astype(u.dtype)
    return y


def ssm_kernel(delta: Array, A: Array, B: Array, C: Array, length: int, method: str = "zoh") -> Array:
    """Eq. (3a), K = (C B_bar, C A_bar B_bar, ..., C A_bar^k B_bar, ...): (dim, length)."""
    A_bar, power = discretize(delta, A, B, method)
    is_complex = np.iscomplexobj(A)
    K = np.empty((A.shape[0], length), power.real.dtype if is_complex else accumulation_dtype(power, C))
    for k in range(length):
        K[:, k] = _read_out(C, power, is_complex)
        power = A_bar * power
    return K


def ssm_kernel_backward(
    dK: Array, delta: Array, A: Array, B: Array, C: Array, length: int, method: str = "zoh"
) -> SSMKernelGradients:
    """Adjoint of the powers p_k = A_bar p_{k-1}, p_0 = B_bar: G_k = C dK_k + A_bar G_{k+1}, then `discretize`'s."""
    A_bar, B_bar = discretize(delta, A, B, method)
    powers = [B_bar]
    for _ in range(length - 1):
        powers.append(A_bar * powers[-1])
    G, dA_bar, dC = np.zeros_like(B_bar), np.zeros_like(A_bar), np.zeros_like(B_bar)
    for k in reversed(range(length)):
        dK_k = dK[:, k, None] * (2 if np.iscomplexobj(A) else 1)
        G = A_bar.conj() * G + C.conj() * dK_k
        dC += dK_k * powers[k].conj()
        if k > 0:
            dA_bar += G * powers[k - 1].conj()
    return SSMKernelGradients(*discretize_backward(dA_bar, G, delta, A, B, method), dC=_cast_like(dC, C))


def ssm_convolution(u: Array, kernel: Array) -> Array:
    """Eq. (3b), y_t = sum_{k <= t} K_k u_{t-k}, as the direct sum."""
    dtype, length = accumulation_dtype(u, kernel), u.shape[2]
    y = np.zeros(u.shape, dtype)
    for k in range(length):
        y[..., k:] += kernel[:, k, None] * u[..., : length - k].astype(dtype)
    return y.astype(u.dtype)


def ssm_convolution_backward(dy: Array, u: Array, kernel: Array) -> SSMConvolutionGradients:
    """du_s = sum_k K_k dy_{s+k}, dK_k = sum_{b,t} dy_t u_{t-k}."""
    dtype, length = accumulation_dtype(u, kernel), u.shape[2]
    du, dkernel = np.zeros(u.shape, dtype), np.zeros(kernel.shape, dtype)
    u_, dy = u.astype(dtype), dy.astype(dtype)
    for k in range(length):
        du[..., : length - k] += kernel[:, k, None] * dy[..., k:]
        dkernel[:, k] = (dy[..., k:] * u_[..., : length - k]).sum(axis=(0, 2))
    return SSMConvolutionGradients(_cast_like(du, u), _cast_like(dkernel, kernel))
