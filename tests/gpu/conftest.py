"""Several libraries share one GPU here, in several processes: none may take the memory of all at once."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest

from sscan import _arrays, _plans
from sscan.cuda._launch import Kernel
from sscan.cuda.kernels._scan import CHECKPOINT

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.fixture(autouse=True)
def plans_repeat_what_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan that a test makes is carried out at once: bit for bit, the results must be the recorded ones."""
    make = _plans._plan

    def checked(recording: Any, planning: Any, arrays: list[Any], device: int, returned: Any) -> Any:
        plan = make(recording, planning, arrays, device, returned)
        factories = {(x.module, x.factory) for x, _, _ in recording.launches if isinstance(x, Kernel)}
        in_place = factories & {("selective_state_update", "update"), ("causal_conv1d", "update")}
        if plan is not _plans._NEVER and not in_place and not _captured():
            again = plan.repeat(planning.address, arrays, [*map(planning.address, arrays)], planning.stream(device))
            pairs = zip(_results(returned), _results(again), strict=True)
            for number, (first, second) in enumerate(pairs):
                assert (type(first), first.dtype, first.shape) == (type(second), second.dtype, second.shape)
                if ("selective_scan", "forward") in factories and len(returned) == 3 and first is returned[2]:
                    kept = _kept(arrays)
                    first, second = first[kept], second[kept]
                assert _bytes(first) == _bytes(second), f"result {number} of {factories}"
        return plan

    monkeypatch.setattr(_plans, "_plan", checked)


def _kept(arrays: list[Any]) -> Any:
    """Which checkpoints there are: of packed sequences (``cu_seqlens``) each has room for one more than it may need."""
    integers = [x for x in map(_arrays.view, arrays) if x.ndim == 1 and x.dtype.kind in "iu"]
    if not integers:
        return slice(None)
    (cu_seqlens,) = integers
    places = []
    for number, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.get().tolist())):
        places += [begin // CHECKPOINT + number + k for k in range(-(-(end - begin) // CHECKPOINT))]
    return places


def _captured() -> bool:
    """Whether the current stream of PyTorch or CuPy records a graph: nothing can be looked at then."""
    import cupy
    import torch

    return torch.cuda.is_current_stream_capturing() or cupy.cuda.get_current_stream().is_capturing()


def _results(returned: Any) -> list[Any]:
    return [x for x in (returned if isinstance(returned, tuple) else (returned,)) if x is not None]


def _bytes(array: Any) -> bytes:
    if hasattr(array, "get"):
        return bytes(array.get().tobytes())
    import torch

    mode = torch.cuda.get_sync_debug_mode()
    if mode:
        torch.cuda.set_sync_debug_mode("default")  # the test forbids to wait: the call, not this
    try:
        return bytes(array.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)
