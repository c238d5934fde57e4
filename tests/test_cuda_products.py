"""Matrix products by cuBLAS: what it is asked for gives the product, on a stand-in that multiplies in columns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from cublas_double import Cublas, installed

from sscan.cuda import _products

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def cublas(monkeypatch: pytest.MonkeyPatch) -> Cublas:
    return installed(monkeypatch)


def normal(*shape: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(len(shape) + sum(shape)).standard_normal(shape).astype(dtype)


CASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "matrices": lambda: (normal(3, 4), normal(4, 5)),
    "a transposed": lambda: (normal(4, 3).T, normal(4, 5)),
    "both transposed": lambda: (normal(4, 3).T, normal(5, 4).T),
    "stack": lambda: (normal(2, 3, 4), normal(2, 4, 5)),
    "stack of transposed": lambda: (normal(2, 4, 3).swapaxes(1, 2), normal(2, 5, 4).swapaxes(1, 2)),
    "one for all": lambda: (normal(3, 4), normal(6, 4, 5)),
    "two axes of stacks": lambda: (normal(2, 1, 3, 4), normal(6, 4, 5)),
    "columns of a matrix": lambda: (normal(3, 9)[:, 2:6], normal(4, 8)[:, :5]),
    "rows of a stack": lambda: (normal(2, 3, 7)[:, :, 1:5], normal(4, 5)),
    "every second": lambda: (normal(3, 8)[:, ::2], normal(8, 10)[::2, ::2]),
    "one row": lambda: (normal(1, 4), normal(4, 5)),
    "one column": lambda: (normal(3, 4), normal(4, 1)),
    "one number of each": lambda: (normal(3, 1), normal(1, 5)),
    "a row of a wide matrix": lambda: (normal(3, 9)[1:2, :4], normal(9, 1)[:4]),
    "a column of a matrix": lambda: (normal(4, 9)[:, 1:2], normal(1, 5)),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_products(name: str, dtype: Any, cublas: Cublas) -> None:
    a, b = (x.astype(dtype, copy=False, order="K") for x in CASES[name]())
    got = _products.matmul(a, b)
    expected = np.matmul(a.astype(np.float64), b.astype(np.float64))
    assert got.dtype == dtype
    assert got.shape == expected.shape
    np.testing.assert_allclose(got.astype(np.float64), expected, atol=8 * float(ml_dtypes.finfo(dtype).eps))
    assert cublas.calls[0] == ("stream", 5, 77)


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 4, 0), (3, 0, 5)])
def test_nothing_to_multiply(shape: tuple[int, int, int], cublas: Cublas) -> None:
    rows, inner, columns = shape
    got = _products.matmul(normal(rows, inner), normal(inner, columns))
    np.testing.assert_array_equal(got, np.zeros((rows, columns)))
    assert not cublas.calls


def test_a_stack_is_one_call(cublas: Cublas) -> None:
    _products.matmul(normal(3, 4), normal(6, 4, 5))
    assert cublas.calls[1:] == [("product", 5, 3, 4, 6)]


@pytest.mark.parametrize("leading", [(7, 2), (2, 7), (1, 7, 2)])
def test_the_longest_axis_of_stacks_is_one_call(leading: tuple[int, ...], cublas: Cublas) -> None:
    """As of rows and heads of attention, which do not lie one behind the other."""
    a, b = normal(*leading, 3, 4), normal(*leading[::-1], 4, 5).swapaxes(0, -3)
    np.testing.assert_allclose(_products.matmul(a, b), a @ b, rtol=1e-5)
    assert cublas.calls[1::2] == 2 * [("product", 5, 3, 4, 7)]


def test_a_recorded_product_has_a_workspace_of_its_own(cublas: Cublas) -> None:
    """It is set behind the stream, which would make cuBLAS take the common one again."""
    with _products.recorded():
        _products.matmul(normal(3, 4), normal(4, 5))
        workspace = _products._graph.workspace.ctypes.data
    _products.matmul(normal(3, 4), normal(4, 5))
    names = [call[0] for call in cublas.calls]
    assert names == ["stream", "workspace", "product", "stream", "product"]
    assert cublas.calls[1] == ("workspace", workspace, _products.WORKSPACE)


def test_a_recorded_graph_keeps_the_plans_of_its_transforms(cublas: Cublas) -> None:
    """CuPy keeps the last 16; a graph would go on to use the memory of one that is gone."""
    plans = [SimpleNamespace(plan=object()) for _ in range(2)]
    fft = SimpleNamespace(config=SimpleNamespace(get_plan_cache=lambda: [("key", node) for node in plans]))
    _products.keep_plans(fft)  # outside of a recording nobody is there to keep them
    with _products.recorded() as kept:
        assert kept == []
        _products.keep_plans(fft)
        assert kept == [node.plan for node in plans]


def test_a_failure_is_an_error(cublas: Cublas) -> None:
    cublas.status = 13
    with pytest.raises(RuntimeError, match=r"a matrix product on the GPU failed \(cuBLAS status 13\)"):
        _products.matmul(normal(3, 4), normal(4, 5))


SUMS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "matrices": lambda: (normal(3, 4), normal(4, 5)),
    "rows of a batch": lambda: (normal(6, 4, 3).swapaxes(1, 2), normal(6, 4, 5)),
    "columns of a batch": lambda: (normal(6, 3, 4), normal(6, 5, 4).swapaxes(1, 2)),
    "two axes of stacks": lambda: (normal(2, 3, 3, 4), normal(2, 3, 4, 5)),
    "one column for all": lambda: (normal(6, 3, 4), np.ones((4, 1), np.float32)),
    "parts of an array": lambda: (normal(6, 9, 4)[:, 2:5], normal(6, 5, 8)[:, :, 1:5].swapaxes(1, 2)),
    "a stack of one": lambda: (normal(1, 3, 4), normal(1, 4, 5)),
}


@pytest.mark.parametrize("most", [1, 2, 4, 100])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", SUMS)
def test_sums_of_products(name: str, dtype: Any, most: int, cublas: Cublas, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 at least, whatever number of products is in memory at once; nothing is copied."""
    a, b = (x.astype(dtype, copy=False, order="K") for x in SUMS[name]())
    expected = (a.astype(np.float64) @ b.astype(np.float64)).reshape(-1, a.shape[-2], b.shape[-1]).sum(axis=0)
    wide = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    monkeypatch.setattr(_products, "PARTS", most * expected.size * wide.itemsize)
    monkeypatch.setattr(_products._sums, "over_parts", lambda pair: np.sum(pair[0], axis=0, out=pair[1]))
    monkeypatch.setattr(_products._recording, "not_repeatable", lambda: pytest.fail("an operand was copied"))
    got = _products.sum_of(a, b, wide)
    assert got.dtype == wide
    np.testing.assert_allclose(got, expected, atol=1e-5 if wide == np.float32 else 1e-12)
    assert _products.sum_of(a, b, dtype).dtype == dtype


@pytest.mark.parametrize("shapes", [((0, 3, 4), (0, 4, 5)), ((2, 3, 0), (2, 0, 5)), ((2, 0, 4), (2, 4, 5))])
def test_sums_of_nothing(shapes: Any, cublas: Cublas) -> None:
    got = _products.sum_of(*map(np.zeros, shapes), np.float64)
    assert got.shape == (shapes[0][1], shapes[1][2])
    assert not got.any()
