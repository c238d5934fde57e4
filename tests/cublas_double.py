"""cuBLAS in NumPy: what it is asked for is done on memory that is named by its address."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from sscan.cuda import _launch, _products

if TYPE_CHECKING:
    import pytest

DTYPES = {0: np.float32, 1: np.float64, 2: np.float16, 14: ml_dtypes.bfloat16}


class Cublas:
    """Products of matrices in columns, in NumPy, on memory that is named by its address."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.status = 0

    def cublasSetStream_v2(self, handle: int, stream: int) -> int:
        self.calls.append(("stream", handle, stream))
        return 0

    def cublasSetWorkspace_v2(self, handle: int, pointer: int, size: int) -> int:
        self.calls.append(("workspace", pointer, size))
        return 0

    def cublasGemmStridedBatchedEx(
        self, handle: int, across_a: int, across_b: int, m: int, n: int, k: int, alpha: int,
        a: int, a_type: int, lda: int, stride_a: int, b: int, b_type: int, ldb: int, stride_b: int, beta: int,
        c: int, c_type: int, ldc: int, stride_c: int, count: int, compute: int, algorithm: int,
    ) -> int:  # fmt: skip
        assert compute == (70 if c_type == 1 else 68)
        scalar = ctypes.c_double if compute == 70 else ctypes.c_float
        assert (scalar.from_address(alpha).value, algorithm) == (1, -1)
        kept = scalar.from_address(beta).value
        assert kept in (0, 1)
        self.calls.append(("product", m, n, k, count))
        wide = np.float64 if compute == 70 else np.float32
        for i in range(count):
            first = columns(a, a_type, lda, stride_a * i, (k, m) if across_a else (m, k))
            second = columns(b, b_type, ldb, stride_b * i, (n, k) if across_b else (k, n))
            first, second = first.T if across_a else first, second.T if across_b else second
            out = columns(c, c_type, ldc, stride_c * i, (m, n))
            made = first.astype(wide) @ second.astype(wide)
            out[...] = made + out.astype(wide) if kept else made
        return self.status


def columns(pointer: int, kind: int, leading: int, start: int, shape: tuple[int, int]) -> Any:
    assert leading >= max(1, shape[0]), "as cuBLAS demands"
    dtype = np.dtype(DTYPES[kind])
    size = leading * (shape[1] - 1) + shape[0]
    memory = (ctypes.c_uint8 * (size * dtype.itemsize)).from_address(pointer + start * dtype.itemsize)
    flat = np.frombuffer(memory, dtype)
    return np.lib.stride_tricks.as_strided(flat, shape, (dtype.itemsize, leading * dtype.itemsize))


def installed(monkeypatch: pytest.MonkeyPatch) -> Cublas:
    """One that NumPy arrays, in the place of CuPy's, are multiplied by until the end of the test."""
    double = Cublas()
    cuda = SimpleNamespace(
        device=SimpleNamespace(get_cublas_handle=lambda: 5), get_current_stream=lambda: SimpleNamespace(ptr=77)
    )
    cupy = SimpleNamespace(empty=np.empty, zeros=np.zeros, broadcast_to=np.broadcast_to, cuda=cuda)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(_products, "_library", lambda: double)
    monkeypatch.setattr(_launch, "address", lambda x: x.ctypes.data)
    monkeypatch.setattr(_launch, "empty", np.empty)
    return double
