"""Calls on a GPU that are repeated, on a stand-in for one: what is launched with which addresses; no GPU is needed."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from driver_double import Driver

import sscan
from sscan import _arrays, _plans, _recording
from sscan._recording import Address
from sscan.cuda import _launch, _workspace
from sscan.cuda._launch import Kernel
from sscan.jax import _frame, _handler

if TYPE_CHECKING:
    from collections.abc import Callable

KERNEL, OTHER = Kernel("a", "kernel", ()), Kernel("another", "kernel", ())
addresses = itertools.count(2**40, 4096)


class Memory(NamedTuple):
    ptr: int
    device_id: int = 0


class Array:
    """As much of a CuPy array as a launch looks at: there is nothing in it."""

    def __init__(self, shape: Any = (4,), dtype: Any = np.float32) -> None:
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.dtype, self.ndim, self.data = np.dtype(dtype), len(self.shape), Memory(next(addresses))
        self.nbytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self.strides = np.empty(self.shape, self.dtype).strides


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What reaches the driver: function, blocks and arguments."""

    class Seen(Driver):
        def cuLaunchKernelEx(self, *call: Any) -> int:
            status = super().cuLaunchKernelEx(*call)
            launch = self.launches.pop()
            seen.append((launch.function, launch.blocks[0], launch.parameters))
            return status

    seen: list[Any] = []
    driver = Seen()
    cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDevice=lambda: 0), get_current_stream=lambda: SimpleNamespace(ptr=77)
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(ndarray=Array, empty=Array, cuda=cuda))
    monkeypatch.setitem(_arrays._known, Array, _arrays.CUPY)
    monkeypatch.setattr(_launch, "_driver", lambda: driver)
    functions = {
        (KERNEL, 0): _launch.Function("kernel", 1, 128, False),
        (OTHER, 0): _launch.Function("other", 2, 64, False),
    }
    monkeypatch.setattr(_launch, "_functions", functions)
    return seen


def counted(op: Callable[..., Any]) -> tuple[Callable[..., Any], list[Any]]:
    """A planned op, and the arguments that it was really run with."""
    runs: list[Any] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        runs.append((args, kwargs))
        return op(*args, **kwargs)

    return _plans.planned(run), runs


class Results(NamedTuple):
    first: Any
    second: Any


def two_launches(x: Any, factor: int = 3, z: Any = None) -> Any:
    memory, (sums, carry) = _workspace.take(_workspace.layout(100, 300))
    y, state = _arrays._empty_on_gpu(x.shape, x.dtype), _arrays._empty_on_gpu((2, 3), np.float64)
    _launch.launch(KERNEL, 7, x, None, sums, carry, y, factor, -5)
    _launch.launch(OTHER, 9, carry, z, state, y, 2**62)
    del memory
    return Results(y, None) if z is None else Results(y, state)


def test_a_repeated_call_has_addresses_of_its_own(launches: list[Any]) -> None:
    op, runs = counted(two_launches)
    for _ in range(3):
        x, z = Array(), Array()
        y, state = op(x, 3, z=z)
        (_, _, first), (_, _, second) = launches[-2:]
        assert [call[:2] for call in launches[-2:]] == [(1, 7), (2, 9)]
        sums, carry = first[2:4]
        assert first == [x.data.ptr, 0, sums, carry, y.data.ptr, 3, -5]
        assert second == [carry, z.data.ptr, state.data.ptr, y.data.ptr, 2**62]
        assert carry - sums == 256
        assert not {sums, carry} & {a.data.ptr for a in (x, z, y, state)}
        assert (y.shape, y.dtype, state.shape, state.dtype) == ((4,), np.float32, (2, 3), np.float64)
    assert len(runs) == 1, "the others are repeated"
    assert len({tuple(arguments) for _, _, arguments in launches}) == 6, "nothing is used twice"


