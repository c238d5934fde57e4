"""Results without data, for torch.compile and torch.export: their shapes and dtypes, after the core's own checks."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from sscan import _arrays, _backends, _checks
from sscan.causal_conv1d import _Arguments as _Convolution
from sscan.causal_conv1d import _checked as _checked_convolution
from sscan.causal_conv1d import _checked_step, _is_silu, _Step
from sscan.discretize import _checked as _checked_system
from sscan.linear_scan import _initial as _checked_state
from sscan.rms_norm import _weight
from sscan.selective_scan import _Arguments, _check_dtypes, _check_shapes, _is_zoh
from sscan.selective_state_update import _Arguments as _ScanStep
from sscan.selective_state_update import _checked as _checked_scan_step
from sscan.ssm import _checked as _checked_kernel


class _Described:
    """What the core's checks look at, of a tensor without data: its memory is such that nothing needs a copy."""

    flags = SimpleNamespace(c_contiguous=True)

    def __init__(self, shape: tuple[Any, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.ndim = shape, len(shape)
        self.dtype, self.itemsize = dtype, dtype.itemsize
        self.strides = (self.itemsize,) * self.ndim

    def astype(self, dtype: np.dtype[Any], order: str) -> _Described:
        return _Described(self.shape, dtype)

    def reshape(self, *shape: Any) -> _Described:
        return _Described(shape[0] if isinstance(shape[0], tuple) else shape, self.dtype)


def check_together(op: str, **tensors: Any) -> None:
    """The checks that the core makes on entering, without looking at memory: dense tensors on one device, or None.

    All may be on meta: then the result is too. A single one must not be, since nobody would write the result.
    """
    first, device = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        _arrays.check_tensor(op, name, tensor)
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise TypeError(
                f"{op}: all tensors must be on one device; {first} is on {device}, {name} on {tensor.device}"
            )


def described(*tensors: Any) -> list[Any]:
    """What the core's checks look at, of tensors that have passed ``check_together``; None stays None."""
    return [None if x is None else _Described(tuple(x.shape), _arrays.numpy_dtype(x.dtype)) for x in tensors]


def accumulation(x: Any) -> Any:
    """The dtype of arithmetic, states and parameters."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def number_of(x: Any, A: Any) -> Any:
    """The dtype of the states for inputs like x and this A."""
    real = accumulation(x)
    return torch.promote_types(real, torch.complex64) if A.is_complex() else real


def gradients(*inputs: Any) -> list[Any]:
    """One gradient for each input that there is."""
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs if x is not None]


# --- The selective scan -----------------------------------------------------------------------------------------------


def selective_scan(
    *arguments: Any,  # those of the op, see _registered.py
) -> tuple[Any, Any, Any]:
    *tensors, _, discretization, return_last_state, keep_checkpoints = arguments
    op, u, A = "selective_scan", tensors[0], tensors[2]
    _is_zoh(op, discretization)
    a, sizes = checked_scan(*tensors)
    number = number_of(u, A)
    last_state, checkpoints = u.new_empty(0), u.new_empty(0)
    if return_last_state:
        last_state = A.new_empty((sizes.get("sequences", sizes["batch"]), *A.shape), dtype=number)
    if keep_checkpoints:
        shape = checkpoints_shape(u, A, a.B, a.C, a.seq_idx, a.cu_seqlens)
        if shape is not None:
            checkpoints = A.new_empty(shape, dtype=number)
    return _wave(u), last_state, checkpoints


def _wave(u: Any) -> Any:
    """An array along time as the core makes it for u: with neighbouring channels where those of u may stay."""
    kernels = _backends.for_device("selective_scan", "cpu" if u.is_meta else u.device.type)
    if not kernels.in_columns(_layout_of(u)):
        return u.new_empty(u.shape)
    batch, dim, length = u.shape
    return u.new_empty((batch, length, dim)).transpose(1, 2)


def _layout_of(x: Any) -> SimpleNamespace:
    """Of a tensor, what backends look at to decide whether they take it as it lies."""
    strides = [step * x.itemsize for step in x.stride()]
    return SimpleNamespace(shape=x.shape, strides=strides, itemsize=x.itemsize)


def checked_scan(*tensors: Any) -> Any:
    """Descriptions of these arguments, in the order of the op, and their sizes, after the core's checks."""
    op, is_complex = "selective_scan", tensors[2].is_complex()
    a = _Arguments(*described(*tensors))
    sizes = _check_shapes(op, a, is_complex)
    _check_dtypes(op, a, is_complex)
    return a, sizes


def checkpoints_shape(u: Any, A: Any, B: Any, C: Any, seq_idx: Any, cu_seqlens: Any) -> Any:
    """The shape of the checkpoints, or None if it depends on values."""
    groups = max(x.shape[1] if x.ndim == 4 else 1 for x in (B, C))
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    number = np.dtype(np.complex64 if A.is_complex() else np.float32)
    if u.dtype is torch.float64:
        number = np.result_type(number, np.float64)
    backend = _backends.for_device("selective_scan", "cpu" if u.is_meta else u.device.type)
    return backend.checkpoints_shape(*u.shape, A.shape[1], groups, number, seq_idx is not None, sequences)


def selective_scan_backward(dy: Any, dlast_state: Any, *arguments: Any) -> list[Any]:
    u, _, A, B, C, D, z, *others = arguments[:9]
    made = [_wave(u), _wave(u), *gradients(A, B, C, D)]
    return made + ([] if z is None else [_wave(u)]) + gradients(*others)


def selective_state_update(*arguments: Any) -> Any:
    op, x = "selective_state_update", arguments[1]
    *tensors, _, A_log = arguments
    inspect.unwrap(_checked_scan_step)(op, _ScanStep(*described(*tensors)), A_log)
    return x.new_empty(x.shape)


# --- The convolution --------------------------------------------------------------------------------------------------


def causal_conv1d(
    x: Any, weight: Any, bias: Any, initial_state: Any, seq_idx: Any, cu_seqlens: Any,
    activation: str | None, return_final_state: bool,
) -> tuple[Any, Any]:  # fmt: skip
    _is_silu("causal_conv1d", activation)
    plan = checked_convolution(x, weight, bias, initial_state, seq_idx, cu_seqlens)
    dim, width = weight.shape
    shape = (plan.sequences, dim, width - 1) if return_final_state else (0,)
    return _convolved(x, width), x.new_empty(shape)


def _convolved(x: Any, width: int) -> Any:
    """What the convolution makes of x, or the gradient of x: with neighbouring channels where those of x may stay."""
    kernels = _backends.for_device("causal_conv1d", "cpu" if x.is_meta else x.device.type)
    if not kernels.channels_last(_layout_of(x), width):
        return x.new_empty(x.shape)
    batch, dim, length = x.shape
    return x.new_empty((batch, length, dim)).transpose(1, 2)


def checked_convolution(*tensors: Any) -> Any:
    """What the core's checks find out about these arguments, in the order of the op."""
    return inspect.unwrap(_checked_convolution)("causal_conv1d", _Convolution(*described(*tensors)))


def causal_conv1d_backward(dy: Any, dfinal_state: Any, x: Any, weight: Any, *arguments: Any) -> list[Any]:
    return [_convolved(x, weight.shape[1]), *gradients(weight, *arguments[:2])]


def causal_conv1d_update(x: Any, conv_state: Any, weight: Any, bias: Any, activation: str | None) -> Any:
    op = "causal_conv1d_update"
    _is_silu(op, activation)
    inspect.unwrap(_checked_step)(op, _Step(*described(x, conv_state, weight, bias)))
    return x.new_empty(x.shape)


# --- The other ops ----------------------------------------------------------------------------------------------------


def rms_norm(x: Any, weight: Any, residual: Any, eps: float) -> tuple[Any, Any]:
    op = "rms_norm"
    x_, weight_, residual_ = described(x, weight, residual)
    _weight(op, x_, weight_, eps, residual=residual_)
    y = x.new_empty(x.shape)
    return y, x.new_empty(0) if residual is None else x.new_empty(x.shape, dtype=accumulation(x))


def rms_norm_backward(dy: Any, dresidual_out: Any, x: Any, weight: Any, residual: Any, eps: float) -> list[Any]:
    return gradients(x, weight, residual)


def linear_scan(a: Any, b: Any, initial_state: Any, reverse: bool) -> Any:
    a_, b_, given = described(a, b, initial_state)
    state: Any = given or _Described(a_.shape[:-1], a_.dtype)
    _checked_state("linear_scan", None, state, a=a_, b=b_)  # type: ignore[arg-type]  # needs no memory for zeros
    return b.new_empty(b.shape)


def linear_scan_backward(dh: Any, a: Any, h: Any, initial_state: Any, reverse: bool) -> list[Any]:
    return gradients(a, h, initial_state)


def discretize(delta: Any, A: Any, B: Any, method: str) -> tuple[Any, Any]:
    delta_, A_, B_ = described(delta, A, B)
    shape, number = _checked_system("discretize", delta_, A_, B_, method).shape, number_of(delta, A)
    return A.new_empty(shape, dtype=number), A.new_empty(shape, dtype=number)


def discretize_backward(dA_bar: Any, dB_bar: Any, delta: Any, A: Any, B: Any, method: str) -> list[Any]:
    return gradients(delta, A, B)


def ssm_kernel(delta: Any, A: Any, B: Any, C: Any, length: Any, method: str) -> Any:
    delta_, A_, B_, C_ = described(delta, A, B, C)
    number = length if isinstance(length, int) else 0  # a symbol while tracing
    _checked_kernel("ssm_kernel", delta_, A_, B_, C_, number, method)
    return A.new_empty((A.shape[0], length), dtype=accumulation(delta))


def ssm_kernel_backward(dK: Any, delta: Any, A: Any, B: Any, C: Any, length: int, method: str) -> list[Any]:
    return gradients(delta, A, B, C)


def ssm_convolution(u: Any, kernel: Any) -> Any:
    op = "ssm_convolution"
    u_, kernel_ = described(u, kernel)
    _checks.sizes(op, u=(u_, "batch, dim, length"), kernel=(kernel_, "dim, length"))
    return u.new_empty(u.shape)


def ssm_convolution_backward(dy: Any, u: Any, kernel: Any) -> list[Any]:
    return gradients(u, kernel)
