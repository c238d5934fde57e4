"""Everything that is measured, one program after the other: ``python bench/run.py gpu`` or ``python bench/run.py cpu``.

Each program of ``bench/measure`` has a process of its own, checks results before it times, and writes its figures
beside their bars into a file NAME-DATE.md of ``--out``. At the end stands how many bars each has missed. Exit code 1
if one of the programs has failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

HERE = Path(__file__).parent
MISSED = "**missed**"  # behind a figure that does not reach its bar

PROGRAMS = {
    "gpu": {
        "cuda": "compare_gpu.py",
        "host": "compare_host.py",
        "cuda-scans": "compare_scans.py",
        "cuda-small": "compare_small.py",
        "torch": "bench_torch_module.py",
        "decode-cuda": "bench_decode_gpu.py",
        "decode-cuda-1.4b": "bench_decode_gpu.py --size 1.4b",
        "generation-130m": "compare_generation.py --size 130m",
        "generation-1.4b": "compare_generation.py --size 1.4b",
        "figure8": "figure8.py",
        "memory-125m": "memory_125m.py",
        "first-call-cuda": "first_call.py --gpu",
    },
    "cpu": {
        "cpu": "compare.py",
        "cpu-ops": "compare_ops.py",
        "decode": "bench_decode.py",  # takes llama-cpp-python and gguf
        "transformers": "bench_transformers.py",
        "memory": "memory.py --lengths",
        "first-call": "first_call.py",
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=PROGRAMS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the files")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder (default bench/results)")
    given = parser.parse_args()
    programs = PROGRAMS[given.device]
    if unknown := set(given.only or ()) - programs.keys():
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}, only {', '.join(programs)}")
    given.out.mkdir(parents=True, exist_ok=True)
    files = {name: given.out / f"{name}-{datetime.now(timezone.utc):%Y-%m-%d}.md" for name in given.only or programs}
    if there := [str(file) for file in files.values() if file.exists()]:
        parser.error(f"these are there already: {', '.join(there)}; give another --out")
    summary, failed = [], False
    for name, file in files.items():
        program, *options = programs[name].split()
        print(f"== {name}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        code = subprocess.run(
            [sys.executable, HERE / "measure" / program, *options, "--out", file], check=False
        ).returncode
        written = file.exists()
        missed = file.read_text(encoding="utf-8").count(MISSED) if written else 0
        failed |= bool(code) or not written
        verdict = f"{missed} bars missed" if written else "has written nothing"
        summary.append(f"{name:20} {time.perf_counter() - start:6.0f} s, exit code {code}, {verdict}")
    print("\n".join(["", *summary]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
