"""The documentation is true: its Python blocks run, its commands exist, and CI can read the README's test command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tokenizers

import sscan.compat
import sscan.nn

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in FENCE.finditer(text)]


@pytest.fixture
def released_model(tmp_path: Path) -> Iterator[None]:
    """A small stand-in at the name of a released model, and no stand-ins for other packages afterwards."""
    folder = tmp_path / "state-spaces" / "mamba-130m-hf"
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "rain": 1, "[UNK]": 2}, "[UNK]"))
    sscan.nn.MambaLM(sscan.nn.MambaConfig(16, 1, 8)).save_pretrained(folder, "transformers")
    words.save(str(folder / "tokenizer.json"))
    yield
    sscan.compat.uninstall()


@pytest.mark.usefixtures("released_model")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In order, in one fresh namespace per page, in a folder that holds nothing but the model.
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


def prose(page: Path) -> str:
    """A page without its code, of which nothing is a link."""
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What links to the headings of a page end in."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    # mkdocs looks at them too, but only at its own pages, and only where it is installed.
    assert re.findall(r"\[[^\]]*\]\s?\[[^\]]*\]", prose(page)) == [], "links are written [text](target)"
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file) if file else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def test_links_are_found() -> None:
    assert sum(len(links(page)) for page in PAGES) > 50


def test_the_check_of_the_documentation_can_fail() -> None:
    # mkdocs counts the warnings that it prints; told to be quiet it finds none.
    commands = re.findall(r"-m mkdocs (.*)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert len(commands) == 1
    assert {"build", "--strict"} <= set(commands[0].split())
    assert not {"--quiet", "-q"} & set(commands[0].split())


def test_every_page_is_in_the_navigation() -> None:
    navigation = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert navigation == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_api_page_lists_every_op() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    modules = {getattr(sscan, name).__module__ for name in sscan.__all__ if callable(getattr(sscan, name))}
    assert [module for module in sorted(modules) if f"\n::: {module}\n" not in page] == []
