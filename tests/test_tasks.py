"""The paper's synthetic tasks: that their data is what they say, and that models learn them."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sscan.nn import MambaLM, no_grad
from sscan.tasks.induction import Induction, InductionOptions
from sscan.tasks.loop import train
from sscan.tasks.selective_copying import SelectiveCopying, SelectiveCopyingOptions, distinct_places
from sscan.tasks.text import Text
from sscan.tasks.training import TrainingRun

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def xp() -> Any:
    """Where models are trained: in tests/gpu it is another."""
    return np


# Induction Heads

EASY = InductionOptions(
    d_model=16, length=16, batch=16, symbols=4, dt_rank=4, lr=5e-3, steps=400, evaluations=8, target=0.0
)


def task(**changes: Any) -> Induction:
    return Induction(InductionOptions(**changes))


@pytest.mark.parametrize(("length", "symbols", "front"), [(3, 2, None), (16, 5, None), (64, 16, 10), (16, 5, 100)])
def test_sequences_with_a_trigger(length: int, symbols: int, front: int | None) -> None:
    """Read one by one: the answer is what stands behind the first trigger, the second is the last token."""
    made = task(length=length, symbols=symbols, front=front)
    ids, answers = made.sequences(np.random.default_rng(0), 2000, length)
    places = set()
    for row, answer in zip(ids.tolist(), answers.tolist(), strict=True):
        first = row.index(symbols)
        assert row.count(symbols) == 2
        assert row[-1] == symbols
        assert row[first + 1] == answer < symbols
        places.add(first)
    assert places == set(range(min(length - 2, front or length)))
    assert {token for row in ids.tolist() for token in row} == set(range(symbols + 1))
    shares = np.bincount(answers, minlength=symbols) / 2000
    assert np.abs(shares - 1 / symbols).max() < 5 * np.sqrt(1 / symbols / 2000)


def test_batches_depend_on_seed_and_step_only() -> None:
    inputs, targets = task(seed=3, batch=50).batch(7)
    again = task(seed=3, batch=50)
    again.batch(1)
    for array, other in zip((inputs, targets), again.batch(7), strict=True):
        np.testing.assert_array_equal(array, other)
    for other_seed, other_step in ((3, 8), (4, 7)):
        assert (task(seed=other_seed, batch=50).batch(other_step)[0] != inputs).any()
    assert (targets[:, :-1] == -100).all()
    np.testing.assert_array_equal(targets[:, -1], [row[row.tolist().index(16) + 1] for row in inputs])


def test_the_paper_s_model() -> None:
    model = Induction(InductionOptions()).new_model()
    assert model.parameter_count() == 73_792  # Table 11: 74K
    assert model.lm_head.weight.shape == (17, 64)


def test_accuracy_counts_right_answers_at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts as at once; and against logits of the run sequences."""
    made = task(d_model=8, length=16, symbols=3, dt_rank=2)
    model = made.new_model()
    model.initialise(5)
    ids, answers = made.sequences(np.random.default_rng(50), 40, 50)
    expected = float((model(ids).data[:, -1].argmax(-1) == answers).mean())
    assert 0 < expected < 1
    assert made.accuracy(model, 50, 40) == expected
    monkeypatch.setattr("sscan.tasks.induction.TOKENS_AT_ONCE", 40 * 7)
    assert made.accuracy(model, 50, 40) == expected


