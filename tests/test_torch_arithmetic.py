"""The Mamba block by launches alone is the block by PyTorch's ops: kernels in the emulator, cuBLAS by a stand-in."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from cublas_double import Cublas, installed

from sscan import _arrays, _plans, _recording
from sscan.cuda import _launch, _workspace
from sscan.testing import patched
from sscan.testing._emulator import Emulator
from sscan.torch import Mamba, _block
from sscan.torch._arithmetic import LAUNCHES, OPS, is_planned
from sscan.torch._block import _backward, _forward, _planned_backward, _planned_forward, planned_step

if TYPE_CHECKING:
    from collections.abc import Iterator

D_MODEL = 12
HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.fixture
def cublas(monkeypatch: pytest.MonkeyPatch) -> Cublas:
    return installed(monkeypatch)


@pytest.fixture(autouse=True)
def emulator(cublas: Cublas) -> Iterator[None]:
    with patched():
        yield


def arguments(
    batch: int, stored: Any, dtype: Any, *, states: bool = False, seed: int = 0, length: int = 9, **packing: Any
) -> list[Any]:
    """What ``sscan::mamba`` takes of a block with weights in a dtype, whose values are nobody's defaults."""
    torch.manual_seed(seed)
    made = Mamba(D_MODEL, d_state=4, dtype=stored)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    given = {"conv_state": None, "ssm_state": None, "seq_idx": None, "cu_seqlens": None, **packing}
    if states:
        given["conv_state"] = torch.randn(batch, made.d_inner, 3, dtype=dtype or stored)
        given["ssm_state"] = torch.randn(batch, made.d_inner, 4)
    taken = (
        made.in_proj.weight, made.in_proj.bias, made.conv1d.weight, made.conv1d.bias, made.x_proj.weight,
        made.dt_proj.weight, made.out_proj.weight, made.out_proj.bias, made.A_log, made.D, made.dt_proj.bias,
    )  # fmt: skip
    hidden = torch.randn(batch, length, D_MODEL, dtype=dtype or stored)
    weights = [None if x is None else x.detach() for x in taken]
    return [hidden, *weights, *given.values(), None, dtype, states]


CASES: dict[str, Any] = {
    "one row": (1, SINGLE, None), "rows": (3, SINGLE, None),
    "autocast": (1, SINGLE, HALF), "rows, autocast": (2, SINGLE, HALF),
    "halves": (1, HALF, None), "rows of halves": (2, HALF, None),
}  # fmt: skip


def close(ours: Any, theirs: Any, low: bool) -> None:
    assert [x is None for x in ours] == [x is None for x in theirs]
    for x, y in zip(ours, theirs, strict=True):
        if x is not None:
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            scale = y.double().abs().max().clamp(min=1e-6)
            assert float((x.double() - y.double()).abs().max() / scale) < (2.0**-6 if low else 1e-5)


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_launches_make_what_ops_make(name: str, states: bool) -> None:
    given = arguments(*CASES[name], states=states)
    low = HALF in CASES[name]
    ours, theirs = (_forward(by, *given) for by in (LAUNCHES, OPS))
    close(ours, theirs, low)
    *_, xz, A = theirs
    dout = torch.randn_like(theirs[0])
    dstates = [None if x is None else torch.randn_like(x) for x in (theirs[1:3] if states else (None, None))]
    close(*(_backward(by, dout, *dstates, xz, A, *given) for by in (LAUNCHES, OPS)), low)


@pytest.mark.parametrize(
    "packing",
    [{"seq_idx": torch.tensor([[0] * 4 + [1] * 5], dtype=torch.int32)}, {"cu_seqlens": torch.tensor([0, 2, 9])}],
    ids=lambda packing: next(iter(packing)),
)
def test_packed_rows(packing: Any) -> None:
    given = arguments(1, SINGLE, None, **packing)
    close(*(_forward(by, *given) for by in (LAUNCHES, OPS)), False)


