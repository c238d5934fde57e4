"""Figure 5's question on a FASTA file: is DNA predicted better from longer contexts? A model for each length.

    python bench/measure/dna_lengths.py chrX.fa.gz --lengths 1024 4096 16384 --device cuda --out runs/dna
    python bench/measure/dna_lengths.py chrX.fa.gz --lengths 1024 --model transformer --n-layer 6 --out runs/dna
    python bench/measure/dna_lengths.py chrX.fa.gz --baselines --out runs/dna

All have the same number of tokens a step, and of steps. Each leaves ``MODEL-LENGTH.json``: held-out bits per
base, in windows of its length and with the states carried along, tokens per second of training, and how much of the
GPU's memory was taken. What is finished is not run again; what `--minutes` has stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Any

from sscan.cli._devices import array_module
from sscan.tasks.dna import DNA, TRANSFORMER, DNAOptions
from sscan.tasks.loop import train
from sscan.tasks.reproduce import Until, device_name, versions
from sscan.tasks.task import PRECISIONS
from sscan.tasks.training import STATE_FILE, TrainingRun


def options_of(args: argparse.Namespace, length: int) -> DNAOptions:
    """What a model is trained with."""
    return DNAOptions(
        d_model=args.d_model, n_layer=args.n_layer, length=length, batch=max(args.tokens // length, 1), lr=args.lr,
        steps=args.steps, precision=args.precision, length_warmup=args.length_warmup, evaluations=args.evaluations,
        layers=TRANSFORMER if args.model == "transformer" else None,
    )  # fmt: skip


def run_length(args: argparse.Namespace, length: int, stop: Until) -> dict[str, Any] | None:
    """Train and measure; None if there was no time to."""
    xp, folder, options = array_module(args.device), args.out / f"{args.model}-{length}", options_of(args, length)
    if (folder / STATE_FILE).exists():
        run = TrainingRun.load(folder, DNA, xp, fasta=[args.fasta])
    else:
        run = TrainingRun(DNA(options, [args.fasta]), xp)
    run.warm_up()
    train(run, folder, sys.stderr, stop)
    if not run.done:
        return None
    result = {
        "model": args.model, "length": length, "parameters": run.model.parameter_count(), "seconds": run.seconds,
        "tokens_per_second": args.steps * options.batch * length / run.seconds, "device": device_name(xp),
        "bits_per_base": run.task.held_out_bits(run.model), "versions": versions(),
        "options": dataclasses.asdict(options),
    }  # fmt: skip
    if args.device == "cuda":
        free, total = xp.cuda.runtime.memGetInfo()
        result["gibibytes"] = (total - free) / 2**30
        del run
        gc.collect()
        xp.get_default_memory_pool().free_all_blocks()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--baselines", action="store_true", help="of the held-out bases; nothing is trained")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << k for k in range(10, 18)])
    parser.add_argument("--model", choices=["mamba", "transformer"], default="mamba")
    parser.add_argument("--tokens", type=int, default=1 << 18, help="a step")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--minutes", type=float, help="of all together")
    for name, default in {"d_model": 128, "n_layer": 12, "lr": 8e-3, "steps": 1200, "evaluations": 4}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    parser.add_argument("--length-warmup", type=float, default=0.0, help="epochs at each length before")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.baselines:
        found = DNA(options_of(args, min(args.lengths)), [args.fasta]).baselines()
        (args.out / "baselines.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(found)
        return
    stop = Until(args.minutes, ())
    for length in args.lengths:
        path = args.out / f"{args.model}-{length}.json"
        if path.exists() or len(stop):
            continue
        result = run_length(args, length, stop)
        if result is not None:
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"{args.model} at {length}: {result['bits_per_base']}", flush=True)


if __name__ == "__main__":
    main()
