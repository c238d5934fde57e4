"""What layers have in common that read sequences in pieces, or token by token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from sscan.nn import ops
from sscan.nn.autodiff import Tensor, no_grad
from sscan.nn.modules import Module

if TYPE_CHECKING:
    from sscan.nn.autodiff import Array, Operand

State: TypeAlias = tuple[Tensor, ...]


class Recurrent(Module, ABC):
    """A layer whose past is a state of constant size: a tuple of tensors, each with the batch first.

    Attributes
    ----------
    time : int
        The axis of time of what it reads: 1 of (batch, length, d_model), 2 of (batch, dim, length).
    """

    time: ClassVar[int] = 1

    @abstractmethod
    def __call__(self, hidden: Operand, seq_idx: Array | None = None) -> Tensor:
        """Apply the layer to sequences from their beginnings.

        `seq_idx` (batch, length) numbers the sequences packed into a row: none sees another.
        """

    @abstractmethod
    def extend(self, hidden: Operand, state: Any) -> tuple[Tensor, Any]:
        """The output for the continuation `hidden` of sequences, and the state at its end, both differentiable."""

    @abstractmethod
    def new_state(self, batch: int) -> Any:
        """The state before the first token of `batch` sequences: zeros, where and of what dtypes the parameters are."""

    @no_grad()
    def step(self, hidden: Operand, state: Any) -> Tensor:
        """The output for one token, `hidden` without the axis of time; the arrays of `state` are updated in place."""
        before = (slice(None),) * self.time
        out, new = self.extend(ops.getitem(hidden, (*before, None)), state)
        for place, tensor in zip(state, new, strict=True):
            place.data[...] = tensor.data
        return ops.getitem(out, (*before, 0))


class Pointwise(Recurrent):
    """A layer that treats every token by itself: nothing is remembered."""

    def extend(self, hidden: Operand, state: State) -> tuple[Tensor, State]:
        """The output for `hidden`, and the state, which is empty."""
        return self(hidden), state

    def new_state(self, batch: int) -> State:
        """Nothing, whatever `batch` is."""
        return ()


class Stateless(Module, ABC):
    """A layer that has to see the whole past again for every token."""

    @abstractmethod
    def __call__(self, hidden: Operand, seq_idx: Array | None = None) -> Tensor:
        """Apply the layer to whole sequences."""

    def extend(self, hidden: Operand, state: Any) -> tuple[Tensor, Any]:
        """NotImplementedError for any `hidden` and `state`: there is nothing to go on from."""
        raise NotImplementedError(f"{type(self).__name__}: what it remembers has no constant size; it has no states")

    def new_state(self, batch: int) -> Any:
        """NotImplementedError for any `batch`, as of `extend`."""
        return self.extend(None, None)
