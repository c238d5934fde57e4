"""docs/experiments.md and docs/trained.md show what is in bench/results, all of it and nothing else."""

from __future__ import annotations

import dataclasses
import json

import pytest
import report_experiments
import report_training
from report_experiments import BLOCK, PAGE, PICTURES, RESULTS, page

from sscan.tasks.reproduce import jobs
from sscan.tasks.tables import TABLES

FILES = sorted(RESULTS.glob("*.json"))


def test_the_page_is_what_the_results_make() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run python bench/pages/report_experiments.py"
    shown = {(name, scale) for _, name, scale, _ in BLOCK.findall(text)}
    assert {name for name, _ in shown} == set(TABLES)
    run = {(result["table"], result["scale"]) for result in map(json.loads, map(read, FILES))}
    assert run
    assert run <= shown
    for name, scale in run:
        assert (PICTURES / f"{name}-{scale}.png").exists()
        assert f"](pictures/{name}-{scale}.png)" in text


def read(path: object) -> str:
    return path.read_text(encoding="utf-8")  # type: ignore[attr-defined, no-any-return]


def test_another_number_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(report_experiments, "results", lambda *where: [])
    assert page(text) != text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_result_is_of_what_its_command_runs_today(path: object) -> None:
    result = json.loads(read(path))
    options = result["options"]
    (job,) = jobs(
        TABLES[result["table"]], result["scale"], [result["row"]], [result["generator"]], [options["lr"]],
        [options["seed"]], {"steps": options["steps"]},
    )  # fmt: skip
    assert path.name == f"{job.name}.json"  # type: ignore[attr-defined]
    assert result["options"] == json.loads(json.dumps(dataclasses.asdict(job.options)))


def test_the_page_of_the_trained_model_is_what_its_runs_make() -> None:
    path = PAGE.parent / "trained.md"
    made = report_training.page(RESULTS.parent / "training-2026-11-29", "trained.png")
    assert path.read_text(encoding="utf-8") == made, "run python bench/pages/report_training.py"
    assert path.with_suffix(".png").exists()
