"""Calls on a GPU, decided once.

What an op does there depends on what its arrays are like, never on their values. So the first call of a kind is
recorded: the memory that it gets, the kernels that it launches, and which argument of a kernel is the address of what.
Every further one is a lookup, the allocations and the launches. Calls that do anything else are not repeated: the op is
run each time.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

from sscan import _arrays, _recording
from sscan._checks import REMEMBERED
from sscan._recording import Recording

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
_NEVER = object()  # instead of the plan of a call that cannot be repeated
_ALIGNMENT = 256  # bytes, as of what allocators give


class Plan(NamedTuple):
    """How a kind of call is repeated.

    What a launch takes is picked from a pool: addresses of the call's arrays, of its results and of its workspace,
    addresses inside of these, and numbers.
    """

    results: tuple[tuple[Callable[..., Any], int | None], ...]  # see ``Planning.like``
    workspace: Callable[[], Any] | None
    inside: tuple[tuple[int, int], ...]  # place of an address in the pool, and bytes behind it
    numbers: tuple[int, ...]
    launches: tuple[Any, ...]  # as ``sscan.cuda._launch.repeat`` takes them
    returned: Callable[[list[Any]], Any]  # what the op returns, of its results

    def repeat(self, address: Callable[[Any], int], arrays: list[Any], addresses: list[int], stream: int) -> Any:
        """What the op returns for these arrays, which lie there."""
        results = [make() if place is None else make(arrays[place]) for make, place in self.results]
        pool = [*addresses, *map(address, results)]
        if self.workspace is not None:
            memory = self.workspace()  # held until the last launch
            pool.append(address(memory))
        pool += [pool[place] + offset for place, offset in self.inside]
        pool += self.numbers
        _launches().repeat(self.launches, pool, stream)
        return self.returned(results)


def planned(op: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """An op that follows its caller, and that on a GPU launches kernels and does nothing else, unless it says so."""
    known: dict[Any, Any] = {}
    following = _arrays.follows_caller(op)

    @functools.wraps(op)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Any:
        arguments = (*args, *kwargs.values()) if kwargs else args
        planning = _arrays.planning(arguments[0]) if arguments else None
        seen = None if planning is None else planning.seen(arguments)
        if planning is None or seen is None or _recording.current.recording is not None:
            return following(*args, **kwargs)
        kind, arrays, addresses, device = seen
        stream = planning.stream(device)
        if stream is None:
            return following(*args, **kwargs)
        key = (*kind, len(args), *kwargs) if kwargs else tuple(kind)
        plan = known.get(key)
        if plan is None:
            recording, returned = _recorded(following, args, kwargs)
            if len(set(addresses)) == len(arrays):  # else one address stood for two arguments
                if len(known) >= REMEMBERED:
                    known.clear()
                known[key] = _plan(recording, planning, arrays, device, returned)
            return returned
        if plan is _NEVER:
            return following(*args, **kwargs)
        return plan.repeat(planning.address, arrays, addresses, stream)

    return call


@functools.cache
def _launches() -> Any:
    """What launches kernels: imported once one has been launched."""
    from sscan.cuda import _launch

    return _launch


def _recorded(op: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Recording, Any]:
    """The recording of a call, and what it returned."""
    recording = _recording.current.recording = Recording()
    try:
        return recording, op(*args, **kwargs)
    finally:
        _recording.current.recording = None


class _Memory(NamedTuple):
    """A piece of memory that a recorded call knows: where it begins, its bytes, and what it is.

    An array or a result has its place in the pool, an allocation for work none.
    """

    address: int
    size: int
    place: int | None


def _plan(recording: Recording, planning: _arrays.Planning, arrays: list[Any], device: int, returned: Any) -> Any:
    """The plan of a recorded call on these arrays, or ``_NEVER``."""
    results = [x for x in (returned if isinstance(returned, tuple) else (returned,)) if x is not None]
    given = [
        _Memory(planning.address(x), _extent(_arrays.view(x)), place) for place, x in enumerate((*arrays, *results))
    ]
    at = {memory.address: memory for memory in given}
    got = {address for address, _, _ in recording.allocations}
    if not (recording.repeatable and recording.launches and len(at) == len(given)):
        return _NEVER
    if not got.issuperset(memory.address for memory in given[len(arrays) :]):
        return _NEVER
    work = [_Memory(address, size, None) for address, size, _ in recording.allocations if address not in at and size]
    launches = []
    for launched, blocks, arguments in recording.launches:
        sources = [_source(x, at, [*given, *work]) for x in arguments]
        if None in sources:
            return _NEVER
        launches.append((launched, blocks, sources))
    starts, total = _laid_out(work, [sources for _, _, sources in launches])
    return _written(planning, arrays, results, device, returned, launches, starts, total)


def _source(x: Any, at: dict[int, _Memory], memories: list[_Memory]) -> Any:
    """An argument of a launch, as a number or as (memory, bytes behind its beginning); None if nobody knows what it is.

    Memory of two arrays may overlap. An address inside of both is nobody's.
    """
    value = 0 if x is None else x if isinstance(x, int) else x.data.ptr
    around = [memory for memory in memories if memory.address <= value < memory.address + memory.size]
    if x is None or type(x) is int:
        return None if around or value in at else value  # it may be an address
    if value in at:
        return at[value], 0
    return (around[0], value - around[0].address) if len(around) == 1 else None


def _written(
    planning: _arrays.Planning, arrays: list[Any], results: list[Any], device: int, returned: Any,
    launches: list[Any], starts: dict[_Memory, int], total: int,
) -> Plan:  # fmt: skip
    """The plan, in which every source has a place in the pool: the given memory, the workspace, inside, numbers."""
    workspace = len(arrays) + len(results)
    inside: dict[tuple[int, int], int] = {}
    numbers: dict[int, int] = {}

    def placed(source: Any) -> Any:
        """Where a source stands, as a table and what to look up there."""
        if isinstance(source, int):
            numbers[source] = 0
            return numbers, source
        memory, offset = source
        if memory.place is None:
            key = workspace, starts[memory] + offset
        elif not offset:
            return range(workspace), memory.place
        else:
            key = memory.place, offset
        inside[key] = 0
        return inside, key

    tables = [(launched, blocks, [placed(x) for x in sources]) for launched, blocks, sources in launches]
    for table, first in ((inside, workspace + bool(total)), (numbers, workspace + bool(total) + len(inside))):
        for place, key in enumerate(table, first):
            table[key] = place  # type: ignore[index]
    repeatable = _launches().repeatable
    return Plan(
        tuple(planning.like(x, arrays) for x in results),
        planning.workspace(total, device) if total else None,
        tuple(inside),
        tuple(numbers),
        tuple(repeatable(launched, blocks, [of[x] for of, x in places]) for launched, blocks, places in tables),
        _returning(returned),
    )


def _extent(view: Any) -> int:
    """Bytes from an array's first element to its last."""
    if 0 in view.shape:
        return 0
    steps = zip(view.shape, view.strides, strict=True)
    return int(view.dtype.itemsize + sum((size - 1) * step for size, step in steps if step > 0))


