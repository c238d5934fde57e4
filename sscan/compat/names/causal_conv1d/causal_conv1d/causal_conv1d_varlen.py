"""The last inputs of packed sequences."""

from sscan.compat.causal_conv1d import causal_conv1d_varlen_states, causal_conv1d_varlen_states_ref

__all__ = ["causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref"]
