"""Say which language each byte of a file is in, by a trained Mamba that somebody else published, on sscan's ops.

    pip install sscan && pip install --no-deps typeseg==0.2.7
    python docs/examples/classify_bytes.py FILE

The package typeseg (Apache-2.0) brings the weights: six bidirectional blocks of width 256. Both directions share
everything up to the scan, so one call of the scan takes both, the second as a second row that runs backwards.
"""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

import sscan

LEAST_STEP = 1e-4
ALLOWED = np.isin(np.arange(256), [9, 10, 13, *range(32, 127)])
OTHER = 128  # stands for every byte that is not allowed


def tokens_of(text: bytes) -> Any:
    """The tokens of a text."""
    data = np.frombuffer(text, np.uint8).astype(np.int64)
    return np.where(ALLOWED[data], data, OTHER)


def load(dtype: Any = np.float32) -> dict[str, Any]:
    """The weights in the package, by their names there."""
    with (files("typeseg") / "data" / "mamba_al.npz").open("rb") as file, np.load(file) as arrays:
        return {name: arrays[name].astype(dtype) for name in arrays}


def logits(weights: dict[str, Any], tokens: Any) -> Any:
    """(length, 35) for tokens (length,), in the dtype of the weights."""
    hidden = weights["Embed_0__embedding"][tokens]
    blocks = sum(name.endswith("A_log") for name in weights)
    for i in range(blocks):
        prefix = f"CheckpointMambaBlock1D_{i}__"
        own = {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}
        hidden = hidden + block(own, layer_norm(own, hidden))
    return dense(weights, 0, layer_norm(weights, hidden))


def block(weights: dict[str, Any], hidden: Any) -> Any:
    """A bidirectional Mamba block."""
    rank, state = weights["Dense_2__kernel"].shape[0], weights["A_log"].shape[1]
    x, z = np.split(dense(weights, 0, hidden).T, 2)
    kernel, bias = weights["Conv_0__kernel"][:, 0].T, weights["Conv_0__bias"]
    # Its convolution looks one step back and two ahead: a causal one whose results are two steps late.
    late = np.pad(x, ((0, 0), (0, kernel.shape[1] - 2)))
    u = sscan.causal_conv1d(late[None], np.ascontiguousarray(kernel), bias, "silu")[0, :, kernel.shape[1] - 2 :]
    dt, B, C = np.split(dense(weights, 1, u.T).T, [rank, rank + state])
    delta = np.logaddexp(0, dense(weights, 2, dt.T).T) + np.asarray(LEAST_STEP, u.dtype)
    u, delta, B, C, z = (np.stack([array, array[:, ::-1]]) for array in (u, delta, B, C, z))
    ahead, back = sscan.selective_scan(u, delta, -np.exp(weights["A_log"]), B, C, weights["D"], z)
    return dense(weights, 3, (ahead + back[:, ::-1]).T)


def dense(weights: dict[str, Any], i: int, x: Any) -> Any:
    """A linear map with a bias."""
    return x @ weights[f"Dense_{i}__kernel"] + weights[f"Dense_{i}__bias"]


def layer_norm(weights: dict[str, Any], x: Any) -> Any:
    """The only layer norm of this part."""
    centred = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(-1, keepdims=True) + np.asarray(1e-6, x.dtype))
    return centred / scale * weights["LayerNorm_0__scale"] + weights["LayerNorm_0__bias"]


def main() -> None:
    """Print the runs of bytes that are in one language."""
    text = Path(sys.argv[1]).read_bytes()
    labels = json.loads((files("typeseg") / "data" / "manifest.json").read_text())["labels"]
    at = 0
    for label, run in groupby(logits(load(), tokens_of(text)).argmax(1)):
        size = len(list(run))
        print(f"{labels[label]:<22} {text[at : at + size][:60]!r}")
        at += size


if __name__ == "__main__":
    main()
