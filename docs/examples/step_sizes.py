"""Draw how the step sizes of a trained Mamba open and close, token by token, in a sequence of Selective Copying.

    sscan reproduce table1 --rows mamba-s6 --out runs/reproduce
    python docs/examples/step_sizes.py runs/reproduce/runs/table1-small-mamba-s6-noise-lr0.005-seed0 step_sizes.png

A step size says how much of a token enters the state, and how much of what was there leaves it (section 3.5 of the
paper): softplus of a projection of the token and its neighbours in the convolution.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sscan.nn import Mamba, MambaLM, no_grad, ops
from sscan.nn.autodiff import to_numpy
from sscan.nn.sequence_ops import causal_conv1d
from sscan.tasks.selective_copying import SelectiveCopying
from sscan.tasks.training import TrainingRun


@no_grad()
def step_sizes(model: MambaLM, ids: Any) -> list[Any]:
    """delta (batch, d_inner, length) of every block."""
    found, stream = [], model.backbone.embedding(ids)
    for block in model.backbone.layers:
        hidden = block.norm(stream)
        found.append(_of_block(block.mixer, hidden))
        stream = stream + block.mixer(hidden)
    return found


def _of_block(mixer: Mamba, hidden: Any) -> Any:
    x = mixer.in_proj.channel_first(hidden.swapaxes(1, 2))[:, : mixer.d_inner]
    taps = mixer.conv1d.weight.reshape(mixer.d_inner, mixer.d_conv)
    x, _ = causal_conv1d(x, taps, mixer.conv1d.bias, "silu", None, True)
    dt = mixer.x_proj.channel_first(x)[:, : mixer.dt_rank]
    delta = ops.matmul(mixer.dt_proj.weight, dt) + mixer.dt_proj.bias.reshape(-1, 1)
    return np.logaddexp(0, to_numpy(delta.data))


def draw(task: SelectiveCopying, model: MambaLM, path: Path) -> None:
    """One sequence: in every block the channels that open widest, as curves, and all of them, as rows of a picture."""
    ids, _ = task.sequences(np.random.default_rng(1), 1)
    symbols = np.flatnonzero((ids[0] > 0) & (ids[0] <= task.options.symbols))
    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for i, delta in enumerate(step_sizes(model, ids)):
        order = np.argsort(delta[0].max(axis=1) / np.median(delta[0], axis=1))[::-1]
        curves, rows = panels[0][i], panels[1][i]
        for place in symbols:
            curves.axvline(place, color="0.8")
        curves.axvspan(task.options.memorised, ids.size, color="0.9")
        curves.plot(delta[0][order[:4]].T, linewidth=0.9)
        curves.set(title=f"block {i + 1}: delta of the channels that open widest", yscale="log")
        image = rows.imshow(np.log10(delta[0][order]), aspect="auto", interpolation="nearest")
        rows.set(title="log10 delta of every channel", xlabel="token")
        figure.colorbar(image, ax=rows)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    folder, picture = map(Path, sys.argv[1:])
    run = TrainingRun.load(folder, SelectiveCopying)
    draw(run.task, run.model, picture)
