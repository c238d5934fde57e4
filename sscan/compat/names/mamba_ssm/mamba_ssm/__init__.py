"""mamba_ssm, as far as it is of Mamba-1."""

from sscan.compat._imports import absent
from sscan.compat.language_model import MambaLMHeadModel
from sscan.compat.mamba_ssm import mamba_inner_fn, selective_scan_fn
from sscan.torch import Mamba

from . import models, modules, ops, utils

__all__ = ["Mamba", "MambaLMHeadModel", "mamba_inner_fn", "models", "modules", "ops", "selective_scan_fn", "utils"]
__version__ = "1.2.2+sscan"

__getattr__ = absent(__name__, {"Mamba2": "Mamba-2", "Mamba3": "Mamba-3"})
