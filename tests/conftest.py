"""Which tests are collected."""

from __future__ import annotations

import os

# tests/gpu needs an NVIDIA GPU with CuPy, PyTorch and JAX. Whoever asks for it, by SSCAN_GPU=1 or by its name, gets all
# of it: what cannot run fails, and nothing is skipped.
collect_ignore = [] if os.environ.get("SSCAN_GPU") == "1" else ["gpu"]
