"""The Mamba block and its language model as modules of Equinox."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("equinox") is None:
    raise ModuleNotFoundError(
        'sscan.jax.equinox needs Equinox, which is installed by: pip install "sscan[equinox]"', name="equinox"
    )

import equinox as eqx
import jax
import jax.numpy as jnp

from sscan.jax import _block
from sscan.jax._block import decays
from sscan.models.config import BlockConfig, MambaConfig
from sscan.models.pretrained import open_model

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Mamba", "MambaLM", "decays"]


class Part(eqx.Module):  # type: ignore[misc]
    """A weight, and a bias or None."""

    weight: Any
    bias: Any = None


class Mamba(_block.Block, eqx.Module):  # type: ignore[misc]
    """A Mamba block: (..., length, d_model) to the same; see :class:`sscan.nn.Mamba`.

    Parameters
    ----------
    d_model : int
    n_layer : int
        Number of residual blocks in the model: out_proj starts smaller by sqrt(n_layer).
    dtype : dtype
        Of the parameters; A_log and D are at least float32. Activations are in the dtype of the input, to which the
        weights of the projections are cast.
    key : key of jax.random
        For the initial values.
    **block
        Further arguments of :class:`sscan.nn.Mamba`: d_state, d_conv, expand, dt_rank, ..., discretization.

    Attributes
    ----------
    in_proj, conv1d, x_proj, dt_proj, out_proj : module
        With `weight` and `bias`, shaped as in the original's checkpoints.
    A_log, D : array
    """

    in_proj: Part
    conv1d: Part
    x_proj: Part
    dt_proj: Part
    A_log: Any
    D: Any
    out_proj: Part
    discretization: str = eqx.field(static=True)

    def __init__(self, d_model: int, *, n_layer: int = 1, dtype: Any = jnp.float32, key: Any, **block: Any) -> None:
        config = BlockConfig(**block)
        arrays = _block.initial(config, d_model, key, n_layer, dtype)
        self.discretization = config.discretization
        for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"):
            setattr(self, name, Part(arrays[f"{name}.weight"], arrays.get(f"{name}.bias")))
        self.A_log, self.D = arrays["A_log"], arrays["D"]

    @classmethod
    def from_pretrained(
        cls, model: str | Path, layer: int = 0, dtype: Any = jnp.float32, *, revision: str | None = None
    ) -> Mamba:
        """Block number `layer` of a model in a folder or on the hub; see :meth:`sscan.nn.MambaLM.from_pretrained`."""
        with open_model(model, revision) as (config, weights):
            prefix = _block.prefix_of(config, layer)
            block: Mamba = _filled(
                lambda key: cls(config.d_model, dtype=dtype, key=key, **config.ssm_cfg), weights, prefix
            )
            return block


class ResidualBlock(eqx.Module):  # type: ignore[misc]
    """A norm and the mixer that reads it."""

    norm: Part
    mixer: Mamba


class Backbone(eqx.Module):  # type: ignore[misc]
    """What lies between token ids and the head."""

    embedding: Part
    layers: list[ResidualBlock]
    norm_f: Part

    def __init__(self, config: MambaConfig, embedding: Any, dtype: Any, key: Any) -> None:
        self.embedding = Part(embedding)
        self.layers = [
            ResidualBlock(
                Part(jnp.ones(config.d_model, dtype)),
                Mamba(config.d_model, n_layer=config.n_layer, dtype=dtype, key=own, **config.ssm_cfg),
            )
            for own in jax.random.split(key, config.n_layer)
        ]
        self.norm_f = Part(jnp.ones(config.d_model, dtype))


class MambaLM(_block.LanguageModel, eqx.Module):  # type: ignore[misc]
    """A language model: token ids to logits over the padded vocabulary; see :class:`sscan.nn.MambaLM`.

    Parameters
    ----------
    config : MambaConfig
    dtype : dtype
        Of parameters and activations; A_log, D, states and the arithmetic of scan and norms are at least float32.
    key : key of jax.random
    """

    backbone: Backbone
    lm_head: Part | None
    norm_epsilon: float = eqx.field(static=True)
    residual_in_fp32: bool = eqx.field(static=True)

    def __init__(self, config: MambaConfig, dtype: Any = jnp.float32, *, key: Any) -> None:
        of_tables, of_blocks = jax.random.split(key)
        embedding, head = _block.initial_tables(config, of_tables, dtype)
        self.backbone = Backbone(config, embedding, dtype, of_blocks)
        self.lm_head = None if head is None else Part(head)
        self.norm_epsilon, self.residual_in_fp32 = config.norm_epsilon, config.residual_in_fp32

    @classmethod
    def from_pretrained(cls, model: str | Path, dtype: Any = jnp.float32, *, revision: str | None = None) -> MambaLM:
        """A model in a folder or on the hub; see :meth:`sscan.nn.MambaLM.from_pretrained`."""
        with open_model(model, revision) as (config, weights):
            lm: MambaLM = _filled(lambda key: cls(config, dtype, key=key), weights)
            return lm


def _filled(make: Any, weights: Any, prefix: str = "") -> Any:
    """The module that `make` makes of a key, which nothing is drawn from, with the weights in opened files."""
    return _block.filled(eqx.filter_eval_shape(make, jax.random.key(0)), weights, prefix)
