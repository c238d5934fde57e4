"""Peak memory of the scan beyond its inputs, 16 states. Linux only.

python bench/measure/memory.py              # in arrays of (batch, dim, length) float32
python bench/measure/memory.py --lengths    # in MB, a table over the length
"""

import argparse
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

SHAPE = (1, 1536, 8192)
LENGTHS = [2**k for k in range(11, 19)]
PROGRAM = """
import sys
from problems import cotangent, scan_problem
import sscan

def status(field):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

def call(problem, dy):
    if sys.argv[1] == "forward":
        return sscan.selective_scan(**problem)
    y, last_state, checkpoints = sscan.selective_scan_forward(**problem)
    return y, last_state, sscan.selective_scan_backward(dy, **problem, checkpoints=checkpoints)

warm = scan_problem((1, 64, 256))
call(warm, cotangent(warm))
problem = scan_problem({shape})
dy = cotangent(problem)
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
before = status("VmRSS")
result = call(problem, dy)
print(status("VmHWM") - before)
"""


def peak(shape: tuple[int, int, int], what: str) -> int:
    """Bytes, in a process of its own."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = [sys.executable, "-c", PROGRAM.format(shape=shape), what]
    return int(subprocess.run(command, cwd=here, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", action="store_true", help="a table over the length")
    parser.add_argument("--out", type=Path, help="also write it to this file")
    given = parser.parse_args()
    lines = []
    for line in over_lengths() if given.lengths else in_arrays():
        print(line, flush=True)
        lines.append(line)
    if given.out:
        given.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


def in_arrays() -> Iterator[str]:
    unit = 4 * math.prod(SHAPE)
    for what in ("forward", "forward + backward"):
        yield f"{what} at {SHAPE}, state 16: {peak(SHAPE, what) / unit:.2f} arrays of {unit / 1e6:.0f} MB"


def over_lengths() -> Iterator[str]:
    yield from (
        f"{datetime.now(timezone.utc):%Y-%m-%d}, {platform.machine()}, Python {platform.python_version()}, float32:",
        "`python bench/measure/memory.py --lengths`. Peak of the process beyond the inputs; 0.0 is memory that the",
        "process had freed before. The last column is the array that a scan keeps which does not make states again:",
        "(batch, dim, length, state).",
        "",
        "| (batch, dim, length) | forward, MB | forward and backward, MB | all states of the scan, MB |",
        "| --- | --- | --- | --- |",
    )
    for length in LENGTHS:
        shape = (1, 256, length)
        sizes = [peak(shape, what) / 1e6 for what in ("forward", "forward + backward")]
        yield f"| {shape} | {sizes[0]:.1f} | {sizes[1]:.1f} | {4 * 16 * math.prod(shape) / 1e6:.1f} |"


if __name__ == "__main__":
    main()
