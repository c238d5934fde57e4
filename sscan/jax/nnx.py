"""The Mamba block and its language model as modules of Flax NNX."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("flax") is None:
    raise ModuleNotFoundError('sscan.jax.nnx needs Flax, which is installed by: pip install "sscan[flax]"', name="flax")

import jax.numpy as jnp
from flax import nnx

from sscan.jax import _block
from sscan.jax._block import decays
from sscan.models.config import BlockConfig
from sscan.models.pretrained import open_model

if TYPE_CHECKING:
    from pathlib import Path

    from sscan.models.config import MambaConfig

__all__ = ["Mamba", "MambaLM", "decays"]


# Flax 0.10, the last for Python 3.10, takes plain lists, and later releases do not.
_List = getattr(nnx, "List", list)


class Part(nnx.Module):  # type: ignore[misc]
    """A weight, and a bias or None."""

    def __init__(self, weight: Any, bias: Any = None) -> None:
        self.weight = nnx.Param(weight)
        self.bias = None if bias is None else nnx.Param(bias)


class Mamba(_block.Block, nnx.Module):  # type: ignore[misc]
    """A Mamba block: (..., length, d_model) to the same; see :class:`sscan.nn.Mamba`.

    Parameters
    ----------
    d_model : int
    n_layer : int
        Number of residual blocks in the model: out_proj starts smaller by sqrt(n_layer).
    dtype : dtype
        Of the parameters; A_log and D are at least float32. Activations are in the dtype of the input, to which the
        weights of the projections are cast.
    rngs : nnx.Rngs
        Whose stream `params` the initial values are drawn from.
    **block
        Further arguments of :class:`sscan.nn.Mamba`: d_state, d_conv, expand, dt_rank, ..., discretization.

    Attributes
    ----------
    in_proj, conv1d, x_proj, dt_proj, out_proj : module
        With `weight` and `bias`, shaped as in the original's checkpoints.
    A_log, D : nnx.Param
    """

    def __init__(
        self, d_model: int, *, n_layer: int = 1, dtype: Any = jnp.float32, rngs: nnx.Rngs, **block: Any
    ) -> None:
        config = BlockConfig(**block)
        arrays = _block.initial(config, d_model, rngs.params(), n_layer, dtype)
        self.discretization = config.discretization
        for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"):
            setattr(self, name, Part(arrays[f"{name}.weight"], arrays.get(f"{name}.bias")))
        self.A_log, self.D = nnx.Param(arrays["A_log"]), nnx.Param(arrays["D"])

    @classmethod
    def from_pretrained(
        cls, model: str | Path, layer: int = 0, dtype: Any = jnp.float32, *, revision: str | None = None
    ) -> Mamba:
        """Block number `layer` of a model in a folder or on the hub; see :meth:`sscan.nn.MambaLM.from_pretrained`."""
        with open_model(model, revision) as (config, weights):
            prefix = _block.prefix_of(config, layer)
            block: Mamba = _filled(
                lambda rngs: cls(config.d_model, dtype=dtype, rngs=rngs, **config.ssm_cfg), weights, prefix
            )
            return block


class ResidualBlock(nnx.Module):  # type: ignore[misc]
    """A norm and the mixer that reads it."""

    def __init__(self, config: MambaConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        self.norm = Part(jnp.ones(config.d_model, dtype))
        self.mixer = Mamba(config.d_model, n_layer=config.n_layer, dtype=dtype, rngs=rngs, **config.ssm_cfg)


class Backbone(nnx.Module):  # type: ignore[misc]
    """What lies between token ids and the head."""

    def __init__(self, config: MambaConfig, embedding: Any, dtype: Any, rngs: nnx.Rngs) -> None:
        self.embedding = Part(embedding)
        self.layers = _List([ResidualBlock(config, dtype, rngs) for _ in range(config.n_layer)])
        self.norm_f = Part(jnp.ones(config.d_model, dtype))


class MambaLM(_block.LanguageModel, nnx.Module):  # type: ignore[misc]
    """A language model: token ids to logits over the padded vocabulary; see :class:`sscan.nn.MambaLM`.

    Parameters
    ----------
    config : MambaConfig
    dtype : dtype
        Of parameters and activations; A_log, D, states and the arithmetic of scan and norms are at least float32.
    rngs : nnx.Rngs
    """

    def __init__(self, config: MambaConfig, dtype: Any = jnp.float32, *, rngs: nnx.Rngs) -> None:
        embedding, head = _block.initial_tables(config, rngs.params(), dtype)
        self.backbone = Backbone(config, embedding, dtype, rngs)
        self.lm_head = None if head is None else Part(head)
        self.norm_epsilon, self.residual_in_fp32 = config.norm_epsilon, config.residual_in_fp32

    @classmethod
    def from_pretrained(cls, model: str | Path, dtype: Any = jnp.float32, *, revision: str | None = None) -> MambaLM:
        """A model in a folder or on the hub; see :meth:`sscan.nn.MambaLM.from_pretrained`."""
        with open_model(model, revision) as (config, weights):
            lm: MambaLM = _filled(lambda rngs: cls(config, dtype, rngs=rngs), weights)
            return lm


def _filled(make: Any, weights: Any, prefix: str = "") -> Any:
    """The module that `make` makes of random streams, which are not drawn from, with the weights in opened files."""
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, state = nnx.split(module)
    return nnx.merge(graph, _block.filled(state, weights, prefix))
