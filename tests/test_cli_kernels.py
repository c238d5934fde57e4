"""`sscan kernels`: what it lists, what a kernel takes, its PTX and its machine code; no GPU is needed."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

import pytest

from sscan.cli import main
from sscan.cuda import _inspect, _launch

if TYPE_CHECKING:
    from pathlib import Path

SMALL = "order.places"  # compiles in a second


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["kernels", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_lists_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys).splitlines()
    counts = {line.split()[0]: int(line.split()[1]) for line in lines}
    kernels = [f"{kernel.module}.{kernel.factory}" for kernel in _inspect.shipped()]
    assert counts == {name: kernels.count(name) for name in kernels}
    assert {"selective_scan.forward", "selective_scan_backward.backward", "_sums.over_parts"} <= counts.keys()


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_says_what_a_kernel_takes(capability: tuple[int, int], capsys: pytest.CaptureFixture[str]) -> None:
    kernels = [kernel for kernel in _inspect.shipped() if f"{kernel.module}.{kernel.factory}" == SMALL]
    head, _, *lines = output(capsys, SMALL, "--capability", "{}.{}".format(*capability)).splitlines()
    assert f"sm_{capability[0]}{capability[1]}:" in head
    assert len(lines) == len(kernels)
    for n, (kernel, line) in enumerate(zip(kernels, lines, strict=True)):
        ptx, threads = _launch.compile_ptx(kernel)
        registers, shared, stack, *_ = _inspect.usage_of(_launch.assemble(ptx, capability)[1])
        assert line.split()[:5] == [str(number) for number in (n, threads, registers, shared, stack)]
        assert line.endswith("  " + ", ".join(map(str, kernel.key)))


def test_prints_ptx(capsys: pytest.CaptureFixture[str]) -> None:
    ptx = output(capsys, SMALL, "--number", "1", "--ptx")
    assert ".visible .entry order_places(" in ptx
    assert _launch.assemble(ptx, (9, 0))[0].startswith(b"\x7fELF")


def test_prints_what_nvdisasm_makes_of_the_cubin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "nvdisasm"
    program.write_text('#!/bin/sh\ntest "$1" = -c && head -c 4 "$2" && grep -c order_places "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert output(capsys, SMALL, "--number", "0", "--sass").startswith("\x7fELF")


def test_without_nvdisasm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.metadata.distribution", absent)
    with pytest.raises(FileNotFoundError):
        _inspect.disassembler()
    assert main(["kernels", SMALL, "--number", "0", "--sass"]) == 2
    assert "pip install nvidia-cuda-nvdisasm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["order.place"], "there is no kernel 'order.place'"),
        ([SMALL, "--number", "2"], "--number must be from 0 to 1, got 2"),
        ([SMALL, "--number", "-1"], "--number must be from 0 to 1, got -1"),
        ([SMALL, "--ptx"], "order.places has 2 specialisations: say which by --number"),
        (["--sass"], "--number, --ptx and --sass are of a kernel: give its name"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_a_gpu_that_nobody_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", SMALL, "--capability", "99.9"]) == 2
    out, err = capsys.readouterr()
    assert "--capability: the assembler knows no GPU of 99.9" in err
    assert out == ""


@pytest.mark.parametrize("capability", ["7.5", "9", "sm_90"])
def test_capabilities_that_are_none(capability: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["kernels", SMALL, "--capability", capability])
    assert "must be 8.0 or above, as in 9.0" in capsys.readouterr().err


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def absent() -> None:
        raise ModuleNotFoundError("No module named 'numba.cuda'")

    monkeypatch.setattr(_inspect, "shipped", absent)
    assert main(["kernels"]) == 2
    assert 'pip install "sscan[cuda13]"' in capsys.readouterr().err
