"""sscan.jax.nnx and sscan.jax.equinox: blocks and language models, against those of sscan.nn with the same weights."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sscan.jax.equinox
import sscan.jax.nnx
from sscan.models import MambaConfig
from sscan.nn import Mamba, MambaLM, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONFIG = MambaConfig(d_model=12, n_layer=2, vocab_size=21, ssm_cfg={"d_state": 5})
CHANGES: dict[str, dict[str, Any]] = {
    "untied": {"tie_embeddings": False, "residual_in_fp32": False, "norm_epsilon": 1e-3},
    "every option": {
        "ssm_cfg": {"d_state": 4, "d_conv": 3, "expand": 3, "dt_rank": 4, "bias": True, "conv_bias": False}
    },
    "zoh": {"ssm_cfg": {"d_state": 4, "discretization": "zoh"}},
}
FRAMEWORKS = {"nnx": sscan.jax.nnx, "equinox": sscan.jax.equinox}
frameworks = pytest.mark.parametrize("framework", FRAMEWORKS)
changes = pytest.mark.parametrize("change", CHANGES)


@pytest.fixture
def double() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def perturbed(folder: Path, change: str = "untied") -> MambaLM:
    """A model in float64, none of whose parameters is as regular as initial values are, also in the folder."""
    model = MambaLM(MambaConfig(**{**CONFIG.to_dict(), **CHANGES[change]}), np.float64)
    rng = np.random.default_rng(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * rng.standard_normal(parameter.shape)
    model.save_pretrained(folder)
    return model


def made(framework: str, *arguments: Any, seed: int = 0, kind: str = "Mamba", **options: Any) -> Any:
    source = {"rngs": nnx.Rngs(seed)} if framework == "nnx" else {"key": jax.random.key(seed)}
    return getattr(FRAMEWORKS[framework], kind)(*arguments, **source, **options)


def arrays_of(module: Any) -> dict[str, Any]:
    """The parameters, or their gradients, by name, in whatever the framework keeps them."""
    tree = nnx.state(module, nnx.Param) if isinstance(module, nnx.Module) else module
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sscan.jax._block.name_of(path): np.asarray(leaf) for path, leaf in leaves}


def taken_apart(module: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The module as a tree that any transformation of JAX takes, and the way back."""
    if isinstance(module, nnx.Module):
        graph, state = nnx.split(module)
        return state, partial(nnx.merge, graph)
    return module, lambda tree: tree


def compiled(framework: str, function: Any) -> Any:
    return (nnx.jit if framework == "nnx" else eqx.filter_jit)(function)


def assert_close(found: Any, expected: Any, name: str = "") -> None:
    """To the rounding of sums in another order, in double precision."""
    assert found.shape == expected.shape, name
    assert found.dtype == expected.dtype, name
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max(), err_msg=name)


