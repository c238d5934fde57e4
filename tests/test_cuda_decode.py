"""A decoding step on the GPU and what is drawn of it, run by the emulator."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from test_nn_decoding import CONFIGS, error, in_dtype, perturbed, steps_of_operations, tokens

from sscan.cuda import _graphs, _launch, decode
from sscan.cuda.sample import sample
from sscan.models.sampling import Sampler
from sscan.nn import MambaConfig, MambaLM, decoding
from sscan.testing import patched
from sscan.testing._emulator import empty

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BFLOAT16 = ml_dtypes.bfloat16
TILES = MambaConfig(64, 2, 93, {"d_state": 16, "dt_rank": 8})  # sizes for the tensor cores, and whole vectors
ODD_TILES = MambaConfig(40, 2, 93, {"d_state": 6, "dt_rank": 5, "d_conv": 3, "bias": True})
SHORT = MambaConfig(16, 1, 93, {"d_state": 4, "dt_rank": 2})
ALL = {**CONFIGS, "tiles": TILES, "odd_tiles": ODD_TILES}


@contextlib.contextmanager
def gpu() -> Iterator[None]:
    """NumPy arrays count as those of a GPU, whose kernels the emulator runs; a graph is what is launched again."""

    class Graph:
        def __init__(self, function: Callable[[], None]) -> None:
            self.launch = function
            function()

    with pytest.MonkeyPatch.context() as monkeypatch, patched():
        monkeypatch.setattr(decoding, "_device", lambda model: "cuda")
        monkeypatch.setattr(_graphs, "Graph", Graph)
        monkeypatch.setattr(_launch, "to_host", np.copy)
        yield


@pytest.fixture
def on_gpu() -> Iterator[None]:
    with gpu():
        yield


def steps(model: MambaLM, ids: Any) -> Any:
    states, logits = model.new_states(len(ids)), []
    for t in range(ids.shape[1]):
        logits.append(decoding.step(model, ids[:, t], states))
        assert logits[-1] is not None, "the kernels were not used"
    return np.stack(logits, axis=1)


KINDS = [(name, dtype) for name in ALL for dtype in (np.float32, BFLOAT16)]


@pytest.mark.parametrize(
    ("name", "dtype"), [*KINDS, *((n, d) for n in ("odd", "tiles") for d in (np.float64, np.float16))]
)
def test_steps_are_as_exact_as_the_operations(name: str, dtype: Any) -> None:
    config = ALL[name]
    model, ids = perturbed(config, dtype), tokens(config, 3, 2)
    exact = in_dtype(model, np.float64)(ids).data
    with gpu():
        plain = error(steps_of_operations(model, ids), exact)
        got = steps(model, ids)
    assert got.dtype == np.result_type(dtype, np.float32)
    assert error(got, exact) <= 3 * plain + 4 * float(ml_dtypes.finfo(dtype).eps)
    if np.dtype(dtype).itemsize == 2:  # only the inputs of convolutions are rounded
        assert error(got, exact) < plain


@pytest.mark.parametrize("batch", [5, 17, 35])
@pytest.mark.parametrize(("config", "dtype"), [(TILES, BFLOAT16), (TILES, np.float16), (ODD_TILES, BFLOAT16)])
def test_tiles_are_as_exact_as_the_operations(config: MambaConfig, dtype: Any, batch: int) -> None:
    model, ids = perturbed(config, dtype), tokens(config, batch, 2)
    exact = in_dtype(model, np.float64)(ids).data
    with gpu():
        plain = error(steps_of_operations(model, ids), exact)
        assert error(steps(model, ids), exact) <= 3 * plain + 4 * float(ml_dtypes.finfo(dtype).eps)


@pytest.mark.parametrize(("dtype", "batch"), [(np.float32, 6), (BFLOAT16, 3), (BFLOAT16, 20)])
def test_rows_do_not_see_each_other(dtype: Any, batch: int, on_gpu: None) -> None:
    """A row has the same bits in every place, whatever is in the others."""
    model, ids = perturbed(TILES, dtype), tokens(TILES, batch, 2)
    turned = np.roll(ids, 1, axis=0)
    turned[1:2] = (turned[1:2] + 1) % TILES.vocab_size
    got, other = steps(model, ids), steps(model, turned)
    np.testing.assert_array_equal(other[2:], got[1:-1])
    np.testing.assert_array_equal(other[0], got[-1])
    assert (other[1] != got[0]).any()


def test_states_of_another_dtype() -> None:
    model, ids = perturbed(TILES, np.float32), tokens(TILES, 2, 3)
    blocks = [decoding._arrays_of(layer) for layer in model.backbone.layers]
    head, norm = model.lm_head.weight.data, model.backbone.norm_f.weight.data
    with patched():
        weights = decode.Weights.of(blocks, head, norm, head)
        logits = {}
        for dtype in (np.float32, BFLOAT16):
            states = [(s.conv.data, s.ssm.data.astype(dtype)) for s in model.new_states(2)]
            for token in ids.T:
                logits[dtype] = empty((2, len(head)), np.float32)
                weights.step(np.ascontiguousarray(token), decoding._eps(model), states, logits[dtype])
    assert 0 < error(logits[BFLOAT16], logits[np.float32].astype(np.float64)) < 0.02


def test_what_is_no_token_touches_no_other_memory(on_gpu: None) -> None:
    model, states = perturbed(TILES, np.float32), None
    weights = decoding._weights(model)
    found = []
    for ids in ([0, 0], [-1, 10**6]):
        states = [(s.conv.data, s.ssm.data) for s in model.new_states(2)]
        found.append(empty((2, weights.vocabulary), np.float32))
        weights.step(np.array(ids), decoding._eps(model), states, found[-1])
    np.testing.assert_array_equal(*found)


def test_an_unfit_batch_is_left_to_the_operations(on_gpu: None) -> None:
    model = perturbed(TILES, np.float32)
    assert decoding.step(model, np.zeros(17, np.int64), model.new_states(17)) is None
    assert decoding.step(model, np.zeros(0, np.int64), model.new_states(0)) is None


# Drawing

FILTERS = [
    (0.0, None, None, None), (1.0, None, None, None), (0.7, 40, None, None), (1.3, None, 0.8, None),
    (0.9, None, None, 0.05), (1.0, 100, 0.9, 0.01), (1e-40, None, None, None),
]  # fmt: skip


class Fixed:
    """A generator of known numbers."""

    def __init__(self, numbers: list[float]) -> None:
        self.numbers = numbers

    def random(self, shape: Any) -> Any:
        return np.array(self.numbers).reshape(shape)


def uniform(seed: int, turn: int) -> float:
    """In Python's integers."""
    bits = (1 << 64) - 1

    def mixed(x: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> shift)) * factor & bits
        return x ^ (x >> 31)

    return (mixed(mixed(seed) + turn * 0x9E3779B97F4A7C15 & bits) >> 11) * 2.0**-53


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(("vocabulary", "count"), [(4400, 4395), (41, 41)])
def test_draws_what_the_host_draws_by_the_same_numbers(filters: Any, vocabulary: int, count: int) -> None:
    rng, batch = np.random.default_rng(0), 2
    logits = (3 * rng.standard_normal((batch, vocabulary))).astype(np.float32)
    logits[:, count:] = 100  # what is not drawn from
    drawn, seeds, turns = np.full(batch, -7), np.arange(batch) + 11, 3 * np.arange(batch)
    sampler = Sampler(*filters)
    sampler.rng = Fixed([uniform(int(s), int(t)) for s, t in zip(seeds, turns, strict=True)])  # type: ignore[assignment]
    with patched():
        sample(logits, count, drawn, seeds, turns, *filters)
    np.testing.assert_array_equal(drawn, sampler(logits[:, :count]))
    np.testing.assert_array_equal(turns, 3 * np.arange(batch) + (filters[0] > 0))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_give_no_token(temperature: float) -> None:
    logits = np.random.default_rng(0).standard_normal((4, 100)).astype(np.float32)
    logits[0, 99], logits[1, 7], logits[2] = np.nan, np.inf, -np.inf
    drawn, seeds = np.full(4, -7), np.arange(4)
    with patched():
        sample(logits, 100, drawn, seeds, seeds.copy(), temperature, None, None, None)
    assert (drawn[:3] == -1).all()
    assert 0 <= drawn[3] < 100


