"""The pictures of the documentation show what lies in bench/results, and what is worked out for its pages is right."""

from __future__ import annotations

import json
import math
from typing import Any

import figure8
import memory_125m
import numpy as np
import pictures
import pytest
import torch

from sscan import reference


def test_speed_is_that_of_the_results() -> None:
    found = pictures.speeds()
    assert found["(8, 5120, 2048)", "float32"] == (6.5, 34.0, 23.55, 78.5)
    assert found["(1, 1536, 2048)", "bfloat16"] == (18.61, 18.7, 39.89, 93.0)  # measured again
    forward, backward = pictures.draw_speed("float32").axes
    for axes, numbers in ((forward, (0, 1)), (backward, (2, 3))):
        for bars, number in zip(axes.containers, numbers, strict=True):
            widths = [bar.get_width() for bar in bars]
            assert widths == [x[number] for (_, dtype), x in found.items() if dtype == "float32"]


def test_memory_is_that_of_the_results() -> None:
    training, reading = pictures.draw_memory().axes
    states, ours = (line.get_xydata().tolist() for line in training.lines)
    for shape, _, measured, all_states in pictures.rows(pictures.MEMORY, 4):
        length = int(shape.strip("()").split(", ")[2])
        assert [length, float(measured)] in ours
        assert [length, float(all_states)] in states
        assert float(all_states) == pytest.approx(256 * length * 16 * 4 / 1e6, rel=1e-2)
    attention, mamba = (line.get_ydata() for line in reading.lines)
    assert attention[0] == pytest.approx(24 * 2 * 768 * 1024 * 4 / 1e6)
    assert mamba == pytest.approx([24 * 1536 * (16 + 3) * 4 / 1e6] * len(attention))


