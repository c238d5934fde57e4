"""sscan.nn in mixed precision: bfloat16 activations, everything that is kept or summed in float32.

Runs on NumPy here and on CuPy in tests/gpu/test_nn.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from sscan import nn
from sscan.models.files import load_arrays, save_arrays
from sscan.nn import MambaConfig, MambaLM, Tensor, ops
from sscan.nn.autodiff import to_numpy

if TYPE_CHECKING:
    from pathlib import Path

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
EPS = float(ml_dtypes.finfo(BFLOAT16).eps)
SMALL = MambaConfig(d_model=32, n_layer=2, vocab_size=11, ssm_cfg={"d_state": 4, "bias": True})


@pytest.fixture
def xp() -> Any:
    return np


def ids(batch: int, length: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 11, (batch, length))


def model_in(xp: Any, activation_dtype: Any, config: MambaConfig = SMALL, seed: int = 0) -> MambaLM:
    model = MambaLM(config, seed=seed, activation_dtype=activation_dtype)
    model.to(xp)
    return model


def distance(got: Any, expected: Any) -> float:
    """|got - expected| / |expected|, Euclidean."""
    got, expected = (to_numpy(array).astype(np.float64) for array in (got, expected))
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def test_what_is_float32_and_what_is_not(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_in(xp, BFLOAT16)
    products: list[Any] = []
    residuals: list[Any] = []
    multiply, add_norm = ops.matmul.function, type(model.backbone)._add_norm

    def matmul(a: Any, b: Any) -> Any:
        products.append((a.dtype, b.dtype))
        return multiply(a, b)

    def recorded(*arguments: Any) -> Any:
        hidden, residual = add_norm(*arguments)
        residuals.append((hidden.dtype, residual.dtype))
        return hidden, residual

    monkeypatch.setattr(ops.matmul, "function", matmul)
    monkeypatch.setattr(type(model.backbone), "_add_norm", recorded)
    loss = model.loss(ids(2, 9), ids(2, 9))
    loss.backward()
    assert products == [(BFLOAT16, BFLOAT16)] * 8  # four in each block
    assert residuals == [(BFLOAT16, np.float32)] * 3
    assert loss.dtype == np.float32
    assert model(ids(2, 9)).dtype == np.float32
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.dtype, parameter.grad.dtype) == (np.float32, np.float32), name
    logits, states = model.prefill(ids(2, 5), model.new_states(2))
    assert logits.dtype == np.float32
    assert {a.dtype for s in states for a in (s.conv.data, s.ssm.data)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "change", [{}, {"fused_add_norm": False}, {"residual_in_fp32": False}, {"tie_embeddings": False}]
)
def test_gradients_are_those_of_float32_within_the_rounding(xp: Any, change: dict[str, Any]) -> None:
    config = MambaConfig(**{**SMALL.to_dict(), **change})
    wide, mixed = MambaLM(config), model_in(xp, BFLOAT16, config)
    losses = [model.loss(ids(4, 33), ids(4, 33, seed=1)) for model in (wide, mixed)]
    for loss in losses:
        loss.backward()
    assert abs(losses[1].item() - losses[0].item()) < EPS * losses[0].item()
    for (name, expected), got in zip(wide.named_parameters(), mixed.parameters(), strict=True):
        # A few roundings, one after the other; never none, or nothing was in bfloat16.
        assert EPS / 100 < distance(got.grad, expected.grad) < 4 * EPS, name


def test_training_goes_as_in_float32(xp: Any) -> None:
    tokens = np.arange(132).reshape(4, 33) % 7
    curves = []
    for dtype in (np.float32, BFLOAT16):
        model = model_in(xp, dtype)
        optimiser = nn.AdamW(nn.decay_groups(model), lr=3e-3)
        losses = []
        for _ in range(30):
            model.zero_grad()
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            nn.clip_gradients(model.parameters())
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        curves.append(losses)
    np.testing.assert_allclose(curves[1], curves[0], atol=0.05 * curves[0][0])


@pytest.mark.parametrize("rule", ["mamba", "zoh"])
def test_decoding_equals_the_scan(xp: Any, rule: str) -> None:
    model = model_in(xp, BFLOAT16, MambaConfig(32, 2, 11, {"discretization": rule}))
    x = ids(3, 12)
    expected = to_numpy(model(x).data)
    logits, states = model.prefill(x[:, :4], model.new_states(3))
    for t in range(4, 12):
        np.testing.assert_allclose(to_numpy(logits), expected[:, t - 1], atol=4 * EPS * np.abs(expected).max())
        logits = model.step(x[:, t], states)


def test_weights_are_cast_to_the_activations(xp: Any) -> None:
    layer = nn.Linear(64, 5)
    layer.initialise(0)
    layer.to(xp)
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(BFLOAT16)
    y = layer(xp.asarray(x))
    assert y.dtype == BFLOAT16
    weight = to_numpy(layer.weight.data).astype(BFLOAT16).astype(np.float64)
    exact = x.astype(np.float64) @ weight.T
    np.testing.assert_allclose(to_numpy(y.data).astype(np.float64), exact, rtol=EPS / 2, atol=1e-6)
    (y * y).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == np.float32
    assert layer(xp.asarray(x.astype(np.float32))).dtype == np.float32


def test_sums_in_the_backward_are_wide(xp: Any) -> None:
    # 1000 terms of 1/256 in bfloat16 would stop growing at 1: each is less than half a unit in the last place of 1.
    bias = Tensor(xp.zeros(2, BFLOAT16), requires_grad=True)
    x = xp.full((1000, 2), 1 / 256, BFLOAT16)
    ops.add(x, bias).backward(x)
    assert to_numpy(bias.grad).astype(np.float32).tolist() == [3.90625, 3.90625]


def test_checkpoints(xp: Any, tmp_path: Path) -> None:
    mixed = model_in(xp, BFLOAT16, seed=1)
    mixed.save_pretrained(tmp_path / "mixed")
    np.testing.assert_array_equal(
        MambaLM.from_pretrained(tmp_path / "mixed").lm_head.weight.data, to_numpy(mixed.lm_head.weight.data)
    )
    half = MambaLM(SMALL, BFLOAT16, seed=1)
    half.to(xp)
    half.save_pretrained(tmp_path / "half")
    file = load_arrays(tmp_path / "half" / "model.safetensors")[0]
    again, wide = MambaLM.from_pretrained(tmp_path / "half", BFLOAT16), MambaLM.from_pretrained(tmp_path / "half")
    for name, parameter in half.named_parameters():
        assert file[name].dtype == parameter.dtype == again.state_dict()[name].dtype, name
        for array in (file[name], again.state_dict()[name], wide.state_dict()[name]):
            np.testing.assert_array_equal(array.astype(np.float32), to_numpy(parameter.data).astype(np.float32))
    assert {parameter.dtype for parameter in wide.parameters()} == {np.dtype(np.float32)}
    save_arrays(tmp_path / "scalar", {"a": xp.asarray(np.array(1.5, BFLOAT16))})
    assert load_arrays(tmp_path / "scalar")[0]["a"] == 1.5


@pytest.mark.parametrize(
    ("dtype", "activations", "message"),
    [
        (np.float64, np.float16, "activation_dtype float16 does not go with parameters in float64: .* at most float32"),
        (np.float32, np.complex64, "activation_dtype complex64 does not go with parameters in float32"),
        (np.float32, np.int8, "activation_dtype: dtype must be a floating or complex one, got int8"),
    ],
)
def test_activations_that_do_not_go_with_the_parameters(dtype: Any, activations: Any, message: str) -> None:
    """Said when the model is made, not by an op in its first forward."""
    with pytest.raises(TypeError, match=message):
        MambaLM(SMALL, dtype, activation_dtype=activations)


def test_there_is_something_to_prefill() -> None:
    model = MambaLM(SMALL)
    with pytest.raises(
        ValueError, match=r"prefill: ids must have shape \(batch, length\) with length >= 1, got \(2, 0\)"
    ):
        model.prefill(np.zeros((2, 0), int), model.new_states(2))
