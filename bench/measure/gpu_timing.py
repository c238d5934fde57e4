"""Times and memory on the GPU: CUDA events around several calls in a row, medians, and what an allocator sees."""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cupy

L2 = 60e6  # bytes of the H200's second-level cache
REPEATS, IN_A_ROW = 9, 10


def sets_for(size: int) -> int:
    """Sets of inputs to take in turn, so that no call finds its own in the L2 cache; at most 16."""
    return 1 if size > 2 * L2 else min(16, 2 + int(2 * L2 / size))


def milliseconds(calls: Sequence[Callable[[], Any]], repeats: int = REPEATS, in_a_row: int = IN_A_ROW) -> float:
    """Median time of one call, by CUDA events around ``in_a_row`` calls, each on the next set of inputs.

    They follow another one, so that the GPU has work while the host launches the first of them.
    """
    for call in calls:
        call()
    turn, start, end, times = itertools.cycle(calls), cupy.cuda.Event(), cupy.cuda.Event(), []
    cupy.cuda.Device().synchronize()
    for _ in range(repeats):
        next(turn)()
        start.record()
        for _ in range(in_a_row):
            next(turn)()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end) / in_a_row)
    return statistics.median(times)


def milliseconds_in_graph(calls: Sequence[Callable[[], Any]], repeats: int = REPEATS) -> float:
    """Median time of one call in a CUDA graph of all of them: without the time that the host takes to launch them."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        results = [call() for call in calls]  # memory for this stream
        results.clear()
        stream.begin_capture()
        results += [call() for call in calls]  # kept: their memory is the graph's as long as it lives
        graph = stream.end_capture()
        graph.launch(stream)
        start, end, times = cupy.cuda.Event(), cupy.cuda.Event(), []
        stream.synchronize()
        for _ in range(repeats):
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, end) / len(calls))
    return statistics.median(times)


def host_microseconds(call: Callable[[], Any], calls: int = 300, batches: int = 9) -> float:
    """Median time that the host spends in a call that it does not wait for."""
    for _ in range(50):
        call()
    times = []
    for _ in range(batches):
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    cupy.cuda.Device().synchronize()
    return 1e6 * statistics.median(times)


def copy_bandwidth(size: int = 2 * 10**9) -> float:
    """Bytes per second read and written by a copy on the device."""
    source, target = cupy.full(size, 1, cupy.uint8), cupy.empty(size, cupy.uint8)
    time_of_one = milliseconds([lambda: target.data.copy_from_device_async(source.data, size)])
    return 2 * size / (1e-3 * time_of_one)


def free_memory() -> None:
    cupy.get_default_memory_pool().free_all_blocks()


class Ledger:
    """An allocator on a pool of its own that counts the bytes in use, and the most there were at any time."""

    def __init__(self) -> None:
        self.pool, self.most = cupy.cuda.MemoryPool(), 0

    def allocate(self, size: int) -> Any:
        memory = self.pool.malloc(size)
        self.most = max(self.most, self.pool.used_bytes())
        return memory


def peak_memory(call: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that a call has in use at most, and those of what it returns; nothing that existed before counts."""
    ledger = Ledger()
    with cupy.cuda.using_allocator(ledger.allocate):
        result = call()
        cupy.cuda.Device().synchronize()
        left = ledger.pool.used_bytes()
        del result
    return ledger.most, left


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every array that is made inside begins as NaN: what a kernel leaves out shows in its results."""
    pool = cupy.cuda.MemoryPool()

    def allocate(size: int) -> Any:
        memory = pool.malloc(size)
        if size:
            memory.memset_async(0xFF, size)
        return memory

    with cupy.cuda.using_allocator(allocate):
        yield
