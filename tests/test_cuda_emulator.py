"""The emulator finds what it is there for, and loops are written out as they would run."""

from __future__ import annotations

import dis
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sscan import testing
from sscan.cuda._primitives import (
    await_previous,
    local_array,
    prefetch,
    reader,
    select,
    shared_array,
    shared_get,
    shared_set,
    shuffle_xor,
    synchronize,
    synchronize_warp,
    thread_index,
    writer,
)
from sscan.cuda._unroll import unroll, written_out
from sscan.testing import _emulator

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., None]

THREADS = 64
F32 = np.dtype(np.float32)
one_number, four_numbers, block_array = local_array(1, F32), local_array(4, F32), shared_array(THREADS, F32)
read_one, write_one = reader(F32, F32, 1), writer(F32, F32, 1)
read_four = reader(F32, F32, 4, True)
ZERO, ONE = F32.type(0), F32.type(1)


@pytest.fixture
def run() -> Run:
    """Run a body as a kernel of one block."""
    return lambda body, *arguments: testing.run(body, THREADS, 1, *arguments)


def test_says_what_it_needs() -> None:
    code = (
        "import sys; sys.modules['numba_cuda'] = None\n"
        "try: import sscan.testing\n"
        "except ImportError as error: print(error, error.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line = 'sscan.testing needs numba-cuda, which is installed by: pip install "sscan[cuda13]" numba_cuda\n'
    assert done.stdout == line


def aligned(size: int) -> Any:
    """Zeros that start at a multiple of 16 bytes."""
    x = np.zeros(size + 4, F32)
    return x[-x.ctypes.data % 16 // 4 :][:size]


# --- Global memory ----------------------------------------------------------------------------------------------------


def test_a_kernel_runs(run: Run) -> None:
    x, y = np.arange(THREADS, dtype=F32), np.zeros(THREADS, F32)

    def body(x: Any, y: Any) -> None:
        value = one_number()
        read_one(value, x, thread_index(), select(thread_index() < 40, 1, 0 * thread_index()))
        value[0] = value[0] + shuffle_xor(value[0], 1)
        write_one(y, thread_index(), value, 1)

    run(body, x, y)
    known = np.where(x < 40, x, 0)
    np.testing.assert_array_equal(y, known + known.reshape(-1, 2)[:, ::-1].ravel())


@pytest.mark.parametrize("size", [THREADS - 1, 1])
def test_read_outside(run: Run, size: int) -> None:
    def body(x: Any) -> None:
        read_one(one_number(), x, thread_index(), 1)

    with pytest.raises(AssertionError, match="outside the array"):
        run(body, np.zeros(size, F32))


@pytest.mark.parametrize("shift", [-1, 1])
def test_write_outside(run: Run, shift: int) -> None:
    """Also where the memory belongs to the next array."""
    memory = np.zeros(3 * THREADS, F32)

    def body(x: Any, before: Any, after: Any, shift: Any) -> None:
        value = one_number()
        value[0] = ZERO
        write_one(x, thread_index() + shift, value, 1)

    x, before, after = memory[THREADS:-THREADS], memory[:THREADS], memory[-THREADS:]
    run(body, x, before, after, 0)
    with pytest.raises(AssertionError, match="outside the array"):
        run(body, x, before, after, shift)


def test_array_that_is_absent(run: Run) -> None:
    def body(x: Any) -> None:
        read_one(one_number(), x, thread_index(), 1)

    with pytest.raises(AssertionError, match="no array at address"):
        run(body, None)


@pytest.mark.parametrize("early", [False, True])
def test_nothing_is_read_before_the_kernel_has_waited(run: Run, early: bool) -> None:
    def body(x: int, out: int) -> None:
        value = one_number()
        if early:
            read_one(value, x, thread_index(), 1)
        prefetch(x + 4 * thread_index())
        await_previous()
        if not early:
            read_one(value, x, thread_index(), 1)
        write_one(out, thread_index(), value, 1)

    x, out = np.arange(THREADS, dtype=F32), np.zeros(THREADS, F32)
    if early:
        with pytest.raises(AssertionError, match="read or written before the kernel had waited"):
            run(body, x, out)
    else:
        run(body, x, out)
        np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("shift", [-4, 4])
def test_what_is_sent_for_is_there(run: Run, shift: int) -> None:
    def body(x: int) -> None:
        prefetch(x + 4 * thread_index() + shift)

    with pytest.raises(AssertionError, match=r"no array at address|outside the array"):
        run(body, np.zeros(THREADS, F32))


@pytest.mark.parametrize("start", [0, 1, 2, 4])
def test_vector_access_must_be_aligned(run: Run, start: int) -> None:
    def body(x: Any) -> None:
        read_four(four_numbers(), x, 4 * thread_index(), 4)

    x = aligned(4 * THREADS + 4)[start:]
    if start % 4 == 0:
        run(body, x)
    else:
        with pytest.raises(AssertionError, match="not aligned"):
            run(body, x)


def test_a_part_of_a_vector(run: Run) -> None:
    def body(x: Any, valid: Any) -> None:
        read_four(four_numbers(), x, 4 * thread_index(), valid - 4 * thread_index())

    x = aligned(4 * THREADS)
    run(body, x, 4 * THREADS - 4)
    with pytest.raises(AssertionError, match="a part of a vector"):
        run(body, x, 4 * THREADS - 2)


# --- Shared memory ----------------------------------------------------------------------------------------------------


def exchange(distance: int, barrier: Any, again: Any = synchronize) -> Any:
    """A body where each thread reads what another one wrote, and then writes there."""

    def body() -> None:
        shared = block_array()
        shared_set(shared, thread_index(), ONE)
        barrier()
        value = shared_get(shared, thread_index() ^ distance)
        again()
        shared_set(shared, thread_index(), value + ONE)

    return body


def no_barrier() -> None: ...


@pytest.mark.parametrize("distance", [1, 31])
def test_race_within_a_warp(run: Run, distance: int) -> None:
    run(exchange(distance, synchronize_warp, synchronize_warp))
    with pytest.raises(AssertionError, match="race: read of shared"):
        run(exchange(distance, no_barrier))
    with pytest.raises(AssertionError, match="race: write of shared"):
        run(exchange(distance, synchronize, no_barrier))


@pytest.mark.parametrize("distance", [32, 33])
def test_race_across_warps(run: Run, distance: int) -> None:
    run(exchange(distance, synchronize, synchronize))
    for missing in (no_barrier, synchronize_warp):
        with pytest.raises(AssertionError, match="race: read of shared"):
            run(exchange(distance, missing))
        with pytest.raises(AssertionError, match="race: write of shared"):
            run(exchange(distance, synchronize, missing))


def test_a_shuffle_is_no_barrier(run: Run) -> None:
    def body() -> None:
        shared = block_array()
        shared_set(shared, thread_index(), ONE)
        shuffle_xor(ONE, 1)
        shared_get(shared, thread_index() ^ 1)

    with pytest.raises(AssertionError, match="race: read of shared"):
        run(body)


def test_an_element_of_several_threads(run: Run) -> None:
    """May be written by all of them with one value, not with several."""

    def body(step: Any) -> None:
        shared_set(block_array(), thread_index() & 31, select((thread_index() & step) == 0, ONE, ZERO))

    run(body, 1)
    with pytest.raises(AssertionError, match="two threads write different numbers"):
        run(body, 32)


def test_shared_index_outside(run: Run) -> None:
    def body() -> None:
        shared_get(block_array(), thread_index() + 1)

    with pytest.raises(AssertionError, match="shared index 64 of 64"):
        run(body)


def test_nothing_is_zero_before_it_is_written(run: Run) -> None:
    seen = {}

    def body() -> None:
        seen["local"], seen["shared"] = one_number()[0], shared_get(block_array(), thread_index())

    run(body)
    assert np.isnan(seen["local"]).all()
    assert np.isnan(seen["shared"]).all()
    assert np.isnan(_emulator.empty((3,), F32)).all()


# --- Control flow -----------------------------------------------------------------------------------------------------


def branch() -> None:
    if thread_index() < 32:
        synchronize()


def loop() -> None:
    for _ in range(thread_index()):  # type: ignore[call-overload]
        synchronize()


def conjunction() -> None:
    select(thread_index() > 1 and thread_index() < 4, ONE, ZERO)


@pytest.mark.parametrize("body", [branch, loop, conjunction])
def test_threads_take_one_path(run: Run, body: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"truth value|only integer scalar arrays|only 0-dimensional"):
        run(body)


def test_indices_of_local_arrays_are_constants(run: Run) -> None:
    def body() -> None:
        four_numbers()[thread_index()]

    with pytest.raises(AssertionError, match="must be known when compiling"):
        run(body)


# --- Loops that are written out ---------------------------------------------------------------------------------------

WIDTH = 3


def triangle(n: int) -> Any:
    offset = 10 * n

    def function(x: Any) -> Any:
        """Pairs below the diagonal, in order; q, k and the free name are used as values and as bounds."""
        pairs = []
        for q in unroll(WIDTH + 1):
            total = 0
            for k in unroll(q):
                pairs.append((q, k, offset + x))
                total += k
            if q == n:
                pairs.append(total)
        return pairs

    return function


def mixed(x: Any) -> Any:
    total = 0
    for i in range(x):
        for j in unroll(6):
            total += i * j
    return total


def left(x: Any) -> Any:
    total = 0
    for i in unroll(WIDTH, WIDTH > 3):
        for j in unroll(2, WIDTH > 3):
            total += i * j + x
    return total


def loops_of(function: Any) -> int:
    return sum(step.opname == "FOR_ITER" for step in dis.get_instructions(function))


@pytest.mark.parametrize(("function", "loops"), [(triangle(2), 0), (triangle(0), 0), (mixed, 1), (left, 2)])
def test_written_out_loops_do_the_same(function: Any, loops: int) -> None:
    written = written_out(function)
    assert loops_of(function) == 2
    assert loops_of(written) == loops, "only ordinary loops are left"
    assert written(7) == function(7)
    assert written.__module__ == function.__module__
    assert written.__code__.co_argcount == 1


def test_functions_without_unroll_are_left_alone() -> None:
    assert written_out(loops_of) is loops_of


def test_launches_that_cannot_be() -> None:
    x = np.zeros(32, F32)
    locked = x.copy()
    locked.flags.writeable = False
    for threads, blocks, argument, error, message in (
        (33, 1, x, ValueError, "run: threads must be a multiple of 32 up to 1024, got 33"),
        (2048, 1, x, ValueError, "run: threads must be a multiple of 32 up to 1024, got 2048"),
        (32, 0, x, ValueError, "run: blocks must be at least 1, got 0"),
        (32, 1, locked, ValueError, "run: argument 0 must be contiguous and writeable"),
        (32, 1, x[::2], ValueError, "run: argument 0 must be contiguous and writeable"),
        (32, 1, 2.5, TypeError, "run: argument 0 must be an array, an integer or None, got float"),
    ):
        with pytest.raises(error, match=message):
            testing.run(lambda x: None, threads, blocks, argument)
