"""Which tests are collected, in which order, and the kernels that are compiled meanwhile."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    import registers

    from sscan.cuda._launch import Kernel

# tests/gpu needs an NVIDIA GPU with CuPy, PyTorch and JAX. Whoever asks for it, by SSCAN_GPU=1 or by its name, gets all
# of it: what cannot run fails, and nothing is skipped.
collect_ignore = [] if os.environ.get("SSCAN_GPU") == "1" else ["gpu"]

COMPILED = "test_cuda_ptx.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of compiled kernels come last."""
    items.sort(key=lambda item: item.path.name == COMPILED)


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels(request: pytest.FixtureRequest) -> Iterator[dict[Kernel, Future[registers.Compiled]]]:
    """All kernels, compiled from the start on by what the other tests leave of the cores; none if none are tested."""
    if not any(item.path.name == COMPILED for item in request.session.items):
        yield {}
        return
    import registers

    pool = registers.workers()
    yield registers.start(pool)
    pool.shutdown(cancel_futures=True)
