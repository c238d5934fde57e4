"""Decoding and prefill on the CPU, sscan.nn beside llama.cpp: the same random weights, in one process, by turns.

    pip install llama-cpp-python gguf
    python bench/measure/bench_decode.py [--out bench/results/decode-DATE.md]

Before anything is timed, the logits of both are compared; exit code 1 if they are not of the same model. What reading
the weights takes at least is measured by the same turns. The bars are this project's own.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

import sscan
from sscan.cpu import _parallel
from sscan.cpu._vector import constant, load_wide, scratch, store_wide
from sscan.nn import MambaConfig, MambaLM

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
# The largest relative distance of logits: llama.cpp rounds activations to the dtype of the weights, sscan does not.
AGREE = {"float32": 1e-4, "bfloat16": 3e-2}
BARS = {"float32": 1.1, "bfloat16": 1.3}  # times llama.cpp's decoding, in the same dtype
OF_BANDWIDTH = 0.85  # of what reading the float32 weights takes


# The model


def random_model(config: MambaConfig) -> MambaLM:
    """Initial weights, but norms and D that are not all one."""
    model, rng = MambaLM(config), np.random.default_rng(1)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith(".D"):
            parameter.data[...] = 1 + 0.1 * rng.standard_normal(parameter.shape)
    return model


def in_dtype(model: MambaLM, dtype: Any) -> MambaLM:
    other = MambaLM(model.config, dtype, seed=None)
    other.load_state_dict(model.state_dict())
    return other


def write_gguf(model: MambaLM, path: Path) -> None:
    """The model as llama.cpp reads it: matrices in the dtype of the model, everything else in float32."""
    import gguf

    writer, config, mixer = gguf.GGUFWriter(path, "mamba"), model.config, model.backbone.layers[0].mixer
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.n_layer)
    writer.add_ssm_conv_kernel(mixer.d_conv)
    writer.add_ssm_inner_size(mixer.d_inner)
    writer.add_ssm_state_size(mixer.d_state)
    writer.add_ssm_time_step_rank(mixer.dt_rank)
    writer.add_layer_norm_rms_eps(model.backbone.norm_f.eps)
    writer.add_vocab_size(config.padded_vocab_size)
    writer.add_tokenizer_model("no_vocab")
    half = model.lm_head.weight.dtype != np.float32
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if half else gguf.LlamaFileType.ALL_F32)

    def add(name: str, array: Any, matrix: bool = False) -> None:
        if matrix and half:
            writer.add_tensor(name, array.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array, np.float32))

    add("token_embd.weight", model.backbone.embedding.weight.data, True)
    add("output_norm.weight", model.backbone.norm_f.weight.data)
    for i, layer in enumerate(model.backbone.layers):
        mixer, block = layer.mixer, f"blk.{i}"
        assert mixer.conv1d.bias is not None
        assert mixer.dt_proj.bias is not None
        add(f"{block}.attn_norm.weight", layer.norm.weight.data)
        add(f"{block}.ssm_in.weight", mixer.in_proj.weight.data, True)
        add(f"{block}.ssm_conv1d.weight", mixer.conv1d.weight.data[:, 0])
        add(f"{block}.ssm_conv1d.bias", mixer.conv1d.bias.data)
        add(f"{block}.ssm_x.weight", mixer.x_proj.weight.data, True)
        add(f"{block}.ssm_dt.weight", mixer.dt_proj.weight.data, True)
        add(f"{block}.ssm_dt.bias", mixer.dt_proj.bias.data)
        add(f"{block}.ssm_a", -np.exp(mixer.A_log.data))
        add(f"{block}.ssm_d", mixer.D.data)
        add(f"{block}.ssm_out.weight", mixer.out_proj.weight.data, True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Two that read tokens and know what comes next


class Sscan:
    def __init__(self, model: MambaLM) -> None:
        self.model = model
        self.reset()

    def reset(self) -> None:
        self.states = self.model.new_states(1)

    def read(self, tokens: Any) -> Any:
        """Logits after tokens (length,)."""
        if len(tokens) == 1:
            return self.model.step(tokens, self.states)[0]
        logits, self.states = self.model.prefill(tokens[None], self.states)
        return logits[0]


class LlamaCpp:
    def __init__(self, path: Path, threads: int, vocabulary: int) -> None:
        import llama_cpp

        self.api, self.vocabulary = llama_cpp, vocabulary
        silent = llama_cpp.llama_log_callback(lambda *message: None)
        llama_cpp.llama_log_set(silent, ctypes.c_void_p())
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 1 << 16, 512, 512
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, params)
        self.kept = silent, model

    def reset(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def read(self, tokens: Any) -> Any:
        """Logits after tokens (length,)."""
        ids = (ctypes.c_int32 * len(tokens))(*tokens.tolist())
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError("llama.cpp: llama_decode failed")
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), (self.vocabulary,)).copy()


@_parallel.kernel
def read_all(counter: Any, tasks: Any, x: Any, per_task: Any, out: Any) -> None:
    """One task: the sum of some of x, from which nobody could do it faster."""
    S = scratch(64, x.dtype)
    S[:] = 0
    while True:
        task = _parallel.take(counter)
        if task >= tasks:
            break
        a = constant(load_wide(S, 0), 0.0)
        b, c, d = a, a, a
        for k in range(task * per_task, (task + 1) * per_task, 256):
            a, b = a + load_wide(x, k), b + load_wide(x, k + 64)
            c, d = c + load_wide(x, k + 128), d + load_wide(x, k + 192)
        store_wide(S, 0, a + b + c + d)
        out[task] = S[0]


def bandwidth(x: Any) -> float:
    """Bytes per second of reading the array once, on as many threads as sscan has."""
    tasks = x.size >> 14
    out = np.empty(tasks, x.dtype)
    begin = time.perf_counter()
    _parallel.run(read_all, tasks, x, 1 << 14, out)
    return float(x.nbytes / (time.perf_counter() - begin))


# Comparison


def distances(readers: dict[str, dict[str, Any]], ids: Any) -> dict[str, float]:
    """For each dtype how far apart logits are after a prompt and some steps, relative to their size."""
    found = {}
    for name, pair in readers.items():
        logits = []
        for reader in pair.values():
            reader.reset()
            logits.append(np.stack([reader.read(ids[:16]), *(reader.read(ids[k : k + 1]) for k in range(16, 24))]))
        found[name] = float(np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[1]))
    return found


def rate(reader: Any, ids: Any, call: Callable[[Any, Any], None]) -> float:
    """Tokens per second."""
    reader.reset()
    reader.read(ids[:2])
    begin = time.perf_counter()
    call(reader, ids)
    return float(len(ids) / (time.perf_counter() - begin))


def decode(reader: Any, ids: Any) -> None:
    for k in range(len(ids)):
        reader.read(ids[k : k + 1])


def prefill(reader: Any, ids: Any) -> None:
    reader.read(ids)


def weights_of_a_step(model: MambaLM) -> int:
    """Bytes that a step reads: all parameters, since the head is the embedding."""
    return sum(parameter.data.nbytes for parameter in model.parameters())


def about(args: argparse.Namespace, config: MambaConfig) -> str:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("llama-cpp-python", "numba", "numpy")
    )
    return (
        f"{cpu}, {args.threads} threads; sscan {sscan.__version__}, {versions}. {config.n_layer} layers of "
        f"{config.d_model}, vocabulary {config.padded_vocab_size}, random weights, batch 1: {args.tokens} tokens one "
        f"by one, a prompt of {args.prompt}. Medians of {args.repeats} turns; load {os.getloadavg()[0]:.1f} at the end."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocabulary", type=int, default=50280)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=_parallel.threads(), help="of llama.cpp; sscan's by default")
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    args = parser.parse_args()

    config = MambaConfig(args.d_model, args.layers, args.vocabulary)
    wide = random_model(config)
    readers: dict[str, dict[str, Any]] = {}
    models = {name: wide if name == "float32" else in_dtype(wide, dtype) for name, dtype in DTYPES.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            path = Path(folder) / f"{name}.gguf"
            write_gguf(model, path)
            llama = LlamaCpp(path, args.threads, config.padded_vocab_size)
            readers[name] = {"sscan.nn": Sscan(model), "llama.cpp": llama}
        ids = np.random.default_rng(0).integers(0, args.vocabulary, args.prompt)
        apart = distances(readers, ids)
        print(f"logits differ by {apart}", flush=True)
        if any(not distance < AGREE[name] for name, distance in apart.items()):
            print("these are not the same models", file=sys.stderr)
            return 1

        memory = np.ones(weights_of_a_step(wide) // 4 >> 14 << 14, np.float32)
        found: dict[tuple[str, str, str], list[float]] = {}
        reads = []
        for _ in range(args.repeats):
            for call, count in ((decode, args.tokens), (prefill, args.prompt)):
                for name, pair in readers.items():
                    for who, reader in pair.items():
                        found.setdefault((call.__name__, name, who), []).append(rate(reader, ids[:count], call))
                    reads.append(bandwidth(memory))
    text = report(args, config, models, apart, {key: statistics.median(rates) for key, rates in found.items()}, reads)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    return 0


def report(
    args: argparse.Namespace,
    config: MambaConfig,
    models: dict[str, MambaLM],
    apart: dict[str, float],
    rates: dict[tuple[str, str, str], float],
    reads: list[float],
) -> str:
    best = statistics.median(reads)
    lines = [
        f"# {datetime.datetime.now(datetime.timezone.utc).date()}, decoding beside llama.cpp",
        "",
        "`python bench/measure/bench_decode.py`",
        "",
        about(args, config),
        "",
        f"Reading memory: {best / 1e9:.1f} GB/s (best {max(reads) / 1e9:.1f}). Distance of logits: "
        + ", ".join(f"{name} {distance:.1e}" for name, distance in apart.items())
        + ".",
        "",
        "| tokens/s | sscan.nn | llama.cpp | times | bar | of the bandwidth | bar |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for call in ("decode", "prefill"):
        for name, model in models.items():
            ours, theirs = rates[call, name, "sscan.nn"], rates[call, name, "llama.cpp"]
            row = [f"{call}, {name}", f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}"]
            if call == "decode":
                share = ours * weights_of_a_step(model) / best
                row += [f"{BARS[name]}", f"{share:.0%}", f"{OF_BANDWIDTH:.0%}" if name == "float32" else ""]
            else:
                row += ["float32's" if name == "bfloat16" else "", "", ""]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
