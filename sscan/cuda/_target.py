"""What the kernels need of numba.cuda. The one file that imports it, so that its successor is a change of one file."""

import contextlib
import re
import types as python_types
import warnings

import numpy as np

from sscan.cuda._unroll import written_out


@contextlib.contextmanager
def _numpy_as_numba_cuda_knows_it():
    """NumPy 2.5 has no row_stack any more, which numba-cuda 0.30 names, and warns of its times without a unit."""
    lent = not hasattr(np, "row_stack")
    if lent:
        np.row_stack = np.vstack  # noqa: NPY201
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if lent:
            del np.row_stack  # noqa: NPY201


with _numpy_as_numba_cuda_knows_it():
    from numba import cuda
    from numba.cuda import cgutils, types
    from numba.cuda.core import inline_closurecall, ir
    from numba.cuda.core.compiler_lock import global_compiler_lock
    from numba.cuda.extending import intrinsic
    from numba.cuda.np import arrayobj  # noqa: F401  # names row_stack; the first kernel would import it

__all__ = ["cgutils", "compile_ptx", "device", "intrinsic", "types"]

# PTX for the oldest architecture that has bfloat16; it is assembled for whatever GPU there is.
ARCHITECTURE = (8, 0)


def device(function):
    """A device function: inlined, since Numba asks the driver about anything that it would have to call."""
    return cuda.jit(device=True, inline="always")(written_out(function))


def compile_ptx(function, name, threads, blocks_per_processor):
    """PTX of a kernel whose arguments are all int64, with the entry point ``name``.

    IEEE arithmetic, but products and sums are contracted; registers are limited so that as many blocks of ``threads``
    threads fit on a multiprocessor.
    """
    function = written_out(function)
    signature = types.void(*(types.int64,) * function.__code__.co_argcount)
    with _inlined_once():
        ptx, _ = cuda.compile(
            function, signature, device=False, fastmath=False, cc=ARCHITECTURE, output="ptx", abi="numba",
            launch_bounds=(threads, blocks_per_processor),
        )  # fmt: skip
    text = ptx if isinstance(ptx, str) else ptx.decode()
    return text.replace(re.search(r"\.entry\s+([\w$]+)", text)[1], name)


# --- inlining, which takes most of the time that compiling takes -----------------------------------------------------

_SHARED = (ir.Var, ir.Loc, ir.Scope, ir.Const, ir.Global, ir.FreeVar)  # inlining puts others in their place
_COPIED = (ir.Block, ir.Stmt, ir.AbstractRHS)


@contextlib.contextmanager
def _inlined_once():
    """Numba goes through a device function once, and not again at each of its calls, and copies only what it changes.

    What it would copy for each block is all variables of the function, twice. The PTX is the same, in half the time.
    """
    worker, known = inline_closurecall.InlineWorker, {}

    def inline_function(self, caller, block, place, function, arg_typs=None):
        if function not in known:
            known[function] = self.run_untyped_passes(function)
        callee = known[function]
        variables = next(iter(callee.blocks.values())).scope.localvars
        before = dict(variables._con)
        try:
            return self.inline_ir(caller, block, place, callee, function.__code__.co_freevars, arg_typs)
        finally:
            variables._con = before  # without the names that this call got

    theirs = worker.inline_function, inline_closurecall.copy
    with global_compiler_lock:
        worker.inline_function = inline_function
        inline_closurecall.copy = python_types.SimpleNamespace(deepcopy=_copied)
        try:
            yield
        finally:
            worker.inline_function, inline_closurecall.copy = theirs


def _copied(part):
    """A copy of a part of Numba's representation of a function, for inlining."""
    if isinstance(part, (list, tuple)):
        return type(part)(map(_copied, part))
    if isinstance(part, dict):
        return {key: _copied(value) for key, value in part.items()}
    if isinstance(part, _SHARED) or not isinstance(part, _COPIED):
        return part
    made = object.__new__(type(part))
    vars(made).update({key: _copied(value) for key, value in vars(part).items()})
    return made
