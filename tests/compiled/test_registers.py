"""Every CUDA kernel that stands for its kind, compiled for three generations of GPUs, stays in registers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import registers

from sscan.cuda import _inspect, _launch
from sscan.cuda._launch import Kernel

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
    # Tuned on sm_90, which needs 48 registers.
    Known("", "sm_80", (Kernel("causal_conv1d", "forward", ("bfloat16", 4, 8, True, True, "")),)),
    # zoh in float32 has room if a multiprocessor has two blocks, not three.
    Known("", "sm_80 sm_90 sm_100", (
        BACKWARD((1, 4, 3, *4 * ("float32",), True, True, *TOGETHER, 4, False, False)),
        BACKWARD((1, 4, 3, "bfloat16", "complex64", "bfloat16", "", True, True, *TOGETHER, 2, False, True)),
    )),
)  # fmt: skip
KNOWN = {kernel: (known.spills, known.fewer) for known in KNOWN_SPILLS for kernel in known.kernels}


Compile = Callable[[Kernel], registers.Compiled]


@pytest.fixture(scope="module")
def compiled() -> Iterator[Compile]:
    """What a kernel takes: as docs/registers.md says, if that is of these sources and compilers; else all are compiled.

    SSCAN_COMPILE=1 compiles them in any case, on all cores.
    """
    known = None if os.environ.get("SSCAN_COMPILE") else registers.recorded()
    if known is not None:
        yield known.__getitem__
        return
    pool = registers.workers()
    started = registers.start(pool)
    yield lambda kernel: started[kernel].result()
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{kernel.name} {kernel.key}")
def test_stays_in_registers(kernel: Kernel, compiled: Compile) -> None:
    """No local memory and no more registers than make its blocks fit, but for what is known."""
    threads, usages, _ = compiled(kernel)
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


@pytest.mark.parametrize("local", [(0, 0, 0), (0, 16, 0), (8, 16, 24)])
def test_a_row_of_the_page_is_read_as_it_is_written(local: tuple[int, int, int]) -> None:
    usages = tuple(_inspect.Usage(40 + bytes_, 512, bytes_, 0, 0) for bytes_ in local)
    made = registers.Compiled(128, usages, sum(local) > 16)
    row = registers.row(KERNELS[0], made)
    assert registers.of_row(registers.label(KERNELS[0]), f"text\n{row}\n| another |\n") == made


@pytest.mark.parametrize(("code", "right"), [
    ("S2R R1 ;\nACQBULK ;\nLDG.E R1, desc[UR4][R2.64] ;", True), ("CCTL.E.PF2 [R2] ;\nACQBULK ;\nEXIT ;", True),
    ("LDG.E.CONSTANT R1, desc[UR4][R2.64] ;\nACQBULK ;", False), ("@P0 STG.E [R2.64], R1 ;\nACQBULK ;", False),
    ("RED.E.ADD [R2], R1 ;\nACQBULK ;", False), ("LDC R1, c[0x0][0x28] ;\nEXIT ;", False),
])  # fmt: skip
def test_what_waiting_first_is(code: str, right: bool) -> None:
    assert registers.waits_first(code) == right


@pytest.mark.parametrize("changed", ["state", "Python", "nothing"])
def test_a_page_of_other_sources_or_compilers_says_nothing(
    changed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = {kernel: registers.Compiled(128, 3 * (_inspect.Usage(40, 0, 0, 0, 0),), True) for kernel in KERNELS}
    monkeypatch.setattr(registers, "PAGE", tmp_path / "page")
    registers.PAGE.write_text(registers.page(results), encoding="utf-8")
    if changed == "state":
        monkeypatch.setattr(registers, "cache_folder", lambda: Path("cuda-0123456789abcdef"))
    if changed == "Python":
        monkeypatch.setattr(registers.sys, "version_info", SimpleNamespace(major=3, minor=99))
    assert registers.recorded() == (results if changed == "nothing" else None)


def test_every_kernel_is_in_the_documentation() -> None:
    """`python bench/inspect/registers.py` writes the page."""
    page = registers.PAGE.read_text(encoding="utf-8")
    assert not [kernel for kernel in KERNELS if registers.label(kernel) not in page]
