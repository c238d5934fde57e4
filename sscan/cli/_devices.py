"""Which devices there are, and in which versions the libraries."""

from __future__ import annotations

import contextlib
from importlib import metadata
from typing import Any

from sscan.cli._failures import Mistake


def array_module(device: str) -> Any:
    """The array library that computes on the device."""
    import numpy as np

    try:
        return np if device == "cpu" else cupy_with_gpu()
    except Mistake as mistake:
        raise Mistake(f"--device {device}: {mistake}") from mistake


def cupy_with_gpu() -> Any:
    """CuPy, which then has a GPU and all that compiling kernels for it takes; the Mistake says what is missing."""
    for name, distribution in (("CuPy", "cupy"), ("numba-cuda", "numba-cuda")):
        if version(distribution) == "-":
            raise Mistake(f'{name} is not installed; it comes with: pip install "sscan[cuda13]" (or cuda12)')
    try:
        import cupy
    except ImportError as error:
        raise Mistake(f"CuPy cannot be imported: {error}") from error
    runtime = cupy.cuda.runtime
    try:
        if not runtime.driverGetVersion():
            raise Mistake("there is no NVIDIA driver")
        runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise Mistake(str(error)) from error
    return cupy


def version(name: str) -> str:
    """Of what is installed by that name, or "-"."""
    candidates = [name, "cupy-cuda13x", "cupy-cuda12x"] if name == "cupy" else [name]
    for candidate in candidates:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(candidate)
    return "-"
