"""Modules: named trees of parameters, and the layers that every model has."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np

from sscan._arrays import array_module
from sscan.models.arguments import check_floats, check_integer, check_number
from sscan.nn import ops
from sscan.nn.autodiff import Array, Operand, Tensor, move, needs_gradient
from sscan.nn.sequence_ops import rms_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

Draw: TypeAlias = "Callable[[np.random.Generator, tuple[int, ...]], Array]"


def _check_dtype(owner: str, dtype: Any) -> None:
    if np.dtype(dtype).kind not in "fcV":  # V is bfloat16
        raise TypeError(f"{owner}: dtype must be a floating or complex one, got {np.dtype(dtype)}")


def at_least_float32(owner: str, dtype: Any) -> np.dtype[Any]:
    """The dtype of parameters that half precision is too little for."""
    _check_dtype(owner, dtype)
    return np.result_type(dtype, np.float32)


class Parameter(Tensor):
    """A tensor that a module owns and an optimiser changes.

    Until :meth:`initialise` or :meth:`Module.load_state_dict` it is a single NaN stretched over the shape: a model of
    any size can be built to look at its names, shapes and parameter count without allocating them.

    Parameters
    ----------
    shape : tuple of int
    draw : callable
        ``draw(rng, shape)``, the initial values; called again by every initialisation.
    dtype : dtype
    decay : bool
        Whether weight decay applies to it, see :func:`sscan.nn.decay_groups`.
    max_lr : float
        The highest learning rate with which it shall be changed, see there too.
    """

    __slots__ = ("decay", "draw", "max_lr")

    def __init__(
        self,
        shape: tuple[int, ...],
        draw: Draw,
        dtype: Any = np.float32,
        *,
        decay: bool = True,
        max_lr: float = math.inf,
    ) -> None:
        _check_dtype("Parameter", dtype)
        super().__init__(np.broadcast_to(np.array(np.nan, dtype), shape), requires_grad=True)
        self.draw = draw
        self.decay, self.max_lr = decay, max_lr

    def initialise(self, rng: np.random.Generator) -> None:
        """Draw the values anew from `rng`, whatever the old ones were."""
        self.data = move(self.draw(rng, self.shape).astype(self.dtype, order="C"), array_module(self.data))


class Module:
    """A tree of parameters: attributes that are parameters, modules or lists of modules, named by their paths.

    A module with ``seed=None`` has no values, only NaN, before :meth:`initialise` or :meth:`load_state_dict` of it or
    of what it is part of.
    """

    def named_parameters(self, prefix: str = "", *, shared: bool = False) -> Iterator[tuple[str, Parameter]]:
        """Names, behind `prefix`, and parameters in the order of construction.

        A parameter that has several names comes once unless `shared`.
        """
        seen: set[int] = set()
        for name, parameter in self._walk(prefix):
            if shared or id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def _walk(self, prefix: str) -> Iterator[tuple[str, Parameter]]:
        for name, value in vars(self).items():
            if isinstance(value, Parameter):
                yield prefix + name, value
            elif isinstance(value, Module):
                yield from value._walk(f"{prefix}{name}.")
            elif isinstance(value, list):
                for i, item in enumerate(value):
                    yield from item._walk(f"{prefix}{name}.{i}.")

    def parameters(self) -> list[Parameter]:
        """The parameters, each once."""
        return [parameter for _, parameter in self.named_parameters()]

    def parameter_count(self) -> int:
        """Number of trainable numbers, shared ones counted once."""
        return sum(math.prod(parameter.shape) for parameter in self.parameters())

    def initialise(self, seed: int | np.random.Generator) -> None:
        """Draw every parameter anew from one stream of random numbers, of `seed`: the same values on every device."""
        rng = np.random.default_rng(seed)
        for parameter in self.parameters():
            parameter.initialise(rng)
        lie_together(self.parameters())

    def __repr__(self) -> str:
        """The tree with the shapes of the parameters; what fits on a line stands on one."""
        parts = []
        for name, value in vars(self).items():
            if isinstance(value, Parameter):
                parts.append(f"{name}{list(value.shape)}")
            elif isinstance(value, Module):
                parts.append(f"{name}={value!r}")
            elif isinstance(value, list):
                parts += [f"{name}.{i}={item!r}" for i, item in enumerate(value)]
        line = f"{type(self).__name__}({', '.join(parts)})"
        if len(line) <= 100 and "\n" not in line:
            return line
        return "\n  ".join([f"{type(self).__name__}(", *(part.replace("\n", "\n  ") for part in parts)]) + "\n)"

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    def to(self, module: Any) -> None:
        """Move the parameters to an array module, ``cupy`` and its current device or back to ``numpy``."""
        for parameter in self.parameters():
            parameter.data, parameter.grad = move(parameter.data, module), None

    def state_dict(self) -> dict[str, Array]:
        """The arrays of the parameters by name, not copied. A shared parameter stands under each of its names."""
        return {name: parameter.data for name, parameter in self.named_parameters(shared=True)}

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names and shapes of arrays, as of a file's header, with those of the parameters.

        Raises
        ------
        ValueError
            If a name is missing or unknown, or a shape differs. Of a shared parameter's names one is enough.
        """
        parameters, aliases = self._aliases()
        problems = [f"unknown key {name!r}" for name in shapes if name not in parameters]
        problems += [f"missing key {names[0]!r}" for names in aliases if not shapes.keys() & set(names)]
        problems += [
            f"{name!r} has shape {shapes[name]}, expected {parameter.shape}"
            for name, parameter in parameters.items()
            if name in shapes and shapes[name] != parameter.shape
        ]
        _raise_for(problems)

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Copy the arrays of `state` into the parameters, cast to their dtypes; of a shared one's names one is enough.

        Raises
        ------
        ValueError
            If a name is missing or unknown, a shape differs, an array is not of a floating dtype or has values beyond
            that of its parameter, or the names of a shared parameter hold different values. Nothing has been changed
            then.
        """
        self.check_shapes({name: tuple(array.shape) for name, array in state.items()})
        parameters, aliases = self._aliases()
        _raise_for(
            [
                f"{name!r} is {a.dtype}, expected a floating dtype"
                for name, a in state.items()
                if a.dtype.kind not in "fV"
            ]
        )
        values = {}
        for names in aliases:
            present = [name for name in names if name in state]
            if any((state[name] != state[present[0]]).any() for name in present[1:]):
                _raise_for([f"{' and '.join(map(repr, present))} are one parameter, but their values differ"])
            values[names[0]] = _cast(present[0], state[present[0]], parameters[names[0]])
        for name, value in values.items():
            parameters[name].data, parameters[name].grad = value, None
        lie_together([parameters[name] for name in values])

    def _aliases(self) -> tuple[dict[str, Parameter], list[list[str]]]:
        """The parameters by all their names, and the names of each."""
        aliases: dict[int, list[str]] = {}
        parameters = dict(self.named_parameters(shared=True))
        for name, parameter in parameters.items():
            aliases.setdefault(id(parameter), []).append(name)
        return parameters, list(aliases.values())


def _cast(name: str, array: Array, parameter: Parameter) -> Array:
    """A copy of the array as the parameter holds it; ValueError if a value would become infinite."""
    xp = array_module(parameter.data)
    array = move(array, xp)
    with np.errstate(over="ignore"):
        cast = array.astype(parameter.dtype, copy=True)
    if cast.dtype != array.dtype and (xp.isinf(cast) & ~xp.isinf(array)).any():
        _raise_for([f"{name!r} has values that {parameter.dtype} cannot hold"])
    return cast


def lie_together(parameters: list[Parameter]) -> None:
    """Put the arrays of parameters in host memory behind each other in one piece of it.

    The system has large pages for large pieces only. Through small ones reading the weights takes a tenth longer, which
    is what a decoding step does. Memory is taken by what is written to it, so little more is needed meanwhile.
    """
    here = [parameter for parameter in parameters if isinstance(parameter.data, np.ndarray)]
    starts = np.cumsum([0] + [-(-parameter.data.nbytes // 64) * 64 for parameter in here])
    memory = np.empty(starts[-1], np.uint8)
    for parameter, start in zip(here, starts, strict=False):
        place = memory[start : start + parameter.data.nbytes].view(parameter.dtype).reshape(parameter.shape)
        place[...] = parameter.data
        parameter.data = place


def _raise_for(problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"load_state_dict: {'; '.join(problems[:3])}{more}")


def zeros(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Initial zeros."""
    return np.zeros(shape)


