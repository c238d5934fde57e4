"""The language model."""

from sscan.compat.generation import GenerationMixin
from sscan.compat.language_model import (
    MambaConfig,
    MambaLMHeadModel,
    MixerModel,
    _init_weights,
    create_block,
    load_config_hf,
    load_state_dict_hf,
)
from sscan.compat.language_model import OldBlock as Block
from sscan.compat.norms import RMSNorm, layer_norm_fn, rms_norm_fn
from sscan.torch import Mamba

__all__ = [
    "Block",
    "GenerationMixin",
    "Mamba",
    "MambaConfig",
    "MambaLMHeadModel",
    "MixerModel",
    "RMSNorm",
    "_init_weights",
    "create_block",
    "layer_norm_fn",
    "load_config_hf",
    "load_state_dict_hf",
    "rms_norm_fn",
]
