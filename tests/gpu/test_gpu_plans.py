"""Calls that are repeated: other values, other memory, other streams and devices than in the call that was recorded."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np
import pytest
import torch

import sscan
from sscan import _plans


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
