"""The ops around the scan: errors, updates in place, and what holds for every kernel whatever the definition says."""

from __future__ import annotations

import gc
import hashlib
import os
import re
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from cases import (
    DIFFERENTIABLE,
    DTYPES,
    Arguments,
    Array,
    Case,
    backward,
    case_of,
    check_backward,
    check_forward,
    conv_problem,
    convolution_problem,
    cotangents,
    discretize_problem,
    eps_of,
    forward,
    kernel_problem,
    linear_scan_problem,
    norm_problem,
    update_problem,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import sscan

if TYPE_CHECKING:
    from collections.abc import Callable

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)
WIDTHS = pytest.mark.parametrize("width", [1, 2, 4, 8])

# --- Errors: the argument, what was expected, what came ---------------------------------------------------------------

ROUNDED = np.float64  # what nothing of a float32 problem may be given in
CASE = {
    "causal_conv1d": "initial state",
    "causal_conv1d_update": "base",
    "rms_norm": "residual",
    "linear_scan": "initial state",
    "selective_state_update": "groups 2",
    "discretize": "zoh 2 B",
    "ssm_kernel": "zoh",
    "ssm_convolution": "base",
}


def short(x: Array) -> Array:
    """One number less along the last axis."""
    return x[..., :-1].copy()


def integers(x: Array) -> Array:
    return x.astype(np.int32)


def double(x: Array) -> Array:
    return x.astype(np.float64)