def ones(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Initial ones."""
    return np.ones(shape)


def constant(value: float) -> Draw:
    """Initial values all equal."""
    return functools.partial(_constant, value)


def _constant(value: float, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.full(shape, value)


def uniform(bound: float) -> Draw:
    """Initial values uniform on [-bound, bound]."""
    return functools.partial(_uniform, bound)


def _uniform(bound: float, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.uniform(-bound, bound, shape)


def normal(deviation: float) -> Draw:
    """Initial values normal with mean 0."""
    return functools.partial(_normal, deviation)


def _normal(deviation: float, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return deviation * rng.standard_normal(shape)


class Linear(Module):
    """y = x W^T + b over the last axis; W is (out_features, in_features).

    W is drawn uniformly from +-scale / sqrt(in_features), b starts at zero and is exempt from weight decay. The product
    is formed in the dtype of x, to which W is cast: with float32 parameters and bfloat16 activations that is mixed
    precision, and the gradients of the parameters are float32.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool, default True
        Whether there is a b.
    dtype : dtype, default float32
        Of the parameters.
    scale : float, default 1
    seed : int, Generator or None, default 0
        Of the initial values; with None they stay undrawn, as of :class:`sscan.nn.Mamba`.
    """

    bias: Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: Any = np.float32,
        *,
        scale: float = 1.0,
        seed: int | np.random.Generator | None = 0,
    ) -> None:
        check_integer("Linear", "in_features", in_features, 0)
        check_integer("Linear", "out_features", out_features, 0)
        bound = scale / math.sqrt(max(in_features, 1))
        self.weight = Parameter((out_features, in_features), uniform(bound), dtype)
        self.bias = Parameter((out_features,), zeros, dtype, decay=False) if bias else None
        if seed is not None:
            self.initialise(seed)

    def __call__(self, x: Operand) -> Tensor:
        """(..., rows, in_features) to (..., rows, out_features)."""
        check_floats("Linear", "x", x, "...", "rows", self.weight.shape[1])
        y = ops.matmul(x, self.weight_like(x).swapaxes(0, 1))
        return y if self.bias is None else (y + self.bias).astype(y.dtype)

    def channel_first(self, x: Operand) -> Tensor:
        """The same map of x along the last but one axis: (batch, in_features, length) to (.., out_features, length)."""
        check_floats("Linear", "x", x, "batch", self.weight.shape[1], "length")
        y = ops.matmul(self.weight_like(x), x)
        return y if self.bias is None else (y + self.bias.reshape(-1, 1)).astype(y.dtype)

    def weight_like(self, x: Operand) -> Tensor:
        """W in the dtype of x."""
        return self.weight if self.weight.dtype == x.dtype else self.weight.astype(x.dtype)  # type: ignore[union-attr]


class Embedding(Module):
    """Rows of a table (rows, width) by index, drawn from a normal distribution of deviation 0.02.

    Parameters
    ----------
    rows, width : int
    dtype : dtype, default float32
    seed : int, Generator or None, default 0
        As of :class:`Linear`.
    """

    def __init__(
        self, rows: int, width: int, dtype: Any = np.float32, *, seed: int | np.random.Generator | None = 0
    ) -> None:
        check_integer("Embedding", "rows", rows)
        check_integer("Embedding", "width", width)
        self.weight = Parameter((rows, width), normal(0.02), dtype)
        if seed is not None:
            self.initialise(seed)

    def __call__(self, indices: Array) -> Tensor:
        """Integers of any shape to (*shape, width)."""
        return ops.embedding(self.weight, indices)


class RMSNorm(Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.

    Parameters
    ----------
    width : int
    eps : float, default 1e-5
    dtype : dtype, default float32
        Of the weight, which starts as ones.
    seed : int, Generator or None, default 0
        None leaves it undrawn, as of :class:`Linear`.
    """

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        dtype: Any = np.float32,
        *,
        seed: int | np.random.Generator | None = 0,
    ) -> None:
        check_integer("RMSNorm", "width", width)
        self.weight = Parameter((width,), ones, dtype, decay=False)
        self.eps = eps
        if seed is not None:
            self.initialise(seed)

    @overload
    def __call__(self, x: Operand, residual: None = None) -> Tensor: ...

    @overload
    def __call__(self, x: Operand, residual: Operand) -> tuple[Tensor, Tensor]: ...

    def __call__(self, x: Operand, residual: Operand | None = None) -> Any:
        """The normalised x; with a residual (the normalised sum, the sum), added and kept in float32 (float64)."""
        check_floats("RMSNorm", "x", x, "...", *self.weight.shape)
        return rms_norm(x, self.weight, residual, self.eps)


