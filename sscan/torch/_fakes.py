"""Results without data, for torch.compile and torch.export: their shapes and dtypes, after the core's own checks."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import torch

from sscan import _backends, _checks
from sscan.causal_conv1d import _Arguments as _Convolution
from sscan.causal_conv1d import _checked as _checked_convolution
from sscan.causal_conv1d import _checked_step, _is_silu, _Step
from sscan.rms_norm import _weight
from sscan.selective_scan import _Arguments, _check_dtypes, _check_shapes
from sscan.selective_state_update import _Arguments as _ScanStep
from sscan.selective_state_update import _checked as _checked_scan_step

_NAMES = (
    "float64", "float32", "float16", "complex64", "complex128", "bool",
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
)  # fmt: skip
_DTYPES = {getattr(torch, name): np.dtype(name) for name in _NAMES} | {torch.bfloat16: np.dtype(ml_dtypes.bfloat16)}


class _Described:
    """What the core's checks look at, of a tensor without data: its memory is such that nothing needs a copy."""

    flags = SimpleNamespace(c_contiguous=True)

    def __init__(self, shape: tuple[Any, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.ndim = shape, len(shape)
        self.dtype, self.itemsize = dtype, dtype.itemsize
        self.strides = (self.itemsize,) * self.ndim

    def astype(self, dtype: np.dtype[Any], order: str) -> _Described:
        return _Described(self.shape, dtype)


def described(op: str, *tensors: Any, names: tuple[str, ...]) -> list[Any]:
    """Descriptions of tensors, after the checks of devices and dtypes that the core makes on entering."""
    device = tensors[0].device
    found: list[_Described | None] = []
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is None:
            found.append(None)
            continue
        if tensor.device.type not in ("cpu", "cuda"):
            raise TypeError(f"{op}: {name} must be a dense tensor on cpu or cuda, got one on {tensor.device}")
        if tensor.device != device:
            raise TypeError(
                f"{op}: all tensors must be on one device; {names[0]} is on {device}, {name} on {tensor.device}"
            )
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{op}: {name} has the dtype {tensor.dtype}, which is not supported")
        found.append(_Described(tuple(tensor.shape), _DTYPES[tensor.dtype]))
    return found


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
    if discretization not in ("mamba", "zoh"):
        raise ValueError(f'{op}: discretization must be "mamba" or "zoh", got {discretization!r}')
    a, sizes = checked_scan(*tensors)
    number = number_of(u, A)
    last_state, checkpoints = u.new_empty(0), u.new_empty(0)
    if return_last_state or keep_checkpoints:
        last_state = A.new_empty((sizes.get("sequences", sizes["batch"]), *A.shape), dtype=number)
    if keep_checkpoints:
        shape = checkpoints_shape(u, A, a.B, a.C, a.seq_idx, a.cu_seqlens)
        if shape is not None:
            checkpoints = A.new_empty(shape, dtype=number)
    return u.new_empty(u.shape), last_state, checkpoints


def checked_scan(*tensors: Any) -> Any:
    """Descriptions of these arguments, in the order of the op, and their sizes, after the core's checks."""
    op, is_complex = "selective_scan", tensors[2].is_complex()
    a = _Arguments(*described(op, *tensors, names=_Arguments._fields[: len(tensors)]))
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
    backend = _backends.for_device("selective_scan", u.device.type)
    return backend.checkpoints_shape(*u.shape, A.shape[1], groups, number, seq_idx is not None, sequences)


def selective_scan_backward(dy: Any, dlast_state: Any, *arguments: Any) -> list[Any]:
    return gradients(*arguments[:9])


def selective_state_update(*arguments: Any) -> Any:
    op, x = "selective_state_update", arguments[1]
    tensors = arguments[:-1]
    inspect.unwrap(_checked_scan_step)(op, _ScanStep(*described(op, *tensors, names=_ScanStep._fields)))
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
    return x.new_empty(x.shape), x.new_empty(shape)


def checked_convolution(*tensors: Any) -> Any:
    """What the core's checks find out about these arguments, in the order of the op."""
    op, names = "causal_conv1d", _Convolution._fields[: len(tensors)]
    given = described(op, *tensors, names=names)
    return inspect.unwrap(_checked_convolution)(op, _Convolution(*given))


def causal_conv1d_backward(dy: Any, dfinal_state: Any, *arguments: Any) -> list[Any]:
    return gradients(*arguments[:4])


def causal_conv1d_update(x: Any, conv_state: Any, weight: Any, bias: Any, activation: str | None) -> Any:
    op = "causal_conv1d_update"
    _is_silu(op, activation)
    inspect.unwrap(_checked_step)(op, _Step(*described(op, x, conv_state, weight, bias, names=_Step._fields)))
    return x.new_empty(x.shape)


# --- The other ops ----------------------------------------------------------------------------------------------------


def rms_norm(x: Any, weight: Any, residual: Any, eps: float) -> tuple[Any, Any]:
    op = "rms_norm"
    x_, weight_, residual_ = described(op, x, weight, residual, names=("x", "weight", "residual"))
    _weight(op, x_, weight_, eps, residual=residual_)
    number = accumulation(x)
    return x.new_empty(x.shape), x.new_empty(x.shape if residual is not None else 0, dtype=number)


def rms_norm_backward(dy: Any, dresidual_out: Any, x: Any, weight: Any, residual: Any, eps: float) -> list[Any]:
    return gradients(x, weight, residual)


def linear_scan(a: Any, b: Any, initial_state: Any, reverse: bool) -> Any:
    op = "linear_scan"
    a_, b_, state = described(op, a, b, initial_state, names=("a", "b", "initial_state"))
    _checks.same_shape(op, a=a_, b=b_)
    if state is not None and state.shape != a_.shape[:-1]:
        expected = f"the shape of a without its last axis, {a_.shape[:-1]}"
        raise ValueError(f"{op}: initial_state must have {expected}, got {state.shape}")
    return b.new_empty(b.shape)


def linear_scan_backward(dh: Any, a: Any, h: Any, initial_state: Any, reverse: bool) -> list[Any]:
    return gradients(a, h, initial_state)


def discretize(delta: Any, A: Any, B: Any, method: str) -> tuple[Any, Any]:
    described("discretize", delta, A, B, names=("delta", "A", "B"))
    shape = A.shape if delta.ndim == 1 else (*delta.shape, A.shape[1])
    number = number_of(delta, A)
    return A.new_empty(shape, dtype=number), A.new_empty(shape, dtype=number)


def discretize_backward(dA_bar: Any, dB_bar: Any, delta: Any, A: Any, B: Any, method: str) -> list[Any]:
    return gradients(delta, A, B)


def ssm_kernel(delta: Any, A: Any, B: Any, C: Any, length: int, method: str) -> Any:
    described("ssm_kernel", delta, A, B, C, names=("delta", "A", "B", "C"))
    return A.new_empty((A.shape[0], length), dtype=accumulation(delta))


def ssm_kernel_backward(dK: Any, delta: Any, A: Any, B: Any, C: Any, length: int, method: str) -> list[Any]:
    return gradients(delta, A, B, C)


def ssm_convolution(u: Any, kernel: Any) -> Any:
    op = "ssm_convolution"
    u_, kernel_ = described(op, u, kernel, names=("u", "kernel"))
    _checks.sizes(op, u=(u_, "batch, dim, length"), kernel=(kernel_, "dim, length"))
    return u.new_empty(u.shape)


def ssm_convolution_backward(dy: Any, u: Any, kernel: Any) -> list[Any]:
    return gradients(u, kernel)
