"""The selective scan as a system: causal, splittable, linear, exact where it must be, deterministic, lean.

What its numbers are is settled by test_conformance.py; here are properties that hold without a reference.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    Arguments,
    Array,
    backward,
    case_of,
    cotangents,
    eps_of,
    error_of,
    forward,
    normal,
    scan_problem,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sscan
from sscan import cpu, reference

OP = "selective_scan"
COMPLEX = {"is_complex": True, "B": "shared complex", "C": "2 complex"}
KINDS: dict[str, dict[str, Any]] = {
    "float64": {"dtype": "float64"},
    "float64 zoh": {"dtype": "float64", "discretization": "zoh"},
    "float64 complex": {"dtype": "float64", **COMPLEX},
    "float32": {"B": "2"},
    "float32 constant B and C": {"B": "constant", "C": "constant"},
    "bfloat16 zoh": {"dtype": "bfloat16", "discretization": "zoh"},
    "float32 complex": COMPLEX,
}
DOUBLE = [name for name in KINDS if name.startswith("float64")]
RAW = {"delta": "positive", "delta_bias": False, "delta_softplus": False}
TIMED = ("u", "delta", "z", "B", "C")
NEAR = 4  # eps between gradients that were summed in other chunks; on a GPU, of kernels for other lengths, twice that
SETTINGS = settings(max_examples=20, deadline=None, derandomize=True)
any_kind = st.sampled_from(sorted(KINDS))
in_double = st.sampled_from(DOUBLE)
RULES = pytest.mark.parametrize("rule", ["mamba", "zoh"])


def problem_of(kind: str, **changes: Any) -> Arguments:
    return scan_problem(np.random.default_rng(0), **{**KINDS[kind], **changes})


def scan(problem: Arguments, **changes: Any) -> dict[str, Array]:
    """y and last_state."""
    return forward(sscan, OP, {**problem, **changes})


def gradients(problem: Arguments, weights: dict[str, Array], **changes: Any) -> dict[str, Array]:
    return backward(sscan, OP, {**problem, **changes}, weights)


def at(problem: Arguments, times: Any, **changes: Any) -> Arguments:
    """The problem on some of its times only."""
    timed = {name: problem[name][..., times] for name in TIMED if name in problem and problem[name].ndim > 2}
    return {**problem, **timed, **changes}


def assert_identical(x: Array, y: Array, what: str = "") -> None:
    """The same bits."""
    assert (x.dtype, x.shape) == (y.dtype, y.shape), what
    assert x.tobytes() == y.tobytes(), f"{what}: {np.count_nonzero(x != y)} of {x.size} numbers differ"


# --- Time: causality, splits, chunks ----------------------------------------------------------------------------------


@SETTINGS
@given(kind=any_kind, t=st.integers(0, 101))
def test_causality(kind: str, t: int) -> None:
    """Nothing before t changes, in any bit, when all inputs from t on do; gradients flow the other way (check 11)."""
    problem = problem_of(kind, length=101, initial_state=True)
    changed = dict(problem)
    for name in TIMED:
        if problem[name].ndim > 2:
            changed[name] = np.concatenate([problem[name][..., :t], -problem[name][..., t:]], axis=-1)
    outputs = scan(problem)
    assert_identical(scan(changed)["y"][..., :t], outputs["y"][..., :t])

    weights = cotangents(outputs)
    other = {**weights, "dy": np.concatenate([-weights["dy"][..., :t], weights["dy"][..., t:]], axis=-1)}
    first, second = gradients(problem, weights), gradients(problem, other)
    for name in ("du", "ddelta", "dz", "dB", "dC"):
        if first[name].ndim > 2:
            assert_identical(first[name][..., t:], second[name][..., t:], name)


@pytest.mark.parametrize(("shape", "groups"), [((2, 40, 0, 3), 2), ((1, 8, 70000, 4), 1), ((2, 6, 4097, 17), 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.complex64, np.float64])
def test_size_of_checkpoints_is_known_beforehand(shape: tuple[int, ...], groups: int, dtype: Any) -> None:
    batch, dim, length, state = shape
    segments, sizes = cpu.segments(OP, batch, length, None, None), (batch, dim, length, state, groups, dtype)
    made = cpu.checkpoints_shape(*sizes, True, None, segments)  # by the segments' own lengths
    assert cpu.checkpoints_shape(*sizes, False, None) == made
    assert cpu.checkpoints_shape(*sizes, True, None) is None


@pytest.mark.parametrize("packing", [{}, {"seq_idx": "int32"}])
def test_checkpoints_of_other_inputs_are_refused(packing: dict[str, Any]) -> None:
    problem = problem_of("float32", **packing)
    y, _, checkpoints = sscan.selective_scan_forward(**problem)
    sscan.selective_scan_backward(y, **problem, checkpoints=checkpoints)
    for wrong in (checkpoints[:-1], checkpoints.astype(np.float64)):
        with pytest.raises(ValueError, match="checkpoints must be those of selective_scan_forward"):
            sscan.selective_scan_backward(y, **problem, checkpoints=wrong)


def test_checkpoints_in_any_memory() -> None:
    problem = problem_of("float32")
    y, _, checkpoints = sscan.selective_scan_forward(**problem)
    expected = gradients(problem, {"dy": y}, checkpoints=checkpoints)
    read_only, misaligned = checkpoints.copy(), np.empty(checkpoints.nbytes + 1, np.uint8)[1:].view(np.float32)
    read_only.flags.writeable, misaligned[...] = False, checkpoints
    for same in (np.repeat(checkpoints, 2)[::2], checkpoints[::-1].copy()[::-1], read_only, misaligned):
        for name, gradient in gradients(problem, {"dy": y}, checkpoints=same).items():
            assert_identical(gradient, expected[name], name)


def test_checkpoints_are_arrays_of_the_same_library() -> None:
    problem = problem_of("float32")
    y, _, checkpoints = sscan.selective_scan_forward(**problem)
    with pytest.raises(TypeError, match=r"^selective_scan_backward: checkpoints must be a NumPy array on cpu"):
        sscan.selective_scan_backward(y, **problem, checkpoints=torch.from_numpy(checkpoints))
    with pytest.raises(TypeError, match=r"^selective_scan_backward: checkpoints must be a NumPy, CuPy, .*; got list"):
        sscan.selective_scan_backward(y, **problem, checkpoints=checkpoints.tolist())


@SETTINGS
@given(kind=in_double, k=st.integers(0, 101))
def test_split_and_carry_is_the_whole(kind: str, k: int) -> None:
    """[0, k) and then [k, L) from the state it left, and gradients back through that state (check 5)."""
    problem = problem_of(kind, length=101, initial_state=True)
    first, second = at(problem, slice(0, k)), at(problem, slice(k, None))
    whole, before = scan(problem), scan(first)
    second["initial_state"] = before["last_state"]
    after = scan(second)
    assert_identical(np.concatenate([before["y"], after["y"]], axis=-1), whole["y"])
    assert_identical(after["last_state"], whole["last_state"])

    weights = cotangents(whole)
    late = gradients(second, {"dy": weights["dy"][..., k:], "dlast_state": weights["dlast_state"]})
    early = gradients(first, {"dy": weights["dy"][..., :k], "dlast_state": late["dinitial_state"]})
    for name, expected in gradients(problem, weights).items():
        if name == "dinitial_state":
            joined = early[name]
        elif expected.shape[-1] == 101:
            joined = np.concatenate([early[name], late[name]], axis=-1)
        else:
            joined = early[name] + late[name]
        assert error_of(joined, expected) < 1e-13, name


@pytest.mark.parametrize("kind", ["float32", "float64 zoh", "float32 complex"])
def test_lengths_around_chunks(kind: str) -> None:
    """A shorter run is the beginning of a longer one, bit for bit, and so are gradients of its outputs (check 4)."""
    problem = problem_of(kind, length=130, initial_state=True)
    y, weights = scan(problem)["y"], cotangents(scan(problem))
    for length in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129):
        part = at(problem, slice(0, length))
        assert_identical(scan(part)["y"], y[..., :length], f"length {length}")
        seen = {"dy": np.where(np.arange(130) < length, weights["dy"], np.zeros_like(weights["dy"]))}
        expected = gradients(problem, seen)
        for name, gradient in gradients(part, {"dy": weights["dy"][..., :length]}).items():
            cut = expected[name][..., :length] if expected[name].shape[-1] == 130 else expected[name]
            assert error_of(gradient, cut) <= NEAR * eps_of(gradient.dtype), f"{name}, length {length}"


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_change_no_bit(kind: str) -> None:
    """Forward with checkpoints walks in other chunks; backward without them makes its own."""
    problem = problem_of(kind, length=131, initial_state=True)
    outputs = scan(problem)
    y, last_state, checkpoints = sscan.selective_scan_forward(**problem)
    assert_identical(y, outputs["y"])
    assert_identical(last_state, outputs["last_state"])
    weights = cotangents(outputs)
    expected = gradients(problem, weights)
    for name, gradient in gradients(problem, weights, checkpoints=checkpoints).items():
        assert_identical(gradient, expected[name], name)


# --- Packed sequences -------------------------------------------------------------------------------------------------

borders = st.lists(st.integers(0, 80), max_size=6).map(sorted)


@SETTINGS
@given(kind=any_kind, cuts=borders)
@example(kind="float64", cuts=[0, 1, 1, 31, 32, 33])
def test_seq_idx_is_separate_runs(kind: str, cuts: list[int]) -> None:
    """A reset gives what a fresh run gives, and no gradient passes it (check 8)."""
    problem = problem_of(kind, length=81, initial_state=True)
    seq_idx = np.zeros((2, 81), np.int32)
    for i, cut in enumerate(cuts):
        seq_idx[0, cut:] = i + 1
    starts = sorted({0, *cuts})
    spans = list(zip(starts, [*starts[1:], 81], strict=True))
    outputs = scan(problem, seq_idx=seq_idx)
    for i, j in spans:
        alone = scan(at(problem, slice(i, j), initial_state=problem["initial_state"] if i == 0 else None))
        assert_identical(alone["y"][0], outputs["y"][0, :, i:j])
        if j == 81:
            assert_identical(alone["last_state"][0], outputs["last_state"][0])
    assert_identical(scan(problem)["y"][1], outputs["y"][1])

    last = spans[-1][0]
    weights = cotangents(outputs)
    weights["dy"][0, :, :last] = 0
    leaked = gradients(problem, weights, seq_idx=seq_idx)
    for name in ("du", "ddelta", "dz", "dB", "dC"):
        if leaked[name].ndim > 2:
            assert not leaked[name][0, ..., :last].any(), name
            assert leaked[name][0, ..., last:].any(), name
    assert last == 0 or not leaked["dinitial_state"][0].any()


@SETTINGS
@given(kind=any_kind, cuts=borders)
@example(kind="float64", cuts=[0, 0, 32, 32, 64, 80])
def test_cu_seqlens_is_separate_runs(kind: str, cuts: list[int]) -> None:
    """Every packed sequence, empty ones too, has its own initial and last state, and gradients of both."""
    cu_seqlens = np.array([0, *cuts, 81], np.int64)
    problem = problem_of(kind, batch=1, length=81, initial_state=True, cu_seqlens=tuple(cu_seqlens))
    outputs = scan(problem)
    weights = cotangents(outputs)
    packed = gradients(problem, weights)
    spans = list(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True))
    parts = []
    for s, (i, j) in enumerate(spans):
        alone = at(problem, slice(i, j), cu_seqlens=None, initial_state=problem["initial_state"][s : s + 1])
        result = scan(alone)
        assert_identical(result["y"], outputs["y"][..., i:j])
        assert_identical(result["last_state"][0], outputs["last_state"][s])
        own = {"dy": weights["dy"][..., i:j], "dlast_state": weights["dlast_state"][s : s + 1]}
        parts.append(gradients(alone, own))
    for name, expected in packed.items():
        pieces = [part[name] for part in parts]
        if name == "dinitial_state":
            joined = np.concatenate(pieces)
        else:
            joined = np.concatenate(pieces, axis=-1) if expected.shape[-1] == 81 else np.sum(pieces, axis=0)
        assert error_of(joined, expected) <= 40 * eps_of(expected.dtype), name


# --- Linearity, and what delta does -----------------------------------------------------------------------------------


@SETTINGS
@given(kind=in_double, name=st.sampled_from("uBC"), a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_linear_in_u_B_and_C(kind: str, name: str, a: float, b: float) -> None:
    problem = problem_of(kind, D=name == "u")
    other = normal(np.random.default_rng(1), problem[name].shape, problem[name].dtype)
    combined = scan(problem, **{name: a * problem[name] + b * other})
    first, second = scan(problem), scan(problem, **{name: other})
    assert error_of(combined["y"], a * first["y"] + b * second["y"]) < 1e-13
    if name != "C":
        assert error_of(combined["last_state"], a * first["last_state"] + b * second["last_state"]) < 1e-13


@pytest.mark.parametrize("kind", KINDS)
def test_zero_delta_leaves_the_state_alone(kind: str) -> None:
    """Not one bit of it changes; the state's gradient is what C and dy send to it, and nothing reaches u or B."""
    problem = problem_of(kind, **RAW, D=False, z=False, length=70, initial_state=True)
    problem["delta"] = np.zeros_like(problem["delta"])
    outputs = scan(problem)
    assert_identical(outputs["last_state"], problem["initial_state"])
    weights = cotangents(outputs)
    none = gradients(problem, {"dy": np.zeros_like(weights["dy"]), "dlast_state": weights["dlast_state"]})
    assert_identical(none["dinitial_state"], weights["dlast_state"])
    some = gradients(problem, weights)
    assert not some["du"].any()
    assert not some["dB"].any()
    assert not some["dA"].any()
    assert some["ddelta"].any()


