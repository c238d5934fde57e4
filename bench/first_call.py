"""Seconds to import sscan and to make the first call of a new process, with an empty and with a filled kernel cache."""

import os
import subprocess
import sys
import tempfile

PROGRAM = """
import time
start = time.perf_counter()
import sscan
imported = time.perf_counter()
import numpy as np
from problems import scan_problem, cotangent
problem = scan_problem((1, 64, 256))
begin = time.perf_counter()
y, _, checkpoints = sscan.selective_scan_forward(**problem)
forward = time.perf_counter()
sscan.selective_scan_backward(cotangent(problem), **problem, checkpoints=checkpoints)
print(imported - start, forward - begin, time.perf_counter() - forward)
"""


def measure(cache: str) -> list[float]:
    """(import, forward, backward) of a new process with this cache folder."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    here = os.path.dirname(os.path.abspath(__file__))
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment, cwd=here, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [float(x) for x in output.stdout.split()]


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        print("cache   import  forward  backward (seconds)")
        for name in ("cold", "warm", "warm"):
            print(f"{name}   " + "  ".join(f"{x:7.2f}" for x in measure(cache)))


if __name__ == "__main__":
    main()
