"""What a model of any layers is: a list of them by name, and the sizes of what is around them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sscan.models.arguments import check_flag, check_integer, check_number
from sscan.nn.layers import BLOCKS, new_layers, plain_layers
from sscan.nn.modules import LayerNorm, Parameter, RMSNorm
from sscan.nn.unet import UNet

if TYPE_CHECKING:
    from collections.abc import Mapping

LAYERS: dict[str, type[Any]] = {**BLOCKS, "unet": UNet}
NORMS: dict[str, type[RMSNorm | LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}
POSITIONS = ("none", "absolute")


@dataclass(frozen=True)
class SequenceConfig:
    """Shape of a :class:`sscan.nn.SequenceModel`, of values that JSON has.

    Attributes
    ----------
    d_model, vocab_size : int
        Width of the residual stream, and number of tokens.
    layers : tuple of dict
        Each the name of a layer, ``{"layer": "gated", ...}``, and further arguments of its class: "mamba"
        (:class:`sscan.nn.Mamba`), "gated", "ungated", "h3", "hyena", "attention", "mlp", "glu" or "unet"
        (:class:`sscan.nn.UNet`). A name alone stands for a dict with nothing else.
    norm : {"rms", "layer"}
        Before each layer, and at the end.
    norm_epsilon : float
        Of the norms.
    positions : {"none", "absolute"}
        What is added to the embedding; absolute ones are sines and cosines of the position (Vaswani et al. 2017), as
        large as embeddings are at first.
    dropout : float
        The share that is dropped of the embedding and of what each layer adds, see :class:`sscan.nn.Dropout`.
    tie_embeddings : bool
        The head uses the embedding's matrix.
    pad_vocab_size_multiple : int
        The embedding has `vocab_size` rows rounded up to it.

    Raises
    ------
    TypeError, ValueError
        If a value is wrong. That of a layer says which one.
    """

    d_model: int
    vocab_size: int
    layers: tuple[Any, ...]
    norm: str = "rms"
    norm_epsilon: float = 1e-5
    positions: str = "none"
    dropout: float = 0.0
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 1

    # What else the backbone asks for: the stream is kept in float32, and added and normalised at once.
    residual_in_fp32: ClassVar[bool] = True
    fused_add_norm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("d_model", "vocab_size", "pad_vocab_size_multiple"):
            check_integer("SequenceConfig", name, getattr(self, name))
        check_number("SequenceConfig", "norm_epsilon", self.norm_epsilon)
        check_number("SequenceConfig", "dropout", self.dropout)
        check_flag("SequenceConfig", "tie_embeddings", self.tie_embeddings)
        for name, known in {"norm": NORMS, "positions": POSITIONS}.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"SequenceConfig: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if self.dropout >= 1:
            raise ValueError(f"SequenceConfig: dropout must be below 1, got {self.dropout}")
        object.__setattr__(self, "layers", plain_layers("SequenceConfig", "layers", self.layers, LAYERS))
        self.new_layers(np.float32)

    def new_layers(self, dtype: Any) -> list[Any]:
        """The layers, with parameters of `dtype` and without initial values."""
        return new_layers("SequenceConfig", self.layers, LAYERS, self.d_model, self.n_layer, dtype)

    @property
    def n_layer(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def padded_vocab_size(self) -> int:
        """Number of rows of the embedding."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all parameters, in order; of tied embeddings both names."""
        table, norm = (self.padded_vocab_size, self.d_model), NORMS[self.norm](self.d_model)
        parameters: dict[str, Parameter] = {}
        for i, layer in enumerate(self.new_layers(np.float32)):
            parameters |= dict(norm.named_parameters(f"backbone.layers.{i}.norm."))
            parameters |= dict(layer.named_parameters(f"backbone.layers.{i}.mixer."))
        parameters |= dict(norm.named_parameters("backbone.norm_f."))
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        return {"backbone.embedding.weight": table, **shapes, "lm_head.weight": table}

    def parameter_count(self) -> int:
        """Number of parameters of the model, that of tied embeddings counted once."""
        shapes = self.shapes()
        if self.tie_embeddings:
            del shapes["lm_head.weight"]
        return sum(map(math.prod, shapes.values()))

    def to_dict(self, format: str = "original") -> dict[str, Any]:
        """As plain values, for a config.json; there is one format of it."""
        if format != "original":
            raise ValueError(f"SequenceConfig: there is no format {format!r} of it")
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SequenceConfig:
        """The configuration of the `values` in a config.json.

        Raises
        ------
        TypeError, ValueError
            If a key is unknown or missing, or a value is wrong.
        """
        fields = dataclasses.fields(cls)
        unknown = values.keys() - {field.name for field in fields}
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
        if unknown or missing:
            what = f"unknown key {min(unknown)!r}" if unknown else f"missing key {missing[0]!r}"
            raise ValueError(f"SequenceConfig: {what}")
        return cls(**values)
