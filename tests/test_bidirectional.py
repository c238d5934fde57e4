"""``BidirectionalMamba`` in both frameworks: against two blocks, one of which gets everything turned around."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sscan.nn
import sscan.torch

SHARED = ("all", "projections", "nothing")
JOINED = ("sum", "concatenation")
each = pytest.mark.parametrize(("shared", "join"), [(s, j) for s in SHARED for j in JOINED])
OPTIONS: dict[str, Any] = {"d_state": 4, "bias": True}


def pair(shared: str, join: str) -> tuple[Any, Any]:
    """The block in both frameworks, float64, with the same irregular weights."""
    torch.manual_seed(0)
    there = sscan.torch.BidirectionalMamba(6, shared=shared, join=join, dtype=torch.float64, **OPTIONS)
    with torch.no_grad():
        for parameter in there.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ours = sscan.nn.BidirectionalMamba(6, shared=shared, join=join, dtype=np.float64, seed=None, **OPTIONS)
    ours.load_state_dict({name: x.numpy() for name, x in there.state_dict().items()})
    return ours, there


def hidden(length: int = 9, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal((2, length, 6))


def joined(join: str, ahead: Any, back: Any) -> Any:
    return ahead + back if join == "sum" else np.concatenate([ahead, back], 2)


@each
def test_two_blocks_one_of_them_backwards(shared: str, join: str) -> None:
    ours, there = pair(shared, join)
    x = hidden()
    expected = joined(join, ours.ahead(x).data, ours.back(x[:, ::-1].copy()).data[:, ::-1])
    np.testing.assert_allclose(ours(x).data, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(there(torch.from_numpy(x)).detach(), expected, rtol=1e-10, atol=1e-12)
    # Both directions matter, and differ.
    assert np.abs(ours.ahead(x).data - ours(x).data[..., :6]).max() > 0.01 or join == "concatenation"
    assert np.abs(ours.ahead(x).data - ours.back(x[:, ::-1].copy()).data[:, ::-1]).max() > 0.01


@each
def test_gradients(shared: str, join: str) -> None:
    ours, there = pair(shared, join)
    x, weight = hidden(), np.random.default_rng(3).standard_normal((2, 9, 6 if join == "sum" else 12))
    y = torch.from_numpy(x).requires_grad_()
    (there(y) * torch.from_numpy(weight)).sum().backward()
    z = sscan.nn.Tensor(x, requires_grad=True)
    (ours(z) * weight).sum().backward()
    np.testing.assert_allclose(z.grad, y.grad, rtol=1e-9, atol=1e-11)
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert gradients.keys() == dict(there.named_parameters()).keys()
    for name, parameter in there.named_parameters():
        np.testing.assert_allclose(gradients[name], parameter.grad, rtol=1e-9, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("shared", SHARED)
def test_packed_sequences_do_not_see_each_other(shared: str) -> None:
    """In either direction; and padding, a sequence of its own, is seen by nobody."""
    ours, there = pair(shared, "sum")
    x, numbers = hidden(), np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 2, np.int32)
    expected = np.concatenate([ours(x[:, a:b].copy()).data for a, b in ((0, 3), (3, 7), (7, 9))], axis=1)
    np.testing.assert_allclose(ours(x, numbers).data, expected, rtol=1e-10, atol=1e-12)
    made = there(torch.from_numpy(x), seq_idx=torch.from_numpy(numbers)).detach()
    np.testing.assert_allclose(made, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("shared", "distinct"), [("all", 11), ("projections", 18), ("nothing", 22)])
def test_what_is_shared(shared: str, distinct: int) -> None:
    ours, there = pair(shared, "sum")
    assert len(list(ours.named_parameters())) == len(list(there.parameters())) == distinct
    assert (there.back.out_proj.weight is there.ahead.out_proj.weight) == (shared != "nothing")
    assert (there.back.A_log is there.ahead.A_log) == (shared == "all")


def test_one_call_where_all_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, there = pair("all", "sum")
    rows: list[int] = []
    for kind, name, block in ((sscan.nn.Mamba, "__call__", ours), (sscan.torch.Mamba, "forward", there)):
        call = getattr(kind, name)
        monkeypatch.setattr(
            kind, name, lambda made, x, *a, call=call, **k: rows.append(x.shape[0]) or call(made, x, *a, **k)
        )
        block(torch.from_numpy(hidden()) if name == "forward" else hidden())
    assert rows == [4, 4]


@pytest.mark.parametrize("kind", [sscan.nn.BidirectionalMamba, sscan.torch.BidirectionalMamba])
def test_options_that_are_none(kind: Any) -> None:
    with pytest.raises(ValueError, match="shared must be one of 'all', 'projections', 'nothing', got True"):
        kind(8, shared=True)
    with pytest.raises(ValueError, match="join must be one of 'sum', 'concatenation', got 'mean'"):
        kind(8, join="mean")
    with pytest.raises(TypeError, match="unexpected keyword argument 'wings'"):
        kind(8, wings=2)


def test_initial_values_are_those_of_the_block() -> None:
    made = sscan.nn.BidirectionalMamba(8, shared="nothing", seed=3)
    assert not np.array_equal(made.ahead.in_proj.weight.data, made.back.in_proj.weight.data)
    assert np.isfinite(made.back.dt_proj.bias.data).all()
    assert made(np.zeros((1, 3, 8), np.float32)).shape == (1, 3, 8)
