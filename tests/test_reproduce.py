"""`sscan reproduce`: which runs there are, that they stop, go on and fail by themselves, and what is said of them."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
import os
import re
import signal
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest

from sscan.cli import main
from sscan.nn import MambaLM
from sscan.tasks import tables
from sscan.tasks.induction import Induction, InductionOptions
from sscan.tasks.report import best_rate, draw, markdown
from sscan.tasks.reproduce import Job, Until, finished, jobs, results, run_all, to_do
from sscan.tasks.tables import TABLES, Row, Table
from sscan.tasks.training import TrainingRun

if TYPE_CHECKING:
    from pathlib import Path

TINY = InductionOptions(
    d_model=8, n_layer=1, length=8, batch=4, symbols=3, dt_rank=2, steps=8, evaluations=4, longest=128
)


def table(*rows: Row, options: Any = TINY) -> Table:
    rows = rows or (Row("mamba", ("Mamba",), {"64": 1.0, "128": 0.5}), Row("wide", ("Wide",), {}, {"d_model": 12}))
    return dataclasses.replace(TABLES["table11"], scales={"small": options}, rows=rows)


def run(todo: list[Job], out: Path, at_once: int = 1, stop: Any = (), stream: Any = None) -> dict[str, str]:
    return run_all(todo, out, np, [], at_once, stop, stream or io.StringIO())


class StopAfter:
    """Asked so many times, it says that somebody wants the run to end."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def __len__(self) -> int:
        self.left -= 1
        return self.left < 0


# Which runs there are


def test_jobs_are_the_rows_at_every_rate_and_seed_and_generator() -> None:
    made = table()
    todo = jobs(made, "small", ["wide", "mamba"], ["front", "anywhere"], [1e-3, 5e-4], [0, 3], {"steps": 5})
    assert len(todo) == 16
    assert len(jobs(made, "small", ["wide", "wide"], [], [], [2, 2], {})) == 1
    assert len({job.name for job in todo}) == 16
    assert [job.row.name for job in todo] == ["wide"] * 8 + ["mamba"] * 8
    assert todo[1].name == "table11-small-wide-front-lr0.001-seed3"
    assert todo[1].options == dataclasses.replace(TINY, d_model=12, front=10, lr=1e-3, seed=3, steps=5)
    assert todo[6].options == dataclasses.replace(TINY, d_model=12, front=None, lr=5e-4, seed=0, steps=5)
    assert [job.options for job in jobs(made, "small", [], [], [], [0], {})] == [
        TINY, dataclasses.replace(TINY, d_model=12)
    ]  # fmt: skip


def test_a_row_may_differ_at_one_scale() -> None:
    row = Row("x", ("X",), {}, {"batch": 2}, {"small": {"batch": 3}})
    made = dataclasses.replace(table(row), scales={"small": TINY, "paper": TINY})
    assert [jobs(made, scale, [], [], [], [0], {})[0].options.batch for scale in ("small", "paper")] == [3, 2]


