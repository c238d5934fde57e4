"""Files of models."""

from sscan.compat.language_model import load_config_hf, load_state_dict_hf

__all__ = ["load_config_hf", "load_state_dict_hf"]
