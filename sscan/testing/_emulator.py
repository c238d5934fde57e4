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
        assert np.result_type(value) == self.values.dtype or np.ndim(value) == 0, "a conversion that costs registers"
        self.values[i] = value


class Shared:
    """An array of a block, which knows who used which element since the last barrier."""

    def __init__(self, size: int, number: Any, emulator: Emulator) -> None:
        self.values = np.full(size, np.nan, number)
        self.emulator = emulator
        self.writes, self.reads = _Accesses(size), _Accesses(size)

    def check(self, index: Any, count: int) -> Any:
        index = np.broadcast_to(np.asarray(index), (self.emulator.threads,))
        together = min(count, 16 // self.values.itemsize)
        assert (index % together == 0).all(), "vector access to shared memory is not aligned"
        assert (index >= 0).all(), f"shared index {index.min()}"
        assert (index + count <= len(self.values)).all(), f"shared index {index.max()} of {len(self.values)}"
        return index

    def get(self, index: Any) -> Any:
        clash = self.writes.clash(self.emulator, index)
        assert not clash.any(), f"race: read of shared {index[clash][:4]} that another thread wrote"
        self.reads.note(self.emulator, index)
        return self.values[index]

    def set(self, index: Any, value: Any) -> None:
        value = np.broadcast_to(value, index.shape)
        for accesses, did in ((self.reads, "read"), (self.writes, "wrote")):
            clash = accesses.clash(self.emulator, index)
            assert not clash.any(), f"race: write of shared {index[clash][:4]} that another thread {did}"
        self.values[index] = value
        self.writes.note(self.emulator, index)
        same = (self.values[index] == value) | (value != value)
        assert same.all(), "race: two threads write different numbers to one element of shared memory"


class _Accesses:
    """Who last accessed each element, when, and whether others did so in the same interval between barriers."""

    def __init__(self, size: int) -> None:
        self.thread, self.warp_epoch, self.block_epoch = (np.full(size, -1) for _ in range(3))
        self.other_lanes, self.other_warps = np.zeros(size, bool), np.zeros(size, bool)

    def _fresh(self, e: Emulator, index: Any) -> tuple[Any, Any]:
        same_block_epoch = self.block_epoch[index] == e.block_epoch
        return same_block_epoch & (self.warp_epoch[index] == e.warp_epoch), same_block_epoch

    def clash(self, e: Emulator, index: Any) -> Any:
        """Whether an access of each thread now and the ones before have no barrier in between."""
        fresh_for_warp, fresh_for_block = self._fresh(e, index)
        other, other_warp = self.thread[index] != e.thread, self.thread[index] // WARP != e.thread // WARP
        return (fresh_for_warp & (other | self.other_lanes[index])) | (
            fresh_for_block & (other_warp | self.other_warps[index])
        )

    def note(self, e: Emulator, index: Any) -> None:
        fresh_for_warp, fresh_for_block = self._fresh(e, index)
        thread = self.thread[index]
        self.other_lanes[index] &= fresh_for_warp
        self.other_warps[index] &= fresh_for_block
        np.logical_or.at(self.other_lanes, index, fresh_for_warp & (thread != e.thread))
        np.logical_or.at(self.other_warps, index, fresh_for_block & (thread // WARP != e.thread // WARP))
        self.thread[index], self.warp_epoch[index], self.block_epoch[index] = e.thread, e.warp_epoch, e.block_epoch
        thread = self.thread[index]  # of several threads in this very instruction, one
        np.logical_or.at(self.other_lanes, index, thread != e.thread)
        np.logical_or.at(self.other_warps, index, thread // WARP != e.thread // WARP)


class Emulator:
    """The twins of the primitives, for one block at a time."""

    def __init__(self, threads: int, arrays: list[Any], home: str = "sscan.cuda.") -> None:
        self.threads, self.thread = threads, np.arange(threads, dtype=np.int64)
        self.home = home  # the module of the kernel, whose functions are device code as ours are
        self.block = 0
        self.warp_epoch = self.block_epoch = 0
        self.memory = [(a.ctypes.data, _bytes(a), a) for a in arrays if a.size]

    # numbers

    def exp2_approx(self, x: Any) -> Any:
        # An H200's results are that much too small on average from 1/2 to 1 (``_math`` makes up for it).
        lost = np.where(x < -1 / 256, 2e-8, 7e-9)
        return (np.exp2(x.astype(np.float64)) * (1 - lost)).astype(np.float32)

    def reciprocal_approx(self, x: Any) -> Any:
        return np.float32(1) / x

    def select(self, condition: Any, x: Any, y: Any) -> Any:
        assert np.result_type(x) == np.result_type(y), "select of two types"
        return np.where(condition, x, y)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        real = np.result_type(x, y, z)
        wide = np.float64 if real == np.float32 else np.longdouble
        return (np.asarray(x, wide) * np.asarray(y, wide) + np.asarray(z, wide)).astype(real)

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
        re, im = np.broadcast_arrays(re, im)
        z = np.empty(re.shape, np.result_type(re, np.complex64))
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
        self.block_epoch += 1
        self.warp_epoch += 1

    def synchronize_warp(self) -> None:
        self.warp_epoch += 1

    def converge(self) -> None:
        """Nothing, as on newer GPUs: memory is not waited for."""

    def _lane(self, x: Any, source: Any) -> Any:  # lanes wait for each other, but memory does not
        return np.broadcast_to(x, (self.threads,))[self.thread // WARP * WARP + source]

    def shuffle_xor(self, x: Any, mask: int) -> Any:
        return self._lane(x, (self.thread % WARP) ^ mask)

    def shuffle_up(self, x: Any, distance: int) -> Any:
        lane = self.thread % WARP
        return self._lane(x, np.where(lane >= distance, lane - distance, lane))

    def shuffle_from(self, x: Any, lane: Any) -> Any:
        return self._lane(x, np.broadcast_to(lane, (self.threads,)) % WARP)

    # memory

    def local_array(self, size: int, number: Any) -> Any:
        return lambda: Local(size, number, self.threads)

    def shared_array(self, size: int, number: Any) -> Any:
        return lambda: Shared(size, number, self)

    def _elements(self, address: Any, index: Any, storage: Any, valid: Any, align: int) -> tuple[Any, Any]:
        """The array that the threads with ``valid`` read or write, as bytes, and where in it they do."""
        if not valid.any():
            return np.zeros(16, np.uint8), np.zeros(self.threads, np.int64)
        at = np.broadcast_to(address + np.asarray(index, np.int64) * storage.itemsize, (self.threads,))
        assert (at[valid] % align == 0).all(), "access to global memory is not aligned"
        known = at[valid][0]
        found = [(start, data) for start, data, _ in self.memory if start <= known < start + len(data)]
        assert found, f"no array at address {known}"
        start, data = found[0]
        offset = at - start
        inside = (offset >= 0) & (offset + storage.itemsize <= len(data))
        assert (inside | ~valid).all(), (
            f"outside the array: byte {offset[valid & ~inside][:4]} of {len(data)}, "
            f"threads {self.thread[valid & ~inside][:4]}"
        )
        return data, np.where(valid & inside, offset, 0)

    def _gather(self, data: Any, offset: Any, storage: Any) -> Any:
        raw = data[offset[:, None] + np.arange(storage.itemsize)]
        return np.ascontiguousarray(raw).view(storage)[:, 0]

    def reader(self, storage: Any, number: Any, count: int, together: bool, constant: bool) -> Any:
        real, reals = _primitives.real_of(number), _primitives.planes(number)
        align = min(count * reals * storage.itemsize, 16) if together else storage.itemsize

        def read(into: Local, address: int, index: Any, valid: Any) -> None:
            valid = np.broadcast_to(np.asarray(valid), (self.threads,))
            assert not together or ((valid <= 0) | (valid >= count)).all(), "a part of a vector"
            for k in range(count):
                parts = []
                for i in range(reals):
                    where = np.asarray(index) * reals + k * reals + i
                    asked = align if together and k == i == 0 else storage.itemsize
                    data, offset = self._elements(address, where, storage, valid > k, asked)
                    value = self._gather(data, offset, storage).astype(real)
                    parts.append(np.where(valid > k, value, real.type(0)))
                into[k] = self.complex_number(*parts) if reals == 2 else parts[0]

        return read

    def writer(self, storage: Any, number: Any, count: int, together: bool) -> Any:
        reals = _primitives.planes(number)
        align = min(count * reals * storage.itemsize, 16) if together else storage.itemsize

        def write(address: int, index: Any, values: Local, valid: Any) -> None:
            valid = np.broadcast_to(np.asarray(valid), (self.threads,))
            assert not together or ((valid <= 0) | (valid >= count)).all(), "a part of a vector"
            for k in range(count):
                parts = (values[k].real, values[k].imag)[:reals]
                for i, part in enumerate(parts):
                    where = np.asarray(index) * reals + k * reals + i
                    asked = align if together and k == i == 0 else storage.itemsize
                    data, offset = self._elements(address, where, storage, valid > k, asked)
                    with np.errstate(over="ignore"):
                        raw = np.ascontiguousarray(part.astype(storage)).view(np.uint8).reshape(self.threads, -1)
                    active = np.flatnonzero(valid > k)
                    data[offset[active][:, None] + np.arange(storage.itemsize)] = raw[active]

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
            valid = np.broadcast_to(np.asarray(valid), (self.threads,))
            assert not together or ((valid <= 0) | (valid >= count)).all(), "a part of a vector"
            for k in range(count):
                asked = align if together and k == 0 else storage.itemsize
                data, offset = self._elements(address, np.asarray(index) + k, storage, valid > k, asked)
                otherwise = into[start + k] if together and keep else storage.type(0)
                into[start + k] = np.where(valid > k, self._gather(data, offset, storage), otherwise)

        return read

    def shifted_reader(self, storage: Any, count: int) -> Any:
        """Halves by twos in words, as on a GPU; what shares the word of the last one, and may be another's, is 0."""

        def read(into: Local, start: int, address: int, index: Any, valid: Any, before: Any) -> None:
            valid, before, index = (np.broadcast_to(np.asarray(x), (self.threads,)) for x in (valid, before, index))
            whole, odd = (valid > count) & (before > 0), (address // 2 + index) % 2
            for word in range(count // 2 + 1):
                halves = []
                for k in (2 * word, 2 * word + 1):
                    one = (k >= odd) & (k - odd < count)
                    there = (whole | one) & (k - odd < valid)
                    data, offset = self._elements(address, index - odd + k, storage, there, 2)
                    known = np.where(there, self._gather(data, offset, np.dtype(np.uint16)), 0)
                    halves.append(known.astype(np.uint32))
                into[start + word] = (halves[0] | halves[1] << 16).view(np.int32)

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
            for k in range(count):
                parts = [stored[start + k * reals + i].astype(real) for i in range(reals)]
                into[k] = self.complex_number(*parts) if reals == 2 else parts[0]

        return widen

    def integer_reader(self, bits: int) -> Any:
        storage = np.dtype(f"i{bits // 8}")

        def read(address: int, index: Any, valid: Any) -> Any:
            shape = np.broadcast(np.asarray(index), np.asarray(valid)).shape
            mask = np.broadcast_to(np.asarray(valid) > 0, (self.threads,))
            data, offset = self._elements(address, index, storage, mask, storage.itemsize)
            value = np.where(mask, self._gather(data, offset, storage).astype(np.int64), 0)
            return value if shape else int(value[0])

        return read

    def write_integer(self, address: int, index: Any, value: Any, valid: Any) -> None:
        storage = np.dtype(np.int64)
        mask = np.broadcast_to(np.asarray(valid) > 0, (self.threads,))
        data, offset = self._elements(address, index, storage, mask, storage.itemsize)
        raw = np.broadcast_to(np.asarray(value, storage), (self.threads,)).copy().view(np.uint8).reshape(-1, 8)
        data[offset[mask][:, None] + np.arange(8)] = raw[mask]

    def shared_reader(self, number: Any, count: int) -> Any:
        def read(into: Local, shared: Shared, index: Any) -> None:
            index = shared.check(index, count)
            for k in range(count):
                into[k] = shared.get(index + k)

        return read

    def shared_writer(self, number: Any, count: int) -> Any:
        def write(shared: Shared, index: Any, values: Local) -> None:
            index = shared.check(index, count)
            for k in range(count):
                shared.set(index + k, values[k])

        return write

    def product_adder(self, real: Any, count: int) -> Any:
        def add(total: Local, i: int, x: Local, y: Local) -> None:
            for k in range(count):
                total[i] = self.fma(x[k], y[k], total[i])

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
        return shared.get(shared.check(index, 1))

    def shared_set(self, shared: Shared, index: Any, value: Any) -> None:
        assert np.result_type(value) == shared.values.dtype, "a conversion on the way to shared memory"
        shared.set(shared.check(index, 1), value)

    # functions

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


def launch(kernel: Any, blocks: int, *arguments: Any) -> None:
    """``_launch.launch`` on NumPy arrays."""
    if blocks:
        function, shape = _launch.build(kernel)
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
    emulator = Emulator(threads, arrays, function.__module__)
    body = emulator.rebound(function, {})
    with np.errstate(all="ignore"):
        for emulator.block in range(blocks):
            emulator.synchronize()
            body(*values)


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
