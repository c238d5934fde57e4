"""Write the tables and pictures of docs/experiments.md anew, from the results in bench/results/experiments.

python bench/pages/report_experiments.py

A table stands between ``<!-- table1 small -->`` and ``<!-- end -->``; its picture is docs/pictures/table1-small.png.
"""

from __future__ import annotations

import re
from pathlib import Path

from sscan.tasks.report import draw, markdown
from sscan.tasks.reproduce import results
from sscan.tasks.tables import TABLES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "experiments"
PAGE = ROOT / "docs" / "experiments.md"
PICTURES = ROOT / "docs" / "pictures"
BLOCK = re.compile(r"(<!-- (table\d+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def page(text: str) -> str:
    """The page with the tables that the results make."""

    def block(match: re.Match[str]) -> str:
        begin, name, scale, end = match.groups()
        return f"{begin}\n{markdown(TABLES[name], results(RESULTS, TABLES[name], scale))}\n{end}"

    return BLOCK.sub(block, text)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page(text), encoding="utf-8")
    for _, name, scale, _ in BLOCK.findall(text):
        found = results(RESULTS, TABLES[name], scale)
        if found:
            draw(TABLES[name], found, PICTURES / f"{name}-{scale}.png")


if __name__ == "__main__":
    main()
