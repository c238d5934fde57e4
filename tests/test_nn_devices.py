"""sscan.nn on arrays that are not NumPy's: the stand-in of device_double here, CuPy in tests/gpu/test_nn.py."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import device_double
import ml_dtypes
import numpy as np
import pytest
from nn_cases import CASES, EVERY, HOST_CONSTANTS, tensor

from sscan import nn
from sscan.models.files import load_arrays, save_arrays
from sscan.nn import MambaConfig, MambaLM, SequenceConfig, SequenceModel, Tensor, ops
from sscan.nn.autodiff import to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SMALL = MambaConfig(d_model=12, n_layer=2, vocab_size=11, ssm_cfg={"d_state": 4, "bias": True})


class Device(NamedTuple):
    """An array module, how far its results may be from NumPy's, and a context in which no value may be read."""

    xp: Any
    roundings: float
    without_reads: Callable[[], Any]

    def check(self, got: Any, expected: Any, name: str = "") -> None:
        assert isinstance(got, self.xp.ndarray), name
        assert got.dtype == expected.dtype, name
        if not expected.size:
            return
        error = np.abs(to_numpy(got).astype(np.float64) - expected.astype(np.float64)).max()
        bound = self.roundings * float(ml_dtypes.finfo(expected.dtype).eps) * np.abs(expected.astype(np.float64)).max()
        assert error <= bound, f"{name}: off by {error:.2e}, allowed {bound:.2e}"


@contextlib.contextmanager
def _no_reads() -> Iterator[None]:
    before = device_double.reads
    yield
    assert device_double.reads == before


@pytest.fixture
def device() -> Device:
    return Device(device_double, 0, _no_reads)


def ids(batch: int, length: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 11, (batch, length))


def twins(device: Device, *arguments: Any, **options: Any) -> tuple[MambaLM, MambaLM]:
    """The same model on NumPy and on the device."""
    host, there = MambaLM(*arguments, **options), MambaLM(*arguments, **options)
    there.to(device.xp)
    return host, there


# Operations


