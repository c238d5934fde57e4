"""``sscan.compat``: the import names, and the functions behind them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

import sscan
import sscan.compat
import sscan.compat.causal_conv1d
import sscan.compat.mamba_ssm
from sscan.compat import selective_scan_cuda
from sscan.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from sscan.compat.mamba_ssm import (
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
    selective_state_update,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAMES = ("mamba_ssm", "causal_conv1d", "selective_scan_cuda")


@pytest.fixture
def installed() -> Iterator[sscan.compat.Installation]:
    made = sscan.compat.install()
    yield made
    made.undo()


# --- Import names -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
def test_names_resolve() -> None:
    from causal_conv1d import causal_conv1d_fn as conv
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_update as update
    from mamba_ssm import Mamba
    from mamba_ssm.modules.mamba_simple import Mamba as Simple
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_ref as inner
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as scan
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update as step
    from selective_scan_cuda import bwd

    import sscan.torch

    assert Mamba is Simple is sscan.torch.Mamba
    assert (conv, update, scan, step) == (
        causal_conv1d_fn, causal_conv1d_update, selective_scan_fn, selective_state_update,
    )  # fmt: skip
    assert (inner, bwd) == (mamba_inner_ref, selective_scan_cuda.bwd)
    with pytest.raises(ModuleNotFoundError, match=r"mamba_ssm\.ops\.triton\.ssd_combined"):
        importlib.import_module("mamba_ssm.ops.triton.ssd_combined")


@pytest.mark.usefixtures("installed")
def test_attributes_of_the_package_are_its_modules() -> None:
    import mamba_ssm

    assert mamba_ssm.ops.triton.selective_state_update.selective_state_update is selective_state_update
    assert mamba_ssm.__version__.startswith("1.2.2+sscan.")


def test_what_asks_for_packages_finds_them_and_no_more_after_undo() -> None:
    assert [importlib.util.find_spec(name) for name in NAMES] == [None] * 3
    made = sscan.compat.install()
    assert all(importlib.util.find_spec(name) for name in NAMES)
    assert importlib.util.find_spec("mamba_ssm.ops.triton") is not None
    assert importlib.metadata.version("mamba-ssm") == importlib.metadata.version("mamba_ssm")
    assert importlib.metadata.version("causal_conv1d").startswith("1.5.0+sscan")
    assert "mamba_ssm" in importlib.metadata.packages_distributions()
    importlib.import_module("mamba_ssm.ops")
    made.undo()
    made.undo()
    assert [importlib.util.find_spec(name) for name in NAMES] == [None] * 3
    assert not [name for name in sys.modules if name.partition(".")[0] in NAMES]
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("mamba_ssm")


def test_says_what_it_did_and_uninstalls(caplog: pytest.LogCaptureFixture) -> None:
    before = list(sys.meta_path)
    with caplog.at_level("INFO", "sscan.compat"):
        made = sscan.compat.install()
    assert made.provided == NAMES
    assert made.kept == ()
    assert "mamba_ssm, causal_conv1d, selective_scan_cuda provided by sscan" in str(made)
    assert str(made) in caplog.text
    again = sscan.compat.install()
    assert len(sys.meta_path) == len(before) + 1
    assert again.provided == NAMES
    sscan.compat.uninstall()
    sscan.compat.uninstall()
    assert sys.meta_path == before


def test_an_installed_original_is_not_shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mamba_ssm"
    package.mkdir()
    (package / "__init__.py").write_text("original = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    original = importlib.import_module("mamba_ssm")
    try:
        made = sscan.compat.install()
        assert (made.kept, made.provided) == (("mamba_ssm",), ("causal_conv1d", "selective_scan_cuda"))
        assert "left alone, because installed: mamba_ssm" in str(made)
        assert importlib.import_module("mamba_ssm").original
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("mamba_ssm.ops")

        forced = sscan.compat.install(force=True)
        assert (forced.kept, forced.provided) == ((), NAMES)
        assert importlib.import_module("mamba_ssm").Mamba
        forced.undo()
        assert importlib.import_module("mamba_ssm") is original
    finally:
        sscan.compat.uninstall()
        del sys.modules["mamba_ssm"]


def test_installing_imports_no_torch() -> None:
    code = "import sys, sscan.compat; sscan.compat.install(); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_a_script_runs_with_the_names(tmp_path: Path) -> None:
    """As a user runs it: transformers, imported by the script, chooses its kernels by itself."""
    (tmp_path / "beside.py").write_text("found = True\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import inspect, sys, beside, mamba_ssm\n"
        "from transformers.models.mamba import modeling_mamba as m\n"
        "kernels = [m.mamba_inner_fn, m.mamba_selective_scan, m.mamba_selective_state_update, m.causal_conv1d_fn,\n"
        "           m.causal_conv1d_update]\n"
        "chosen = [inspect.getclosurevars(k).nonlocals['implementation'].__module__ for k in kernels]\n"
        "print(sys.argv[1:], __name__, *sorted(set(chosen)))\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "sscan.compat", str(script), "--flag"], capture_output=True, text=True, check=True
    )
    assert run.stdout == "['--flag'] __main__ sscan.compat.causal_conv1d sscan.compat.mamba_ssm\n"
    assert "provided by sscan" in run.stderr
    assert subprocess.run([sys.executable, "-m", "sscan.compat"], check=False, capture_output=True).returncode == 1


# --- mamba_ssm --------------------------------------------------------------------------------------------------------


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def scan_inputs(dtype: torch.dtype = torch.float64, number: torch.dtype = torch.float64) -> dict[str, Any]:
    inputs = {
        "u": random(2, 6, 21), "delta": random(2, 6, 21, seed=1), "A": -random(6, 4).exp(), "B": random(2, 4, 21),
        "C": random(2, 2, 4, 21), "D": random(6), "z": random(2, 6, 21, seed=2), "delta_bias": random(6, seed=1) - 2,
    }  # fmt: skip
    return {name: x.to(number if name in ("A", "D", "delta_bias") else dtype) for name, x in inputs.items()}


FORMS: dict[str, dict[str, Any]] = {
    "base": {},
    "constant B and C": {"B": random(6, 4), "C": random(6, 4, seed=1)},
    "bare": {"D": None, "z": None, "delta_bias": None},
    "complex": {"A": torch.complex(-random(6, 4).exp(), random(6, 4)), "B": random(2, 4, 42), "C": random(2, 4, 42)},
}


@pytest.mark.parametrize("change", FORMS.values(), ids=list(FORMS))
def test_scan_is_its_reference(change: dict[str, Any]) -> None:
    """Outputs, last state and gradients, those through the last state too."""
    inputs = {name: x.requires_grad_() for name, x in (scan_inputs() | change).items() if x is not None}
    results = []
    for scan in (selective_scan_fn, selective_scan_ref):
        y, last_state = scan(**inputs, delta_softplus=True, return_last_state=True)
        total = (y * random(2, 6, 21, seed=5)).sum() + (last_state * random(2, 6, 4, seed=6)).real.sum()
        results.append([y, last_state, *torch.autograd.grad(total, inputs.values())])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(selective_scan_fn(**inputs, delta_softplus=True), results[0][0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scan_of_mixed_dtypes(dtype: torch.dtype) -> None:
    """Half u, z, B, C, A and D with a float32 step: only results are rounded, gradients like their inputs."""
    inputs = scan_inputs(dtype, dtype) | {"delta": scan_inputs(torch.float32)["delta"]}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    y = selective_scan_fn(**leaves, delta_softplus=True)
    expected = selective_scan_ref(**leaves, delta_softplus=True)
    assert y.dtype is expected.dtype is dtype
    torch.testing.assert_close(y, expected)
    gradients = torch.autograd.grad(y.float().sum(), leaves.values())
    assert [g.dtype for g in gradients] == [x.dtype for x in leaves.values()]


def test_autocast_changes_neither_scan_nor_convolution() -> None:
    inputs = scan_inputs(torch.float32, torch.float32)
    x, weight = inputs["u"], inputs["A"]
    with torch.autocast("cpu", torch.bfloat16):
        y, conv = selective_scan_fn(**inputs, delta_softplus=True), causal_conv1d_fn(x, weight)
    assert torch.equal(y, selective_scan_fn(**inputs, delta_softplus=True))
    assert torch.equal(conv, causal_conv1d_fn(x, weight))


def inner_inputs(dtype: torch.dtype = torch.float64, states: int = 3) -> dict[str, Any]:
    shapes = {
        "xz": (2, 12, 17), "conv1d_weight": (6, 1, 4), "conv1d_bias": (6,), "x_proj_weight": (2 + 2 * states, 6),
        "delta_proj_weight": (6, 2), "out_proj_weight": (5, 6), "out_proj_bias": (5,), "A": (6, 3), "D": (6,),
        "delta_bias": (6,),
    }  # fmt: skip
    inputs = {name: 0.5 * random(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    inputs["A"] = -inputs["A"].exp()
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


INNER: dict[str, dict[str, Any]] = {
    "fused": {},
    "checkpoint_lvl 0": {"checkpoint_lvl": 0},
    "without biases": {"conv1d_bias": None, "out_proj_bias": None, "delta_bias": None, "D": None},
    "given B": {"B": random(6, 3), "C_proj_bias": random(3)},
    "given C": {"C": random(2, 3, 17), "B_proj_bias": random(3)},
    "strided": {"xz": random(2, 17, 12).mT},
}


@pytest.mark.parametrize("change", INNER.values(), ids=list(INNER))
def test_inner_is_its_reference(change: dict[str, Any]) -> None:
    inputs = {name: x for name, x in (inner_inputs() | change).items() if isinstance(x, torch.Tensor)}
    absent = {name: x for name, x in change.items() if x is None}
    options = {"checkpoint_lvl": change["checkpoint_lvl"]} if "checkpoint_lvl" in change else {}
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    wanted = [x for name, x in leaves.items() if x is not None]
    results = []
    for inner, more in ((mamba_inner_fn, options), (mamba_inner_ref, {})):
        out = inner(**leaves, **absent, **more)
        results.append([out, *torch.autograd.grad((out * random(2, 17, 5)).sum(), wanted, allow_unused=True)])
    for ours, expected in zip(*results, strict=True):
        if expected is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_inner_with_a_complex_state_matrix() -> None:
    inputs = inner_inputs(states=6) | {"A": torch.complex(-random(6, 3).exp(), random(6, 3))}
    out, expected = mamba_inner_fn(**inputs), mamba_inner_ref(**inputs)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)


def test_inner_with_norms() -> None:
    """Unit weights: the norm of B times a number is the norm of B, whatever the number."""
    inputs = inner_inputs()
    norms = {"b_rms_weight": torch.ones(3), "c_rms_weight": torch.ones(3), "dt_rms_weight": torch.ones(6)}
    norms = {name: weight.double() for name, weight in norms.items()} | {"b_c_dt_rms_eps": 0.0}
    out = mamba_inner_fn(**inputs, **norms)
    scaled = dict(inputs, x_proj_weight=3 * inputs["x_proj_weight"])
    torch.testing.assert_close(mamba_inner_fn(**scaled, **norms), out, rtol=1e-9, atol=1e-11)
    assert (out - mamba_inner_fn(**inputs)).abs().max() > 0.01
    (gradient,) = torch.autograd.grad(out.sum(), [inputs["x_proj_weight"]])
    assert gradient.abs().max() > 0


def test_inner_under_autocast() -> None:
    inputs = inner_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = mamba_inner_fn(**inputs)
    expected = mamba_inner_fn(**inputs)
    assert out.dtype is torch.bfloat16
    assert (out - expected).norm() < 0.03 * expected.norm()


def test_inner_refuses_what_it_cannot_do() -> None:
    inputs = inner_inputs()
    with pytest.raises(ValueError, match="checkpoint_lvl must be 0 or 1, got 2"):
        mamba_inner_fn(**inputs, checkpoint_lvl=2)
    with pytest.raises(ValueError, match="B is given, so it must not have a bias or a norm"):
        mamba_inner_fn(**inputs, B=random(6, 3), B_proj_bias=random(3))


@pytest.mark.parametrize("groups", [1, 2])
def test_state_update_with_heads(groups: int) -> None:
    """As many channels as heads * dim, in the order of memory; also of a state whose heads do not merge."""
    batch, heads, dim, states = 2, 4, 3, 5
    state = random(batch, heads, dim, states)
    x, dt, z = (random(batch, heads, dim, seed=k) for k in range(3))
    A, D, bias = -random(heads, dim, states).exp(), random(heads, dim), random(heads, dim, seed=1)
    B, C = (random(batch, groups, states, seed=k) for k in range(2))
    expected = state.flatten(1, 2).clone()
    y = sscan.selective_state_update(
        expected, x.flatten(1), dt.flatten(1), A.flatten(0, 1), B, C, D.flatten(), z.flatten(1), bias.flatten(), True
    )
    apart = state.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    for given in (state, apart):
        found = selective_state_update(given, x, dt, A, B, C, D, z, bias, True)
        torch.testing.assert_close(found, y.view_as(x))
        torch.testing.assert_close(given, expected.view_as(given))


# --- causal_conv1d ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_convolution_is_that_of_torch(activation: str | None) -> None:
    x, weight, bias = random(2, 5, 11), random(5, 4), random(5)
    before = random(2, 5, 3)
    y, states = causal_conv1d_fn(x, weight, bias, None, before, True, activation=activation)
    whole = torch.cat([before, x], -1)
    expected = torch.nn.functional.conv1d(whole, weight[:, None], bias, groups=5)
    torch.testing.assert_close(y, expected if activation is None else torch.nn.functional.silu(expected))
    assert torch.equal(states, whole[..., -3:])
    out = torch.empty(2, 5, 3, dtype=torch.float64)
    assert causal_conv1d_fn(x, weight, bias, None, before, True, out)[1] is out
    assert torch.equal(out, states)


@pytest.mark.parametrize("kept", [3, 5])
@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("ring", [False, True])
def test_convolution_of_the_next_tokens(kept: int, tokens: int, ring: bool) -> None:
    """Shifted or a ring, chunk after chunk: what the whole sequence gives."""
    x, weight, bias = random(2, 5, 14), random(5, 4), random(5)
    expected = causal_conv1d_fn(x, weight, bias, activation="silu")
    state, filled = torch.zeros(2, 5, kept, dtype=torch.float64), torch.tensor([0, 3])
    outs = []
    for t in range(0, 14, tokens):
        outs.append(
            causal_conv1d_update(x[..., t : t + tokens], state, weight, bias, "silu", filled + t if ring else None)
        )
    torch.testing.assert_close(torch.cat(outs, -1), expected)
    if not ring:
        assert torch.equal(state, x[..., 14 - kept :])


def test_convolution_of_some_rows() -> None:
    x, weight, pool = random(4, 5), random(5, 4), random(6, 5, 4, seed=1)
    indices = torch.tensor([4, -1, 0, -1], dtype=torch.int32)
    expected_pool = pool.clone()
    rows = pool[[4, 0]].clone()
    expected = causal_conv1d_update(x[[0, 2]], rows, weight)
    expected_pool[[4, 0]] = rows
    y = causal_conv1d_update(x, pool, weight, conv_state_indices=indices)
    torch.testing.assert_close(y[[0, 2]], expected)
    assert not y[[1, 3]].any()
    assert torch.equal(pool, expected_pool)
    assert not causal_conv1d_update(x, pool, weight, conv_state_indices=torch.full((4,), -1)).any()
    assert torch.equal(pool, expected_pool)
    with pytest.raises(ValueError, match="keep width - 1 = 3 columns"):
        causal_conv1d_update(x[..., None].expand(4, 5, 2), pool[:4, :, :2], weight)


# --- selective_scan_cuda ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
def test_extension_module(gated: bool) -> None:
    """As the autograd functions of VMamba, Vim and fla use it."""
    inputs = {name: x.requires_grad_() for name, x in scan_inputs().items() if gated or name != "z"}
    u, delta, A, B, C, D, bias = (inputs[name] for name in ("u", "delta", "A", "B", "C", "D", "delta_bias"))
    z = inputs.get("z")
    y, last_state = selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True)
    dout = random(2, 6, 21, seed=9)
    expected = torch.autograd.grad((y * dout).sum(), inputs.values())
    with torch.no_grad():
        out, x, *rest = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, bias, True)
        dz = torch.empty_like(u) if gated else None
        found = selective_scan_cuda.bwd(u, delta, A, B, C, D, z, bias, dout, x, out, dz, True, gated)
    torch.testing.assert_close(rest[0] if gated else out, y)
    torch.testing.assert_close(x[:, :, -1, 1::2], last_state)
    du, ddelta, dA, dB, dC, dD, dbias, *more = found
    assert len(more) == (2 if gated else 0)
    if gated:
        assert more[0] is dz
        torch.testing.assert_close(more[1], y)
    ours = dict(u=du, delta=ddelta, A=dA, B=dB, C=dC, D=dD, delta_bias=dbias, **({"z": dz} if gated else {}))
    for name, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(ours[name], gradient)
