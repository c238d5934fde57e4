"""What a newcomer meets first: README, citation, templates and CI parse, and say what pyproject.toml says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart import chart

import sscan

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def parsed(*path: str) -> Any:
    return yaml.safe_load(ROOT.joinpath(*path).read_text(encoding="utf-8"))


def test_readme_is_whole_where_only_the_text_is_shown() -> None:
    # On PyPI there are no files beside it: no relative link, and no picture that has to be fetched.
    targets = re.findall(r"\]\(([^)\s]+)\)", README)
    assert [target for target in targets if not re.match(r"https://|#", target)] == []
    assert re.search(r"!\[|<img", README) is None
    assert "https://arxiv.org/abs/2312.00752" in targets
    named = re.findall(r"`((?:docs|bench)(?:/[\w./-]+)?|[A-Z]+\.(?:md|cff))`", README)
    assert {"docs", "docs/index.md", "bench/results", "SECURITY.md", "CITATION.cff"} <= set(named)
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_readme_picture_is_that_of_the_results() -> None:
    assert f"```text\n{chart()}\n```" in README
    assert max(map(len, chart().splitlines())) <= 88


def test_readme_has_a_snippet_for_every_kind_of_user() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)  # which tests/test_docs.py runs
    users = ["import numpy", "import sscan.torch", "import sscan.jax", "from mamba_ssm import", "from_pretrained("]
    for words in users:
        assert sum(words in block for block in blocks) == 1, words


def test_citation() -> None:
    cited = parsed("CITATION.cff")
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= cited.keys()
    assert cited["version"] == sscan.__version__
    assert f'license = "{cited["license"]}"' in PROJECT
    assert [f'authors = [{{ name = "{author["name"]}" }}]' in PROJECT for author in cited["authors"]] == [True]
    (paper,) = cited["references"]
    assert paper["title"] == "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
    assert [author["family-names"] for author in paper["authors"]] == ["Gu", "Dao"]
    assert paper["url"] == "https://arxiv.org/abs/2312.00752"


def test_workflow_runs_the_check_and_every_python() -> None:
    workflow = parsed(".github", "workflows", "ci.yml")
    assert {"push", "pull_request"} <= workflow[True].keys()  # YAML 1.1 reads `on` as true
    check, test = workflow["jobs"]["check"], workflow["jobs"]["test"]
    assert ".ci/run" in [step.get("run") for step in check["steps"]]
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert test["strategy"]["matrix"]["python"] == pythons
    assert f'requires-python = ">={pythons[0]}"' in PROJECT
    tests = ("python -m pytest -n 2 --dist worksteal", "python -m pytest tests/compiled/test_registers.py")
    assert tests == tuple(step.get("run") for step in test["steps"])[-2:]
    assert f"&& .venv/bin/{tests[0]}\n" in README
    assert f"\n.venv/bin/{tests[1].replace('pytest', 'pytest --quiet')}\n" in (ROOT / ".ci" / "run").read_text()
    arguments = ", ".join(f'"{x}"' for x in tests[0].split()[3:])
    assert f"\nPROCESSES = [{arguments}]" in (ROOT / "noxfile.py").read_text()


def test_there_are_forms() -> None:
    assert len(FORMS) == 3
    assert parsed(".github", "ISSUE_TEMPLATE", "config.yml") == {"blank_issues_enabled": True}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_issue_forms(form: Path) -> None:
    """GitHub shows no form that lacks one of these, and says so nowhere."""
    values = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= values.keys()
    assert [item["type"] for item in values["body"]] == ["textarea"] * len(values["body"])
    assert all(item["attributes"]["label"] for item in values["body"])
    names = [item["id"] for item in values["body"]]
    assert len(set(names)) == len(names) > 1
    assert any(item.get("validations", {}).get("required") is True for item in values["body"])


def test_what_is_not_installed_says_how_it_is() -> None:
    wanted = [
        ("flax", "jax.nnx", "Flax", "flax"),
        ("equinox", "jax.equinox", "Equinox", "equinox"),
        ("torch", "torch", "PyTorch", "torch"),
        ("jax", "jax", "JAX", "jax"),
        ("lm_eval", "lm_eval", "lm-evaluation-harness", "lm-eval"),
    ]
    lines = ["import importlib, sys"]
    for library, module, _, _ in wanted:
        lines += [
            "for name in [name for name in sys.modules if name.startswith('sscan.jax')]: del sys.modules[name]",
            f"sys.modules[{library!r}] = None",
            f"try: importlib.import_module('sscan.{module}')",
            "except ModuleNotFoundError as error: print(error.name, error)",
        ]
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.splitlines() == [
        f'{library} sscan.{module} needs {title}, which is installed by: pip install "sscan[{extra}]"'
        for library, module, title, extra in wanted
    ]


def test_pages_of_the_front_door() -> None:
    assert "Report a vulnerability" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    template = (ROOT / ".github" / "pull_request_template.md").read_text(encoding="utf-8")
    assert "CHANGELOG.md" in template
    assert ".ci/run" in template
