"""Language models: embedding, residual blocks with a norm before each, norm, head; and the one of Mamba blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sscan._arrays import array_module
from sscan.models.arguments import check_integer
from sscan.models.files import load_arrays, save_arrays
from sscan.models.generation import GenerationMixin
from sscan.models.pretrained import open_model, save_model
from sscan.models.states import States, check_count, check_states
from sscan.nn import decoding
from sscan.nn.autodiff import Array, Tensor, move, no_grad, to_numpy
from sscan.nn.losses import linear_cross_entropy
from sscan.nn.mamba import Mamba
from sscan.nn.modules import (
    Embedding,
    LayerNorm,
    Linear,
    Module,
    ResidualBlock,
    RMSNorm,
    at_least_float32,
    lie_together,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from typing_extensions import Self

    from sscan.models.config import Format, MambaConfig
    from sscan.models.pretrained import Weights
    from sscan.models.sampling import Sampler
    from sscan.nn.sequence_config import SequenceConfig

StatesT = TypeVar("StatesT", bound=list[Any])


class Backbone(Module):
    """Token ids (batch, length) to normalised hidden vectors (batch, length, d_model)."""

    def __init__(
        self,
        config: MambaConfig | SequenceConfig,
        mixers: Iterable[Any],
        norm: type[RMSNorm | LayerNorm],
        dtype: Any,
        activation_dtype: Any,
    ) -> None:
        def new_norm() -> RMSNorm | LayerNorm:
            return norm(config.d_model, config.norm_epsilon, dtype, seed=None)

        self.config = config
        self.activation_dtype = np.dtype(activation_dtype)
        wide = at_least_float32("activation_dtype", activation_dtype)
        if "c" in (np.dtype(dtype).kind, wide.kind) or np.result_type(dtype, wide) != wide:
            raise TypeError(
                f"activation_dtype {self.activation_dtype} does not go with parameters in {np.dtype(dtype)}: both are "
                f"real, and parameters at most {wide.type(0).real.dtype}"
            )
        self.embedding = Embedding(config.padded_vocab_size, config.d_model, dtype, seed=None)
        self.layers = [ResidualBlock(new_norm(), mixer) for mixer in mixers]
        self.norm_f = new_norm()

    def __call__(self, ids: Array, seq_idx: Array | None = None) -> Tensor:
        """Hidden vectors of sequences from their beginnings; `seq_idx` as in :class:`sscan.nn.Mamba`."""
        _check_ids(ids, "length")
        if seq_idx is not None:
            seq_idx = move(seq_idx, array_module(self.norm_f.weight.data))
        return self._run(ids, lambda i, mixer, hidden: mixer(hidden, seq_idx))

    def extend(self, ids: Array, states: StatesT) -> tuple[Tensor, StatesT]:
        """Hidden vectors of the continuation of sequences, and the states at its end."""
        _check_ids(ids, "length")
        check_count("extend", states, self.layers)
        ends = type(states)(states)

        def mix(i: int, mixer: Any, hidden: Tensor) -> Tensor:
            hidden, ends[i] = mixer.extend(hidden, states[i])
            return hidden

        return self._run(ids, mix), ends

    def step(self, ids: Array, states: list[Any]) -> Tensor:
        """Hidden vectors (batch, d_model) of one token each, ids (batch,); the states are updated in place."""
        _check_ids(ids)
        check_count("step", states, self.layers)
        return self._run(ids, lambda i, mixer, hidden: mixer.step(hidden, states[i]))

    def _run(self, ids: Array, mix: Callable[[int, Any, Tensor], Tensor]) -> Tensor:
        hidden = self.embedded(ids)
        residual = None
        for i, layer in enumerate(self.layers):
            hidden, residual = self._add_norm(layer.norm, hidden, residual)
            hidden = mix(i, layer.mixer, hidden)
        return self._add_norm(self.norm_f, hidden, residual)[0]

    def embedded(self, ids: Array) -> Tensor:
        """What the first block reads."""
        return self.embedding(ids)

    def _add_norm(self, norm: RMSNorm | LayerNorm, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
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


def _check_ids(ids: Array, *time: str) -> None:
    """ValueError unless token ids are (batch, *time); that they are integers, the embedding sees to."""
    axes = ("batch", *time)
    if hasattr(ids, "shape") and len(ids.shape) != len(axes):
        raise ValueError(f"model: ids must have shape ({', '.join(axes)}), got {tuple(ids.shape)}")


class LanguageModel(Module):
    """What language models have in common, whatever their blocks are.

    Parameters
    ----------
    backbone : Backbone
    dtype : dtype
        Of the head.
    seed : int, Generator or None
        For the initial values; None leaves the parameters unallocated, to be loaded or only counted.
    """

    def __init__(self, backbone: Backbone, dtype: Any, seed: int | np.random.Generator | None) -> None:
        config = backbone.config
        self.backbone = backbone
        self.lm_head = Linear(config.d_model, config.padded_vocab_size, bias=False, dtype=dtype, seed=None)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        if seed is not None:
            self.initialise(seed)

    def __call__(self, ids: Array, seq_idx: Array | None = None) -> Tensor:
        """Logits (batch, length, padded vocabulary) for ids (batch, length)."""
        return self._logits(self.backbone(ids, seq_idx))

    def loss(self, ids: Array, targets: Array, seq_idx: Array | None = None) -> Tensor:
        """Mean cross-entropy in nats of `targets` behind `ids`, both (batch, length); the logits are never held.

        Targets of -100 do not count. `seq_idx` (batch, length) numbers the sequences packed into a row.
        """
        return linear_cross_entropy(self.backbone(ids, seq_idx), self.lm_head.weight, targets)

    def extend(self, ids: Array, states: StatesT) -> tuple[Tensor, StatesT]:
        """Logits (batch, length, padded vocabulary) for the continuation `ids`, and the states at its end."""
        hidden, states = self.backbone.extend(ids, states)
        return self._logits(hidden), states

    @no_grad()
    def prefill(self, ids: Array, states: StatesT) -> tuple[Array, StatesT]:
        """Read ids (batch, length >= 1) at once: logits (batch, padded vocabulary) for the next, and new states.

        The logits are at least float32, so that those of a model in half precision can be told apart.
        """
        if not ids.shape[-1]:
            raise ValueError(f"prefill: ids must have shape (batch, length) with length >= 1, got {ids.shape}")
        hidden, states = self.backbone.extend(ids, states)
        return self._logits_to_choose_from(hidden[:, -1]), states

    @no_grad()
    def step(self, ids: Array, states: Any) -> Array:
        """Read one token each, ids (batch,): logits for the next. The states are updated in place, at constant cost."""
        return self._logits_to_choose_from(self.backbone.step(ids, states))

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden.astype(self.lm_head.weight.dtype))

    def _logits_to_choose_from(self, hidden: Tensor) -> Array:
        logits = self._logits(hidden).data
        return logits.astype(np.result_type(logits.dtype, np.float32), copy=False)

    @classmethod
    def of_weights(cls, config: Any, weights: Weights, dtype: Any = np.float32, **options: Any) -> Self:
        """The model of `config` with the weights in opened files, in `dtype`; `options` are those of the class."""
        model: Self = cls(config, dtype, seed=None, **options)
        for name, parameter in model.named_parameters():
            parameter.data = weights.read(name, parameter.dtype)
        lie_together(model.parameters())
        return model


class MambaLM(GenerationMixin, LanguageModel):
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
        mixers = [
            Mamba(config.d_model, **config.ssm_cfg, n_layer=config.n_layer, dtype=dtype, seed=None)
            for _ in range(config.n_layer)
        ]
        activations = dtype if activation_dtype is None else activation_dtype
        super().__init__(Backbone(config, mixers, RMSNorm, dtype, activations), dtype, seed)

    def new_states(self, batch: int) -> States:
        """The states before the first token of `batch` sequences: their size is all that decoding ever needs."""
        check_integer("new_states", "batch", batch, least=0)
        return States(layer.mixer.new_state(batch) for layer in self.backbone.layers)

    @no_grad()
    def step(self, ids: Array, states: States) -> Array:
        """Read one token each, ids (batch,): logits for the next. The states are updated in place, at constant cost.

        Every weight is read once, as it is stored, if the discretisation is "mamba" and the residual stream float32
        (float64). On the CPU, for at most 32 rows, that is one call of a kernel: nothing is rounded to half precision
        in between, and a row of a batch gives the same bits as alone. On a GPU it is four kernels a block, of which
        weights in half precision are multiplied by the tensor cores if there are more than four rows.
        """
        logits = decoding.step(self, ids, states)
        return super().step(ids, states) if logits is None else logits

    def _prefill_on_host(self, ids: Array, states: States) -> tuple[Array, States]:
        logits, states = self.prefill(ids, states)
        return to_numpy(logits), states

    def _step_on_host(self, ids: Array, states: States) -> Array:
        return to_numpy(self.step(ids, states))

    def _decoder(self, states: States, drawn: int, sampler: Sampler) -> Any:
        return decoding.decoder(self, states, drawn, sampler)

    def save_states(self, path: str | Path, states: States) -> None:
        """Write states to the safetensors file `path`, atomically."""
        save_arrays(Path(path), {name: tensor.data for name, tensor in states.named_tensors()})

    def load_states(self, path: str | Path) -> States:
        """The states in the file `path` that :meth:`save_states` of a model of this configuration wrote, on its device.

        Raises
        ------
        OSError, ValueError
            If the file cannot be read, or holds other states; the message names the file.
        """
        arrays, _ = load_arrays(Path(path))
        made = self.new_states(1)
        check_states(path, arrays, made)
        xp = array_module(self.lm_head.weight.data)
        dtypes = {name: tensor.dtype for name, tensor in made.named_tensors()}
        return States.of_tensors({name: Tensor(move(array.astype(dtypes[name]), xp)) for name, array in arrays.items()})

    @classmethod
    def from_pretrained(
        cls, model: str | Path, dtype: Any = np.float32, *, activation_dtype: Any = None, revision: str | None = None
    ) -> MambaLM:
        """A model in a folder or on the hub, of the original's names or transformers', in whatever files it is.

        Parameters
        ----------
        model : str or Path
            A folder with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``, whole or in shards with an
            index; or the name of a model on the hub, "owner/name", whose files are kept in huggingface_hub's cache and
            taken from there, with ``HF_HUB_OFFLINE=1`` only from there (``pip install "sscan[lm]"``).
            ``pytorch_model.bin`` takes PyTorch to read, which runs nothing in it.
        dtype, activation_dtype
            As of the class, whatever the file has.
        revision : str, optional
            Branch, tag or commit of a model on the hub.

        Raises
        ------
        OSError
            If a file cannot be read, or there is no such model.
        ValueError
            If the configuration is not one of a plain Mamba language model, or the arrays are not those of the
            configuration, or beyond `dtype`; the message names the file. Names and shapes are compared before memory
            is taken for the weights.
        """
        with open_model(model, revision) as (config, weights):
            return cls.of_weights(config, weights, dtype, activation_dtype=activation_dtype)

    def save_pretrained(self, folder: str | Path, format: Format = "original", *, pickled: bool = False) -> None:
        """Write ``config.json`` and ``model.safetensors`` to a folder, which is created if need be.

        Parameters
        ----------
        folder : str or Path
        format : {"original", "transformers"}
            Whose names the configuration and the parameters have.
        pickled : bool
            Write ``pytorch_model.bin``, which is what mamba_ssm itself reads, in its place; takes PyTorch.

        Raises
        ------
        OSError
            If there is no room, or they cannot be written; older files stay as they are.
        ValueError
            If transformers has no such model.
        """
        arrays = {name: parameter.data for name, parameter in self.named_parameters()}
        save_model(folder, self.config, arrays, format, pickled=pickled)
