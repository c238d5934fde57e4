"""Peak memory of the scan beyond its inputs, as a multiple of one (batch, dim, length) float32 array. Linux only."""

import os
import subprocess
import sys

SHAPE = (1, 1536, 8192)
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


def main() -> None:
    unit = 4 * SHAPE[0] * SHAPE[1] * SHAPE[2]
    here = os.path.dirname(os.path.abspath(__file__))
    for what in ("forward", "forward + backward"):
        output = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(shape=SHAPE), what],
            cwd=here,
            check=True,
            capture_output=True,
            text=True,
        )
        print(f"{what} at {SHAPE}, state 16: {int(output.stdout) / unit:.2f} arrays of {unit / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
