"""A call on PyTorch's tensors as a CUDA graph, which takes away the time that the host needs for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def in_a_graph(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, captured."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        call()
    replay: Callable[[], Any] = graph.replay
    return replay


WAYS: dict[str, Callable[[Any], Any]] = {"": lambda call: call, ", in a graph": in_a_graph}  # of timing a call, by name
