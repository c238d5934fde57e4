"""Compiled kernels on disk: a folder for each state of the kernels' sources, with files that are whole or not there.

What is read here is run. So it has to be what this user or the administrator has written, where nobody else may write;
and a checksum comes before everything else, for disks and interrupted copies.
"""

import contextlib
import functools
import hashlib
import importlib.resources
import os
import sys
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import platformdirs

_SUM = hashlib.sha256().digest_size  # bytes of the checksum that a file begins with


# --- the folder ------------------------------------------------------------------------------------------------------


def folder(package: str, *patterns: str, versions: str = "") -> Path | None:
    """Where compiled kernels of ``sscan.<package>`` are kept, by digest of those sources and of ``versions``.

    It lies in $NUMBA_CACHE_DIR or the user's cache folder; None for a user who has neither.
    """
    root = os.environ.get("NUMBA_CACHE_DIR") or _of_user()
    if root is None:
        return None
    digest = hashlib.sha256(versions.encode())
    for source in _sources(package, patterns) or [_release()]:
        digest.update(source)
    return Path(root).absolute() / f"{package}-{digest.hexdigest()[:16]}"


def _of_user() -> str | None:
    """The user's cache folder for sscan; None for one without a home, of whom older platformdirs say "~"."""
    try:
        found = platformdirs.user_cache_dir("sscan", appauthor=False)
    except RuntimeError:
        return None
    return None if found.startswith("~") else found


def _sources(package: str, patterns: tuple[str, ...]) -> list[bytes]:
    """The files of a package, on disk or in a zip; none if it comes without its sources, in a frozen program say."""
    found = []
    for pattern in patterns:
        *below, name = pattern.split("/")
        place = importlib.resources.files(__package__) / package
        for part in below:
            place = place / part
        with contextlib.suppress(OSError):
            files = sorted(place.iterdir(), key=lambda file: file.name)
            found += [file.read_bytes() for file in files if fnmatch(file.name, name)]
    return found


def _release() -> bytes:
    version: str = sys.modules[__package__].__version__
    return version.encode()


# --- files -----------------------------------------------------------------------------------------------------------


def read(folder: Path | None, name: str) -> bytes | None:
    """What ``write`` put there; None if there is nothing, not all of it, or nothing that may be trusted."""
    if folder is None:
        return None
    try:
        if not _is_trusted(folder, folder.stat()):
            return None
        with (folder / name).open("rb") as file:
            if not _is_trusted(folder, os.fstat(file.fileno())):
                return None
            data = file.read()
    except OSError:
        return None
    return data[_SUM:] if hashlib.sha256(data[_SUM:]).digest() == data[:_SUM] else None


def write(folder: Path | None, name: str, data: bytes) -> None:
    """All of it or nothing, however many processes do so at once; nothing where it cannot be kept."""
    if folder is None:
        return
    temporary = folder / f"{name}.{os.urandom(8).hex()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        if not _is_trusted(folder, folder.stat()):
            return
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(data).digest() + data)
            os.replace(temporary, folder / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _is_trusted(folder: Path, status: Any) -> bool:
    """Whether nobody but this user and the administrator can have written a folder or a file in it."""
    if not hasattr(os, "geteuid"):  # elsewhere users' folders are closed to others
        return True
    trusted = status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022
    if not trusted:
        _warn(folder)
    return trusted


@functools.cache
def _warn(folder: Path) -> None:
    warnings.warn(
        f"sscan: compiled kernels in {folder} are not used, and compiled again: the folder or a file in it belongs to "
        "another user, or others may write to it (see NUMBA_CACHE_DIR)",
        RuntimeWarning,
        stacklevel=2,
    )
