"""Models in files: ``model.safetensors`` and ``config.json`` in a folder, never half written, and checked when read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sscan.nn.autodiff import Array, to_numpy
from sscan.nn.language_model import MambaConfig, MambaLM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# The dtypes of safetensors that are read; it knows others, of which NumPy has none.
_READABLE = {"F64", "F32", "F16", "BF16", "I64", "I32"}


# Writing


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a new file, then put it in the place of `path`, with the permissions that the umask leaves.

    Whatever happens, `path` holds either all of the old or all of the new content: the new file is on the disk before
    it takes the name. Until then it lies in a folder of its own beside `path`, together with what libraries write on
    their way; what a process leaves there when it is killed, :func:`remove_leftovers` removes.
    """
    folder = path.with_name(f".{path.name}.{os.getpid()}.new")
    folder.mkdir(exist_ok=True)
    new = folder / path.name
    try:
        write(new)
        new.chmod(0o666 & folder.stat().st_mode)  # safetensors' files are for nobody but their owner
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
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
    """Write arrays, from any device, and text metadata to a safetensors file, atomically.

    Raises
    ------
    OSError
        If there is no room, or it cannot be written; an older file stays as it is.
    """
    host = {name: np.asarray(to_numpy(array), order="C") for name, array in arrays.items()}

    def write(new: Path) -> None:
        try:
            save_file(host, new, None if metadata is None else dict(metadata))
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from error

    write_atomically(path, write)


def save_model(model: MambaLM, folder: str | Path) -> None:
    """Write a model to a folder, which is created if need be. A shared parameter is written once.

    Raises
    ------
    OSError
        As :func:`save_arrays`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(model.config.to_dict(), indent=2) + "\n"
    write_atomically(folder / "config.json", lambda new: new.write_text(text, encoding="utf-8"))
    save_arrays(folder / "model.safetensors", {name: p.data for name, p in model.named_parameters()})


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


def load_weights(file: Any, config: MambaConfig, prefix: str = "", **options: Any) -> MambaLM:
    """The model of a configuration with the weights in an opened file, whose names begin with `prefix`.

    Names and shapes are compared with the file's header first, so that a wrong configuration costs neither time nor
    memory. `options` go to :class:`MambaLM`.
    """
    names = {name.removeprefix(prefix): name for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    if config.n_layer > len(names):
        raise ValueError(f"holds {len(names)} arrays, too few for n_layer = {config.n_layer}")
    model = MambaLM(config, seed=None, **options)
    model.check_shapes({short: tuple(file.get_slice(name).get_shape()) for short, name in names.items()})
    model.load_state_dict({short: file.get_tensor(name) for short, name in names.items()})
    return model


def load_model(folder: str | Path, dtype: Any = np.float32) -> MambaLM:
    """Read a model that :func:`save_model` wrote.

    Raises
    ------
    OSError
        If a file cannot be read.
    ValueError
        If the configuration is not one of a Mamba language model, or the arrays are not those of the configuration; the
        message names the file.
    """
    path = Path(folder) / "config.json"
    check_readable(path)
    with content_of(path):
        config = MambaConfig.from_dict(parse_object(path.read_bytes().decode("utf-8-sig")))
        MambaLM(dataclasses.replace(config, n_layer=1), dtype, seed=None)  # the block's arguments are checked here
    path = Path(folder) / "model.safetensors"
    with open_arrays(path) as file:
        return load_weights(file, config, dtype=dtype)
