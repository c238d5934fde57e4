"""An op as a JAX function: checks while it is traced, one custom call when it runs, and its rule under vmap."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

import sscan
from sscan.jax import _handler, _shapes
from sscan.jax._handler import UPDATES, Call

_handler.register()

type_of: Any = getattr(jax, "typeof", lambda x: None)  # before JAX 0.6 types know nothing of meshes
CHECKPOINTED = ("selective_scan_forward", "selective_scan_backward")


def call(op: str, arrays: Mapping[str, Any], **options: Any) -> Any:
    """The results of ``sscan.<op>``, where arrays may be None; the state that it updates, if any, is the last one."""
    given = {name: x for name, x in arrays.items() if x is not None}
    checkpoints = _shapes.platform() if op in CHECKPOINTED else ""
    made = Call(op, tuple(given), tuple(options.items()), checkpoints)
    stand_ins = {name: None if x is None else _stand_in(op, name, x) for name, x in arrays.items()}
    results = getattr(sscan, op)(**stand_ins, **options)
    if op in UPDATES:
        results = (results, stand_ins[UPDATES[op]])
    leaves, structure = jax.tree.flatten(results)
    return jax.tree.unflatten(structure, _bind(made, leaves, given.values()))


def _stand_in(op: str, name: str, x: Any) -> _shapes.Shape:
    if not all(isinstance(size, int) for size in x.shape):
        op = op.removesuffix("_forward").removesuffix("_backward")
        raise ValueError(f"{op}: {name} must have a shape of numbers, got the symbolic one {x.shape}")
    return _shapes.Shape(x.shape, x.dtype)


def _bind(made: Call, results: list[Any], arrays: Any) -> Any:
    """The custom call, which is batched by ``_batched`` and has no derivative of its own."""

    def run(first: Any, *others: Any) -> Any:
        first = supported_p.bind(first, op=made.op)
        results_like = [_like(first, x.shape, x.dtype) for x in results]
        aliases = {made.names.index(UPDATES[made.op]): 1} if made.op in UPDATES else None
        foreign = jax.ffi.ffi_call(_handler.target(made.op), results_like, input_output_aliases=aliases)
        return tuple(foreign(first, *others, call=made.text))

    bound = custom_vmap(run)
    bound.def_vmap(partial(_batched, made, results))
    without_derivative = jax.custom_jvp(bound)
    without_derivative.defjvp(partial(_refuse_derivative, made.op))
    return without_derivative(*arrays)


def _refuse_derivative(op: str, *_: Any) -> Any:
    name = op.removesuffix("_forward").removesuffix("_backward")
    raise NotImplementedError(f"sscan.jax: {name} has no {'' if op in UPDATES else 'second '}derivative")


def _like(x: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A result that varies over the same axes of a mesh as x does."""
    options: dict[str, Any] = {}
    if _varying_axes(x):
        kind = type_of(x)
        name = "manual_axis_type" if hasattr(kind, "manual_axis_type") else "vma"  # up to JAX 0.9
        options = {name: getattr(kind, name), "sharding": NamedSharding(kind.sharding.mesh, PartitionSpec())}
    return jax.ShapeDtypeStruct(shape, dtype, **options)


def _varying_axes(x: Any) -> frozenset[str]:
    """The axes of a mesh over which x varies, as far as JAX keeps track (``check_vma`` of shard_map)."""
    kind = type_of(x)
    kind = getattr(kind, "manual_axis_type", kind)
    return getattr(kind, "varying", None) or getattr(kind, "vma", None) or frozenset()


