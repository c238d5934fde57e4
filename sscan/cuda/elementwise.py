"""Functions by element on the GPU: arrays of any layout as planes of rows of neighbours, and the launch."""

from sscan.cuda import _launch
from sscan.cuda._launch import Kernel

THREADS = 256
FUNCTIONS_OF_TWO = ("add", "multiply", "sigmoid_backward", "silu_backward", "gelu_backward")
WIDEST = 16  # bytes that a thread reads at once


def compute(name, inputs, out):
    """Fill out with a function of ``sscan.cuda.kernels.elementwise`` of one array or two.

    All have one shape, the inputs one dtype and any layout; out is dense, or a part of a dense array along one axis.
    Dtypes are float32, float16 and bfloat16.
    """
    if not out.size:
        return
    order = sorted(range(out.ndim), key=lambda axis: -out.strides[axis])
    arrays = [*inputs, out]
    groups = _merged(arrays, order)
    if len(groups) > 3 or set(groups[-1][1]) != {1}:
        arrays = [*(_dense(array, order) for array in inputs), out]
        groups = _merged(arrays, order)
    if set(groups[-1][1]) != {1}:  # out is one column of something
        groups.append((1, (1,) * len(arrays)))
    nothing = (1, (0,) * len(arrays))
    (planes, jumps), (rows, steps), (columns, _) = (nothing,) * (3 - len(groups)) + tuple(groups)
    each = WIDEST // max(arrays[0].itemsize, out.itemsize)
    if any(number % each for number in (columns, *jumps, *steps)):
        each = 1
    if any(_launch.address(array) % (each * array.itemsize) for array in arrays):
        each = 1
    chunks = -(-columns // (THREADS * each))
    if len(inputs) == 1:
        arrays, jumps, steps = (arrays[0], None, out), (jumps[0], 0, jumps[1]), (steps[0], 0, steps[1])
    _launch.launch(
        Kernel("elementwise", "compute", (name, arrays[0].dtype.name, out.dtype.name, each)),
        planes * rows * chunks, *arrays, columns, chunks, rows, *steps, *jumps,
    )  # fmt: skip


def _merged(arrays, order):
    """Axes that lie alike in all arrays as one, outermost first: length, and for each array the numbers of a step."""
    groups = []
    for axis in order:
        length, steps = arrays[0].shape[axis], tuple(array.strides[axis] // array.itemsize for array in arrays)
        if length == 1:
            continue
        if groups and groups[-1][1] == tuple(length * step for step in steps):
            length *= groups.pop()[0]
        groups.append((length, steps))
    return groups or [(1, (1,) * len(arrays))]


def _dense(array, order):
    """A copy without gaps, with its axes in this order in memory."""
    copy = _launch.empty([array.shape[i] for i in order], array.dtype)
    copy[...] = array.transpose(order)
    return copy.transpose([order.index(i) for i in range(array.ndim)])
