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
_kernels: dict[str, Callable[..., Any]] = {}
_PLAIN = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)  # tensors of which nobody else wants to know


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The op ``sscan::<schema>``; ``fake`` checks tensors without data and makes results of the right shapes.

    The kernel serves tensors of every device: the core says what is wrong with one that it does not know. Only where a
    tensor is on meta, the dispatcher asks the fake one, which therefore must not be given memory to fill.
    """
    name = schema.partition("(")[0]
    _kernels[name] = kernel
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    op = getattr(torch.ops.sscan, name).default
    places = [(i, op._schema.arguments[i].name) for i in _tensors(op)]

    def checked_fake(*arguments: Any) -> Any:
        check_together(name, **{argument: arguments[i] for i, argument in places})
        return fake(*arguments)

    torch.library.register_fake(f"sscan::{name}", checked_fake, lib=_library)
    return op


class Saved(NamedTuple):
    """Tensors and options that a backward starts from, and the outputs that have no gradients."""

    tensors: Sequence[Any]
    options: Sequence[Any]
    constants: Sequence[Any] = ()


def differentiate(op: Any, save: Callable[[Any, Any], Saved], backward: Callable[..., Iterable[Any]]) -> None:
    """Give an op gradients: ``save(inputs, outputs)`` says what to keep for them.

    ``backward(gradients of the outputs, tensors, options)`` gives a gradient, or None, for each of the first inputs;
    the others have none.
    """
    number = len(op._schema.arguments)
    places = _tensors(op)
    listed = "List" in str(op._schema.returns[0].type)
    below, implementation = torch._C._after_autograd_keyset, _kernels[_name(op)]

    class Recorded(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, keys: Any, *inputs: Any) -> Any:
            outputs = run(keys, inputs)
            tensors, ctx.options, constants = save(inputs, outputs)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*constants)
            ctx.save_for_backward(*tensors)
            return tuple(outputs) if listed else outputs

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            if all(gradient is None for gradient in gradients):
                return (None,) * (1 + number)
            made = tuple(backward(gradients, ctx.saved_tensors, ctx.options))
            return None, *made, *(None,) * (number - len(made))

    def run(keys: Any, inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if keys.highestPriorityTypeId() in _PLAIN:  # where the dispatcher would come to, but for its time
                return implementation(*inputs)
            return op.redispatch(keys, *inputs)

    # What torch.library.register_autograd would register, but for 100 us that it spends on defaults that no op has.
    def kernel(keys: Any, *inputs: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, inputs)
        if torch.is_grad_enabled() and any(inputs[i] is not None and inputs[i].requires_grad for i in places):
            if torch._C._are_functorch_transforms_active():
                raise NotImplementedError(f"{_name(op)}: torch.func has no gradients of sscan; use torch.autograd.grad")
            outputs = Recorded.apply(keys & below, *inputs)
            return list(outputs) if listed else outputs
        return run(keys & below, inputs)

    _library.impl(_name(op), kernel, "Autograd", with_keyset=True)


def refuse_derivatives(op: Any) -> None:
    """Have an op that updates a state in place raise a TypeError for tensors that require grad: it would be lost."""
    places = _tensors(op)
    below, implementation = torch._C._after_autograd_keyset, _kernels[_name(op)]

    def kernel(keys: Any, *inputs: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, inputs)
        if torch.is_grad_enabled():
            for i in places:
                if inputs[i] is not None and inputs[i].requires_grad:
                    raise TypeError(
                        f"{_name(op)}: {op._schema.arguments[i].name} requires grad, which an update in place would "
                        "lose; use torch.no_grad()"
                    )
        keys = keys & below
        with torch._C._AutoDispatchBelowAutograd():
            return implementation(*inputs) if keys.highestPriorityTypeId() in _PLAIN else op.redispatch(keys, *inputs)

    _library.impl(_name(op), kernel, "Autograd", with_keyset=True)


def _refuse_tangents(op: Any, inputs: Sequence[Any]) -> None:
    """NotImplementedError for inputs with a tangent, which would be zero behind the op."""
    for i in _tensors(op):
        if inputs[i] is not None and has_tangent(inputs[i]):
            raise NotImplementedError(
                f"{_name(op)}: {op._schema.arguments[i].name} has a tangent, but the ops of sscan have no forward-mode "
                "derivatives; use reverse mode (torch.autograd.grad)"
            )


def _name(op: Any) -> str:
    return str(op._schema.name).partition("::")[2]


def _tensors(op: Any) -> list[int]:
    """Which of the op's arguments are tensors, or may be."""
    return [i for i, argument in enumerate(op._schema.arguments) if "Tensor" in str(argument.type)]


def differentiate_again(backward: Any, composed: Callable[..., Any], constants: int = 0) -> None:
    """Give a backward op gradients: those of a composition, which takes what the op takes but the ``constants``.

    These are its last tensors.
    """
    tensors = len(_tensors(backward))

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


def cast_under_autocast(op: Any, *names: str, axes: int) -> None:
    """Under autocast, have these arguments in autocast's dtype, as matrix products have theirs.

    Those with fewer axes are parameters, and left alone; so is, as everywhere in autocast, what is not a floating-point
    tensor on its device, and float64.
    """
    named = [argument.name in names for argument in op._schema.arguments]
    for device in ("cpu", "cuda"):

        def kernel(*arguments: Any, device: str = device) -> Any:
            dtype = torch.get_autocast_dtype(device)
            cast = [
                _lowered(x, device, dtype) if lowered and x is not None and x.ndim >= axes else x
                for x, lowered in zip(arguments, named, strict=True)
            ]
            with torch.autocast(device, enabled=False):
                return op(*cast)

        _library.impl(_name(op), kernel, f"Autocast{device.upper()}")


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
