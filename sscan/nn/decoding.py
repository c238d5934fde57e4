"""A decoding step of a language model as few kernels, where the device's can use all arrays as they lie.

On the CPU it is one kernel; on a GPU one for each phase of a block, and with draws in between one CUDA graph. Whatever
is not as the kernels expect, also what is wrong, is left to the operations of the model, which know what to say: a
function here returns None then.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan import _arrays
from sscan._arrays import array_module
from sscan.nn.autodiff import move
from sscan.nn.mamba import DepthwiseConvolution, Mamba
from sscan.nn.modules import Linear, Module, RMSNorm
from sscan.nn.ops import check_indices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sscan.models.sampling import Sampler
    from sscan.models.states import States
    from sscan.nn.autodiff import Array, Tensor

MOST_ROWS = 32  # of a batch on the CPU; from there on the products are worth BLAS

# What kernels know of a model, and the arrays of the parameters that they know it of.
_known: weakref.WeakKeyDictionary[Module, tuple[list[weakref.ref[Any]], Any]] = weakref.WeakKeyDictionary()


def step(model: Any, ids: Array, states: Sequence[Any]) -> Array | None:
    """Logits (batch, padded vocabulary) of a :class:`MambaLM` for ids (batch,); the states are updated in place."""
    weights = _weights(model)
    if weights is None or getattr(ids, "ndim", 0) != 1:
        return None
    memory = _memory(weights, model, len(ids), states)
    if memory is None:
        return None
    if _device(model) == "cpu":
        if len(ids) > MOST_ROWS:
            return None
        return weights.step(model.backbone.embedding(ids).data, _eps(model), memory)
    if not weights.fits(len(ids)):
        return None
    check_indices(ids, weights.vocabulary)
    xp = array_module(memory[0][0])
    logits = xp.empty((len(ids), weights.vocabulary), weights.real)
    weights.step(xp.ascontiguousarray(move(ids, xp).astype(np.int64, copy=False)), _eps(model), memory, logits)
    return logits


def decoder(model: Any, states: States, drawn: int, sampler: Sampler) -> Any:
    """A :class:`sscan.cuda.decode.Decoder` of these states, from there on at their addresses."""
    weights = _weights(model)
    memory = None if weights is None else _memory(weights, model, states.batch, states)
    if memory is None or _device(model) == "cpu" or sampler.repetition_penalty != 1 or not weights.fits(states.batch):
        return None
    if weights.real != np.float32:
        return None  # draws are made from float32
    from sscan.cuda.decode import Decoder

    return Decoder(weights, _eps(model), memory, drawn, *sampler.filters)  # type: ignore[no-untyped-call]


def _device(model: Any) -> str:
    """Whose kernels know the model's arrays: "cpu", "cuda", or "" for nobody's."""
    array = model.lm_head.weight.data
    if type(array) is np.ndarray:
        return "cpu"
    return "cuda" if _arrays.enter("step", weight=array)[0].device.partition(":")[0] == "cuda" else ""


def _eps(model: Any) -> list[float]:
    """Those of all norms."""
    backbone = model.backbone
    return [*(layer.norm.eps for layer in backbone.layers), backbone.norm_f.eps]


def _memory(weights: Any, model: Any, batch: int, states: Sequence[Any]) -> list[tuple[Array, Array]] | None:
    """The arrays of the states, if kernels can update them where they lie."""
    if len(states) != len(model.backbone.layers):
        return None
    memory = [(state.conv.data, state.ssm.data) for state in states]
    shapes, dtypes = weights.state_shapes(batch), (weights.of_conv, weights.of_ssm)
    fit = all(_fits(*each) for pair in memory for each in zip(pair, shapes, dtypes, strict=True))
    return memory if fit else None


def _weights(model: Any) -> Any:
    """What kernels know of the model; found out again when a parameter has another array than before."""
    backbone = model.backbone
    blocks: Any = [_arrays_of(layer) for layer in backbone.layers]
    if None in blocks or not (model.config.residual_in_fp32 or backbone.activation_dtype.itemsize > 2):
        return None
    ends = backbone.embedding.weight.data, backbone.norm_f.weight.data, model.lm_head.weight.data
    arrays = [array for block in [*blocks, ends] for array in block if array is not None]
    references, weights = _known.get(model, ([], None))
    if len(references) == len(arrays) and all(a is known() for a, known in zip(arrays, references, strict=True)):
        return weights
    kind, device = type(ends[-1]), _device(model)
    if not device or not all(type(array) is kind and array.flags.c_contiguous for array in arrays):
        return None
    if len(model.parameters()) != len(arrays) - (ends[0] is ends[-1]):
        return None  # there are others, of which the kernels know nothing
    if device == "cpu":
        from sscan.cpu.decode import Weights
    else:
        from sscan.cuda.decode import Weights  # type: ignore[assignment]
    weights = Weights.of(blocks, *ends)
    if weights is not None:
        _known[model] = [weakref.ref(array) for array in arrays], weights
    return weights


def _fits(array: Array, shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether a kernel can update it where it lies."""
    same = array.shape == shape and array.dtype == dtype and array.flags.c_contiguous
    return same and (type(array) is not np.ndarray or array.flags.writeable)


def _arrays_of(layer: Any) -> tuple[Array | None, ...] | None:
    """The arrays of a block in the order of `sscan.cpu.decode`, if its parts are the plain ones."""
    norm, mixer = layer.norm, layer.mixer
    if type(mixer) is not Mamba or mixer.discretization != "mamba":
        return None
    parts = norm, mixer.conv1d, mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj
    if tuple(map(type, parts)) != (RMSNorm, DepthwiseConvolution, Linear, Linear, Linear, Linear):
        return None

    def of(bias: Tensor | None) -> Array | None:
        return None if bias is None else bias.data

    return (
        norm.weight.data, mixer.in_proj.weight.data, of(mixer.in_proj.bias), mixer.conv1d.weight.data,
        of(mixer.conv1d.bias), mixer.x_proj.weight.data, mixer.dt_proj.weight.data, of(mixer.dt_proj.bias),
        mixer.A_log.data, mixer.D.data, mixer.out_proj.weight.data, of(mixer.out_proj.bias),
    )  # fmt: skip
