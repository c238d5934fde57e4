"""The Mamba module and the drop-in on a GPU: autocast, CUDA graphs, streams, and transformers' fast path."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_within, eps_of
from test_compat import scan_inputs
from test_torch_mamba import block, hidden, numbers, plain, states_of, with_gradients
from test_transformers import counted, ids, modeling

import sscan.compat
from sscan.compat.mamba_ssm import selective_scan_fn
from sscan.compat.transformers import replace_mixers
from sscan.torch import Mamba


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own convolution would have eleven bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(x: Any) -> Any:
    return x.detach().cuda().requires_grad_(x.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fast", [True, False])
def test_module_errs_no_more_than_plain_torch(dtype: torch.dtype, fast: bool) -> None:
    made = block(dtype=dtype, bias=True, use_fast_path=fast).cuda()
    exact = Mamba(made.d_model, d_state=4, bias=True, dtype=torch.float64)
    exact.load_state_dict(made.state_dict())
    x = on_gpu(hidden(dtype))
    wide = x.detach().cpu().double().requires_grad_()
    found = with_gradients(made(x), [x, *made.parameters()])
    same = with_gradients(plain(made, x), [x, *made.parameters()])
    true = with_gradients(plain(exact, wide), [wide, *exact.parameters()])
    for name, ours, theirs, right in zip(["y", "dx", *dict(made.named_parameters())], found, same, true, strict=True):
        eps = eps_of(np.float32) if ours.dtype is torch.float32 else 2.0**-7
        assert_within(numbers(ours.cpu()), numbers(theirs.cpu()), numbers(right), eps, name)


def test_packed_and_split_sequences_are_the_cpus() -> None:
    made, x = block(), hidden(batch=1)
    start = states_of(made, 3)
    given = {"return_final_states": True, "cu_seqlens": torch.tensor([0, 4, 11, x.shape[1]])}
    out, states = made(x, initial_states=start, **given)
    expected = with_gradients((out, *states), [x, *start, *made.parameters()])
    there, y = deepcopy(made).cuda(), on_gpu(x)
    begin = [on_gpu(state) for state in start]
    given["cu_seqlens"] = given["cu_seqlens"].cuda()
    out, states = there(y, initial_states=tuple(begin), **given)
    found = with_gradients((out, *states), [y, *begin, *there.parameters()])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_step_by_step_in_half_precision() -> None:
    made = Mamba(256, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(4, 12, 256, device="cuda", dtype=torch.bfloat16)
    states = made.allocate_inference_cache(4, 12)
    stepped = torch.cat([made.step(x[:, t : t + 1], *states)[0] for t in range(12)], 1)
    torch.testing.assert_close(stepped, made(x), rtol=0.05, atol=2e-3)


def test_autocast() -> None:
    torch.manual_seed(0)
    made = Mamba(256, device="cuda")
    x = torch.randn(4, 300, 256, device="cuda", requires_grad=True)
    inputs = [x, *made.parameters()]
    expected = with_gradients(made(x), inputs)
    with torch.autocast("cuda", torch.bfloat16):
        out = made(x)
    assert out.dtype is torch.bfloat16
    found = with_gradients(out, inputs)
    assert {g.dtype for g in found[1:]} == {torch.float32}
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.float() - theirs).norm() < 0.03 * theirs.norm()


def training_step(made: Mamba, x: Any, optimizer: Any) -> Any:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        loss = made(x).float().square().mean()
    loss.backward()
    optimizer.step()
    return loss


def test_a_cuda_graph_captures_a_training_step() -> None:
    torch.manual_seed(0)
    eager = Mamba(128, device="cuda")
    captured = deepcopy(eager)
    x = torch.randn(2, 200, 128, device="cuda")
    stream = torch.cuda.Stream()
    optimizers = [torch.optim.SGD(made.parameters(), lr=0.1) for made in (eager, captured)]
    losses = [training_step(eager, x, optimizers[0]).item() for _ in range(6)]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            training_step(captured, x, optimizers[1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = training_step(captured, x, optimizers[1])
    found = []
    for _ in range(3):
        graph.replay()
        found.append(loss.item())
    assert losses[0] > losses[-1]
    np.testing.assert_allclose(found, losses[3:], rtol=1e-5)
    for ours, theirs in zip(captured.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_never_waits_for_the_gpu() -> None:
    made = Mamba(128, device="cuda")
    x = torch.randn(2, 200, 128, device="cuda", requires_grad=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            made(x).sum().backward()

    step()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not see all that waits
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inductor's own
def test_compiles_with_inductor() -> None:
    torch.manual_seed(0)
    made = Mamba(128, device="cuda")
    compiled = torch.compile(made, fullgraph=True)
    x = torch.randn(2, 200, 128, device="cuda", requires_grad=True)
    inputs = [x, *made.parameters()]
    for found, expected in zip(
        with_gradients(compiled(x), inputs), with_gradients(made(x), inputs), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scan_of_mixed_dtypes(dtype: torch.dtype) -> None:
    inputs = scan_inputs(dtype, dtype) | {"delta": scan_inputs(torch.float32)["delta"]}
    expected = selective_scan_fn(**inputs, delta_softplus=True)
    y = selective_scan_fn(**{name: x.cuda() for name, x in inputs.items()}, delta_softplus=True)
    assert y.dtype is dtype
    torch.testing.assert_close(y.cpu(), expected)


def config() -> Any:
    from transformers import MambaConfig

    return MambaConfig(
        vocab_size=89, hidden_size=64, state_size=16, num_hidden_layers=3, pad_token_id=0, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def models() -> Any:
    """The same random model on its slow and on its fast path, and calls of the fast one."""
    slow = modeling("slow_modeling_gpu")
    with counted() as calls:
        sscan.compat.install()
        fast = modeling("fast_modeling_gpu")
        sscan.compat.uninstall()
    torch.manual_seed(0)
    made = [module.MambaForCausalLM(config()).eval().cuda() for module in (slow, fast)]
    made[1].load_state_dict(made[0].state_dict())
    return *made, calls


@pytest.mark.parametrize("training", [False, True])
def test_transformers_takes_its_fast_path(models: Any, training: bool) -> None:
    """Logits and gradients as those of the slow path: to float32's precision, summed over a few hundred terms."""
    *both, calls = models
    before, results = dict(calls), []
    for model in both:
        model.train(training).zero_grad()
        out = model(ids().cuda(), labels=ids().cuda(), use_cache=False)
        out.loss.backward()
        results.append([out.logits, *(p.grad for p in model.parameters())])
        model.eval()
    used = {"mamba_inner_fn"} if training else {"selective_scan_fn", "causal_conv1d_fn"}
    assert {name for name in calls if calls[name] - before[name] == 3} == used
    for slow, fast in zip(*results, strict=True):
        assert (fast - slow).norm() <= 1e-5 * slow.norm()


def test_transformers_generates_the_same(models: Any) -> None:
    slow, fast, _ = models
    tokens = ids().cuda()
    expected = slow.generate(tokens, max_new_tokens=9, do_sample=False)
    assert torch.equal(fast.generate(tokens, max_new_tokens=9, do_sample=False), expected)
    replaced = deepcopy(slow)
    assert replace_mixers(replaced) == 3
    assert torch.equal(replaced.generate(tokens, max_new_tokens=9, do_sample=False), expected)


def test_transformers_in_half_precision(models: Any) -> None:
    slow, fast, _ = models
    with torch.no_grad():
        expected = slow(ids().cuda()).logits
        found = deepcopy(fast).bfloat16()(ids().cuda()).logits
    assert (found.float() - expected).norm() < 0.05 * expected.norm()
