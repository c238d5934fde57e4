"""Generation."""

from . import generation

__all__ = ["generation"]
