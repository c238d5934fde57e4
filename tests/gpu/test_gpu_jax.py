"""sscan.jax on a GPU: every op under jit and its gradients, XLA's stream and memory, nothing waits."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import cupy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, DIFFERENTIABLE, Case, _check, backward, case_of, cotangents, forward, upcast
from test_jax import (
    EVERYTHING,
    VMAPS,
    assert_same,
    conjugated,
    double_precision,
    loss_of,
    of_double,
    outputs_of,
    scan_case,
    scanned,
    split,
)
from test_jax import test_chunks_in_lax_scan as chunks_in_lax_scan
from test_jax import test_decoding_in_lax_scan as decoding_in_lax_scan
from test_jax import test_only_custom_calls_and_no_copies as only_custom_calls_and_no_copies
from test_jax import test_vmap as vmap_is_one_by_one

import sscan
import sscan.jax
from sscan import reference
from sscan.jax import _handler

GPU = jax.devices("gpu")[0]


def label(case: Case) -> str:
    return f"{case.op}: {case.name}"


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Any:
    with jax.default_device(GPU):
        yield


@pytest.mark.parametrize("case", CASES, ids=label)
def test_values(case: Case) -> None:
    """Within the tolerance of every lane."""
    arguments = case.arguments()
    arrays, options = split(arguments)
    with double_precision(any(map(of_double, arrays.values()))):
        found = jax.jit(lambda x: outputs_of(case, x, options))(arrays)
    expected = forward(reference, case.op, arguments)
    ordered = {name: np.asarray(found[name]) for name in expected}
    _check(ordered, expected, forward(reference, case.op, upcast(arguments)), case)


@pytest.mark.parametrize("case", [case for case in CASES if case.op in DIFFERENTIABLE], ids=label)
def test_gradients(case: Case) -> None:
    """Within the tolerance of every lane, those of parameters in the dtype of the reference's."""
    arguments = case.arguments()
    arrays, options = split(arguments)
    given = cotangents(forward(reference, case.op, arguments), 1)
    differentiable = {name: x for name, x in arrays.items() if x.dtype.kind not in "iu"}
    others = {name: x for name, x in arrays.items() if name not in differentiable}

    def gradients(differentiable: Any, given: Any) -> Any:
        return jax.vjp(lambda x: outputs_of(case, {**x, **others}, options), differentiable)[1](given)[0]

    with double_precision(any(map(of_double, arrays.values()))):
        found = jax.jit(gradients)(differentiable, {name[1:]: x for name, x in conjugated(given).items()})
    expected = backward(reference, case.op, arguments, given)
    ordered = conjugated({name: np.asarray(found[name[1:]]).astype(x.dtype) for name, x in expected.items()})
    _check(ordered, expected, backward(reference, case.op, upcast(arguments), upcast(given)), case)


@pytest.mark.parametrize("name", ["scan", "scan, groups", "scan, complex", "convolution", "norm", "step"])
def test_vmap(name: str) -> None:
    assert VMAPS[name][2] == EVERYTHING
    vmap_is_one_by_one(name)


def test_loops() -> None:
    chunks_in_lax_scan()
    decoding_in_lax_scan()


def test_only_custom_calls_and_no_copies() -> None:
    only_custom_calls_and_no_copies()


