"""Every CUDA kernel that stands for its kind is compiled for three generations of GPUs, and stays in registers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import pytest
import registers

from sscan.cuda import _inspect, _launch
from sscan.cuda._launch import Kernel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

KERNELS = registers.kernels()


class Known(NamedTuple):
    """Kernels that do not get all they want on some architectures, named as in "sm_80 sm_90"."""

    spills: str  # where something of a thread is in local memory
    fewer: str  # where ``_launch.assemble`` gave up blocks of a multiprocessor for more registers in a thread
    kernels: tuple[Kernel, ...]


TOGETHER = ("rows", True, "rows", True)  # orders, and whether elements are read by fours
BACKWARD = partial(Kernel, "selective_scan_backward", "backward")
# Exact: a kernel that is not here keeps everything in registers and gets its blocks, and one that no longer spills has
# to be taken out.
KNOWN_SPILLS = (
    # What a state needs for zoh and its exponentials in float64, with all options, is more than the 255 registers that
    # a thread can have. To do: one state a lane.
    Known("sm_80 sm_90 sm_100", "", (
        BACKWARD((1, 2, 4, *4 * ("float64",), True, True, *TOGETHER, 2, True, True)),
    )),
    # The exponential of A in float64, of all states at once; steps in float64 are rare.
    Known("sm_80 sm_90 sm_100", "", (
        Kernel("selective_state_update", "update", (
            "float64", "float64", "float64", 32, 2, 2, 4, 1, True, "float64", "float64", True,
        )),
    )),
    # Tuned on sm_90, which needs 80 registers.
    Known("", "sm_80", (Kernel("causal_conv1d", "backward", ("bfloat16", 4, 8, True, True, "")),)),
    # zoh in float32 has room if a multiprocessor has two blocks, not three.
    Known("", "sm_80 sm_90 sm_100", (
        BACKWARD((1, 4, 3, *4 * ("float32",), True, True, *TOGETHER, 4, False, False)),
        BACKWARD((1, 4, 3, "bfloat16", "complex64", "bfloat16", "", True, True, *TOGETHER, 2, False, True)),
    )),
)  # fmt: skip
KNOWN = {kernel: (known.spills, known.fewer) for known in KNOWN_SPILLS for kernel in known.kernels}


@pytest.fixture(scope="module")
def compiled_kernels() -> Iterator[dict[Kernel, Future[registers.Compiled]]]:
    """All kernels, being compiled on all cores."""
    pool = registers.workers()
    yield registers.start(pool)
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{kernel.name} {kernel.key}")
def test_stays_in_registers(kernel: Kernel, compiled_kernels: dict[Kernel, Future[registers.Compiled]]) -> None:
    """No local memory and no more registers than make its blocks fit, but for what is known."""
    threads, usages = compiled_kernels[kernel].result()
    _, shape = _launch.build(kernel)
    assert threads == shape.threads
    of = {
        _inspect.architecture(capability): usage
        for capability, usage in zip(registers.CAPABILITIES, usages, strict=True)
    }
    fits = {name: usage.registers * threads * shape.blocks_per_processor <= 65536 for name, usage in of.items()}
    spills, fewer = [name for name in of if of[name].local], [name for name in of if not fits[name]]
    assert (" ".join(spills), " ".join(fewer)) == KNOWN.get(kernel, ("", "")), of
    for name, usage in of.items():
        assert usage.registers * threads <= 65536, name
        assert usage.shared <= 48 * 1024, name  # all that a kernel has without asking for more


def test_known_spills_are_of_kernels_that_are_compiled() -> None:
    assert not KNOWN.keys() - set(KERNELS)


def test_every_kernel_is_in_the_documentation() -> None:
    """`python bench/inspect/registers.py` writes the page."""
    page = registers.PAGE.read_text(encoding="utf-8")
    assert not [kernel for kernel in KERNELS if registers.label(kernel) not in page]