# (op, argument, change of it, exception, its message after the op's name)
WRONG: list[tuple[str, str, Callable[[Any], Any], type[Exception], str]] = [
    ("causal_conv1d", "x", lambda x: x[0], ValueError, "x must have shape (batch, dim, length), got (20, 70)"),
    ("causal_conv1d", "x", integers, TypeError, "x must have dtype float64, float32, float16, bfloat16; got int32"),
    ("causal_conv1d", "x", lambda x: x.tolist(), TypeError, "x must be a NumPy, CuPy, PyTorch or JAX array"),
    (
        "causal_conv1d",
        "weight",
        lambda w: w[1:],
        ValueError,
        "weight must have shape (dim, width) = (20, width), got (19, 4)",
    ),
    (
        "causal_conv1d",
        "weight",
        double,
        TypeError,
        "weight must have dtype float32 (or one that it can hold), got float64",
    ),
    ("causal_conv1d", "bias", short, ValueError, "bias must have shape (dim,) = (20,), got (19,)"),
    ("causal_conv1d", "bias", double, TypeError, "bias must have dtype float32"),
    ("causal_conv1d", "initial_state", short, ValueError, "(batch, dim, width-1) = (2, 20, 3), got (2, 20, 2)"),
    ("causal_conv1d", "initial_state", double, TypeError, "initial_state must have dtype float32"),
    ("causal_conv1d", "activation", lambda _: "relu", ValueError, "activation must be None or 'silu', got 'relu'"),
    (
        "causal_conv1d",
        "seq_idx",
        lambda _: np.zeros((2, 69), int),
        ValueError,
        "seq_idx must have shape (batch, length)",
    ),
    ("causal_conv1d", "seq_idx", lambda _: np.zeros((2, 70)), TypeError, "seq_idx must be integers, got float64"),
    ("causal_conv1d_update", "x", short, ValueError, "(batch, dim, kept) = (2, 19, kept), got (2, 20, 3)"),
    ("causal_conv1d_update", "conv_state", short, ValueError, "kept >= width - 1"),
    ("causal_conv1d_update", "conv_state", double, TypeError, "conv_state must have dtype float32"),
    ("causal_conv1d_update", "bias", short, ValueError, "bias must have shape (dim,) = (20,), got (19,)"),
    (
        "causal_conv1d_update",
        "activation",
        lambda _: "tanh",
        ValueError,
        "activation must be None or 'silu', got 'tanh'",
    ),
    ("rms_norm", "x", lambda x: x[0, 0, 0, ...], ValueError, "x must have at least one axis, got shape ()"),
    ("rms_norm", "x", integers, TypeError, "x must have dtype float64"),
    ("rms_norm", "weight", short, ValueError, "weight must have shape (size,) = (40,), got (39,)"),
    ("rms_norm", "weight", double, TypeError, "weight must have dtype float32"),
    ("rms_norm", "residual", short, ValueError, "residual must have the shape of x, (2, 7, 40), got (2, 7, 39)"),
    ("rms_norm", "residual", double, TypeError, "residual must have dtype float32"),
    ("rms_norm", "eps", lambda _: -1.0, ValueError, "eps must be at least 0, got -1.0"),
    ("rms_norm", "eps", lambda _: np.nan, ValueError, "eps must be at least 0, got nan"),
    ("rms_norm", "eps", lambda _: "1e-5", TypeError, "eps must be a real number, got str"),
    ("linear_scan", "reverse", lambda _: "no", TypeError, "reverse must be True or False, got 'no'"),
    ("causal_conv1d", "return_final_state", lambda _: 1, TypeError, "return_final_state must be True or False, got 1"),
    ("selective_state_update", "dt_softplus", lambda _: None, TypeError, "dt_softplus must be True or False, got None"),
    (
        "selective_state_update",
        "state_batch_indices",
        lambda _: np.array([0, 1, 2**63], np.uint64),
        ValueError,
        f"below the rows of state, 3, got {2**63}",
    ),
    ("linear_scan", "b", short, ValueError, "b must have the shape of a, (2, 20, 70), got (2, 20, 69)"),
    ("linear_scan", "b", double, TypeError, "b must have the dtype of a, float32; got float64"),
    ("linear_scan", "a", integers, TypeError, "a must have dtype float64, float32"),
    (
        "linear_scan",
        "a",
        lambda a: a.astype(np.complex64),
        TypeError,
        "b must have the dtype of a, complex64; got float32",
    ),
    ("linear_scan", "initial_state", short, ValueError, "without its last axis, (2, 20), got (2, 19)"),
    ("linear_scan", "initial_state", double, TypeError, "initial_state must have dtype float32"),
    ("selective_state_update", "x", short, ValueError, "(batch, dim) = (3, 19), got (3, 20)"),
    ("selective_state_update", "dt", double, TypeError, "dt must have the dtype of x, float32; got float64"),
    ("selective_state_update", "A", double, TypeError, "A must have dtype float32"),
    (
        "selective_state_update",
        "A",
        lambda A: A.astype(np.complex64),
        TypeError,
        "B must be complex, like A, got float32",
    ),
    (
        "selective_state_update",
        "B",
        lambda B: B[:, :, :-1],
        ValueError,
        "B must have shape (batch, groups, state) = (3, groups, 8), got (3, 2, 7)",
    ),
    (
        "selective_state_update",
        "B",
        lambda B: B[:, :, None],
        ValueError,
        "(batch, state) = (3, 8) or (batch, groups, state)",
    ),
    (
        "selective_state_update",
        "C",
        lambda C: C[:, :1],
        ValueError,
        "C must have shape (batch, groups, state) = (3, 2, 8)",
    ),
    ("selective_state_update", "D", short, ValueError, "D must have shape (dim,) = (20,), got (19,)"),
    ("selective_state_update", "z", short, ValueError, "z must have shape (batch, dim) = (3, 20), got (3, 19)"),
    ("selective_state_update", "dt_bias", double, TypeError, "dt_bias must have dtype float32"),
    ("selective_state_update", "state", short, ValueError, "(slots, dim, state) = (slots, 20, 8), got (3, 20, 7)"),
    ("selective_state_update", "state", double, TypeError, "state must have dtype float32"),
    ("selective_state_update", "state", lambda s: s[:2].copy(), ValueError, "one row for each of x, 3, got 2"),
    (
        "selective_state_update",
        "state_batch_indices",
        lambda _: np.array([0, 1, 3]),
        ValueError,
        "below the rows of state, 3",
    ),
    (
        "selective_state_update",
        "state_batch_indices",
        lambda _: np.zeros(3),
        TypeError,
        "must be integers, got float64",
    ),
    ("discretize", "method", lambda _: "tustin", ValueError, "'bilinear', 'euler', got 'tustin'"),
    (
        "discretize",
        "delta",
        lambda d: d[0],
        ValueError,
        "delta must have shape (dim,) or (batch, dim, length), got (6, 17)",
    ),
    (
        "discretize",
        "delta",
        lambda d: d[0, :, 0],
        ValueError,
        "B must have shape (dim, state) = (6, 5), got (2, 2, 5, 17)",
    ),
    ("discretize", "A", double, TypeError, "A must have dtype float32"),
    ("discretize", "B", double, TypeError, "B must have the dtype of delta, float32; got float64"),
    ("discretize", "B", lambda B: np.repeat(B, 2, axis=1), ValueError, "B's groups must divide dim = 6, got 4"),
    ("discretize", "B", short, ValueError, "(batch, groups, state, length) = (2, groups, 5, 17), got (2, 2, 5, 16)"),
    ("ssm_kernel", "length", lambda _: -1, ValueError, "length must be at least 0, got -1"),
    ("ssm_kernel", "length", lambda _: 3.0, TypeError, "length must be an integer, got float"),
    ("ssm_kernel", "C", short, ValueError, "C must have shape (dim, state) = (6, 5), got (6, 4)"),
    ("ssm_kernel", "C", double, TypeError, "C must have dtype float32"),
    ("ssm_kernel", "delta", lambda d: d[:, None], ValueError, "delta must have shape (dim,), got (6, 1)"),
    ("ssm_convolution", "u", integers, TypeError, "u must have dtype float64"),
    ("ssm_convolution", "kernel", short, ValueError, "kernel must have shape (dim, length) = (6, 70), got (6, 69)"),
    ("ssm_convolution", "kernel", double, TypeError, "kernel must have dtype float32"),
]


@pytest.mark.parametrize(
    ("op", "argument", "change", "exception", "message"), WRONG, ids=lambda x: x if isinstance(x, str) else ""
)
def test_error(op: str, argument: str, change: Any, exception: type[Exception], message: str) -> None:
    arguments = case_of(op, CASE[op]).arguments()
    if op in ("causal_conv1d_update", "selective_state_update"):
        arguments = {name: x.copy() if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    arguments[argument] = change(arguments.get(argument))
    with pytest.raises(exception, match=f"^{op}: .*{re.escape(message)}"):
        getattr(sscan, op)(**arguments)


OPS = [op for op in DIFFERENTIABLE if op in CASE]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("change", "exception"), [(short, ValueError), (integers, TypeError)])
def test_error_in_a_gradient(op: str, change: Any, exception: type[Exception]) -> None:
    arguments = case_of(op, CASE[op]).arguments()
    given = cotangents(forward(sscan, op, arguments))
    for name in given:
        with pytest.raises(exception, match=rf"^{op}_backward: {name} must"):
            backward(sscan, op, arguments, {**given, name: change(given[name])})