def test_everything_is_where_xla_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are made in its memory, on its device, on a stream of its own."""
    seen: list[Any] = []
    run, is_at = _handler._run, _handler._is_at

    def watched(call: Any, arguments: Any, results: Any) -> None:
        seen.append((cupy.cuda.get_current_stream().ptr, {memory.device for memory in (*arguments, *results)}))
        run(call, arguments, results)

    def checked(*arrays: Any) -> bool:
        seen.append(is_at(*arrays))
        return bool(seen[-1])

    monkeypatch.setattr(_handler, "_run", watched)
    monkeypatch.setattr(_handler, "_is_at", checked)
    arrays, options = scan_case(initial_state=True)
    jax.block_until_ready(jax.jit(jax.grad(loss_of(partial(scanned, options))))(arrays))
    calls = [x for x in seen if isinstance(x, tuple)]
    assert len(calls) == 2
    for stream, devices in calls:
        assert stream != 0
        assert devices == {"cuda:0"}
    assert all(x for x in seen if not isinstance(x, tuple))
    assert len(seen) > 10


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d", "rms_norm"])
def test_calls_that_are_repeated(op: str) -> None:
    """Later calls are launched without a look at the op, on other memory and with other values."""
    case = next(case for case in CASES if case.op == op)
    arrays, options = split(case.arguments())
    gradients = jax.jit(jax.grad(loss_of(lambda x: outputs_of(case, x, options))))
    kept = []
    for factor in (1, 2, -1, 3):
        scaled = {name: np.asarray(x * factor if name in ("u", "x") else x) for name, x in arrays.items()}
        found = gradients(jax.device_put(scaled, GPU))
        with jax.default_device(jax.devices("cpu")[0]):
            expected = jax.jit(jax.grad(loss_of(lambda x: outputs_of(case, x, options))))(scaled)
        for name, x in expected.items():
            assert np.allclose(found[name], x, rtol=1e-3, atol=1e-4), name
        kept.append(found)  # so that memory is not always the same


def test_nothing_waits() -> None:
    """Calls behind a long computation return long before it ends, and read its result nevertheless."""
    arrays, options = scan_case(batch=4, dim=64, length=512)
    arrays = jax.device_put(arrays, GPU)
    huge = jax.random.normal(jax.random.key(0), (8192, 8192))

    @jax.jit
    def long(x: Any, u: Any) -> Any:
        for _ in range(60):
            x = x @ x
            x = x / jnp.abs(x).max()
        return u + 0 * x[0, 0]

    gradient = jax.jit(jax.grad(loss_of(partial(scanned, options))))
    expected = jax.block_until_ready(gradient({**arrays, "u": long(huge, arrays["u"])}))
    start = time.perf_counter()
    u = jax.block_until_ready(long(huge, arrays["u"]))
    alone = time.perf_counter() - start
    start = time.perf_counter()
    found = gradient({**arrays, "u": long(huge, arrays["u"])})
    returned = time.perf_counter() - start
    assert not found["A"].is_ready()
    assert returned < alone / 2, f"returned after {returned:.3f} s, the computation takes {alone:.3f} s"
    assert_same(found, {name: np.asarray(x) for name, x in expected.items()})
    assert u.shape == arrays["u"].shape


def test_many_calls_are_in_order() -> None:
    """Workspaces of CuPy's pool are taken again by later calls, never too early."""
    arrays, options = scan_case(batch=2, dim=32, length=2000, initial_state=True)
    arrays = jax.device_put(arrays, GPU)
    gradient = jax.jit(jax.grad(loss_of(partial(scanned, options))))
    expected = {name: np.asarray(x) for name, x in gradient(arrays).items()}
    for found in [gradient(arrays) for _ in range(50)]:
        assert_same(found, expected)


def test_state_is_updated_in_donated_memory() -> None:
    arguments = case_of("selective_state_update", "base").arguments()
    arrays, options = split(arguments)
    state = jax.device_put(jnp.array(arrays.pop("state")), GPU)
    step = jax.jit(partial(sscan.jax.selective_state_update, **options), donate_argnames="state")
    address = state.unsafe_buffer_pointer()
    y, updated = step(state=state, **arrays)
    assert updated.unsafe_buffer_pointer() == address
    expected = forward(reference, "selective_state_update", arguments)
    _check(
        {"y": np.asarray(y), "state": np.asarray(updated)}, expected,
        forward(reference, "selective_state_update", upcast(arguments)), case_of("selective_state_update", "base"),
    )  # fmt: skip


def test_the_cpu_beside_the_gpu() -> None:
    """What is traced for the GPU's kernels runs on the CPU of the same process."""
    arrays, options = scan_case(dim=11)
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        gradient = jax.jit(jax.grad(loss_of(partial(scanned, options))))(jax.device_put(arrays, cpu))
    assert gradient["A"].devices() == {cpu}
    dy = forward(sscan, "selective_scan", {**arrays, **options})
    expected = backward(sscan, "selective_scan", {**arrays, **options}, {f"d{name}": 2 * x for name, x in dy.items()})
    for name, x in gradient.items():
        np.testing.assert_allclose(np.asarray(x), expected[f"d{name}"], rtol=1e-5, atol=1e-5)


def test_error_of_python_is_one_of_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no more")

    arrays, options = scan_case(dim=3)
    compiled = jax.jit(partial(scanned, options)).lower(arrays).compile()
    monkeypatch.setattr(sscan, "selective_scan", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="MemoryError: no more"):
        jax.block_until_ready(compiled(arrays))
