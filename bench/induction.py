"""Induction Heads at a size for two CPU cores: accuracy by length, as one line of JSON for each seed.

python bench/induction.py 0 1 2 > bench/results/induction-small-DATE.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from sscan.tasks.induction import SMALL, Induction
from sscan.tasks.loop import train
from sscan.tasks.training import STATE_FILE, TrainingRun

LENGTHS = [1 << k for k in range(6, 17)]


def result(seed: int, lr: float, folder: Path) -> dict[str, Any]:
    """What a run of this seed comes to; what is done of it in the folder is not done again."""
    if (folder / STATE_FILE).exists():
        run = TrainingRun.load(folder, Induction)
    else:
        run = TrainingRun(Induction(dataclasses.replace(SMALL, seed=seed, lr=lr)))
    run.warm_up()
    train(run, folder, sys.stderr)
    return {
        "options": dataclasses.asdict(run.options),
        "parameters": run.model.parameter_count(),
        "seconds": round(run.seconds),
        "first_without_mistakes": next((step for step, error in run.measures if error == 0), None),
        "accuracy": {length: run.task.accuracy(run.model, length) for length in LENGTHS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--lr", type=float, default=SMALL.lr)
    given = parser.parse_args()
    for seed in given.seeds:
        print(json.dumps(result(seed, given.lr, Path("runs", f"induction-{given.lr}-{seed}"))), flush=True)


if __name__ == "__main__":
    main()
