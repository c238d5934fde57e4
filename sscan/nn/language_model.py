"""The Mamba language model: embedding, residual blocks with RMSNorm before each, norm, head."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan.nn.arguments import check_flag, check_integer
from sscan.nn.autodiff import Array, Tensor, array_module, move, no_grad, to_numpy
from sscan.nn.losses import linear_cross_entropy
from sscan.nn.mamba import Mamba, MambaState
from sscan.nn.modules import Embedding, Linear, Module, RMSNorm
from sscan.nn.sampling import Sampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# What configurations of released models also say, with the only value that is supported here.
_FIXED = {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}}
# What `ssm_cfg` may say: the arguments of a block but those that the model gives.
_BLOCK_ARGUMENTS = inspect.signature(Mamba).parameters.keys() - {"d_model", "n_layer", "dtype", "seed"}


@dataclass(frozen=True)
class MambaConfig:
    """Shape of a language model, named as in the config.json of released checkpoints.

    Attributes
    ----------
    d_model, n_layer : int
        Width of the residual stream and number of blocks.
    vocab_size, pad_vocab_size_multiple : int
        The embedding has `vocab_size` rows rounded up to the multiple; the rows added are never generated.
    ssm_cfg : dict
        Further arguments of :class:`sscan.nn.Mamba`.
    residual_in_fp32 : bool
        Keep the residual stream in float32 when the activations are in half precision.
    fused_add_norm : bool
        Add to the stream and normalise in one operation; the same up to rounding.
    tie_embeddings : bool
        The head uses the embedding's matrix.
    """

    d_model: int = 2560
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"):
            check_integer("MambaConfig", name, getattr(self, name))
        for name in ("residual_in_fp32", "fused_add_norm", "tie_embeddings"):
            check_flag("MambaConfig", name, getattr(self, name))
        if not isinstance(self.ssm_cfg, dict):
            raise TypeError(f"MambaConfig: ssm_cfg must be a dict, got {self.ssm_cfg!r}")
        unknown = [name for name in self.ssm_cfg if name not in _BLOCK_ARGUMENTS]
        if unknown:
            raise ValueError(f"MambaConfig: ssm_cfg has {unknown[0]!r}, which is no argument of a Mamba block")

    @property
    def padded_vocab_size(self) -> int:
        """Number of rows of the embedding."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    def parameter_count(self) -> int:
        """Number of parameters of the model, counted on one that is never allocated."""
        return MambaLM(self, seed=None).parameter_count()

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MambaConfig:
        """The configuration in a config.json.

        Raises
        ------
        ValueError
            For keys that are unknown, or ask for a model that is not a plain Mamba language model.
        TypeError, ValueError
            If a value is not of its type, or out of its range.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        for key, value in values.items():
            if key not in names and (key not in _FIXED or value != _FIXED[key]):
                raise ValueError(f"MambaConfig: {key} = {value!r} is not supported")
        known = {key: value for key, value in values.items() if key in names}
        if isinstance(known.get("ssm_cfg"), dict):
            known["ssm_cfg"] = _without_layer(known["ssm_cfg"])
        return cls(**known)


def _without_layer(ssm_cfg: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a block; newer configurations also name its kind."""
    layer = ssm_cfg.get("layer", "Mamba1")
    if layer != "Mamba1":
        raise ValueError(f"MambaConfig: ssm_cfg layer = {layer!r} is not supported, only 'Mamba1'")
    return {name: value for name, value in ssm_cfg.items() if name != "layer"}


class ResidualBlock(Module):
    """A norm and the mixer that reads it."""

    def __init__(self, config: MambaConfig, dtype: Any) -> None:
        self.norm = RMSNorm(config.d_model, dtype=dtype)
        self.mixer = Mamba(config.d_model, **config.ssm_cfg, n_layer=config.n_layer, dtype=dtype, seed=None)


