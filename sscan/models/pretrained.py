"""Models in folders, and on the hub: which files there are, what is in them under which names, and writing them."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sscan.models.config import Format, MambaConfig, Shapes
from sscan.models.files import arrays_writer, content_of, open_arrays, read_object, write_together
from sscan.models.pickled import PickledArrays, check_writable, save_pickled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sscan.models.files import Array

CONFIG, WEIGHTS, PICKLE = "config.json", "model.safetensors", "pytorch_model.bin"
# What goes with a model when it is converted.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"
THEIR_EMBEDDING = "backbone.embeddings.weight"  # the one name that transformers has changed


# Reading


class Described(Protocol):
    """A configuration that files go with."""

    @property
    def n_layer(self) -> int:
        """Number of blocks."""

    @property
    def tie_embeddings(self) -> bool:
        """Whether the head uses the embedding's matrix."""

    def shapes(self) -> Shapes:
        """Names and shapes of all parameters."""

    def to_dict(self, format: Format) -> dict[str, Any]:
        """As plain values."""


@dataclass(frozen=True)
class _Place:
    """An array in an opened file."""

    path: Path
    file: Any
    key: str


class Weights(Mapping[str, Any]):
    """The parameters of a model by the original's names: in files, each read when it is asked for.

    Names and shapes are those of the configuration, which only headers were read to find out.
    """

    def __init__(self, config: Described, places: Mapping[str, _Place], source: Path) -> None:
        """`source` is the file to name if an array is missing, or one too many.

        Raises
        ------
        ValueError
            If a name is missing or unknown, a shape differs, or two copies of tied embeddings do.
        """
        self._places = {EMBEDDING if name == THEIR_EMBEDDING else name: place for name, place in places.items()}
        with content_of(source):
            if config.n_layer > len(places):
                raise ValueError(f"holds {len(places)} arrays, too few for n_layer = {config.n_layer}")
            expected = config.shapes()
            if config.tie_embeddings:
                if HEAD in self._places:
                    self._places.setdefault(EMBEDDING, self._places[HEAD])
                else:
                    del expected[HEAD]
            check_shapes({name: place.file.shape(place.key) for name, place in self._places.items()}, expected)
            if config.tie_embeddings and HEAD in self._places:
                if (self[HEAD] != self[EMBEDDING]).any():
                    raise ValueError(f"{EMBEDDING!r} and {HEAD!r} are one parameter, but their values differ")
                del self._places[HEAD]

    def __getitem__(self, name: str) -> Array:
        place = self._places[name]
        with content_of(place.path):
            return place.file.read(place.key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, name: str, dtype: Any) -> Array:
        """An array of one's own in this dtype.

        Raises
        ------
        ValueError
            If it is not of a floating dtype, or has values beyond the one that is asked for.
        """
        array = self[name]
        with content_of(self._places[name].path):
            return cast(name, array, dtype)


