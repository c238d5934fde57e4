"""How an op gets into torch.library: its kernel, its shapes, its gradients and what autocast makes of its inputs."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd import forward_ad

from sscan._arrays import has_tangent
from sscan.torch._composed import pulled_back
from sscan.torch._fakes import check_together

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_library = torch.library.Library("sscan", "DEF")
_TENSOR, _PARAMETER = torch.Tensor, torch.nn.Parameter


class Op:
    """An op of torch.library.

    A call that the dispatcher would bring to ``kernel`` without telling anybody else goes there at once.
    """

    def __init__(self, name: str, kernel: Callable[..., Any]) -> None:
        self.name, self.kernel = name, kernel
        self.registered = getattr(torch.ops.sscan, name).default
        arguments = self.registered._schema.arguments
        self.arguments = [argument.name for argument in arguments]
        self.tensors = [i for i, argument in enumerate(arguments) if "Tensor" in str(argument.type)]  # or None
        self.optional = {i for i in self.tensors if "Optional" in str(arguments[i].type)}
        self.record: Callable[..., Any] | None = None  # called as (keys, places, inputs) if inputs require grad
        self.lower: Callable[..., Any] | None = None  # what autocast makes of the inputs, on a kind of device

    def __call__(self, *inputs: Any) -> Any:
        places = None if torch.compiler.is_compiling() or not is_plain_call() else self._places(inputs)
        if places is None:
            self._check(inputs)
            return self.registered(*inputs)
        # of any device: the question that takes less time comes first
        if (
            self.lower is not None
            and torch._C._is_any_autocast_enabled()
            and torch.is_autocast_enabled(device := inputs[0].device.type)
        ):
            with torch.autocast(device, enabled=False):
                return self(*self.lower(device, *inputs))
        if places and self.record is not None:
            return self.record(None, places, inputs)
        return self.kernel(*inputs)

    def recorded(self, inputs: Any) -> list[int]:
        """The places of the inputs that require grad, while gradients are recorded."""
        if not torch.is_grad_enabled():
            return []
        return [i for i in self.tensors if inputs[i] is not None and inputs[i].requires_grad]

    def _places(self, inputs: Any) -> list[int] | None:
        """As ``recorded``; None if a tensor is not a plain one with data, so that somebody else is to be told of it."""
        recording, places = torch.is_grad_enabled(), []
        for i in self.tensors:
            x = inputs[i]
            kind = type(x)
            if kind is _TENSOR or kind is _PARAMETER:
                if not (x.is_cuda or x.is_cpu):
                    return None
                if recording and x.requires_grad:
                    places.append(i)
            elif x is not None or i not in self.optional:
                return None
        return places

    def _check(self, inputs: Any) -> None:
        named = {i: (self.arguments[i], inputs[i]) for i in self.tensors}
        check_tensors(
            self.name,
            dict(named[i] for i in named if i not in self.optional),
            dict(named[i] for i in named if i in self.optional),
        )


def is_plain_call() -> bool:
    """Whether no mode, transformation, tracer or profiler is active, which would see a call of the dispatcher."""
    dispatch = torch._C
    return not (
        dispatch._len_torch_dispatch_stack() or dispatch._len_torch_function_stack()
        or dispatch._are_functorch_transforms_active() or dispatch._get_tracing_state() is not None
        or dispatch._autograd._profiler_enabled() or forward_ad._current_level >= 0
    )  # fmt: skip


def check_tensors(op: str, required: dict[str, Any], optional: dict[str, Any]) -> None:
    """TypeError for what is no tensor, with its name and type: PyTorch would print its values."""
    for name, x in {**required, **optional}.items():
        if isinstance(x, torch.Tensor):
            if x.is_nested:
                raise TypeError(f"{op}: {name} must be a dense tensor on cpu or cuda, got a nested one")
        elif x is not None or name in required:
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Op:
    """The op ``sscan::<schema>``; ``fake`` checks tensors without data and makes results of the right shapes.

    What the kernel returns None for is an empty tensor to torch.library, which knows no optional results. The kernel
    serves tensors of every device: the core says what is wrong with one that it does not know. Only where a tensor is
    on meta, the dispatcher asks the fake one, which therefore must not be given memory to fill.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    op = Op(name, kernel)

    def complete(*arguments: Any) -> Any:
        made = kernel(*arguments)
        return tuple(arguments[0].new_empty(0) if x is None else x for x in made) if type(made) is tuple else made

    _library.impl(name, complete, "CompositeExplicitAutograd")

    def checked_fake(*arguments: Any) -> Any:
        check_together(name, **{op.arguments[i]: arguments[i] for i in op.tensors})
        return fake(*arguments)

    torch.library.register_fake(f"sscan::{name}", checked_fake, lib=_library)
    return op


