"""Language models on a GPU: the CPU's logits, rows that do not see each other, and generation as CUDA graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cupy
import numpy as np
import pytest
import torch
from cases import assert_within, eps_of
from test_generation import PROMPTS, WIDE, lists, model_of
from test_models import exact_logits, ids, perturbed

import sscan.torch
from sscan.compat.language_model import MambaLMHeadModel
from sscan.models import generation

if TYPE_CHECKING:
    from pathlib import Path

FRAMEWORKS = ("nn", "torch")


def on_gpu(framework: str, dtype: torch.dtype = torch.float32) -> Any:
    model = model_of(framework, WIDE, dtype)
    if framework == "torch":
        return model.cuda()
    model.to(cupy)
    return model


def test_logits_err_no_more_than_the_cpus() -> None:
    model, tokens = perturbed(WIDE), ids(2, 65)
    with torch.no_grad():
        here = model(torch.from_numpy(tokens)).numpy()
        exact = exact_logits(model, tokens)
        there = model.cuda()(torch.from_numpy(tokens).cuda()).cpu().numpy()
    assert_within(there, here, exact, eps_of(np.float32), "logits")


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_the_same_bits_alone_and_among_others(
    framework: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_gpu(framework, dtype)
    drawn: dict[tuple[int, ...], list[bytes]] = {}
    draw = generation._Row.draw

    def recorded(row: Any, logits: Any) -> int:
        drawn.setdefault(tuple(row.prompt), []).append(logits.tobytes())
        return draw(row, logits)

    monkeypatch.setattr(generation._Row, "draw", recorded)
    for batch in (1, 3, 8):
        model.generate(PROMPTS, 6, temperature=0, batch=batch)
        among, drawn = drawn, {}
        for prompt in PROMPTS:
            model.generate([prompt], 6, temperature=0, batch=batch)
        assert len(among) == len(PROMPTS)
        assert among == drawn
        drawn = {}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_tokens_are_the_cpus(framework: str) -> None:
    expected = lists(model_of(framework, WIDE).generate(PROMPTS, 12, temperature=0))
    assert lists(on_gpu(framework).generate(PROMPTS, 12, temperature=0)) == expected


def test_states_travel_between_devices_and_frameworks(tmp_path: Path) -> None:
    model, other = on_gpu("torch"), on_gpu("nn")
    _, states = model.prefill(torch.from_numpy(ids(3, 9)).cuda(), model.new_states(3))
    model.save_states(tmp_path / "states", states)
    read = other.load_states(tmp_path / "states")
    assert isinstance(read[0].ssm.data, cupy.ndarray)
    tokens = np.array([1, 2, 3])
    first, second = model.step(torch.from_numpy(tokens).cuda(), states), other.step(tokens, read)
    np.testing.assert_allclose(first.cpu(), second.get(), rtol=1e-4, atol=1e-4)
    assert model.load_states(tmp_path / "states")[1].conv.is_cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_of_the_drop_in_generate_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also when they are used again, for another prompt, another length and another batch."""
    perturbed(WIDE).save_pretrained(tmp_path)
    model = MambaLMHeadModel.from_pretrained(tmp_path, device="cuda", dtype=dtype).eval()
    for batch, length, new in ((3, 9, 20), (3, 17, 30), (1, 5, 8), (3, 9, 20)):
        prompt = torch.from_numpy(ids(batch, length, seed=length)).cuda()
        eager = model.generate(prompt, length + new, return_dict_in_generate=True, output_scores=True)
        graph = model.generate(prompt, length + new, return_dict_in_generate=True, output_scores=True, cg=True)
        assert torch.equal(graph.sequences, eager.sequences)
        for one, other in zip(graph.scores, eager.scores, strict=True):
            assert torch.equal(one, other)
    assert model._decoding_cache.callables.keys() == {(3, 1)}


def test_the_whole_model_errs_no_more_in_both_directions() -> None:
    torch.manual_seed(0)
    block = sscan.torch.BidirectionalMamba(32, shared="projections", dtype=torch.float32)
    x = torch.randn(2, 40, 32)
    with torch.no_grad():
        here, exact = block(x), block.double()(x.double())
        there = block.float().cuda()(x.cuda()).cpu()
    assert_within(there.numpy(), here.numpy(), exact.numpy(), eps_of(np.float32), "both directions")