REQUIRED = {
    "selective_scan": ("base", "u delta A B C"),
    "causal_conv1d": ("initial state", "x weight"),
    "causal_conv1d_update": ("base", "x conv_state weight"),
    "rms_norm": ("residual", "x weight"),
    "linear_scan": ("initial state", "a b"),
    "selective_state_update": ("base", "state x dt A B C"),
    "discretize": ("zoh 2 B", "delta A B"),
    "ssm_kernel": ("zoh", "delta A B C"),
    "ssm_convolution": ("base", "u kernel"),
}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, (_, names) in REQUIRED.items() for name in names.split()])
def test_error_for_a_required_argument_that_is_none(op: str, name: str) -> None:
    arguments = case_of(op, REQUIRED[op][0]).arguments()
    with pytest.raises(TypeError, match=f"^{op}: {name} is required, got None$"):
        getattr(sscan, op)(**{**arguments, name: None})


BACKWARD_REQUIRED = {
    "selective_scan": "dy u delta A B C",
    "causal_conv1d": "dy x weight",
    "rms_norm": "dy x weight",
    "linear_scan": "dh a h",
    "discretize": "dA_bar dB_bar delta A B",
    "ssm_kernel": "dK delta A B C",
    "ssm_convolution": "dy u kernel",
}


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, names in BACKWARD_REQUIRED.items() for name in names.split()]
)
def test_error_for_a_required_argument_of_a_gradient_that_is_none(op: str, name: str) -> None:
    arguments = case_of(op, REQUIRED[op][0]).arguments()
    outputs = forward(sscan, op, arguments)
    arguments |= cotangents(outputs)
    if op == "linear_scan":
        arguments["h"] = outputs["h"]
        del arguments["b"]
    with pytest.raises(TypeError, match=f"^{op}_backward: {name} is required, got None$"):
        getattr(sscan, f"{op}_backward")(**{**arguments, name: None})


class Plain(np.ndarray):
    """A class of somebody's own."""


