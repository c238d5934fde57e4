"""Calls that are repeated: other values, other memory, other streams and devices than in the call that was recorded."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np
import pytest
import torch

import sscan.torch
from sscan import _plans
from sscan.torch import _arithmetic, _block, mamba
from sscan.torch._arithmetic import is_planned_step


def scan_arguments(seed: int, length: int = 96) -> dict[str, Any]:
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return random.standard_normal(shape).astype(np.float32)

    wave, matrix = (2, 40, length), (2, 16, length)
    return {
        "u": normal(*wave), "delta": normal(*wave), "A": -np.exp(normal(40, 16)), "B": normal(*matrix),
        "C": normal(*matrix), "D": normal(40), "z": normal(*wave), "delta_bias": normal(40), "delta_softplus": True,
    }  # fmt: skip


def moved(arguments: dict[str, Any], move: Any) -> dict[str, Any]:
    return {name: move(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}


LIBRARIES = {
    "cupy": (cupy.asarray, cupy.asnumpy),
    "torch": (lambda x: torch.from_numpy(x).cuda(), lambda x: x.cpu().numpy()),
}


@pytest.fixture
def repeats(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans that are carried out."""
    seen: list[Any] = []
    repeat = _plans.Plan.repeat

    def noted(plan: Any, *arguments: Any) -> Any:
        seen.append(plan)
        return repeat(plan, *arguments)

    monkeypatch.setattr(_plans.Plan, "repeat", noted)
    return seen


