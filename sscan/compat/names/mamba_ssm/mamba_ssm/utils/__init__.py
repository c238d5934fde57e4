"""Generation and files."""

from . import generation, hf

__all__ = ["generation", "hf"]
