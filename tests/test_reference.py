"""The definition is right: its gradients by complex steps or differences, and checks of paper.md section 7 on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from cases import (
    CASES,
    DIFFERENTIABLE,
    DTYPES,
    Arguments,
    Array,
    Case,
    assert_within,
    backward,
    case_of,
    conv_problem,
    cotangents,
    eps_of,
    error_of,
    forward,
    normal,
    scan_problem,
    upcast,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sscan import reference

if TYPE_CHECKING:
    from collections.abc import Callable

RULES = ("zoh", "mamba", "bilinear")
REAL_AND_COMPLEX = pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def dtype_of(is_complex: bool) -> type[np.inexact[Any]]:
    return np.complex128 if is_complex else np.float64


def lti_problem(is_complex: bool, length: int = 70) -> tuple[Array, Array, Array, Array, Array]:
    """u (2, 5, length), delta (5,), A, B, C (5, 4)."""
    rng, dtype = generator(), dtype_of(is_complex)
    A = -rng.uniform(0.3, 3, (5, 4)) + (1j * rng.uniform(-3, 3, (5, 4)) if is_complex else 0)
    B, C = normal(rng, (5, 4), dtype), normal(rng, (5, 4), dtype)
    return normal(rng, (2, 5, length), np.float64), rng.uniform(0.05, 0.5, 5), A, B, C


# --- The cases themselves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}: {case.name}")
def test_case_is_finite_and_accurate(case: Case) -> None:
    """Every case, in its own dtypes, is finite and close to the exact values, forward and backward."""
    arguments = case.arguments()
    same, exact = forward(reference, case.op, arguments), forward(reference, case.op, upcast(arguments))
    if case.op in DIFFERENTIABLE:
        dy = cotangents(same, state_gradient=case.state_gradient)
        same |= backward(reference, case.op, arguments, dy)
        exact |= backward(reference, case.op, upcast(arguments), upcast(dy))
    for name, x in same.items():
        assert np.isfinite(exact[name]).all()
        assert error_of(x, exact[name]) <= 100 * eps_of(x.dtype), name


def test_cases_are_deterministic_and_named_once() -> None:
    assert len({(case.op, case.name) for case in CASES}) == len(CASES)
    first, again = (case_of("selective_scan", "zoh everything").arguments() for _ in range(2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["u"], case_of("selective_scan", "zoh everything").arguments(seed=1)["u"])
    assert not any(x.flags.writeable for x in first.values() if isinstance(x, np.ndarray))


def test_tolerance_rule_catches_a_planted_error() -> None:
    case = case_of("selective_scan", "base")
    y = forward(reference, case.op, case.arguments())["y"]
    exact = forward(reference, case.op, upcast(case.arguments()))["y"]
    assert_within(y, y, exact, eps_of(y.dtype))
    for wrong in (y * np.float32(1.001), np.where(y == y.max(), np.nan, y), np.full_like(y, np.inf)):
        with pytest.raises(AssertionError, match="exceeds"):
            assert_within(wrong, y, exact, eps_of(y.dtype))
    with pytest.raises(AssertionError, match="shape"):
        assert_within(y[..., 1:], y, exact, eps_of(y.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@REAL_AND_COMPLEX
def test_result_dtypes(dtype: str, is_complex: bool) -> None:
    """Activations and their gradients in the storage dtype, states and parameters in the accumulation dtype."""
    arguments = scan_problem(
        generator(), dtype=dtype, is_complex=is_complex, C="constant", initial_state=True, length=3
    )
    real = np.float64 if dtype == "float64" else np.float32
    system = np.result_type(real, np.complex64) if is_complex else np.dtype(real)
    outputs = forward(reference, "selective_scan", arguments)
    assert (outputs["y"].dtype, outputs["last_state"].dtype) == (DTYPES[dtype], system)
    gradients = backward(reference, "selective_scan", arguments, cotangents(outputs))
    assert {gradients[name].dtype for name in ("du", "ddelta", "dz", "dB")} == {DTYPES[dtype]}
    assert {gradients[name].dtype for name in ("dA", "dC", "dinitial_state")} == {system}
    assert {gradients[name].dtype for name in ("dD", "ddelta_bias")} == {np.dtype(real)}


# --- Gradients: backward against derivatives of the forward alone -----------------------------------------------------

COMPLEX_STEP = 1e-100
DIFFERENCE_STEP = 1e-4


def in_float64(arguments: Arguments) -> Arguments:
    return {
        name: x.astype(np.result_type(np.float64, x.dtype)) if is_differentiable(x) else x
        for name, x in arguments.items()
    }


def is_differentiable(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind not in "biu"


def loss(outputs: dict[str, Array], weights: dict[str, Array]) -> float:
    return float(sum((weights[f"d{name}"].conj() * x).real.sum() for name, x in outputs.items()))


def complex_step(op: str, arguments: Arguments, weights: dict[str, Array], name: str, direction: Array) -> float:
    """Derivative of the loss of a real problem, exact to rounding: the imaginary part of f(x + i h direction) / h.

    A complex A means another system to these ops, one that returns 2 Re(C h). There the imaginary part of C h is read
    with C / 2i instead, and the term D u, which does not depend on A, is left out.
    """
    step = 1j * COMPLEX_STEP * direction
    if name == "A" and op in ("selective_scan", "ssm_kernel"):
        changed = {key: x for key, x in arguments.items() if key != "D"}
        changed |= {"A": arguments["A"] + step, "B": arguments["B"] + 0j, "C": arguments["C"] / 2j}
    else:
        changed = {key: x + 0j if is_differentiable(x) and key != "A" else x for key, x in arguments.items()}
        changed[name] = arguments[name] + step
    outputs = forward(reference, op, changed)
    return loss({k: x.imag if np.iscomplexobj(x) else x for k, x in outputs.items()}, weights) / COMPLEX_STEP


def difference(op: str, arguments: Arguments, weights: dict[str, Array], name: str, direction: Array) -> float:
    """The central difference of fourth order."""
    total = 0.0
    for factor, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
        moved = {**arguments, name: arguments[name] + factor * DIFFERENCE_STEP * direction}
        total += weight * loss(forward(reference, op, moved), weights)
    return total / (12 * DIFFERENCE_STEP)


def check_gradient(op: str, arguments: Arguments, weights: dict[str, Array], name: str, gradient: Array) -> None:
    """Compare <gradient, v> with the derivative along a random v, relative to the size of the terms in that sum."""
    v = normal(generator(1), gradient.shape, arguments[name].dtype)
    terms = (gradient.conj() * v).real
    if any(np.iscomplexobj(x) for x in arguments.values()):
        expected, tolerance = difference(op, arguments, weights, name, v), 1e-7
        noise = 1e-15 / DIFFERENCE_STEP * (1 + abs(loss(forward(reference, op, arguments), weights)))
    else:
        expected, tolerance, noise = complex_step(op, arguments, weights, name, v), 1e-10, 1e-13
    error = abs(terms.sum() - expected)
    assert error <= tolerance * np.linalg.norm(terms) + noise, (
        f"d{name}: {error / (np.linalg.norm(terms) + 1e-300):.2g}"
    )


def gradient_problem(case: Case) -> tuple[Arguments, dict[str, Array], dict[str, Array]]:
    arguments = in_float64(case.arguments())
    weights = cotangents(forward(reference, case.op, arguments))
    used = weights if case.state_gradient else dict([next(iter(weights.items()))])
    gradients = backward(reference, case.op, arguments, used)
    return arguments, {name: w * (name in used) for name, w in weights.items()}, gradients


GRADIENT_CASES = [case for case in CASES if case.op in DIFFERENTIABLE]


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda case: f"{case.op}: {case.name}")
def test_gradients(case: Case) -> None:
    """Every gradient of every op under every option."""
    arguments, weights, gradients = gradient_problem(case)
    inputs = [name for name, x in arguments.items() if is_differentiable(x)]
    assert sorted(gradients) == sorted(f"d{name}" for name in inputs)
    for name in inputs:
        assert gradients[f"d{name}"].shape == arguments[name].shape
        check_gradient(case.op, arguments, weights, name, gradients[f"d{name}"])


PLANTED = [
    case_of(op, "base") for op in ("selective_scan", "linear_scan", "causal_conv1d", "rms_norm", "ssm_convolution")
]
PLANTED += [case_of("selective_scan", "complex groups"), case_of("selective_scan", "zoh everything")]
PLANTED += [case_of("discretize", "zoh"), case_of("ssm_kernel", "bilinear"), case_of("ssm_kernel", "zoh complex")]


@pytest.mark.parametrize("case", PLANTED, ids=lambda case: f"{case.op}: {case.name}")
def test_gradient_checker_catches_a_planted_error(case: Case) -> None:
    """0.1 % in a whole gradient, and 0.1 % in its largest element alone."""
    arguments, weights, gradients = gradient_problem(case)
    for name, gradient in gradients.items():
        one_element = np.where(np.abs(gradient) == np.abs(gradient).max(), 1.001 * gradient, gradient)
        for wrong in (1.001 * gradient, one_element):
            with pytest.raises(AssertionError, match=name):
                check_gradient(case.op, arguments, weights, name[1:], wrong)


# --- Scalar functions -------------------------------------------------------------------------------------------------


@REAL_AND_COMPLEX
def test_phi1_and_psi_are_their_integrals(is_complex: bool) -> None:
    """phi1(z) = int_0^1 exp(z s) ds and psi(z) = int_0^1 s exp(z s) ds, by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    s = (nodes + 1) / 2
    z = -np.concatenate([[0.0], np.geomspace(1e-12, 30, 200), -np.geomspace(1e-12, 2, 50)])
    z = z * np.exp(1j * 0.4) if is_complex else z
    kernel = np.exp(z[:, None] * s) * weights / 2
    np.testing.assert_allclose(reference.phi1(z), kernel.sum(1), rtol=1e-13)
    np.testing.assert_allclose(reference.psi(z), (kernel * s).sum(1), rtol=1e-13)


