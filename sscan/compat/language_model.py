"""The language model of mamba_ssm (``models.mixer_seq_simple``), with its arguments in its order, on sscan's parts."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sscan.compat.generation import GenerationMixin
from sscan.compat.norms import RMSNorm, layer_norm_fn
from sscan.models import config as configurations
from sscan.models.files import read_object, write_together
from sscan.models.pretrained import CONFIG, EMBEDDING, HEAD, PICKLE, WEIGHTS, Source, open_model
from sscan.torch.language_model import tensor_of
from sscan.torch.mamba import Mamba

if TYPE_CHECKING:
    from collections.abc import Callable

Tensor = Any

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


@dataclass
class MambaConfig:
    """The original's configuration; :class:`sscan.models.MambaConfig` says what its fields mean."""

    d_model: int = 2560
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
    d_intermediate: int = 0
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)


class Block(nn.Module):  # type: ignore[misc]
    """A norm and the mixer that reads it, of a residual stream to which each block's output is added by the next.

    Parameters
    ----------
    dim : int
        Width.
    mixer_cls, mlp_cls, norm_cls : callable
        Each makes a module of the width. ``nn.Identity`` for ``mlp_cls`` is none; another stands behind the mixer, with
        a norm of its own.
    fused_add_norm : bool
        Add and normalise in one operation; ``norm_cls`` makes a LayerNorm or an RMSNorm then.
    residual_in_fp32 : bool
        Keep the residual stream in float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module] = nn.Identity,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm, self.mixer = norm_cls(dim), mixer_cls(dim)
        has_mlp = mlp_cls is not nn.Identity
        self.norm2: Any = norm_cls(dim) if has_mlp else None
        self.mlp: Any = mlp_cls(dim) if has_mlp else None
        if fused_add_norm and not isinstance(self.norm, (nn.LayerNorm, RMSNorm)):
            raise TypeError(f"Block: fused_add_norm needs a LayerNorm or an RMSNorm, got {type(self.norm).__name__}")

    def forward(
        self, hidden_states: Tensor, residual: Tensor = None, inference_params: Any = None, **mixer_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The output, which is not added yet, and the residual stream in front of it."""
        hidden_states, residual = self._add_norm(self.norm, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = self._add_norm(self.norm2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _add_norm(self, norm: Any, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(norm, hidden, residual, self.fused_add_norm, self.residual_in_fp32)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: Any = None) -> Any:
        """The mixer's states before the first token."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype)


def add_norm(norm: Any, hidden: Tensor, residual: Tensor, fused: bool, in_fp32: bool) -> tuple[Tensor, Tensor]:
    """The normalised sum and the sum."""
    if fused:
        return layer_norm_fn(  # type: ignore[no-any-return]
            hidden, norm.weight, norm.bias, residual, eps=norm.eps, prenorm=True, residual_in_fp32=in_fp32,
            is_rms_norm=isinstance(norm, RMSNorm),
        )  # fmt: skip
    residual = hidden if residual is None else hidden + residual
    return norm(residual.to(norm.weight.dtype)), residual.float() if in_fp32 else residual


class OldBlock(Block):
    """``mamba_ssm.modules.mamba_simple.Block`` of releases 1, which has no ``mlp_cls``."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)


def create_block(
    d_model: int,
    ssm_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: Any = None,
    dtype: Any = None,
    *,
    d_intermediate: int = 0,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
) -> Block:
    """A block of Mamba-1. The order is that of releases 1, what came with release 2 goes by name.

    Raises
    ------
    ValueError
        For another kind of layer, an MLP or attention.
    """
    _refuse_others(d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg)
    made = {"device": device, "dtype": dtype}
    block_cfg = {name: value for name, value in (ssm_cfg or {}).items() if name != "layer"}
    block = Block(
        d_model,
        functools.partial(Mamba, **block_cfg, layer_idx=layer_idx, **made),
        norm_cls=functools.partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **made),
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block.layer_idx = layer_idx
    return block


def _refuse_others(d_intermediate: int, ssm_cfg: Any, attn_layer_idx: Any, attn_cfg: Any) -> None:
    layer = (ssm_cfg or {}).get("layer", "Mamba1")
    for name, value, wanted in (
        ("ssm_cfg layer", layer, "Mamba1"), ("d_intermediate", d_intermediate, 0),
        ("attn_layer_idx", attn_layer_idx or [], []), ("attn_cfg", attn_cfg or {}, {}),
    ):  # fmt: skip
        if value != wanted:
            raise ValueError(f"mamba_ssm: {name} must be {wanted!r}, for sscan.compat has Mamba-1 alone, got {value!r}")


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Initial values of a part, for ``Module.apply``; where it is called twice, the second time decides."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    elif isinstance(module, nn.Linear) and module.bias is not None and not getattr(module.bias, "_no_reinit", False):
        nn.init.zeros_(module.bias)
    if rescale_prenorm_residual:
        for name, parameter in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                with torch.no_grad():
                    parameter.div_(math.sqrt(n_residuals_per_layer * n_layer))


class MixerModel(nn.Module):  # type: ignore[misc]
    """Token ids (batch, length) to normalised hidden vectors (batch, length, d_model); see :func:`create_block`."""

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: Any = None,
        **others: Any,
    ) -> None:
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **made)
        self.layers = nn.ModuleList(
            create_block(
                d_model, ssm_cfg, norm_epsilon, rms_norm, residual_in_fp32, fused_add_norm, i, **made, **others
            )
            for i in range(n_layer)
        )
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **made)
        self.apply(functools.partial(_init_weights, n_layer=n_layer, **(initializer_cfg or {})))

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: Any = None) -> dict[int, Any]:
        """The states of all layers, by their numbers."""
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype)
            for i, layer in enumerate(self.layers)
        }

    def forward(self, input_ids: Tensor, inference_params: Any = None, **mixer_kwargs: Any) -> Tensor:
        """See the class; ``inference_params`` and further arguments go to every mixer."""
        hidden, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=inference_params, **mixer_kwargs)
        return add_norm(self.norm_f, hidden, residual, self.fused_add_norm, self.residual_in_fp32)[0]


