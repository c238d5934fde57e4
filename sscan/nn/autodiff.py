"""Reverse-mode differentiation over NumPy and CuPy arrays: a tape of primitives.

A *primitive* is a plain function on arrays. Called with tensors, it computes on their arrays and, when one of them
requires a gradient, leaves a node on the tape. :func:`defvjp` and :func:`defvjp_all` say, beside the primitive, how a
gradient travels through it. :meth:`Tensor.backward` walks the nodes from the newest to the oldest.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import types
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Generic, ParamSpec, TypeAlias

import numpy as np

from sscan._arrays import array_module
from sscan.nn.elementwise import add

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Array: TypeAlias = Any  # numpy.ndarray, or cupy.ndarray, which is not imported for the user
Operand: TypeAlias = "Tensor | Array | float"

P = ParamSpec("P")
VJP: TypeAlias = "Callable[[Node, Any], Sequence[Array | None]]"

_recording: ContextVar[bool] = ContextVar("recording", default=True)
_numbers = itertools.count()


def to_numpy(array: Array) -> Array:
    """The array in host memory, as NumPy sees it."""
    return array.get() if hasattr(array, "get") else np.asarray(array)


def move(array: Array, module: Any) -> Array:
    """The array as one of `module` (numpy or cupy), on its current device; copied only if it is not there yet."""
    return to_numpy(array) if module is np else module.asarray(array)


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Record nothing inside the block: results require no gradient and keep nothing alive."""
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


def needs_gradient(*values: Any) -> bool:
    """Whether a primitive called with these values here would be recorded."""
    return _recording.get() and any(isinstance(value, Tensor) and value.requires_grad for value in values)


