"""Matrix products by cuBLAS. It is called directly, since CuPy refuses to while a CUDA graph is recorded.

cuBLAS works on matrices in columns, so that a product in rows is that of the transposes the other way round.
"""

import contextlib
import ctypes
import functools
import math
import sys
import threading
from typing import NamedTuple

import ml_dtypes
import numpy as np

from sscan import _recording
from sscan.cuda import _launch, _sums

DOUBLE = np.dtype(np.float64)
# As cuBLAS numbers them: storage; arithmetic, of halves in float32.
STORAGE = {np.dtype(np.float32): 0, DOUBLE: 1, np.dtype(np.float16): 2, np.dtype(ml_dtypes.bfloat16): 14}
COMPUTE_32F, COMPUTE_64F, DEFAULT_ALGORITHM = 68, 70, -1
WORKSPACE = 32 << 20  # bytes, what cuBLAS itself takes on Hopper: so a recorded product has the bits of any other
PARTS = 256 << 20  # bytes of products that are added up afterwards
_BYTE = np.dtype(np.uint8)


class Operand(NamedTuple):
    """Matrices as cuBLAS takes them: whether in columns, elements from one row (column) to the next, and matrices."""

    array: object
    transposed: int
    leading: int
    stride: int


class _Graph(threading.local):
    """The graph that this thread records: its workspace, which shared with others would be written by two at once.

    And what it has to keep beside that.
    """

    workspace, kept = None, None


_graph = _Graph()


@contextlib.contextmanager
def recorded():
    """Products that become part of a CUDA graph, for which the memory of CuPy's current allocator is taken.

    Gives the list of what must live as long as the graph.
    """
    _graph.kept = []
    try:
        with working_in(_launch.empty(WORKSPACE, _BYTE)):
            yield _graph.kept
    finally:
        _graph.kept = None


@contextlib.contextmanager
def working_in(memory):
    """Products of this thread that use ``WORKSPACE`` bytes of this array, as part of somebody else's graph."""
    _graph.workspace = memory
    try:
        yield
    finally:
        _graph.workspace = None


def keep_plans(fft):
    """Let the graph that is recorded, if one is, keep the plans of CuPy's module ``fft``, whose work memory it uses.

    CuPy itself keeps the last 16 plans of a thread.
    """
    if _graph.kept is not None:
        _graph.kept += [node.plan for _, node in fft.config.get_plan_cache()]


def matmul(a, b):
    """a @ b of CuPy arrays over the last two axes, of one real dtype; the axes before them broadcast.

    Halves are multiplied in float32.
    """
    cupy = sys.modules["cupy"]
    leading = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    (rows, inner), columns = a.shape[-2:], b.shape[-1]
    if not inner:
        return cupy.zeros((*leading, rows, columns), a.dtype)
    out = cupy.empty((*leading, rows, columns), a.dtype)
    if not out.size:
        return out
    a, b = (cupy.broadcast_to(x, leading + x.shape[-2:]) for x in (a, b))
    if not leading:
        into(out, a, b)
        return out
    most = max(range(len(leading)), key=leading.__getitem__)  # along this axis, cuBLAS goes by itself
    several = [x.swapaxes(0, most) for x in (out, a, b)]
    for index in np.ndindex(*several[0].shape[1:-2]):
        into(*(x[(slice(None), *index)] for x in several))
    return out


