"""Registers and memory of every CUDA kernel that stands for its kind: ``python bench/registers.py``, no GPU needed.

Writes docs/registers.md. Numbers depend on the versions of the compilers, which the page names.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import multiprocessing
import os
import re
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sscan.cuda import _launch

if TYPE_CHECKING:
    from sscan.cuda._launch import Kernel

CAPABILITIES = ((8, 0), (9, 0), (10, 0))
PAGE = Path(__file__).parent.parent / "docs" / "registers.md"
COMPILERS = ("numba-cuda", "nvidia-nvvm", "nvidia-cuda-nvvm", "nvidia-nvjitlink")


class Usage(NamedTuple):
    """What a kernel takes on one architecture: registers of a thread, bytes of everything else."""

    registers: int
    shared: int  # of a block
    stack: int  # of a thread, as is what follows
    spill_stores: int
    spill_loads: int

    @property
    def local(self) -> bool:
        """Whether a thread keeps something in memory that has no room in registers."""
        return bool(self.stack or self.spill_stores or self.spill_loads)


class Compiled(NamedTuple):
    """A kernel for all architectures."""

    threads: int
    usages: tuple[Usage, ...]


def shipped() -> list[Kernel]:
    """The kernels that stand for all, those that take longest to compile first."""
    names = sorted(path.stem for path in (Path(_launch.__file__).parent / "kernels").glob("[!_]*.py"))
    modules = [importlib.import_module(f"sscan.cuda.kernels.{name}") for name in (*names, "_sums")]
    kernels = [kernel for module in modules for kernel in module.shipped()]
    slow = ("selective_scan_backward", "selective_scan")
    return sorted(kernels, key=lambda kernel: slow.index(kernel.module) if kernel.module in slow else len(slow))


def usage_of(log: str) -> Usage:
    """What the assembler says of the one kernel that it was given."""

    def number(pattern: str, missing: str | None = None) -> int:
        found = re.findall(pattern, log) or ([missing] if missing is not None else [])
        if len(found) != 1:
            raise ValueError(f"{pattern!r} is not once in the assembler's log: {log}")
        return int(found[0])

    return Usage(
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes smem", "0"),
        number(r"(\d+) bytes stack frame"),
        number(r"(\d+) bytes spill stores"),
        number(r"(\d+) bytes spill loads"),
    )


def compiled(kernel: Kernel) -> Compiled:
    """PTX once, assembled for every architecture."""
    ptx, threads = _launch.compile_ptx(kernel)
    return Compiled(threads, tuple(usage_of(_launch.assemble(ptx, capability)[1]) for capability in CAPABILITIES))


def workers() -> ProcessPoolExecutor:
    """A process for each core, behind all others; spawned, since the caller may have threads."""
    cores, spawn = len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(cores, spawn, initializer=os.nice, initargs=(10,))


def start(pool: ProcessPoolExecutor) -> dict[Kernel, Future[Compiled]]:
    """All kernels, being compiled."""
    return {kernel: pool.submit(compiled, kernel) for kernel in shipped()}


def label(kernel: Kernel) -> str:
    """How the table names a kernel: two columns."""
    key = ", ".join(f"{part}" if part != "" else "-" for part in kernel.key)
    return f"| `{kernel.module}.{kernel.factory}` | {key} |"


def name(capability: tuple[int, int]) -> str:
    """As the assembler names an architecture."""
    return f"sm_{capability[0]}{capability[1]}"


def row(kernel: Kernel, result: Compiled) -> str:
    registers = " | ".join(f"{usage.registers}" for usage in result.usages)
    local = ", ".join(
        f"{usage.stack} on {name(capability)}"
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
    architectures = " | ".join(map(name, CAPABILITIES))
    rows = "\n".join(row(kernel, results[kernel]) for kernel in sorted(results))
    return f"""# Registers

What the CUDA kernels take of a multiprocessor, which has 65,536 registers and from 100 to 228 kB of shared memory. Each
kernel is shown in the specialisations that the tests compile, which stand for all; what the parts of a specialisation
mean, its factory in `sscan/cuda/kernels/` says. Local memory is where a thread keeps what its registers do not hold;
which kernels need it, and why, is listed in `tests/test_cuda_ptx.py`, and no other may.

Written by `python bench/registers.py` with {", ".join(versions)}.

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
