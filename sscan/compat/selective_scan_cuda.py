"""The functions of the extension module ``selective_scan_cuda``, as autograd functions of others call them."""

from __future__ import annotations

from typing import Any

import sscan


def fwd(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, delta_softplus: bool) -> list[Any]:
    """``[out, x]``, or ``[out, x, out_z]`` with a gate: out is before the gate, out_z after it.

    x (batch, dim, 1, 2 * state) holds the last state in ``x[:, :, -1, 1::2]``, where callers look for it. The other
    half, the decay up to there in the original, is zero.
    """
    out, last_state = sscan.selective_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus, True)
    x = last_state.new_zeros((*last_state.shape[:2], 1, 2 * last_state.shape[2]))
    x[:, :, 0, 1::2] = last_state
    return [out, x] if z is None else [out, x, _gated(out, z)]


def bwd(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, dout: Any, x: Any, out: Any, dz: Any,
    delta_softplus: bool, recompute_out_z: bool,
) -> list[Any]:  # fmt: skip
    """``[du, ddelta, dA, dB, dC, dD, ddelta_bias]``, then dz if there is z, and out_z if it is asked for.

    dz is written to if it is given. x and out are not needed, out_z aside: the forward is run again.
    """
    gradients = sscan.selective_scan_backward(dout, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    found = [getattr(gradients, name) for name in ("du", "ddelta", "dA", "dB", "dC", "dD", "ddelta_bias")]
    if z is not None:
        found.append(gradients.dz if dz is None else dz.copy_(gradients.dz))
        if recompute_out_z:
            found.append(_gated(out, z))
    return found


def _gated(out: Any, z: Any) -> Any:
    return (out.float() * z.float().sigmoid() * z.float()).to(out.dtype)
