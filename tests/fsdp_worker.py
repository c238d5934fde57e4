"""One rank of FSDP2 on a ``sscan.torch.Mamba``: ``python fsdp_worker.py FOLDER True|False``, with or without its one op.

Each leaves the gradients that it sees of the whole in the folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_torch_parts import block, hidden
from torch.distributed.fsdp import fully_shard


def main(folder: Path, fast: bool) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    made = fully_shard(block(torch.float32, use_fast_path=fast))
    for _ in range(2):  # the second one meets what the first one has left
        made.zero_grad()
        made(hidden(torch.float32)[rank : rank + 1]).square().mean().backward()
    torch.save({name: p.grad.full_tensor() for name, p in made.named_parameters()}, folder / f"rank{rank}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "True")
