"""Table 15 on this GPU: peak memory of training a Mamba of 130M beside a Transformer of the same size.

    python bench/measure/memory_125m.py --out bench/results/memory-125m-DATE.md
    python bench/measure/memory_125m.py --device cpu --d-model 128 --layers 4 --batches 1 2 --lengths 256 512  # a trial

A step: forward and backward under bfloat16 autocast, cross-entropy, fused AdamW; its state and the weights, float32,
are there before. By batch at one length, and by length at batch 1; with layers and loss made again in the backward, and
without. What head and loss take is measured alone. A series ends where memory does, or before a step that would take
too long. Exit code 1 if a step of Mamba fails for another reason, or gradients change when layers are made again. A
JSON file with every measurement lies beside the page. On the CPU, for trying it, peaks are those of the process.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from records import OUT_OF_MEMORY, Record, about, cause, free, named, table, write
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from train_beside import Transformer

from sscan.models import MambaConfig
from sscan.torch import MambaLM, decay_groups

if TYPE_CHECKING:
    from collections.abc import Callable

VOCABULARY = 50277
LENGTH, BATCHES, LENGTHS = 2048, [1, 2, 4, 8, 16, 32], [2**k for k in range(11, 19)]
CHECKED_LENGTH = 256
PIECE = 8192  # tokens whose logits are there at once, when the loss is made in pieces
MAMBA, TRANSFORMER = "Mamba", "Transformer"
# Gigabytes by batch; length 2048, A100, the Transformer with FlashAttention-2 and torch.compile.
PAPER = {
    TRANSFORMER: {1: 4.6, 2: 5.2, 4: 6.9, 8: 11.5, 16: 20.7, 32: 34.5},
    MAMBA: {1: 4.8, 2: 5.8, 4: 7.3, 8: 12.3, 16: 23.1, 32: 38.2},
}
WAYS = {  # whether layers are made again in the backward; whether the loss is, in pieces
    "all kept": (False, False),
    "layers again": (True, False),
    "layers and loss again": (True, True),
}


class Subject:
    """A model whose training is measured."""

    def __init__(self, name: str, model: nn.Module, layers: Any, hidden: Callable[[Any], Any], device: str) -> None:
        self.name, self.model, self.hidden, self.device = name, model.to(device), hidden, device
        self.layers = [Layer(layer) for layer in layers]
        self.summed_loss: Callable[..., Any] = summed_loss
        self.optimiser = torch.optim.AdamW(decay_groups(model), lr=1e-4, fused=True)

    def head(self) -> Any:
        return self.model.get_parameter("lm_head.weight" if self.name == MAMBA else "embedding.weight")

    def step(self, batch: int, length: int, way: str, update: bool = True) -> None:
        """Of training, on random tokens."""
        again, in_pieces = WAYS[way]
        for layer in self.layers:
            layer.again = again
        tokens = torch.randint(VOCABULARY, (batch, length + 1), device=self.device)
        self.model.zero_grad(set_to_none=True)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            with torch.autocast(self.device, torch.bfloat16):
                hidden = self.hidden(tokens[:, :-1])
                loss = cross_entropy(hidden, self.head(), tokens[:, 1:], self.summed_loss, in_pieces)
            loss.backward()
        if update:
            self.optimiser.step()

    def loss_alone(self, batch: int, length: int, way: str) -> None:
        """Head and loss of a step, forward and backward."""
        width = self.head().shape[1]
        hidden = torch.randn(batch, length, width, device=self.device, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(VOCABULARY, (batch, length), device=self.device)
        with torch.autocast(self.device, torch.bfloat16):
            loss = cross_entropy(hidden, self.head(), targets, self.summed_loss, WAYS[way][1])
        torch.autograd.grad(loss, [hidden, self.head()])


class Layer:
    """The forward of a layer, that the backward may run again."""

    def __init__(self, module: Any) -> None:
        self.run, self.module, self.again = module.forward, module, False
        module.forward = self

    def __call__(self, *inputs: Any) -> Any:
        if not self.again:
            return self.run(*inputs)
        return checkpoint(self.run, *inputs, use_reentrant=False, preserve_rng_state=False)

    def compile(self) -> None:
        self.run = torch.compile(self.run, dynamic=True)


def summed_loss(hidden: Any, head: Any, targets: Any) -> Any:
    """Cross-entropy of tokens, in float32."""
    return functional.cross_entropy(functional.linear(hidden, head).float(), targets, reduction="sum")


def cross_entropy(hidden: Any, head: Any, targets: Any, summed: Callable[..., Any], in_pieces: bool) -> Any:
    """The mean; or of some tokens at a time, whose logits the backward makes again."""
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    if not in_pieces:
        return summed(hidden, head, targets) / len(targets)
    again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    parts = zip(hidden.split(PIECE), targets.split(PIECE), strict=True)
    return torch.stack([again(summed, part, head, wanted) for part, wanted in parts]).sum() / len(targets)


def made(name: str, d_model: int, layers: int, longest: int, device: str) -> Subject:
    """Mamba of so many blocks, or a Transformer of half as many layers."""
    config = MambaConfig(d_model, layers, VOCABULARY)
    with torch.device(device):
        if name == MAMBA:
            mamba = MambaLM(config)

            def mix(_: int, mixer: Any, hidden: Any) -> Any:
                return mixer(hidden)

            return Subject(name, mamba, mamba.backbone.layers, lambda ids: mamba.backbone(ids, mix), device)
        model = Transformer(d_model, max(layers // 2, 1), 3 * d_model, longest, config.padded_vocab_size)

        def hidden(ids: Any) -> Any:
            x, length = model.embedding(ids), ids.shape[1]
            for layer in model.layers:
                x = layer(x, model.cos[:length], model.sin[:length])
            return model.norm(x)

        return Subject(name, model, model.layers, hidden, device)


# --- measuring --------------------------------------------------------------------------------------------------------


def allocated(device: str, what: str = "VmRSS") -> int:
    """Bytes in use."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