class Tensor:
    """An array together with its place on the tape.

    Parameters
    ----------
    data : array or nested sequence of numbers
        Held, not copied. Anything that is not an array becomes a NumPy array.
    requires_grad : bool
        Whether `backward` shall leave the gradient with respect to this tensor in `grad`.

    Attributes
    ----------
    data : array
    grad : array or None
        Same shape and dtype as `data`; every `backward` adds to it. Only leaves (not computed from others) get one.

    Raises
    ------
    TypeError
        If `requires_grad` is set and the dtype is not a floating or complex one.
    """

    __slots__ = ("__weakref__", "_node", "_output", "data", "grad", "requires_grad")
    __array_ufunc__ = None  # `array + tensor` comes to Tensor.__radd__ instead of broadcasting over an object array

    def __init__(self, data: Array, requires_grad: bool = False) -> None:
        if isinstance(data, Tensor):
            raise TypeError("Tensor: data is a Tensor already; use it as it is, or take its .data")
        scalar_or_list = isinstance(data, np.generic) or not hasattr(data, "dtype")
        self.data: Array = np.asarray(data) if scalar_or_list else data
        if self.data.dtype.kind in "OSUMm":
            raise TypeError(f"Tensor: data must be numbers, got {self.data.dtype}")
        if requires_grad and self.data.dtype.kind in "biu":
            raise TypeError(f"Tensor: a gradient needs a floating dtype, got {self.data.dtype}")
        self.requires_grad = requires_grad
        self.grad: Array | None = None
        self._node: Node | None = None  # what computed it; None for a leaf
        self._output = 0  # which of the node's outputs it is

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(self.data.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the array."""
        return self.data.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(self.data.size)

    def item(self) -> float:
        """The value of a tensor with one element, as a Python number."""
        return self.data.item()  # type: ignore[no-any-return]

    def detach(self) -> Tensor:
        """A leaf on the same array: no gradient flows through it."""
        return Tensor(self.data)

    def __repr__(self) -> str:
        return f"Tensor({self.data!r}, requires_grad={self.requires_grad})"

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("Tensor: one without axes has no length")
        return self.shape[0]

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError(f"Tensor: one of shape {self.shape} is neither true nor false; use .data.any() or .all()")
        return bool(self.item())

    # By itself Python would compare identities and say False. In sets and dictionaries it still goes by them.
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        raise TypeError("Tensor: == and != are not defined; compare the arrays in .data, or identities with `is`")

    def __array__(self, *arguments: Any, **options: Any) -> Array:
        raise TypeError("Tensor: NumPy would lose the gradient; its array is .data")

    def backward(self, gradient: Array | None = None, *, retain_graph: bool = False) -> None:
        """Add the gradient of this tensor to the `grad` of every leaf that it was computed from.

        Parameters
        ----------
        gradient : array, optional
            Gradient with respect to this tensor, of its shape. May be left out for a tensor with one element (1).
        retain_graph : bool
            Keep what the nodes saved, so that backward can run again. Otherwise each node lets go of its arrays as soon
            as the gradient has passed it.

        Raises
        ------
        RuntimeError
            If the tensor requires no gradient, or its graph has been released by an earlier backward.
        ValueError
            If `gradient` is missing for a tensor with several elements, or has another shape.
        """
        if not self.requires_grad:
            raise RuntimeError("backward: this tensor was computed from nothing that requires a gradient")
        if gradient is None:
            if self.size != 1:
                raise ValueError(f"backward: a tensor of shape {self.shape} needs a gradient; only a scalar does not")
            gradient = array_module(self.data).ones_like(self.data)
        if isinstance(gradient, Tensor) or not hasattr(gradient, "shape"):
            raise TypeError(f"backward: gradient must be an array, got {type(gradient).__name__}")
        if tuple(gradient.shape) != self.shape:
            raise ValueError(f"backward: gradient must have shape {self.shape}, got {tuple(gradient.shape)}")
        _propagate(self, gradient, retain_graph)

    # Attached at the end of sscan.nn.ops, which is written in terms of this class.
    __add__: ClassVar[Callable[..., Tensor]]
    __radd__: ClassVar[Callable[..., Tensor]]
    __sub__: ClassVar[Callable[..., Tensor]]
    __rsub__: ClassVar[Callable[..., Tensor]]
    __mul__: ClassVar[Callable[..., Tensor]]
    __rmul__: ClassVar[Callable[..., Tensor]]
    __truediv__: ClassVar[Callable[..., Tensor]]
    __rtruediv__: ClassVar[Callable[..., Tensor]]
    __matmul__: ClassVar[Callable[..., Tensor]]
    __rmatmul__: ClassVar[Callable[..., Tensor]]
    __neg__: ClassVar[Callable[..., Tensor]]
    __pow__: ClassVar[Callable[..., Tensor]]
    __getitem__: ClassVar[Callable[..., Tensor]]
    reshape: ClassVar[Callable[..., Tensor]]
    swapaxes: ClassVar[Callable[..., Tensor]]
    astype: ClassVar[Callable[..., Tensor]]
    sum: ClassVar[Callable[..., Tensor]]
    mean: ClassVar[Callable[..., Tensor]]


class Node:
    """One call of a primitive: what came in, what went out, where the gradients go."""

    __slots__ = ("arguments", "number", "options", "parents", "primitive", "released", "result")

    def __init__(
        self,
        primitive: Primitive[Any],
        arguments: list[Array],
        options: dict[str, Any],
        parents: list[Tensor | None],
        result: Any,
    ) -> None:
        self.primitive = primitive
        self.arguments = arguments
        self.released = False
        self.options = options
        self.parents = parents
        self.result = result
        self.number = next(_numbers)  # grows along every edge, so it orders the nodes topologically

    def input_gradients(self, gradients: list[Array | None]) -> Sequence[Array | None]:
        """Gradients for the arguments, from those of the outputs."""
        if self.released:
            raise RuntimeError(
                "backward: the graph was released by an earlier backward; pass retain_graph=True to the first one"
            )
        gradient = tuple(gradients) if isinstance(self.result, tuple) else gradients[0]
        if self.primitive.vjp is None:
            raise NotImplementedError(f"{self.primitive.name}: no gradient is defined for this primitive")
        return self.primitive.vjp(self, gradient)

    def release(self) -> None:
        """Let go of everything that was saved."""
        self.arguments, self.options, self.parents, self.result, self.released = [], {}, [], None, True


class Primitive(Generic[P]):
    """A function on arrays that accepts tensors and records itself; made by :func:`primitive`."""

    def __init__(self, function: Callable[P, Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.name: str = function.__name__.lstrip("_")
        self.vjp: VJP | None = None

    def __call__(self, *arguments: P.args, **options: P.kwargs) -> Tensor:
        """Apply a primitive that has one output."""
        return self.apply(*arguments, **options)  # type: ignore[no-any-return]

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """As a method, like any function in a class."""
        return self if instance is None else types.MethodType(self, instance)

    def apply(self, *arguments: Any, **options: Any) -> Any:
        """Apply the primitive: one tensor, or a tuple with a tensor for every array that the function returned."""
        for name, value in options.items():
            if isinstance(value, Tensor):
                raise TypeError(f"{self.name}: {name} is an option, not differentiable; it must not be a Tensor")
        arrays = [value.data if isinstance(value, Tensor) else value for value in arguments]
        result = self.function(*arrays, **options)
        if not needs_gradient(*arguments):
            return _wrap(result, None)
        parents = [value if isinstance(value, Tensor) and value.requires_grad else None for value in arguments]
        return _wrap(result, Node(self, arrays, options, parents, result))


def _wrap(result: Any, node: Node | None) -> Any:
    """Tensors for one array, or for every array of a tuple; anything else in the tuple passes as it is."""
    if isinstance(result, tuple):
        return tuple(_output(value, node, i) if hasattr(value, "dtype") else value for i, value in enumerate(result))
    return _output(result, node, 0)


def _output(array: Array, node: Node | None, index: int) -> Tensor:
    tensor = Tensor(array)
    if node is not None and tensor.data.dtype.kind not in "biu":
        tensor.requires_grad, tensor._node, tensor._output = True, node, index
    return tensor


def primitive(function: Callable[P, Any]) -> Primitive[P]:
    """Make a differentiable operation of a function on arrays.

    Positional arguments may be tensors, keyword arguments may not. The function returns one array or a tuple; it must
    not write to its arguments. Give it gradients with :func:`defvjp` or :func:`defvjp_all`.
    """
    return Primitive(function)


def defvjp(operation: Primitive[Any], *vjps: Callable[..., Array]) -> None:
    """Define the gradient of `operation` by `vjps`, one function for each of its first positional arguments.

    Each is called as ``vjp(gradient, result, *arguments, **options)``, only if that argument needs a gradient, and
    returns an array of the argument's shape. `gradient` has the shape of `result`; where the operation returns a tuple,
    it is a tuple too, with None for outputs that nobody used.
    """

    def every(node: Node, gradient: Any) -> Sequence[Array | None]:
        gradients: list[Array | None] = [None] * len(node.parents)
        for i, parent in enumerate(node.parents):
            if parent is None:
                continue
            if i >= len(vjps):
                raise NotImplementedError(f"{operation.name}: no gradient is defined for argument {i}")
            gradients[i] = vjps[i](gradient, node.result, *node.arguments, **node.options)
        return gradients

    operation.vjp = every


def defvjp_all(operation: Primitive[Any], vjp: Callable[..., Sequence[Array | None]]) -> None:
    """Define the gradient of `operation` by one function, `vjp`, returning those of all arguments."""
    operation.vjp = lambda node, gradient: vjp(gradient, node.result, *node.arguments, **node.options)


def recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors), of which only the tensors and the result are kept: the backward calls it again.

    It must depend on nothing else that requires a gradient, and do the same whenever it is called.
    """
    return _recomputed(*tensors, function=function)


@primitive
def _recomputed(*arrays: Array, function: Callable[..., Tensor]) -> Array:
    with no_grad():
        return function(*map(Tensor, arrays)).data


def _recomputed_gradients(
    gradient: Array, result: Array, *arrays: Array, function: Callable[..., Tensor]
) -> list[Array | None]:
    token = _recording.set(True)
    try:
        leaves = [Tensor(array, requires_grad=True) for array in arrays]
        function(*leaves).backward(gradient)
    finally:
        _recording.reset(token)
    return [leaf.grad for leaf in leaves]


defvjp_all(_recomputed, _recomputed_gradients)


def _propagate(tensor: Tensor, gradient: Array, retain_graph: bool) -> None:
    """Visit the nodes behind `tensor` from the newest to the oldest, each once, when all its gradients are in."""
    waiting: dict[Node, list[Array | None]] = {}
    queue: list[tuple[int, Node]] = []

    def receive(target: Tensor, value: Array) -> None:
        if target._node is None:
            _accumulate(target, value)
            return
        node = target._node
        if node not in waiting:
            waiting[node] = [None] * (len(node.result) if isinstance(node.result, tuple) else 1 + target._output)
            heapq.heappush(queue, (-node.number, node))
        slots = waiting[node]
        present = slots[target._output]
        slots[target._output] = value if present is None else add(present, value)

    receive(tensor, gradient)
    while queue:
        node = heapq.heappop(queue)[1]
        gradients = node.input_gradients(waiting.pop(node))
        for parent, value in zip(node.parents, gradients, strict=False):
            if parent is not None and value is not None:
                _check_gradient(node.primitive, parent, value)
                receive(parent, value)
        if not retain_graph:
            node.release()


def _check_gradient(operation: Primitive[Any], parent: Tensor, value: Array) -> None:
    if tuple(value.shape) != parent.shape or value.dtype != parent.dtype:
        raise RuntimeError(
            f"{operation.name}: its gradient has shape {tuple(value.shape)} and dtype {value.dtype}, "
            f"the argument {parent.shape} and {parent.dtype}"
        )


def _accumulate(leaf: Tensor, value: Array) -> None:
    # A copy: the gradient may be a view, or the same array as another leaf's, and optimisers write to it.
    leaf.grad = value.copy() if leaf.grad is None else add(leaf.grad, value)
