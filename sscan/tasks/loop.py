"""The loop that trains any task: progress, evaluations, log and checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from sscan.tasks.log import Log
from sscan.tasks.progress import Phase, facts_of

if TYPE_CHECKING:
    from collections.abc import Sized
    from pathlib import Path

    from sscan.tasks.training import TrainingRun

LOG_FILE, BEST_FOLDER = "log.jsonl", "best"
SECONDS_BETWEEN_CHECKPOINTS = 60.0


def train(run: TrainingRun[Any], folder: Path, stream: TextIO, stop: Sized = ()) -> None:
    """Train until the run is done, or until there is something in `stop`, and save it, now and then and at the end.

    Beside the checkpoint, the folder gets a log (:class:`sscan.tasks.log.Log`) with a line at every start and for every
    evaluation, and in a folder of its own the model that did best in these.

    Parameters
    ----------
    run : TrainingRun
    folder : Path
        Made if it is not there.
    stream : text stream
        For progress.
    stop : sized
        As a list that a signal handler appends to.

    Raises
    ------
    FloatingPointError
        As :meth:`sscan.tasks.training.TrainingRun.step`, `evaluate` and `save`.
    OSError
        If something cannot be written; an older checkpoint stays whole.
    """
    saved = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder / LOG_FILE, len(run.losses))
    log.append({
        "step": len(run.losses), "task": run.task.name, "options": dataclasses.asdict(run.options),
        "files": list(map(_named, run.task.files)),
    })  # fmt: skip
    with Phase("training", stream, facts_of(run), stays=True) as phase:
        while not run.done and not len(stop):
            due = int(run.progress * run.options.evaluations)
            run.step()
            phase(run.progress)
            if int(run.progress * run.options.evaluations) > due:
                with phase.titled("evaluating"):
                    _evaluate(run, folder, log)
            if time.monotonic() - saved >= SECONDS_BETWEEN_CHECKPOINTS:
                run.save(folder)
                saved = time.monotonic()
        run.save(folder)


def _named(file: Path) -> dict[str, Any]:
    """A file as it can be known again."""
    with file.open("rb") as content:
        digest = hashlib.sha256()
        while part := content.read(1 << 20):
            digest.update(part)
    return {"name": str(file.resolve()), "bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _evaluate(run: TrainingRun[Any], folder: Path, log: Log) -> None:
    before = run.measures[-1][0] if run.measures else 0
    found, step = run.evaluate(), len(run.losses)
    if run.best is not None and run.best[0] == step:
        run.save_best(folder / BEST_FOLDER)
    log.append({
        "step": step, "seconds": round(run.seconds, 3), "lr": run.optimiser.lr,
        "loss": float(np.mean(run.losses[before:])), "held_out": found,
    })  # fmt: skip