def peak(call: Callable[[], Any], device: str) -> int:
    """Bytes in use at most during a call, those before it included."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    call()
    return allocated(device, "VmHWM")


def outside(device: str) -> int:
    """Bytes that CuPy's pool holds, which PyTorch does not count."""
    if device == "cpu":
        return 0
    import cupy

    return int(cupy.get_default_memory_pool().total_bytes())


def measure(subject: Subject, by: str, batch: int, length: int, way: str, record: Record, end: float) -> None:
    """Add the peak of a step to the record, or why there is none."""
    row: Record = {"by": by, "name": subject.name, "way": way, "batch": batch, "length": length}
    before = series(record, by, subject.name, way)
    if any("peak" not in earlier for earlier in before):
        return
    seconds, loss = expected(before, batch * length)
    if time.monotonic() > end:
        row["not_run"] = "no time left"
    elif seconds > record["longest_step"]:
        row["not_run"] = f"not run: up to {seconds:.0f} s"
    elif loss > record["memory"]:
        row["not_run"] = f"not run: head and loss alone would take {gigabytes(loss)} GB"
    else:
        device = subject.device
        subject.model.zero_grad(set_to_none=True)
        row["before"], start = allocated(device), time.perf_counter()
        try:
            row["peak"] = peak(lambda: subject.step(batch, length, way), device)
        except Exception as error:  # memory; a backend that refuses
            row["failed"] = cause(error)
        if "failed" in row:
            free()
        else:
            row["seconds"], row["outside"] = time.perf_counter() - start, outside(device)
            subject.model.zero_grad(set_to_none=True)
            least = allocated(device)
            row["loss"] = peak(lambda: subject.loss_alone(batch, length, way), device) - least
    print(f"{time.monotonic() - end:6.0f} s", row, file=sys.stderr, flush=True)
    record["measurements"].append(row)


def expected(before: list[Record], tokens: int) -> tuple[float, float]:
    """Seconds that a step takes at most, if it grows as attention does, and the bytes of its head and loss.

    Of the first steps nothing is known of the seconds: kernels are compiled in them.
    """
    if len(before) < 3:
        return 0.0, 0.0
    growth = [tokens / (row["batch"] * row["length"]) for row in before]
    seconds = min(row["seconds"] * factor**2 for row, factor in zip(before, growth, strict=True))
    return seconds, before[-1]["loss"] * growth[-1]


def measure_all(subject: Subject, args: argparse.Namespace, record: Record, end: float) -> None:
    """Both tables of a model; what is found lies on the disk after every row."""
    sizes = [("batch", batch, args.length) for batch in sorted(args.batches)]
    sizes += [("length", 1, length) for length in sorted(args.lengths)]
    for by, batch, length in sizes:
        for way in WAYS:
            measure(subject, by, batch, length, way, record, end)
        if args.out:
            write(args.out, record, page)


