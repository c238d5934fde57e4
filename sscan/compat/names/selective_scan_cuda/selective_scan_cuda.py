"""The extension module of mamba_ssm."""

from sscan.compat.selective_scan_cuda import bwd, fwd

__all__ = ["bwd", "fwd"]
