"""sscan.nn: models of any layers."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import torch
from nn_cases import ATTENTION, EVERY, H3, HYENA, S4, S6

from sscan import nn
from sscan.models.files import load_arrays
from sscan.nn import SequenceConfig, SequenceModel

if TYPE_CHECKING:
    from pathlib import Path

RECURRENT = ("mamba", S6, S4, H3, "mlp", "glu")


def ids(batch: int, length: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 11, (batch, length))


def model_of(*layers: Any, seed: int = 0, dtype: Any = np.float64, **config: Any) -> SequenceModel:
    """A model whose parameters are away from their initial values."""
    model = SequenceModel(SequenceConfig(8, 11, layers, **config), dtype, seed)
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * rng.standard_normal(parameter.shape).astype(dtype)
    return model


def test_of_mamba_blocks_it_is_the_mamba_language_model() -> None:
    config = nn.MambaConfig(12, 2, 11, {"d_state": 4})
    layer = {"layer": "mamba", "d_state": 4}
    model = SequenceModel(SequenceConfig(12, 11, [layer] * 2, pad_vocab_size_multiple=8))
    expected = nn.MambaLM(config)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}
    for name, array in expected.state_dict().items():  # from the same seed
        np.testing.assert_array_equal(model.state_dict()[name], array)
    np.testing.assert_array_equal(model(ids(2, 9)).data, expected(ids(2, 9)).data)
    states, theirs = model.new_states(2), expected.new_states(2)
    for part in (slice(0, 4), slice(4, 9)):
        got, states = model.prefill(ids(2, 9)[:, part], states)
        logits, theirs = expected.prefill(ids(2, 9)[:, part], theirs)
        np.testing.assert_array_equal(got, logits)


@pytest.mark.parametrize("positions", ["none", "absolute"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_it_is_a_residual_stream(norm: str, positions: str) -> None:
    model = model_of(S6, "mlp", norm=norm, positions=positions, tie_embeddings=False)
    x = ids(2, 9)
    stream = torch.tensor(model.backbone.embedding.weight.data[x])
    if positions == "absolute":
        t, i = np.arange(9)[:, None], np.arange(4)
        angle = t / 10000 ** (2 * i / 8)
        stream += 0.02 * np.sqrt(2) * torch.tensor(np.concatenate([np.sin(angle), np.cos(angle)], axis=1))

    def normalised(stream: Any, module: Any) -> Any:
        parameters = [torch.tensor(p.data) for p in module.parameters()]
        if norm == "rms":
            return torch.nn.functional.rms_norm(stream, (8,), *parameters, 1e-5)
        return torch.nn.functional.layer_norm(stream, (8,), *parameters, 1e-5)

    for block in model.backbone.layers:
        stream = stream + torch.tensor(block.mixer(normalised(stream, block.norm).numpy()).data)
    logits = normalised(stream, model.backbone.norm_f) @ torch.tensor(model.lm_head.weight.data).T
    np.testing.assert_allclose(model(x).data, logits.numpy(), rtol=1e-6, atol=1e-7)
    targets = ids(2, 9, seed=1)
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 11), torch.tensor(targets.reshape(-1)))
    np.testing.assert_allclose(model.loss(x, targets).item(), expected.item(), rtol=1e-6)


def test_no_token_sees_what_is_to_come() -> None:
    model = model_of(*EVERY)
    x = ids(1, 12)
    logits = model(x).data
    for t in (2, 9):
        changed = x.copy()
        changed[0, t] = (x[0, t] + 1) % 11
        difference = np.abs(model(changed).data - logits).max(axis=(0, 2))
        assert (difference[:t] < 1e-11).all()
        assert (difference[t:] > 1e-6).all()


def test_gradients() -> None:
    layers = {**S6, "d_state": 2, "expand": 1}, {**ATTENTION, "heads": 1}
    config = SequenceConfig(4, 5, layers, norm="layer", positions="absolute", tie_embeddings=False)
    model = SequenceModel(config, np.float64)
    for parameter in model.parameters():
        parameter.data += 0.2 * np.random.default_rng(0).standard_normal(parameter.shape)
    x, y = ids(1, 5) % 5, ids(1, 5, seed=1) % 5
    nn.check_gradients(lambda *_: model.loss(x, y), *model.parameters())


def test_pieces_and_steps_are_the_whole() -> None:
    model = model_of(*RECURRENT)
    x = ids(3, 9)
    expected = model(x).data
    states = model.new_states(3)
    logits, states = model.prefill(x[:, :3], states)
    np.testing.assert_allclose(logits, expected[:, 2], rtol=1e-10, atol=1e-11)
    whole, states = model.extend(x[:, 3:6], states)
    np.testing.assert_allclose(whole.data, expected[:, 3:6], rtol=1e-10, atol=1e-11)
    for t in range(6, 9):
        np.testing.assert_allclose(model.step(x[:, t], states), expected[:, t], rtol=1e-10, atol=1e-11)


def test_models_without_states_say_which_layers_have_none() -> None:
    with pytest.raises(NotImplementedError, match=r"with layer 4 \('hyena'\), layer 5 \('attention'\)$"):
        model_of(*EVERY).new_states(1)
    with pytest.raises(NotImplementedError, match="states of constant size with absolute positions"):
        model_of(S6, positions="absolute").new_states(1)
    with pytest.raises(ValueError, match="new_states: batch must be at least 0, got -1"):
        model_of(*RECURRENT).new_states(-1)
    with pytest.raises(NotImplementedError, match="absolute positions do not begin anew in packed sequences"):
        model_of(S6, positions="absolute")(np.zeros((1, 4), np.int32), np.zeros((1, 4), np.int32))


def test_files(tmp_path: Path) -> None:
    config = SequenceConfig(8, 11, EVERY, norm="layer", positions="absolute", dropout=0.1, pad_vocab_size_multiple=4)
    assert SequenceConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for changes in ({}, {"tie_embeddings": False}):
        model = SequenceModel(dataclasses.replace(config, **changes), seed=3)
        assert model.config.shapes() == {n: a.shape for n, a in model.state_dict().items()}
        assert model.config.parameter_count() == model.parameter_count() == sum(p.data.size for p in model.parameters())
        model.save_pretrained(tmp_path)
        again = SequenceModel.from_pretrained(tmp_path)
        assert again.config == model.config
        np.testing.assert_array_equal(again(ids(2, 9)).data, model(ids(2, 9)).data)
    arrays, _ = load_arrays(tmp_path / "model.safetensors")
    assert arrays.keys() == model.state_dict().keys()
    for values, message in [
        ({**config.to_dict(), "heads": 2}, "config.json: SequenceConfig: unknown key 'heads'"),
        ({"d_model": 8, "vocab_size": 11}, "config.json: SequenceConfig: missing key 'layers'"),
        (dataclasses.replace(config, layers=EVERY[1:]).to_dict(), "model.safetensors: .*missing key|unknown key"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=message):
            SequenceModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"layers": ()}, TypeError, r"layers must be a list of one layer at least, got \(\)"),
    ({"layers": "mamba"}, TypeError, "layers must be a list of one layer at least, got 'mamba'"),
    ({"layers": ("s6",)}, ValueError, "layer 0 must be one of mamba, .*, or a dict with it as 'layer', got 's6'"),
    ({"layers": ("mlp", {"inner": "s6"})}, ValueError, "layer 1 must be one of"),
    ({"layers": ({**S6, "inner": "s5"},)}, ValueError, "layer 0, 'gated': Gated: inner must be one of s6, s4, hyena"),
    ({"layers": ({**S6, "heads": 2},)}, ValueError, "layer 0, 'gated': .* unexpected keyword argument 'heads'"),
    ({"layers": ({**S6, "seed": 2},)}, ValueError, "layer 0, 'gated': .* multiple values .* 'seed'"),
    ({"layers": ({**S6, "dt_rank": np.float32},)}, TypeError, "layer 0, 'gated': .* not JSON serializable"),
    ({"norm": "batch"}, ValueError, "norm must be one of rms, layer, got 'batch'"),
    ({"positions": "rotary"}, ValueError, "positions must be one of none, absolute, got 'rotary'"),
    ({"dropout": 1.0}, ValueError, "dropout must be below 1, got 1.0"),
    ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
])  # fmt: skip
def test_wrong_configurations(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"SequenceConfig: {message}"):
        SequenceConfig(**{"d_model": 8, "vocab_size": 11, "layers": (S6,), **changes})


def test_parameter_counts_of_the_paper() -> None:
    """Attention in Table 11 has 137K parameters: two layers of attention alone, with LayerNorm and an untied head."""
    config = SequenceConfig(128, 16, ("attention",) * 2, norm="layer", tie_embeddings=False)
    assert config.parameter_count() == 136_960
    # Tables 9 and 10 keep their counts when B and C are fixed.
    for d_state, millions in [(1, 367.1), (2, 367.4), (4, 368.0), (8, 369.1), (16, 371.5)]:
        for selective in (["delta"], ["delta", "B", "C"]):
            layer = {"layer": "gated", "d_state": d_state, "selective": selective}
            count = SequenceConfig(1024, 50264, (layer,)).parameter_count()
            assert round((48 * (count - 50264 * 1024 - 1024) + 50264 * 1024 + 1024) / 1e6, 1) == millions


def test_dropout_is_for_training() -> None:
    model = model_of(S6, dropout=0.5)
    losses = {model.loss(ids(2, 9), ids(2, 9)).item() for _ in range(4)}
    assert len(losses) == 4
    with nn.no_grad():
        plain = model_of(S6)
        assert model.loss(ids(2, 9), ids(2, 9)).item() == plain.loss(ids(2, 9), ids(2, 9)).item()


def test_mixed_precision_learns_as_float32_does() -> None:
    x = np.arange(66).reshape(2, 33) % 7
    for layers in ((S6, S4), (H3, "glu"), (HYENA, ATTENTION)):
        ends = []
        for activation_dtype in (np.float32, ml_dtypes.bfloat16):
            model = SequenceModel(SequenceConfig(8, 11, layers), activation_dtype=activation_dtype)
            optimiser = nn.AdamW(nn.decay_groups(model), lr=2e-2)
            for _ in range(30):
                model.zero_grad()
                loss = model.loss(x[:, :-1], x[:, 1:])
                loss.backward()
                optimiser.step()
            ends.append(loss.item())
        assert max(ends) < 1.2
        assert abs(ends[0] - ends[1]) < 0.02 * 2.4  # of a loss that was 2.4 to begin with
