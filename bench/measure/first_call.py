"""Seconds to import sscan and to make the first call of a new process, with an empty and with a filled kernel cache.

    python bench/measure/first_call.py [--gpu]

On a GPU, CuPy is imported and brought up before sscan's first call; the bar for a warm one is 1.5 s.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = """
import sys
import time
gpu = sys.argv[1] == "gpu"
start = time.perf_counter()
import sscan
imported = time.perf_counter()
from problems import scan_problem, cotangent
problem = scan_problem((1, 64, 256))
dy = cotangent(problem)
wait = lambda: None
if gpu:
    import cupy
    problem = {k: cupy.asarray(x) if hasattr(x, "shape") else x for k, x in problem.items()}
    dy, wait = cupy.asarray(dy), cupy.cuda.Device().synchronize
    wait()
begin = time.perf_counter()
y, _, checkpoints = sscan.selective_scan_forward(**problem)
wait()
forward = time.perf_counter()
sscan.selective_scan_backward(dy, **problem, checkpoints=checkpoints)
wait()
print(imported - start, begin - imported, forward - begin, time.perf_counter() - forward)
loaded = [name for name in ("numba", "numba.cuda", "llvmlite") if name in sys.modules]
print(" ".join(loaded) or "nothing")
"""


def measure(cache: str, device: str) -> tuple[list[float], str]:
    """(import, inputs, forward, backward) of a new process with this cache folder, and compilers that it imported."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache, "CUPY_CACHE_DIR": os.path.join(cache, "cupy")}
    here = os.path.dirname(os.path.abspath(__file__))
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM, device],
        env=environment, cwd=here, check=True, stdout=subprocess.PIPE, text=True,
    ).stdout.splitlines()  # fmt: skip
    return [float(x) for x in output[-2].split()], output[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on CuPy arrays")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    given = parser.parse_args()
    lines = [
        "| cache | import, s | inputs | forward | backward | compilers imported |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm", "warm"):
            times, loaded = measure(cache, "gpu" if given.gpu else "cpu")
            lines.append(f"| {name} | " + " | ".join(f"{x:.2f}" for x in times) + f" | {loaded} |")
            print(lines[-1], flush=True)
    if given.out:
        given.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
