"""A sequence scanned in pieces that are put together by summaries, on any lane, beside the whole of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from cases import Arguments, Array, assert_within, cotangents, eps_of, scan_problem, upcast

from sscan import reference
from sscan.selective_scan import (
    selective_scan_backward,
    selective_scan_backward_summary,
    selective_scan_forward,
    selective_scan_summary,
    selective_scan_through,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    Move = Callable[[Any], Any]

LENGTHS = (134, 0, 7, 70)
PROBLEMS: dict[str, dict[str, Any]] = {
    "base": {"dim": 5},
    "two rows, 17 states": {"batch": 2, "dim": 3, "state": 17},
    "float64, groups": {"dtype": "float64", "dim": 6, "B": "2", "C": "1"},
    "bfloat16, constant C": {"dtype": "bfloat16", "dim": 5, "C": "constant"},
    "complex": {"is_complex": True, "dim": 5},
    "complex float64, no bias": {"is_complex": True, "dtype": "float64", "dim": 3, "delta_bias": False},
    "complex arrays, constant B, zoh": {
        "is_complex": True, "dim": 5, "B": "constant", "C": "shared complex", "discretization": "zoh"
    },
    "bare, slow decay": {
        "dim": 5, "D": False, "z": False, "delta": "positive", "delta_bias": False, "delta_softplus": False,
        "A_scale": 0.01,
    },
    "no decay": {"dim": 5, "A_scale": 0.0},
}  # fmt: skip


def itself(x: Any) -> Any:
    return x


def pieces(arguments: Arguments, lengths: tuple[int, ...]) -> list[Arguments]:
    """The problem cut along time; D and the like, and options, are in all pieces."""
    found, begin, planes = [], 0, 2 if arguments["A"].dtype.kind == "c" else 1
    for length in lengths:
        piece = dict(arguments)
        for name, x in arguments.items():
            if isinstance(x, np.ndarray) and x.ndim > 2:
                reals = planes if name in "BC" and x.dtype.kind != "c" else 1
                piece[name] = x[..., reals * begin : reals * (begin + length)]
        found.append(piece)
        begin += length
    return found


def scanned_in_pieces(
    arguments: Arguments, given: dict[str, Array], lengths: tuple[int, ...], there: Move = itself, home: Move = itself
) -> dict[str, Array]:
    """y, the last state and all gradients, each piece scanned on its own, as the ranks of a group do it.

    ``there`` moves an array of NumPy to the lane, ``home`` one of the lane's back.
    """
    outside, dlast_state = there(arguments["initial_state"]), there(given["dlast_state"])
    of_time = {name: x for name, x in arguments.items() if name != "initial_state"}
    cut = [
        {name: there(x) if isinstance(x, np.ndarray) else x for name, x in piece.items()}
        for piece in pieces({**of_time, "dy": given["dy"]}, lengths)
    ]
    A, made, passages = cut[0]["A"], [], []
    for piece in cut:
        dy, options = piece.pop("dy"), piece
        summary = selective_scan_summary(**options, initial_state=None if passages else outside)
        state = selective_scan_through(A, np.stack(passages)) if passages else outside
        y, _, checkpoints = selective_scan_forward(**options, initial_state=state, parts=summary.parts)
        made.append(SimpleNamespace(dy=dy, options=options, state=state, y=y, checkpoints=checkpoints))
        passages.append(summary.passage)
    last_state, passages, gradients = selective_scan_through(A, np.stack(passages)), [], []
    for piece in reversed(made):
        summary = selective_scan_backward_summary(
            piece.dy, **piece.options, dlast_state=None if passages else dlast_state
        )
        gradients.append(
            selective_scan_backward(
                piece.dy, **piece.options, initial_state=piece.state, checkpoints=piece.checkpoints,
                dlast_state=selective_scan_through(A, np.stack(passages), True) if passages else dlast_state,
                parts=summary.parts,
            )
        )  # fmt: skip
        passages.insert(0, summary.passage)
    dinitial_state = selective_scan_through(A, np.stack(passages), True)
    joined = {
        "y": np.concatenate([home(piece.y) for piece in made], -1),
        "last_state": home(last_state),
        "dinitial_state": home(dinitial_state),
    }
    for name in gradients[0]._fields[:-1]:
        if getattr(gradients[0], name) is not None:
            parts = [home(getattr(x, name)) for x in reversed(gradients)]
            joined[name] = np.concatenate(parts, -1) if parts[0].ndim > 2 else sum(parts)
    return joined


def check_pieces(name: str, lengths: tuple[int, ...] = LENGTHS, there: Move = itself, home: Move = itself) -> None:
    """The tolerance rule on all that a problem's pieces give, put together."""
    sizes = {"batch": 1, "state": 4, "length": sum(lengths), **PROBLEMS[name]}
    arguments = scan_problem(np.random.default_rng(0), **sizes, initial_state=True)

    def whole(arguments: Arguments, given: dict[str, Array] | None) -> tuple[dict[str, Array], dict[str, Array]]:
        y, last_state = reference.selective_scan(**arguments, return_last_state=True)
        given = given or cotangents({"y": y, "last_state": last_state})
        gradients = reference.selective_scan_backward(**given, **arguments)._asdict()
        return {"y": y, "last_state": last_state, **{k: x for k, x in gradients.items() if x is not None}}, given

    same, given = whole(arguments, None)
    exact, _ = whole(upcast(arguments), upcast(given))
    found = scanned_in_pieces(arguments, given, lengths, there, home)
    assert set(found) == set(exact)
    for key, x in found.items():
        assert_within(x, same[key], exact[key], eps_of(x.dtype), f"{name}: {key}")


# --- Passages by themselves -------------------------------------------------------------------------------------------

NUMBERS = ("float32", "float64", "complex64", "complex128")


def passages_of(number: str, count: int, *, batch: int = 2, dim: int = 5, state: int = 7) -> tuple[Array, Array]:
    """A and passages; the step sizes leave something of a state, even over several of them."""
    rng, planes = np.random.default_rng(count), 2 if number.startswith("c") else 1
    real = np.dtype(number).type(0).real.dtype
    A = -rng.uniform(0.1, 1, (dim, state)) + (planes - 1) * 1j * rng.normal(size=(dim, state))
    passages = rng.normal(size=(count, batch, dim, planes * state + 1)).astype(real)
    passages[..., -1] = rng.uniform(0, 2, passages.shape[:-1])
    return (A if planes == 2 else A.real).astype(number), passages


def walked(A: Array, passages: Array, back: bool) -> Array:
    """What comes out of all passages, step by step."""
    state = np.zeros((passages.shape[1], *A.shape), A.dtype)
    for passage in passages[::-1] if back else passages:
        decay = np.exp(A * passage[..., -1:])
        own = np.ascontiguousarray(passage[..., :-1]).view(A.dtype)
        state = (decay.conj() if back else decay) * state + own
    return state


def check_through(number: str, count: int, back: bool, there: Move = itself, home: Move = itself) -> None:
    """The tolerance rule for so many passages."""
    A, passages = passages_of(number, count)
    found = home(selective_scan_through(there(A), there(passages), back))
    wide = upcast({"A": A, "passages": passages})
    same, exact = walked(A, passages, back), walked(wide["A"], wide["passages"], back)
    assert (found.shape, found.dtype) == (same.shape, same.dtype)
    assert_within(found, same, exact, eps_of(found.dtype), f"{number}, {count} passages, {back=}")
