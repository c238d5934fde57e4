"""What long commands say while they work: on a terminal one live line as wide as it is, plain lines anywhere else."""

from __future__ import annotations

import fcntl
import io
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sscan.tasks import progress
from sscan.tasks.progress import Phase, facts_of

ROOT = Path(__file__).parent.parent
ESCAPE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Screen:
    """What a terminal shows: the few things that a live line asks of one."""

    def __init__(self, columns: int) -> None:
        self.columns, self.rows, self.row, self.column = columns, [""], 0, 0

    def feed(self, text: str) -> None:
        for escape, code, letter, character in re.findall(r"(\x1b\[([0-9;?]*)([A-Za-z]))|(.)", text, re.DOTALL):
            if escape and letter == "A":
                self.row -= int(code or 1)
            elif escape and (code, letter) == ("2", "K"):
                self.rows[self.row] = ""
            elif escape:
                assert letter in "mhl", f"{escape!r} is not known here"
            else:
                self._put(character)

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n" or self.column == self.columns:
            self.row, self.column = self.row + 1, 0
            self.rows += [""] * (self.row + 1 - len(self.rows))
        if character not in "\r\n":
            line = self.rows[self.row].ljust(self.column)
            self.rows[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1


def half_way() -> Any:
    """A run that has made half of its steps, 30 s each."""
    run = SimpleNamespace(
        losses=[], progress=0.0, seconds=0.0, measures=[], options=SimpleNamespace(batch=8, length=256),
        task=SimpleNamespace(unit="bits", in_unit=lambda loss: loss / 2),
    )  # fmt: skip
    facts = facts_of(run)
    assert facts() == []
    run.losses, run.progress, run.seconds, run.measures = [2.0] * 10, 0.5, 300.0, [(5, 1.25)]
    return facts


def shown(columns: int, monkeypatch: pytest.MonkeyPatch, facts: Any, share: float | None) -> str:
    """The live line, taken while it is live."""
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal, screen = Terminal(), Screen(columns)
    with Phase("training", terminal, facts) as phase:
        phase.share = share
        phase._live.refresh()
        screen.feed(terminal.getvalue())
        (line,) = (row for row in screen.rows if row)
    return line


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (130, r"training  50%  [━╸╺]{30}  step 10  loss 2.000  1.000 bits  held out 1.250  68 tokens/s  5:00 left"),
        (100, r"training  50%  [━╸╺]{6,}  step 10  loss 2.000  1.000 bits  held out 1.250  68 tokens/s  5:00 left"),
        (60, r"training  50%  held out 1\.250  68 tokens/s  5:00 left"),
        (40, r"training  50%  68 tokens/s  5:00 left"),
        (20, r"training  50%"),
        (8, r"training"),
    ],
)  # fmt: skip
def test_what_is_missed_most_stays_on_a_narrow_line(
    columns: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = shown(columns, monkeypatch, half_way(), 0.5)
    assert re.fullmatch(expected, line.strip()), line
    assert len(line) <= columns


def test_a_phase_with_no_facts_says_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(60, monkeypatch, list, None) == "training  0:00"
    assert re.fullmatch(r"training  50%  [━╸╺]+  0:00 left", shown(60, monkeypatch, list, 0.5))


def test_no_color_and_terminals_that_obey_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(**environment: str) -> str:
        terminal = Terminal()
        with monkeypatch.context() as patch:
            for name in ("NO_COLOR", "COLORTERM"):
                patch.delenv(name, raising=False)
            for name, value in {"TERM": "xterm-256color", **environment}.items():
                patch.setenv(name, value)
            with Phase("reading", terminal) as phase:
                phase(0.5)
        return terminal.getvalue()

    coloured = re.compile(r"\x1b\[(?:\d+;)*(?:3\d|4\d|9\d)[;\dm]")
    assert coloured.search(said())
    plain = said(NO_COLOR="1")
    assert "reading  50%" in ESCAPE.sub("", plain)
    assert not coloured.search(plain)
    assert said(TERM="dumb") == ""


def test_lines_where_no_terminal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with Phase("reading", stream) as phase:  # done before a line is due
        phase(1.0)
    assert stream.getvalue() == ""
    with Phase("training", stream, half_way(), stays=True) as phase:
        phase(1.0)
    assert stream.getvalue().startswith("training 100%  step 10  loss 2.000")
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.5)
    stream = io.StringIO()
    with Phase("compiling kernels", stream):  # of which nothing comes while it works
        time.sleep(1.3)
    assert stream.getvalue() == "compiling kernels  0:01\n"
    with Phase("reading", stream := io.StringIO(), hidden=True) as phase:
        phase(1.0)
        time.sleep(1.3)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_a_stream_that_takes_nothing(kind: type[io.StringIO]) -> None:
    class Closed(kind):  # type: ignore[misc, valid-type]
        tried = 0

        def write(self, text: str) -> int:
            Closed.tried += 1
            raise OSError("gone")

    with Phase("training", Closed(), half_way(), stays=True) as phase:
        phase(1.0)
    assert Closed.tried


def resize(terminal: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


def test_training_on_a_terminal_that_becomes_narrower(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the rain it raineth every day, and the wind and the rain.\n" * 200)
    ours, theirs = os.openpty()
    resize(ours, 150)
    names = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "sscan.cli", "train", "--text", "text", "--out", "run", "--steps", "10000000",
         "--d-model", "8", "--n-layer", "1", "--length", "16", "--batch", "2"],
        cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs,
        env=names | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    screen, said, end = Screen(150), "", time.monotonic() + 120

    def read(until: str) -> str:
        new = ""
        while until not in new:
            assert time.monotonic() < end, new
            try:
                part = os.read(ours, 10000).decode()
            except OSError:  # the terminal is closed
                break
            new += part
        return new

    said = read("tokens/s")
    screen.feed(said)
    resize(ours, 60)
    read("tokens/s")  # which may have been drawn before
    after = read("tokens/s") + read("left")
    process.send_signal(signal.SIGINT)
    after += read("never said")
    assert process.wait(60) == 128 + signal.SIGINT
    os.close(ours)

    titles = ("loading", "compiling kernels", "kernels     ready after", "training ")
    places = [ESCAPE.sub("", said).index(title) for title in titles]
    assert places == sorted(places)
    text, model, device, kernels, line = (row.split()[0] for row in screen.rows if row.strip())
    assert (text, model, device, kernels, line) == ("text", "model", "device", "kernels", "training")
    live = [line.rstrip() for line in re.split(r"[\r\n]+", ESCAPE.sub("", after)) if line.startswith("training ")]
    assert len(live) >= 2
    assert [line for line in live if len(line) > 60 or "tokens/s" not in line or not line.endswith(" left")] == []
    assert "stopped; continue with" in after