@pytest.mark.parametrize(
    ("what", "message"),
    [(("big", [], []), "table11: scale must be one of small, got 'big'"),
     (("small", ["mambo"], []), "table11: row must be one of mamba, wide, got 'mambo'"),
     (("small", [], ["back"]), "table11: generator must be one of anywhere, front, got 'back'")],
)  # fmt: skip
def test_jobs_that_are_none(what: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jobs(table(), *what, [], [0], {})


def test_a_table_with_one_generator_takes_none() -> None:
    with pytest.raises(ValueError, match="table7: generator must be left out, as there is only one, got 'noise'"):
        jobs(TABLES["table7"], "small", [], ["noise"], [], [0], {})


# The paper's tables

TINIER = {"d_model": 16, "length": 16, "batch": 2, "steps": 2, "evaluations": 1}
SMALLEST = {"table1": {"tokens": 2, "symbols": 3, "batch": 64}, "table11": {"longest": 64, "symbols": 3, "dt_rank": 2}}


@pytest.mark.parametrize("name", TABLES)
def test_every_row_runs(name: str, tmp_path: Path) -> None:
    """With a loss near that of guessing, as two steps leave it; and no two rows are the same model."""
    made, text = TABLES[name], tmp_path / "text"
    text.write_text("the rain it raineth every day, and the wind and the rain. " * 40)
    todo = jobs(made, "small", [], [], [], [0], TINIER | SMALLEST.get(name, {}))
    assert run_all(todo, tmp_path, np, [text], 1, (), io.StringIO()) == {}
    found = {result["row"]: result for result in results(tmp_path, made, "small")}
    assert found.keys() == {row.name for row in made.rows}
    tokens = {"table1": 5, "table11": 4}.get(name, 256)
    for result in found.values():
        assert result["measures"].keys() <= made.headings.keys()
        assert abs(result["curve"][0]["loss"] - np.log(tokens)) < 0.4
    models = {json.dumps([r["options"]["layers"], r["options"]["positions"]]) for r in found.values()}
    assert len(models) == len(found)


@pytest.mark.parametrize("name", TABLES)
def test_both_scales_of_every_row_are_models(name: str) -> None:
    made = TABLES[name]
    for row in made.rows:
        for generator in made.generators:
            small, large = (made.options(row, scale, generator) for scale in tables.SCALES)
            assert small.d_model <= large.d_model
            assert small.steps < large.steps  # type: ignore[operator]
        assert row.paper.keys() <= made.headings.keys()


def parameters(name: str, row: str, vocabulary: int) -> int:
    """Of the model of a row at the paper's scale."""
    options: Any = TABLES[name].options(TABLES[name].row(row), "paper", next(iter(TABLES[name].generators)))
    return int(options.config(vocabulary, tie_embeddings=False).parameter_count())


def test_sizes_are_those_that_the_paper_prints() -> None:
    """Table 11 in thousands: 137 without 16 embeddings of the trigger, 74 with R = 4; what a rank of delta costs."""
    assert round(parameters("table11", "mha-absolute", 17) / 1000) == 137
    assert round(parameters("table11", "mha-rotary", 17) / 1000) == 137
    ranks = [parameters("table9", f"rank-{rank}", 256) for rank in (0, 1, 2, 4, 8, 16, 32, 64)]
    each = 2 * 640 * 12  # a row of x_proj and a column of dt_proj in 12 blocks of d_inner 640
    assert np.diff(ranks).tolist() == [each, each, 2 * each, 4 * each, 8 * each, 16 * each, 32 * each]
    for n in (1, 2, 4, 8, 16):
        assert parameters("table10", f"constant-{n}", 256) == parameters("table10", f"selective-{n}", 256)
    sizes = [parameters("table6", row.name, 256) for row in TABLES["table6"].rows]
    assert max(sizes) < 1.12 * min(sizes)


# Runs


def test_a_run_leaves_its_result_and_is_not_run_again(tmp_path: Path) -> None:
    todo = jobs(table(), "small", ["mamba"], [], [], [0], {})
    assert run(todo, tmp_path) == {}
    (result,) = results(tmp_path, table(), "small")
    assert (result["finished"], result["steps"], result["parameters"]) == (True, 8, 1408)
    assert result["options"] == json.loads(json.dumps(dataclasses.asdict(TINY)))
    assert [point["step"] for point in result["curve"]] == [2, 4, 6, 8]
    model = MambaLM.from_pretrained(tmp_path / "runs" / todo[0].name)
    task = Induction(TINY)
    assert result["measures"] == {"64": task.accuracy(model, 64), "128": task.accuracy(model, 128)}
    assert result["versions"].keys() >= {"python", "sscan", "numpy", "numba"}
    more = jobs(table(), "small", [], [], [1e-3, 5e-4], [0, 1], {})
    assert to_do(more, tmp_path, []) == [job for job in more if job.name != todo[0].name]
    with pytest.raises(ValueError, match=f"{todo[0].name} has been run with batch = 4, not 5"):
        to_do(jobs(table(), "small", ["mamba"], [], [], [0], {"batch": 5}), tmp_path, [])
    for change, message in (
        ({"table": "table1"}, "is no result of table11"), ({"row": "mambo"}, "row must be one of mamba, wide, got 'm"),
        ({"measures": {"63": 1.0}}, "measures must be of 64, 128, .*got {'63'"), ({"measures": {}}, "measures must be"),
    ):  # fmt: skip
        (tmp_path / "table11-small-x.json").write_text(json.dumps(result | change))
        with pytest.raises(ValueError, match=rf"table11-small-x.json.* {message}"):
            results(tmp_path, table(), "small")


def test_a_row_is_of_one_set_of_options(tmp_path: Path) -> None:
    """Beside learning rate and seed, as means are taken over its runs; other rows may have others."""
    run(jobs(table(), "small", ["mamba"], [], [], [0], {}), tmp_path)
    other = jobs(table(), "small", ["mamba"], [], [5e-4], [1], {"steps": 9})
    with pytest.raises(ValueError, match=r"table11-small-mamba-anywhere-lr0\.001-seed0 .* with steps = 8, not 9"):
        to_do(other, tmp_path, [])
    free = jobs(table(), "small", ["wide"], [], [], [0], {"steps": 9})
    free += jobs(table(), "small", ["mamba"], ["front"], [], [0], {"steps": 9})
    assert to_do(free, tmp_path, []) == free
    close = jobs(table(), "small", ["mamba"], [], [1e-3 * (1 + 1e-9)], [0], {})  # of the same name
    with pytest.raises(ValueError, match=r"lr0\.001-seed0 has been run with lr = 0\.001, not 0\.001000000001"):
        to_do(close, tmp_path, [])


def test_a_folder_is_of_one_text(tmp_path: Path) -> None:
    """For any row, seed and rate of a table; also that of a run of which there is nothing but a checkpoint."""
    made, texts, out = TABLES["table7"], [tmp_path / "rain", tmp_path / "wind"], tmp_path / "out"
    for path in texts:
        path.write_text(f"the {path.name} it raineth every day. " * 40)
    first, second = jobs(made, "small", ["none", "B"], [], [], [0], TINIER)
    assert run_all([first], out, np, texts[:1], 1, (), io.StringIO()) == {}
    assert to_do([first, second], out, texts[:1]) == [second]
    other = rf"table7-small-none-lr0\.01-seed0 in {out} has been run on another text"
    for job in (first, second):
        with pytest.raises(ValueError, match=other):
            to_do([job], out, texts[1:])
    (out / f"{first.name}.json").unlink()
    with pytest.raises(ValueError, match=other):
        to_do([first], out, texts[1:])
    assert to_do([first], out, texts[:1]) == [first]


def test_errors_that_nobody_foresaw_are_told_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(self: Any, model: Any) -> Any:
        raise KeyError("x")

    monkeypatch.setattr(Induction, "measure", measure)
    stream = io.StringIO()
    (failure,) = run(jobs(table(), "small", ["mamba"], [], [], [0], {}), tmp_path, stream=stream).values()
    assert failure == "KeyError: 'x'"
    assert 'raise KeyError("x")' in stream.getvalue()


def test_stopped_runs_go_on_bit_for_bit(tmp_path: Path) -> None:
    todo = jobs(table(), "small", ["mamba"], [], [], [1], {})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    run(todo, whole)
    for expected in (3, 6):
        run(todo, parts, stop=StopAfter(5))
        (result,) = results(parts, table(), "small")
        assert (result["finished"], result["steps"], result["measures"]) == (False, expected, {})
    run(todo, parts)
    first, second = (results(folder, table(), "small")[0] for folder in (whole, parts))
    assert first["curve"] == second["curve"]
    assert first["measures"] == second["measures"]
    assert second["finished"]


def test_unfinished_runs_go_on_with_their_own_options_only(tmp_path: Path) -> None:
    """Also if there is no result yet, as when the process was killed; and the first command still goes on."""
    todo, fewer = (jobs(table(), "small", ["mamba"], [], [], [0], {"steps": steps}) for steps in (8, 2))
    run(todo, tmp_path, stop=StopAfter(5))
    name = todo[0].name
    for path in (None, tmp_path / f"{name}.json"):
        if path:
            path.unlink()
        with pytest.raises(ValueError, match=f"{name} has been run with steps = 8, not 2"):
            to_do(fewer, tmp_path, [])
    assert run(fewer, tmp_path) == {name: f"ValueError: {name} has been run with steps = 8, not 2"}
    assert to_do(todo, tmp_path, []) == todo
    assert run(todo, tmp_path) == {}
    assert finished(tmp_path, table(), "small") == {name}


def test_a_run_is_of_one_command_at_a_time(tmp_path: Path) -> None:
    """The other rows of the second go on."""
    todo = jobs(table(), "small", [], [], [], [0], {})
    folder = tmp_path / "runs" / todo[0].name
    folder.mkdir(parents=True)
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert run(todo, tmp_path) == {todo[0].name: "another command is at it"}
    os.close(lock)
    assert finished(tmp_path, table(), "small") == {todo[1].name}
    assert run(todo[:1], tmp_path) == {}
    assert finished(tmp_path, table(), "small") == {job.name for job in todo}


def test_time_that_is_over_when_the_data_are_read_begins_nothing(tmp_path: Path) -> None:
    todo = jobs(table(), "small", ["mamba"], [], [], [0], {})
    assert run(todo, tmp_path, stop=StopAfter(1)) == {}
    assert results(tmp_path, table(), "small") == []
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_has_not_begun_when_time_is_over_is_not_begun(tmp_path: Path) -> None:
    todo = jobs(table(), "small", [], [], [], [0], {})
    assert run(todo, tmp_path, stop=Until(1e-9, ())) == {}
    assert list(tmp_path.iterdir()) == []
    assert len(Until(10, ())) == len(Until(None, ())) == 0
    assert len(Until(10, [2])) == 1


def test_runs_at_once_are_the_runs_one_by_one(tmp_path: Path) -> None:
    todo = jobs(table(), "small", [], [], [], [0, 1], {"steps": 20})
    found = []
    for at_once in (1, 3):
        out, stream = tmp_path / str(at_once), io.StringIO()
        out.mkdir()
        assert run(todo, out, at_once, stream=stream) == {}
        made = results(out, table(), "small")
        found.append({result["name"]: (result["curve"], result["measures"]) for result in made})
        lines = stream.getvalue().splitlines()
        assert {line.split()[0] for line in lines if " 100%  step 20 " in line} == {job.name for job in todo}
    assert len(found[0]) == 4
    assert found[0] == found[1]


class Stream:
    """In the place of CuPy's: which one a thread uses."""

    used: ClassVar[dict[int, list[Any]]] = {}

    def __init__(self, non_blocking: bool) -> None:
        assert non_blocking

    def use(self) -> None:
        self.used.setdefault(threading.get_ident(), []).append(self)


class Module:
    """NumPy, but that it has streams and the name of a GPU."""

    cuda = SimpleNamespace(
        Stream=Stream,
        runtime=SimpleNamespace(getDevice=lambda: 1, getDeviceProperties=lambda i: {"name": f"GPU {i}".encode()}),
    )
    asarray = staticmethod(np.asarray)


def test_every_thread_has_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "used", {})
    todo = jobs(table(), "small", [], [], [], [0, 1], {})
    assert run_all(todo, tmp_path, Module, [], 2, (), io.StringIO()) == {}
    assert {result["device"] for result in results(tmp_path, table(), "small")} == {"GPU 1"}
    assert 1 <= len(Stream.used) <= 2
    assert threading.get_ident() not in Stream.used
    assert {len(streams) for streams in Stream.used.values()} == {1}


