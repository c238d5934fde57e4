"""Generation on a GPU as the paper measures it: prompts of 2048 tokens, 128 new ones, beside transformers' GPT-NeoX.

    python bench/measure/compare_generation.py [--size 130m] [--minutes 8] [--out bench/results/generation-DATE]

Random weights in bfloat16, greedy. Tokens per second are batch * 128 / time, prompts included (section 4.5), at growing
batches until memory or the minutes end. Prompts are read some rows at a time; kernels, graphs and memory are made
before.

- sscan.nn and sscan.torch: ``prefill``, and the decoder that ``generate`` uses, a CUDA graph a step.
- GPTNeoXForCausalLM: its own attention (SDPA) reads the prompts, which then lie in its StaticCache; a step is a CUDA
  graph, or, at its best batch, torch.compile(mode="reduce-overhead").

Before anything is timed: logits of ``prefill`` are those of single steps, both of ours draw the same tokens, and the
Transformer's steps have the logits of its forward. Exit code 1 if a check fails. OUT.json and OUT.md are written anew
after every measurement.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
import transformers
from records import OUT_OF_MEMORY, free, write

from sscan import torch as sscan_torch
from sscan.models import MambaConfig, Sampler
from sscan.nn import MambaLM

if TYPE_CHECKING:
    from collections.abc import Iterator

PROMPT, NEW, VOCABULARY = 2048, 128, 50277
BATCHES = (1, 16, 64, 256, 512, 1024, 2048)
AT_ONCE = 1 << 15  # tokens of prompts that are read at once
REPEATS = 3
SMALL = 4, 16  # rows and tokens of the checks
TOLERANCE = 0.05  # of logits, relative, in bfloat16
PEAK = 790e12  # dense bfloat16 products of an H200, as measured; operations a second
MAMBA = {"130m": MambaConfig(768, 24, VOCABULARY), "1.4b": MambaConfig(2048, 48, VOCABULARY)}
# Pythia's sizes of the same name: width, layers, heads.
GPT_NEOX = {"130m": (768, 12, 12), "1.4b": (2048, 24, 16)}


HEAD = """\
# Generation on {device}, {size}, bfloat16

`{command}`; torch {torch}, transformers {transformers}; parameters {parameters}. Prompts of {prompt} tokens, {new} new
ones, greedy; tokens a second. In brackets what it takes at least: for prompts, two operations for each parameter and
token at {peak:.0f} TFLOP/s; for a step, its bytes of weights and states, or keys and values, at {copies:.2f} TB/s, and
its launches alone.

