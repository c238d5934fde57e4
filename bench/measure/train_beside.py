"""A Mamba, by ``sscan train``, or a Transformer of the same size in PyTorch: same text, windows, recipe, minutes.

    python bench/data/corpus.py corpus
    python bench/measure/train_beside.py mamba --text corpus --out runs/mamba --minutes 10
    python bench/measure/train_beside.py transformer --text corpus --out runs/transformer --minutes 10
    python bench/pages/report_training.py FOLDER --out docs/trained.md  # once their files lie there

Both folders get ``log.jsonl``, with the held-out bits per byte of the same windows on the way, and ``result.json``,
with those of the whole held-out part and samples. What the minutes count is steps alone, batches and the reading of
their loss included; compilation, evaluations and checkpoints are not counted.

The Transformer is the paper's strong one (section 4.2: rotary positions, SwiGLU, RMSNorm, no biases), by
scaled_dot_product_attention, in bfloat16 by autocast, through torch.compile, with fused AdamW.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from sscan import cli
from sscan.cli._devices import array_module
from sscan.models.sampling import Sampler
from sscan.tasks.loop import train
from sscan.tasks.task import RunOptions
from sscan.tasks.text import Text, text_files
from sscan.tasks.training import TrainingRun

HEAD = 64  # width of an attention head
RESULT = "result.json"
PROMPT, SAMPLE = 64, 500  # bytes


class Layer(nn.Module):
    """Attention and a gated MLP, each behind a norm and added to the residual stream."""

    def __init__(self, width: int, inner: int, layers: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        for linear, scale in ((self.qkv, 1), (self.gate_up, 1), (self.out, 2 * layers), (self.down, 2 * layers)):
            nn.init.normal_(linear.weight, std=0.02 / math.sqrt(scale))

    def forward(self, x: Any, cos: Any, sin: Any) -> Any:
        batch, length, width = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, length, 3, width // HEAD, HEAD).transpose(1, 3)
        q, k, v = qkv.unbind(2)
        attended = functional.scaled_dot_product_attention(
            _rotated(q, cos, sin).to(v.dtype), _rotated(k, cos, sin).to(v.dtype), v, is_causal=True
        )
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)


def _rotated(x: Any, cos: Any, sin: Any) -> Any:
    """Pairs (i, i + HEAD / 2) turned by the angle of their position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Transformer(nn.Module):
    """Bytes, or other tokens, to logits for the next; the head is the embedding."""

    def __init__(self, width: int, layers: int, inner: int, longest: int, vocabulary: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(width, inner, layers) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        angles = torch.outer(torch.arange(longest), 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Any) -> Any:
        x, length = self.embedding(ids), ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        return functional.linear(self.norm(x), self.embedding.weight)

    def loss(self, ids: Any, targets: Any) -> Any:
        """Mean cross-entropy in nats; targets of -100 do not count."""
        return functional.cross_entropy(self(ids).float().flatten(0, 1), targets.flatten())


class TransformerRun(TrainingRun[Text]):
    """A run of the loop of ``sscan train`` whose model and steps are PyTorch's."""

    def __init__(self, task: Text, device: str, compiled: bool) -> None:
        self.task, self.options, recipe = task, task.options, task.recipe
        self.losses, self.measures, self.seconds, self._made = [], [], 0.0, None
        self.device, self.precision = device, getattr(torch, self.options.precision)
        torch.manual_seed(self.options.seed)
        width = self.options.d_model
        layers = max(self.options.n_layer // 2, 1)  # section 3.4: two blocks are one layer
        self.model: Any = Transformer(width, layers, 3 * width, self.options.length).to(device)
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if (p.ndim > 1) == decays], "weight_decay": recipe.weight_decay * decays}
            for decays in (True, False)
        ]
        self.optimiser = _Optimiser(torch.optim.AdamW(groups, betas=recipe.betas, fused=device == "cuda"))
        self._loss: Any = torch.compile(self.model.loss) if compiled else self.model.loss
        self.compiled = compiled

    def warm_up(self) -> None:
        """Compile, and change nothing. What the compiler cannot do is done without it."""
        try:
            for _ in range(3):
                self._gradients(*self._batch(0))
        except Exception as error:  # of which there are many in a compiler
            if not self.compiled:
                raise
            print(f"torch.compile failed, so the run goes on without: {error!r}"[:2000], flush=True)
            self._loss, self.compiled = self.model.loss, False
            self._gradients(*self._batch(0))
        self.model.zero_grad()

    def step(self) -> None:
        """One update of the parameters."""
        start, number = time.perf_counter(), len(self.losses)
        self.optimiser.lr = self.task.recipe.rate(self.progress, self.options.lr)
        result = self._gradients(*self._batch(number))
        nn.utils.clip_grad_norm_(self.model.parameters(), self.task.recipe.clip, foreach=True)
        self.optimiser.step()
        self._make(number + 1)  # while a GPU is at work
        loss = float(result)
        self._check_loss(loss)
        self.losses.append(loss)
        self.seconds += time.perf_counter() - start

    def _batch(self, step: int) -> tuple[Any, Any]:
        return self._moved(*self._make(step))

    def _moved(self, *arrays: Any) -> Any:
        tensors = [torch.from_numpy(np.ascontiguousarray(array, np.int64)) for array in arrays]
        if self.device == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        return [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    def _gradients(self, inputs: Any, targets: Any) -> Any:
        self.model.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self._loss(inputs, targets)
        loss.backward()
        return loss.detach()

    def _autocast(self) -> Any:
        return torch.autocast(self.device, self.precision, enabled=self.options.precision != "float32")

    def loss(self, inputs: Any, targets: Any) -> Any:
        """What `Text` asks of a model that it measures."""
        with torch.no_grad(), self._autocast():
            return self.model.loss(*self._moved(inputs, targets))

    def evaluate(self) -> dict[str, float]:
        """The task's measures, of the model as it is."""
        found = self.task.measure(self)  # type: ignore[arg-type]
        self.measures.append((len(self.losses), found[self.task.goal]))
        return found

    def save(self, folder: Path) -> None:
        """Write the parameters."""
        torch.save(self.model.state_dict(), folder / "model.pt")

    def save_best(self, folder: Path) -> None:
        """Write the parameters."""
        torch.save(self.model.state_dict(), folder.with_suffix(".pt"))

    @torch.no_grad()
    def continued(self, prompt: Any, count: int, temperature: float) -> bytes:
        """New bytes, each from all the bytes before it that fit into a window."""
        sampler, ids = Sampler(temperature, seed=0), prompt.astype(np.int64)
        for _ in range(count):
            with self._autocast():
                logits = self.model(*self._moved(ids[None, -self.options.length :]))[:, -1]
            ids = np.append(ids, sampler(logits.float().cpu().numpy()))
        return bytes(ids[prompt.size :].tolist())


class _Optimiser:
    """PyTorch's, with one learning rate."""

    def __init__(self, made: Any) -> None:
        self.made, self.lr = made, 0.0

    def step(self) -> None:
        for group in self.made.param_groups:
            group["lr"] = self.lr
        self.made.step()


# Runs


def train_mamba(args: argparse.Namespace, options: RunOptions) -> tuple[Any, dict[str, Any]]:
    """By the command; the run is then read from its folder."""
    given = {
        name: value for name, value in dataclasses.asdict(options).items()
        if value is not None and name not in ("seed", "target")
    }  # fmt: skip
    flags = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = ["train", "--text", str(args.text), "--out", str(args.out), "--device", args.device, *flags]
    print("sscan", *command, flush=True)
    if code := cli.main(command):
        sys.exit(code)
    run = TrainingRun.load(args.out, Text, array_module(args.device))
    model = run.model

    def continued(prompt: Any, count: int, temperature: float) -> bytes:
        return bytes(model.generate(prompt, count, temperature=temperature, seed=0)[0].tolist())

    return run, {
        "parameters": model.parameter_count(), "bits_per_byte": run.task.held_out_bits(model),
        "samples": samples(run.task, continued),
    }  # fmt: skip


def train_transformer(args: argparse.Namespace, options: RunOptions) -> tuple[Any, dict[str, Any]]:
    """By the same loop."""
    run = TransformerRun(Text(options, text_files([args.text])), args.device, not args.eager)
    run.warm_up()
    train(run, args.out, sys.stderr)
    return run, {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "bits_per_byte": run.task.held_out_bits(run),  # type: ignore[arg-type]
        "samples": samples(run.task, run.continued), "compiled": run.compiled,
    }  # fmt: skip


def samples(task: Text, continued: Any) -> list[dict[str, str]]:
    """What follows two places in the held-out part: its beginning and its middle."""
    found = []
    for start in (task.held_out, (task.held_out + task.data.size) // 2):
        prompt = task.data[start : start + PROMPT]
        text = continued(prompt, SAMPLE, 0.8)
        found.append({"prompt": prompt.tobytes().decode(errors="replace"), "text": text.decode(errors="replace")})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["mamba", "transformer"])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--eager", action="store_true", help="the Transformer without torch.compile")
    for name, kind, default in (
        ("d_model", int, 512), ("n_layer", int, 12), ("length", int, 2048), ("batch", int, 32), ("lr", float, 3e-3),
        ("evaluations", int, 30), ("minutes", float, None), ("steps", int, None), ("precision", str, "bfloat16"),
    ):  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default)
    args = parser.parse_args()
    given = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(RunOptions) if hasattr(args, field.name)
    }
    options = RunOptions(**given)
    torch.set_float32_matmul_precision("high")
    run, found = {"mamba": train_mamba, "transformer": train_transformer}[args.model](args, options)
    record = {
        "model": args.model, "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor(),
        "options": dataclasses.asdict(options), "bytes": run.task.bytes.size, "held_out_bytes": run.task.held_out_bytes,
        "steps": len(run.losses), "seconds": run.seconds, "best": run.best, **found,
    }  # fmt: skip
    (args.out / RESULT).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record)[:500])


if __name__ == "__main__":
    main()
