"""How kernels are compiled, cached on disk and spread over threads.

Numba's own threading layers are not used: ``workqueue`` aborts the process when two Python threads call it at once,
``omp`` cannot be used after a fork, ``tbb`` does not exist on every platform. Kernels are compiled serial, release
the GIL, and take task numbers from a counter in memory; a few Python threads run the same kernel on the same counter.
What a task computes does not depend on who runs it, so results are bit-identical for every number of threads.
"""

import functools
import hashlib
import os
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher
from numba.core.serialize import dumps
from numba.extending import intrinsic, register_jitable

from sscan import _cache
from sscan.cpu._vector import _X86

# --- compilation -----------------------------------------------------------------------------------------------------


@functools.cache
def cache_folder() -> Path | None:
    """Where compiled kernels are kept, by digest of all kernel sources.

    Numba's own rule looks at one file only, and misses an edit in a file that the kernel's file imports.
    """
    return _cache.folder("cpu", "*.py", versions=numba.__version__)


class _Cache(NullCache):
    """A kernel's cache: what cannot be read is compiled, what cannot be written is not kept."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def _name(self, sig: Any, codegen: Any) -> str:
        """The file of one specialisation, for this Python and the processor that is compiled for."""
        function = self._function
        constants = [cell.cell_contents for cell in function.__closure__ or ()]
        python = sys.implementation.cache_tag, getattr(sys, "abiflags", "")
        key = repr((function.__module__, function.__qualname__, constants, sig, codegen.magic_tuple(), python))
        return f"{function.__module__}.{function.__name__}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.kernel"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        data = _cache.read(cache_folder(), self._name(sig, target_context.codegen()))
        return None if data is None else CompileResult._rebuild(target_context, *pickle.loads(data))

    def save_overload(self, sig: Any, data: Any) -> None:
        _cache.write(cache_folder(), self._name(sig, data.codegen), dumps(data._reduce()))


class _Dispatcher(CPUDispatcher):
    """Compiles also where NUMBA_DISABLE_JIT is set, for somebody's own code: vectors mean nothing to Python."""

    def __init__(self, function: Callable[..., Any]) -> None:
        options = {"nopython": True, "nogil": True, "error_model": "numpy", "boundscheck": None}
        super().__init__(function, targetoptions=options)
        self._cache = _Cache(function)

    def compile(self, sig: Any) -> Any:
        with global_compiler_lock:
            disabled, numba.config.DISABLE_JIT = numba.config.DISABLE_JIT, 0
            try:
                return super().compile(sig)
            finally:
                numba.config.DISABLE_JIT = disabled


def kernel(function: Callable[..., Any]) -> Any:
    """Compile with Numba on first call: GIL released, IEEE arithmetic, kept on disk."""
    return _Dispatcher(function)


# --- atomic steps ----------------------------------------------------------------------------------------------------


@intrinsic
def take(typingctx, counter):
    """The counter's value, and add one to it, in one atomic step."""

    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), codegen


@intrinsic
def _add_at(typingctx, address, number):
    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@kernel
def add(address, number):
    """The integer at an address, and add a number to it, in one atomic step."""
    return _add_at(address, number)


@intrinsic
def _read_at(typingctx, address):
    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), codegen


ALL_TAKEN = CLOSED = 1 << 62
_sleep = types.ExternalFunction("usleep", types.int32(types.uint32))


