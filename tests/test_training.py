"""The loop that trains any task, and text as its first: files, tokens, evaluations, log, best model, exact resume."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
from typing import TYPE_CHECKING, Any

import matplotlib.figure
import numpy as np
import pytest
import tokenizers

from sscan.cli import main
from sscan.models import tokens
from sscan.models.files import load_arrays
from sscan.models.tokens import Bytes, Tokens
from sscan.nn import MambaLM
from sscan.tasks.log import Log
from sscan.tasks.loop import train
from sscan.tasks.progress import draw_loss_curve
from sscan.tasks.task import LANGUAGE_MODELS, RunOptions
from sscan.tasks.text import Text, overlapping_windows, text_files
from sscan.tasks.training import TrainingRun

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "the rain it raineth every day, für Elise, 日本 and a hey, ho, the wind and the rain\n" * 40
TINY = ["--d-model", "8", "--n-layer", "1", "--length", "16", "--batch", "2"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "poem.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def tokenizer(path: Path, size: int = 300, truncation: int = 0) -> Path:
    """A byte-pair tokenizer as those of the released models, trained on the text."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT], tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    if truncation:
        made.enable_truncation(truncation)
        made.enable_padding(length=truncation)
    made.save(str(path))
    return path


@pytest.fixture
def words(tmp_path: Path) -> Path:
    return tokenizer(tmp_path / "words.json")


