"""Every CUDA kernel that stands for its kind is compiled for three generations of GPUs, and stays in registers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import registers

from sscan.cuda import _launch, selective_scan
from sscan.cuda.kernels import selective_scan_backward

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from sscan.cuda._launch import Kernel

KERNELS = registers.shipped()


@pytest.fixture(scope="module")
def results() -> Iterator[dict[Kernel, Future[registers.Compiled]]]:
    """All of them, under way on all cores."""
    pool = registers.workers()
    yield registers.start(pool)
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{kernel.name} {kernel.key}")
def test_stays_in_registers(kernel: Kernel, results: dict[Kernel, Future[registers.Compiled]]) -> None:
    """No local memory, which is a stack frame, and so no spills; no more registers than make its blocks fit."""
    threads, usages = results[kernel].result()
    _, shape = _launch.build(kernel)
    assert threads == shape.threads
    for capability, usage in zip(registers.CAPABILITIES, usages, strict=True):
        assert (usage.stack, usage.spill_stores, usage.spill_loads) == (0, 0, 0), f"{capability}: {usage}"
        assert usage.registers * threads * shape.blocks_per_processor <= 65536, f"{capability}: {usage}"
        assert usage.shared <= 48 * 1024, f"{capability}: {usage}"  # all that a kernel has without asking for more


def test_every_kernel_is_in_the_documentation() -> None:
    """`python bench/registers.py` writes the page."""
    page = registers.PAGE.read_text(encoding="utf-8")
    assert not [kernel for kernel in KERNELS if registers.label(kernel) not in page]


def test_the_assemblers_log_is_understood() -> None:
    log = """ptxas info    : Function properties for kernel
ptxas         .     24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 44272 bytes smem, 384 bytes cmem[0]"""
    assert registers.usage_of(log) == (168, 44272, 24, 20, 16)
    assert registers.usage_of(log.replace(", 44272 bytes smem", "")).shared == 0
    with pytest.raises(ValueError, match="is not once"):
        registers.usage_of("")


def test_backward_shapes_are_those_that_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """``shipped`` repeats what ``backward_shape`` decides: for every variant, with few blocks and with many."""
    monkeypatch.setattr(_launch, "processors", lambda: 132)
    kernels = [kernel.key for kernel in selective_scan_backward.shipped() if kernel.factory == "backward"]
    decided: set[Any] = set()
    for key in kernels:
        A, many = SimpleNamespace(dtype=np.dtype(key[4])), key[11]
        for blocks in (1, 10**6):
            decided.add((selective_scan.backward_shape(A, lambda channels, n=blocks: n, many), key[4], many))
    assert {(key[:3], key[4], key[11]) for key in kernels} == decided
