"""``sscan generate``, ``evaluate`` and ``convert`` on models of any vocabulary, from anywhere."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from test_models import assert_same_bits, load, parameters_of, perturbed

import sscan.nn
from sscan.cli import main
from sscan.models import MambaConfig
from sscan.models.tokens import Bytes, Tokens, vocabulary_of

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "the rain it raineth every day, für Elise, 日本 and a hey, ho, the wind and the rain\n" * 30
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-pair tokenizer as those of the released models, trained on the text."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([TEXT], trainer)
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(scope="module")
def folder(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of words in transformers' format, with more rows than words, and its tokenizer."""
    made = tmp_path_factory.mktemp("model")
    size = tokenizers.Tokenizer.from_file(str(words)).get_vocab_size()
    perturbed(MambaConfig(16, 2, size + 5)).save_pretrained(made, "transformers")
    (made / "tokenizer.json").write_bytes(words.read_bytes())
    return made


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bytes")
    perturbed(MambaConfig(16, 2, 256)).save_pretrained(made)
    return made


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


# sscan generate


def test_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "generate", folder, "--prompt", "the rain", "-n", "30", "--seed", "4")
    words = Tokens(folder / "tokenizer.json")
    model = sscan.nn.MambaLM.from_pretrained(folder)
    made = model.generate(words.encode(b"the rain"), 30, 0.8, seed=4, eos=words.token(END), vocab_size=words.size)[0]
    assert made.max() < words.size
    assert out == "the rain" + words.decode(made.tolist()) + "\n"
    assert words.token(END) == 0
    assert words.token("nothing") is None


def test_words_are_written_in_whole_characters(folder: Path) -> None:
    words = Tokens(folder / "tokenizer.json")
    text = "日本, für 日本"
    ids = words.encode(text.encode())
    write = words.writer()
    parts = [write(token) for token in ids]
    assert b"".join(parts).decode() == text
    for part in parts:
        part.decode()
    assert len(ids) > 5


def test_samples_and_files_and_pipes(
    of_bytes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["-n", "12", "--seed", "3"]
    one = said(capsys, "generate", of_bytes, "--prompt", "rain", *options)
    two = said(capsys, "generate", of_bytes, "--prompt", "rain", "-n", "12", "--seed", "4")
    assert one != two
    assert said(capsys, "generate", of_bytes, "--prompt", "rain", *options, "--samples", "2") == f"{one}\n{two}"
    (tmp_path / "prompt").write_bytes(b"rain")
    assert said(capsys, "generate", of_bytes, "--prompt-file", tmp_path / "prompt", *options) == one
    for arguments in (["-"], ["--prompt-file", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"rain")))
        assert said(capsys, "generate", of_bytes, *arguments, *options) == one


