"""A trained Mamba of somebody else's, with weights and reference from PyPI: ``nox -s typeseg``."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import assert_within, eps_of
from typeseg import _numpy_backend, _runtime, _tokenize

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "classify_bytes.py"
MIXED = b'{"name": "sscan", "size": [1, 2]}\n\ndef f(x):\n    return x\n\n<p>caf\xc3\xa9</p>\n\x00SELECT * FROM t;\n'


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("typeseg_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("text", [MIXED, Path(__file__).read_bytes()[:1500], b"x"], ids=["mixed", "python", "one"])
def test_logits_are_those_of_the_package(text: bytes, example: Any) -> None:
    """By its own NumPy reference, in float32 as ours, and ours in float64."""
    weights = _runtime._weights("mamba_al.npz")
    theirs = _numpy_backend.mamba_forward(weights, _tokenize.text_to_bytes(text.decode("utf-8")))
    tokens = example.tokens_of(text)
    made = example.logits(example.load(), tokens)
    exact = example.logits(example.load(np.float64), tokens)
    assert made.dtype == np.float32
    assert_within(made, theirs, exact, eps_of(np.float32), "logits")
    assert (made.argmax(1) == theirs.argmax(1)).all()


def test_it_knows_languages(example: Any, tmp_path: Path) -> None:
    """It was trained: most of this file is Python, and the command says so."""
    labels = example.logits(example.load(), example.tokens_of(Path(__file__).read_bytes())).argmax(1)
    counts = np.bincount(labels)
    (tmp_path / "file").write_bytes(Path(__file__).read_bytes())
    command = [sys.executable, str(EXAMPLE), str(tmp_path / "file")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert counts.max() > 0.9 * len(labels)
    assert said.startswith("python ")
