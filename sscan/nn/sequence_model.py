"""Models of any layers, with the interface of the Mamba language model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan._arrays import array_module
from sscan.models.arguments import check_integer
from sscan.models.files import content_of, open_arrays, read_object
from sscan.models.pretrained import CONFIG, WEIGHTS, save_model, weights_in
from sscan.nn.language_model import Backbone, LanguageModel
from sscan.nn.modules import Dropout
from sscan.nn.sequence_config import NORMS, SequenceConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from sscan.nn.autodiff import Array, Tensor

LONGEST_WAVE = 10000.0  # of absolute positions, over 2 pi
LIKE_EMBEDDINGS = 0.02 * math.sqrt(2)  # times a sine or cosine it has the deviation of the embedding


class SequenceBackbone(Backbone):
    """Token ids to hidden vectors through any layers, with positions and dropout."""

    def __init__(self, config: SequenceConfig, dtype: Any, activation_dtype: Any) -> None:
        super().__init__(config, config.new_layers(dtype), NORMS[config.norm], dtype, activation_dtype)
        self.positions, self.dropout = config.positions, Dropout(config.dropout)

    def __call__(self, ids: Array, seq_idx: Array | None = None) -> Tensor:
        """Hidden vectors of sequences from their beginnings.

        Raises
        ------
        NotImplementedError
            For packed sequences with absolute positions, which would count on from one into the next.
        """
        if seq_idx is not None and self.positions == "absolute":
            raise NotImplementedError("SequenceModel: absolute positions do not begin anew in packed sequences")
        return super().__call__(ids, seq_idx)

    def embedded(self, ids: Array) -> Tensor:
        """The embedding, with positions if there are any."""
        hidden = self.embedding(ids)
        if self.positions == "absolute":
            hidden = (hidden + self._positions(hidden.shape[-2])).astype(hidden.dtype)
        return self.dropout(hidden)

    def _positions(self, length: int) -> Array:
        """Sines and cosines (length, d_model) of positions, of wavelengths in geometric progression."""
        xp, width = array_module(self.embedding.weight.data), self.config.d_model
        waves = LONGEST_WAVE ** -(xp.arange(0, width, 2) / width)
        angle = xp.arange(length)[:, None] * waves
        both = xp.concatenate([xp.sin(angle), xp.cos(angle)], axis=1)[:, :width]
        return (LIKE_EMBEDDINGS * both).astype(np.float32)

    def _run(self, ids: Array, mix: Callable[[int, Any, Tensor], Tensor]) -> Tensor:
        return super()._run(ids, lambda i, mixer, hidden: self.dropout(mix(i, mixer, hidden)))


class SequenceModel(LanguageModel):
    """A model of any layers: token ids to logits over the padded vocabulary.

    Embedding; for each layer, x + layer(norm(x)); norm; head. Initial values are those of the layers, embeddings normal
    with deviation 0.02.

    Parameters
    ----------
    config : SequenceConfig
    dtype, seed, activation_dtype
        As of :class:`sscan.nn.MambaLM`.
    """

    def __init__(
        self,
        config: SequenceConfig,
        dtype: Any = np.float32,
        seed: int | np.random.Generator | None = 0,
        *,
        activation_dtype: Any = None,
    ) -> None:
        self.config = config
        activations = dtype if activation_dtype is None else activation_dtype
        super().__init__(SequenceBackbone(config, dtype, activations), dtype, seed)

    def new_states(self, batch: int) -> list[Any]:
        """The states before the first token of `batch` sequences, one a layer: their size is all that reading on needs.

        Raises
        ------
        NotImplementedError
            If there are layers that have none, or absolute positions; it says which.
        """
        check_integer("new_states", "batch", batch, least=0)
        states, without = [], ["absolute positions"] if self.config.positions == "absolute" else []
        for i, layer in enumerate(self.config.layers):
            try:
                states.append(self.backbone.layers[i].mixer.new_state(batch))
            except NotImplementedError:
                without.append(f"layer {i} ({layer['layer']!r})")
        if without:
            raise NotImplementedError(f"SequenceModel: no states of constant size with {', '.join(without)}")
        return states

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: Any = np.float32, *, activation_dtype: Any = None
    ) -> SequenceModel:
        """The model in a folder that :meth:`save_pretrained` wrote.

        `dtype` and `activation_dtype` are those of :class:`sscan.nn.MambaLM`.

        Raises
        ------
        OSError
            If a file cannot be read.
        ValueError
            If the configuration is none of such a model, or the arrays are not those of the configuration, or beyond
            `dtype`; the message names the file.
        """
        path, weights = Path(folder) / CONFIG, Path(folder) / WEIGHTS
        values = read_object(path)
        with content_of(path):
            config = SequenceConfig.from_dict(values)
        with open_arrays(weights) as file:
            return cls.of_weights(
                config, weights_in(weights, file, config, ""), dtype, activation_dtype=activation_dtype
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` to a folder, which is created if need be.

        Raises
        ------
        OSError
            If there is no room, or they cannot be written; older files stay as they are.
        """
        save_model(folder, self.config, {name: parameter.data for name, parameter in self.named_parameters()})
