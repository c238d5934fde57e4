"""Which tests are collected, and how many threads other libraries have beside a second pytest process."""

from __future__ import annotations

import os

# tests/gpu needs an NVIDIA GPU with CuPy, PyTorch and JAX. Whoever asks for it, by SSCAN_GPU=1 or by its name, gets all
# of it: what cannot run fails, and nothing is skipped.
collect_ignore = [] if os.environ.get("SSCAN_GPU") == "1" else ["gpu"]

# BLAS' and PyTorch's threads wait by spinning, and two processes of pytest-xdist would spin away each other's cores.
# sscan's own do not, and keep their number.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# What XLA compiles here is run once, and not timed: on the CPU a third of such a test goes into making that faster.
if os.environ.get("SSCAN_GPU") != "1":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