| batch | | with the prompts | decoding alone | prompts, s (least) | a step, us (bytes) (launches) |
| --- | --- | --- | --- | --- | --- |"""


class Failed(Exception):
    """A check found something wrong."""


class Row(NamedTuple):
    """A sequence whose last token is not read yet."""

    new: list[int]
    seed: int


def pieces(batch: int) -> Iterator[range]:
    """The rows of a batch whose prompts are read at once."""
    rows = max(AT_ONCE // PROMPT, 1)
    return (range(start, min(start + rows, batch)) for start in range(0, batch, rows))


# --- those that are compared ------------------------------------------------------------------------------------------


class Mamba:
    """Either of ours."""

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model, self.config = name, model, model.config

    def prepare(self, batch: int) -> None:
        """Everything that a batch needs but its prompts."""
        self.batch = batch
        self.states = self.model.new_states(batch)
        self.empty = {len(rows): self.model.new_states(len(rows)) for rows in pieces(batch)}
        self.decoder = self.model._decoder(self.states, self.config.vocab_size, Sampler(0.0))
        if self.decoder is None:
            raise Failed(f"{self.name} has no decoder on this device")

    def prefill(self, ids: Any) -> Any:
        """Read prompts (batch, length): the first tokens, in host memory."""
        found = []
        for rows in pieces(self.batch):
            logits, after = self.model.prefill(ids[rows.start : rows.stop], self.empty[len(rows)])
            self.states.put(rows, after)
            found.append(logits[:, : self.config.vocab_size].argmax(-1))
        return np.concatenate([_host(tokens) for tokens in found])

    def decode(self, tokens: Any, count: int) -> Any:
        """The tokens (count, batch) behind these, in host memory."""
        for place, token in enumerate(tokens.tolist()):
            self.decoder.put(place, Row([token], place))
        return self.decoder.steps(count)

    def ids(self, ids: Any) -> Any:
        """Prompts where the model is."""
        if isinstance(self.model, torch.nn.Module):
            return torch.from_numpy(ids).to(self.model.lm_head.weight.device)
        import cupy

        return cupy.asarray(ids)

    def forget(self) -> None:
        """Free what `prepare` made."""
        self.states = self.empty = self.decoder = None

    def read_by_a_step(self, batch: int) -> int:
        """Bytes of weights, and of states, which are written as well."""
        one = sum(tensor.data.nbytes for _, tensor in self.model.new_states(1).named_tensors())
        return _bytes_of(self.model) + 2 * batch * one


class GPTNeoX:
    """The Transformer, with keys and values in a static cache."""

    name = "GPT-NeoX"

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.device = model.lm_head.weight.device
        self.compiled = False
        self.cache_name = next(
            x for x in ("past_key_values", "cache") if x in inspect.signature(model.forward).parameters
        )

    def prepare(self, batch: int) -> None:
        """The cache, and the step as a graph."""
        self.batch, config = batch, self.config
        self.cache = transformers.StaticCache(config=config, max_cache_len=PROMPT + NEW)
        heads = config.num_attention_heads
        like = self.model.lm_head.weight.new_empty(batch, heads, 0, config.hidden_size // heads)
        for layer in self.cache.layers:
            layer.lazy_initialization(like, like)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self._at(PROMPT)
        torch._dynamo.mark_static_address(self.token)  # changed in place, which a graph of the compiler's may do then
        self.step: Any = torch.compile(self._step, mode="reduce-overhead") if self.compiled else self._step
        for _ in range(3):
            self.step()
        self.graph: Any = None
        if self.device.type == "cuda" and not self.compiled:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()

    def _at(self, position: int) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(position)

    def _step(self) -> Any:
        """Read the tokens, and put the next ones in their place; the logits."""
        logits = self.model(self.token, **{self.cache_name: self.cache}, use_cache=True).logits[:, -1]
        self.token.copy_(logits.argmax(-1, keepdim=True))
        return logits

    def prefill(self, ids: Any) -> Any:
        """As of :class:`Mamba`; keys and values are copied to where they stay."""
        found, length = [], ids.shape[1]
        for rows in pieces(self.batch):
            out = self.model(ids[rows.start : rows.stop], use_cache=True, logits_to_keep=1)
            for layer, read in zip(self.cache.layers, out[self.cache_name].layers, strict=True):
                layer.keys[rows.start : rows.stop, :, :length] = read.keys
                layer.values[rows.start : rows.stop, :, :length] = read.values
            found.append(out.logits[:, -1].argmax(-1))
        self._at(length)
        return np.concatenate([_host(tokens) for tokens in found])

    def decode(self, tokens: Any, count: int) -> Any:
        """As of :class:`Mamba`."""
        self.token.copy_(torch.from_numpy(tokens)[:, None])
        made = torch.empty(count, self.batch, dtype=torch.long, device=self.device)
        for i in range(count):
            self.step() if self.graph is None else self.graph.replay()
            made[i] = self.token[:, 0]
        return _host(made)

    def ids(self, ids: Any) -> Any:
        """Prompts where the model is."""
        return torch.from_numpy(ids).to(self.device)

    def forget(self) -> None:
        """Free what `prepare` made."""
        self.cache = self.graph = self.step = None

    def read_by_a_step(self, batch: int) -> int:
        """Bytes of weights without the embedding, and of keys and values, in the mean over the steps."""
        config = self.config
        of_a_token = 2 * 2 * config.num_hidden_layers * config.hidden_size
        embedding = self.model.gpt_neox.embed_in.weight
        return _bytes_of(self.model) - embedding.nbytes + batch * of_a_token * (PROMPT + NEW // 2)


def _host(array: Any) -> Any:
    return array.cpu().numpy() if isinstance(array, torch.Tensor) else getattr(array, "get", lambda: array)()


def _bytes_of(model: Any) -> int:
    return sum(parameter.data.nbytes for parameter in model.parameters())


def _parameters_of(model: Any) -> int:
    return sum(math.prod(parameter.shape) for parameter in model.parameters())


def _multiplied(model: Any) -> int:
    """How many parameters each token of a prompt is multiplied with: all but embedding and head."""
    return sum(math.prod(p.shape) for p in model.parameters() if p.shape[0] < VOCABULARY)


def made(size: str, device: str) -> list[Any]:
    """Models with random weights; those of ours are the same, in the same memory."""
    torch.manual_seed(0)
    ours = sscan_torch.MambaLM(MAMBA[size], device, torch.bfloat16).eval()
    width, layers, heads = GPT_NEOX[size]
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY + 27, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=PROMPT + NEW, attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            theirs = transformers.GPTNeoXForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return [Mamba("sscan.nn", without_framework(ours)), Mamba("sscan.torch", ours), GPTNeoX(theirs)]


def without_framework(model: Any) -> MambaLM:
    """The model of sscan.nn on a PyTorch model's memory."""
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    found, given = MambaLM(model.config, bfloat16, seed=None), dict(model.named_parameters())
    for name, parameter in found.named_parameters():
        tensor = given[name].detach()
        half = tensor.dtype is torch.bfloat16
        tensor = tensor.view(torch.int16) if half else tensor
        if tensor.is_cuda:
            import cupy

            array = cupy.from_dlpack(tensor)
        else:
            array = tensor.numpy()
        parameter.data = array.view(bfloat16) if half else array
    return found