def test_expm1_of_complex_numbers_does_not_cancel() -> None:
    z = np.array([1e-9 + 1e-9j, -1e-12 + 3e-7j, 0j, -2.5 + 40j, 1e-20j])
    wide = z.astype(np.clongdouble)
    exact = np.where(np.abs(wide) < 1e-5, wide + wide**2 / 2 + wide**3 / 6, np.exp(wide) - 1)
    np.testing.assert_allclose(reference.expm1(z), exact.astype(np.complex128), rtol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softplus_and_sigmoid_at_extremes(dtype: Any) -> None:
    v = np.array([-1e4, -100, -20, 0, 20, 100, 1e4], dtype)
    np.testing.assert_allclose(reference.softplus(v)[3:], [np.log(2), 20 + np.exp(-20), 100, 1e4], rtol=1e-6)
    np.testing.assert_allclose(reference.softplus(v)[1:3], np.exp(v[1:3].astype(np.float64)), rtol=1e-6, atol=1e-45)
    np.testing.assert_allclose(reference.sigmoid(v) + reference.sigmoid(-v), 1, rtol=1e-6)
    np.testing.assert_array_equal(reference.silu(v)[[0, 3, 6]], [0, 0, 1e4])


# --- Check 1: Theorem 1 -----------------------------------------------------------------------------------------------


def theorem_problem(dtype: Any, w: float = 1.3, b: float = -0.4) -> tuple[Array, Array, Callable[..., Array]]:
    """x, the pre-activation v = w x + b, and the scan of Theorem 1 as a function of the rule."""
    x = normal(generator(), (2, 3, 50), dtype)
    one = np.ones((3, 1), dtype)
    bias = np.full(3, b, dtype)

    def scan(rule: str, scale: float = 1.0) -> Array:
        y = reference.selective_scan(
            x,
            (w * x).astype(dtype),
            -one,
            one * dtype(scale),
            one,
            delta_bias=bias,
            delta_softplus=True,
            discretization=rule,
        )
        return np.asarray(y)

    return x, (w * x + b).astype(dtype), scan


def gated_recurrence(x: Array, keep: Array, write: Array) -> Array:
    h, out = np.zeros(x.shape[:2], x.dtype), np.empty_like(x)
    for t in range(x.shape[2]):
        h = keep[..., t] * h + write[..., t] * x[..., t]
        out[..., t] = h
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 2e-15), (np.float32, 1e-6)])
def test_theorem_1(dtype: Any, tolerance: float) -> None:
    """Under zoh, h_t = (1 - g_t) h_{t-1} + g_t x_t with g = sigmoid(v) (eq. 5); B scales the input term."""
    x, v, scan = theorem_problem(dtype)
    g = 1 / (1 + np.exp(-v.astype(np.float64)))
    expected = gated_recurrence(x.astype(np.float64), 1 - g, g)
    assert error_of(scan("zoh"), expected) < tolerance
    assert error_of(scan("zoh", 2.5), 2.5 * expected) < tolerance


