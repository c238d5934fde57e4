"""State passing: what makes one sequence of parts that are scanned on their own, both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from cases import scan_problem
from state_passing_cases import NUMBERS, PROBLEMS, Chain, check_pieces, check_prefix, prefix, scanned_in_pieces

from sscan.cuda import selective_scan as cuda
from sscan.selective_scan import selective_scan_backward, selective_scan_forward
from sscan.testing import patched

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=["cpu", "cuda", "cuda, uncut"], autouse=True)
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The CPU's kernels, or the GPU's in the emulator: with parts of 32 steps, or as if it had work enough."""
    if request.param == "cpu":
        yield request.param
        return
    cuda._plans.clear()
    if request.param == "cuda, uncut":
        monkeypatch.setattr(cuda, "RESIDENT", 0)
        monkeypatch.setattr(cuda, "RESIDENT_BACKWARD", 0)
    with patched():
        yield request.param
    cuda._plans.clear()


@pytest.mark.parametrize("name", PROBLEMS)
def test_pieces_are_the_whole(name: str) -> None:
    check_pieces(name)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("number", NUMBERS)
def test_prefix_of_carries(number: str, count: int, back: bool) -> None:
    check_prefix(number, count, back)


def test_a_carry_holds_the_last_state_and_the_sum_of_step_sizes() -> None:
    arguments = scan_problem(
        np.random.default_rng(1), batch=2, dim=5, state=3, length=100, A_scale=0.01, delta="positive",
        delta_softplus=False, initial_state=True,
    )  # fmt: skip
    chain = Chain()
    _, last_state, _ = selective_scan_forward(**arguments, state_passing=chain)
    (carry,) = chain.carries
    assert carry.shape == (2, 5, 4)
    np.testing.assert_allclose(carry[..., :-1], last_state, rtol=1e-5, atol=1e-5)
    sums = (arguments["delta"] + arguments["delta_bias"][:, None]).astype(np.float64).sum(-1)
    np.testing.assert_allclose(carry[..., -1], sums, rtol=1e-5)


