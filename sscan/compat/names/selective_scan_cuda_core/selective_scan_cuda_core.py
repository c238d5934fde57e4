"""The extension module of VMamba."""

from sscan.compat.selective_scan_cuda_core import bwd, fwd

__all__ = ["bwd", "fwd"]