def test_theorem_1_fails_under_the_mamba_rule() -> None:
    """The negative control: there the input is weighted by softplus(v) = -log(1 - g) >= g."""
    x, v, scan = theorem_problem(np.float64)
    g = 1 / (1 + np.exp(-v))
    assert error_of(scan("mamba"), gated_recurrence(x, 1 - g, g)) > 0.1
    assert error_of(scan("mamba"), gated_recurrence(x, 1 - g, -np.log1p(-g))) < 2e-15


def test_theorem_1_with_one_gate_for_all_channels() -> None:
    x = normal(generator(), (2, 3, 50), np.float64)
    v = np.broadcast_to(x.mean(axis=1, keepdims=True), x.shape)
    one = np.ones((3, 1))
    y = reference.selective_scan(x, v, -one, one, one, delta_softplus=True, discretization="zoh")
    assert error_of(y, gated_recurrence(x, 1 - reference.sigmoid(v), reference.sigmoid(v))) < 2e-15


@pytest.mark.parametrize(("v", "expected"), [(40.0, "the input"), (-40.0, "the state")])
def test_theorem_1_edges(v: float, expected: str) -> None:
    x, h0, one = (
        normal(generator(), (1, 3, 1), np.float64),
        normal(generator(1), (1, 3, 1), np.float64),
        np.ones((3, 1)),
    )
    arguments = {"u": x, "delta": np.full_like(x, v), "A": -one, "B": one, "C": one, "initial_state": h0}
    arguments |= {"delta_softplus": True, "discretization": "zoh"}
    outputs = forward(reference, "selective_scan", arguments)
    np.testing.assert_allclose(outputs["y"], x if expected == "the input" else h0, atol=1e-15)
    gradients = backward(reference, "selective_scan", arguments, cotangents(outputs))
    assert all(np.isfinite(g).all() for g in gradients.values())


# --- Checks 2 and 3: the LTI system -----------------------------------------------------------------------------------


def fft_convolution(u: Array, kernel: Array) -> Array:
    length = u.shape[-1]
    return np.fft.irfft(np.fft.rfft(u, 2 * length) * np.fft.rfft(kernel, 2 * length), 2 * length)[..., :length]


