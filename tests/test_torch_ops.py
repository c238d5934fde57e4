"""sscan.torch: the core's results bit for bit, under autograd, torch.compile, torch.export and autocast."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import (
    CASES,
    DIFFERENTIABLE,
    Case,
    backward,
    conv_problem,
    conv_update_problem,
    convolution_problem,
    discretize_problem,
    forward,
    kernel_problem,
    linear_scan_problem,
    norm_problem,
    scan_problem,
    update_problem,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sscan
import sscan.torch
from sscan.compat.mamba_ssm import mamba_inner_fn

if TYPE_CHECKING:
    from collections.abc import Callable

Arguments = dict[str, Any]

PROBLEMS: dict[str, Callable[..., Arguments]] = {
    "selective_scan": scan_problem,
    "causal_conv1d": conv_problem,
    "rms_norm": norm_problem,
    "linear_scan": linear_scan_problem,
    "discretize": discretize_problem,
    "ssm_kernel": kernel_problem,
    "ssm_convolution": convolution_problem,
    "selective_state_update": update_problem,
    "causal_conv1d_update": conv_update_problem,
}
STATES = {"selective_scan": {"return_last_state": True}, "causal_conv1d": {"return_final_state": True}}
UPDATED = {"selective_state_update": "state", "causal_conv1d_update": "conv_state"}


def to_torch(x: Any, device: str = "cpu") -> Any:
    """A tensor of the array's values and, where PyTorch knows such strides, its layout."""
    if not isinstance(x, np.ndarray):
        return x
    values = x.view(np.int16) if x.dtype == ml_dtypes.bfloat16 else x
    tensor = torch.from_numpy(np.array(values))
    if all(step > 0 for step in x.strides):
        strides = [step // x.itemsize for step in x.strides]
        tensor = torch.empty_strided(x.shape, strides, dtype=tensor.dtype).copy_(tensor)
    return (tensor if values is x else tensor.view(torch.bfloat16)).to(device)


def tensors(arguments: Arguments, device: str = "cpu") -> Arguments:
    return {name: to_torch(x, device) for name, x in arguments.items()}


def problem(op: str, device: str = "cpu", **changes: Any) -> Arguments:
    return tensors(PROBLEMS[op](np.random.default_rng(0), **changes), device)


def differentiable(arguments: Arguments) -> Arguments:
    return {
        name: x
        for name, x in arguments.items()
        if isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())
    }


def with_leaves(arguments: Arguments) -> Arguments:
    """The arguments, those that have gradients as leaves of the same layout."""
    return arguments | {name: x.detach().requires_grad_() for name, x in differentiable(arguments).items()}


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def loss(outputs: Any) -> torch.Tensor:
    """A number that depends on all outputs, each element in its own way."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = torch.zeros((), device=outputs[0].device)
    for x in outputs:
        x = torch.view_as_real(x) if x.is_complex() else x
        total = total + (x.double() * torch.linspace(1, 2, x.numel(), device=x.device).reshape(x.shape)).square().sum()
    return total


# --- The core's results -----------------------------------------------------------------------------------------------


def check_is_the_core(case: Case, device: str = "cpu") -> None:
    arguments = tensors(case.arguments(), device)
    expected = forward(sscan, case.op, arguments)
    leaves = with_leaves(arguments)
    actual = forward(sscan.torch, case.op, leaves)
    assert list(actual) == list(expected)
    names = list(expected) if case.state_gradient else list(expected)[:1]
    given = {f"d{name}": torch.randn_like(expected[name]) for name in names}
    inputs = differentiable(leaves)
    found = torch.autograd.grad([actual[name] for name in names], list(inputs.values()), list(given.values()))
    for name, x in expected.items():
        assert identical(actual[name].detach(), x), name
    gradients = backward(sscan, case.op, arguments, given)
    for name, gradient in zip(inputs, found, strict=True):
        assert identical(gradient, gradients[f"d{name}"]), f"d{name}"


@pytest.mark.parametrize("case", [case for case in CASES if case.op in DIFFERENTIABLE], ids=lambda c: f"{c.op}: {c}")
def test_is_the_core(case: Case) -> None:
    check_is_the_core(case)


def check_updates_like_the_core(case: Case, device: str = "cpu") -> None:
    arguments, state = tensors(case.arguments(), device), UPDATED[case.op]
    y, mine = (
        (getattr(library, case.op)(**given), given[state])
        for library in (sscan, sscan.torch)
        for given in [{**arguments, state: arguments[state].clone()}]
    )
    assert identical(mine[0], y[0])
    assert identical(mine[1], y[1])


@pytest.mark.parametrize("case", [case for case in CASES if case.op in UPDATED], ids=lambda c: f"{c.op}: {c}")
def test_updates_like_the_core(case: Case) -> None:
    check_updates_like_the_core(case)


class Recorder(TorchDispatchMode):
    """The arguments that ops of sscan are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "sscan":
            names = (argument.name for argument in op._schema.arguments)
            self.calls.append((op._opname, dict(zip(names, args, strict=True))))
        return op(*args, **(kwargs or {}))