@SETTINGS
@given(kind=any_kind, ignored=st.sets(st.integers(0, 49)))
def test_ignored_tokens_can_be_deleted(kind: str, ignored: set[int]) -> None:
    """Softplus of a very negative number is a delta of 0: other outputs do not notice, at any spacing (check 10)."""
    problem = problem_of(kind, length=50, initial_state=True)
    kept = [t for t in range(50) if t not in ignored]
    problem["delta"] = problem["delta"].copy()
    problem["delta"][..., sorted(ignored)] = -1000
    whole, shorter = scan(problem), scan(at(problem, kept))
    assert_identical(whole["y"][..., kept], shorter["y"])
    assert_identical(whole["last_state"], shorter["last_state"])


@pytest.mark.parametrize("kind", ["float64 zoh", "bfloat16 zoh"])
def test_large_delta_resets_under_zoh(kind: str) -> None:
    """Delta = 1e4 forgets the past and leaves h = -B u / A (check 9)."""
    problem = problem_of(kind, **RAW, length=40, initial_state=True)
    problem["delta"] = problem["delta"].copy()
    problem["delta"][..., 33] = 1e4
    other = {**problem, "initial_state": problem["initial_state"] + 1, "u": problem["u"].copy()}
    other["u"][..., :33] += 1
    y, changed = scan(problem)["y"], scan(other)["y"]
    assert not np.array_equal(y[..., :33], changed[..., :33])
    assert_identical(y[..., 33:], changed[..., 33:])
    h = scan(at(problem, slice(0, 34)))["last_state"]
    B, u = (problem[name][..., 33].astype(h.dtype) for name in "Bu")
    np.testing.assert_allclose(h, -B[:, None] * u[..., None] / problem["A"], rtol=4 * eps_of(h.dtype))


@pytest.mark.parametrize("kind", ["float64", "float32", "float32 complex"])
def test_large_delta_resets_under_mamba_where_B_is_zero(kind: str) -> None:
    problem = problem_of(kind, **RAW, length=40, initial_state=True)
    problem |= {"delta": problem["delta"].copy(), "B": problem["B"].copy()}
    problem["delta"][..., 33], problem["B"][..., 33] = 1e4, 0
    after = scan(at(problem, slice(34, None), initial_state=None))
    assert_identical(scan(problem)["y"][..., 34:], after["y"])


