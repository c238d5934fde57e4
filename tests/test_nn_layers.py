"""sscan.nn: layers beside the Mamba block, against formulas that share nothing with them, and what holds for all."""

from __future__ import annotations

import pickle
import re
import tracemalloc
from typing import TYPE_CHECKING, Any

import device_double
import ml_dtypes
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from sscan import nn
from sscan.nn import Tensor
from sscan.nn.autodiff import to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def perturbed(module: Any, seed: int = 0) -> Any:
    """The module with every parameter away from its initial value, so that none is zero or one."""
    rng = np.random.default_rng(seed)
    for parameter in module.parameters():
        parameter.data += 0.2 * rng.standard_normal(parameter.shape)
    return module


# Parts


@pytest.mark.parametrize("dtype", [np.float64, ml_dtypes.bfloat16])
def test_layer_norm_adds_and_normalises(dtype: Any) -> None:
    norm = nn.LayerNorm(6, eps=0.1, dtype=np.float64)
    norm.initialise(0)
    perturbed(norm)
    x, residual = normal(2, 3, 6).astype(dtype), normal(2, 3, 6, seed=1)
    y, total = norm(Tensor(x), Tensor(residual))
    np.testing.assert_array_equal(total.data, x.astype(np.float64) + residual)
    weights = [torch.tensor(p.data) for p in norm.parameters()]
    expected = torch.nn.functional.layer_norm(torch.tensor(total.data), (6,), *weights, 0.1).numpy()
    assert y.dtype == dtype
    np.testing.assert_allclose(y.data.astype(np.float64), expected, rtol=float(ml_dtypes.finfo(dtype).eps) * 8)
    np.testing.assert_array_equal(norm(Tensor(total.data)).data.astype(dtype), y.data)


@pytest.mark.parametrize("xp", [np, device_double])
def test_dropout(xp: Any) -> None:
    dropout, again, other = nn.Dropout(0.25, seed=3), nn.Dropout(0.25, seed=3), nn.Dropout(0.25, seed=4)
    x = Tensor(xp.asarray(np.ones((100, 400), np.float32)), requires_grad=True)
    calls = [to_numpy(dropout(x).data) for _ in range(3)]
    for y in calls:
        assert set(np.unique(y)) == {0, np.float32(4 / 3)}
        assert abs((y == 0).mean() - 0.25) < 0.01  # four standard deviations
    # No two calls drop the same numbers, nor more of the same than chance has it; a seed says which.
    for a, b in [(calls[0], calls[1]), (calls[1], calls[2]), (calls[0], to_numpy(other(x).data))]:
        assert abs(((a == 0) & (b == 0)).mean() - 0.0625) < 0.006
    np.testing.assert_array_equal(to_numpy(again(x).data), calls[0])
    y = again(x)
    y.backward(y.data)
    np.testing.assert_allclose(to_numpy(x.grad), calls[1] ** 2, rtol=1e-6)
    with nn.no_grad():
        assert dropout(x) is x
    assert (to_numpy(dropout(x.data).data) == 1).all()
    assert nn.Dropout(0.0)(x) is x
    with pytest.raises(ValueError, match="Dropout: rate must be below 1, got 1"):
        nn.Dropout(1)


def test_modules_show_their_tree() -> None:
    assert repr(nn.Linear(3, 2)) == "Linear(weight[2, 3], bias[2])"
    model = nn.MambaLM(nn.MambaConfig(4, 2, 8, {"d_state": 2}), seed=None)
    lines = repr(model).splitlines()
    assert lines[:3] == ["MambaLM(", "  backbone=Backbone(", "    embedding=Embedding(weight[8, 4])"]
    assert "    layers.1=ResidualBlock(" in lines
    assert "        A_log[8, 2]" in lines
    assert lines[-1] == ")"


# Time-invariant and selective systems


