"""Audio: levels, files, baselines, and the commands from recordings to a WAV; every bad input is one line."""

from __future__ import annotations

import math
import re
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from sscan.cli import main
from sscan.nn import SequenceModel
from sscan.tasks.audio import Audio, AudioOptions, continued, open_audio_model
from sscan.tasks.linear_prediction import LinearPrediction, flac_bits_per_sample
from sscan.tasks.recordings import SILENCE, compress, draw_spectrogram, expand, read_recording, write_recording
from sscan.tasks.training import TrainingRun

if TYPE_CHECKING:
    from pathlib import Path

RATE = 800
TINY = ["--d-model", "4", "--length", "32", "--batch", "2", "--steps", "3"]


def tone(seconds: float, rate: int = RATE, frequency: float = 50.0, seed: int = 0) -> Any:
    """A sine with a little noise."""
    t = np.arange(round(seconds * rate)) / rate
    return 0.5 * np.sin(2 * np.pi * frequency * t) + 0.01 * np.random.default_rng(seed).standard_normal(t.size)


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(2.0), RATE, subtype="PCM_16")
    return path


# Levels


def test_mu_law_against_its_equation() -> None:
    for x in (-1.0, -0.3, -1e-4, 0.0, 1e-4, 0.02, 0.9, 1.0):
        curved = math.copysign(math.log(1 + 255 * abs(x)) / math.log(256), x)
        assert compress(np.array([x]))[0] == math.floor((curved + 1) * 127.5 + 0.5)
    levels = np.arange(256)
    for level, x in zip(levels.tolist(), expand(levels).tolist(), strict=True):
        assert math.isclose(255 * abs(x) + 1, 256 ** abs(level / 127.5 - 1), rel_tol=1e-12)
    np.testing.assert_array_equal(compress(expand(levels)), levels)
    np.testing.assert_allclose(expand(levels), -expand(255 - levels), rtol=1e-13)
    assert (np.diff(expand(levels)) > 0).all()


def test_no_level_is_zero() -> None:
    assert compress(np.zeros(1))[0] == SILENCE == 128
    np.testing.assert_allclose(expand(np.array([127, 128])), [-8.62e-5, 8.62e-5], rtol=1e-3)
    np.testing.assert_array_equal(compress(np.array([-1e-12, 1e-12])), [127, 128])
    np.testing.assert_array_equal(compress(np.array([-1.0, -1e-4, 1e-4, 1.0])), [0, 127, 128, 255])


@given(st.floats(-1, 1))
def test_nearest_level(x: float) -> None:
    """No other level is nearer on the curve, on which levels are a factor of 256^(1 / 127.5) of |x| + 1/255 apart."""
    level = compress(np.array([x]))
    assert abs(expand(level)[0] - x) <= (abs(x) + 1 / 255) * (256 ** (0.5 / 127.5 * 1.0001) - 1)


# Files


@pytest.mark.parametrize(("name", "subtype", "bits"), [
    ("a.wav", "PCM_16", 15), ("a.wav", "PCM_24", 23), ("a.wav", "PCM_U8", 7), ("a.wav", "FLOAT", 23),
    ("a.flac", "PCM_16", 15), ("a.flac", "PCM_24", 23), ("a.flac", "PCM_S8", 7),
])  # fmt: skip
def test_reading(tmp_path: Path, name: str, subtype: str, bits: int) -> None:
    samples = tone(0.5)
    soundfile.write(tmp_path / name, samples, RATE, subtype=subtype)
    got, rate = read_recording(tmp_path / name)
    assert rate == RATE
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, samples, rtol=0, atol=1.01 * 2.0**-bits)


def test_resampling(wav: Path) -> None:
    got, rate = read_recording(wav, 1200)
    assert rate == 1200
    assert got.size == 2400
    t = np.arange(2400) / 1200
    inside = slice(100, -100)  # the filter has ends
    np.testing.assert_allclose(got[inside], 0.5 * np.sin(2 * np.pi * 50 * t)[inside], atol=0.05)
    soundfile.write(wav, np.sign(tone(1.0)), RATE, subtype="FLOAT")
    assert np.abs(read_recording(wav, 1200)[0]).max() == 1  # an edge rings beyond it, and is clipped


