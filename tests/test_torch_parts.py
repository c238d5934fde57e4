"""Whatever stands at in_proj, conv1d, x_proj, dt_proj and out_proj of ``sscan.torch.Mamba`` is called.

Adapters, hooks, parametrisations, quantised and offloaded layers; the one op that serves plain parts is then not used.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import accelerate
import peft
import pytest
import torch
from distributed_cases import run_ranks
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

from sscan.compat.mamba_ssm import selective_scan_ref
from sscan.torch import Mamba

if TYPE_CHECKING:
    from collections.abc import Callable

D_MODEL, LENGTH = 10, 9
WORKER = Path(__file__).parent / "fsdp_worker.py"
PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
PROJECTIONS = tuple(name for name in PARTS if name != "conv1d")

paths = pytest.mark.parametrize("fast", [True, False])
every_part = pytest.mark.parametrize("part", PARTS)


def block(dtype: torch.dtype = torch.float64, **options: Any) -> Mamba:
    torch.manual_seed(0)
    made = Mamba(D_MODEL, d_state=4, bias=True, **options, dtype=dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def hidden(dtype: torch.dtype = torch.float64) -> Any:
    return torch.randn(2, LENGTH, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=dtype)


def called(made: Any, x: Any) -> Any:
    """The block in plain PyTorch, which calls its parts."""
    u, z = made.in_proj(x).mT.chunk(2, 1)
    u = functional.silu(made.conv1d(u)[..., : x.shape[1]])
    dt, B, C = made.x_proj(u.mT).split([made.dt_rank, made.d_state, made.d_state], 2)
    y = selective_scan_ref(u, made.dt_proj(dt).mT, -torch.exp(made.A_log), B.mT, C.mT, made.D, z, None, True)
    return made.out_proj(y.mT)


def stepped(made: Any, x: Any) -> Any:
    states = made.allocate_inference_cache(x.shape[0], 0)
    with torch.no_grad():
        return torch.cat([made.step(token, *states)[0] for token in x.split(1, 1)], 1)


def ops_of(function: Callable[[], Any]) -> set[str]:
    """The ops of sscan that are run."""

    class Seen(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op.namespace == "sscan":
                names.add(op._schema.name)
            return op(*args, **kwargs or {})

    names: set[str] = set()
    with Seen():
        function()
    return names


FUSED, SEPARATE = {"sscan::mamba"}, {"sscan::causal_conv1d", "sscan::selective_scan"}


def assert_is_what_its_parts_make(made: Any, x: Any, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    """Output and gradients of forward, a sequence in two parts, and steps."""
    parameters = [p for p in made.parameters() if p.requires_grad]
    found, expected = made(x), called(made, x)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    if parameters:
        ours, right = (torch.autograd.grad((y * weights).sum(), parameters) for y in (found, expected))
        for gradient, theirs in zip(ours, right, strict=True):
            assert theirs.abs().max() > 0
            torch.testing.assert_close(gradient, theirs, rtol=rtol, atol=atol)
    first, states = made(x[:, :2], return_final_states=True)
    second, (conv_state, ssm_state) = made(x[:, 2:], initial_states=states, return_final_states=True)
    torch.testing.assert_close(torch.cat([first, second], 1), expected, rtol=rtol, atol=atol)
    last = made(x[:, :0], initial_states=(conv_state, ssm_state), return_final_states=True)[1][0]
    torch.testing.assert_close(last, conv_state)
    torch.testing.assert_close(stepped(made, x), expected.detach(), rtol=rtol, atol=atol)


def test_one_op_serves_plain_parts_only() -> None:
    made, x = block(), hidden()
    assert ops_of(lambda: made(x)) == FUSED
    made.use_fast_path = False
    assert ops_of(lambda: made(x)) == SEPARATE
    assert_is_what_its_parts_make(made, x)


# --- What may stand there ---------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """An adapter that has a weight, as those of peft do, of the layer that it adapts."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, like = base.requires_grad_(False), base.weight
        self.down = nn.Parameter(0.3 * torch.randn(2, like.shape[1], dtype=like.dtype))
        self.up = nn.Parameter(0.3 * torch.randn(like.shape[0], 2, dtype=like.dtype))

    @property
    def weight(self) -> Any:
        return self.base.weight

    @property
    def bias(self) -> Any:
        return self.base.bias

    def forward(self, x: Any) -> Any:
        return self.base(x) + x @ self.down.T @ self.up.T


