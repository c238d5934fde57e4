"""A function of arrays on a GPU as one CUDA graph, which the host starts with one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sscan._arrays import array_module

if TYPE_CHECKING:
    from collections.abc import Callable

    from sscan.nn.autodiff import Array


class capture:  # used as a decorator
    """Make one CUDA graph of everything that a function does with arrays on a GPU.

    The first call runs the function as it is, which compiles what has to be compiled. The second one records it, and
    from then on a call copies its arguments to where the graph reads them and launches the graph: what the function
    does on the host, in Python, is not done again. Arrays of other shapes or dtypes, or on another device, begin anew,
    and the graph that was is let go together with its memory: so lengths may change in stages, while shapes that come
    and go are better captured once for each. On NumPy arrays every call runs the function.

    Parameters
    ----------
    function : callable
        Of arrays, and no keywords. It may change other arrays in place, such as parameters and states; they must stay
        where they are. It must not read values on the host. Numbers that change from call to call have to be arguments,
        or in arrays.

    Notes
    -----
    The results are the graph's own: the next call overwrites them. They have the same bits as without a graph.

    Examples
    --------
    >>> @nn.capture
    ... def step(inputs, targets):
    ...     model.zero_grad()
    ...     loss = model.loss(inputs, targets)
    ...     loss.backward()
    ...     nn.clip_gradients(model.parameters())
    ...     optimiser.update(loss)
    ...     return loss
    >>> for inputs, targets in data:
    ...     optimiser.advance()
    ...     loss = step(inputs, targets)
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        if not callable(function):
            raise TypeError(f"capture: function must be callable, got {type(function).__name__}")
        self.function = function
        self._kinds: list[Any] = []  # of the arrays of the last call
        self._recorded: _Recorded | None = None

    def __call__(self, *arrays: Array) -> Any:
        """What the function returns for these arrays."""
        if all(isinstance(array, np.ndarray) for array in arrays):
            return self.function(*arrays)
        kinds = [(array.shape, array.dtype, array.device) for array in arrays]
        if kinds != self._kinds:
            self._kinds, self._recorded = kinds, None
            return self.function(*arrays)
        if self._recorded is None:
            self._recorded = _Recorded(self.function, arrays)
        else:
            self._recorded.put(arrays)
        return self._recorded.launch()


class _Recorded:
    """A recorded function, and its arguments where the graph reads them."""

    def __init__(self, function: Callable[..., Any], arrays: tuple[Array, ...]) -> None:
        from sscan.cuda._graphs import Graph

        self.inputs = inputs = [array.copy() for array in arrays]
        array_module(arrays[0]).get_default_memory_pool().free_all_blocks()  # of the call before, which took as much
        # Not of self.inputs: the graph would hold this object, and both their memory until the next collection.
        self.graph = Graph(lambda: function(*inputs))  # type: ignore[no-untyped-call]

    def put(self, arrays: tuple[Array, ...]) -> None:
        """Copy the arguments to where the graph reads them."""
        for place, array in zip(self.inputs, arrays, strict=True):
            place[...] = array

    def launch(self) -> Any:
        """Run it on the current stream."""
        self.graph.launch()  # type: ignore[no-untyped-call]
        return self.graph.results
