"""Vector functions of the CPU kernels: how exact they are, what they do at the ends, and storage of half precision."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numba
import numpy as np
import pytest

from sscan.cpu._tiles import read_row, view, write_row
from sscan.cpu._vector import (
    complex_,
    constant,
    flush_subnormals,
    imag,
    lane_sums,
    load,
    real,
    restore_environment,
    splat,
    store,
    transpose,
)
from sscan.cpu._vector_math import decay, decay_and_change, psi, rate, sigmoid, softplus

Array = np.ndarray[Any, Any]
compiled = numba.njit(error_model="numpy")  # as kernels are, but not kept on disk
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


# --- The functions, evaluated on grids as kernels do ------------------------------------------------------------------


@compiled
def real_functions(z, out):
    """Each row of ``out``: decay(z, rate(1)), both of decay_and_change, softplus, sigmoid, psi."""
    environment = flush_subnormals()
    size = z.size
    rates = np.empty(1, z.dtype)
    rates[0] = rate(1.0)
    for i in range(0, size, 16):
        x, r = load(z, i), splat(rates[0])
        a, change = decay_and_change(x, r)
        store(out, i, decay(x, r))
        store(out, size + i, a)
        store(out, 2 * size + i, change)
        store(out, 3 * size + i, softplus(x))
        store(out, 4 * size + i, sigmoid(x))
        store(out, 5 * size + i, psi(x, a, change))
    restore_environment(environment)


@compiled
def complex_functions(delta, re, im, out):
    """Real and imaginary parts of decay, of both of decay_and_change and of psi, for A = re + i im."""
    environment = flush_subnormals()
    size = delta.size
    for i in range(0, size, 16):
        x = load(delta, i)
        A = complex_(load(re, i), load(im, i))
        r = complex_(real(A) * constant(x, rate(1.0)), imag(A))
        a, change = decay_and_change(x, r)
        same, curve = decay(x, r), psi(x * A, a, change)
        for k, value in enumerate((same, a, change, curve)):
            store(out, 2 * k * size + i, real(value))
            store(out, (2 * k + 1) * size + i, imag(value))
    restore_environment(environment)


REAL = ("decay", "decay too", "change", "softplus", "sigmoid", "psi")
COMPLEX = ("decay", "decay too", "change", "psi")


def points(dtype: Any) -> Array:
    """Dense around 0 and over every magnitude, to both ends of the exponent's range and far beyond."""
    end = 90 if dtype == np.float32 else 715
    small = np.geomspace(1e-38 if dtype == np.float32 else 1e-300, 1, 20000)
    parts = (np.linspace(-end, end, 60000), np.linspace(-1, 1, 20000), small, -small, [0.0], special(dtype))
    z = np.concatenate(parts).astype(dtype)
    return np.append(z, np.zeros(-z.size % 16, dtype))


def special(dtype: Any) -> Array:
    most = float(np.finfo(dtype).max)
    return np.array([-most, -1e30, -1e4, -710.0, -104.0, -88.73, 88.73, 104.0, 200.0, 710.0, 1e4, 1e30, most])


def angles(dtype: Any) -> tuple[Array, Array, Array]:
    """Delta and A with decays from none to all of it, and up to a thousand turns."""
    rng = np.random.default_rng(0)
    size = 2**15
    delta = rng.choice([0.0, 1e-8, 1e-4, 0.01, 0.3, 1.0, 3.0], size) * rng.uniform(0.5, 1, size)
    re = -rng.choice([0.0, 1e-6, 0.5, 1.0, 8.0, 256.0], size) * rng.uniform(0.5, 1, size)
    im = rng.choice([-1.0, 1.0], size) * rng.choice([0.0, 1e-6, 0.5, 3.0, 100.0, 2000.0], size)
    return delta.astype(dtype), re.astype(dtype), (im * rng.uniform(0.5, 1, size)).astype(dtype)


