"""transformers' Mamba on its fast path with the installed names, and with sscan's block in the place of its mixers.

These tests run with the oldest and the newest release that is supported: `nox -s transformers`.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
import time
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import accelerate
import numpy as np
import peft
import pytest
import torch
from cases import assert_within, eps_of
from test_torch_parts import ops_of

import sscan.compat
import sscan.compat.causal_conv1d
import sscan.compat.mamba_ssm
import sscan.compat.transformers
from sscan.compat.transformers import Mixer, replace_mixers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def modeling(name: str) -> Any:
    """A copy of transformers' Mamba, which chooses its kernels now."""
    found = importlib.util.find_spec("transformers.models.mamba.modeling_mamba")
    spec = importlib.util.spec_from_file_location(f"transformers.models.mamba.{name}", found.origin)  # type: ignore
    made = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[spec.name] = made  # type: ignore[union-attr]
    spec.loader.exec_module(made)  # type: ignore[union-attr]
    return made


KERNELS = {
    "mamba_inner_fn": sscan.compat.mamba_ssm,
    "selective_scan_fn": sscan.compat.mamba_ssm,
    "selective_state_update": sscan.compat.mamba_ssm,
    "causal_conv1d_fn": sscan.compat.causal_conv1d,
    "causal_conv1d_update": sscan.compat.causal_conv1d,
}


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How often each of our functions is called, by those who take it from its module from now on."""
    calls = dict.fromkeys(KERNELS, 0)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in KERNELS.items():
            function = getattr(module, name)

            def counting(*args: Any, function: Any = function, name: str = name, **kwargs: Any) -> Any:
                calls[name] += 1
                return function(*args, **kwargs)

            wrapper = functools.wraps(function)(counting)
            patch.setattr(module, name, wrapper)
        yield calls


@pytest.fixture(scope="module")
def models() -> Any:
    """The same random model on its slow path, on its fast path, and the slow one in float64; calls of the fast one."""
    from transformers import MambaConfig

    config = MambaConfig(
        vocab_size=89, hidden_size=32, state_size=8, num_hidden_layers=3, pad_token_id=0, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    slow = modeling("slow_modeling")
    with counted() as calls:
        sscan.compat.install()
        fast = modeling("fast_modeling")
        sscan.compat.uninstall()
    exact = modeling("exact_modeling")
    # The norm computes in float32 whatever its input.
    exact.MambaRMSNorm.forward = lambda self, x: self.weight * x * torch.rsqrt((x * x).mean(-1, True) + 1e-5)
    config.residual_in_fp32 = False
    torch.manual_seed(0)
    made = [module.MambaForCausalLM(config).eval() for module in (slow, fast, exact)]
    for other in made[1:]:
        other.load_state_dict(made[0].state_dict())
    return *made[:2], made[2].double(), calls


def ids(batch: int = 2, length: int = 33) -> Any:
    return torch.randint(1, 89, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [False, True])
def test_transformers_takes_its_fast_path(models: Any, training: bool) -> None:
    """Logits and gradients err no more than those of the slow path; training takes the fused function."""
    *three, calls = models
    results = []
    before = dict(calls)
    for model in three:
        model.train(training).zero_grad()
        out = model(ids(), labels=ids(), use_cache=False)
        out.loss.backward()
        results.append([out.logits, *(p.grad for p in model.parameters())])
        model.eval()
    made = {name: calls[name] - before[name] for name in calls}
    used = {"mamba_inner_fn"} if training else {"selective_scan_fn", "causal_conv1d_fn"}
    assert made == {name: 3 if name in used else 0 for name in calls}
    for name, slow, fast, exact in zip(["logits", *dict(three[0].named_parameters())], *results, strict=True):
        arrays = [x.detach().numpy() for x in (fast, slow, exact)]
        assert_within(*arrays, eps_of(np.float32), name)


def test_transformers_generates_the_same(models: Any) -> None:
    slow, fast, _, calls = models
    mask = torch.ones_like(ids())
    mask[0, :9] = 0
    before = calls["selective_state_update"]
    for given in ({}, {"attention_mask": mask}):
        expected = slow.generate(ids(), max_new_tokens=9, do_sample=False, **given)
        assert torch.equal(fast.generate(ids(), max_new_tokens=9, do_sample=False, **given), expected)
    assert calls["selective_state_update"] - before == 2 * 8 * 3  # for all but the first token of each


def test_transformers_compiles_on_its_fast_path(models: Any) -> None:
    fast = models[1]
    compiled = torch.compile(fast.train(), fullgraph=True, backend="aot_eager")
    try:
        found, expected = (model(ids(), use_cache=False).logits for model in (compiled, fast))
        torch.testing.assert_close(found, expected)
        found.sum().backward()
    finally:
        fast.eval()


def test_transformers_is_faster(models: Any) -> None:
    """By far: the slow path takes a step of Python for every token."""
    slow, fast, *_ = models
    long = ids(1, 600)
    seconds = []
    with torch.no_grad():
        for model in (fast, slow):
            model(long[:, :8])
            start = time.perf_counter()
            model(long)
            seconds.append(time.perf_counter() - start)
    assert seconds[0] < seconds[1]


def test_availability_is_asked_again() -> None:
    from transformers.utils import import_utils

    cuda = pytest.MonkeyPatch()
    cuda.setattr(import_utils, "is_torch_cuda_available", lambda: True)
    try:
        sscan.compat.uninstall()
        assert not import_utils.is_mamba_ssm_available()
        with_names = sscan.compat.install()
        assert import_utils.is_mamba_ssm_available()
        assert import_utils.is_causal_conv1d_available()
        assert not import_utils.is_mamba_2_ssm_available()
        with_names.undo()
        assert not import_utils.is_mamba_ssm_available()
    finally:
        cuda.undo()
        for name in ("is_mamba_ssm_available", "is_causal_conv1d_available", "is_mamba_2_ssm_available"):
            getattr(import_utils, name).cache_clear()


@pytest.mark.usefixtures("models")
def test_says_who_came_too_early() -> None:
    modeling("modeling_early")
    made = sscan.compat.install()
    made.undo()
    assert "transformers.models.mamba.modeling_early" in made.too_late
    assert "imported before, and do not use it" in str(made)
    del sys.modules["transformers.models.mamba.modeling_early"]


# --- sscan's block in the place of the mixers -------------------------------------------------------------------------

CACHE = "cache" if tuple(map(int, version("transformers").split(".")[:2])) >= (5, 24) else "cache_params"


@pytest.fixture(scope="module")
def pair(models: Any) -> Any:
    """A model on transformers' own slow path whose mixers are not as regular as fresh ones, and the same with ours."""
    theirs = copy.deepcopy(models[0])
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in theirs.backbone.layers:
            for parameter in layer.mixer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    ours = copy.deepcopy(theirs)
    assert replace_mixers(ours) == 3
    return theirs, ours


