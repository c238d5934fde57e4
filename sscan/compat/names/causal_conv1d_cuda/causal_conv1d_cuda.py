"""The extension module of causal_conv1d, as its releases 1.2 to 1.4 have it."""

from sscan.compat.causal_conv1d_cuda import causal_conv1d_bwd_function as causal_conv1d_bwd
from sscan.compat.causal_conv1d_cuda import causal_conv1d_fwd_function as causal_conv1d_fwd
from sscan.compat.causal_conv1d_cuda import causal_conv1d_update_function as causal_conv1d_update

__all__ = ["causal_conv1d_bwd", "causal_conv1d_fwd", "causal_conv1d_update"]