# --- checks -----------------------------------------------------------------------------------------------------------


def check(models: list[Any]) -> dict[str, float]:
    """Relative distances of logits."""
    rows, length = SMALL
    ids, found, tokens = np.random.default_rng(0).integers(0, VOCABULARY, (rows, length)), {}, {}
    for entry in models:
        entry.prepare(rows)
        given = entry.ids(ids)
        if isinstance(entry, Mamba):
            exact, _ = entry.model.prefill(given, entry.model.new_states(rows))
            states = entry.model.new_states(rows)
            for k in range(length):
                logits = entry.model.step(given[:, k], states)
            tokens[entry.name] = entry.decode(entry.prefill(given), 8)
        else:
            exact = entry.model(given).logits[:, -1]
            entry.prefill(given[:, :-1])
            entry.token.copy_(given[:, -1:])
            logits = entry._step()
        exact, logits = (_host(x.float() if isinstance(x, torch.Tensor) else x) for x in (exact, logits))
        found[entry.name] = float(np.linalg.norm(logits - exact) / np.linalg.norm(exact))
        if not found[entry.name] < TOLERANCE:
            raise Failed(f"{entry.name}: logits of steps are off by {found[entry.name]:.3f}")
        entry.forget()
    ours, other = tokens.values()
    if (ours != other).mean() > 0.1:  # the prefills differ in their last bits, and random weights have near ties
        raise Failed(f"sscan.torch has other tokens than sscan.nn: {(ours != other).mean():.0%}")
    return found


# --- times ------------------------------------------------------------------------------------------------------------


def repeats_of(batch: int) -> int:
    """How often a batch is measured."""
    return REPEATS if batch <= 64 else 1


def times(entry: Any, batch: int) -> dict[str, float]:
    """Seconds of a generation, and of its decoding alone; medians."""
    repeats = repeats_of(batch)
    entry.prepare(batch)
    ids = entry.ids(np.random.default_rng(batch).integers(0, VOCABULARY, (batch, PROMPT)))
    whole, decoding = [], []
    entry.decode(np.zeros(batch, np.int64), 4)
    if repeats > 1:  # everything there is at larger batches has been called at smaller ones
        entry.prefill(ids)
    for _ in range(repeats):
        start = time.perf_counter()
        tokens = entry.prefill(ids)  # in host memory, so nothing is under way
        middle = time.perf_counter()
        if entry.decode(tokens, NEW - 1).shape != (NEW - 1, batch):
            raise Failed(f"{entry.name}: not all tokens came")
        end = time.perf_counter()
        whole.append(end - start)
        decoding.append(end - middle)
    return {"seconds": statistics.median(whole), "decoding": statistics.median(decoding)}


def launches(model: MambaLM, batch: int) -> dict[str, float]:
    """Launches of a step of ours, and the microseconds that a graph of as many empty ones takes."""
    import bench_decode_gpu as decoding

    from sscan.cuda import _launch

    kernels = decoding.kernels_of(model, batch)
    count, empty = sum(len(calls) - 1 for calls in kernels.values()) + 1, kernels["embed"][0]
    took = decoding.microseconds(lambda: [_launch.launch(*empty) for _ in range(count)])
    return {"launches": count, "launches_us": took}


