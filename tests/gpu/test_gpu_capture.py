"""A training step as one CUDA graph: the same bits as without, and nothing of the host is forgotten."""

from __future__ import annotations

import weakref
from typing import Any

import cupy
import ml_dtypes
import numpy as np
import pytest
from nn_cases import EVERY

from sscan import nn
from sscan.nn import MambaConfig, MambaLM


def batch(step: int, rows: int = 3, length: int = 40) -> tuple[Any, Any]:
    ids = cupy.asarray(np.random.default_rng(step).integers(0, 60, (rows, length + 1)).astype(np.int32))
    return ids[:, :-1].copy(), ids[:, 1:].copy()


def trained(steps: int, graph: bool, dtype: Any) -> tuple[list[float], dict[str, Any]]:
    model = MambaLM(MambaConfig(32, 2, vocab_size=60), seed=0, activation_dtype=dtype)
    model.to(cupy)
    optimiser = nn.AdamW(nn.decay_groups(model))

    def step(inputs: Any, targets: Any) -> Any:
        model.zero_grad()
        loss = model.loss(inputs, targets)
        loss.backward()
        norm = nn.clip_gradients(model.parameters(), 0.7)
        optimiser.update(loss)
        return loss.data, norm

    step = nn.capture(step) if graph else step
    found = []
    for number in range(steps):
        optimiser.lr = 1e-2 / (1 + number)
        optimiser.advance()
        loss, norm = step(*batch(number))
        found += [float(loss), float(norm)]
    arrays = model.state_dict() | optimiser.state_dict()
    return found, {name: cupy.asnumpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_captured_step_has_the_same_bits(dtype: Any) -> None:
    (expected, arrays), (found, others) = (trained(9, graph, dtype) for graph in (False, True))
    assert found == expected
    assert found[-2] < found[0]
    for name, array in arrays.items():
        np.testing.assert_array_equal(others[name], array, err_msg=name)


@pytest.mark.parametrize("layer", EVERY, ids=lambda layer: layer if isinstance(layer, str) else layer["layer"])
def test_a_captured_step_of_any_layer_has_the_same_bits(layer: Any) -> None:
    """With dropout: every launch of the graph draws anew, and what it draws is what the plain step would."""
    ends = []
    for graph in (False, True):
        model = nn.SequenceModel(nn.SequenceConfig(8, 60, (layer,), dropout=0.2))
        model.to(cupy)
        optimiser = nn.AdamW(nn.decay_groups(model))

        def step(inputs: Any, targets: Any, model: Any = model, optimiser: Any = optimiser) -> Any:
            model.zero_grad()
            loss = model.loss(inputs, targets)
            loss.backward()
            optimiser.update(loss)
            return loss.data

        run = nn.capture(step) if graph else step
        losses = []
        for number in range(7):
            optimiser.advance()
            losses.append(float(run(*batch(number))))
            for length in range(100, 140):  # and CuPy forgets the plans of FFTs that the step has used
                cupy.fft.rfft(cupy.ones(length))
        ends.append((losses, {name: cupy.asnumpy(array) for name, array in model.state_dict().items()}))
    assert ends[0][0] == ends[1][0]
    for name, array in ends[0][1].items():
        np.testing.assert_array_equal(ends[1][1][name], array, err_msg=name)


def test_other_shapes_and_dtypes_begin_anew() -> None:
    calls: list[tuple[Any, Any]] = []

    @nn.capture
    def double(x: Any) -> Any:
        calls.append((x.shape, x.dtype))
        return x * 2

    for kind in (cupy.arange(3), cupy.arange(4), cupy.arange(4.0), cupy.arange(3)):
        calls.clear()
        for number in range(4):
            assert double(kind + number).tolist() == (2 * (kind + number)).tolist()
        assert calls == 2 * [(kind.shape, kind.dtype)], "once as it is, once to record it"


def test_a_graph_that_was_replaced_leaves_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the GPU has left would say so too, but other processes take of it."""
    pools: weakref.WeakSet[Any] = weakref.WeakSet()

    class Pool(cupy.cuda.MemoryPool):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            pools.add(self)

    monkeypatch.setattr(cupy.cuda, "MemoryPool", Pool)
    keep = nn.capture(lambda x: cupy.ones(1 << 26, np.uint8)[: x.size] + x)
    sizes = []
    for length in range(4, 12):
        for _ in range(3):
            keep(cupy.zeros(length, np.uint8))
        sizes.append(sum(pool.total_bytes() for pool in pools))
    assert sizes[0] >= 1 << 26
    assert sizes == sizes[:1] * len(sizes)


def test_arguments_and_state_are_those_of_the_call() -> None:
    total = cupy.zeros(4)

    @nn.capture
    def add(x: Any) -> Any:
        total[...] += x
        return total * 2

    for number in range(1, 5):
        assert add(cupy.full(4, float(number))).tolist() == [float(number * (number + 1))] * 4
    assert total.tolist() == [10.0] * 4


def test_an_error_while_recording_is_the_functions_own() -> None:
    calls: list[int] = []

    @nn.capture
    def fails_later(x: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("mine")
        return x + 1

    fails_later(cupy.arange(2))
    with pytest.raises(KeyError, match="mine"):
        fails_later(cupy.arange(2))
    assert fails_later(cupy.arange(2)).tolist() == [1, 2], "the stream records no more"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_changes_nothing(bad: float) -> None:
    model = nn.Linear(3, 2)
    model.initialise(0)
    model.to(cupy)
    optimiser = nn.AdamW(nn.decay_groups(model))
    before = {name: array.copy() for name, array in (model.state_dict()).items()}
    for parameter in model.parameters():
        parameter.grad = cupy.full_like(parameter.data, bad)
    nn.clip_gradients(model.parameters())
    optimiser.advance()
    optimiser.update(nn.Tensor(cupy.float32(bad).reshape(())))
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array.get(), before[name].get())