def scans_of_lti(u: Array, delta: Array, A: Array, B: Array, C: Array, rule: str) -> dict[str, Array]:
    """The selective scan with parameters that are constant, or vary in form only, and the scan primitive."""
    batch, dim, length = u.shape
    steps = np.broadcast_to(delta[:, None], u.shape)
    B_, C_ = (np.broadcast_to(M[None, :, :, None], (batch, *M.shape, length)) for M in (B, C))
    A_bar, B_bar = reference.discretize(delta, A, B, rule)
    a = np.broadcast_to(A_bar[..., None], (batch, dim, A.shape[1], length))
    h = reference.linear_scan(a, B_bar[..., None] * u[:, :, None])
    factor = 2 if np.iscomplexobj(A) else 1
    return {
        "constant": np.asarray(reference.selective_scan(u, steps, A, B, C, discretization=rule)),
        "varying": np.asarray(reference.selective_scan(u, steps, A, B_, C_, discretization=rule)),
        "constant B": np.asarray(reference.selective_scan(u, steps, A, B, C_, discretization=rule)),
        "constant C": np.asarray(reference.selective_scan(u, steps, A, B_, C, discretization=rule)),
        "linear scan": factor * np.einsum("dn,bdnt->bdt", C, h).real,
    }


@pytest.mark.parametrize("rule", RULES)
@REAL_AND_COMPLEX
def test_lti_recurrence_convolution_and_scan_agree(rule: str, is_complex: bool) -> None:
    u, delta, A, B, C = lti_problem(is_complex)
    expected = reference.ssm_recurrence(u, delta, A, B, C, rule)
    K = reference.ssm_kernel(delta, A, B, C, u.shape[2], rule)
    assert error_of(reference.ssm_convolution(u, K), expected) < 1e-13
    assert error_of(fft_convolution(u, K), expected) < 1e-13
    for name, y in scans_of_lti(u, delta, A, B, C, rule).items():
        assert error_of(y, expected) < 1e-13, name


@pytest.mark.parametrize("rule", RULES)
@REAL_AND_COMPLEX
def test_kernel_is_its_closed_form(rule: str, is_complex: bool) -> None:
    """Eq. (3a) with powers instead of a loop: K_k = C A_bar^k B_bar."""
    _, delta, A, B, C = lti_problem(is_complex)
    A_bar, B_bar = reference.discretize(delta, A, B, rule)
    K = np.einsum("dn,dnk->dk", C * B_bar, A_bar[..., None] ** np.arange(20))
    K = 2 * K.real if is_complex else K
    assert error_of(reference.ssm_kernel(delta, A, B, C, 20, rule), K) < 1e-14


def test_discretize_is_equation_4() -> None:
    """Zoh as printed, where nothing cancels: (Delta A)^-1 (exp(Delta A) - I) Delta B; and the other rules' formulas."""
    _, delta, A, B, _ = lti_problem(True)
    z = delta[:, None] * A
    expected = {
        "zoh": (np.exp(z), (np.exp(z) - 1) / z * delta[:, None] * B),
        "mamba": (np.exp(z), delta[:, None] * B),
        "bilinear": ((1 + z / 2) / (1 - z / 2), delta[:, None] * B / (1 - z / 2)),
        "euler": (1 + z, delta[:, None] * B),
    }
    for rule, (A_bar, B_bar) in expected.items():
        for actual, exact in zip(reference.discretize(delta, A, B, rule), (A_bar, B_bar), strict=True):
            np.testing.assert_allclose(actual, exact, rtol=1e-14)
    with pytest.raises(ValueError, match="tustin"):
        reference.discretize(delta, A, B, "tustin")


def test_convolution_does_not_match_when_delta_varies() -> None:
    """The control of the check above: selection is what a convolution cannot do."""
    u, delta, A, B, C = lti_problem(False)
    steps = delta[:, None] * generator(1).uniform(0.5, 1.5, u.shape)
    K = reference.ssm_kernel(delta, A, B, C, u.shape[2])
    assert (
        error_of(reference.ssm_convolution(u, K), reference.selective_scan(u, steps, A, B, C, discretization="zoh"))
        > 0.1
    )


# --- Check 6: the scan's operator is associative ----------------------------------------------------------------------

Element = tuple[Any, Any]


def combine(first: Element, second: Element) -> Element:
    """Two steps as one: h -> a2 (a1 h + b1) + b2."""
    return second[0] * first[0], second[0] * first[1] + second[1]


def hillis_steele(a: Array, b: Array) -> Array:
    offset = 1
    while offset < a.shape[-1]:
        new_a, new_b = combine((a[..., :-offset], b[..., :-offset]), (a[..., offset:], b[..., offset:]))
        a, b = np.concatenate([a[..., :offset], new_a], -1), np.concatenate([b[..., :offset], new_b], -1)
        offset *= 2
    return b


