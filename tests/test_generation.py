"""Generation, in both frameworks: what is drawn, when it ends, that rows do not see each other; and states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from cases import assert_within, eps_of
from test_models import CONFIG, exact_logits, ids, parameters_of, perturbed
from transformers.generation import logits_process

import sscan.nn
import sscan.torch
from sscan.models import MambaConfig, generation
from sscan.nn import Sampler

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FRAMEWORKS = ("nn", "torch")
WIDE = MambaConfig(d_model=256, n_layer=2, vocab_size=501)  # wide enough for every path through BLAS

PROMPTS = [[5], [7, 1, 40], list(range(40)), [3] * 11, [2, 4], [9, 9], [1, 2, 3, 4, 5, 6], [0], [11, 12], [42, 0, 42]]


def model_of(framework: str, config: MambaConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Any:
    model = perturbed(config, dtype)
    if framework == "torch":
        return model
    ours = sscan.nn.MambaLM(config, ml_dtypes.bfloat16 if dtype is torch.bfloat16 else np.float32, seed=None)
    ours.load_state_dict(parameters_of(model))
    return ours


@pytest.fixture(params=FRAMEWORKS)
def model(request: pytest.FixtureRequest) -> Any:
    return model_of(request.param)


def test_states_of_no_number_of_sequences_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="new_states: batch must be at least 0, got -1"):
        model.new_states(-1)
    with pytest.raises(TypeError, match="new_states: batch must be an integer"):
        model.new_states("two")


def tokens_for(model: Any, array: Any) -> Any:
    return array if isinstance(model, sscan.nn.MambaLM) else torch.from_numpy(array)


def host(values: Any) -> Any:
    return (
        np.asarray(getattr(values, "data", values)) if not isinstance(values, torch.Tensor) else values.detach().numpy()
    )


def lists(made: list[Any]) -> list[list[int]]:
    assert all(tokens.dtype == np.int64 for tokens in made)
    return [tokens.tolist() for tokens in made]


# Against transformers


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("theirs")
    perturbed().save_pretrained(folder, "transformers")
    return transformers.MambaForCausalLM.from_pretrained(folder, pad_token_id=0).eval()


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_tokens_are_those_of_transformers(model: Any, theirs: Any, penalty: float) -> None:
    prompts = ids(3, 7)
    expected = theirs.generate(
        torch.from_numpy(prompts), max_new_tokens=12, do_sample=False, repetition_penalty=penalty, eos_token_id=None
    )
    made = model.generate(prompts, 12, temperature=0, repetition_penalty=penalty, vocab_size=48)
    assert np.stack(made).tolist() == expected[:, 7:].tolist()


def test_ragged_prompts_are_each_as_transformers_alone(model: Any, theirs: Any) -> None:
    made = lists(model.generate(PROMPTS, 9, temperature=0, vocab_size=48))
    for prompt, tokens in zip(PROMPTS, made, strict=True):
        whole = theirs.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=None)
        assert tokens == whole[0, len(prompt) :].tolist()


WARPERS: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "temperature": ({"temperature": 0.7}, lambda: logits_process.TemperatureLogitsWarper(0.7)),
    "top_k": ({"top_k": 5}, lambda: logits_process.TopKLogitsWarper(5)),
    "top_p": ({"top_p": 0.6}, lambda: logits_process.TopPLogitsWarper(0.6)),
    "min_p": ({"min_p": 0.2}, lambda: logits_process.MinPLogitsWarper(0.2)),
    "repetition_penalty": (
        {"repetition_penalty": 1.3}, lambda: logits_process.RepetitionPenaltyLogitsProcessor(1.3)
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "warper"), WARPERS.values(), ids=WARPERS)
def test_probabilities_are_those_of_transformers(options: dict[str, Any], warper: Any) -> None:
    logits = 2 * np.random.default_rng(0).standard_normal((3, 30))
    seen = np.random.default_rng(1).integers(0, 30, (3, 8))
    expected = torch.softmax(warper()(torch.from_numpy(seen), torch.from_numpy(logits)), -1)
    np.testing.assert_allclose(Sampler(**options).probabilities(logits, seen.tolist()), expected, rtol=1e-12)


def test_sampler_options_in_their_order() -> None:
    """Penalty, temperature, top_k, min_p, top_p; each decides on what the one before left."""
    logits = np.log(np.array([[0.4, 0.3, 0.15, 0.1, 0.05]]))
    made = Sampler(0.5, top_k=4, min_p=0.2, top_p=0.6, repetition_penalty=1.0).probabilities(logits)
    # Squares 16, 9, 2.25, 1 after the first two; the last two are below a fifth of 16; 16 / 25 is more than 0.6.
    np.testing.assert_allclose(made, [[1, 0, 0, 0, 0]])
    made = Sampler(0.5, top_k=4, min_p=0.2).probabilities(logits)
    np.testing.assert_allclose(made, [[16 / 25, 9 / 25, 0, 0, 0]])
    # A token that was seen is penalised, however often; what is beyond the vocabulary is nobody's.
    penalised = Sampler(repetition_penalty=2.0).probabilities(np.array([[2.0, 0.0, -1.0]]), [[0, 2, 2, 7]])
    np.testing.assert_allclose(penalised, np.exp([[1.0, 0.0, -2.0]]) / np.exp([1.0, 0.0, -2.0]).sum())
    assert Sampler(0, repetition_penalty=3.0)(np.array([[2.0, 1.0, 0.0]]), [[0]]) == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
        ({"min_p": np.nan}, "min_p must be in"),
        ({"repetition_penalty": 0}, "repetition_penalty must be finite and above 0"),
        ({"repetition_penalty": np.inf}, "repetition_penalty must be finite"),
        ({"batch": 0}, "generate: batch must be at least 1, got 0"),
        ({"vocab_size": 0}, "generate: vocab_size must be at least 1"),
        ({"vocab_size": 10**6}, r"generate: vocab_size must be at most the model's \d+, padding included, got 1"),
        ({"seed": -1}, "generate: seed must be at least 0"),
        ({"eos": -1}, "generate: eos must be at least 0"),
        ({"eos": [0, 500]}, "generate: eos must be tokens below [0-9]+, padding included, got 500"),
        ({"stop": ("a",)}, "stop is looked for in text, so it needs a tokenizer"),
        ({"stop": ("",), "tokenizer": bytes}, "stop must not be an empty text"),
    ],
)
def test_options_out_of_their_range(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate([[1]], 1, **options)


def test_options_of_another_type(model: Any) -> None:
    for options, message in (
        ({"stop": "abc", "tokenizer": bytes}, "stop must be a sequence of texts, got the text 'abc'"),
        ({"eos": 1.5}, "eos must be an integer"),
        ({"batch": 2.0}, "batch must be an integer"),
        ({"repetition_penalty": "2"}, "repetition_penalty must be a number"),
    ):
        with pytest.raises(TypeError, match=message):
            model.generate([[1]], 1, **options)


# Rows


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_the_same_bits_alone_and_among_others(
    framework: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on another place, and behind others; the logits, not only the tokens."""
    model = model_of(framework, WIDE, dtype)
    drawn: dict[tuple[int, ...], list[bytes]] = {}
    draw = generation._Row.draw

    def recorded(row: Any, logits: Any) -> int:
        drawn.setdefault(tuple(row.prompt), []).append(logits.tobytes())
        return draw(row, logits)

    monkeypatch.setattr(generation._Row, "draw", recorded)
    for batch in (1, 3, 8):
        model.generate(PROMPTS, 6, temperature=0, batch=batch)
        among, drawn = drawn, {}
        for prompt in PROMPTS:
            model.generate([prompt], 6, temperature=0, batch=batch)
        assert len(among) == len(PROMPTS)
        assert all(len(steps) == 6 for steps in among.values())
        assert among == drawn
        drawn = {}


