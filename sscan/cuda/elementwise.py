"""Functions by element on the GPU: arrays of any layout as planes of rows of neighbours, and the launch."""

import functools
from typing import Any, NamedTuple

from sscan.cuda import _launch
from sscan.cuda._launch import Kernel

THREADS = 256
FUNCTIONS_OF_TWO = ("add", "multiply", "sigmoid_backward", "silu_backward", "gelu_backward")
WIDEST = 16  # bytes that a thread reads at once


class Layout(NamedTuple):
    """What an array is like."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any


class Plan(NamedTuple):
    """How arrays of some layouts are computed."""

    order: tuple[int, ...] | None  # of the axes in copies of the inputs, if these have to be copied
    kernel: Kernel
    blocks: int
    numbers: tuple[int, ...]


def compute(name, inputs, out):
    """Fill out with a function of ``sscan.cuda.kernels.elementwise`` of one array or two.

    All have one shape, the inputs one dtype and any layout; out is dense, or a part of a dense array along one axis.
    Dtypes are float32, float16 and bfloat16.
    """
    if not out.size:
        return
    arrays = (*inputs, out)
    layouts = tuple([Layout(x.shape, x.strides, x.dtype) for x in arrays])
    plan = _planned(name, layouts, tuple([_launch.address(x) % WIDEST for x in arrays]))
    if plan.order is not None:
        inputs = [_dense(array, plan.order) for array in inputs]
    _launch.launch(plan.kernel, plan.blocks, *inputs, *((None,) * (2 - len(inputs))), out, *plan.numbers)


@functools.lru_cache(4096)
def _planned(name, layouts, addresses):
    """The plan for the inputs and out, whose addresses are these behind a multiple of ``WIDEST`` bytes."""
    *inputs, out = layouts
    order = tuple(sorted(range(len(out.shape)), key=lambda axis: -out.strides[axis]))
    groups = _merged(layouts, order)
    copied = len(groups) > 3 or set(groups[-1][1]) != {1}
    if copied:
        layouts, addresses = [*(_without_gaps(x, order) for x in inputs), out], addresses[-1:]
        groups = _merged(layouts, order)
    if set(groups[-1][1]) != {1}:  # out is one column of something
        groups.append((1, (1,) * len(layouts)))
    nothing = (1, (0,) * len(layouts))
    (planes, jumps), (rows, steps), (columns, _) = (nothing,) * (3 - len(groups)) + tuple(groups)
    each, sizes = WIDEST // max(x.dtype.itemsize for x in layouts), [x.dtype.itemsize for x in layouts]
    if any(number % each for number in (columns, *jumps, *steps)):
        each = 1
    if any(address % (each * size) for address, size in zip(addresses, sizes[-len(addresses) :], strict=True)):
        each = 1
    chunks = -(-columns // (THREADS * each))
    if len(inputs) == 1:
        jumps, steps = (jumps[0], 0, jumps[1]), (steps[0], 0, steps[1])
    kernel = Kernel("elementwise", "compute", (name, inputs[0].dtype.name, out.dtype.name, each))
    return Plan(order if copied else None, kernel, planes * rows * chunks, (columns, chunks, rows, *steps, *jumps))


def _without_gaps(layout, order):
    """The layout of what ``_dense`` makes."""
    strides, step = [0] * len(order), layout.dtype.itemsize
    for axis in reversed(order):
        strides[axis], step = step, step * layout.shape[axis]
    return layout._replace(strides=tuple(strides))


def _merged(layouts, order):
    """Axes that lie alike in all arrays as one, outermost first: length, and for each array the numbers of a step."""
    groups = []
    for axis in order:
        length, steps = layouts[0].shape[axis], tuple(x.strides[axis] // x.dtype.itemsize for x in layouts)
        if length == 1:
            continue
        if groups and groups[-1][1] == tuple(length * step for step in steps):
            length *= groups.pop()[0]
        groups.append((length, steps))
    return groups or [(1, (1,) * len(layouts))]


def _dense(array, order):
    """A copy without gaps, with its axes in this order in memory."""
    copy = _launch.empty([array.shape[i] for i in order], array.dtype)
    copy[...] = array.transpose(order)
    return copy.transpose([order.index(i) for i in range(array.ndim)])
