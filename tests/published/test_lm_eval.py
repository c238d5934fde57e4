"""lm-evaluation-harness on a small local task, against its own transformers backend: ``nox -s lm_eval``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1", HF_EVALUATE_OFFLINE="1")

import lm_eval
import tokenizers
from lm_eval.tasks import TaskManager
from test_cli_models import END, TEXT
from test_models import perturbed

import sscan.lm_eval
from sscan.models import MambaConfig

TASKS = {
    "choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{answers}}",
        "doc_to_target": "{{right}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "likelihood": {
        "output_type": "loglikelihood", "doc_to_text": "{{question}}", "doc_to_target": " {{answers[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}} {{answers[1]}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "continuation": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answers[0]}}",
        "generation_kwargs": {"until": ["\n", "q"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip
DOCS = [
    {"question": "the rain it", "answers": ["raineth every day", "wind", "für Elise and the"], "right": 0},
    {"question": "a hey, ho,", "answers": ["the wind", "the rain it raineth", "日本"], "right": 1},
    {"question": "日本 and", "answers": ["a hey", "ho", "every"], "right": 2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, as transformers has it."""
    made = tmp_path_factory.mktemp("model")
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    words.train_from_iterator([TEXT], trainer)
    words.save(str(made / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "model_max_length": 2048}
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    perturbed(MambaConfig(16, 2, words.get_vocab_size(), pad_vocab_size_multiple=1)).save_pretrained(
        made, "transformers"
    )
    return made


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tasks")
    (made / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(made / "docs.jsonl")}}}
    for name, task in TASKS.items():
        (made / f"{name}.yaml").write_text(json.dumps({"task": name, **common, "test_split": "test", **task}))
    return made


def results(model: str, arguments: dict[str, Any], tasks: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures and the samples of every task."""
    made = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=list(TASKS), task_manager=TaskManager(include_path=str(tasks)),
        log_samples=True, bootstrap_iters=0, device="cpu",
    )  # fmt: skip
    return made["results"], made["samples"]


@pytest.mark.filterwarnings("default")
def test_figures_are_those_of_transformers(folder: Path, tasks: Path) -> None:
    ours, our_samples = results("sscan", {"pretrained": str(folder), "batch_size": 2}, tasks)
    theirs, their_samples = results(
        "hf", {"pretrained": str(folder), "prefix_token_id": 0, "add_bos_token": False}, tasks
    )
    assert ours.keys() == theirs.keys() == TASKS.keys()
    for task, figures in theirs.items():
        for name, value in figures.items():
            if isinstance(value, float):
                assert ours[task][name] == pytest.approx(value, rel=1e-4), (task, name)
    for task in TASKS:
        for first, second in zip(our_samples[task], their_samples[task], strict=True):
            for one, other in zip(first["resps"], second["resps"], strict=True):
                if task == "continuation":
                    assert one == other
                else:
                    flat = [x[0] if isinstance(x, (list, tuple)) else x for x in (one[0], other[0])]
                    assert float(flat[0]) == pytest.approx(float(flat[1]), rel=1e-4)
    assert any(sample["resps"][0][0] for sample in our_samples["continuation"])


def test_the_command_has_the_model(folder: Path, tasks: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "sscan.lm_eval", "--model", "sscan", "--model_args", f"pretrained={folder}", "--tasks",
        "choice", "--include_path", str(tasks), "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "|choice|" in run.stdout.replace(" ", "")


def test_options_that_are_not_known() -> None:
    assert sscan.lm_eval._options({"until": "x", "temperature": 0.5, "top_p": 0.9}) == (
        ["x"], {"max_new_tokens": 256, "temperature": 0.5, "top_p": 0.9},
    )  # fmt: skip
    assert sscan.lm_eval._options({"temperature": 0.5, "do_sample": False})[1]["temperature"] == 0
    with pytest.raises(ValueError, match=r"generation options \['num_beams'\] are not known"):
        sscan.lm_eval._options({"num_beams": 3})
