"""What counting and compressing say of the held-out part of a text: bits per byte, beside train_beside.py.

pip install pyppmd
python bench/measure/count_baselines.py --text corpus --out bench/results/training-DATE/baselines.json
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path

import numpy as np
import pyppmd

from sscan.tasks.backoff import BackoffModel
from sscan.tasks.text import held_out_start, read_text, text_files

ORDERS = (2, 4, 6)  # of this corpus 7 is worse than 6


PPM_ORDER, PPM_MEMORY = 16, (1 << 31) - (1 << 17)


def xz(data: bytes) -> int:
    """Bytes after ``xz -9e``."""
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def ppmd(data: bytes) -> int:
    """Bytes after 7-Zip's PPMd."""
    return len(pyppmd.compress(data, max_order=PPM_ORDER, mem_size=PPM_MEMORY))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    data = np.concatenate([read_text(path) for path in text_files([args.text])])
    start = held_out_start(data)
    size = data.size - start
    before, held_out, whole = (part.tobytes() for part in (data[:start], data[start:], data))
    counted = BackoffModel(data[:start], max(ORDERS))
    found = {f"back-off of order {order}": counted.bits_per_byte(data, start, order) for order in ORDERS}
    for name, compressed in (("xz -9e", xz), (f"PPMd of order {PPM_ORDER}", ppmd)):
        found[f"{name}, held-out part alone"] = 8 * compressed(held_out) / size
        found[f"{name}, behind the rest"] = 8 * (compressed(whole) - compressed(before)) / size
    print(found)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
