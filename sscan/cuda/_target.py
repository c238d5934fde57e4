"""What the kernels need of numba.cuda. The one file that imports it, so that its successor is a change of one file."""

import contextlib
import re
import warnings

import numpy as np

from sscan.cuda._unroll import written_out


@contextlib.contextmanager
def _numpy_as_numba_cuda_knows_it():
    """NumPy 2.5 has no row_stack any more, which numba-cuda 0.30 names, and warns of its times without a unit."""
    lent = not hasattr(np, "row_stack")
    if lent:
        np.row_stack = np.vstack  # noqa: NPY201
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if lent:
            del np.row_stack  # noqa: NPY201


with _numpy_as_numba_cuda_knows_it():
    from numba import cuda
    from numba.cuda import cgutils, types
    from numba.cuda.extending import intrinsic
    from numba.cuda.np import arrayobj  # noqa: F401  # names row_stack; the first kernel would import it

__all__ = ["cgutils", "compile_ptx", "device", "intrinsic", "types"]

# PTX for the oldest architecture that has bfloat16; it is assembled for whatever GPU there is.
ARCHITECTURE = (8, 0)


def device(function):
    """A device function: inlined, since Numba asks the driver about anything that it would have to call."""
    return cuda.jit(device=True, inline="always")(written_out(function))


def compile_ptx(function, name, threads, blocks_per_processor):
    """PTX of a kernel whose arguments are all int64, with the entry point ``name``.

    IEEE arithmetic, but products and sums are contracted; registers are limited so that as many blocks of ``threads``
    threads fit on a multiprocessor.
    """
    function = written_out(function)
    signature = types.void(*(types.int64,) * function.__code__.co_argcount)
    ptx, _ = cuda.compile(
        function, signature, device=False, fastmath=False, cc=ARCHITECTURE, output="ptx", abi="numba",
        launch_bounds=(threads, blocks_per_processor),
    )  # fmt: skip
    text = ptx if isinstance(ptx, str) else ptx.decode()
    return text.replace(re.search(r"\.entry\s+([\w$]+)", text)[1], name)
