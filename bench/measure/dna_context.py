"""How much context helps a model of DNA: bits per base by how many bases of a window have been read.

    python bench/measure/dna_context.py chrX.fa.gz runs/dna/mamba-1024 runs/dna/mamba-16384 --out context.json

Windows lie evenly in what training holds out, and every model reads the same ones, from their beginnings.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from sscan.models.files import write_atomically
from sscan.nn import MambaLM
from sscan.tasks.dna import DNA, DNAOptions
from sscan.tasks.scoring import log_likelihoods
from sscan.tasks.sequences import is_base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", type=Path)
    parser.add_argument("models", type=Path, nargs="+", help="folders of runs of `sscan train dna`")
    parser.add_argument("--length", type=int, default=1 << 14, help="of a window")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    task = DNA(DNAOptions(length=args.length), [args.fasta])
    regions = [task.data[start:end] for start, end in task.held_out]
    windows = [
        region[at : at + args.length] for region in regions for at in range(0, region.size - args.length, args.length)
    ]
    windows = windows[:: max(len(windows) // args.windows, 1)][: args.windows]
    edges = [1, *(1 << k for k in range(6, args.length.bit_length() - 1, 2)), args.length]
    found = {}
    for folder in args.models:
        model = MambaLM.from_pretrained(folder)
        log_p = np.array([np.concatenate(list(log_likelihoods(model, window))) for window in windows])
        bases = np.array([is_base(window[1:]) for window in windows])
        parts = [(slice(a - 1, b - 1), f"{a} to {b - 1}") for a, b in zip(edges, edges[1:], strict=False)]
        found[folder.name] = {
            name: float(-log_p[:, part][bases[:, part]].mean() / np.log(2))
            for part, name in parts
            if bases[:, part].any()
        }
        print(folder.name, {name: round(bits, 4) for name, bits in found[folder.name].items()}, flush=True)
    about = {"windows": len(windows), "length": args.length, "bits_per_base": found}
    write_atomically(args.out, lambda new: new.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8"))


if __name__ == "__main__":
    main()
