"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the ops: the arithmetic that they do.

As in PyTorch's own formulas a multiplication with an addition is two, and what is done once for an element along time
(gate, skip, softplus, activation, norm) is none. For each state at each time the scan multiplies delta A, takes its
exponential, multiplies delta u B, multiplies and adds in the recurrence and in C h; the backward makes the states again
(the same but for C h) and then multiplies and adds once for the gradient of the state, C, B, u, delta and A each, and a
few times in between.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch.utils.flop_counter import register_flop_formula

from sscan.torch import _block, _registered

if TYPE_CHECKING:
    from collections.abc import Callable

    from sscan.torch._library import Op

# For a state at a time: real, complex. A complex product is six, a complex exponential four, a real part three.
SCAN = (1 + 1 + 1 + 2 + 2, 2 + 4 + 2 + 8 + 4)
SCAN_BACKWARD = (5 + 3 + 2 * 6, 16 + 10 + 4 + 4 + 4 + 12 + 4 + 4)
LINEAR_SCAN = (2, 8)
LINEAR_SCAN_BACKWARD = (2 + 1, 8 + 6)


def _register(op: Op, formula: Callable[[Any], int]) -> None:
    """Count ``formula`` of the op's arguments, by their names, for it."""

    def count(*arguments: Any, out_val: Any = None) -> int:
        return formula(SimpleNamespace(**dict(zip(op.arguments, arguments, strict=True))))

    register_flop_formula(op.registered.overloadpacket, get_raw=True)(count)


def _scan(u: Any, A: Any, numbers: tuple[int, int]) -> int:
    flops: int = math.prod(u.shape) * A.shape[1] * numbers[A.is_complex()]
    return flops


def _convolution(x: Any, weight: Any, times: int) -> int:
    """So many sums as long as the filter for each element."""
    flops: int = 2 * times * math.prod(x.shape) * weight.shape[1]
    return flops


def _product(weight: Any, x: Any) -> int:
    """The product of a weight with x along its channels."""
    flops: int = 2 * math.prod(weight.shape) * x.shape[0] * x.shape[2]
    return flops


def _inner(a: Any) -> int:
    products = sum(_product(weight, a.x) for weight in (a.x_proj_weight, a.dt_proj_weight, a.out_proj_weight))
    return products + _convolution(a.x, a.conv_weight, 1) + _scan(a.x, a.A, SCAN)


def _inner_backward(a: Any) -> int:
    """Convolution, projections and scan once more, and the gradients: of a product, two products."""
    out, projections = (
        _product(a.out_proj_weight, a.x),
        _product(a.x_proj_weight, a.x) + _product(a.dt_proj_weight, a.x),
    )
    scan = _scan(a.x, a.A, SCAN) + _scan(a.x, a.A, SCAN_BACKWARD)
    return 2 * out + 3 * projections + _convolution(a.x, a.conv_weight, 1 + 3) + scan


def _as_inner(a: Any) -> Any:
    """Arguments of a block as those of what is behind its input projection."""
    x = a.hidden.new_empty((a.hidden.shape[0], a.A_log.shape[0], a.hidden.shape[1]), device="meta")
    return SimpleNamespace(**vars(a), x=x, A=a.A_log)


_register(_registered.selective_scan, lambda a: _scan(a.u, a.A, SCAN))
_register(_registered.selective_scan_backward, lambda a: _scan(a.u, a.A, SCAN_BACKWARD))
_register(_registered.selective_state_update, lambda a: _scan(a.x, a.A, SCAN))
_register(_registered.causal_conv1d, lambda a: _convolution(a.x, a.weight, 1))
_register(_registered.causal_conv1d_backward, lambda a: _convolution(a.x, a.weight, 3 if a.activation else 2))
_register(_registered.causal_conv1d_update, lambda a: _convolution(a.x, a.weight, 1))
_register(_registered.linear_scan, lambda a: math.prod(a.a.shape) * LINEAR_SCAN[a.a.is_complex()])
_register(_registered.linear_scan_backward, lambda a: math.prod(a.a.shape) * LINEAR_SCAN_BACKWARD[a.a.is_complex()])
_register(_block.mamba_inner, _inner)
_register(_block.mamba_inner_backward, _inner_backward)
_register(_block.mamba, lambda a: _product(a.in_proj_weight, a.hidden.mT) + _inner(_as_inner(a)))
_register(_block.mamba_backward, lambda a: 2 * _product(a.in_proj_weight, a.hidden.mT) + _inner_backward(_as_inner(a)))
