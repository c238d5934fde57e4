"""sscan.nn's matrix products: right, the same bits for every number of threads, and BLAS on one thread meanwhile."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

import sscan.nn
from sscan.cpu import _parallel, half_precision
from sscan.nn import MambaConfig, MambaLM, products
from sscan.nn.products import one_blas_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NN = Path(sscan.nn.__file__).parent


def operand(*shape: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng([7, *shape]).standard_normal(shape).astype(dtype)


# Small ones are one product, large ones are cut by rows, by columns, and by the axes before them.
SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((2, 3), (3, 4)),
    ((0, 3), (3, 4)),
    ((2, 0), (0, 4)),
    ((1537, 96), (96, 640)),
    ((300, 96), (96, 1537)),
    ((1, 768), (768, 20011)),
    ((700, 200), (3, 200, 131)),
    ((2, 1, 515, 100), (3, 100, 260)),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("a", "b"), SHAPES, ids=str)
def test_products(a: tuple[int, ...], b: tuple[int, ...], dtype: Any) -> None:
    a, b = operand(*a, dtype=dtype), operand(*b, dtype=dtype)
    exact = np.einsum("...ij,...jk->...ik", a.astype(np.float64), b.astype(np.float64))
    got = products.matmul(a, b)
    assert got.dtype == dtype
    assert got.shape == exact.shape
    # A sum of n products in the dtype of the accumulation, rounded once.
    wide = np.result_type(dtype, np.float32)
    sums = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64)
    bound = a.shape[-1] * np.finfo(wide).eps * sums + float(ml_dtypes.finfo(dtype).eps) * np.abs(exact)
    assert (np.abs(got.astype(np.float64) - exact) <= bound).all()
    transposed = products.matmul(b.swapaxes(-1, -2), a.swapaxes(-1, -2))
    assert (np.abs(transposed.swapaxes(-1, -2).astype(np.float64) - exact) <= bound).all()


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("vectors", [np.float32, None])
def test_few_rows_with_weights_in_half_precision(half: Any, vectors: Any) -> None:
    weight, x = operand(5001, 901, dtype=half), operand(7, 901, dtype=vectors or half)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    got = products.matmul(x, weight.T)
    assert got.dtype == x.dtype
    bound = 901 * np.finfo(np.float32).eps * (np.abs(x).astype(np.float64) @ np.abs(weight.T).astype(np.float64))
    assert (np.abs(got - exact) <= bound + float(ml_dtypes.finfo(x.dtype).eps) * np.abs(exact)).all()
    np.testing.assert_array_equal(got[2:3], products.matmul(x[2:3], weight.T))


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_conversions_are_those_of_numpy(half: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    convert = half_precision.convert
    monkeypatch.setattr(half_precision, "convert", lambda *given: calls.append(given) or convert(*given))
    every = np.arange(1 << 16, dtype=np.uint16).view(half)  # all bits that there are
    assert every.size >= products.LEAST_COPY
    wide = products.cast(every, np.float32)
    np.testing.assert_array_equal(wide, every.astype(np.float32))
    around = wide.view(np.int32)[:, None] + np.array([-1, 0, 1, 0x0FFF, 0x1000, 0x7FFF, 0x8000, 0x8001], np.int32)
    around = around.astype(np.int32).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = around.astype(half)
    got = products.cast(around, half)
    np.testing.assert_array_equal(got.astype(np.float32), expected.astype(np.float32))
    for layout in (around.T, around[::2], around.reshape(256, 256, 8).swapaxes(1, 2), around[:0]):
        got = products.cast(layout, half)
        assert got.shape == layout.shape
        with np.errstate(over="ignore", invalid="ignore"):
            np.testing.assert_array_equal(got.astype(np.float32), layout.astype(half).astype(np.float32))
    assert len(calls) == 5
    assert products.cast(wide, np.float32) is wide


@pytest.mark.parametrize(("a", "b"), SHAPES, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(
    a: tuple[int, ...], b: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = operand(*a), operand(*b)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(_parallel, "threads", lambda threads=threads: threads)
        results.append(products.matmul(a, b))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_sizes_that_do_not_fit() -> None:
    for a, b in [((2, 3), (4, 5)), ((2000, 300), (301, 2000)), ((2, 500, 300), (3, 300, 500))]:
        with pytest.raises(ValueError, match=r"matmul|broadcast"):
            products.matmul(operand(*a), operand(*b))


# BLAS


@pytest.fixture
def two_threads() -> Iterator[None]:
    """BLAS as it comes on a machine with two cores, whatever this one has."""
    assert one_blas_thread.libraries, "no BLAS library was found, so nothing is held down"
    before = counts()
    for i, count in enumerate(before):
        one_blas_thread._set(i, 2, count)
    assert set(counts()) == {2}
    yield
    for i, count in enumerate(before):
        one_blas_thread._set(i, count, 2)


def counts() -> list[int]:
    return [library.get_num_threads() for library in one_blas_thread.libraries]


@pytest.mark.usefixtures("two_threads")
def test_blas_has_one_thread_while_a_model_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def spy(name: str) -> None:
        function = getattr(np, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            found.append((name, *counts()))
            return function(*arguments, **options)

        monkeypatch.setattr(np, name, wrapper)

    spy("matmul")
    spy("vdot")
    model = MambaLM(MambaConfig(16, 1, 300))
    ids = np.zeros((1, 8), np.int64)
    model.loss(ids, ids).backward()
    sscan.nn.clip_gradients(model.parameters())
    list(model.generate(ids, 2))
    assert {name for name, *_ in found} == {"matmul", "vdot"}
    assert {count for _, *threads in found for count in threads} == {1}
    assert set(counts()) == {2}


def test_no_other_file_calls_blas() -> None:
    # What goes around products.py would bring BLAS' own threads back.
    names = {"matmul", "dot", "vdot", "inner", "tensordot", "einsum"}
    found = {
        (path.name, node.func.attr)
        for path in NN.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names
        and ast.unparse(node.func) != "self.inner"  # a layer
    }  # fmt: skip
    operators = [
        path.name
        for path in NN.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.MatMult)
    ]
    assert operators == []
    through_products = {(name, "matmul") for name in ("ops.py", "modules.py", "mamba.py", "s6.py", "attention.py")}
    assert found - through_products == {
        ("products.py", "matmul"), ("optim.py", "vdot"),
    }  # fmt: skip


def someone_inside() -> Callable[[], None]:
    """Another thread holds BLAS to one; the function has it leave."""
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with one_blas_thread:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()

    def end() -> None:
        leave.set()
        thread.join()

    return end


@pytest.mark.usefixtures("two_threads")
def test_who_comes_first_may_leave_first() -> None:
    with one_blas_thread:
        end = someone_inside()
    assert set(counts()) == {1}
    end()
    assert set(counts()) == {2}
    with pytest.raises(ValueError, match="matmul"):
        products.matmul(operand(2, 3), operand(4, 5))
    assert set(counts()) == {2}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # which is the point
@pytest.mark.filterwarnings("ignore:os.fork.* was called:RuntimeWarning")  # JAX's, if it is there
def test_a_child_forked_meanwhile_has_its_threads_back() -> None:
    end = someone_inside()
    child = os.fork()
    if not child:
        code = 1
        with one_blas_thread:
            code = int(set(counts()) != {1})
        os._exit(code or int(set(counts()) != {2}))
    _, status = os.waitpid(child, 0)
    end()
    assert os.waitstatus_to_exitcode(status) == 0


def test_libraries_with_a_limit_for_each_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """MKL, and OpenBLAS on OpenMP: every thread that multiplies has to ask for itself."""

    class Library(threading.local):
        internal_api, count = "mkl", 8

        def get_num_threads(self) -> int:
            return self.count

        def set_num_threads(self, count: int) -> None:
            self.count = count

    library, held = Library(), products._OneBlasThread()
    held.libraries = [library]
    monkeypatch.setattr(products, "one_blas_thread", held)
    monkeypatch.setattr(_parallel, "threads", lambda: 4)
    multiply, found, gate = np.matmul, {}, threading.Barrier(2, timeout=60)

    def spy(*arguments: Any, **options: Any) -> Any:
        if threading.get_ident() not in found:
            found[threading.get_ident()] = library.count
            if len(found) <= 2:
                gate.wait()  # until a second thread multiplies
        return multiply(*arguments, **options)

    monkeypatch.setattr(np, "matmul", spy)
    products.matmul(operand(2000, 300), operand(300, 2000))
    assert len(found) > 1
    assert set(found.values()) == {1}
    assert library.count == 8
    assert not held.inside


def test_importing_models_loads_no_compiler() -> None:
    code = "import sys, sscan.nn; print('numba' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=NN.parent.parent)
    assert run.stdout == "False\n"
