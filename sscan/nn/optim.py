"""AdamW with decoupled decay, gradient clipping, and the learning rate over time: the recipe of section E.2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sscan._arrays import array_module, on_gpu
from sscan.models.arguments import check_integer, check_number
from sscan.nn.autodiff import Array, move
from sscan.nn.products import one_blas_thread

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sscan.nn.autodiff import Tensor
    from sscan.nn.modules import Module, Parameter


def decay_groups(module: Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Groups of the parameters of `module` for :class:`AdamW`: those that decay or must not, and those that go slowly.

    A_log, D, biases and norms do not decay. Step sizes and A of :class:`sscan.nn.S4D` have a highest learning rate.
    Each group is a dict with "parameters" (by name), "weight_decay", and "max_lr" if there is one.
    """
    if not hasattr(module, "named_parameters"):
        raise TypeError(f"decay_groups: module must be a module of sscan.nn, got {type(module).__name__}")
    named = list(module.named_parameters())
    kinds = dict.fromkeys([(True, math.inf), (False, math.inf), *((p.decay, p.max_lr) for _, p in named)])
    return [
        {
            "parameters": {name: p for name, p in named if (p.decay, p.max_lr) == (decays, max_lr)},
            "weight_decay": weight_decay * decays,
            **({} if math.isinf(max_lr) else {"max_lr": max_lr}),
        }
        for decays, max_lr in kinds
    ]


def _check_groups(groups: Any) -> None:
    """TypeError or ValueError unless they are as :func:`decay_groups` returns them."""
    seen: set[int] = set()
    if not groups:
        raise ValueError("AdamW: there are no groups of parameters")
    for group in groups:
        if not isinstance(group, Mapping):
            raise TypeError(f"AdamW: a group is a dict, as `decay_groups(model)` makes, got {type(group).__name__}")
        if not {"parameters", "weight_decay"} <= group.keys() <= {"parameters", "weight_decay", "max_lr"}:
            raise ValueError(f"AdamW: a group has parameters, weight_decay and perhaps max_lr, got {', '.join(group)}")
        if not isinstance(group["parameters"], dict):
            kind = type(group["parameters"]).__name__
            raise TypeError(f"AdamW: parameters must be a dict of them by name, got {kind}")
        for name in ("weight_decay", "max_lr"):
            if name in group:
                check_number("AdamW", name, group[name])
        for name, parameter in group["parameters"].items():
            if id(parameter) in seen:
                raise ValueError(f"AdamW: {name} is there twice")
            seen.add(id(parameter))