def test_rows_that_are_decoded_at_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One, or a multiple of eight; see ``test_rows_are_the_same_bits_alone_and_among_others``."""
    rows: set[int] = set()
    step = type(model).step
    monkeypatch.setattr(type(model), "step", lambda m, i, s: rows.add(len(i)) or step(m, i, s))
    for batch, expected in ((1, 1), (2, 8), (8, 8), (9, 16), (None, 16)):
        rows.clear()
        model.generate(PROMPTS, 3, batch=batch)
        assert rows == {expected}
    rows.clear()
    model.generate(PROMPTS[0], 3)
    assert rows == {1}


def test_each_row_draws_from_its_own_seed(model: Any) -> None:
    made = lists(model.generate([[1, 2]] * 3 + [[4]], 15, seed=7, batch=8))
    assert len({tuple(tokens) for tokens in made}) == 4
    for i, prompt in enumerate([[1, 2]] * 3 + [[4]]):
        assert lists(model.generate(prompt, 15, seed=7 + i, batch=8)) == [made[i]]
        assert lists(model.generate(PROMPTS[:i] + [prompt], 15, seed=7, batch=8))[i] == made[i]


def test_equal_prompts_are_read_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    prefill = type(model).prefill
    monkeypatch.setattr(type(model), "prefill", lambda m, i, s: read.append(tuple(i.shape)) or prefill(m, i, s))
    model.generate([[1, 2, 3]] * 5 + [[4, 5]], 2)
    assert read == [(1, 3), (1, 2)]


def test_long_prompts_are_read_in_pieces(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = lists(model.generate(PROMPTS, 8, temperature=0))
    monkeypatch.setattr(generation, "PIECE", 7)
    assert lists(model.generate(PROMPTS, 8, temperature=0)) == expected


def test_padding_of_the_vocabulary_is_never_drawn(model: Any) -> None:
    """43 tokens in 48 rows; the last five rows are the most likely by far."""
    with torch.no_grad():
        model.backbone.embedding.weight.data[43:] = 100 * model.backbone.norm_f.weight.data
    for options in ({"temperature": 5.0}, {"temperature": 0}):
        assert max(tokens.max() for tokens in model.generate(PROMPTS, 10, **options)) < 43
    assert max(tokens.max() for tokens in model.generate(PROMPTS, 10, temperature=5.0, vocab_size=7)) < 7
    assert max(tokens.max() for tokens in model.generate(PROMPTS, 10, vocab_size=48)) >= 43


def test_ruined_models_generate_nothing(model: Any) -> None:
    with torch.no_grad():
        model.backbone.norm_f.weight.data[3] = np.nan
    with np.errstate(invalid="ignore"), pytest.raises(FloatingPointError, match="logits are NaN or infinite"):
        model.generate([[1]], 1)


# Ends


class Letters:
    """A tokenizer whose token i is the letter i, two of which make one character."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(97 + token % 26) for token in tokens)


