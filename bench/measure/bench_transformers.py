"""Prefill of transformers' MambaForCausalLM (random weights) before and after ``sscan.compat.install()``.

    python bench/measure/bench_transformers.py [--device cuda --dtype bfloat16] [--out FILE.md]

The default is the configuration of mamba-130m on the CPU. Three models with the same weights: transformers' own path in
PyTorch, its fast path with sscan behind it, and sscan's module in the place of its mixers. Before anything is timed,
logits are compared with those of transformers' own path in float32; exit code 1 if they are further away than its own.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import MambaConfig

import sscan
import sscan.compat
from sscan.compat.transformers import replace_mixers


def modeling(name: str) -> Any:
    """A copy of transformers' module, which chooses its kernels when it is executed."""
    found = importlib.util.find_spec("transformers.models.mamba.modeling_mamba")
    spec = importlib.util.spec_from_file_location(f"transformers.models.mamba.{name}", found.origin)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def models(config: MambaConfig, device: str, dtype: torch.dtype) -> dict[str, Any]:
    before = modeling("modeling_before")
    installation = sscan.compat.install()
    after = modeling("modeling_after")
    installation.undo()
    made = {
        name: module.MambaForCausalLM(config).to(device, dtype).eval()
        for name, module in (("transformers", before), ("sscan.compat", after), ("sscan.torch.Mamba", before))
    }
    for model in made.values():
        model.load_state_dict(made["transformers"].state_dict())
    replace_mixers(made["sscan.torch.Mamba"])
    return made


def exact(model: Any) -> Any:
    """The model in float32, with the same weights."""
    made = type(model)(model.config).to(model.device).eval()
    made.load_state_dict(model.state_dict())
    return made


def difference(logits: Any, expected: Any) -> float:
    """Of all logits, relative."""
    distance: float = ((logits.float() - expected).norm() / expected.norm()).item()
    return distance


def seconds(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Median. What compiles did so when the logits were compared."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def prefill(model: Any, ids: Any) -> Any:
    """Logits of the token that comes next, and no others."""
    last = model.backbone(ids, use_cache=False).last_hidden_state[:, -1:]  # float32, whatever the weights are
    return model.lm_head(last.to(model.lm_head.weight.dtype))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slow-repeats", type=int, default=3, help="of transformers' own path")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()

    config = MambaConfig(
        hidden_size=args.d_model, num_hidden_layers=args.layers, state_size=16, vocab_size=50280, use_bias=False,
        initializer_range=0.02,  # with 0.1, the default, a change of bits grows to another answer in 24 layers
    )  # fmt: skip
    torch.manual_seed(0)
    made = models(config, args.device, getattr(torch, args.dtype))
    ids = torch.randint(0, 50280, (args.batch, args.length), device=args.device)
    about = (
        f"MambaForCausalLM, {args.layers} layers of {args.d_model}, batch {args.batch}, {args.length} tokens, "
        f"{args.dtype}, {args.device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores; sscan "
        f"{sscan.__version__}, torch {torch.__version__}, transformers {transformers.__version__}. Medians."
    )
    head = "| mixers | prefill, s | tokens/s | difference of logits from float32 |"
    lines = [about, "", head, "| --- | --- | --- | --- |"]
    with torch.no_grad():
        expected = exact(made["transformers"])(ids[:, :64]).logits
        differences = {name: difference(model(ids[:, :64]).logits, expected) for name, model in made.items()}
        for name, model in made.items():
            repeats = args.slow_repeats if name == "transformers" else args.repeats
            taken = seconds(lambda model=model: prefill(model, ids), args.device, repeats)
            lines.append(f"| {name} | {taken:.3f} | {args.batch * args.length / taken:.0f} | {differences[name]:.1e} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    return int(not all(found <= differences["transformers"] + 1e-3 for found in differences.values()))


if __name__ == "__main__":
    sys.exit(main())
