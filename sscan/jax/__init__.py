"""The ops of sscan inside JAX: under jit, grad, vmap, scan, checkpoint and shard_map, on CPUs and NVIDIA GPUs."""

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
