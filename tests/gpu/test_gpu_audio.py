"""The U-Net on a GPU: what it computes, its steps and its training, captured as a graph, are those of the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cupy
import numpy as np
import pytest
import soundfile
from test_audio import RATE, tone
from test_nn_unet import LAYERS, ids, model_of

from sscan.tasks.audio import BLOCKS, Audio, AudioOptions
from sscan.tasks.training import TrainingRun

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("kind", LAYERS)
def test_forward_pieces_and_steps_are_those_of_the_cpu(kind: str) -> None:
    model, x = model_of(kind, np.float32), ids(2, 48)
    expected = model(x).data
    model.to(cupy)

    def check(logits: Any, where: Any) -> None:
        np.testing.assert_allclose(cupy.asnumpy(logits), expected[:, where], rtol=1e-3, atol=1e-4)

    check(model(cupy.asarray(x)).data, slice(None))
    for offset in range(16):
        logits, states = model.extend(cupy.asarray(x[:, :offset]), model.new_states(2))
        check(logits.data, slice(0, offset))
        for t in range(offset, offset + 16):
            check(model.step(cupy.asarray(x[:, t]), states), t)


@pytest.mark.parametrize("block", BLOCKS)
def test_graphs_train_as_plain_calls_do(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "a.wav", tone(2.0), RATE)
    options = AudioOptions(d_model=8, length=64, batch=4, steps=20, lr=1e-2, block=block)
    losses = []
    for graphs in (False, True):
        run: TrainingRun[Any] = TrainingRun(Audio(options, [tmp_path / "a.wav"]), cupy)
        if not graphs:
            monkeypatch.setattr(run, "_captured", run._update)
        while not run.done:
            run.step()
        losses.append(run.losses)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