@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_stop(kind: str, folder: Path, of_bytes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is written ends before the text; nothing of it, and nothing less, is left out."""
    command = ["generate", folder if kind == "words" else of_bytes, "--prompt", "rain", "-n", "40", "--seed", "5"]
    whole = said(capsys, *command).rstrip("\n")
    for at, length in ((11, 1), (14, 3), (20, 2)):
        stop = whole[at : at + length]
        if "\ufffd" in stop:
            continue
        assert said(capsys, *command, "--stop", stop, "--stop", "never said") == whole[: whole.find(stop, 4)] + "\n"
    assert said(capsys, *command, "--stop", "never said") == whole + "\n"


def test_options_reach_the_sampler(of_bytes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", of_bytes, "--prompt", "rain", "-n", "40"]
    greedy = said(capsys, *command, "--temperature", "0")
    assert said(capsys, *command, "--top-k", "1") == greedy
    assert said(capsys, *command, "--top-p", "0.000001") == greedy
    assert said(capsys, *command, "--min-p", "1") == greedy
    assert said(capsys, *command, "--temperature", "0", "--repetition-penalty", "50") != greedy
    assert said(capsys, *command) != greedy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-p", "2"], "min_p must be in [0, 1], got 2.0"),
        (["--repetition-penalty", "0"], "repetition_penalty must be finite and above 0"),
        (["--prompt-file", "missing"], "missing: No such file or directory"),
        (["-", "--prompt", "a"], "not allowed with argument"),
        (["--tokenizer", "missing"], "missing/tokenizer.json: No such file or directory"),
        (["--samples", "0"], "invalid positive integer value"),
        (["--stop", ""], "--stop: must not be an empty text"),
    ],
)
def test_mistakes(arguments: list[str], message: str, of_bytes: Path) -> None:
    run = [sys.executable, "-m", "sscan.cli", "generate", str(of_bytes), *arguments]
    made = subprocess.run(run, capture_output=True, text=True, check=False)
    assert made.returncode == 2
    assert message in made.stderr
    assert made.stderr.count("\n") == 1
    assert not made.stdout


def test_vocabularies_that_do_not_fit(
    folder: Path, of_bytes: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "tokenizer.json has 300 tokens, more than the 256 of the model" in mistake(
        capsys, "generate", of_bytes, "--tokenizer", words
    )
    perturbed(MambaConfig(16, 2, 300)).save_pretrained(tmp_path)
    assert f"{tmp_path} has a vocabulary of 300, not the 256 bytes, and no tokenizer.json" in mistake(
        capsys, "generate", tmp_path
    )
    assert said(capsys, "generate", tmp_path, "--tokenizer", words, "-n", "3").startswith("\n")
    (tmp_path / "tokenizer.json").write_text("{")
    assert f"{tmp_path}/tokenizer.json: " in mistake(capsys, "generate", tmp_path)
    (tmp_path / "latin").write_bytes(b"f\xfcr")
    assert "can't decode byte 0xfc" in mistake(capsys, "generate", folder, "--prompt-file", tmp_path / "latin")


def test_words_without_the_library(folder: Path) -> None:
    program = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from sscan.cli import main\n"
        "sys.exit(main(['generate', sys.argv[1]]))"
    )
    run = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == (
        f'sscan generate: {folder}/tokenizer.json: the library for it comes with: pip install "sscan[lm]"\n'
    )


def test_progress(of_bytes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On standard error, where the text itself cannot be watched: a line now and then."""
    from sscan.tasks import progress

    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert main(["generate", str(of_bytes), "-n", "4", "--samples", "2"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert {line.split("  ")[0] for line in lines} <= {"loading", "reading the prompt", "generating", "generating 100%"}
    shares = [line for line in lines if line.endswith("%")]
    shares = list(dict.fromkeys(shares))  # a slow machine says some of them twice
    assert shares == [f"generating {share:4.0%}" for share in (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1)]


# sscan evaluate


def figures(out: str) -> dict[str, float]:
    """The numbers behind the first words of the lines, which must all be there."""
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines()}
    return {name: float(lines[name].split()[0]) for name in ("nats", "perplexity", "bits")}


def surprise(folder: Path, ids: list[int]) -> Any:
    """-log p of each token but the first, from transformers' model, in one forward."""
    model = transformers.MambaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none").numpy()


@pytest.mark.parametrize("piece", [1024, 37])
def test_evaluation_carries_the_state(
    piece: int, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sscan.tasks import evaluation

    monkeypatch.setattr(evaluation, "PIECE", piece)
    text = TEXT[:700].encode()
    (tmp_path / "text").write_bytes(text)
    ids = Tokens(folder / "tokenizer.json").encode(text)
    each = surprise(folder, ids)
    out = said(capsys, "evaluate", folder, "--text", tmp_path / "text")
    made = figures(out)
    assert f"{len(text):,} bytes, {len(ids):,} tokens" in out
    assert made["nats"] == pytest.approx(each.mean(), rel=1e-4)
    assert made["perplexity"] == pytest.approx(math.exp(each.mean()), rel=1e-3)
    first = len(Tokens(folder / "tokenizer.json").decode(ids[:1]).encode())
    assert made["bits"] == pytest.approx(each.sum() / math.log(2) / (len(text) - first), rel=1e-4)


def test_evaluation_in_windows(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As llama.cpp does it: of each window the tokens behind its middle; and with a stride, all, each once."""
    text = TEXT[:900].encode()
    (tmp_path / "text").write_bytes(text)
    ids = Tokens(folder / "tokenizer.json").encode(text)
    parts = [surprise(folder, ids[at : at + 32])[16:] for at in range(0, len(ids) - 31, 32)]
    assert len(parts) > 2
    assert {len(part) for part in parts} == {15}
    made = figures(said(capsys, "evaluate", folder, "--text", tmp_path / "text", "--window", "32"))
    assert made["nats"] == pytest.approx(np.concatenate(parts).mean(), rel=1e-4)

    parts, counted = [], 1
    for at in range(0, len(ids), 10):
        window = surprise(folder, ids[at : at + 32]) if at + 1 < len(ids) else []
        parts.append(window[counted - at - 1 :] if counted < at + 32 else [])
        counted = max(counted, min(at + 32, len(ids)))
        if counted == len(ids):
            break
    each = np.concatenate(parts)
    assert len(each) == len(ids) - 1
    out = said(capsys, "evaluate", folder, "--text", tmp_path / "text", "--window", "32", "--stride", "10")
    assert figures(out)["nats"] == pytest.approx(each.mean(), rel=1e-4)
    assert f"counted     {len(ids) - 1:,} tokens" in out


@pytest.mark.parametrize("size", [2, 16, 50])
def test_windows_that_do_not_overlap(
    size: int, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first token of each has nothing before it, and is not counted as if it were predicted."""
    (tmp_path / "text").write_bytes(text := TEXT[:400].encode())
    ids = Tokens(folder / "tokenizer.json").encode(text)
    each = np.concatenate([surprise(folder, ids[at : at + size]) for at in range(0, len(ids) - 1, size)])
    out = said(capsys, "evaluate", folder, "--text", tmp_path / "text", "--window", size, "--stride", size)
    assert figures(out)["nats"] == pytest.approx(each.mean(), rel=1e-4)
    assert f"counted     {len(each):,} tokens" in out


def test_bytes_of_tokens(folder: Path) -> None:
    """They add up to the text, whatever tokens begin inside a character."""
    words = Tokens(folder / "tokenizer.json")
    for text in ("für Elise", "日本日本", "the rain", "ё日a"):
        ids, sizes = words.encode_sized(text.encode())
        assert ids.tolist() == words.encode(text.encode())
        assert sizes.sum() == len(text.encode())
        assert (sizes >= 0).all()
    ids, sizes = Bytes().encode_sized("ü".encode())
    assert (ids.tolist(), sizes.tolist()) == ([0xC3, 0xBC], [1, 1])


def test_mistakes_in_evaluations(of_bytes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("rain")
    command = ["evaluate", of_bytes, "--text", tmp_path / "text"]
    for arguments in (["--stride", "4"], ["--stride", "4", "--window", "3"]):
        line = mistake(capsys, *command, *arguments)
        assert "stride needs a window of as many tokens at least, got a stride of 4 and" in line
    assert "window must be at least 3 tokens, got 2" in mistake(capsys, *command, "--window", "2")
    assert "window must be at least 2 tokens, got 1" in mistake(capsys, *command, "--window", "1", "--stride", "1")
    assert "the text is too short: it has 4 tokens, and needs 5" in mistake(capsys, *command, "--window", "5")
    (tmp_path / "text").write_text("r")
    assert "the text is too short: it has 1 tokens, and needs 2" in mistake(capsys, *command)
    assert "missing: No such file" in mistake(capsys, "evaluate", of_bytes, "--text", "missing")


# sscan convert


def test_convert(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = parameters_of(load("torch", folder))
    out = said(capsys, "convert", folder, tmp_path / "original", "--format", "original")
    assert out == f"written     {tmp_path}/original: config.json, model.safetensors, tokenizer.json\n"
    values = json.loads((tmp_path / "original" / "config.json").read_text())
    assert (values["d_model"], values["n_layer"]) == (16, 2)
    out = said(capsys, "convert", tmp_path / "original", tmp_path / "back", "--format", "transformers", "--pickle")
    assert "config.json, pytorch_model.bin, tokenizer.json" in out
    model = transformers.MambaForCausalLM.from_pretrained(folder)
    assert_same_bits(parameters_of(load("nn", tmp_path / "back")), expected)
    found = {n.replace("embeddings", "embedding"): p.detach().numpy() for n, p in model.named_parameters()}
    assert_same_bits(dict(sorted(found.items())), dict(sorted(expected.items())))
    assert vocabulary_of(tmp_path / "back", 305).size == 300


def test_convert_to_another_dtype(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "convert", folder, tmp_path / "half", "--dtype", "bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    model = transformers.MambaForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert model.lm_head.weight.dtype is torch.bfloat16
    assert_same_bits(
        parameters_of(load("nn", tmp_path / "half", "bfloat16")), parameters_of(load("torch", folder, "bfloat16"))
    )
    arrays = load("torch", tmp_path / "half").state_dict()
    torch.testing.assert_close(
        arrays["backbone.layers.0.mixer.A_log"], load("torch", folder).state_dict()["backbone.layers.0.mixer.A_log"],
        rtol=0, atol=0,
    )  # fmt: skip


def test_convert_overwrites_no_model_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    perturbed(MambaConfig(8, 1, 256)).save_pretrained(tmp_path / "a")
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    line = mistake(capsys, "convert", tmp_path / "a", tmp_path / "b" / ".." / "a", "--dtype", "bfloat16")
    assert "is the model itself" in line
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["config.json", "training.safetensors", "notes.txt"])
def test_convert_leaves_folders_of_others_alone(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / name).write_text("precious")
    line = mistake(capsys, "convert", folder, theirs)
    assert f"{theirs} has files that are not a model's, as {name}; give another folder" in line
    assert [path.read_text() for path in theirs.iterdir()] == ["precious"]
    for _ in range(2):  # over a model that it has written itself
        said(capsys, "convert", folder, tmp_path / "new")


def test_an_end_that_there_is_not_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = mistake(capsys, "generate", folder, "--prompt", "a", "-n", "2", "--eos", "<|nothing|>")
    assert "--eos: the model's vocabulary has no special token '<|nothing|>'" in line


def test_convert_says_what_transformers_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sscan.nn.MambaLM(MambaConfig(8, 1, 256, {"discretization": "zoh"})).save_pretrained(tmp_path / "zoh")
    assert "transformers has no discretization" in mistake(capsys, "convert", tmp_path / "zoh", tmp_path / "new")
    assert not (tmp_path / "new").exists()
