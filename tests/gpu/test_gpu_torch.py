"""sscan.torch on CUDA tensors: what test_torch_ops.py checks, and streams, CUDA graphs and the absence of waiting."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_interchange import GPU_CASES
from test_torch_ops import (
    DERIVATIVES,
    UPDATED,
    Arguments,
    block,
    block_inputs,
    check_autocast,
    check_compiled,
    check_derivatives,
    check_is_the_core,
    check_updates_like_the_core,
    differentiable,
    function_of,
    identical,
    loss,
    problem,
)

import sscan.torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cases import Case


def test_fakes_lie_in_memory_as_results_do() -> None:
    """Of inputs with neighbouring channels, which the scan takes as they are."""
    u, delta, z, dy = (torch.randn(2, 40, 24, device="cuda").mT for _ in range(4))
    B, C = (torch.randn(2, 40, 16, device="cuda").mT for _ in range(2))
    A, D, bias = (-torch.rand(24, 16, device="cuda"), *torch.randn(2, 24, device="cuda"))
    scanned = (u, delta, A, B, C, D, z, bias, None, None, None)
    ops = torch.ops.sscan
    y, _, checkpoints = ops.selective_scan(*scanned, True, "mamba", False, True)
    assert y.stride() == u.stride()
    for op, arguments in (
        (ops.selective_scan, (*scanned, True, "mamba", False, True)),
        (ops.selective_scan_backward, (dy, None, *scanned, checkpoints, True, "mamba")),
    ):
        torch.library.opcheck(op.default, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda c: f"{c.op}: {c}")
def test_is_the_core(case: Case) -> None:
    check = check_updates_like_the_core if case.op in UPDATED else check_is_the_core
    check(case, "cuda")


@pytest.mark.parametrize(("op", "options"), DERIVATIVES)
def test_first_and_second_derivatives(op: str, options: Arguments) -> None:
    check_derivatives(op, options, "cuda")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_block_trains_at_every_length(backend: str) -> None:
    check_compiled(backend, (33, 7, 64, 300), "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    check_autocast("cuda", dtype)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # inductor's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 40, 777), (2, 264, 300), (1, 6, 50)], ids=str)
def test_convolution_of_neighbouring_channels(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The same numbers as with neighbouring steps, in memory like the input's, which the compiler knows."""
    batch, dim, length = shape
    x = torch.randn(batch, length, dim, device="cuda", dtype=dtype).mT.requires_grad_()
    weight, bias = torch.randn(dim, 4, device="cuda"), torch.randn(dim, device="cuda")
    dy = torch.randn_like(x)
    compiled = torch.compile(sscan.torch.causal_conv1d, fullgraph=True, backend="inductor")
    made = []
    for function, inputs in (
        (sscan.torch.causal_conv1d, x), (compiled, x),
        (sscan.torch.causal_conv1d, x.detach().contiguous().requires_grad_()),
    ):  # fmt: skip
        y = function(inputs, weight, bias, "silu")
        made.append((y.detach(), *torch.autograd.grad(y, inputs, dy)))
    for found in made[:2]:
        for ours, expected in zip(found, made[2], strict=True):
            torch.testing.assert_close(ours, expected)
            assert ours.stride() == (x.stride() if dim % 4 == 0 else expected.stride())


# --- Streams, graphs and waiting --------------------------------------------------------------------------------------


def gradients(inputs: list[Any]) -> list[Any]:
    return [block(*inputs).detach(), *torch.autograd.grad(block(*inputs), inputs)]


def test_work_is_on_the_current_stream() -> None:
    """On a stream that waits for slow work which makes the inputs; the default stream is not in the way."""
    inputs = block_inputs(200, "cuda")
    late = [torch.zeros_like(x) for x in inputs]
    expected = gradients(inputs)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gradients(inputs)  # so that this stream has memory: taking it from the GPU may wait
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)  # cycles, about half a second
        for x, values in zip(late, inputs, strict=True):
            x.copy_(values.detach())
        found = gradients([x.requires_grad_() for x in late])
        assert not stream.query(), "the host waited"
    stream.synchronize()
    assert all(map(identical, found, expected))


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not see all that waits
        torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("packing", [{}, {"seq_idx": "int32"}, {"batch": 1, "cu_seqlens": (0, 3, 3, 20)}], ids=str)
@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d"])
def test_nothing_waits(op: str, packing: Arguments, request: pytest.FixtureRequest) -> None:
    function, inputs = function_of(op, problem(op, "cuda", dim=4, length=20, initial_state=True, **packing))
    request.getfixturevalue("no_waiting")
    first = torch.autograd.grad(loss(function(*inputs)), inputs, create_graph=True)
    torch.autograd.grad(sum(loss(x) for x in first), inputs)


def test_graph_of_a_training_step() -> None:
    """Captured once, replayed on other values: forward, backward and the optimiser's step."""
    inputs = block_inputs(100, "cuda")
    parameters = [x for x in inputs if x.ndim < 3]

    def step() -> None:
        for x in inputs:
            x.grad = None
        (block(*inputs) / 1e4).backward()
        with torch.no_grad():
            for x in parameters:
                x -= 1e-3 * x.grad

    values = [x.detach().clone() for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()

    def after(run: Any) -> list[Any]:
        with torch.no_grad():
            for x, start in zip(inputs, values, strict=True):
                x.copy_(1.5 * start)
        for _ in range(3):
            run()
        return [x.detach().clone() for x in inputs]

    assert all(map(identical, after(graph.replay), after(step)))


def test_results_come_from_the_allocator_of_pytorch() -> None:
    arguments = problem("selective_scan", "cuda", length=1000)
    sscan.torch.selective_scan(**arguments)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = sscan.torch.selective_scan(**arguments)
    assert torch.cuda.memory_allocated() - before >= y.nbytes
    del y
    assert torch.cuda.memory_allocated() == before


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", differentiable(problem("selective_scan")))
def test_mixed_devices_are_named(name: str) -> None:
    arguments = problem("selective_scan", "cuda")
    first = "delta" if name == "u" else name
    with pytest.raises(TypeError, match=rf"^selective_scan: all arrays must .*{first} is a PyTorch array on"):
        sscan.torch.selective_scan(**arguments | {name: arguments[name].cpu()})
