"""What the kernels need of numba.cuda. The one file that imports it, so that its successor is a change of one file."""

import contextlib
import gc
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
    from numba.cuda.core import analysis, inline_closurecall, ir
    from numba.cuda.core.compiler_lock import global_compiler_lock
    from numba.cuda.extending import intrinsic
    from numba.cuda.np import arrayobj  # noqa: F401  # names row_stack; the first kernel would import it
    from numba.cuda.typing.context import BaseContext

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
    with _hastened():
        ptx, _ = cuda.compile(
            function, signature, device=False, fastmath=False, cc=ARCHITECTURE, output="ptx", abi="numba",
            launch_bounds=(threads, blocks_per_processor),
        )  # fmt: skip
    text = ptx if isinstance(ptx, str) else ptx.decode()
    return text.replace(re.search(r"\.entry\s+([\w$]+)", text)[1], name)


# --- what Numba would take most of its time for -----------------------------------------------------------------------

_SHARED = (ir.Var, ir.Loc, ir.Scope, ir.Const, ir.Global, ir.FreeVar)  # inlining puts others in their place
_COPIED = (ir.Block, ir.Stmt, ir.AbstractRHS)


@contextlib.contextmanager
def _hastened():
    """Numba makes the same PTX in 40 % of the time: kernels are large, and have many calls of device functions.

    Python looks for no cycles meanwhile: that would be an eighth of the time, and leaves 30 MB more of 500.
    """
    copy = python_types.SimpleNamespace(deepcopy=_copied)
    with (
        global_compiler_lock,
        _lent(inline_closurecall.InlineWorker, "inline_function", _inlining_once()),
        _lent(inline_closurecall, "copy", copy),
        _lent(analysis, "compute_live_map", _live_map),
        _lent(BaseContext, "resolve_function_type", _resolving_once(BaseContext.resolve_function_type)),
    ):
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


@contextlib.contextmanager
def _lent(owner, name, ours):
    """An attribute of Numba's that is ours meanwhile."""
    theirs = getattr(owner, name)
    setattr(owner, name, ours)
    try:
        yield
    finally:
        setattr(owner, name, theirs)


def _inlining_once():
    """Numba's way to inline a function, which goes through it once, and not again at each of its calls."""
    known = {}

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

    return inline_function


def _resolving_once(resolve):
    """Numba's way to find the signature of a call, which asks once for the same types of arguments."""
    known = {}

    def resolved(self, function, args, kws):
        if not all(isinstance(x, types.Type) for x in args):
            return resolve(self, function, args, kws)
        key = function, tuple(args), tuple(kws.items()) if kws else ()
        if known.get(key) is None:
            known[key] = resolve(self, function, args, kws)
        return known[key]

    return resolved


def _copied(part):
    """A copy of a part of Numba's representation of a function: of what inlining changes, and not of its variables."""
    if isinstance(part, (list, tuple)):
        return type(part)(map(_copied, part))
    if isinstance(part, dict):
        return {key: _copied(value) for key, value in part.items()}
    if isinstance(part, _SHARED) or not isinstance(part, _COPIED):
        return part
    made = object.__new__(type(part))
    vars(made).update({key: _copied(value) for key, value in vars(part).items()})
    return made


def _live_map(graph, blocks, used, defined):
    """The names of variables that are alive at the entry of each block, from those that it uses and defines.

    As Numba finds them, with bits in place of sets. Alive is what a later block uses, back to where it is defined, and
    what no block before has seen is not.
    """
    names = list({name for of_block in (*used.values(), *defined.values()) for name in of_block})
    bits = {name: 1 << place for place, name in enumerate(names)}
    uses, defines = ({block: sum(bits[name] for name in of[block]) for block in blocks} for of in (used, defined))
    order = [*graph.topo_order(), *graph.dead_nodes()]
    seen, alive = {block: uses[block] | defines[block] for block in blocks}, dict(uses)
    forward = [(block, after) for block in order for after, _ in graph.successors(block)]
    _settled(seen, forward, lambda block, after: seen[block])
    backward = [(block, before) for block in reversed(order) for before, _ in graph.predecessors(block)]
    _settled(alive, backward, lambda block, before: alive[block] & seen[before] & ~defines[before])
    return {block: {names[place] for place in _places(alive[block])} for block in blocks}


def _places(bits):
    """Where a number has ones."""
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


def _settled(values, edges, carried):
    """Let bits go along edges of a graph until none is new."""
    moving = True
    while moving:
        moving = False
        for start, end in edges:
            known = values[end] | carried(start, end)
            moving |= known != values[end]
            values[end] = known
