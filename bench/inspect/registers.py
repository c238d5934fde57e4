"""Registers and memory of every CUDA kernel that stands for its kind; no GPU needed.

``python bench/inspect/registers.py`` writes docs/registers.md. Numbers depend on the compilers, so the page names them,
and the state of sources and compilers, by which the tests know whether it is of what they find.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import re
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sscan.cuda._inspect import Usage, architecture, machine_code, shipped, usage_of
from sscan.cuda._launch import assemble, cache_folder, comes_early, compile_ptx

if TYPE_CHECKING:
    from sscan.cuda._launch import Kernel

CAPABILITIES = ((8, 0), (9, 0), (10, 0))
PAGE = Path(__file__).parents[2] / "docs" / "registers.md"
WAIT = "ACQBULK"  # what griddepcontrol.wait becomes
COMPILERS = ("numba-cuda", "nvidia-nvvm", "nvidia-cuda-nvvm", "nvidia-nvjitlink")


class Compiled(NamedTuple):
    """A kernel for all architectures; ``early``: from sm_90 on, it comes while the kernel ahead of it ends."""

    threads: int
    usages: tuple[Usage, ...]
    early: bool


def kernels() -> list[Kernel]:
    """The kernels that stand for all, those that take longest to compile first."""
    slow = ("selective_scan_backward", "selective_scan")
    return sorted(shipped(), key=lambda kernel: slow.index(kernel.module) if kernel.module in slow else len(slow))


def compiled(kernel: Kernel) -> Compiled:
    """PTX once, assembled for every architecture."""
    ptx, threads = compile_ptx(kernel)
    made = {capability: assemble(ptx, capability) for capability in CAPABILITIES}
    early = [cubin for capability, (cubin, _) in made.items() if comes_early(ptx, capability)]
    if not all(waits_first(machine_code(cubin)) for cubin in early):
        raise ValueError(f"{kernel} reads or writes memory before it has waited for the kernel ahead of it")
    return Compiled(threads, tuple(usage_of(log) for _, log in made.values()), bool(early))


def waits_first(code: str) -> bool:
    """Whether no memory but the parameters is read or written before the wait, in machine code for a GPU."""
    before, wait, _ = code.partition(WAIT)
    return bool(wait) and not re.search(r"\b(LD|ST|LDG|STG|ATOM|ATOMG|RED|REDG)[. ]", before)


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


def state() -> str | None:
    """A digest of the kernels' sources and of the compilers, as the cache of compiled kernels has it."""
    folder = cache_folder()
    return None if folder is None else f"{folder.name}, Python {sys.version_info.major}.{sys.version_info.minor}"


def row(kernel: Kernel, result: Compiled) -> str:
    registers = " | ".join(f"{usage.registers}" for usage in result.usages)
    local = ", ".join(
        f"{usage.stack} on {architecture(capability)}"
        for capability, usage in zip(CAPABILITIES, result.usages, strict=True)
        if usage.local
    )
    last = f"{local or 0} | {'yes' if result.early else 'no'} |"
    return f"{label(kernel)} {result.threads} | {registers} | {result.usages[0].shared} | {last}"


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
which kernels need it, and why, is listed in `tests/compiled/test_registers.py`, and no other may. From sm_90 on some
kernels come early, while the one before them ends, and their machine code touches no memory before they have waited for
that one.

Written by `python bench/inspect/registers.py` with {", ".join(versions)}, of `{state()}`.

| kernel | specialisation | threads | {architectures} | shared bytes | local bytes | early |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{rows}
"""


def recorded() -> dict[Kernel, Compiled] | None:
    """What the page says, if it is of these sources and compilers."""
    text = PAGE.read_text(encoding="utf-8")
    if state() is None or f"`{state()}`" not in text:
        return None
    return {kernel: of_row(label(kernel), text) for kernel in kernels()}


def of_row(head: str, text: str) -> Compiled:
    """A row of the page read back: of what a thread has in local memory, the whole."""
    (line,) = (line for line in text.split("\n") if line.startswith(head))
    threads, *registers, shared, local, early = line[len(head) :].strip("| ").split(" | ")
    bytes_of = {name: int(count) for count, name in re.findall(r"(\d+) on (sm_\d+)", local)}
    names = map(architecture, CAPABILITIES)
    of_each = zip(registers, names, strict=True)
    usages = tuple(Usage(int(count), int(shared), bytes_of.get(name, 0), 0, 0) for count, name in of_each)
    return Compiled(int(threads), usages, early == "yes")


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
