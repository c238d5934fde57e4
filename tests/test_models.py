"""Language models in files and out of them: frameworks, formats, kinds of files; and transformers' own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from cases import assert_within, eps_of

import sscan.nn
import sscan.torch
from sscan.models import MambaConfig
from sscan.models.files import load_arrays, save_arrays, write_together
from sscan.models.pretrained import open_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONFIG = MambaConfig(d_model=24, n_layer=3, vocab_size=43, ssm_cfg={"d_state": 8})
CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    "untied": {"tie_embeddings": False},
    "every_option": {
        "ssm_cfg": {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 4, "bias": True, "conv_bias": False},
        "norm_epsilon": 1e-3,
    },
    "stream": {"residual_in_fp32": False, "fused_add_norm": False, "pad_vocab_size_multiple": 1},
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
FORMATS = ("original", "transformers")
formats = pytest.mark.parametrize("format", FORMATS)


def config_with(change: dict[str, Any]) -> MambaConfig:
    return MambaConfig(**{**CONFIG.to_dict(), **change})


def perturbed(config: MambaConfig = CONFIG, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model none of whose parameters is as regular as initial values are."""
    torch.manual_seed(seed)
    model = sscan.torch.MambaLM(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def ids(batch: int = 2, length: int = 21, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 43, (batch, length))


def logits_of(model: Any, tokens: Any) -> Any:
    if isinstance(model, sscan.nn.MambaLM):
        return model(tokens).data
    out = model(torch.from_numpy(tokens))
    return getattr(out, "logits", out).detach().float().numpy()


def parameters_of(model: Any) -> dict[str, Any]:
    if isinstance(model, sscan.nn.MambaLM):
        return {name: p.data for name, p in model.named_parameters()}
    return {name: sscan.torch.language_model.array_of(p) for name, p in model.named_parameters()}


def assert_same_bits(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.dtype == second[name].dtype, name
        assert array.tobytes() == second[name].tobytes(), name


# Configurations

RELEASED = {  # what stands in the config.json of the converted released models, with much of it said twice
    "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536, "d_model": 768,
    "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu", "hidden_size": 768,
    "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05, "model_type": "mamba",
    "n_layer": 24, "num_hidden_layers": 24, "pad_token_id": 0, "pad_vocab_size_multiple": 8,
    "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True, "ssm_cfg": {}, "state_size": 16,
    "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
    "time_step_rank": 48, "time_step_scale": 1.0, "torch_dtype": "float32", "transformers_version": "4.39.0.dev0",
    "use_bias": False, "use_cache": True, "use_conv_bias": True, "vocab_size": 50280,
}  # fmt: skip


def test_configurations_of_released_models() -> None:
    config = MambaConfig.from_dict(RELEASED)
    assert config == MambaConfig(768, 24, 50280, pad_vocab_size_multiple=1)
    assert config.parameter_count() == 129_135_360


def test_what_transformers_takes_for_granted() -> None:
    theirs = transformers.MambaConfig()
    ours = MambaConfig.from_dict({"model_type": "mamba"})
    assert (ours.d_model, ours.n_layer, ours.vocab_size) == (
        theirs.hidden_size, theirs.num_hidden_layers, theirs.vocab_size,
    )  # fmt: skip
    assert MambaConfig.from_dict(theirs.to_dict()) == MambaConfig.from_dict(theirs.to_diff_dict()) == ours


@changes
@formats
def test_configurations_survive_either_format(change: dict[str, Any], format: Any) -> None:
    config = config_with(change)
    assert MambaConfig.from_dict(json.loads(json.dumps(config.to_dict(format)))) == config


@changes
def test_transformers_reads_our_configuration(change: dict[str, Any]) -> None:
    config = config_with(change)
    theirs = transformers.MambaConfig(**config.to_dict("transformers"))
    block = config.block
    assert (theirs.hidden_size, theirs.num_hidden_layers, theirs.vocab_size) == (24, 3, config.padded_vocab_size)
    assert (theirs.state_size, theirs.conv_kernel, theirs.expand) == (block.d_state, block.d_conv, block.expand)
    assert (theirs.use_bias, theirs.use_conv_bias) == (block.bias, block.conv_bias)
    assert (theirs.intermediate_size, theirs.time_step_rank) == block.sizes(24)
    assert (theirs.layer_norm_epsilon, theirs.tie_word_embeddings) == (config.norm_epsilon, config.tie_embeddings)
    assert theirs.residual_in_fp32 == config.residual_in_fp32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "falcon_mamba"}, "'falcon_mamba' .whose blocks normalise dt, B and C. is not supported"),
        ({"model_type": "mamba2"}, "model_type = 'mamba2' is not supported, only 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, expected 'silu'"),
        ({"intermediate_size": 1000}, "intermediate_size = 1000 is not supported, expected 1536"),
        ({"d_model": 512}, "d_model = 512 is not supported, expected 768"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg = .* is not supported, expected {}"),
        ({"wings": 2}, "wings = 2 is not supported$"),
        ({"architectures": ["MambaModel"]}, "architectures = .* expected .'MambaForCausalLM'"),
        ({"num_hidden_layers": 0, "n_layer": 0}, "n_layer must be at least 1, got 0"),
    ],
)
def test_configurations_of_other_models(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MambaConfig.from_dict({**RELEASED, **change})


def test_formats_that_are_none() -> None:
    with pytest.raises(ValueError, match="format must be 'original' or 'transformers', got 'gguf'"):
        CONFIG.to_dict("gguf")  # type: ignore[arg-type]
    zoh = MambaConfig(8, 1, 5, {"discretization": "zoh"})
    with pytest.raises(ValueError, match="transformers has no discretization = 'zoh'"):
        zoh.to_dict("transformers")
    with pytest.raises(ValueError, match=r"sscan\.torch has no discretization = 'zoh'; sscan\.nn has"):
        sscan.torch.MambaLM(zoh)
    assert sscan.nn.MambaLM(zoh).config.block.discretization == "zoh"


# Names and initial values


@changes
def test_names_and_shapes_are_the_same_everywhere(change: dict[str, Any]) -> None:
    config = config_with(change)
    expected = config.shapes()
    ours = {name: array.shape for name, array in sscan.nn.MambaLM(config, seed=None).state_dict().items()}
    theirs = {name: tuple(x.shape) for name, x in sscan.torch.MambaLM(config, device="meta").state_dict().items()}
    assert ours == theirs == expected
    assert list(ours) == list(expected)
    assert config.parameter_count() == sum(p.numel() for p in sscan.torch.MambaLM(config).parameters())


def test_initial_values_in_pytorch() -> None:
    torch.manual_seed(0)
    config = MambaConfig(64, 9, 256, {"bias": True})
    model = sscan.torch.MambaLM(config)
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert abs(model.lm_head.weight.std().item() - 0.02) < 1e-3
    mixer = model.backbone.layers[4].mixer
    bound = 1 / 128**0.5 / 3  # d_inner, and the root of n_layer
    assert 0.9 * bound < mixer.out_proj.weight.abs().max().item() <= bound
    assert not mixer.in_proj.bias.any()
    assert not mixer.out_proj.bias.any()
    assert not sscan.torch.MambaLM(MambaConfig(8, 1, 8, tie_embeddings=False)).lm_head.weight.equal(
        model.backbone.embedding.weight[:8, :8]
    )
    assert mixer.A_log.dtype == sscan.torch.MambaLM(config, dtype=torch.bfloat16).backbone.layers[0].mixer.D.dtype


def test_decay_groups_are_those_of_sscan_nn() -> None:
    config = config_with(CHANGES["every_option"])
    expected = [set(group["parameters"]) for group in sscan.nn.decay_groups(sscan.nn.MambaLM(config, seed=None))]
    model = perturbed(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = sscan.torch.decay_groups(model)
    assert [{names[id(p)] for p in group["params"]} for group in groups] == expected
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    model.backbone.norm_f.weight.requires_grad_(False)
    assert sum(len(group["params"]) for group in sscan.torch.decay_groups(model)) == len(names) - 1
    torch.optim.AdamW(groups)


# Values

MODELS = {"nn": sscan.nn.MambaLM, "torch": sscan.torch.MambaLM}
DTYPES = {"float32": (np.float32, torch.float32), "bfloat16": (ml_dtypes.bfloat16, torch.bfloat16)}


def load(framework: str, folder: Path, dtype: str = "float32") -> Any:
    of_numpy, of_torch = DTYPES[dtype]
    if framework == "nn":
        return sscan.nn.MambaLM.from_pretrained(folder, of_numpy)
    return sscan.torch.MambaLM.from_pretrained(folder, dtype=of_torch)


@changes
@formats
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trips(change: dict[str, Any], format: Any, pickled: bool, dtype: str, tmp_path: Path) -> None:
    """Through every framework and file the parameters keep their bits, their marks and whether they are shared."""
    model = perturbed(config_with(change), DTYPES[dtype][1])
    expected = parameters_of(model)
    for i, framework in enumerate(["torch", "nn", "torch"]):
        folder = tmp_path / str(i)
        model.save_pretrained(folder, format, pickled=pickled)
        assert {path.name for path in folder.iterdir()} == {
            "config.json", "pytorch_model.bin" if pickled else "model.safetensors",
        }  # fmt: skip
        model = load(framework, folder, dtype)
        assert model.config == config_with(change)
        assert_same_bits(parameters_of(model), expected)
    assert (model.lm_head.weight is model.backbone.embedding.weight) == model.config.tie_embeddings
    assert model.backbone.layers[0].mixer.A_log._no_weight_decay
    assert model.backbone.layers[0].mixer.dt_proj.bias._no_reinit


def test_a_folder_has_the_weights_of_one_model(tmp_path: Path) -> None:
    for pickled, name in ((True, "pytorch_model.bin"), (False, "model.safetensors"), (True, "pytorch_model.bin")):
        perturbed().save_pretrained(tmp_path, pickled=pickled)
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", name}


def exact_logits(model: Any, tokens: Any) -> Any:
    """Of the same weights in float64, through sscan.nn, whose formulas have tests of their own."""
    wide = sscan.nn.MambaLM(model.config, np.float64, seed=None)
    wide.load_state_dict({name: array.astype(np.float64) for name, array in parameters_of(model).items()})
    return wide(tokens).data


@changes
def test_frameworks_agree_with_transformers(change: dict[str, Any], tmp_path: Path) -> None:
    """On weights written by sscan.torch, and no worse than transformers is on the same."""
    ours = perturbed(config_with(change))
    ours.save_pretrained(tmp_path, "transformers")
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path).eval()
    tokens = ids()
    exact, reference = exact_logits(ours, tokens), logits_of(theirs, tokens)
    for model in (ours, load("torch", tmp_path), load("nn", tmp_path)):
        assert_within(logits_of(model, tokens), reference, exact, eps_of(np.float32), "logits")
    assert np.abs(exact).max() > 0.5  # that there is something to agree on


def test_transformers_own_folders(tmp_path: Path) -> None:
    """Written by transformers, whole and in shards: the same bits, and the same logits."""
    torch.manual_seed(1)
    config = transformers.MambaConfig(vocab_size=43, hidden_size=24, state_size=8, num_hidden_layers=3, use_bias=True)
    theirs = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = {name.replace("embeddings", "embedding"): p.detach().numpy() for name, p in theirs.named_parameters()}
    for name, size in (("whole", "1GB"), ("shards", "20KB")):
        theirs.save_pretrained(tmp_path / name, max_shard_size=size)
        assert (tmp_path / name / "model.safetensors.index.json").exists() == (name == "shards")
        for framework in MODELS:
            model = load(framework, tmp_path / name)
            assert_same_bits(dict(sorted(parameters_of(model).items())), dict(sorted(expected.items())))
            exact = exact_logits(model, ids())
            assert_within(logits_of(model, ids()), logits_of(theirs, ids()), exact, eps_of(np.float32), framework)


def test_half_precision_and_autocast() -> None:
    """bfloat16 weights, and bfloat16 autocast over float32 ones: as far from exact as the dtype, and no farther."""
    wide = perturbed()
    half = sscan.torch.MambaLM(CONFIG, dtype=torch.bfloat16)
    half.load_state_dict(wide.state_dict())
    exact = exact_logits(wide, ids())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = logits_of(wide, ids())
    mixed_nn = sscan.nn.MambaLM(CONFIG, seed=None, activation_dtype=ml_dtypes.bfloat16)
    mixed_nn.load_state_dict(parameters_of(wide))
    scale = np.abs(exact).max()
    reference = np.abs(logits_of(mixed_nn, ids()) - exact).max() / scale
    assert 1e-4 < reference < 0.05
    for made in (mixed, logits_of(half, ids())):
        assert 1e-4 < np.abs(made - exact).max() / scale < 3 * reference


@pytest.mark.parametrize("in_fp32", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_dtype_of_the_residual_stream(in_fp32: bool, fused: bool) -> None:
    config = config_with({"residual_in_fp32": in_fp32, "fused_add_norm": fused})
    model = perturbed(config, torch.bfloat16)
    dtypes: list[Any] = []
    for layer in model.backbone.layers:
        layer.register_forward_hook(lambda layer, given, made: dtypes.extend(x.dtype for x in made))
    model(torch.from_numpy(ids()))
    assert dtypes == [torch.bfloat16, torch.float32 if in_fp32 else torch.bfloat16] * 3


def test_states_under_autocast_are_those_that_steps_take() -> None:
    model = perturbed()
    tokens = torch.from_numpy(ids())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(tokens)
        _, states = model.extend(tokens[:, :10], model.new_states(2))
        fresh = model.new_states(2)
        for (name, made), (_, expected) in zip(states.named_tensors(), fresh.named_tensors(), strict=True):
            assert (made.dtype, made.shape) == (expected.dtype, expected.shape), name
        for t in range(10, 21):
            logits = model.step(tokens[:, t], states)
    scale = whole.float().abs().max().item()
    assert (logits.float() - whole[:, -1].float()).abs().max().item() < 0.03 * scale


def test_training_in_pytorch() -> None:
    """Gradients of all parameters, against those of sscan.nn in float64."""
    model = perturbed(config_with(CHANGES["every_option"]), torch.float64)
    tokens, targets = ids(2, 9), ids(2, 9, seed=1)
    logits = model(torch.from_numpy(tokens))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten())
    loss.backward()
    ours = sscan.nn.MambaLM(model.config, np.float64, seed=None)
    ours.load_state_dict(parameters_of(model))
    expected = ours.loss(tokens, targets)
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-12
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.grad, gradients[name], rtol=1e-8, atol=1e-12, err_msg=name)


