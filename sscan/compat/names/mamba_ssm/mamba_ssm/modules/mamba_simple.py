"""The Mamba block."""

from sscan.compat._imports import absent
from sscan.torch import Mamba

__all__ = ["Mamba"]

__getattr__ = absent(__name__, {"Block": "the language model"})
