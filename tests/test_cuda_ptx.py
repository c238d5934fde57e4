"""Every CUDA kernel that stands for its kind is compiled for three generations of GPUs, and stays in registers."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import registers

from sscan.cuda import _inspect, _launch, selective_scan
from sscan.cuda._launch import Kernel
from sscan.cuda._segments import Segments
from sscan.cuda.kernels import selective_scan_backward
from sscan.cuda.kernels.selective_scan import Variant

if TYPE_CHECKING:
    from concurrent.futures import Future

KERNELS = registers.kernels()
ROOT = Path(__file__).parent.parent


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


# NumPy 2.5 has no row_stack, and a NumPy that has it can do without.
WITHOUT_ROW_STACK = """
import numpy
import scipy.fft  # looks numpy through
if hasattr(numpy, "row_stack"):
    del numpy.row_stack
from sscan.cuda import _launch
_launch.compile_ptx(_launch.Kernel("_sums", "over_parts", ("float32", "float32")))
assert not hasattr(numpy, "row_stack")
"""


def test_kernels_compile_with_a_numpy_that_numba_cuda_does_not_know() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_ROW_STACK], check=True, cwd=ROOT)


def test_lines_for_older_gpus_are_for_them_alone() -> None:
    head = ".version 8.0\n.target sm_80\n.address_size 64\n.entry f() .maxntid 32, 1, 1 .minnctapersm 1\n"
    line = f"bar.sync 1, 32; {_launch.BEFORE_SM_90}\n"
    with_line, without = head + "{\n" + line + "ret;\n}", head + "{\nret;\n}"
    assert _launch.assemble(with_line, (9, 0))[0] == _launch.assemble(without, (9, 0))[0]
    assert _launch.assemble(with_line, (8, 0))[0] != _launch.assemble(without, (8, 0))[0]


class _Linker:
    """In the place of cuda.core's: says what it is told to, and keeps what it was asked for."""

    def __init__(self, log: str, asked: list[tuple[str, Any]]) -> None:
        self.log, self.asked = log, asked

    def __call__(self, code: Any, options: Any) -> _Linker:
        self.asked.append((bytes(code.code).decode(), options))
        return self

    def link(self, kind: str) -> Any:
        return SimpleNamespace(code=kind.encode())

    def get_info_log(self) -> str:
        return self.log


@pytest.mark.parametrize(("said", "tried"), [("", [3]), ("0 bytes", [3]), ("10 bytes", [3, 2, 1])])
def test_blocks_are_given_up_for_spills_that_are_reported_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, said: str, tried: list[int]
) -> None:
    asked: list[tuple[str, Any]] = []
    log = f"ptxas         .     24 bytes stack frame, {said} spill stores, 16 bytes spill loads" if said else ""
    monkeypatch.setattr("cuda.core.Linker", _Linker(log, asked))
    _launch.assemble(".version 8.0\n.entry f() .maxntid 32, 1, 1 .minnctapersm 3\n{ret;}", (9, 0))
    assert [int(re.findall(r"minnctapersm (\d+)", ptx)[0]) for ptx, _ in asked] == tried
    assert all(options.no_cache for _, options in asked)  # else the second process on a machine gets no log


def test_the_assemblers_log_is_understood() -> None:
    log = """ptxas info    : Function properties for kernel
ptxas         .     24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 44272 bytes smem, 384 bytes cmem[0]"""
    assert _inspect.usage_of(log) == (168, 44272, 24, 20, 16)
    assert _inspect.usage_of(log.replace(", 44272 bytes smem", "")).shared == 0
    with pytest.raises(ValueError, match="is not once"):
        _inspect.usage_of("")


def test_backward_shapes_are_those_that_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """``shipped`` repeats what ``backward_shape`` decides: every variant, few blocks, time in parts, many blocks.

    Blocks of fewer warps, for groups of few channels, stand for themselves in the usual variant alone.
    """
    monkeypatch.setattr(_launch, "processors", lambda: 132)
    kernels = [kernel.key for kernel in selective_scan_backward.shipped() if kernel.factory == "backward"]
    compiled, decided = set(), set()
    for key in kernels:
        v = Variant(*key[3:])
        A: Any = SimpleNamespace(dtype=np.dtype(v.number))
        compiled.add((key[:3], v.number, v.zoh, v.many))
        usual = v.number == "float32" and not v.zoh and not v.many
        for blocks, length in ((1, 3), (1, 10000), (10**6, 100)):
            segments = Segments(1, 1, length, None, None)
            for warps in (1, 2, 4) if usual else (4,):
                shape = selective_scan.backward_shape(A, v.zoh, v.many, segments, warps, lambda channels, n=blocks: n)
                decided.add((shape, v.number, v.zoh, v.many))
    assert compiled == decided
