"""The states of a generation."""

from sscan.compat._imports import absent
from sscan.compat.mamba_ssm import InferenceParams

__all__ = ["InferenceParams"]

__getattr__ = absent(
    __name__,
    {
        "GenerationMixin": "the language model",
        "decode": "the language model",
        "sample": "the language model",
        "update_graph_cache": "the language model",
    },
)
