"""What the original has in Triton."""

from . import layer_norm, layernorm, selective_state_update

__all__ = ["layer_norm", "layernorm", "selective_state_update"]