def test_inference_keeps_nothing() -> None:
    arguments = problem("selective_scan", dim=2, length=40)
    with Recorder() as recorder:
        sscan.torch.selective_scan(**arguments)
        with torch.no_grad():
            sscan.torch.selective_scan(**with_leaves(arguments))
        with torch.inference_mode():
            sscan.torch.selective_scan(**arguments, return_last_state=True)
        y = sscan.torch.selective_scan(**with_leaves(arguments))
    asked = [(call["keep_checkpoints"], call["return_last_state"]) for _, call in recorder.calls]
    assert asked == [(False, False), (False, False), (False, True), (True, False)]
    assert y.grad_fn.saved_tensors[-1].numel() > 0


# --- Gradients --------------------------------------------------------------------------------------------------------

RAW = {"D": False, "z": False, "delta_bias": False, "delta": "positive", "delta_softplus": False}
COMPLEX = {"is_complex": True}
SMALL: dict[str, dict[str, Any]] = {
    "selective_scan": {"batch": 2, "dim": 2, "length": 3, "state": 2},
    "causal_conv1d": {"batch": 2, "dim": 2, "length": 5, "width": 3},
    "rms_norm": {"shape": (2, 3)},
    "linear_scan": {"shape": (2, 3)},
    "discretize": {"batch": 2, "dim": 2, "length": 2, "state": 2},
    "ssm_kernel": {"dim": 2, "length": 4, "state": 2},
    "ssm_convolution": {"batch": 2, "dim": 2, "length": 4},
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "selective_scan": [
        {},
        {"initial_state": True},
        RAW,
        {"discretization": "zoh", "initial_state": True},
        {**RAW, "discretization": "zoh", "delta": "zero"},
        {"B": "2", "C": "1"},
        {"B": "constant", "C": "constant"},
        {"seq_idx": "int32", "initial_state": True, "length": 8, "batch": 1},
        {"batch": 1, "cu_seqlens": (0, 0, 2, 3), "initial_state": True},
        {"batch": 1, "cu_seqlens": (0, 1, 3)},
        {**COMPLEX, "initial_state": True},
        {**COMPLEX, "B": "shared complex", "C": "2"},
        {**COMPLEX, "B": "constant", "C": "constant", "discretization": "zoh"},
    ],
    "causal_conv1d": [
        {"initial_state": True},
        {"bias": False, "activation": None},
        {"seq_idx": "int32", "initial_state": True, "batch": 1, "length": 8},
        {"batch": 1, "cu_seqlens": (0, 0, 2, 5), "initial_state": True},
        {"batch": 1, "cu_seqlens": (0, 1, 5)},
        {"width": 1},
    ],
    "rms_norm": [{}, {"residual": "float64"}],
    "linear_scan": [
        {"reverse": reverse, "initial_state": state, "dtype": dtype}
        for reverse, state, dtype in (
            (False, False, "float64"), (True, True, "float64"), (False, True, "complex128"), (True, False, "complex128")
        )
    ],
    "discretize": [
        *({"method": method, "is_complex": True, "B": "2"} for method in ("zoh", "mamba", "bilinear", "euler")),
        {"lti": True},
        {"B": "constant"},
    ],
    "ssm_kernel": [{}, {"method": "bilinear", **COMPLEX}],
    "ssm_convolution": [{}],
}  # fmt: skip


def function_of(op: str, arguments: Arguments) -> tuple[Callable[..., Any], tuple[torch.Tensor, ...]]:
    """The op, and all its results, as a function of the inputs that have gradients; these inputs."""
    inputs = differentiable(with_leaves(arguments))

    def function(*values: torch.Tensor) -> Any:
        given = arguments | dict(zip(inputs, values, strict=True)) | STATES.get(op, {})
        return getattr(sscan.torch, op)(**given)

    return function, tuple(inputs.values())


def check_derivatives(op: str, options: Arguments, device: str = "cpu") -> None:
    function, inputs = function_of(op, problem(op, device, **{"dtype": "float64", **SMALL[op], **options}))
    assert gradcheck(function, inputs, fast_mode=device != "cpu")
    assert gradgradcheck(function, inputs, fast_mode=True)  # in random directions instead of one input after the other


DERIVATIVES = [
    pytest.param(op, options, id=f"{op}-{number}") for op in OPTIONS for number, options in enumerate(OPTIONS[op])
]


