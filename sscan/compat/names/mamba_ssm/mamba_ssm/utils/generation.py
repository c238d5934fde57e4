"""Generation."""

from sscan.compat.generation import (
    DecodingCGCache,
    GenerationMixin,
    capture_graph,
    decode,
    sample,
    update_graph_cache,
)
from sscan.compat.mamba_ssm import InferenceParams

__all__ = [
    "DecodingCGCache",
    "GenerationMixin",
    "InferenceParams",
    "capture_graph",
    "decode",
    "sample",
    "update_graph_cache",
]
