"""The documentation is true and whole: its Python blocks run, its links lead somewhere, all that is public is there."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tokenizers

import sscan.compat
import sscan.nn
from sscan.nn import ops
from sscan.nn.autodiff import Primitive

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
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


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.is_relative_to(ROOT / "docs")], ids=lambda page: page.name
)
def test_code_fits_a_narrow_column(page: Path) -> None:
    """88 columns; what notebooks print is as wide as it is."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^ *```(\S*).*\n((?:.*\n)*?) *```$", text, re.MULTILINE)
    printed = "text" if page.parent.name == "notebooks" else "{eval-rst}"  # the latter is prose
    code = [block for kind, block in fences if kind != printed]
    assert fences or "```" not in text
    assert [line for block in code for line in block.splitlines() if len(line) > 88] == []


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
    # Sphinx looks at them too, but only at its own pages.
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


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build a folder of pages as CI does."""
    commands = re.findall(r"-m sphinx (.*) docs ", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert len(commands) == 1
    command = [sys.executable, "-m", "sphinx", *commands[0].split(), str(folder), str(folder / "site")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# What is planted on a page, and what the build must say of it.
PLANTED = {
    "[a page](gone-page.md)": "gone-page.md",
    "[a heading](other.md#gone-heading)": "gone-heading",
    "[a heading of this page](#gone-too)": "gone-too",
    "![a picture](gone.png)": "gone.png",
    "{py:func}`sscan.gone_function`": "sscan.gone_function",
    "```{eval-rst}\n.. autofunction:: sscan.gone_entry\n```": "gone_entry",
    "```{eval-rst}\n.. py:function:: f()\n\n   See :class:`sscan.nn.GoneClass`.\n```": "GoneClass",
    "$\\gone{x}$": "\\gone",
    "```{help} gone-command\n```": "gone-command",
}


def test_a_planted_fault_fails_the_build(tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs" / "conf.py", tmp_path)
    shutil.copytree(ROOT / "docs" / "static", tmp_path / "static")
    index, other = tmp_path / "index.md", tmp_path / "other.md"
    whole = "# A page\n\n[another](other.md#its-heading), $x^2$\n\n```{toctree}\nother\n```\n"
    index.write_text(whole)
    entries = [
        ".. py:class:: sscan.nn.Mamba",
        ".. py:method:: sscan.nn.MambaLM.from_pretrained()",
        ".. autoclass:: sscan.jax.nnx.Mamba",
    ]
    other.write_text("# Another\n\n## Its heading\n\n```{eval-rst}\n" + "\n\n".join(entries) + "\n```\n")
    built = build(tmp_path)
    assert (built.returncode, built.stderr) == (0, "")
    assert "<math" in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    shown = re.sub(r"<[^>]*>", "", (tmp_path / "site" / "other.html").read_text(encoding="utf-8"))
    assert "sscan.jax.nnx.Mamba(d_model, *, n_layer=1, dtype=jnp.float32, rngs, **block)" in shown
    assert "from_pretrained(model, layer=0, dtype=jnp.float32, *, revision=None)" in shown
    index.write_text(whole + "\n" + "\n\n".join(PLANTED))
    (tmp_path / "alone.md").write_text("# A page that no other leads to\n")
    built = build(tmp_path)
    assert built.returncode == 1
    assert [said for said in [*PLANTED.values(), "alone.md"] if said not in built.stderr] == []


def test_every_command_is_on_its_page() -> None:
    page = (ROOT / "docs" / "api" / "command-line.md").read_text(encoding="utf-8")
    commands = {path.stem for path in (ROOT / "sscan" / "cli").glob("[!_]*.py")}
    assert commands == set(re.findall(r"^```\{help\} (\w+)$", page, re.MULTILINE))


def test_the_array_operations_are_all_on_the_page_of_sscan_nn() -> None:
    text = (ROOT / "docs" / "api" / "nn.md").read_text(encoding="utf-8")
    listed = re.findall(r"``(\w+)``", text[text.index("Array operations") : text.index("\nOps\n")])
    of_module = (name for name, x in vars(ops).items() if isinstance(x, Primitive) or inspect.isfunction(x))
    others = {"unbroadcast", "check_indices"}  # for those who write operations
    here = {name for name in of_module if getattr(ops, name).__module__ == ops.__name__ and not name.startswith("_")}
    assert sorted(listed) == sorted(here - others)
