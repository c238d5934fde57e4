"""The pictures of the documentation show what lies in bench/results."""

from __future__ import annotations

import pictures
import pytest


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
