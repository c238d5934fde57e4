"""Folders with the modules of mamba_ssm and causal_conv1d, for ``sys.path``.

A path, and not an importer of our own, because others hand it on: processes that multiprocessing (whatever the start
method), joblib or pytest-xdist start have their parent's before they import anything.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import ModuleType

logger = logging.getLogger(__name__)

# Each has a folder of its own in names/, with its modules in it, and its metadata if it has a distribution.
NAMES = (
    "mamba_ssm", "causal_conv1d", "causal_conv1d_cuda", "selective_scan_cuda", "selective_scan_cuda_core",
    "selective_scan_cuda_oflex",
)  # fmt: skip
_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "names")


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
    _shadowed: dict[str, ModuleType] = field(repr=False)

    def __str__(self) -> str:
        lines = [f"sscan.compat: {', '.join(self.provided) or 'nothing'} provided by sscan"]
        if self.kept:
            lines.append(f"left alone, because installed: {', '.join(self.kept)}")
        if self.too_late:
            lines.append(f"imported before, and do not use it: {', '.join(self.too_late)}")
        return "; ".join(lines)

    @property
    def folders(self) -> list[str]:
        """What was added to ``sys.path``."""
        return [os.path.join(_FOLDER, name) for name in self.provided]

    def undo(self) -> None:
        """Forget the names again, and bring back what they shadowed. What was imported from them stays with its user.

        Doing it twice does no harm.
        """
        global _current
        if _current is not self:
            return
        _current = None
        _leave_path()
        _forget(self.provided)
        sys.modules.update(self._shadowed)
        _ask_again()


_current: Installation | None = None


def install(force: bool = False) -> Installation:
    """Make the import names of Mamba-1 code resolve to sscan where the originals are absent.

    ``mamba_ssm``, ``causal_conv1d``, and the extension modules of both and of VMamba; docs/migration.md lists the
    names. What belongs to Mamba-2 raises a ModuleNotFoundError that says so. Call it before what imports them is
    imported: transformers chooses its kernels when a model's module is imported, and not again. Processes that
    multiprocessing starts have the names too.

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
    uninstall()
    _leave_path()  # a process started by one that has the names has the folders
    kept = () if force else tuple(name for name in NAMES if _is_installed(name))
    provided = tuple(name for name in NAMES if name not in kept)
    _current = Installation(provided, kept, tuple(_too_late()), _forget(provided))
    place = 0 if force else len(sys.path)
    sys.path[place:place] = _current.folders
    _ask_again()
    logger.log(logging.WARNING if _current.too_late else logging.INFO, "%s", _current)
    return _current


def uninstall() -> None:
    """Undo the last ``install``, if there was one."""
    if _current is not None:
        _current.undo()


def _leave_path() -> None:
    sys.path[:] = [entry for entry in sys.path if os.path.dirname(entry) != _FOLDER]
    importlib.invalidate_caches()


def _is_installed(name: str) -> bool:
    module = sys.modules.get(name)
    spec = importlib.util.find_spec(name) if module is None else getattr(module, "__spec__", None)
    if spec is None:
        return module is not None  # somebody's own, without a file
    return not str(spec.origin).startswith(_FOLDER)


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
    wanted = {
        "mamba_inner_fn",
        "selective_scan_fn",
        "selective_state_update",
        "causal_conv1d_fn",
        "causal_conv1d_update",
    }
    for name, module in sorted(sys.modules.items()):
        if re.fullmatch(r"transformers\.models\.\w+\.modeling_\w+", name) and wanted & vars(module).keys():
            yield name


# --- What is not there ------------------------------------------------------------------------------------------------


def refuse(name: str, part: str) -> NoReturn:
    """ModuleNotFoundError, for which most code has an answer, with a sentence about what is missing."""
    raise ModuleNotFoundError(
        f"{name} is not here: sscan.compat has the names of Mamba-1, and {name} is of {part}", name=name
    )


def absent(module: str, parts: Mapping[str, str]) -> Callable[[str], Any]:
    """``__getattr__`` of a module: an import of one of these names says which part of the original it is of."""

    def missing(name: str) -> Any:
        if name in parts:
            refuse(f"{module}.{name}", parts[name])
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return missing