def test_writing(tmp_path: Path) -> None:
    write_recording(tmp_path / "a.wav", tone(0.5), RATE)
    info = soundfile.info(tmp_path / "a.wav")
    assert (info.samplerate, info.channels, info.subtype, info.frames) == (RATE, 1, "PCM_16", 400)
    np.testing.assert_allclose(soundfile.read(tmp_path / "a.wav")[0], tone(0.5), rtol=0, atol=2.0**-15)


def bad(path: Path, kind: str) -> None:
    samples = tone(1.0)
    if kind == "empty file":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no audio at all\n" * 100)
    elif kind.startswith("torn"):
        soundfile.write(path, samples, RATE, format=kind.removeprefix("torn "))
        path.write_bytes(path.read_bytes()[:600])
    elif kind == "no samples":
        soundfile.write(path, samples[:0], RATE, format="WAV")
    elif kind == "stereo":
        soundfile.write(path, np.stack([samples, samples], axis=1), RATE, format="WAV")
    else:
        samples[7] = {"NaN": np.nan, "infinite": -np.inf, "loud": 1.5}[kind]
        soundfile.write(path, samples, RATE, format="WAV", subtype="FLOAT")


BAD = {
    "empty file": "not read as audio",
    "text": "not read as audio",
    "torn FLAC": "not read as audio: .*(flac|fseek)",
    "torn WAV": "is torn: 600 of 1644 bytes",
    "no samples": "holds no samples",
    "stereo": "has 2 channels, expected one",
    "NaN": r"sample 7 is nan, expected numbers in \[-1, 1\]",
    "infinite": "sample 7 is -inf, expected",
    "loud": "sample 7 is 1.5, expected",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    path = tmp_path / "bad.wav"
    bad(path, kind)
    assert main(["train", "audio", str(path), "--out", str(tmp_path / "run"), *TINY]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.match(f"sscan train: {re.escape(str(path))}: .*({BAD[kind]})", lines[0]), lines[0]
    assert not (tmp_path / "run").exists()


def test_mistakes(tmp_path: Path, wav: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.wav"
    soundfile.write(other, tone(1.0, 1000), 1000)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("x")
    for arguments, message in [
        ([wav, other], f"{other}: has 1000 Hz, those before have 800; --rate makes them one"),
        ([tmp_path / "folder"], "no file in this folder ends in .wav or .flac"),
        ([tmp_path / "none.wav"], "none.wav: No such file"),
        ([], "audio: files to train on must be named"),
        ([wav, "--length", "40"], "run: length must be a multiple of 16, got 40"),
        ([wav, "--length", "3200"], "1600 samples are too short for windows of 3200"),
        ([wav, "--rate", "0"], "invalid positive integer"),
        ([wav, "--block", "s5"], "invalid choice"),
    ]:
        try:
            code: Any = main(["train", "audio", *TINY, *map(str, arguments), "--out", str(tmp_path / "run")])
        except SystemExit as stopped:
            code = stopped.code
        assert code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_soundfile_is_an_extra(wav: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ValueError, match=re.escape('comes with: pip install "sscan[audio]"')):
        read_recording(wav)


# Baselines


def test_linear_prediction_is_a_code() -> None:
    """It predicts what is predictable, needs all of it for noise, and its tables are distributions."""
    t = np.arange(40_000)
    sine = compress(0.8 * np.sin(0.05 * t) * np.sin(0.0007 * t))
    noise = np.random.default_rng(0).integers(0, 256, 40_000).astype(np.uint8)
    assert LinearPrediction(sine[:36_000]).bits_per_sample(sine, 36_000) < 3
    assert 7.9 < LinearPrediction(noise[:36_000]).bits_per_sample(noise, 36_000) < 9.5
    assert LinearPrediction(sine[:20]).bits_per_sample(sine[:25], 20) < 10  # fewer than it looks back
    silent = np.full(5000, SILENCE, np.uint8)
    assert LinearPrediction(silent[:4000]).bits_per_sample(silent, 4000) < 0.1


def test_linear_prediction_against_a_loop() -> None:
    levels = compress(tone(2.0))
    model = LinearPrediction(levels[:1200])
    x = expand(levels)
    tables, residuals = np.full((24, 16, 511), 0.5), []
    bits = 0.0
    for t in range(levels.size):
        past = sum(w * x[t - 1 - i] for i, w in enumerate(model.weights) if t - 1 - i >= 0)
        predicted = int(compress(np.clip(np.array([past]), -1, 1))[0])
        recent = sum(abs(r) for r in residuals[-16:]) / 16
        place = (min(int(3 * math.log2(1 + recent)), 23), abs(2 * predicted - 255) * 16 // 256)
        residuals.append(int(levels[t]) - predicted)
        if t < 1200:
            tables[(*place, residuals[-1] + 255)] += 1
        else:
            table = tables[place]
            bits -= math.log2(table[residuals[-1] + 255] / table.sum())
    assert math.isclose(model.bits_per_sample(levels, 1200), bits / 400, rel_tol=1e-9)

    # The weights are those of least squares: no other ones predict the training data better.
    def error(weights: Any) -> float:
        padded = np.concatenate([np.zeros(32), x[:1200], np.zeros(32)])
        predicted = sum(w * padded[31 - i : -1 - i] for i, w in enumerate(weights))
        return float(((padded[32:] - predicted) ** 2).sum())

    nudges = 1e-3 * np.random.default_rng(0).standard_normal((20, 32))
    assert all(error(model.weights + nudge) > error(model.weights) for nudge in nudges)


def test_flac_holds_the_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted is a file from which the levels come back."""
    levels = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    kept = []
    write = soundfile.write

    def keeping(file: Any, *arguments: Any, **options: Any) -> None:
        write(file, *arguments, **options)
        kept.append(file)

    monkeypatch.setattr(soundfile, "write", keeping)
    bits = flac_bits_per_sample(levels, RATE)
    assert bits == 8 * len(kept[0].getvalue()) / 5000 > 8
    kept[0].seek(0)
    read = soundfile.read(kept[0], dtype="int16")[0]
    np.testing.assert_array_equal(read // 256 + SILENCE, levels)
    assert flac_bits_per_sample(compress(tone(10.0)), RATE) < 7


# The task


def test_what_is_held_out(tmp_path: Path) -> None:
    """The last tenth, in an order that neither names nor places decide."""
    parts = [tone(1.0, seed=i, frequency=20 + 3 * i) for i in range(20)]
    for folder, order in (("a", range(20)), ("b", reversed(range(20)))):
        (tmp_path / folder).mkdir()
        for name, i in enumerate(order):
            soundfile.write(tmp_path / folder / f"{name:02}.wav", parts[i], RATE, subtype="FLOAT")
    first, second = (Audio(AudioOptions(length=32), sorted((tmp_path / folder).iterdir())) for folder in ("a", "b"))
    np.testing.assert_array_equal(first.data, second.data)
    assert first.data.size - first.held_out == 1600
    levels = {compress(np.float32(part).astype(np.float64)).tobytes() for part in parts}
    assert {first.data[i : i + RATE].tobytes() for i in range(0, 16000, RATE)} == levels
    inputs, targets = first.batch(5)
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    training = first.data[: first.held_out].tobytes()
    assert all(row.astype(np.uint8).tobytes() in training for row in targets)


def test_from_recordings_to_a_wav(tmp_path: Path, wav: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "made.wav"
    assert main(["train", "audio", str(wav), "--out", str(run), "--evaluations", "1", *TINY]) == 0
    said = capsys.readouterr().out
    assert "2.0 s at 800 Hz, 0.2 s of them held out" in said
    assert "1 blocks a stage of a U-Net of width 4, 2 windows of 32 samples a step" in said
    names = "mamba, windows of 32", "mamba, states carried along", "linear prediction", "FLAC", "order-2 back-off"
    line = ", ".join(rf"{name} \d+\.\d\d\d" for name in names)
    assert re.search(f"^held out    {line} bits per sample$", said, re.MULTILINE)
    assert main(["train", "audio", "--resume", str(run), "--steps", "5"]) == 0
    assert "5 steps" in capsys.readouterr().out
    again = TrainingRun.load(run, Audio)
    assert len(again.losses) == 5

    # Generation is the loop of drawing from the forward over everything before.
    arguments = ["generate", str(run), "--prompt-file", str(wav), "-n", "20", "--seed", "3", "--out", str(out)]
    assert main(arguments) == 0
    assert f"written     {out}: 2.02 s, the last 0.03 of them generated" in capsys.readouterr().out
    samples, rate = soundfile.read(out)
    assert (samples.size, rate) == (1620, RATE)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    model, rate = open_audio_model(run)
    assert isinstance(model, SequenceModel)
    assert rate == RATE
    levels = compress(read_recording(wav)[0])
    np.testing.assert_allclose(samples[:1600], expand(levels), atol=2.0**-15)

    def greedy(logits: Any) -> Any:
        return logits.argmax(axis=1)

    got = continued(model, levels[:50], 14, greedy, lambda share: None)  # type: ignore[arg-type]
    expected = levels[:50].tolist()
    for _ in range(14):
        padded = np.array([expected + [0] * (-len(expected) % 16)])
        expected.append(int(model(padded).data[0, len(expected) - 1].argmax()))
    assert got.tolist() == expected

    for more, message in [
        (["--stop", "x"], "--prompt-file takes a recording"),
        (["--samples", "2"], "--samples"),
        (["--seconds", "1"], "--seconds: not beside -n"),
        (["--out", "x.mp3"], "--out: must be a .wav"),
        (["--temperature", "-1"], "temperature must be at least 0"),
    ]:
        assert main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err
    assert main(["generate", str(tmp_path), "--seconds", "1"]) == 2
    assert f"--seconds: {tmp_path} is no model of audio" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--text", str(wav)]) == 2
    assert "is a model of audio" in capsys.readouterr().err


def test_a_run_knows_its_recordings(tmp_path: Path, wav: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", "audio", str(wav), "--rate", "400", "--out", str(run), *TINY]) == 0
    moved = tmp_path / "moved.flac"
    samples, rate = soundfile.read(wav)
    soundfile.write(moved, samples, rate, subtype="PCM_16")
    wav.unlink()
    for arguments, message in [
        ([], "tone.wav: No such file"),
        ([str(moved), "--rate", "800"], "was trained with rate = 400, not 800"),
        ([str(moved), "--block", "s4"], "was trained with block = mamba, not s4"),
    ]:
        assert main(["train", "audio", "--resume", str(run), "--steps", "4", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", "audio", "--resume", str(run), str(moved), "--steps", "4"]) == 0
    samples[5] += 0.1
    soundfile.write(moved, samples, rate, subtype="PCM_16")
    capsys.readouterr()
    assert main(["train", "audio", "--resume", str(run), str(moved), "--steps", "5"]) == 2
    assert f"was trained on other audio than {moved}" in capsys.readouterr().err


def test_models_of_every_block_learn(wav: Path) -> None:
    for block, centre in (("mamba-complex", "s4"), ("mamba-s4", "mamba")):
        options = AudioOptions(d_model=8, length=64, batch=4, steps=40, lr=2e-2, block=block, centre=centre)
        run = TrainingRun(Audio(options, [wav]))
        for _ in range(40):
            run.step()
        assert np.mean(run.losses[-5:]) < run.losses[0] - 1.0, block


def test_spectrogram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw_spectrogram(tmp_path / "a.png", tone(1.0), RATE)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw_spectrogram(tmp_path / "b.png", tone(1.0), RATE)
    assert not (tmp_path / "b.png").exists()
