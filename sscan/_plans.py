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

    A kernel's arguments are picked from a pool: addresses of the call's arrays, of its results and of parts of its
    workspace, and numbers.
    """

    results: tuple[tuple[Callable[..., Any], int | None], ...]  # see ``Planning.like``
    workspace: Callable[[], Any] | None
    parts: tuple[int, ...]  # where they start in the workspace
    numbers: tuple[int, ...]
    launches: tuple[Any, ...]  # as ``sscan.cuda._launch.repeat`` takes them
    returned: Callable[[list[Any]], Any]  # what the op returns, of its results

    def repeat(self, address: Callable[[Any], int], arrays: list[Any], addresses: list[int], stream: int) -> Any:
        """What the op returns for these arrays, which lie there."""
        results = [make() if place is None else make(arrays[place]) for make, place in self.results]
        pool = [*addresses, *map(address, results)]
        if self.workspace is not None:
            memory = self.workspace()  # held until the last launch
            start = address(memory)
            pool += [start + part for part in self.parts]
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


def _plan(recording: Recording, planning: _arrays.Planning, arrays: list[Any], device: int, returned: Any) -> Any:
    """The plan of a recorded call on these arrays, or ``_NEVER``."""
    results = [x for x in (returned if isinstance(returned, tuple) else (returned,)) if x is not None]
    places = [planning.address(x) for x in results]
    workspaces, total = _laid_out(recording, places)
    # The pool, as the place of each thing in it.
    known = {address: place for place, address in enumerate((*map(planning.address, arrays), *places))}
    parts: dict[int, int] = {}
    numbers: dict[int, int] = {}

    def source(x: Any) -> Any:
        """The table of a kernel's argument and what it is there; None if nobody knows what it is."""
        value = 0 if x is None else x if isinstance(x, int) else x.data.ptr
        part = next((at + value - start for start, size, at in workspaces if start <= value < start + size), None)
        if x is None or type(x) is int:
            numbers[value] = 0
            return None if value in known or part is not None else (numbers, value)  # it may be an address
        if value in known:
            return known, value
        if part is None:
            return None
        parts[part] = 0
        return parts, part

    launches = [(kernel, blocks, [source(x) for x in arguments]) for kernel, blocks, arguments in recording.launches]
    got = {address for address, _, _ in recording.allocations}
    if not (recording.repeatable and launches and got.issuperset(places) and len(known) == len(arrays) + len(places)):
        return _NEVER
    if any(None in sources for _, _, sources in launches):
        return _NEVER
    for place, number in enumerate(numbers, len(known) + len(parts)):
        numbers[number] = place
    for place, part in enumerate(parts, len(known)):
        parts[part] = place
    repeatable = _launches().repeatable
    return Plan(
        tuple(planning.like(x, arrays) for x in results),
        planning.workspace(total, device) if total else None,
        tuple(parts),
        tuple(numbers),
        tuple(repeatable(kernel, blocks, [of[x] for of, x in sources]) for kernel, blocks, sources in launches),
        _returning(returned),
    )


def _laid_out(recording: Recording, results: list[int]) -> tuple[list[tuple[int, int, int]], int]:
    """Address, size and place in one workspace of each allocation that is no result; the size of that workspace."""
    places, total = [], 0
    for address, size, _ in recording.allocations:
        if address not in results and size:
            places.append((address, size, total))
            total += -(-size // _ALIGNMENT) * _ALIGNMENT
    return places, total


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
