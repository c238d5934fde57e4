"""Devices to kernel packages. A package is imported when the first array of its device arrives."""

import concurrent.futures.thread  # noqa: F401  # SciPy imports it; once the main thread is done, Python lets nobody
import functools
import importlib
import importlib.util
from types import ModuleType

from sscan._arrays import INSTALL_CUDA

_PACKAGES = {"cpu": "sscan.cpu", "cuda": "sscan.cuda"}
_NEEDED = {"cuda": ("numba_cuda", "cuda.core")}  # imported late or never, but their absence is better known at once


def for_device(op: str, device: str) -> ModuleType:
    """The kernels for a device such as "cpu" or "cuda:1"; RuntimeError if a library is missing that they need."""
    try:
        return _package(device.partition(":")[0])
    except ModuleNotFoundError as error:
        if (error.name or "sscan").startswith("sscan"):
            raise
        raise RuntimeError(f"{op}: arrays on a GPU need {error.name}, which is installed by: {INSTALL_CUDA}") from error


def register(kind: str, package: str) -> None:
    """Serve a kind of device by the module of this name."""
    _PACKAGES[kind] = package


@functools.cache
def _package(kind: str) -> ModuleType:
    for library in _NEEDED.get(kind, ()):
        if not _is_installed(library):
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
    return importlib.import_module(_PACKAGES[kind])


def _is_installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:  # the parent of a submodule
        return False
