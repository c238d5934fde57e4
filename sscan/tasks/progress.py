"""What a long command says of itself: a live line on a terminal, a line now and then anywhere else; a loss curve."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from sscan.models.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live

    from sscan.tasks.training import TrainingRun

SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal
UPDATES_A_SECOND = 4  # of the live line
NARROWEST_BAR, WIDEST_BAR = 6, 30
RECENT = 50  # steps over which the loss is averaged


class Phase:
    """Says what is going on while it lasts, in a ``with`` statement; calling it says which share is done.

    On a terminal this is a live line that follows the width. Elsewhere it is a line now and then, and nothing for what
    is done before the first is due. A stream that takes nothing more, as a terminal that was closed, ends nothing.

    Parameters
    ----------
    title : str
    stream : text stream
    facts : callable, optional
        Gives more to say, as parts of the line. Where there is no room for all, the first are left out.
    hidden : bool
        Whether to say nothing.
    stays : bool
        Whether the last line is left on the terminal, and elsewhere one is written when all is done.
    """

    def __init__(
        self, title: str, stream: TextIO, facts: Callable[[], list[str]] = list, *, hidden: bool = False,
        stays: bool = False,
    ) -> None:  # fmt: skip
        self.title, self.facts, self.stays = title, facts, stays
        self.share: float | None = None
        self.began = self.last_line = time.monotonic()
        self.stream = _Lenient(stream)
        self._lock, self._over = threading.Lock(), threading.Event()
        self._plain = not hidden and not _obeys(stream)
        self._live = None if hidden or self._plain else self._drawn_by_rich()

    def _drawn_by_rich(self) -> Live:
        """The display whose thread draws this anew now and then."""
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self.stream, force_terminal=True, highlight=False)  # type: ignore[arg-type]
        return Live(
            self, console=console, transient=not self.stays, refresh_per_second=UPDATES_A_SECOND, redirect_stdout=False
        )

    def __enter__(self) -> Phase:
        if self._live is not None:
            self._live.start()
            self._live.console.show_cursor(True)  # a process that is killed would leave it hidden
        elif self._plain:
            threading.Thread(target=self._remind, daemon=True).start()
        return self

    def _remind(self) -> None:
        while not self._over.wait(1.0):
            self._write_line()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the line to others; doing it twice does no harm."""
        self._over.set()
        if self._live is not None:
            self._live.stop()

    def __call__(self, share: float) -> None:
        """So much of 1 is done."""
        self.share = share
        if self._plain and not self._over.is_set():
            self._write_line()

    @contextlib.contextmanager
    def titled(self, title: str) -> Iterator[None]:
        """Something else goes on for a while."""
        before, self.title = self.title, title
        try:
            yield
        finally:
            self.title = before

    def _head(self) -> str:
        return self.title if self.share is None else f"{self.title} {self.share:4.0%}"

    def _write_line(self) -> None:
        """Write a line where there is no terminal, if it is time to."""
        with self._lock:
            now, done = time.monotonic(), self.stays and self.share is not None and self.share >= 1
            if now - self.last_line >= SECONDS_BETWEEN_LINES or done:
                self.last_line = now
                parts = self.facts() or ([clock(now - self.began)] if self.share is None else [])
                self.stream.write("  ".join([self._head(), *parts]) + "\n")
                self.stream.flush()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The live line, as wide as there is room."""
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        room, head, seconds = options.max_width, self._head(), time.monotonic() - self.began
        parts = self.facts()
        if not parts:
            parts = [f"{clock(seconds * (1 - self.share) / self.share)} left" if self.share else clock(seconds)]
        while parts and len("  ".join([head, *parts])) > room:
            del parts[0]
        text = "  ".join([head, *parts])
        bar = min(room - len(text) - 2, WIDEST_BAR)
        yield Text(head, style="bold", no_wrap=True, overflow="crop", end="")
        if self.share is not None and bar >= NARROWEST_BAR:
            yield Text("  ", end="")
            yield ProgressBar(total=1.0, completed=self.share, width=bar)
        yield Text(text.removeprefix(head), no_wrap=True, overflow="crop", end="")


class _Lenient:
    """A stream to which nothing is written any more when it takes nothing, as a terminal that was closed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _obeys(stream: TextIO) -> bool:
    """Whether a stream is a terminal whose cursor can be moved."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def clock(seconds: float) -> str:
    """Minutes and seconds, as in 2:05."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


def facts_of(run: TrainingRun[Any]) -> Callable[[], list[str]]:
    """What there is to say of a run later: step, loss in nats and in its unit, held-out goal, speed, time left."""
    first_step, first_share, first_seconds = len(run.losses), run.progress, run.seconds

    def facts() -> list[str]:
        steps, seconds = len(run.losses) - first_step, run.seconds - first_seconds
        if not steps or not seconds:
            return []
        loss, share = float(np.mean(run.losses[-RECENT:])), run.progress
        left = seconds * (1 - share) / (share - first_share) if share > first_share else 0.0
        return [
            f"step {first_step + steps}",
            f"loss {loss:.3f}",
            f"{run.task.in_unit(loss):.3f} {run.task.unit}",
            *(f"held out {goal:.3f}" for _, goal in run.measures[-1:]),
            f"{steps * run.options.batch * run.options.length / seconds:,.0f} tokens/s",
            f"{clock(left)} left",
        ]

    return facts


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