@pytest.mark.parametrize(("op", "options"), DERIVATIVES)
def test_first_and_second_derivatives(op: str, options: Arguments) -> None:
    check_derivatives(op, options)


@pytest.mark.parametrize("options", [{}, OPTIONS["selective_scan"][-1]], ids=["mamba", "zoh complex"])
def test_third_derivatives(options: Arguments) -> None:
    scan, inputs = function_of(
        "selective_scan", problem("selective_scan", dtype="float64", batch=1, dim=1, length=2, state=2, **options)
    )

    def slope(*values: torch.Tensor) -> Any:
        return torch.autograd.grad(loss(scan(*values)), values, create_graph=True)

    assert gradgradcheck(slope, inputs, fast_mode=True)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_derivatives_of_nothing(op: str) -> None:
    """Batches and sequences without elements have gradients too, and these have theirs."""
    empty = {"shape": (0, 3)} if op in ("rms_norm", "linear_scan") else {"length": 0}
    if op in ("selective_scan", "causal_conv1d"):
        empty["initial_state"] = True
    function, inputs = function_of(op, problem(op, **{**SMALL[op], **empty}))
    first = torch.autograd.grad(loss(function(*inputs)), inputs, create_graph=True)
    second = torch.autograd.grad(sum(loss(x) for x in first), inputs, allow_unused=True)
    for x, *derivatives in zip(inputs, first, second, strict=True):
        assert all(d is None or (d.shape == x.shape and d.isfinite().all()) for d in derivatives)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d", "rms_norm", "linear_scan"])
def test_second_derivatives_of_halves(op: str, dtype: str) -> None:
    """They are those of float64, but for rounding."""

    def penalty(arguments: Arguments) -> tuple[list[torch.Tensor], Any]:
        function, inputs = function_of(op, arguments)
        slopes = torch.autograd.grad(loss(function(*inputs)) / 100, inputs, create_graph=True)
        return list(inputs), torch.autograd.grad(sum(x.double().square().sum() for x in slopes), inputs)

    half = problem(op, **{**SMALL[op], "dtype": dtype})
    inputs, found = penalty(half)
    _, exact = penalty(half | {name: x.detach().double() for name, x in differentiable(half).items()})
    for x, mine, theirs in zip(inputs, found, exact, strict=True):
        assert mine.dtype == x.dtype
        assert (mine.double() - theirs).abs().max() < 0.05 * theirs.abs().max()


def test_gradients_that_are_expanded_lazy_or_absent() -> None:
    arguments = problem("selective_scan", dim=3, length=9, is_complex=True, initial_state=True)
    core = backward(
        sscan, "selective_scan", arguments, {"dy": torch.ones(2, 3, 9), "dlast_state": 1j * torch.ones(2, 3, 8)}
    )
    function, inputs = function_of("selective_scan", arguments)
    y, last_state = function(*inputs)
    lazy = (-1j * torch.ones(2, 3, 8)).conj()
    assert lazy.is_conj()
    found = torch.autograd.grad((y.sum(), last_state), inputs, (None, lazy), retain_graph=True)
    for name, gradient in zip(differentiable(arguments), found, strict=True):
        assert identical(gradient, core[f"d{name}"]), name
    of_state = torch.autograd.grad(last_state.real.sum(), inputs)
    assert of_state[0].any()
    assert not of_state[list(differentiable(arguments)).index("z")].any()


def test_some_inputs_without_gradients() -> None:
    arguments = problem("selective_scan", dim=3, length=9)
    whole = with_leaves(arguments)
    sscan.torch.selective_scan(**whole).sum().backward()
    arguments["A"].requires_grad_()
    sscan.torch.selective_scan(**arguments).sum().backward()
    assert identical(arguments["A"].grad, whole["A"].grad)
    assert arguments["u"].grad is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    function, inputs = function_of("selective_scan", problem("selective_scan", dim=3, length=40, initial_state=True))
    expected = torch.autograd.grad(loss(function(*inputs)), inputs)
    loss(checkpoint(function, *inputs, use_reentrant=reentrant)).backward()
    for x, gradient in zip(inputs, expected, strict=True):
        assert identical(x.grad, gradient)


# --- torch.library ----------------------------------------------------------------------------------------------------

REGISTERED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("selective_scan", {"B": "2", "C": "constant", "initial_state": True, **COMPLEX}, {"keep_checkpoints": True}),
    ("selective_scan", {"seq_idx": "int32", "length": 8}, {"keep_checkpoints": True}),
    ("causal_conv1d", {}, {}),
    ("rms_norm", {"residual": "float32"}, {"eps": 1e-5}),
    ("linear_scan", {}, {}),
]


