"""What kernels become: which there are, the registers and memory that they take, and their machine code."""

import importlib
import importlib.metadata
import pkgutil
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from sscan.cuda import _launch, kernels

Capability = tuple[int, int]


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


def shipped() -> list[_launch.Kernel]:
    """The kernels that stand for all: every module's, in the order of names and, in a module, of its own list."""
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__) if not module.name.startswith("_")]
    modules = [importlib.import_module(f"{kernels.__name__}.{name}") for name in (*names, "_sums")]
    return [kernel for module in modules for kernel in module.shipped()]


def architecture(capability: Capability) -> str:
    """As the assembler names it: sm_90 for (9, 0)."""
    return f"sm_{capability[0]}{capability[1]}"


def ptx(kernel: _launch.Kernel) -> str:
    """Its PTX, the same for every GPU."""
    return _launch.compile_ptx(kernel)[0]


def usages(kernel: _launch.Kernel, *capabilities: Capability) -> tuple[int, tuple[Usage, ...]]:
    """Its threads, and what it takes on each of these GPUs."""
    code, threads = _launch.compile_ptx(kernel)
    return threads, tuple(usage_of(_launch.assemble(code, capability)[1]) for capability in capabilities)


def machine_code(cubin: bytes) -> str:
    """What a cubin has of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([disassembler(), "-c", str(path)], check=True, capture_output=True, text=True).stdout


def disassembler() -> str:
    """The path of nvdisasm; FileNotFoundError says how to get it."""
    if found := shutil.which("nvdisasm"):
        return found
    try:
        package = importlib.metadata.distribution("nvidia-cuda-nvdisasm")
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError("no nvdisasm; it comes with: pip install nvidia-cuda-nvdisasm") from None
    (file,) = (file for file in package.files or () if file.stem == "nvdisasm")
    return str(package.locate_file(file))


def sass(kernel: _launch.Kernel, capability: Capability) -> str:
    """Its machine code for a GPU."""
    return machine_code(_launch.assemble(ptx(kernel), capability)[0])
