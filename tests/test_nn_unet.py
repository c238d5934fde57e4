"""The U-Net: what it computes, that it is causal, and that samples one by one are the whole."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sscan import nn
from sscan.nn import SequenceConfig, SequenceModel, UNet

if TYPE_CHECKING:
    from collections.abc import Callable

COMPLEX = {"layer": "gated", "inner": "s6", "A": "lin", "d_state": 4}
LAYERS: dict[str, dict[str, Any]] = {
    "real": {"outer": [{"layer": "mamba", "d_state": 4}]},
    "complex": {"outer": [COMPLEX]},
    "s4": {"outer": [{"layer": "ungated", "inner": "s4", "d_state": 4}, {"layer": "mlp", "expand": 2}]},
    "mixed": {"outer": [{"layer": "mamba", "d_state": 4}], "centre": [COMPLEX], "blocks": 2},
}


def perturbed(module: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    for parameter in module.parameters():
        parameter.data += 0.2 * rng.standard_normal(parameter.shape).astype(parameter.dtype)
    return module


def model_of(kind: str, dtype: Any = np.float64, **changes: Any) -> SequenceModel:
    layer = {"layer": "unet", "blocks": 1, **LAYERS[kind], **changes}
    model: SequenceModel = perturbed(SequenceModel(SequenceConfig(4, 11, [layer]), dtype))
    return model


def ids(batch: int, length: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 11, (batch, length))


def test_what_it_computes() -> None:
    """Step by step from the definition, with pools of different sizes; only the layers are the module's own."""
    unet = perturbed(UNet(2, ["mlp"], blocks=1, pool=[3, 2], dtype=np.float64))
    x = np.random.default_rng(1).standard_normal((2, 12, 2))

    def level(module: Any, x: Any, factor: int, inner: Any) -> Any:
        batch, length, width = x.shape
        x = module.before(x).data
        down, up = ([p.data for p in linear.parameters()] for linear in (module.pool, module.unpool))
        low = np.zeros((batch, length // factor, 2 * width))
        for k in range(length // factor):
            low[:, k] = np.concatenate([x[:, k * factor + i] for i in range(factor)], axis=1) @ down[0].T + down[1]
        low, skip = inner(low), x.copy()
        for t in range(factor, length):
            k, i = t // factor - 1, t % factor  # the low step before
            skip[:, t] += (low[:, k] @ up[0].T + up[1])[:, i * width : (i + 1) * width]
        return module.after(skip).data

    def inner(low: Any) -> Any:
        return level(unet.inner, low, 2, lambda lowest: unet.inner.inner(lowest).data)

    np.testing.assert_allclose(unet(x).data, level(unet, x, 3, inner), rtol=1e-12, atol=1e-13)
    block = unet.before.layers[0]
    np.testing.assert_allclose(unet.before(x).data, x + block.mixer(block.norm(x)).data, rtol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_steps_and_pieces_are_the_whole_at_every_offset(kind: str) -> None:
    model, x = model_of(kind), ids(2, 48)
    expected = model(x).data

    def check(logits: Any, where: Any) -> None:
        np.testing.assert_allclose(logits, expected[:, where], rtol=1e-9, atol=1e-10)

    states = model.new_states(2)
    for t in range(48):  # from the very first sample
        check(model.step(x[:, t], states), t)
    for offset in range(16):
        logits, states = model.extend(x[:, :offset], model.new_states(2))
        check(logits.data, slice(0, offset))
        for t in range(offset, offset + 16):
            check(model.step(x[:, t], states), t)
        piece, states = model.extend(x[:, offset + 16 : 47], states)  # from the middle of a group to that of another
        check(piece.data, slice(offset + 16, 47))
        check(model.prefill(x[:, 47:], states)[0], 47)


def test_steps_in_half_precision() -> None:
    """Float32 parameters and bfloat16 activations: steps and pieces differ from the whole by their roundings alone."""
    model, x = model_of("real", np.float32), ids(2, 32)
    half = SequenceModel(model.config, activation_dtype=ml_dtypes.bfloat16)
    half.load_state_dict(model.state_dict())
    exact, whole, states = model(x).data, half(x).data, half.new_states(2)
    steps = np.stack([half.step(x[:, t], states) for t in range(32)], axis=1)
    pieces = half.extend(x, half.new_states(2))[0].data
    rounding = np.abs(whole - exact).max()
    assert 0 < rounding < 0.05 * np.abs(exact).max()
    assert np.abs(steps - exact).max() < 2 * rounding
    assert np.abs(pieces - exact).max() < 2 * rounding


@settings(max_examples=25, deadline=None)
@given(t=st.integers(0, 47), kind=st.sampled_from(sorted(LAYERS)))
def test_no_sample_sees_what_is_to_come(t: int, kind: str) -> None:
    model, x = model_of(kind), ids(1, 48)
    changed = x.copy()
    changed[0, t] = (x[0, t] + 1) % 11
    difference = np.abs(model(changed).data - model(x).data).max(axis=(0, 2))
    assert (difference[:t] < 1e-10).all()
    assert difference[t] > 1e-6


def test_which_samples_the_low_rates_serve() -> None:
    unet = perturbed(UNet(2, ["mlp"], blocks=1, dtype=np.float64))  # layers that see one sample at a time
    x = np.random.default_rng(1).standard_normal((1, 48, 2))
    for t, reached in [(0, {0, *range(4, 8), *range(20, 36)}), (18, {18, *range(20, 24), *range(36, 48)})]:
        changed = x.copy()
        changed[0, t] += 1
        difference = np.abs(unet(changed).data - unet(x).data).max(axis=(0, 2))
        # A step of 4 samples serves the 4 after it; one of 16 serves the 4 steps after it, each of which serves on.
        assert set(np.flatnonzero(difference > 1e-9).tolist()) == reached


def check_directions(function: Callable[[], Any], model: SequenceModel) -> None:
    """The gradient of every parameter along one direction, against central differences."""
    model.zero_grad()
    function().backward()
    rng = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        direction, middle = rng.standard_normal(parameter.shape), parameter.data.copy()
        assert parameter.grad is not None, name
        expected, step = 0.0, 1e-4
        with nn.no_grad():
            for offset, factor in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
                parameter.data[...] = middle + offset * step * direction
                expected += factor * function().item() / (12 * step)
        parameter.data[...] = middle
        assert expected != 0, name
        np.testing.assert_allclose((parameter.grad * direction).sum(), expected, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_gradients(kind: str) -> None:
    model, x, y = model_of(kind), ids(1, 48), ids(1, 48, seed=1)
    check_directions(lambda: model.loss(x, y), model)

    def pieces() -> Any:  # gradients through states too
        first, states = model.extend(x[:, :21], model.new_states(1))
        second, _ = model.extend(x[:, 21:], states)
        return (first[:, 20] ** 2).sum() + (second[:, 26] ** 3).sum()

    check_directions(pieces, model)


def test_parameter_counts_of_the_paper() -> None:
    """Sections 4.4 and E.4 print 3.5M, 6.1M and 24.3M."""
    for width, blocks, pool, printed in [(64, 3, 16, 3.5), (64, 8, 4, 6.1), (96, 15, 4, 24.3)]:
        config = SequenceConfig(width, 256, [{"layer": "unet", "blocks": blocks, "pool": [pool, pool]}])
        assert abs(config.parameter_count() / (1e6 * printed) - 1) < 0.03


def test_initial_values_know_how_many_layers_add_up() -> None:
    unet = UNet(16, ["mlp"], ["mlp", "glu"], blocks=2, n_layer=3)  # 4 stages of 2, and 4 in the middle
    for stage in (unet.before, unet.inner.before, unet.inner.inner):
        weight = stage.layers[0].mixer.out_proj.weight
        bound = 1 / np.sqrt(weight.shape[1] * 3 * 12)
        assert 0.95 * bound < np.abs(weight.data).max() <= bound


def test_errors() -> None:
    model = model_of("real")
    with pytest.raises(ValueError, match=re.escape("UNet: length must be a multiple of 16, got 40")):
        model(ids(1, 40))
    with pytest.raises(NotImplementedError, match="UNet: takes no packed sequences"):
        model(ids(1, 16), np.zeros((1, 16), np.int32))
    with pytest.raises(NotImplementedError, match=r"with layer 0 \('unet'\)"):
        model_of("real", centre=["attention"]).new_states(1)
    for options, error, message in [
        ({"pool": []}, TypeError, r"pool must be a list of integers, got \[\]"),
        ({"pool": [0]}, ValueError, "pool must be at least 1, got 0"),
        ({"blocks": 0}, ValueError, "blocks must be at least 1, got 0"),
        ({"outer": ["unet"]}, ValueError, "layer 0 must be one of mamba, .*, got 'unet'"),
        ({"centre": "mamba"}, TypeError, "centre must be a list of one layer at least, got 'mamba'"),
        ({"outer": [{"layer": "mamba", "heads": 1}]}, ValueError, "unexpected keyword argument 'heads'"),
    ]:
        with pytest.raises(error, match=f"UNet: .*{message}"):
            UNet(4, **options)