class Twice(nn.Module):
    def forward(self, x: Any) -> Any:
        return 2 * x


class Doubling(torch.Tensor):
    """A weight that computes by itself, as quantised ones and DTensors do."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(function, types, args, kwargs or {})
        if function in (functional.linear, functional.conv1d):
            return 2 * made.as_subclass(torch.Tensor)
        return made


def doubled(part: Any, *_: Any) -> Any:
    return 2 * _[-1]


def own_forward(part: Any) -> None:
    forward = part.forward
    part.forward = lambda x: 2 * forward(x)


def own_weight(part: Any) -> None:
    part.weight = nn.Parameter(part.weight.detach().as_subclass(Doubling))


def own_class(part: Any) -> None:
    part.__class__ = type("Own", (type(part),), {"forward": lambda self, x: 2 * super(type(self), self).forward(x)})


CHANGES: dict[str, Callable[[Any], Any]] = {
    "forward hook": lambda part: part.register_forward_hook(doubled),
    "hook before": lambda part: part.register_forward_pre_hook(lambda _, given: (2 * given[0],)),
    "parametrisation": lambda part: parametrize.register_parametrization(part, "weight", Twice()),
    "pruning": lambda part: prune.l1_unstructured(part, "weight", amount=0.3),
    "forward of its own": own_forward,
    "weight of its own": own_weight,
    "class of its own": own_class,
}


@paths
@every_part
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_is_called(change: Callable[[Any], Any], part: str, fast: bool) -> None:
    made, x = block(use_fast_path=fast), hidden()
    before = made(x)
    change(getattr(made, part))
    assert (made(x) - before).abs().max() > 1e-3 * before.abs().max()
    assert not ops_of(lambda: made(x)) & FUSED
    assert_is_what_its_parts_make(made, x)


@paths
@pytest.mark.parametrize("parts", [(name,) for name in PROJECTIONS] + [PROJECTIONS], ids=str)
def test_adapters_of_ones_own(parts: tuple[str, ...], fast: bool) -> None:
    made, x = block(use_fast_path=fast), hidden()
    for name in parts:
        setattr(made, name, LowRank(getattr(made, name)))
    assert_is_what_its_parts_make(made, x)


@paths
def test_hooks_of_all_modules(fast: bool) -> None:
    """Hooks for every module see all five parts, the block once, and each part once in a step."""
    made, x = block(use_fast_path=fast), hidden()
    expected, seen = made(x), []
    names = {module: name for name, module in made.named_modules()}
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(names[module]))
    try:
        torch.testing.assert_close(made(x), expected, rtol=1e-10, atol=1e-12)
        assert seen == [*PARTS, ""]
        seen.clear()
        stepped(made, x[:, :1])
        assert seen == list(PARTS)
    finally:
        handle.remove()
    assert ops_of(lambda: made(x)) == (FUSED if fast else SEPARATE)


@paths
@every_part
def test_hooks_of_the_backward(part: str, fast: bool) -> None:
    made, x, seen = block(use_fast_path=fast), hidden().requires_grad_(), []
    getattr(made, part).register_full_backward_hook(lambda *_: seen.append("behind"))
    getattr(made, part).register_full_backward_pre_hook(lambda *_: seen.append("before"))
    made(x).sum().backward()
    assert seen == ["before", "behind"]


def test_hooks_of_the_block_fire_once() -> None:
    made, x, seen = block(layer_idx=0), hidden(), []
    made.register_forward_hook(lambda *_: seen.append(1))
    params = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    with torch.no_grad():
        made(x, inference_params=params)
    assert seen == [1]


@paths
def test_plain_layers_that_are_not_mamba_ssms(fast: bool) -> None:
    """A bias at x_proj, none at dt_proj; a filter that lies apart, whose states are not kept."""
    made, x = block(use_fast_path=fast), hidden()
    made.x_proj = nn.Linear(20, 9, dtype=torch.float64)
    assert_is_what_its_parts_make(made, x)
    made = block(use_fast_path=fast)
    made.dt_proj = nn.Linear(1, 20, bias=False, dtype=torch.float64)
    assert_is_what_its_parts_make(made, x)
    made.conv1d = nn.Conv1d(20, 20, 4, groups=20, dilation=2, padding=6, dtype=torch.float64)
    torch.testing.assert_close(made(x), called(made, x), rtol=1e-10, atol=1e-12)
    made.conv1d = nn.Conv1d(20, 20, 4, padding=3, dtype=torch.float64)
    assert_is_what_its_parts_make(made, x)


def test_under_autocast() -> None:
    """Parts that are called, and those that are read, in autocast's dtype."""
    made, x = block(torch.float32), hidden(torch.float32)
    expected = made(x)
    for part in PARTS:
        other = copy.deepcopy(made)
        getattr(other, part).register_forward_hook(lambda *_: None)
        with torch.autocast("cpu", torch.bfloat16):
            found, states = other(x, return_final_states=True)
        assert (found.dtype, states[0].dtype, states[1].dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        assert (found.float() - expected).norm() < 0.03 * expected.norm()  # eight bits in each of five products


def test_packed_sequences_need_a_plain_convolution() -> None:
    made, x = block(), hidden()
    seq_idx = torch.tensor([[0] * 4 + [1] * 5] * 2)
    expected = made(x, seq_idx=seq_idx)
    made.in_proj.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(made(x, seq_idx=seq_idx), expected, rtol=1e-10, atol=1e-12)
    made.conv1d.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"seq_idx and cu_seqlens need a plain nn\.Conv1d at conv1d"):
        made(x, seq_idx=seq_idx)
    few = torch.zeros(2, 20, 2, dtype=torch.float64), torch.zeros(2, 20, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"conv_state must have 3 columns or more, got \(2, 20, 2\)"):
        made(x, initial_states=few)
    with pytest.raises(ValueError, match=r"conv_state must have 3 columns or more, got \(2, 20, 2\)"), torch.no_grad():
        made.step(x[:, :1], *few)