@pytest.mark.parametrize(("kind", "is_invariant"), [("float64 zoh", True), ("float64", False)])
def test_refinement(kind: str, is_invariant: bool) -> None:
    """Delta / 4 with every input repeated four times gives the same coarse outputs, under zoh only (check 12)."""
    coarse = problem_of(kind, **RAW, length=30)
    repeated = {name: np.repeat(coarse[name], 4, axis=-1) for name in TIMED}
    fine = {**coarse, **repeated, "delta": repeated["delta"] / 4}
    error = error_of(scan(fine)["y"][..., 3::4], scan(coarse)["y"])
    assert error < 1e-13 if is_invariant else error > 1e-3


# --- Check 1: Theorem 1 -----------------------------------------------------------------------------------------------


def gated_recurrence(x: Array, keep: Array, write: Array) -> Array:
    h, out = np.zeros(x.shape[:2], x.dtype), np.empty_like(x)
    for t in range(x.shape[2]):
        h = keep[..., t] * h + write[..., t] * x[..., t]
        out[..., t] = h
    return out


def theorem_problem(dtype: Any, scale: float = 1.0) -> tuple[Arguments, Array, Array]:
    """A = -1, B = scale, C = 1, delta = softplus(w x + b); x and the exact sigmoid(w x + b)."""
    x = normal(np.random.default_rng(0), (2, 3, 150), dtype)
    one, bias = np.ones((2, 1, 150), dtype), np.full(3, -0.4, dtype)
    scaled = (1.3 * x).astype(dtype)
    problem = {"u": x, "delta": scaled, "A": -np.ones((3, 1), dtype), "B": scale * one, "C": one, "delta_bias": bias}
    v = scaled.astype(np.float64) + bias.astype(np.float64)[:, None]
    return {**problem, "delta_softplus": True}, x.astype(np.float64), 1 / (1 + np.exp(-v))


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 2e-15), (np.float32, 1e-6)])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_theorem_1(dtype: Any, tolerance: float, scale: float) -> None:
    """Under zoh, h_t = (1 - g_t) h_{t-1} + g_t x_t with g = sigmoid(w x + b) (equation 5)."""
    problem, x, g = theorem_problem(dtype, scale)
    y = scan(problem, discretization="zoh")["y"]
    assert error_of(y, scale * gated_recurrence(x, 1 - g, g)) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 2e-15), (np.float32, 1e-6)])
def test_theorem_1_fails_under_the_mamba_rule(dtype: Any, tolerance: float) -> None:
    """The negative control: there the input is weighted by softplus(v) = -log(1 - g) >= g."""
    problem, x, g = theorem_problem(dtype)
    y = scan(problem, discretization="mamba")["y"]
    assert error_of(y, gated_recurrence(x, 1 - g, g)) > 0.1
    assert error_of(y, gated_recurrence(x, 1 - g, -np.log1p(-g))) < tolerance


# --- Checks 2 and 3: the LTI system -----------------------------------------------------------------------------------


def lti_problem(kind: str) -> tuple[Arguments, Array]:
    """A scan whose delta, B and C do not vary, and the same by the direct convolution of equation 3b."""
    rng, is_complex = np.random.default_rng(0), KINDS[kind].get("is_complex", False)
    A = -rng.uniform(0.3, 3, (5, 4)) + (1j * rng.uniform(-3, 3, (5, 4)) if is_complex else 0)
    B, C = normal(rng, (5, 4), A.dtype), normal(rng, (5, 4), A.dtype)
    u, delta = normal(rng, (2, 5, 200), np.float64), rng.uniform(0.05, 0.5, 5)
    rule = KINDS[kind].get("discretization", "mamba")
    K = reference.ssm_kernel(delta, A, B, C, 200, rule)
    problem = {"u": u, "delta": np.broadcast_to(delta[:, None], u.shape), "A": A, "discretization": rule}
    return {**problem, "B": B, "C": C}, reference.ssm_convolution(u, K)


def as_varying(problem: Arguments, names: str = "BC") -> Arguments:
    """Constant B and C as one group for each channel, repeated over batch and time (strides of 0)."""
    batch, dim, length = problem["u"].shape
    shape = (batch, dim, problem["A"].shape[1], length)
    return {**problem, **{name: np.broadcast_to(problem[name][None, :, :, None], shape) for name in names}}


@pytest.mark.parametrize("kind", DOUBLE)
def test_lti_scan_is_convolution(kind: str) -> None:
    """Scan, direct convolution and the FFT of sscan agree; the response to an impulse is the kernel (check 2)."""
    problem, expected = lti_problem(kind)
    assert error_of(scan(as_varying(problem))["y"], expected) < 1e-12
    rule, length = problem["discretization"], expected.shape[2]
    K = sscan.ssm_kernel(problem["delta"][0, :, 0], *(problem[name] for name in "ABC"), length, rule)
    assert error_of(sscan.ssm_convolution(problem["u"], K), expected) < 1e-12
    impulse = np.zeros_like(problem["u"])
    impulse[..., 0] = 1
    assert error_of(scan(as_varying(problem), u=impulse)["y"][0], K) < 1e-12


def test_convolution_does_not_match_when_delta_varies() -> None:
    """The control of the check above: selection is what a convolution cannot do."""
    problem, expected = lti_problem("float64 zoh")
    delta = problem["delta"] * np.random.default_rng(1).uniform(0.5, 1.5, problem["u"].shape)
    assert error_of(scan(as_varying(problem), delta=delta)["y"], expected) > 0.1


# --- Checks 13, 14 and all finite inputs ------------------------------------------------------------------------------


@pytest.mark.parametrize("A", [-1.0, -0.6 + 0.8j], ids=str)
def test_small_delta_keeps_its_digits_in_float32(A: complex) -> None:
    """B_bar (one step's state for u = 1) within 1e-6 for z down to 1e-8; exp(z) - 1 as printed loses half by 1e-4."""
    dtype = np.complex64 if isinstance(A, complex) else np.float32
    delta = np.geomspace(1e-8, 1, 400, dtype=np.float32)
    one = np.ones((1, 400, 1), np.float32)
    system = {"A": np.full((400, 1), A, dtype), "B": np.ones((1, 1, 1), dtype), "C": np.ones((1, 1, 1), dtype)}
    h = scan({"u": one, "delta": delta[None, :, None], **system, "discretization": "zoh"})["last_state"][0, :, 0]
    z = delta.astype(np.longdouble) * system["A"][:, 0].astype(np.clongdouble)
    exact = delta * sum(z**k / float(np.prod(np.arange(1.0, k + 2))) for k in range(25))
    assert np.max(np.abs(h / exact - 1)) < 1e-6


@RULES
@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
def test_gradients_where_delta_is_zero(rule: str, is_complex: bool) -> None:
    """The functions of zoh are smooth there: at delta = 0, dh/ddelta = A h + B u under both rules."""
    changes = {"is_complex": is_complex, "B": "1 complex", "C": "1 complex"} if is_complex else {"B": "1", "C": "1"}
    problem = scan_problem(np.random.default_rng(0), **RAW, **changes, D=False, z=False, length=1, initial_state=True,
                           discretization=rule)  # fmt: skip
    problem["delta"] = np.zeros_like(problem["delta"])
    outputs = scan(problem)
    weights = cotangents(outputs)
    weights["dy"][:] = 0
    B, h = problem["B"][:, :, :, 0].astype(problem["A"].dtype), problem["initial_state"]
    slope = problem["A"] * h + B * problem["u"]
    expected = (weights["dlast_state"].conj() * slope).real.sum(-1)[..., None]
    assert error_of(gradients(problem, weights)["ddelta"], expected) < 1e-6