@pytest.mark.parametrize("layer", [{"layer": "gated", "inner": "s4"}, {"layer": "attention", "heads": 1}])
def test_accuracy_of_other_layers(layer: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With states in parts, without them some sequences at a time."""
    made = task(d_model=8, length=16, symbols=3, layers=(layer,))
    model = made.new_model()
    model.initialise(5)
    ids, answers = made.sequences(np.random.default_rng(50), 40, 50)
    with no_grad():
        expected = float((model(ids).data[:, -1].argmax(-1) == answers).mean())
    assert 0 < expected < 1
    for tokens in (1 << 16, 40 * 7, 7 * 50):
        monkeypatch.setattr("sscan.tasks.induction.TOKENS_AT_ONCE", tokens)
        monkeypatch.setattr("sscan.tasks.induction.PAIRS_AT_ONCE", 50 * tokens)
        assert made.accuracy(model, 50, 40) == expected


def test_models_without_states_get_few_long_sequences_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention to 64 sequences of 1024 tokens took 8 GB."""
    made = task(d_model=8, length=16, symbols=3, layers=({"layer": "attention", "heads": 1},))
    model, read = made.new_model(), []
    run = type(model).__call__
    monkeypatch.setattr(type(model), "__call__", lambda self, ids: (read.append(ids.shape), run(self, ids))[1])
    made.accuracy(model, 1024, 6)
    made.accuracy(model, 64, 6)
    made.accuracy(model, 4096, 1)
    assert read == [(4, 1024), (2, 1024), (6, 64), (1, 4096)]


def test_runs_of_other_layers_go_on(tmp_path: Path) -> None:
    options = InductionOptions(
        d_model=8, length=8, symbols=3, steps=4, layers=({"layer": "attention", "heads": 2}, {"layer": "mlp"}),
        positions="absolute",
    )  # fmt: skip
    run = TrainingRun(Induction(options))
    assert [type(block.mixer).__name__ for block in run.model.backbone.layers] == ["Attention", "MLP"] * 2
    assert run.model.config.positions == "absolute"
    run.step()
    run.save(tmp_path)
    resumed = TrainingRun.load(tmp_path, Induction, changes={"layers": options.layers})
    assert resumed.options == options
    while not run.done:
        run.step()
        resumed.step()
    assert resumed.losses == run.losses
    with pytest.raises(ValueError, match="was trained with positions = absolute, not none"):
        TrainingRun.load(tmp_path, Induction, changes={"positions": "none"})
    with pytest.raises(ValueError, match=r"layer 0 must be one of mamba, .*got 'mambo'"):
        InductionOptions(layers=("mambo",))  # type: ignore[arg-type]


def test_measures_are_of_the_length_and_of_longer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Induction, "accuracy", lambda self, model, length: {16: 0.75, 256: 0.5}[length])
    found = task(length=16).measure(None)  # type: ignore[arg-type]
    assert found == {"error": 0.5, "accuracy_16": 0.75, "accuracy_256": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"length": 2}, "length must be at least 3"), ({"longest": 63}, "longest must be at least 64"),
     ({"positions": "absolute"}, "positions need layers, got 'absolute' without"),
     ({"layers": ("mamba",), "positions": "odd"}, "positions must be one of none, absolute, got 'odd'"),
     ({"symbols": 1}, "symbols must be at least 2"),
     ({"front": 0}, "front must be at least 1"), ({"dt_rank": "auto"}, "dt_rank must be an integer")],
)  # fmt: skip
def test_options_that_are_none(change: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        InductionOptions(**change)


def test_the_rate_is_constant_and_nothing_decays_or_is_clipped() -> None:
    run = TrainingRun(task(d_model=8, length=8, symbols=3, dt_rank=2, steps=3))
    assert run.optimiser.betas == (0.9, 0.999)
    assert {group["weight_decay"] for group in run.optimiser.groups} == {0}
    for parameter in run.model.parameters():
        parameter.data = parameter.data * 3  # so that gradients are large
    norms = []
    for _ in range(3):
        run.step()
        assert run.optimiser.lr == 1e-3
        norms.append(float(np.sqrt(sum((p.grad**2).sum() for p in run.model.parameters()))))
    assert max(norms) > 1.5


def test_induction_is_learned(xp: Any, tmp_path: Path) -> None:
    """A model of 7,312 numbers makes no mistake at 16 times the length that it was trained on; chance is 1 in 4."""
    run = TrainingRun(Induction(EASY), xp)
    train(run, tmp_path, io.StringIO())
    assert run.done
    assert run.progress < 1
    for length in (16, 64, 256):
        assert run.task.accuracy(run.model, length, 100) == 1
    model = MambaLM.from_pretrained(tmp_path / "best")
    assert run.task.accuracy(model, 64, 100) == 1


def test_runs_of_one_task_are_none_of_another(tmp_path: Path) -> None:
    options = InductionOptions(d_model=8, length=8, symbols=3, dt_rank=2, steps=4)
    run = TrainingRun(Induction(options))
    run.step()
    run.save(tmp_path)
    with pytest.raises(ValueError, match=r"training.safetensors: holds a run of the task 'induction', not 'text'"):
        TrainingRun.load(tmp_path, Text)
    with pytest.raises(ValueError, match="was trained with symbols = 3, not 4"):
        TrainingRun.load(tmp_path, Induction, changes={"symbols": 4})
    with pytest.raises(ValueError, match="induction: unknown texts"):
        TrainingRun.load(tmp_path, Induction, texts=["x"])
    resumed = TrainingRun.load(tmp_path, Induction)
    assert resumed.task.options == options
    while not run.done:
        run.step()
        resumed.step()
    assert resumed.losses == run.losses
    for name, parameter in run.model.named_parameters():
        np.testing.assert_array_equal(dict(resumed.model.named_parameters())[name].data, parameter.data, err_msg=name)


# Selective Copying


def copying(**changes: Any) -> SelectiveCopying:
    return SelectiveCopying(SelectiveCopyingOptions(**changes))


@pytest.mark.parametrize(
    ("length", "tokens", "symbols", "length_is", "memorised", "total"),
    [(20, 5, 3, "noise", 25, 30), (20, 5, 3, "total", 15, 20), (1, 3, 2, "noise", 4, 7), (6, 3, 4, "total", 3, 6)],
)
def test_sequences_to_copy_from(
    length: int, tokens: int, symbols: int, length_is: str, memorised: int, total: int
) -> None:
    """Read one by one: what is not noise, in its order, and then as many markers; places are anywhere."""
    made = copying(length=length, tokens=tokens, symbols=symbols, length_is=length_is)
    ids, answers = made.sequences(np.random.default_rng(0), 3000)
    assert ids.shape == (3000, total)
    for row, answer in zip(ids.tolist(), answers.tolist(), strict=True):
        assert [token for token in row[:memorised] if token != 0] == answer
        assert row[memorised:] == [symbols + 1] * tokens
    assert set(answers.ravel().tolist()) == set(range(1, symbols + 1))
    share = (ids[:, :memorised] != 0).mean(axis=0)
    expected = tokens / memorised
    assert np.abs(share - expected).max() <= 5 * np.sqrt(expected * (1 - expected) / 3000)


def test_every_set_of_places_is_equally_likely() -> None:
    rows = distinct_places(np.random.default_rng(0), 20_000, 3, 6)
    assert (np.diff(rows, axis=1) > 0).all()
    sets, counts = np.unique(rows, axis=0, return_counts=True)
    assert len(sets) == 20  # 6 over 3
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000 * 19 / 20)