OTHER_CONVOLUTIONS = {
    "dilation": {"dilation": 2, "padding": 6},
    "padding": {"padding_mode": "replicate", "padding": 3},
    "taps": {"kernel_size": 7, "padding": 6},
}


@torch.no_grad()
@pytest.mark.parametrize("changes", OTHER_CONVOLUTIONS.values(), ids=list(OTHER_CONVOLUTIONS))
def test_states_need_a_convolution_that_they_know(changes: dict[str, Any]) -> None:
    """Whole sequences go through any convolution; what it looks back to has to fit into a state."""
    made = block()
    dim = made.d_inner
    made.conv1d = nn.Conv1d(dim, dim, **{"kernel_size": 4, "groups": dim, "dtype": torch.float64, **changes})
    x = hidden()
    torch.testing.assert_close(made(x), called(made, x))
    states = made.allocate_inference_cache(2, 0)
    for call in (
        lambda: made.step(x[:, :1], *states),
        lambda: made(x, return_final_states=True),
        lambda: made(x, initial_states=states),
    ):
        with pytest.raises(ValueError, match="states and steps need a conv1d with d_conv = 4 taps side by side"):
            call()


@torch.no_grad()
def test_a_convolution_that_is_wrapped_has_a_cache() -> None:
    made, x = block(layer_idx=0), hidden()
    made.conv1d = nn.Sequential(made.conv1d)
    expected, cache = made(x), SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    found = []
    for t in range(LENGTH):
        found.append(made(x[:, t : t + 1], inference_params=cache))
        cache.seqlen_offset += 1
    torch.testing.assert_close(torch.cat(found, 1), expected)
    assert made.allocate_inference_cache(2, 0)[0].dtype is torch.float64


@pytest.mark.parametrize("changed", [False, True])
def test_compiles_to_one_graph(changed: bool) -> None:
    made, x = block(torch.float32), hidden(torch.float32)
    if changed:
        made.x_proj = LowRank(made.x_proj)
    torch._dynamo.reset()
    found = torch.compile(made, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, made(x))
    (graph,) = torch._dynamo.explain(made)(x).graphs
    ops = {str(node.target) for node in graph.graph.nodes if "sscan" in str(node.target)}
    assert ops == {f"{name.replace('::', '.')}.default" for name in (SEPARATE if changed else FUSED)}


# --- Other libraries --------------------------------------------------------------------------------------------------


