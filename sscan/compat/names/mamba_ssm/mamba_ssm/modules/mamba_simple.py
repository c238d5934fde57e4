"""The Mamba block, and a block of the language model as of releases 1."""

from sscan.compat.language_model import OldBlock as Block
from sscan.torch import Mamba

__all__ = ["Block", "Mamba"]