def alike(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays as a call takes them: on all devices of a mesh alike, or varying over the same axes of it.

    Each has its own way back for gradients. Inside of shard_map, that of a parameter which all devices share is the sum
    over them.
    """
    arrays = {name: _gathered(x) for name, x in arrays.items()}
    axes = {name: _varying_axes(x) for name, x in arrays.items()}
    every = frozenset().union(*axes.values())
    return {name: _varying(x, tuple(sorted(every - axes[name]))) for name, x in arrays.items()}


def _gathered(x: Any) -> Any:
    """An array whose type says how it is sharded ("explicit" axes of a mesh), whole on every device."""
    sharding = getattr(type_of(x), "sharding", None)
    if sharding is None or not any(sharding.spec):
        return x
    return jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*[None] * x.ndim)))


def _varying(x: Any, axes: tuple[str, ...]) -> Any:
    if not axes:
        return x
    return jax.lax.pcast(x, axes, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(x, axes)


# --- platforms --------------------------------------------------------------------------------------------------------

supported_p = Primitive("sscan_supported")  # gives what it is given, where there are kernels
supported_p.def_impl(lambda x, *, op: x)
supported_p.def_abstract_eval(lambda x, *, op: x)


def _refuse_platform(context: Any, x: Any, *, op: str) -> Any:
    platforms = ", ".join(context.platforms or context.module_context.platforms)
    raise NotImplementedError(f"sscan.jax: {op} runs on the platforms cpu and cuda, got {platforms}")


mlir.register_lowering(supported_p, _refuse_platform)
for _platform in ("cpu", "cuda"):
    mlir.register_lowering(supported_p, lambda context, x, *, op: [x], platform=_platform)


# --- vmap -------------------------------------------------------------------------------------------------------------

INDICES = {"seq_idx", "cu_seqlens", "state_batch_indices"}
PARAMETERS = {"A", "B", "C", "weight", "kernel", "A_bar", "B_bar", "K"}  # (dim, ...), if they have two axes
RESULTS = {
    "selective_scan": ("y", "last_state"),
    "selective_state_update": ("y", "state"),
    "causal_conv1d": ("y", "final_state"),
    "causal_conv1d_update": ("y", "conv_state"),
    "discretize": ("A_bar", "B_bar"),
    "ssm_kernel": ("K",),
    "ssm_convolution": ("y",),
}


class Problems(NamedTuple):
    """``size`` problems for one op: arrays that are ``mapped`` have an axis for them in front."""

    op: str
    size: int
    arrays: dict[str, Any]
    mapped: set[str]
    options: dict[str, Any]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array in one of the problems."""
        shape: tuple[int, ...] = self.arrays[name].shape
        return shape[1:] if name in self.mapped else shape

    def of_each(self, name: str) -> Any:
        """An array with the axis of problems in front."""
        x = self.arrays[name]
        return x if name in self.mapped else jnp.broadcast_to(x, (self.size, *x.shape))

    @property
    def varying_axes(self) -> int:
        """Of a B or C that varies with time and has no groups."""
        return 2 if self.op == "selective_state_update" else 3

    def groups(self, name: str) -> int | None:
        """Groups of B or C; None if it is absent or constant."""
        ndim = len(self.shape(name)) if name in self.arrays else 0
        if ndim < self.varying_axes:
            return None
        return 1 if ndim == self.varying_axes else self.shape(name)[1]


def _batched(made: Call, results: list[Any], size: int, mapped: Any, *arrays: Any) -> Any:
    """The rule of vmap: the results, and which of them have an axis of problems."""
    if size == 0:
        return tuple(jnp.zeros((0, *x.shape), x.dtype) for x in results), (True,) * len(results)
    op, options = made.op, dict(made.options)
    given = dict(zip(made.names, arrays, strict=True))
    given.pop("checkpoints", None)  # their layout belongs to the kernels: the backward makes its own
    unused = []
    if op == "selective_scan_forward":
        op, options["return_last_state"] = "selective_scan", True
        unused = [jnp.zeros(x.shape, x.dtype) for x in results[2:]]
    names = {name for name, is_mapped in zip(made.names, mapped, strict=True) if is_mapped and name in given}
    shapes = [x.shape for x in results]
    found = jax.tree.leaves(_solve(Problems(op, size, given, names, options), shapes))
    return (*found, *unused), (*(True for _ in found), *(False for _ in unused))


def _solve(problems: Problems, shapes: list[tuple[int, ...]]) -> Any:
    """As one call, if there is one of which every problem is a part of its own, its sums over batch and time too."""
    if not problems.mapped:  # but for checkpoints
        found = call(problems.op, problems.arrays, **problems.options)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (problems.size, *x.shape)), found)
    groups = {problems.groups("B"), problems.groups("C")} - {None}
    if problems.op.startswith("linear_scan") or (problems.op == "rms_norm" and "weight" not in problems.mapped):
        return _as_rows(problems)
    if problems.op.startswith("rms_norm") or problems.mapped & INDICES or len(groups) > 1:
        return _one_by_one(problems)
    return _as_channels(problems, shapes)


def _as_rows(problems: Problems) -> Any:
    """One axis more, in front of those that the op treats alike."""
    arrays = {name: x if name == "weight" else problems.of_each(name) for name, x in problems.arrays.items()}
    return call(problems.op, arrays, **problems.options)


def _one_by_one(problems: Problems) -> Any:
    """In a loop."""
    mapped = {name: problems.arrays[name] for name in problems.mapped}
    return jax.lax.map(lambda one: call(problems.op, {**problems.arrays, **one}, **problems.options), mapped)


def _as_channels(problems: Problems, shapes: list[tuple[int, ...]]) -> Any:
    """The channels of all problems side by side; results have these shapes in each problem."""
    joined = {}
    for name, x in problems.arrays.items():
        if name not in INDICES:
            x = problems.of_each(name)
            if name in ("B", "C") and x.ndim - 1 == problems.varying_axes:
                x = x[:, :, None]  # a group for each problem
            axis = _channel_axis(name, x.ndim - 1)
            x = jnp.moveaxis(x, 0, axis)
            x = x.reshape(*x.shape[:axis], problems.size * x.shape[axis + 1], *x.shape[axis + 2 :])
        joined[name] = x
    found = call(problems.op, joined, **problems.options)
    names = [name[1:] for name in found._fields] if hasattr(found, "_fields") else RESULTS[problems.op]
    found = found if isinstance(found, tuple) else (found,)
    present = [(name, x) for name, x in zip(names, found, strict=False) if x is not None]
    return [_apart(name, x, problems.size, shape) for (name, x), shape in zip(present, shapes, strict=False)]


def _apart(name: str, x: Any, size: int, shape: tuple[int, ...]) -> Any:
    """A result of each problem, of this shape."""
    axis = _channel_axis(name, x.ndim)
    x = x.reshape(*x.shape[:axis], size, x.shape[axis] // size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0).reshape(size, *shape)


def _channel_axis(name: str, ndim: int) -> int:
    """The axis of channels, or of their groups."""
    return 0 if ndim == 1 or (ndim == 2 and name.removeprefix("d") in PARAMETERS) else 1