def blelloch(a: Array, b: Array) -> Array:
    """Combine neighbours, scan the half-length sequence, and fill in the odd places from it."""
    length = a.shape[-1]
    if length == 1:
        return b
    even, odd = slice(0, length - length % 2, 2), slice(1, None, 2)
    pairs = combine((a[..., even], b[..., even]), (a[..., odd], b[..., odd]))
    h = np.empty_like(b)
    h[..., odd] = blelloch(*pairs)
    h[..., 0] = b[..., 0]
    h[..., 2::2] = a[..., 2::2] * h[..., 1:-1:2] + b[..., 2::2]
    return h


finite = st.complex_numbers(max_magnitude=10, allow_nan=False)


@SETTINGS
@given(*[st.tuples(finite, finite)] * 3)
def test_scan_operator_is_associative_with_identity(x: Element, y: Element, z: Element) -> None:
    np.testing.assert_allclose(combine(combine(x, y), z), combine(x, combine(y, z)), rtol=1e-12, atol=1e-12)
    assert combine((1, 0), x) == x == combine(x, (1, 0))


@SETTINGS
@given(length=st.integers(1, 70), seed=st.integers(0, 99), is_complex=st.booleans())
def test_tree_shapes_agree(length: int, seed: int, is_complex: bool) -> None:
    rng, dtype = generator(seed), dtype_of(is_complex)
    a, b = 0.5 * normal(rng, (3, length), dtype), normal(rng, (3, length), dtype)
    h = reference.linear_scan(a, b)
    assert error_of(hillis_steele(a, b), h) < 1e-13
    assert error_of(blelloch(a, b), h) < 1e-13


@SETTINGS
@given(length=st.integers(0, 30), seed=st.integers(0, 99))
def test_initial_state_is_one_more_element(length: int, seed: int) -> None:
    """An initial state equals an element (0, h_0) in front; reverse equals the scan of the flipped arrays."""
    rng = generator(seed)
    a, b, h0 = normal(rng, (3, length), np.float64), normal(rng, (3, length), np.float64), normal(rng, (3,), np.float64)
    h = reference.linear_scan(a, b, h0)
    longer = reference.linear_scan(np.insert(a, 0, 0, axis=1), np.insert(b, 0, h0, axis=1))
    np.testing.assert_array_equal(h, longer[:, 1:])
    np.testing.assert_array_equal(reference.linear_scan(a[:, ::-1], b[:, ::-1], h0, reverse=True)[:, ::-1], h)


# --- Checks 9, 10 and 12: what Delta does -----------------------------------------------------------------------------


def test_large_delta_resets_under_zoh() -> None:
    """Delta = 1e4 forgets the past and leaves h_t = -B x / A."""
    problem = scan_problem(
        generator(), dtype="float64", delta="positive", delta_bias=False, delta_softplus=False, length=9
    )
    problem |= {"discretization": "zoh", "delta": problem["delta"].copy()}
    problem["delta"][..., 4] = 1e4
    other = {**problem, "u": problem["u"].copy()}
    other["u"][..., :4] += 1
    y, changed = (reference.selective_scan(**p) for p in (problem, other))
    assert not np.array_equal(y[..., :4], changed[..., :4])
    np.testing.assert_array_equal(y[..., 4:], changed[..., 4:])
    upto = {k: x[..., :5] if k in ("u", "delta", "B", "C", "z") else x for k, x in problem.items()}
    _, h = reference.selective_scan(**upto, return_last_state=True)
    expected = -problem["B"][:, None, :, 4] * problem["u"][..., 4, None] / problem["A"]
    np.testing.assert_allclose(h, expected, rtol=1e-14)


def test_large_delta_resets_under_mamba_where_B_is_zero() -> None:
    problem = scan_problem(
        generator(), dtype="float64", delta="positive", delta_bias=False, delta_softplus=False, length=9
    )
    problem |= {"delta": problem["delta"].copy(), "B": problem["B"].copy()}
    problem["delta"][..., 4], problem["B"][..., 4] = 1e4, 0
    after = {k: x[..., 5:] if k in ("u", "delta", "B", "C", "z") else x for k, x in problem.items()}
    np.testing.assert_array_equal(reference.selective_scan(**problem)[..., 5:], reference.selective_scan(**after))


@SETTINGS
@given(ignored=st.sets(st.integers(0, 19)), rule=st.sampled_from(["mamba", "zoh"]), is_complex=st.booleans())
def test_ignored_tokens_can_be_deleted(ignored: set[int], rule: str, is_complex: bool) -> None:
    """Softplus of a very negative number is Delta = 0: the state is left alone, whatever the spacing."""
    form = "shared complex" if is_complex else "shared"
    problem = scan_problem(generator(), dtype="float64", dim=3, length=20, is_complex=is_complex, B=form, C=form)
    kept = [t for t in range(20) if t not in ignored]
    problem |= {"discretization": rule, "delta": problem["delta"].copy()}
    problem["delta"][..., sorted(ignored)] = -1000
    shorter = {k: x[..., kept] if k in ("u", "delta", "B", "C", "z") else x for k, x in problem.items()}
    y, h = reference.selective_scan(**problem, return_last_state=True)
    y_kept, h_kept = reference.selective_scan(**shorter, return_last_state=True)
    np.testing.assert_array_equal(y[..., kept], y_kept)
    np.testing.assert_array_equal(h, h_kept)


