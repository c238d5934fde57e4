"""pytest-benchmark of the selective scan: ``pytest bench --benchmark-only``. Checks the result before it times."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from compare import check
from peers import numpy_reference, ours
from problems import SHAPES, scan_problem

SMALL = (1, 64, 256)


@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("discretization", ["mamba", "zoh"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_selective_scan(benchmark: Any, shape: Any, discretization: Any, dtype: Any, direction: str) -> None:
    column = ("forward", "forward + backward").index(direction)
    small = scan_problem(SMALL, dtype)
    expected = numpy_reference({**small, "discretization": discretization})[column]
    tolerance = 0.02 if dtype is ml_dtypes.bfloat16 else 1e-5
    check(str(shape), ours(small, discretization=discretization)[column](), expected(), tolerance)
    benchmark(ours(scan_problem(shape, dtype), discretization=discretization)[column])
