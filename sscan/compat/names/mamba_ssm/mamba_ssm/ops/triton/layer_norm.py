"""The norms, by the name that they have from release 2 on."""

from sscan.compat.norms import RMSNorm, layer_norm_fn, rms_norm_fn

__all__ = ["RMSNorm", "layer_norm_fn", "rms_norm_fn"]
