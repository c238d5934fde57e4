"""CUDA graphs: what a function launches, recorded once and then launched as one."""

import contextlib
import sys

from sscan.cuda._products import recorded


class Graph:
    """What a function without arguments launches; it must do the same at the same addresses whenever it is called.

    It is only recorded, so that whatever is made at a first call has to be there already. Its memory comes from a pool
    of its own: what the function frees is used again by every launch, and nobody else gets it. `results` is what the
    function returned; every launch writes it anew.
    """

    def __init__(self, function):
        cuda = sys.modules["cupy"].cuda
        self._function = function  # and with it the arrays that the graph reads and writes
        self._memory, stream = cuda.MemoryPool(), cuda.Stream(non_blocking=True)
        stream.wait_event(cuda.get_current_stream().record())
        with stream, cuda.using_allocator(self._memory.malloc), recorded() as self._kept:
            stream.begin_capture()
            try:
                self.results = function()
            except BaseException:
                with contextlib.suppress(Exception):  # of a recording that has failed; the function's own is told
                    stream.end_capture()
                raise
            self._graph = stream.end_capture()

    def launch(self):
        """Start it on CuPy's current stream."""
        self._graph.launch()