def _laid_out(work: list[_Memory], launches: list[list[Any]]) -> tuple[dict[_Memory, int], int]:
    """Where each piece of memory lies in one workspace, and the size of that.

    Launches come one after the other, so two pieces may lie in the same place if one is needed for the last time before
    the other is for the first.
    """
    used: dict[_Memory, list[int]] = {}
    for number, sources in enumerate(launches):
        for source in sources:
            if not isinstance(source, int) and source[0].place is None:
                used.setdefault(source[0], []).append(number)
    starts: dict[_Memory, int] = {}
    total = 0
    for memory in sorted(work, key=lambda memory: -memory.size):
        if memory not in used:
            continue
        first, last = used[memory][0], used[memory][-1]
        beside = sorted(
            (start, start + other.size)
            for other, start in starts.items()
            if used[other][0] <= last and first <= used[other][-1]
        )
        place = 0
        for start, end in beside:
            if place + memory.size <= start:
                break
            place = max(place, -(-end // _ALIGNMENT) * _ALIGNMENT)
        starts[memory] = place
        total = max(total, place + memory.size)
    return starts, total


def _returning(returned: Any) -> Callable[[list[Any]], Any]:
    """What makes, of the results, something like what was returned: one, or a tuple with None in the same places."""
    if not isinstance(returned, tuple):
        return operator.itemgetter(0)
    make = getattr(type(returned), "_make", tuple)
    given = [x is not None for x in returned]
    if all(given):
        return make

    def with_nothing(results: list[Any]) -> Any:
        left = iter(results)
        return make([next(left) if there else None for there in given])

    return with_nothing
