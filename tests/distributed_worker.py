"""One rank of a process group: its parts of problems through ``sscan.torch.distributed``, and what came of them.

``python distributed_worker.py BACKEND FOLDER``, as often as there are ranks, with RANK and WORLD_SIZE in the
environment. They meet in a file in the folder, and each leaves its results there, for the tests to put together.
"""

from __future__ import annotations

import os
import pickle
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch
import torch.distributed as dist
from cases import Arguments, Array, conv_problem, cotangents, scan_problem
from torch.distributed.fsdp import fully_shard

import sscan.torch
from sscan import reference
from sscan.torch import distributed

if TYPE_CHECKING:
    from collections.abc import Callable

STATES = {"selective_scan": "last_state", "causal_conv1d": "final_state"}
SCANS: dict[str, dict[str, Any]] = {
    "base": {},
    "initial state": {"initial_state": True},
    "float64, groups": {"dtype": "float64", "B": "2", "C": "1", "initial_state": True, "batch": 1},
    "bfloat16, constant C": {"dtype": "bfloat16", "C": "constant", "initial_state": True},
    "complex": {"is_complex": True, "initial_state": True},
    "complex arrays, constant B, zoh": {
        "is_complex": True, "B": "constant", "C": "shared complex", "discretization": "zoh"
    },
    "bare, slow decay": {
        "D": False, "z": False, "delta": "positive", "delta_bias": False, "delta_softplus": False, "A_scale": 0.01,
        "initial_state": True,
    },
}  # fmt: skip
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "initial state": {"initial_state": True, "activation": None},
    "bfloat16": {"initial_state": True, "dtype": "bfloat16"},
    "float64, wide": {"initial_state": True, "dtype": "float64", "width": 9, "bias": False},
    "width 1": {"width": 1},
}
NAMES = [("selective_scan", name) for name in SCANS] + [("causal_conv1d", name) for name in CONVOLUTIONS]


def splits(backend: str, size: int) -> list[tuple[int, ...]]:
    """Lengths of the parts on so many ranks: equal ones; others, some shorter than a filter; almost nothing.

    The first ones are long enough for a GPU to cut them further along time.
    """
    steps = 400 if backend == "nccl" else 75
    return [(steps,) * size, (200, 99, 0, 2, *[30] * size)[:size], (1, 0, 2, *[0] * size)[:size]]


def problem_of(op: str, name: str, length: int) -> Arguments:
    rng = np.random.default_rng(0)
    if op == "selective_scan":
        return scan_problem(rng, **{"dim": 6, "state": 5, "length": length, **SCANS[name]})
    return conv_problem(rng, **{"dim": 6, "length": length, **CONVOLUTIONS[name]})


def gradients_of_results(op: str, problem: Arguments) -> dict[str, Array]:
    y, state = getattr(reference, op)(**problem, **{f"return_{STATES[op]}": True})
    return cotangents({"y": y, STATES[op]: state})


def part(name: str, x: Any, problem: Arguments, lengths: tuple[int, ...], rank: int) -> Any:
    """The rank's part of an argument: of those along time some steps, the initial state on the first rank."""
    if name == "initial_state":
        return x if rank == 0 else None
    if not isinstance(x, np.ndarray) or x.ndim < 3:
        return x
    reals = x.shape[-1] // sum(lengths) if sum(lengths) else 1
    begin = reals * sum(lengths[:rank])
    return x[..., begin : begin + reals * lengths[rank]]


def tensor(x: Any, device: str = "cpu") -> Any:
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(x.copy()).to(device)


def array(x: Any) -> Array:
    x = x.detach().cpu().resolve_conj()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype is torch.bfloat16 else x.numpy()


def solve(op: str, problem: Arguments, lengths: tuple[int, ...], rank: int, device: str) -> dict[str, Array]:
    """The rank's results and gradients; every rank gives its state a gradient, the same on all."""
    state, given = STATES[op], gradients_of_results(op, problem)
    inputs = {name: tensor(part(name, x, problem, lengths, rank), device) for name, x in problem.items()}
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    call = getattr(distributed, op)
    with torch.no_grad():
        alone = call(**inputs)
    y, end = call(**inputs, **{f"return_{state}": True})
    assert torch.equal(alone, y), "not the same when gradients are not recorded"
    dy = tensor(part("dy", given["dy"], problem, lengths, rank), device)
    dend = tensor(given[f"d{state}"], device)
    gradients = torch.autograd.grad((y, end), list(leaves.values()), (dy, dend))
    found = {"y": y, state: end, **{f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}}
    return {name: array(x) for name, x in found.items()}