@pytest.mark.parametrize("at_once", [1, 2])
def test_one_that_fails_leaves_the_others_alone(tmp_path: Path, at_once: int) -> None:
    made = table(Row("bad", ("Bad",), {}, {"lr": 1e30}), Row("good", ("Good",), {}))
    todo = jobs(made, "small", [], [], [], [0], {})
    failures = run(todo, tmp_path, at_once)
    assert failures.keys() == {todo[0].name}
    assert re.match(r"(the loss is|.* is not finite after) .*; try a smaller --lr$", failures[todo[0].name])
    assert [(result["row"], result["finished"]) for result in results(tmp_path, made, "small")] == [("good", True)]


# What is said of them


def result(row: str, lr: float, seed: int, measures: dict[str, float], generator: str = "anywhere") -> dict[str, Any]:
    return {
        "row": row, "scale": "small", "generator": generator, "options": {"lr": lr, "seed": seed}, "steps": 1200,
        "seconds": 90.0, "finished": bool(measures), "measures": measures,
    }  # fmt: skip


FOUND = [
    result("mamba", 1e-3, 0, {"64": 1.0, "128": 0.995}), result("mamba", 1e-3, 1, {"64": 1.0, "128": 0.25}),
    result("mamba", 1e-4, 0, {"64": 0.6, "128": 0.7}), result("mamba", 1e-4, 1, {"64": 0.6, "128": 0.7}),
    result("mamba", 1e-2, 2, {"64": 1.0, "128": 1.0}), result("mamba", 3e-3, 0, {}, "front"),
]  # fmt: skip
HEADINGS = {"64": "2^6", "128": "2^7"}


