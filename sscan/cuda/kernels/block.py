"""What a Mamba block needs beside convolution, scan and products: copies in another dtype, A, the gradient of log -A.

A block of threads has ``EACH * THREADS`` neighbouring numbers; neighbouring threads have neighbours.
"""

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._math import number_functions
from sscan.cuda._primitives import block_index, dtype_of, local_array, reader, thread_index, writer
from sscan.cuda.block import EACH, THREADS


def copies(of, to):
    """Rows of up to six pairs (source, target), from one storage to another.

    Of each pair: elements of a row, elements from one row to the next in the source and in the target, blocks for a
    row, and the first block that has it.
    """
    real = np.dtype(np.float64 if "float64" in (of, to) else np.float32)
    read, write = reader(dtype_of(of), real, 1), writer(dtype_of(to), real, 1)
    one_number, numbers = local_array(1, real), local_array(EACH, real)

    def kernel(
        source, target, columns, step, to_step, chunks, first,
        source1, target1, columns1, step1, to_step1, chunks1, first1,
        source2, target2, columns2, step2, to_step2, chunks2, first2,
        source3, target3, columns3, step3, to_step3, chunks3, first3,
        source4, target4, columns4, step4, to_step4, chunks4, first4,
        source5, target5, columns5, step5, to_step5, chunks5, first5,
    ):  # fmt: skip
        block = block_index()
        if block >= first1:
            source, target, columns, step, to_step, chunks, first = (
                source1, target1, columns1, step1, to_step1, chunks1, first1,
            )  # fmt: skip
        if block >= first2:
            source, target, columns, step, to_step, chunks, first = (
                source2, target2, columns2, step2, to_step2, chunks2, first2,
            )  # fmt: skip
        if block >= first3:
            source, target, columns, step, to_step, chunks, first = (
                source3, target3, columns3, step3, to_step3, chunks3, first3,
            )  # fmt: skip
        if block >= first4:
            source, target, columns, step, to_step, chunks, first = (
                source4, target4, columns4, step4, to_step4, chunks4, first4,
            )  # fmt: skip
        if block >= first5:
            source, target, columns, step, to_step, chunks, first = (
                source5, target5, columns5, step5, to_step5, chunks5, first5,
            )  # fmt: skip
        x, values = one_number(), numbers()
        row = (block - first) // chunks
        start = (block - first - row * chunks) * EACH * THREADS + thread_index()
        for k in range(EACH):  # all are asked for before one is needed
            read(x, source, row * step + start + k * THREADS, columns - (start + k * THREADS))
            values[k] = x[0]
        for k in range(EACH):
            x[0] = values[k]
            write(target, row * to_step + start + k * THREADS, x, columns - (start + k * THREADS))

    return kernel, Shape(THREADS, 4)


def diagonal(real):
    """A = -exp(log -A)."""
    real = np.dtype(real)
    f, unit = number_functions(real), real.type(1)
    rate, decay = f.rate, f.decay
    read, write, one_number = reader(real, real, 1), writer(real, real, 1), local_array(1, real)

    def kernel(A_log, A, size):
        x = one_number()
        start = block_index() * EACH * THREADS + thread_index()
        for k in range(EACH):
            i = start + k * THREADS
            read(x, A_log, i, size - i)
            x[0] = -decay(unit, rate(x[0]))
            write(A, i, x, size - i)

    return kernel, Shape(THREADS, 4)


def diagonal_backward(real):
    """The gradient of log -A is A times that of A."""
    real = np.dtype(real)
    read, write, one_number = reader(real, real, 1), writer(real, real, 1), local_array(1, real)

    def kernel(dA, A, dA_log, size):
        x, y = one_number(), one_number()
        start = block_index() * EACH * THREADS + thread_index()
        for k in range(EACH):
            i = start + k * THREADS
            read(x, dA, i, size - i)
            read(y, A, i, size - i)
            x[0] = x[0] * y[0]
            write(dA_log, i, x, size - i)

    return kernel, Shape(THREADS, 4)


def shipped():
    """Kernels that stand for all."""
    keys = (("float32", "bfloat16"), ("float16", "float16"), ("float64", "float64"))
    return [Kernel("block", "copies", key) for key in keys] + [
        Kernel("block", factory, (real,))
        for factory in ("diagonal", "diagonal_backward")
        for real in ("float32", "float64")
    ]