@paths
@pytest.mark.parametrize("parts", [(name,) for name in PROJECTIONS] + [PROJECTIONS], ids=str)
def test_peft(parts: tuple[str, ...], fast: bool) -> None:
    x, original = hidden(), block(use_fast_path=fast)
    config = peft.LoraConfig(r=2, target_modules=list(parts), init_lora_weights=False)
    adapted = peft.get_peft_model(nn.Sequential(copy.deepcopy(original)), config).double()
    made = adapted.base_model.model[0]
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert {name.partition(".")[0] for name in trained} == set(parts)
    assert (made(x) - original(x)).abs().max() > 1e-3
    assert_is_what_its_parts_make(made, x)
    with adapted.disable_adapter():
        torch.testing.assert_close(made(x), original(x), rtol=1e-10, atol=1e-12)
    expected = made(x)
    (merged,) = adapted.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, rtol=1e-8, atol=1e-10)
    assert ops_of(lambda: merged(x)) == (FUSED if fast else SEPARATE)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")  # which cannot be merged
def test_peft_of_the_convolution() -> None:
    config = peft.LoraConfig(r=20, target_modules=["conv1d"], init_lora_weights=False)
    adapted = peft.get_peft_model(nn.Sequential(block()), config).double()
    made, x = adapted.base_model.model[0], hidden()
    assert (made(x) - block()(x)).abs().max() > 1e-3
    assert_is_what_its_parts_make(made, x)


def test_other_parameters_for_a_call() -> None:
    made, x = block(), hidden()
    given = {name: 1.1 * p.detach() for name, p in made.named_parameters()}
    found = torch.func.functional_call(made, given, (x,))
    made.load_state_dict(given)
    assert torch.equal(found, made(x))


def test_quantised_layers() -> None:
    """Products in 8 bits: as far from those in float32 as the same block that calls its parts, within one step each."""
    made, x = block(torch.float32), hidden(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's advice to use torchao, and what it says about itself
        quantised = torch.ao.quantization.quantize_dynamic(made, {nn.Linear}, torch.qint8)
        assert type(quantised.x_proj) is not nn.Linear
        found, again, expected = quantised(x), stepped(quantised, x), called(quantised, x)
    rounding = (expected - made(x)).norm()
    assert rounding > 1e-3 * expected.norm()
    assert (found - expected).norm() < 0.5 * rounding
    assert (again - made(x)).norm() < 2 * rounding


OFFLOADED: dict[str, Callable[[Any, Path], Any]] = {
    "cpu": lambda model, _: accelerate.cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device="cpu"),
    "in part": lambda model, folder: accelerate.dispatch_model(
        model, {"0": "cpu", "1": "disk"}, main_device="cpu", offload_dir=folder
    ),
}


@paths
@pytest.mark.parametrize("offload", OFFLOADED.values(), ids=list(OFFLOADED))
def test_accelerate(offload: Callable[[Any, Path], Any], fast: bool, tmp_path: Path) -> None:
    """All at once, and in parts with mamba_ssm's states."""
    x, original = hidden(torch.float32), nn.Sequential(*(block(use_fast_path=fast, layer_idx=i) for i in range(2)))
    expected = original.float()(x).detach()
    made = offload(copy.deepcopy(original), tmp_path)
    assert made[1].in_proj.weight.device.type == "meta"
    params = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    outs = []
    with torch.no_grad():
        torch.testing.assert_close(made(x), expected)
        for begin, end in ((0, 5), (5, 6), (6, LENGTH)):
            params.seqlen_offset = begin
            first = made[0](x[:, begin:end], inference_params=params)
            outs.append(made[1](first, inference_params=params))
    torch.testing.assert_close(torch.cat(outs, 1), expected)
    assert made[1].in_proj.weight.device.type == "meta"


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What came of everything on every rank: starting processes takes longer than all they do."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(2, str(WORKER), str(folder))
    return [torch.load(folder / f"rank{rank}") for rank in range(2)]


@pytest.mark.parametrize("way", ["one op", "part by part", "parts by themselves"])
def test_fsdp(way: str, of_ranks: list[dict[str, Any]]) -> None:
    """FSDP2, each rank with half of the batch: gradients of the whole."""
    made = block(torch.float32)
    made(hidden(torch.float32)).square().mean().backward()
    expected = {name: p.grad for name, p in made.named_parameters()}
    for found in of_ranks:
        assert found[way].keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[way][name], gradient)


# --- Devices ----------------------------------------------------------------------------------------------------------


