"""A block of the language model, as of releases 2."""

from sscan.compat.language_model import Block

__all__ = ["Block"]
