"""Where a segment lies (see ``sscan.cuda._segments``)."""

from sscan.cuda._primitives import INTEGER_READERS
from sscan.cuda._target import device

read_integer = INTEGER_READERS[64]


@device
def segment(number, length, cu_seqlens):
    """Batch row, first step and number of steps of a segment; ``cu_seqlens`` is an address, 0 if rows are segments."""
    if cu_seqlens == 0:
        return number, 0, length
    begin = min(max(read_integer(cu_seqlens, number, 1), 0), length)
    end = min(max(read_integer(cu_seqlens, number + 1, 1), begin), length)
    return 0, begin, end - begin