def with_cache(model: Any, tokens: Any, cache: Any = None, **given: Any) -> tuple[Any, Any]:
    """Logits, and the cache behind them."""
    out = model(tokens, use_cache=True, **{CACHE: cache}, **given)
    return out.logits, getattr(out, CACHE)


def close(found: Any, expected: Any) -> None:
    """To the rounding of float32 in a sum, on the scale of all numbers."""
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def padded(kept: int = 24) -> Any:
    mask = torch.ones(2, 33, dtype=torch.int64)
    mask[0, : 33 - kept] = 0
    return mask


def test_mixers_stay_what_they_were(models: Any) -> None:
    """The same objects, parameters, order and names; a second call finds none."""
    model = copy.deepcopy(models[0])
    mixers = [layer.mixer for layer in model.backbone.layers]
    parameters, names = list(model.named_parameters()), list(model.state_dict())
    assert replace_mixers(model) == 3
    assert replace_mixers(model) == 0
    assert all(layer.mixer is mixer for layer, mixer in zip(model.backbone.layers, mixers, strict=True))
    assert {type(mixer) for mixer in mixers} == {Mixer}
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in parameters]
    assert all(p is before for (_, p), (_, before) in zip(model.named_parameters(), parameters, strict=True))
    assert list(model.state_dict()) == names
    assert ops_of(lambda: model(ids(), use_cache=False)) == {"sscan::mamba"}


@pytest.mark.parametrize("training", [False, True])
def test_replaced_mixers_err_no_more(models: Any, training: bool) -> None:
    """Logits and gradients, beside those of the slow path."""
    slow, _, exact, _ = models
    ours, results = copy.deepcopy(slow), []
    replace_mixers(ours)
    for model in (slow, ours, exact):
        model.train(training).zero_grad()
        out = model(ids(), labels=ids(), use_cache=False)
        out.loss.backward()
        results.append([out.logits, *(p.grad for p in model.parameters())])
        model.eval()
    for name, theirs, found, right in zip(["logits", *dict(slow.named_parameters())], *results, strict=True):
        arrays = [x.detach().numpy() for x in (found, theirs, right)]
        assert_within(*arrays, eps_of(np.float32), name)


