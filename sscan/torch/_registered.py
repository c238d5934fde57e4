"""The ops of sscan as ops of torch.library: each with its backward, and the backward with its own.

The order of arguments: what has gradients, other tensors, options. A backward takes the gradients of the results first,
then what the forward took, and gives the gradients of those inputs that are not None. An optional result that was
not asked for is an empty tensor.
"""

from __future__ import annotations

from typing import Any

import torch

import sscan
from sscan.torch import _composed, _fakes
from sscan.torch._library import (
    Saved,
    cast_under_autocast,
    define,
    differentiate,
    differentiate_again,
    for_each,
    or_zeros,
    refuse_derivatives,
)


def _present(gradients: Any) -> list[Any]:
    return [gradient for gradient in gradients if gradient is not None]


# --- The selective scan -----------------------------------------------------------------------------------------------

_SCAN = """Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias,
    Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens"""


def _selective_scan(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, initial_state: Any, seq_idx: Any,
    cu_seqlens: Any, delta_softplus: bool, discretization: Any, return_last_state: bool, keep_checkpoints: bool,
) -> tuple[Any, Any, Any]:  # fmt: skip
    arguments = (u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    options = {
        "initial_state": initial_state, "seq_idx": seq_idx, "cu_seqlens": cu_seqlens, "discretization": discretization,
    }  # fmt: skip
    return sscan.selective_scan_forward(
        *arguments, **options, return_last_state=return_last_state,
        keep_checkpoints=keep_checkpoints and _has_checkpoints(u, A, B, C, seq_idx, cu_seqlens),
    )  # fmt: skip


def _selective_scan_backward(
    dy: Any, dlast_state: Any,
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, initial_state: Any, seq_idx: Any,
    cu_seqlens: Any, checkpoints: Any, delta_softplus: bool, discretization: Any,
) -> list[Any]:  # fmt: skip
    return _present(
        sscan.selective_scan_backward(
            dy, u, delta, A, B, C, D, z, delta_bias, delta_softplus, dlast_state=dlast_state,
            initial_state=initial_state, seq_idx=seq_idx, cu_seqlens=cu_seqlens, discretization=discretization,
            checkpoints=checkpoints,
        )
    )  # fmt: skip


selective_scan = define(
    f"selective_scan({_SCAN}, bool delta_softplus, str discretization, bool return_last_state, bool keep_checkpoints)"
    " -> (Tensor y, Tensor last_state, Tensor checkpoints)",
    _selective_scan,
    _fakes.selective_scan,
)
selective_scan_backward = define(
    f"selective_scan_backward(Tensor dy, Tensor? dlast_state, {_SCAN}, Tensor? checkpoints, bool delta_softplus,"
    " str discretization) -> Tensor[]",
    _selective_scan_backward,
    _fakes.selective_scan_backward,
)
cast_under_autocast(selective_scan, "u", "delta", "B", "C", "z", axes=3)


def _has_checkpoints(u: Any, A: Any, B: Any, C: Any, seq_idx: Any, cu_seqlens: Any) -> bool:
    """Whether the checkpoints' shape does not depend on values, so that an op can return them."""
    if seq_idx is None and cu_seqlens is None:
        return True
    return _fakes.checkpoints_shape(u, A, B, C, seq_idx, cu_seqlens) is not None


def _scan_saved(inputs: Any, outputs: Any) -> Saved:
    *tensors, delta_softplus, discretization, return_last_state, keep_checkpoints = inputs
    _, last_state, checkpoints = outputs
    u, _, A, B, C, *_, seq_idx, cu_seqlens = tensors
    kept = keep_checkpoints and _has_checkpoints(u, A, B, C, seq_idx, cu_seqlens)
    return Saved(
        (*tensors, checkpoints if kept else None),
        (delta_softplus, discretization),
        (checkpoints,) if return_last_state else (last_state, checkpoints),
    )


def _scan_gradients(gradients: Any, tensors: Any, options: Any) -> Any:
    dy, dlast_state, _ = gradients
    return for_each(selective_scan_backward(or_zeros(dy, tensors[0]), dlast_state, *tensors, *options), tensors[:9])


def _composed_scan_backward(dy: Any, dlast_state: Any, *arguments: Any) -> Any:
    return _composed.gradients(_composed.selective_scan, (dy, dlast_state), arguments[:9], *arguments[9:])


differentiate(selective_scan, _scan_saved, _scan_gradients)
differentiate_again(selective_scan_backward, _composed_scan_backward, constants=1)


def _selective_state_update(
    state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, z: Any, dt_bias: Any, state_batch_indices: Any,
    dt_softplus: bool, A_log: bool,
) -> Any:  # fmt: skip
    y = sscan.selective_state_update(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, A_log=A_log
    )
    torch.autograd.graph.increment_version(state)
    return y


selective_state_update = define(
    """selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,
    Tensor? dt_bias, Tensor? state_batch_indices, bool dt_softplus, bool A_log) -> Tensor""",
    _selective_state_update,
    _fakes.selective_state_update,
)
refuse_derivatives(selective_state_update)
cast_under_autocast(selective_state_update, "x", "dt", "B", "C", "z", axes=2)

# --- The convolution --------------------------------------------------------------------------------------------------

_CONVOLUTION = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens"


def _causal_conv1d(
    x: Any, weight: Any, bias: Any, initial_state: Any, seq_idx: Any, cu_seqlens: Any,
    activation: str | None, return_final_state: bool,
) -> tuple[Any, Any]:  # fmt: skip
    result = sscan.causal_conv1d(x, weight, bias, activation, initial_state, return_final_state, seq_idx, cu_seqlens)
    return result if return_final_state else (result, None)


def _causal_conv1d_backward(
    dy: Any, dfinal_state: Any, x: Any, weight: Any, bias: Any, initial_state: Any, seq_idx: Any, cu_seqlens: Any,
    activation: str | None,
) -> list[Any]:  # fmt: skip
    return _present(
        sscan.causal_conv1d_backward(
            dy, x, weight, bias, activation, initial_state, seq_idx, cu_seqlens, dfinal_state=dfinal_state
        )
    )


causal_conv1d = define(
    f"causal_conv1d({_CONVOLUTION}, str? activation, bool return_final_state) -> (Tensor y, Tensor final_state)",
    _causal_conv1d,
    _fakes.causal_conv1d,
)
causal_conv1d_backward = define(
    f"causal_conv1d_backward(Tensor dy, Tensor? dfinal_state, {_CONVOLUTION}, str? activation) -> Tensor[]",
    _causal_conv1d_backward,
    _fakes.causal_conv1d_backward,
)
cast_under_autocast(causal_conv1d, "x", axes=3)


def _convolution_saved(inputs: Any, outputs: Any) -> Saved:
    *tensors, activation, return_final_state = inputs
    return Saved(tensors, (activation,), () if return_final_state else outputs[1:])


def _convolution_gradients(gradients: Any, tensors: Any, options: Any) -> Any:
    dy, dfinal_state = gradients
    return for_each(causal_conv1d_backward(or_zeros(dy, tensors[0]), dfinal_state, *tensors, *options), tensors[:4])


def _composed_convolution_backward(dy: Any, dfinal_state: Any, *arguments: Any) -> Any:
    return _composed.gradients(_composed.causal_conv1d, (dy, dfinal_state), arguments[:4], *arguments[4:])


differentiate(causal_conv1d, _convolution_saved, _convolution_gradients)
differentiate_again(causal_conv1d_backward, _composed_convolution_backward)


def _causal_conv1d_update(x: Any, conv_state: Any, weight: Any, bias: Any, activation: str | None) -> Any:
    y = sscan.causal_conv1d_update(x, conv_state, weight, bias, activation)
    torch.autograd.graph.increment_version(conv_state)
    return y


causal_conv1d_update = define(
    "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, str? activation) -> Tensor",
    _causal_conv1d_update,
    _fakes.causal_conv1d_update,
)
refuse_derivatives(causal_conv1d_update)
cast_under_autocast(causal_conv1d_update, "x", axes=2)

# --- The normalisation ------------------------------------------------------------------------------------------------


def _rms_norm(x: Any, weight: Any, residual: Any, eps: float) -> tuple[Any, Any]:
    result = sscan.rms_norm(x, weight, residual, eps)
    return (result, None) if residual is None else result


def _rms_norm_backward(dy: Any, dresidual_out: Any, x: Any, weight: Any, residual: Any, eps: float) -> list[Any]:
    return _present(sscan.rms_norm_backward(dy, x, weight, residual, eps, dresidual_out))


rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor y, Tensor residual_out)",
    _rms_norm,
    _fakes.rms_norm,
)
rms_norm_backward = define(
    "rms_norm_backward(Tensor dy, Tensor? dresidual_out, Tensor x, Tensor weight, Tensor? residual, float eps)"
    " -> Tensor[]",
    _rms_norm_backward,
    _fakes.rms_norm_backward,
)


