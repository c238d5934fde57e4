"""Files that are broken or lie, in every way that was thought of: one line that names the file, and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sscan.cli import main
from sscan.nn import MambaLM

if TYPE_CHECKING:
    from collections.abc import Callable

Change = Any  # what becomes of a file: bytes, or a function of its path

MILLION = 10**6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "text").write_text("the rain it raineth every day\n" * 40)
    size = ["--d-model", "8", "--n-layer", "1", "--length", "16", "--batch", "2", "--steps", "2"]
    assert main(["train", "--text", str(folder / "text"), "--out", str(folder / "run"), *size]) == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run of one's own to break."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def one_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert len(err) < 600
    return err


# Files of any kind

NO_FILES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "loop": lambda path: (path.unlink(), path.symlink_to(path)),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(100)),
    "ones": lambda path: path.write_bytes(b"\xff" * 100),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
}
READERS = {
    "config.json": ["generate"],
    "model.safetensors": ["generate"],
    "training.safetensors": ["train", "--resume"],
}


@pytest.mark.parametrize("change", NO_FILES.values(), ids=NO_FILES)
@pytest.mark.parametrize("name", READERS)
def test_no_such_files(name: str, change: Any, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(run / name)
    assert str(run / name) in one_line(capsys, *READERS[name], run)


# config.json

DEEP = b"[" * 100_000


def with_values(**changes: Any) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_block(**changes: Any) -> Callable[[Path], object]:
    return with_values(ssm_cfg=changes)


CONFIGURATIONS: dict[str, Change] = {
    **{f"content_{i}": text for i, text in enumerate([
        b"[]", b"3", b"null", b'"text"', b"{", b"{}}", b"{'d_model': 8}", b"\xff\xfe{}", b'{"d_model": NaN}', DEEP,
        b'{"d_model": 8, "d_model": 8}', b'{"d_model": ' + b"9" * 5000 + b"}", b'{"\xff": 1}', b'{"ssm_cfg": ' + DEEP,
    ])},
    "utf_16": lambda path: path.write_text(path.read_text(), encoding="utf-16"),
    "infinity": lambda path: path.write_text(path.read_text().replace("8", "Infinity", 1)),
    **{f"{name}_{value}": with_values(**{name: value})
       for name in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple")
       for value in (0, -1, 1.5, 8.0, "8", None, [8], {"n": 8}, True, 10**30)},
    **{f"{name}_{value}": with_values(**{name: value})
       for name in ("residual_in_fp32", "fused_add_norm", "tie_embeddings") for value in (1, "yes", None)},
    **{f"ssm_cfg_{value}": with_values(ssm_cfg=value) for value in (None, [], "Mamba1", 3, {"wings": 2}, {"": 1})},
    **{f"layer_{value}": with_block(layer=value) for value in ("Mamba2", None, 1, [])},
    **{f"block_{name}_{value}": with_block(**{name: value})
       for name in ("d_state", "d_conv", "expand", "dt_rank")
       for value in (-1, "16", None, [16], True, 10**30)},
    **{f"block_{name}_{value}": with_block(**{name: value})
       for name in ("dt_min", "dt_max", "dt_scale", "dt_init_floor") for value in (-1, 0, "1", None)},
    **{f"block_{name}": with_block(**{name: 3})
       for name in ("bias", "conv_bias", "dt_init", "discretization", "seed", "dtype", "n_layer", "d_model")},
    "no_columns": with_block(expand=1e-9),
    "other_shape": with_values(d_model=16),
    "untied": with_values(tie_embeddings=False),
    "million_layers": with_values(n_layer=MILLION),
    "million_wide": with_values(d_model=MILLION),
    "attention": with_values(attn_layer_idx=[1]),
    "no_norm": with_values(rms_norm=False),
}  # fmt: skip


@pytest.mark.parametrize("change", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_broken_configurations(change: Change, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "config.json"
    path.write_bytes(change) if isinstance(change, bytes) else change(path)
    # What only the weights contradict is said of them.
    assert f"{run}/" in (said := one_line(capsys, "generate", run))
    assert "config.json:" in said or "model.safetensors:" in said


@pytest.mark.parametrize(
    "change", [with_block(layer="Mamba1"), lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())]
)
def test_configurations_that_are_whole(change: Any, run: Path, trained: Path) -> None:
    change(run / "config.json")
    assert MambaLM.from_pretrained(run).config == MambaLM.from_pretrained(trained).config


# Weights and the state of a run


def with_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change what the header of a safetensors file says."""

    def write(path: Path) -> None:
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return write