@pytest.mark.parametrize("A", ["lin", "real", "half", "random"])
def test_s4d_is_its_recurrence_and_its_convolution(A: str) -> None:
    layer = perturbed(nn.S4D(3, 6, A=A, dtype=np.float64))
    u = normal(2, 3, 20)
    # h' = A h + u held over each step, integrated by the exponential of the matrix [[A, 1], [0, 0]].
    delta, matrix, C = np.exp(layer.log_delta.data), layer.A().data, layer.C().data
    expected = np.zeros((2, 3, 20))
    for d in range(3):
        h = np.zeros((2, matrix.shape[1]), np.complex128)
        for t in range(20):
            for n, a in enumerate(matrix[d]):
                step = scipy.linalg.expm(delta[d] * np.array([[a, 1], [0, 0]]))
                h[:, n] = step[0, 0] * h[:, n] + step[0, 1] * u[:, d, t]
            y = (C[d] * h).sum(axis=1)
            expected[:, d, t] = (2 if A == "lin" else 1) * y.real + layer.D.data[d] * u[:, d, t]
    np.testing.assert_allclose(layer(u).data, expected, rtol=1e-9, atol=1e-11)
    one_sequence = np.zeros((2, 20), np.int32)
    np.testing.assert_allclose(layer(u, one_sequence).data, expected, rtol=1e-9, atol=1e-11)  # as a scan


def test_initial_values_of_state_matrices() -> None:
    n = np.arange(4)
    for initial, expected in [
        ("real", -(n + 1.0)), ("lin", -0.5 + 1j * np.pi * n), ("half", np.full(4, -0.5))
    ]:  # fmt: skip
        layer = nn.S4D(5, 8 if initial == "lin" else 4, A=initial, dtype=np.float64)
        np.testing.assert_allclose(layer.A().data, np.broadcast_to(expected, (5, 4)), rtol=1e-15)
    paper = nn.S4D(5, 8, A="lin", imaginary=1, dtype=np.float64).A().data
    np.testing.assert_allclose(paper.imag, np.broadcast_to(n, (5, 4)))
    random = nn.S6(500, 16, A="random", dtype=np.float64).A().data
    assert scipy.stats.kstest(np.log(-random).ravel(), "norm").pvalue > 0.01
    delta = nn.S4D(1000, dtype=np.float64).log_delta.data
    assert scipy.stats.kstest((delta - np.log(1e-3)) / np.log(100), "uniform").pvalue > 0.01
    assert np.isclose((np.abs(nn.S4D(1000).C().data) ** 2).mean(), 1, rtol=0.02)


def selections() -> list[tuple[str, ...]]:
    """The rows of Table 7."""
    return [(), ("B",), ("C",), ("delta",), ("delta", "B", "C")]


@pytest.mark.parametrize(
    ("selective", "A"), [*((row, "real") for row in selections()), ((), "lin"), (("delta", "B", "C"), "lin")]
)
def test_s6_is_its_recurrence(selective: tuple[str, ...], A: str) -> None:
    rank = {"dt_rank": 2} if "delta" in selective else {}
    layer = perturbed(nn.S6(3, 4, **rank, selective=selective, A=A, dtype=np.float64))
    u = normal(2, 3, 12)
    expected = np.zeros_like(u)
    matrix = layer.A().data
    h = np.zeros((2, *matrix.shape), np.complex128)

    def pairs(rows: Any) -> Any:
        return rows[:, 0::2] + 1j * rows[:, 1::2] if A == "lin" else rows

    for t in range(12):
        rows = u[:, :, t] @ layer.x_proj.weight.data.T
        delta, B, C = (np.full((2, 0), np.nan), layer.B, layer.C)
        if "delta" in selective:
            delta, rows = rows[:, :2], rows[:, 2:]
        if "B" in selective:
            B, rows = pairs(rows[:, :4])[:, None], rows[:, 4:]
        if "C" in selective:
            C, rows = pairs(rows[:, :4])[:, None], rows[:, 4:]
        assert rows.shape[1] == 0
        step = np.log1p(np.exp(delta @ layer.dt_proj.weight.data.T + layer.dt_proj.bias.data))[..., None]
        B, C = (x().data if callable(x) else x for x in (B, C))
        h = np.exp(step * matrix) * h + step * B * u[:, :, t, None]
        expected[:, :, t] = (2 if A == "lin" else 1) * (C * h).sum(axis=2).real + layer.D.data * u[:, :, t]
    np.testing.assert_allclose(layer(u).data, expected, rtol=1e-11, atol=1e-12)


