"""Data-parallel training of a small Mamba: every process has a copy of the model and other data.

    torchrun --nproc-per-node 2 docs/examples/train_ddp.py

The task is made up: to name the token of three steps before. The loss starts at log(16) = 2.8.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sscan.torch import Mamba

TOKENS, DELAY, BATCH, LENGTH = 16, 3, 8, 64


class Model(nn.Module):
    """Tokens to logits through one block."""

    def __init__(self, d_model=32):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, d_model)
        self.mixer = Mamba(d_model)
        self.head = nn.Linear(d_model, TOKENS)

    def forward(self, tokens):
        """Logits (batch, length, TOKENS) of tokens (batch, length)."""
        x = self.embedding(tokens)
        return self.head(x + self.mixer(x))


def train(device, rank, steps):
    """The losses of all steps, each the mean over the processes."""
    torch.manual_seed(0)  # the same model everywhere: DDP takes that of the first process
    model = DistributedDataParallel(Model().to(device), device_ids=[device] if device.type == "cuda" else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.Generator().manual_seed(1 + rank)  # and other data
    losses = []
    for _ in range(steps):
        tokens = torch.randint(TOKENS, (BATCH, LENGTH), generator=data).to(device)
        logits = model(tokens)[:, DELAY:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, :-DELAY].flatten())
        optimizer.zero_grad()
        loss.backward()  # DDP averages the gradients over the processes
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean / dist.get_world_size())
    return torch.stack(losses).tolist()


def main():
    """Train on the devices that there are, or on the CPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--meeting", default="env://", help="where the processes meet; torchrun sees to the default")
    given = parser.parse_args()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if given.device == "cuda" else torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=given.meeting, rank=rank, world_size=size)
    losses = train(device, rank, given.steps)
    if rank == 0:
        print(f"loss {losses[0]:.2f} at first, {losses[-1]:.2f} after {given.steps} steps")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
