"""Modules."""

from . import mamba_simple

__all__ = ["mamba_simple"]
