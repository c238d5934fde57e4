"""The documentation is true: its Python blocks run, its commands exist, and CI can read the README's test command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sscan

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in FENCE.finditer(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In order, in one fresh namespace per page, in an empty folder.
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, block in blocks(page):
        exec(compile("\n" * (line - 1) + block, str(page), "exec"), namespace)


@pytest.mark.parametrize("heading", ["Run it", "Test it"])
def test_readme_has_one_line_for_each_job(heading: str) -> None:
    # .ci/run reads the line under "Test it" with the same rule.
    section = re.search(rf"^## {heading}$(.*?)^## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert section is not None
    commands = re.findall(r"^```\w*\n(.*?)^```$", section.group(1), re.M | re.S)
    assert [command.count("\n") for command in commands] == [1]
    assert commands[0].startswith("python3 -m venv .venv && ")


def test_every_page_is_in_the_navigation() -> None:
    navigation = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert navigation == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_api_page_lists_every_op() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    modules = {getattr(sscan, name).__module__ for name in sscan.__all__ if callable(getattr(sscan, name))}
    assert [module for module in sorted(modules) if f"\n::: {module}\n" not in page] == []
