"""Ops on sequences in parts on four ranks, and data-parallel training on two, with gloo."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import upcast
from distributed_cases import check, run_ranks, solved
from distributed_worker import NAMES, problem_of, splits, tensor

import sscan.torch
from sscan import reference
from sscan.torch import distributed

if TYPE_CHECKING:
    from collections.abc import Iterator

RANKS = 4
EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "train_ddp.py"


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What came of everything on every rank: starting processes takes longer than all they do."""
    return solved("gloo", tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.mark.parametrize("lengths", splits("gloo", RANKS), ids=str)
@pytest.mark.parametrize(("op", "name"), NAMES)
def test_parts_are_the_whole(op: str, name: str, lengths: tuple[int, ...], of_ranks: list[dict[Any, Any]]) -> None:
    check(op, name, lengths, of_ranks)


def test_gradients_pass_through_ranks_that_want_none(of_ranks: list[dict[Any, Any]]) -> None:
    problem = upcast(problem_of("selective_scan", "initial state", 40))
    exact = reference.selective_scan_backward(np.ones_like(problem["u"]), **problem).dinitial_state
    np.testing.assert_allclose(of_ranks[0]["wanting nothing"], exact, rtol=1e-5, atol=1e-5)


def test_errors_name_the_argument(of_ranks: list[dict[Any, Any]]) -> None:
    for rank, results in enumerate(of_ranks):
        said = results["errors"]
        assert said["weight"].startswith("causal_conv1d: weight must have shape"), said
        assert said["delta"].startswith("selective_scan: delta must have shape"), said
        if rank == 0:
            assert said["state"].startswith("selective_scan: initial_state must have shape"), said
        else:
            for name, op in (("halo", "causal_conv1d"), ("state", "selective_scan")):
                assert said[name].startswith(f"{op}: initial_state belongs to the first rank"), said


def test_sharded_parameters_have_the_same_gradients(of_ranks: list[dict[Any, Any]]) -> None:
    """FSDP gathers parameters for each use and frees them after it: ops may not keep a storage from being resized."""
    for results in of_ranks:
        assert len(results["sharded"]) == 2 * (3 + 9)
        for name, (whole, gathered) in results["sharded"].items():
            assert np.abs(whole).max() > 0, name
            np.testing.assert_allclose(gathered, whole, rtol=0, atol=1e-5 * np.abs(whole).max(), err_msg=name)


def test_under_autocast_inputs_are_cast(of_ranks: list[dict[Any, Any]]) -> None:
    for results in of_ranks:
        assert results["under autocast"] == ["torch.bfloat16", "torch.bfloat16", "torch.float32"]


@pytest.fixture
def _alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(("op", "name"), [("selective_scan", "initial state"), ("causal_conv1d", "initial state")])
def test_a_group_of_one_is_one_device(op: str, name: str) -> None:
    problem = {key: tensor(x) for key, x in problem_of(op, name, 20).items()}
    assert torch.equal(getattr(distributed, op)(**problem), getattr(sscan.torch, op)(**problem))


def test_the_example_of_data_parallel_training_learns(tmp_path: Path) -> None:
    written, _ = run_ranks(2, str(EXAMPLE), "--device", "cpu", "--meeting", f"file://{tmp_path}/meeting")
    first, last = map(float, re.findall(r"loss (\S+) at first, (\S+) after 30 steps", written)[0])
    assert first > 2.5
    assert last < 1.0