def options(**changes: Any) -> RunOptions:
    return RunOptions(**{"d_model": 8, "n_layer": 1, "length": 16, "batch": 2, "steps": 6, "minutes": None} | changes)


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """What the log says of them, but for the time."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records(folder) if "held_out" in record]


def arrays_of(folder: Path) -> dict[str, Any]:
    return load_arrays(folder / "training.safetensors")[0] | load_arrays(folder / "model.safetensors")[0]


class Reached:
    """Not empty once a run has made so many steps."""

    def __init__(self, run: TrainingRun[Any], step: int) -> None:
        self.run, self.step = run, step

    def __len__(self) -> int:
        return len(self.run.losses) >= self.step


# Files


def test_files_and_folders_are_joined_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    contents = {"b.txt": "bbb", "a/z.md": "zzz", "a/c": "ccc", ".git/x": "no", "a/.hidden": "no"}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content * 10)
    (tmp_path / "first").write_text("f" * 30)
    files = text_files([tmp_path / "first", folder])
    assert [path.name for path in files] == ["first", "c", "z.md", "b.txt"]
    task = Text(options(), files)
    assert task.bytes.tobytes() == b"f" * 30 + b"c" * 30 + b"z" * 30 + b"b" * 30
    assert task.held_out_bytes == 12
    assert task.held_out == 108


def test_the_command_takes_files_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("one", "folder/two", "folder/three"):
        (tmp_path / name).write_text(f"{name} and more\n" * 50)
    run = tmp_path / "run"
    texts = [tmp_path / "folder", tmp_path / "one"]
    assert main(["train", "--text", *map(str, texts), "--out", str(run), "--steps", "1", *TINY]) == 0
    assert f"text        {tmp_path}/folder/three and 2 more: 2,750 bytes, the last 275" in capsys.readouterr().out
    assert main(["train", "--resume", str(run), "--steps", "2"]) == 0
    assert main(["train", "--resume", str(run), "--steps", "3", "--text", *map(str, texts)]) == 0
    assert "on another text" in mistake(capsys, "train", "--resume", run, "--text", *reversed(texts))
    (tmp_path / "folder" / "two").unlink()
    assert "folder/two: No such file" in mistake(capsys, "train", "--resume", run)


def test_folders_that_hold_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".hidden").write_text(TEXT)
    assert f"{folder}: no file in this folder" in mistake(capsys, "train", "--text", folder, "--out", tmp_path / "x")
    (folder / "picture").write_bytes(b"PNG\0")
    assert f"{folder}/picture is not text: byte 3" in mistake(
        capsys, "train", "--text", folder, "--out", tmp_path / "x"
    )


# Tokens


@pytest.mark.parametrize("part", [1, 100, 10**6])
def test_long_texts_are_the_same_tokens(part: int, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PART", part)
    monkeypatch.setattr(tokens, "PARTS", 3)
    expected = tokenizers.Tokenizer.from_file(str(words)).encode(TEXT).ids
    np.testing.assert_array_equal(Tokens(words).encode_long(TEXT.encode()), expected)
    assert Tokens(words).encode_long(b"").size == 0
    np.testing.assert_array_equal(Bytes().encode_long(TEXT.encode()), list(TEXT.encode()))


def test_no_token_is_cut_off_or_put_in(tmp_path: Path, words: Path) -> None:
    """A tokenizer.json may say how long texts are to be made; ours are as long as they are."""
    cut = Tokens(tokenizer(tmp_path / "cut.json", truncation=7))
    whole = Tokens(words)
    assert cut.encode(b"the rain it raineth every day") == whole.encode(b"the rain it raineth every day")
    assert cut.encode(b"rain") == whole.encode(b"rain")
    np.testing.assert_array_equal(cut.encode_long(TEXT.encode()), whole.encode_long(TEXT.encode()))


def test_held_out_bits_of_tokens(text: Path, words: Path) -> None:
    task = Text(options(length=10**3 // 8, batch=3), [text], words)
    held_out = task.bytes[-task.held_out_bytes :].tobytes()
    assert task.held_out_bytes == pytest.approx(task.bytes.size / 10, abs=3)
    assert bytes(task.vocabulary.decode(task.data[task.held_out :]), "utf-8") == held_out
    assert task.vocabulary.decode(task.data).encode() == TEXT.encode()
    model = task.new_model()
    inputs, targets = overlapping_windows(task.data, task.held_out, task.options.length)
    logits = model(inputs).data.astype(np.float64)
    nats = (
        np.logaddexp.reduce(logits, axis=-1) - np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    )
    counted = targets != -100
    assert counted.sum() == task.data.size - task.held_out
    bits = nats[counted].sum() / math.log(2) / len(held_out)
    assert task.held_out_bits(model) == pytest.approx(bits, rel=1e-5)
    assert task.measure(model) == {"bits_per_byte": pytest.approx(bits, rel=1e-5)}  # so few windows are all measured
    assert task.in_unit(math.log(2)) == pytest.approx(task.held_out / (task.bytes.size - task.held_out_bytes))


def test_the_held_out_part_begins_with_a_character(tmp_path: Path, words: Path) -> None:
    for size in range(100, 110):
        path = tmp_path / "text"
        path.write_text("日" * size, encoding="utf-8")
        task = Text(options(length=4), [path], words)
        assert task.held_out_bytes % 3 == 0
        assert 0 <= int(3 * size * 0.1) - task.held_out_bytes < 3


def test_texts_whose_end_is_one_character(tmp_path: Path, words: Path) -> None:
    path = tmp_path / "text"
    path.write_text("日" * 4, encoding="utf-8")  # whose last tenth is the last byte
    with pytest.raises(ValueError, match="too short"):
        Text(options(length=1), [path], words)


def test_measures_are_of_windows_all_over_the_held_out_part() -> None:
    data = np.arange(10_000) % 251
    every = overlapping_windows(data, 5000, 16)
    some = overlapping_windows(data, 5000, 16, most=100)
    step = -(-len(every[0]) // 100)
    for all_of_them, chosen in zip(every, some, strict=True):
        np.testing.assert_array_equal(all_of_them[::step], chosen)
    assert 50 < len(some[0]) <= 100


def test_a_run_with_a_tokenizer_goes_on_bit_for_bit(
    text: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--text", str(text), "--tokenizer", str(words), *TINY, "--seed", "3"]
    assert main([*command, "--steps", "6", "--out", str(tmp_path / "whole")]) == 0
    out = capsys.readouterr().out
    assert "of 300 kinds" in out
    assert "2 windows of 16 tokens a step" in out
    assert "order-4 back-off" in out
    run = TrainingRun(Text(options(seed=3), [text], words))
    (tmp_path / "parts").mkdir()
    for end in (2, 5):
        run = run if end == 2 else TrainingRun.load(tmp_path / "parts", Text)
        train(run, tmp_path / "parts", io.StringIO(), stop=Reached(run, end))
        assert len(run.losses) == end
    words.unlink()  # the run has its own
    assert main(["train", "--resume", str(tmp_path / "parts")]) == 0
    whole, parts = arrays_of(tmp_path / "whole"), arrays_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(parts[name], array, err_msg=name)
    assert evaluations(tmp_path / "parts") == evaluations(tmp_path / "whole")
    assert [record["step"] for record in evaluations(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]
    capsys.readouterr()
    for folder in (tmp_path / "parts", tmp_path / "parts" / "best"):
        assert main(["generate", str(folder), "--prompt", "the rain", "-n", "5"]) == 0
        assert capsys.readouterr().out.startswith("the rain")


def test_tokenizers_that_do_not_fit(
    text: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--text", text, *TINY, "--steps", "1", "--out"]
    assert main([*map(str, command), str(tmp_path / "bytes")]) == 0
    assert main([*map(str, command), str(tmp_path / "tokens"), "--tokenizer", str(words)]) == 0
    assert "on bytes, without" in mistake(capsys, "train", "--resume", tmp_path / "bytes", "--tokenizer", words)
    other = tokenizer(tmp_path / "other.json", size=290)
    assert "with another tokenizer" in mistake(capsys, "train", "--resume", tmp_path / "tokens", "--tokenizer", other)
    assert main(["train", "--resume", str(tmp_path / "tokens"), "--tokenizer", str(words)]) == 0
    (tmp_path / "tokens" / "tokenizer.json").unlink()
    assert "tokenizer.json: No such file" in mistake(capsys, "train", "--resume", tmp_path / "tokens")
    latin = tmp_path / "latin"
    latin.write_bytes(b"caf\xe9" * 100)
    said = mistake(capsys, "train", "--text", latin, "--tokenizer", words, "--out", tmp_path / "x")
    assert "latin is not UTF-8, as a tokenizer needs it: byte 3" in said
    assert main(["train", "--text", str(latin), *TINY, "--steps", "1", "--out", str(tmp_path / "latin_run")]) == 0
    said = mistake(capsys, "train", "--text", text, "--tokenizer", text, "--out", tmp_path / "x")
    assert f"{text}: " in said


# The recipe


def test_the_recipe_of_language_models(text: Path) -> None:
    """AdamW with betas (0.9, 0.95), decay 0.1 but for A_log, D, biases and norms; warm-up, cosine to 1e-5; clip 1."""
    run = TrainingRun(Text(options(steps=20, lr=0.3), [text]))
    assert run.optimiser.betas == (0.9, 0.95)
    decays = {name: group["weight_decay"] for group in run.optimiser.groups for name in group["parameters"]}
    assert decays.keys() == dict(run.model.named_parameters()).keys()
    spared = {name for name, decay in decays.items() if decay == 0}
    assert {name.split(".")[-1] if "norm" not in name else "norm" for name in spared} == {"A_log", "D", "bias", "norm"}
    assert {decay for name, decay in decays.items() if name not in spared} == {0.1}
    rates, norms = [], []
    for _ in range(20):
        run.step()
        rates.append(run.optimiser.lr)
        norms.append(math.sqrt(sum(float((p.grad**2).sum()) for p in run.model.parameters())))
    expected = [0, 0.15] + [
        1e-5 + (0.3 - 1e-5) * (1 + math.cos(math.pi * (i / 20 - 0.1) / 0.9)) / 2 for i in range(2, 20)
    ]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)
    assert max(norms) == pytest.approx(1, rel=1e-5)
    assert LANGUAGE_MODELS.rate(1.0, 0.3) == pytest.approx(1e-5)


def test_the_next_batch_is_made_before_the_loss_is_waited_for(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = TrainingRun(Text(options(), [text]))
    make, happened, given = run.task.batch, [], []  # type: ignore[var-annotated]

    class Loss:
        def __float__(self) -> float:
            happened.append("waited")
            return 1.0

    def making(step: int) -> Any:
        happened.append(step)
        return make(step)

    def captured(*batch: Any) -> Loss:
        given.append(batch)
        return Loss()

    monkeypatch.setattr(run.task, "batch", making)
    monkeypatch.setattr(run, "_captured", captured)
    run.step()
    run.step()
    assert happened == [0, 1, "waited", 2, "waited"]
    for step, batch in enumerate(given):
        np.testing.assert_array_equal(batch, make(step))


# Evaluations, the best model, and where to stop


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What evaluations will find."""
    values: list[float] = []
    monkeypatch.setattr(Text, "measure", lambda self, model: {"bits_per_byte": values.pop(0)})
    return values


