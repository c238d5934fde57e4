"""Ops on sequences in parts on all GPUs of the machine, of which there must be at least two, with NCCL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from distributed_cases import check, solved
from distributed_worker import NAMES, splits
from test_torch_distributed import test_sharded_parameters_have_the_same_gradients  # noqa: F401

if TYPE_CHECKING:
    from pathlib import Path

SPLITS = range(len(splits("nccl", 2)))


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    size = torch.cuda.device_count()
    assert size > 1, f"needs two GPUs, found {size}"
    return solved("nccl", folder, size)


@pytest.mark.parametrize("number", SPLITS)
@pytest.mark.parametrize(("op", "name"), NAMES)
def test_parts_are_the_whole(op: str, name: str, number: int, of_ranks: list[dict[Any, Any]]) -> None:
    check(op, name, splits("nccl", len(of_ranks))[number], of_ranks)