@pytest.mark.parametrize("op", REQUIRED)
@pytest.mark.parametrize("kind", [np.ma.MaskedArray, np.matrix])
def test_error_for_arrays_that_mean_more(op: str, kind: Any) -> None:
    """A mask that would be ignored, and a class whose slices and products are not those of arrays."""
    arguments = case_of(op, REQUIRED[op][0]).arguments()
    arguments = {name: x.copy() if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    for name in REQUIRED[op][1].split():
        given_ = np.zeros((2, 2), np.float32).view(kind)
        with pytest.raises(TypeError, match=f"^{op}: {name} must be a plain array, .*; got {kind.__name__}$"):
            getattr(sscan, op)(**{**arguments, name: given_})


@pytest.mark.parametrize("op", REQUIRED)
def test_arrays_of_ones_own_class_are_arrays(op: str) -> None:
    arguments = case_of(op, REQUIRED[op][0]).arguments()
    expected = forward(sscan, op, arguments)
    own = {name: x.view(Plain) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    for name, x in forward(sscan, op, own).items():
        np.testing.assert_array_equal(x, expected[name])
        assert type(x) is (Plain if name == UPDATED.get(op) else np.ndarray)


def test_no_class_is_remembered() -> None:
    kind = type("Passing", (np.ndarray,), {})
    x, weight = np.ones((2, 3), np.float32), np.ones(3, np.float32)
    sscan.rms_norm(x.view(kind), weight)
    sscan.causal_conv1d(x[None].view(kind), x[:, :2].view(kind))
    reference = weakref.ref(kind)
    del kind
    gc.collect()
    assert reference() is None


def test_error_for_a_call_with_nothing() -> None:
    """Not even a first array, of which the library could be asked."""
    with pytest.raises(TypeError, match=r"^selective_scan: u is required, got None$"):
        sscan.selective_scan(None, None, None, None, None)


def test_error_for_no_groups() -> None:
    arguments = case_of("selective_state_update", "groups 2").arguments()
    arguments |= {name: arguments[name][:, :0] for name in "BC"} | {"state": arguments["state"].copy()}
    with pytest.raises(ValueError, match=r"^selective_state_update: B's groups must divide dim = 20, got 0$"):
        sscan.selective_state_update(**arguments)


@pytest.mark.parametrize("op", ["causal_conv1d", "causal_conv1d_update"])
def test_error_for_a_filter_without_taps(op: str) -> None:
    arguments = {**case_of(op, "bare" if op == "causal_conv1d" else "base").arguments()}
    arguments["weight"] = arguments["weight"][:, :0]
    if "conv_state" in arguments:
        arguments["conv_state"] = arguments["conv_state"].copy()
    with pytest.raises(ValueError, match=rf"^{op}: .*width >= 1, got .*\(20, 0\)"):
        getattr(sscan, op)(**arguments)


def test_error_for_two_kinds_of_packing() -> None:
    arguments = {**case_of("causal_conv1d", "cu_seqlens").arguments(), "seq_idx": np.zeros((1, 70), int)}
    with pytest.raises(ValueError, match=r"^causal_conv1d: give seq_idx or cu_seqlens, not both"):
        sscan.causal_conv1d(**arguments)


@pytest.mark.parametrize("borders", [[0, 30, 20, 70], [0, 69], [1, 70]])
def test_error_for_borders(borders: list[int]) -> None:
    arguments = {**case_of("causal_conv1d", "cu_seqlens").arguments(), "cu_seqlens": np.array(borders)}
    with pytest.raises(ValueError, match=r"^causal_conv1d: cu_seqlens must rise from 0 to length = 70, got"):
        sscan.causal_conv1d(**arguments)


def test_error_for_a_gradient_of_what_was_not_returned() -> None:
    x, weight = np.ones((2, 3), np.float32), np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"^rms_norm_backward: dresidual_out is the gradient of an output"):
        sscan.rms_norm_backward(x, x, weight, dresidual_out=x)


# --- Updates in place -------------------------------------------------------------------------------------------------

UPDATED = {"causal_conv1d_update": "conv_state", "selective_state_update": "state"}
updates = pytest.mark.parametrize("op", UPDATED)


@updates
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_update_reaches_a_strided_state(op: str, axis: int) -> None:
    arguments = case_of(op, "base").arguments()
    state = arguments[UPDATED[op]]
    expected = forward(sscan, op, arguments)
    every_other = (slice(None),) * axis + (slice(None, None, 2),)
    wide = np.repeat(state, 2, axis=axis)
    y = getattr(sscan, op)(**{**arguments, UPDATED[op]: wide[every_other]})
    np.testing.assert_array_equal(y, expected["y"])
    np.testing.assert_array_equal(wide[every_other], expected[UPDATED[op]])
    between = (slice(None),) * axis + (slice(1, None, 2),)
    np.testing.assert_array_equal(wide[between], state)


@updates
def test_update_refuses_a_read_only_state(op: str) -> None:
    arguments = case_of(op, "base").arguments()
    with pytest.raises(TypeError, match=rf"^{op}: {UPDATED[op]} is updated in place and must be writeable"):
        getattr(sscan, op)(**arguments)


OVERLAPPING: dict[str, Callable[[int, int, int], tuple[int, int, int]]] = {
    "expanded": lambda i, j, k: (0, j, k),
    "expanded inside": lambda i, j, k: (i, 0, k),
    "a sliding window": lambda i, j, k: (i, k, k),
    "half a row apart": lambda i, j, k: (i // 2, j, k),
    "half a row apart, backwards": lambda i, j, k: (-i // 2, j, k),
    "halves of numbers": lambda i, j, k: (i, j, k // 2),
}


@updates
@pytest.mark.parametrize("name", OVERLAPPING)
def test_update_refuses_a_state_that_overlaps_itself(op: str, name: str) -> None:
    arguments = case_of(op, "base").arguments()
    memory = np.repeat(arguments[UPDATED[op]], 3, axis=0)[len(arguments["x"]) :]
    strides = OVERLAPPING[name](*memory.strides)
    state = np.lib.stride_tricks.as_strided(memory, arguments[UPDATED[op]].shape, strides, writeable=True)
    with pytest.raises(ValueError, match=f"^{op}: {UPDATED[op]} is updated in place and must not overlap itself, got"):
        getattr(sscan, op)(**{**arguments, UPDATED[op]: state})


@updates
def test_update_refuses_a_state_that_is_an_input_too(op: str) -> None:
    arguments = case_of(op, "base").arguments()
    state = arguments[UPDATED[op]].copy()
    with pytest.raises(ValueError, match=f"^{op}: {UPDATED[op]} is updated in place and must not share memory with x$"):
        getattr(sscan, op)(**{**arguments, UPDATED[op]: state, "x": state[:, :, -1]})


@updates
def test_update_refuses_a_state_that_is_a_view_of_an_input(op: str) -> None:
    x = np.zeros((2, 4), np.float32)
    parameters = {"weight": x[0, :4, None].repeat(2, 1)}
    if op == "selective_state_update":
        parameters = {"dt": x.copy(), "A": np.zeros((4, 1), np.float32), "B": x[:, :1].copy(), "C": x[:, :1].copy()}
    with pytest.raises(ValueError, match=f"^{op}: {UPDATED[op]} is updated in place and must not share memory with x$"):
        getattr(sscan, op)(**{UPDATED[op]: x[:, :, None], "x": x, **parameters})


@updates
def test_update_takes_inputs_beside_the_state(op: str) -> None:
    """In the same memory, interleaved with it, but no element of both."""
    arguments = case_of(op, "base").arguments()
    expected, state, x = forward(sscan, op, arguments), arguments[UPDATED[op]], arguments["x"]
    memory = np.concatenate([x[:, :, None], state], axis=2)
    y = getattr(sscan, op)(**{**arguments, UPDATED[op]: memory[:, :, 1:], "x": memory[:, :, 0]})
    np.testing.assert_array_equal(y, expected["y"])
    np.testing.assert_array_equal(memory[:, :, 1:], expected[UPDATED[op]])


@updates
def test_update_takes_a_state_in_any_order(op: str) -> None:
    """Axes that are exchanged, reversed or of one element do not overlap."""
    arguments = case_of(op, "base").arguments()
    expected = forward(sscan, op, arguments)
    of_one = {name: x[:1] if name in (UPDATED[op], "x", "dt", "z", "B", "C") else x for name, x in arguments.items()}
    for given_, arrange in (
        (arguments, lambda x: np.ascontiguousarray(x.transpose(2, 0, 1)).transpose(1, 2, 0)),
        (arguments, lambda x: x[::-1].copy()[::-1]),
        (of_one, lambda x: np.lib.stride_tricks.as_strided(x.copy(), x.shape, (0, *x.strides[1:]), writeable=True)),
    ):
        state = arrange(given_[UPDATED[op]])
        getattr(sscan, op)(**{**given_, UPDATED[op]: state})
        np.testing.assert_array_equal(state, expected[UPDATED[op]][: len(state)])


@pytest.mark.parametrize("stride", [1, 2])
def test_update_leaves_other_slots_alone(stride: int) -> None:
    arguments = case_of("selective_state_update", "indices with skipped rows").arguments()
    wide = np.repeat(arguments["state"], stride, axis=2)
    state = wide[..., ::stride]
    y = sscan.selective_state_update(**{**arguments, "state": state})
    (owned,) = arguments["state_batch_indices"][arguments["state_batch_indices"] >= 0]
    others = np.arange(len(state)) != owned
    np.testing.assert_array_equal(state[others], arguments["state"][others])
    assert (state[owned] != arguments["state"][owned]).any()
    np.testing.assert_array_equal(y[arguments["state_batch_indices"] < 0], 0)


# --- Steps, splits and resets -----------------------------------------------------------------------------------------


def conv(length: int = 40, **changes: Any) -> Arguments:
    problem = {"dim": 5, "length": length, "initial_state": True, **changes}
    return Case("", "causal_conv1d", partial(conv_problem, **problem)).arguments()


@WIDTHS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_make_the_whole_convolution(width: int, dtype: str) -> None:
    arguments = conv(width=width, dtype=dtype)
    y, final_state = sscan.causal_conv1d(**arguments, return_final_state=True)
    x, state = arguments.pop("x"), arguments.pop("initial_state").copy()
    steps = [sscan.causal_conv1d_update(x[..., t], state, **arguments) for t in range(x.shape[2])]
    np.testing.assert_allclose(
        np.stack(steps, axis=2).astype(float), y.astype(float), rtol=1e-2 if dtype == "bfloat16" else 1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(state, final_state)


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
def test_steps_make_the_whole_scan(is_complex: bool) -> None:
    build = partial(update_problem, is_complex=is_complex, groups=2)
    steps = [Case("", "selective_state_update", build).arguments(seed) for seed in range(9)]
    constant = {name: steps[0][name] for name in ("A", "D", "dt_bias")}
    state = steps[0]["state"].copy()
    ys = [sscan.selective_state_update(**{**step, **constant, "state": state}) for step in steps]
    u, delta, B, C, z = (np.stack([step[name] for step in steps], -1) for name in ("x", "dt", "B", "C", "z"))
    A, D, bias = constant.values()
    y, last_state = sscan.selective_scan(u, delta, A, B, C, D, z, bias, True, True, initial_state=steps[0]["state"])
    np.testing.assert_allclose(np.stack(ys, axis=-1), y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, last_state, rtol=1e-4, atol=1e-5)


@SETTINGS
@given(width=st.integers(1, 9), k=st.integers(0, 40), activation=st.sampled_from([None, "silu"]))
def test_split_convolution_is_the_whole(width: int, k: int, activation: str | None) -> None:
    arguments = conv(width=width, activation=activation)
    given_ = cotangents(forward(sscan, "causal_conv1d", arguments))
    x, state, dy = arguments.pop("x"), arguments.pop("initial_state"), given_["dy"]
    y, final_state = sscan.causal_conv1d(x, **arguments, initial_state=state, return_final_state=True)
    y0, between = sscan.causal_conv1d(x[..., :k], **arguments, initial_state=state, return_final_state=True)
    y1, last = sscan.causal_conv1d(x[..., k:], **arguments, initial_state=between, return_final_state=True)
    np.testing.assert_array_equal(np.concatenate([y0, y1], axis=2), y)
    np.testing.assert_array_equal(last, final_state)

    back, dfinal = sscan.causal_conv1d_backward, given_["dfinal_state"]
    whole = back(dy, x, **arguments, initial_state=state, dfinal_state=dfinal)
    second = back(dy[..., k:], x[..., k:], **arguments, initial_state=between, dfinal_state=dfinal)
    first = back(dy[..., :k], x[..., :k], **arguments, initial_state=state, dfinal_state=second.dinitial_state)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(np.concatenate([first.dx, second.dx], axis=2), whole.dx)
    close(first.dinitial_state, whole.dinitial_state)
    close(first.dweight + second.dweight, whole.dweight)
    close(first.dbias + second.dbias, whole.dbias)


@WIDTHS
@pytest.mark.parametrize("packing", ["seq_idx", "cu_seqlens"])
def test_packed_convolution_is_separate_runs(width: int, packing: str) -> None:
    borders = [0, 1, 3, 20, 20, 40] if packing == "cu_seqlens" else [0, 1, 3, 20, 40]
    arguments = conv(width=width, batch=1, cu_seqlens=tuple(borders))
    del arguments["cu_seqlens"]
    x, states = arguments.pop("x"), arguments.pop("initial_state")
    if packing == "cu_seqlens":
        packed: Arguments = {"cu_seqlens": np.array(borders), "initial_state": states}
    else:  # only the first run has an initial state
        packed = {"seq_idx": np.repeat(np.arange(4), np.diff(borders))[None], "initial_state": states[:1]}
        states = np.concatenate([states[:1], np.zeros_like(states[1:])])
    dy = np.random.default_rng(0).standard_normal(x.shape, np.float32)
    y, final = sscan.causal_conv1d(x, **arguments, **packed, return_final_state=True)
    gradients = sscan.causal_conv1d_backward(dy, x, **arguments, **packed)
    runs = [(slice(i, j), states[s : s + 1]) for s, (i, j) in enumerate(zip(borders[:-1], borders[1:], strict=True))]
    alone = [sscan.causal_conv1d(x[..., t], **arguments, initial_state=h, return_final_state=True) for t, h in runs]
    backs = [sscan.causal_conv1d_backward(dy[..., t], x[..., t], **arguments, initial_state=h) for t, h in runs]
    np.testing.assert_array_equal(y, np.concatenate([y_run for y_run, _ in alone], axis=2))
    finals = np.concatenate([final_run for _, final_run in alone])
    np.testing.assert_array_equal(final, finals if packing == "cu_seqlens" else finals[-1:])
    np.testing.assert_array_equal(gradients.dx, np.concatenate([back.dx for back in backs], axis=2))
    np.testing.assert_allclose(gradients.dweight, sum(back.dweight for back in backs), rtol=1e-4, atol=1e-4)
    dinitial = np.concatenate([back.dinitial_state for back in backs])
    np.testing.assert_array_equal(gradients.dinitial_state, dinitial[: len(gradients.dinitial_state)])


# --- Defaults ---------------------------------------------------------------------------------------------------------

# Of every op the options, what they are by default, and something else, with which the results are others.
DEFAULTS: dict[str, dict[str, tuple[Any, Any]]] = {
    "selective_scan": {"delta_softplus": (False, True), "discretization": ("mamba", "zoh")},
    "selective_state_update": {"dt_softplus": (False, True)},
    "causal_conv1d": {"activation": (None, "silu")},
    "causal_conv1d_update": {"activation": (None, "silu")},
    "rms_norm": {"eps": (1e-5, 2e-5)},
    "linear_scan": {"reverse": (False, True)},
    "discretize": {"method": ("zoh", "mamba")},
    "ssm_kernel": {"method": ("zoh", "mamba")},
}


@pytest.mark.parametrize(("op", "option"), [(op, option) for op, options in DEFAULTS.items() for option in options])
def test_default(op: str, option: str) -> None:
    """An option that is not given is the documented one, in the op and in its gradient."""
    arguments = case_of(op, REQUIRED[op][0]).arguments()
    arguments = {name: x for name, x in arguments.items() if name not in DEFAULTS[op]}
    weights = cotangents(forward(sscan, op, arguments)) if op in DIFFERENTIABLE else {}

    def made(**given_: Any) -> tuple[bytes, bytes]:
        """The outputs, and the gradients."""
        outputs = forward(sscan, op, {**arguments, **given_})
        back = backward(sscan, op, {**arguments, **given_}, weights) if weights else {}
        return tuple(b"".join(x.tobytes() for x in found.values()) for found in (outputs, back))

    default, other = DEFAULTS[op][option]
    by_default, different = made(), made(**{option: other})
    assert by_default == made(**{option: default})
    assert by_default[0] != different[0]
    assert by_default[1] != different[1] or not weights


@pytest.mark.parametrize(
    ("op", "option"), [("selective_scan", "return_last_state"), ("causal_conv1d", "return_final_state")]
)
def test_a_state_is_returned_if_asked_for(op: str, option: str) -> None:
    arguments = case_of(op, REQUIRED[op][0]).arguments()
    y, _ = getattr(sscan, op)(**arguments, **{option: True})
    np.testing.assert_array_equal(getattr(sscan, op)(**arguments), y)


# --- Numbers at the ends of their range -------------------------------------------------------------------------------

GROWS = np.concatenate([np.full(140, 2), np.full(884, 0.5)])  # a product of 2^140 at first, in one part
SHRINKS = np.concatenate([np.full(200, 0.5), np.full(200, 2), np.ones(624)])  # of 2^-200, and then back to 1


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("factors", "start"), [(GROWS, 1e-20), (SHRINKS, 1e38)], ids=["grows", "shrinks"])
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_few_rows_are_as_many(factors: Array, start: float, reverse: bool, dtype: Any) -> None:
    """What a part makes of a state may be infinite or nothing when what becomes of the state is neither."""
    a = (factors[::-1] if reverse else factors).astype(dtype)[None]
    for rows in (1, 3):
        alone = [np.repeat(x, rows, 0) for x in (a, np.zeros_like(a), np.full(1, start, dtype))]
        many = [np.repeat(x, 64, 0) for x in (a, np.zeros_like(a), np.full(1, start, dtype))]
        h, expected = sscan.linear_scan(*alone, reverse), sscan.linear_scan(*many, reverse)
        steps = np.cumprod(factors.astype(np.longdouble))
        np.testing.assert_allclose(h[0].real, (start * steps)[:: -1 if reverse else 1], rtol=1e-6, atol=1e-37)
        np.testing.assert_array_equal(h, expected[:rows])
        dh = np.zeros_like(alone[0])
        dh[:, 0 if reverse else -1] = start
        back = sscan.linear_scan_backward(dh, alone[0], h, alone[2], reverse)
        among = sscan.linear_scan_backward(np.repeat(dh[:1], 64, 0), many[0], expected, many[2], reverse)
        for x, y in zip(back, among, strict=True):
            np.testing.assert_array_equal(x, y[:rows])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    a, b = np.full((3, 5000), 0.5, np.float32), np.ones((3, 5000), np.float32)
    b[1, 7] = value
    h = sscan.linear_scan(a, b)
    assert np.isfinite(h[::2]).all()
    assert np.isfinite(h[1, :7]).all()
    assert not np.isfinite(h[1, 7:]).any()


SIZES = {"float32": (1e30, 3e38, 1e-30, 1e-42), "float64": (1e300, 1.5e308, 1e-300, 1e-320), "bfloat16": (1e30, 1e-30)}


@pytest.mark.parametrize(("dtype", "size"), [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm_of_any_size(dtype: str, size: float, residual: bool) -> None:
    """The squares leave the range of numbers, on either side; what is normalised does not, nor do gradients."""
    rng = np.random.default_rng(0)
    x = (size * rng.uniform(0.3, 1, (3, 40))).astype(DTYPES[dtype])
    accumulated = np.float64 if dtype == "float64" else np.float32
    weight, dy = rng.standard_normal(40).astype(accumulated), rng.standard_normal((3, 40)).astype(x.dtype)
    stream = np.zeros((3, 40), accumulated) if residual else None
    result = sscan.rms_norm(x, weight, stream, eps=0.0)
    y = result[0] if residual else result
    s = x.astype(np.longdouble)
    r = 1 / np.sqrt((s * s).mean(-1, keepdims=True))
    n, g = s * r, dy.astype(np.longdouble) * weight
    tolerance = {"rtol": 8 * eps_of(x.dtype), "atol": 8 * eps_of(x.dtype)}
    np.testing.assert_allclose(y.astype(np.longdouble), n * weight, **tolerance)
    if residual:
        np.testing.assert_array_equal(result[1], x.astype(accumulated))
    if size > 1e-38 or (dtype == "float64" and size > 1e-308):  # 1 / x is a number
        back = sscan.rms_norm_backward(dy, x, weight, stream, 0.0)
        dx_over_r, found = g - n * (g * n).mean(-1, keepdims=True), back.dx.astype(np.longdouble) / r
        np.testing.assert_allclose(found.astype(float), dx_over_r.astype(float), **tolerance)
        np.testing.assert_allclose(back.dweight, (dy.astype(np.longdouble) * n).sum(0).astype(float), **tolerance)


def test_rms_norm_of_one() -> None:
    for size in (1e30, 1e-30, 1.0):
        x, weight = np.full((1, 8), size, np.float32), np.ones(8, np.float32)
        np.testing.assert_array_equal(sscan.rms_norm(x, weight, eps=0.0), 1)


@pytest.mark.parametrize("eps", [1e-38, 1e-36, 1e-12])
def test_rms_norm_of_a_small_row_with_eps(eps: float) -> None:
    x = np.full((1, 16), 1e-25, np.float32)
    expected = 1e-25 / np.sqrt(1e-50 + eps)
    np.testing.assert_allclose(sscan.rms_norm(x, np.ones(16, np.float32), eps=eps), expected, rtol=1e-6)


# --- What does not depend on the definition ---------------------------------------------------------------------------

# Large enough that kernels cut them into parts and tasks.
LARGE = {
    "causal_conv1d": partial(conv_problem, dim=9, length=9001, initial_state=True),
    "causal_conv1d packed": partial(
        conv_problem, batch=1, dim=9, length=9001, initial_state=True, cu_seqlens=(0, 5, 5, 4200, 8300, 8301, 9001)
    ),
    "causal_conv1d wide": partial(conv_problem, dim=2, length=2500, width=1100, initial_state=True),
    "linear_scan": partial(linear_scan_problem, shape=(3, 5003), initial_state=True),
    "linear_scan reverse": partial(linear_scan_problem, shape=(3, 5003), initial_state=True, reverse=True),
    "linear_scan rows": partial(linear_scan_problem, shape=(3000, 33), initial_state=True),
    "linear_scan complex": partial(linear_scan_problem, shape=(1, 1200), dtype="complex64", initial_state=True),
    "rms_norm": partial(norm_problem, shape=(3000, 40), residual="float32"),
    "discretize": partial(discretize_problem, dim=40, length=150, B="2"),
    "discretize constant": partial(discretize_problem, dim=40, length=150, B="constant"),
    "ssm_kernel": partial(kernel_problem, length=4200),
    "ssm_kernel complex": partial(kernel_problem, length=4200, is_complex=True),
    "ssm_convolution": partial(convolution_problem, dim=100, batch=10, length=300),
    "selective_state_update": partial(update_problem, batch=40, dim=64, state=64),
    "causal_conv1d_update": partial(lambda rng: case_of("causal_conv1d_update", "base").build(rng)),
}
LARGE_CASES = [Case(f"large {name}", name.split()[0], build) for name, build in LARGE.items()]
large = pytest.mark.parametrize("case", LARGE_CASES, ids=str)


@large
def test_large_problem_conforms(case: Case) -> None:
    check_forward(sscan, case)
    if case.op in DIFFERENTIABLE:
        check_backward(sscan, case)


def results(case: Case) -> list[bytes]:
    """All outputs and gradients of a case."""
    arguments = case.arguments()
    outputs = forward(sscan, case.op, arguments)
    found = list(outputs.values())
    if case.op in DIFFERENTIABLE:
        found += backward(sscan, case.op, arguments, cotangents(outputs)).values()
    return [array.tobytes() for array in found]


@large
def test_two_runs_are_bit_identical(case: Case) -> None:
    assert results(case) == results(case)


DIGESTS = "import test_ops; test_ops.write_digests()"


def write_digests() -> None:
    for case in LARGE_CASES:
        sys.stdout.write(f"{case.name} {hashlib.sha256(b''.join(results(case))).hexdigest()}\n")


def test_thread_counts_are_bit_identical() -> None:
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent)])
    outputs = []
    for threads in ("1", "2", "5"):
        environment = {**os.environ, "NUMBA_NUM_THREADS": threads, "PYTHONPATH": path}
        run = subprocess.run(
            [sys.executable, "-c", DIGESTS], capture_output=True, text=True, env=environment, check=False
        )
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout)
    assert outputs[0].count("\n") == len(LARGE_CASES)
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize(
    ("op", "argument"), [("causal_conv1d", "x"), ("linear_scan", "a"), ("linear_scan", "b")], ids="-".join
)
@pytest.mark.parametrize("t", [0, 1, 600, 4999])
def test_the_past_does_not_depend_on_the_future(op: str, argument: str, t: int) -> None:
    arguments = Case("", op, LARGE[op]).arguments()
    changed = arguments[argument].copy()
    changed[..., t + 1 :] = np.nan
    (name, before), *_ = forward(sscan, op, arguments).items()
    after = forward(sscan, op, {**arguments, argument: changed})[name]
    np.testing.assert_array_equal(before[..., : t + 1], after[..., : t + 1])


ADJOINT = {
    "causal_conv1d": partial(conv_problem, length=33, initial_state=True),
    "causal_conv1d packed": partial(conv_problem, length=33, initial_state=True, seq_idx="int32"),
    "linear_scan": partial(linear_scan_problem, shape=(3, 40), initial_state=True),
    "linear_scan reverse": partial(linear_scan_problem, shape=(3, 700), initial_state=True, reverse=True),
    "linear_scan complex": partial(linear_scan_problem, shape=(3, 40), initial_state=True),
    "rms_norm": partial(norm_problem, residual="float64"),
    "ssm_convolution": convolution_problem,
    **{
        f"discretize {method}": partial(discretize_problem, method=method)
        for method in ("zoh", "mamba", "bilinear", "euler")
    },
    **{
        f"discretize {method} complex": partial(discretize_problem, method=method, is_complex=True, B="2")
        for method in ("zoh", "mamba", "bilinear", "euler")
    },
    "ssm_kernel": kernel_problem,
    "ssm_kernel complex": partial(kernel_problem, is_complex=True),
}


def is_float(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind in "fc"


@pytest.mark.parametrize("name", ADJOINT)
def test_adjoint_identity(name: str) -> None:
    """<Jv, w> = <v, J'w>, Jv by five-point differences in float64: on the kernels alone."""
    op = name.split()[0]
    dtype = "complex128" if name == "linear_scan complex" else "float64"
    arguments = Case(name, op, partial(ADJOINT[name], dtype=dtype)).arguments()
    rng = np.random.default_rng(1)
    directions = {}
    for key, x in arguments.items():
        if is_float(x):
            v = rng.standard_normal(x.shape)
            directions[key] = v + 1j * rng.standard_normal(x.shape) if x.dtype.kind == "c" else v
    w = cotangents(forward(sscan, op, arguments), seed=2)

    def product(step: float) -> float:
        """<f(x + step v), w>."""
        moved = {key: arguments[key] + step * v for key, v in directions.items()}
        outputs = forward(sscan, op, {**arguments, **moved})
        return sum(float((w[f"d{key}"].conj() * y).sum().real) for key, y in outputs.items())

    h = 1e-5
    Jv = (8 * (product(h) - product(-h)) - (product(2 * h) - product(-2 * h))) / (12 * h)
    gradients = backward(sscan, op, arguments, w)
    vJ = sum(float((g.conj() * directions[key[1:]]).sum().real) for key, g in gradients.items())
    assert {key[1:] for key in gradients} == set(directions)
    assert vJ == pytest.approx(Jv, rel=1e-6, abs=1e-6)