class MambaLMHeadModel(nn.Module, GenerationMixin):  # type: ignore[misc]
    """The language model: logits over the padded vocabulary, generation, and files.

    Parameters
    ----------
    config : MambaConfig
    initializer_cfg : dict, optional
        Arguments of ``_init_weights``.
    device, dtype
        Of the parameters.
    """

    def __init__(
        self, config: MambaConfig, initializer_cfg: dict[str, Any] | None = None, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.config = config
        rows = -(-config.vocab_size // config.pad_vocab_size_multiple) * config.pad_vocab_size_multiple
        self.backbone = MixerModel(
            config.d_model, config.n_layer, rows, config.ssm_cfg, rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg, fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32, device=device, dtype=dtype, d_intermediate=config.d_intermediate,
            attn_layer_idx=config.attn_layer_idx, attn_cfg=config.attn_cfg,
        )  # fmt: skip
        self.lm_head = nn.Linear(config.d_model, rows, bias=False, device=device, dtype=dtype)
        self.apply(functools.partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head use the embedding's matrix, if the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: Any = None) -> dict[int, Any]:
        """The states of all layers, by their numbers."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> Any:
        """``.logits``, of the last ``num_last_tokens`` if that is not 0; ``position_ids`` do not matter."""
        hidden = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        return CausalLMOutput(logits=self.lm_head(hidden[:, -num_last_tokens:] if num_last_tokens > 0 else hidden))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | Path, device: Any = None, dtype: Any = None, **kwargs: Any
    ) -> MambaLMHeadModel:
        """A model in a folder or on the hub, in whatever format; ``kwargs`` are of the class."""
        with open_model(pretrained_model_name) as (config, _):
            if config.norm_epsilon != configurations.MambaConfig.norm_epsilon:
                raise ValueError(f"{pretrained_model_name}: mamba_ssm has no norm_epsilon = {config.norm_epsilon}")
            known = config.to_dict()
        model = cls(MambaConfig(**known), device=device, dtype=dtype, **kwargs)
        model.load_state_dict(load_state_dict_hf(pretrained_model_name))  # A_log keeps what a smaller dtype would lose
        return model

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``pytorch_model.bin`` and ``config.json`` to a folder, which is created if need be."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self.config), indent=4)
        write_together(
            {
                folder / CONFIG: lambda new: new.write_text(text, encoding="utf-8"),
                folder / PICKLE: lambda new: torch.save(self.state_dict(), new),
            }
        )
        (folder / WEIGHTS).unlink(missing_ok=True)  # which would be read first


def load_config_hf(model_name: str | Path) -> dict[str, Any]:
    """What stands in the ``config.json`` of a model."""
    return read_object(Source(model_name).require(CONFIG))


def load_state_dict_hf(model_name: str | Path, device: Any = None, dtype: Any = None) -> dict[str, Tensor]:
    """The parameters of a model by the original's names; the head also if it is the embedding."""
    with open_model(model_name) as (_, weights):
        state = {name: tensor_of(array).to(device=device, dtype=dtype) for name, array in weights.items()}
    return {**state, HEAD: state.get(HEAD, state[EMBEDDING])}
