"""Functions."""

from . import selective_scan_interface, triton

__all__ = ["selective_scan_interface", "triton"]