@pytest.mark.parametrize("library", LIBRARIES)
def test_repeated_scans_have_their_own_results(library: str, repeats: list[Any]) -> None:
    """Results of earlier calls stay what they were; seven of eight calls are repeated."""
    there, back = LIBRARIES[library]
    problems = [scan_arguments(seed, length=160) for seed in range(8)]
    got = [sscan.selective_scan(**moved(problem, there)) for problem in problems]
    assert len(repeats) >= 7
    for problem, y in zip(problems, got, strict=True):
        np.testing.assert_allclose(back(y), sscan.selective_scan(**problem), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("library", LIBRARIES)
def test_options_of_equal_value_and_another_type_are_still_refused(library: str) -> None:
    there, _ = LIBRARIES[library]
    problem = moved(scan_arguments(0, length=64), there)
    sscan.selective_scan(**problem)
    with pytest.raises(TypeError, match="delta_softplus must be True or False, got 1"):
        sscan.selective_scan(**problem | {"delta_softplus": 1})


def test_what_requires_grad_is_still_refused() -> None:
    problem = moved(scan_arguments(0, length=64), LIBRARIES["torch"][0])
    sscan.selective_scan(**problem)
    problem["u"].requires_grad_()
    with pytest.raises(TypeError, match="u requires grad"):
        sscan.selective_scan(**problem)


@pytest.mark.parametrize("library", LIBRARIES)
def test_one_array_in_two_places(library: str) -> None:
    """Which of two arguments an address was of is not known from a call with one array for both."""
    there, back = LIBRARIES[library]
    first, second = scan_arguments(1, length=48), scan_arguments(2, length=48)
    shared = moved(first, there)
    sscan.selective_scan(**shared | {"z": shared["u"]})
    for problem in (first, second):
        np.testing.assert_allclose(
            back(sscan.selective_scan(**moved(problem, there))), sscan.selective_scan(**problem), rtol=2e-4, atol=2e-5
        )
    shared = moved(second, there)
    y = sscan.selective_scan(**shared | {"z": shared["u"]})
    np.testing.assert_allclose(back(y), sscan.selective_scan(**second | {"z": second["u"]}), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("library", LIBRARIES)
def test_repeated_steps_update_their_own_states(library: str, repeats: list[Any]) -> None:
    there, back = LIBRARIES[library]
    random = np.random.default_rng(0)
    for _ in range(4):
        state, x = random.standard_normal((3, 24, 4)).astype(np.float32), random.standard_normal((3, 24)).astype("f4")
        weight = random.standard_normal((24, 4)).astype(np.float32)
        on_gpu = there(state.copy())
        y = sscan.causal_conv1d_update(there(x), on_gpu, there(weight), None, "silu")
        expected = sscan.causal_conv1d_update(x, state, weight, None, "silu")
        np.testing.assert_allclose(back(y), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(back(on_gpu), state)
    assert len(repeats) >= 3


def test_long_states_of_a_step_move_on_each_time() -> None:
    """What is not only launches of kernels is not repeated."""
    state = np.arange(2 * 8 * 40, dtype=np.float32).reshape(2, 8, 40)
    on_gpu, weight = cupy.asarray(state), np.ones((8, 4), np.float32)
    for step in range(3):
        x = np.full((2, 8), step, np.float32)
        sscan.causal_conv1d_update(cupy.asarray(x), on_gpu, cupy.asarray(weight))
        sscan.causal_conv1d_update(x, state, weight)
    np.testing.assert_array_equal(on_gpu.get(), state)


def test_repeated_in_the_callers_stream() -> None:
    """On another stream, behind work that takes long."""
    problems = [moved(scan_arguments(seed, length=128), torch.from_numpy) for seed in range(3)]
    for problem in problems:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            there = {k: x.cuda() if isinstance(x, torch.Tensor) else x for k, x in problem.items()}
            torch.cuda._sleep(10**8)
            there["u"].mul_(2.0)
            y = sscan.selective_scan(**there)
        stream.synchronize()
        expected = sscan.selective_scan(**problem | {"u": problem["u"] * 2.0})
        torch.testing.assert_close(y.cpu(), expected, rtol=2e-4, atol=2e-5)


def block_and_input(d_model: int, batch: int, length: int, dtype: torch.dtype, seed: int = 0) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    made = sscan.torch.Mamba(d_model, device="cuda", dtype=dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return made, torch.randn(batch, length, d_model, device="cuda", dtype=dtype)


def results_of(made: Any, x: Any, lowered: torch.dtype | None) -> list[Any]:
    """What a block makes of x, and the gradients of x and all parameters."""
    x = x.detach().requires_grad_()
    made.zero_grad(set_to_none=True)
    with torch.autocast("cuda", lowered, enabled=lowered is not None):
        y = made(x)
    torch.manual_seed(7)
    y.backward(torch.randn_like(y))
    return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in made.parameters())]


BLOCKS = {
    "one row": (192, 1, 100, torch.float32, None), "rows": (96, 5, 257, torch.float32, None),
    "autocast": (192, 1, 1000, torch.float32, torch.bfloat16),
    "rows, autocast": (96, 4, 333, torch.float32, torch.float16),
    "large": (768, 3, 64, torch.float32, torch.bfloat16),
    "halves": (192, 2, 512, torch.bfloat16, None), "one row of halves": (64, 1, 77, torch.float16, None),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_a_repeated_block_is_that_of_pytorchs_ops(
    name: str, repeats: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other values than those of the recorded call; its error is no more than twice that of PyTorch's ops."""
    *kind, lowered = BLOCKS[name]
    results_of(*block_and_input(*kind), lowered)
    repeats.clear()
    made, x = block_and_input(*kind, seed=1)
    ours = results_of(made, x, lowered)
    assert len(repeats) == 2, "the forward and the backward"
    monkeypatch.setattr(_block, "is_planned", lambda *_: False)
    theirs = results_of(made, x, lowered)
    assert len(repeats) > 2
    exact = results_of(made.double(), x.double(), None)
    for ours_, theirs_, right in zip(ours, theirs, exact, strict=True):
        assert (ours_.dtype, ours_.shape) == (theirs_.dtype, theirs_.shape)
        error, other = (float((y.double() - right).norm() / right.norm()) for y in (ours_, theirs_))
        assert error <= 2 * other + 1e-6


def test_a_block_repeats_in_less_memory_than_its_parts(repeats: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = block_and_input(768, 8, 1024, torch.float32)

    def peak() -> int:
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            results_of(made, x, torch.bfloat16)
        return int(torch.cuda.max_memory_allocated())

    ours = peak()
    assert repeats
    monkeypatch.setattr(_block, "is_planned", lambda *_: False)
    assert ours <= peak()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 7])
def test_a_repeated_step_is_that_of_pytorchs_ops(
    batch: int, dtype: torch.dtype, repeats: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, x = block_and_input(96, batch, 6, dtype)
    runs = []
    with torch.no_grad():
        for planned in (True, False):
            monkeypatch.setattr(mamba, "is_planned_step", is_planned_step if planned else lambda *_: False)
            states = made.allocate_inference_cache(batch, 6)
            runs.append([torch.cat([made.step(x[:, t : t + 1], *states)[0] for t in range(6)], 1), *states])
            assert len(repeats) >= 5
            if planned:
                assert len(repeats) == 5, "all of a step but the first"
        exact = made.double()(x.double())
    error, other = (float((run[0].double() - exact).norm() / exact.norm()) for run in runs)
    assert error <= 2 * other + 1e-6
    assert states[0]._version > 0


def test_no_plan_where_products_are_to_be_others() -> None:
    """TF32, say: a plan would not know."""
    torch.set_float32_matmul_precision("high")
    try:
        assert not _arithmetic.are_cublas(torch.float32)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert _arithmetic.are_cublas(torch.float32)