@torch.no_grad()
def test_prompt_and_steps_are_the_whole(pair: Any) -> None:
    """The states reach the cache and come back: a prompt of 11 tokens, then steps."""
    theirs, ours = pair
    expected = theirs(ids(), use_cache=False).logits
    close(ours(ids(), use_cache=False).logits, expected)
    logits, cache = with_cache(ours, ids()[:, :11])
    found = [logits]
    for t in range(11, 33):
        logits, cache = with_cache(ours, ids()[:, t : t + 1], cache)
        found.append(logits)
    close(torch.cat(found, 1), expected)
    assert ops_of(lambda: with_cache(ours, ids()[:, :1], cache)) == {
        "sscan::causal_conv1d_update", "sscan::selective_state_update",
    }  # fmt: skip


@torch.no_grad()
def test_caches_are_transformers_own(pair: Any) -> None:
    """Its mixers go on where ours ended, and ours where its mixers did."""
    expected = pair[0](ids(), use_cache=False).logits
    for first, second in (pair, reversed(pair)):
        _, cache = with_cache(first, ids()[:, :32])
        close(with_cache(second, ids()[:, 32:], cache)[0], expected[:, 32:])


def test_generates_the_same(pair: Any) -> None:
    theirs, ours = pair
    for given in ({}, {"attention_mask": padded()}, {"attention_mask": padded(), "num_beams": 3}):
        expected = theirs.generate(ids(), max_new_tokens=9, do_sample=False, **given)
        assert len(set(expected[0, 33:].tolist())) > 3
        assert torch.equal(ours.generate(ids(), max_new_tokens=9, do_sample=False, **given), expected)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(4, 29), (9, 24), (12, 1, 20), (1, 1, 31), (33,)], ids=str)
@pytest.mark.parametrize("whole_mask", [True, False])
def test_padding_in_chunks(pair: Any, chunks: tuple[int, ...], whole_mask: bool) -> None:
    """A row with padding on the left, in parts with a cache, is the row alone; the mask is of all tokens, or a part."""
    theirs, ours = pair
    alone, other = theirs(ids()[:1, 9:], use_cache=False).logits, theirs(ids()[1:], use_cache=False).logits
    cache, found, begin = None, [], 0
    for length in chunks:
        end = begin + length
        mask = padded()[:, :end] if whole_mask else padded()[:, begin:end]
        logits, cache = with_cache(ours, ids()[:, begin:end], cache, attention_mask=mask)
        found.append(logits)
        begin = end
    close(torch.cat(found, 1)[:1, 9:], alone)
    close(torch.cat(found, 1)[1:], other)


@pytest.mark.parametrize("fast", [True, False])
def test_holes_in_the_mask(pair: Any, fast: bool) -> None:
    """Numbers, and gradients, of transformers, which zeroes what enters the convolution and what leaves it."""
    mask = padded()
    mask[0, 14:17] = mask[1, 5] = mask[1, 30:] = 0
    results = []
    for model in pair:
        for layer in model.backbone.layers:
            layer.mixer.use_fast_path = fast
        model.zero_grad()
        out = model(ids(), attention_mask=mask, use_cache=False)
        (out.logits * mask[..., None]).square().mean().backward()
        results.append([out.logits[mask == 1].detach(), *(p.grad for p in model.parameters())])
    for expected, found in zip(*results, strict=True):
        close(found, expected)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int64])
def test_masks_of_every_dtype(pair: Any, kind: torch.dtype) -> None:
    theirs, ours = pair
    with torch.no_grad():
        expected, found = (m(ids(), attention_mask=padded().to(kind), use_cache=False).logits for m in (theirs, ours))
    close(found[padded() == 1], expected[padded() == 1])


def test_gradients_go_through_the_cache(pair: Any) -> None:
    """Of a sequence in parts, steps among them, when they are recorded."""
    ours = pair[1]
    results = []
    for parts in ((33,), (11, 1, 1, 20)):
        ours.zero_grad()
        cache, found = None, []
        for tokens in ids().split(parts, 1):
            logits, cache = with_cache(ours, tokens, cache)
            found.append(logits)
        torch.cat(found, 1).square().mean().backward()
        results.append([p.grad for p in ours.parameters()])
    for whole, in_parts in zip(*results, strict=True):
        close(in_parts, whole)


