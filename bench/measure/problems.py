"""Random inputs of realistic size for the benchmarks, and what they are checked against."""

from typing import Any

import numpy as np

# (batch, dim, length): one long prompt at the 130M model's width, a training batch of it, a very long sequence of few
# channels
SHAPES = [(1, 1536, 2048), (8, 1536, 512), (1, 64, 131072)]
STATE = 16


def scan_problem(shape: tuple[int, int, int], dtype: Any = np.float32, seed: int = 0) -> dict[str, Any]:
    """Arguments of ``selective_scan`` as a Mamba block gives them: D, z, bias and softplus, A = -1 .. -16."""
    rng = np.random.default_rng(seed)
    batch, dim, length = shape

    def normal(*size: int) -> Any:
        return rng.standard_normal(size, np.float32)

    step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), dim))
    return {
        "u": normal(*shape).astype(dtype),
        "delta": (0.5 * normal(*shape)).astype(dtype),
        "A": -np.tile(np.arange(1, STATE + 1, dtype=np.float32), (dim, 1)),
        "B": normal(batch, STATE, length).astype(dtype),
        "C": normal(batch, STATE, length).astype(dtype),
        "D": normal(dim),
        "z": normal(*shape).astype(dtype),
        "delta_bias": np.log(np.expm1(step)).astype(np.float32),
        "delta_softplus": True,
    }


def cotangent(problem: dict[str, Any]) -> Any:
    """A gradient for y."""
    return np.random.default_rng(1).standard_normal(problem["u"].shape, np.float32).astype(problem["u"].dtype)