def with_arrays(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        arrays, metadata = load_file(path), metadata_of(path)
        change(arrays)
        path.unlink()
        save_file(arrays, path, metadata)

    return write


def metadata_of(path: Path) -> Any:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]).get("__metadata__")


def first(header: dict[str, Any]) -> Any:
    return next(value for name, value in header.items() if name != "__metadata__")


def with_size(size: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])


def to_fp8(header: dict[str, Any]) -> None:
    for value in header.values():
        if value.get("dtype") == "F32":
            value.update(dtype="F8_E4M3", shape=[4 * value["shape"][0], *value["shape"][1:]])


def with_each(end: str, change: Callable[[Any], Any]) -> Callable[[Path], object]:
    """Change the arrays whose names end so."""
    return with_arrays(lambda arrays: arrays.update({n: change(a) for n, a in arrays.items() if n.endswith(end)}))


BROKEN_ARRAYS: dict[str, Any] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "only_length": lambda path: path.write_bytes(path.read_bytes()[:8]),
    "cut_header": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "length_0": with_size(0),
    "length_huge": with_size(2**63),
    "length_short": with_size(17),
    "no_header": lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]"),
    "nothing": lambda path: path.write_bytes(struct.pack("<Q", 2) + b"{}"),
    "dtype_unknown": with_header(lambda h: first(h).update(dtype="F99")),
    "dtype_smaller": with_header(lambda h: first(h).update(dtype="F16")),
    "dtype_fp8": with_header(to_fp8),
    "shape_lies": with_header(lambda h: first(h).update(shape=[2**40])),
    "shape_overflows": with_header(lambda h: first(h).update(shape=[2**62, 2**62])),
    "shape_negative": with_header(lambda h: first(h).update(shape=[-1])),
    "shape_no_list": with_header(lambda h: first(h).update(shape="x")),
    "offsets_outside": with_header(lambda h: first(h).update(data_offsets=[0, 2**50])),
    "offsets_backward": with_header(lambda h: first(h).update(data_offsets=[64, 0])),
    "metadata_no_text": with_header(lambda h: h.update(__metadata__={"run": 3})),
    "integers": with_each(".D", lambda a: a.astype(np.int32)),
    "complex": with_each(".D", lambda a: a.astype(np.complex64)),
    "bytes": with_each(".D", lambda a: a.astype(np.uint8)),
    "too_large": with_each(".D", lambda a: a.astype(np.float64) * 1e300),
    "transposed": with_each("in_proj.weight", lambda a: np.ascontiguousarray(a.T)),
    "flat": with_each("A_log", np.ravel),
    "surplus": with_arrays(lambda a: a.update({"model.wings": np.ones(2), "wings": np.ones(2)})),
    "missing": with_arrays(lambda a: [a.pop(n) for n in list(a) if n.endswith("norm_f.weight")]),
}


