"""Selective state space models (Mamba) on the arrays of NumPy, PyTorch, JAX and CuPy."""

from sscan.causal_conv1d import causal_conv1d, causal_conv1d_backward, causal_conv1d_update
from sscan.discretize import discretize, discretize_backward
from sscan.linear_scan import linear_scan, linear_scan_backward
from sscan.rms_norm import rms_norm, rms_norm_backward
from sscan.selective_scan import (
    SelectiveScanGradients,
    selective_scan,
    selective_scan_backward,
    selective_scan_forward,
)
from sscan.selective_state_update import selective_state_update
from sscan.ssm import ssm_convolution, ssm_convolution_backward, ssm_kernel, ssm_kernel_backward

__version__ = "0.3.0"

__all__ = [
    "SelectiveScanGradients",
    "causal_conv1d",
    "causal_conv1d_backward",
    "causal_conv1d_update",
    "discretize",
    "discretize_backward",
    "linear_scan",
    "linear_scan_backward",
    "rms_norm",
    "rms_norm_backward",
    "selective_scan",
    "selective_scan_backward",
    "selective_scan_forward",
    "selective_state_update",
    "ssm_convolution",
    "ssm_convolution_backward",
    "ssm_kernel",
    "ssm_kernel_backward",
]