def test_selection_costs_no_parameters() -> None:
    """Paper, Tables 7 to 10: B and C are of one size whether they are projected or not, in either field."""
    counts = {nn.S6(64, 16, 4, selective=s, seed=None).parameter_count() for s in selections() if "delta" in s}
    assert counts == {64 * (2 * 4 + 1 + 3 * 16 + 1)}
    fixed = {
        nn.S6(64, 16, selective=s, A=A, seed=None).parameter_count() for s in selections()[:3] for A in ("real", "lin")
    }
    assert fixed == {64 * (1 + 3 * 16 + 1)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"selective": ("A",)}, r"S6: selective must be some of delta, B, C, got \('A',\)"),
        ({"selective": "B"}, "S6: selective must be some of delta, B, C, got 'B'"),
        ({"A": "hippo"}, "StateMatrix: initial must be one of real, lin, half, random, got 'hippo'"),
        ({"A": "lin", "d_state": 5}, "StateMatrix: d_state must be even for a complex state, got 5"),
        ({"dt_min": 1.0}, "S6: dt_min must be at most dt_max, got 1.0 and 0.1"),
        ({"discretization": "euler"}, "S6: discretization must be 'mamba' or 'zoh', got 'euler'"),
    ],
)
def test_wrong_arguments_of_systems(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nn.S6(8, **arguments)


# Architectures


def test_gated_s6_is_mamba() -> None:
    mamba, gated = perturbed(nn.Mamba(10, d_state=4, bias=True)), nn.Gated(10, d_state=4, bias=True, seed=None)
    names = {"x_proj": "inner.x_proj", "dt_proj": "inner.dt_proj", "A_log": "inner.A.log", "D": "inner.D"}
    gated.load_state_dict(
        {
            ".".join([names.get(name.split(".")[0], name.split(".")[0]), *name.split(".")[1:]]): array
            for name, array in mamba.state_dict().items()
        }
    )
    x = normal(2, 9, 10).astype(np.float32)
    np.testing.assert_allclose(gated(x).data, mamba(x).data, rtol=2e-5, atol=2e-6)
    assert nn.Gated(64, seed=None).parameter_count() == nn.Mamba(64, seed=None).parameter_count()
    for a, b in zip(nn.Gated(10).parameters(), nn.Mamba(10).parameters(), strict=True):
        np.testing.assert_array_equal(a.data, b.data)  # the same initial values from the same seed


def test_ungated_and_h3_are_their_formulas() -> None:
    x = normal(2, 9, 6)
    block = perturbed(nn.Ungated(6, "s4", d_state=4, dtype=np.float64))
    inner = block.inner(x.swapaxes(1, 2)).data.swapaxes(1, 2)
    expected = torch.nn.functional.glu(
        torch.nn.functional.gelu(torch.tensor(inner)) @ torch.tensor(block.out_proj.weight.data).T
        + torch.tensor(block.out_proj.bias.data)
    )
    np.testing.assert_allclose(block(x).data, expected.numpy(), rtol=1e-11, atol=1e-12)

    h3 = perturbed(nn.H3(6, "s6", taps=3, d_state=4, dtype=np.float64))
    q, k, v = np.split(x @ h3.in_proj.weight.data.T + h3.in_proj.bias.data, 3, axis=2)
    taps, shifted = h3.conv1d.weight.data[:, 0], np.zeros_like(k) + h3.conv1d.bias.data
    for t in range(9):
        for age in range(min(3, t + 1)):
            shifted[:, t] += taps[:, 2 - age] * k[:, t - age]
    inner = h3.inner((shifted * v).swapaxes(1, 2)).data.swapaxes(1, 2)
    expected = (q * inner) @ h3.out_proj.weight.data.T + h3.out_proj.bias.data
    np.testing.assert_allclose(h3(x).data, expected, rtol=1e-11, atol=1e-12)


def test_hyena_is_its_formula() -> None:
    hyena = perturbed(nn.Hyena(4, length=16, width=8, depth=1, dtype=np.float64))
    f = hyena.filter
    kernel = np.zeros((4, 12))
    for t in range(12):
        age = t / 15
        z = np.array([age, *(np.exp(-2j * np.pi * frequency * age).real for frequency in (1e-4, 1)),
                      *(np.exp(-2j * np.pi * frequency * age).imag for frequency in (1e-4, 1))])  # fmt: skip
        for layer in f.hidden:
            z = np.sin(layer.frequency.data * (layer.linear.weight.data @ z + layer.linear.bias.data))
        for d, reach in enumerate(1 / np.linspace(1 / 1.5, 1 / 0.3, 4)):
            kernel[d, t] = (f.last.weight.data @ z)[d] * (0.01 ** (age / reach) + 0.05)
    np.testing.assert_allclose(f.kernel(12).data, kernel, rtol=1e-11, atol=1e-12)
    x = normal(2, 12, 4)
    u = x @ hyena.in_proj.weight.data.T + hyena.in_proj.bias.data
    taps = hyena.conv1d.weight.data[:, 0]
    padded = np.pad(u, ((0, 0), (2, 0), (0, 0)))
    u = sum(padded[:, j : j + 12] * taps[:, j] for j in range(3)) + hyena.conv1d.bias.data
    v, first, second = np.split(u, 3, axis=2)
    v = first * v
    y = v * f.D.data
    for b, d in np.ndindex(2, 4):
        y[b, :, d] += np.convolve(v[b, :, d], kernel[d])[:12]
    expected = (second * y) @ hyena.out_proj.weight.data.T + hyena.out_proj.bias.data
    np.testing.assert_allclose(hyena(x).data, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("positions", ["none", "rotary", "xpos"])
def test_attention_is_that_of_pytorch(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = perturbed(nn.Attention(16, 2, positions=positions, dtype=np.float64))
    x = normal(2, 11, 16)
    q, k, v = np.split(x @ attention.in_proj.weight.data.T + attention.in_proj.bias.data, 3, axis=2)
    q, k, v = (a.reshape(2, 11, 2, 8).swapaxes(1, 2) for a in (q, k, v))
    if positions != "none":  # pairs of numbers as complex ones
        i, t = np.arange(4), np.arange(11)[:, None]
        turn = np.exp(1j * t * 10000 ** (-i / 4))
        fade = ((i / 4 + 0.4) / 1.4) ** (t / 512) if positions == "xpos" else np.ones((11, 4))
        q, k = ((a[..., :4] + 1j * a[..., 4:]) * turn * f for a, f in ((q, fade), (k, 1 / fade)))
        q, k = (np.concatenate([a.real, a.imag], axis=3) for a in (q, k))
    y = torch.nn.functional.scaled_dot_product_attention(*map(torch.tensor, (q, k, v)), is_causal=True).numpy()
    y = y.swapaxes(1, 2).reshape(2, 11, 16)
    expected = y @ attention.out_proj.weight.data.T + attention.out_proj.bias.data
    for block in (1024, 4):
        monkeypatch.setattr("sscan.nn.attention.BLOCK", block)
        np.testing.assert_allclose(attention(x).data, expected, rtol=1e-6, atol=1e-6)  # turned by float32 numbers


def test_mlp_and_glu_are_those_of_pytorch() -> None:
    x = normal(2, 3, 6)
    for layer, activation in (
        (nn.MLP(6, dtype=np.float64), torch.nn.functional.gelu),
        (nn.GLU(6, dtype=np.float64), None),
    ):
        w, b, w_out, b_out = (torch.tensor(p.data) for p in perturbed(layer).parameters())
        h = torch.tensor(x) @ w.T + b
        if activation is None:
            first, second = h.chunk(2, dim=-1)
            h = first * torch.nn.functional.silu(second)
        else:
            h = activation(h)
        np.testing.assert_allclose(layer(x).data, (h @ w_out.T + b_out).numpy(), rtol=1e-11, atol=1e-12)
    assert nn.MLP(48, seed=None).width == 4 * 48
    assert nn.GLU(48, seed=None).width == 128


# What holds for all

LAYERS: dict[str, Any] = {
    "gated s6": lambda dtype: nn.Gated(8, d_state=4, dtype=dtype),
    "gated s6 complex": lambda dtype: nn.Gated(8, d_state=4, A="lin", discretization="zoh", dtype=dtype),
    "gated fixed B": lambda dtype: nn.Gated(8, d_state=4, selective=("delta", "C"), dtype=dtype),
    "gated s4": lambda dtype: nn.Gated(8, "s4", d_state=4, dtype=dtype),
    "gated hyena": lambda dtype: nn.Gated(8, "hyena", length=16, width=4, depth=1, dtype=dtype),
    "ungated s6": lambda dtype: nn.Ungated(8, d_state=4, dtype=dtype),
    "ungated s4 real": lambda dtype: nn.Ungated(8, "s4", d_state=4, A="real", dtype=dtype),
    "h3 s4": lambda dtype: nn.H3(8, d_state=4, taps=5, dtype=dtype),
    "h3 s6": lambda dtype: nn.H3(8, "s6", d_state=4, taps=4, dtype=dtype),
    "hyena": lambda dtype: nn.Hyena(8, length=16, width=4, depth=1, dtype=dtype),
    "attention": lambda dtype: nn.Attention(8, 2, dtype=dtype),
    "attention rotary": lambda dtype: nn.Attention(8, 2, positions="rotary", dtype=dtype),
    "attention xpos": lambda dtype: nn.Attention(8, 2, positions="xpos", dtype=dtype),
    "mlp": lambda dtype: nn.MLP(8, dtype=dtype),
    "glu": lambda dtype: nn.GLU(8, dtype=dtype),
}  # fmt: skip
STATELESS = {"gated hyena", "hyena", "attention", "attention rotary", "attention xpos"}
THROUGH_FFT = {"gated s4", "gated hyena", "ungated s4 real", "h3 s4", "hyena"}
layers = pytest.mark.parametrize("name", LAYERS)


@layers
def test_no_layer_sees_what_is_to_come(name: str) -> None:
    layer = perturbed(LAYERS[name](np.float64))
    x = normal(2, 12, 8)
    y = layer(x).data
    for t in (1, 7, 11):
        changed = x.copy()
        changed[:, t] += 1
        difference = np.abs(layer(changed).data - y).max(axis=(0, 2))
        assert (difference[:t] <= (1e-12 if name in THROUGH_FFT else 0)).all()
        assert difference[t] > 1e-3


@layers
def test_layers_are_pickled_with_their_values(name: str) -> None:
    layer = perturbed(LAYERS[name](np.float64))
    again = pickle.loads(pickle.dumps(layer))
    for ours, theirs in zip(layer.parameters(), again.parameters(), strict=True):
        np.testing.assert_array_equal(ours.data, theirs.data)
    again.initialise(1)


@layers
def test_layers_of_nothing(name: str) -> None:
    layer = LAYERS[name](np.float64)
    for shape in ((0, 5, 8), (2, 0, 8)):
        assert layer(np.zeros(shape)).shape == shape


@layers
def test_gradients_of_layers(name: str) -> None:
    layer = perturbed(LAYERS[name](np.float64))
    x = Tensor(normal(1, 5, 8), requires_grad=True)
    nn.check_gradients(lambda x, *_: layer(x), x, *layer.parameters())


@layers
def test_layers_in_half_precision(name: str) -> None:
    wide, half = perturbed(LAYERS[name](np.float64)), LAYERS[name](np.float32)
    half.load_state_dict(wide.state_dict())
    x = normal(2, 9, 8).astype(ml_dtypes.bfloat16)
    expected = wide(x.astype(np.float64)).data
    y = half(Tensor(x, requires_grad=True))
    assert y.dtype == ml_dtypes.bfloat16
    assert np.abs(y.data.astype(np.float64) - expected).max() <= 2**-5 * np.abs(expected).max()
    y.backward(y.data)
    for parameter in half.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == np.float32


@pytest.mark.parametrize("name", sorted(LAYERS.keys() - STATELESS))
def test_pieces_and_steps_are_the_whole(name: str) -> None:
    layer = perturbed(LAYERS[name](np.float64))
    x = normal(3, 9, 8)
    expected = layer(x).data
    state, parts = layer.new_state(3), []
    for piece in (x[:, :1], x[:, 1:3], x[:, 3:6]):
        y, state = layer.extend(piece, state)
        parts.append(y.data)
    arrays = [tensor.data for tensor in state]
    parts += [layer.step(x[:, t], state).data[:, None] for t in range(6, 9)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=1e-10, atol=1e-11)
    assert all(tensor.data is array for tensor, array in zip(state, arrays, strict=True))  # updated in place


def test_sequences_in_attention_are_runs_of_equal_numbers() -> None:
    layer = nn.Attention(8, 2, positions="rotary", seed=0)
    x = normal(1, 7, 8)
    packed = layer(x, np.array([[0, 0, 1, 1, 0, 0, 0]], np.int32)).data
    np.testing.assert_allclose(packed[:, 4:], layer(x[:, 4:]).data, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"Attention: seq_idx must have shape \(batch, length\) = \(1, 7\)"):
        layer(x, np.zeros((1, 6), np.int32))
    with pytest.raises(TypeError, match="Attention: seq_idx must be integers"):
        layer(x, np.zeros((1, 7)))


def test_rotary_attention_is_as_exact_as_its_dtype() -> None:
    """Products depend on differences of positions only, also far from the first."""
    layer, x = nn.Attention(6, 1, positions="rotary", dtype=np.float64, seed=0), normal(1, 900, 6)
    q, k, v = (part[0] for part in np.split(layer.in_proj(x).data, 3, axis=2))
    angle = np.arange(900)[:, None] * 1e4 ** -(np.arange(3) / 3)
    turned = [(y[:, :3] + 1j * y[:, 3:]) * np.exp(1j * angle) for y in (q, k)]
    scores = (turned[0] @ turned[1].conj().T).real / np.sqrt(6) + np.triu(np.full((900, 900), -np.inf), 1)
    shares = np.exp(scores - scores.max(1, keepdims=True))
    y = layer.out_proj((shares / shares.sum(1, keepdims=True)) @ v).data
    np.testing.assert_allclose(layer(x).data[0], y, rtol=0, atol=1e-12 * np.abs(y).max())


@pytest.mark.parametrize("positions", ["none", "xpos"])
def test_attention_forms_its_scores_again(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of a few queries: the same gradients, and what is kept for them does not grow with their square."""
    layer, length = perturbed(nn.Attention(16, 8, positions=positions, dtype=np.float64)), 300
    x, seq_idx, found, kept = normal(2, length, 16), np.repeat([[0, 1], [2, 2]], length // 2, axis=1), [], []
    for scores in (1 << 26, 2 * 8 * length * 7):
        monkeypatch.setattr("sscan.nn.attention.SCORES", scores)
        layer.zero_grad()
        hidden = Tensor(x, requires_grad=True)
        tracemalloc.start()
        y = layer(hidden, seq_idx)
        kept.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        y.backward(np.cos(np.arange(y.size)).reshape(y.shape))
        found.append([y.data, hidden.grad, *(parameter.grad for parameter in layer.parameters())])
    for whole, blocks in zip(*found, strict=True):
        np.testing.assert_allclose(blocks, whole, rtol=0, atol=1e-12 * np.abs(whole).max())
    assert kept[0] > 2 * 8 * length**2 * 8 > 4 * kept[1]


@pytest.mark.parametrize("name", sorted(LAYERS.keys() - THROUGH_FFT | {"gated s4", "h3 s4"}))
def test_packed_sequences_do_not_see_each_other(name: str) -> None:
    layer = perturbed(LAYERS[name](np.float64))
    x, seq_idx = normal(1, 9, 8), np.array([[0, 0, 0, 0, 1, 1, 2, 2, 2]], np.int32)
    separate = np.concatenate([layer(x[:, a:b]).data for a, b in ((0, 4), (4, 6), (6, 9))], axis=1)
    np.testing.assert_allclose(layer(x, seq_idx).data, separate, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", sorted(STATELESS))
def test_layers_without_states_say_so(name: str) -> None:
    layer = LAYERS[name](np.float64)
    with pytest.raises(
        NotImplementedError, match=r"(HyenaFilter|Hyena|Attention): what it remembers has no constant size"
    ):
        layer.new_state(2)
    if "hyena" in name:
        with pytest.raises(ValueError, match=r"HyenaFilter: .* packed sequences"):
            layer(normal(1, 4, 8), np.zeros((1, 4), np.int32))


# What layers say of inputs that they do not take


INPUTS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "Linear": (lambda: nn.Linear(8, 4), "x", "..., rows, 8"),
    "RMSNorm": (lambda: nn.RMSNorm(8), "x", "..., 8"),
    "LayerNorm": (lambda: nn.LayerNorm(8), "x", "..., 8"),
    "Mamba": (lambda: nn.Mamba(8), "hidden", "batch, length, 8"),
    "BidirectionalMamba": (lambda: nn.BidirectionalMamba(8), "hidden", "batch, length, 8"),
    "S4D": (lambda: nn.S4D(8), "u", "batch, 8, length"),
    "S6": (lambda: nn.S6(8), "u", "batch, 8, length"),
    "HyenaFilter": (lambda: nn.HyenaFilter(8), "u", "batch, 8, length"),
    "H3": (lambda: nn.H3(8), "hidden", "batch, length, 8"),
    "Hyena": (lambda: nn.Hyena(8), "hidden", "batch, length, 8"),
    "Gated": (lambda: nn.Gated(8), "hidden", "batch, length, 8"),
    "Ungated": (lambda: nn.Ungated(8), "hidden", "batch, length, 8"),
    "Attention": (lambda: nn.Attention(8, 2), "hidden", "batch, length, 8"),
    "MLP": (lambda: nn.MLP(8), "hidden", "..., rows, 8"),
    "GLU": (lambda: nn.GLU(8), "hidden", "..., rows, 8"),
    "UNet": (lambda: nn.UNet(8, blocks=1, pool=(2,)), "hidden", "batch, length, 8"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_layers_name_what_is_wrong_with_their_input(name: str) -> None:
    make, argument, axes = INPUTS[name]
    layer: Any = make()
    shapes: list[tuple[int, ...]] = [(2, 7, 7), (2, 9, 9), (7,), ()]
    if "..." not in axes:
        shapes += [(8, 8), (1, 2, 8, 8)]
    for shape in shapes:
        expected = re.escape(f"{name}: {argument} must have shape ({axes}), got {shape}")
        with pytest.raises(ValueError, match=f"^{expected}$"):
            layer(np.zeros(shape, np.float32))
    right = np.zeros((2, 8, 8))
    for x, got in ((right.astype(np.int64), "int64"), (right.astype(np.complex64), "complex64"), (right > 1, "bool"),
                   (right.tolist(), "list"), (None, "NoneType"), (torch.zeros(2, 8, 8), "torch.Tensor")):  # fmt: skip
        expected = f"{name}: {argument} must be an array of floating-point numbers, got {got}"
        with pytest.raises(TypeError, match=f"^{expected}$"):
            layer(x)
    assert layer(right.astype(np.float32)).shape[:2] == (2, 8)


def test_models_name_the_axes_of_ids() -> None:
    model = nn.MambaLM(nn.MambaConfig(8, 1, 16))
    ids = np.zeros((2, 3), np.int64)
    for wrong in (ids[0], ids[None]):
        for call in (model, lambda x: model.loss(x, x), lambda x: model.extend(x, model.new_states(2))):
            with pytest.raises(
                ValueError, match=re.escape(f"model: ids must have shape (batch, length), got {wrong.shape}")
            ):
                call(wrong)
    with pytest.raises(ValueError, match=r"model: ids must have shape \(batch\), got \(2, 3\)"):
        model.backbone.step(ids, model.new_states(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.S6(4, dt_rank=2, selective=("B",)), "S6: dt_rank = 2 is for a selective delta, and selective is"),
        (lambda: nn.Gated(4, dt_rank=0, selective=()), "S6: dt_rank = 0 is for a selective delta, and selective is"),
        (lambda: nn.S6(4, imaginary=1), "StateMatrix: imaginary = 1 is for a complex A, and 'real' is real"),
        (lambda: nn.S4D(4, A="half", imaginary=1.5), "imaginary = 1.5 is for a complex A, and 'half' is real"),
    ],
)
def test_arguments_that_would_make_no_difference(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_plain_layers_have_their_initial_values() -> None:
    """Each by itself, as every other module; with seed=None they wait for whom they are part of."""
    linear, table = nn.Linear(64, 32, scale=2.0, seed=1), nn.Embedding(500, 20, seed=1)
    assert np.abs(linear.weight.data).max() <= 2 / 8
    np.testing.assert_allclose(linear.weight.data.std(), 2 / 8 / np.sqrt(3), rtol=0.05)
    assert (linear.bias.data == 0).all()
    np.testing.assert_allclose(table.weight.data.std(), 0.02, rtol=0.05)
    assert (nn.Linear(64, 32, seed=2).weight.data != nn.Linear(64, 32, seed=3).weight.data).any()
    for norm in (nn.RMSNorm(5), nn.LayerNorm(5)):
        np.testing.assert_array_equal(norm.weight.data, np.ones(5))
    assert np.isnan(nn.Linear(3, 2, seed=None).weight.data).all()
    for make in (nn.RMSNorm, nn.LayerNorm, lambda size: nn.Linear(1, size), lambda size: nn.Embedding(size, 1)):
        with pytest.raises(ValueError, match=r"must be at least [01], got -1"):
            make(-1)
    with pytest.raises(TypeError, match="dtype must be a floating or complex one, got int32"):
        nn.Linear(2, 2, dtype=np.int32)


@pytest.mark.parametrize("layer", [nn.Mamba, nn.S4D, nn.S6, nn.HyenaFilter, nn.MLP])
def test_a_dtype_that_is_no_floating_one(layer: Any) -> None:
    """Also where parameters are in a wider dtype than is asked for: an integer widens to float64."""
    with pytest.raises(TypeError, match="dtype must be a floating or complex one, got int64"):
        layer(8, dtype=int)


@pytest.mark.parametrize("layer", [nn.Attention, nn.Gated, nn.Ungated, nn.H3, nn.Hyena, nn.MLP, nn.GLU, nn.Mamba])
def test_layers_check_how_many_there_are(layer: Any) -> None:
    more = {"length": 8} if layer is nn.Hyena else {}
    with pytest.raises(ValueError, match=f"{layer.__name__}: n_layer must be at least 1, got 0"):
        layer(16, n_layer=0, **more)