@functools.cache
def evaluated(name: str) -> dict[str, Array]:
    """Results of the functions on their grid, in one dtype: "real float32", "complex float64", ..."""
    kind, _, dtype = name.partition(" ")
    if kind == "real":
        z = points(np.dtype(dtype).type)
        out = np.full(len(REAL) * z.size, np.nan, dtype)
        real_functions(z, out)
        return dict(zip(REAL, out.reshape(len(REAL), -1), strict=True))
    inputs = angles(dtype)
    out = np.full(2 * len(COMPLEX) * inputs[0].size, np.nan, dtype)
    complex_functions(*inputs, out)
    return {key: re + 1j * im for key, (re, im) in zip(COMPLEX, out.reshape(len(COMPLEX), 2, -1), strict=True)}


NAMES = ("real float32", "real float64", "complex float32", "complex float64")


def save(folder: str) -> None:
    """Everything that ``evaluated`` gives; called in a process whose vector code is generated in another way."""
    for name in NAMES:
        np.savez(Path(folder, name), **evaluated(name))


# --- What they should be, in long double ------------------------------------------------------------------------------


def exact_psi(z: Array) -> Array:
    """(z exp(z) - expm1(z)) / z^2, by its series near 0."""
    with np.errstate(all="ignore"):
        closed = (z * np.exp(z) - (np.exp(z) - 1)) / (z * z)
    series, term = np.zeros_like(z), np.ones_like(z)
    near = np.where(np.abs(z) < 1, z, 0)
    for k in range(30):
        series = series + term / (k + 2)
        term = term * near / (k + 1)
    return np.where(np.abs(z) < 1, series, closed)


def exact_real(z: Array) -> dict[str, Array]:
    z = z.astype(np.longdouble)
    with np.errstate(all="ignore"):
        e = np.exp(-np.abs(z))
        sigma = np.where(z >= 0, 1, e) / (1 + e)
        a, change = np.exp(z), np.expm1(z)
        return {"decay": a, "decay too": a, "change": change, "softplus": np.maximum(z, 0) + np.log1p(e),
                "sigmoid": sigma, "psi": exact_psi(z)}  # fmt: skip


def exact_complex(delta: Array, re: Array, im: Array) -> dict[str, Array]:
    p = delta.astype(np.longdouble) * re
    q = delta.astype(np.longdouble) * im
    a = np.exp(p) * (np.cos(q) + 1j * np.sin(q))
    change = np.expm1(p) * np.cos(q) - 2 * np.sin(q / 2) ** 2 + 1j * np.exp(p) * np.sin(q)
    return {"decay": a, "decay too": a, "change": change, "psi": exact_psi(p + 1j * q)}


def relative(x: Array, exact: Array) -> Array:
    """Relative error in units of eps; 0 where both vanish, or are below what is kept (subnormal numbers are not)."""
    info = np.finfo(x.dtype)
    with np.errstate(all="ignore"):
        error = np.abs(x.astype(exact.dtype) - exact) / np.maximum(np.abs(exact), info.tiny) / info.eps
    return np.where(np.abs(exact) > info.max, 0, error).astype(np.float64)


# --- Accuracy ---------------------------------------------------------------------------------------------------------


def grid(dtype: Any) -> tuple[Array, dict[str, Array], dict[str, Array], Array]:
    """Points, results, exact values, and where neither exp(z) nor exp(z) - 1 leaves the normal numbers."""
    z = points(dtype)
    size = np.abs(z.astype(np.float64))
    kept = (size < (86 if dtype == np.float32 else 707)) & ((size > 4 * np.finfo(dtype).tiny) | (size == 0))
    return z, evaluated(f"real {np.dtype(dtype)}"), exact_real(z), kept


@DTYPES
def test_decay_is_accurate(dtype: Any) -> None:
    """Exp(z) as exactly as z, rounded once, allows; exp(z) - 1 to 3 units for z <= 0, however small."""
    z, result, exact, kept = grid(dtype)
    growth = 0.75 * np.abs(z[kept].astype(np.float64))
    for name in ("decay", "decay too"):
        assert (relative(result[name], exact[name])[kept] <= 1.5 + growth).all(), name
        assert np.abs(result[name][z <= 0] - exact[name][z <= 0]).max() <= np.finfo(dtype).eps, name
    assert relative(result["change"], exact["change"])[kept & (z <= 0)].max() <= 3
    assert (relative(result["change"], exact["change"])[kept] <= 3 + growth).all()