@pytest.mark.parametrize(("rule", "is_invariant"), [("zoh", True), ("mamba", False), ("bilinear", False)])
@REAL_AND_COMPLEX
def test_refinement(rule: str, is_invariant: bool, is_complex: bool) -> None:
    """Delta / k with every input repeated k times gives the same coarse outputs under zoh, and only there."""
    u, delta, A, B, C = lti_problem(is_complex, length=30)
    coarse = reference.ssm_recurrence(u, delta, A, B, C, rule)
    fine = reference.ssm_recurrence(np.repeat(u, 4, axis=2), delta / 4, A, B, C, rule)[..., 3::4]
    error = error_of(fine, coarse)
    assert error < 1e-13 if is_invariant else error > 1e-4


# --- Check 13: small Delta --------------------------------------------------------------------------------------------


def test_small_delta_keeps_its_digits_in_float32() -> None:
    """B_bar within 1e-6 for z from -1 down to -1e-8; the printed form of eq. (4) would lose half of them by 1e-4."""
    delta = np.geomspace(1e-8, 1, 400, dtype=np.float32)
    one = np.ones((400, 1), np.float32)
    for A in (-one, one * np.complex64(-0.6 + 0.8j)):
        B_bar = reference.discretize(delta, A, one.astype(A.dtype))[1][:, 0]
        z = delta.astype(np.longdouble) * A[:, 0]
        series = sum(z**k / float(np.prod(np.arange(1.0, k + 2))) for k in range(25))
        assert np.max(np.abs(B_bar / (delta * series) - 1)) < 1e-6


@REAL_AND_COMPLEX
def test_gradients_are_finite_where_delta_is_zero(is_complex: bool) -> None:
    dtype = dtype_of(is_complex)
    A, B = np.full((3, 2), -1, dtype), np.ones((3, 2), dtype)
    gradients = reference.discretize_backward(B, B, np.zeros(3), A, B)
    np.testing.assert_array_equal(gradients.ddelta, np.sum(A + B, axis=1).real)  # d exp(z) = A, d (Delta phi1(z)) = 1
    np.testing.assert_array_equal(gradients.dA, 0)
    np.testing.assert_array_equal(gradients.dB, 0)


# --- Check 16: complex A ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["mamba", "zoh"])
def test_complex_state_is_a_rotation_with_decay(rule: str) -> None:
    """A conjugate pair is the real system h' = [[p, -q], [q, p]] h + (Re B, Im B) x, y = 2 (Re C, -Im C) h."""
    u, delta, A, B, C = lti_problem(True, length=25)
    A_bar, B_bar = reference.discretize(delta, A, B, rule)
    decay, angle = np.exp(delta[:, None] * A.real), delta[:, None] * A.imag
    rotation = decay * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    h, y = np.zeros((2, 2, *A.shape)), np.empty_like(u)  # (batch, re and im, dim, state)
    for t in range(u.shape[2]):
        h = np.einsum("ijdn,bjdn->bidn", rotation, h) + np.array([B_bar.real, B_bar.imag]) * u[:, None, :, t, None]
        y[..., t] = 2 * (C.real * h[:, 0] - C.imag * h[:, 1]).sum(-1)
    np.testing.assert_allclose(A_bar, rotation[0, 0] + 1j * rotation[1, 0], rtol=1e-14)
    steps = np.broadcast_to(delta[:, None], u.shape)
    assert error_of(reference.selective_scan(u, steps, A, B, C, discretization=rule), y) < 1e-14


@pytest.mark.parametrize("rule", ["mamba", "zoh"])
def test_complex_without_imaginary_parts_is_real_with_halved_C(rule: str) -> None:
    problem = scan_problem(generator(), dtype="float64", discretization=rule, initial_state=True, B="2")
    problem_c = {**problem, "C": problem["C"] / 2 + 0j} | {k: problem[k] + 0j for k in ("A", "B", "initial_state")}
    real, as_complex = (forward(reference, "selective_scan", p) for p in (problem, problem_c))
    assert error_of(as_complex["y"], real["y"]) < 1e-14
    assert error_of(as_complex["last_state"], real["last_state"].astype(np.complex128)) < 1e-14
    dy = cotangents({"y": real["y"]})
    real, as_complex = (backward(reference, "selective_scan", p, dy) for p in (problem, problem_c))
    for name, g in real.items():
        assert error_of(as_complex[name].real / (2 if name == "dC" else 1), g) < 1e-13, name


def test_interleaved_is_complex_arrays() -> None:
    problem = scan_problem(generator(), dtype="float64", is_complex=True, B="2", C="shared")
    arrays = {name: problem[name][..., 0::2] + 1j * problem[name][..., 1::2] for name in ("B", "C")}
    y, y_arrays = (reference.selective_scan(**p) for p in (problem, problem | arrays))
    np.testing.assert_array_equal(y, y_arrays)
    dy = cotangents({"y": y})
    given_, expected = (backward(reference, "selective_scan", p, dy) for p in (problem, problem | arrays))
    for name in ("dB", "dC"):
        np.testing.assert_array_equal(given_[name][..., 0::2] + 1j * given_[name][..., 1::2], expected[name])