@pytest.mark.parametrize("several", [True, False])
def test_repeated_calls_of_jax_are_on_its_memory(
    several: bool, launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call takes XLA's memory in the order in which it asks for some, and copies; later ones know better."""
    count = 2 if several else 1
    regions = [_frame.Region(next(addresses), np.dtype(np.float32), (4,)) for _ in range(4 * (1 + count))]

    copied: list[int] = []

    class View(Array):
        def reshape(self, shape: Any) -> Any:
            return self

        def copy(self) -> Any:
            return self

        def __setitem__(self, index: Any, values: Any) -> None:
            copied.append(self.data.ptr)

    def viewed(memory: _handler.Memory) -> Any:
        view = View(memory.region.shape, memory.region.dtype)
        view.data = Memory(memory.region.address)
        return view

    def last_is_made_first(x: Any) -> Any:
        caller, (x,) = _arrays.enter("op", x=x)
        made = [caller.empty((4,), np.dtype(np.float32)) for _ in range(count)][::-1]
        memory, (work,) = _workspace.take(_workspace.layout(100))
        _launch.launch(KERNEL, 7, x, *made, work)
        del memory
        return tuple(made) if several else made[0]

    op, runs = counted(last_is_made_first)
    library = dataclasses.replace(_arrays._known[_handler.Memory], view=viewed)
    monkeypatch.setitem(_arrays._known, _handler.Memory, library)
    monkeypatch.setattr(_handler, "_view", viewed)
    monkeypatch.setattr(sscan, "rms_norm", op)
    call = _handler.Call("rms_norm", ("x",), ())
    for i in range(0, len(regions), 1 + count):
        x, *results = (_handler.Memory(region, "cuda:0") for region in regions[i : i + 1 + count])
        _handler._run(call, [x], results)
        (_, _, arguments) = launches[-1]
        own = [memory.region.address for memory in results]
        assert arguments[:-1] == [x.region.address, *(own if i else own[::-1])]
    assert len(runs) == 1
    assert copied == [region.address for region in regions[1:3] if several], "of the first call only"


def test_what_was_not_returned_is_not_returned(launches: list[Any]) -> None:
    op, _ = counted(two_launches)
    for _ in range(2):
        results = op(Array())
        assert type(results) is Results
        assert results.second is None


@pytest.mark.parametrize(
    "change",
    [
        lambda: ((Array(5),), {}), lambda: ((Array((2, 2)),), {}), lambda: ((Array(dtype=np.float64),), {}),
        lambda: ((Array(), 4), {}), lambda: ((Array(), True), {}),
        lambda: ((Array(), 3, Array()), {}), lambda: ((Array(),), {"factor": 3}), lambda: ((Array(),), {"z": Array()}),
    ],
)  # fmt: skip
def test_another_call_is_not_repeated(change: Any, launches: list[Any]) -> None:
    op, runs = counted(two_launches)
    op(Array(), 3)
    args, kwargs = change()
    op(*args, **kwargs)
    assert len(runs) == 2


def test_options_of_equal_value_are_told_apart_by_type(launches: list[Any]) -> None:
    op, runs = counted(lambda x, flag: two_launches(x))
    for flag in (True, 1, 1.0):
        op(Array(), flag)
    assert len(runs) == 3


def unaligned(x: Any) -> Any:
    x.data = Memory(x.data.ptr + 4)
    return x


def test_another_alignment_is_not_repeated(launches: list[Any]) -> None:
    op, runs = counted(two_launches)
    op(Array())
    op(unaligned(Array()))
    assert len(runs) == 2


def reads_a_copy(x: Any) -> Any:
    _launch.launch(KERNEL, 1, Array(), y := _arrays._empty_on_gpu(x.shape, x.dtype))
    return y


def returns_what_it_did_not_get(x: Any) -> Any:
    _launch.launch(KERNEL, 1, x, 5)
    return Array()


def returns_its_argument(x: Any) -> Any:
    _launch.launch(KERNEL, 1, x, 5)
    return x


def says_so(x: Any) -> Any:
    _recording.not_repeatable()
    return two_launches(x)


def launches_nothing(x: Any) -> Any:
    return _arrays._empty_on_gpu(x.shape, x.dtype)


def hides_an_address(x: Any) -> Any:
    y = _arrays._empty_on_gpu(x.shape, x.dtype)
    _launch.launch(KERNEL, 1, x, int(y.data.ptr), y)
    return y


def hides_an_address_of_work(x: Any) -> Any:
    work, y = _launch.empty(8, np.float32), _arrays._empty_on_gpu(x.shape, x.dtype)
    _launch.launch(KERNEL, 1, x, work.data.ptr + 4, y)
    return y


def names_an_unknown_address(x: Any) -> Any:
    y = _arrays._empty_on_gpu(x.shape, x.dtype)
    _launch.launch(KERNEL, 1, x, Address(3 * 2**40), y)
    return y


@pytest.mark.parametrize(
    "op",
    [
        reads_a_copy, returns_what_it_did_not_get, returns_its_argument, says_so, launches_nothing, hides_an_address,
        hides_an_address_of_work, names_an_unknown_address,
    ],
)  # fmt: skip
def test_calls_that_do_more_are_run_each_time(op: Callable[..., Any], launches: list[Any]) -> None:
    planned, runs = counted(op)
    for _ in range(3):
        planned(Array())
    assert len(runs) == 3


def test_one_array_for_two_arguments(launches: list[Any]) -> None:
    """Such a call is not recorded, as nobody could tell the two; it may be repeated, if it has been recorded."""
    op, runs = counted(two_launches)
    shared = Array()
    op(shared, 3, shared)
    x, z = Array(), Array()
    op(x, 3, z)
    assert len(runs) == 2
    op(shared, 3, shared)
    assert len(runs) == 2
    assert launches[-2][2][0] == launches[-1][2][1] == shared.data.ptr


def test_errors_are_raised_each_time_and_leave_nothing_behind(launches: list[Any]) -> None:
    def refuse(x: Any) -> Any:
        raise ValueError("x is not as it should be")

    op, runs = counted(refuse)
    for _ in range(2):
        with pytest.raises(ValueError, match="x is not as it should be"):
            op(Array())
        assert _recording.current.recording is None
    assert len(runs) == 2


def test_an_op_within_an_op_is_part_of_its_plan(launches: list[Any]) -> None:
    inner, runs = counted(lambda x: two_launches(x).first)
    outer, _ = counted(inner)
    for _ in range(3):
        outer(Array())
    assert len(runs) == 1
    assert len(launches) == 6


def test_plans_do_not_pile_up(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plans, "REMEMBERED", 3)
    op, runs = counted(two_launches)
    for number in range(9):
        op(Array(), number)
    op(Array(), 8)
    assert len(runs) == 9
    op(Array(), 0)
    assert len(runs) == 10, "the first ones were let go"


def test_arrays_of_the_host_are_none_of_its_business(launches: list[Any]) -> None:
    op, runs = counted(lambda x: x + 1)
    for _ in range(2):
        assert op(np.arange(3)).tolist() == [1, 2, 3]
    assert len(runs) == 2
    assert not launches


def works_in_turns(x: Any) -> Any:
    """Three pieces of memory, of which the first is done with when the last is begun."""
    first, second, third = (_launch.empty(size, np.float32) for size in (100, 200, 100))
    y = _arrays._empty_on_gpu(x.shape, x.dtype)
    _launch.launch(KERNEL, 1, x, first)
    _launch.launch(KERNEL, 1, first, second)
    _launch.launch(KERNEL, 1, second, third)
    _launch.launch(KERNEL, 1, third, y)
    return y


def test_memory_is_used_again_when_nobody_needs_it(launches: list[Any]) -> None:
    op, _ = counted(works_in_turns)
    for _ in range(2):
        op(Array())
    (_, first), (also_first, second), (also_second, third), (also_third, _) = (call[2] for call in launches[-4:])
    assert (first, second, third) == (also_first, also_second, also_third)
    assert first == third
    assert abs(first - second) >= (400 if first < second else 800)


class Part(NamedTuple):
    """A part of an array, as a kernel is given it."""

    data: Memory


def works_on_halves(x: Any) -> Any:
    y = _arrays._empty_on_gpu(x.shape, x.dtype)
    _launch.launch(KERNEL, 1, x, Part(Memory(x.data.ptr + 8)), y, Part(Memory(y.data.ptr + 8)))
    return y


def test_parts_of_arrays_and_results_move_with_them(launches: list[Any]) -> None:
    op, runs = counted(works_on_halves)
    for _ in range(2):
        x = Array()
        y = op(x)
        assert launches[-1][2] == [x.data.ptr, x.data.ptr + 8, y.data.ptr, y.data.ptr + 8]
    assert len(runs) == 1


def overlapping(x: Any, other: Any) -> Any:
    y = _arrays._empty_on_gpu((4,), x.dtype)
    _launch.launch(KERNEL, 1, x, other, Part(Memory(x.data.ptr + 12)), y)
    return y


def test_parts_of_two_arrays_are_nobodys(launches: list[Any]) -> None:
    """Two rows of one array overlap here: whose part this is, nobody knows."""
    op, runs = counted(overlapping)
    for _ in range(2):
        x, other = Array(), Array()
        other.data = Memory(x.data.ptr + 8)
        op(x, other)
    assert len(runs) == 2
