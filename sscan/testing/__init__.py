"""A GPU in NumPy: the CUDA kernels on NumPy arrays, on any machine.

::

    from sscan.testing import emulated

    y = emulated.selective_scan(u, delta, A, B, C)  # what a GPU computes, and how

All threads of a block run as one NumPy vector, in lockstep, one block after the other. An AssertionError says when a
kernel reads or writes outside of the arrays that it was given, makes a vector access that is not aligned, uses an
element of shared memory from two threads without a barrier in between, or has control flow that depends on the thread.
Memory that nobody has written is NaN. It needs no GPU and no driver, but the compiler of the kernels::

    pip install "sscan[cuda13]"
"""

import importlib.util

if importlib.util.find_spec("numba_cuda") is None:
    raise ModuleNotFoundError(
        'sscan.testing needs numba-cuda, which is installed by: pip install "sscan[cuda13]"', name="numba_cuda"
    )

from sscan.testing._emulator import emulated, patched, run

__all__ = ["emulated", "patched", "run"]