# --- Check 17: groups, and the forms of B and C -----------------------------------------------------------------------


def test_groups() -> None:
    """One group is the shared form; as many groups as channels is a matrix per channel; gradients sum accordingly."""
    shared = scan_problem(generator(), dtype="float64", dim=6, length=20)
    one = {**shared, "B": shared["B"][:, None], "C": shared["C"][:, None]}
    each = {**shared, **{name: np.repeat(one[name], 6, axis=1) for name in ("B", "C")}}
    two = {**shared, **{name: np.repeat(one[name], 2, axis=1) for name in ("B", "C")}}
    expected = forward(reference, "selective_scan", shared)
    dy = cotangents(expected)
    gradients = backward(reference, "selective_scan", shared, dy)
    for problem in (one, two, each):
        assert error_of(forward(reference, "selective_scan", problem)["y"], expected["y"]) < 1e-15
        for name, g in backward(reference, "selective_scan", problem, dy).items():
            assert error_of(g.sum(axis=1) if name in ("dB", "dC") else g, gradients[name]) < 1e-14, name


def test_groups_are_separate_systems() -> None:
    """Channels of group g see only the B and C of group g."""
    problem = scan_problem(generator(), dtype="float64", dim=6, length=20, B="3", C="3")
    y = reference.selective_scan(**problem)
    for g in range(3):
        part = {name: x[:, 2 * g : 2 * g + 2] for name, x in problem.items() if name in ("u", "delta", "z")}
        part |= {name: problem[name][2 * g : 2 * g + 2] for name in ("A", "D", "delta_bias")}
        part |= {name: problem[name][:, g] for name in ("B", "C")}
        assert error_of(reference.selective_scan(**part, delta_softplus=True), y[:, 2 * g : 2 * g + 2]) < 1e-15


@pytest.mark.parametrize("names", ["B", "C", "BC"])
@REAL_AND_COMPLEX
def test_constant_is_broadcast_varying(names: str, is_complex: bool) -> None:
    """Constant (dim, state) equals a group per channel that repeats over batch and time; its gradient is their sum."""
    forms = {name: "constant" if name in names else "2" for name in "BC"}
    constant = scan_problem(generator(), dtype="float64", dim=6, length=20, is_complex=is_complex, **forms)
    varying = dict(constant)
    for name in names:
        varying[name] = np.broadcast_to(constant[name][None, :, :, None], (2, 6, 8, 20))
    expected = forward(reference, "selective_scan", varying)
    assert error_of(forward(reference, "selective_scan", constant)["y"], expected["y"]) < 1e-15
    dy = cotangents(expected)
    sums = backward(reference, "selective_scan", varying, dy)
    for name, g in backward(reference, "selective_scan", constant, dy).items():
        assert error_of(g, sums[name].sum(axis=(0, 3)) if name[1:] in list(names) else sums[name]) < 1e-14, name


# --- Resets, splits and steps -----------------------------------------------------------------------------------------


def cut(problem: Arguments, i: int, j: int, **changes: Any) -> Arguments:
    """The problem on times i to j only."""
    timed = ("u", "delta", "z", "B", "C", "x")
    return {name: x[..., i:j] if name in timed else x for name, x in problem.items()} | changes


BORDERS = [0, 4, 4, 5, 19]
PACKABLE: dict[str, tuple[Arguments, str]] = {
    "selective_scan": (scan_problem(generator(), dtype="float64", batch=1, length=19, B="2"), "last_state"),
    "causal_conv1d": (conv_problem(generator(), dtype="float64", batch=1, length=19), "final_state"),
}


@pytest.mark.parametrize("op", PACKABLE)
def test_packed_sequences_are_separate_runs(op: str) -> None:
    """cu_seqlens with states of its own, and seq_idx without, equal one run per sequence: outputs and gradients."""
    problem, state = PACKABLE[op]
    state_shape = (4, *forward(reference, op, problem)[state].shape[1:])
    h0 = normal(generator(2), state_shape, np.float64)
    packed = {**problem, "initial_state": h0, "cu_seqlens": np.array(BORDERS)}
    spans = list(zip(BORDERS[:-1], BORDERS[1:], strict=True))
    runs = [cut(problem, i, j, initial_state=h0[s : s + 1]) for s, (i, j) in enumerate(spans)]

    outputs, parts = forward(reference, op, packed), [forward(reference, op, run) for run in runs]
    np.testing.assert_array_equal(outputs["y"], np.concatenate([part["y"] for part in parts], axis=2))
    np.testing.assert_array_equal(outputs[state], np.concatenate([part[state] for part in parts]))

    weights = cotangents(outputs)
    gradients = backward(reference, op, packed, weights)
    part_gradients = [
        backward(reference, op, run, {"dy": weights["dy"][..., i:j], f"d{state}": weights[f"d{state}"][s : s + 1]})
        for s, ((i, j), run) in enumerate(zip(spans, runs, strict=True))
    ]
    for name, g in gradients.items():
        pieces = [part[name] for part in part_gradients]
        if name == "dinitial_state":
            expected = np.concatenate(pieces)
        else:
            expected = np.concatenate(pieces, axis=-1) if g.shape[-1] == 19 else np.sum(pieces, axis=0)
        assert error_of(g, expected) < 1e-14, name