@pytest.mark.usefixtures("double")
@frameworks
@changes
def test_a_block_is_that_of_sscan_nn(framework: str, change: str, tmp_path: Path) -> None:
    """Values and all gradients, with packed sequences and from states."""
    ours = perturbed(tmp_path, change).backbone.layers[1].mixer
    rng = np.random.default_rng(0)
    hidden, given = rng.standard_normal((2, 2, 9, 12))
    seq_idx = np.repeat([[0, 1, 2]], (4, 3, 2), axis=1).repeat(2, axis=0).astype(np.int32)
    seq_idx[1] = 0
    tensor = Tensor(hidden, requires_grad=True)
    expected = ours(tensor, seq_idx)
    (expected * given).sum().backward()
    tree, rebuilt = taken_apart(FRAMEWORKS[framework].Mamba.from_pretrained(tmp_path, 1, jnp.float64))

    @jax.jit
    def values_and_gradients(tree: Any, hidden: Any) -> Any:
        out, back = jax.vjp(lambda tree, hidden: rebuilt(tree)(hidden, seq_idx), tree, hidden)
        return out, back(given)

    out, (of_module, of_input) = values_and_gradients(tree, hidden)
    assert_close(np.asarray(out), expected.data)
    assert_close(np.asarray(of_input), tensor.grad)
    gradients, wanted = arrays_of(of_module), {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(gradients[name], gradient, name)


@pytest.mark.usefixtures("double")
@frameworks
@changes
def test_a_model_is_that_of_sscan_nn(framework: str, change: str, tmp_path: Path) -> None:
    """At once, in parts and token by token."""
    ours, ids = perturbed(tmp_path, change), np.random.default_rng(0).integers(0, 21, (3, 9))
    model = FRAMEWORKS[framework].MambaLM.from_pretrained(tmp_path, jnp.float64)
    assert {name: x.shape for name, x in arrays_of(model).items()} == {n: p.shape for n, p in ours.named_parameters()}
    expected = ours(ids).data
    assert_close(np.asarray(compiled(framework, lambda m, ids: m(ids))(model, ids)), expected)
    first, states = compiled(framework, lambda m, *rest: m.extend(*rest))(model, ids[:, :5], model.new_states(3))
    assert_close(np.asarray(first), expected[:, :5])
    step = compiled(framework, lambda m, *rest: m.step(*rest))
    for t in range(5, 9):
        logits, states = step(model, ids[:, t], states)
        assert_close(np.asarray(logits), expected[:, t])


@frameworks
def test_leading_axes(framework: str) -> None:
    """A single sequence, a batch, axes in front of it, and vmap over single ones are the same."""
    tree, rebuilt = taken_apart(made(framework, 12))
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 9, 12))
    numbers = np.repeat([0, 1], (4, 5)).astype(np.int32)

    @jax.jit
    def all_of_them(tree: Any) -> Any:
        module = rebuilt(tree)
        states = [module.extend(x[..., :8, :], module.new_state(*x.shape[:-2]))[1] for x in (hidden, hidden[1, 2])]
        return {
            "batch": module(hidden.reshape(6, 9, 12)).reshape(hidden.shape),
            "axes": module(hidden),
            "vmap": jax.vmap(jax.vmap(module))(hidden),
            "single": module(hidden[1, 2]),
            "packed": module(hidden, jnp.broadcast_to(numbers, (2, 3, 9)))[1, 2],
            "packed single": module(hidden[1, 2], jnp.asarray(numbers)),
            "step": module.step(hidden[..., 8, :], states[0])[0],
            "step single": module.step(hidden[1, 2, 8], states[1])[0],
            "none": module(hidden[:0]),
            "step of none": module.step(hidden[:0, :, 0], module.new_state(0, 3))[0],
        }

    found = {name: np.asarray(x) for name, x in all_of_them(tree).items()}
    whole = found.pop("batch")
    packed = found.pop("packed")
    assert not np.allclose(packed, whole[1, 2], atol=1e-3)
    expected = {
        "axes": whole, "vmap": whole, "single": whole[1, 2], "packed single": packed, "step": whole[..., 8, :],
        "step single": whole[1, 2, 8], "none": whole[:0], "step of none": whole[:0, :, 8],
    }  # fmt: skip
    for name, x in expected.items():
        assert found[name].shape == x.shape
        np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-5, err_msg=name)


@frameworks
def test_mixed_precision(framework: str, tmp_path: Path) -> None:
    """bfloat16 input and float32 weights, as in sscan.nn."""
    module, ours = made(framework, 12), Mamba(12)
    for name, array in arrays_of(module).items():
        dict(ours.named_parameters())[name].data = array
    hidden = jax.random.normal(jax.random.key(0), (2, 9, 12), jnp.bfloat16)
    out, state = module.extend(hidden, module.new_state(2))
    expected, end = ours.extend(Tensor(np.asarray(hidden)), ours.new_state(2))
    for found, wanted in ((out, expected), (state.conv, end.conv), (state.ssm, end.ssm)):
        assert found.dtype == wanted.dtype
        wide = np.asarray(wanted.data, np.float32)
        np.testing.assert_allclose(np.asarray(found, np.float32), wide, rtol=0, atol=0.02 * np.abs(wide).max())


@frameworks
def test_initial_values_are_distributed_as_in_sscan_nn(framework: str) -> None:
    dtype = jnp.bfloat16
    options: dict[str, Any] = {"dt_min": 0.01, "dt_init_floor": 0.02, "dt_scale": 2.0, "bias": True}
    found = arrays_of(made(framework, 64, n_layer=4, dtype=dtype, **options))
    expected = {n: p.data for n, p in Mamba(64, n_layer=4, dtype=dtype, **options).named_parameters()}
    assert found.keys() == expected.keys()
    assert not np.array_equal(found["in_proj.weight"][:64], found["in_proj.weight"][64:128])
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        quantiles, wanted = (np.quantile(x.astype(np.float64), np.linspace(0, 1, 5)) for x in (found[name], array))
        np.testing.assert_allclose(quantiles, wanted, rtol=0, atol=0.15 * (wanted[-1] - wanted[0]) + 1e-6, err_msg=name)


