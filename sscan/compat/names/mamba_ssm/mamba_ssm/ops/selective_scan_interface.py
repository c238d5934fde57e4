"""The scan and the block."""

from sscan.compat.mamba_ssm import (
    MambaInnerFn,
    SelectiveScanFn,
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
)

__all__ = [
    "MambaInnerFn",
    "SelectiveScanFn",
    "mamba_inner_fn",
    "mamba_inner_ref",
    "selective_scan_fn",
    "selective_scan_ref",
]