@pytest.mark.parametrize("fused", [False, True])
def test_optimizer_state_carries_over(pair: Any, fused: bool) -> None:
    """Saved before the mixers are replaced, loaded after it."""
    theirs = copy.deepcopy(pair[0])
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, fused=fused)

    def train(model: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        model(ids(), labels=ids(), use_cache=False).loss.backward()
        optimizer.step()

    for _ in range(2):
        train(theirs, optimizer)
    ours, state = copy.deepcopy(theirs), copy.deepcopy(optimizer.state_dict())
    assert replace_mixers(ours) == 3
    other = torch.optim.AdamW(ours.parameters(), lr=1e-2, fused=fused)
    other.load_state_dict(state)
    train(theirs, optimizer)
    train(ours, other)
    for (name, expected), found in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            close(other.state[found][key], optimizer.state[expected][key])
        assert (found - expected).abs().max() < 1e-3, name  # of a step of 1e-2, where a small gradient is noise


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # transformers 5.24 to peft
@pytest.mark.parametrize("first", ["peft", "replace_mixers"])
def test_peft(pair: Any, first: str) -> None:
    """Adapters stay where they are, or come later; they act in forward and steps, and learn."""
    config = peft.LoraConfig(
        r=2, target_modules=["in_proj", "x_proj", "dt_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )  # peft refuses out_proj of this model, whose weight transformers once read past it
    torch.manual_seed(2)
    theirs = peft.get_peft_model(copy.deepcopy(pair[0]), config)
    if first == "peft":
        ours = copy.deepcopy(theirs)
        assert replace_mixers(ours) == 3
    else:
        ours = peft.get_peft_model(copy.deepcopy(pair[1]), config)
        ours.load_state_dict(theirs.state_dict())
    by_hand = copy.deepcopy(theirs).merge_and_unload()  # transformers reads dt_proj.weight past its adapter
    expected = by_hand(ids(), use_cache=False).logits.detach()
    assert (expected - pair[0](ids(), use_cache=False).logits).abs().max() > 1e-2 * expected.abs().max()
    close(ours(ids(), use_cache=False).logits, expected)
    with torch.no_grad():
        _, cache = with_cache(ours, ids()[:, :32])
        close(with_cache(ours, ids()[:, 32:], cache)[0], expected[:, 32:])
    ours(ids(), labels=ids(), use_cache=False).loss.backward()
    trained = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 3 * 2
    assert {name: bool(gradient.abs().max() > 0) for name, gradient in trained.items()} == dict.fromkeys(trained, True)
    close(ours.merge_and_unload()(ids(), use_cache=False).logits, expected)


@pytest.mark.parametrize("first", ["accelerate", "replace_mixers"])
def test_accelerate(pair: Any, first: str, tmp_path: Path) -> None:
    """Weights that lie on the disk are there when they are needed, whichever came first."""
    theirs, ours = pair
    expected = theirs(ids(), use_cache=False).logits.detach()
    model = copy.deepcopy(theirs if first == "accelerate" else ours)
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert replace_mixers(model) == (3 if first == "accelerate" else 0)
    cache, found = None, []
    with torch.no_grad():
        for tokens in ids().split((11, 1, 21), 1):
            logits, cache = with_cache(model, tokens, cache)
            found.append(logits)
    close(torch.cat(found, 1), expected)
    assert model.backbone.layers[0].mixer.A_log.device.type == "meta"
    assert ops_of(lambda: model(ids(), use_cache=False)) == {"sscan::selective_scan"}  # the convolution is called


def test_replaced_mixers_compile(pair: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(pair[1], fullgraph=True, backend="aot_eager")
    close(compiled(ids(), use_cache=False).logits, pair[1](ids(), use_cache=False).logits)


def test_refuses_what_it_does_not_know(pair: Any, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair
    mixer, x = ours.backbone.layers[0].mixer, torch.zeros(1, 4, 32)
    with torch.no_grad():
        cache = with_cache(ours, ids())[1]
    with pytest.raises(TypeError, match="unexpected keyword argument 'state'"):
        mixer(x, state=cache)
    with pytest.raises(TypeError, match="cache and cache_params are one argument under two names"):
        mixer(x, cache=cache, cache_params=cache)
    for mask in (torch.ones(1, 3), torch.ones(2, 4), torch.ones(1, 1, 4, 4)):
        with pytest.raises(ValueError, match=r"must have shape \(batch or 1, length or more\) = \(1, 4 or"):
            mixer(x, attention_mask=mask)
    cache.layers[0].activate_past_recording()
    with pytest.raises(ValueError, match="a cache that records its past"):
        mixer(x, cache=cache)

    model = copy.deepcopy(theirs)
    model.backbone.layers[2].mixer.activation = "gelu"
    with pytest.raises(ValueError, match="activation of a mixer must be 'silu', got 'gelu'"):
        replace_mixers(model)
    model.backbone.layers[2].mixer.activation = "swish"
    model.backbone.layers[2].mixer.forward = lambda *_: x
    with pytest.raises(ValueError, match="the forward of a mixer was replaced"):
        replace_mixers(model)
    assert Mixer not in {type(layer.mixer) for layer in model.backbone.layers}, "none is replaced unless all can be"
    monkeypatch.setattr(sscan.compat.transformers, "version", lambda _: "5.14.1")
    with pytest.raises(RuntimeError, match=r"transformers must be 5\.15 or later, got 5\.14\.1"):
        replace_mixers(theirs)