def test_numbers_drawn_are_uniform() -> None:
    """Those that the kernel was seen to draw by above: over seeds, and over the turns of one."""
    for numbers in ([uniform(seed, 0) for seed in range(4096)], [uniform(7, turn) for turn in range(4096)]):
        counts = np.bincount((16 * np.array(numbers)).astype(int), minlength=16)
        assert ((counts - 256) ** 2 / 256).sum() < 38  # chi squared of 15 degrees of freedom, 1 in 1000


# A decoder and what generates with it


@pytest.mark.parametrize("filters", [(0.0, None, None, None), (0.8, 20, 0.9, None)])
def test_a_decoder_goes_on_from_where_its_rows_are(filters: Any, on_gpu: None) -> None:
    model, prompts = perturbed(SHORT, np.float32), tokens(SHORT, 2, 4)
    states = model.new_states(3)
    states[0].ssm.data[...] = 1  # what is there stays, and is overwritten
    decoder = model._decoder(states, TILES.vocab_size, Sampler(*filters))
    assert (states[0].ssm.data == 1).all()
    rows = [type("Row", (), {"new": [3 + i], "seed": 5 + i}) for i in range(2)]
    logits, after = model.prefill(prompts, model.new_states(2))
    for place, row in zip((2, 0), rows, strict=True):
        states.put([place], after.select([row.seed - 5]))
        decoder.put(place, row)
    got = decoder.steps(3)
    token = np.array([3, 4])
    for turn in range(3):
        logits = model.step(token, after)
        sampler = Sampler(*filters)
        sampler.rng = Fixed([uniform(5, turn), uniform(6, turn)])  # type: ignore[assignment]
        token = sampler(logits[:, : TILES.vocab_size])
        np.testing.assert_array_equal(got[turn, [2, 0]], token)


@pytest.mark.parametrize("streamed", [False, True])
def test_generates_the_tokens_of_single_steps(streamed: bool, on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = perturbed(SHORT, np.float32), [[1, 2, 3], [4], [5, 6]]
    monkeypatch.setattr("sscan.models.generation.PLACES", 2)
    monkeypatch.setattr("sscan.models.generation.AHEAD", 2)
    seen: list[Any] = []
    options = {"temperature": 0.0, "batch": 2, "streamer": (lambda *token: seen.append(token)) if streamed else None}
    got = model.generate(prompts, 4, **options)
    monkeypatch.setattr(MambaLM, "_decoder", lambda *_: None)
    expected = model.generate(prompts, 4, **options)
    for row, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(row, other)
    assert len(seen) == (2 * 3 * 4 if streamed else 0)


def test_a_ruined_model_generates_nothing(on_gpu: None) -> None:
    model = perturbed(SHORT, np.float32)
    model.lm_head.weight.data[5] = np.nan
    with pytest.raises(FloatingPointError, match="broken"):
        model.generate([1, 2], 5)


def test_repetition_is_penalised_on_the_host(on_gpu: None) -> None:
    model = perturbed(TILES, np.float32)
    assert model._decoder(model.new_states(1), 90, Sampler(repetition_penalty=1.2)) is None
