"""``sscan.torch.Mamba``: against the same block in plain PyTorch, float64, and against itself in every other way."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_within, eps_of

import sscan.nn
import sscan.nn.products
from sscan.compat.mamba_ssm import mamba_inner_ref
from sscan.torch import Mamba, _arithmetic, causal_conv1d
from sscan.torch._arithmetic import diagonal
from sscan.torch._block import mamba, mamba_inner

BATCH, LENGTH, D_MODEL = 2, 19, 10

OPTIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "bias": {"bias": True},
    "without conv_bias": {"conv_bias": False},
    "narrow": {"d_conv": 1, "expand": 1, "dt_rank": 3, "d_state": 1},
    "wide": {"d_conv": 6, "d_state": 17},
    "every op by itself": {"use_fast_path": False, "bias": True},
}


def block(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Mamba:
    torch.manual_seed(seed)
    made = Mamba(D_MODEL, **{"d_state": 4, **options}, dtype=dtype)
    with torch.no_grad():  # D and the steps of a new block are too regular to tell mistakes
        for parameter in (made.D, made.dt_proj.bias, made.A_log):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def hidden(dtype: torch.dtype = torch.float64, batch: int = BATCH, length: int = LENGTH, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, D_MODEL, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def states_of(made: Mamba, rows: int = BATCH, seed: int = 2) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, made.d_inner, made.d_conv - 1), (rows, made.d_inner, made.d_state)
    dtypes = made.conv1d.weight.dtype, made.A_log.dtype
    conv_state, ssm_state = (
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return conv_state, ssm_state


def plain(made: Mamba, x: Any) -> Any:
    """The block in plain PyTorch."""
    return mamba_inner_ref(
        made.in_proj(x).mT, made.conv1d.weight, made.conv1d.bias, made.x_proj.weight, made.dt_proj.weight,
        made.out_proj.weight, made.out_proj.bias, -torch.exp(made.A_log), None, None, made.D, made.dt_proj.bias,
    )  # fmt: skip


def with_gradients(out: Any, inputs: Any, seed: int = 3) -> list[Any]:
    outputs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(seed)
    total = sum((y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(total, inputs)]


def numbers(x: Any) -> np.ndarray[Any, Any]:
    return x.detach().double().numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_is_the_block_in_plain_torch(options: dict[str, Any]) -> None:
    made, x = block(**options), hidden()
    inputs = [x, *made.parameters()]
    found, expected = with_gradients(made(x), inputs), with_gradients(plain(made, x), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errs_no_more_than_plain_torch(dtype: torch.dtype) -> None:
    """Outputs and gradients in float32, and with everything but A_log and D in bfloat16."""
    made = block(dtype=dtype, bias=True)
    exact = Mamba(D_MODEL, d_state=4, bias=True, dtype=torch.float64)
    exact.load_state_dict(made.state_dict())
    x = hidden(dtype)
    wide = x.detach().double().requires_grad_()
    found = with_gradients(made(x), [x, *made.parameters()])
    same = with_gradients(plain(made, x), [x, *made.parameters()])
    true = with_gradients(plain(exact, wide), [wide, *exact.parameters()])
    for name, ours, theirs, right in zip(["y", "dx", *dict(made.named_parameters())], found, same, true, strict=True):
        eps = eps_of(np.float32) if ours.dtype is torch.float32 else 2.0**-7
        assert_within(numbers(ours), numbers(theirs), numbers(right), eps, name)


def test_is_the_block_of_sscan_nn() -> None:
    made, x = block(dtype=torch.float32), hidden(torch.float32)
    other = sscan.nn.Mamba(D_MODEL, d_state=4)
    other.load_state_dict({name: numbers(value).astype(np.float32) for name, value in made.state_dict().items()})
    expected = other(x.detach().numpy()).data
    np.testing.assert_allclose(numbers(made(x)), expected, rtol=2e-5, atol=2e-6)


def tensors_of(made: Any, op: Any, hidden: Any) -> list[Any]:
    """What an op of the block takes first, as leaves: its input, or what in_proj makes of that, and the weights."""
    projections = (made.x_proj.weight, made.dt_proj.weight, made.out_proj.weight, made.out_proj.bias)
    if op is mamba:
        taken = (
            hidden, made.in_proj.weight, made.in_proj.bias, made.conv1d.weight, made.conv1d.bias, *projections,
            made.A_log, made.D, made.dt_proj.bias,
        )  # fmt: skip
    else:
        x, z = made.in_proj(hidden).mT.chunk(2, 1)
        weight = made.conv1d.weight.squeeze(1)
        taken = (x, z, weight, made.conv1d.bias, *projections, diagonal(made.A_log), made.D, made.dt_proj.bias)
    return [t if t is None else t.detach().clone().requires_grad_() for t in taken]


@pytest.mark.parametrize("op", [mamba, mamba_inner], ids=lambda op: op.name)
@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 0, 1, 1]])])
def test_gradients_are_difference_quotients(mask: Any, op: Any) -> None:
    """First and second ones, for every tensor that the op takes."""
    torch.manual_seed(0)
    made = Mamba(2, d_state=2, d_conv=2, expand=1, bias=True, dtype=torch.float64)
    conv_state, ssm_state = (torch.randn(1, 2, n, dtype=torch.float64, requires_grad=True) for n in (1, 2))
    leaves = tensors_of(made, op, torch.randn(1, 4, 2, dtype=torch.float64))

    def results(*given: Any) -> Any:
        return op(*given, None, None, mask, None if op is mamba else True, True)[:3]

    inputs = (*leaves, conv_state, ssm_state)
    assert torch.autograd.gradcheck(results, inputs)
    assert torch.autograd.gradgradcheck(results, inputs)


@pytest.mark.parametrize("op", [mamba, mamba_inner], ids=lambda op: op.name)
def test_ops_keep_the_rules_of_torch(op: Any) -> None:
    made, states = block(), states_of(block())
    leaves = tensors_of(made, op, hidden().detach())
    for return_states, mask in ((True, None), (False, torch.ones(BATCH, LENGTH))):
        option = None if op is mamba else True
        torch.library.opcheck(op.registered, (*leaves, *states, None, None, mask, option, return_states))


def test_an_op_lowers_its_projections_alone() -> None:
    """In a dtype that is given, as under autocast; gradients have the dtypes of what they are of."""
    made = block(dtype=torch.float32, bias=True)
    leaves = tensors_of(made, mamba, hidden(torch.float32).detach())
    states = (None, None, None, None, None)
    out = mamba(*leaves, *states, torch.bfloat16, False)[0]
    lowered = [
        x.detach().to(torch.bfloat16) if i in (0, 1, 2, 5, 6, 7, 8) else x.detach() for i, x in enumerate(leaves)
    ]
    torch.testing.assert_close(out, mamba(*lowered, *states, None, False)[0], rtol=0, atol=0)
    gradients = with_gradients((out,), leaves)[-len(leaves) :]
    assert [g.dtype for g in gradients] == [torch.float32] * len(leaves)


@torch.no_grad()
def test_step_by_step() -> None:
    made, x = block(bias=True), hidden()
    out, final_states = made(x, return_final_states=True)
    states = made.allocate_inference_cache(BATCH, LENGTH)
    stepped = torch.cat([made.step(x[:, t : t + 1], *states)[0] for t in range(LENGTH)], 1)
    torch.testing.assert_close(stepped, out, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(states[0][..., 1:], final_states[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(states[1], final_states[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cut", [0, 1, 2, LENGTH - 1, LENGTH])
def test_a_sequence_in_two_parts(cut: int) -> None:
    """States carry over the cut, and gradients through them."""
    made, x = block(), hidden()
    start = states_of(made)
    inputs = [x, *start, *made.parameters()]
    whole = made(x, initial_states=start, return_final_states=True)
    first, states = made(x[:, :cut], initial_states=start, return_final_states=True)
    second, final_states = made(x[:, cut:], initial_states=states, return_final_states=True)
    found = with_gradients((torch.cat([first, second], 1), *final_states), inputs)
    for ours, expected in zip(found, with_gradients((whole[0], *whole[1]), inputs), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_packed_is_separate() -> None:
    made, x = block(), hidden(batch=1)
    borders = (0, 4, 5, 13, LENGTH)
    start = states_of(made, len(borders) - 1)
    inputs = [x, *start, *made.parameters()]
    parts = [
        made(
            x[:, begin:end], initial_states=tuple(state[k : k + 1] for state in start), return_final_states=True
        )
        for k, (begin, end) in enumerate(zip(borders, borders[1:], strict=False))
    ]  # fmt: skip
    separate = [torch.cat([out for out, _ in parts], 1), *(torch.cat([s[k] for _, s in parts]) for k in (0, 1))]
    out, states = made(x, initial_states=start, return_final_states=True, cu_seqlens=torch.tensor(borders))
    expected = with_gradients(tuple(separate), inputs)
    for ours, theirs in zip(with_gradients((out, *states), inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

    lengths = torch.tensor(borders).diff()
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
    fresh = torch.cat([made(x[:, begin:end]) for begin, end in zip(borders, borders[1:], strict=False)], 1)
    torch.testing.assert_close(made(x, seq_idx=seq_idx), fresh, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_keeps_the_output_of_the_input_projection_only(autocast: bool) -> None:
    """What is saved along time: the input and x and z, in the dtype of the products; and parameters."""
    made, x = block(dtype=torch.float32, bias=True), hidden(torch.float32, length=64)
    parameters = sum(p.numel() * p.element_size() for p in made.parameters())
    kept: dict[tuple[Any, ...], int] = {}

    def keep(tensor: Any) -> Any:
        if tensor.numel() * tensor.element_size() and tensor.numel() >= BATCH * 64:
            kept[tensor.data_ptr(), tuple(sorted(tensor.shape))] = tensor.numel() * tensor.element_size()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        out = made(x)
    element = 2 if autocast else 4
    along_time = {key: size for key, size in kept.items() if 64 in key[1]}
    assert sorted(along_time.values()) == sorted(BATCH * 64 * n * element for n in (D_MODEL, 2 * 20))
    assert sum(kept.values()) - sum(along_time.values()) <= 2 * parameters
    out.sum().backward()


def test_autocast() -> None:
    made, x = block(dtype=torch.float32, bias=True), hidden(torch.float32)
    expected = with_gradients(made(x), [x, *made.parameters()])
    with torch.autocast("cpu", torch.bfloat16):
        out, (conv_state, ssm_state) = made(x, return_final_states=True)
    assert (out.dtype, conv_state.dtype, ssm_state.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    found = with_gradients(out, [x, *made.parameters()])
    assert {g.dtype for g in found[1:]} == {torch.float32}
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.float() - theirs).norm() < 0.03 * theirs.norm()  # eight bits in each of five products in a row


def test_compiles_without_a_break() -> None:
    """Forward and backward, for lengths that change, with and without states."""
    made = block(dtype=torch.float32)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager", dynamic=True)
    start = states_of(made)
    for length in (LENGTH, 33):
        x = hidden(torch.float32, length=length)
        inputs = [x, *start, *made.parameters()]
        given = {"initial_states": start, "return_final_states": True}
        (out, states), (expected, expected_states) = compiled(x, **given), made(x, **given)
        theirs = with_gradients((expected, *expected_states), inputs)
        for found, right in zip(with_gradients((out, *states), inputs), theirs, strict=True):
            torch.testing.assert_close(found, right)


def test_exports() -> None:
    made, x = block(dtype=torch.float32), hidden(torch.float32).detach()
    program = torch.export.export(made, (x,))
    torch.testing.assert_close(program.module()(x), made(x))
    assert any("sscan.mamba.default" in str(node.target) for node in program.graph.nodes)


def test_parameters_are_those_of_mamba_ssm() -> None:
    """In their order too, by which optimizers know them; and the modules without parameters."""
    made = Mamba(48, bias=True)
    assert [(name, tuple(p.shape)) for name, p in made.named_parameters()] == [
        ("A_log", (96, 16)), ("D", (96,)), ("in_proj.weight", (192, 48)), ("in_proj.bias", (192,)),
        ("conv1d.weight", (96, 1, 4)), ("conv1d.bias", (96,)), ("x_proj.weight", (35, 96)),
        ("dt_proj.weight", (96, 3)), ("dt_proj.bias", (96,)), ("out_proj.weight", (48, 96)), ("out_proj.bias", (48,)),
    ]  # fmt: skip
    assert list(made.state_dict()) == [name for name, _ in made.named_parameters()]
    assert [name for name, _ in made.named_children()] == ["in_proj", "conv1d", "act", "x_proj", "dt_proj", "out_proj"]
    assert made.activation == "silu"
    assert type(made.act) is torch.nn.SiLU
    half = Mamba(48, dtype=torch.bfloat16)
    assert {name for name, p in half.named_parameters() if p.dtype is torch.float32} == {"A_log", "D"}
    other = Mamba(48, bias=True)
    other.load_state_dict(made.state_dict())
    x = torch.randn(1, 7, 48)
    assert torch.equal(other(x), made(x))
    on_meta = Mamba(48, bias=True, device="meta")
    on_meta.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(on_meta(x), made(x))


def test_defaults_are_those_of_mamba_ssm() -> None:
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(Mamba).parameters.items() if name != "d_model"
    }
    assert defaults == {
        "d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto", "dt_min": 0.001, "dt_max": 0.1, "dt_init": "random",
        "dt_scale": 1.0, "dt_init_floor": 1e-4, "conv_bias": True, "bias": False, "use_fast_path": True,
        "layer_idx": None, "device": None, "dtype": None,
    }  # fmt: skip
    made = Mamba(40)
    assert (made.d_inner, made.dt_rank, made.conv1d.kernel_size, made.d_state) == (80, 3, (4,), 16)
    assert made.conv1d.bias is not None
    assert made.in_proj.bias is made.out_proj.bias is made.x_proj.bias is None


def uniform(x: Any, low: float, high: float) -> None:
    """Within the bounds, near both, and with the mean and deviation of a uniform distribution, to four errors."""
    assert low <= x.min() < low + 0.02 * (high - low)
    assert high >= x.max() > high - 0.02 * (high - low)
    of_width, errors = (x - low) / (high - low), 4 / len(x.flatten()) ** 0.5
    assert abs(of_width.mean() - 0.5) < 0.29 * errors
    assert abs(of_width.std() - 12**-0.5) < 0.29 * errors


@pytest.mark.parametrize(
    ("options", "low", "high", "scale"),
    [
        ({}, 1e-3, 0.1, 1.0),
        ({"dt_min": 0.01, "dt_max": 0.2, "dt_scale": 0.5}, 0.01, 0.2, 0.5),
        ({"dt_min": 1e-6, "dt_max": 1e-3}, 1e-6, 1e-3, 1.0),  # some below the floor of 1e-4
        ({"dt_min": 0.01, "dt_max": 0.2, "dt_init_floor": 0.02, "dtype": torch.float64}, 0.01, 0.2, 1.0),
    ],
    ids=str,
)
def test_initial_values(options: dict[str, Any], low: float, high: float, scale: float) -> None:
    torch.manual_seed(0)
    made = Mamba(512, **options)
    floor = options.get("dt_init_floor", 1e-4)
    step = torch.nn.functional.softplus(made.dt_proj.bias.detach().double())
    raised = step < floor * (1 + 1e-5)
    assert step.min() > floor * (1 - 1e-5)
    share = max(math.log(floor / low) / math.log(high / low), 0)
    assert abs(raised.double().mean() - share) <= 4 * (share / 1024) ** 0.5
    slack = 1 + 1e-5  # of float32
    uniform(step[~raised].log(), math.log(max(low, floor) / slack), math.log(high * slack))
    bound = scale * 32**-0.5
    uniform(made.dt_proj.weight.detach().double(), -bound * slack, bound * slack)
    for part in (made.in_proj, made.x_proj, made.out_proj):  # as PyTorch starts them
        bound = part.in_features**-0.5
        uniform(part.weight.detach().double(), -bound * slack, bound * slack)
    uniform(made.conv1d.weight.detach().double(), -0.5 * slack, 0.5 * slack)
    uniform(made.conv1d.bias.detach().double(), -0.5 * slack, 0.5 * slack)
    torch.testing.assert_close(torch.exp(made.A_log), torch.arange(1.0, 17).expand(1024, 16).to(made.A_log))
    assert torch.equal(made.D, torch.ones_like(made.D))


def test_constant_initial_values() -> None:
    constant = Mamba(64, dt_init="constant", dt_scale=2.0)
    assert torch.equal(constant.dt_proj.weight, torch.full((128, 4), 1.0))
    assert torch.equal(Mamba(64, dt_init="constant").dt_proj.weight, torch.full((128, 4), 0.5))


def test_marks_for_other_code() -> None:
    """Which parameters code for mamba_ssm leaves alone when it makes new values or lets weights decay."""
    marked = {
        mark: {name for name, p in Mamba(16, bias=True).named_parameters() if getattr(p, mark, False)}
        for mark in ("_no_reinit", "_no_weight_decay")
    }
    assert marked == {"_no_reinit": {"dt_proj.bias"}, "_no_weight_decay": {"A_log", "D"}}


def test_a_subclass_with_a_forward_of_its_own() -> None:
    class Own(Mamba):
        def forward(self, hidden_states: Any) -> Any:
            x, _ = self.in_proj(hidden_states).mT.chunk(2, 1)
            assert self.activation in ("silu", "swish")
            return self.act(self.conv1d(x)[..., : hidden_states.shape[1]])

    torch.manual_seed(0)
    made, x = Own(16, d_state=4), torch.randn(2, 5, 16)
    u = causal_conv1d(made.in_proj(x).mT[:, :32], made.conv1d.weight[:, 0], made.conv1d.bias, "silu")
    torch.testing.assert_close(made(x), u)


@torch.no_grad()
def test_inference_params() -> None:
    """Prefill, several tokens at once, then one at a time: the states live in mamba_ssm's dictionary."""
    made, x = block(layer_idx=3), hidden().detach()
    expected = made(x)
    params = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    outs = []
    for begin, end in ((0, 2), (2, 9), (9, 10), (10, LENGTH)):
        params.seqlen_offset = begin
        outs.append(made(x[:, begin:end], inference_params=params))
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-10, atol=1e-12)
    assert [tuple(state.shape) for state in params.key_value_memory_dict[3]] == [(BATCH, 20, 4), (BATCH, 20, 4)]
    params.seqlen_offset = 0
    with pytest.raises(ValueError, match=r"must have states of 1 sequences, as hidden_states has, got \(2, 20, 4\)"):
        made(x[:1], inference_params=params)


