"""Section 3.5 of the paper on layers of sscan.nn: gated RNN, reset and filter, and what LTI layers cannot do."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sscan.nn import S4D, S6, Tensor
from sscan.nn.sequence_ops import selective_scan
from sscan.tasks.selective_copying import SelectiveCopying, SelectiveCopyingOptions

DIM, LENGTH = 3, 40
EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "step_sizes.py"


def gated_rnn(discretization: str = "zoh") -> S6:
    """The S6 of Theorem 1: N = 1, A = -1, B = C = 1, no D; its step size is softplus(Linear(u))."""
    layer = S6(DIM, 1, DIM, selective=["delta"], discretization=discretization, dtype=np.float64, seed=3)
    for matrix, value in ((layer.A.log, 0.0), (layer.B.real, 1.0), (layer.C.real, 1.0), (layer.D, 0.0)):
        matrix.data[...] = value
    layer.dt_proj.weight.data[...] = np.random.default_rng(1).standard_normal((DIM, DIM))
    layer.dt_proj.bias.data[...] = [-1.0, 0.3, 0.5]
    return layer


def inputs(seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((2, DIM, LENGTH))


def gates(layer: S6, u: Any) -> Any:
    """sigmoid(Linear(u)), with the two projections as one matrix."""
    weight = layer.dt_proj.weight.data @ layer.x_proj.weight.data
    return 1 / (1 + np.exp(-(np.einsum("ij,bjt->bit", weight, u) + layer.dt_proj.bias.data[:, None])))


def recurrence(g: Any, write: Any, u: Any) -> Any:
    h, states = np.zeros(u.shape[:2]), []
    for t in range(u.shape[2]):
        h = (1 - g[:, :, t]) * h + write[:, :, t] * u[:, :, t]
        states.append(h)
    return np.stack(states, axis=2)


def test_the_gated_rnn_of_theorem_1() -> None:
    """h = (1 - g) h + g u under zero-order hold; Mamba's own rule writes softplus in the place of g."""
    layer, u = gated_rnn(), inputs()
    g = gates(layer, u)
    np.testing.assert_allclose(layer(Tensor(u)).data, recurrence(g, g, u), rtol=1e-12, atol=1e-13)
    mixed = gated_rnn("mamba")(Tensor(u)).data
    np.testing.assert_allclose(mixed, recurrence(g, -np.log1p(-g), u), rtol=1e-12, atol=1e-13)
    assert np.abs(mixed - recurrence(g, g, u)).max() > 0.1


def opened(layer: S6, u: Any, where: int, value: float) -> Any:
    """Inputs whose token at a place has all pre-activations of the step size at a value."""
    weight = layer.dt_proj.weight.data @ layer.x_proj.weight.data
    u = u.copy()
    u[:, :, where] = np.linalg.solve(weight, value - layer.dt_proj.bias.data)
    return u


def test_an_open_gate_is_a_border() -> None:
    """g = 1: what stands before the token makes no difference behind it, as if another sequence began there."""
    layer = gated_rnn()
    first, second = (opened(layer, inputs(seed), 10, 40.0) for seed in (0, 1))
    second[:, :, 10:] = first[:, :, 10:]
    y, other = (layer(Tensor(u)).data for u in (first, second))
    assert np.abs(y[:, :, :10] - other[:, :, :10]).max() > 0.1
    np.testing.assert_array_equal(y[:, :, 10:], other[:, :, 10:])
    np.testing.assert_allclose(layer(Tensor(first[:, :, 10:])).data, y[:, :, 10:], rtol=1e-12)


def test_a_closed_gate_filters_noise() -> None:
    """g = 0: with any number of such tokens in between, what is behind them is as if they were not there."""
    layer, u = gated_rnn(), inputs()
    noise = opened(layer, inputs(2), 0, -800.0)[:, :, :1]
    expected = layer(Tensor(u)).data
    for count in (1, 7):
        spaced = np.insert(u, [5] * count + [20], noise, axis=2)
        y = layer(Tensor(spaced)).data
        kept = np.delete(y, [*range(5, 5 + count), 20 + count], axis=2)
        np.testing.assert_allclose(kept, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("A", ["lin", "real"])
def test_time_invariant_layers_cannot(A: str) -> None:
    """The same experiments on S4D: what comes before leaks, and spacing changes the answer, for every token."""
    layer = S4D(DIM, 8, A=A, dtype=np.float64)
    u = inputs()
    changed = np.concatenate([inputs(1)[:, :, :10], u[:, :, 10:]], axis=2)
    y, leaked = layer(Tensor(u)).data, layer(Tensor(changed)).data
    assert np.abs(y - leaked)[:, :, 10:].max(axis=(0, 1)).min() > 1e-4
    spaced = np.delete(layer(Tensor(np.insert(u, [5] * 3, 0, axis=2))).data, [5, 6, 7], axis=2)
    assert np.abs(y - spaced)[:, :, 5:].max(axis=(0, 1)).min() > 1e-4


def test_the_step_sizes_that_the_example_draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are those with which the scan of each block is called."""
    spec = importlib.util.spec_from_file_location("step_sizes", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    called = []

    def scan(u: Any, delta: Any, *arguments: Any, **options: Any) -> Any:
        called.append(np.logaddexp(0, delta.data + arguments[5].data[:, None]))
        return selective_scan(u, delta, *arguments, **options)

    task = SelectiveCopying(SelectiveCopyingOptions(d_model=8, length=12, tokens=3))
    model: Any = task.new_model()
    for parameter in model.parameters():
        parameter.data *= 2
    monkeypatch.setattr("sscan.nn.mamba.selective_scan", scan)
    found = example.step_sizes(model, task.sequences(np.random.default_rng(0), 2)[0])
    assert len(found) == len(called) == 2
    for delta, expected in zip(found, called, strict=True):
        assert delta.std() > 1e-3
        np.testing.assert_allclose(delta, expected, rtol=1e-5)
    example.draw(task, model, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