@DTYPES
def test_softplus_and_sigmoid_are_accurate(dtype: Any) -> None:
    """To 3 units where they matter; far below zero, where they are exp(z), log2(e) is rounded."""
    z, result, exact, kept = grid(dtype)
    growth = np.where(z < 0, np.abs(z.astype(np.float64)) / 8, 0)
    for name in ("softplus", "sigmoid"):
        assert (relative(result[name], exact[name]) <= 3 + growth)[kept].all(), name
        assert (result[name] <= 2 * np.finfo(dtype).tiny)[z < (-88 if dtype == np.float32 else -709)].all(), name


@DTYPES
def test_psi_is_accurate(dtype: Any) -> None:
    z, result, exact, _ = grid(dtype)
    assert relative(result["psi"], exact["psi"])[(z <= 1) & (z >= -1e4)].max() <= 8


@DTYPES
def test_complex_decay_is_accurate(dtype: Any) -> None:
    """To 3 units for |z| < 1; beyond, the error of z, which is rounded once, grows with it."""
    delta, re, im = angles(dtype)
    result, exact = evaluated(f"complex {np.dtype(dtype)}"), exact_complex(delta, re, im)
    size = np.abs(delta.astype(np.float64) * (re + 1j * im.astype(np.float64)))
    kept = delta * re > (-70 if dtype == np.float32 else -670)  # eps of less is no normal number
    beyond = np.where(size < 1, 0, size)
    for name in ("decay", "decay too"):
        assert (relative(result[name], exact[name]) <= 3 + 2 * beyond)[kept].all(), name
    assert (relative(result["psi"], exact["psi"]) <= 8 + 6 * beyond).all()
    near_turns = np.maximum(np.abs(exact["change"]), np.minimum(size, 1))  # exp(z) - 1 vanishes at whole turns
    error = np.abs(result["change"] - exact["change"]) / np.maximum(near_turns, 1e-300) / np.finfo(dtype).eps
    assert (error <= 3 + 2 * beyond).all()


@DTYPES
def test_ends(dtype: Any) -> None:
    """Exact where it is known, and finite wherever z <= 0."""
    z, result = points(dtype), evaluated(f"real {np.dtype(dtype)}")
    for name, value in (("decay", 1), ("decay too", 1), ("change", 0), ("sigmoid", 0.5), ("psi", 0.5)):
        np.testing.assert_array_equal(result[name][z == 0], value)
    for name, value in (("decay", 0), ("decay too", 0), ("change", -1), ("softplus", 0), ("sigmoid", 0)):
        np.testing.assert_array_equal(result[name][z <= -1e4], value)
    huge = z >= 1e4
    assert np.isposinf(result["decay"][huge]).all()
    np.testing.assert_array_equal(result["softplus"][huge], z[huge])
    np.testing.assert_array_equal(result["sigmoid"][huge], 1)
    for name in ("decay", "softplus", "sigmoid"):
        assert (result[name] >= 0).all(), name
    for name in REAL:
        assert np.isfinite(result[name][z <= 0]).all(), name


@DTYPES
def test_complex_ends(dtype: Any) -> None:
    """A delta of 0 changes nothing, exactly; an A without imaginary part gives real numbers."""
    delta, _, im = angles(dtype)
    result = evaluated(f"complex {np.dtype(dtype)}")
    still = delta == 0
    assert still.any()
    for name, value in (("decay", 1), ("decay too", 1), ("change", 0), ("psi", 0.5)):
        assert (result[name][still] == value).all(), name
        assert (result[name].imag[im == 0] == 0).all(), name


# --- Both ways to generate code ---------------------------------------------------------------------------------------