@pytest.mark.parametrize("case", [case for case in CASES if case not in HOST_CONSTANTS])
def test_array_operation_gradients(device: Device, case: str) -> None:
    function, shapes = CASES[case]
    host = [tensor(*shape, seed=i) for i, shape in enumerate(shapes)]
    there = [Tensor(device.xp.asarray(t.data), requires_grad=True) for t in host]
    outputs = []
    for inputs in (host, there):
        results = function(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        for i, result in enumerate(results):
            g = np.random.default_rng(i).standard_normal(result.shape)
            result.backward(g if inputs is host else device.xp.asarray(g), retain_graph=True)
        outputs.append(results)
    for expected, got in zip(*outputs, strict=True):
        device.check(got.data, expected.data)
    for expected, got in zip(host, there, strict=True):
        device.check(got.grad, expected.grad)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "shapes", [((5, 40), (40, 6)), ((5, 40), (2, 40, 3)), ((2, 4, 40), (40, 5)), ((2, 1, 4, 40), (3, 40, 5))]
)
def test_products_in_half_precision(device: Device, dtype: Any, shapes: Any) -> None:
    host = [tensor(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    there = [Tensor(device.xp.asarray(t.data), requires_grad=True) for t in host]
    expected, got = ops.matmul(*host), ops.matmul(*there)
    g = np.random.default_rng(0).standard_normal(expected.shape).astype(dtype)
    expected.backward(g)
    got.backward(device.xp.asarray(g))
    rounded = device._replace(roundings=2)
    rounded.check(got.data, expected.data)
    for a, b in zip(host, there, strict=True):
        rounded.check(b.grad, a.grad)


@pytest.mark.parametrize("classes", [4, 300])
def test_losses(device: Device, classes: int) -> None:
    targets = np.random.default_rng(0).integers(0, classes, (2, 50))
    targets[0, :7] = -100
    for loss, shapes in [(nn.cross_entropy, [(2, 50, classes)]), (nn.linear_cross_entropy, [(2, 50, 8), (classes, 8)])]:
        host = [tensor(*shape) for shape in shapes]
        there = [Tensor(device.xp.asarray(t.data), requires_grad=True) for t in host]
        expected = loss(*host, targets)
        expected.backward()
        for where in (np, device.xp):  # targets may lie on either side
            for t in there:
                t.grad = None
            got = loss(*there, where.asarray(targets))
            got.backward()
            device.check(got.data, np.asarray(expected.data))
            for a, b in zip(host, there, strict=True):
                device.check(b.grad, a.grad)


def test_indices_in_host_memory_are_checked_wherever_the_weights_are(device: Device) -> None:
    model = MambaLM(SMALL)
    model.to(device.xp)
    with pytest.raises(ValueError, match=r"embedding: indices must be in \[0, 16\)"):
        model(ids(1, 3) + 16)
    with pytest.raises(ValueError, match=r"targets must be in \[0, 16\)"):
        model.loss(ids(1, 3), ids(1, 3) + 16)


# Models


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_language_model(device: Device, dtype: Any) -> None:
    host, there = twins(device, SMALL, dtype, seed=3)
    for name, parameter in host.named_parameters():
        np.testing.assert_array_equal(to_numpy(there.state_dict()[name]), parameter.data)
    device.check(there(ids(2, 9)).data, host(ids(2, 9)).data)
    seq_idx = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 2)
    for model in (host, there):
        loss = model.loss(ids(2, 9), ids(2, 9, seed=1))
        loss.backward()
        (model(ids(2, 9), seq_idx) ** 2).mean().backward()
    for (name, expected), got in zip(host.named_parameters(), there.parameters(), strict=True):
        device.check(got.grad, expected.grad, name)


UNET = {"layer": "unet", "blocks": 1, "pool": [3, 3]}


@pytest.mark.parametrize("layer", [*EVERY, UNET], ids=lambda layer: layer if isinstance(layer, str) else layer["layer"])
def test_layers(device: Device, layer: Any) -> None:
    config = SequenceConfig(8, 11, (layer,), norm="layer", positions="absolute", dropout=0.2)
    host, there = SequenceModel(config, np.float64), SequenceModel(config, np.float64)
    there.to(device.xp)
    x, y = ids(2, 9), ids(2, 9, seed=1)
    there_x, there_y = device.xp.asarray(x), device.xp.asarray(y)
    for reads in (contextlib.nullcontext, device.without_reads):  # the first call compiles kernels
        host.zero_grad()
        there.zero_grad()
        expected = host.loss(x, y)
        expected.backward()
        with reads():
            got = there.loss(there_x, there_y)
            got.backward()
    device.check(got.data, np.asarray(expected.data))
    for (name, parameter), other in zip(host.named_parameters(), there.parameters(), strict=True):
        device.check(other.grad, parameter.grad, name)


def train(model: MambaLM, steps: int, xp: Any = np) -> tuple[list[Any], nn.AdamW]:
    """Losses and optimiser of some steps on tokens that are arrays of `xp`."""
    optimiser = nn.AdamW(nn.decay_groups(model), lr=1e-2)
    tokens = xp.asarray(np.arange(66).reshape(2, 33) % 7)
    losses = []
    for _ in range(steps):
        model.zero_grad()
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.clip_gradients(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.data)
    return losses, optimiser


def test_training_is_the_same_and_waits_for_no_value(device: Device) -> None:
    host, there = twins(device, SMALL)
    train(there, 1, device.xp)  # compiles the kernels
    there.initialise(0)
    expected, _ = train(host, 30)
    with device.without_reads():
        losses, _ = train(there, 30, device.xp)
    got = [float(loss) for loss in losses]
    # Rounding differences grow from step to step.
    np.testing.assert_allclose(got, [float(e) for e in expected], rtol=0.02 if device.roundings else 0)
    assert got[-1] < 0.3 * got[0]


def test_checkpoints_move_between_devices(device: Device, tmp_path: Path) -> None:
    there = MambaLM(SMALL, seed=1)
    there.to(device.xp)
    _, optimiser = train(there, 2)
    there.save_pretrained(tmp_path)
    host = MambaLM.from_pretrained(tmp_path)
    save_arrays(tmp_path / "optimiser", optimiser.state_dict())
    moments = load_arrays(tmp_path / "optimiser")[0]
    for name, parameter in there.named_parameters():
        assert isinstance(parameter.data, device.xp.ndarray)
        np.testing.assert_array_equal(host.state_dict()[name], to_numpy(parameter.data))

    again = MambaLM(SMALL, seed=None)
    again.to(device.xp)
    again.load_state_dict(host.state_dict())  # from the host to the device
    resumed = nn.AdamW(nn.decay_groups(again))
    resumed.load_state_dict(moments)
    for name, array in optimiser.state_dict().items():
        np.testing.assert_array_equal(to_numpy(resumed.state_dict()[name]), to_numpy(array))
    host.load_state_dict(again.state_dict())  # and back
    again.to(np)
    for name, array in host.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], array)


def test_generation(device: Device) -> None:
    host, there = twins(device, SMALL, seed=2)
    prompts, count, k = ids(2, 4), 12, 4
    greedy = [[new.tolist() for new in model.generate(prompts, count, 0.0)] for model in (host, there)]
    assert greedy[0] == greedy[1]
    # A GPU draws other tokens with the same seed, and always the same ones.
    drawn = [there.generate(prompts, count, seed=5, top_k=k) for _ in range(2)]
    np.testing.assert_array_equal(*drawn)
    read = np.hstack([prompts, drawn[0]])[:, :-1]
    logits = host(read).data[:, -count:, : SMALL.vocab_size]
    better = (logits > np.take_along_axis(logits, np.array(drawn[0])[..., None], 2)).sum(2)
    assert better.max() < k
    assert len(np.unique(better)) == k, "each of them is drawn now and then"
