"""Registers and memory of every CUDA kernel that stands for its kind; no GPU needed.

``python bench/inspect/registers.py`` writes docs/registers.md, which names the compilers: numbers depend on them.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sscan.cuda._inspect import Usage, architecture, shipped, usages

if TYPE_CHECKING:
    from sscan.cuda._launch import Kernel

CAPABILITIES = ((8, 0), (9, 0), (10, 0))
PAGE = Path(__file__).parents[2] / "docs" / "registers.md"
COMPILERS = ("numba-cuda", "nvidia-nvvm", "nvidia-cuda-nvvm", "nvidia-nvjitlink")


class Compiled(NamedTuple):
    """A kernel for all architectures."""

    threads: int
    usages: tuple[Usage, ...]


def kernels() -> list[Kernel]:
    """The kernels that stand for all, those that take longest to compile first."""
    slow = ("selective_scan_backward", "selective_scan")
    return sorted(shipped(), key=lambda kernel: slow.index(kernel.module) if kernel.module in slow else len(slow))


def compiled(kernel: Kernel) -> Compiled:
    """PTX once, assembled for every architecture."""
    return Compiled(*usages(kernel, *CAPABILITIES))


def workers() -> ProcessPoolExecutor:
    """A process for each core; spawned, since the caller may have threads."""
    cores, spawn = len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(cores, spawn)


def start(pool: ProcessPoolExecutor) -> dict[Kernel, Future[Compiled]]:
    """All kernels, being compiled."""
    return {kernel: pool.submit(compiled, kernel) for kernel in kernels()}


def label(kernel: Kernel) -> str:
    """How the table names a kernel: two columns."""
    key = ", ".join(f"{part}" if part != "" else "-" for part in kernel.key)
    return f"| `{kernel.module}.{kernel.factory}` | {key} |"


def row(kernel: Kernel, result: Compiled) -> str:
    registers = " | ".join(f"{usage.registers}" for usage in result.usages)
    local = ", ".join(
        f"{usage.stack} on {architecture(capability)}"
        for capability, usage in zip(CAPABILITIES, result.usages, strict=True)
        if usage.local
    )
    return f"{label(kernel)} {result.threads} | {registers} | {result.usages[0].shared} | {local or 0} |"


def page(results: dict[Kernel, Compiled]) -> str:
    versions = []
    for package in COMPILERS:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    architectures = " | ".join(map(architecture, CAPABILITIES))
    rows = "\n".join(row(kernel, results[kernel]) for kernel in sorted(results))
    return f"""# Registers

What the CUDA kernels take of a multiprocessor, which has 65,536 registers and from 100 to 228 kB of shared memory. Each
kernel is shown in the specialisations that the tests compile, which stand for all; what the parts of a specialisation
mean, its factory in `sscan/cuda/kernels/` says. Local memory is where a thread keeps what its registers do not hold;
which kernels need it, and why, is listed in `tests/compiled/test_registers.py`, and no other may.

Written by `python bench/inspect/registers.py` with {", ".join(versions)}.

| kernel | specialisation | threads | {architectures} | shared bytes | local bytes |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}
"""


def main() -> None:
    with workers() as pool:
        futures = start(pool)
        results = {}
        for kernel, future in futures.items():
            results[kernel] = future.result()
            print(row(kernel, results[kernel]), file=sys.stderr, flush=True)
    PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
