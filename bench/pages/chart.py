"""The picture in the README, of characters, which need no address to be shown: ``python bench/pages/chart.py``.

Its numbers are read from ``bench/results``.
"""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
WIDTH = 40  # of the longest bar of a group
EIGHTHS = " ▏▎▍▌▋▊▉"

Bars = dict[str, float]


def cells(file: str, *first: str) -> list[str]:
    """The cells of the first row of a results file that begins with these, without them."""
    for line in (RESULTS / file).read_text(encoding="utf-8").splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and row[: len(first)] == list(first):
            return row[len(first) :]
    raise ValueError(f"{file} has no row {first}")


def number(cell: str) -> float:
    """The number that a cell begins with, as in "6.51 (6.6)"."""
    return float(cell.split()[0].replace(",", ""))


def groups() -> dict[str, Bars]:
    """What the picture shows: titles, and under each the names of bars and their numbers."""
    forward, _, backward, theirs = cells("cuda-2026-11-22.md", "(8, 5120, 2048)", "bfloat16")
    their_forward, their_backward = map(float, theirs.split("/"))
    prefill = {mixers: number(cells("transformers-2026-11-22.md", mixers)[1]) for mixers in
               ("transformers", "sscan.compat", "sscan.torch.Mamba")}  # fmt: skip
    return {
        "the scan forward and backward on an H200, bfloat16: picoseconds a point, less is better": {
            "mamba_ssm": their_forward + their_backward,
            "sscan": number(forward) + number(backward),
        },
        "transformers' Mamba of 130M reads a prompt on two CPU cores: tokens/s, more is better": {
            "as it comes": prefill["transformers"],
            "sscan.compat": prefill["sscan.compat"],
            "sscan.torch": prefill["sscan.torch.Mamba"],
        },
    }


def drawn(title: str, bars: Bars) -> str:
    """A group as lines of text."""
    lines = [title]
    for name, value in bars.items():
        whole, part = divmod(round(8 * WIDTH * value / max(bars.values())), 8)
        bar = "█" * whole + EIGHTHS[part].strip()
        lines.append(f"  {name:<13}{bar:<{WIDTH}} {value:,.0f}")
    return "\n".join(lines)


def chart() -> str:
    """The whole picture."""
    return "\n\n".join(drawn(title, bars) for title, bars in groups().items())


if __name__ == "__main__":
    print(chart())