def test_models_compile() -> None:
    model = perturbed()
    tokens = torch.from_numpy(ids())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_activation_checkpointing() -> None:
    """Layers that are run again in the backward: the same gradients, bit for bit."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointImpl,
        apply_activation_checkpointing,
        checkpoint_wrapper,
    )

    gradients: list[Any] = []
    calls: list[int] = []
    for again in (False, True):
        model = perturbed()
        parameters = list(model.parameters())
        if again:
            for layer in model.backbone.layers:
                layer.mixer.register_forward_pre_hook(lambda *_: calls.append(1))
            apply_activation_checkpointing(
                model,
                lambda m: checkpoint_wrapper(m, checkpoint_impl=CheckpointImpl.NO_REENTRANT),
                check_fn=lambda m: isinstance(m, sscan.torch.language_model.ResidualBlock),
            )
        model(torch.from_numpy(ids())).square().sum().backward()
        gradients.append([p.grad for p in parameters])
    assert len(calls) == 2 * CONFIG.n_layer
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# What is wrong with files, beside test_broken_files.py


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with two shards of an untied model."""
    config = config_with(CHANGES["untied"])
    model = perturbed(config)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    arrays = parameters_of(model)
    places = {name: f"part-{(i + 1) % 2}.safetensors" for i, name in enumerate(arrays)}
    for shard in set(places.values()):
        save_arrays(tmp_path / shard, {name: arrays[name] for name in arrays if places[name] == shard})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tmp_path