def test_the_best_model_is_kept(text: Path, tmp_path: Path, measured: list[float]) -> None:
    measured += [5, 3, 4, 3]
    run = TrainingRun(Text(options(steps=8, evaluations=4), [text]))
    kept = []
    step = run.step

    def keep() -> None:
        step()
        kept.append({name: p.data.copy() for name, p in run.model.named_parameters()})

    run.step = keep  # type: ignore[method-assign]
    train(run, tmp_path, io.StringIO())
    assert run.measures == [(2, 5), (4, 3), (6, 4), (8, 3)]
    assert run.best == (4, 3)
    for folder, expected in ((tmp_path / "best", kept[3]), (tmp_path, kept[7])):
        for name, parameter in MambaLM.from_pretrained(folder).named_parameters():
            np.testing.assert_array_equal(parameter.data, expected[name], err_msg=name)
    assert TrainingRun.load(tmp_path, Text).measures == run.measures


def test_stops_at_the_target(text: Path, tmp_path: Path, measured: list[float]) -> None:
    measured += [3, 2.5, 2, 1, 1]
    run = TrainingRun(Text(options(steps=8, evaluations=4, target=2.5), [text]))
    train(run, tmp_path, io.StringIO())
    assert len(run.losses) == 4
    assert run.done
    assert run.progress == 0.5
    assert TrainingRun.load(tmp_path, Text).done
    run = TrainingRun.load(tmp_path, Text, changes={"target": 1.5})
    assert not run.done
    train(run, tmp_path, io.StringIO())
    assert len(run.losses) == 8


