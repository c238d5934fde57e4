"""sscan.nn: AdamW, its groups, clipping and the learning rate."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sscan import nn
from sscan.nn import MambaConfig, MambaLM

SMALL = MambaConfig(d_model=12, n_layer=2, vocab_size=11, ssm_cfg={"d_state": 4, "bias": True})


def parameter(value: Any, gradient: Any, decay: bool = True) -> nn.Parameter:
    value = np.array(value, np.float64)
    result = nn.Parameter(value.shape, lambda rng, shape: value, np.float64, decay=decay)
    result.initialise(np.random.default_rng(0))
    result.grad = np.array(gradient, np.float64)
    return result


def test_decay_groups() -> None:
    decayed, kept = nn.decay_groups(MambaLM(SMALL), 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    projections = {"in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"}
    assert {name.split("mixer.")[-1] for name in decayed["parameters"]} == projections | {"backbone.embedding.weight"}
    others = {"A_log", "D", "in_proj.bias", "conv1d.bias", "dt_proj.bias", "out_proj.bias"}
    norms = {"backbone.layers.0.norm.weight", "backbone.layers.1.norm.weight", "backbone.norm_f.weight"}
    assert {name.split("mixer.")[-1] for name in kept["parameters"]} == others | norms
    assert not decayed["parameters"].keys() & kept["parameters"].keys()


def test_step_sizes_and_a_of_s4_have_a_highest_rate() -> None:
    layer = nn.Ungated(4, "s4", d_state=2)
    decayed, kept, slow = nn.decay_groups(layer)
    assert slow["parameters"].keys() == {"inner.log_delta", "inner.A.log", "inner.A.imag"}
    assert (slow["weight_decay"], slow["max_lr"]) == (0, 1e-3)
    assert decayed["parameters"].keys() == {"inner.C.real", "inner.C.imag", "out_proj.weight"}
    assert kept["parameters"].keys() == {"inner.D", "out_proj.bias"}
    for lr, expected in ((1e-2, 1e-3), (1e-4, 1e-4)):  # the first step is as long as the rate
        layer.initialise(0)
        before = {name: parameter.data.copy() for name, parameter in layer.named_parameters()}
        for parameter in layer.parameters():
            parameter.grad = np.full(parameter.shape, 7, np.float32)
        nn.AdamW(nn.decay_groups(layer, 0.0), lr=lr).step()
        for name, parameter in layer.named_parameters():
            moved = expected if name in slow["parameters"] else lr
            np.testing.assert_allclose(before[name] - parameter.data, moved, rtol=1e-2)


def test_adamw_by_hand() -> None:
    p = parameter([1.0, -2.0], [0.5, -0.25])
    optimiser = nn.AdamW([{"parameters": {"p": p}, "weight_decay": 0.1}], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    array, m, v, expected = p.data, np.zeros(2), np.zeros(2), p.data.copy()
    for t in range(1, 6):
        p.grad = np.array([0.5, -0.25]) * t
        m, v = 0.9 * m + 0.1 * p.grad, 0.95 * v + 0.05 * p.grad**2
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        expected = expected - 0.01 * 0.1 * expected - 0.01 * step
        optimiser.step()
        np.testing.assert_allclose(p.data, expected, rtol=1e-12)
    assert p.data is array  # in place


def test_decay_is_decoupled_from_the_gradient() -> None:
    p, q = parameter([1.0], [0.0]), parameter([1.0], [0.0], decay=False)
    groups = [{"parameters": {"p": p}, "weight_decay": 0.1}, {"parameters": {"q": q}, "weight_decay": 0.0}]
    nn.AdamW(groups, lr=0.5).step()
    np.testing.assert_allclose(p.data, [0.95])
    np.testing.assert_array_equal(q.data, [1.0])


def test_parameters_without_gradient_stay() -> None:
    p = parameter([1.0], [0.0])
    p.grad = None
    nn.AdamW([{"parameters": {"p": p}, "weight_decay": 0.1}]).step()
    np.testing.assert_array_equal(p.data, [1.0])


def train(model: MambaLM, optimiser: nn.AdamW, steps: range) -> float:
    loss = math.nan
    for i in steps:
        ids = np.random.default_rng([0, i]).integers(0, 11, (2, 9))
        model.zero_grad()
        value = model.loss(ids[:, :-1], ids[:, 1:])
        value.backward()
        nn.clip_gradients(model.parameters())
        optimiser.step()
        loss = value.item()
    return loss


def test_resuming_is_exact() -> None:
    model = MambaLM(SMALL)
    optimiser = nn.AdamW(nn.decay_groups(model), lr=3e-3)
    train(model, optimiser, range(3))
    weights, moments = ({k: v.copy() for k, v in d.items()} for d in (model.state_dict(), optimiser.state_dict()))
    train(model, optimiser, range(3, 6))

    resumed = MambaLM(SMALL, seed=None)
    resumed.load_state_dict(weights)
    again = nn.AdamW(nn.decay_groups(resumed), lr=3e-3)
    again.load_state_dict(moments)
    train(resumed, again, range(3, 6))
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(resumed.state_dict()[name], array)
    for name, array in optimiser.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], array)


def test_training_learns() -> None:
    model = MambaLM(MambaConfig(16, 1, 8))
    optimiser = nn.AdamW(nn.decay_groups(model), lr=1e-2)
    ids = np.arange(33)[None] % 8
    for _ in range(60):
        model.zero_grad()
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        nn.clip_gradients(model.parameters())
        optimiser.step()
    assert loss.item() < 0.1


def test_load_state_dict_is_strict() -> None:
    optimiser = nn.AdamW([{"parameters": {"p": parameter([1.0], [0.0])}, "weight_decay": 0.1}])
    with pytest.raises(ValueError, match=r"state 'p\.m' has shape \(2,\), expected \(1,\)"):
        optimiser.load_state_dict({**optimiser.state_dict(), "p.m": np.zeros(2)})
    with pytest.raises(ValueError, match=r"state 'p\.v' has shape None, expected \(1,\)"):
        optimiser.load_state_dict({"steps": np.array(1), "p.m": np.zeros(1)})


def test_half_precision_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match=r"AdamW: backbone\.embedding\.weight is bfloat16"):
        nn.AdamW(nn.decay_groups(MambaLM(SMALL, ml_dtypes.bfloat16)))


def test_clipping() -> None:
    p, q = parameter([0.0, 0.0], [3.0, 0.0]), parameter([0.0], [4.0])
    assert nn.clip_gradients([p, q], 1.0) == 5.0
    np.testing.assert_allclose(p.grad, [0.6, 0.0])
    np.testing.assert_allclose(q.grad, [0.8])
    assert nn.clip_gradients([p, q], 2.0) == pytest.approx(1.0)
    np.testing.assert_allclose(q.grad, [0.8])


def test_warmup_cosine() -> None:
    assert nn.warmup_cosine(0.0, 3e-3) == 0.0
    assert nn.warmup_cosine(0.05, 3e-3) == pytest.approx(1.5e-3)
    assert nn.warmup_cosine(0.1, 3e-3) == pytest.approx(3e-3)
    assert nn.warmup_cosine(0.55, 3e-3) == pytest.approx((3e-3 + 1e-5) / 2)
    assert nn.warmup_cosine(1.0, 3e-3) == pytest.approx(1e-5)
    assert nn.warmup_cosine(1.5, 3e-3) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": math.nan}, "AdamW: lr must be finite and at least 0, got nan"),
        ({"lr": -1e-3}, "AdamW: lr"),
        ({"lr": math.inf}, "AdamW: lr"),
        ({"eps": -1e-8}, "AdamW: eps"),
        ({"betas": (1.0, 0.9)}, "AdamW: betas must be two numbers in"),
        ({"betas": (0.9,)}, "AdamW: betas must be two numbers in"),
        ({"betas": (0.9, math.nan)}, "AdamW: betas must be two numbers in"),
    ],
)
def test_numbers_that_adamw_refuses(arguments: dict[str, Any], message: str) -> None:
    group = {"parameters": {"p": parameter([1.0], [0.5])}, "weight_decay": 0.1}
    with pytest.raises(ValueError, match=message):
        nn.AdamW([group], **arguments)
    with pytest.raises(ValueError, match="AdamW: weight_decay"):
        nn.AdamW([{**group, "weight_decay": math.nan}])
    optimiser = nn.AdamW([group])
    optimiser.lr = math.nan  # assigned later
    with pytest.raises(ValueError, match="AdamW: lr"):
        optimiser.step()
    assert optimiser.steps == 0
    np.testing.assert_array_equal(group["parameters"]["p"].data, [1.0])
    optimiser.lr = 0.0
    optimiser.step()


def test_clips_that_are_none() -> None:
    p = parameter([0.0, 0.0], [3.0, 4.0])
    for limit in (-1.0, 0.0, math.nan):
        with pytest.raises(ValueError, match=f"clip_gradients: max_norm must be above 0, got {limit}"):
            nn.clip_gradients([p], limit)
    assert nn.clip_gradients([p], math.inf) == 5.0
    np.testing.assert_array_equal(p.grad, [3.0, 4.0])


def test_rates_that_are_none() -> None:
    for arguments, message in [
        ({"progress": -0.1}, "progress"), ({"progress": math.nan}, "progress"), ({"peak": -1.0}, "peak"),
        ({"final": math.inf}, "final"), ({"warmup": 1.0}, "warmup must be below 1"), ({"warmup": -0.1}, "warmup"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"warmup_cosine: {message}"):
            nn.warmup_cosine(**{"progress": 0.5, "peak": 1.0, **arguments})
    assert nn.warmup_cosine(0.0, 2.0, warmup=0.0) == 2.0


def test_states_of_other_kinds_are_refused() -> None:
    optimiser = nn.AdamW([{"parameters": {"p": parameter([1.0], [0.0])}, "weight_decay": 0.1}])
    for name, array in [("p.m", np.ones(1, np.int32)), ("steps", np.array(1.5))]:
        with pytest.raises(ValueError, match=f"AdamW: state '{name}' is {array.dtype}"):
            optimiser.load_state_dict({**optimiser.state_dict(), name: array})
    with pytest.raises(ValueError, match="AdamW: steps must be at least 0, got -1"):
        optimiser.load_state_dict({**optimiser.state_dict(), "steps": np.array(-1)})


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([], ValueError, "no groups of parameters"),
        ([{"weight_decay": 0.0}], ValueError, "a group has parameters, weight_decay and perhaps max_lr"),
        ([{"parameters": {}, "weight_decay": 0.0, "lr": 1e-6}], ValueError, "got parameters, weight_decay, lr"),
        ([{"parameters": [1], "weight_decay": 0.0}], TypeError, "must be a dict of them by name, got list"),
    ],
)
def test_groups_that_are_none(groups: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"AdamW: .*{message}"):
        nn.AdamW(groups)


def test_a_parameter_has_one_group() -> None:
    layer = nn.Linear(2, 2)
    layer.initialise(0)
    with pytest.raises(ValueError, match="AdamW: weight is there twice"):
        nn.AdamW(2 * nn.decay_groups(layer))


def test_an_update_before_the_first_step_changes_nothing() -> None:
    layer = nn.Linear(2, 2, bias=False)
    layer.initialise(0)
    optimiser, before = nn.AdamW(nn.decay_groups(layer)), layer.weight.data.copy()
    layer.weight.grad = np.ones((2, 2), np.float32)
    with pytest.raises(RuntimeError, match=r"AdamW: call advance\(\) before update\(\)"):
        optimiser.update()
    np.testing.assert_array_equal(layer.weight.data, before)
    assert not optimiser.moments["weight"][0].any()


def test_parameters_that_are_no_groups() -> None:
    """What one would write for PyTorch."""
    model = nn.Linear(2, 3)
    with pytest.raises(TypeError, match=r"AdamW: a group is a dict, as `decay_groups\(model\)` makes, got Parameter"):
        nn.AdamW(list(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"decay_groups: module must be a module of sscan\.nn, got int"):
        nn.decay_groups(5)  # type: ignore[arg-type]
