"""What models remember of what they have read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


@dataclass
class MambaState:
    """What a block remembers of the past, however long that was.

    Attributes
    ----------
    conv : tensor (batch, d_inner, d_conv - 1)
        The last inputs of the convolution, newest last, in the dtype of its weights.
    ssm : tensor (batch, d_inner, d_state)
        The state of the scan, at least float32 whatever the dtype of the model, because its rounding errors accumulate.

    They are tensors of the model's library: :class:`sscan.nn.Tensor`, or PyTorch's.
    """

    conv: Any
    ssm: Any


class States(list[MambaState]):
    """What a language model remembers of the sequences of a batch: the :class:`MambaState` of each block.

    Models make them (``new_states``), return them (``extend``, ``prefill``) and change them in place (``step``). Their
    size does not depend on how much was read. `extend` leaves the states that it is given as they are, so one prefix,
    read once, can be continued in many ways.

    Parameters
    ----------
    iterable : iterable of MambaState
        One for each block, as of a list.
    """

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return int(self[0].ssm.shape[0])

    def copy(self) -> States:
        """The same states in memory of their own."""
        return self.select(range(self.batch))

    def select(self, rows: Sequence[int]) -> States:
        """A copy without gradients of the sequences `rows`, in this order; one may come twice, as in a beam search."""
        rows = list(rows)
        return States(MambaState(_rows(state.conv, rows), _rows(state.ssm, rows)) for state in self)

    def put(self, rows: Sequence[int], others: States) -> None:
        """Overwrite the states of the sequences `rows` with those of `others`, in their order."""
        rows = list(rows)
        for state, other in zip(self, others, strict=True):
            state.conv.data[rows], state.ssm.data[rows] = other.conv.data, other.ssm.data

    def named_tensors(self) -> Iterator[tuple[str, Any]]:
        """Every tensor with the name that it has in files, "0.conv", "0.ssm", "1.conv", ..."""
        for i, state in enumerate(self):
            yield f"{i}.conv", state.conv
            yield f"{i}.ssm", state.ssm

    @classmethod
    def of_tensors(cls, tensors: dict[str, Any]) -> States:
        """The states whose `named_tensors` are `tensors`."""
        return cls(MambaState(tensors[f"{i}.conv"], tensors[f"{i}.ssm"]) for i in range(len(tensors) // 2))


def _rows(tensor: Any, rows: list[int]) -> Any:
    copy = tensor.data[rows]  # both libraries keep there what no gradient goes through
    return copy if isinstance(copy, type(tensor)) else type(tensor)(copy)


def check_count(op: str, states: Sequence[Any], layers: Sequence[Any]) -> None:
    """ValueError unless there is a state for each layer."""
    if len(states) != len(layers):
        raise ValueError(f"{op}: states must be of {len(layers)} layers, got those of {len(states)}")


def check_states(path: str | Path, arrays: Mapping[str, Any], expected: States) -> None:
    """ValueError, which names the file, if arrays are not states of a model; `expected` are some, of any batch."""
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.named_tensors()}
    batch = next((array.shape[0] for array in arrays.values() if array.ndim), 0)
    for name in wanted.keys() ^ arrays.keys():
        raise ValueError(f"{path}: {name!r} is {'missing' if name in wanted else 'not of this model'}")
    for name, shape in wanted.items():
        if arrays[name].shape != (batch, *shape[1:]) or arrays[name].dtype.kind not in "fV":
            raise ValueError(
                f"{path}: {name!r} must have shape {(batch, *shape[1:])} and a floating dtype, "
                f"got {arrays[name].shape} and {arrays[name].dtype}"
            )