class AdamW:
    """Adam with bias correction and decoupled weight decay.

    With gradient g at step t: m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
    p = (1 - lr weight_decay) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps). Everything is updated in place.

    Parameters
    ----------
    groups : list of dict
        As :func:`decay_groups` returns.
    lr : float
        May be assigned between steps. A group with a "max_lr" below it takes that.
    betas, eps
        Decay rates of the moments, and what keeps the quotient finite.

    Raises
    ------
    TypeError
        If a parameter is in half precision, where most updates would be rounded away.
    TypeError, ValueError
        If a number is not finite or not in its range: `lr`, `eps` and weight decay are not negative, `betas` in [0, 1).
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        check_number("AdamW", "lr", lr)
        check_number("AdamW", "eps", eps)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"AdamW: betas must be two numbers in [0, 1), got {betas}")
        _check_groups(groups)
        self.groups, self.lr, self.betas, self.eps = groups, lr, betas, eps
        self.steps = 0
        self._factors: dict[str, Array] = {}  # on a GPU, by dtype: what `advance` found
        self.moments: dict[str, tuple[Array, Array]] = {}
        for name, parameter in self._named():
            if parameter.dtype.itemsize < 4:
                raise TypeError(f"AdamW: {name} is {parameter.dtype}; keep the parameters that train in float32")
            zeros = array_module(parameter.data).zeros
            self.moments[name] = zeros(parameter.shape, parameter.dtype), zeros(parameter.shape, parameter.dtype)

    def _named(self) -> Iterable[tuple[str, Parameter]]:
        return (item for group in self.groups for item in group["parameters"].items())

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        self.advance()
        self.update()

    def advance(self) -> None:
        """Begin the next step: the part of it that the host does, and a CUDA graph of `update` does not."""
        check_number("AdamW", "lr", self.lr)  # assigned between steps
        self.steps += 1
        if self._factors:
            self._put_factors()

    def _put_factors(self) -> None:
        (b1, b2), steps = self.betas, self.steps
        numbers = [math.sqrt(1 - b2**steps)]
        for group in self.groups:
            lr = self._rate(group)
            numbers += [lr / (1 - b1**steps), 1 - lr * group["weight_decay"]]
        for factors in self._factors.values():
            factors.set(np.array(numbers, factors.dtype))

    def _rate(self, group: dict[str, Any]) -> float:
        highest: float = group.get("max_lr", math.inf)
        return min(self.lr, highest)

    def update(self, loss: Tensor | None = None) -> None:
        """Update every parameter that has a gradient, behind `advance`; none, if the loss is given and not finite.

        On a GPU nothing is waited for, and one launch updates several parameters.

        Raises
        ------
        RuntimeError
            If `advance` has not been called yet.
        """
        if not self.steps:
            raise RuntimeError("AdamW: call advance() before update()")
        table = [
            (parameter.data, parameter.grad, *self.moments[name], number)
            for number, group in enumerate(self.groups)
            for name, parameter in group["parameters"].items()
            if parameter.grad is not None
        ]
        if table and all(on_gpu(array) and array.flags.c_contiguous for row in table for array in row[:4]):
            self._update_on_gpu(table, loss)
        elif loss is None or math.isfinite(loss.item()):
            for value, gradient, m, v, number in table:
                self._update(value, gradient, m, v, self.groups[number])

    def _update_on_gpu(self, table: list[Any], loss: Tensor | None) -> None:
        from sscan.cuda import adamw

        xp = array_module(table[0][0])
        for dtype in {row[0].dtype.name for row in table} - self._factors.keys():
            self._factors[dtype] = xp.empty(1 + 2 * len(self.groups), dtype)
            self._put_factors()
        value = None if loss is None else xp.asarray(loss.data, np.float32)
        adamw.update(table, self._factors, value, self.betas, self.eps)  # type: ignore[no-untyped-call]

    def _update(self, value: Array, gradient: Array, m: Array, v: Array, group: dict[str, Any]) -> None:
        (b1, b2), lr = self.betas, self._rate(group)
        scratch = gradient * (1 - b1)
        m *= b1
        m += scratch
        array_module(value).multiply(gradient, gradient, out=scratch)
        scratch *= 1 - b2
        v *= b2
        v += scratch
        array_module(value).sqrt(v, out=scratch)
        scratch /= math.sqrt(1 - b2**self.steps)
        scratch += self.eps
        array_module(value).divide(m, scratch, out=scratch)
        scratch *= lr / (1 - b1**self.steps)
        value *= 1 - lr * group["weight_decay"]
        value -= scratch

    def state_dict(self) -> dict[str, Array]:
        """The moments by name, ``<parameter>.m`` and ``<parameter>.v``, and the number of steps; arrays not copied."""
        state: dict[str, Array] = {"steps": np.array(self.steps)}
        for name, (m, v) in self.moments.items():
            state[f"{name}.m"], state[f"{name}.v"] = m, v
        return state

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Continue from a saved state, bit for bit.

        Raises
        ------
        ValueError
            If the names or shapes are not those of the parameters, the moments are not of a floating dtype, or the
            number of steps is not one.
        """
        expected = {name: array.shape for name, array in self.state_dict().items()}
        got = {name: array.shape for name, array in state.items()}
        for name in sorted(expected.keys() | got.keys()):
            if expected.get(name) != got.get(name):
                raise ValueError(f"AdamW: state {name!r} has shape {got.get(name)}, expected {expected.get(name)}")
            if state[name].dtype.kind not in ("iu" if name == "steps" else "fV"):
                raise ValueError(f"AdamW: state {name!r} is {state[name].dtype}")
        check_integer("AdamW", "steps", int(state["steps"]), 0)
        self.steps = int(state["steps"])
        for name, moments in self.moments.items():
            for letter, moment in zip("mv", moments, strict=True):
                moment[...] = move(state[f"{name}.{letter}"], array_module(moment))


def clip_gradients(parameters: Iterable[Parameter], max_norm: float = 1.0) -> Array:
    """Scale the gradients of `parameters` in place to a joint Euclidean norm of at most `max_norm`; returns it before.

    The norm is a number where the gradients are, so that nothing waits for a GPU before it is read.

    Raises
    ------
    ValueError
        Unless `max_norm` is above zero; infinity changes nothing.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_gradients: max_norm must be above 0, got {max_norm}")
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return np.float64(0)
    xp = array_module(gradients[0])
    if all(on_gpu(g) and g.flags.c_contiguous for g in gradients):
        from sscan.cuda import adamw

        return adamw.clip(gradients, max_norm)  # type: ignore[no-untyped-call]
    with one_blas_thread:
        norm = xp.sqrt(xp.stack([xp.vdot(g, g) for g in gradients]).sum(dtype=np.float64))
    if math.isinf(max_norm):
        return norm
    scale = max_norm / xp.maximum(norm, max_norm)
    for gradient in gradients:
        gradient *= scale.astype(gradient.dtype)
    return norm


def warmup_cosine(progress: float, peak: float, final: float = 1e-5, warmup: float = 0.1) -> float:
    """Learning rate at `progress` in [0, 1]: linear from 0 up to `peak`, then half a cosine down to `final`.

    Raises
    ------
    TypeError, ValueError
        If a number is negative or not finite, or `warmup`, the share of the first part, is not below 1.
    """
    for name, value in {"progress": progress, "peak": peak, "final": final, "warmup": warmup}.items():
        check_number("warmup_cosine", name, value)
    if warmup >= 1:
        raise ValueError(f"warmup_cosine: warmup must be below 1, got {warmup}")
    if progress < warmup:
        return peak * progress / warmup
    position = min((progress - warmup) / (1 - warmup), 1.0)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * position))
