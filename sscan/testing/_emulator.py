"""Runs the bodies of ``sscan.cuda.kernels`` without a GPU, all threads of a block as one vector.

The functions are the product's own, with every primitive replaced by its twin here. Threads go in lockstep, so control
flow that depends on the thread raises (a vector has no truth value). Beyond the result it finds what is hidden on a
GPU: reads and writes outside the arrays that a kernel was given, vector accesses that are not aligned, and shared
memory that two threads use without a barrier in between.
"""

from __future__ import annotations

import contextlib
import functools
import types
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

import sscan
from sscan import _backends
from sscan.cuda import _launch, _primitives, _products, _workspace
from sscan.models.arguments import check_integer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WARP = 32
SEVERAL, EPOCH = 1024, 2048  # beside the numbers of threads, of which a block has 1024 at most; more than all of these


class Local:
    """An array of each thread: (size, threads). Reading copies, as registers do."""

    def __init__(self, size: int, number: Any, threads: int) -> None:
        self.values = np.full((size, threads), np.nan, number)

    def __getitem__(self, i: int) -> Any:
        assert isinstance(i, int), "indices of a local array must be known when compiling"
        assert 0 <= i < len(self.values)
        return self.values[i].copy()

    def __setitem__(self, i: int, value: Any) -> None:
        assert isinstance(i, int)
        assert 0 <= i < len(self.values)
        assert np.ndim(value) == 0 or value.dtype == self.values.dtype, "a conversion that costs registers"
        self.values[i] = value

    def several(self, start: int, count: int) -> Any:
        """That many of each thread; their memory, not a copy."""
        assert isinstance(start, int), "indices of a local array must be known when compiling"
        assert 0 <= start <= start + count <= len(self.values)
        return self.values[start : start + count]

    def put(self, start: int, values: Any) -> None:
        into = self.several(start, len(values))
        assert values.dtype == into.dtype, "a conversion that costs registers"
        into[...] = values


class Shared:
    """An array of a block, which knows who used which element since the last barrier."""

    def __init__(self, size: int, number: Any, emulator: Emulator) -> None:
        self.values = np.full(size, np.nan, number)
        self.emulator = emulator
        self.writes, self.reads = _Accesses(size), _Accesses(size)

    def check(self, index: Any, count: int) -> Any:
        """Where the threads access that many elements: (count, threads), and whether parts of vectors are apart."""
        index = self.emulator.of_each(index)
        return _places(index.tobytes(), index.dtype, count, self.values.itemsize, len(self.values))

    def get(self, index: Any, count: int = 1) -> Any:
        places, _ = self.check(index, count)
        clash = self.writes.clash(self.emulator, places)
        assert not np.count_nonzero(clash), f"race: read of shared {places[clash][:4]} that another thread wrote"
        self.reads.note(self.emulator, places)
        return self.values.take(places)

    def set(self, index: Any, values: Any, count: int = 1) -> None:
        places, apart = self.check(index, count)
        for at, value in [(places, values)] if apart else zip(places, values, strict=True):
            for accesses, did in ((self.reads, "read"), (self.writes, "wrote")):
                clash = accesses.clash(self.emulator, at)
                assert not np.count_nonzero(clash), f"race: write of shared {at[clash][:4]} that another thread {did}"
            self.values[at] = value
            self.writes.note(self.emulator, at)
            written = self.values.take(at)
            same = (written == value) | (value != value)
            assert same.all(), "race: two threads write different numbers to one element of shared memory"


