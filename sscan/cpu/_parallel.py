"""How kernels are compiled, cached on disk and spread over threads.

Numba's own threading layers are not used: ``workqueue`` aborts the process when two Python threads call it at once,
``omp`` cannot be used after a fork, ``tbb`` does not exist on every platform. Kernels are compiled serial, release
the GIL, and take task numbers from a counter in memory; a few Python threads run the same kernel on the same counter.
What a task computes does not depend on who runs it, so results are bit-identical for every number of threads.
"""

import contextlib
import functools
import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.caching import Cache, CompileResultCacheImpl, _CacheLocator
from numba.extending import intrinsic

_PACKAGE = Path(__file__).parent


# --- compilation -----------------------------------------------------------------------------------------------------


@functools.cache
def cache_folder() -> Path:
    """Where compiled kernels are kept: $NUMBA_CACHE_DIR or the user's cache folder, by digest of all kernel sources.

    Numba's own rule looks at one file's time stamp and misses an edit in a file that the kernel's file imports.
    """
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.glob("*.py")):
        digest.update(path.read_bytes())
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(numba.config.CACHE_DIR) if numba.config.CACHE_DIR else Path(home) / "sscan"
    return root / f"cpu-{digest.hexdigest()[:16]}"


class _Locator(_CacheLocator):
    def __init__(self, function: Callable[..., Any]) -> None:
        self._name = function.__module__

    def get_cache_path(self) -> str:
        return str(cache_folder())

    def get_source_stamp(self) -> str:
        return cache_folder().name

    def get_disambiguator(self) -> str:
        return self._name

    @classmethod
    def from_function(cls, function: Callable[..., Any], source: str) -> "_Locator":
        return cls(function)


class _CacheImpl(CompileResultCacheImpl):
    _locator_classes = (_Locator,)


class _Cache(Cache):
    """A cache that is never in the way: what cannot be read is compiled, what cannot be written is not kept."""

    _impl_class = _CacheImpl

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # no such folder, not permitted, or a file that was cut short: unpickling raises anything
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError:
            return
        except Exception:  # a damaged index, which is begun anew
            with contextlib.suppress(OSError):
                self.flush()
                super().save_overload(sig, data)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile with Numba on first call: GIL released, IEEE arithmetic, kept on disk."""
    dispatcher = numba.njit(nogil=True, error_model="numpy")(function)
    dispatcher._cache = _Cache(function)
    return dispatcher


# --- threads ---------------------------------------------------------------------------------------------------------


@intrinsic
def take(typingctx, counter):
    """The counter's value, and add one to it, in one atomic step."""

    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), codegen


_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def threads() -> int:
    """How many threads a kernel may use: NUMBA_NUM_THREADS, by default the cores this process may run on."""
    return int(numba.config.NUMBA_NUM_THREADS)


def _helpers() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(1, threads() - 1), thread_name_prefix="sscan")
        return _pool


def _after_fork() -> None:
    """A child has none of its parent's threads; it starts its own when it needs them."""
    global _pool, _lock
    _lock, _pool = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run(function: Any, tasks: int, *arguments: Any) -> None:
    """Call ``function(counter, tasks, *arguments)`` on up to ``threads()`` threads at once, this one included."""
    counter = np.zeros(1, np.int64)
    helpers: list[Future[None]] = []
    try:
        for _ in range(min(threads(), tasks) - 1):
            helpers.append(_helpers().submit(function, counter, tasks, *arguments))
        function(counter, tasks, *arguments)
    finally:
        counter[0] = tasks  # matters after an error only
        _finish(helpers)
    for helper in helpers:
        if not helper.cancelled():
            helper.result()


def _finish(helpers: "list[Future[None]]") -> None:
    """Wait until no helper runs. They know arrays by address, so not even Ctrl-C may go on before them."""
    interrupted = None
    for helper in [helper for helper in helpers if not helper.cancel()]:
        while not helper.done():
            try:
                helper.exception()
            except KeyboardInterrupt as error:
                interrupted = error
    if interrupted is not None:
        raise interrupted
