"""sscan.nn: the tape, the array operations, the losses and the recorded ops, against central differences."""

from __future__ import annotations

import gc
import operator
import re
import tracemalloc
import weakref
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import scipy.special
import torch
from nn_cases import CASES, tensor

from sscan import nn
from sscan.nn import Tensor, check_gradients, losses, ops

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("case", CASES)
def test_array_operation_gradients(case: str) -> None:
    function, shapes = CASES[case]
    check_gradients(function, *(tensor(*shape, seed=i) for i, shape in enumerate(shapes)), tolerance=1e-7)


@pytest.mark.parametrize("value", [-800.0, -40.0, 0.0, 40.0, 800.0])
def test_elementwise_functions_in_the_tails(value: float) -> None:
    x = Tensor(np.array([value]), requires_grad=True)
    with np.errstate(under="ignore"):
        for function, expected, slope in [
            (ops.softplus, max(value, 0) + np.log1p(np.exp(-abs(value))), 0.5 * (1 + np.tanh(value / 2))),
            (ops.sigmoid, 0.5 * (1 + np.tanh(value / 2)), 0.0 if value else 0.25),
            (ops.silu, value * 0.5 * (1 + np.tanh(value / 2)), 0.5 * (1 + np.tanh(value / 2))),
        ]:
            x.grad = None
            y = function(x)
            y.backward()
            np.testing.assert_allclose(y.data, expected, rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(x.grad, slope, rtol=1e-12, atol=1e-13)


COMPLEX: dict[str, Callable[[Any, Any, Any], Any]] = {
    "product": lambda f, a, b: a * b,
    "product with a real one": lambda f, a, b: a * f.real,
    "real one times a product": lambda f, a, b: f.real * a * b,
    "product with a number": lambda f, a, b: a * (0.5 + 0.7j),
    "quotient": lambda f, a, b: a / b,
    "real one by it": lambda f, a, b: f.real / b,
    "number by it": lambda f, a, b: 1 / b,
    "square": lambda f, a, b: a**2,
    "power": lambda f, a, b: b**-1.5,
    "power 0": lambda f, a, b: a**0 * b,
    "matrix product": lambda f, a, b: a @ b,
    "stacks by a matrix": lambda f, a, b: f.stack @ b,
    "exp": lambda f, a, b: f.exp(a),
    "log": lambda f, a, b: f.log(b),
    "sine": lambda f, a, b: f.sin(a),
    "tanh": lambda f, a, b: f.tanh(a),
    "broadcast": lambda f, a, b: f.row * b + f.row,
}


@pytest.mark.parametrize("name", COMPLEX)
@pytest.mark.filterwarnings("error")
def test_gradients_of_complex_numbers_are_those_of_pytorch(name: str) -> None:
    """d/dreal + i d/dimag, and of a real number among them the real part."""
    rng = np.random.default_rng(3)
    arrays = {
        "a": rng.standard_normal((3, 3)) + 1j * rng.standard_normal((3, 3)),
        "b": rng.standard_normal((3, 3)) + 1j * rng.uniform(0.5, 2, (3, 3)),
        "real": rng.standard_normal((3, 3)),
        "row": rng.standard_normal((1, 3)),
        "stack": rng.standard_normal((2, 3, 3)) + 1j * rng.standard_normal((2, 3, 3)),
    }
    ours = {key: Tensor(x.copy(), requires_grad=True) for key, x in arrays.items()}
    theirs = {key: torch.tensor(x, requires_grad=True) for key, x in arrays.items()}
    values = []
    for library, leaves in ((ops, ours), (torch, theirs)):
        functions = {key: getattr(library, key) for key in ("exp", "log", "sin", "tanh")}
        values.append(COMPLEX[name](SimpleNamespace(**functions, **leaves), leaves["a"], leaves["b"]))
    got, expected = values
    np.testing.assert_allclose(got.data, expected.detach().numpy(), rtol=1e-12)
    gradient = rng.standard_normal(got.shape) + 1j * rng.standard_normal(got.shape)
    got.backward(gradient)
    expected.backward(torch.tensor(gradient))
    for key, leaf in ours.items():
        other = theirs[key].grad
        assert (leaf.grad is None) == (other is None), key
        if other is not None:
            assert leaf.grad.dtype == leaf.dtype
            np.testing.assert_allclose(leaf.grad, other.numpy(), rtol=1e-11, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("axes", [(0, -1, -2), (-1, 0, 1), (2, 0, 1)])
def test_axes_counted_from_the_end(axes: tuple[int, ...]) -> None:
    for shape in ((3, 3, 3), (2, 3, 4)):
        check_gradients(lambda x: ops.transpose(x, axes) * ops.transpose(x, axes), tensor(*shape))


def test_reshape_takes_sizes_or_a_tuple_of_them() -> None:
    assert tensor(4, 6).reshape((6, 4)).shape == tensor(4, 6).reshape(6, 4).shape == (6, 4)


def test_a_constant_power_of_zero() -> None:
    x = Tensor(np.zeros(2), requires_grad=True)
    (x**0).sum().backward()
    np.testing.assert_array_equal(x.grad, [0, 0])


def test_functions_of_rows_are_those_of_scipy_and_pytorch() -> None:
    x, w, b = (tensor(*shape).data for shape in ((5, 8), (8,), (1, 8)))
    x *= 30
    x[:, 3] = -np.inf  # as a mask has it
    np.testing.assert_allclose(ops.softmax(x).data, scipy.special.softmax(x, axis=-1), rtol=1e-14)
    assert (ops.softmax(x).data[:, 3] == 0).all()
    x[:, 3] = 1000  # whose exponential is infinite
    np.testing.assert_allclose(ops.softmax(x).data, scipy.special.softmax(x, axis=-1), rtol=1e-14)
    for function, theirs in (
        (ops.gelu, torch.nn.functional.gelu),
        (
            lambda x: ops.layer_norm(x, w, b[0], 0.1),
            lambda x: torch.nn.functional.layer_norm(x, (8,), *map(torch.tensor, (w, b[0])), 0.1),
        ),
    ):
        np.testing.assert_allclose(function(x).data, theirs(torch.tensor(x)).numpy(), rtol=1e-12, atol=1e-14)
        for half in (np.float16, ml_dtypes.bfloat16):
            y = function(Tensor(x.astype(half), requires_grad=True))
            y.backward(y.data)
            assert y.dtype == half
            expected = function(x.astype(half).astype(np.float64)).data
            np.testing.assert_allclose(
                y.data.astype(np.float64), expected, rtol=float(ml_dtypes.finfo(half).eps), atol=1e-6
            )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_products_accumulate_in_float32(dtype: Any) -> None:
    a, b = np.full((1, 4096), 0.01, dtype), np.full((4096, 1), 0.01, dtype)
    got = ops.matmul(a, b)
    exact = np.dot(a.astype(np.float64), b.astype(np.float64))
    assert got.dtype == dtype
    assert got.data.astype(np.float64) == exact.astype(dtype).astype(np.float64)


def test_embedding_gradient_is_deterministic_and_in_order() -> None:
    rng = np.random.default_rng(0)
    ids, g = rng.integers(0, 7, 1000), rng.standard_normal((1000, 3)).astype(np.float32)
    gradients = []
    for _ in range(2):
        weight = tensor(7, 3, dtype=np.float32)
        ops.embedding(weight, ids).backward(g)
        gradients.append(weight.grad)
    np.testing.assert_array_equal(gradients[0], gradients[1])
    expected = np.zeros((7, 3))
    np.add.at(expected, ids, g.astype(np.float64))
    np.testing.assert_allclose(gradients[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.embedding(tensor(3, 2), np.array([3])), ValueError, r"embedding: indices must be in \[0, 3\)"),
        (lambda: ops.embedding(tensor(3, 2), np.array([-1])), ValueError, r"embedding: indices must be in \[0, 3\)"),
        (lambda: ops.embedding(tensor(3, 2), np.array([1.0])), TypeError, "embedding: indices must be integers"),
        (lambda: ops.split(tensor(3), (1, 1)), ValueError, "split: sizes"),
        (lambda: ops.split(tensor(5), (7, -2)), TypeError, r"split: sizes must be .*, got \(7, -2\)"),
        (lambda: ops.split(tensor(4), 2), TypeError, "split: sizes must be .*, got 2"),
        (lambda: ops.concatenate([]), ValueError, "concatenate: tensors must be at least one"),
        (lambda: tensor(3)[True], TypeError, "getitem: an index is an integer, .*, not bool"),
        (lambda: ops.silu([1.0, 2.0]), TypeError, "expected an array of NumPy or CuPy, or a Tensor, got list"),
        (lambda: Tensor("abc"), TypeError, "Tensor: data must be numbers, got <U3"),
        (lambda: Tensor(None), TypeError, "Tensor: data must be numbers, got object"),
        (lambda: tensor(2).backward([1, 1]), TypeError, "backward: gradient must be an array, got list"),
        (lambda: tensor(2).backward(tensor(2)), TypeError, "backward: gradient must be an array, got Tensor"),
        (lambda: check_gradients(ops.exp, np.ones(3)), TypeError, "tensor 0 must be float64 .*, got a ndarray of"),
        (lambda: check_gradients(ops.exp, Tensor(np.ones(3))), TypeError, "got a Tensor of float64 that requires none"),
        (lambda: tensor(3)[np.array([0])], TypeError, "getitem: an index is an integer"),
        (lambda: tensor(3) @ tensor(3), ValueError, "matmul: both operands need at least two axes"),
        (lambda: Tensor(tensor(3)), TypeError, "Tensor: data is a Tensor already"),
        (lambda: Tensor([1, 2], requires_grad=True), TypeError, "Tensor: a gradient needs a floating dtype"),
        (lambda: ops.reshape(tensor(3), shape=tensor(1)), TypeError, "reshape: shape is an option"),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# The tape


def test_gradients_accumulate_over_calls_and_uses() -> None:
    x = Tensor(np.array([2.0, 3.0]), requires_grad=True)
    (x * x).sum().backward()
    (x * 10.0).sum().backward()
    np.testing.assert_array_equal(x.grad, [14.0, 16.0])


def test_leaves_never_share_their_gradient() -> None:
    a, b = tensor(3), tensor(3, seed=1)
    (a + b).sum().backward()
    assert a.grad is not None
    a.grad *= 2
    np.testing.assert_array_equal(b.grad, np.ones(3))


def test_diamond_visits_every_node_once() -> None:
    calls = []

    @nn.primitive
    def double(a: Any) -> Any:
        return 2 * a

    def vjp(g: Any, out: Any, a: Any) -> Any:
        calls.append(1)
        return 2 * g

    nn.defvjp(double, vjp)
    x = tensor(2)
    y = double(x)
    (y * y + double(y) + y).sum().backward()
    assert len(calls) == 2
    np.testing.assert_allclose(x.grad, 2 * (2 * y.data + 2 + 1))


def test_deep_graphs_need_no_recursion() -> None:
    x = tensor(1)
    y = x
    for _ in range(5000):
        y = y + 1.0
    y.backward()
    np.testing.assert_array_equal(x.grad, [1.0])


def test_no_grad_records_nothing() -> None:
    x = tensor(2)
    with nn.no_grad():
        y = x * 2.0
    assert not y.requires_grad
    assert (x * 2.0).requires_grad
    assert not x.detach().requires_grad


def test_backward_releases_what_the_nodes_saved() -> None:
    x = tensor(1000)
    middle = ops.exp(x)
    saved = weakref.ref(middle)
    y = (middle * 2.0).sum()
    del middle
    y.backward()
    gc.collect()
    assert saved() is None
    with pytest.raises(RuntimeError, match="released by an earlier backward"):
        y.backward()


def test_retained_graphs_run_again() -> None:
    x = tensor(3)
    y = (x * x).sum()
    y.backward(retain_graph=True)
    first = np.array(x.grad)
    y.backward()
    np.testing.assert_allclose(x.grad, 2 * first)


def test_backward_errors() -> None:
    with pytest.raises(RuntimeError, match="computed from nothing that requires a gradient"):
        Tensor(np.ones(())).backward()
    with pytest.raises(ValueError, match=r"shape \(3,\) needs a gradient"):
        (tensor(3) * 2.0).backward()
    with pytest.raises(ValueError, match=r"gradient must have shape \(3,\), got \(2,\)"):
        (tensor(3) * 2.0).backward(np.ones(2))


def test_primitives_without_or_with_wrong_gradients() -> None:
    @nn.primitive
    def opaque(a: Any) -> Any:
        return a.copy()

    with pytest.raises(NotImplementedError, match="opaque: no gradient is defined"):
        opaque(tensor(2)).sum().backward()
    nn.defvjp(opaque, lambda g, out, a: g[:1])
    with pytest.raises(RuntimeError, match=r"opaque: its gradient has shape \(1,\)"):
        opaque(tensor(2)).sum().backward()


def test_check_gradients_finds_a_small_error() -> None:
    @nn.primitive
    def cube(a: Any) -> Any:
        return a**3

    nn.defvjp(cube, lambda g, out, a: g * 3.003 * a * a)  # wrong by 0.1 %
    with pytest.raises(AssertionError, match="tensor 0 at"):
        check_gradients(cube, tensor(3))
    with pytest.raises(TypeError, match="must be float64"):
        check_gradients(cube, tensor(3, dtype=np.float32))


# Losses


TARGETS = np.array([[0, 2, -100], [1, 1, 3]])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "BLOCK_BYTES", 2 * 4 * 4)  # two rows of four classes


@pytest.mark.usefixtures("small_blocks")
def test_cross_entropy_gradients() -> None:
    check_gradients(lambda logits: nn.cross_entropy(logits, TARGETS), tensor(2, 3, 4))
    check_gradients(lambda h, w: nn.linear_cross_entropy(h, w, TARGETS) * 3.0, tensor(2, 3, 5), tensor(4, 5))


@pytest.mark.usefixtures("small_blocks")
def test_cross_entropy_is_the_mean_negative_log_likelihood() -> None:
    hidden, weight = tensor(2, 3, 5), tensor(4, 5)
    logits = hidden.data @ weight.data.T
    log_likelihood = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = -np.mean([log_likelihood[i][TARGETS[i]] for i in np.ndindex(2, 3) if TARGETS[i] >= 0])
    np.testing.assert_allclose(nn.cross_entropy(Tensor(logits), TARGETS).item(), expected, rtol=1e-14)
    np.testing.assert_allclose(nn.linear_cross_entropy(hidden, weight, TARGETS).item(), expected, rtol=1e-14)


def test_cross_entropy_with_extreme_logits_and_no_targets() -> None:
    logits = Tensor(np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32), requires_grad=True)
    loss = nn.cross_entropy(logits, np.array([0, 0]))
    loss.backward()
    assert loss.dtype == np.float32
    assert loss.item() == 1e4
    np.testing.assert_array_equal(logits.grad, [[0, 0], [-0.5, 0.5]])
    assert nn.cross_entropy(logits, np.array([-100, -100])).item() == 0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_cross_entropy_of_half_precision_is_computed_in_float32(dtype: Any) -> None:
    hidden, weight = tensor(2, 3, 5, dtype=dtype), tensor(4, 5, dtype=dtype)
    loss = nn.linear_cross_entropy(hidden, weight, TARGETS)
    loss.backward()
    wide = nn.linear_cross_entropy(hidden.astype(np.float32), weight.astype(np.float32), TARGETS)
    assert loss.dtype == np.float32
    assert loss.item() == wide.item()
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype


def test_linear_cross_entropy_never_holds_the_logits() -> None:
    rows, classes = 2048, 4096
    hidden, weight = tensor(rows, 8, dtype=np.float32), tensor(classes, 8, dtype=np.float32)
    targets = np.zeros(rows, np.int64)
    tracemalloc.start()
    nn.linear_cross_entropy(hidden, weight, targets).backward()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows * classes * 4 / 3


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (np.zeros((2, 3)), TypeError, "targets must be integers"),
        (np.zeros((2, 2), int), ValueError, r"targets must have shape \(2, 3\), got \(2, 2\)"),
        (np.full((2, 3), 4), ValueError, r"targets must be in \[0, 4\) or -100, got 4"),
        (np.full((2, 3), -1), ValueError, r"targets must be in \[0, 4\) or -100, got -1"),
    ],
)
def test_cross_entropy_errors(targets: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nn.cross_entropy(tensor(2, 3, 4), targets)
    with pytest.raises(error, match=message):
        nn.linear_cross_entropy(tensor(2, 3, 5), tensor(4, 5), targets)


# The ops of sscan on the tape


def test_selective_scan_on_the_tape() -> None:
    def scan(
        u: Tensor, delta: Tensor, a: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, b: Tensor, h: Tensor
    ) -> Any:
        return nn.selective_scan(u, delta, -ops.exp(a), B, C, D, z, b, True, True, initial_state=h)

    shapes = [(2, 3, 5), (2, 3, 5), (3, 2), (2, 2, 5), (2, 2, 5), (3,), (2, 3, 5), (3,), (2, 3, 2)]
    check_gradients(scan, *(tensor(*shape, seed=i) for i, shape in enumerate(shapes)))


@pytest.mark.parametrize("rule", ["mamba", "zoh"])
def test_selective_scan_gradient_of_the_last_state_alone(rule: str) -> None:
    def last(u: Tensor, delta: Tensor, a: Tensor, B: Tensor) -> Tensor:
        C = np.ones((2, 2, 5))
        state: Tensor = nn.selective_scan(
            u, delta, -ops.exp(a), B, C, delta_softplus=True, return_last_state=True, discretization=rule
        )[1]
        return state

    check_gradients(last, tensor(2, 3, 5), tensor(2, 3, 5, seed=1), tensor(3, 2), tensor(2, 2, 5))


@pytest.mark.parametrize("reverse", [False, True])
def test_linear_scan_on_the_tape(reverse: bool) -> None:
    check_gradients(
        lambda a, b, h: nn.linear_scan(ops.tanh(a), b, h, reverse),
        tensor(2, 3, 6),
        tensor(2, 3, 6, seed=1),
        tensor(2, 3),
    )


def test_causal_conv1d_on_the_tape() -> None:
    shapes = [(2, 3, 5), (3, 4), (3,), (2, 3, 3)]
    inputs = [tensor(*shape, seed=i) for i, shape in enumerate(shapes)]
    check_gradients(lambda x, w, b, s: nn.causal_conv1d(x, w, b, "silu", s, return_final_state=True), *inputs)
    seq_idx = np.array([[0, 0, 1, 1, 1], [3, 3, 3, 3, 4]])
    check_gradients(lambda x, w, b, s: nn.causal_conv1d(x, w, b, None, s, seq_idx=seq_idx), *inputs)


def test_rms_norm_on_the_tape() -> None:
    check_gradients(nn.rms_norm, tensor(2, 3, 4), tensor(4))
    check_gradients(nn.rms_norm, tensor(2, 3, 4), tensor(4), tensor(2, 3, 4, seed=1))
    check_gradients(lambda x, w, r: nn.rms_norm(x, w, r)[1], tensor(2, 4), tensor(4), tensor(2, 4, seed=1))


def test_what_a_tensor_says_of_its_array() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = Tensor(array)
    assert (tensor.shape, tensor.ndim, tensor.size, len(tensor), tensor.dtype) == ((2, 3), 2, 6, 2, np.float32)
    assert Tensor(np.full((1, 1), 2.5)).item() == 2.5
    assert repr(tensor) == f"Tensor({array!r}, requires_grad=False)"


# What Python would answer without a word


def test_truth_is_asked_of_one_element_only() -> None:
    for value, truth in [(0.0, False), (2.0, True)]:
        for shape in [(), (1,), (1, 1)]:
            assert bool(Tensor(np.full(shape, value))) is truth
    for shape in [(2,), (0,), (0, 3)]:
        with pytest.raises(ValueError, match=re.escape(f"Tensor: one of shape {shape} is neither true nor false")):
            bool(Tensor(np.zeros(shape)))


def test_comparing_and_converting_are_refused() -> None:
    a, b = Tensor(np.ones(2)), Tensor(np.ones(2))
    for other in (b, a, 1.0, None, np.ones(2)):
        for compare in (operator.eq, operator.ne):
            with pytest.raises(TypeError, match="Tensor: == and != are not defined"):
                compare(a, other)
    with pytest.raises(TypeError, match="Tensor: == and != are not defined"):
        np.ones(2) == a  # noqa: B015
    assert {a: 1, b: 2}[b] == 2  # by identity
    with pytest.raises(TypeError, match=r"its array is \.data"):
        np.asarray(a)
    with pytest.raises(TypeError, match="without axes has no length"):
        len(Tensor(1.0))


def test_capture_on_numpy_arrays_is_a_plain_call() -> None:
    calls: list[Any] = []
    double = nn.capture(lambda x: calls.append(x) or 2 * x)
    for n in (2, 3, 3):
        np.testing.assert_array_equal(double(np.arange(n)), 2 * np.arange(n))
    assert len(calls) == 3
    with pytest.raises(TypeError, match="capture: function must be callable, got int"):
        nn.capture(3)  # type: ignore[arg-type]
