"""Kernels for arrays in GPU memory: checked arrays in, filled arrays out. One module for each op."""

from sscan.cuda._segments import segments
from sscan.cuda.causal_conv1d import causal_conv1d_backward, causal_conv1d_forward, causal_conv1d_update, channels_last
from sscan.cuda.discretize import discretize_backward, discretize_forward
from sscan.cuda.linear_scan import linear_scan_backward, linear_scan_forward
from sscan.cuda.rms_norm import rms_norm_backward, rms_norm_forward
from sscan.cuda.selective_scan import (
    checkpoints_shape,
    in_columns,
    selective_scan_backward,
    selective_scan_backward_summary,
    selective_scan_forward,
    selective_scan_prefix,
    selective_scan_summary,
)
from sscan.cuda.selective_state_update import selective_state_update
from sscan.cuda.ssm import ssm_convolution_backward, ssm_convolution_forward, ssm_kernel_backward, ssm_kernel_forward

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