def check_shapes(shapes: Mapping[str, tuple[int, ...]], expected: Shapes) -> None:
    """ValueError for the first names that are missing or unknown, and shapes that differ."""
    problems = [f"unknown key {name!r}" for name in shapes if name not in expected]
    problems += [f"missing key {name!r}" for name in expected if name not in shapes]
    problems += [
        f"{name!r} has shape {shapes[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError("; ".join(problems[:3]) + more)


def cast(name: str, array: Array, dtype: Any) -> Array:
    """A copy of a NumPy array in a floating dtype.

    Raises
    ------
    ValueError
        If it is not of a floating dtype itself, or a value would become infinite.
    """
    if array.dtype.kind not in "fV":
        raise ValueError(f"{name!r} is {array.dtype}, expected a floating dtype")
    with np.errstate(over="ignore"):
        made = array.astype(dtype, copy=True)
    if made.dtype != array.dtype and (np.isinf(made) & ~np.isinf(array)).any():
        raise ValueError(f"{name!r} has values that {made.dtype} cannot hold")
    return made


class _SafeArrays:
    """An opened safetensors file, read as :class:`PickledArrays` are."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def keys(self) -> list[str]:
        return list(self.file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.file.get_slice(name).get_shape())

    def read(self, name: str) -> Array:
        return self.file.get_tensor(name)


def weights_in(path: Path, file: Any, config: Described, prefix: str) -> Weights:
    """Those arrays of an opened safetensors file whose names begin with the prefix, as the weights of a model."""
    places = _places(path, _SafeArrays(file))
    return Weights(config, {n.removeprefix(prefix): place for n, place in places.items() if n.startswith(prefix)}, path)


def _places(path: Path, file: Any) -> dict[str, _Place]:
    return {name: _Place(path, file, name) for name in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def open_model(model: str | Path, revision: str | None = None) -> Iterator[tuple[MambaConfig, Weights]]:
    """The configuration of a model, and its weights, which are read when they are asked for.

    Parameters
    ----------
    model : str or Path
        A folder, or the name of a model on the hub, "owner/name". Files from there are kept in huggingface_hub's cache,
        and taken from it; with ``HF_HUB_OFFLINE=1`` from nowhere else.
    revision : str, optional
        Branch, tag or commit of a model on the hub.

    Raises
    ------
    OSError
        If a file cannot be read, or there is no such model.
    ValueError
        If the configuration is not one of a Mamba language model, or the arrays are not those of the configuration; the
        message names the file.
    """
    source = Source(model, revision)
    path = source.require(CONFIG)
    values = read_object(path)
    with content_of(path):
        config = MambaConfig.from_dict(values)
    with contextlib.ExitStack() as stack:
        path, places = _open_weights(source, stack)
        yield config, Weights(config, places, path)


def _open_weights(source: Source, stack: contextlib.ExitStack) -> tuple[Path, dict[str, _Place]]:
    """Every array in the files of the first kind that is there, and the file that says which they are."""

    def open_safe(path: Path) -> _SafeArrays:
        return _SafeArrays(stack.enter_context(open_arrays(path)))

    for name, open_file in ((WEIGHTS, open_safe), (PICKLE, PickledArrays)):
        whole = source.find(name)
        if whole is not None:
            return whole, _places(whole, open_file(whole))
        index = source.find(f"{name}.index.json")
        if index is not None:
            return index, _open_shards(source, index, open_file)
    path = source.require(WEIGHTS)
    raise AssertionError(path)


def _open_shards(source: Source, index: Path, open_file: Callable[[Path], Any]) -> dict[str, _Place]:
    """Every array of the shards, which are to hold what the index says."""
    said = read_object(index).get("weight_map")
    with content_of(index):
        if not isinstance(said, dict) or not all(isinstance(shard, str) for shard in said.values()):
            raise ValueError("holds no weight_map from names to files")
        outside = [shard for shard in said.values() if not re.fullmatch(r"[\w-][\w.-]*", shard)]
        if outside:
            raise ValueError(f"{outside[0]!r} is no name of a file beside it")
    found: dict[str, _Place] = {}
    for shard in sorted(set(said.values())):
        found |= _places(path := source.require(shard), open_file(path))
    with content_of(index):
        for name in said.keys() ^ found.keys():
            raise ValueError(f"{name!r} is in {'no file' if name in said else 'a file, but not in the index'}")
        for name, shard in said.items():
            if found[name].path.name != shard:
                raise ValueError(f"{name!r} is in {found[name].path.name}, not in {shard}")
    return found


class Source:
    """Where the files of a model are: a folder, or a repository on the hub."""

    def __init__(self, model: str | Path, revision: str | None = None) -> None:
        self.model, self.revision = model, revision
        self.on_hub = (
            isinstance(model, str)
            and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) is not None
            and not os.path.lexists(model)
        )
        if revision is not None and not self.on_hub:
            raise ValueError(f"{model}: revision is for models on the hub, got {revision!r}")

    def find(self, name: str) -> Path | None:
        """The file of this name, if there is one."""
        if self.on_hub:
            with contextlib.suppress(FileNotFoundError):
                return self._fetch(name)
            return None
        path = Path(self.model) / name
        return path if os.path.lexists(path) else None  # also if it is a link to nowhere

    def require(self, name: str) -> Path:
        """The file of this name; FileNotFoundError if there is none."""
        if self.on_hub:
            return self._fetch(name)
        path = Path(self.model) / name
        path.lstat()
        return path

    def _fetch(self, name: str) -> Path:
        """The file in the cache of huggingface_hub, which asks the hub for it if it may."""
        try:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
        except ImportError as error:
            raise FileNotFoundError(
                f'{self.model}: no such folder; to load models by their names on the hub: pip install "sscan[lm]"'
            ) from error
        try:
            return Path(hf_hub_download(str(self.model), name, revision=self.revision))
        except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
            raise FileNotFoundError(
                f"{self.model}: no such folder, and no {name} of it on the hub: {first_line(error)}"
            ) from error


def first_line(error: BaseException) -> str:
    """What an error says, without what it says on further lines."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# Writing


def save_model(
    folder: str | Path, config: Described, arrays: Mapping[str, Array], format: Format = "original", *,
    pickled: bool = False,
) -> None:  # fmt: skip
    """Write a model to a folder, which is created if need be; no file takes its name before all are on the disk.

    Weights in the other kind of file, of a model that the folder had before, are removed at the end.

    Parameters
    ----------
    folder : str or Path
    config : MambaConfig or sscan.nn.SequenceConfig
    arrays : mapping
        The parameters by the original's names, tied embeddings once.
    format : {"original", "transformers"}
        Whose names the configuration and the arrays have.
    pickled : bool
        Write ``pytorch_model.bin``, which is what the original itself reads, in the place of ``model.safetensors``;
        takes PyTorch.

    Raises
    ------
    OSError
        If there is no room, or they cannot be written; older files stay as they are.
    """
    folder = Path(folder)
    values = config.to_dict(format)
    if format == "transformers":
        arrays = {THEIR_EMBEDDING if name == EMBEDDING else name: array for name, array in arrays.items()}
        values["dtype"] = arrays[THEIR_EMBEDDING].dtype.name
    table = THEIR_EMBEDDING if format == "transformers" else EMBEDDING
    also = {HEAD: table} if config.tie_embeddings else {}
    if pickled:
        check_writable(folder / PICKLE)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=2) + "\n"
    if pickled:
        weights = folder / PICKLE, lambda new: save_pickled(new, arrays, also)
    else:
        path = folder / WEIGHTS
        weights = path, arrays_writer(path, arrays, {"format": "pt"})  # which transformers asks for
    write_together(dict([(folder / CONFIG, lambda new: new.write_text(text, encoding="utf-8")), weights]))
    (folder / (WEIGHTS if pickled else PICKLE)).unlink(missing_ok=True)  # of a model that was there before


