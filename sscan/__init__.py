"""Selective state space models (Mamba) on the arrays of NumPy, PyTorch, JAX and CuPy."""

__version__ = "0.1.0"
