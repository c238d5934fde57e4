"""sscan.nn: layers beside the Mamba block, against formulas that share nothing with them, and what holds for all."""

from __future__ import annotations

from typing import Any

import device_double
import ml_dtypes
import numpy as np
import pytest
import torch

from sscan import nn
from sscan.nn import Tensor
from sscan.nn.autodiff import to_numpy


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def perturbed(module: Any, seed: int = 0) -> Any:
    """The module with every parameter away from its initial value, so that none is zero or one."""
    rng = np.random.default_rng(seed)
    for parameter in module.parameters():
        parameter.data += 0.2 * rng.standard_normal(parameter.shape)
    return module


# Parts


@pytest.mark.parametrize("dtype", [np.float64, ml_dtypes.bfloat16])
def test_layer_norm_adds_and_normalises(dtype: Any) -> None:
    norm = nn.LayerNorm(6, eps=0.1, dtype=np.float64)
    norm.initialise(0)
    perturbed(norm)
    x, residual = normal(2, 3, 6).astype(dtype), normal(2, 3, 6, seed=1)
    y, total = norm(Tensor(x), Tensor(residual))
    np.testing.assert_array_equal(total.data, x.astype(np.float64) + residual)
    weights = [torch.tensor(p.data) for p in norm.parameters()]
    expected = torch.nn.functional.layer_norm(torch.tensor(total.data), (6,), *weights, 0.1).numpy()
    assert y.dtype == dtype
    np.testing.assert_allclose(y.data.astype(np.float64), expected, rtol=float(ml_dtypes.finfo(dtype).eps) * 8)
    np.testing.assert_array_equal(norm(Tensor(total.data)).data.astype(dtype), y.data)


@pytest.mark.parametrize("xp", [np, device_double])
def test_dropout(xp: Any) -> None:
    dropout, again, other = nn.Dropout(0.25, seed=3), nn.Dropout(0.25, seed=3), nn.Dropout(0.25, seed=4)
    x = Tensor(xp.asarray(np.ones((100, 400), np.float32)), requires_grad=True)
    calls = [to_numpy(dropout(x).data) for _ in range(3)]
    for y in calls:
        assert set(np.unique(y)) == {0, np.float32(4 / 3)}
        assert abs((y == 0).mean() - 0.25) < 0.01  # four standard deviations
    # No two calls drop the same numbers, nor more of the same than chance has it; a seed says which.
    for a, b in [(calls[0], calls[1]), (calls[1], calls[2]), (calls[0], to_numpy(other(x).data))]:
        assert abs(((a == 0) & (b == 0)).mean() - 0.0625) < 0.006
    np.testing.assert_array_equal(to_numpy(again(x).data), calls[0])
    y = again(x)
    y.backward(y.data)
    np.testing.assert_allclose(to_numpy(x.grad), calls[1] ** 2, rtol=1e-6)
    with nn.no_grad():
        assert dropout(x) is x
    assert (to_numpy(dropout(x.data).data) == 1).all()
    assert nn.Dropout(0.0)(x) is x
    with pytest.raises(ValueError, match="Dropout: rate must be below 1, got 1"):
        nn.Dropout(1)


def test_modules_show_their_tree() -> None:
    assert repr(nn.Linear(3, 2)) == "Linear(weight[2, 3], bias[2])"
    model = nn.MambaLM(nn.MambaConfig(4, 2, 8, {"d_state": 2}), seed=None)
    lines = repr(model).splitlines()
    assert lines[:3] == ["MambaLM(", "  backbone=Backbone(", "    embedding=Embedding(weight[8, 4])"]
    assert "    layers.1=ResidualBlock(" in lines
    assert "        A_log[8, 2]" in lines
    assert lines[-1] == ")"