class Report:
    """What was found so far, on the disk after every measurement."""

    def __init__(self, about: dict[str, Any], out: Path | None) -> None:
        self.about, self.out = about, out
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        """A measurement, or why there is none."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.out:
            write(self.out, {**self.about, "measurements": self.rows}, lambda _: self.text())

    def text(self) -> str:
        """As a table."""
        lines = [
            HEAD.format(**self.about, prompt=PROMPT, new=NEW, copies=self.about["bandwidth"] / 1e12, peak=PEAK / 1e12)
        ]
        for row in self.rows:
            batch, who = row["batch"], row["who"]
            if "seconds" not in row:
                lines.append(f"| {batch} | {who} | {row['failed']} | | | |")
                continue
            prompts, step = row["seconds"] - row["decoding"], row["decoding"] / (NEW - 1)
            launched = f" ({row['launches']} in {row['launches_us']:.0f})" if "launches" in row else ""
            lines.append(
                f"| {batch} | {who} | **{batch * NEW / row['seconds']:,.0f}** | {batch / step:,.0f} | "
                f"{prompts:.3f} ({row['prompt_floor']:.3f}) | {1e6 * step:.0f} ({row['bytes_us']:.0f}){launched} |"
            )
        best = self.best()
        if "GPT-NeoX" in best:
            theirs = best["GPT-NeoX"][0]
            found = [f"{who} {rate:,.0f} at {batch} ({rate / theirs:.2f}x)" for who, (rate, batch) in best.items()]
            lines += ["", f"Each at its best batch: {', '.join(found)}."]
        return "\n".join([*lines, ""])

    def best(self) -> dict[str, tuple[float, int]]:
        """The highest rate of each, and its batch."""
        found: dict[str, tuple[float, int]] = {}
        for row in self.rows:
            if "seconds" in row:
                who = row["who"].removesuffix(", compiled")
                found[who] = max(found.get(who, (0.0, 0)), (row["batch"] * NEW / row["seconds"], row["batch"]))
        return found


def compare(models: list[Any], report: Report, end: float, batches: tuple[int, ...], bandwidth: float) -> None:
    """Measure each at each batch, until its memory or the time ends; where it is memory, at two batches in between."""
    going, before = list(models), dict.fromkeys(models, (0, 0.0))
    for batch in batches:
        for entry in tuple(going):
            last, took = before[entry]
            if last and time.monotonic() + (1 + repeats_of(batch)) * took * batch / last > end:
                report.add(batch=batch, who=entry.name, failed="no time left")
                going.remove(entry)
                continue
            if not measure(entry, batch, report, bandwidth) and not retried(entry, batch, report, bandwidth):
                going.remove(entry)
                fits, limit = last, batch
                for _ in range(2 * (report.rows[-1]["failed"] == OUT_OF_MEMORY)):
                    if (between := (fits + limit) // 16 * 8) > fits and time.monotonic() + took * batch / max(
                        last, 1
                    ) < end:
                        fits, limit = (
                            (between, limit) if measure(entry, between, report, bandwidth) else (fits, between)
                        )
            before[entry] = batch, report.rows[-1].get("seconds", took)  # without what is compiled at a first batch
    theirs = models[-1]
    if theirs.name in report.best() and not theirs.compiled and time.monotonic() + 120 < end:
        theirs.compiled = True
        measure(theirs, report.best()[theirs.name][1], report, bandwidth)


def retried(entry: Any, batch: int, report: Report, bandwidth: float) -> bool:
    """Compile what could not be captured, from there on, and measure it."""
    if not isinstance(entry, GPTNeoX) or entry.compiled or report.rows[-1]["failed"] == OUT_OF_MEMORY:
        return False
    entry.compiled = True
    return measure(entry, batch, report, bandwidth)


def measure(entry: Any, batch: int, report: Report, bandwidth: float) -> bool:
    """Add a measurement to the report; False if it could not be made."""
    who = entry.name + (", compiled" if getattr(entry, "compiled", False) else "")
    try:
        found: dict[str, Any] = times(entry, batch)
    except Failed:
        raise
    except Exception as error:  # memory; what a compiler or a capture says
        said = f"{type(error).__name__}: {error}"
        kind = OUT_OF_MEMORY if "OutOfMemory" in said or OUT_OF_MEMORY in said.lower() else said[:300]
        found = {"failed": kind.replace("|", "/").replace("\n", " ")}
    else:
        found["bytes_us"] = 1e6 * entry.read_by_a_step(batch) / bandwidth
        found["prompt_floor"] = 2 * _multiplied(entry.model) * batch * PROMPT / PEAK
        if entry.name == "sscan.nn" and torch.cuda.is_available():
            found |= launches(entry.model, batch)
    entry.forget()
    free()
    report.add(batch=batch, who=who, **found)
    return "seconds" in found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=MAMBA, default="130m")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="without its ending")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    with torch.no_grad():
        models = made(args.size, args.device)
        parameters = ", ".join(f"{entry.name} {_parameters_of(entry.model):,}" for entry in models)
        try:
            print("logits of steps are off by", check(models), flush=True)
            name, bandwidth = "cpu", 1e10
            if args.device == "cuda":
                from gpu_timing import copy_bandwidth

                name, bandwidth = torch.cuda.get_device_name(), copy_bandwidth()
                free()
            about = {
                "device": name, "size": args.size, "bandwidth": bandwidth, "parameters": parameters,
                "command": " ".join(["python", *sys.argv]), "torch": torch.__version__,
                "transformers": transformers.__version__,
            }  # fmt: skip
            report = Report(about, args.out)
            compare(models, report, end, tuple(args.batches), bandwidth)
        except Failed as failure:
            print(f"check failed: {failure}", flush=True)
            return 1
    print(report.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
