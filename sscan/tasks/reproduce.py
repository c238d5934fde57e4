"""The paper's tables from runs of their rows: which runs there are, and how many of them go on at once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import threading
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

import sscan
from sscan.models.files import content_of, read_object, remove_leftovers, write_atomically
from sscan.tasks._lock import alone_in
from sscan.tasks.loop import BEST_FOLDER, train
from sscan.tasks.progress import Phase
from sscan.tasks.training import STATE_FILE, Saved, TrainingRun

if TYPE_CHECKING:
    from collections.abc import Sequence, Sized
    from pathlib import Path

    from sscan.tasks.tables import Row, Table
    from sscan.tasks.task import RunOptions

RUNS_FOLDER = "runs"
RESULT = {"name", "table", "row", "scale", "generator", "options", "steps", "seconds", "finished", "measures"}


@dataclass(frozen=True)
class Job:
    """One run of a row.

    Attributes
    ----------
    table : Table
    row : Row
    scale, generator : str
        Those of the table, by name; the generator is empty where a table has none.
    options : RunOptions
        With the learning rate and the seed of this run.
    """

    table: Table
    row: Row
    scale: str
    generator: str
    options: RunOptions

    @property
    def name(self) -> str:
        """Of its files."""
        generator = f"-{self.generator}" if self.generator else ""
        options = self.options
        return f"{self.table.name}-{self.scale}-{self.row.name}{generator}-lr{options.lr:g}-seed{options.seed}"

    def given(self, texts: Sequence[Path]) -> dict[str, Any]:
        """What its task takes beside the options."""
        return {"texts": texts} if self.table.of_texts else {}

    def check(self, name: str, options: RunOptions | Mapping[str, Any]) -> None:
        """Whether a run of this row with these options can stand beside this one, or be it if it has its name.

        Raises
        ------
        ValueError
            If an option differs; of a run of another name the learning rate and the seed may.
        """
        before = options if isinstance(options, Mapping) else _as_json(options)
        for option, value in _as_json(self.options).items():
            if before.get(option) != value and (name == self.name or option not in ("lr", "seed")):
                raise ValueError(f"{name} has been run with {option} = {before.get(option)}, not {value}")

    def run(self, out: Path, array_module: Any, texts: Sequence[Path], stop: Sized, stream: TextIO) -> None:
        """Train and measure, from the checkpoint if there is one, until it is done or something is in `stop`.

        The result is a JSON file in `out`, which says whether it is finished; checkpoint and log are below it.
        """
        if len(stop):
            return
        folder = out / RUNS_FOLDER / self.name
        with alone_in(folder):
            with Phase("loading", stream):
                run = self._begin(folder, array_module, texts)
            if len(stop):  # to read the data may have taken long
                return
            with Phase("compiling kernels", stream):
                run.warm_up()
            train(run, folder, stream, stop)
            result = self._result(run, array_module)
            write_atomically(out / f"{self.name}.json", lambda new: new.write_text(json.dumps(result, indent=1) + "\n"))

    def _begin(self, folder: Path, array_module: Any, texts: Sequence[Path]) -> TrainingRun[Any]:
        """A new run, or the one of the checkpoint."""
        task, given, checkpoint = self.table.task, self.given(texts), folder / STATE_FILE
        if not checkpoint.exists():
            return TrainingRun(task(self.options, **given), array_module)
        remove_leftovers(folder)
        remove_leftovers(folder / BEST_FOLDER)
        self.check(self.name, Saved.read(checkpoint, task).options)
        return TrainingRun.load(folder, task, array_module, **given)

    def _result(self, run: TrainingRun[Any], array_module: Any) -> dict[str, Any]:
        steps = [0, *(step for step, _ in run.measures)]
        losses = [float(np.mean(run.losses[a:b])) for a, b in zip(steps, steps[1:], strict=False)]
        return {
            "name": self.name, "table": self.table.name, "row": self.row.name, "scale": self.scale,
            "generator": self.generator, "options": dataclasses.asdict(self.options),
            "parameters": run.model.parameter_count(), "steps": len(run.losses), "seconds": round(run.seconds, 1),
            "device": device_name(array_module), "versions": versions(), "finished": run.done,
            "measures": run.task.final(run.model) if run.done else {},
            **({"sha256": run.task.about()["sha256"]} if self.table.of_texts else {}),
            "curve": [
                {"step": step, "loss": loss, run.task.goal: goal}
                for (step, goal), loss in zip(run.measures, losses, strict=True)
            ],
        }  # fmt: skip


def jobs(
    table: Table, scale: str, rows: Sequence[str], generators: Sequence[str], rates: Sequence[float],
    seeds: Sequence[int], changes: Mapping[str, Any],
) -> list[Job]:  # fmt: skip
    """The runs that are asked for: all first rows first, each at every rate, for every seed and generator.

    Without rows, generators or rates those are all rows, the first generator and the row's own rate.

    Raises
    ------
    ValueError
        If the table has no such row, scale or generator, or an option is none.
    """
    chosen = [table.row(name) for name in rows] or list(table.rows)
    made = (
        Job(table, row, scale, generator, table.options(row, scale, generator, seed=seed, **rate, **changes))
        for row in chosen
        for generator in generators or list(table.generators)[:1]
        for rate in [{"lr": rate} for rate in rates] or [{}]
        for seed in seeds
    )
    return list({job.name: job for job in made}.values())  # what is asked for twice is done once


def results(out: Path, table: Table, scale: str) -> list[dict[str, Any]]:
    """What runs of a table have come to so far.

    Raises
    ------
    OSError, ValueError
        If a file cannot be read, or is none of :meth:`Job.run`; the message names it.
    """
    found = []
    for path in sorted(out.glob(f"{table.name}-{scale}-*.json")):
        result = read_object(path)
        if result.get("table") != table.name or not result.keys() >= RESULT:
            raise ValueError(f"{path} is no result of {table.name}")
        with content_of(path):
            table.row(result["row"])
            measures = result["measures"]
            if bool(measures) != result["finished"] or not measures.keys() <= table.headings.keys():
                raise ValueError(f"measures must be of {', '.join(table.headings)}, got {measures}")
        found.append(result)
    return found


def finished(out: Path, table: Table, scale: str) -> set[str]:
    """The names of those runs of a table that are; raises as :func:`results`."""
    return {result["name"] for result in results(out, table, scale) if result["finished"]}


def to_do(wanted: Sequence[Job], out: Path, texts: Sequence[Path]) -> list[Job]:
    """The jobs of one table that are not finished.

    Raises
    ------
    OSError
        If a file cannot be read.
    ValueError
        If what a table would show together does not belong together: runs of one row with other options than learning
        rate and seed, or runs on another text; also of those that are not finished.
    """
    table, scale = wanted[0].table, wanted[0].scale
    found = results(out, table, scale)
    before = [(result["name"], result.get("sha256")) for result in found]
    for job in wanted:
        for result in found:
            if (result["row"], result["generator"]) == (job.row.name, job.generator):
                job.check(result["name"], result["options"])
        checkpoint = out / RUNS_FOLDER / job.name / STATE_FILE
        if checkpoint.exists():
            saved = Saved.read(checkpoint, table.task)
            job.check(job.name, saved.options)
            before.append((job.name, saved.about.get("sha256")))
    if table.of_texts:
        sha256 = table.task(wanted[0].options, **wanted[0].given(texts)).about()["sha256"]
        for name, other in before:
            if other != sha256:
                raise ValueError(f"{name} in {out} has been run on another text; for this one take another folder")
    done = finished(out, table, scale)
    return [job for job in wanted if job.name not in done]


def run_all(
    todo: Sequence[Job], out: Path, array_module: Any, texts: Sequence[Path], at_once: int, stop: Sized,
    stream: TextIO,
) -> dict[str, str]:  # fmt: skip
    """Run jobs, so many at once, and say why those failed that did.

    Each has a thread of its own, and on a GPU a stream. When one fails the others go on.
    """
    failures, lock, streams = {}, threading.Lock(), []

    def begin() -> None:
        if array_module is not np:
            streams.append(array_module.cuda.Stream(non_blocking=True))
            streams[-1].use()

    def run(job: Job) -> None:
        job.run(out, array_module, texts, stop, _Named(job.name, stream, lock))  # type: ignore[arg-type]

    with ThreadPoolExecutor(at_once, initializer=begin) as threads:
        futures = {threads.submit(run, job): job for job in todo}
        for future in as_completed(futures):
            error = future.exception()
            if error is not None:
                reason = str(error)
                if not isinstance(error, FloatingPointError | OSError):  # nobody has foreseen it
                    stream.write("".join(traceback.format_exception(error)))
                    reason = f"{type(error).__name__}: {reason}"
                failures[futures[future].name] = reason
    return failures


def _as_json(options: RunOptions) -> dict[str, Any]:
    """Options as they come back from a file."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(options)))
    return values


