"""causal_conv1d."""

from sscan.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update

from . import causal_conv1d_interface, causal_conv1d_varlen, cpp_functions

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_interface",
    "causal_conv1d_update",
    "causal_conv1d_varlen",
    "cpp_functions",
]
__version__ = "1.5.0+sscan"
