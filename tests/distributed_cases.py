"""Runs ``distributed_worker.py`` on every rank of a group, and compares what came of it with the reference."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from cases import Arguments, Array, assert_within, eps_of, upcast
from distributed_worker import STATES, gradients_of_results, part, problem_of

from sscan import reference

WORKER = Path(__file__).parent / "distributed_worker.py"


def run_ranks(size: int, *command: str, seconds: int = 500) -> list[str]:
    """What a Python script wrote as each of the ranks, which run side by side; all must succeed, without warnings."""
    processes = []
    for rank in range(size):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "error", *command], env={**os.environ, **place}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    written = []
    try:
        for process in processes:
            written.append(process.communicate(timeout=seconds)[0])
            assert process.returncode == 0, written[-1]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return written


def solved(backend: str, folder: Path, size: int) -> list[dict[Any, Any]]:
    """The results of every rank."""
    run_ranks(size, str(WORKER), backend, str(folder))
    return [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(size)]


def joined(op: str, of_ranks: list[dict[str, Array]]) -> dict[str, Array]:
    """The sequence's results: along time one after the other, of what all ranks have the sum, all states."""
    found = {}
    for name, first in of_ranks[0].items():
        arrays = [results[name] for results in of_ranks if name in results]
        if name in (STATES[op], "dinitial_state"):
            found[name] = np.stack(arrays)
        elif first.ndim > 2:
            found[name] = np.concatenate(arrays, -1)
        else:
            wide = first.dtype if first.dtype.kind == "c" else np.result_type(first.dtype, np.float64)
            found[name] = np.asarray(sum(x.astype(wide) for x in arrays)).astype(first.dtype)
    return found


def expected(op: str, problem: Arguments, given: dict[str, Array], lengths: tuple[int, ...]) -> dict[str, Array]:
    """The same from the reference, one part after the other; the state after every part has the same gradient."""
    state_name, made, found = STATES[op], [], []
    state = problem.get("initial_state")
    for rank in range(len(lengths)):
        piece = {name: part(name, x, problem, lengths, rank) for name, x in problem.items()}
        dy = part("dy", given["dy"], problem, lengths, rank)
        y, after = getattr(reference, op)(**{**piece, "initial_state": state, f"return_{state_name}": True})
        made.append((dy, {**piece, "initial_state": state}, y, after))
        state = after
    behind = 0
    for dy, piece, y, after in reversed(made):
        of_state = {f"d{state_name}": (given[f"d{state_name}"] + behind).astype(after.dtype)}
        gradients = getattr(reference, f"{op}_backward")(dy, **piece, **of_state)._asdict()
        behind = gradients["dinitial_state"]
        if piece is not made[0][1]:
            del gradients["dinitial_state"]
        found.append({"y": y, state_name: after, **{name: x for name, x in gradients.items() if x is not None}})
    return joined(op, found[::-1])


def check(op: str, name: str, lengths: tuple[int, ...], of_ranks: list[dict[Any, Any]]) -> None:
    """The tolerance rule on every result and every gradient."""
    problem = problem_of(op, name, sum(lengths))
    given = gradients_of_results(op, problem)
    same, exact = expected(op, problem, given, lengths), expected(op, upcast(problem), upcast(given), lengths)
    found = joined(op, [results[op, name, lengths] for results in of_ranks])
    assert set(found) == set(exact)
    for key, x in found.items():
        assert_within(x, same[key], exact[key], eps_of(same[key].dtype), f"{op} {name} {lengths}: {key}")
