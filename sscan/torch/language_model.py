"""The Mamba language model in PyTorch: embedding, residual blocks with RMSNorm before each, norm, head."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch
from torch import nn

from sscan.models.arguments import check_integer
from sscan.models.files import load_arrays, save_arrays
from sscan.models.generation import GenerationMixin
from sscan.models.pretrained import open_model, save_model
from sscan.models.states import MambaState, States, check_count, check_states
from sscan.torch import decoding
from sscan.torch.mamba import Mamba
from sscan.torch.norms import RMSNorm

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sscan.models.config import Format, MambaConfig
    from sscan.models.pretrained import Weights
    from sscan.models.sampling import Sampler

    Mix = Callable[[int, Mamba, Any], Any]


class ResidualBlock(nn.Module):  # type: ignore[misc]
    """A norm and the mixer that reads it."""

    def __init__(self, config: MambaConfig, index: int, device: Any, dtype: Any) -> None:
        super().__init__()
        self.config, self.index = config, index
        block = {name: value for name, value in config.ssm_cfg.items() if name != "discretization"}
        self.norm = RMSNorm(config.d_model, config.norm_epsilon, device, dtype)
        self.mixer = Mamba(config.d_model, **block, layer_idx=index, device=device, dtype=dtype)

    def forward(self, hidden: Any, residual: Any, mix: Mix) -> Any:
        """What `mix` makes of the normalised stream; and the stream."""
        hidden, residual = add_norm(self.norm, hidden, residual, self.config)
        return mix(self.index, self.mixer, hidden), residual


def add_norm(norm: Any, hidden: Any, residual: Any, config: MambaConfig) -> tuple[Any, Any]:
    """The normalised sum in the dtype of the activations, and the sum in that of the residual stream."""
    dtype = hidden.dtype
    stream = torch.promote_types(dtype, torch.float32) if config.residual_in_fp32 else dtype
    if residual is None:
        return norm(hidden), hidden.to(stream)
    if config.fused_add_norm:
        hidden, residual = norm(hidden, residual)
        return hidden, residual.to(stream)
    residual = (hidden + residual).to(stream)
    return norm(residual.to(dtype)), residual


class Backbone(nn.Module):  # type: ignore[misc]
    """Token ids (batch, length) to normalised hidden vectors (batch, length, d_model)."""

    def __init__(self, config: MambaConfig, device: Any, dtype: Any) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model, device=device, dtype=dtype)
        self.layers = nn.ModuleList(ResidualBlock(config, i, device, dtype) for i in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_epsilon, device, dtype)

    def forward(self, ids: Any, mix: Mix) -> Any:
        """Hidden vectors; `mix` is called for every block, with its number, its mixer and what that reads."""
        hidden, residual = self.embedding(ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, mix)
        return add_norm(self.norm_f, hidden, residual, self.config)[0]


class MambaLM(GenerationMixin, nn.Module):  # type: ignore[misc]
    """A language model: token ids to logits over the padded vocabulary, the same as :class:`sscan.nn.MambaLM`.

    Blocks are :class:`sscan.torch.Mamba`. Initial values are those of the paper's code, and names of parameters those
    of its checkpoints. Works under autocast, ``torch.compile`` and activation checkpointing, on the CPU and on CUDA.

    Parameters
    ----------
    config : MambaConfig
    device, dtype
        Of the parameters; A_log, D, states and the arithmetic of scan and norms are at least float32.
    """

    def __init__(self, config: MambaConfig, device: Any = None, dtype: Any = None) -> None:
        if config.block.discretization != "mamba":
            raise ValueError("MambaLM: sscan.torch has no discretization = 'zoh'; sscan.nn has")
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, device, dtype)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False, device=device, dtype=dtype)
        self._initialise()
        self.tie_weights()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _initialise(self) -> None:
        """The values that those of the parts do not fit; see section 4.2 of the paper's code."""
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        for layer in self.backbone.layers:
            layer.mixer.out_proj.weight.div_(math.sqrt(self.config.n_layer))
            for projection in (layer.mixer.in_proj, layer.mixer.out_proj):
                if projection.bias is not None:
                    projection.bias.zero_()

    def tie_weights(self) -> None:
        """Let the head use the embedding's matrix, if the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(self, ids: Tensor, *, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits (batch, length, padded vocabulary) for ids (batch, length).

        ``seq_idx`` and ``cu_seqlens`` pack sequences, as in :class:`sscan.torch.Mamba`.
        """
        return self.lm_head(
            self.backbone(ids, lambda i, mixer, hidden: mixer(hidden, seq_idx=seq_idx, cu_seqlens=cu_seqlens))
        )

    def new_states(self, batch: int) -> States:
        """The states before the first token of ``batch`` sequences: their size is all that decoding ever needs."""
        check_integer("new_states", "batch", batch, least=0)
        states = States()
        for layer in self.backbone.layers:
            conv, ssm = layer.mixer.allocate_inference_cache(batch, 0)
            states.append(MambaState(conv[..., 1:].contiguous(), ssm))
        return states

    def extend(self, ids: Tensor, states: States) -> tuple[Tensor, States]:
        """Logits (batch, length, padded vocabulary) for the continuation ``ids``, and the states at its end."""
        hidden, ends = self._extend(ids, states)
        return self.lm_head(hidden), ends

    def _extend(self, ids: Any, states: States) -> tuple[Any, States]:
        check_count("extend", states, self.backbone.layers)
        ends = States(states)

        def mix(i: int, mixer: Mamba, hidden: Any) -> Any:
            before = states[i]
            hidden, (conv, ssm) = mixer(
                hidden, initial_states=(before.conv, before.ssm), return_final_states=True
            )  # fmt: skip
            ends[i] = MambaState(conv.to(before.conv.dtype), ssm.to(before.ssm.dtype))
            return hidden

        return self.backbone(ids, mix), ends

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def prefill(self, ids: Tensor, states: States) -> tuple[Tensor, States]:
        """Read ids (batch, length >= 1) at once: logits (batch, padded vocabulary) for the next, and new states."""
        hidden, states = self._extend(ids, states)
        return self.lm_head(hidden[:, -1]), states

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, ids: Tensor, states: States) -> Tensor:
        """Read one token each, ids (batch,): logits for the next. The states are updated in place, at constant cost.

        On a GPU it is four kernels a block, if all parts are the plain ones without hooks, autocast is off and the
        residual stream is float32 (float64): see :meth:`sscan.nn.MambaLM.step`.
        """
        logits = decoding.step(self, ids, states)
        if logits is not None:
            return logits.to(self.lm_head.weight.dtype)
        check_count("step", states, self.backbone.layers)

        def mix(i: int, mixer: Mamba, hidden: Any) -> Any:
            return mixer.step(hidden, states[i].conv, states[i].ssm)[0]

        return self.lm_head(self.backbone(ids[:, None], mix)[:, 0])

    def _prefill_on_host(self, ids: Any, states: States) -> tuple[Any, States]:
        logits, states = self.prefill(self._ids(ids), states)
        return logits.float().cpu().numpy(), states

    def _step_on_host(self, ids: Any, states: States) -> Any:
        return self.step(self._ids(ids), states).float().cpu().numpy()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _decoder(self, states: States, drawn: int, sampler: Sampler) -> Any:
        return decoding.decoder(self, states, drawn, sampler)

    def _ids(self, ids: Any) -> Any:
        return torch.from_numpy(ids).to(self.lm_head.weight.device)

    def save_states(self, path: str | Path, states: States) -> None:
        """Write states to the safetensors file ``path``, atomically; :class:`sscan.nn.MambaLM` reads it too."""
        save_arrays(Path(path), {name: array_of(tensor) for name, tensor in states.named_tensors()})

    def load_states(self, path: str | Path) -> States:
        """The states in the file ``path``, which :meth:`save_states` of such a model wrote, on the device of this one.

        Raises
        ------
        OSError, ValueError
            If the file cannot be read, or holds other states; the message names the file.
        """
        arrays, _ = load_arrays(Path(path))
        made = self.new_states(1)
        check_states(path, arrays, made)
        like = dict(made.named_tensors())
        return States.of_tensors({name: tensor_of(array).to(like[name]) for name, array in arrays.items()})

    @classmethod
    def from_pretrained(
        cls, model: str | Path, device: Any = None, dtype: Any = None, *, revision: str | None = None
    ) -> MambaLM:
        """A model in a folder or on the hub; see :meth:`sscan.nn.MambaLM.from_pretrained`.

        Parameters
        ----------
        model : str or Path
        device, dtype
            As of the class, whatever the file has.
        revision : str, optional
            Branch, tag or commit of a model on the hub.

        Raises
        ------
        OSError, ValueError
            As there.
        """
        with open_model(model, revision) as (config, weights):
            return cls.of_weights(config, weights, device, dtype)

    @classmethod
    def of_weights(cls, config: MambaConfig, weights: Weights, device: Any = None, dtype: Any = None) -> MambaLM:
        """The model of ``config`` with the weights in opened files, on ``device`` and in ``dtype``."""
        model = cls(config, device="meta", dtype=dtype)
        for name, empty in list(model.named_parameters()):
            stored = ml_dtypes.bfloat16 if empty.dtype is torch.bfloat16 else str(empty.dtype).removeprefix("torch.")
            parameter = nn.Parameter(tensor_of(weights.read(name, np.dtype(stored))).to(device))
            parameter.__dict__.update(empty.__dict__)  # what is not to decay, or to be drawn again
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameter)
        model.tie_weights()
        return model

    def save_pretrained(self, folder: str | Path, format: Format = "original", *, pickled: bool = False) -> None:
        """Write the model to a folder; see :meth:`sscan.nn.MambaLM.save_pretrained`."""
        arrays = {name: array_of(parameter) for name, parameter in self.named_parameters()}
        save_model(folder, self.config, arrays, format, pickled=pickled)


def array_of(tensor: Any) -> Any:
    """The tensor as a NumPy array, in host memory."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:  # of which Tensor.numpy does not know
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def tensor_of(array: Any) -> Any:
    """A NumPy array as a tensor on its memory."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def decay_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """The parameters of ``model`` in two groups for an optimiser of PyTorch, as the paper trains.

    Matrices decay by ``weight_decay``. Vectors (biases, norms) and what is marked with ``_no_weight_decay``, as A_log
    and D are, do not. Each parameter comes once, also a shared one, and none that is frozen.
    """
    decayed: list[Any] = []
    kept: list[Any] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
            (kept if exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