def test_ends_of_sequences(model: Any) -> None:
    whole = lists(model.generate(PROMPTS, 20, temperature=0.9, seed=3))
    eos = [whole[0][4], whole[2][9]]
    for given in (eos, tuple(eos), np.array(eos)):
        cut = lists(model.generate(PROMPTS, 20, temperature=0.9, seed=3, eos=given))
        for before, after in zip(whole, cut, strict=True):
            ends = [i for i, token in enumerate(before) if token in eos]
            assert after == before[: ends[0] + 1 if ends else 20]
    assert len({len(tokens) for tokens in cut}) > 2
    assert lists(model.generate(PROMPTS, 20, temperature=0.9, seed=3, eos=eos, batch=3)) == cut
    first = lists(model.generate([PROMPTS[0]], 20, temperature=0.9, seed=3, eos=eos[0]))
    assert first[0] == whole[0][: whole[0].index(eos[0]) + 1]


def test_texts_that_end_sequences(model: Any) -> None:
    whole = lists(model.generate(PROMPTS, 20, temperature=0.9, seed=3))
    letters = [Letters().decode(tokens) for tokens in whole]
    stop = [letters[1][5:8], letters[3][11:13]]
    cut = lists(model.generate(PROMPTS, 20, temperature=0.9, seed=3, stop=stop, tokenizer=Letters()))
    for text, tokens in zip(letters, cut, strict=True):
        ends = [text.find(end) + len(end) for end in stop if end in text]
        assert Letters().decode(tokens) == text[: min(ends, default=20)]
    assert len(cut[1]) <= 8
    assert len(cut[3]) <= 13


def test_texts_that_end_late_and_texts_of_special_tokens() -> None:
    """However much was said before, and whatever stands between the letters and is no text."""

    class Sparse(Letters):
        def decode(self, tokens: list[int]) -> str:
            return super().decode([token for token in tokens if token])

    ending = generation._Ending(1000, None, ("cd",), Sparse())
    assert not ending.is_reached([1] * 300 + [2, 1, 3])
    assert ending.is_reached([1] * 300 + [2, 0, 0, 0, 3])
    assert generation._Ending(1000, None, ("abcdefgh",), Letters()).is_reached([9] * 50 + list(range(8)))


def test_streamers_hear_every_token_in_order(model: Any) -> None:
    heard: list[tuple[int, int]] = []
    made = lists(model.generate(PROMPTS, 5, seed=1, batch=3, streamer=lambda *said: heard.append(said)))
    assert [[token for i, token in heard if i == row] for row in range(len(PROMPTS))] == made
    assert heard[0][0] == 0


def test_what_a_streamer_raises_ends_it(model: Any) -> None:
    def full(i: int, token: int) -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        model.generate([[1]], 5, streamer=full)


# States (check 7 of paper.md section 7)


def test_what_is_no_temperature(model: Any) -> None:
    with pytest.raises(ValueError, match="temperature must be at least 0, got 'a'"):
        model.generate([[1]], 3, temperature="a")


