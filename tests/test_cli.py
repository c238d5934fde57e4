"""The command line at a tiny size: training, stopping, resuming, generating; every mistake is one line and code 2."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sscan import cli
from sscan.cli import _devices, _output, main
from sscan.models.files import load_arrays, remove_leftovers, save_arrays, write_atomically
from sscan.nn import MambaLM
from sscan.tasks import text as texts
from sscan.tasks.backoff import BackoffModel
from sscan.tasks.task import RunOptions
from sscan.tasks.text import Text, mean_nats, overlapping_windows, random_windows
from sscan.tasks.training import TrainingRun

ROOT = Path(__file__).parent.parent
TINY = ["--d-model", "8", "--n-layer", "1", "--length", "16", "--batch", "2"]
POEM = "the rain it raineth every day, and the wind and the rain. café.\n" * 40


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "poem.txt"
    path.write_text(POEM, encoding="utf-8")
    return path


@pytest.fixture
def checkpoint(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    folder = tmp_path / "checkpoint"
    assert main(["train", "--text", str(text), "--out", str(folder), "--steps", "2", *TINY]) == 0
    capsys.readouterr()
    return folder


RUN_FILES = {
    "config.json", "model.safetensors", "training.safetensors", "log.jsonl", "loss.png",
    "best/config.json", "best/model.safetensors",
}  # fmt: skip


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.suffix == ".new"}


def contents_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_in(folder)}


def load(folder: Path, **changes: Any) -> TrainingRun[Text]:
    return TrainingRun.load(folder, Text, changes=changes)


# Training


def test_train_from_start_to_end(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "run"
    assert main(["train", "--text", str(text), "--out", str(folder), "--steps", "30", *TINY]) == 0
    out, err = capsys.readouterr()
    for part in (
        "2,600 bytes, the last 260",
        "parameters in 1 Mamba blocks of width 8",
        "held out    Mamba",
        "order-2 back-off",
    ):
        assert part in out
    assert "100%  step 30  loss" in err  # standard error is no terminal here: plain lines
    assert "\r" not in err
    assert files_in(folder) == RUN_FILES
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    run = load(folder)
    assert len(run.losses) == 30
    assert run.losses[-1] < run.losses[0]
    printed = float(out.split("held out    Mamba ")[1].split(",")[0])
    nats = mean_nats(run.model, run.task.bytes, 2340, 16, 2)
    assert printed == pytest.approx(nats / np.log(2), abs=1e-3)


def test_defaults() -> None:
    assert dataclasses.asdict(RunOptions()) == {
        "d_model": 96, "n_layer": 6, "length": 256, "batch": 4, "lr": 1.2e-2, "seed": 0, "steps": None, "minutes": 2.0,
        "precision": "float32", "evaluations": 10, "target": None,
    }  # fmt: skip
    train, generate = (vars(cli._parser().parse_args(words)) for words in (["train"], ["generate", "x"]))
    given = {name for name, value in train.items() if value is not None}
    assert given == {"name", "command", "device"}  # everything else is RunOptions' to say
    assert train["device"] == "cpu"
    del generate["command"]
    assert generate == {
        "name": "generate", "model": "x", "prompt": None, "prompt_file": None, "stdin": None, "tokens": None,
        "temperature": None, "out": None, "seconds": None,
        "top_k": None, "top_p": None, "min_p": None, "repetition_penalty": 1.0, "stop": [],
        "eos": None, "samples": 1, "seed": 0, "tokenizer": None, "device": "cpu", "dtype": None,
    }  # fmt: skip
    assert (_output.SAMPLE_TOKENS, _output.TEMPERATURE) == (400, 0.8)  # of texts, where neither is given


def test_train_for_a_time(text: Path, tmp_path: Path) -> None:
    run = TrainingRun(Text(RunOptions(8, 1, 16, 2, minutes=0.2 / 60), [text]))
    while run.progress < 1:
        run.step()
    assert run.seconds >= 0.2
    assert run.optimiser.lr < 3e-3


def test_default_text_and_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(texts, "HELD_OUT", 0.001)
    for number in (1, 2):
        assert main(["train", "--steps", "1", *TINY]) == 0
        assert (tmp_path / "runs" / f"topics-{number}" / "model.safetensors").exists()
    assert "pydoc_data" in capsys.readouterr().out


def arrays_of(folder: Path) -> dict[str, Any]:
    return load_arrays(folder / "training.safetensors")[0] | load_arrays(folder / "model.safetensors")[0]


def test_interrupted_and_resumed_equals_uninterrupted(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--text", str(text), "--steps", "7", *TINY]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0

    step = TrainingRun.step

    def interrupted_step(run: TrainingRun) -> None:
        step(run)
        if len(run.losses) == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "step", interrupted_step)
        assert main([*arguments, "--out", str(tmp_path / "parts")]) == 130
    assert "--resume" in capsys.readouterr().err
    MambaLM.from_pretrained(str(tmp_path / "parts"))  # usable as it is
    assert len(load(tmp_path / "parts").losses) == 3
    assert main(["train", "--resume", str(tmp_path / "parts")]) == 0

    whole, parts = arrays_of(tmp_path / "whole"), arrays_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(parts[name], array, err_msg=name)


def test_resume_can_make_a_run_longer(checkpoint: Path) -> None:
    assert main(["train", "--resume", str(checkpoint), "--steps", "4"]) == 0
    assert len(load(checkpoint).losses) == 4
    run = load(checkpoint, steps=None, minutes=1.0)
    assert 0 < run.progress < 1


ENVIRONMENT = {
    # Buffered as a user's, whatever the tests are run with: what cannot be written is then noticed late.
    "env": {k: x for k, x in os.environ.items() if k != "PYTHONUNBUFFERED"}
    | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
}
COMMAND = [sys.executable, "-m", "sscan.cli"]


def endless_training(text: Path, tmp_path: Path, **options: Any) -> subprocess.Popen[str]:
    """A run that has begun its steps, and does not end by itself."""
    process = subprocess.Popen(
        [*COMMAND, "train", "--text", str(text), "--steps", "10000000", *TINY, "--out", "run"],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True, **ENVIRONMENT, **{"stderr": subprocess.PIPE, **options},
    )  # fmt: skip
    assert process.stdout is not None
    while "kernels" not in process.stdout.readline():
        assert process.poll() is None
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_a_usable_checkpoint(number: signal.Signals, text: Path, tmp_path: Path) -> None:
    process = endless_training(text, tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "stopped; continue with" in err
    assert "Traceback" not in err
    assert len(load(tmp_path / "run").losses) < 10000000


def test_ignored_signals_stay_ignored(text: Path, tmp_path: Path) -> None:
    process = endless_training(text, tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))  # nohup
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_terminal_that_is_closed(text: Path, tmp_path: Path) -> None:
    """Its processes get SIGHUP, perhaps twice, and can write nothing more."""
    command = [*COMMAND, "train", "--text", str(text), "--steps", "10000000", *TINY, "--out", str(tmp_path / "run")]
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), **ENVIRONMENT,  # noqa: PLW1509
    )  # fmt: skip
    os.close(theirs)
    said = b""
    while b"tokens/s" not in said:  # which is not said before the first step
        said += os.read(ours, 1000)
    time.sleep(1)
    os.close(ours)
    time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert len(load(tmp_path / "run").losses) > 1


def test_what_a_killed_run_left_is_removed(checkpoint: Path, text: Path) -> None:
    killed = checkpoint / ".training.safetensors.123.new"
    killed.mkdir()
    (killed / ".tmpAbCdEf").write_bytes(b"half")
    (checkpoint / ".model.safetensors.1.new").write_bytes(b"half, of sscan 0.3")
    (checkpoint / "best" / ".model.safetensors.123.new").mkdir()
    (checkpoint / ".notes.new").write_text("the user's")
    assert main(["train", "--resume", str(checkpoint), "--steps", "3"]) == 0
    assert files_in(checkpoint) == RUN_FILES | {".notes.new"}


def test_killed_while_saving(text: Path, tmp_path: Path) -> None:
    """Everything on the way to a checkpoint stands in folders that the next start removes."""
    program = (
        "import os, signal, sys; from pathlib import Path; from sscan.models import files\n"
        "files.os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.save_arrays(Path(sys.argv[1]), {'a': files.np.ones(3)})"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.safetensors")], check=False, **ENVIRONMENT)
    assert run.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir() if path != text] != []
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_are_what_the_umask_says(umask: int, checkpoint: Path) -> None:
    before = os.umask(umask)
    try:
        assert main(["train", "--resume", str(checkpoint), "--steps", "3"]) == 0
    finally:
        os.umask(before)
    for name in RUN_FILES - {"log.jsonl"}:  # which is as old as the run
        assert (checkpoint / name).stat().st_mode & 0o777 == 0o666 & ~umask, name


@pytest.mark.parametrize("steps", ["1", "2", "3", "50"])
def test_learning_rates_that_ruin_the_model(
    steps: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    command = ["train", "--text", text, "--out", folder, *TINY, "--lr", "1e30", "--steps"]
    if steps == "1":  # whose rate is still 0
        assert main([*map(str, command), steps]) == 0
        assert "nan" not in capsys.readouterr().out
    else:
        assert main([*map(str, command), steps]) == 2
        *progress, said = capsys.readouterr().err.splitlines()
        assert len(progress) == (steps == "2")
        assert said.startswith("sscan train: the loss is ")
        assert said.endswith("; try a smaller --lr")
        assert not [name for name in files_in(folder) if not name.startswith(("best/", "log"))]
        if steps != "50":  # the first step changes nothing, and what it left was evaluated
            assert np.isfinite(MambaLM.from_pretrained(folder / "best")(np.zeros((1, 3), np.int64)).data).all()


def test_a_ruined_model_does_not_replace_a_good_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents_of(checkpoint)
    run = load(checkpoint, steps=4)
    run.model.backbone.layers[0].mixer.D.data[3] = np.nan
    with pytest.raises(FloatingPointError, match=r"backbone\.layers\.0\.mixer\.D is not finite after 2 steps"):
        run.save(checkpoint)
    run = load(checkpoint, steps=4)
    run.model.backbone.norm_f.weight.data[:] = 1e38  # finite, as is the next, and the loss is not
    run.model.backbone.embedding.weight.data[:] *= 1e10
    with pytest.raises(FloatingPointError, match="the loss is"):
        run.save(checkpoint)
    assert contents_of(checkpoint) == before


def test_models_that_are_ruined_generate_nothing(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    arrays = load_arrays(path)[0]
    arrays["backbone.norm_f.weight"][0] = np.nan
    save_arrays(path, arrays)
    for options in ([], ["--temperature", "0"]):
        run = subprocess.run(
            [*COMMAND, "generate", str(checkpoint), *options], capture_output=True, check=False, **ENVIRONMENT
        )
        assert run.returncode == 1
        assert run.stdout.strip() == b""
        assert (
            run.stderr.decode() == "sscan generate: the model's logits are NaN or infinite; its parameters are broken\n"
        )


def test_windows_of_one_byte(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--text", str(text), "--out", str(tmp_path / "run"), "--steps", "2", *TINY, "--length", "1"]
    assert main(command) == 0
    assert "held out    Mamba" in capsys.readouterr().out


def test_without_matplotlib(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["train", "--text", str(text), "--out", str(tmp_path / "run"), "--steps", "2", *TINY]) == 0
    line = 'curve       not drawn, for want of matplotlib; it comes with: pip install "sscan[plot]"\n'
    assert line in capsys.readouterr().out
    assert not (tmp_path / "run" / "loss.png").exists()


def test_train_in_bfloat16(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--text", str(text), "--out", str(tmp_path / "run"), "--steps", "20", "--precision", "bfloat16"]
    assert main([*command, *TINY]) == 0
    assert "device      cpu, bfloat16" in capsys.readouterr().out
    run = load(tmp_path / "run")
    assert run.model(np.zeros((1, 3), np.int64)).dtype == np.float32
    assert run.model.backbone(np.zeros((1, 3), np.int64)).dtype == ml_dtypes.bfloat16
    floats = {name: array.dtype for name, array in arrays_of(tmp_path / "run").items() if array.dtype.kind != "i"}
    assert {dtype for name, dtype in floats.items() if name not in ("losses", "measures")} == {np.dtype(np.float32)}
    assert run.losses[-1] < run.losses[0]
    assert "was trained with precision = bfloat16, not float32" in mistake(
        capsys, "train", "--resume", tmp_path / "run", "--precision", "float32"
    )
    assert main(["generate", str(tmp_path / "run"), "-n", "3"]) == 0


def test_step_with_infinite_loss_changes_nothing(text: Path) -> None:
    run = TrainingRun(Text(RunOptions(8, 1, 16, 2, steps=2), [text]))
    run.model.backbone.norm_f.weight.data[:] = np.inf
    before = {name: array.copy() for name, array in run.model.state_dict().items()}
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        run.step()
    for name, array in run.model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_failed_writes_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write(new: Path) -> None:
        new.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# Generating and the installation


def test_generate(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(checkpoint), "--prompt", "the rain", "-n", "40", "--seed", "3"]
    outputs = []
    for _ in range(2):
        assert main(command) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("the rain")
    assert main([*command, "--temperature", "0", "--top-k", "5", "--top-p", "0.9"]) == 0


def generate_control_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says: escape, bell, a, delete, C1's escape in UTF-8, half a character, a tab."""
    said = b"\x1b[31m\x07a\x7f\xc2\x9b\xc3(\t"

    def generate(model: MambaLM, prompts: object, n: int, *drawing: object, streamer: Any, **options: object) -> None:
        for byte in said:
            streamer(0, byte)

    monkeypatch.setattr(MambaLM, "generate", generate)


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding, newline="\n")

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", "café\\x1b[31m\\x07a\\x7f\\x9b\ufffd(\t\n"), ("ascii", "caf?\\x1b[31m\\x07a\\x7f\\x9b?(\t\n")],
)
def test_terminals_show_control_characters(
    encoding: str, shown: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_control_bytes(monkeypatch)
    terminal = Terminal(encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "__stdout__", terminal)
    assert main(["generate", str(checkpoint), "--prompt", "café"]) == 0
    assert terminal.buffer.getvalue().decode(encoding) == shown  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_pipes_get_the_bytes(encoding: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_control_bytes(monkeypatch)
    pipe = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setattr(sys, "__stdout__", pipe)
    assert main(["generate", str(checkpoint), "--prompt", "café"]) == 0
    assert pipe.buffer.getvalue() == b"caf\xc3\xa9\x1b[31m\x07a\x7f\xc2\x9b\xc3(\t\n"  # type: ignore[attr-defined]


def test_reader_that_leaves_early(checkpoint: Path) -> None:
    command = f"{sys.executable} -m sscan.cli generate {checkpoint} -n 300 | head -c 1"
    run = subprocess.run(command, shell=True, capture_output=True, check=True, **ENVIRONMENT)
    assert run.stderr == b""


def shell(command: str) -> tuple[int, list[str]]:
    """Exit code and lines on standard error of `sscan` in a shell's command."""
    command = command.replace("sscan ", f"{sys.executable} -m sscan.cli ", 1)
    run = subprocess.run(
        ["bash", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **ENVIRONMENT
    )
    return run.returncode, run.stderr.splitlines()


@pytest.mark.parametrize("command", ["--version", "--help", "", "info", "train --help", "generate {} -n 3"])
def test_output_that_nobody_takes(command: str, checkpoint: Path) -> None:
    command = command.format(checkpoint)
    name = " ".join(["sscan", *[word for word in command.split()[:1] if not word.startswith("-")]])
    name = "sscan" if "--help" in command else name
    assert shell(f"sscan {command} > /dev/full") == (1, [f"{name}: No space left on device"])
    assert shell(f"sscan {command} >&-") == (1, ["sscan: standard output is closed"])
    assert shell(f"sscan {command} > /dev/full 2>&1") == (1, [])
    assert shell(f"sscan {command} > /dev/null 2>&-") == (0, [])


def test_errors_that_nobody_reads() -> None:
    for command in ("fly", "generate missing"):
        assert shell(f"sscan {command} 2>/dev/full") == (2, [])
        assert shell(f"sscan {command} 2>&-") == (2, [])


def test_a_notice_that_there_is_no_room_for(tmp_path: Path) -> None:
    """Libraries write to standard error too, as matplotlib does when it builds its cache for long."""
    program = "import logging, sys; from sscan.cli import main; logging.warning('notice'); sys.exit(main(['info']))"
    run = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{program}" 2>/dev/full'], cwd=tmp_path, capture_output=True, check=False,
        **ENVIRONMENT,
    )  # fmt: skip
    assert run.returncode == 0


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_training_that_nobody_watches(stderr: str, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert shell(f"sscan train --text {text} --out {out} --steps 3 {' '.join(TINY)} {stderr}") == (0, [])
    assert len(load(out).losses) == 3


def test_no_room_for_a_checkpoint(checkpoint: Path) -> None:
    before = contents_of(checkpoint)
    # A limit on the size of files fails as a full disk does, in the middle of writing.
    command = f"ulimit -f 8; sscan train --resume {checkpoint} --steps 3"
    code, lines = shell(command)
    assert code == 1
    assert len(lines) == 2  # the progress, and
    assert "model.safetensors: " in lines[1]
    assert "File too large" in lines[1]
    after = contents_of(checkpoint)
    assert after.pop("log.jsonl").startswith(before.pop("log.jsonl"))
    assert after == before


def test_too_little_memory(text: Path, tmp_path: Path) -> None:
    command = f"sscan train --text {text} --out {tmp_path / 'run'} --batch 1000000000000"
    code, lines = shell(command)
    assert (code, len(lines)) == (1, 1)
    assert lines[0].startswith("sscan train: not enough memory")


def test_without_a_command_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    bare = capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert bare == capsys.readouterr()
    assert bare.out.startswith("usage: sscan")


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for part in ("sscan ", "numpy 2", "numba 0", "threads", "cache ", "CUDA "):
        assert part in out


class CUDARuntimeError(RuntimeError):
    """As CuPy calls it."""


def pretend(monkeypatch: pytest.MonkeyPatch, driver: int = 13000, gpus: int = 0, **versions: str) -> None:
    """Some driver, GPUs and versions of CuPy and numba-cuda, whatever this machine has."""

    def count() -> int:
        if not gpus:
            raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return gpus

    gpu = {"name": b"NVIDIA H200", "major": 9, "minor": 0, "totalGlobalMem": 140 << 30}
    runtime = SimpleNamespace(
        driverGetVersion=lambda: driver, runtimeGetVersion=lambda: 13020, getDeviceCount=count,
        getDeviceProperties=lambda i: gpu, CUDARuntimeError=CUDARuntimeError,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    installed = {"cupy": "14.2.0", "numba-cuda": "0.30.4"} | {k.replace("_", "-"): v for k, v in versions.items()}
    version = _devices.version
    monkeypatch.setattr(_devices, "version", lambda name: installed.get(name) or version(name))


def test_info_about_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretend(monkeypatch, gpus=2)
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith("cupy 14.2.0, numba-cuda 0.30.4")
    assert lines[-3:] == [
        "CUDA        the driver supports CUDA 13.0, CuPy brings CUDA 13.2",
        "            GPU 0: NVIDIA H200, compute capability 9.0, 140 GiB",
        "            GPU 1: NVIDIA H200, compute capability 9.0, 140 GiB",
    ]
    pretend(monkeypatch)
    assert main(["info"]) == 0
    assert "CUDA        no GPU can be used: cudaErrorNoDevice" in capsys.readouterr().out


# Mistakes


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"cupy": "-"}, 'CuPy is not installed; it comes with: pip install "sscan[cuda13]" (or cuda12)'),
        ({"numba_cuda": "-"}, "numba-cuda is not installed; it comes with"),
        ({"driver": 0}, "there is no NVIDIA driver"),
        ({"gpus": 0}, "cudaErrorNoDevice: no CUDA-capable device is detected"),
    ],
)
def test_training_without_a_gpu(
    machine: dict[str, Any], message: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pretend(monkeypatch, **machine)
    said = mistake(capsys, "train", "--text", text, "--out", tmp_path / "run", "--device", "cuda")
    assert said.startswith(f"sscan train: --device cuda: {message}")
    assert not (tmp_path / "run").exists()


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that the command says about a mistake."""
    try:
        code: Any = main([str(argument) for argument in arguments])
    except SystemExit as exit:  # argparse
        code = exit.code
    _, err = capsys.readouterr()
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("sscan")
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--wings"], "unrecognized arguments: --wings"),
        (["train", "text.txt"], "; texts are given with --text FILE (try sscan train --help)"),
        (["train", "--steps", "0"], "invalid positive integer value: '0'"),
        (["train", "--minutes", "nan"], "invalid positive number value: 'nan'"),
        (["train", "--steps", "3", "--minutes", "1"], "not allowed with argument"),
        (["train", "--precision", "float8"], "invalid choice: 'float8'"),
        (["train", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["train", "--text", "missing.txt"], "missing.txt: No such file or directory"),
        (["train", "--tokenizer", "missing.json"], "missing.json"),
        (["train", "--target", "0"], "invalid positive number value: '0'"),
        (["train", "--resume", "missing"], "No such file or directory"),
        (["train", "--resume", "missing", "--out", "other"], "--out: a resumed run stays in the folder"),
        (["generate", "missing"], "missing/config.json: No such file or directory"),
        (["generate", "missing", "--prompt", ""], "--prompt: one byte at least"),
        (["generate", "missing", "-n", "9" * 20], "--tokens and --samples: that is 2^63 tokens or more"),
        (["generate", "missing", "--samples", "9" * 20], "--tokens and --samples: that is 2^63 tokens or more"),
        (["generate", "missing", "--prompt", "\udcff"], "--prompt: not valid text"),
        (["generate", ""], "invalid path value: ''"),
        (["train", "--out", ""], "invalid path value: ''"),
        (["train", "--text", ""], "invalid path value: ''"),
        (["train", "--resume", ""], "invalid path value: ''"),
        (["train", "--text", "/dev/zero"], "/dev/zero: not a regular file"),
        (["train", "--seed", "-1"], "seed must be at least 0"),
        (["train", "--d-model", "9" * 30], "d_model"),
        (["train", "--length", "9" * 30], "length must be below 2^63"),
    ],
)
def test_mistakes_in_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in mistake(capsys, *arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"text\0text" * 100, "is not text: byte 4 is NUL"),
        (b"too short", "is too short: 9 bytes for windows of 16"),
    ],
)
def test_files_that_are_no_text(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert message in mistake(capsys, "train", "--text", path, "--out", tmp_path / "run", *TINY)
    assert not (tmp_path / "run").exists()


def test_runs_that_do_not_fit(checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "was trained with d_model = 8, not 9" in mistake(capsys, "train", "--resume", checkpoint, "--d-model", "9")
    assert "holds a run already" in mistake(capsys, "train", "--text", text, "--out", checkpoint)
    other = tmp_path / "other.txt"
    other.write_text(POEM.replace("rain", "snow"), encoding="utf-8")
    assert "was trained on another text" in mistake(capsys, "train", "--resume", checkpoint, "--text", other)
    text.unlink()
    assert f"{text}: No such file" in mistake(capsys, "train", "--resume", checkpoint)


@pytest.mark.parametrize("again", ["new", "resumed"])
def test_one_command_at_a_time(
    again: str, checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of a run that has no checkpoint yet is taken, too."""
    folder = checkpoint if again == "resumed" else tmp_path / "new"
    folder.mkdir(exist_ok=True)
    how = ["--resume", folder, "--steps", 4] if again == "resumed" else ["--text", text, "--out", folder, "--steps", 2]
    arguments = ["train", *map(str, how), *([] if again == "resumed" else TINY)]
    lock, before = os.open(folder, os.O_RDONLY), contents_of(folder)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert f"{folder}: another command is at it" in mistake(capsys, *arguments)
    assert contents_of(folder) == before
    os.close(lock)
    assert main(arguments) == 0


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "log.jsonl", "best"])
def test_what_lies_in_a_folder_is_not_written_over(
    name: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does it pass for a part of the new run."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).mkdir() if name == "best" else (folder / name).write_text("mine")
    line = mistake(capsys, "train", "--text", text, "--out", folder, *TINY)
    assert f"{folder} holds {name} of something else; remove that, or name another folder" in line
    assert os.listdir(folder) == [name]


def test_a_folder_in_which_nothing_was_done_is_removed(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(run: TrainingRun) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingRun, "warm_up", stopped)
    assert main(["train", "--text", str(text), "--out", str(tmp_path / "run"), "--steps", "2", *TINY]) == 130
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_are_broken(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = checkpoint / "config.json"
    values = json.loads(config.read_text())
    for change, message in [
        ({"d_model": 12}, "'backbone.embedding.weight' has shape (256, 8), expected (256, 12)"),
        ({"n_layer": 2}, "missing key 'backbone.layers.1.norm.weight'"),
        ({"wings": 2}, "MambaConfig: wings = 2 is not supported"),
    ]:
        config.write_text(json.dumps(values | change))
        assert message in mistake(capsys, "generate", checkpoint)
    config.write_text("[]")
    assert "config.json: holds no JSON object, but list" in mistake(capsys, "generate", checkpoint)
    config.write_text("{")
    mistake(capsys, "generate", checkpoint)
    config.write_text(json.dumps(values))
    assert "temperature must be at least 0" in mistake(capsys, "generate", checkpoint, "--temperature", "-1")
    for name, command in [("model.safetensors", ["generate"]), ("training.safetensors", ["train", "--resume"])]:
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[:-5])
        mistake(capsys, *command, checkpoint)
    (checkpoint / "training.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:0])
    mistake(capsys, "train", "--resume", checkpoint)


# Data and baseline


def test_every_held_out_byte_is_a_target_once() -> None:
    data = (np.arange(1000) % 251 + 1).astype(np.uint8)
    for start, length in [(900, 16), (900, 15), (993, 64), (901, 32)]:
        inputs, targets = overlapping_windows(data, start, length)
        assert inputs.shape == targets.shape
        counted = targets != -100
        assert counted.sum() == 1000 - start
        np.testing.assert_array_equal(np.sort(targets[counted]), np.sort(data[start:]))
        np.testing.assert_array_equal(inputs[counted] % 251 + 1, targets[counted])  # the byte before it
        assert np.flatnonzero(counted.any(axis=0)).min() >= length // 2 - 1


def test_training_windows_stay_inside_and_depend_on_seed_and_step() -> None:
    data = np.arange(1, 41, dtype=np.uint8)
    inputs, targets = random_windows(data, 200, 8, seed=1, step=2)
    np.testing.assert_array_equal(inputs + 1, targets)
    assert (inputs.min(), targets.max()) == (1, 40)
    np.testing.assert_array_equal(random_windows(data, 200, 8, seed=1, step=2)[0], inputs)
    assert (random_windows(data, 200, 8, seed=1, step=3)[0] != inputs).any()


@pytest.mark.parametrize("order", [0, 1, 2, 4])
def test_baseline_probabilities_add_up_to_one(order: int) -> None:
    model = BackoffModel(np.frombuffer(POEM.encode(), np.uint8), order)
    for context in (b"the ", b"rain", b"zzzz", b"zthe", b"\xff\xfe\xfd\xfc"):
        total = sum(
            model.probabilities(np.frombuffer(context + bytes([byte]), np.uint8), len(context))[0]
            for byte in range(256)
        )
        assert total == pytest.approx(1, abs=1e-12)


def test_baseline_by_hand() -> None:
    model = BackoffModel(np.frombuffer(b"abacab", np.uint8), order=1)
    unigram = {"a": (3 + 3 / 256) / 9, "b": (2 + 3 / 256) / 9, "c": (1 + 3 / 256) / 9}
    after_a = {"b": (2 + 2 * unigram["b"]) / 5, "c": (1 + 2 * unigram["c"]) / 5}
    p = model.probabilities(np.frombuffer(b"abac", np.uint8), 1)
    np.testing.assert_allclose(p, [after_a["b"], (1 + unigram["a"]) / 2, after_a["c"]], rtol=1e-14)


def test_baseline_learns_from_context() -> None:
    data = np.frombuffer(POEM.encode(), np.uint8)
    bits = [BackoffModel(data[:2000], order).bits_per_byte(data, 2000) for order in range(4)]
    highest = BackoffModel(data[:2000], 3)
    assert bits == [highest.bits_per_byte(data, 2000, order) for order in range(4)]
    assert bits == sorted(bits, reverse=True)