def _norm_saved(inputs: Any, outputs: Any) -> Saved:
    *tensors, eps = inputs
    return Saved(tensors, (eps,), outputs[1:] if tensors[2] is None else ())


def _norm_gradients(gradients: Any, tensors: Any, options: Any) -> Any:
    dy, dresidual_out = gradients
    return for_each(rms_norm_backward(or_zeros(dy, tensors[0]), dresidual_out, *tensors, *options), tensors)


def _composed_norm_backward(dy: Any, dresidual_out: Any, x: Any, weight: Any, residual: Any, eps: float) -> Any:
    return _composed.gradients(_composed.rms_norm, (dy, dresidual_out), (x, weight, residual), eps)


differentiate(rms_norm, _norm_saved, _norm_gradients)
differentiate_again(rms_norm_backward, _composed_norm_backward)

# --- The linear scan --------------------------------------------------------------------------------------------------


def _linear_scan_backward(dh: Any, a: Any, h: Any, initial_state: Any, reverse: bool) -> list[Any]:
    return _present(sscan.linear_scan_backward(dh, a, h, initial_state, reverse))


linear_scan = define(
    "linear_scan(Tensor a, Tensor b, Tensor? initial_state, bool reverse) -> Tensor",
    sscan.linear_scan,
    _fakes.linear_scan,
)
linear_scan_backward = define(
    "linear_scan_backward(Tensor dh, Tensor a, Tensor h, Tensor? initial_state, bool reverse) -> Tensor[]",
    _linear_scan_backward,
    _fakes.linear_scan_backward,
)


