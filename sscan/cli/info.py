"""``sscan info``: devices, versions, threads and the cache folder."""

from __future__ import annotations

import itertools
import os
import platform
from typing import TYPE_CHECKING, Any

import sscan
from sscan.cli import _devices
from sscan.cli._failures import Mistake

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator


def add_to(commands: Any) -> None:
    """Add the command to those that there are."""
    parser = commands.add_parser("info", help="devices, versions, threads and cache folder")
    parser.set_defaults(command=_info)


def _info(options: argparse.Namespace) -> int:
    from sscan.cpu import _parallel

    print(f"sscan       {sscan.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for title, names in [
        ("needs", ["numpy", "numba", "llvmlite", "scipy", "ml_dtypes", "safetensors"]),
        ("works with", ["torch", "jax", "cupy", "numba-cuda"]),
    ]:
        print(f"{title:<12}" + ", ".join(f"{name} {_devices.version(name)}" for name in names))
    print(f"CPU         {os.cpu_count()} cores, {_parallel.threads()} threads (NUMBA_NUM_THREADS)")
    print("threading   kernels release the GIL and run on sscan's own Python threads; no Numba threading layer")
    print(f"cache       {_parallel.cache_folder() or 'none'} (NUMBA_CACHE_DIR)")
    for title, line in zip(itertools.chain(["CUDA"], itertools.repeat("")), _gpus(), strict=False):
        print(f"{title:<12}{line}")
    return 0


def _gpus() -> Iterator[str]:
    """Lines about the GPUs, or the one that says why there is none."""
    try:
        runtime = _devices.cupy_with_gpu().cuda.runtime
    except Mistake as mistake:
        yield f"no GPU can be used: {mistake}"
        return
    driver, built = (f"{n // 1000}.{n % 1000 // 10}" for n in (runtime.driverGetVersion(), runtime.runtimeGetVersion()))
    yield f"the driver supports CUDA {driver}, CuPy brings CUDA {built}"
    for i in range(runtime.getDeviceCount()):
        gpu = runtime.getDeviceProperties(i)
        capability, memory = f"{gpu['major']}.{gpu['minor']}", gpu["totalGlobalMem"] / 2**30
        yield f"GPU {i}: {gpu['name'].decode()}, compute capability {capability}, {memory:.0f} GiB"