def test_what_cannot_be_multiplied_is_an_error() -> None:
    given = arguments(1, SINGLE, None)
    given[0] = given[0][..., :-1]
    with pytest.raises(RuntimeError, match=r"Mamba: matrices \(1, 48, 12\) and \(1, 11, 9\) cannot be multiplied"):
        _forward(LAUNCHES, *given)


@pytest.mark.parametrize("captured", [False, True])
def test_products_of_a_graph_work_in_its_memory(
    captured: bool, cublas: Cublas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set behind the stream, which would make cuBLAS take its own again; and for no product after it."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    monkeypatch.setattr(_block, "is_planned", lambda *_: True)
    given, once = arguments(1, SINGLE, None), ["stream", *(["workspace"] if captured else []), "product"]

    def names_of(call: Any, *arguments: Any) -> list[str]:
        cublas.calls.clear()
        call(*arguments)
        return [name for name, *_ in cublas.calls]

    out, _, _, xz, A = _block._mamba(*given)
    assert names_of(_block._mamba, *given) == 4 * once
    assert names_of(_block._mamba_backward_kernel, torch.ones_like(out), None, None, xz, A, *given) == 12 * once
    assert names_of(planned_step, *step_of(2, SINGLE, seed=0)[1]) == 4 * once
    assert names_of(LAUNCHES.bmm, torch.randn(1, 3, 4), torch.randn(1, 4, 5)) == ["stream", "product"]


def test_nothing_is_planned_on_the_cpu() -> None:
    *tensors, dtype, states = arguments(1, SINGLE, None)
    assert not is_planned(tensors, dtype, states)


# --- as a plan --------------------------------------------------------------------------------------------------------


class Recorder:
    """Launches and allocations of a call in the emulator, as they are recorded on a GPU, and what repeats them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run, take, empty = _launch.launch, _workspace.take, _launch.empty

        def launch(kernel: Any, blocks: int, *given: Any) -> None:
            _recording.launched(kernel, blocks, given)
            run(kernel, blocks, *given)

        def allocated(array: Any) -> Any:
            if array is not None:
                _recording.allocated(array, array.ctypes.data, array.nbytes)
            return array

        def taken(layout: Any) -> Any:
            memory, parts = take(layout)
            return memory, [allocated(part) for part in parts]

        caller = _arrays.Caller(
            "PyTorch", "cpu", lambda shape, dtype: allocated(empty(shape, dtype)), _arrays._leave_to_torch
        )
        monkeypatch.setattr(_arrays, "_torch_on", lambda kind, device: caller)
        monkeypatch.setattr(_launch, "launch", launch)
        monkeypatch.setattr(_launch, "empty", lambda shape, dtype: allocated(empty(shape, dtype)))
        monkeypatch.setattr(_workspace, "take", taken)
        monkeypatch.setattr(_launch, "repeatable", lambda *launch: launch)
        monkeypatch.setattr(_launch, "repeat", self.repeat)
        self.memory: list[Any] = []

        def workspace(size: int, device: int) -> Any:
            def make() -> Any:
                self.memory.append(torch.full((size,), 255, dtype=torch.uint8))  # NaN, in every dtype
                return self.memory[-1]

            return make

        def like(result: Any, arrays: Any) -> Any:
            def make() -> Any:
                self.memory.append(torch.full_like(result, torch.nan))
                return self.memory[-1]

            return make, None

        assert _arrays.TORCH.planning is not None
        self.planning = dataclasses.replace(_arrays.TORCH.planning, workspace=workspace, like=like)

    def plan(self, op: Any, *given: Any) -> Any:
        recording, returned = _plans._recorded(op, given, {})
        recording.launches = [
            (launched, blocks, tuple(map(pointer, arguments))) for launched, blocks, arguments in recording.launches
        ]
        arrays = [x for x in given if isinstance(x, torch.Tensor)]
        return _plans._plan(recording, self.planning, arrays, 0, returned)

    def repeated(self, plan: Any, *given: Any) -> Any:
        self.memory = arrays = [x for x in given if isinstance(x, torch.Tensor)]
        return plan.repeat(self.planning.address, [*arrays], [x.data_ptr() for x in arrays], 0)

    def repeat(self, launches: Any, pool: list[int], stream: int) -> None:
        memory = [_arrays.TORCH.view(x) for x in self.memory]
        for launched, blocks, places in launches:
            values = [pool[place] for place in places]
            if isinstance(launched, _launch.Kernel):
                function, shape = _launch.build(launched)
                Emulator(shape.threads, memory, function.__module__).run(function, blocks, values)
            else:
                launched.starter(stream)(launched, *values)


@pytest.fixture
def recorder(emulator: None) -> Iterator[Recorder]:
    """Undone before the emulator is, which puts back what was there before both."""
    with pytest.MonkeyPatch.context() as patch:
        yield Recorder(patch)


def pointer(x: Any) -> Any:
    return SimpleNamespace(data=SimpleNamespace(ptr=x.ctypes.data)) if isinstance(x, np.ndarray) else x


@pytest.mark.parametrize(("name", "states"), [*((name, False) for name in CASES), ("one row", True), ("rows", True)])
def test_a_repeated_block_is_the_block(name: str, states: bool, recorder: Recorder) -> None:
    """On other values, in memory that is used again as soon as nobody needs it: bit for bit."""
    low = CASES[name][2] is not None
    # A length of its own: what is known of a call's arrays is kept with the memory that this test watches.
    first, second = (arguments(*CASES[name], states=states, seed=seed, length=11) for seed in (0, 1))
    plan = recorder.plan(_planned_forward.__wrapped__, *first[:-2], low, states)
    made = recorder.repeated(plan, *second[:-2], low, states)
    expected = _forward(LAUNCHES, *second)
    same(made, expected)
    *_, xz, A = expected
    dout = torch.randn_like(expected[0])
    dstates = [None if x is None else torch.randn_like(x) for x in expected[1:3]]
    given = (dout, *dstates, xz, A, *second[:-2], low, states)
    plan = recorder.plan(_planned_backward.__wrapped__, *given)
    given = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in given)
    same(recorder.repeated(plan, *given), _backward(LAUNCHES, dout, *dstates, xz, A, *second))


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_repeated_step_is_the_step(batch: int, dtype: Any, recorder: Recorder) -> None:
    plan = recorder.plan(planned_step.__wrapped__, *step_of(batch, dtype, seed=0)[1])
    made, given = step_of(batch, dtype, seed=1)
    (hidden, states), ours = (given[0].clone(), [x.clone() for x in given[-2:]]), given[-2:]
    out = recorder.repeated(plan, *given)
    with torch.no_grad():
        expected, *_ = made.step(hidden[:, None], *states)
    close([out, *ours], [expected[:, 0], *states], dtype is HALF)
    assert not any(torch.equal(x, y) for x, y in zip(states, step_of(batch, dtype, seed=1)[1][-2:], strict=True))


def step_of(batch: int, dtype: Any, seed: int) -> tuple[Mamba, list[Any]]:
    """A block, and what its step as a plan takes."""
    torch.manual_seed(seed)
    made = Mamba(D_MODEL, d_state=4, dtype=dtype)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    states = [torch.randn_like(x) for x in made.allocate_inference_cache(batch, 1)]
    weights = (
        made.in_proj.weight, made.conv1d.weight, made.conv1d.bias, made.x_proj.weight, made.dt_proj.weight,
        made.out_proj.weight, made.A_log, made.D, made.dt_proj.bias,
    )  # fmt: skip
    return made, [torch.randn(batch, D_MODEL, dtype=dtype), *(x.detach() for x in weights), *states]


def same(ours: Any, theirs: Any) -> None:
    assert [x is None for x in ours] == [x is None for x in theirs]
    for x, y in zip(ours, theirs, strict=True):
        if x is not None:
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            assert x.isfinite().all()
            assert torch.equal(x, y)
