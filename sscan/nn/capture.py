"""A function of arrays on a GPU as one CUDA graph, which the host starts with one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from sscan.nn.autodiff import Array


class capture:  # used as a decorator
    """Make one CUDA graph of everything that a function does with arrays on a GPU.

    The first call runs the function as it is, which compiles what has to be compiled. The second one records it, and
    from then on a call copies its arguments to where the graph reads them and launches the graph: what the function
    does on the host, in Python, is not done again. On NumPy arrays every call runs the function.

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
        self.function = function
        self._calls = 0
        self._recorded: _Recorded | None = None

    def __call__(self, *arrays: Array) -> Any:
        """What the function returns for these arrays.

        Raises
        ------
        ValueError
            If an array differs in shape, dtype or device from that of the call that was recorded.
        """
        if all(isinstance(array, np.ndarray) for array in arrays):
            return self.function(*arrays)
        self._calls += 1
        if self._calls == 1:
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

        self.inputs = [array.copy() for array in arrays]
        self.graph = Graph(lambda: function(*self.inputs))  # type: ignore[no-untyped-call]

    def put(self, arrays: tuple[Array, ...]) -> None:
        """Copy the arguments to where the graph reads them."""
        kinds, expected = ([(x.shape, x.dtype, x.device) for x in given] for given in (arrays, self.inputs))
        if kinds != expected:
            raise ValueError(f"capture: arrays must be like the recorded ones, {expected}, got {kinds}")
        for place, array in zip(self.inputs, arrays, strict=True):
            place[...] = array

    def launch(self) -> Any:
        """Run it on the current stream."""
        self.graph.launch()  # type: ignore[no-untyped-call]
        return self.graph.results
