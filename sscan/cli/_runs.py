"""The run that ``sscan train`` makes or continues: its task, its data and its folder."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sscan.cli._devices import array_module
from sscan.cli._failures import Mistake
from sscan.tasks._lock import alone_in

if TYPE_CHECKING:
    import argparse
    from contextlib import ExitStack

    from sscan.tasks.training import TrainingRun


def open_run(options: argparse.Namespace, claims: ExitStack) -> tuple[TrainingRun[Any], Path]:
    """The run to continue, or a new one, and its folder, which nobody else gets until the end of `claims`."""
    from sscan.tasks.training import TrainingRun

    task, data = _task_and_data(options)
    given = {f.name: getattr(options, f.name, None) for f in dataclasses.fields(task.Options)}
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in given.items() if x is not None}
    xp = array_module(options.device)
    if "minutes" in given:
        given["steps"] = None
    if options.resume is not None:
        if options.out is not None:
            raise Mistake("--out: a resumed run stays in the folder of --resume")
        if options.resume.is_dir():
            _claim(options.resume, claims)
        run = TrainingRun.load(options.resume, task, xp, given, **data)
        return run, _prepared(options.resume)
    files, *_ = data.values()
    if not files:
        raise Mistake(f"{task.name}: files to train on must be named")
    run = TrainingRun(task(task.Options(**given), **data), xp)
    folder = options.out or _new_folder((options.text or files)[0].resolve().stem)
    _check_free(folder)
    _claim(folder, claims)
    _check_free(folder)  # again: another command may have come to its end in between
    return run, _prepared(folder)


def _task_and_data(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The task that was named, and what it is given beside options, files first."""
    from sscan.models.pretrained import open_model
    from sscan.models.tokens import tokenizer_file
    from sscan.tasks.audio import Audio
    from sscan.tasks.dna import DNA, TRANSFORMER
    from sscan.tasks.recordings import SUFFIXES
    from sscan.tasks.species import Species
    from sscan.tasks.text import Text, text_files

    new = options.resume is None
    if options.task is None:
        texts = None if options.text is None else text_files(options.text)
        tokenizer = None if options.tokenizer is None else tokenizer_file(options.tokenizer)
        return Text, {"texts": texts or ([default_text()] if new else None), "tokenizer": tokenizer}
    for name in ("text", "tokenizer"):
        if getattr(options, name) is not None:
            raise Mistake(f"--{name}: {options.task} is of no text")
    if options.task == "dna":
        options.layers = TRANSFORMER if getattr(options, "model", None) == "transformer" else None
        return DNA, {"fasta": options.fasta}
    if options.task == "audio":
        return Audio, {"recordings": text_files(options.recordings, SUFFIXES), "rate": getattr(options, "rate", None)}
    pretrained = getattr(options, "pretrained", None)
    if pretrained is None:
        return Species, {"maf": options.maf}
    if not new:
        raise Mistake("--from: a resumed run has its model")
    with open_model(pretrained) as (config, _):
        options.d_model, options.n_layer = options.d_model or config.d_model, options.n_layer or config.n_layer
    return Species, {"maf": options.maf, "pretrained": Path(pretrained)}


def _check_free(folder: Path) -> None:
    """Mistake if there is anything in a folder that a new run would write over, or that would pass for its own."""
    from sscan.models.pretrained import CONFIG, WEIGHTS
    from sscan.tasks.loop import BEST_FOLDER, LOG_FILE
    from sscan.tasks.training import STATE_FILE

    if (folder / STATE_FILE).exists():
        raise Mistake(f"{folder} holds a run already; continue it with --resume {folder}, or name another folder")
    there = [name for name in (CONFIG, WEIGHTS, LOG_FILE, BEST_FOLDER) if (folder / name).exists()]
    if there:
        raise Mistake(f"{folder} holds {', '.join(there)} of something else; remove that, or name another folder")


def _claim(folder: Path, claims: ExitStack) -> None:
    """Keep other commands out of a folder, which is made and then can be written to."""
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    try:
        claims.enter_context(alone_in(folder))
    except BlockingIOError as error:
        raise Mistake(f"{folder}: {error}") from error


def _prepared(folder: Path) -> Path:
    """The folder, without what a run that was killed left there."""
    from sscan.models.files import remove_leftovers
    from sscan.tasks.loop import BEST_FOLDER

    remove_leftovers(folder)
    remove_leftovers(folder / BEST_FOLDER)
    return folder


def default_text() -> Path:
    """A real English text that every CPython carries: the language reference behind help()."""
    from pydoc_data import topics

    return Path(topics.__file__)


def _new_folder(name: str) -> Path:
    numbers = (i for i in range(1, sys.maxsize) if not Path("runs", f"{name}-{i}").exists())
    return Path("runs", f"{name}-{next(numbers)}")