def arguments_of(op: Any, known: Arguments) -> list[Any]:
    """The arguments of an op of torch.library by their names; flags that are not known are off, others None."""
    off = {argument.name: False if str(argument.type) == "bool" else None for argument in op._schema.arguments}
    return [known.get(name, default) for name, default in off.items()]


@pytest.mark.parametrize(("name", "changes", "flags"), REGISTERED, ids=lambda x: x if isinstance(x, str) else "")
def test_registered_forward_and_backward(name: str, changes: Arguments, flags: Arguments) -> None:
    forward_op, backward_op = (getattr(torch.ops.sscan, n).default for n in (name, f"{name}_backward"))
    known = with_leaves(problem(name, **{**SMALL[name], **changes})) | flags
    torch.library.opcheck(forward_op, arguments_of(forward_op, known))

    with torch.no_grad():
        outputs = forward_op(*arguments_of(forward_op, known))
    for result, x in zip(
        forward_op._schema.returns, outputs if isinstance(outputs, tuple) else (outputs,), strict=True
    ):
        if x.numel():
            known |= {result.name or "h": x, f"d{result.name or 'h'}": torch.randn_like(x).requires_grad_()}
    torch.library.opcheck(backward_op, arguments_of(backward_op, known))


@pytest.mark.parametrize("op", UPDATED)
def test_registered_updates(op: str) -> None:
    registered = getattr(torch.ops.sscan, op).default
    torch.library.opcheck(registered, arguments_of(registered, problem(op, dim=3)))


@pytest.mark.parametrize("op", UPDATED)
def test_updates_are_known_to_autograd(op: str) -> None:
    """A state that a graph needs as it was may not change unseen, and none that requires grad may lose it."""
    arguments, state = problem(op, dim=3), UPDATED[op]
    before = arguments[state]._version
    getattr(sscan.torch, op)(**arguments)
    assert arguments[state]._version > before
    for name in differentiable(arguments):
        given = arguments | {name: arguments[name].clone().requires_grad_()}
        with pytest.raises(TypeError, match=f"^{op}: {name} requires grad, which an update in place would lose"):
            getattr(sscan.torch, op)(**given)
        with torch.no_grad():
            getattr(sscan.torch, op)(**given)


# --- torch.compile and torch.export -----------------------------------------------------------------------------------


def block(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, weight: Any) -> Any:
    """What a Mamba block does between its projections."""
    x = sscan.torch.causal_conv1d(u, weight, activation="silu")
    y, last_state = sscan.torch.selective_scan(x, delta, A, B, C, D, z, delta_bias, True, True)
    return sscan.torch.rms_norm(y.mT, D).square().sum() + last_state.sum()


def block_inputs(length: int, device: str = "cpu") -> list[Any]:
    arguments = problem("selective_scan", device, dim=6, length=length, state=4, C="2")
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(device)
    return [x.requires_grad_() for x in (*(arguments[name] for name in names), weight)]


def check_compiled(backend: str, lengths: tuple[int, ...], device: str = "cpu") -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for length in lengths:
        inputs = block_inputs(length, device)
        for x in inputs:
            if x.ndim > 2:
                torch._dynamo.mark_dynamic(x, x.ndim - 1)
        value = compiled(*inputs)
        torch.testing.assert_close(value, block(*inputs), rtol=1e-5, atol=0)  # sums may be taken in another order
        found, expected = (torch.autograd.grad(x, inputs) for x in (value, block(*inputs)))
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1, "compiled again for another length"


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_block_trains_at_every_length(backend: str) -> None:
    check_compiled(backend, (33, 7, 64, 100))


@pytest.mark.parametrize("packing", ["seq_idx", "cu_seqlens"])
def test_compiled_packed_sequences(packing: str) -> None:
    torch._dynamo.reset()
    changes: Arguments = {"seq_idx": "int32"} if packing == "seq_idx" else {"batch": 1, "cu_seqlens": (0, 4, 4, 20)}
    function, inputs = function_of("selective_scan", problem("selective_scan", dim=3, length=20, **changes))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(*inputs), inputs, _ones(f(*inputs))) for f in (compiled, function))
    assert all(map(identical, found, expected))


def _ones(outputs: Any) -> list[torch.Tensor]:
    return [torch.ones_like(x) for x in outputs]


@pytest.mark.parametrize("op", UPDATED)
def test_compiled_updates(op: str) -> None:
    torch._dynamo.reset()
    arguments, state = problem(op, dim=3), UPDATED[op]
    mine = arguments | {state: arguments[state].clone()}
    function = getattr(sscan.torch, op)
    y = torch.compile(function, fullgraph=True, backend="aot_eager")(**mine)
    assert identical(y, function(**arguments))
    assert identical(mine[state], arguments[state])