def test_the_markdown() -> None:
    made = dataclasses.replace(table(), headings=HEADINGS)
    assert markdown(made, FOUND, {"x": "no memory"}).splitlines() == [
        "| row | model |  | 2^6 | 2^7 | rate (tried) | steps | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| mamba | Mamba | paper | 100 | 50 |  |  |  |",
        "|  |  | anywhere seed 0 | 100 | 99.5 | 0.001 (0.0001, 0.001; not compared: 0.01) | 1,200 | 1.5 |",
        "|  |  | anywhere seed 1 | 100 | 25 | 0.001 (0.0001, 0.001; not compared: 0.01) | 1,200 | 1.5 |",
        "|  |  | front seed 0, not finished |  |  | 0.003 (0.003) | 1,200 | 1.5 |",
        "| wide | Wide | paper |  |  |  |  |  |",
        "|  |  | not run |  |  |  |  |  |",
        "",
        "x failed: no memory",
    ]


def test_the_markdown_of_one_measure() -> None:
    """The paper's and ours may be of different things."""
    made = dataclasses.replace(table(), across="", headings=HEADINGS, generators={"anywhere": {}})
    assert markdown(made, FOUND[:2]).splitlines() == [
        "| row | model | paper: 2^6 | ours, by | 2^7 | rate (tried) | steps | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| mamba | Mamba | 100 | anywhere seed 0 | 99.5 | 0.001 (0.001) | 1,200 | 1.5 |",
        "|  |  |  | anywhere seed 1 | 25 | 0.001 (0.001) | 1,200 | 1.5 |",
        "| wide | Wide |  | not run |  |  |  |  |",
    ]


