"""The CUDA kernels of causal_conv1d and rms_norm, run by the emulator."""

from __future__ import annotations

import importlib
import itertools
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from cases import Case, cases_of, check_backward, check_forward, conv_problem, norm_problem

import sscan
from sscan.cuda import _launch, _sums
from sscan.cuda._primitives import dtype_of
from sscan.testing import emulated, patched

of_convolution = importlib.import_module("sscan.cuda.causal_conv1d")
NORMS = {
    **{f"size {n}": {"shape": (9, n)} for n in (2, 63, 64, 65, 129, 508, 516, 1025)},
    "several blocks": {"shape": (300, 6), "residual": "float32"},
    "bfloat16, several turns": {"shape": (150, 128), "dtype": "bfloat16", "residual": "bfloat16"},
    "wide": {"shape": (5, 8200), "residual": "float16"},
    "wide, bfloat16": {"shape": (30, 8196), "dtype": "bfloat16", "residual": "float32"},
    "wide, float64": {"shape": (5, 2050), "dtype": "float64", "residual": "float64"},
    "not aligned": {"shape": (5, 256), "layout": "offset"},
    "no eps": {"shape": (5, 64), "eps": 0.0},
}
SPANS = {"float32": 4, "float16": 8, "bfloat16": 8, "float64": 2}  # steps of a lane, if rows are alike
PACKED = {"batch": 1, "initial_state": True}
BORDERS = (0, 0, 1, 2, 3, 3, 5, 8, 9, 40, 120, 121, 123, 128)
CONVOLUTIONS = {
    **{
        f"{dtype}, {tiles} tiles and {more} steps": {"dtype": dtype, "length": 32 * span * tiles + more, "dim": 5}
        for dtype, span in SPANS.items()
        for tiles, more in ((1, -span // 2), (1, 0), (2, span // 2), (2, 1))
    },
    "more tiles than a warp has": {"length": 2312, "dim": 1, "batch": 3, "initial_state": True},
    "more rows than a warp has": {"length": 8, "dim": 2, "batch": 19, "initial_state": True},
    **{
        f"rows that begin anywhere, {dtype}, length {length}": {
            "dtype": dtype, "length": length, "dim": 9, "batch": 2, "initial_state": True,
        }
        for dtype in SPANS for length in (1, 7, 77, 259)
    },
    **{f"width {width}": {"width": width, "initial_state": True, "length": 24, "dim": 6} for width in (6, 7, 9, 40)},
    **{
        f"width {width}, many sequences, {dtype}": {
            **PACKED, "width": width, "length": 128, "cu_seqlens": BORDERS, "dtype": dtype, "dim": 5,
        }
        for width, dtype in ((1, "float32"), (4, "bfloat16"), (8, "float32"), (4, "float64"), (11, "float16"))
    },
    "many sequences, not aligned": {**PACKED, "length": 130, "cu_seqlens": (*BORDERS, 130), "dim": 5},
    "many sequences without states": {"batch": 1, "length": 128, "cu_seqlens": BORDERS, "dim": 5},
    **{
        f"width {width}, seq_idx, {dtype}": {
            "seq_idx": "int16", "width": width, "length": 256, "initial_state": True, "dtype": dtype, "dim": 5,
        }
        for width, dtype in ((4, "bfloat16"), (2, "float16"), (8, "float32"), (10, "float32"))
    },
    **{
        f"{name}, channels are neighbours": {"layout": "transposed", "dim": 12, "length": 77, **changes}
        for name, changes in {
            **{dtype: {"dtype": dtype, "initial_state": True} for dtype in SPANS},
            **{f"width {width}": {"width": width, "initial_state": True} for width in (1, 2, 3, 8)},
            "many channels": {"dim": 264, "length": 9},
            # Turns are whole where they are so for all threads of a block, to the emulator, which is 512 channels.
            **{
                f"whole turns, {dtype}": {"dtype": dtype, "dim": 512, "length": 77, "batch": 1, "initial_state": True}
                for dtype in SPANS
            },
            "whole turns, seq_idx": {"seq_idx": "int32", "dim": 512, "length": 77, "batch": 1, "initial_state": True},
            "whole turns, width 8": {"width": 8, "dim": 512, "length": 77, "batch": 1, "initial_state": True},
            "whole turns, many sequences": {**PACKED, "cu_seqlens": (*BORDERS, 130), "length": 130, "dim": 512},
            "long": {"length": 600, "batch": 1, "dim": 4, "initial_state": True},
            "without bias": {"bias": False, "activation": None},
            "seq_idx": {"seq_idx": "int32", "initial_state": True, "dtype": "bfloat16"},
            "many sequences": {**PACKED, "cu_seqlens": (*BORDERS, 130), "length": 130},
            "many sequences without states": {"batch": 1, "cu_seqlens": (*BORDERS, 130), "length": 130},
        }.items()
    },
    "width 10, short": {"width": 10, "length": 4, "seq_idx": "int32", "initial_state": True},
    "width 10, empty": {"width": 10, "length": 0, "initial_state": True},
}  # fmt: skip


def more(op, problem, table):
    """Cases of ours."""
    return [Case(f"our {name}", op, partial(problem, **changes)) for name, changes in table.items()]


@pytest.mark.parametrize("case", [*cases_of("rms_norm"), *more("rms_norm", norm_problem, NORMS)], ids=str)
def test_rms_norm(case):
    check_forward(emulated, case)
    check_backward(emulated, case)


@pytest.mark.parametrize(
    "case", [*cases_of("causal_conv1d"), *more("causal_conv1d", conv_problem, CONVOLUTIONS)], ids=str
)
@pytest.mark.parametrize("warps", [1, 32])
def test_causal_conv1d(case, warps, monkeypatch):
    """With few warps on a GPU, each has several tiles and rows, and threads have long chunks, with whole turns."""
    monkeypatch.setattr(of_convolution, "WARPS", warps)
    monkeypatch.setattr(of_convolution, "WARPS_BACKWARD", warps)
    if warps == 1:
        monkeypatch.setattr(of_convolution, "_chunks", chunks_of_24)
    check_forward(emulated, case)
    check_backward(emulated, case)


def chunks_of_24(x, group, resident):
    batch, dim, length = x.shape
    across, chunks, block = -(-dim // group), -(-length // 24), of_convolution.BLOCK
    bits = min(block.bit_length() - 1, (across - 1).bit_length())
    return chunks, 24, bits, -(-batch * chunks * -(-across >> bits) // (block >> bits))


def test_chunks_fill_the_gpu(monkeypatch):
    """All steps are in a chunk, all threads in a block; no chunk is so long that half of a GPU has nothing to do."""
    monkeypatch.setattr(_launch, "processors", lambda: 132)
    for shape in itertools.product((1, 8, 300), (4, 36, 1536, 5120), (1, 7, 64, 2048, 100_003)):
        for group, resident in ((2, 4), (4, 5)):
            batch, dim, length = shape
            array = SimpleNamespace(shape=shape)
            chunks, chunk, bits, blocks = of_convolution._chunks(array, group, resident)
            assert (chunks - 1) * chunk < length <= chunks * chunk
            across = -(-dim // (group << bits))
            assert blocks * of_convolution.BLOCK >= batch * chunks * across << bits
            assert chunk <= 4 or 2 * blocks > resident * 132, (shape, group)


@pytest.mark.parametrize("case", cases_of("causal_conv1d_update"), ids=str)
def test_causal_conv1d_update(case):
    check_forward(emulated, case)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neighbouring_channels_stay_where_they_are(monkeypatch, dtype):
    """No copy is made of x and dy, and y and dx have the channels as neighbours too."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((2, 33, 8)).astype(dtype_of(dtype)).transpose(0, 2, 1) for _ in range(2))
    weight = rng.standard_normal((8, 4), dtype=np.float32)
    kernels, results = [], []
    with patched(), monkeypatch.context() as patch:
        launch = _launch.launch

        def noted(kernel, blocks, *arguments):
            kernels.append(kernel.module)
            assert not any(a.shape == x.shape and a.strides != x.strides for a in arguments if hasattr(a, "shape"))
            launch(kernel, blocks, *arguments)

        patch.setattr(_launch, "launch", noted)
        results.append(sscan.causal_conv1d(x, weight, activation="silu"))
        results.append(sscan.causal_conv1d_backward(dy, x, weight, activation="silu").dx)
    assert kernels[:2] == ["causal_conv1d_last"] * 2
    assert all(made.strides == x.strides for made in results)


def test_rows_that_begin_at_other_places_are_read_step_by_step(monkeypatch):
    """x is every second channel of an array, y has the channels side by side: groups of 16 bytes do not match."""
    both = np.zeros((1, 6, 9), np.float32)
    (kernel,) = launched(monkeypatch, "causal_conv1d", x=both[:, ::2], weight=np.ones((3, 4), np.float32))
    assert kernel.key == ("float32", 4, 1, False, False, "")


def launched(monkeypatch, op, **arguments):
    """The kernels that a call launches."""
    kernels = []
    with patched(), monkeypatch.context() as patch:
        launch = _launch.launch
        patch.setattr(_launch, "launch", lambda kernel, *rest: (kernels.append(kernel), launch(kernel, *rest)))
        getattr(sscan, op)(**arguments)
    return kernels


@pytest.mark.parametrize(("offset", "together"), [(0, True), (1, False), (2, False), (4, True)])
def test_vector_accesses_are_chosen_by_alignment(monkeypatch, offset, together):
    x = np.zeros(4 * 64 + 8, np.float32)
    x = x[-x.ctypes.data % 16 // 4 :][offset : offset + 256].reshape(4, 64)
    (kernel,) = launched(monkeypatch, "rms_norm", x=x, weight=np.ones(64, np.float32))
    assert kernel.key == ("float32", "", 4, 4, 4) if together else ("float32", "", 8, 8, 1)
    kernel = launched(monkeypatch, "causal_conv1d", x=x[None], weight=np.ones((4, 4), np.float32))[0]
    assert kernel.key == ("float32", 4, 4 if together else 1, False, False, "")


@pytest.mark.parametrize("count", [1, 2, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 200])
def test_sums_over_any_number_of_parts(count):
    """However many threads share a sum, nothing is left out, and nothing is written behind the sums."""
    rng = np.random.default_rng(count)
    parts = [rng.integers(-9, 9, (count, size)).astype(np.float32) for size in (515, 1)]  # whose sums are exact
    sums = [np.full(x.shape[1], np.nan, np.float32) for x in parts]
    with patched():
        _sums.over_parts(*zip(parts, sums, strict=True))
    for x, total in zip(parts, sums, strict=True):
        np.testing.assert_array_equal(total, x.sum(0))