def convert(
    model: str | Path, folder: str | Path, format: Format, dtype: Any = None, *, pickled: bool = False
) -> list[str]:
    """Write a model, wherever it is and in whatever format, to a folder; the names of the files that were written.

    Parameters
    ----------
    model, folder, format, pickled
        As of :func:`open_model` and :func:`save_model`.
    dtype : dtype, optional
        Of the parameters, but for A_log and D, which stay at least float32; without it they stay as they are.

    Raises
    ------
    OSError, ValueError
        As those, and if the folder is the model's own or has files in it that are not a model's.
    """
    if Path(model).exists() and Path(folder).resolve() == Path(model).resolve():
        raise ValueError(f"{folder} is the model itself, which would be overwritten; give another folder")
    _check_target(Path(folder))
    source = Source(model)
    with open_model(model) as (config, weights):
        arrays = {}
        for name in weights:
            array = weights[name]
            wide = np.float32 if name.endswith((".A_log", ".D")) else dtype
            arrays[name] = array if dtype is None else weights.read(name, np.result_type(dtype, wide))
    save_model(folder, config, arrays, format, pickled=pickled)
    written = [CONFIG, PICKLE if pickled else WEIGHTS]
    for name in COMPANIONS:
        found = source.find(name)
        if found is not None:
            write_together({Path(folder) / name: functools.partial(shutil.copyfile, found)})
            written.append(name)
    return sorted(written)


def _check_target(folder: Path) -> None:
    """ValueError for a folder whose files are not those of a model, and may be somebody's."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = there - {CONFIG, WEIGHTS, PICKLE, *COMPANIONS}
    if others or (there and not there & {WEIGHTS, PICKLE}):
        raise ValueError(f"{folder} has files that are not a model's, as {min(others or there)}; give another folder")