class Backbone(Module):
    """Token ids (batch, length) to normalised hidden vectors (batch, length, d_model)."""

    def __init__(self, config: MambaConfig, dtype: Any, activation_dtype: Any) -> None:
        self.config = config
        self.activation_dtype = np.dtype(activation_dtype)
        self.embedding = Embedding(config.padded_vocab_size, config.d_model, dtype)
        self.layers = [ResidualBlock(config, dtype) for _ in range(config.n_layer)]
        self.norm_f = RMSNorm(config.d_model, dtype=dtype)

    def __call__(self, ids: Array, seq_idx: Array | None = None) -> Tensor:
        """Hidden vectors of sequences from their beginnings; `seq_idx` as in :class:`sscan.nn.Mamba`."""
        if seq_idx is not None:
            seq_idx = move(seq_idx, array_module(self.norm_f.weight.data))
        return self._run(ids, lambda i, mixer, hidden: mixer(hidden, seq_idx))

    def extend(self, ids: Array, states: list[MambaState]) -> tuple[Tensor, list[MambaState]]:
        """Hidden vectors of the continuation of sequences, and the states at its end."""
        ends = list(states)

        def mix(i: int, mixer: Mamba, hidden: Tensor) -> Tensor:
            hidden, ends[i] = mixer.extend(hidden, states[i])
            return hidden

        return self._run(ids, mix), ends

    def step(self, ids: Array, states: list[MambaState]) -> Tensor:
        """Hidden vectors (batch, d_model) of one token each, ids (batch,); the states are updated in place."""
        return self._run(ids, lambda i, mixer, hidden: mixer.step(hidden, states[i]))

    def _run(self, ids: Array, mix: Callable[[int, Mamba, Tensor], Tensor]) -> Tensor:
        hidden = self.embedding(ids)
        residual = None
        for i, layer in enumerate(self.layers):
            hidden, residual = self._add_norm(layer.norm, hidden, residual)
            hidden = mix(i, layer.mixer, hidden)
        return self._add_norm(self.norm_f, hidden, residual)[0]

    def _add_norm(self, norm: RMSNorm, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The normalised sum in the dtype of the activations, and the sum in that of the residual stream."""
        dtype = self.activation_dtype
        stream = np.result_type(dtype, np.float32) if self.config.residual_in_fp32 else dtype
        if residual is None:
            return norm(hidden).astype(dtype), hidden.astype(stream)
        if self.config.fused_add_norm:
            normalised, residual = norm(hidden, residual)
            return normalised, residual.astype(stream)
        residual = (hidden + residual).astype(stream)
        return norm(residual.astype(hidden.dtype)), residual


class MambaLM(Module):
    """A language model: token ids to logits over the padded vocabulary.

    Initial values are those of the paper's code: embeddings normal with deviation 0.02, everything else as in
    :class:`sscan.nn.Mamba`, biases of projections zero, norms one. Names of parameters are those of released
    checkpoints.

    Parameters
    ----------
    config : MambaConfig
    dtype : dtype
        Of weights and activations; A_log, D, states and the arithmetic of scan and norms are at least float32.
    seed : int, Generator or None
        For the initial values; None leaves the parameters unallocated, to be loaded or only counted.
    activation_dtype : dtype, optional
        Of the activations, if not `dtype`. bfloat16 with a `dtype` of float32 is mixed precision: the operands of the
        blocks' matrix products are rounded to bfloat16; parameters and their gradients, states, the residual stream,
        logits and loss stay in float32.
    """

    def __init__(
        self,
        config: MambaConfig,
        dtype: Any = np.float32,
        seed: int | np.random.Generator | None = 0,
        *,
        activation_dtype: Any = None,
    ) -> None:
        self.config = config
        self.backbone = Backbone(config, dtype, dtype if activation_dtype is None else activation_dtype)
        self.lm_head = Linear(config.d_model, config.padded_vocab_size, bias=False, dtype=dtype)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        if seed is not None:
            self.initialise(seed)

    def __call__(self, ids: Array, seq_idx: Array | None = None) -> Tensor:
        """Logits (batch, length, padded vocabulary) for ids (batch, length)."""
        return self._logits(self.backbone(ids, seq_idx))

    def loss(self, ids: Array, targets: Array, seq_idx: Array | None = None) -> Tensor:
        """Mean cross-entropy in nats; the logits are never held. Targets of -100 do not count."""
        return linear_cross_entropy(self.backbone(ids, seq_idx), self.lm_head.weight, targets)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden.astype(self.lm_head.weight.dtype))

    def new_states(self, batch: int) -> list[MambaState]:
        """The states before the first token, one for each block: their size is all that decoding ever needs."""
        return [layer.mixer.new_state(batch) for layer in self.backbone.layers]

    @no_grad()
    def prefill(self, ids: Array, states: list[MambaState]) -> tuple[Array, list[MambaState]]:
        """Read ids (batch, length >= 1) at once: logits (batch, padded vocabulary) for the next, and new states."""
        hidden, states = self.backbone.extend(ids, states)
        return self._logits(hidden[:, -1]).data, states

    @no_grad()
    def step(self, ids: Array, states: list[MambaState]) -> Array:
        """Read one token each, ids (batch,): logits for the next. The states are updated in place, at constant cost."""
        return self._logits(self.backbone.step(ids, states)).data

    def generate(
        self,
        prompt: Array,
        n: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | np.random.Generator = 0,
    ) -> Iterator[Array]:
        """Continue a prompt, one token at a time, each as soon as it is known.

        Parameters
        ----------
        prompt : array of int, (length,) or (batch, length), length >= 1
        n : int
            Number of tokens to generate.
        temperature, top_k, top_p, seed
            See :class:`Sampler`; temperature 0 takes the most likely token.

        Yields
        ------
        array of int64, () or (batch,)
            The next token of each sequence.

        Raises
        ------
        TypeError, ValueError
            For arguments that are not as above; rows of a batch have one length.
        FloatingPointError
            If a logit is NaN or infinite: the model is broken.
        """
        check_integer("generate", "n", n, 0)
        try:
            prompt = to_numpy(prompt)
        except ValueError as error:  # NumPy's "inhomogeneous shape"
            raise ValueError("generate: prompt must be one array of token ids; its rows differ in length") from error
        if prompt.ndim not in (1, 2) or prompt.shape[-1] == 0:
            raise ValueError(f"generate: prompt must be (length,) or (batch, length), length >= 1, got {prompt.shape}")
        sampler = Sampler(temperature, top_k, top_p, seed)
        return self._generate(prompt, n, sampler)

    def _generate(self, prompt: Array, n: int, sampler: Sampler) -> Iterator[Array]:
        rows = prompt.reshape(-1, prompt.shape[-1])
        logits, states = self.prefill(rows, self.new_states(len(rows)))
        for i in range(n):
            ids = sampler(logits[:, : self.config.vocab_size])
            yield ids.reshape(prompt.shape[:-1])
            if i + 1 < n:
                logits = self.step(ids, states)
