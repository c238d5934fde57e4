"""The extension module of VMamba whose output may be float32."""

from sscan.compat.selective_scan_cuda_oflex import bwd, fwd

__all__ = ["bwd", "fwd"]
