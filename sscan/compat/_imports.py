"""A finder at the end of ``sys.meta_path`` that knows the modules of mamba_ssm and causal_conv1d."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import ModuleType

logger = logging.getLogger(__name__)

_SCAN = ("selective_scan_fn", "selective_scan_ref", "mamba_inner_fn", "mamba_inner_ref")
_CONVOLUTION = ("causal_conv1d_fn", "causal_conv1d_update")

# Of each module: the module of ours that it takes names from, and the names.
_MODULES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "mamba_ssm": (
        ("sscan.torch", ("Mamba",)),
        ("sscan.compat.mamba_ssm", ("selective_scan_fn", "mamba_inner_fn")),
    ),
    "mamba_ssm.modules": (),
    "mamba_ssm.modules.mamba_simple": (("sscan.torch", ("Mamba",)),),
    "mamba_ssm.ops": (),
    "mamba_ssm.ops.selective_scan_interface": (("sscan.compat.mamba_ssm", _SCAN),),
    "mamba_ssm.ops.triton": (),
    "mamba_ssm.ops.triton.selective_state_update": (("sscan.compat.mamba_ssm", ("selective_state_update",)),),
    "causal_conv1d": (("sscan.compat.causal_conv1d", _CONVOLUTION),),
    "causal_conv1d.causal_conv1d_interface": (("sscan.compat.causal_conv1d", _CONVOLUTION),),
    "selective_scan_cuda": (("sscan.compat.selective_scan_cuda", ("fwd", "bwd")),),
}

# The releases whose Mamba-1 interface this is. Those of mamba_ssm from 2 on promise the kernels of Mamba-2.
_VERSIONS = {"mamba_ssm": "1.2.2", "causal_conv1d": "1.5.0"}


@dataclass(frozen=True)
class Installation:
    """What ``install`` did; ``str`` of it is a report, ``undo`` takes it back.

    Attributes
    ----------
    provided : tuple of str
        Top-level modules that are sscan's now.
    kept : tuple of str
        Those that are installed, and were left alone.
    too_late : tuple of str
        Modules that were imported before and decided then that the originals are missing.
    """

    provided: tuple[str, ...]
    kept: tuple[str, ...]
    too_late: tuple[str, ...]
    _finder: _Finder = field(repr=False)
    _shadowed: dict[str, ModuleType] = field(repr=False)

    def __str__(self) -> str:
        lines = [f"sscan.compat: {', '.join(self.provided) or 'nothing'} provided by sscan"]
        if self.kept:
            lines.append(f"left alone, because installed: {', '.join(self.kept)}")
        if self.too_late:
            lines.append(f"imported before, and do not use it: {', '.join(self.too_late)}")
        return "; ".join(lines)

    def undo(self) -> None:
        """Forget the names again, and bring back what they shadowed. What was imported from them stays with its user.

        Doing it twice does no harm.
        """
        global _current
        if self._finder not in sys.meta_path:
            return
        sys.meta_path.remove(self._finder)
        _forget(self.provided)
        sys.modules.update(self._shadowed)
        _ask_again()
        if _current is self:
            _current = None


_current: Installation | None = None


def install(force: bool = False) -> Installation:
    """Make the import names of Mamba-1 code resolve to sscan where the originals are absent.

    ``mamba_ssm`` (Mamba, ``ops.selective_scan_interface``, ``ops.triton.selective_state_update``,
    ``modules.mamba_simple``), ``causal_conv1d`` and ``selective_scan_cuda``; docs/migration.md lists the names. Other
    submodules raise ModuleNotFoundError, as if an older release were installed. Call it before what imports them is
    imported: transformers chooses its kernels when a model's module is imported, and not again.

    Parameters
    ----------
    force : bool
        Shadow originals that are installed too.

    Returns
    -------
    Installation
        What was done, which the logger ``sscan.compat`` says too. A second call undoes the first.
    """
    global _current
    if _current is not None:
        _current.undo()
    names = [name for name in _MODULES if "." not in name]
    kept = () if force else tuple(name for name in names if _is_installed(name))
    provided = tuple(name for name in names if name not in kept)
    finder = _Finder(provided)
    shadowed = _forget(provided)
    sys.meta_path.insert(0 if force else len(sys.meta_path), finder)
    _ask_again()
    _current = Installation(provided, kept, tuple(_too_late()), finder, shadowed)
    logger.log(logging.WARNING if _current.too_late else logging.INFO, "%s", _current)
    return _current


def uninstall() -> None:
    """Undo the last ``install``, if there was one."""
    if _current is not None:
        _current.undo()


def _is_installed(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


def _forget(names: Iterable[str]) -> dict[str, ModuleType]:
    """Remove these top-level modules and all below them from ``sys.modules``."""
    roots = set(names)
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in roots}


def _ask_again() -> None:
    """Have what others remember of missing modules looked up anew."""
    importlib.invalidate_caches()
    asked = sys.modules.get("transformers.utils.import_utils")
    for name in ("is_mamba_ssm_available", "is_mamba_2_ssm_available", "is_causal_conv1d_available"):
        clear = getattr(getattr(asked, name, None), "cache_clear", None)
        if clear is not None:
            clear()


def _too_late() -> Iterator[str]:
    wanted = {"mamba_inner_fn", "selective_scan_fn", "selective_state_update", *_CONVOLUTION}
    for name, module in sorted(sys.modules.items()):
        if re.fullmatch(r"transformers\.models\.\w+\.modeling_\w+", name) and wanted & vars(module).keys():
            yield name


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of ``_MODULES`` below the given top-level names, and their distributions."""

    def __init__(self, provided: tuple[str, ...]) -> None:
        self.provided = provided

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _MODULES or fullname.partition(".")[0] not in self.provided:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in _MODULES)
        return importlib.machinery.ModuleSpec(fullname, _Loader(), origin=__file__, is_package=is_package)

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterator[importlib.metadata.Distribution]:
        """For ``importlib.metadata.version``: of one name, or of every one if the context names none."""
        asked = None if context is None or context.name is None else _normalised(context.name)
        for name in _VERSIONS:
            if name in self.provided and asked in (None, _normalised(name)):
                yield _Distribution(name)


class _Loader(importlib.abc.Loader):
    """Fills a module with names of ours, and imports what is below it, as the originals do."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        for source, names in _MODULES[name]:
            ours = importlib.import_module(source)
            vars(module).update((each, getattr(ours, each)) for each in names)
        if name in _VERSIONS:
            vars(module)["__version__"] = _version(name)
        for other in _MODULES:
            if other.rpartition(".")[0] == name:
                importlib.import_module(other)


class _Distribution(importlib.metadata.Distribution):
    """Name and version, without files."""

    def __init__(self, name: str) -> None:
        self._name = name

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: {self._name}\nVersion: {_version(self._name)}\n"
        return f"{self._name}\n" if filename == "top_level.txt" else None

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


def _version(name: str) -> str:
    from sscan import __version__

    return f"{_VERSIONS[name]}+sscan.{__version__}"


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