@paths
@pytest.mark.parametrize("missing", list(block().state_dict()))
def test_a_parameter_that_was_not_loaded(missing: str, fast: bool) -> None:
    made, x = block(torch.float32, device="meta", use_fast_path=fast), hidden(torch.float32)
    state = {name: p for name, p in block(torch.float32).state_dict().items() if name != missing}
    made.load_state_dict(state, assign=True, strict=False)
    said = f"Mamba: {missing} must be on cpu, where hidden_states is, got a tensor on meta"
    with pytest.raises(TypeError, match=said):
        made(x)
    with pytest.raises(TypeError, match=said), torch.no_grad():
        made.step(x[:, :1], torch.zeros(2, 20, 4), torch.zeros(2, 20, 4))


@paths
def test_shapes_on_meta(fast: bool) -> None:
    made, x = block(torch.bfloat16, device="meta", use_fast_path=fast), hidden(torch.bfloat16).to("meta")
    out, states = made(x, return_final_states=True)
    out.sum().backward()
    assert [(t.device.type, t.dtype, tuple(t.shape)) for t in (out, *states, made.x_proj.weight.grad)] == [
        ("meta", torch.bfloat16, (2, LENGTH, D_MODEL)), ("meta", torch.bfloat16, (2, 20, 3)),
        ("meta", torch.float32, (2, 20, 4)), ("meta", torch.bfloat16, (9, 20)),
    ]  # fmt: skip


# --- Memory -----------------------------------------------------------------------------------------------------------


class TheirScan(torch.autograd.Function):
    """mamba_ssm's scan as it keeps things: the inputs, the output before the gate, states at intervals."""

    @staticmethod
    def forward(ctx: Any, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any) -> Any:
        states = u.new_zeros(u.shape[0], u.shape[1], -(-u.shape[2] // 2048), 2 * A.shape[1], dtype=torch.float32)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, states, torch.zeros_like(u))
        return torch.zeros_like(u)


class TheirConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any) -> Any:
        ctx.save_for_backward(x, weight, bias)
        return torch.zeros(x.shape, dtype=x.dtype)


def their_slow_path(made: Any, x: Any) -> Any:
    batch, length, _ = x.shape
    xz = (made.in_proj.weight @ x.reshape(-1, x.shape[2]).T).reshape(-1, batch, length).transpose(0, 1)
    u, z = xz.chunk(2, 1)
    u = TheirConvolution.apply(u, made.conv1d.weight.squeeze(1), made.conv1d.bias)
    x_dbl = made.x_proj(u.mT.reshape(batch * length, -1))
    dt, B, C = x_dbl.split([made.dt_rank, made.d_state, made.d_state], 1)
    delta = (made.dt_proj.weight @ dt.T).reshape(-1, batch, length).transpose(0, 1)
    B, C = (m.reshape(batch, length, -1).mT.contiguous() for m in (B, C))
    bias = made.dt_proj.bias.float()
    y = TheirScan.apply(u, delta, -torch.exp(made.A_log.float()), B, C, made.D.float(), z, bias)
    return made.out_proj(y.mT)


def kept_by(function: Callable[[], Any]) -> int:
    """Bytes of the storages that are kept for the backward."""
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function()
    del out
    return sum(kept.values())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("called", [(), PROJECTIONS], ids=["read", "called"])
@pytest.mark.parametrize("d_state", [16, 64])
def test_part_by_part_keeps_no_more_than_mamba_ssm(
    dtype: torch.dtype, batch: int, called: tuple[str, ...], d_state: int
) -> None:
    torch.manual_seed(0)
    made = Mamba(64, d_state=d_state, dtype=dtype, use_fast_path=False)
    x = torch.randn(batch, 512, 64, dtype=dtype, requires_grad=True)
    theirs = kept_by(lambda: their_slow_path(made, x))
    for name in called:
        getattr(made, name).register_forward_hook(lambda *_: None)
    ours = kept_by(lambda: made(x))
    assert x.nbytes < ours <= theirs


def test_part_by_part_keeps_every_array_once_under_autocast() -> None:
    """Weights are not cast for every row of the batch."""
    made, x = Mamba(64, use_fast_path=False), torch.randn(8, 16, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_by(lambda: made(x))
    weights = sum(p.nbytes for p in made.parameters())
    along_time = 8 * 16 * 2 * (64 + 6 * 128 + 4 + 2 * 16)
    assert kept < 2 * weights + along_time + 8 * 16 * 4
