"""How CUDA kernels become PTX and are assembled; `tests/compiled` does so with all that stand for their kind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sscan.cuda import _inspect, _launch, selective_scan
from sscan.cuda._segments import Segments
from sscan.cuda.kernels import selective_scan_backward
from sscan.cuda.kernels.selective_scan import Variant

ROOT = Path(__file__).parent.parent

# NumPy 2.5 has no row_stack, and a NumPy that has it can do without.
WITHOUT_ROW_STACK = """
import numpy
import scipy.fft  # looks numpy through
if hasattr(numpy, "row_stack"):
    del numpy.row_stack
from sscan.cuda import _launch
_launch.compile_ptx(_launch.Kernel("_sums", "over_parts", ("float32", "float32", 1)))
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


PLAIN = _launch.Kernel("ssm", "kernel_forward", ("float32",))  # which does not come early
PROJECTION = ("bfloat16", "float32", 8, 6, True, 1, 1, 1, False, False)
COME, AWAIT = "griddepcontrol.launch_dependents", "griddepcontrol.wait"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_a_kernel_that_waits_by_itself_comes_early_where_gpus_know_that(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    """It has sent for weights before it waits. Nothing is read before; no read is marked as free to be."""
    asked: list[tuple[str, Any]] = []
    monkeypatch.setattr("cuda.core.Linker", _Linker("", asked))
    ptx, _ = _launch.compile_ptx(_launch.Kernel("decode", "projection", PROJECTION))
    early = capability >= (9, 0)
    assert _launch.comes_early(ptx, capability) == early
    _launch.assemble(ptx, capability)
    instructions = re.findall(r"^\s+(?:@\S+ )?([a-z][\w.]*).*;", asked[0][0].split("{", 1)[1], re.MULTILINE)
    assert "prefetch.global.L2" in instructions
    assert bool([x for x in instructions if ".nc" in x]) != early
    assert instructions.count(COME) == instructions.count(AWAIT) == early
    if early:
        assert instructions[0] == COME
        before = instructions[1 : instructions.index(AWAIT)]
        assert "prefetch.global.L2" in before
        assert not [x for x in before if x.startswith(("ld.global", "st."))]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_other_kernels_do_not(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    asked: list[tuple[str, Any]] = []
    monkeypatch.setattr("cuda.core.Linker", _Linker("", asked))
    ptx, _ = _launch.compile_ptx(PLAIN)
    assert not _launch.comes_early(ptx, capability)
    _launch.assemble(ptx, capability)
    assert asked[0][0] == ptx


@pytest.mark.parametrize("ptx", ["", 2 * ".entry f() .minnctapersm 1 {ret;}"])
def test_what_is_no_kernel_is_not_assembled(ptx: str) -> None:
    with pytest.raises(ValueError, match=f"expected PTX of one kernel, got {ptx.count('entry')}"):
        _launch.assemble(f".minnctapersm 1 {AWAIT};{ptx}", (9, 0))


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
