"""How a training run shows itself: a live bar on a terminal, a line now and then anywhere else, a curve at the end."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from tqdm import tqdm

from sscan.models.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from sscan.tasks.training import TrainingRun

SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal
RECENT = 50  # steps over which the loss is averaged


class Progress:
    """Shows loss, held-out goal, speed and time left while a run goes on; use it in a ``with`` statement.

    A stream that takes nothing more, as a terminal that was closed, does not end the run.
    """

    def __init__(self, run: TrainingRun[Any], stream: TextIO) -> None:
        self.run, self.stream = run, stream
        self.first_step, self.first_progress, self.first_seconds = len(run.losses), run.progress, run.seconds
        self.last_line = time.monotonic()
        terminal = stream.isatty()
        self.bar = tqdm(
            total=1.0, initial=run.progress, file=stream, bar_format="{percentage:3.0f}% |{bar:20}| {desc}",
            disable=not terminal,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):
            self.bar.close()

    def update(self) -> None:
        """Show the state after a step."""
        with contextlib.suppress(OSError):
            self._show()

    def _show(self) -> None:
        if not self.bar.disable:
            self.bar.set_description_str(self.describe(), refresh=False)
            self.bar.update(self.run.progress - self.bar.n)
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES or self.run.progress >= 1:
            self.last_line = time.monotonic()
            self.stream.write(f"{self.run.progress:4.0%}  {self.describe()}\n")
            self.stream.flush()

    def describe(self) -> str:
        """One line: step, loss in nats and in the task's unit, held-out goal, tokens per second, time left."""
        run = self.run
        loss = float(np.mean(run.losses[-RECENT:]))
        held_out = f"held out {run.measures[-1][1]:.3f}  " if run.measures else ""
        seconds, done = run.seconds - self.first_seconds, run.progress - self.first_progress
        tokens = (len(run.losses) - self.first_step) * run.options.batch * run.options.length
        left = round(seconds * (1 - run.progress) / done) if done > 0 else 0
        return (
            f"step {len(run.losses)}  loss {loss:.3f}  {run.task.in_unit(loss):.3f} {run.task.unit}  {held_out}"
            f"{tokens / seconds:,.0f} tokens/s  {left // 60}:{left % 60:02d} left"
        )


class Bar:
    """Shows the share of something that is done, in a ``with`` statement; a line now and then where no terminal is."""

    def __init__(self, title: str, stream: TextIO, *, hidden: bool = False) -> None:
        self.title, self.stream, self.hidden = title, stream, hidden
        self.last_line = time.monotonic()
        self.bar = tqdm(
            total=1.0, desc=title, file=stream, bar_format="{desc} {percentage:3.0f}% |{bar:20}| {remaining} left",
            disable=hidden or not stream.isatty(), leave=False,
        )  # fmt: skip

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):
            self.bar.close()

    def __call__(self, share: float) -> None:
        """Show it."""
        with contextlib.suppress(OSError):
            if not self.bar.disable:
                self.bar.update(share - self.bar.n)
            elif not self.hidden and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
                self.last_line = time.monotonic()
                self.stream.write(f"{self.title} {share:4.0%}\n")
                self.stream.flush()


def draw_loss_curve(path: Path, run: TrainingRun[Any], lines: dict[str, float]) -> bool:
    """Write the curves of the training loss and of the held-out goal, which has the same unit, as a picture.

    Results that others have there are horizontal `lines`. False without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=run.task.unit)
    losses = [run.task.in_unit(loss) for loss in run.losses]
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.8, label="training, each step")
    axes.plot(*zip(*run.measures, strict=True), marker=".", label="held out, some windows")
    for i, (label, value) in enumerate(lines.items(), start=2):
        axes.axhline(value, color=f"C{i}", linestyle="--", label=f"{label}: {value:.3f}")
    axes.legend()
    write_atomically(path, lambda new: figure.savefig(new, format="png", dpi=150))
    return True
