"""CUDA graphs: what a function launches, recorded once and then launched as one."""

import sys

from sscan.cuda._products import recorded


class Graph:
    """What a function without arguments launches; it must do the same at the same addresses whenever it is called.

    It is run once as it is, so that whatever is made at a first call is made, and a second time to be recorded. Its
    memory comes from a pool that lives as long as the graph.
    """

    def __init__(self, function):
        cuda = sys.modules["cupy"].cuda
        self._memory, stream = cuda.MemoryPool(), cuda.Stream(non_blocking=True)
        stream.wait_event(cuda.get_current_stream().record())
        with stream, cuda.using_allocator(self._memory.malloc), recorded():
            function()
            stream.begin_capture()
            try:
                function()
            finally:
                self._graph = stream.end_capture()
        stream.synchronize()

    def launch(self):
        """Start it on CuPy's current stream."""
        self._graph.launch()
