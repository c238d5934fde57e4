"""The Mamba block and its language model on JAX arrays, for the modules of Flax NNX and Equinox.

Both kinds of modules have parts of the same names, those of the original's checkpoints; what they do is written once
here, and what differs is how a framework keeps arrays.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from sscan.jax.ops import causal_conv1d, causal_conv1d_update, rms_norm, selective_scan, selective_state_update
from sscan.models.arguments import check_integer
from sscan.models.states import MambaState

if TYPE_CHECKING:
    from collections.abc import Callable

    from sscan.jax.ops import Input
    from sscan.models.config import BlockConfig, MambaConfig
    from sscan.models.pretrained import Weights

    Arrays = dict[str, Any]

jax.tree_util.register_pytree_node(  # so that states go through jit, vmap and scan
    MambaState, lambda state: ((state.conv, state.ssm), None), lambda _, arrays: MambaState(*arrays)
)


class Block:
    """What a module with the parts of a Mamba block does; see :class:`sscan.nn.Mamba`."""

    in_proj: Any
    conv1d: Any
    x_proj: Any
    dt_proj: Any
    A_log: Any
    D: Any
    out_proj: Any
    discretization: Any  # "mamba" or "zoh"

    def __call__(self, hidden: Input, seq_idx: Input | None = None) -> jax.Array:
        """Apply the block to sequences from their beginnings, hidden (..., length, d_model).

        `seq_idx` (..., length) numbers the sequences packed into a row: neither the convolution nor the scan sees
        across a change of number.
        """
        return self._mix(hidden, None, seq_idx)[0]

    def extend(self, hidden: Input, state: MambaState, seq_idx: Input | None = None) -> tuple[jax.Array, MambaState]:
        """The output for the continuation `hidden` of sequences, and the state at its end, both differentiable.

        `seq_idx` is that of a call of the block.
        """
        return self._mix(hidden, state, seq_idx)

    def step(self, hidden: Input, state: MambaState) -> tuple[jax.Array, MambaState]:
        """One token, hidden (..., d_model): the output for it and the new state; without derivatives."""
        if self.discretization != "mamba":  # the rule of selective_state_update
            out, state = self.extend(jnp.asarray(hidden)[..., None, :], state)
            return out[..., 0, :], state
        hidden, batch = self._rows_of(hidden, ("d_model",))
        conv, ssm = _states_of(state, batch)
        x, z = jnp.split(_linear(self.in_proj, hidden), 2, axis=1)
        x, conv = causal_conv1d_update(x, conv, *_taps(self.conv1d), "silu")
        dt, B, C = self._dt_B_C(_linear(self.x_proj, x), 1)
        delta = dt @ jnp.asarray(self.dt_proj.weight, dt.dtype).T
        y, ssm = selective_state_update(ssm, x, delta, self._A(), B, C, self._D(), z, self._delta_bias(), True)
        out = _linear(self.out_proj, y)
        return _with_batch(batch, out), MambaState(_with_batch(batch, conv), _with_batch(batch, ssm))

    def new_state(self, *batch: int) -> MambaState:
        """The state before the first token of `batch` sequences, of a single one without it: zeros."""
        d_inner, _, width = self.conv1d.weight.shape
        conv = jnp.zeros((*batch, d_inner, width - 1), self.conv1d.weight.dtype)
        return MambaState(conv, jnp.zeros((*batch, *self.A_log.shape), self.A_log.dtype))

    def _mix(self, hidden: Any, state: MambaState | None, seq_idx: Any) -> tuple[Any, MambaState]:
        hidden, batch = self._rows_of(hidden, ("length", "d_model"))
        conv, ssm = (None, None) if state is None else _states_of(state, batch)
        if seq_idx is not None:
            seq_idx = seq_idx.reshape(hidden.shape[:2])
        xz = _channel_first(self.in_proj, jnp.swapaxes(hidden, 1, 2))
        x, z = jnp.split(xz, 2, axis=1)
        x, conv = causal_conv1d(x, *_taps(self.conv1d), "silu", conv, True, seq_idx)
        dt, B, C = self._dt_B_C(_channel_first(self.x_proj, x), 1)
        delta = jnp.matmul(jnp.asarray(self.dt_proj.weight, dt.dtype), dt)
        y, ssm = selective_scan(
            x, delta, self._A(), B, C, self._D(), z, self._delta_bias(), True, True,
            initial_state=ssm, seq_idx=seq_idx, discretization=self.discretization,
        )  # fmt: skip
        out = _linear(self.out_proj, jnp.swapaxes(y, 1, 2))
        conv = conv.astype(self.conv1d.weight.dtype)
        return _with_batch(batch, out), MambaState(_with_batch(batch, conv), _with_batch(batch, ssm))

    def _rows_of(self, hidden: Any, last: tuple[str, ...]) -> tuple[Any, tuple[int, ...]]:
        """The input with one axis in place of all in front of the last ones, and what these were."""
        hidden, d_model = jnp.asarray(hidden), self.in_proj.weight.shape[1]
        if hidden.ndim < len(last) or hidden.shape[-1] != d_model:
            wanted = f"(..., {', '.join(last)}) with d_model = {d_model}"
            raise ValueError(f"Mamba: hidden must have shape {wanted}, got {hidden.shape}")
        if not jnp.issubdtype(hidden.dtype, jnp.floating):
            raise TypeError(f"Mamba: hidden must be of a floating dtype, got {hidden.dtype}")
        batch = hidden.shape[: hidden.ndim - len(last)]
        return hidden.reshape(math.prod(batch), *hidden.shape[len(batch) :]), batch

    def _dt_B_C(self, projected: Any, axis: int) -> Any:
        rank, states = self.dt_proj.weight.shape[1], self.A_log.shape[1]
        return jnp.split(projected, (rank, rank + states), axis)

    def _A(self) -> Any:
        return -jnp.exp(jnp.asarray(self.A_log))

    def _D(self) -> Any:
        return jnp.asarray(self.D)

    def _delta_bias(self) -> Any:
        return jnp.asarray(self.dt_proj.bias, self.D.dtype)


def _linear(part: Any, x: Any) -> Any:
    """Along the last axis, in the dtype of x."""
    y = x @ jnp.asarray(part.weight, x.dtype).T
    return y if part.bias is None else (y + jnp.asarray(part.bias)).astype(y.dtype)


def _channel_first(part: Any, x: Any) -> Any:
    """Along the last but one axis, in the dtype of x."""
    y = jnp.matmul(jnp.asarray(part.weight, x.dtype), x)
    return y if part.bias is None else (y + jnp.asarray(part.bias)[:, None]).astype(y.dtype)


def _taps(part: Any) -> tuple[Any, Any]:
    weight = jnp.asarray(part.weight)
    return weight[:, 0], None if part.bias is None else jnp.asarray(part.bias)


def _states_of(state: MambaState, batch: tuple[int, ...]) -> list[Any]:
    """Both arrays with one axis in place of those of the batch."""
    for name, array in (("conv", state.conv), ("ssm", state.ssm)):
        if array.shape[:-2] != batch:
            raise ValueError(f"Mamba: state.{name} must be of sequences {batch}, got those of {array.shape[:-2]}")
    return [array.reshape(math.prod(batch), *array.shape[-2:]) for array in (state.conv, state.ssm)]


def _with_batch(batch: tuple[int, ...], array: Any) -> Any:
    return array.reshape(*batch, *array.shape[1:])


class LanguageModel:
    """What a module with the parts of the language model does; see :class:`sscan.nn.MambaLM`."""

    backbone: Any
    lm_head: Any
    norm_epsilon: float
    residual_in_fp32: bool

    def __call__(self, ids: Input, seq_idx: Input | None = None) -> jax.Array:
        """Logits (..., length, padded vocabulary) for ids (..., length); `seq_idx` as in Mamba."""
        return self._run(ids, lambda i, mixer, hidden: mixer(hidden, seq_idx))

    def extend(self, ids: Input, states: list[MambaState]) -> tuple[jax.Array, list[MambaState]]:
        """Logits for the continuation `ids` of sequences, and the states of all blocks at its end."""
        return self._carry(ids, states, "extend")

    def step(self, ids: Input, states: list[MambaState]) -> tuple[jax.Array, list[MambaState]]:
        """Read one token each, ids (...): logits for the next, and the new states, at constant cost."""
        return self._carry(ids, states, "step")

    def new_states(self, *batch: int) -> list[MambaState]:
        """The states of all blocks before the first token of `batch` sequences, of a single one without it."""
        return [layer.mixer.new_state(*batch) for layer in self.backbone.layers]

    def _carry(self, ids: Any, states: list[MambaState], how: str) -> tuple[Any, list[MambaState]]:
        ends = list(states)

        def mix(i: int, mixer: Any, hidden: Any) -> Any:
            hidden, ends[i] = getattr(mixer, how)(hidden, states[i])
            return hidden

        return self._run(ids, mix), ends

    def _run(self, ids: Any, mix: Callable[[int, Any, Any], Any]) -> Any:
        backbone, norm = self.backbone, partial(rms_norm, eps=self.norm_epsilon)
        hidden = jnp.asarray(backbone.embedding.weight)[ids]
        stream = jnp.promote_types(hidden.dtype, jnp.float32) if self.residual_in_fp32 else hidden.dtype
        residual = jnp.zeros(hidden.shape, stream)
        for i, layer in enumerate(backbone.layers):
            hidden, residual = norm(hidden, jnp.asarray(layer.norm.weight), residual)
            hidden = mix(i, layer.mixer, hidden)
        hidden, _ = norm(hidden, jnp.asarray(backbone.norm_f.weight), residual)
        return _linear(backbone.embedding if self.lm_head is None else self.lm_head, hidden)


# Values


def initial(block: BlockConfig, d_model: int, key: Any, n_layer: int = 1, dtype: Any = jnp.float32) -> Arrays:
    """The parameters of a block by their names, drawn as :class:`sscan.nn.Mamba` draws them."""
    check_integer("Mamba", "n_layer", n_layer)
    wide = jnp.promote_types(dtype, jnp.float32)
    found = {}
    for name, shape in block.shapes(d_model).items():
        key, own = jax.random.split(key)
        found[name] = _draw(block, name, shape, own, n_layer).astype(wide if name in ("A_log", "D") else dtype)
    return found


def _draw(block: BlockConfig, name: str, shape: tuple[int, ...], key: Any, n_layer: int) -> Any:
    def uniform(bound: float) -> Any:
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    if name == "A_log":  # A = -(1, 2, ..., N) in every channel: S4D-Real
        return jnp.broadcast_to(jnp.log(jnp.arange(1.0, shape[1] + 1)), shape)
    if name == "D":
        return jnp.ones(shape)
    if name == "dt_proj.bias":  # its softplus is the step size
        low, high = math.log(block.dt_min), math.log(block.dt_max)
        step = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high)), block.dt_init_floor)
        return step + jnp.log(-jnp.expm1(-step))
    if name == "dt_proj.weight":
        bound = block.dt_scale / math.sqrt(max(shape[1], 1))
        return uniform(bound) if block.dt_init == "random" else jnp.full(shape, bound)
    if name.startswith("conv1d."):
        return uniform(1 / math.sqrt(block.d_conv))
    if name.endswith(".bias"):
        return jnp.zeros(shape)
    return uniform(1 / math.sqrt(shape[1] * (n_layer if name == "out_proj.weight" else 1)))


def initial_tables(config: MambaConfig, key: Any, dtype: Any) -> tuple[Any, Any]:
    """Embedding and head of a language model, drawn as :class:`sscan.nn.MambaLM` draws them; a tied head is None."""
    of_embedding, of_head = jax.random.split(key)
    shape, bound = (config.padded_vocab_size, config.d_model), 1 / math.sqrt(config.d_model)
    embedding = (0.02 * jax.random.normal(of_embedding, shape)).astype(dtype)
    if config.tie_embeddings:
        return embedding, None
    return embedding, jax.random.uniform(of_head, shape, minval=-bound, maxval=bound).astype(dtype)


def name_of(path: tuple[Any, ...]) -> str:
    """The name in checkpoints of an array at this path in a tree of parameters."""
    keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))) for key in path]
    return ".".join(key for key in keys if key != "value")  # where NNX keeps the array of a parameter


def filled(tree: Any, weights: Weights, prefix: str = "") -> Any:
    """The tree with the arrays of its names in files, in the dtypes of the leaves, which may be abstract."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(weights.read(prefix + name_of(path), leaf.dtype)), tree
    )


def prefix_of(config: MambaConfig, layer: int) -> str:
    """What the names of the parameters of a block begin with."""
    check_integer("Mamba", "layer", layer, 0)
    if layer >= config.n_layer:
        raise ValueError(f"Mamba: layer must be less than n_layer = {config.n_layer}, got {layer}")
    return f"backbone.layers.{layer}.mixer."


def decays(parameters: Any) -> Any:
    """Which parameters decay as the paper trains: matrices but for A_log do; vectors, biases and norms do not.

    Parameters
    ----------
    parameters : tree of arrays
        An Equinox module, or the state of an NNX one.

    Returns
    -------
    The same tree of booleans, a mask for the weight decay of optax.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim > 1 and name_of(path).split(".")[-1] != "A_log", parameters
    )
