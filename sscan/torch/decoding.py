"""A decoding step of a language model on a GPU as few kernels, and with draws in between as one CUDA graph.

They read the parameters where they lie. Whatever is not as they expect is left to the modules, which are then called: a
function here returns None.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from sscan._arrays import TensorView, follows_caller
from sscan.torch.mamba import Mamba, _plain
from sscan.torch.norms import RMSNorm

if TYPE_CHECKING:
    from collections.abc import Callable

    from sscan.models.sampling import Sampler
    from sscan.models.states import States

# What kernels know of a model, and the parameters, with their addresses, that they know it of.
_known: weakref.WeakKeyDictionary[nn.Module, tuple[list[tuple[Any, int]], Any]] = weakref.WeakKeyDictionary()


def step(model: Any, ids: Any, states: States) -> Any:
    """Logits (batch, padded vocabulary) in float32 (float64) for ids (batch,); the states are updated in place."""
    found = _found(model, states)
    if found is None or ids.shape != (states.batch,) or ids.is_floating_point() or ids.device != states[0].ssm.device:
        return None
    weights, eps, memory = found
    dtype = torch.promote_types(model.lm_head.weight.dtype, torch.float32)
    logits = torch.empty((states.batch, weights.vocabulary), dtype=dtype, device=ids.device)
    tokens = TensorView(ids.to(torch.int64).contiguous())
    _where_it_is(logits, weights.step, tokens, eps, memory, TensorView(logits))
    return logits


def decoder(model: Any, states: States, drawn: int, sampler: Sampler) -> Any:
    """What ``generate`` decodes with: a :class:`sscan.cuda.decode.Decoder` of these states, on PyTorch's stream."""
    found = _found(model, states)
    if found is None or sampler.repetition_penalty != 1 or model.lm_head.weight.dtype is torch.float64:
        return None
    return _Decoder(states[0].ssm, *found, drawn, *sampler.filters)


class _Decoder:
    """A decoder that works where a tensor is."""

    def __init__(self, tensor: Any, *arguments: Any) -> None:
        from sscan.cuda.decode import Decoder

        self._tensor, self._decoder = tensor, _where_it_is(tensor, Decoder, *arguments)

    def put(self, place: int, row: Any) -> None:
        _where_it_is(self._tensor, self._decoder.put, place, row)

    def steps(self, count: int) -> Any:
        return _where_it_is(self._tensor, self._decoder.steps, count)


@follows_caller
def _where_it_is(tensor: Any, call: Callable[..., Any], *arguments: Any) -> Any:
    """A call with the tensor's device and PyTorch's current stream on it."""
    return call(*arguments)


def _found(model: Any, states: States) -> Any:
    """The weights, the eps of all norms and the memory of the states, if kernels can use all of them."""
    device = model.lm_head.weight.device
    if device.type != "cuda" or torch.is_autocast_enabled("cuda") or torch.is_grad_enabled():
        return None
    layers = model.backbone.layers
    weights = _weights(model, device)
    if weights is None or len(states) != len(layers) or not weights.fits(states.batch):
        return None
    for state in states:
        conv, ssm = state.conv, state.ssm
        if (tuple(conv.shape), tuple(ssm.shape)) != weights.state_shapes(states.batch) or conv.device != device:
            return None
        here = conv.is_contiguous() and ssm.is_contiguous() and ssm.device == device
        if not here or TensorView(conv).dtype != weights.of_conv or TensorView(ssm).dtype not in weights.of_states:
            return None
    eps = [*(layer.norm.eps for layer in layers), model.backbone.norm_f.eps]
    return weights, eps, [(TensorView(state.conv), TensorView(state.ssm)) for state in states]


def _weights(model: Any, device: Any) -> Any:
    """What kernels know of the model; found out again when a parameter is another, or elsewhere, than before."""
    backbone = model.backbone
    blocks: Any = [_tensors_of(layer) for layer in backbone.layers]
    parts = backbone.embedding, backbone.norm_f, model.lm_head
    if None in blocks or _has_any_global_hook() or any(_has_hooks(part) for part in (model, backbone, *parts)):
        return None
    head, half = _plain(model.lm_head, nn.Linear), model.lm_head.weight.dtype in (torch.float16, torch.bfloat16)
    known = type(parts[0]) is nn.Embedding and type(parts[1]) is RMSNorm and head is not None and head[1] is None
    if not known or (half and not model.config.residual_in_fp32):
        return None
    ends = [part.weight for part in parts]
    tensors = [tensor for block in [*blocks, ends] for tensor in block if tensor is not None]
    key, (before, weights) = [(tensor, tensor.data_ptr()) for tensor in tensors], _known.get(model, ([], None))
    if len(key) == len(before) and all(x is a and at == b for (x, at), (a, b) in zip(key, before, strict=True)):
        return weights
    if not all(tensor.is_contiguous() and tensor.device == device for tensor in tensors):
        return None
    if len(list(model.parameters())) != len(tensors) - (ends[0] is ends[-1]):
        return None  # there are others, of which the kernels know nothing
    from sscan.cuda.decode import Weights

    views = [[None if tensor is None else TensorView(tensor) for tensor in block] for block in blocks]
    weights = Weights.of(views, *map(TensorView, ends))  # type: ignore[no-untyped-call]
    if weights is not None:
        _known[model] = key, weights
    return weights


def _has_hooks(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _tensors_of(layer: Any) -> list[Any] | None:
    """The parameters of a block in the order of `sscan.cuda.decode`, if its parts are the plain ones."""
    mixer, norm = layer.mixer, layer.norm
    if type(mixer) is not Mamba or type(norm) is not RMSNorm or any(map(_has_hooks, (layer, mixer, norm))):
        return None
    linear: Any = [_plain(part, nn.Linear) for part in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)]
    conv = _plain(mixer.conv1d, nn.Conv1d)
    if conv is None or None in linear or linear[1][1] is not None:
        return None
    in_proj, (x_proj, _), dt_proj, out_proj = linear
    return [norm.weight, *in_proj, *conv, x_proj, *dt_proj, mixer.A_log, mixer.D, *out_proj]
