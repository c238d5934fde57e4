"""A sequence scanned in pieces that hand on carries, on any lane, beside the whole of it."""

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
    """State passing between pieces that are scanned one after the other: each gets the carries of those before it."""

    def __init__(self, *, back: bool = False) -> None:
        self.carries: list[Any] = []
        self.back = back

    def __call__(self, carry: Any) -> Any:
        before = np.stack(self.carries) if self.carries else None
        self.carries.insert(0 if self.back else len(self.carries), carry)
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
        made.append(selective_scan_forward(**inputs, state_passing=chain))
    chain, dlast_state = Chain(back=True), there(given["dlast_state"])
    for piece, (_, _, checkpoints) in zip(reversed(cut), reversed(made), strict=True):
        gradients.append(
            selective_scan_backward(**piece, dlast_state=dlast_state, checkpoints=checkpoints, state_passing=chain)
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


# --- Carries by themselves -------------------------------------------------------------------------------------------

NUMBERS = ("float32", "float64", "complex64", "complex128")


def carries_of(number: str, count: int, *, batch: int = 2, dim: int = 5, state: int = 7) -> tuple[Array, Array]:
    """A and carries; the step sizes leave something of a state, even over several of them."""
    rng, planes = np.random.default_rng(count), 2 if number.startswith("c") else 1
    real = np.dtype(number).type(0).real.dtype
    A = -rng.uniform(0.1, 1, (dim, state)) + (planes - 1) * 1j * rng.normal(size=(dim, state))
    carries = rng.normal(size=(count, batch, dim, planes * state + 1)).astype(real)
    carries[..., -1] = rng.uniform(0, 2, carries.shape[:-1])
    return (A if planes == 2 else A.real).astype(number), carries


def walked(A: Array, carries: Array, back: bool, state: Array) -> Array:
    """The prefix of all carries, step by step, and a state after them."""
    prefix = np.zeros_like(state)
    for carry in carries[::-1] if back else carries:
        decay = np.exp(A * carry[..., -1:])
        own = np.ascontiguousarray(carry[..., :-1]).view(A.dtype)
        prefix = (decay.conj() if back else decay) * prefix + own
    return prefix + state


def prefix(A: Any, carries: Any, back: bool, state: Any, empty: Any) -> Any:
    """The same by a scan of no steps; ``empty`` is (batch, dim, 0), in the real dtype."""
    arguments = {"u": empty, "delta": empty, "A": A, "B": A, "C": A}
    _, last_state, checkpoints = selective_scan_forward(
        **arguments, initial_state=None if back else state, state_passing=None if back else lambda _: carries
    )
    if not back:
        return last_state
    arguments |= {"initial_state": state, "dlast_state": state, "checkpoints": checkpoints}
    return selective_scan_backward(empty, **arguments, state_passing=lambda _: carries).dinitial_state


def check_prefix(number: str, count: int, back: bool, there: Move = itself, home: Move = itself) -> None:
    """The tolerance rule for so many carries."""
    A, carries = carries_of(number, count)
    state = carries_of(number, count + 1)[1][0, ..., :-1].copy().view(number)
    empty = np.zeros((*state.shape[:2], 0), carries.dtype)
    found = home(prefix(there(A), there(carries), back, there(state), there(empty)))
    wide = upcast({"A": A, "carries": carries, "state": state})
    same = walked(A, carries, back, state)
    exact = walked(wide["A"], wide["carries"], back, wide["state"])
    assert (found.shape, found.dtype) == (same.shape, same.dtype)
    assert_within(found, same, exact, eps_of(found.dtype), f"{number}, {count} carries, {back=}")
