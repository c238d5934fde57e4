"""The log of a run: a line of JSON for each thing that happened."""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any

from sscan.models.files import parse_object, write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class Log:
    """Appends records to a file, each as one line that is on the disk when :meth:`append` returns.

    What a run that was killed wrote beyond its checkpoint will happen again, so it is removed, and so is a line that
    was not finished: the log of a run that was continued is that of a run that was not interrupted.

    Parameters
    ----------
    path : Path
    step : int
        Where the run stands: records of later steps are removed.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if _step(line) <= step]
        if kept != lines:
            write_atomically(path, lambda new: new.write_bytes(b"".join(kept)))

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record, which has a "step".

        Raises
        ------
        OSError
            If there is no room. Nothing of the record is left then.
        """
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            end = os.fstat(file).st_size
            try:
                written = 0
                while written < len(line):  # the rest of a short write says why it was short
                    written += os.write(file, line[written:])
                os.fsync(file)
            except OSError as error:
                os.ftruncate(file, end)
                raise OSError(error.errno, error.strerror, str(self.path)) from error
        finally:
            os.close(file)


def _step(line: bytes) -> float:
    """The step of a record; infinity if the line is none."""
    try:
        return float(parse_object(line.decode())["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
