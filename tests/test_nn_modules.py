"""sscan.nn: parameter counts, initial values, names, decoding and dtypes of the block and the language model."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import re
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from scipy import stats

from sscan import nn
from sscan.nn import MambaConfig, MambaLM, Tensor
from sscan.nn.mamba import MambaState

SMALL = MambaConfig(d_model=12, n_layer=2, vocab_size=11, ssm_cfg={"d_state": 4})


def ids(batch: int, length: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 11, (batch, length))


# Parameter counts (check 20 of paper.md section 7)


@pytest.mark.parametrize(
    ("n_layer", "d_model", "count"),
    [
        (24, 768, 129_135_360),
        (48, 1024, 371_516_416),
        (48, 1536, 793_204_224),
        (48, 2048, 1_372_178_432),
        (64, 2560, 2_768_345_600),
    ],
)
def test_released_sizes(n_layer: int, d_model: int, count: int) -> None:
    assert MambaConfig(d_model, n_layer).parameter_count() == count


@pytest.mark.parametrize(
    ("dt_rank", "d_state", "millions"),
    [
        *[(0, 16, 358.9), (1, 16, 359.1), (2, 16, 359.3), (4, 16, 359.7), (8, 16, 360.5), (16, 16, 362.1)],
        *[(32, 16, 365.2), (64, 16, 371.5)],  # Table 9
        *[(64, 1, 367.1), (64, 2, 367.4), (64, 4, 368.0), (64, 8, 369.1), (64, 16, 371.5)],  # Table 10
    ],
)
def test_tables_9_and_10(dt_rank: int, d_state: int, millions: float) -> None:
    config = MambaConfig(1024, 48, 50264, {"dt_rank": dt_rank, "d_state": d_state})
    assert round(config.parameter_count() / 1e6, 1) == millions


def test_count_of_the_ablated_model() -> None:
    assert MambaConfig(1024, 48, 50264).parameter_count() == 371_500_032


@pytest.mark.parametrize(
    ("blocks", "width", "count"),
    [
        (4, 64, 262_720),
        (5, 96, 684_192),
        (6, 128, 1_401_472),
        (7, 192, 3_527_232),
        (8, 256, 7_012_608),
        (10, 384, 19_291_008),
        (12, 512, 40_694_272),
    ],
)
def test_dna_sizes(blocks: int, width: int, count: int) -> None:
    assert MambaConfig(width, 2 * blocks, vocab_size=12, pad_vocab_size_multiple=16).parameter_count() == count


def test_count_is_that_of_the_allocated_arrays() -> None:
    model = MambaLM(SMALL)
    assert SMALL.parameter_count() == sum(p.data.size for p in model.parameters())
    untied = MambaConfig(12, 2, 11, {"d_state": 4}, tie_embeddings=False)
    assert untied.parameter_count() - SMALL.parameter_count() == 16 * 12


# Names (check 21)


def test_names_and_shapes_are_those_of_released_checkpoints() -> None:
    config = MambaConfig(d_model=768, n_layer=1)
    shapes = {name: array.shape for name, array in MambaLM(config, seed=None).state_dict().items()}
    mixer = "backbone.layers.0.mixer."
    assert shapes == {
        "backbone.embedding.weight": (50280, 768),
        "backbone.layers.0.norm.weight": (768,),
        mixer + "in_proj.weight": (3072, 768),
        mixer + "conv1d.weight": (1536, 1, 4),
        mixer + "conv1d.bias": (1536,),
        mixer + "x_proj.weight": (80, 1536),
        mixer + "dt_proj.weight": (1536, 48),
        mixer + "dt_proj.bias": (1536,),
        mixer + "A_log": (1536, 16),
        mixer + "D": (1536,),
        mixer + "out_proj.weight": (768, 1536),
        "backbone.norm_f.weight": (768,),
        "lm_head.weight": (50280, 768),
    }


def test_state_dict_round_trip() -> None:
    first, second = MambaLM(SMALL, seed=1), MambaLM(SMALL, seed=None)
    second.load_state_dict(first.state_dict())
    x = ids(2, 7)
    np.testing.assert_array_equal(first(x).data, second(x).data)
    assert not np.shares_memory(first.lm_head.weight.data, second.lm_head.weight.data)
    assert second.lm_head.weight is second.backbone.embedding.weight
    state = first.state_dict()
    del state["lm_head.weight"]  # as files often have it
    second.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("backbone.norm_f.weight"), "missing key 'backbone.norm_f.weight'"),
        (lambda s: s.update(extra=np.zeros(1)), "unknown key 'extra'"),
        (
            lambda s: s.update({"backbone.norm_f.weight": np.zeros(13)}),
            r"'backbone.norm_f.weight' has shape \(13,\), expected \(12,\)",
        ),
        (
            lambda s: s.update({"lm_head.weight": s["lm_head.weight"] + 1}),
            "'backbone.embedding.weight' and 'lm_head.weight' are one parameter, but their values differ",
        ),
        (lambda s: s.clear(), "missing key 'backbone.embedding.weight'; .* and 19 more"),
        (
            lambda s: s.update({"backbone.norm_f.weight": np.ones(12, np.int64)}),
            "'backbone.norm_f.weight' is int64, expected a floating dtype",
        ),
        (
            lambda s: s.update({"backbone.norm_f.weight": np.full(12, 1e300)}),
            "'backbone.norm_f.weight' has values that float32 cannot hold",
        ),
    ],
)
def test_load_state_dict_is_strict(change: Any, message: str) -> None:
    model = MambaLM(SMALL)
    before = model.state_dict()
    state = MambaLM(SMALL, seed=1).state_dict()
    change(state)
    with pytest.raises(ValueError, match=message) as caught:
        model.load_state_dict(state)
    assert str(caught.value).count("; ") == (3 if "more" in message else 0)
    assert all(model.state_dict()[name] is array for name, array in before.items())


# Defaults and initial values (check 19)


def defaults(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def test_defaults_are_those_of_the_original() -> None:
    # mamba_ssm/modules/mamba_simple.py, models/config_mamba.py and mixer_seq_simple.py; what is ours stands last.
    assert defaults(nn.Mamba) == {
        "d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto", "dt_min": 0.001, "dt_max": 0.1,
        "dt_init": "random", "dt_scale": 1.0, "dt_init_floor": 1e-4, "conv_bias": True, "bias": False,
        "discretization": "mamba", "n_layer": 1, "dtype": np.float32, "seed": 0,
    }  # fmt: skip
    assert dataclasses.asdict(MambaConfig()) == {
        "d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 8, "tie_embeddings": True, "norm_epsilon": 1e-5,
    }  # fmt: skip
    assert defaults(nn.RMSNorm)["eps"] == defaults(nn.rms_norm)["eps"] == 1e-5
    assert defaults(nn.Linear) == {"bias": True, "dtype": np.float32, "scale": 1.0, "seed": 0}
    assert defaults(nn.AdamW) == {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    assert defaults(nn.decay_groups) == {"weight_decay": 0.1}
    assert defaults(nn.clip_gradients) == {"max_norm": 1.0}
    assert defaults(nn.warmup_cosine) == {"final": 1e-5, "warmup": 0.1}
    drawing = {
        "temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "repetition_penalty": 1.0, "seed": 0,
    }  # fmt: skip
    assert defaults(nn.Sampler) == drawing
    for model in (MambaLM,):
        assert defaults(model.generate) == {
            **drawing, "eos": None, "stop": (), "tokenizer": None, "streamer": None, "batch": None, "vocab_size": None,
        }  # fmt: skip
    for loss in (nn.cross_entropy, nn.linear_cross_entropy):
        assert defaults(loss) == {"ignore_index": -100}


def test_defaults_reach_what_they_are_for() -> None:
    block = nn.Mamba(40)
    assert (block.d_inner, block.dt_rank, block.d_state, block.d_conv) == (80, 3, 16, 4)  # 3 is 40 / 16 rounded up
    assert block.in_proj.bias is None
    assert block.out_proj.bias is None
    assert block.conv1d.bias is not None
    assert 0.5 < np.abs(block.dt_proj.weight.data).max() <= 3**-0.5
    assert (block.dt_proj.weight.data < 0).any()
    tiny = nn.Mamba(64, dt_min=1e-9, dt_max=1e-6, dtype=np.float64)
    np.testing.assert_allclose(np.logaddexp(0, tiny.dt_proj.bias.data), 1e-4, rtol=1e-9)  # the floor
    model = MambaLM(MambaConfig(8, 3, 13))
    assert model.lm_head.weight.shape == (16, 8)
    assert model.lm_head.bias is None
    assert [layer.norm.eps for layer in model.backbone.layers] == [1e-5] * 3
    assert model.backbone.norm_f.eps == 1e-5


def test_numbers_that_no_block_can_be_made_of() -> None:
    for arguments, error, message in [
        ({"d_model": 0}, ValueError, "d_model must be at least 1, got 0"),
        ({"d_state": 2.0}, TypeError, "d_state must be an integer, got 2.0"),
        ({"d_conv": 0}, ValueError, "d_conv must be at least 1"),
        ({"n_layer": 0}, ValueError, "n_layer must be at least 1"),
        ({"dt_rank": -1}, ValueError, "dt_rank must be at least 0"),
        ({"dt_rank": "all"}, TypeError, "dt_rank must be an integer"),
        ({"expand": math.nan}, ValueError, "expand must be finite and above 0, got nan"),
        ({"expand": 0.01}, ValueError, "expand d_model must be at least 1"),
        ({"dt_min": 0}, ValueError, "dt_min must be finite and above 0"),
        ({"dt_min": 0.2}, ValueError, "dt_min must be at most dt_max, got 0.2 and 0.1"),
        ({"bias": 1}, TypeError, "bias must be True or False"),
        ({"conv_bias": None}, TypeError, "conv_bias must be True or False"),
        ({"dt_init": "zero"}, ValueError, "dt_init must be 'random' or 'constant'"),
        ({"discretization": "euler"}, ValueError, "discretization must be 'mamba' or 'zoh'"),
    ]:
        with pytest.raises(error, match=f"Mamba: {re.escape(message)}"):
            nn.Mamba(**{"d_model": 8, **arguments}, seed=None)


# Initial values


def test_step_sizes_start_log_uniform() -> None:
    block = nn.Mamba(1024, dtype=np.float64)
    step = np.log1p(np.exp(block.dt_proj.bias.data))
    assert step.min() >= 1e-3 * (1 - 1e-12)
    assert step.max() <= 1e-1 * (1 + 1e-12)
    position = (np.log(step) - math.log(1e-3)) / math.log(100)
    assert stats.kstest(position, "uniform").pvalue > 0.01
    assert stats.kstest(step, "uniform", (1e-3, 0.099)).pvalue < 1e-6  # and so not uniform
    floored = nn.Mamba(64, dt_min=1e-6, dt_init_floor=1e-4, dtype=np.float64)
    assert np.isclose(np.log1p(np.exp(floored.dt_proj.bias.data)).min(), 1e-4)


def test_initial_values_of_the_block() -> None:
    block = nn.Mamba(64, d_state=8, bias=True)
    np.testing.assert_array_equal(block.A_log.data, np.log(np.arange(1.0, 9.0)).astype(np.float32)[None].repeat(128, 0))
    np.testing.assert_allclose(block.A().data[0], -np.arange(1.0, 9.0), rtol=1e-6)
    np.testing.assert_array_equal(block.D.data, np.ones(128))
    for parameter, bound in [
        (block.in_proj.weight, 1 / 8),
        (block.x_proj.weight, 1 / math.sqrt(128)),
        (block.out_proj.weight, 1 / math.sqrt(128)),
        (block.conv1d.weight, 1 / 2),
        (block.conv1d.bias, 1 / 2),
        (block.dt_proj.weight, 1 / 2),  # rank 4
    ]:
        assert stats.kstest(parameter.data.ravel() / bound, "uniform", (-1, 2)).pvalue > 0.01
    np.testing.assert_array_equal(block.in_proj.bias.data, np.zeros(256))
    constant = nn.Mamba(64, dt_init="constant", dt_scale=2.0)
    np.testing.assert_array_equal(constant.dt_proj.weight.data, np.full((128, 4), 1.0))


def test_output_projections_shrink_with_depth_and_only_once() -> None:
    deviations = []
    for n_layer in (1, 4, 16):
        model = MambaLM(MambaConfig(64, n_layer, 16))
        weight = model.backbone.layers[0].mixer.out_proj.weight
        deviations.append(weight.data.std())
        model.initialise(1)
        np.testing.assert_allclose(weight.data.std(), deviations[-1], rtol=0.05)
    assert all(np.isclose(a / b, 2, rtol=0.05) for a, b in pairwise(deviations))


def test_initial_values_of_the_model_and_their_seed() -> None:
    model = MambaLM(MambaConfig(64, 2, 256))
    assert stats.kstest(model.backbone.embedding.weight.data.ravel() / 0.02, "norm").pvalue > 0.01
    np.testing.assert_array_equal(model.backbone.norm_f.weight.data, np.ones(64))
    again, other = MambaLM(MambaConfig(64, 2, 256)), MambaLM(MambaConfig(64, 2, 256), seed=1)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, again.state_dict()[name])
    assert (model.backbone.embedding.weight.data != other.backbone.embedding.weight.data).any()


def test_unallocated_models_hold_nothing_and_say_so_in_their_output() -> None:
    model = MambaLM(SMALL, seed=None)
    assert sum(p.data.base.size for p in model.parameters()) == len(model.parameters())
    assert np.isnan(model(ids(1, 3)).data).all()


# Gradients


@pytest.mark.parametrize("rule", ["mamba", "zoh"])
def test_gradients_of_the_block(rule: str) -> None:
    block = nn.Mamba(4, d_state=2, dt_rank=2, bias=True, discretization=rule, dtype=np.float64)
    x = Tensor(np.random.default_rng(0).standard_normal((2, 5, 4)), requires_grad=True)
    nn.check_gradients(lambda *tensors: block(tensors[0]), x, *block.parameters())


def test_gradients_through_carried_states() -> None:
    block = nn.Mamba(4, d_state=2, dtype=np.float64)
    rng = np.random.default_rng(0)
    shapes = [(2, 3, 4), (2, 8, 3), (2, 8, 2)]
    inputs = [Tensor(rng.standard_normal(shape), requires_grad=True) for shape in shapes]

    def extend(x: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, ...]:
        out, state = block.extend(x, MambaState(conv, ssm))
        return out, state.conv, state.ssm

    nn.check_gradients(extend, *inputs)


@pytest.mark.parametrize("change", [{}, {"fused_add_norm": False}, {"tie_embeddings": False}])
def test_gradients_of_the_language_model(change: dict[str, Any]) -> None:
    model = MambaLM(MambaConfig(4, 2, 5, {"d_state": 2}, **change), np.float64)
    model.backbone.embedding.weight.data *= 50  # rows of length 0.04 through RMSNorm are too curved for differences
    x, y = ids(2, 6) % 5, ids(2, 6, seed=1) % 5
    assert nn.check_gradients(lambda *_: model.loss(x, y), *model.parameters()) < 1e-8


def test_step_size_without_projection() -> None:
    block = nn.Mamba(8, d_state=2, dt_rank=0, dtype=np.float64)
    x = Tensor(np.random.default_rng(0).standard_normal((1, 4, 8)), requires_grad=True)
    nn.check_gradients(block, x)


# Decoding (checks 7 and 24)


@pytest.mark.parametrize("prompt", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "ssm_cfg", [{"d_state": 4}, {"discretization": "zoh"}, {"d_conv": 1}, {"d_conv": 6, "bias": True}]
)
def test_prefill_then_decode_equals_the_scan(ssm_cfg: dict[str, Any], prompt: int) -> None:
    model = MambaLM(MambaConfig(12, 2, 11, ssm_cfg), np.float64)
    x = ids(3, 12)
    expected = model(x).data
    logits, states = model.prefill(x[:, :prompt], model.new_states(3))
    for t in range(prompt, 12):
        np.testing.assert_allclose(logits, expected[:, t - 1], rtol=1e-12, atol=1e-12)
        logits = model.step(x[:, t], states)
    np.testing.assert_allclose(logits, expected[:, -1], rtol=1e-12, atol=1e-12)


def test_decoding_from_nothing_equals_the_scan() -> None:
    block = nn.Mamba(12, d_state=4, dtype=np.float64)
    x = np.random.default_rng(0).standard_normal((2, 9, 12))
    state = block.new_state(2)
    steps = [block.step(x[:, t], state).data for t in range(9)]
    np.testing.assert_allclose(np.stack(steps, axis=1), block(x).data, rtol=1e-12, atol=1e-13)


def test_prefill_in_pieces_equals_one_prefill() -> None:
    model = MambaLM(SMALL, np.float64)
    x = ids(2, 9)
    whole, _ = model.prefill(x, model.new_states(2))
    states = model.new_states(2)
    for piece in (x[:, :1], x[:, 1:3], x[:, 3:]):
        logits, states = model.prefill(piece, states)
    np.testing.assert_allclose(logits, whole, rtol=1e-12, atol=1e-13)


def test_state_does_not_grow() -> None:
    model = MambaLM(SMALL)
    states = model.new_states(2)
    buffers = [array for s in states for array in (s.conv.data, s.ssm.data)]
    shapes = [array.shape for array in buffers]
    assert shapes == [(2, 24, 3), (2, 24, 4)] * 2
    for t in range(20):
        model.step(ids(2, 1, seed=t)[:, 0], states)
    after = [array for s in states for array in (s.conv.data, s.ssm.data)]
    assert all(a is b for a, b in zip(after, buffers, strict=True))  # updated in place: the same memory at every step
    assert [array.shape for array in after] == shapes


def test_generation() -> None:
    model = MambaLM(SMALL)
    prompt = ids(2, 3)
    greedy = np.stack(model.generate(prompt, 6, temperature=0))
    x = prompt
    for _ in range(6):
        x = np.concatenate([x, model(x).data[:, -1:, :11].argmax(axis=-1)], axis=1)
    np.testing.assert_array_equal(greedy, x[:, 3:])
    assert [len(made) for made in model.generate(prompt[0], 1)] == [1]
    assert [len(made) for made in model.generate(prompt, 0)] == [0, 0]
    assert model.generate([], 3) == []
    first, second = (model.generate(prompt[0], 20, seed=5)[0].tolist() for _ in range(2))
    assert first == second
    with pytest.raises(ValueError, match=r"generate: prompt 0 must be one token or more in one axis, got shape \(0,\)"):
        model.generate(prompt[:, :0], 1)


def test_prompts_and_counts_that_are_none() -> None:
    model = MambaLM(SMALL)
    with pytest.raises(ValueError, match="generate: max_new_tokens must be at least 0, got -1"):
        model.generate(ids(1, 3), -1)
    with pytest.raises(TypeError, match="generate: prompt 0 must be integers, got float64"):
        model.generate([1.0, 2.0], 1)
    for prompts, number in (([1, [2, 3]], 0), ([[1], [1, [2]]], 1), ([[1, 2], [[1], [2, 3]]], 1)):
        with pytest.raises(TypeError, match=f"generate: prompt {number} must be integers, got some that are sequences"):
            model.generate(prompts, 1)
    with pytest.raises(TypeError, match="generate: prompts must be token ids, got a text"):
        model.generate("rain", 1)
    for wrong in (3, np.array(3), None):
        with pytest.raises(TypeError, match="generate: prompts must be token ids, or sequences of them, got"):
            model.generate(wrong, 1)
    for wrong, low, high in ((-1, -1, 2), (16, 2, 16)):  # of 11 tokens and 5 rows of padding
        with pytest.raises(ValueError, match=rf"prompt 1 must be tokens in \[0, 16\), got {low} to {high}"):
            model.generate([[1], [2, wrong]], 1)
    with pytest.raises(TypeError, match="embedding: indices must be integers, got list"):
        model([[1, 2]])
    with pytest.raises(TypeError, match="linear_cross_entropy: targets must be integers, got list"):
        model.loss(ids(1, 2), [[1, 2]])
    assert model.generate([1, 2], 3)[0].tolist() == model.generate(np.array([1, 2], np.uint8), 3)[0].tolist()


def test_models_that_are_ruined_generate_nothing() -> None:
    for value in (np.nan, np.inf):
        model = MambaLM(SMALL)
        model.backbone.norm_f.weight.data[3] = value
        for temperature in (0, 1.0):
            with np.errstate(invalid="ignore"), pytest.raises(FloatingPointError, match="logits are NaN or infinite"):
                model.generate(ids(2, 3), 1, temperature)


def test_generation_leaves_recording_on_between_tokens() -> None:
    model = MambaLM(SMALL)
    recorded = []
    model.generate(
        ids(1, 3), 2, streamer=lambda i, token: recorded.append(model.loss(ids(1, 3), ids(1, 3)).requires_grad)
    )
    assert recorded == [True, True]


def test_padding_of_the_vocabulary_is_never_generated() -> None:
    model = MambaLM(SMALL)
    model.backbone.embedding.weight.data[11:] = 100 * model.backbone.norm_f.weight.data
    assert model.generate(ids(1, 3), 50, temperature=5.0)[0].max() < 11


def test_sampler() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))
    probabilities = nn.Sampler().probabilities
    np.testing.assert_allclose(probabilities(logits), [[0.5, 0.3, 0.15, 0.05]])
    np.testing.assert_allclose(nn.Sampler(top_k=2).probabilities(logits), [[0.625, 0.375, 0, 0]])
    np.testing.assert_allclose(nn.Sampler(top_p=0.6).probabilities(logits), [[0.625, 0.375, 0, 0]])
    np.testing.assert_allclose(nn.Sampler(top_p=0.1).probabilities(logits), [[1, 0, 0, 0]])
    np.testing.assert_allclose(nn.Sampler(0.5).probabilities(logits), np.array([[100, 36, 9, 1]]) / 146, atol=1e-2)
    drawn = nn.Sampler(seed=1)(logits.repeat(20000, axis=0))
    np.testing.assert_allclose(np.bincount(drawn) / 20000, [0.5, 0.3, 0.15, 0.05], atol=0.01)
    for arguments, message in [
        ({"temperature": -1}, "temperature"), ({"temperature": np.nan}, "temperature"), ({"top_k": 0}, "top_k"),
        ({"top_p": 0}, "top_p"), ({"top_p": 1.1}, "top_p"), ({"top_p": np.nan}, "top_p"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            nn.Sampler(**arguments)
    with pytest.raises(TypeError, match="top_k must be an integer"):
        nn.Sampler(top_k=1.5)
    for temperature, expected in [(1e-308, [1, 0, 0, 0]), (np.inf, [0.25] * 4)]:
        np.testing.assert_allclose(nn.Sampler(temperature).probabilities(logits), [expected])
    masked = np.array([[-np.inf, 0.0, -np.inf]])
    assert nn.Sampler()(masked) == nn.Sampler(0)(masked) == [1]
    for wrong in ([[np.nan, 0]], [[0, np.inf]], [[-np.inf, -np.inf]]):
        for temperature, dtype in itertools.product((0, 1), (np.float64, np.float16, ml_dtypes.bfloat16)):
            with pytest.raises(FloatingPointError, match="NaN or infinite"):
                nn.Sampler(temperature)(np.array(wrong, dtype))


# Add and norm (check 33), packing, dtypes (check 18), configuration


@pytest.mark.parametrize("residual_in_fp32", [True, False])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16])
def test_fused_add_norm_equals_unfused(dtype: Any, residual_in_fp32: bool) -> None:
    x = ids(2, 9)
    outputs = [
        MambaLM(
            MambaConfig(12, 3, 11, fused_add_norm=fused, residual_in_fp32=residual_in_fp32), dtype
        )(x).data.astype(np.float64)
        for fused in (True, False)
    ]  # fmt: skip
    eps = float(ml_dtypes.finfo(dtype).eps)
    assert np.abs(outputs[0] - outputs[1]).max() <= 8 * eps * np.abs(outputs[0]).max()


def test_packed_sequences_do_not_see_each_other() -> None:
    model = MambaLM(SMALL, np.float64)
    x = ids(1, 9)
    packed = model(x, seq_idx=np.array([[0, 0, 0, 0, 1, 1, 2, 2, 2]])).data
    separate = np.concatenate([model(x[:, a:b]).data for a, b in ((0, 4), (4, 6), (6, 9))], axis=1)
    np.testing.assert_allclose(packed, separate, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_models(dtype: Any) -> None:
    model = MambaLM(SMALL, dtype)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (np.float32 if name.endswith(("A_log", ".D")) else dtype)
    state = model.new_states(2)[0]
    assert state.conv.dtype == dtype
    assert state.ssm.dtype == np.float32
    wide = MambaLM(SMALL, np.float64)
    wide.load_state_dict(model.state_dict())
    x = ids(2, 9)
    eps = float(ml_dtypes.finfo(dtype).eps)
    logits = model(x)
    assert logits.dtype == dtype
    np.testing.assert_allclose(logits.data.astype(np.float64), wide(x).data, atol=8 * eps * np.abs(wide(x).data).max())
    model.loss(x, x).backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())
    assert [len(made) for made in model.generate(x, 3)] == [3, 3]


def test_float32_state_beats_a_half_precision_state() -> None:
    model, wide = MambaLM(SMALL, ml_dtypes.bfloat16), MambaLM(SMALL, np.float64)
    for layer in model.backbone.layers:  # where B and C are small, so is what the states have in the result
        layer.mixer.x_proj.weight.data *= 16
    wide.load_state_dict(model.state_dict())
    x = ids(1, 200)
    exact, errors = wide(x).data, {}
    for name in ("float32", "bfloat16"):
        states, worst = model.new_states(1), []
        for t in range(200):
            if name == "bfloat16":
                for s in states:
                    s.ssm.data[...] = s.ssm.data.astype(ml_dtypes.bfloat16)
            logits = model.step(x[:, t], states).astype(np.float64)
            worst.append(np.abs(logits - exact[:, t]).mean())
        errors[name] = np.mean(worst)
    assert 1.5 * errors["float32"] < errors["bfloat16"]


def test_config_reads_released_files_and_refuses_others() -> None:
    released = {
        "d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    }  # fmt: skip
    assert MambaConfig.from_dict(released) == MambaConfig(768, 24)
    assert MambaConfig.from_dict(SMALL.to_dict()) == SMALL
    with pytest.raises(ValueError, match="attn_layer_idx = \\[1\\] is not supported"):
        MambaConfig.from_dict({**released, "attn_layer_idx": [1]})
    for ssm_cfg in ({"layer": "Mamba1"}, {}):
        assert MambaConfig.from_dict({**released, "ssm_cfg": ssm_cfg}) == MambaConfig(768, 24)
    with pytest.raises(ValueError, match="layer = 'Mamba2' is not supported"):
        MambaConfig.from_dict({**released, "ssm_cfg": {"layer": "Mamba2"}})
    with pytest.raises(ValueError, match="ssm_cfg has 'wings', which is no argument of a Mamba block"):
        MambaConfig(ssm_cfg={"wings": 2})