def sum_of(a, b, dtype):
    """The sum of a @ b over all axes but the last two, a matrix; the axes before these broadcast. Dtypes as of matmul.

    Sums are in float32 at least. Where the matrices of a stack lie so that they are one, it is one product, else parts
    are products of their own, which nothing is copied for.
    """
    wide, (rows, inner), columns = np.result_type(a.dtype, np.float32), a.shape[-2:], b.shape[-1]
    a, b = (x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]) for x in (a, b))
    count = max(len(a), len(b))
    if not (rows and columns and inner and min(len(a), len(b))):
        return sys.modules["cupy"].zeros((rows, columns), dtype)
    total = _launch.empty((rows, columns), wide)
    a_long, b_long = _joined(a.swapaxes(1, 2)), _joined(b)
    if len(a) == len(b) and a_long is not None and b_long is not None:
        into(total, a_long.swapaxes(0, 1), b_long)
        return total.astype(dtype, copy=False)
    most = min(count, max(1, PARTS // total.nbytes))
    parts = _launch.empty((most, rows, columns), wide)
    for start in range(0, count, most):
        some = slice(start, min(start + most, count))
        into(parts[: some.stop - start], *(x[0] if len(x) == 1 else x[some] for x in (a, b)), added=start > 0)
    _sums.over_parts((parts, total))
    return total.astype(dtype, copy=False)


def _joined(stack):
    """A stack (matrices, rows, columns) as one matrix, if it lies so."""
    count, rows, columns = stack.shape
    if count > 1 and stack.strides[0] != rows * stack.strides[1]:
        return None
    return stack.reshape(count * rows, columns)


def multiply(x, weight, out, added):
    """out (rows, columns) = x (rows, inner) weight (columns, inner)^T, or that added to it; all are contiguous.

    Of halves, out may be float32, and is not rounded to them then.
    """
    (rows, inner), columns = x.shape, len(weight)
    operands = Operand(weight, 1, inner, 0), Operand(x, 0, inner, 0), Operand(out, 0, columns, 0)
    _gemm(*operands, columns, rows, inner, 1, added)


def into(out, a, b, added=False):
    """out = a b, or that added to it, of matrices or of as many of them as out has; a single one is there for all.

    The last axis of out is contiguous. Dtypes as of ``multiply``.
    """
    (rows, columns), inner = out.shape[-2:], a.shape[-1]
    _gemm(_operand(b), _operand(a), _operand(out), columns, rows, inner, out.shape[0] if out.ndim > 2 else 1, added)


def _operand(x):
    """The matrices of an array (rows, columns) or (matrices, rows, columns); copied if neither axis is contiguous."""
    (rows, columns), strides = x.shape[-2:], x.strides
    size = x.itemsize
    down, across = (step // size for step in strides[-2:])
    stride = strides[0] // size if x.ndim > 2 else 0
    if (across == 1 or columns == 1) and (down >= columns or rows == 1):
        return Operand(x, 0, down if rows > 1 else columns, stride)
    if (down == 1 or rows == 1) and (across >= rows or columns == 1):
        return Operand(x, 1, across if columns > 1 else rows, stride)
    _recording.not_repeatable()
    return _operand(x.copy())


def _gemm(a, b, c, m, n, k, count, added=False):
    """c = a b in columns, or added: c (m, n), a (m, k) or transposed, b (k, n) or transposed, ``count`` of each."""
    arrays, stored = (a.array, b.array, c.array), [STORAGE[x.array.dtype] for x in (a, b, c)]
    wide = stored[0] == STORAGE[DOUBLE]
    product = Product(
        (a.transposed, b.transposed, m, n, k, _numbers[wide, True]), (stored[0], a.leading, a.stride),
        (stored[1], b.leading, b.stride, _numbers[wide, bool(added)]),
        (stored[2], c.leading, c.stride, count, COMPUTE_64F if wide else COMPUTE_32F, DEFAULT_ALGORITHM),
    )  # fmt: skip
    _recording.launched(product, 0, arrays)
    product.starter(sys.modules["cupy"].cuda.get_current_stream().ptr)(product, *map(_launch.address, arrays))


class Product(NamedTuple):
    """A call of cuBLAS: what it takes in front of the addresses of a, b and c, between them and behind."""

    before: tuple[int, ...]
    of_a: tuple[int, ...]
    of_b: tuple[int, ...]
    of_c: tuple[int, ...]

    @staticmethod
    def starter(stream):
        """What starts products one after the other on a stream of the current device: ``start(product, a, b, c)``."""
        cublas, handle = _library(), _handle()
        _check(cublas.cublasSetStream_v2(handle, stream))  # which makes it take its own workspace
        if _graph.workspace is not None:
            _check(cublas.cublasSetWorkspace_v2(handle, _launch.address(_graph.workspace), WORKSPACE))
        multiply = cublas.cublasGemmStridedBatchedEx

        def start(product, a, b, c):
            before, of_a, of_b, of_c = product
            _check(multiply(handle, *before, a, *of_a, b, *of_b, c, *of_c))

        return start


# 1 and 0 where cuBLAS reads them, by whether they are in double precision.
_constants = {(wide, one): (ctypes.c_double if wide else ctypes.c_float)(one) for wide in (0, 1) for one in (0, 1)}
_numbers = {key: ctypes.addressof(number) for key, number in _constants.items()}


def _check(status):
    if status:
        raise RuntimeError(f"sscan: a matrix product on the GPU failed (cuBLAS status {status})")


def _handle():
    """CuPy's, of this thread and the current device."""
    return sys.modules["cupy"].cuda.device.get_cublas_handle()


@functools.cache
def _library():
    """The cuBLAS that CuPy has loaded."""
    _handle()
    major = sys.modules["cupy"].cuda.runtime.runtimeGetVersion() // 1000
    cublas = ctypes.CDLL(f"cublas64_{major}.dll" if sys.platform == "win32" else f"libcublas.so.{major}")
    pointer, number, stride = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
    cublas.cublasSetStream_v2.argtypes = pointer, pointer
    cublas.cublasSetWorkspace_v2.argtypes = pointer, pointer, ctypes.c_size_t
    cublas.cublasGemmStridedBatchedEx.argtypes = (
        pointer, *5 * (number,), pointer, *2 * (pointer, number, number, stride), pointer, pointer, number, number,
        stride, *3 * (number,),
    )  # fmt: skip
    return cublas
