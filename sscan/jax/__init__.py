"""The ops of sscan inside JAX: under jit, grad, vmap, scan, checkpoint and shard_map, on CPUs and NVIDIA GPUs."""

import importlib.util

if importlib.util.find_spec("jax") is None:
    raise ModuleNotFoundError('sscan.jax needs JAX, which is installed by: pip install "sscan[jax]"', name="jax")

from sscan.jax.ops import (
    causal_conv1d,
    causal_conv1d_update,
    discretize,
    linear_scan,
    rms_norm,
    selective_scan,
    selective_state_update,
    ssm_convolution,
    ssm_kernel,
)

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "discretize",
    "linear_scan",
    "rms_norm",
    "selective_scan",
    "selective_state_update",
    "ssm_convolution",
    "ssm_kernel",
]