@pytest.mark.parametrize("pieces", [(1, 1, 1, 18), (5, 16), (20, 1), (2, 9, 10), (21,)])
def test_pieces_and_steps_equal_the_whole(model: Any, pieces: tuple[int, ...]) -> None:
    """Any number of tokens behind a state, also fewer than the convolution is wide; then token by token."""
    tokens = ids(2, 21)
    states, made, at = model.new_states(2), [], 0
    for length in pieces:
        logits, states = model.extend(tokens_for(model, tokens[:, at : at + length]), states)
        made.append(host(logits))
        at += length
    exact, whole = exact_logits(perturbed(), tokens), host(model(tokens_for(model, tokens)))
    assert_within(np.concatenate(made, axis=1), whole, exact, eps_of(np.float32), "pieces")

    states, made = model.new_states(2), []
    logits, states = model.prefill(tokens_for(model, tokens[:, : pieces[0]]), states)
    made.append(host(logits))
    for t in range(pieces[0], 21):
        made.append(host(model.step(tokens_for(model, tokens[:, t]), states)))
    assert_within(np.stack(made, 1), whole[:, pieces[0] - 1 :], exact[:, pieces[0] - 1 :], eps_of(np.float32), "steps")


def test_prefixes_are_reused(model: Any) -> None:
    """States that were continued are still those of the prefix."""
    prefix, one, other = (tokens_for(model, x) for x in (ids(1, 9), ids(1, 4, seed=1), ids(1, 4, seed=2)))
    _, states = model.prefill(prefix, model.new_states(1))
    kept = {name: host(tensor).copy() for name, tensor in states.named_tensors()}
    first, _ = model.extend(one, states)
    model.step(one[:, 0], states.copy())
    model.extend(other, states)
    assert all((host(tensor) == kept[name]).all() for name, tensor in states.named_tensors())
    np.testing.assert_array_equal(host(model.extend(one, states)[0]), host(first))


def test_rows_of_states(model: Any) -> None:
    _, states = model.prefill(tokens_for(model, ids(4, 9)), model.new_states(4))
    assert states.batch == 4
    beams = states.select([2, 0, 2])
    assert beams.batch == 3
    for (_, made), (_, before) in zip(beams.named_tensors(), states.named_tensors(), strict=True):
        np.testing.assert_array_equal(host(made), host(before)[[2, 0, 2]])
        assert not np.shares_memory(host(made), host(before))
    model.step(tokens_for(model, np.array([1, 2, 3])), beams)
    others = states.copy()
    others.put([3, 1], beams.select([0, 1]))
    for (_, made), (_, before), (_, put) in zip(
        others.named_tensors(), states.named_tensors(), beams.named_tensors(), strict=True
    ):
        np.testing.assert_array_equal(host(made)[[0, 2]], host(before)[[0, 2]])
        np.testing.assert_array_equal(host(made)[[3, 1]], host(put)[[0, 1]])


@pytest.mark.parametrize("reader", FRAMEWORKS)
def test_states_in_files(model: Any, reader: str, tmp_path: Path) -> None:
    """A conversation that is put away and taken up again, also by the other framework."""
    _, states = model.prefill(tokens_for(model, ids(3, 9)), model.new_states(3))
    model.save_states(tmp_path / "states", states)
    again = model_of(reader)
    read = again.load_states(tmp_path / "states")
    for (name, made), (_, before) in zip(read.named_tensors(), states.named_tensors(), strict=True):
        assert host(made).tobytes() == host(before).tobytes(), name
    tokens = np.array([1, 2, 3])
    np.testing.assert_allclose(
        host(again.step(tokens_for(again, tokens), read)),
        host(model.step(tokens_for(model, tokens), states)),
        rtol=1e-4,
    )


def test_states_of_a_deeper_model(model: Any) -> None:
    deeper = model.new_states(1)
    deeper.append(deeper[0])
    tokens = tokens_for(model, ids(1, 1))
    for call, given in ((model.step, tokens[:, 0]), (model.extend, tokens)):
        with pytest.raises(ValueError, match=r"states must be of \d+ layers, got those of \d+"):
            call(given, deeper)


def test_states_of_another_model(model: Any, tmp_path: Path) -> None:
    other = sscan.nn.MambaLM(MambaConfig(24, 2, 43, {"d_state": 8}))
    other.save_states(tmp_path / "fewer", other.new_states(2))
    other = sscan.nn.MambaLM(MambaConfig(24, 3, 43, {"d_state": 9}))
    other.save_states(tmp_path / "wider", other.new_states(2))
    with pytest.raises(ValueError, match=r"fewer: '2\.(conv|ssm)' is missing"):
        model.load_states(tmp_path / "fewer")
    with pytest.raises(ValueError, match=r"wider: '0.ssm' must have shape \(2, 48, 8\) and a floating dtype, got"):
        model.load_states(tmp_path / "wider")


def test_generation_in_pytorch_keeps_gradients_on() -> None:
    model = perturbed()
    recorded: list[bool] = []
    model.generate([[1]], 2, streamer=lambda i, token: recorded.append(model(torch.tensor([[1]])).requires_grad))
    assert recorded == [True, True]