def test_the_best_rate_is_the_lowest_where_low_is_good() -> None:
    assert {r["options"]["lr"] for r in best_rate(table(), FOUND[:4])} == {1e-3}
    low = dataclasses.replace(table(), higher_is_better=False)
    assert {r["options"]["lr"] for r in best_rate(low, FOUND[:4])} == {1e-4}
    assert best_rate(table(), []) == []


def test_rates_are_compared_by_the_same_seeds() -> None:
    """A second seed, which is worse or better, decides nothing where the other rate has none."""
    one, two = (1e-3, 0.6), (1e-4, 0.5)
    for second in (0.1, 1.0):
        found = [result("mamba", lr, 0, {"64": value}) for lr, value in (one, two)]
        assert best_rate(table(), [*found, result("mamba", 1e-3, 1, {"64": second})])[0]["options"]["lr"] == 1e-3
        chosen = best_rate(table(), [*found, result("mamba", 1e-4, 1, {"64": second})])
        assert [r["options"]["lr"] for r in chosen] == [1e-3]
    chosen = best_rate(table(), [result("mamba", 1e-3, 1, {"64": 0.1}), *found, result("mamba", 1e-4, 2, {"64": 1.0})])
    assert [(r["options"]["lr"], r["options"]["seed"]) for r in chosen] == [(1e-3, 1), (1e-3, 0)]  # all of its seeds


