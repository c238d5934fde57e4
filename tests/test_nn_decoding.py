"""A decoding step in one call of a kernel: as exact as the operations, the same bits whatever runs beside it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sscan.cpu import _parallel
from sscan.nn import Linear, MambaConfig, MambaLM, Parameter, decoding

BFLOAT16 = ml_dtypes.bfloat16
HALVES = [np.float16, BFLOAT16]
# Sizes that fill vectors and sizes that do not, and everything that may be absent.
CONFIGS = {
    "whole_vectors": MambaConfig(64, 2, 96, {"d_state": 16, "dt_rank": 16}),
    "odd": MambaConfig(35, 3, 53, {"d_state": 11, "dt_rank": 7, "bias": True}, tie_embeddings=False),
    "wide_rows": MambaConfig(100, 1, 20, {"d_state": 17, "expand": 1.3, "conv_bias": False}),
    "no_memory_of_inputs": MambaConfig(24, 2, 40, {"d_conv": 1, "d_state": 1}),
    "no_step_size_from_the_input": MambaConfig(24, 2, 40, {"dt_rank": 0, "d_conv": 2}),
    "separate_norm": MambaConfig(48, 2, 40, fused_add_norm=False),
}
SMALL = CONFIGS["odd"]


def perturbed(config: MambaConfig, dtype: Any, seed: int = 0, by: float = 0.2) -> MambaLM:
    model, rng = MambaLM(config, dtype, seed=seed), np.random.default_rng(seed)
    for p in model.parameters():
        p.data = (p.data.astype(np.float64) + by * rng.standard_normal(p.shape)).astype(p.dtype)
    return model


def in_dtype(model: MambaLM, dtype: Any) -> MambaLM:
    other = MambaLM(model.config, dtype, seed=None)
    other.load_state_dict(model.state_dict())
    return other


def tokens(config: MambaConfig, batch: int, length: int) -> Any:
    return np.random.default_rng(1).integers(0, config.vocab_size, (batch, length))


def steps(model: MambaLM, ids: Any) -> Any:
    """Logits of all tokens, each in one call of the kernel."""
    states, logits = model.new_states(len(ids)), []
    for t in range(ids.shape[1]):
        logits.append(decoding.step(model, ids[:, t], states))
        assert logits[-1] is not None, "the kernel was not used"
    return np.stack(logits, axis=1)


def steps_of_operations(model: MambaLM, ids: Any) -> Any:
    states = model.new_states(len(ids))
    return np.stack([model._logits(model.backbone.step(i, states)).data for i in ids.T], axis=1)


def error(got: Any, exact: Any) -> float:
    return float(np.abs(got.astype(np.float64) - exact).max() / max(1, np.abs(exact).max()))


# Right


@pytest.mark.parametrize("dtype", [np.float64, np.float32, *HALVES])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_steps_are_as_exact_as_the_operations(config: MambaConfig, dtype: Any) -> None:
    model, ids = perturbed(config, dtype), tokens(config, 3, 7)
    exact = in_dtype(model, np.float64)(ids).data
    got = steps(model, ids)
    assert got.dtype == np.result_type(dtype, np.float32)
    plain = error(steps_of_operations(model, ids), exact)
    assert error(got, exact) <= 3 * plain + 4 * float(ml_dtypes.finfo(dtype).eps)
    if np.dtype(dtype).itemsize == 2:  # only the inputs of convolutions are rounded
        assert error(got, exact) < plain


@pytest.mark.parametrize("dtype", [np.float64, np.float32, *HALVES])
def test_steps_continue_a_prompt(dtype: Any) -> None:
    model, ids = perturbed(SMALL, dtype), tokens(SMALL, 2, 9)
    exact = in_dtype(model, np.float64)(ids).data
    plain = max(error(model(ids).data, exact), error(steps_of_operations(model, ids), exact))
    logits, states = model.prefill(ids[:, :5], model.new_states(2))
    for t in range(5, 9):
        assert logits.dtype == np.result_type(dtype, np.float32)
        assert error(logits, exact[:, t - 1]) <= 3 * plain + 4 * float(ml_dtypes.finfo(dtype).eps)
        logits = model.step(ids[:, t], states)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_weights_give_the_bits_of_the_same_weights_in_float32(dtype: Any) -> None:
    config = CONFIGS["no_memory_of_inputs"]  # in the state of a convolution inputs are rounded
    model, ids = perturbed(config, dtype), tokens(config, 2, 5)
    np.testing.assert_array_equal(steps(model, ids), steps(in_dtype(model, np.float32), ids))
    model = perturbed(SMALL, dtype)
    np.testing.assert_array_equal(steps(model, ids[:, :1]), steps(in_dtype(model, np.float32), ids[:, :1]))


def test_extreme_weights() -> None:
    model = perturbed(SMALL, np.float32)
    mixer = model.backbone.layers[1].mixer
    mixer.A_log.data[:, 0], mixer.A_log.data[:, 1] = 80, -80
    model.backbone.layers[0].mixer.out_proj.weight.data *= 1e18
    ids = tokens(SMALL, 1, 6)
    got, plain = steps(model, ids), steps_of_operations(model, ids)
    assert np.isfinite(got).all()
    assert error(got, plain.astype(np.float64)) < 1e-4


# Always the same


@pytest.mark.parametrize("dtype", [np.float64, np.float32, BFLOAT16])
def test_bits_depend_neither_on_threads_nor_on_the_batch(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MambaConfig(200, 3, 517)
    model, ids = perturbed(config, dtype), tokens(config, 6, 5)
    monkeypatch.setattr("sscan.cpu.decode.ALONE", 0)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(_parallel, "threads", lambda threads=threads: threads)
        monkeypatch.setattr("sscan.cpu.decode.threads", lambda threads=threads: threads)
        results.append(steps(model, ids))
        np.testing.assert_array_equal(results[-1], results[0])
    for row in range(6):
        np.testing.assert_array_equal(steps(model, ids[row : row + 1])[0], results[0][row])


def test_an_empty_batch() -> None:
    model = perturbed(SMALL, np.float32)
    assert model.step(np.zeros(0, np.int64), model.new_states(0)).shape == (0, 56)


# What the kernel does not know


def test_weights_are_read_as_they_are_now() -> None:
    model, ids = perturbed(SMALL, np.float32), tokens(SMALL, 1, 1)
    before = steps(model, ids)
    model.backbone.layers[2].mixer.A_log.data *= 1.5  # in place
    model.backbone.layers[2].mixer.D.data *= 1.5
    changed = steps(model, ids)
    assert (changed != before).any()
    model.lm_head.weight.data = model.lm_head.weight.data * 2  # another array
    np.testing.assert_array_equal(steps(model, ids), 2 * changed)
    model.backbone.norm_f.eps = 1e3
    assert np.abs(steps(model, ids)).max() < np.abs(changed).max()
    model.load_state_dict({name: 0 * array for name, array in model.state_dict().items()})
    assert not steps(model, ids).any()


class Doubled(Linear):
    def __call__(self, x: Any) -> Any:
        return super().__call__(x) * 2.0


def _transposed(model: MambaLM) -> None:
    weight = model.backbone.layers[0].mixer.in_proj.weight
    weight.data = np.asfortranarray(weight.data)


def _subclass(model: MambaLM) -> None:
    mixer = model.backbone.layers[0].mixer
    doubled = Doubled(mixer.d_inner, model.config.d_model, True)
    doubled.weight, doubled.bias = mixer.out_proj.weight, mixer.out_proj.bias
    mixer.out_proj = doubled


def _another_parameter(model: MambaLM) -> None:
    model.backbone.layers[0].mixer.gain = Parameter((1,), lambda rng, shape: np.ones(shape))  # type: ignore[attr-defined]


def _zoh(model: MambaLM) -> None:
    model.backbone.layers[1].mixer.discretization = "zoh"


def _half_stream(model: MambaLM) -> None:
    model.config = MambaConfig(**{**model.config.to_dict(), "residual_in_fp32": False})
    model.backbone.activation_dtype = np.dtype(BFLOAT16)


@pytest.mark.parametrize("change", [_transposed, _subclass, _another_parameter, _zoh, _half_stream])
def test_other_models_are_left_to_the_operations(change: Any) -> None:
    model, ids = perturbed(SMALL, np.float32), tokens(SMALL, 2, 1)[:, 0]
    change(model)
    assert decoding.step(model, ids, model.new_states(2)) is None
    expected = model._logits(model.backbone.step(ids, model.new_states(2))).data
    np.testing.assert_array_equal(model.step(ids, model.new_states(2)), expected)


def test_dtypes_that_do_not_go_together_are_left_to_the_operations() -> None:
    model, ids = perturbed(SMALL, np.float32), tokens(SMALL, 2, 1)[:, 0]
    norm = model.backbone.norm_f.weight
    norm.data = norm.data.astype(np.float64)
    assert decoding.step(model, ids, model.new_states(2)) is None
    with pytest.raises(TypeError, match="weight must have dtype float32"):
        model.step(ids, model.new_states(2))


@pytest.mark.parametrize("shape", [(10,), (70, 10), (7, 2, 10)])
def test_shapes_that_do_not_go_together_are_left_to_the_operations(shape: tuple[int, ...]) -> None:
    model, ids = perturbed(SMALL, np.float32), tokens(SMALL, 2, 1)[:, 0]
    model.backbone.layers[1].mixer.A_log.data = np.zeros(shape, np.float32)
    assert decoding.step(model, ids, model.new_states(2)) is None
    model.backbone.layers[0].mixer.A_log.data = np.zeros(shape, np.float32)
    assert decoding.step(model, ids, model.new_states(2)) is None


def test_states_that_lie_otherwise_are_left_to_the_operations() -> None:
    model, ids = perturbed(SMALL, np.float32), tokens(SMALL, 2, 3)
    expected = steps(model, ids)
    states = model.new_states(2)
    for state in states:
        state.ssm.data = np.zeros((3, *state.ssm.shape[:0:-1]), np.float32)[:2].swapaxes(1, 2)
    assert decoding.step(model, ids[:, 0], states) is None
    for t in range(3):
        np.testing.assert_allclose(model.step(ids[:, t], states), expected[:, t], rtol=1e-4, atol=1e-5)


def test_large_batches_are_left_to_the_operations() -> None:
    model, ids = perturbed(SMALL, np.float32), tokens(SMALL, decoding.MOST_ROWS + 1, 1)[:, 0]
    assert decoding.step(model, ids, model.new_states(len(ids))) is None
    alone = steps(model, ids[:3, None])[:, 0]
    np.testing.assert_allclose(model.step(ids, model.new_states(len(ids)))[:3], alone, rtol=1e-4, atol=1e-5)


def test_wrong_arguments() -> None:
    model, ids = perturbed(SMALL, np.float32), tokens(SMALL, 2, 1)[:, 0]
    with pytest.raises(ValueError, match="indices must be in"):
        model.step(ids + 1000, model.new_states(2))
    with pytest.raises(ValueError, match="conv_state must have shape"):
        model.step(ids, model.new_states(3))
    frozen = model.new_states(2)
    frozen[1].ssm.data.flags.writeable = False
    with pytest.raises(TypeError, match="read-only"):
        model.step(ids, frozen)


def test_models_are_not_kept() -> None:
    model = perturbed(SMALL, np.float32)
    steps(model, tokens(SMALL, 1, 1))
    array = weakref.ref(model.lm_head.weight.data)
    model.load_state_dict({name: a.copy() for name, a in model.state_dict().items()})
    gc.collect()
    assert array() is None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# Phases


def test_who_keeps_others_waiting_does_no_more_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parallel, "threads", lambda: 2)
    done, by = np.zeros((6, 4), np.int64), np.zeros((6, 4), np.int64)

    @_parallel.kernel
    def work(counter: Any, count: Any, progress: Any, done: Any, by: Any, pause: Any) -> None:
        thread = _parallel.take(counter)
        phases, tasks = done.shape
        for phase in range(phases):
            while True:
                task = _parallel.next_task(progress, phase, tasks, thread)
                if task < 0:
                    break
                if phase == 0 and task == 0:
                    _parallel._sleep(pause)
                before = done[:phase].sum()
                done[phase, task] = 1 if before == phase * tasks else 2  # 2: the phase before was not over
                by[phase, task] = thread
                _parallel.finish(progress, phase, thread)

    work(np.zeros(1, np.int64), 1, _parallel.phases(6, 1), done.copy(), by.copy(), 0)
    _parallel.run(work, 2, _parallel.phases(6, 2), done, by, 500_000)
    assert (done == 1).all()
    late = by[0, 0]
    assert (by[0, 1:] != late).all(), "nobody else was there"
    assert (by[1:] != late).all()
