"""DNA on a GPU: lengths that rise are graphs in turn, with the steps of plain calls; scores are those of the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cupy
import numpy as np
from test_dna import letters, new_model, options, write_fasta

from sscan.tasks import dna
from sscan.tasks.dna import DNA
from sscan.tasks.scoring import log_likelihoods
from sscan.tasks.sequences import BASES
from sscan.tasks.training import TrainingRun

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_stages_are_graphs_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dna, "FIRST_LENGTH", 64)
    path = write_fasta(tmp_path / "x.fa", a=letters(6000, 8))
    made = options(length=256, batch=2, length_warmup=0.5, steps=20, lr=1e-2)
    losses = []
    for graphs in (False, True):
        run: TrainingRun[Any] = TrainingRun(DNA(made, [path]), cupy)
        assert len(run.task.stages) == 3
        assert run.task.stages[-1][1] < 18
        if not graphs:
            monkeypatch.setattr(run, "_captured", run._update)
        while not run.done:
            run.step()
        losses.append(run.losses)
    assert losses[0] == losses[1]


def test_scores_are_those_of_the_cpu() -> None:
    model, tokens = new_model(), BASES.tokens((letters(400, 9) + "NNR").encode())
    expected = np.concatenate(list(log_likelihoods(model, tokens)))
    model.to(cupy)
    np.testing.assert_allclose(np.concatenate(list(log_likelihoods(model, tokens))), expected, rtol=1e-3, atol=1e-4)