def _linear_scan_saved(inputs: Any, outputs: Any) -> Saved:
    a, _, initial_state, reverse = inputs
    return Saved((a, outputs, initial_state), (reverse,))


def _linear_scan_gradients(gradients: Any, tensors: Any, options: Any) -> Any:
    return for_each(linear_scan_backward(*gradients, *tensors, *options), tensors)


differentiate(linear_scan, _linear_scan_saved, _linear_scan_gradients)
differentiate_again(linear_scan_backward, _composed.linear_scan_backward)

# --- Discretisation and the time-invariant system ---------------------------------------------------------------------


def _discretize_backward(dA_bar: Any, dB_bar: Any, delta: Any, A: Any, B: Any, method: str) -> list[Any]:
    return list(sscan.discretize_backward(dA_bar, dB_bar, delta, A, B, method))


discretize = define(
    "discretize(Tensor delta, Tensor A, Tensor B, str method) -> (Tensor A_bar, Tensor B_bar)",
    sscan.discretize,
    _fakes.discretize,
)
discretize_backward = define(
    "discretize_backward(Tensor dA_bar, Tensor dB_bar, Tensor delta, Tensor A, Tensor B, str method) -> Tensor[]",
    _discretize_backward,
    _fakes.discretize_backward,
)


def _discretize_saved(inputs: Any, outputs: Any) -> Saved:
    return Saved(inputs[:-1], inputs[-1:])


def _discretize_gradients(gradients: Any, tensors: Any, options: Any) -> Any:
    some = next(gradient for gradient in gradients if gradient is not None)
    both = (torch.zeros_like(some) if gradient is None else gradient for gradient in gradients)
    return discretize_backward(*both, *tensors, *options)


def _composed_discretize_backward(dA_bar: Any, dB_bar: Any, delta: Any, A: Any, B: Any, method: str) -> Any:
    return _composed.gradients(_composed.discretize, (dA_bar, dB_bar), (delta, A, B), method)


differentiate(discretize, _discretize_saved, _discretize_gradients)
differentiate_again(discretize_backward, _composed_discretize_backward)


def _ssm_kernel_backward(dK: Any, delta: Any, A: Any, B: Any, C: Any, length: int, method: str) -> list[Any]:
    return list(sscan.ssm_kernel_backward(dK, delta, A, B, C, length, method))


ssm_kernel = define(
    "ssm_kernel(Tensor delta, Tensor A, Tensor B, Tensor C, SymInt length, str method) -> Tensor",
    sscan.ssm_kernel,
    _fakes.ssm_kernel,
)
ssm_kernel_backward = define(
    "ssm_kernel_backward(Tensor dK, Tensor delta, Tensor A, Tensor B, Tensor C, SymInt length, str method) -> Tensor[]",
    _ssm_kernel_backward,
    _fakes.ssm_kernel_backward,
)


def _kernel_saved(inputs: Any, outputs: Any) -> Saved:
    return Saved(inputs[:4], inputs[4:])


def _kernel_gradients(gradients: Any, tensors: Any, options: Any) -> Any:
    return ssm_kernel_backward(*gradients, *tensors, *options)


def _composed_kernel_backward(dK: Any, delta: Any, A: Any, B: Any, C: Any, length: int, method: str) -> Any:
    return _composed.gradients(_composed.ssm_kernel, (dK,), (delta, A, B, C), length, method)


differentiate(ssm_kernel, _kernel_saved, _kernel_gradients)
differentiate_again(ssm_kernel_backward, _composed_kernel_backward)


def _ssm_convolution_backward(dy: Any, u: Any, kernel: Any) -> list[Any]:
    return list(sscan.ssm_convolution_backward(dy, u, kernel))


ssm_convolution = define(
    "ssm_convolution(Tensor u, Tensor kernel) -> Tensor", sscan.ssm_convolution, _fakes.ssm_convolution
)
ssm_convolution_backward = define(
    "ssm_convolution_backward(Tensor dy, Tensor u, Tensor kernel) -> Tensor[]",
    _ssm_convolution_backward,
    _fakes.ssm_convolution_backward,
)


def _ssm_convolution_saved(inputs: Any, outputs: Any) -> Saved:
    return Saved(inputs, ())


def _ssm_convolution_gradients(gradients: Any, tensors: Any, options: Any) -> Any:
    return ssm_convolution_backward(*gradients, *tensors)


def _composed_ssm_convolution_backward(dy: Any, u: Any, kernel: Any) -> Any:
    return _composed.gradients(_composed.ssm_convolution, (dy,), (u, kernel))


differentiate(ssm_convolution, _ssm_convolution_saved, _ssm_convolution_gradients)
differentiate_again(ssm_convolution_backward, _composed_ssm_convolution_backward)
