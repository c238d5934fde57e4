"""Functions by element, of arrays in planes of rows of neighbouring numbers.

A thread has ``each`` neighbours of a row, a block ``THREADS`` times as many; arithmetic is in float32.
"""

import math
from functools import cache

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._math import polynomial, real_functions
from sscan.cuda._primitives import (
    absolute,
    block_index,
    dtype_of,
    exp2_approx,
    local_array,
    quotient,
    reader,
    reciprocal_approx,
    select,
    thread_index,
    writer,
)
from sscan.cuda._target import device
from sscan.cuda.elementwise import FUNCTIONS_OF_TWO, THREADS

REAL = np.dtype(np.float32)
# exp(x^2 / 2) Phi(-x) as a function of 6 / (3 + x) - 1 for x >= 0, with the distribution function Phi of the standard
# normal distribution: to 1.3e-9
TAIL_OVER_FALL = (
    0.12151394801, 0.20640261295, 0.12322497519, 0.046213389304, 0.006133081041, -0.0029051093588, -0.00098975681893,
    0.00034205004216, 0.00012990044686, -6.1397360654e-05, -1.2148321197e-05, 8.4552156015e-06,
)  # fmt: skip


@cache
def _normal():
    """``normal(x)`` = Phi(x) and x times the density there."""
    tail, three, six = polynomial(REAL, TAIL_OVER_FALL), REAL.type(3), REAL.type(6)
    to_exponent, root = REAL.type(-0.5 / math.log(2)), REAL.type(1 / math.sqrt(2 * math.pi))
    zero, one = REAL.type(0), REAL.type(1)

    @device
    def normal(x):
        fall = exp2_approx(x * x * to_exponent)
        beyond = fall * tail(six * reciprocal_approx(three + absolute(x)) - one)
        return select(x > zero, one - beyond, beyond), x * fall * root

    return normal


@cache
def _functions():
    """By name, a function of one or two numbers."""
    one, sigmoid, normal = REAL.type(1), real_functions(REAL).sigmoid, _normal()

    @device
    def silu_backward(g, a):
        s = sigmoid(a)
        return g * s * (one + a * (one - s))

    @device
    def gelu(a):
        below, _ = normal(a)
        return a * below

    @device
    def gelu_backward(g, a):
        below, change = normal(a)
        return g * (below + change)

    return {
        "copy": device(lambda a: a),
        "add": device(lambda a, b: a + b),
        "multiply": device(lambda a, b: a * b),
        "sigmoid": device(sigmoid),
        "sigmoid_backward": device(lambda g, s: g * s * (one - s)),
        "silu": device(lambda a: a * sigmoid(a)),
        "silu_backward": silu_backward,
        "gelu": gelu,
        "gelu_backward": gelu_backward,
    }


def compute(name, of, to, each):
    """A function of one array or two, stored as ``of``, to one stored as ``to``."""
    function, numbers, together = _functions()[name], local_array(each, REAL), each > 1
    two = name in FUNCTIONS_OF_TWO
    read, write = reader(dtype_of(of), REAL, each, together), writer(dtype_of(to), REAL, each, together)

    def kernel(
        a, b, out, columns, chunks, rows, a_step, b_step, out_step, a_jump, b_jump, out_jump,
    ):  # fmt: skip
        """Of each array, the numbers from one row of ``columns`` to the next, and from one plane of ``rows``.

        A row has ``chunks`` blocks.
        """
        x, y = numbers(), numbers()
        row = quotient(block_index(), chunks)
        plane, chunk = quotient(row, rows), block_index() - row * chunks
        row, at = row - plane * rows, (chunk * THREADS + thread_index()) * each
        read(x, a, plane * a_jump + row * a_step + at, columns - at)
        if two:
            read(y, b, plane * b_jump + row * b_step + at, columns - at)
        for k in range(each):
            x[k] = function(x[k], y[k]) if two else function(x[k])
        write(out, plane * out_jump + row * out_step + at, x, columns - at)

    return kernel, Shape(THREADS, 8)


def shipped():
    """Kernels that stand for all: every function, every dtype."""
    keys = [("copy", "bfloat16", "float32", 4), ("copy", "float32", "float16", 1)]
    keys += [(name, "bfloat16", "bfloat16", 8) for name in ("add", "multiply", "sigmoid", "silu", "gelu")]
    keys += [(name, "float16", "float16", 8) for name in ("silu_backward", "gelu_backward")]
    return [Kernel("elementwise", "compute", key) for key in (*keys, ("sigmoid_backward", "float32", "float32", 4))]
