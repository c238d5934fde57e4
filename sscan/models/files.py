"""Files of models and runs: never half written, and checked before what they hold is read."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

Array: TypeAlias = Any  # numpy.ndarray, or where it is written from cupy.ndarray

# The dtypes of safetensors that are read; it knows others, of which NumPy has none.
_READABLE = {"F64", "F32", "F16", "BF16", "I64", "I32"}


# Writing


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a new file, then put it in the place of `path`, with the permissions that the umask leaves.

    Whatever happens, `path` holds either all of the old or all of the new content: the new file is on the disk before
    it takes the name. Until then it lies in a folder of its own beside `path`, together with what libraries write on
    their way; what a process leaves there when it is killed, :func:`remove_leftovers` removes.
    """
    write_together({path: write})


def write_together(writes: Mapping[Path, Callable[[Path], Any]]) -> None:
    """:func:`write_atomically` for several files: none takes its name before all are on the disk."""
    folders = {path: path.with_name(f".{path.name}.{os.getpid()}.new") for path in writes}
    try:
        for path, write in writes.items():
            folders[path].mkdir(exist_ok=True)
            new = folders[path] / path.name
            write(new)
            new.chmod(0o666 & folders[path].stat().st_mode)  # safetensors' files are for nobody but their owner
            with new.open("rb+") as file:
                os.fsync(file.fileno())
        for path, folder in folders.items():
            os.replace(folder / path.name, path)
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes left that were killed while they wrote to this folder; nobody may be writing now."""
    for left in folder.glob(".*.*.new"):
        if left.suffixes[-2][1:].isdecimal():
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:  # of sscan 0.3
                left.unlink()


def save_arrays(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    """Write NumPy or CuPy arrays and text metadata to a safetensors file, atomically.

    Raises
    ------
    OSError
        If there is no room, or it cannot be written; an older file stays as it is.
    """
    write_atomically(path, arrays_writer(path, arrays, metadata))


def arrays_writer(
    path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> Callable[[Path], None]:
    """What fills a new file with the arrays; an error names `path`."""
    on_host = {name: array.get() if hasattr(array, "get") else array for name, array in arrays.items()}
    host = {name: np.asarray(array, order="C") for name, array in on_host.items()}

    def write(new: Path) -> None:
        try:
            save_file(host, new, None if metadata is None else dict(metadata))
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from error

    return write


# Reading


@contextlib.contextmanager
def content_of(path: Path) -> Iterator[None]:
    """Whatever is wrong with the content of a file becomes a ValueError that names the file."""
    try:
        yield
    except (SafetensorError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def check_readable(path: Path) -> None:
    """OSError, with the name of the file, if it cannot be opened; ValueError if it is a pipe or a device."""
    if not stat.S_ISDIR(path.stat().st_mode) and not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    path.open("rb").close()


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it holds no object; the message names the file.
    """
    check_readable(path)
    with content_of(path):
        return parse_object(path.read_bytes().decode("utf-8-sig"))


def parse_object(text: str) -> dict[str, Any]:
    """The object of a JSON text; ValueError also for what Python lets pass: NaN, infinity, a key that comes twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
        return values

    def no_number(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a number")

    values = json.loads(text, object_pairs_hook=unique, parse_constant=no_number)
    if not isinstance(values, dict):
        raise ValueError(f"holds no JSON object, but {type(values).__name__}")
    return values


@contextlib.contextmanager
def open_arrays(path: Path) -> Iterator[Any]:
    """A safetensors file of which nothing but the header is read yet; ValueError, with its name, if that is wrong."""
    check_readable(path)
    with content_of(path), safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118
            dtype = file.get_slice(name).get_dtype()
            if dtype not in _READABLE:
                raise ValueError(f"{name!r} is {dtype}, expected one of {', '.join(sorted(_READABLE))}")
        yield file


def load_arrays(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """NumPy arrays and metadata of a safetensors file.

    Raises
    ------
    OSError, ValueError
        If the file cannot be read, or is not of that format.
    """
    with open_arrays(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
