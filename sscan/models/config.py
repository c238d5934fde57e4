"""What a Mamba language model is: its sizes, the names and shapes of its parameters, and the two ways to write that."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from sscan.models.arguments import check_flag, check_integer, check_number

if TYPE_CHECKING:
    from collections.abc import Mapping

Format = Literal["original", "transformers"]

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class BlockConfig:
    """The arguments of a Mamba block but its width, as mamba_ssm names them; see :class:`sscan.nn.Mamba`."""

    d_state: int = 16
    d_conv: int = 4
    expand: float = 2
    dt_rank: int | Literal["auto"] = "auto"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: str = "random"
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    conv_bias: bool = True
    bias: bool = False
    discretization: str = "mamba"

    def __post_init__(self) -> None:
        for name in ("d_state", "d_conv"):
            check_integer("Mamba", name, getattr(self, name))
        if self.dt_rank != "auto":
            check_integer("Mamba", "dt_rank", self.dt_rank, 0)
        for name in ("expand", "dt_min", "dt_max", "dt_scale", "dt_init_floor"):
            check_number("Mamba", name, getattr(self, name), positive=True)
        for name in ("conv_bias", "bias"):
            check_flag("Mamba", name, getattr(self, name))
        if self.dt_min > self.dt_max:
            raise ValueError(f"Mamba: dt_min must be at most dt_max, got {self.dt_min} and {self.dt_max}")
        if self.dt_init not in ("random", "constant"):
            raise ValueError(f"Mamba: dt_init must be 'random' or 'constant', got {self.dt_init!r}")
        if self.discretization not in ("mamba", "zoh"):
            raise ValueError(f"Mamba: discretization must be 'mamba' or 'zoh', got {self.discretization!r}")

    def sizes(self, d_model: int) -> tuple[int, int]:
        """d_inner and dt_rank of a block of width `d_model`."""
        check_integer("Mamba", "d_model", d_model)
        d_inner = int(self.expand * d_model)
        if not d_inner:
            raise ValueError(f"Mamba: expand d_model must be at least 1, got {self.expand} times {d_model}")
        return d_inner, math.ceil(d_model / 16) if self.dt_rank == "auto" else self.dt_rank

    def shapes(self, d_model: int) -> Shapes:
        """Names and shapes of the parameters of a block of width `d_model`."""
        d_inner, dt_rank = self.sizes(d_model)
        shapes: Shapes = {
            "in_proj.weight": (2 * d_inner, d_model),
            "in_proj.bias": (2 * d_inner,),
            "conv1d.weight": (d_inner, 1, self.d_conv),
            "conv1d.bias": (d_inner,),
            "x_proj.weight": (dt_rank + 2 * self.d_state, d_inner),
            "dt_proj.weight": (d_inner, dt_rank),
            "dt_proj.bias": (d_inner,),
            "A_log": (d_inner, self.d_state),
            "D": (d_inner,),
            "out_proj.weight": (d_model, d_inner),
            "out_proj.bias": (d_model,),
        }
        absent = {"in_proj.bias": not self.bias, "out_proj.bias": not self.bias, "conv1d.bias": not self.conv_bias}
        return {name: shape for name, shape in shapes.items() if not absent.get(name)}


_BLOCK = {f.name: f.default for f in dataclasses.fields(BlockConfig)}
# What configurations of released models also say of the original's models, with the only value that is supported here.
_FIXED = {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}}


@dataclass(frozen=True)
class MambaConfig:
    """Shape of a language model, named as in the config.json of the original's checkpoints.

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
    norm_epsilon : float
        Is added to the mean square in the norms.
    """

    d_model: int = 2560
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
    norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"):
            check_integer("MambaConfig", name, getattr(self, name))
        for name in ("residual_in_fp32", "fused_add_norm", "tie_embeddings"):
            check_flag("MambaConfig", name, getattr(self, name))
        check_number("MambaConfig", "norm_epsilon", self.norm_epsilon)
        if not isinstance(self.ssm_cfg, dict):
            raise TypeError(f"MambaConfig: ssm_cfg must be a dict, got {self.ssm_cfg!r}")
        unknown = [name for name in self.ssm_cfg if name not in _BLOCK]
        if unknown:
            raise ValueError(f"MambaConfig: ssm_cfg has {unknown[0]!r}, which is no argument of a Mamba block")
        self.block.sizes(self.d_model)

    @property
    def block(self) -> BlockConfig:
        """The arguments of every block, checked, with the defaults for those that `ssm_cfg` leaves out."""
        return BlockConfig(**self.ssm_cfg)

    @property
    def padded_vocab_size(self) -> int:
        """Number of rows of the embedding."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    def shapes(self) -> Shapes:
        """Names and shapes of all parameters, in order; of tied embeddings both names."""
        table = (self.padded_vocab_size, self.d_model)
        block = {f"mixer.{name}": shape for name, shape in self.block.shapes(self.d_model).items()}
        layer = {"norm.weight": (self.d_model,), **block}
        return {
            "backbone.embedding.weight": table,
            **{f"backbone.layers.{i}.{name}": shape for i in range(self.n_layer) for name, shape in layer.items()},
            "backbone.norm_f.weight": (self.d_model,),
            "lm_head.weight": table,
        }

    def parameter_count(self) -> int:
        """Number of parameters of the model, that of tied embeddings counted once."""
        shapes = self.shapes()
        if self.tie_embeddings:
            del shapes["lm_head.weight"]
        return sum(map(math.prod, shapes.values()))

    def to_dict(self, format: Format = "original") -> dict[str, Any]:
        """As plain values, for a config.json of either format.

        Raises
        ------
        ValueError
            If transformers has no such model.
        """
        if format not in get_args(Format):
            raise ValueError(f"MambaConfig: format must be 'original' or 'transformers', got {format!r}")
        if format == "transformers":
            return _to_transformers(self)
        values = dataclasses.asdict(self)
        if self.norm_epsilon == MambaConfig.norm_epsilon:  # of which the original's own reader does not know
            del values["norm_epsilon"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MambaConfig:
        """The configuration of the `values` in a config.json of either format.

        Raises
        ------
        ValueError
            For keys that are unknown, or ask for a model that is not a plain Mamba language model.
        TypeError, ValueError
            If a value is not of its type, or out of its range.
        """
        if "model_type" in values or "hidden_size" in values:
            return cls(**_from_transformers(values))
        names = {f.name for f in dataclasses.fields(cls)}
        for key, value in values.items():
            if key not in names and (key not in _FIXED or value != _FIXED[key]):
                raise ValueError(f"MambaConfig: {key} = {value!r} is not supported")
        known = {key: value for key, value in values.items() if key in names}
        if isinstance(known.get("ssm_cfg"), dict):
            known["ssm_cfg"] = _plain_block(known["ssm_cfg"])
        return cls(**known)


def _plain_block(ssm_cfg: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a block; configurations may also name its kind, and a path that gives the same results."""
    layer = ssm_cfg.get("layer", "Mamba1")
    if layer != "Mamba1":
        raise ValueError(f"MambaConfig: ssm_cfg layer = {layer!r} is not supported, only 'Mamba1'")
    return {name: value for name, value in ssm_cfg.items() if name not in ("layer", "use_fast_path")}


# The other format

_MODEL_NAMES = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "residual_in_fp32": "residual_in_fp32",
    "fused_add_norm": "fused_add_norm",
    "tie_embeddings": "tie_word_embeddings",
    "norm_epsilon": "layer_norm_epsilon",
}
_BLOCK_NAMES = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "dt_rank": "time_step_rank",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init": "time_step_init_scheme",
    "dt_scale": "time_step_scale",
    "dt_init_floor": "time_step_floor",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}
# What transformers takes for granted where it differs from the original.
_MODEL_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 32, "vocab_size": 50280}
# What the file says for others than the model: how it was trained, where it is from, what a program does with it.
_UNUSED = {
    "_name_or_path", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "initializer_range", "is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states",
    "pad_token_id", "pad_vocab_size_multiple", "problem_type", "rescale_prenorm_residual", "return_dict",
    "tokenizer_class", "torch_dtype", "transformers_version", "use_associative_scan", "use_cache", "use_mambapy",
}  # fmt: skip


def _from_transformers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of MambaConfig in a config.json of transformers, where released ones say many things twice."""
    model_type = values.get("model_type", "mamba")
    if model_type != "mamba":
        what = " (whose blocks normalise dt, B and C)" if model_type == "falcon_mamba" else ""
        raise ValueError(f"MambaConfig: model_type = {model_type!r}{what} is not supported, only 'mamba'")
    model = {
        ours: values.get(theirs, _MODEL_DEFAULTS.get(theirs, getattr(MambaConfig, ours, None)))
        for ours, theirs in _MODEL_NAMES.items()
    }
    block = {ours: values.get(theirs, _BLOCK[ours]) for ours, theirs in _BLOCK_NAMES.items()}
    d_inner, dt_rank = BlockConfig(**{**block, "dt_rank": "auto"}).sizes(model["d_model"])
    if block["dt_rank"] == dt_rank:
        block["dt_rank"] = "auto"
    model["ssm_cfg"] = {name: value for name, value in block.items() if value != _BLOCK[name]}
    model["pad_vocab_size_multiple"] = 1  # vocab_size is the number of rows
    if "unpadded_vocab_size" in values:  # ours, for transformers has no word for it
        model["vocab_size"] = values["unpadded_vocab_size"]
        model["pad_vocab_size_multiple"] = values.get("pad_vocab_size_multiple", 1)
    expected = {
        **_FIXED, "d_model": model["d_model"], "n_layer": model["n_layer"], "ssm_cfg": {}, "d_inner": d_inner,
        "intermediate_size": d_inner, "hidden_act": "silu", "architectures": ["MambaForCausalLM"],
    }  # fmt: skip
    known = {*_MODEL_NAMES.values(), *_BLOCK_NAMES.values(), *_UNUSED, "model_type", "unpadded_vocab_size"}
    for key, value in values.items():
        if key not in known and value is not None and (key not in expected or value != expected[key]):
            wanted = f", expected {expected[key]!r}" if key in expected else ""
            raise ValueError(f"MambaConfig: {key} = {value!r} is not supported{wanted}")
    return model


def _to_transformers(config: MambaConfig) -> dict[str, Any]:
    block = dataclasses.asdict(config.block)
    if block.pop("discretization") != "mamba":
        raise ValueError("MambaConfig: transformers has no discretization = 'zoh'")
    d_inner, dt_rank = config.block.sizes(config.d_model)
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        **{theirs: getattr(config, ours) for ours, theirs in _MODEL_NAMES.items()},
        **{theirs: block[ours] for ours, theirs in _BLOCK_NAMES.items()},
        "time_step_rank": dt_rank,
        "intermediate_size": d_inner,
        "hidden_act": "silu",
        "vocab_size": config.padded_vocab_size,
        "unpadded_vocab_size": config.vocab_size,
        "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
    }