@frameworks
def test_seeds_and_constant_initial_values(framework: str) -> None:
    first, again, other = (arrays_of(made(framework, 12, seed=seed, dt_init="constant")) for seed in (0, 0, 1))
    assert all(np.array_equal(x, again[name]) for name, x in first.items())
    assert {name for name, x in first.items() if np.array_equal(x, other[name])} == {"A_log", "D", "dt_proj.weight"}
    assert np.all(first["dt_proj.weight"] == 1.0)  # rank 1


@frameworks
def test_optax_lowers_a_loss(framework: str) -> None:
    """To name the token before, by the recipe of the paper: what does not decay is masked."""
    config = MambaConfig(d_model=16, n_layer=1, vocab_size=8, ssm_cfg={"d_state": 4})
    model = made(framework, config, kind="MambaLM")
    ids = np.random.default_rng(0).integers(0, 8, (8, 16))
    decays = FRAMEWORKS[framework].decays

    def loss(model: Any) -> Any:
        logits = model(ids)[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, :-1]).mean()

    optimiser = optax.adamw(2e-2, mask=decays)
    losses = []
    state, rebuilt = taken_apart(model)
    memory = optimiser.init(state)

    @jax.jit
    def step(state: Any, memory: Any) -> Any:
        value, gradients = jax.value_and_grad(lambda state: loss(rebuilt(state)))(state)
        updates, memory = optimiser.update(gradients, memory, state)
        return value, optax.apply_updates(state, updates), memory

    for _ in range(30):
        value, state, memory = step(state, memory)
        losses.append(float(value))
    assert losses[0] > 1.9
    assert losses[-1] < 0.5 * losses[0]


@frameworks
def test_what_decays(framework: str) -> None:
    config = MambaConfig(d_model=16, n_layer=2, vocab_size=8, ssm_cfg={"bias": True})
    model = made(framework, config, kind="MambaLM")
    found = FRAMEWORKS[framework].decays(taken_apart(model)[0])
    named = {sscan.jax._block.name_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(found)}
    assert named == {name: parameter.decay for name, parameter in MambaLM(config).named_parameters()}


@frameworks
def test_errors_name_what_is_wrong(framework: str, tmp_path: Path) -> None:
    perturbed(tmp_path)
    module = FRAMEWORKS[framework]
    with pytest.raises(ValueError, match="Mamba: layer must be less than n_layer = 2, got 2"):
        module.Mamba.from_pretrained(tmp_path, 2)
    with pytest.raises(ValueError, match="Mamba: layer must be at least 0, got -1"):
        module.Mamba.from_pretrained(tmp_path, -1)
    with pytest.raises(TypeError, match="d_sate"):
        made(framework, 12, d_sate=3)
    with pytest.raises(ValueError, match="Mamba: dt_init must be 'random' or 'constant', got 'zero'"):
        made(framework, 12, dt_init="zero")
    block = made(framework, 12)
    for hidden in (jnp.ones(12), jnp.ones((2, 9, 11))):
        shape = re.escape(f"(..., length, d_model) with d_model = 12, got {hidden.shape}")
        with pytest.raises(ValueError, match=f"Mamba: hidden must have shape {shape}"):
            block(hidden)
    with pytest.raises(TypeError, match="Mamba: hidden must be of a floating dtype, got int32"):
        block.step(jnp.ones((2, 12), int), block.new_state(2))
    with pytest.raises(ValueError, match=r"Mamba: state.conv must be of sequences \(2,\), got those of \(3,\)"):
        block.extend(jnp.ones((2, 9, 12)), block.new_state(3))
    assert block(np.ones((2, 9, 12))).dtype == jnp.float32  # as JAX has arrays of float64


@pytest.mark.parametrize(("name", "library", "title"), [("nnx", "flax", "Flax"), ("equinox", "equinox", "Equinox")])
def test_a_missing_framework_is_named(name: str, library: str, title: str) -> None:
    assert importlib.import_module(f"sscan.jax.{name}")
    code = (
        f"import sys; sys.modules['{library}'] = None\n"
        f"try: import sscan.jax.{name}\n"
        "except ImportError as error: print(error, error.name)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert (
        run.stdout
        == f'sscan.jax.{name} needs {title}, which is installed by: pip install "sscan[{library}]" {library}\n'
    )
