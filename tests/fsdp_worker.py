"""One rank of FSDP2 on ``sscan.torch.Mamba``: ``python fsdp_worker.py FOLDER``.

Each leaves the gradients that it sees of the whole in the folder.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from test_torch_parts import PARTS, block, hidden
from torch.distributed.fsdp import fully_shard


def gradients(made: Any, rank: int) -> dict[str, Any]:
    for _ in range(2):  # the second one meets what the first one has left
        made.zero_grad()
        made(hidden(torch.float32)[rank : rank + 1]).square().mean().backward()
    return {name: p.grad.full_tensor() for name, p in made.named_parameters()}


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    with_parts = block(torch.float32)
    for part in PARTS:
        fully_shard(getattr(with_parts, part))
    blocks = {
        "one op": block(torch.float32),
        "part by part": block(torch.float32, use_fast_path=False),
        "parts by themselves": with_parts,
    }
    # Of every nn.Linear without a bias; nothing is done in place with what it returns.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPLinear\) returned a view tensor")
    found = {way: gradients(fully_shard(made), rank) for way, made in blocks.items()}
    torch.save(found, folder / f"rank{rank}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
