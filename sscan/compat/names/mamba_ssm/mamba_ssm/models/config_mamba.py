"""The configuration of the language model."""

from sscan.compat.language_model import MambaConfig

__all__ = ["MambaConfig"]