def test_launches(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one costs the host time: two more for a carry, which "ends" and "starts" are of if parts are cut."""
    seen: list[str] = []
    arguments = scan_problem(np.random.default_rng(0), batch=1, dim=5, state=4, length=100)
    carries = np.zeros((3, 1, 5, 5), np.float32)
    with monkeypatch.context() as patch:  # what the lane puts back afterwards is its own
        patch.setattr("sscan.cuda._launch.launch", lambda kernel, *_: seen.append(kernel.factory))
        _, _, checkpoints = selective_scan_forward(**arguments, state_passing=lambda _: carries)
        forward = seen.copy()
        seen.clear()
        selective_scan_backward(arguments["u"], **arguments, checkpoints=checkpoints, state_passing=lambda _: carries)
    assert forward == ([] if lane == "cpu" else ["ends", "prefix", "prefix", "forward"])
    assert seen[:4] == ([] if lane == "cpu" else ["starts", "prefix", "prefix", "backward"])


def test_no_parts_before() -> None:
    """None and an empty array of carries are the same."""
    arguments = scan_problem(np.random.default_rng(0), batch=1, dim=5, state=4, length=10, initial_state=True)
    alone, _, _ = selective_scan_forward(**arguments)
    for nothing in (None, np.zeros((0, 1, 5, 5), np.float32)):
        y, _, _ = selective_scan_forward(**arguments, state_passing=lambda _, nothing=nothing: nothing)
        np.testing.assert_allclose(y, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["u", "delta", "B", "dy", "C", "z"])
def test_what_is_not_finite_reaches_all_pieces(name: str) -> None:
    """However long ago it was, and however fast states decay; and no other channel."""
    arguments = scan_problem(np.random.default_rng(0), batch=1, dim=3, state=4, length=350, A_scale=30.0)
    given = {"dy": np.ones_like(arguments["u"])}
    back = name in ("dy", "C", "z")
    changed = given if back and name == "dy" else arguments
    changed[name] = changed[name].copy()
    changed[name][0, 0, 340 if back else 3] = np.nan
    given["dlast_state"] = np.zeros((1, 3, 4), np.float32)
    arguments["initial_state"] = np.zeros((1, 3, 4), np.float32)
    found = scanned_in_pieces(arguments, given, (300, 50) if not back else (50, 300))
    whole = np.isnan(found["du"][0, 0, :340]).all() if back else np.isnan(found["y"][0, 0, 3:]).all()
    assert whole
    state = found["dinitial_state"] if back else found["last_state"]
    assert np.isnan(state[0, 0]).any()
    if name not in ("B", "C"):
        assert np.isfinite(state[0, 1:]).all()
        assert np.isfinite(found["y"][0, 1:]).all()


@pytest.mark.parametrize("back", [False, True])
def test_a_state_that_grows_is_passed_on(back: bool) -> None:
    """e^120 of it is infinite: of nothing it makes nothing, and of 1e-30 a number. Then it shrinks again."""
    A, carries = np.ones((2, 1), np.float32), np.zeros((3, 1, 2, 2), np.float32)
    carries[2, 0, 0, 0], carries[0, 0, 1, 0] = 0.25, 1e-30
    carries[:, 0, :, 1] = np.array([0, 120, -120])[:, None]
    carries = np.ascontiguousarray(carries[::-1]) if back else carries
    found = prefix(A, carries, back, np.zeros((1, 2, 1), np.float32), np.zeros((1, 2, 0), np.float32))
    np.testing.assert_allclose(found[0, :, 0], [0.25, 1e-30], rtol=1e-4)


@pytest.mark.parametrize("size", [(0, 5), (2, 0)])
def test_no_channels(size: tuple[int, int]) -> None:
    batch, dim = size
    arguments = scan_problem(np.random.default_rng(0), batch=batch, dim=dim, state=4, length=10)
    carries = np.zeros((2, batch, dim, 5), np.float32)
    _, last_state, _ = selective_scan_forward(**arguments, state_passing=lambda _: carries)
    assert last_state.shape == (batch, dim, 4)


@pytest.mark.parametrize(
    "carries",
    [np.zeros((2, 1, 5, 4), np.float32), np.zeros((1, 5, 5), np.float32), np.zeros((2, 1, 5, 5)),
     np.zeros((2, 1, 5, 10), np.float32)[..., ::2]],
)  # fmt: skip
def test_bad_carries(carries: Any) -> None:
    arguments = scan_problem(np.random.default_rng(0), batch=1, dim=5, state=4, length=10)
    expected = r"state_passing must return contiguous carries, float32 of shape \(parts, 1, 5, 5\), got"
    with pytest.raises(ValueError, match=f"^selective_scan: {expected}"):
        selective_scan_forward(**arguments, state_passing=lambda _: carries)
    _, _, checkpoints = selective_scan_forward(**arguments)
    with pytest.raises(ValueError, match=f"^selective_scan_backward: {expected}"):
        selective_scan_backward(arguments["u"], **arguments, checkpoints=checkpoints, state_passing=lambda _: carries)


def test_what_state_passing_does_not_go_with() -> None:
    arguments = scan_problem(np.random.default_rng(0), batch=1, dim=5, state=4, length=10)
    for name, x in (("seq_idx", np.zeros((1, 10), np.int32)), ("cu_seqlens", np.array([0, 10]))):
        with pytest.raises(ValueError, match=r"^selective_scan: state_passing goes with neither seq_idx nor cu_"):
            selective_scan_forward(**arguments, **{name: x}, state_passing=Chain())
    with pytest.raises(ValueError, match=r"^selective_scan_backward: state_passing needs checkpoints"):
        selective_scan_backward(arguments["u"], **arguments, state_passing=Chain(back=True))
