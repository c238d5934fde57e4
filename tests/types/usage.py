"""Right and wrong uses of sscan, for checkers of types; ``test_types.py`` compares what they find with the comments."""

from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import assert_type

import sscan
import sscan.jax
import sscan.nn
import sscan.torch

Floats = npt.NDArray[np.float32]


def numpy_arrays(u: Floats, A: Floats, halves: npt.NDArray[np.float16], flag: bool) -> None:
    assert_type(sscan.selective_scan(u, u, A, u, u, delta_softplus=True), Floats)
    y, h = sscan.selective_scan(halves, halves, A, halves, halves, return_last_state=True)
    assert_type(y, npt.NDArray[np.float16])
    assert_type(h, Floats)
    sscan.selective_scan(u, u, A, u, u, A, u, A, True, initial_state=h, seq_idx=np.zeros((2, 3), np.int64))
    assert_type(sscan.selective_state_update(u, u, u, A, u, u), Floats)
    assert_type(sscan.discretize(u, A, u)[1], Floats)
    assert_type(sscan.linear_scan(u, u), Floats)
    assert_type(sscan.rms_norm(u, A), Floats)
    assert_type(sscan.rms_norm(halves, A, u)[0], npt.NDArray[np.float16])
    assert_type(sscan.causal_conv1d(u, A, return_final_state=True)[1], Floats)
    assert_type(sscan.causal_conv1d(u, A, activation="silu"), Floats)
    assert_type(sscan.causal_conv1d_update(u, u, A), Floats)
    assert_type(sscan.ssm_convolution(u, A), Floats)
    assert_type(sscan.selective_scan_backward(u, u, u, A, u, u), sscan.SelectiveScanGradients)

    sscan.selective_scan([1.0], u, A, u, u)  # expect: an error
    sscan.selective_scan(u, u, A, u)  # expect: an error
    sscan.selective_scan(u, u, A, u, u, softplus=True)  # expect: an error
    sscan.selective_scan(u, u, A, u, u, discretization="euler")  # expect: an error
    sscan.selective_scan(u, u, A, u, u, return_last_state=True).shape  # expect: an error
    sscan.selective_scan(u, u, A, u, u, return_last_state=flag).shape  # expect: an error
    sscan.ssm_kernel(u, A, A, A, 3.5)  # expect: an error
    sscan.causal_conv1d(u, A, return_final_state=True).shape  # expect: an error


def tensors(x: torch.Tensor, array: Floats) -> None:
    assert_type(sscan.selective_scan(x, x, x, x, x), torch.Tensor)
    assert_type(sscan.selective_scan(x, x, x, x, x, return_last_state=True), tuple[torch.Tensor, torch.Tensor])
    assert_type(sscan.torch.selective_scan(x, x, x, x, x), torch.Tensor)
    assert_type(sscan.torch.selective_scan(x, x, x, x, x, return_last_state=True), tuple[torch.Tensor, torch.Tensor])
    assert_type(sscan.torch.rms_norm(x, x), torch.Tensor)
    assert_type(sscan.torch.discretize(x, x, x), tuple[torch.Tensor, torch.Tensor])
    block = sscan.torch.Mamba(32)
    assert_type(block.forward(x), torch.Tensor)
    assert_type(block.forward(x, return_final_states=True)[0], torch.Tensor)
    model = sscan.torch.MambaLM.from_pretrained("folder")
    assert_type(model, sscan.torch.MambaLM)
    assert_type(model.forward(x), torch.Tensor)
    assert_type(model.generate([[1, 2]], 3), list[Any])

    sscan.torch.selective_scan(array, x, x, x, x)  # expect: an error
    sscan.torch.causal_conv1d(x)  # expect: an error
    block.forward(array)  # expect: an error
    block.forward(x, return_final_states=True).shape  # expect: an error


def jax_arrays(x: jax.Array, array: Floats) -> None:
    assert_type(sscan.selective_scan(x, x, x, x, x), jax.Array)
    assert_type(sscan.jax.selective_scan(x, array, x, x, x), jax.Array)
    assert_type(sscan.jax.selective_scan(x, x, x, x, x, return_last_state=True), tuple[jax.Array, jax.Array])
    assert_type(sscan.jax.selective_state_update(x, x, x, x, x, x), tuple[jax.Array, jax.Array])
    assert_type(sscan.jax.causal_conv1d(x, x), jax.Array)

    sscan.jax.selective_scan([1.0], x, x, x, x)  # expect: an error
    sscan.jax.linear_scan(x, x, backwards=True)  # expect: an error


def models(ids: npt.NDArray[np.int64], x: sscan.nn.Tensor) -> None:
    model = sscan.nn.MambaLM(sscan.nn.MambaConfig(32, 2, 256))
    assert_type(model(ids), sscan.nn.Tensor)
    assert_type(model.loss(ids, ids), sscan.nn.Tensor)
    assert_type(model.extend(ids, model.new_states(2)), tuple[sscan.nn.Tensor, sscan.nn.States])
    assert_type(sscan.nn.Mamba(32)(x), sscan.nn.Tensor)
    assert_type(sscan.nn.RMSNorm(32)(x), sscan.nn.Tensor)
    assert_type(sscan.nn.RMSNorm(32)(x, x), tuple[sscan.nn.Tensor, sscan.nn.Tensor])
    assert_type(sscan.nn.selective_scan(x, x, x, x, x), sscan.nn.Tensor)

    sscan.nn.Mamba("32")  # expect: an error
    sscan.nn.MambaLM(32)  # expect: an error
    model.loss(ids)  # expect: an error
