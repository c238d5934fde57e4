"""What a Mamba block needs on a GPU beside its convolution, its scan and its products."""

import math

from sscan.cuda import _launch
from sscan.cuda._launch import Kernel

THREADS, EACH = 256, 8  # of a block; numbers of a thread
MOST = 6  # pairs of one launch


def copy(*pairs):
    """Of up to ``MOST`` pairs (source, target): fill target from source, of its shape, in one launch.

    All sources have one dtype, all targets one. Behind the first axis both are contiguous.
    """
    table, blocks = [], 0
    for source, target in pairs:
        rows, columns = source.shape[0], math.prod(source.shape[1:])
        steps = [x.strides[0] // x.itemsize for x in (source, target)]
        if rows == 1 or steps == [columns, columns]:  # one row: no number is left to few threads
            rows, columns = 1, rows * columns
        chunks = -(-columns // (THREADS * EACH))
        table += [source, target, columns, *steps, chunks, blocks]
        blocks += rows * chunks
    table += [0, 0, 0, 0, 0, 1, blocks] * (MOST - len(pairs))  # no block comes so far
    (source, target), *_ = pairs
    _launch.launch(Kernel("block", "copies", (source.dtype.name, target.dtype.name)), blocks, *table)


def diagonal(A_log, A):
    """Fill A = -exp(A_log); both contiguous and of one dtype."""
    _launch.launch(Kernel("block", "diagonal", (A.dtype.name,)), _blocks(A), A_log, A, math.prod(A.shape))


def diagonal_backward(dA, A, dA_log):
    """Fill the gradient of A_log from that of A; all contiguous and of one dtype."""
    kernel = Kernel("block", "diagonal_backward", (A.dtype.name,))
    _launch.launch(kernel, _blocks(A), dA, A, dA_log, math.prod(A.shape))


def _blocks(A):
    return -(-math.prod(A.shape) // (THREADS * EACH))