@kernel
def close(counter, inside):
    """Leave no task to take, let no more helpers in, and return when the last one is out; two addresses.

    Signal handlers run between steps of Python only, so they cannot end this wait, whatever they raise.
    """
    _add_at(counter, ALL_TAKEN)
    _add_at(inside, -CLOSED)
    turns, pause = 0, 20
    while _add_at(inside, 0) != -CLOSED:
        turns += 1
        if turns > 500:  # some microseconds
            _sleep(pause)
            pause = min(pause + pause // 4, 1000)


# --- phases ----------------------------------------------------------------------------------------------------------
# A kernel of several phases, each of which reads what the one before has written, is still one call. Nobody is waited
# for who has not begun: a phase is over when its tasks are done, and who comes late finds it so and goes on. Who has
# kept others waiting for long, because it lost its core, does no more of the call: it may lose it again.

# A phase has a row of two cache lines, since everybody takes tasks while some look for the last one: in the first how
# many are taken; in the second how many are done, and whether one of them is awaited.
_ROW, _DONE, _AWAITED = 16, 8, 9
_PATIENCE = 2000 if _X86 else 20000  # turns, some ten microseconds; the first sleep is about as long again


def phases(count: int, threads: int) -> Any:
    """What the threads of one call share: a row for each phase, and one for each thread, whether it shall stop."""
    return np.zeros((count + threads, _ROW), np.int64)


@intrinsic
def _pause(typingctx):
    """Leave the core's other thread the core for a moment; x86 only, else nothing."""

    def codegen(context, builder, sig, args):
        if _X86:
            function = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@register_jitable
def next_task(progress, phase, tasks, thread):
    """A task of the phase that nobody has taken; -1 when all are done, and what they wrote can be read."""
    if progress[len(progress) - 1 - thread, 0]:
        return -1
    address = progress.ctypes.data + 8 * _ROW * phase
    task = _add_at(address, 1)
    if task < tasks:
        return task
    turns = 0
    while _read_at(address + 8 * _DONE) < tasks:
        turns += 1
        if turns < _PATIENCE:
            _pause()
        else:
            if turns > _PATIENCE:
                _add_at(address + 8 * _AWAITED, 1)
            _sleep(20)
    return -1


@register_jitable
def finish(progress, phase, thread):
    """Say that a task is done. A thread that has taken one must come here: the others wait for it."""
    address = progress.ctypes.data + 8 * _ROW * phase
    _add_at(address + 8 * _DONE, 1)
    if _read_at(address + 8 * _AWAITED):
        progress[len(progress) - 1 - thread, 0] = 1


# --- threads ---------------------------------------------------------------------------------------------------------


def threads() -> int:
    """How many threads a kernel may use: NUMBA_NUM_THREADS, by default the cores this process may run on."""
    return int(numba.config.NUMBA_NUM_THREADS)


class _Call:
    """A kernel's call, on which helpers work together with the thread that makes it."""

    def __init__(self, function: Any, tasks: int, arguments: tuple[Any, ...], caller: Any) -> None:
        self.function, self.tasks, self.arguments = function, tasks, arguments
        self.caller = caller  # the frame, which holds the arrays
        self.state = np.zeros(2, np.int64)  # the next task; the helpers inside, less CLOSED when none may enter
        self.addresses = self.state.ctypes.data, self.state.ctypes.data + self.state.itemsize
        self.error: BaseException | None = None

    def help(self) -> None:
        """Work on it, unless its own thread has done so already."""
        inside = self.addresses[1]
        if add(inside, 1) >= 0:
            try:
                self.function(self.state, self.tasks, *self.arguments)
            except BaseException as error:
                self.error = error
        add(inside, -1)


_lock = threading.Lock()
_calls: "SimpleQueue[_Call]" = SimpleQueue()
_helpers = 0  # threads that take calls from there


def _help(calls: "SimpleQueue[_Call]") -> None:
    while True:
        calls.get().help()


def _start_helpers() -> int:
    """How many helpers there are, after starting all of them, or as many as can be.

    They are daemon threads: they help whoever still works when the main thread is done, and do not keep the process.
    """
    global _helpers
    with _lock:
        if not _helpers:  # compiles what calls with helpers need, before there is one
            call = _Call(None, 0, (), None)
            add(call.addresses[1], 0)
            close(*call.addresses)
        while _helpers < threads() - 1:
            try:
                threading.Thread(target=_help, args=(_calls,), name="sscan", daemon=True).start()
            except RuntimeError:  # no more threads; Python starts none when it is about to end
                break
            _helpers += 1
        return _helpers


def _after_fork() -> None:
    """A child has none of its parent's threads; it starts its own when it needs them."""
    global _calls, _helpers, _lock
    _calls, _helpers, _lock = SimpleQueue(), 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
    # A fork waits for a kernel that is being compiled: a child could do nothing with half of a compiler's state.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


def run(function: Any, tasks: int, *arguments: Any) -> None:
    """Call ``function(counter, tasks, *arguments)`` on up to ``threads()`` threads at once, this one included.

    Kernels know arrays by address, so nothing may leave this function, whatever is raised and how often, before the
    last helper has left the kernel. Python 3.10 looks for signals once more before ``finally``; should anything leave
    there, the call still holds the arrays.
    """
    wanted = min(threads(), tasks) - 1
    helpers = wanted if wanted <= _helpers else min(wanted, _start_helpers())
    if not helpers:
        function(np.zeros(1, np.int64), tasks, *arguments)
        return
    call = _Call(function, tasks, arguments, sys._getframe(1))
    try:
        for _ in range(helpers):
            _calls.put(call)
        function(call.state, tasks, *arguments)
    finally:
        close(*call.addresses)
    call.arguments, call.caller = (), None  # the queue may hold the call for a while
    if call.error is not None:
        raise call.error
