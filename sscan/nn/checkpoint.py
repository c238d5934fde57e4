"""Models in files: ``model.safetensors`` and ``config.json`` in a folder, never half written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from sscan.nn.autodiff import Array, to_numpy
from sscan.nn.language_model import MambaConfig, MambaLM

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a new file beside `path`, then put it in the place of `path`.

    Whatever happens, `path` holds either all of the old or all of the new content: the new file is on the disk before
    it takes the name.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        write(new)
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def save_arrays(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays, from any device, and text metadata to a safetensors file, atomically."""
    host = {name: np.asarray(to_numpy(array), order="C") for name, array in arrays.items()}
    write_atomically(path, lambda new: save_file(host, new, None if metadata is None else dict(metadata)))


def load_arrays(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """NumPy arrays and metadata of a safetensors file."""
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def save_model(model: MambaLM, folder: str | Path) -> None:
    """Write a model to a folder, which is created if need be. A shared parameter is written once."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(model.config.to_dict(), indent=2) + "\n"
    write_atomically(folder / "config.json", lambda new: new.write_text(text, encoding="utf-8"))
    save_arrays(folder / "model.safetensors", {name: p.data for name, p in model.named_parameters()})


def load_model(folder: str | Path, dtype: Any = np.float32) -> MambaLM:
    """Read a model that :func:`save_model` wrote.

    Raises
    ------
    OSError
        If a file cannot be read.
    ValueError
        If the configuration is not one of a Mamba language model, or the arrays are not those of the configuration.
    """
    folder = Path(folder)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError("config.json holds no configuration")
    model = MambaLM(MambaConfig.from_dict(values), dtype, seed=None)
    model.load_state_dict(load_arrays(folder / "model.safetensors")[0])
    return model
