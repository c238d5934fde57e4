"""Decoding on a GPU by sscan.nn and sscan.torch: tokens per second beside bars and floors, and what each kernel takes.

    python bench/measure/bench_decode_gpu.py [--size 130m] [--out bench/results/decode-cuda-DATE.md]

Random weights in bfloat16. Before anything is timed, logits are compared with the formulas in float64, drawn tokens
with those that the host draws from the same logits, and tokens of sscan.torch with those of sscan.nn. Exit code 1 if a
check fails; bars that are missed are marked.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from sscan.cuda import _graphs, _launch
from sscan.models import MambaConfig, Sampler
from sscan.nn import MambaLM, decoding

if TYPE_CHECKING:
    from collections.abc import Callable

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SIZES = {"130m": MambaConfig(768, 24, 50277), "1.4b": MambaConfig(2048, 48, 50277)}
BARS = {"130m": {1: 2500, 16: 24_870, 64: 86_510, 256: 238_474}}  # tokens per second; 1.2 times mamba_ssm's but batch 1
BATCHES = (1, 16, 64, 256)
NEW = 128  # tokens of a measurement
GREEDY = Sampler(0.0)


class Row(NamedTuple):
    """A sequence that begins with one token."""

    new: list[int]
    seed: int


class Failed(Exception):
    """A check found something wrong."""


# --- checks -----------------------------------------------------------------------------------------------------------


def exact_logits(model: MambaLM, ids: Any) -> Any:
    """Logits (batch, vocabulary) after ids (batch, length), by the formulas in float64."""
    import cupy as cp

    def double(p: Any) -> Any:
        return p.data.astype(np.float64)

    def silu(x: Any) -> Any:
        return x / (1 + cp.exp(-x))

    def normalised(x: Any, norm: Any) -> Any:
        return x / cp.sqrt((x * x).mean(1, keepdims=True) + norm.eps) * double(norm.weight)

    batch, layers = len(ids), model.backbone.layers
    inputs = [cp.zeros((batch, layer.mixer.d_inner, layer.mixer.d_conv)) for layer in layers]
    states = [cp.zeros((batch, *layer.mixer.A_log.shape)) for layer in layers]
    for token in ids.T:
        stream = double(model.backbone.embedding.weight)[token]
        for layer, seen, h in zip(layers, inputs, states, strict=True):
            m = layer.mixer
            x, z = cp.split(normalised(stream, layer.norm) @ double(m.in_proj.weight).T, 2, axis=1)
            seen[:, :, :-1], seen[:, :, -1] = seen[:, :, 1:].copy(), x
            u = silu((seen * double(m.conv1d.weight)[:, 0]).sum(2) + double(m.conv1d.bias))
            dt, B, C = cp.split(u @ double(m.x_proj.weight).T, [m.dt_rank, m.dt_rank + m.d_state], axis=1)
            delta = cp.logaddexp(dt @ double(m.dt_proj.weight).T + double(m.dt_proj.bias), 0.0)
            h *= cp.exp(-delta[:, :, None] * cp.exp(double(m.A_log)))
            h += (delta * u)[:, :, None] * B[:, None]
            y = ((h * C[:, None]).sum(2) + double(m.D) * u) * silu(z)
            stream = stream + y @ double(m.out_proj.weight).T
    return normalised(stream, model.backbone.norm_f) @ double(model.lm_head.weight).T


def check_logits(model: MambaLM, batch: int) -> float:
    """Relative error after three steps."""
    import cupy as cp

    ids = cp.asarray(np.random.default_rng(batch).integers(0, model.config.vocab_size, (batch, 3)))
    states = model.new_states(batch)
    for token in ids.T:
        logits = decoding.step(model, token, states)
        if logits is None:
            raise Failed("the kernels were not used")
    exact = exact_logits(model, ids)
    error = float(cp.linalg.norm(logits - exact) / cp.linalg.norm(exact))
    if not error < 0.03:  # bfloat16 through 24 blocks
        raise Failed(f"batch {batch}: logits are off by {error:.3f}")
    return error


def check_tokens(model: MambaLM, batch: int, sampler: Sampler) -> None:
    """The graph's tokens are those of single steps, drawn on the host by the same numbers."""
    import cupy as cp

    drawn = tokens_of(model, batch, sampler, 8)
    states, token = model.new_states(batch), cp.arange(batch)
    for turn, row in enumerate(drawn):
        logits = decoding.step(model, token, states).get()[:, : model.config.vocab_size]
        sampler.rng = _Fixed([uniform(b, turn) for b in range(batch)])  # type: ignore[assignment]
        if (sampler(logits) != row).mean() > 0.02:  # a number drawn may fall on the other side of a rounding
            raise Failed(f"batch {batch}, {sampler.filters}: other tokens than the host draws")
        token = cp.asarray(row)


class _Fixed:
    def __init__(self, numbers: list[float]) -> None:
        self.numbers = numbers

    def random(self, shape: Any) -> Any:
        return np.array(self.numbers).reshape(shape)


def uniform(seed: int, turn: int) -> float:
    """What ``sscan.cuda.kernels.sample`` draws, in Python's integers."""
    bits = (1 << 64) - 1

    def mixed(x: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> shift)) * factor & bits
        return x ^ (x >> 31)

    return (mixed(mixed(seed) + turn * 0x9E3779B97F4A7C15 & bits) >> 11) * 2.0**-53