def check(subject: Subject, length: int = CHECKED_LENGTH) -> float:
    """The largest relative change of a gradient by making layers and loss again."""
    found = []
    for way in ("all kept", "layers and loss again"):
        torch.manual_seed(0)
        subject.step(2, length, way, update=False)
        found.append([p.grad.clone() for p in subject.model.parameters()])
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*found, strict=True))


def compiled(subject: Subject) -> str:
    """Compile the loss, and the Transformer's layers, if that works; what came of it."""
    runs = [layer.run for layer in subject.layers]
    try:
        subject.summed_loss = torch.compile(summed_loss, dynamic=True)
        for layer in subject.layers if subject.name == TRANSFORMER else []:
            layer.compile()
        for way in WAYS:
            subject.step(1, CHECKED_LENGTH, way, update=False)
    except Exception as error:  # of which there are many in a compiler
        subject.summed_loss = summed_loss
        for layer, run in zip(subject.layers, runs, strict=True):
            layer.run = run
        return f"nothing compiled ({cause(error)})"
    return "layers and loss by torch.compile" if subject.name == TRANSFORMER else "loss by torch.compile"


def plain_loss(subject: Subject, length: int) -> float:
    """Bytes that a token takes in head and loss when nothing is compiled."""
    before, subject.summed_loss = subject.summed_loss, summed_loss
    few, many = (
        peak(lambda n=n: subject.loss_alone(1, n * length, "all kept"), subject.device)  # type: ignore[misc]
        for n in (1, 2)
    )
    subject.summed_loss = before
    return (many - few) / length


# --- the page ---------------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# Table 15: memory of training 125M parameters on {device}, {date}

{named}

The most that PyTorch had allocated during a step, GB of 10^9 bytes: forward and backward under bfloat16 autocast,
cross-entropy in float32, fused AdamW. Weights and its state, float32, count. CuPy's pool, which PyTorch does not count,
held {outside:.1f} MB at most. {vocabulary:,} tokens; the head is the embedding.

{models}