@RULES
def test_a_million_extreme_steps(rule: str) -> None:
    """L = 2^20, A down to -256, pre-activations of +-100 and 1e4: finite, forward and backward (check 14)."""
    rng, length = np.random.default_rng(0), 2**20
    delta = rng.choice(np.array([-100, -20, 0, 20, 100, 1e4], np.float32), (1, 2, length))
    u = rng.standard_normal((1, 2, length), np.float32)
    B, C = rng.standard_normal((2, 1, 4, length), np.float32)
    A = np.array([[-256, -16, -1, -1e-3], [-256, 0, -1e-8, -64]], np.float32)
    problem = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "z": u, "delta_softplus": True, "discretization": rule}
    outputs = scan(problem)
    for name, x in (outputs | gradients(problem, cotangents(outputs))).items():
        assert np.isfinite(x).all(), name


MODERATE = [0.0, 1e-30, 1.0, -1.0, 3e-7, 500.0, -1e3]
DELTAS = [0.0, -1e30, -1e4, -104.0, -88.5, -87.0, -20.0, 1e-30, 1.0, 20.0, 88.8, 100.0, 1e4]
RATES = [0.0, -1e-38, -1e-20, -1e-3, -1.0, -256.0, -1e6]


@SETTINGS
@given(
    kind=st.sampled_from(["float32", "bfloat16 zoh", "float32 complex", "float64 zoh", "float32 constant B and C"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_finite_for_all_finite_inputs(kind: str, seed: int) -> None:
    """Re(A) <= 0, step sizes through softplus; numbers as large as the products of three of them can still be held."""
    rng = np.random.default_rng(seed)
    problem = problem_of(kind, length=37, state=3, initial_state=True)
    for name, x in problem.items():
        if isinstance(x, np.ndarray):
            values = {"delta": DELTAS, "A": RATES}.get(name, MODERATE)
            drawn = rng.choice(values, x.shape)
            if x.dtype.kind == "c":
                drawn = drawn + 1j * rng.choice(RATES[:-1] if name == "A" else MODERATE, x.shape)
            problem[name] = drawn.astype(x.dtype)
    outputs = scan(problem)
    weights = {f"d{name}": rng.choice(MODERATE, x.shape).astype(x.dtype) for name, x in outputs.items()}
    for name, x in (outputs | gradients(problem, weights)).items():
        assert np.isfinite(x).all(), name


@pytest.mark.parametrize("state", [1, 3, 4, 5, 16, 17])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_infinite_step_under_zoh(state: int, dtype: Any) -> None:
    """It forgets everything and leaves -B u / A, whatever fills up the vectors that the states are in."""
    rng = np.random.default_rng(0)
    A, B, C = -rng.uniform(0.5, 2, (3, state)), rng.standard_normal((1, state, 40)), np.ones((1, state, 40))
    u, delta = rng.standard_normal((1, 3, 40)), np.full((1, 3, 40), 0.1)
    delta[..., 20] = np.inf
    A, B, C, u, delta = (x.astype(dtype) for x in (A, B, C, u, delta))
    outputs = scan({"u": u, "delta": delta, "A": A, "B": B, "C": C, "discretization": "zoh"})
    expected = (-B[:, None, :, 20] / A * u[..., 20, None]).sum(-1)
    np.testing.assert_allclose(outputs["y"][..., 20], expected, rtol=20 * eps_of(dtype))
    assert np.isfinite(outputs["y"]).all()
    assert np.isfinite(outputs["last_state"]).all()


# --- A row that is split along time is as it is unsplit ---------------------------------------------------------------


LONG = 8192  # steps; one batch row of few channels is cut into four parts, eight rows are not


def long_problem(A: float | complex = -1.0, **changes: Any) -> Arguments:
    """One row of two channels, A and a third of it, and a step size of a tenth."""
    wave, one = np.zeros((1, 2, LONG), np.float32), np.ones((1, 1, LONG), np.float32)
    number = np.dtype(np.complex64 if isinstance(A, complex) else np.float32)
    B = np.broadcast_to(one, (1, 1, LONG)).astype(number)
    return {
        "u": wave, "delta": np.full_like(wave, 0.1), "A": np.array([[A], [A / 3]], number), "B": B, "C": B,
        **changes,
    }  # fmt: skip


def alone_and_among_eight(problem: Arguments, weights: dict[str, Array]) -> list[tuple[str, Array, Array]]:
    """Outputs and gradients of one row, and those of the same row among eight; sums over the batch are an eighth."""
    eight = {k: np.repeat(x, 8, 0) if isinstance(x, np.ndarray) and k != "A" else x for k, x in problem.items()}
    found = []
    for arguments, given_ in ((problem, weights), (eight, {k: np.repeat(x, 8, 0) for k, x in weights.items()})):
        outputs = scan(arguments)
        found.append(outputs | gradients(arguments, given_))
    alone, among = found
    return [(name, x, among[name][:1] if name != "dA" else among[name] / 8) for name, x in alone.items()]


@pytest.mark.parametrize("A", [1.0, 0.5 + 1j], ids=str)
@pytest.mark.parametrize("start", [0.0, 1e-30])
def test_a_state_that_grows_on_a_long_row(A: complex, start: float) -> None:
    """e^(A 205) is infinite, and is what a part makes of a state: but of one that is zero, it makes nothing."""
    problem = long_problem(A)
    problem["initial_state"] = np.full((1, 2, 1), start, problem["A"].dtype)
    problem["u"][..., -1] = 2
    problem["delta"][..., 1000:] = 0 if start else 0.1
    dy = np.zeros_like(problem["u"])
    dy[..., 0] = 1
    for name, x, expected in alone_and_among_eight(problem, {"dy": dy}):
        assert np.isfinite(expected).all(), name
        np.testing.assert_allclose(x, expected, rtol=1e-3, err_msg=name)  # e^100: what rounding 100 costs
    if not start:
        np.testing.assert_allclose(scan(problem)["y"][..., -1], 0.2 if A == 1 else 0.4, rtol=1e-6)


def test_a_state_that_grows_and_shrinks_on_a_long_row() -> None:
    """Steps backwards in time: e^200 for a part and e^-200 for the next, with a state that has room for both."""
    problem = long_problem(initial_state=np.full((1, 2, 1), 1e-30, np.float32))
    problem["delta"][..., :2048], problem["delta"][..., 2048:4096], problem["delta"][..., 4096:] = -0.04, 0.04, 0
    dy = np.zeros_like(problem["u"])
    dy[..., -1] = 1e-30
    for name, x, expected in alone_and_among_eight(problem, {"dy": dy}):
        assert np.isfinite(expected).all(), name
        np.testing.assert_allclose(x, expected, rtol=1e-3, atol=1e-35, err_msg=name)
    assert scan(problem)["last_state"][0, 0, 0] == pytest.approx(1e-30, rel=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["u", "delta", "B", "dy", "C", "z"])
@pytest.mark.parametrize("softplus", [True, False])
def test_what_is_not_finite_stays_in_its_channel(name: str, value: float, softplus: bool) -> None:
    """To the end, and the last state has it; to the start, in gradients. As in a batch of eight, which is not split."""
    rng = np.random.default_rng(0)
    problem = long_problem(u=rng.standard_normal((1, 2, LONG), np.float32), delta_softplus=softplus)
    problem["z"] = rng.standard_normal((1, 2, LONG), np.float32)
    weights = {"dy": rng.standard_normal((1, 2, LONG), np.float32)}
    given_ = weights if name == "dy" else problem
    given_[name] = given_[name].copy()
    given_[name][0, 0, 4000 if name in ("dy", "C", "z") else 100] = value
    for key, x, expected in alone_and_among_eight(problem, weights):
        np.testing.assert_array_equal(np.isnan(x), np.isnan(expected), err_msg=key)
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(np.isfinite(x), finite, err_msg=key)
        np.testing.assert_allclose(x[finite], expected[finite], rtol=1e-3, atol=1e-3, err_msg=key)
    if name == "u":
        y, last_state = scan(problem).values()
        assert not np.isfinite(y[0, 0, 100:]).any()
        assert not np.isfinite(last_state[0, 0]).any()
        assert np.isfinite(y[0, 1]).all()
        assert np.isfinite(last_state[0, 1]).all()


def test_a_long_row_raises_no_floating_point_errors() -> None:
    """Even where the user wants to know of all of them: what underflows inside is no affair of theirs."""
    problem = long_problem(-1000.0, u=np.ones((1, 2, LONG), np.float32), delta_softplus=True)
    with np.errstate(all="raise"):
        outputs = scan(problem)
        result = gradients(problem, {"dy": outputs["y"]})
    assert np.isfinite(result["dA"]).all()


# --- Checks 16, 17 and 18: complex A, forms of B and C, half precision ------------------------------------------------


def test_complex_state_is_a_rotation_with_decay() -> None:
    """A conjugate pair is the real system h' = [[p, -q], [q, p]] h + (Re B, Im B) delta u, y = 2 (Re C, -Im C) h."""
    problem = problem_of("float64 complex", **RAW, D=False, z=False, C="shared complex", initial_state=True)
    angle = problem["delta"][..., None] * problem["A"].imag[:, None]
    decay = np.exp(problem["delta"][..., None] * problem["A"].real[:, None])
    p, q = decay * np.cos(angle), decay * np.sin(angle)
    re, im, y = problem["initial_state"].real, problem["initial_state"].imag, np.empty_like(problem["u"])
    for t in range(y.shape[2]):
        B, C = problem["B"][:, None, :, t], problem["C"][:, None, :, t]
        step = (problem["delta"] * problem["u"])[:, :, t, None]
        re, im = p[:, :, t] * re - q[:, :, t] * im + B.real * step, q[:, :, t] * re + p[:, :, t] * im + B.imag * step
        y[..., t] = 2 * (C.real * re - C.imag * im).sum(-1)
    outputs = scan(problem)
    assert error_of(outputs["y"], y) < 1e-14
    assert error_of(outputs["last_state"], re + 1j * im) < 1e-14


@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_complex_without_imaginary_parts_is_real_with_halved_C(kind: str) -> None:
    problem = problem_of(kind, initial_state=True, B="2", C="shared")
    of_A = np.result_type(problem["A"], np.complex64)
    as_complex = {name: problem[name].astype(of_A) for name in ("A", "B", "C", "initial_state")}
    as_complex["C"] = as_complex["C"] / 2
    expected, outputs = scan(problem), scan(problem, **as_complex)
    tolerance = 20 * eps_of(problem["A"].dtype)
    assert error_of(outputs["y"], expected["y"]) < tolerance
    assert error_of(outputs["last_state"], expected["last_state"].astype(of_A)) < tolerance
    dy = cotangents({"y": expected["y"]})
    expected, result = gradients(problem, dy), gradients(problem, dy, **as_complex)
    for name, g in expected.items():
        assert error_of(result[name].real / (2 if name == "dC" else 1), g) < tolerance, name


def test_interleaved_is_complex_arrays() -> None:
    problem = problem_of("float64 complex", B="2", C="shared")
    arrays = {name: problem[name][..., 0::2] + 1j * problem[name][..., 1::2] for name in "BC"}
    outputs = scan(problem)
    assert_identical(outputs["y"], scan(problem, **arrays)["y"])
    dy = cotangents(outputs)
    flat, expected = gradients(problem, dy), gradients(problem, dy, **arrays)
    for name in ("dB", "dC"):
        assert_identical(flat[name][..., 0::2] + 1j * flat[name][..., 1::2], expected[name])


@pytest.mark.parametrize("kind", DOUBLE)
def test_groups(kind: str) -> None:
    """One group is the shared form; a group for each channel is a matrix for each; gradients sum accordingly."""
    form = "shared complex" if "complex" in kind else "shared"
    shared = problem_of(kind, dim=36, B=form, C=form)
    expected = scan(shared)
    weights = cotangents(expected)
    sums = gradients(shared, weights)
    for groups in (1, 2, 36):
        problem = {**shared, **{name: np.repeat(shared[name][:, None], groups, axis=1) for name in "BC"}}
        assert_identical(scan(problem)["y"], expected["y"], f"{groups} groups")
        for name, g in gradients(problem, weights).items():
            assert error_of(g.sum(axis=1) if name in ("dB", "dC") else g, sums[name]) < 1e-14, (name, groups)


def test_groups_are_separate_systems() -> None:
    """Channels of a group see its B and C only."""
    problem = problem_of("float64", dim=6, B="3", C="3")
    y = scan(problem)["y"]
    for g in range(3):
        part = {name: problem[name][:, 2 * g : 2 * g + 2] for name in ("u", "delta", "z")}
        part |= {name: problem[name][2 * g : 2 * g + 2] for name in ("A", "D", "delta_bias")}
        part |= {name: problem[name][:, g] for name in "BC"}
        assert_identical(scan({**problem, **part})["y"], y[:, 2 * g : 2 * g + 2])


@pytest.mark.parametrize("names", ["B", "C", "BC"])
@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
def test_constant_is_broadcast_varying(names: str, is_complex: bool) -> None:
    """Constant B or C equals a group for each channel that repeats over batch and time; its gradient is their sum."""
    other = "1 complex" if is_complex else "1"
    forms = {name: "constant" if name in names else other for name in "BC"}
    constant = scan_problem(np.random.default_rng(0), dim=6, is_complex=is_complex, **forms)
    varying = as_varying(constant, names)
    expected = scan(varying)
    assert error_of(scan(constant)["y"], expected["y"]) < 1e-6
    weights = cotangents(expected)
    sums = gradients(varying, weights)
    for name, g in gradients(constant, weights).items():
        total = sums[name].sum(axis=(0, 3)) if name[1:] in names and name in ("dB", "dC") else sums[name]
        assert error_of(g, total) < 2e-6, name


def test_float32_state_beats_bfloat16_state() -> None:
    """bfloat16 inputs lose little as long as the state is float32; a bfloat16 state loses more (check 18)."""
    slow = {"length": 300, "A_scale": 0.05, "D": False, "z": False}
    problem = scan_problem(np.random.default_rng(0), dtype="bfloat16", **slow)
    exact = reference.selective_scan(**{k: x.astype(np.float64) if isinstance(x, np.ndarray) else x
                                        for k, x in problem.items()})  # fmt: skip
    state, y = np.zeros((2, 20, 8), ml_dtypes.bfloat16), np.empty_like(problem["u"])
    for t in range(300):
        y[..., t] = sscan.selective_state_update(
            state, *(problem[name][..., t].copy() for name in ("u", "delta")), problem["A"],
            *(problem[name][..., t].copy() for name in "BC"), dt_bias=problem["delta_bias"], dt_softplus=True,
        )  # fmt: skip
    result = sscan.selective_scan(**problem)
    assert error_of(result, exact) < eps_of(result.dtype)
    assert error_of(y, exact) > 4 * error_of(result, exact)


# --- Gradients on kernels alone ---------------------------------------------------------------------------------------


def inner(x: dict[str, Array], y: dict[str, Array], prefix: str = "d") -> tuple[float, float]:
    """The sum over all names of Re <x, y>, and of the magnitudes of its terms."""
    terms = [(x[name].conj() * y[f"{prefix}{name}"]).real.ravel() for name in x]
    return float(np.concatenate(terms).sum()), float(np.abs(np.concatenate(terms)).sum())


LINEAR = {
    "u and initial_state": (("u", "initial_state"), {"initial_state": True}),
    "B": (("B",), {"D": False}),
    "C": (("C",), {"D": False, "initial_state": True}),
}


@pytest.mark.parametrize("names", LINEAR)
@pytest.mark.parametrize("kind", DOUBLE)
def test_adjoint_identity(kind: str, names: str) -> None:
    """<J v, w> = <v, J' w>; the scan is linear in these inputs, so J v is the scan itself."""
    inputs, options = LINEAR[names]
    problem = problem_of(kind, length=133, dim=37, **options, **({"C": "1 complex"} if "complex" in kind else {}))
    outputs = scan(problem)
    weights = cotangents(outputs)
    seen = {"y": outputs["y"]} if names == "C" else outputs
    weights = {f"d{name}": weights[f"d{name}"] for name in seen}
    left, scale = inner(seen, weights)
    right, _ = inner({name: problem[name] for name in inputs}, gradients(problem, weights))
    assert abs(left - right) < 1e-14 * scale


STEP = 1e-4


def slope(problem: Arguments, weights: dict[str, Array], name: str, direction: Array) -> float:
    """Derivative of the weighted sum of outputs along a direction: central difference of fourth order."""
    total = 0.0
    for factor, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
        moved = scan(problem, **{name: problem[name] + factor * STEP * direction})
        total += weight * inner(moved, weights)[0]
    return total / (12 * STEP)


def check_gradient(problem: Arguments, weights: dict[str, Array], name: str, gradient: Array) -> None:
    """Compare <gradient, v> with the derivative along a random v, relative to the size of the terms in that sum."""
    v = normal(np.random.default_rng(1), gradient.shape, gradient.dtype)
    terms = (gradient.conj() * v).real
    error = abs(terms.sum() - slope(problem, weights, name, v))
    noise = 1e-15 / STEP * (1 + inner(scan(problem), weights)[1])
    assert error <= 1e-7 * np.linalg.norm(terms) + noise, f"d{name}: {error / np.linalg.norm(terms):.2g}"


GRADIENT_PROBLEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("float64", {"seq_idx": "int32", "length": 40}),
    "mamba bare": ("float64", {**RAW, "D": False, "z": False, "length": 40, "B": "2"}),
    "zoh": ("float64 zoh", {"length": 40, "B": "2", "C": "2"}),
    "zoh small delta": ("float64 zoh", {**RAW, "delta": "tiny", "length": 40}),
    "complex": ("float64 complex", {"length": 40}),
    "packed": ("float64", {"batch": 1, "length": 40, "cu_seqlens": (0, 3, 3, 34, 40)}),
}


@pytest.mark.parametrize("name", GRADIENT_PROBLEMS)
def test_gradients_are_derivatives(name: str) -> None:
    """Every differentiable input, initial_state and a gradient on the last state included (check 15)."""
    kind, changes = GRADIENT_PROBLEMS[name]
    problem = problem_of(kind, **changes, initial_state=True)
    weights = cotangents(scan(problem))
    result = gradients(problem, weights)
    inputs = [key for key, x in problem.items() if isinstance(x, np.ndarray) and x.dtype.kind not in "iu"]
    assert sorted(result) == sorted(f"d{key}" for key in inputs)
    for key in inputs:
        check_gradient(problem, weights, key, result[f"d{key}"])


@pytest.mark.parametrize("name", ["mamba", "zoh", "complex"])
def test_gradient_checker_catches_a_planted_error(name: str) -> None:
    """0.1 % in a whole gradient, and 0.1 % in its largest element alone."""
    kind, changes = GRADIENT_PROBLEMS[name]
    problem = problem_of(kind, **changes, initial_state=True)
    weights = cotangents(scan(problem))
    for key, gradient in gradients(problem, weights).items():
        one_element = np.where(np.abs(gradient) == np.abs(gradient).max(), 1.001 * gradient, gradient)
        for wrong in (1.001 * gradient, one_element):
            with pytest.raises(AssertionError, match=key):
                check_gradient(problem, weights, key[1:], wrong)


# --- Options that are absent ------------------------------------------------------------------------------------------


def test_absent_inputs_have_no_gradient() -> None:
    problem = problem_of("float32", D=False, z=False, delta_bias=False)
    dy = np.ones_like(problem["u"])
    result = sscan.selective_scan_backward(dy, **problem)
    assert [name for name, g in result._asdict().items() if g is None] == ["dD", "dz", "ddelta_bias", "dinitial_state"]


def test_result_has_a_state_only_if_asked() -> None:
    problem = problem_of("float32")
    y, last_state = sscan.selective_scan(**problem, return_last_state=True)
    assert_identical(sscan.selective_scan(**problem), y)
    assert last_state.shape == (2, 20, 8)
    positional = [problem.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus")]
    assert_identical(sscan.selective_scan(*positional, True)[1], last_state)


@pytest.mark.parametrize("shape", [(0, 20, 70), (2, 0, 70), (2, 20, 0), (0, 0, 0)])
def test_empty_axes(shape: tuple[int, int, int]) -> None:
    batch, dim, length = shape
    problem = scan_problem(np.random.default_rng(0), batch=batch, dim=dim, length=length, initial_state=True)
    outputs = scan(problem)
    assert outputs["y"].shape == shape
    if length == 0:
        assert_identical(outputs["last_state"], problem["initial_state"])
    weights = cotangents(outputs)
    result = gradients(problem, weights)
    assert all(np.isfinite(g).all() for g in result.values())
    assert not result["dA"].any()
    if length == 0:
        assert_identical(result["dinitial_state"], weights["dlast_state"])


@pytest.mark.parametrize("shape", [(0, 20, 70), (2, 20, 0), (2, 20, 1)])
def test_empty_axes_with_seq_idx(shape: tuple[int, int, int]) -> None:
    batch, dim, length = shape
    problem = scan_problem(np.random.default_rng(0), batch=batch, dim=dim, length=length, initial_state=True)
    outputs = scan(problem, seq_idx=np.zeros((batch, length), np.int32))
    for name, x in scan(problem).items():
        assert_identical(outputs[name], x, name)


# --- Errors -----------------------------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = np.float32) -> Array:
    return np.zeros(shape, dtype)


GOOD = {name: zeros(2, 6, 64) for name in ("u", "delta")} | {"A": zeros(6, 16)}
GOOD |= {name: zeros(2, 2, 16, 64) for name in "BC"}
half, double = np.float16, np.float64
ERRORS: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "u rank": (ValueError, {"u": zeros(6, 64)}, "u must have shape (batch, dim, length), got (6, 64)"),
    "delta": (
        ValueError,
        {"delta": zeros(2, 6, 63)},
        "delta must have shape (batch, dim, length) = (2, 6, 64), got (2, 6, 63)",
    ),
    "A": (ValueError, {"A": zeros(5, 16)}, "A must have shape (dim, state) = (6, state), got (5, 16)"),
    "no state": (
        ValueError,
        {"A": zeros(6, 0), "B": zeros(6, 0), "C": zeros(6, 0)},
        "A must have at least one state, got shape (6, 0)",
    ),
    "B length": (
        ValueError,
        {"B": zeros(2, 1, 16, 63)},
        "B must have shape (batch, groups, state, length) = (2, groups, 16, 64), got (2, 1, 16, 63)",
    ),
    "B constant": (ValueError, {"B": zeros(6, 15)}, "B must have shape (dim, state) = (6, 16), got (6, 15)"),
    "B rank": (
        ValueError,
        {"B": zeros(16)},
        "B must have shape (dim, state) = (6, 16) or (batch, state, length) = (2, 16, 64) or (batch, groups, ",
    ),
    "C shared": (
        ValueError,
        {"C": zeros(2, 16, 65)},
        "C must have shape (batch, state, length) = (2, 16, 64), got (2, 16, 65)",
    ),
    "C interleaved": (
        ValueError,
        {"A": zeros(6, 16, dtype=np.complex64), "B": zeros(2, 16, 128)},
        "C must have shape (batch, groups_of_c, state, 2*length) = (2, groups_of_c, 16, 128), got (2, 2, 16, 64)",
    ),
    "groups differ": (
        ValueError,
        {"C": zeros(2, 3, 16, 64)},
        "C must have B's 2 groups, or one, got 3",
    ),
    "groups do not divide": (
        ValueError,
        {"B": zeros(2, 4, 16, 64), "C": zeros(2, 16, 64)},
        "B's groups must divide dim = 6, got 4",
    ),
    "no groups": (ValueError, {"B": zeros(2, 0, 16, 64), "C": zeros(6, 16)}, "B's groups must divide dim = 6, got 0"),
    "D": (ValueError, {"D": zeros(7)}, "D must have shape (dim,) = (6,), got (7,)"),
    "z": (ValueError, {"z": zeros(2, 64, 6)}, "z must have shape (batch, dim, length) = (2, 6, 64), got (2, 64, 6)"),
    "delta_bias": (ValueError, {"delta_bias": zeros(6, 1)}, "delta_bias must have shape (dim,) = (6,), got (6, 1)"),
    "initial_state": (
        ValueError,
        {"initial_state": zeros(6, 16)},
        "initial_state must have shape (batch, dim, state) = (2, 6, 16), got (6, 16)",
    ),
    "seq_idx": (
        ValueError,
        {"seq_idx": zeros(64, dtype=int)},
        "seq_idx must have shape (batch, length) = (2, 64), got (64,)",
    ),
    "seq_idx dtype": (TypeError, {"seq_idx": zeros(2, 64)}, "seq_idx must be integers, got float32"),
    "cu_seqlens batch": (ValueError, {"cu_seqlens": np.array([0, 64])}, "cu_seqlens needs a batch of 1, got 2"),
    "cu_seqlens dtype": (TypeError, {"cu_seqlens": zeros(3)}, "cu_seqlens must be integers, got float32"),
    "both": (
        ValueError,
        {"cu_seqlens": np.array([0, 64]), "seq_idx": zeros(2, 64, dtype=int)},
        "give seq_idx or cu_seqlens, not both",
    ),
    "rule": (ValueError, {"discretization": "euler"}, 'discretization must be "mamba" or "zoh", got \'euler\''),
    "u dtype": (
        TypeError,
        {"u": zeros(2, 6, 64, dtype=int)},
        "u must have dtype float64, float32, float16, bfloat16; got int64",
    ),
    "delta dtype": (
        TypeError,
        {"delta": zeros(2, 6, 64, dtype=half)},
        "delta must have the dtype of u, float32; got float16",
    ),
    "B dtype": (
        TypeError,
        {"B": zeros(2, 2, 16, 64, dtype=half)},
        "B must have the dtype of u, float32; got float16",
    ),
    "A too wide": (
        TypeError,
        {"A": zeros(6, 16, dtype=double)},
        "A must have dtype float32 (or one that it can hold), got float64",
    ),
    "D integers": (
        TypeError,
        {"D": zeros(6, dtype=int)},
        "D must have dtype float32 (or one that it can hold), got int64",
    ),
    "D complex": (
        TypeError,
        {"D": zeros(6, dtype=np.complex64)},
        "D must have dtype float32 (or one that it can hold), got complex64",
    ),
    "state too wide": (
        TypeError,
        {"initial_state": zeros(2, 6, 16, dtype=double)},
        "initial_state must have dtype float32 (or one that it can hold), got float64",
    ),
    "constant B real for complex A": (
        TypeError,
        {"A": zeros(6, 16, dtype=np.complex64), "B": zeros(6, 16), "C": zeros(2, 16, 128)},
        "B must be complex because A is and it is constant, got float32",
    ),
    "complex B for real A": (
        TypeError,
        {"B": zeros(2, 16, 64, dtype=np.complex64)},
        "B must have the dtype of u, float32; got complex64",
    ),
    "complex B too wide": (
        TypeError,
        {"A": zeros(6, 16, dtype=np.complex64), "B": zeros(2, 16, 64, dtype=np.complex128), "C": zeros(2, 16, 128)},
        "B must have dtype float32 (interleaved) or complex64; got complex128",
    ),
    "softplus": (TypeError, {"delta_softplus": "no"}, "delta_softplus must be True or False, got 'no'"),
    "return_last_state": (
        TypeError,
        {"return_last_state": "x" * 10**6},
        "return_last_state must be True or False, got 'xxxxxxxxxxxx...xxxxxxxxxxxxx'",
    ),
    "a list": (TypeError, {"u": [[[1.0]]]}, "u must be a NumPy, CuPy, PyTorch or JAX array, or offer DLPack; got list"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    kind, changes, message = ERRORS[name]
    with pytest.raises(kind) as error:
        sscan.selective_scan(**{**GOOD, **changes})
    assert str(error.value).startswith("selective_scan: ")
    assert message in str(error.value)


CU_SEQLENS: dict[str, tuple[Array, str]] = {
    "too short": (np.array([0, 63]), "0 to 63"),
    "too long": (np.array([0, 65]), "0 to 65"),
    "late": (np.array([1, 64]), "1 to 64"),
    "falling": (np.array([0, 40, 30, 64]), "40 before 30, at 1"),
    "a difference beyond int64": (np.array([0, 2**63 - 1, -(2**63), 64]), f"{2**63 - 1} before {-(2**63)}, at 1"),
    "beyond int64": (np.array([0, 2**63, 64], np.uint64), f"{2**63} before 64, at 1"),
    "a million": (np.arange(10**6), "0 to 999999"),
}


@pytest.mark.parametrize("name", CU_SEQLENS)
def test_errors_of_cu_seqlens(name: str) -> None:
    one = {k: x[:1] if x.ndim > 2 else x for k, x in GOOD.items()}
    cu_seqlens, got = CU_SEQLENS[name]
    expected = f"^selective_scan: cu_seqlens must rise from 0 to length = 64, got {got}$"
    with pytest.raises(ValueError, match=expected):
        sscan.selective_scan(**one, cu_seqlens=cu_seqlens)


def test_errors_of_packed_states() -> None:
    one = {k: x[:1] if x.ndim > 2 else x for k, x in GOOD.items()}
    expected = r"initial_state must have shape \(sequences, dim, state\) = \(2, 6, 16\), got \(1, 6, 16\)"
    with pytest.raises(ValueError, match=expected):
        sscan.selective_scan(**one, cu_seqlens=np.array([0, 3, 64]), initial_state=zeros(1, 6, 16))


BACKWARD_ERRORS = {
    "dy shape": (
        ValueError,
        {"dy": zeros(2, 6, 65)},
        "dy must have shape (batch, dim, length) = (2, 6, 64), got (2, 6, 65)",
    ),
    "dy dtype": (TypeError, {"dy": zeros(2, 6, 64, dtype=double)}, "dy must have the dtype of u, float32; got float64"),
    "dlast_state": (
        ValueError,
        {"dlast_state": zeros(2, 6, 15)},
        "dlast_state must have shape (batch, dim, state) = (2, 6, 16), got (2, 6, 15)",
    ),
    "dlast_state dtype": (
        TypeError,
        {"dlast_state": zeros(2, 6, 16, dtype=double)},
        "dlast_state must have dtype float32 (or one that it can hold), got float64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BACKWARD_ERRORS)
def test_errors_of_backward(name: str) -> None:
    kind, changes, message = BACKWARD_ERRORS[name]
    with pytest.raises(kind) as error:
        sscan.selective_scan_backward(**{"dy": zeros(2, 6, 64), **GOOD, **changes})
    assert str(error.value) == f"selective_scan_backward: {message}"


@pytest.mark.parametrize("name", ["A", "D", "delta_bias", "initial_state"])
def test_parameters_may_be_narrower(name: str) -> None:
    """Parameters and states that the accumulation dtype can hold are widened without loss."""
    problem = problem_of("float32", initial_state=True)
    for dtype in (DTYPES["float16"], DTYPES["bfloat16"]):
        narrow = problem[name].astype(dtype)
        assert_identical(scan(problem, **{name: narrow})["y"], scan(problem, **{name: narrow.astype(np.float32)})["y"])


# --- Inputs are only read; every run gives the same bits --------------------------------------------------------------


@pytest.mark.parametrize("name", ["zoh everything", "complex groups", "constant B and C", "strided memory bfloat16"])
def test_no_input_is_written(name: str) -> None:
    problem = case_of(OP, name).arguments()
    weights = cotangents(scan(problem))
    for x in weights.values():
        x.flags.writeable = False
    y, last_state, checkpoints = sscan.selective_scan_forward(**problem)
    given_ = {**problem, **weights, "checkpoints": checkpoints}
    before = {k: x.tobytes() for k, x in given_.items() if isinstance(x, np.ndarray)}
    sscan.selective_scan_backward(**given_)
    assert {k: x.tobytes() for k, x in given_.items() if isinstance(x, np.ndarray)} == before
    assert y.flags.writeable
    assert last_state.flags.writeable


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_are_identical(kind: str) -> None:
    problem = problem_of(kind, batch=3, dim=70, length=150, initial_state=True)
    outputs = scan(problem)
    weights = cotangents(outputs)
    first = outputs | gradients(problem, weights)
    for _ in range(3):
        for name, x in (scan(problem) | gradients(problem, weights)).items():
            assert_identical(x, first[name], name)


# Runs in a process of its own, with the number of threads that its environment says.
HASHES = """
    import hashlib
    import sys
    import numpy as np
    import sscan

    def digest(batch, dim, length, groups, dtype, rule="mamba", of_A=np.float32):
        rng = np.random.default_rng(0)
        def draw(*shape):
            return rng.standard_normal(shape, np.float32).astype(dtype)
        u, delta, z, dy = (draw(batch, dim, length) for _ in range(4))
        width = 2 * length if of_A is np.complex64 else length
        B, C = (draw(batch, groups, 5, width) for _ in range(2))
        A = -np.exp(rng.standard_normal((dim, 5), np.float32)).astype(of_A) * (1 + 3j if of_A is np.complex64 else 1)
        rest = dict(D=np.ones(dim, np.float32), z=z, delta_softplus=True, discretization=rule)
        rest["initial_state"] = np.ones((batch, dim, 5), of_A)
        *results, checkpoints = sscan.selective_scan_forward(u, delta, A.astype(of_A), B, C, **rest)
        results += sscan.selective_scan_backward(dy, u, delta, A.astype(of_A), B, C, **rest, dlast_state=results[1])
        return hashlib.sha256(b"".join(x.tobytes() for x in results if x is not None)).hexdigest()

    digests = [
        digest(1, 8, 20000, 1, np.float32),
        digest(1, 40, 20000, 1, np.float32, "zoh"),
        digest(3, 70, 150, 2, np.float16),
        digest(1, 4, 20000, 1, np.float32, of_A=np.complex64),
    ]
    from sscan.cpu import _parallel
    sys.stdout.write(" ".join([str(_parallel.threads()), *digests]))
"""


def python(code: str, *arguments: str, **environment: str) -> str:
    """The output of a program in a new process."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_any_number_of_threads_gives_the_same_bits() -> None:
    """Including shapes with fewer channels than threads, which are split along time (check 31)."""
    runs = [python(HASHES, NUMBA_NUM_THREADS=str(n)).split() for n in (1, 2, 3)]
    assert [run[0] for run in runs] == ["1", "2", "3"]
    assert runs[0][1:] == runs[1][1:] == runs[2][1:]


# --- Memory, and sizes beyond 32 bits ---------------------------------------------------------------------------------

# Prints the most memory in use during a call, in bytes beyond what was in use before it.
PEAK = """
    import sys
    import numpy as np
    import sscan

    direction, state = sys.argv[1], int(sys.argv[2])

    def memory(which):  # not getrusage: its maximum begins with that of the parent process
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(which))

    def scan(dim, length):
        rng = np.random.default_rng(0)
        u = rng.standard_normal((1, dim, length), np.float32)
        B, C = (rng.standard_normal((1, state, length), np.float32) for _ in range(2))
        A = -np.ones((dim, state), np.float32)
        before = memory("VmRSS")
        if direction == "forward":
            sscan.selective_scan(u, u, A, B, C, z=u, delta_softplus=True)
        else:
            *_, checkpoints = sscan.selective_scan_forward(u, u, A, B, C, z=u, delta_softplus=True)
            sscan.selective_scan_backward(u, u, u, A, B, C, z=u, delta_softplus=True, checkpoints=checkpoints)
        return 1024 * (memory("VmHWM") - before)

    scan(16, 100)
    sys.stdout.write(str(scan(256, 4096)))
"""


def test_memory_does_not_grow_with_the_states_of_all_steps() -> None:
    """Forward: y and next to nothing. Backward: gradients, checkpoints and partial sums of dB and dC (check 23)."""
    wave, states = 4 * 256 * 4096, 64
    few, many = (int(python(PEAK, "forward", str(n))) for n in (8, states))
    assert few < 2.5 * wave
    assert many < few + wave
    every_state = states * wave
    assert int(python(PEAK, "backward", str(states))) < every_state / 3


RESULTS_AND_PARTS = """
    import sys
    import numpy as np
    import sscan

    def memory(which):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(which))

    def both(batch, dim, length, state):
        u = np.ones((batch, dim, length), np.float32)
        B = np.ones((batch, state, length), np.float32)
        A = -np.ones((dim, state), np.float32)
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # VmHWM begins again
        before = memory("VmRSS")
        y, last_state, checkpoints = sscan.selective_scan_forward(u, u, A, B, B, delta_softplus=True)
        made = sscan.selective_scan_backward(u, u, u, A, B, B, delta_softplus=True, checkpoints=checkpoints)
        return 1024 * (memory("VmHWM") - before)

    shape = tuple(map(int, sys.argv[1:]))
    both(1, shape[1], 5000, shape[3])
    sys.stdout.write(str(both(*shape)))
"""


@pytest.mark.parametrize("shape", [(1, 64, 131072, 16), (1, 16, 65536, 256), (4, 768, 1024, 16)])
def test_memory_of_forward_and_backward(shape: tuple[int, int, int, int]) -> None:
    """The formula of docs/numerics.md."""
    batch, dim, length, state = shape
    slices = min(dim // 16, -(-16 // batch))
    results = 3 * dim + 2 * state  # y, du and ddelta, dB and dC
    expected = 4 * batch * length * (results + dim * state / 32 + 2 * (slices - 1) * state)
    peak = int(python(RESULTS_AND_PARTS, *map(str, shape)))
    assert 0.9 * expected < peak < 1.05 * expected + 2e7


def test_reference_memory_does_grow() -> None:
    """The control of the test above: the definition's backward keeps every state."""
    problem = scan_problem(np.random.default_rng(0), batch=1, dim=16, length=512, state=64)
    tracemalloc.start()
    try:
        reference.selective_scan_backward(np.ones_like(problem["u"]), **problem)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak > 4 * 16 * 512 * 64


def test_strides_beyond_32_bits() -> None:
    """Rows that lie 2^28 elements apart: the last one begins beyond 2^32 elements. Untouched memory costs nothing."""
    rows, apart, length = 18, 2**28, 70
    far = np.lib.stride_tricks.as_strided(
        np.empty(rows * apart, np.float16), (1, rows, length), (0, 2 * apart, 2), writeable=True
    )
    problem = scan_problem(np.random.default_rng(0), batch=1, dim=rows, length=length, dtype="float16")
    far[...] = problem["u"]
    outputs = scan(problem)
    assert_identical(scan(problem, u=far)["y"], outputs["y"])
    dy = cotangents(outputs)
    expected = gradients(problem, dy)
    for name, gradient in gradients(problem, dy, u=far).items():
        assert_identical(gradient, expected[name], name)


def test_large_result_has_more_than_2_to_31_elements() -> None:
    """Its last channels equal a run of their own (check 36): 4.3 GB of bfloat16, from inputs with strides of 0."""
    rng, dtype, dim, length = np.random.default_rng(0), DTYPES["bfloat16"], 2064, 2**20
    u = rng.standard_normal((1, 1, length), np.float32).astype(dtype)
    B, C = rng.standard_normal((2, 1, 1, length), np.float32).astype(dtype)
    A = -np.linspace(0.5, 1.5, dim, dtype=np.float32)[:, None]
    delta = np.full((1, 1, length), 0.1, dtype)

    def channels(count: int) -> Array:
        inputs = (np.broadcast_to(x, (1, count, length)) for x in (u, delta))
        y: Array = sscan.selective_scan(*inputs, A[-count:], B, C)
        return y

    y = channels(dim)
    assert y.size > 2**31
    assert_identical(y[:, -16:], channels(16))
    assert_identical(y[:, :1, :1000], scan({"u": u, "delta": delta, "A": A[:1], "B": B, "C": C})["y"][..., :1000])