class Until:
    """Has something in it when the time is over, or there is something in `received`."""

    def __init__(self, minutes: float | None, received: Sized) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.received = received

    def __len__(self) -> int:
        return len(self.received) + (self.end is not None and time.monotonic() >= self.end)


class _Named:
    """A stream for the progress of one of several runs: whole lines, which begin with its name."""

    def __init__(self, name: str, stream: TextIO, lock: threading.Lock) -> None:
        self.name, self.stream, self.lock = name, stream, lock

    def isatty(self) -> bool:
        return False

    def write(self, line: str) -> int:
        with self.lock:
            return self.stream.write(f"{self.name}  {line}")

    def flush(self) -> None:
        with self.lock:
            self.stream.flush()


def device_name(array_module: Any) -> str:
    """What computes."""
    if array_module is np:
        return f"{platform.machine()}, {os.environ.get('NUMBA_NUM_THREADS') or os.cpu_count()} threads"
    runtime = array_module.cuda.runtime
    return str(runtime.getDeviceProperties(runtime.getDevice())["name"].decode())


def versions() -> dict[str, str]:
    """Those of Python, sscan, and what it computes with."""
    found = {"python": platform.python_version(), "sscan": sscan.__version__}
    for package in ("numpy", "numba", "cupy-cuda12x", "cupy-cuda13x"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
