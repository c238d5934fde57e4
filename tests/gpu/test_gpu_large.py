"""Long sequences and more than 2^31 elements on a GPU, against runs of pieces: a minute, and 60 GB of its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cupy
import ml_dtypes
import numpy as np
import pytest
from cases import eps_of

import sscan

if TYPE_CHECKING:
    from collections.abc import Iterator

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
WAVES, OF_TIME, PARAMETERS = ("u", "delta", "z"), ("B", "C"), ("A", "D", "delta_bias")
LONG = (1, 64, 2**20)
CHUNK = 2**18
LARGE = (2, 1024, 1048640)  # 2^31 + 131072 elements
TAIL, LAST = 4096, 1024  # steps at an end that are run on their own; those of them that the past cannot reach
CHANNELS = 4


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """All of the GPU's, and given back."""
    cupy.get_default_memory_pool().free_all_blocks()
    yield
    cupy.get_default_memory_pool().free_all_blocks()


def normals(generator: Any, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> Any:
    """In pieces: a generator may not count beyond 2^31, and its float32 numbers need memory, too."""
    x = cupy.empty(shape, dtype)
    for row in range(shape[0]):
        for first in range(0, shape[1], 64):
            part = x[row, first : first + 64]
            part[...] = generator.standard_normal(part.shape, dtype=cupy.float32) * np.float32(scale)
    return x


def problem_of(shape: tuple[int, int, int], dtype: Any, state: int) -> dict[str, Any]:
    """Step sizes of about 0.1 and A of -1 and less: what was hundreds of steps ago is forgotten to the last bit."""
    generator = cupy.random.RandomState(0)
    batch, dim, length = shape
    real = np.float64 if np.dtype(dtype) == np.float64 else np.float32
    problem: dict[str, Any] = {name: normals(generator, shape, dtype, 0.5) for name in WAVES}
    problem |= {name: normals(generator, (batch, state, length), dtype) for name in OF_TIME}
    rng = np.random.default_rng(0)
    problem["A"] = cupy.asarray(-np.arange(1, state + 1) * rng.uniform(1, 1.3, (dim, 1)), dtype=real)
    problem["D"] = cupy.asarray(rng.standard_normal(dim), dtype=real)
    problem["delta_bias"] = cupy.asarray(rng.uniform(-3, -1, dim), dtype=real)
    return {**problem, "delta_softplus": True}


def wide(values: dict[str, Any]) -> dict[str, Any]:
    """The same stored values in float64."""
    return {name: x.astype(np.float64) if isinstance(x, cupy.ndarray) else x for name, x in values.items()}


def at(problem: dict[str, Any], times: slice) -> dict[str, Any]:
    return {name: x[..., times] if name in WAVES + OF_TIME else x for name, x in problem.items()}


def of_channels(problem: dict[str, Any], channels: slice) -> dict[str, Any]:
    waves = {name: problem[name][:, channels] for name in WAVES}
    return {**problem, **waves, **{name: problem[name][channels] for name in PARAMETERS}}


def everything(problem: dict[str, Any], dy: Any, dlast_state: Any = None) -> dict[str, Any]:
    """y, the last state and all gradients."""
    y, last_state, checkpoints = sscan.selective_scan_forward(**problem)
    gradients = sscan.selective_scan_backward(dy, **problem, dlast_state=dlast_state, checkpoints=checkpoints)
    results = {"y": y, "last_state": last_state, **gradients._asdict()}
    return {name: x for name, x in results.items() if x is not None}


def in_chunks(problem: dict[str, Any], dy: Any, dlast_state: Any, chunk: int) -> dict[str, Any]:
    """The same from runs of ``chunk`` steps: states are carried forwards, their gradients backwards."""
    length = problem["u"].shape[2]
    state = cupy.zeros((problem["u"].shape[0], *problem["A"].shape), problem["A"].dtype)
    pieces, states = [], []
    for first in range(0, length, chunk):
        part = {**at(problem, slice(first, first + chunk)), "initial_state": state}
        y, state = sscan.selective_scan(**part, return_last_state=True)
        pieces.append({"y": y})
        states.append(part["initial_state"])
    last_state, gradient = state, dlast_state
    for i in reversed(range(len(pieces))):
        times = slice(i * chunk, (i + 1) * chunk)
        part = {**at(problem, times), "initial_state": states[i]}
        results = sscan.selective_scan_backward(dy[..., times], **part, dlast_state=gradient)
        pieces[i] |= results._asdict()
        gradient = pieces[i].pop("dinitial_state")
    joined = {}
    for name in list(pieces[0]):
        parts = [piece.pop(name) for piece in pieces]
        over_time = parts[0].ndim == 3
        joined[name] = cupy.concatenate(parts, axis=-1) if over_time else sum(parts[1:], parts[0])
    return {**joined, "last_state": last_state}


def error_of(x: Any, exact: Any) -> float:
    """max|x - exact| / max(1, max|exact|); nan if x is not finite."""
    difference = cupy.abs(x.astype(np.float64) - exact.astype(np.float64)).max()
    return float(difference) / max(1.0, float(cupy.abs(exact.astype(np.float64)).max()))


def assert_close(results: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Sums over two million steps are rounded in another order; bfloat16 is float32 rounded once more."""
    for name, x in expected.items():
        assert results[name].shape == x.shape, name
        error, eps = error_of(results[name], x), eps_of(results[name].dtype)
        allowed = 2000 if name in ("dA", "dD", "ddelta_bias") else 2 if x.dtype == BFLOAT16 else 64
        assert error <= allowed * eps, f"{where} {name}: {error / eps:.1f} eps"


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=["float32", "bfloat16"])
def test_a_million_steps(dtype: Any) -> None:
    """As exact as a run in chunks of a float64 run's results, gradients with a gradient of the last state included."""
    problem = problem_of(LONG, dtype, 16)
    generator = cupy.random.RandomState(1)
    dy = normals(generator, LONG, dtype)
    dlast_state = normals(generator, (LONG[0], *problem["A"].shape), np.float32)
    exact = everything(wide(problem), dy.astype(np.float64), dlast_state.astype(np.float64))
    whole, chunked = everything(problem, dy, dlast_state), in_chunks(problem, dy, dlast_state, CHUNK)
    assert sorted(whole) == sorted(chunked)
    for name, x in exact.items():
        eps, error = eps_of(whole[name].dtype), error_of(whole[name], x)
        of_chunks = error_of(chunked[name], x)
        assert of_chunks < 0.01, name
        assert error <= 5 * of_chunks + 4 * eps, f"{name}: {error / eps:.1f} eps, in chunks {of_chunks / eps:.1f}"


def test_float64_in_chunks_is_the_whole() -> None:
    problem = problem_of((1, 16, LONG[2] // 4), np.float64, 16)
    generator = cupy.random.RandomState(1)
    dy = normals(generator, problem["u"].shape, np.float64)
    dlast_state = normals(generator, (1, *problem["A"].shape), np.float64)
    whole, chunked = everything(problem, dy, dlast_state), in_chunks(problem, dy, dlast_state, CHUNK // 4 + 1)
    for name, x in whole.items():
        assert error_of(chunked[name], x) < 1e-12, name


def test_more_than_two_to_the_31_elements() -> None:
    """Both ends of time for all channels, and all of time for the first and last channels, are what they are alone."""
    problem = problem_of(LARGE, BFLOAT16, 16)
    length, dim = LARGE[2], LARGE[1]
    assert problem["u"].size > 2**31
    dy = normals(cupy.random.RandomState(1), LARGE, BFLOAT16)
    results = everything(problem, dy)

    # The end: gradients come from there alone; states, and so dC and y, forget the steps before it.
    last = everything(at(problem, slice(length - TAIL, None)), dy[..., length - TAIL :])
    names = ("y", "du", "dz", "ddelta", "dB", "dC")
    assert_close(
        {name: results[name][..., length - LAST :] for name in names} | {"last_state": results["last_state"]},
        {name: last[name][..., TAIL - LAST :] for name in names} | {"last_state": last["last_state"]},
        "at the end:",
    )
    del last

    # The beginning: y, which only the past decides, and gradients, which forget what comes later.
    first = everything(at(problem, slice(0, TAIL)), dy[..., :TAIL])
    assert_close(
        {name: results[name][..., :LAST] for name in names}, {name: first[name][..., :LAST] for name in names},
        "at the beginning:",
    )  # fmt: skip
    del first

    # Whole channels, in chunks: the very first ones, those in the middle, and the last, where element 2^31 is.
    for channels in (slice(0, CHANNELS), slice(dim // 2, dim // 2 + CHANNELS), slice(dim - CHANNELS, dim)):
        alone = in_chunks(of_channels(problem, channels), dy[:, channels], None, length // 4)
        alone = {name: x for name, x in alone.items() if name not in ("dB", "dC")}
        of_them = {name: results[name][channels] if name in ("dA", "dD", "ddelta_bias") else results[name][:, channels]
                   for name in alone}  # fmt: skip
        assert_close(of_them, alone, f"{channels}")
