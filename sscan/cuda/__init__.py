"""Kernels for arrays in GPU memory: checked arrays in, filled arrays out. One module for each op."""

import importlib

_OPS = {
    "causal_conv1d": ("causal_conv1d_backward", "causal_conv1d_forward", "causal_conv1d_update"),
    "discretize": ("discretize_backward", "discretize_forward"),
    "linear_scan": ("linear_scan_backward", "linear_scan_forward"),
    "rms_norm": ("rms_norm_backward", "rms_norm_forward"),
    "selective_scan": ("empty_checkpoints", "selective_scan_backward", "selective_scan_forward"),
    "selective_state_update": ("selective_state_update",),
    "ssm": ("ssm_convolution_backward", "ssm_convolution_forward", "ssm_kernel_backward", "ssm_kernel_forward"),
    "_segments": ("segments",),
}


def __getattr__(name):
    for module, functions in _OPS.items():
        if name in functions:
            globals()[name] = getattr(importlib.import_module(f"sscan.cuda.{module}"), name)
            return globals()[name]
    raise AttributeError(name)