def test_compiled_calls_are_checked() -> None:
    torch._dynamo.reset()
    arguments = problem("selective_scan", dim=3, length=20)
    compiled = torch.compile(sscan.torch.selective_scan, backend="aot_eager", fullgraph=True)
    with pytest.raises(
        Exception, match=r"selective_scan: z must have shape \(batch, dim, length\) = \(2, 3, 20\), got"
    ):
        compiled(**arguments | {"z": arguments["z"][:1]})


class Exported(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A = torch.nn.Parameter(-torch.rand(6, 4))
        self.weight = torch.nn.Parameter(torch.randn(6, 4))

    def forward(self, u: Any, delta: Any, B: Any, C: Any) -> Any:
        return sscan.torch.selective_scan(sscan.torch.causal_conv1d(u, self.weight), delta, self.A, B, C)


def test_exported() -> None:
    module, length = Exported(), torch.export.Dim("length", min=2, max=4096)
    u, delta, _, B, C, *_ = (x.detach() for x in block_inputs(16))
    shapes = [{x.ndim - 1: length} for x in (u, delta, B, C)]
    with torch.no_grad():
        program = torch.export.export(module, (u, delta, B, C), dynamic_shapes=shapes)
    longer = [x.detach() for k, x in enumerate(block_inputs(50)) if k in (0, 1, 3, 4)]
    assert identical(program.module()(*longer), module(*longer))
    longer[0].requires_grad_()  # exported without checkpoints: gradients are there all the same
    found, expected = (torch.autograd.grad(f(*longer).sum(), longer[0]) for f in (program.module(), module))
    assert identical(found[0], expected[0])


@pytest.mark.parametrize("packing", [{}, {"seq_idx": "int32"}, {"batch": 1, "cu_seqlens": (0, 4, 20)}], ids=str)
def test_gpu_is_understood_without_one(packing: Arguments) -> None:
    """Fake tensors on a GPU have the checkpoints of the GPU's kernels, of a shape known beforehand in every case."""
    numbers = problem("selective_scan", dim=3, length=20, state=4, **packing)
    with FakeTensorMode():
        arguments = {
            name: torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, torch.Tensor) else x
            for name, x in numbers.items()
        }
        op = torch.ops.sscan.selective_scan.default
        results = op(*arguments_of(op, arguments | {"keep_checkpoints": True}))
        assert [x.device.type for x in results] == ["cuda"] * 3
        assert [x.ndim for x in results] == [3, 1, 3]  # the last state was not asked for
        with pytest.raises(TypeError, match="all tensors must be on one device; u is on cuda:0, z on cpu"):
            sscan.torch.selective_scan(**arguments | {"z": torch.empty(arguments["z"].shape)})


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("selective_scan", {"delta_softplus": 1}),
        ("selective_scan", {"return_last_state": None}),
        ("selective_scan", {"discretization": None}),
        ("causal_conv1d", {"activation": True}),
        ("causal_conv1d", {"return_final_state": "no"}),
        ("selective_state_update", {"dt_softplus": "no"}),
        ("causal_conv1d_update", {"activation": "relu"}),
    ],
    ids=str,
)
def test_options_are_refused_as_in_the_core(op: str, options: Arguments) -> None:
    arguments = {**problem(op), **options}
    said = []
    for module in (sscan, sscan.torch):
        with pytest.raises((TypeError, ValueError)) as caught:
            getattr(module, op)(**arguments)
        said.append((caught.type, str(caught.value)))
    assert said[0] == said[1]


@pytest.mark.parametrize(("dim", "kept"), [(8, True), (6, False)])  # groups of four channels
def test_gpu_keeps_neighbouring_channels(dim: int, kept: bool) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 33, dim, device="cuda", dtype=torch.bfloat16).mT
        weight = torch.empty(dim, 4, device="cuda")
        y, _ = torch.ops.sscan.causal_conv1d(x, weight, None, None, None, None, "silu", False)
        dx, dweight = torch.ops.sscan.causal_conv1d_backward(y, None, x, weight, None, None, None, None, "silu")
        expected = x.stride() if kept else (33 * dim, 33, 1)
        assert y.stride() == dx.stride() == expected
        assert dweight.stride() == (4, 1)


# --- Autocast ---------------------------------------------------------------------------------------------------------