@pytest.mark.parametrize("change", BROKEN_ARRAYS.values(), ids=BROKEN_ARRAYS)
@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors"])
def test_broken_arrays(name: str, change: Any, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(run / name)
    assert f"{run / name}: " in one_line(capsys, *READERS[name], run)


def with_run(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change what the training file says about its run."""

    def edit(header: dict[str, Any]) -> None:
        about = json.loads(header["__metadata__"]["run"])
        changed = change(about)
        header["__metadata__"]["run"] = changed if isinstance(changed, str) else json.dumps(about)

    return with_header(edit)


def with_option(name: str, value: Any) -> Callable[[Path], object]:
    return with_run(lambda about: about["options"].update({name: value}))


BROKEN_RUNS: dict[str, Any] = {
    "no_metadata": with_header(lambda h: h.pop("__metadata__")),
    **{f"run_{text}": with_run(lambda about, text=text: text) for text in ("", "{", "[]", "null", "NaN", "{}", "\x00")},
    "deep": with_run(lambda about: DEEP.decode()),
    **{f"no_{name}": with_run(lambda about, name=name: about.pop(name) and None)
       for name in ("task", "options", "about", "seconds")},
    "surplus": with_run(lambda about: about.update(wings=2)),
    **{f"{name}_{value}": with_run(lambda about, name=name, value=value: about.update({name: value}))
       for name, values in {
           "task": (None, 3, "induction", []), "options": (None, [], 3, "x"), "about": (None, [], 3, "x"),
           "seconds": (-1, "1", None, float("nan"), float("inf"), True),
       }.items() for value in values},
    **{f"{name}_{value}": with_run(lambda about, name=name, value=value: about["about"].update({name: value}))
       for name, values in {
           "texts": (None, 3, "x", [], {}, [3]), "sha256": (None, 3), "tokenizer_sha256": (3, [], True), "wings": (2,),
       }.items() for value in values},
    **{f"about_no_{name}": with_run(lambda about, name=name: about["about"].pop(name) and None)
       for name in ("texts", "sha256")},
    "seconds_1e400": with_run(lambda about: json.dumps({**about, "seconds": "x"}).replace('"x"', "1e400")),
    **{f"{name}_{value}": with_option(name, value)
       for name in ("d_model", "n_layer", "length", "batch", "steps", "minutes", "lr", "seed", "precision",
                    "evaluations", "target")
       for value in (-1, "8", [8], {}, True, float("nan"))},
    **{f"{name}_{value}": with_option(name, value)
       for name in ("d_model", "n_layer", "length", "batch", "lr", "seed", "precision", "evaluations")
       for value in (None,)},
    "no_end": with_run(lambda about: about["options"].update(steps=None, minutes=None)),
    "unknown_option": with_option("wings", 2),
    "million_layers": with_option("n_layer", MILLION),
    "million_wide": with_option("d_model", MILLION),
    "huge": with_option("d_model", 10**30),
    "no_losses": with_arrays(lambda a: a.pop("losses")),
    "losses_matrix": with_arrays(lambda a: a.update(losses=np.ones((2, 1)))),
    "losses_float32": with_arrays(lambda a: a.update(losses=a["losses"].astype(np.float32))),
    "losses_short": with_arrays(lambda a: a.update(losses=a["losses"][:1])),
    "no_measures": with_arrays(lambda a: a.pop("measures")),
    "measures_list": with_arrays(lambda a: a.update(measures=np.ones(2))),
    "measures_float32": with_arrays(lambda a: a.update(measures=a["measures"].astype(np.float32))),
    "measures_nan": with_arrays(lambda a: a.update(measures=np.full((1, 2), np.nan))),
    "measures_infinite": with_arrays(lambda a: a.update(measures=np.full((1, 2), np.inf))),
    "measures_beyond": with_arrays(lambda a: a.update(measures=np.array([[3.0, 1.0]]))),
    "no_steps": with_arrays(lambda a: a.pop("optimiser.steps")),
    "steps_float": with_arrays(lambda a: a.update({"optimiser.steps": np.array(2.5)})),
    "steps_negative": with_arrays(lambda a: a.update({"optimiser.steps": np.array(-2)})),
    "steps_list": with_arrays(lambda a: a.update({"optimiser.steps": np.array([2])})),
    "no_moment": with_arrays(lambda a: a.pop("optimiser.backbone.norm_f.weight.m")),
    "moment_integer": with_arrays(lambda a: a.update({"optimiser.backbone.norm_f.weight.m": np.ones(8, np.int64)})),
    "moment_shape": with_arrays(lambda a: a.update({"optimiser.backbone.norm_f.weight.m": np.ones(9)})),
}  # fmt: skip


@pytest.mark.parametrize("change", BROKEN_RUNS.values(), ids=BROKEN_RUNS)
def test_broken_runs(change: Any, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "training.safetensors"
    change(path)
    assert f"{path}: " in one_line(capsys, "train", "--resume", run)


@pytest.mark.parametrize("value", ["/no/such/file", "", "/dev/zero", "a\0b", "/"])
def test_runs_whose_text_is_gone(value: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_run(lambda about: about["about"].update(texts=[value]))(run / "training.safetensors")
    one_line(capsys, "train", "--resume", run)


def test_a_wrong_configuration_is_refused_before_anything_is_built(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sscan.nn import language_model

    built: list[int] = []
    monkeypatch.setattr(language_model, "ResidualBlock", lambda *a: built.append(1))
    with_values(n_layer=MILLION)(run / "config.json")
    assert "too few for n_layer = 1000000" in one_line(capsys, "generate", run)
    assert not built
