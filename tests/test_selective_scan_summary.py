"""Summaries of the selective scan: what makes one sequence of parts that are scanned on their own, both ways."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from cases import Arguments, Array, assert_within, cotangents, eps_of, scan_problem, upcast
from emulator import patched

from sscan import reference
from sscan.cuda import selective_scan as cuda
from sscan.selective_scan import (
    selective_scan_backward,
    selective_scan_backward_summary,
    selective_scan_forward,
    selective_scan_summary,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

LENGTHS = (134, 0, 7, 70)
PROBLEMS: dict[str, dict[str, Any]] = {
    "base": {"dim": 5},
    "two rows, 17 states": {"batch": 2, "dim": 3, "state": 17},
    "float64, groups": {"dtype": "float64", "dim": 6, "B": "2", "C": "1"},
    "bfloat16, constant C": {"dtype": "bfloat16", "dim": 5, "C": "constant"},
    "complex": {"is_complex": True, "dim": 5},
    "complex arrays, constant B, zoh": {
        "is_complex": True, "dim": 5, "B": "constant", "C": "shared complex", "discretization": "zoh"
    },
    "bare, slow decay": {
        "dim": 5, "D": False, "z": False, "delta": "positive", "delta_bias": False, "delta_softplus": False,
        "A_scale": 0.01,
    },
    "no decay": {"dim": 5, "A_scale": 0.0},
}  # fmt: skip


@pytest.fixture(params=["cpu", "cuda", "cuda, uncut"], autouse=True)
def _lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU's kernels, or the GPU's in the emulator: with parts from 32 steps on, or as if it had work enough."""
    if request.param == "cpu":
        yield
        return
    cuda._plans.clear()
    monkeypatch.setattr(cuda, "SHORTEST", 32)
    if request.param == "cuda, uncut":
        monkeypatch.setattr(cuda, "RESIDENT", 0)
        monkeypatch.setattr(cuda, "RESIDENT_BACKWARD", 0)
    with patched():
        yield
    cuda._plans.clear()


def pieces(arguments: Arguments) -> list[Arguments]:
    """The problem cut along time; D and the like, and options, are in all pieces."""
    found, begin, planes = [], 0, 2 if arguments["A"].dtype.kind == "c" else 1
    for length in LENGTHS:
        piece = dict(arguments)
        for name, x in arguments.items():
            if isinstance(x, np.ndarray) and x.ndim > 2 and name != "initial_state":
                reals = planes if name in "BC" and x.dtype.kind != "c" else 1
                piece[name] = x[..., reals * begin : reals * (begin + length)]
        found.append(piece)
        begin += length
    return found


def through(summary: Any, A: Array, state: Array, *, back: bool = False) -> Array:
    """What becomes of a state, or of a gradient on the way back."""
    stretches = zip(np.moveaxis(summary.delta_sums, 1, 0), np.moveaxis(summary.states, 1, 0), strict=True)
    for delta_sum, own in reversed(list(stretches)) if back else stretches:
        decay = np.exp(A * delta_sum[..., None])
        state = (decay.conj() if back else decay) * state + own
    return state


def scanned_in_pieces(arguments: Arguments, given: dict[str, Array]) -> dict[str, Array]:
    """y, the last state and all gradients, each piece scanned on its own."""
    state, A = arguments["initial_state"], arguments["A"]
    made, found = [], pieces({**arguments, "dy": given["dy"]})
    for piece in found:
        dy, options = piece.pop("dy"), {k: x for k, x in piece.items() if k != "initial_state"}
        summary = selective_scan_summary(**options)
        y, _, checkpoints = selective_scan_forward(**{**piece, "initial_state": state}, parts=summary.parts)
        made.append(SimpleNamespace(dy=dy, options=options, state=state, y=y, checkpoints=checkpoints))
        state = through(summary, A, state)
    gradient, gradients = given["dlast_state"], []
    for piece in reversed(made):
        summary = selective_scan_backward_summary(piece.dy, **piece.options)
        gradients.append(
            selective_scan_backward(
                piece.dy, **piece.options, dlast_state=gradient, initial_state=piece.state,
                checkpoints=piece.checkpoints, parts=summary.parts,
            )
        )  # fmt: skip
        gradient = through(summary, A, gradient, back=True)
    joined = {"y": np.concatenate([piece.y for piece in made], -1), "last_state": state, "dinitial_state": gradient}
    for name in gradients[0]._fields[:-1]:
        parts = [getattr(x, name) for x in reversed(gradients)]
        if parts[0] is not None:
            joined[name] = np.concatenate(parts, -1) if parts[0].ndim > 2 else sum(parts)
    return joined


@pytest.mark.parametrize("name", PROBLEMS)
def test_pieces_with_summaries_are_the_whole(name: str) -> None:
    rng = np.random.default_rng(0)
    arguments = scan_problem(
        rng, **{"batch": 1, "state": 4, "length": sum(LENGTHS), **PROBLEMS[name]}, initial_state=True
    )

    def whole(arguments: Arguments, given: dict[str, Array] | None) -> tuple[dict[str, Array], dict[str, Array]]:
        y, last_state = reference.selective_scan(**arguments, return_last_state=True)
        given = given or cotangents({"y": y, "last_state": last_state})
        gradients = reference.selective_scan_backward(**given, **arguments)._asdict()
        return {"y": y, "last_state": last_state, **{k: x for k, x in gradients.items() if x is not None}}, given

    same, given = whole(arguments, None)
    exact, _ = whole(upcast(arguments), upcast(given))
    found = scanned_in_pieces(arguments, given)
    assert set(found) == set(exact)
    for key, x in found.items():
        assert_within(x, same[key], exact[key], eps_of(x.dtype), key)