@torch.no_grad()
def test_inference_params_of_packed_sequences() -> None:
    """A packed prompt, with a state for each sequence; then steps of all; and one token that is a sequence's first."""
    made, x = block(layer_idx=0), hidden(batch=1).detach()
    expected = torch.cat([made(x[:, :4])[:, -1:], made(x[:, 4:18])[:, -1:]])
    params = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    made(torch.cat([x[:, :3], x[:, 4:17]], 1), inference_params=params, cu_seqlens=torch.tensor([0, 3, 16]))
    params.seqlen_offset = 1
    found = made(torch.cat([x[:, 3:4], x[:, 17:18]]), inference_params=params)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    found = made(x[:, 18:], inference_params=params, cu_seqlens=torch.tensor([0, 0, 1]))
    torch.testing.assert_close(found, made(x[:, 4:])[:, -1:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("trained", ["input", "parameter", "state"])
def test_states_in_place_lose_no_gradient_in_silence(trained: str) -> None:
    made, x = block(layer_idx=0).requires_grad_(trained == "parameter"), hidden().detach()
    x.requires_grad_(trained == "input")
    states = made.allocate_inference_cache(BATCH, 1)
    states[1].requires_grad_(trained == "state")
    with pytest.raises(TypeError, match=r"Mamba: step updates states in place, which loses gradients.*initial_states"):
        made.step(x[:, :1], *states)
    with torch.no_grad():
        made.step(x[:, :1], *states)
    params = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    if trained != "state":
        with pytest.raises(TypeError, match=r"Mamba: forward with inference_params updates .*initial_states"):
            made(x, inference_params=params)
        assert not params.key_value_memory_dict
    made.requires_grad_(False)
    made(x.detach(), inference_params=params)
    made.step(x[:, :1].detach(), *params.key_value_memory_dict[0])  # nothing could be lost


def test_cache_keeps_states_wide() -> None:
    states = Mamba(16, dtype=torch.bfloat16).allocate_inference_cache(3, 100)
    assert [(tuple(s.shape), s.dtype) for s in states] == [
        ((3, 32, 4), torch.bfloat16), ((3, 32, 16), torch.float32),
    ]  # fmt: skip
    assert {s.dtype for s in Mamba(16).allocate_inference_cache(3, 100, torch.float16)} == {torch.float16}


def test_bad_input() -> None:
    made, x = block(), hidden().detach()
    with pytest.raises(ValueError, match="dt_init must be 'random' or 'constant', got 'normal'"):
        Mamba(8, dt_init="normal")
    with pytest.raises(ValueError, match=r"step: hidden_states must have shape \(batch, 1, d_model\), got \(2, 19"):
        made.step(x, *made.allocate_inference_cache(BATCH, 1))
    params = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    with pytest.raises(ValueError, match="layer_idx"), torch.no_grad():
        made(x, inference_params=params)
    with pytest.raises(ValueError, match="inference_params bring states"):
        made(x, inference_params=params, return_final_states=True)
    with pytest.raises(ValueError, match="initial_state must have shape"):
        made(x, initial_states=states_of(made, 3))
    with pytest.raises(TypeError, match="seq_idx"):
        made(x, seq_idx=torch.zeros(BATCH, LENGTH))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": "16"}, "d_model must be a positive integer, got '16'"),
        ({"d_state": 0}, "d_state must be a positive integer, got 0"),
        ({"d_conv": 0}, "d_conv must be a positive integer, got 0"),
    ],
)
def test_sizes_that_are_none(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Mamba: {message}$"):
        Mamba(**{"d_model": 8, **changes})


def test_inputs_that_are_none() -> None:
    made, x = Mamba(8), torch.zeros(1, 5, 8)
    for wrong in (None, x.numpy()):
        with pytest.raises(TypeError, match=r"^Mamba: hidden_states must be a torch.Tensor, got \w+$"):
            made(wrong)
    with pytest.raises(TypeError, match=r"^Mamba.step: hidden_states must be a torch.Tensor, got ndarray$"):
        made.step(x[:, :1].numpy(), *made.allocate_inference_cache(1, 0))
    with pytest.raises(ValueError, match=r"hidden_states must have shape \(batch, length, d_model\), got \(5, 8\)"):
        made(x[0])
    with pytest.raises(TypeError, match=r"^Mamba: cu_seqlens must be a torch\.Tensor, got list$"):
        made(x, cu_seqlens=[0, 5])


def test_products_on_the_cpu_are_made_on_the_threads_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """None by PyTorch, whose threads and the kernels' would take the cores from each other."""
    torch.manual_seed(0)
    made = Mamba(96)
    x = torch.randn(2, 700, 96, requires_grad=True)
    multiply, products = sscan.nn.products.matmul, []

    def outputs(dtype: torch.dtype) -> list[Any]:
        here = x.detach().to(dtype).requires_grad_()
        return [numbers(y) for y in with_gradients(made.to(dtype)(here), [here, *made.parameters()])]

    with monkeypatch.context() as patched:
        patched.setattr(_arithmetic, "_is_wide_on_cpu", lambda x: False)
        exact, by_pytorch = outputs(torch.float64), outputs(torch.float32)

    def counting(a: Any, b: Any) -> Any:
        products.append(a.shape)
        return multiply(a, b)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a product by PyTorch")

    monkeypatch.setattr(sscan.nn.products, "matmul", counting)
    for name in ("bmm", "baddbmm"):
        monkeypatch.setattr(torch, name, refuse)
    for found, other, right in zip(outputs(torch.float32), by_pytorch, exact, strict=True):
        assert_within(found, other, right, eps_of("float32"))
    assert len(products) == 4 + 12  # forward, and backward with two of them again


@pytest.mark.parametrize("batch", [1, BATCH])
def test_casts_and_products_are_few(batch: int) -> None:
    """Each is a launch, where nothing is planned. Weights are cast once for each way."""
    made, x = block(dtype=torch.float32), hidden(torch.float32, batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        with torch.autocast("cpu", torch.bfloat16):
            y = made(x)
        y.sum().backward()
    counts = Counter(event.name.removeprefix("aten::") for event in profiled.events())
    assert counts["_to_copy"] == 2 + 2 * 4 + 5, "of input and its gradient, of weights, and five gradients of weights"
    assert counts["neg"] == 1, "A is made once"
    assert counts["bmm"] + counts["baddbmm_"] == 16


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("way", ["one op", "parts", "step", "meta"])
def test_another_dtype_than_the_weights_is_refused(way: str, dtype: torch.dtype) -> None:
    made = Mamba(8, use_fast_path=way != "parts", device="meta" if way == "meta" else None)
    x = torch.ones(2, 1, 8, dtype=dtype, device="meta" if way == "meta" else None)
    owner = "Mamba.step" if way == "step" else "Mamba"
    states = made.allocate_inference_cache(2, 1) if way == "step" else ()
    call = made.step if way == "step" else made
    message = f"^{owner}: hidden_states must have the dtype of the weights, t"
    with torch.no_grad(), pytest.raises(TypeError, match=message):
        call(x, *states)


def test_autocast_takes_what_it_casts() -> None:
    made, x = Mamba(8), torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x.half()).dtype is torch.bfloat16
        with pytest.raises(TypeError, match=r"floating-point dtype, got torch\.int64$"):
            made(x.long())
        with pytest.raises(TypeError, match=r"dtype of the weights, torch\.float32, got torch\.float64$"):
            made(x.double())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_another_width_is_refused(device: str) -> None:
    made, x = Mamba(8, device=device), torch.randn(2, 1, 7, device=device)
    message = r": hidden_states must have shape \(batch, length, 8\), got \(2, 1, 7\)$"
    with pytest.raises(ValueError, match="^Mamba" + message):
        made(x)
    with torch.no_grad(), pytest.raises(ValueError, match=r"^Mamba\.step" + message):
        made.step(x, *made.allocate_inference_cache(2, 1))


@pytest.mark.parametrize("padding", [4, "same"])
def test_states_need_the_padding_of_a_causal_convolution(padding: Any) -> None:
    """Another one is called as it is; but where it begins, d_conv - 1 inputs do not tell."""
    made, x = Mamba(8, d_conv=3), torch.randn(1, 6, 8)
    made.conv1d = torch.nn.Conv1d(16, 16, 3, groups=16, padding=padding)
    made(x)
    with pytest.raises(ValueError, match=r"^Mamba: states and steps need a conv1d with d_conv = 3 taps side by side"):
        made(x, return_final_states=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"expand": "2"}, TypeError, "expand must be a number, got '2'"),
        ({"expand": 0.01}, ValueError, r"expand \* d_model must be at least 1, got 0\.01 \* 8"),
        ({"expand": float("nan")}, ValueError, "expand must be finite and above 0, got nan"),
        ({"dt_rank": 0}, ValueError, "dt_rank must be at least 1, got 0"),
        ({"dt_rank": "all"}, TypeError, "dt_rank must be an integer, got 'all'"),
        ({"dt_min": 0}, ValueError, "dt_min must be finite and above 0, got 0"),
        ({"dt_min": 1}, ValueError, r"dt_min must be at most dt_max, got 1 and 0\.1"),
        ({"dt_init_floor": -1}, ValueError, "dt_init_floor must be finite and at least 0, got -1"),
        ({"bias": "no"}, TypeError, "bias must be True or False, got 'no'"),
        ({"dtype": torch.int32}, TypeError, r"dtype must be a floating-point one, got torch\.int32"),
    ],
    ids=str,
)
def test_options_that_make_no_block(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^Mamba: {message}$"):
        Mamba(8, **options)