def test_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    curves = dataclasses.replace(table(), headings=HEADINGS)
    bars = dataclasses.replace(curves, headings={"64": "2^6"}, across="")
    for i, made in enumerate((curves, bars)):
        assert draw(made, FOUND, tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = {line.get_label(): line.get_ydata().tolist() for line in drawn[0].axes[0].lines}
    assert lines == {"Mamba, paper": [1.0, 0.5], "Mamba, ours": [1.0, pytest.approx(0.6225)]}
    assert [[bar.get_width() for bar in container] for container in drawn[1].axes[0].containers] == [[1.0], [1.0]]


# The command


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Table:
    made = dataclasses.replace(table(), headings=HEADINGS)
    monkeypatch.setitem(tables.TABLES, "table11", made)
    return made


def test_the_command(tiny: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reproduce", "table11", "--rows", "mamba", "--seeds", "0", "1", "--at-once", "2", "--out", str(tmp_path)]
    for left in (2, 0):
        assert main(command) == 0
        out, err = capsys.readouterr()
        assert f"Table 11, Induction Heads, small: {left} of 2 runs to do" in err
        assert out.startswith(markdown(tiny, results(tmp_path, tiny, "small")))
        assert "|  |  | not run |  |  |" in out
        assert str(tmp_path / "table11-small.png") in out
    assert (tmp_path / "table11-small.png").exists()


def test_the_command_says_what_failed_and_what_is_left(
    tiny: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "table11", "--lr", "1e30", "--rows", "mamba", "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    name = "table11-small-mamba-anywhere-lr1e+30-seed0"
    assert f"{name} failed: the loss is" in out
    assert f"sscan reproduce: {name}: the loss is" in err
    assert "not finished" not in out + err
    slow = ["reproduce", "table11", "--steps", "1000000", "--minutes", "0.02", "--rows", "mamba", "--out"]
    assert main([*slow, str(tmp_path / "slow")]) == 0
    left = "not finished, and goes on with the same command: table11-small-mamba-anywhere-lr0.001-seed0\n"
    assert capsys.readouterr().err.endswith(left)
    for steps in ("999999", "20"):
        assert main([*slow[:3], steps, *slow[4:], str(tmp_path / "slow")]) == 2
        assert f"has been run with steps = 1000000, not {steps}" in capsys.readouterr().err


def test_what_failed_is_not_said_to_go_on(
    tiny: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though there is a checkpoint of it, and a result that says it is not finished."""
    command = ["reproduce", "table11", "--rows", "mamba", "--out", str(tmp_path)]
    run(jobs(tiny, "small", ["mamba"], [], [], [0], {}), tmp_path, stop=StopAfter(5))

    def step(self: Any) -> None:
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(TrainingRun, "step", step)
    assert main(command) == 1
    err = capsys.readouterr().err
    assert err.endswith("sscan reproduce: table11-small-mamba-anywhere-lr0.001-seed0: the loss is nan\n")
    assert "goes on" not in err


@pytest.mark.parametrize("arguments", [["--device", "cuda"], ["--rows", "x"]])
def test_what_cannot_begin_leaves_no_folder(
    arguments: list[str], tiny: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("sscan.cli._devices.version", lambda name: "-")
    assert main(["reproduce", "table11", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("sscan reproduce: ")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_checkpoints(tiny: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all that go on; they are not begun anew."""

    begun, over = tmp_path / "runs", threading.Event()

    def press() -> None:
        while sum(b"held_out" in path.read_bytes() for path in begun.glob("*/log.jsonl")) < 2:
            if over.wait(0.01):
                return
        os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=press, daemon=True)
    pressing.start()
    command = ["reproduce", "table11", "--at-once", "2", "--steps", "400", "--out", str(tmp_path)]
    code = main(command)
    over.set()
    assert code == 130
    assert "sscan reproduce: stopped; the same command goes on" in capsys.readouterr().err
    before = {result["row"]: result["steps"] for result in results(tmp_path, tiny, "small")}
    assert before.keys() == {"mamba", "wide"}
    assert 0 < min(before.values()) <= max(before.values()) < 400
    assert main(command) == 0
    for result in results(tmp_path, tiny, "small"):
        lines = (tmp_path / "runs" / result["name"] / "log.jsonl").read_text().splitlines()
        starts = [record["step"] for record in map(json.loads, lines) if "task" in record]
        assert starts == [0, before[result["row"]]]
        assert result["steps"] == 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["table12"], "invalid choice: 'table12'"), (["table11", "--rows", "x"], "row must be one of mamba, wide, got"),
     (["table11", "--text", "x"], "--text: table11 is of no text"), (["table11", "--at-once", "0"], "--at-once"),
     (["table11", "--seeds", "-1"], "run: seed must be at least 0")],
)  # fmt: skip
def test_mistakes(
    arguments: list[str], message: str, tiny: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    try:
        code: Any = main(["reproduce", *arguments])
    except SystemExit as exit:  # of argparse
        code = exit.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/reproduce/*"))