def test_a_held_out_loss_that_is_no_number(text: Path, tmp_path: Path, measured: list[float]) -> None:
    measured += [3, math.nan]
    run = TrainingRun(Text(options(steps=8, evaluations=4), [text]))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 4"):
        train(run, tmp_path, io.StringIO())
    assert [record["step"] for record in evaluations(tmp_path)] == [2]
    assert not (tmp_path / "training.safetensors").exists()


def test_the_picture_shows_both_curves(
    text: Path, tmp_path: Path, measured: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured += [3, 2]
    run = TrainingRun(Text(options(steps=4, evaluations=2), [text]))
    train(run, tmp_path, io.StringIO())
    drawn: list[Any] = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw))
    )
    assert draw_loss_curve(tmp_path / "loss.png", run, {"counting": 2.5})
    (axes,) = drawn[0].axes
    training, held_out, counting = axes.lines
    np.testing.assert_allclose(training.get_ydata(), np.array(run.losses) / math.log(2))
    np.testing.assert_array_equal(held_out.get_xydata(), [(2, 3), (4, 2)])
    assert set(counting.get_ydata()) == {2.5}
    assert axes.get_ylabel() == "bits/byte"


# The log


def test_what_the_log_says(text: Path, tmp_path: Path) -> None:
    run = TrainingRun(Text(options(steps=7, evaluations=2), [text]))
    train(run, tmp_path, io.StringIO())
    start, *rest = records(tmp_path)
    assert start["step"] == 0
    assert start["task"] == "text"
    assert RunOptions(**start["options"]) == run.options
    content = text.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert start["files"] == [{"name": str(text.resolve()), "bytes": len(content), "sha256": digest}]
    assert [record["step"] for record in rest] == [4, 7]
    assert [record["held_out"] for record in rest] == [{"bits_per_byte": value} for _, value in run.measures]
    assert [record["loss"] for record in rest] == [np.mean(run.losses[:4]), np.mean(run.losses[4:])]
    assert rest[-1]["lr"] == run.optimiser.lr
    assert 0 < rest[0]["seconds"] < rest[1]["seconds"] == round(run.seconds, 3)


def test_a_run_that_crashed_goes_on_from_its_checkpoint(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log, best model and all else become what they are without the crash."""
    made = options(steps=8, evaluations=8)
    train(TrainingRun(Text(made, [text])), tmp_path / "whole", io.StringIO())
    run = TrainingRun(Text(made, [text]))
    train(run, tmp_path / "parts", io.StringIO(), stop=Reached(run, 3))
    step = TrainingRun.step

    def crash(run: TrainingRun[Text]) -> None:
        if len(run.losses) == 6:
            raise RuntimeError("the power is gone")
        step(run)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "step", crash)
        with pytest.raises(RuntimeError, match="power"):
            train(run, tmp_path / "parts", io.StringIO())
    assert [record["step"] for record in evaluations(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]
    run = TrainingRun.load(tmp_path / "parts", Text)
    assert len(run.losses) == 3
    train(run, tmp_path / "parts", io.StringIO())
    assert evaluations(tmp_path / "parts") == evaluations(tmp_path / "whole")
    assert [record["step"] for record in records(tmp_path / "parts") if "options" in record] == [0, 3, 3]
    for name in ("model.safetensors", "best/model.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for name, array in arrays_of(tmp_path / "whole").items():
        np.testing.assert_array_equal(arrays_of(tmp_path / "parts")[name], array, err_msg=name)


def test_what_is_behind_the_checkpoint_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = Log(path, 0)
    for step in (0, 3, 7, 9):
        log.append({"step": step})
    whole = path.read_bytes()
    for torn in (b'{"step": 7', b"\n", b"[]\n", b'{"step": "x"}\n', b"\xff\n", b'{"step": 7}', b"[" * 100_000 + b"\n"):
        path.write_bytes(whole + torn)
        Log(path, 7).append({"step": 8})
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 3, 7, 8]
    Log(path, 0)
    assert path.read_bytes() == b'{"step": 0}\n'


def test_a_record_for_which_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    log = Log(path, 0)
    log.append({"step": 1})
    write, said = os.write, iter([5])

    def full(file: int, data: bytes) -> int:
        for size in said:
            return write(file, data[:size])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            log.append({"step": 2})
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b'{"step": 1}\n'
    log.append({"step": 3})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'


def test_a_new_run_in_an_old_folder_begins_a_new_log(text: Path, tmp_path: Path) -> None:
    train(TrainingRun(Text(options(steps=2), [text])), tmp_path, io.StringIO())
    (tmp_path / "training.safetensors").unlink()
    train(TrainingRun(Text(options(steps=3), [text])), tmp_path, io.StringIO())
    assert [record["step"] for record in evaluations(tmp_path)] == [1, 2, 3]
