"""Layers by name: what a configuration, which is JSON, makes a list of them from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sscan.nn.attention import Attention
from sscan.nn.gated import Gated, Ungated
from sscan.nn.h3 import H3
from sscan.nn.hyena import Hyena
from sscan.nn.mamba import Mamba
from sscan.nn.mlp import GLU, MLP

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BLOCKS: dict[str, type[Any]] = {
    "mamba": Mamba, "gated": Gated, "ungated": Ungated, "h3": H3, "hyena": Hyena, "attention": Attention,
    "mlp": MLP, "glu": GLU,
}  # fmt: skip


def plain_layers(owner: str, name: str, layers: Any, known: Mapping[str, type[Any]]) -> tuple[dict[str, Any], ...]:
    """The owner's argument `name`, layers each as JSON gives it back, so that lists that say the same are equal.

    Raises
    ------
    TypeError, ValueError
        If it is no list of layers that are known, or holds what is not JSON.
    """
    if not isinstance(layers, (list, tuple)) or not layers:
        raise TypeError(f"{owner}: {name} must be a list of one layer at least, got {layers!r}")
    return tuple(_plain(owner, i, layer, known) for i, layer in enumerate(layers))


def _plain(owner: str, i: int, layer: Any, known: Mapping[str, type[Any]]) -> dict[str, Any]:
    values = {"layer": layer} if isinstance(layer, str) else layer
    if not isinstance(values, dict) or values.get("layer") not in known:
        raise ValueError(
            f"{owner}: layer {i} must be one of {', '.join(known)}, or a dict with it as 'layer', got {layer!r}"
        )
    try:
        plain: dict[str, Any] = json.loads(json.dumps(values))
    except TypeError as error:
        raise TypeError(f"{owner}: layer {i}, {values['layer']!r}: {error}") from error
    return plain


def new_layers(
    owner: str, layers: Sequence[dict[str, Any]], known: Mapping[str, type[Any]], d_model: int, n_layer: int, dtype: Any
) -> list[Any]:
    """The layers, without initial values.

    Raises
    ------
    ValueError
        If an argument of one is wrong; it says which layer's.
    """
    made = []
    for i, layer in enumerate(layers):
        options = {name: value for name, value in layer.items() if name != "layer"}
        try:
            made.append(known[layer["layer"]](d_model, **options, n_layer=n_layer, dtype=dtype, seed=None))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{owner}: layer {i}, {layer['layer']!r}: {error}") from error
    return made