PORTABLE = """
import sys
from sscan.cpu import _vector_math
assert isinstance(_vector_math._AVX512, bool)
_vector_math._AVX512 = False  # read when code is generated
sys.path.insert(0, sys.argv[1])
import test_vector_math
test_vector_math.save(sys.argv[2])
"""


def test_code_without_avx512_gives_the_same(tmp_path: Path) -> None:
    """Machines without AVX-512 clamp and shift instead: the same bits, but where results leave the normal numbers."""
    command = [sys.executable, "-W", "error", "-c", PORTABLE, str(Path(__file__).parent), str(tmp_path)]
    subprocess.run(command, check=True, env=dict(os.environ), timeout=300)
    for name in NAMES:
        with np.load(tmp_path / f"{name}.npz") as portable:
            for key, x in evaluated(name).items():
                y = portable[key]
                z = points(x.dtype.type) if name.startswith("real") else np.multiply(*angles(x.real.dtype)[:2])
                limit = 86 if "32" in name else 707
                assert x[np.abs(z) < limit].tobytes() == y[np.abs(z) < limit].tobytes(), f"{name}: {key}"
                low = z <= -limit
                np.testing.assert_allclose(y[low], x[low], rtol=0, atol=8 * np.finfo(x.dtype).tiny, err_msg=key)


# --- Storage ----------------------------------------------------------------------------------------------------------


@compiled
def convert(count, source, destination, like, flush):
    """From one storage dtype to another through the accumulation dtype of ``like``, 16 at a time."""
    environment = flush_subnormals() if flush else 0
    for k in range(0, count, 16):
        here = min(16, count - k)
        x = read_row(splat(like), source, source.address + k * source.item, here)
        write_row(destination, destination.address + k * destination.item, here, x)
    if flush:
        restore_environment(environment)


def converted(x: Array, dtype: Any, flush: bool = False) -> Array:
    out = np.full(x.size, np.nan, dtype)
    like = np.float64(0) if x.dtype == np.float64 else np.float32(0)
    convert(x.size, view(x[None, None]), view(out[None, None]), like, flush)
    return out


HALVES_OP = """
import hashlib
import sys
import ml_dtypes
import numpy as np
import sscan

digest = hashlib.sha256()
x, weight = np.random.default_rng(0).standard_normal((2, 3, 100))
for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
    digest.update(sscan.rms_norm(x.astype(dtype), weight[0].astype(dtype)).tobytes())
sys.stdout.write(digest.hexdigest())
"""
HALVES = pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
FLUSH = pytest.mark.parametrize("flush", [False, True])


def assert_same_numbers(x: Array, y: Array) -> None:
    """Bit for bit, except that any NaN is as good as another."""
    assert x.dtype == y.dtype
    with np.errstate(invalid="ignore"):  # signalling NaNs
        missing, bits = np.isnan(x), np.dtype(f"u{x.itemsize}")
        np.testing.assert_array_equal(missing, np.isnan(y))
    np.testing.assert_array_equal(x.view(bits)[~missing], y.view(bits)[~missing])


@HALVES
@FLUSH
def test_all_half_numbers_are_read_exactly(half: Any, flush: bool) -> None:
    x = np.arange(2**16, dtype=np.uint16).view(half)
    with np.errstate(invalid="ignore"):  # of signalling NaNs, which NumPy tells on some machines
        expected = x.astype(np.float32)
    assert_same_numbers(converted(x, np.float32, flush), expected)
    assert_same_numbers(converted(x, half, flush), x)