@functools.lru_cache(4096)  # threads come back to the same places in every tile
def _places(index: bytes, kind: Any, count: int, itemsize: int, size: int) -> tuple[Any, bool]:
    """The elements of vectors that begin at ``index``, and whether no two vectors overlap in part."""
    first = np.frombuffer(index, kind)
    together = min(count, 16 // itemsize)
    assert together == 1 or not (first % together).any(), "vector access to shared memory is not aligned"
    assert first.min() >= 0, f"shared index {first.min()}"
    assert first.max() + count <= size, f"shared index {first.max()} of {size}"
    places = first + np.arange(count)[:, None]
    places.flags.writeable = False
    return places, not (first % count).any()


class _Accesses:
    """Who accessed each element since the last barrier: a thread, a warp, or several of them.

    They are numbered anew after each barrier, so a smaller number than is given out now is of one who came before it.
    What was accessed since the last barrier of the block is looked through when somebody might clash with it: mostly
    nobody does.
    """

    def __init__(self, size: int) -> None:
        self.threads, self.warps = np.full(size, -1), np.full(size, -1)
        self.recent: list[tuple[Any, ...]] = []
        self.epoch = -1  # of the block, in which they were

    def clash(self, e: Emulator, index: Any) -> Any:
        """Whether an access of each thread now and the ones before have no barrier in between."""
        if self.epoch != e.block_epoch:
            return False
        for access in self.recent:
            self._enter(*access)
        self.recent.clear()
        thread, warp = self.threads[index], self.warps[index]
        return ((thread >= e.warp_epoch) & (thread != e.known_thread)) | (
            (warp >= e.block_epoch) & (warp != e.known_warp)
        )

    def note(self, e: Emulator, index: Any) -> None:
        if self.epoch != e.block_epoch:
            self.epoch = e.block_epoch
            self.recent.clear()
        self.recent.append((index, e.known_thread, e.warp_epoch, e.known_warp, e.block_epoch))

    def _enter(self, index: Any, thread: Any, warp_epoch: int, warp: Any, block_epoch: int) -> None:
        for known, own, epoch in ((self.threads, thread, warp_epoch), (self.warps, warp, block_epoch)):
            before = known[index]
            other = (before >= epoch) & (before != own)
            known[index] = own
            other |= known[index] != own  # of several in this very instruction, one is known
            known[index[other]] = epoch + SEVERAL


class Emulator:
    """The twins of the primitives, for one block at a time."""

    def __init__(self, threads: int, arrays: list[Any], home: str = "sscan.cuda.") -> None:
        self.threads, self.thread = threads, np.arange(threads, dtype=np.int64)
        self.home = home  # the module of the kernel, whose functions are device code as ours are
        self.lane, self.warp = self.thread % WARP, self.thread // WARP
        self.block = 0
        self.touched = False  # memory, by this block
        self.warp_epoch = self.block_epoch = 0
        self.synchronize()
        self.memory = [(a.ctypes.data, _bytes(a), a) for a in arrays if a.size]

    # numbers

    def exp2_approx(self, x: Any) -> Any:
        # An H200's results are that much too small on average from 1/2 to 1 (``_math`` makes up for it).
        kept = np.where(x < -1 / 256, 1 - 2e-8, 1 - 7e-9)
        return (np.exp2(x.astype(np.float64)) * kept).astype(np.float32)

    def reciprocal_approx(self, x: Any) -> Any:
        return np.float32(1) / x

    def select(self, condition: Any, x: Any, y: Any) -> Any:
        assert np.result_type(x) == np.result_type(y), "select of two types"
        return np.where(condition, x, y)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        real = np.result_type(x, y, z)
        wide = np.float64 if real == np.float32 else np.longdouble
        exact = np.asarray(x, wide) * np.asarray(y, wide)
        exact += np.asarray(z, wide)
        return exact.astype(real)

    def absolute(self, x: Any) -> Any:
        return np.abs(x)

    def maximum(self, x: Any, y: Any) -> Any:
        return np.fmax(x, y)

    def nearest(self, x: Any) -> Any:
        return np.rint(x)

    def square_root(self, x: Any) -> Any:
        return np.sqrt(x)

    def power_of_two(self, k: Any) -> Any:
        return np.ldexp(np.ones_like(k), k.astype(np.int32))

    def quotient(self, x: Any, y: Any) -> Any:
        return x // y

    def complex_number(self, re: Any, im: Any) -> Any:
        z = np.empty(np.broadcast_shapes(np.shape(re), np.shape(im)), np.result_type(re, np.complex64))
        z.real, z.imag = re, im
        return z

    def rank_of(self, x: Any) -> Any:
        word = np.asarray(x, np.float32).view(np.int32)
        return np.where(word < 0, word ^ 0x7FFFFFFF, word).astype(np.int64)

    def anew(self, x: Any) -> Any:
        return x

    def as_real(self, bits: int) -> Any:
        return np.int64(bits).view(np.float64)

    # threads

    def thread_index(self) -> Any:
        return self.thread

    def block_index(self) -> int:
        return self.block

    def synchronize(self) -> None:
        self.block_epoch += EPOCH
        self.known_warp = self.block_epoch + self.warp
        self.synchronize_warp()

    def synchronize_warp(self) -> None:
        self.warp_epoch += EPOCH
        self.known_thread = self.warp_epoch + self.thread

    def ask_now(self) -> None:
        """Nothing, as ``converge``."""

    def converge(self) -> None:
        """Nothing, as on newer GPUs: memory is not waited for."""

    def await_previous(self) -> None:
        """Kernels are run one after the other; on a GPU, what was read before would be older."""
        assert not self.touched, "memory was read or written before the kernel had waited for the one before it"

    def prefetch(self, address: Any) -> None:
        address, touched = self.of_each(address), self.touched
        self._elements(address[None], np.int64(0), np.dtype(np.uint8), np.ones((1, self.threads), bool), 1)
        self.touched = touched

    def of_each(self, x: Any) -> Any:
        """What each thread has, also if all have the same."""
        x = np.asarray(x)
        return x if x.shape == (self.threads,) else np.broadcast_to(x, (self.threads,))

    def _of_lane(self, x: Any, source: Any) -> Any:  # lanes wait for each other, but memory does not
        return self.of_each(x)[self.warp * WARP + source]

    def in_all_lanes(self, condition: Any) -> bool:
        return bool(np.all(condition))  # of all warps, which only a kernel could tell that depends on it

    def shuffle_xor(self, x: Any, mask: int) -> Any:
        return self._of_lane(x, self.lane ^ mask)

    def shuffle_up(self, x: Any, distance: int) -> Any:
        return self._of_lane(x, np.where(self.lane >= distance, self.lane - distance, self.lane))

    def shuffle_from(self, x: Any, lane: Any) -> Any:
        return self._of_lane(x, self.of_each(lane) % WARP)

    # memory

    def local_array(self, size: int, number: Any) -> Any:
        return lambda: Local(size, number, self.threads)

    def shared_array(self, size: int, number: Any) -> Any:
        return lambda: Shared(size, number, self)

    def _elements(self, address: Any, index: Any, storage: Any, valid: Any, align: int) -> tuple[Any, Any]:
        """The array that the threads with ``valid`` read or write, as words of bits, and which of them they do.

        ``index`` and ``valid`` have a row for each element of a vector, of which the first is to be aligned.
        """
        word, size = np.dtype(f"u{storage.itemsize}"), storage.itemsize
        if not valid.any():
            return np.zeros(1, word), np.zeros(valid.shape, np.int64)
        self.touched = True
        at = address + index * size
        assert not (at % size)[valid].any(), "access to global memory is not aligned"
        assert align == size or not (at[0] % align)[valid[0]].any(), "access to global memory is not aligned"
        known = at[valid][0]
        found = next(((start, data) for start, data, _ in self.memory if start <= known < start + len(data)), None)
        assert found, f"no array at address {known}"
        start, data = found
        offset = at - start
        outside = valid & ((offset < 0) | (offset + size > len(data)))
        assert not outside.any(), (
            f"outside the array: byte {offset[outside][:4]} of {len(data)}, "
            f"threads {np.broadcast_to(self.thread, valid.shape)[outside][:4]}"
        )
        first = -start % size  # elements lie at multiples of their size, wherever the array begins
        words = data[first : len(data) - (len(data) - first) % size].view(word)
        return words, np.where(valid, (offset - first) // size, 0)

    def _places(self, index: Any, count: int, valid: Any, together: bool) -> tuple[Any, Any]:
        """Of vectors of ``count`` elements: which element each is, and whether it is valid; (count, threads)."""
        valid, k = self.of_each(valid), np.arange(count)[:, None]
        assert not together or ((valid <= 0) | (valid >= count)).all(), "a part of a vector"
        return self.of_each(index) + k, valid > k

    def _parts(self, index: Any, valid: Any, reals: int) -> tuple[Any, Any]:
        """The same of the reals in the numbers."""
        if reals == 1:
            return index, valid
        return np.stack([2 * index, 2 * index + 1], 1).reshape(-1, self.threads), np.repeat(valid, 2, 0)

    def reader(self, storage: Any, number: Any, count: int, together: bool, constant: bool) -> Any:
        real, reals = _primitives.real_of(number), _primitives.planes(number)
        align = min(count * reals * storage.itemsize, 16) if together else storage.itemsize

        def read(into: Local, address: int, index: Any, valid: Any) -> None:
            index, valid = self._parts(*self._places(index, count, valid, together), reals)
            words, place = self._elements(address, index, storage, valid, align)
            values = np.where(valid, words[place].view(storage).astype(real), real.type(0))
            into.put(0, self.complex_number(values[::2], values[1::2]) if reals == 2 else values)

        return read

    def writer(self, storage: Any, number: Any, count: int, together: bool) -> Any:
        reals = _primitives.planes(number)
        align = min(count * reals * storage.itemsize, 16) if together else storage.itemsize

        def write(address: int, index: Any, values: Local, valid: Any) -> None:
            index, valid = self._parts(*self._places(index, count, valid, together), reals)
            words, place = self._elements(address, index, storage, valid, align)
            parts = values.several(0, count)
            if reals == 2:
                parts = np.stack([parts.real, parts.imag], 1).reshape(valid.shape)
            with np.errstate(over="ignore"):
                words[place[valid]] = parts.astype(storage)[valid].view(words.dtype)

        return write

    def stored_array(self, size: int, storage: Any) -> Any:
        def make() -> Local:
            made = Local(size, storage, self.threads)
            made.values[:] = 0
            return made

        return make

    def stored_reader(self, storage: Any, count: int, together: bool, keep: bool, constant: bool) -> Any:
        align = min(count * storage.itemsize, 16) if together else storage.itemsize

        def read(into: Local, start: int, address: int, index: Any, valid: Any) -> None:
            index, valid = self._places(index, count, valid, together)
            words, place = self._elements(address, index, storage, valid, align)
            otherwise = into.several(start, count) if together and keep else storage.type(0)
            into.put(start, np.where(valid, words[place].view(storage), otherwise))

        return read

    def shifted_reader(self, storage: Any, count: int) -> Any:
        """Halves by twos in words, as on a GPU."""

        def read(into: Local, start: int, address: int, index: Any, valid: Any, before: Any) -> None:
            valid, before, index = self.of_each(valid), self.of_each(before), self.of_each(index)
            whole, odd = (valid > count + 1) & (before > 0), (address // 2 + index) % 2
            k = np.arange(count // 2 * 2 + 2)[:, None]
            there = whole | ((k >= odd) & (k - odd < np.minimum(count, valid)))
            words, place = self._elements(address, index - odd + k, storage, there, 2)
            halves = np.where(there, words[place], np.uint16(0)).astype(np.uint32)
            into.put(start, (halves[::2] | halves[1::2] << 16).view(np.int32))

        return read

    def shifted_widener(self, storage: Any, number: Any, count: int) -> Any:
        real = _primitives.real_of(number)

        def widen(into: Local, held: Local, start: int, address: int, index: Any) -> None:
            shift = (address + 2 * np.asarray(index)) % 4 * 8
            for i in range(count // 2):
                low, high = (np.asarray(held[start + k]).view(np.uint32).astype(np.uint64) for k in (i, i + 1))
                word = (low | high << 32) >> np.asarray(shift, np.uint64)
                for k in (0, 1):
                    bits = (word >> np.uint64(16 * k)).astype(np.uint16)
                    into[2 * i + k] = bits.view(storage).astype(real)

        return widen

    def shifted_writer(self, storage: Any, number: Any) -> Any:
        return self.writer(storage, number, 4, False)

    def widener(self, storage: Any, number: Any, count: int) -> Any:
        real, reals = _primitives.real_of(number), _primitives.planes(number)

        def widen(into: Local, stored: Local, start: int) -> None:
            values = stored.several(start, count * reals).astype(real)
            into.put(0, self.complex_number(values[::2], values[1::2]) if reals == 2 else values)

        return widen

    def integer_reader(self, bits: int) -> Any:
        storage = np.dtype(f"i{bits // 8}")

        def read(address: int, index: Any, valid: Any) -> Any:
            shape = np.broadcast(np.asarray(index), np.asarray(valid)).shape
            index, valid = self._places(index, 1, valid, False)
            words, place = self._elements(address, index, storage, valid, storage.itemsize)
            value = np.where(valid, words[place].view(storage).astype(np.int64), 0)[0]
            return value if shape else int(value[0])

        return read

    def write_integer(self, address: int, index: Any, value: Any, valid: Any) -> None:
        storage = np.dtype(np.int64)
        index, valid = self._places(index, 1, valid, False)
        words, place = self._elements(address, index, storage, valid, storage.itemsize)
        words[place[valid]] = self.of_each(np.asarray(value, storage))[valid[0]].view(words.dtype)

    def shared_reader(self, number: Any, count: int) -> Any:
        def read(into: Local, shared: Shared, index: Any) -> None:
            into.put(0, shared.get(index, count))

        return read

    def shared_writer(self, number: Any, count: int) -> Any:
        def write(shared: Shared, index: Any, values: Local) -> None:
            shared.set(index, values.several(0, count), count)

        return write

    def product_adder(self, real: Any, count: int) -> Any:
        def add(total: Local, i: int, x: Local, y: Local) -> None:
            wide = np.float64 if real == np.float32 else np.longdouble
            products, sums = x.several(0, count).astype(wide) * y.several(0, count), total[i]
            for product in products:
                sums = (product + sums).astype(real)
            total[i] = sums

        return add

    def matrix_multiplier(self, storage: Any) -> Any:
        group, own = self.thread % WARP // 4, self.thread % 4  # own: a lane's four columns of k

        def multiply(total: Local, i: int, w: Local, low: int, high: int, x: Local, at: int) -> None:
            warps, width = self.threads // WARP, np.float32
            warp = self.thread // WARP
            left, right = np.zeros((warps, 16, 16), width), np.zeros((warps, 16, 8), width)
            for k in range(4):
                left[warp, group, 4 * own + k] = w[low + k].astype(width)
                left[warp, group + 8, 4 * own + k] = w[high + k].astype(width)
                right[warp, 4 * own + k, group] = x[at + k].astype(width)
            product = left @ right
            for n in range(4):
                total[i + n] = total[i + n] + product[warp, group + 8 * (n // 2), 2 * own + n % 2]

        return multiply

    def shared_get(self, shared: Shared, index: Any) -> Any:
        return shared.get(index)[0]

    def shared_set(self, shared: Shared, index: Any, value: Any) -> None:
        assert np.result_type(value) == shared.values.dtype, "a conversion on the way to shared memory"
        shared.set(index, self.of_each(value)[None])

    # functions

    def run(self, function: Callable[..., None], blocks: int, values: list[int]) -> None:
        """A kernel, one block after the other."""
        body = self.rebound(function, {})
        with np.errstate(all="ignore"):
            for self.block in range(blocks):
                self.touched = False
                self.synchronize()
                body(*values)

    def rebound(self, value: Any, known: dict[int, Any]) -> Any:
        """A primitive's twin, a device function or kernel that uses twins, or the value itself."""
        if id(value) in known:
            return known[id(value)]
        if isinstance(value, type(_primitives.select)) and value in _primitives.PRIMITIVES:
            name, parameters = _primitives.PRIMITIVES[value]
            twin = getattr(self, name)
            known[id(value)] = twin(*parameters) if parameters else twin
            return known[id(value)]
        body = getattr(value, "py_func", value)
        if not isinstance(body, types.FunctionType) or not body.__module__.startswith(("sscan.cuda.", self.home)):
            return value
        names = {name: body.__globals__[name] for name in body.__code__.co_names if name in body.__globals__}
        replaced = {name: self.rebound(x, known) for name, x in names.items()}
        cells = tuple(types.CellType(self.rebound(cell.cell_contents, known)) for cell in body.__closure__ or ())
        function = types.FunctionType(
            body.__code__, {**body.__globals__, **replaced}, body.__name__, body.__defaults__, cells
        )
        known[id(value)] = function
        return function


def _bytes(array: Any) -> Any:
    """The memory of an array, from its first element to its last, as bytes (strides are never negative here)."""
    extent = array.itemsize + sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True))
    interface = {"data": (array.ctypes.data, False), "shape": (extent,), "typestr": "|u1", "version": 3}
    holder = types.SimpleNamespace(__array_interface__=interface, owner=array)
    return np.asarray(holder)


_built = functools.cache(_launch.build)  # which takes as long as a small launch


def launch(kernel: Any, blocks: int, *arguments: Any) -> None:
    """``_launch.launch`` on NumPy arrays."""
    if blocks:
        function, shape = _built(kernel)
        _run(function, shape.threads, blocks, *arguments)


def run(function: Callable[..., None], threads: int, blocks: int, *arguments: Any) -> None:
    """Run a kernel of your own, written with the primitives of ``sscan.cuda._primitives``, in the emulator.

    Parameters
    ----------
    function : callable
        What one thread does. Its arguments are addresses and integers.
    threads, blocks : int
        Threads of a block, a multiple of 32, and blocks of the launch.
    *arguments : array, int or None
        As of a launch on a GPU: of a NumPy array the kernel gets the address, and reads and writes it there; of None
        it gets the address 0.

    Raises
    ------
    AssertionError
        If the kernel does what the emulator is there to find.
    TypeError, ValueError
        If it could not be launched so.

    Notes
    -----
    Primitives are found by their names in the module of the kernel, so import them by name.
    """
    if threads not in range(32, 1025, 32):
        raise ValueError(f"run: threads must be a multiple of 32 up to 1024, got {threads}")
    check_integer("run", "blocks", blocks)
    for place, argument in enumerate(arguments):
        _check(place, argument)
    _run(function, threads, blocks, *arguments)


def _check(place: int, argument: Any) -> None:
    """Raise unless a kernel, which gets an address or a number, can do nothing unseen with it."""
    if isinstance(argument, np.ndarray):
        if not (argument.flags.c_contiguous and argument.flags.writeable):
            raise ValueError(f"run: argument {place} must be contiguous and writeable: a kernel has its address only")
    elif not (argument is None or isinstance(argument, Integral)):
        raise TypeError(f"run: argument {place} must be an array, an integer or None, got {type(argument).__name__}")


def _run(function: Callable[..., None], threads: int, blocks: int, *arguments: Any) -> None:
    """Run a kernel, one block after the other."""
    arrays = [a for a in arguments if isinstance(a, np.ndarray)]
    values = [0 if a is None else a.ctypes.data if isinstance(a, np.ndarray) else int(a) for a in arguments]
    Emulator(threads, arrays, function.__module__).run(function, blocks, values)


def empty(shape: Any, dtype: Any) -> Any:
    """Memory that shows whether it was written before it is read."""
    array = np.empty(shape, dtype)
    array.view(np.uint8).fill(0xFF)  # NaN
    return array


def take(layout: Any) -> Any:
    """``_workspace.take`` with an array for each workspace, to find what is accessed beyond its end."""
    return None, [empty(size, np.uint8) if size else None for size in layout.sizes]


def multiply(X: Any, weight: Any, out: Any, added: bool) -> None:
    """``_products.multiply`` in NumPy."""
    out[...] = X.astype(np.float32) @ weight.astype(np.float32).T + (out if added else np.float32(0))


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Inside the block, sscan's ops take NumPy arrays for those of a GPU, and the emulator runs their kernels."""
    keep = _launch.launch, _launch.empty, _launch.processors, _launch.address, _workspace.take, _products.multiply
    packages = dict(_backends._PACKAGES)
    _launch.launch, _launch.empty, _launch.processors = launch, empty, lambda: 4
    _launch.address = lambda array: array.ctypes.data
    _workspace.take, _products.multiply = take, multiply
    _backends._PACKAGES["cpu"] = "sscan.cuda"
    _backends._package.cache_clear()
    try:
        yield
    finally:
        _launch.launch, _launch.empty, _launch.processors, _launch.address, _workspace.take = keep[:-1]
        _products.multiply = keep[-1]
        _backends._PACKAGES.update(packages)
        _backends._package.cache_clear()


class _Emulated:
    """The public functions of :mod:`sscan` by name, each on NumPy arrays, with its CUDA kernels run by the emulator."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(sscan, name)

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with patched():
                return function(*arguments, **options)

        return call


emulated = _Emulated()