def check_autocast(device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> None:
    arguments = with_leaves(problem("selective_scan", device, dim=3, length=20, B="constant", initial_state=True))
    lowered = {name: x.to(dtype) if name in ("u", "delta", "C", "z") else x for name, x in arguments.items()}
    expected = sscan.torch.selective_scan(**lowered, return_last_state=True)
    with torch.autocast(device, dtype):
        y, last_state = sscan.torch.selective_scan(**arguments, return_last_state=True)
        mine = torch.autograd.grad(loss((y, last_state)), list(differentiable(arguments).values()))
    assert y.dtype is dtype
    assert last_state.dtype is torch.float32
    assert identical(y, expected[0])
    assert identical(last_state, expected[1])
    theirs = torch.autograd.grad(loss(expected), list(differentiable(arguments).values()))
    assert all(map(identical, mine, theirs))
    assert {x.dtype for x in mine} == {torch.float32}


def test_autocast() -> None:
    check_autocast()
    step, conv, double = (
        problem("selective_state_update", dim=3),
        problem("causal_conv1d", dim=3),
        problem("selective_scan", dim=3, dtype="float64"),
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert sscan.torch.selective_state_update(**step).dtype is torch.bfloat16
        assert sscan.torch.causal_conv1d(**conv).dtype is torch.bfloat16
        assert sscan.torch.selective_scan(**double).dtype is torch.float64
        assert sscan.torch.rms_norm(**problem("rms_norm")).dtype is torch.float32
    assert step["state"].dtype is torch.float32


def test_compiled_autocast() -> None:
    torch._dynamo.reset()

    def lowered(*inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return block(*inputs)

    inputs = block_inputs(16)
    compiled = torch.compile(lowered, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, lowered))
    assert all(map(identical, found, expected))


# --- Counting operations ----------------------------------------------------------------------------------------------


def counted(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def counted_both(op: str, arguments: Arguments) -> tuple[int, int]:
    """The operations of forward and backward."""
    function, inputs = function_of(op, arguments)
    results: list[Any] = []
    forward = counted(lambda: results.append(function(*inputs)))
    return forward, counted(lambda: loss(results[0]).backward())


def test_flops_of_the_ops() -> None:
    """By hand: the scan's loop has seven operations for each state, its backward twenty."""
    size = {"batch": 2, "dim": 3, "length": 5}
    elements = 2 * 3 * 5
    assert counted_both("selective_scan", problem("selective_scan", state=4, **size)) == (
        7 * 4 * elements, 20 * 4 * elements
    )  # fmt: skip
    assert counted_both("selective_scan", problem("selective_scan", state=4, is_complex=True, **size)) == (
        20 * 4 * elements, 58 * 4 * elements
    )  # fmt: skip
    conv = problem("causal_conv1d", width=4, activation="silu", **size)
    assert counted_both("causal_conv1d", conv) == (2 * 4 * elements, 6 * 4 * elements)
    assert counted_both("linear_scan", problem("linear_scan", shape=(2, 3, 5))) == (2 * elements, 3 * elements)
    step = problem("selective_state_update", batch=2, dim=3, state=4)
    assert counted(lambda: sscan.torch.selective_state_update(**step)) == 7 * 4 * 2 * 3
    step = problem("causal_conv1d_update", batch=2, dim=3, width=4)
    assert counted(lambda: sscan.torch.causal_conv1d_update(**step)) == 2 * 4 * 2 * 3


def test_flops_of_the_block() -> None:
    """Those of its fused op are those of its parts: products, convolution and scan, in the backward once more."""
    model = sscan.torch.Mamba(16, d_state=16)
    tokens, inner, rank = 20, 32, 1
    products = [2 * tokens * inner * x for x in (2 * 16, rank + 2 * 16, rank, 16)]  # in_proj, x_proj, dt_proj, out_proj
    assert sum(products) == 104_960
    _, x_proj, dt_proj, out_proj = products
    conv, scan = 2 * 4 * tokens * inner, 16 * tokens * inner
    weights = (model.conv1d.weight, None, model.x_proj.weight, model.dt_proj.weight, model.out_proj.weight, None)
    outs: list[Any] = []
    forward = counted(lambda: outs.append(mamba_inner_fn(torch.randn(1, 2 * inner, tokens), *weights, -model.A_log)))
    assert forward == x_proj + dt_proj + out_proj + conv + 7 * scan
    backward = 3 * (x_proj + dt_proj) + 2 * out_proj + 4 * conv + (7 + 20) * scan
    assert counted(lambda: outs[0].sum().backward()) == backward
    # The counter puts hooks on modules, for which a block may call its parts one by one, the convolution with padding.
    whole = sum(products) + conv + 7 * scan
    assert whole <= counted(lambda: model(torch.randn(1, tokens, 16))) <= 1.01 * whole


# --- Bad input --------------------------------------------------------------------------------------------------------


def freed(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


DENSE = r"^selective_scan: z must be a dense tensor on cpu or cuda, got "
BAD: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "meta": (lambda x: x.to("meta"), TypeError, "^selective_scan: all tensors must .*; u is on cpu, z on meta$"),
    "dtype": (torch.Tensor.double, TypeError, r"^selective_scan: z must have the dtype of u, float32; got float64"),
    "shape": (lambda x: x[:1], ValueError, r"^selective_scan: z must have shape .* = \(2, 3, 20\), got \(1, 3, 20\)"),
    "sparse": (torch.Tensor.to_sparse, TypeError, DENSE + "a sparse_coo one$"),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), TypeError, DENSE + "a quantized one$"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), TypeError, DENSE + "a nested one$"),
    "jagged": (
        lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), TypeError, DENSE + "a nested one$"
    ),
    "fp8": (
        lambda x: x.to(torch.float8_e4m3fn), TypeError,
        r"^selective_scan: z has the dtype torch.float8_e4m3fn, which is not supported$",
    ),
    "freed": (freed, TypeError, DENSE + "one without memory"),
    "library": (torch.Tensor.numpy, TypeError, "^selective_scan: z must be a torch.Tensor, got ndarray$"),
    "list": (torch.Tensor.tolist, TypeError, "^selective_scan: z must be a torch.Tensor, got list$"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz:UserWarning")
def test_bad_input_is_named(kind: str) -> None:
    change, error, message = BAD[kind]
    arguments = problem("selective_scan", dim=3, length=20)
    with pytest.raises(error, match=message):
        sscan.torch.selective_scan(**arguments | {"z": change(arguments["z"])})


@pytest.mark.parametrize("op", [*DIFFERENTIABLE, *UPDATED])
def test_every_argument_is_named(op: str) -> None:
    """None for a required one too, which PyTorch hands on without a word."""
    arguments = problem(op)
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor):
            required = inspect.signature(getattr(sscan.torch, op)).parameters[name].default is inspect.Parameter.empty
            for bad in ([1.0], None) if required else ([1.0],):
                with pytest.raises(TypeError, match=f"^{op}: {name} must be a torch.Tensor, got {type(bad).__name__}$"):
                    getattr(sscan.torch, op)(**arguments | {name: bad})


