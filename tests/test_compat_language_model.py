"""The language model under mamba_ssm's names, against ``sscan.torch.MambaLM`` of the same weights."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from cases import assert_within, eps_of
from test_models import CHANGES, assert_same_bits, config_with, exact_logits, ids, load, parameters_of, perturbed
from torch import nn

from sscan.compat.generation import decode, sample
from sscan.compat.language_model import (
    Block,
    MambaConfig,
    MambaLMHeadModel,
    OldBlock,
    create_block,
    load_config_hf,
    load_state_dict_hf,
)
from sscan.compat.mamba_ssm import InferenceParams
from sscan.compat.norms import RMSNorm
from sscan.models import Sampler
from sscan.torch import Mamba

if TYPE_CHECKING:
    from pathlib import Path

KNOWN = {name: change for name, change in CHANGES.items() if "norm_epsilon" not in change}
changes = pytest.mark.parametrize("change", KNOWN.values(), ids=KNOWN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    perturbed().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def model(folder: Path) -> Any:
    return MambaLMHeadModel.from_pretrained(folder).eval()


def tokens(batch: int = 2, length: int = 21, seed: int = 0) -> Any:
    return torch.from_numpy(ids(batch, length, seed))


# The model


@changes
@pytest.mark.parametrize("format", ["original", "transformers"])
def test_logits_and_files(change: dict[str, Any], format: Any, tmp_path: Path) -> None:
    ours = perturbed(config_with(change))
    ours.save_pretrained(tmp_path / "ours", format)
    model = MambaLMHeadModel.from_pretrained(tmp_path / "ours").eval()
    assert model.config.tie_embeddings == (model.lm_head.weight is model.backbone.embedding.weight)
    logits = model(tokens()).logits.detach().numpy()
    assert_within(logits, ours(tokens()).detach().numpy(), exact_logits(ours, ids()), eps_of(np.float32), "logits")
    torch.testing.assert_close(model(tokens(), num_last_tokens=3).logits, model(tokens()).logits[:, -3:])
    model.save_pretrained(tmp_path / "theirs")
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {"config.json", "pytorch_model.bin"}
    assert_same_bits(parameters_of(load("nn", tmp_path / "theirs")), parameters_of(ours))
    assert MambaConfig(**load_config_hf(tmp_path / "theirs")) == model.config
    state = load_state_dict_hf(tmp_path / "theirs", dtype=torch.float64)
    assert state.keys() == model.state_dict().keys()
    assert all(x.dtype is torch.float64 and x.float().equal(model.state_dict()[name]) for name, x in state.items())


def test_half_precision_keeps_what_must_be_wide(folder: Path) -> None:
    model = MambaLMHeadModel.from_pretrained(folder, dtype=torch.bfloat16)
    exact = load("torch", folder).state_dict()
    for name, parameter in model.named_parameters():
        if name.endswith((".A_log", ".D")):
            assert parameter.equal(exact[name]), name
        else:
            assert parameter.equal(exact[name].bfloat16()), name
    assert model.allocate_inference_cache(2, 100)[0][1].dtype is torch.float32


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(64, 9, 256, {"bias": True}))
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert abs(model.lm_head.weight.std().item() - 0.02) < 1e-3
    mixer = model.backbone.layers[4].mixer
    bound = 1 / 128**0.5 / 3
    assert 0.9 * bound < mixer.out_proj.weight.abs().max().item() <= bound
    assert not mixer.in_proj.bias.any()
    assert mixer.dt_proj.bias.any()
    wide = MambaLMHeadModel(MambaConfig(64, 1, 256), initializer_cfg={"initializer_range": 0.5})
    assert abs(wide.lm_head.weight.std().item() - 0.5) < 0.02


def test_steps_equal_the_whole(model: Any) -> None:
    params = InferenceParams(max_seqlen=21, max_batch_size=2)
    made = []
    with torch.no_grad():
        for piece in tokens().split([5, 4, *[1] * 12], 1):
            made.append(model(piece, inference_params=params).logits)
            params.seqlen_offset += piece.shape[1]
        whole = model(tokens()).logits
    exact = exact_logits(perturbed(), ids())
    assert_within(torch.cat(made, 1).numpy(), whole.numpy(), exact, eps_of(np.float32), "steps")


def test_what_is_not_mamba_1(tmp_path: Path) -> None:
    for change, message in (
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg layer must be 'Mamba1', .* got 'Mamba2'"),
        ({"d_intermediate": 8}, "d_intermediate must be 0"), ({"attn_layer_idx": [1]}, "attn_layer_idx must be"),
        ({"attn_cfg": {"heads": 2}}, "attn_cfg must be {}"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            MambaLMHeadModel(MambaConfig(d_model=8, n_layer=2, vocab_size=9, **change))
    assert MambaLMHeadModel(MambaConfig(8, 1, 9, {"layer": "Mamba1"})).lm_head.weight.shape == (16, 8)
    perturbed(config_with({"norm_epsilon": 1e-3})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"mamba_ssm has no norm_epsilon = 0\.001"):
        MambaLMHeadModel.from_pretrained(tmp_path)


# Blocks


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("norm", [nn.LayerNorm, RMSNorm])
@pytest.mark.parametrize("in_fp32", [True, False])
def test_blocks_are_prenorm_with_the_sum_left_to_the_next(fused: bool, norm: Any, in_fp32: bool) -> None:
    torch.manual_seed(0)
    kinds = (lambda d: nn.Linear(d, d).double(), lambda d: nn.Sequential(nn.Linear(d, d), nn.SiLU()).double())

    class Mixer(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Any, inference_params: Any = None, scale: float = 1.0) -> Any:
            return self.inner(x) * scale

    block = Block(6, lambda d: Mixer(kinds[0](d)), kinds[1], lambda d: norm(d).double(), fused, False)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    block.residual_in_fp32 = in_fp32 and not fused  # of float64 streams the fused norms keep float64
    hidden, residual = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    out, stream = block(hidden, residual, scale=0.5)
    first = hidden + residual
    mixed = 0.5 * block.mixer.inner(normed(block.norm, first))
    expected = mixed + (first.float() if block.residual_in_fp32 else first)
    torch.testing.assert_close(stream.double(), expected.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out, block.mlp(normed(block.norm2, expected)), rtol=1e-5, atol=1e-5)


def normed(norm: Any, x: Any) -> Any:
    if isinstance(norm, nn.LayerNorm):
        return nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def test_blocks_of_both_releases() -> None:
    block = create_block(8, {"d_state": 4}, rms_norm=True, residual_in_fp32=True, fused_add_norm=True, layer_idx=3)
    assert isinstance(block.mixer, Mamba)
    assert (block.layer_idx, block.mixer.layer_idx, block.mlp) == (3, 3, None)
    hidden, residual = block(torch.randn(2, 5, 8))
    assert residual.dtype is torch.float32
    old = OldBlock(8, lambda d: Mamba(d, layer_idx=0), RMSNorm, True, True)
    assert isinstance(old.norm, RMSNorm)
    conv, ssm = old.allocate_inference_cache(3, 10)
    assert (conv.shape, ssm.shape) == ((3, 16, 4), (3, 16, 16))
    assert old(hidden, residual)[0].shape == (2, 5, 8)
    with pytest.raises(TypeError, match="fused_add_norm needs a LayerNorm or an RMSNorm, got Identity"):
        OldBlock(8, Mamba, nn.Identity, fused_add_norm=True)


# Generation


def test_greedy_tokens(model: Any) -> None:
    prompt = tokens(3, 7)
    expected = np.stack(perturbed().generate(prompt, 12, temperature=0))
    for given in ({}, {"cg": True}, {"return_dict_in_generate": True, "output_scores": True}):
        made = model.generate(prompt, max_length=19, **given)
        sequences = made if isinstance(made, torch.Tensor) else made.sequences
        assert torch.equal(sequences[:, :7], prompt)
        assert sequences[:, 7:].tolist() == expected.tolist()
    assert len(made.scores) == 12
    with torch.no_grad():
        whole = model(sequences).logits
    for i, scores in enumerate(made.scores):
        torch.testing.assert_close(scores, whole[:, 6 + i], rtol=1e-4, atol=1e-5)
    assert model.generate(prompt, 19, return_dict_in_generate=True).scores is None


def test_penalty_vocabulary_teacher_and_end(model: Any) -> None:
    prompt = tokens(2, 7)
    options = {"temperature": 0, "repetition_penalty": 1.7}
    expected = np.stack(perturbed().generate(prompt, 9, **options))
    assert model.generate(prompt, 16, repetition_penalty=1.7)[:, 7:].tolist() == expected.tolist()
    assert model.generate(prompt, 30, top_k=0, temperature=5.0, vocab_size=7)[:, 7:].max() < 7
    assert prompt.max() > 7
    assert model.generate(prompt, 30, repetition_penalty=1.5, vocab_size=7)[:, 7:].max() < 7
    teacher = tokens(2, 12, seed=1)
    made = model.generate(prompt, 16, teacher_outputs=teacher)
    assert torch.equal(made[:, 7:12], teacher[:, 7:12])
    assert made.shape == (2, 16)
    alone = prompt[:1]
    greedy = model.generate(alone, 30)[0, 7:].tolist()
    ended = model.generate(alone, 30, eos_token_id=greedy[5])[0, 7:].tolist()
    assert ended == greedy[: greedy.index(greedy[5]) + 1]


def test_padding_of_the_vocabulary_is_never_drawn(model: Any) -> None:
    with torch.no_grad():
        model.backbone.embedding.weight[43:] = 100 * model.backbone.norm_f.weight
    for options in ({}, {"top_k": 0, "temperature": 5.0}, {"repetition_penalty": 1.1}):
        made = model.generate(tokens(3, 4), 30, return_dict_in_generate=True, output_scores=True, **options)
        assert made.sequences.max() < 43
        assert made.scores[0].shape == (3, 48)
        assert made.scores[0].argmax(-1).min() >= 43


def test_streamers(model: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.heard: list[Any] = []

        def put(self, said: Any) -> None:
            self.heard.append(said)

        def end(self) -> None:
            self.heard.append("end")

    streamer = Streamer()
    made = model.generate(tokens(1, 4), 9, streamer=streamer)
    assert streamer.heard.pop() == "end"
    assert torch.equal(torch.cat(streamer.heard, 1), made)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 4, "top_p": 0.8, "min_p": 0.1}],
)
def test_samples_follow_the_probabilities_of_the_sampler(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 7, dtype=torch.float64) * 1.5
    expected = Sampler(**options).probabilities(logits.numpy())[0]
    drawn = sample(logits.expand(20000, -1), **{"top_k": 0, **options})
    counts = Counter(drawn.tolist())
    np.testing.assert_allclose([counts[i] / 20000 for i in range(7)], expected, atol=0.015)
    assert set(counts) <= set(np.flatnonzero(expected).tolist())


def test_samples_of_wrong_options() -> None:
    with pytest.raises(ValueError, match=r"top_p must be in \[0, 1\], got 1.5"):
        sample(torch.zeros(1, 3), top_k=0, top_p=1.5)
    assert sample(torch.tensor([[0.0, 2.0, 1.0]])).tolist() == [1]


def test_unknown_arguments_are_none(model: Any, folder: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'wings'"):
        model.generate(tokens(1, 3), 5, wings=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'wings'"):
        MambaLMHeadModel.from_pretrained(folder, wings=2)


def test_models_are_copied_with_their_ties(model: Any) -> None:
    other = copy.deepcopy(model)
    assert other.lm_head.weight is other.backbone.embedding.weight
    assert torch.equal(decode(tokens(1, 3), other, 9).sequences, decode(tokens(1, 3), model, 9).sequences)


SCRIPT = """
import sys, time
import torch
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

model = MambaLMHeadModel.from_pretrained(sys.argv[1], device="cpu", dtype=torch.bfloat16)
print(model)
model.eval()
print(f"parameters: {sum(p.numel() for p in model.parameters() if p.requires_grad)}")
torch.random.manual_seed(0)
input_ids = torch.randint(1, 40, (3, 11), dtype=torch.long)
generate = lambda: model.generate(
    input_ids=input_ids, max_length=20, cg=True, return_dict_in_generate=True, output_scores=True, enable_timing=False,
    temperature=1.0, top_k=1, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
)
out = generate()
assert torch.equal(out.sequences, generate().sequences)
print(f"lengths: {len(input_ids[0])}, {len(out.sequences[0]) - len(input_ids[0])}, {len(out.scores)}")
"""


def test_a_script_as_the_original_benchmark(folder: Path, tmp_path: Path) -> None:
    """The calls of benchmark_generation_mamba_simple.py, with mamba_ssm's names; on a GPU see tests/gpu."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "sscan.compat", str(tmp_path / "script.py"), str(folder)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert "MambaLMHeadModel(" in said.stdout
    assert f"parameters: {config_with({}).parameter_count()}\n" in said.stdout
    assert said.stdout.endswith("lengths: 11, 9, 9\n")