def tokens_of(model: Any, batch: int, sampler: Sampler, count: int) -> Any:
    """Tokens (count, batch) of a decoder whose sequences begin with the tokens 0, 1, ..."""
    decoder = model._decoder(model.new_states(batch), model.config.vocab_size, sampler)
    if decoder is None:
        raise Failed("the model has no decoder on this device")
    for place in range(batch):
        decoder.put(place, Row([place], place))
    return decoder.steps(count)


# --- times ------------------------------------------------------------------------------------------------------------


def tokens_per_second(model: Any, batch: int, sampler: Sampler) -> float:
    """Of a decoder, by the host's clock, tokens in host memory; the median of five times ``NEW`` steps."""
    decoder = model._decoder(model.new_states(batch), model.config.vocab_size, sampler)
    decoder.steps(8)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        decoder.steps(NEW)
        times.append(time.perf_counter() - start)
    return batch * NEW / statistics.median(times)


def microseconds(function: Callable[[], Any]) -> float:
    """Of a CUDA graph of what a function launches, by CUDA events."""
    import cupy as cp

    function()
    graph, start, end, times = _graphs.Graph(function), cp.cuda.Event(), cp.cuda.Event(), []
    for _ in range(11):
        start.record()
        graph.launch()
        end.record()
        end.synchronize()
        times.append(1e3 * cp.cuda.get_elapsed_time(start, end))
    return statistics.median(times[1:])


def kernels_of(model: MambaLM, batch: int) -> dict[str, list[Any]]:
    """The launches of a step by the names of their kernels."""
    import cupy as cp

    found, launch = defaultdict(list), _launch.launch
    states, ids = model.new_states(batch), cp.zeros(batch, np.int64)
    decoding.step(model, ids, states)
    _launch.launch = lambda *call: found[call[0].factory].append(call)
    try:
        decoding.step(model, ids, states)
    finally:
        _launch.launch = launch
    return {name: [*calls, (states, ids)] for name, calls in found.items()}


def report(size: str, model: MambaLM, other: Any, bandwidth: float) -> list[str]:
    """The rows of a table for each batch."""
    weights = decoding._weights(model)
    read = sum(p.data.nbytes for p in model.parameters())
    lines = []
    for batch in BATCHES:
        state_bytes = sum(2 * (s.conv.data.nbytes + s.ssm.data.nbytes) for s in model.new_states(batch))
        step = 1e6 * batch / (rate := tokens_per_second(model, batch, GREEDY))
        drawn, torch_rate = tokens_per_second(model, batch, Sampler(1.0, 50)), tokens_per_second(other, batch, GREEDY)
        kernels = kernels_of(model, batch)
        launches = sum(len(calls) - 1 for calls in kernels.values()) + 1
        empty = kernels["embed"][0]
        floor = microseconds(lambda empty=empty, n=launches: [_launch.launch(*empty) for _ in range(n)])
        bar = BARS.get(size, {}).get(batch)
        verdict = f"{bar:,}{' **missed**' if min(rate, torch_rate) < bar else ''}" if bar else "-"
        lines.append(
            f"| {batch} | {rate:,.0f} | {torch_rate:,.0f} | {verdict} | {drawn:,.0f} | {step:.0f} | "
            f"{1e6 * (read + state_bytes) / bandwidth:.0f} | {launches} in {floor:.0f} |"
        )
        print(lines[-1], flush=True)
        parts = []
        for name, calls in kernels.items():
            took = microseconds(lambda calls=calls: [_launch.launch(*call) for call in calls[:-1]])
            parts.append(f"{name} {len(calls) - 1} x {took / (len(calls) - 1):.2f}")
        lines.append(f"|   | {', '.join(parts)} us |")
        print(lines[-1], flush=True)
    assert weights is not None
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="130m")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import cupy
    import torch
    from gpu_timing import copy_bandwidth

    from sscan import torch as sscan_torch

    model = MambaLM(SIZES[options.size], BFLOAT16)
    other = sscan_torch.MambaLM(SIZES[options.size], "meta", torch.bfloat16).to_empty(device="cuda")
    other.tie_weights()
    model.to(cupy)
    with torch.no_grad():
        ours = dict(model.named_parameters())
        for name, parameter in other.named_parameters():
            parameter.view(torch.uint8).copy_(torch.from_dlpack(ours[name].data.view(np.uint8)))
    try:
        errors = {batch: check_logits(model, batch) for batch in (1, 3, 16, 64)}
        print("relative errors of logits:", errors, flush=True)
        for batch, sampler in ((1, GREEDY), (16, Sampler(0.8, 50, 0.9)), (64, Sampler(1.0))):
            check_tokens(model, batch, sampler)
            if (tokens_of(other, batch, sampler, 16) != tokens_of(model, batch, sampler, 16)).any():
                raise Failed(f"batch {batch}: sscan.torch has other tokens than sscan.nn")
    except Failed as failure:
        print(f"check failed: {failure}")
        return 1
    bandwidth = copy_bandwidth()
    lines = report(options.size, model, other, bandwidth)
    text = "\n".join([
        f"# Decoding on {cupy.cuda.runtime.getDeviceProperties(0)['name'].decode()}, {options.size}, bfloat16", "",
        f"`{' '.join(['python', *sys.argv])}`; copies {bandwidth / 1e12:.2f} TB/s. tokens/s greedy, of {NEW} steps",
        "with the tokens in host memory at the end; microseconds of a step, its bytes and its launches alone.", "",
        "| batch | `sscan.nn` | `sscan.torch` | bar | top-k 50 | step us | bytes us | launches us |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |", *lines, "",
    ])  # fmt: skip
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
