"""sscan.nn and ``sscan train`` on a GPU: what runs on the stand-in and in mixed precision on NumPy, on CuPy."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cupy
import cupyx
import ml_dtypes
import numpy as np
import pytest
import test_nn_devices
import test_nn_precision
import test_tasks
from test_nn_devices import Device, train
from test_nn_precision import BFLOAT16, EPS, SMALL, distance, ids, model_in

from sscan import nn
from sscan.cli import main
from sscan.models.files import load_arrays
from sscan.nn import MambaLM, ops
from sscan.tasks.task import RunOptions
from sscan.tasks.text import Text
from sscan.tasks.training import TrainingRun

if TYPE_CHECKING:
    from collections.abc import Iterator

PRECISIONS = pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
TINY = ["--d-model", "16", "--n-layer", "1", "--length", "32", "--batch", "4"]

# The tests of these files are tests here, too, with these fixtures in the place of theirs.
for module in (test_nn_devices, test_nn_precision, test_tasks):
    globals().update({name: value for name, value in vars(module).items() if name.startswith("test_")})


@contextlib.contextmanager
def no_reads() -> Iterator[None]:
    """Any value that comes to the host raises."""
    with warnings.catch_warnings():
        # It warns that it does not find every wait; what it finds is a failure all the same.
        warnings.filterwarnings("ignore", "cupyx.allow_synchronize", UserWarning)
        with cupyx.allow_synchronize(False):
            yield


@pytest.fixture
def device() -> Device:
    """CuPy. Sums of up to a few hundred terms in another order differ by as many roundings, rarely."""
    return Device(cupy, 500, no_reads)


@pytest.fixture
def xp() -> Any:
    return cupy


@PRECISIONS
def test_training_is_reproducible_bit_for_bit(dtype: Any) -> None:
    runs = []
    for _ in range(2):
        model = model_in(cupy, dtype)
        losses, optimiser = train(model, 30, cupy)
        assert float(losses[-1]) < 0.5 * float(losses[0])
        arrays = {name: cupy.asnumpy(array) for name, array in (model.state_dict() | optimiser.state_dict()).items()}
        runs.append((np.array([float(loss) for loss in losses]), arrays))
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    for name, array in runs[0][1].items():
        np.testing.assert_array_equal(array, runs[1][1][name], err_msg=name)


def test_mixed_precision_agrees_with_numpy() -> None:
    host, there = model_in(np, BFLOAT16), model_in(cupy, BFLOAT16)
    losses = [model.loss(ids(4, 33), ids(4, 33, seed=1)) for model in (host, there)]
    for loss in losses:
        loss.backward()
    assert abs(losses[0].item() - losses[1].item()) < EPS / 4 * losses[0].item()
    for (name, expected), got in zip(host.named_parameters(), there.parameters(), strict=True):
        assert distance(got.grad, expected.grad) < 4 * EPS, name


def test_embedding_gradient_of_many_tokens() -> None:
    rng = np.random.default_rng(0)
    indices, g = rng.integers(0, 256, (16, 1024)), rng.standard_normal((16, 1024, 64)).astype(np.float32)
    indices[:, :300] = 7  # one token that is much more frequent than the others
    expected = np.zeros((300, 64))
    np.add.at(expected, indices.reshape(-1), g.reshape(-1, 64).astype(np.float64))
    gradients = []
    for _ in range(2):
        weight = nn.Tensor(cupy.zeros((300, 64), np.float32), requires_grad=True)
        ops.embedding(weight, cupy.asarray(indices)).backward(cupy.asarray(g))
        gradients.append(cupy.asnumpy(weight.grad))
    np.testing.assert_array_equal(gradients[0], gradients[1])
    assert np.abs(gradients[0] - expected).max() < 1e-5 * np.abs(expected).max()


def test_half_precision_models() -> None:
    for dtype in (np.float16, ml_dtypes.bfloat16):
        host, there = MambaLM(SMALL, dtype), MambaLM(SMALL, dtype)
        there.to(cupy)
        expected, got = host(ids(2, 9)).data.astype(np.float64), cupy.asnumpy(there(ids(2, 9)).data).astype(np.float64)
        assert np.abs(got - expected).max() < 8 * float(ml_dtypes.finfo(dtype).eps) * np.abs(expected).max()
        there.loss(ids(2, 9), ids(2, 9)).backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in there.parameters())


# The command


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "poem.txt"
    path.write_text("the rain it raineth every day, and the wind and the rain.\n" * 60, encoding="utf-8")
    return path


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_train_from_start_to_end(
    precision: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    command = ["train", "--text", str(text), "--steps", "30", "--device", "cuda", "--precision", precision, *TINY]
    for folder in folders:
        assert main([*command, "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"device      cuda, {precision}" in out
    assert "held out    Mamba" in out
    runs = [load_arrays(folder / "training.safetensors")[0] for folder in folders]
    for name, array in runs[0].items():
        np.testing.assert_array_equal(array, runs[1][name], err_msg=name)
    assert runs[0]["losses"][-1] < 0.7 * runs[0]["losses"][0]
    on_host = TrainingRun(Text(RunOptions(16, 1, 32, 4, steps=30, precision=precision), [text]))
    while on_host.progress < 1:
        on_host.step()
    np.testing.assert_allclose(runs[0]["losses"], on_host.losses, rtol=0.02 if precision == "float32" else 0.1)


def test_runs_change_devices(text: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    assert main(["train", "--text", str(text), "--out", folder, "--steps", "4", "--device", "cuda", *TINY]) == 0
    assert main(["train", "--resume", folder, "--steps", "8"]) == 0
    assert main(["train", "--resume", folder, "--steps", "12", "--device", "cuda"]) == 0
    assert len(TrainingRun.load(Path(folder), Text).losses) == 12
    run = TrainingRun.load(Path(folder), Text, cupy)
    assert all(isinstance(parameter.data, cupy.ndarray) for parameter in run.model.parameters())
    assert isinstance(MambaLM.from_pretrained(folder).lm_head.weight.data, np.ndarray)
    assert main(["generate", folder, "-n", "20"]) == 0


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "GPU 0: NVIDIA" in capsys.readouterr().out