# --- Tensors without memory -------------------------------------------------------------------------------------------


def registered_tensors(op: Any) -> list[int]:
    return [i for i, argument in enumerate(op._schema.arguments) if "Tensor" in str(argument.type)]


def registered_ops() -> list[Any]:
    """Every op of torch.library that sscan defines, the backwards too."""
    names = {name.removeprefix("sscan::") for name in torch._C._dispatch_get_all_op_names() if name[:7] == "sscan::"}
    assert {"selective_scan", "selective_scan_backward", "mamba", "mamba_backward", "mamba_inner"} <= names
    return [getattr(torch.ops.sscan, name).default for name in sorted(names)]


@pytest.mark.parametrize("op", registered_ops(), ids=str)
def test_one_tensor_on_meta_is_an_error(op: Any) -> None:
    """PyTorch would take the result that the op makes for tensors without data: memory that nobody wrote."""
    options = {
        "bool": False,
        "str": "",
        "Optional[str]": None,
        "Optional[int]": None,
        "float": 1.0,
        "int": 1,
        "SymInt": 1,
    }
    places = registered_tensors(op)
    for place in places:
        arguments = [
            torch.zeros(2, device="meta" if i == place else "cpu") if i in places else options[str(argument.type)]
            for i, argument in enumerate(op._schema.arguments)
        ]
        name = op._schema.arguments[place].name
        on_meta = rf"{name} is on meta, \w+ on cpu" if place == places[0] else rf"\w+ is on cpu, {name} on meta"
        with pytest.raises(TypeError, match=f"^{op._opname}: all tensors must be on one device; {on_meta}$"):
            op(*arguments)


@pytest.mark.parametrize("op", [*DIFFERENTIABLE, *UPDATED])
def test_meta_tensors_give_meta_results(op: str) -> None:
    """As everywhere in PyTorch: the shapes and dtypes of the results, and of their gradients."""
    arguments = problem(op)
    on_meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    found, expected = [], []
    for results, given in ((found, on_meta), (expected, arguments)):
        if op in UPDATED:
            results.append(getattr(sscan.torch, op)(**given))
            continue
        leaves = with_leaves(given)
        made = getattr(sscan.torch, op)(**leaves, **STATES.get(op, {}))
        made = made if isinstance(made, tuple) else (made,)
        inputs = list(differentiable(leaves).values())
        results += [*made, *torch.autograd.grad(made, inputs, [torch.ones_like(x) for x in made])]
    assert {x.device.type for x in found} == {"meta"}
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]


