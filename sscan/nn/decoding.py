"""A decoding step of a language model as one call of a kernel, where the CPU can use all arrays as they lie.

Whatever is not as the kernel expects, also what is wrong, is left to the operations of the model, which know what to
say: a function here returns None then.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan.nn.mamba import DepthwiseConvolution, Mamba
from sscan.nn.modules import Linear, Module, RMSNorm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sscan.cpu.decode import Weights
    from sscan.nn.autodiff import Array, Tensor

MOST_ROWS = 32  # of a batch; from there on the products are worth BLAS

# What a kernel knows of a model, and the arrays of the parameters that it knows it of.
_known: weakref.WeakKeyDictionary[Module, tuple[list[weakref.ref[Any]], Weights]] = weakref.WeakKeyDictionary()


def step(model: Any, ids: Array, states: Sequence[Any]) -> Array | None:
    """Logits (batch, padded vocabulary) of a :class:`MambaLM` for ids (batch,); the states are updated in place."""
    backbone = model.backbone
    blocks = [_arrays_of(layer) for layer in backbone.layers]
    if None in blocks or not (model.config.residual_in_fp32 or backbone.activation_dtype.itemsize > 2):
        return None
    if getattr(ids, "ndim", 0) != 1 or len(ids) > MOST_ROWS or len(states) != len(blocks):
        return None
    weights = _weights_of(model, blocks)
    if weights is None:
        return None
    memory = [(state.conv.data, state.ssm.data) for state in states]
    shapes = weights.state_shapes(len(ids))
    dtypes = backbone.layers[0].mixer.conv1d.weight.dtype, weights.dtype
    if not all(_fits(*each) for pair in memory for each in zip(pair, shapes, dtypes, strict=True)):
        return None
    eps = [*(layer.norm.eps for layer in backbone.layers), backbone.norm_f.eps]
    return weights.step(backbone.embedding(ids).data, eps, memory)


def _fits(array: Array, shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether a kernel can update it where it lies."""
    here = type(array) is np.ndarray and array.shape == shape and array.dtype == dtype
    return here and array.flags.c_contiguous and array.flags.writeable


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


def _weights_of(model: Any, blocks: list[Any]) -> Weights | None:
    """What a kernel knows of the model; found out again when a parameter has another array than before."""
    ends = model.backbone.norm_f.weight.data, model.lm_head.weight.data
    arrays = [array for block in [*blocks, ends] for array in block if array is not None]
    references, weights = _known.get(model, ([], None))
    if len(references) == len(arrays) and all(a is known() for a, known in zip(arrays, references, strict=True)):
        return weights
    if not all(type(array) is np.ndarray and array.flags.c_contiguous for array in arrays):
        return None
    embedding = model.backbone.embedding.weight
    if len(model.parameters()) != len(arrays) + (embedding is not model.lm_head.weight):
        return None  # there are others, of which the kernel knows nothing
    from sscan.cpu.decode import Weights

    weights = Weights.of(blocks, *ends)
    if weights is not None:
        _known[model] = [weakref.ref(array) for array in arrays], weights
    return weights
