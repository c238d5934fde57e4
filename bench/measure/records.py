"""What measurements in PyTorch say of themselves, why one is missing, and their files: JSON, and a page of it."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import platform
import shlex
import sys
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import torch

import sscan
from sscan.models.files import write_together

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Record = dict[str, Any]
OUT_OF_MEMORY = "out of memory"


def about(device: str) -> Record:
    """Day, device, versions and command."""
    versions = {"Python": platform.python_version(), "sscan": sscan.__version__, "torch": torch.__version__}
    name = platform.processor() or platform.machine()
    if device == "cuda":
        import cupy

        name = torch.cuda.get_device_name()
        versions |= {
            "CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version()), "CuPy": cupy.__version__,
            "numba-cuda": importlib.metadata.version("numba-cuda"),
        }  # fmt: skip
    return {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}", "device": name, "versions": versions,
        "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip


def named(record: Record) -> str:
    """Command and versions, for a page."""
    return f"`{record['command']}`; {', '.join(f'{name} {version}' for name, version in record['versions'].items())}."


def cause(error: Exception) -> str:
    """Why a measurement failed, fit for a cell of a table."""
    said = f"{type(error).__name__}: {error}"
    short = said if len(said) <= 300 else f"{said[:300]} ..."
    return OUT_OF_MEMORY if "OutOfMemory" in said else short.replace("|", "/").replace("\n", " ")


def free() -> None:
    """Give unused memory of the GPU back, for whoever comes next."""
    gc.collect()
    if torch.cuda.is_available():
        import cupy

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        cupy.get_default_memory_pool().free_all_blocks()


def write(out: Path, record: Record, page: Callable[[Record], str]) -> None:
    """OUT.json and OUT.md, neither of them ever half written."""
    texts = {".json": json.dumps(record, indent=1) + "\n", ".md": page(record)}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_together(
        {out.with_suffix(end): lambda new, text=text: new.write_text(text, encoding="utf-8")
         for end, text in texts.items()}
    )  # fmt: skip


def table(*rows: list[str]) -> list[str]:
    """Lines of a table in Markdown; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:], ""]