def test_what_is_said_at_the_markers_is_the_target() -> None:
    made = copying(length=12, tokens=3, symbols=4, batch=20, seed=5)
    inputs, targets = made.batch(3)
    assert inputs.dtype == targets.dtype == np.int32
    assert (targets[:, :-3] == -100).all()
    for row, said in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert said[-3:] == [token for token in row if token not in (0, 5)]
    np.testing.assert_array_equal(copying(length=12, tokens=3, symbols=4, batch=20, seed=5).batch(3)[0], inputs)
    assert (copying(length=12, tokens=3, symbols=4, batch=20, seed=6).batch(3)[0] != inputs).any()
    assert (made.batch(4)[0] != inputs).any()


def test_accuracy_counts_right_symbols() -> None:
    """In batches that do not come out even, as in one."""
    made = copying(d_model=8, length=12, tokens=3, symbols=4, batch=7)
    model = made.new_model()
    model.initialise(1)
    ids, symbols = made.sequences(np.random.default_rng(12), 40)
    expected = float((model(ids).data[:, -3:].argmax(-1) == symbols).mean())
    assert 0 < expected < 1
    assert made.accuracy(model, 40) == pytest.approx(expected, abs=1e-12)


def test_the_paper_s_size_of_copying() -> None:
    made = SelectiveCopying(SelectiveCopyingOptions())
    assert made.batch(0)[0].shape == (64, 4096 + 2 * 16)
    assert made.new_model().config.vocab_size == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tokens": 0}, "tokens must be at least 1"), ({"symbols": 1}, "symbols must be at least 2"),
     ({"length_is": "half"}, "length_is must be one of noise, total, got 'half'"),
     ({"length_is": "total", "length": 31}, "length must be at least 2 tokens = 32, got 31")],
)  # fmt: skip
def test_options_of_copying_that_are_none(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectiveCopyingOptions(**change)


def test_copying_is_learned(xp: Any, tmp_path: Path) -> None:
    """Two of three symbols among eight tokens of noise; chance is 1 in 3."""
    options = SelectiveCopyingOptions(
        d_model=16, length=8, tokens=2, symbols=3, batch=16, lr=1e-2, steps=400, evaluations=4
    )
    run = TrainingRun(SelectiveCopying(options), xp)
    train(run, tmp_path, io.StringIO())
    assert run.task.final(run.model)["accuracy"] > 0.97