def wanting_nothing(rank: int, device: str) -> Array:
    """The gradient of the initial state, where no rank but the first wants any."""
    problem = problem_of("selective_scan", "initial state", 40)
    lengths = (40 // dist.get_world_size(),) * dist.get_world_size()
    inputs = {name: tensor(part(name, x, problem, lengths, rank), device) for name, x in problem.items()}
    if rank == 0:
        inputs["initial_state"].requires_grad_()
    distributed.selective_scan(**inputs).sum().backward()
    return array(inputs["initial_state"].grad) if rank == 0 else np.empty(0)


def errors(rank: int, device: str) -> dict[str, str]:
    """What is said to arguments that do not fit, on the rank that has them."""
    x, weight, state = (torch.zeros(shape, device=device) for shape in ((1, 2, 3), (2, 4), (1, 2, 4)))
    calls: dict[str, Callable[[], Any]] = {
        "weight": lambda: distributed.causal_conv1d(x, weight[:1]),
        "delta": lambda: distributed.selective_scan(x, x[..., :2], weight, x, x),
    }
    if rank == 0:
        B = torch.zeros((1, 4, 3), device=device)
        calls["state"] = lambda: distributed.selective_scan(x, x, weight, B, B, initial_state=state[..., 1:])
    else:
        calls["halo"] = lambda: distributed.causal_conv1d(x, weight, initial_state=x)
        calls["state"] = lambda: distributed.selective_scan(x, x, weight, x, x, initial_state=state)
    said = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            said[name] = str(error)
    return said


def under_autocast(device: str) -> list[str]:
    """The dtypes of results of both ops, of inputs in float32 and one in bfloat16."""
    x, parameter = torch.rand(1, 2, 4, device=device), torch.rand(2, 4, device=device)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        u = distributed.causal_conv1d(x, parameter)
        y, end = distributed.selective_scan(u, x, -parameter, parameter, parameter, z=x, return_last_state=True)
    return [str(result.dtype) for result in (u, y, end)]


class Block(torch.nn.Module):
    """Ops on parameters of its own, and a Mamba block."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 4))
        self.A_log = torch.nn.Parameter(torch.randn(6, 5))
        self.norm = torch.nn.Parameter(torch.rand(6))
        self.mixer = sscan.torch.Mamba(6, d_state=4)

    def forward(self, x: Any) -> Any:
        u = sscan.torch.causal_conv1d(x, self.weight, activation="silu")
        y = sscan.torch.selective_scan(u, u.abs(), -self.A_log.exp(), u[:, :5], u[:, 1:])
        return x + self.mixer(sscan.torch.rms_norm(y.mT, self.norm)).mT


def sharded(device: str) -> dict[str, tuple[Array, Array]]:
    """Gradients of two blocks by parameter, without FSDP and with it, which frees gathered parameters."""
    x = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for shard in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(Block(), Block()).to(device)
        if shard:
            for module in (*model, model):
                fully_shard(module)
        for _ in range(2):  # the second time, in storages that were freed
            model.zero_grad()
            model(x).square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append({name: g.full_tensor() if shard else g for name, g in gradients.items()})
    return {name: (array(g), array(found[1][name])) for name, g in found[0].items()}


def main(backend: str, folder: Path) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device, options = "cpu", {}
    if backend == "nccl":
        device, options = f"cuda:{rank}", {"device_id": torch.device("cuda", rank)}
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=size, timeout=timedelta(seconds=400),
        **options,
    )  # fmt: skip
    results: dict[Any, Any] = {
        (op, name, lengths): solve(op, problem_of(op, name, sum(lengths)), lengths, rank, device)
        for lengths in splits(backend, size)
        for op, name in NAMES
    }
    results["wanting nothing"], results["errors"] = wanting_nothing(rank, device), errors(rank, device)
    results["sharded"] = sharded(device)
    results["under autocast"] = under_autocast(device)
    (folder / f"rank{rank}").write_bytes(pickle.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