class LayerNorm(Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis.

    Parameters
    ----------
    width : int
    eps : float, default 1e-5
    dtype : dtype, default float32
        Of the weight, which starts as ones, and of the bias, which starts as zeros.
    seed : int, Generator or None, default 0
        None leaves them undrawn, as of :class:`Linear`.
    """

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        dtype: Any = np.float32,
        *,
        seed: int | np.random.Generator | None = 0,
    ) -> None:
        check_integer("LayerNorm", "width", width)
        self.weight = Parameter((width,), ones, dtype, decay=False)
        self.bias = Parameter((width,), zeros, dtype, decay=False)
        self.eps = eps
        if seed is not None:
            self.initialise(seed)

    @overload
    def __call__(self, x: Operand, residual: None = None) -> Tensor: ...

    @overload
    def __call__(self, x: Operand, residual: Operand) -> tuple[Tensor, Tensor]: ...

    def __call__(self, x: Operand, residual: Operand | None = None) -> Any:
        """The normalised x; with a residual (the normalised sum, the sum), added and kept in float32 (float64)."""
        check_floats("LayerNorm", "x", x, "...", *self.weight.shape)
        if residual is None:
            return ops.layer_norm(x, self.weight, self.bias, self.eps)
        dtype = x.dtype  # type: ignore[union-attr]
        total = ops.astype(x, np.result_type(dtype, np.float32)) + residual
        return ops.layer_norm(total, self.weight, self.bias, self.eps).astype(dtype), total


class ResidualBlock(Module):
    """A norm and the mixer that reads it."""

    def __init__(self, norm: RMSNorm | LayerNorm, mixer: Any) -> None:
        self.norm = norm
        self.mixer = mixer


class Dropout(Module):
    """Zero in the place of each number with probability `rate`, and 1 / (1 - rate) times the others.

    It does so while gradients are recorded. Under :func:`sscan.nn.no_grad`, or when nothing requires one, x comes
    back as it is: there is nothing to switch.

    Which numbers those are follows from the seed and from how many calls there were, which is counted where x is: in a
    CUDA graph, too, every launch draws anew. A run that is continued from a checkpoint counts from zero again.

    Parameters
    ----------
    rate : float
    seed : int, default 0
    """

    def __init__(self, rate: float, seed: int = 0) -> None:
        check_number("Dropout", "rate", rate)
        check_integer("Dropout", "seed", seed, 0)
        if rate >= 1:
            raise ValueError(f"Dropout: rate must be below 1, got {rate}")
        self.rate = rate
        self.calls = np.array([seed], np.uint32) * 0x9E3779B9  # so that the calls of two seeds are others

    def __call__(self, x: Operand) -> Tensor:
        """x with some of its numbers dropped."""
        check_floats("Dropout", "x", x, "...")
        if not (self.rate and isinstance(x, Tensor) and needs_gradient(x)):
            return x if isinstance(x, Tensor) else Tensor(x)
        xp = array_module(x.data)
        self.calls = move(self.calls, xp)
        self.calls += 1  # in place, which a graph repeats
        drawn = _scrambled(xp.bitwise_xor(_scrambled(self.calls), xp.arange(x.size, dtype=np.uint32)))
        kept = (drawn >= round(self.rate * (1 << 32))).reshape(x.shape)
        return ops.multiply(x, (kept.astype(np.float32) / (1 - self.rate)).astype(x.dtype))


def _scrambled(x: Array) -> Array:
    """The finishing steps of MurmurHash3: a bijection of 32-bit integers in which each bit depends on all."""
    xp = array_module(x)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = xp.bitwise_xor(x, xp.right_shift(x, shift)) * factor
    return xp.bitwise_xor(x, xp.right_shift(x, 16))