@HALVES
@FLUSH
def test_half_numbers_are_rounded_to_nearest_even(half: Any, flush: bool) -> None:
    """Every number of the format, every tie between two of them, the floats around ties, and any bits at all."""
    with np.errstate(invalid="ignore"):
        numbers = np.arange(2**16, dtype=np.uint16).view(half).astype(np.float32)
    finite = np.sort(numbers[np.isfinite(numbers)])
    ties = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(ties, np.float32(sign * np.inf)) for sign in (-1, 1)]
    ends = np.array([np.nan, np.inf, -np.inf, 65504, 65519.99, 65520, 65536, 3.4e38, 3.39e38, 1e-45, 1e-40], np.float32)
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 2**32, 2**18, dtype=np.uint32).view(np.float32)
    x = np.concatenate([numbers, ties, *beside, ends, -ends, anything])
    with np.errstate(all="ignore"):
        expected = x.astype(half)
    assert_same_numbers(converted(x, half, flush), expected)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_part_of_a_vector(dtype: Any) -> None:
    """Fewer than 16 elements: no other is written."""
    x = np.random.default_rng(0).standard_normal(40).astype(dtype)
    for count in range(41):
        out = np.full(40, 7, dtype)
        like = np.float64(0) if dtype is np.float64 else np.float32(0)
        convert(count, view(x[None, None]), view(out[None, None]), like, False)
        np.testing.assert_array_equal(out[:count], x[:count])
        np.testing.assert_array_equal(out[count:], np.full(40 - count, 7, dtype))


@pytest.mark.parametrize(
    "machine",
    [
        {"NUMBA_CPU_NAME": "generic"},
        {"NUMBA_CPU_NAME": "sandybridge", "NUMBA_CPU_FEATURES": ""},
        {"NUMBA_ENABLE_AVX": "0"},
    ],
    ids=["generic", "sandybridge", "no AVX"],
)
def test_storage_on_other_processors(machine: dict[str, str]) -> None:
    """Without instructions for half precision, without AVX: the tests above, and an op to the same bits."""
    env = {**os.environ, **machine}
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "read_exactly or nearest_even or part_of"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=100)
    assert "12 passed" in run.stdout, run.stdout
    command = [sys.executable, "-c", HALVES_OP]
    here, there = (
        subprocess.run(command, capture_output=True, check=True, env=e, timeout=100).stdout for e in (os.environ, env)
    )
    assert len(here) == 64
    assert there == here


# --- Shuffles ---------------------------------------------------------------------------------------------------------


@compiled
def shuffle(source, start, stride, moved, to, step, sums):
    transpose(source, start, stride, moved, to, step)
    store(sums, 0, lane_sums(source, start, stride))


@DTYPES
@pytest.mark.parametrize(("start", "stride", "to", "step"), [(0, 16, 0, 16), (5, 21, 3, 40)])
def test_transpose_and_lane_sums(dtype: Any, start: int, stride: int, to: int, step: int) -> None:
    source = np.random.default_rng(0).integers(-1000, 1000, 400).astype(dtype)
    moved, sums = np.full(700, -1, dtype), np.empty(16, dtype)
    shuffle(source, start, stride, moved, to, step, sums)
    rows = np.stack([source[start + r * stride :][:16] for r in range(16)])
    expected = np.full(700, -1, dtype)
    for k in range(16):
        expected[to + k * step :][:16] = rows[:, k]
    np.testing.assert_array_equal(moved, expected)
    np.testing.assert_array_equal(sums, rows.sum(axis=1))


@DTYPES
def test_lane_sums_have_a_fixed_order(dtype: Any) -> None:
    """Halves onto halves, so that sums do not depend on the machine's vector width."""
    x = np.random.default_rng(0).standard_normal(256).astype(dtype)
    moved, sums = np.empty(256, dtype), np.empty(16, dtype)
    shuffle(x, 0, 16, moved, 0, 16, sums)
    rows = x.reshape(16, 16)
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows = rows[:, :half] + rows[:, half:]
    np.testing.assert_array_equal(sums, rows[:, 0])


@DTYPES
def test_transpose_where_it_lies(dtype: Any) -> None:
    x, sums = np.arange(20 * 16, dtype=dtype), np.empty(16, dtype)
    expected = x.reshape(16, 20).copy()
    expected[:, :16] = expected[:, :16].T.copy()
    shuffle(x, 0, 20, x, 0, 20, sums)
    np.testing.assert_array_equal(x.reshape(16, 20), expected)
