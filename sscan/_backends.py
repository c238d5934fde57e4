"""Devices to kernel packages. A package is imported when the first array of its device arrives."""

import importlib
from types import ModuleType

_PACKAGES = {"cpu": "sscan.cpu"}


def for_device(op: str, device: str) -> ModuleType:
    """The kernels for a device: a package with one module for each op. RuntimeError if there are none."""
    if device not in _PACKAGES:
        raise RuntimeError(
            f"{op}: sscan has no kernels for {device} arrays in this version, only for arrays in CPU memory; "
            'a version with them is installed by: pip install --upgrade "sscan[cuda13]"'
        )
    return importlib.import_module(_PACKAGES[device])