class Saved(NamedTuple):
    """Tensors and options that a backward starts from, and the outputs that have no gradients."""

    tensors: Sequence[Any]
    options: Sequence[Any]
    constants: Sequence[Any] = ()


class _Call:
    """A call of which gradients will be asked: what is not known to autograd, which looks at every argument."""

    __slots__ = ("inputs", "keys", "outputs", "places", "variable")

    def __init__(self, keys: Any, inputs: Sequence[Any], places: list[int]) -> None:
        self.keys, self.inputs, self.places = keys, inputs, places
        self.outputs: list[Any] = []
        self.variable: list[int] = []  # which of them have gradients


def differentiate(op: Op, save: Callable[[Any, Any], Saved], backward: Callable[..., Iterable[Any]]) -> None:
    """Give an op gradients: ``save(inputs, outputs)`` says what to keep for them.

    ``backward(gradients of the outputs, tensors, options)`` gives a gradient, or None, for each of the first inputs;
    the others have none.
    """
    kind = str(op.registered._schema.returns[0].type)
    listed, single = "List" in kind, len(op.registered._schema.returns) == 1
    below = torch._C._after_autograd_keyset

    class Recorded(torch.autograd.Function):  # type: ignore[misc]
        """Of a call, which holds all inputs and is given all outputs, and of those inputs that require grad."""

        @staticmethod
        def forward(ctx: Any, call: _Call, *_: Any) -> Any:
            outputs = op.kernel(*call.inputs) if call.keys is None else run(call.keys, call.inputs)
            tensors, ctx.options, constants = save(call.inputs, outputs)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors)
            call.outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
            fixed = {id(x) for x in (None, *constants)}
            call.variable = [i for i, x in enumerate(call.outputs) if id(x) not in fixed]
            ctx.places, ctx.variable, ctx.outputs = call.places, call.variable, len(call.outputs)
            return tuple(call.outputs[i] for i in call.variable)

        @staticmethod
        def backward(ctx: Any, *given: Any) -> Any:
            gradients = [None] * ctx.outputs
            for i, gradient in zip(ctx.variable, given, strict=True):
                gradients[i] = gradient
            if all(gradient is None for gradient in given):
                return (None,) * (1 + len(ctx.places))
            made = tuple(backward(gradients, ctx.saved_tensors, ctx.options))
            return None, *[made[i] if i < len(made) else None for i in ctx.places]

    # Without the part in Python, which is about torch.func's transformations and takes as long as the rest.
    apply = super(torch.autograd.Function, Recorded).apply

    def record(keys: Any, places: list[int], inputs: Any) -> Any:
        call = _Call(keys, inputs, places)
        results = apply(call, *[inputs[i] for i in places])
        for i, result in zip(call.variable, results, strict=True):
            call.outputs[i] = result
        return call.outputs if listed else call.outputs[0] if single else tuple(call.outputs)

    def run(keys: Any, inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.registered.redispatch(keys, *inputs)

    # What torch.library.register_autograd would register, but for 100 us that it spends on defaults that no op has.
    def kernel(keys: Any, *inputs: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, inputs)
        if places := op.recorded(inputs):
            if torch._C._are_functorch_transforms_active():
                raise NotImplementedError(f"{op.name}: torch.func has no gradients of sscan; use torch.autograd.grad")
            return record(keys & below, places, inputs)
        return run(keys & below, inputs)

    op.record = record
    _library.impl(op.name, kernel, "Autograd", with_keyset=True)


def refuse_derivatives(op: Op) -> None:
    """Have an op that updates a state in place raise a TypeError for tensors that require grad: it would be lost."""

    def record(keys: Any, places: list[int], inputs: Any) -> Any:
        name = op.arguments[places[0]]
        raise TypeError(f"{op.name}: {name} requires grad, which an update in place would lose; use torch.no_grad()")

    def kernel(keys: Any, *inputs: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, inputs)
        if places := op.recorded(inputs):
            record(keys, places, inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op.registered.redispatch(keys & torch._C._after_autograd_keyset, *inputs)

    op.record = record
    _library.impl(op.name, kernel, "Autograd", with_keyset=True)


def _refuse_tangents(op: Op, inputs: Sequence[Any]) -> None:
    """NotImplementedError for inputs with a tangent, which would be zero behind the op."""
    for i in op.tensors:
        if inputs[i] is not None and has_tangent(inputs[i]):
            raise NotImplementedError(
                f"{op.name}: {op.arguments[i]} has a tangent, but the ops of sscan have no forward-mode derivatives; "
                "use reverse mode (torch.autograd.grad)"
            )


def differentiate_again(backward: Op, composed: Callable[..., Any], constants: int = 0) -> None:
    """Give a backward op gradients: those of a composition, which takes what the op takes but the ``constants``.

    These are its last tensors.
    """
    tensors = len(backward.tensors)

    def save(inputs: Any, outputs: Any) -> Saved:
        return Saved(inputs[: tensors - constants], inputs[tensors:])

    def second(gradients: Any, inputs: Any, options: Any) -> Any:
        return pulled_back(composed, inputs, options, gradients)

    differentiate(backward, save, second)


def for_each(gradients: Iterable[Any], inputs: Iterable[Any]) -> list[Any]:
    """The gradients of the inputs that there are, and None for each that is None."""
    made = iter(gradients)
    return [None if x is None else next(made) for x in inputs]


def or_zeros(gradient: Any, like: Any) -> Any:
    """The gradient of a result like this one, which may not matter for the loss."""
    return torch.zeros_like(like) if gradient is None else gradient


def cast_under_autocast(op: Op, *names: str, axes: int) -> None:
    """Under autocast, have these arguments in autocast's dtype, as matrix products have theirs.

    Those with fewer axes are parameters, and left alone; so is, as everywhere in autocast, what is not a floating-point
    tensor on its device, and float64.
    """
    named = [name in names for name in op.arguments]

    def lower(device: str, *arguments: Any) -> list[Any]:
        dtype = torch.get_autocast_dtype(device)
        return [
            _lowered(x, device, dtype) if lowered and x is not None and x.ndim >= axes else x
            for x, lowered in zip(arguments, named, strict=True)
        ]

    op.lower = lower
    for device in ("cpu", "cuda"):

        def kernel(*arguments: Any, device: str = device) -> Any:
            with torch.autocast(device, enabled=False):
                return op.registered(*lower(device, *arguments))

        _library.impl(op.name, kernel, f"Autocast{device.upper()}")


def autocast_dtype(x: Any) -> Any:
    """Autocast's dtype for the device of a tensor, or None; of meta, PyTorch does not want to be asked."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def without_autocast(x: Any) -> Any:
    """A context without autocast on the device of a tensor."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _lowered(x: Any, device: str, dtype: Any) -> Any:
    if x.device.type != device or not x.is_floating_point() or x.dtype is torch.float64:
        return x
    return x.to(dtype)
