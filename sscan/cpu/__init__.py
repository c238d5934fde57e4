"""Kernels for arrays in CPU memory: checked arrays in, filled arrays out. One module for each op."""

from sscan._segments import segments
from sscan.cpu.causal_conv1d import causal_conv1d_backward, causal_conv1d_forward, causal_conv1d_update, channels_last
from sscan.cpu.discretize import discretize_backward, discretize_forward
from sscan.cpu.linear_scan import linear_scan_backward, linear_scan_forward
from sscan.cpu.rms_norm import rms_norm_backward, rms_norm_forward
from sscan.cpu.selective_scan import (
    checkpoints_shape,
    in_columns,
    selective_scan_backward,
    selective_scan_backward_summary,
    selective_scan_forward,
    selective_scan_prefix,
    selective_scan_summary,
)
from sscan.cpu.selective_state_update import selective_state_update
from sscan.cpu.ssm import ssm_convolution_backward, ssm_convolution_forward, ssm_kernel_backward, ssm_kernel_forward

__all__ = [
    "causal_conv1d_backward",
    "causal_conv1d_forward",
    "causal_conv1d_update",
    "channels_last",
    "checkpoints_shape",
    "discretize_backward",
    "discretize_forward",
    "in_columns",
    "linear_scan_backward",
    "linear_scan_forward",
    "rms_norm_backward",
    "rms_norm_forward",
    "segments",
    "selective_scan_backward",
    "selective_scan_backward_summary",
    "selective_scan_forward",
    "selective_scan_prefix",
    "selective_scan_summary",
    "selective_state_update",
    "ssm_convolution_backward",
    "ssm_convolution_forward",
    "ssm_kernel_backward",
    "ssm_kernel_forward",
]