def edit(path: Path, change: Callable[[Any], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_shards(sharded: Path) -> None:
    assert load("nn", sharded).config == load("torch", sharded).config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.clear(), "index.json: holds no weight_map from names to files"),
        (lambda v: v.update(weight_map=[1]), "index.json: holds no weight_map"),
        (lambda v: v["weight_map"].update(D=3), "index.json: holds no weight_map"),
        (lambda v: v["weight_map"].update(D="../part-0.safetensors"), "'../part-0.safetensors' is no name of a file"),
        (lambda v: v["weight_map"].update(D="/etc/passwd"), "'/etc/passwd' is no name of a file beside it"),
        (lambda v: v["weight_map"].update(D="part-0.safetensors"), "index.json: 'D' is in no file"),
        (lambda v: v["weight_map"].pop("lm_head.weight"), "'lm_head.weight' is in a file, but not in the index"),
        (
            lambda v: v["weight_map"].update({"lm_head.weight": "part-0.safetensors"}),
            "'lm_head.weight' is in part-1.safetensors, not in part-0.safetensors",
        ),
    ],
)
def test_broken_indices(change: Any, message: str, sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    assert json.loads(index.read_text())["weight_map"]["lm_head.weight"] == "part-1.safetensors"
    edit(index, change)
    with pytest.raises(ValueError, match=message):
        load("nn", sharded)


def test_shards_that_are_missing(sharded: Path) -> None:
    (sharded / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"part-1\.safetensors"):
        load("nn", sharded)


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


PICKLES: dict[str, tuple[Any, str]] = {
    "harmful": (lambda path: torch.save({"a": Harmful()}, path), "Weights only load failed"),
    "number": (lambda path: torch.save({"a": 3}, path), "holds something else than tensors by name"),
    "list": (lambda path: torch.save([torch.ones(2)], path), "holds something else than tensors by name"),
    "other": (lambda path: torch.save({"a": torch.ones(2)}, path), "holds 1 arrays, too few for n_layer = 3"),
    "empty": (lambda path: path.write_bytes(b""), "ends too early|Ran out of input|failed"),
    "zeros": (lambda path: path.write_bytes(bytes(100)), "failed|invalid"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "not a whole file of torch.save"),
}


@pytest.mark.parametrize(("write", "message"), PICKLES.values(), ids=PICKLES)
def test_broken_pickles(write: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    perturbed().save_pretrained(tmp_path, pickled=True)
    write(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin: .*({message})"):
        load("torch", tmp_path)
    assert not (tmp_path / "harm").exists()


def test_pickles_of_old_pytorch(tmp_path: Path) -> None:
    model = perturbed()
    model.save_pretrained(tmp_path, pickled=True)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same_bits(parameters_of(load("nn", tmp_path)), parameters_of(model))


def test_pickles_without_pytorch(tmp_path: Path) -> None:
    perturbed().save_pretrained(tmp_path, pickled=True)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from sscan.nn import MambaLM\n"
        "try: MambaLM.from_pretrained(sys.argv[1])\n"
        "except ValueError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert said.stdout == (
        f"{tmp_path}/pytorch_model.bin: only PyTorch, which is not here, reads and writes these; where it is, "
        "`sscan convert` makes a model.safetensors of it, which needs no PyTorch\n"
    )


def test_a_pickle_is_not_begun_without_pytorch(tmp_path: Path) -> None:
    perturbed().save_pretrained(tmp_path / "model")
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from sscan.models.pretrained import convert\n"
        "try: convert(sys.argv[1], sys.argv[2], 'original', pickled=True)\n"
        "except ValueError as error: print(error)"
    )
    new = tmp_path / "new"
    command = [sys.executable, "-c", program, str(tmp_path / "model"), str(new)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout == (
        f"{new}/pytorch_model.bin: only PyTorch, which is not here, reads and writes these; a model.safetensors is "
        "written without it\n"
    )
    assert not new.exists()


def test_a_pickle_takes_the_place_of_safetensors(tmp_path: Path) -> None:
    perturbed(seed=1).save_pretrained(tmp_path)
    model = perturbed(seed=2)
    model.save_pretrained(tmp_path, pickled=True)
    assert_same_bits(parameters_of(load("torch", tmp_path)), parameters_of(model))
    model = perturbed(seed=3)
    model.save_pretrained(tmp_path)
    assert_same_bits(parameters_of(load("torch", tmp_path)), parameters_of(model))


def test_files_that_belong_together_are_replaced_together(tmp_path: Path) -> None:
    """If one cannot be written, the others stay as they were, and nothing is left behind."""
    (tmp_path / "first").write_text("old")

    def full(new: Path) -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write_together({tmp_path / "first": lambda new: new.write_text("new"), tmp_path / "second": full})
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    assert (tmp_path / "first").read_text() == "old"


@pytest.mark.parametrize("framework", MODELS)
def test_values_beyond_the_dtype(framework: str, tmp_path: Path) -> None:
    model = perturbed(dtype=torch.float64)
    with torch.no_grad():
        model.backbone.norm_f.weight[3] = 1e300
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors: 'backbone.norm_f.weight' has values that float32"):
        load(framework, tmp_path)


@pytest.mark.parametrize("framework", MODELS)
def test_tied_embeddings_under_both_names(framework: str, tmp_path: Path) -> None:
    """As the original writes them; two that differ are not one."""
    model = perturbed()
    model.save_pretrained(tmp_path)
    arrays = parameters_of(model)
    table = arrays["backbone.embedding.weight"]
    save_arrays(tmp_path / "model.safetensors", {**arrays, "lm_head.weight": table})
    assert_same_bits(parameters_of(load(framework, tmp_path)), arrays)
    save_arrays(tmp_path / "model.safetensors", {**arrays, "lm_head.weight": table + 1e-3})
    with pytest.raises(ValueError, match=r"model\.safetensors: .* are one parameter, but their values differ"):
        load(framework, tmp_path)
    del arrays["backbone.embedding.weight"]
    save_arrays(tmp_path / "model.safetensors", {**arrays, "lm_head.weight": table})
    assert load(framework, tmp_path).config == CONFIG


def test_files_say_that_they_are_pytorchs(tmp_path: Path) -> None:
    """Which older releases of transformers ask for."""
    perturbed().save_pretrained(tmp_path)
    assert load_arrays(tmp_path / "model.safetensors")[1] == {"format": "pt"}


# The hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of huggingface_hub with one model in it, as the hub would have filled it."""
    repository = tmp_path / "hub" / "models--somebody--tiny-mamba"
    commit = "0123456789abcdef0123456789abcdef01234567"
    perturbed().save_pretrained(repository / "snapshots" / commit, "transformers")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return tmp_path / "hub"


def in_another_process(cache: Path, program: str) -> str:
    program = f"from sscan.nn import MambaLM\ntry:\n    {program}\nexcept Exception as error: print(repr(error))"
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_models_from_the_hub_are_taken_from_its_cache(cache: Path) -> None:
    said = in_another_process(cache, "print(MambaLM.from_pretrained('somebody/tiny-mamba').config.vocab_size)")
    assert said == "43\n"


def test_models_that_are_nowhere(cache: Path, tmp_path: Path) -> None:
    said = in_another_process(cache, "MambaLM.from_pretrained('somebody/else')")
    assert said.startswith("FileNotFoundError('somebody/else: no such folder, and no config.json of it on the hub: ")
    said = in_another_process(cache, "MambaLM.from_pretrained('somebody/tiny-mamba', revision='v9')")
    assert said.startswith("FileNotFoundError('somebody/tiny-mamba: no such folder, and no config.json of it")
    said = in_another_process(
        cache, "import sys; sys.modules['huggingface_hub'] = None; MambaLM.from_pretrained('a/b')"
    )
    assert "to load models by their names on the hub: pip install" in said
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load("nn", tmp_path / "nothing")
    with pytest.raises(ValueError, match="revision is for models on the hub, got 'main'"):
        sscan.nn.MambaLM.from_pretrained(tmp_path, revision="main")


def test_folders_that_look_like_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Come first: runs/book-1 is where `sscan train` puts its models."""
    perturbed().save_pretrained(tmp_path / "runs" / "book-1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert sscan.nn.MambaLM.from_pretrained("runs/book-1").config == CONFIG


def test_weights_are_a_mapping_of_the_original_names(tmp_path: Path) -> None:
    model = perturbed()
    model.save_pretrained(tmp_path, "transformers")
    with open_model(tmp_path) as (config, weights):
        assert config == CONFIG
        assert_same_bits(dict(weights), dict(sorted(parameters_of(model).items())))
