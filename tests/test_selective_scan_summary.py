"""Summaries of the selective scan: what makes one sequence of parts that are scanned on their own, both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from cases import scan_problem
from emulator import patched
from summary_cases import NUMBERS, PROBLEMS, check_pieces, check_through, passages_of

from sscan.cuda import selective_scan as cuda
from sscan.selective_scan import (
    selective_scan,
    selective_scan_backward_summary,
    selective_scan_summary,
    selective_scan_through,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=["cpu", "cuda", "cuda, uncut"], autouse=True)
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The CPU's kernels, or the GPU's in the emulator: with parts from 32 steps on, or as if it had work enough."""
    if request.param == "cpu":
        yield request.param
        return
    cuda._plans.clear()
    monkeypatch.setattr(cuda, "SHORTEST", 32)
    if request.param == "cuda, uncut":
        monkeypatch.setattr(cuda, "RESIDENT", 0)
        monkeypatch.setattr(cuda, "RESIDENT_BACKWARD", 0)
    with patched():
        yield request.param
    cuda._plans.clear()


@pytest.mark.parametrize("name", PROBLEMS)
def test_pieces_with_summaries_are_the_whole(name: str) -> None:
    check_pieces(name)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("number", NUMBERS)
def test_through_passages(number: str, count: int, back: bool) -> None:
    check_through(number, count, back)


def test_a_passage_holds_the_last_state_and_the_sum_of_step_sizes() -> None:
    arguments = scan_problem(
        np.random.default_rng(1), batch=2, dim=5, state=3, length=100, A_scale=0.01, delta="positive",
        delta_softplus=False, initial_state=True,
    )  # fmt: skip
    passage, _ = selective_scan_summary(**arguments)
    _, last_state = selective_scan(**arguments, return_last_state=True)
    assert passage.shape == (2, 5, 4)
    np.testing.assert_allclose(passage[..., :-1], last_state, rtol=1e-5, atol=1e-5)
    sums = (arguments["delta"] + arguments["delta_bias"][:, None]).astype(np.float64).sum(-1)
    np.testing.assert_allclose(passage[..., -1], sums, rtol=1e-5)


def test_launches(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one costs the host time: two for a summary, one for what comes out of passages."""
    seen: list[str] = []
    arguments = scan_problem(np.random.default_rng(0), batch=1, dim=5, state=4, length=100)
    with monkeypatch.context() as patch:  # what the lane puts back afterwards is its own
        patch.setattr("sscan.cuda._launch.launch", lambda kernel, *_: seen.append(kernel.factory))
        _, parts = selective_scan_summary(**arguments)
        _, back_parts = selective_scan_backward_summary(arguments["u"], **arguments)
        selective_scan_through(*passages_of("float32", 3))
    assert seen == ([] if lane == "cpu" else ["ends", "through", "starts", "through", "through"])
    assert (parts is None, back_parts is None) == (lane != "cuda",) * 2


def test_strided_passages_and_wider_dtypes() -> None:
    A, passages = passages_of("complex64", 3)
    whole = np.repeat(passages.astype(np.float64), 2, axis=2)
    found = selective_scan_through(A, whole[:, :, ::2])
    expected = selective_scan_through(A.astype(np.complex128), passages.astype(np.float64))
    assert found.dtype == np.complex128
    np.testing.assert_array_equal(found, expected)


def test_no_channels() -> None:
    for shape in ((0, 5), (2, 0)):
        A, passages = passages_of("float32", 2, batch=shape[0], dim=shape[1])
        assert selective_scan_through(A, passages).shape == (*shape, 7)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda A, p: (A, p[:0]), ValueError, "passages must be of at least one sequence"),
        (lambda A, p: (A, p[..., 1:]), ValueError, r"passages must have shape \(sequences, batch, dim, state\+1\)"),
        (lambda A, p: (A[1:], p), ValueError, "passages must have shape"),
        (lambda A, p: (A + 1j, p), ValueError, r"passages must have shape \(sequences, batch, dim, 2\*state\+1\)"),
        (lambda A, p: (A, p.astype(np.float16)), TypeError, "passages must have dtype float32 or float64, got float16"),
        (lambda A, p: (A.astype(np.float64), p), TypeError, "A must have dtype float32"),
    ],
)
def test_bad_passages(change: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^selective_scan_through: {message}"):
        selective_scan_through(*change(*passages_of("float32", 2)))


def test_bad_states_are_named_as_in_the_scan() -> None:
    arguments = scan_problem(np.random.default_rng(0), batch=1, dim=5, state=4, length=10)
    states = np.zeros((1, 5, 3), np.float32)
    with pytest.raises(ValueError, match=r"^selective_scan: initial_state must have shape"):
        selective_scan_summary(**arguments, initial_state=states)
    with pytest.raises(ValueError, match=r"^selective_scan_backward: dlast_state must have shape"):
        selective_scan_backward_summary(arguments["u"], **arguments, dlast_state=states)