def test_meta_tensors_are_checked() -> None:
    for op, name, message in (
        ("discretize", "method", "method must be one of"), ("ssm_kernel", "method", "method must be one of"),
        ("linear_scan", "b", "b must have the shape of a"), ("ssm_convolution", "u", "u must have shape"),
        ("rms_norm", "weight", "weight must have"), ("causal_conv1d", "weight", "weight must have shape"),
    ):  # fmt: skip
        arguments = {key: x.to("meta") if isinstance(x, torch.Tensor) else x for key, x in problem(op).items()}
        bad = "none" if name == "method" else arguments[name].new_empty(2)
        with pytest.raises(ValueError, match=f"^{op}: {message}"):
            getattr(sscan.torch, op)(**arguments | {name: bad})


@pytest.mark.parametrize("library", [sscan, sscan.torch], ids=lambda x: x.__name__)
@pytest.mark.parametrize("op", [*DIFFERENTIABLE, *UPDATED])
def test_tensors_stay_resizable(op: str, library: Any) -> None:
    """FSDP frees the storage of a parameter between its uses: an op must not keep it from being resized."""
    arguments = problem(op)
    for _ in range(2):  # the second call is a known one
        getattr(library, op)(**arguments)
    for x in arguments.values():
        if isinstance(x, torch.Tensor):
            size = x.untyped_storage().nbytes()
            x.untyped_storage().resize_(0)
            x.untyped_storage().resize_(size)
            x.resize_(9, 4)


def test_halves_stay_resizable() -> None:
    arguments = problem("selective_scan", dtype="bfloat16")
    sscan.torch.selective_scan(**with_leaves(arguments)).float().sum().backward()
    for name in ("u", "delta", "B", "C", "z"):
        arguments[name].untyped_storage().resize_(0)


# --- Forward mode and torch.func --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.func's own
@pytest.mark.parametrize("op", [*DIFFERENTIABLE, *UPDATED])
def test_forward_mode_is_refused(op: str) -> None:
    """A tangent must not become zero in silence; tensors that have none pass while another has one."""
    arguments = problem(op)
    expected = getattr(sscan.torch, op)(**{k: x.clone() if hasattr(x, "clone") else x for k, x in arguments.items()})
    for name, x in differentiable(arguments).items():
        with forward_ad.dual_level():
            given = arguments | {name: forward_ad.make_dual(x, torch.ones_like(x))}
            with pytest.raises(NotImplementedError, match=f"^{op}: {name} has a tangent, but"):
                getattr(sscan.torch, op)(**given)
            with pytest.raises(TypeError, match=f"^{op}: {name} has a tangent, which would be lost"):
                getattr(sscan, op)(**given)
        with pytest.raises(NotImplementedError, match=f"^{op}: {name} has a tangent"):
            torch.func.jvp(lambda y, name=name: getattr(sscan.torch, op)(**arguments | {name: y}), (x,), (x,))
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.ones(1), torch.ones(1))
        found = getattr(sscan.torch, op)(**arguments)
    for x, y in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, expected)), strict=True):
        assert identical(x, y)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_forward_mode_through_the_block_is_refused() -> None:
    block, hidden = sscan.torch.Mamba(8, d_state=3), torch.randn(2, 5, 8)
    with pytest.raises(NotImplementedError, match="hidden has a tangent, but the ops of sscan have no forward-mode"):
        torch.func.jvp(block, (hidden,), (hidden,))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_gradients_of_torch_func_are_refused() -> None:
    function, (x, weight) = function_of("rms_norm", problem("rms_norm", shape=(2, 3)))

    def number(x: torch.Tensor) -> torch.Tensor:
        return function(x, weight)[0].sum()

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        with pytest.raises(NotImplementedError, match=r"^rms_norm: torch\.func has no gradients of sscan"):
            transform(number)(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_is_one_call_after_the_other() -> None:
    """Results and, of tensors that require grad outside of it, gradients."""
    arguments = problem("selective_scan", **SMALL["selective_scan"])
    weights = with_leaves({name: arguments[name] for name in ("A", "B", "C", "D", "delta_bias")})
    us = torch.randn(3, *arguments["u"].shape, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def scan(u: torch.Tensor) -> torch.Tensor:
        return sscan.torch.selective_scan(**arguments | weights | {"u": u})

    found, expected = torch.vmap(scan)(us), torch.stack([scan(u) for u in us])
    assert identical(found, expected)
    inputs = [us, *weights.values()]
    for mine, theirs in zip(*(torch.autograd.grad(loss(y), inputs) for y in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)  # sums over the calls in another order


def test_options_are_checked() -> None:
    arguments = problem("selective_scan", dim=3, length=20)
    with pytest.raises(ValueError, match="discretization must be"):
        sscan.torch.selective_scan(**arguments | {"discretization": "euler"})