@pytest.mark.parametrize("op", PACKABLE)
def test_seq_idx_resets_and_leaks_nothing(op: str) -> None:
    problem, state = PACKABLE[op]
    seq_idx = np.repeat([7, 3, 7], [4, 1, 14])[None]
    h0 = normal(generator(2), forward(reference, op, problem)[state].shape, np.float64)
    whole = {**problem, "initial_state": h0, "seq_idx": seq_idx}
    outputs = forward(reference, op, whole)
    first, second, third = cut(problem, 0, 4, initial_state=h0), cut(problem, 4, 5), cut(problem, 5, 19)
    parts = [forward(reference, op, part) for part in (first, second, third)]
    np.testing.assert_array_equal(outputs["y"], np.concatenate([part["y"] for part in parts], axis=2))
    np.testing.assert_array_equal(outputs[state], parts[-1][state])

    weights = cotangents(outputs)
    weights["dy"][..., :5] = 0  # only the last sequence, and the state it leaves, matter
    gradients = backward(reference, op, whole, weights)
    np.testing.assert_array_equal(gradients["dinitial_state"], 0)
    for name in ("du", "ddelta", "dB", "dC", "dz", "dx"):
        if name in gradients:
            np.testing.assert_array_equal(gradients[name][..., :5], 0)
            assert np.any(gradients[name][..., 5:])


@SETTINGS
@given(k=st.integers(0, 19), op=st.sampled_from(sorted(PACKABLE)))
def test_split_and_carry_is_the_whole(k: int, op: str) -> None:
    """Running [0, k) and then [k, L) from the state it left gives the whole run."""
    problem, state = PACKABLE[op]
    whole, first = forward(reference, op, problem), forward(reference, op, cut(problem, 0, k))
    second = forward(reference, op, cut(problem, k, 19, initial_state=first[state]))
    np.testing.assert_array_equal(np.concatenate([first["y"], second["y"]], axis=2), whole["y"])
    np.testing.assert_array_equal(second[state], whole[state])


def test_state_update_is_the_scan_token_by_token() -> None:
    problem = scan_problem(generator(), dtype="float64", length=6, B="2", C="shared")
    y, last_state = reference.selective_scan(**problem, return_last_state=True)
    state, untouched = np.zeros((5, 20, 8)), normal(generator(1), (3, 20, 8), np.float64)
    state[[0, 2, 4]] = untouched
    for t in range(6):
        step = {name: problem[name][..., t] for name in ("B", "C", "z")}
        y_t = reference.selective_state_update(
            state, problem["u"][..., t], problem["delta"][..., t], problem["A"], D=problem["D"], **step,
            dt_bias=problem["delta_bias"], dt_softplus=True, state_batch_indices=np.array([3, 1]),
        )  # fmt: skip
        np.testing.assert_array_equal(y_t, y[..., t])
    np.testing.assert_array_equal(state[[3, 1]], last_state)
    np.testing.assert_array_equal(state[[0, 2, 4]], untouched)


@pytest.mark.parametrize(("width", "kept"), [(4, 3), (4, 4), (4, 6), (1, 0), (1, 2)])
def test_conv_update_is_the_convolution_token_by_token(width: int, kept: int) -> None:
    rng = generator()
    x, weight, bias = (normal(rng, shape, np.float64) for shape in ((2, 5, 9), (5, width), (5,)))
    y = reference.causal_conv1d(x, weight, bias, "silu")
    state = np.zeros((2, 5, kept))
    for t in range(9):
        np.testing.assert_array_equal(reference.causal_conv1d_update(x[..., t], state, weight, bias, "silu"), y[..., t])
    np.testing.assert_array_equal(state, x[..., 9 - kept :])


def test_convolution_is_numpys() -> None:
    rng = generator()
    x, weight = normal(rng, (2, 5, 30), np.float64), normal(rng, (5, 4), np.float64)
    y = reference.causal_conv1d(x, weight)
    for b, d in np.ndindex(2, 5):
        np.testing.assert_allclose(y[b, d], np.convolve(x[b, d], weight[d, ::-1])[:30], rtol=1e-12, atol=1e-12)


def test_rms_norm_has_unit_mean_square_and_returns_the_sum() -> None:
    rng = generator()
    x, residual = normal(rng, (3, 40), np.float64), normal(rng, (3, 40), np.float64)
    y, total = reference.rms_norm(x, np.ones(40), residual, eps=0.0)
    np.testing.assert_array_equal(total, x + residual)
    np.testing.assert_allclose((y**2).mean(axis=-1), 1, rtol=1e-14)
    np.testing.assert_array_equal(reference.rms_norm(total, np.ones(40), eps=0.0), y)