In brackets what head and loss take of it, measured alone: logits (batch x length x vocabulary) and their gradients,
both in bfloat16 if torch.compile has fused the loss; without it they take {plain_loss:.0f} KB a token, since PyTorch
then has them in float32 as well. *Layers again*: `torch.utils.checkpoint` around every layer. *Loss again*: head and
loss of {piece:,} tokens at a time, made again in the backward. A series ends where memory does, or before a step of
more than {longest_step:g} s; the reason stands at the first that is missing.
"""
MODELS = {
    MAMBA: "`sscan.torch.MambaLM`, {layers} blocks of width {width}",
    TRANSFORMER: "that of `bench/measure/train_beside.py`, half as many layers, flash attention; its table of "
    "rotations, for as many positions as the longest of the page, counts",
}


def series(record: Record, by: str, name: str, way: str) -> list[Record]:
    """The measurements of a column, in order."""
    wanted = (by, name, way)
    return [row for row in record["measurements"] if (row["by"], row["name"], row["way"]) == wanted]


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.2f}"


def memory_cell(row: Record | None) -> str:
    """Peak and loss, or why there are none."""
    if row is None:
        return ""
    if "peak" not in row:
        return str(row.get("failed") or row["not_run"])
    return f"{gigabytes(row['peak'])} ({gigabytes(row['loss'])})"


def memory_table(record: Record, by: str) -> list[str]:
    """A row for each batch or length, a column for each model and way."""
    columns = [(name, way) for name in (MAMBA, TRANSFORMER) for way in WAYS]
    found = {column: {row[by]: row for row in series(record, by, *column)} for column in columns}
    head = [by, *(f"{name}, {way}" for name, way in columns)]
    papers = [(name, PAPER[name]) for name in (MAMBA, TRANSFORMER) if by == "batch"]
    head += [f"{name}, paper" for name, _ in papers]
    sizes = sorted({size for rows in found.values() for size in rows})
    rows = (
        [f"{size:,}", *(memory_cell(found[column].get(size)) for column in columns),
         *(f"{paper[size]:.1f}" if size in paper else "" for _, paper in papers)]
        for size in sizes
    )  # fmt: skip
    return table(head, *rows)


def slope(rows: list[Record], of: str) -> float:
    """Bytes that a token adds to a quantity, between the two largest that were measured."""
    tokens = [(row["batch"] * row["length"], row[of]) for row in rows if of in row]
    if len(tokens) < 2:
        return math.nan
    (few, small), (many, large) = tokens[-2:]
    return (large - small) / (many - few)


def limits(record: Record, by: str) -> list[str]:
    """What a token costs, what of it is the loss, and where each column ended."""
    rows = []
    for name in (MAMBA, TRANSFORMER):
        for way in WAYS:
            line = series(record, by, name, way)
            whole, loss = (slope(line, of) / 1e3 for of in ("peak", "loss"))
            largest = max((row[by] for row in line if "peak" in row), default=None)
            ended = next((memory_cell(row) for row in line if "peak" not in row), "measured to the end")
            cells = ["not measured" if math.isnan(x) else f"{x:.1f}" for x in (whole, loss, whole - loss)]
            rows.append([name, way, *cells, "none" if largest is None else f"{largest:,}", ended])
    head = ["", "", "KB a token", "of which head and loss", "of which layers", f"largest {by}", "then"]
    return ["What limits, by what a token adds between the two largest:", "", *table(head, *rows)]


def page(record: Record) -> str:
    """All of it in Markdown."""
    measured = [row for row in record["measurements"] if "peak" in row]
    before = {row["name"]: row["before"] for row in reversed(measured)}
    models = (
        f"- *{name}*: {MODELS[name].format(**record)}; {record['compiled'][name]}; {parameters:,} parameters, "
        f"{gigabytes(before.get(name, 0))} GB before a step."
        for name, parameters in record["parameters"].items()
    )
    outside = max((row["outside"] for row in measured), default=0) / 1e6
    about_it = {
        "plain_loss": record["plain_loss"] / 1e3,
        "named": named(record),
        "models": "\n".join(models),
        "outside": outside,
        "vocabulary": VOCABULARY,
    }
    return "\n".join(
        [
            INTRODUCTION.format(**{**record, **about_it}, piece=PIECE),
            f"## By batch, length {record['length']:,}, beside the paper's GB (A100, all kept)\n",
            *memory_table(record, "batch"),
            *limits(record, "batch"),
            "## By length, batch 1\n",
            *memory_table(record, "length"),
            *limits(record, "length"),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument(
        "--layers", type=int, default=24, help="blocks of Mamba; half as many layers of the Transformer"
    )
    parser.add_argument("--length", type=int, default=LENGTH, help="of the batches")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="at batch 1")
    parser.add_argument("--seconds", type=float, default=90, help="after which nothing new is measured")
    parser.add_argument("--longest-step", type=float, default=20, help="in seconds; series end before longer ones")
    parser.add_argument("--eager", action="store_true", help="nothing by torch.compile")
    parser.add_argument("--out", type=Path, help="the page; the JSON file lies beside it")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    torch.set_float32_matmul_precision("high")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if args.device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    record: Record = {
        **about(args.device), "memory": memory, "width": args.d_model, "layers": args.layers, "length": args.length,
        "longest_step": args.longest_step, "compiled": {}, "plain_loss": 0.0, "parameters": {},
        "checks": {}, "measurements": [],
    }  # fmt: skip
    right = True
    for name in (MAMBA, TRANSFORMER):
        subject = made(name, args.d_model, args.layers, max(CHECKED_LENGTH, args.length, *args.lengths), args.device)
        record["compiled"][name] = "nothing compiled" if args.eager else compiled(subject)
        record["parameters"][name] = sum(p.numel() for p in subject.model.parameters())
        record["plain_loss"] = plain_loss(subject, args.length)
        record["checks"][name] = check(subject)
        right &= record["checks"][name] < 0.02
        print(name, record["checks"][name], file=sys.stderr, flush=True)
        subject.step(1, 64, "all kept")  # makes the optimiser's state
        measure_all(subject, args, record, end)
        del subject
        free()
    print(page(record))
    ours = [row for row in record["measurements"] if row["name"] == MAMBA]
    broken = any(row.get("failed", OUT_OF_MEMORY) != OUT_OF_MEMORY for row in ours)
    return int(not right or broken or not any("peak" in row for row in ours))


if __name__ == "__main__":
    sys.exit(main())
