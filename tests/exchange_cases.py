"""A sequence scanned in pieces that hand on passages, on any lane, beside the whole of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from cases import Arguments, Array, assert_within, cotangents, eps_of, scan_problem, upcast

from sscan import reference
from sscan.selective_scan import selective_scan_backward, selective_scan_forward

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


class Chain:
    """An exchange of pieces that are scanned one after the other: each gets the passages of those before it."""

    def __init__(self, *, back: bool = False) -> None:
        self.passages: list[Any] = []
        self.back = back

    def __call__(self, passage: Any) -> Any:
        before = np.stack(self.passages) if self.passages else None
        self.passages.insert(0 if self.back else len(self.passages), passage)
        return before


def scanned_in_pieces(
    arguments: Arguments, given: dict[str, Array], lengths: tuple[int, ...], there: Move = itself, home: Move = itself
) -> dict[str, Array]:
    """y, the last state and all gradients, each piece scanned on its own, as the ranks of a group do it.

    ``there`` moves an array of NumPy to the lane, ``home`` one of the lane's back.
    """
    of_time = {name: x for name, x in arguments.items() if name != "initial_state"}
    cut = [
        {name: there(x) if isinstance(x, np.ndarray) else x for name, x in piece.items()}
        for piece in pieces({**of_time, "dy": given["dy"]}, lengths)
    ]
    cut[0]["initial_state"] = there(arguments["initial_state"])
    made, gradients, chain = [], [], Chain()
    for piece in cut:
        inputs = {name: x for name, x in piece.items() if name != "dy"}
        made.append(selective_scan_forward(**inputs, exchange=chain))
    chain, dlast_state = Chain(back=True), there(given["dlast_state"])
    for piece, (_, _, checkpoints) in zip(reversed(cut), reversed(made), strict=True):
        gradients.append(
            selective_scan_backward(**piece, dlast_state=dlast_state, checkpoints=checkpoints, exchange=chain)
        )
        dlast_state = None
    joined = {
        "y": np.concatenate([home(y) for y, _, _ in made], -1),
        "last_state": home(made[-1][1]),
        "dinitial_state": home(gradients[-1].dinitial_state),
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


def walked(A: Array, passages: Array, back: bool, state: Array) -> Array:
    """What comes out of all passages, step by step, and a state behind them."""
    through = np.zeros_like(state)
    for passage in passages[::-1] if back else passages:
        decay = np.exp(A * passage[..., -1:])
        own = np.ascontiguousarray(passage[..., :-1]).view(A.dtype)
        through = (decay.conj() if back else decay) * through + own
    return through + state


def through(A: Any, passages: Any, back: bool, state: Any, empty: Any) -> Any:
    """The same by a scan of no steps; ``empty`` is (batch, dim, 0), in the real dtype."""
    arguments = {"u": empty, "delta": empty, "A": A, "B": A, "C": A}
    _, last_state, checkpoints = selective_scan_forward(
        **arguments, initial_state=None if back else state, exchange=None if back else lambda _: passages
    )
    if not back:
        return last_state
    return selective_scan_backward(
        empty, **arguments, initial_state=state, dlast_state=state, checkpoints=checkpoints, exchange=lambda _: passages
    ).dinitial_state


def check_through(number: str, count: int, back: bool, there: Move = itself, home: Move = itself) -> None:
    """The tolerance rule for so many passages."""
    A, passages = passages_of(number, count)
    state = passages_of(number, count + 1)[1][0, ..., :-1].copy().view(number)
    empty = np.zeros((*state.shape[:2], 0), passages.dtype)
    found = home(through(there(A), there(passages), back, there(state), there(empty)))
    wide = upcast({"A": A, "passages": passages, "state": state})
    same = walked(A, passages, back, state)
    exact = walked(wide["A"], wide["passages"], back, wide["state"])
    assert (found.shape, found.dtype) == (same.shape, same.dtype)
    assert_within(found, same, exact, eps_of(found.dtype), f"{number}, {count} passages, {back=}")
