"""``pytorch_model.bin``, which only PyTorch reads: the one file of :mod:`sscan.models` that imports it, when asked."""

from __future__ import annotations

import pickle
import zipfile
from typing import TYPE_CHECKING, Any

import ml_dtypes

from sscan.models.files import check_readable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sscan.models.files import Array


def _import_torch(path: Path, otherwise: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"{path}: only PyTorch, which is not here, reads and writes these; {otherwise}") from error
    return torch


def check_writable(path: Path) -> None:
    """ValueError if there is no PyTorch, which writes such a file."""
    _import_torch(path, "a model.safetensors is written without it")


class PickledArrays:
    """The tensors in a file of ``torch.save``, which nothing of is run: ``weights_only=True``.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it holds anything but tensors by name, or there is no PyTorch.
    """

    def __init__(self, path: Path) -> None:
        check_readable(path)
        self._torch = torch = _import_torch(
            path, "where it is, `sscan convert` makes a model.safetensors of it, which needs no PyTorch"
        )
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except OSError as error:  # PyTorch's "invalid argument", for a part of an archive
            raise ValueError(f"{path}: not a whole file of torch.save ({error})") from error
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError) as error:
            raise ValueError(f"{path}: {str(error).splitlines()[0] if str(error) else 'ends too early'}") from error
        if not isinstance(found, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
        ):
            raise ValueError(f"{path}: holds something else than tensors by name")
        self._tensors: dict[str, Any] = found

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Array:
        """One as a NumPy array."""
        tensor = self._tensors[name].detach().contiguous()
        if tensor.dtype is self._torch.bfloat16:
            return tensor.view(self._torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def save_pickled(path: Path, arrays: Mapping[str, Array], also: Mapping[str, str]) -> None:
    """Write arrays as ``torch.save`` does; `also` are second names of some."""
    import torch

    tensors = {name: _tensor(torch, array) for name, array in arrays.items()}
    torch.save({**tensors, **{name: tensors[first] for name, first in also.items()}}, path)


def _tensor(torch: Any, array: Array) -> Any:
    array = array.get() if hasattr(array, "get") else array
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)