def test_a_page_without_results_is_an_error(tmp_path: pictures.Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("| (1, 2, 3) | 4 |\n")
    assert pictures.rows(page, 2) == [["(1, 2, 3)", "4"]]
    with pytest.raises(AssertionError, match="has no table of 3 columns"):
        pictures.rows(page, 3)


def record_of_figure8() -> dict[str, Any]:
    """A scan that grows as the length, attention as its square, equal at 1500, and a backend that refuses."""
    rows: list[dict[str, Any]] = []
    for kind, ours, theirs in (("kernel", "scan, N 16", "attention"), ("block", "two Mamba", "attention + MLP")):
        for way in figure8.WAYS:
            for length in (512, 1024, 2048, 4096):
                of = {"kind": kind, "way": way, "length": length}
                rows.append({**of, "name": ours, "ms": length / 1500, "called_ms": length / 1500 + 1})
                ms = (length / 1500) ** 2
                ended = {"ms": ms, "called_ms": ms} if length < 4096 else {"not_run": "no time left"}
                rows.append({**of, "name": f"{theirs}, flash", **ended})
            rows.append({"kind": kind, "way": way, "length": 512, "name": f"{theirs}, cuDNN", "failed": "refused"})
    return {
        "date": "2026-11-30", "device": "a GPU", "versions": {"torch": "2"}, "command": "python figure8.py",
        "width": 2048, "heads": 16, "inner": 8832, "mamba": 1, "attention": 1, "longest_call": 2.0,
        "checks": {"scan, N 16": 0.001, "attention, cuDNN": "refused"}, "measurements": rows,
    }  # fmt: skip


def test_crossover() -> None:
    lengths = (512, 1024, 2048, 4096)
    linear, square = {x: x / 1500 for x in lengths}, {x: (x / 1500) ** 2 for x in lengths}
    assert figure8.crossover(linear, square) == pytest.approx(1500)  # both are straight lines
    assert figure8.crossover(square, linear) == math.inf
    assert figure8.crossover(linear, dict.fromkeys(lengths, 9.0)) == 0
    assert figure8.crossover(linear, {x: square[x] for x in (512, 1024)}) == math.inf  # of what both have
    twice = {512: 2.0, 1024: 0.5, 2048: 2.0, 4096: 0.5}
    assert figure8.crossover(twice, dict.fromkeys(lengths, 1.0)) == pytest.approx(2048 * math.sqrt(2))
    with pytest.raises(ValueError, match="no length in common"):
        figure8.crossover({512: 1.0}, {1024: 1.0})
    assert figure8.following([1.0, 4.0]) == 16
    assert figure8.following([1.0, 1.1]) == pytest.approx(2.2)


def test_page_of_figure8() -> None:
    lines = figure8.page(record_of_figure8()).splitlines()
    assert "| length | scan, N 16 | attention, flash | attention, cuDNN |" in lines
    assert lines.count("| 512 | 0.341 (1.34) | 0.117 | refused |") == 4  # two kinds, two ways
    assert lines.count("| 4,096 | 2.73 (3.73) | no time left |  |") == 4
    # called from Python ours take a millisecond more: beyond what both have
    assert "| scan, N 16 | attention, flash | 1,500 | 1,500 | beyond 2,048 | beyond 2,048 |" in lines
    assert "| two Mamba | attention + MLP, cuDNN |" + " not measured |" * 4 in lines
    assert "| attention, flash | not measured | 1.4 at 2,048 | not measured | 1.4 at 2,048 |" in lines


def test_picture_of_figure8(tmp_path: pictures.Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no figure8-DATE"):
        pictures.newest("figure8", tmp_path)
    for date, found in (("2026-11-30", record_of_figure8()), ("2026-11-29", {})):
        (tmp_path / f"figure8-{date}.json").write_text(json.dumps(found))
    record = pictures.newest("figure8", tmp_path)
    for axes in pictures.draw_figure8(record).axes:
        ours, theirs = axes.lines  # and none of the backend that refused
        assert ours.get_ydata() == pytest.approx([512 / 1500, 1024 / 1500, 2048 / 1500, 4096 / 1500])
        assert theirs.get_xdata().tolist() == [512, 1024, 2048]


def test_what_the_scan_is_compared_with_is_right() -> None:
    torch.manual_seed(0)
    (u, delta, A, B, C, D, z, bias), convolved, *_ = (
        [x.double() for x in next(c for c in figure8.made(32, "cpu") if c.name == name).inputs(16)]
        for name in ("scan, N 4", "FFT convolution")
    )
    expected = reference.selective_scan(*(x.numpy() for x in (u, delta, A, B, C, D, z, bias)), True)
    found = figure8.unfused_scan(u, delta, A, B, C, D, z, bias)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12)
    u, k = convolved
    by_hand = [np.convolve(a, b)[:16] for a, b in zip(u[0].numpy(), k.numpy(), strict=True)]
    for convolution in (figure8.fft_convolution, figure8.direct_convolution):
        np.testing.assert_allclose(convolution(u, k)[0].numpy(), by_hand, rtol=1e-10, atol=1e-12)


def test_loss_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_125m, "PIECE", 3)
    hidden, head = torch.randn(2, 4, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    targets, found = torch.randint(7, (2, 4)), []
    for in_pieces in (False, True):
        loss = memory_125m.cross_entropy(hidden, head, targets, memory_125m.summed_loss, in_pieces)
        found.append([loss, *torch.autograd.grad(loss, [hidden, head])])
    torch.testing.assert_close(*found)
    logits = hidden.flatten(0, 1) @ head.T
    torch.testing.assert_close(found[0][0], torch.nn.functional.cross_entropy(logits, targets.flatten()))


def test_page_and_picture_of_memory() -> None:
    names = memory_125m.MAMBA, memory_125m.TRANSFORMER
    rows: list[dict[str, Any]] = [
        {"by": by, "name": name, "way": way, by: size, "before": 2e9, "outside": 0, "seconds": 1.0, "loss": size * 1e8,
         {"batch": "length", "length": "batch"}[by]: 1000, "peak": 2e9 + size * 3e8}
        for by in ("batch", "length") for name in names for way in memory_125m.WAYS for size in (1, 2, 4)
    ]  # fmt: skip
    del rows[-1]["peak"], rows[-1]["loss"]
    rows[-1]["failed"] = "out of memory"  # the Transformer's longest, layers and loss again
    record = {
        "date": "2026-11-30", "device": "a GPU", "versions": {"torch": "2"}, "command": "python memory_125m.py",
        "width": 768, "layers": 24, "length": 1000, "longest_step": 20.0, "plain_loss": 6e5, "measurements": rows,
        "compiled": dict.fromkeys(names, "compiled"), "parameters": dict.fromkeys(names, 1),
    }  # fmt: skip
    lines = memory_125m.page(record).splitlines()
    assert "| 2 |" + " 2.6 (0.20) |" * 6 + " 5.8 | 5.2 |" in lines
    assert "| 4 |" + " 3.2 (0.40) |" * 5 + " out of memory |" in lines
    assert "| Mamba | all kept | 300.0 | 100.0 | 200.0 | 4 | measured to the end |" in lines
    assert "| Transformer | layers and loss again | 300.0 | 100.0 | 200.0 | 2 | out of memory |" in lines
    by_batch, by_length = pictures.draw_memory_125m(record).axes
    assert [len(line.get_xdata()) for line in by_batch.lines] == [3, 3, 3, 3]
    assert [line.get_ydata().tolist() for line in by_length.lines][1] == pytest.approx([2.3, 2.6])
    seconds, loss = memory_125m.expected(rows[:3], 8000)
    assert (seconds, loss) == (4.0, 8e8)
    assert memory_125m.expected(rows[:2], 8000) == (0.0, 0.0)
