"""Where a segment lies (see ``sscan.cuda._segments``)."""

from sscan.cuda._primitives import INTEGER_READERS, quotient
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


@device
def part_of(number, parts, launched_parts, length, part_length, sequences, cu_seqlens):
    """(segment, part of it, its parts, number of the part) of the one that a launch of the first parts has ``number``.

    Rows have ``parts`` each. Packed sequences have as many as they need, and all have ``parts``: those of sequence i
    begin with number begin_i // part_length + i, which leaves enough to the next one.
    """
    if cu_seqlens == 0 or parts == 1:
        which = quotient(number, launched_parts)
        part = number - which * launched_parts
        return which, part, parts, which * parts + part
    which, end = 0, sequences
    while end - which > 1:
        middle = (which + end) >> 1
        begin = min(max(read_integer(cu_seqlens, middle, 1), 0), length)
        if quotient(begin, part_length) + middle <= number:
            which = middle
        else:
            end = middle
    _, begin, steps = segment(which, length, cu_seqlens)
    part = max(number - quotient(begin, part_length) - which, 0)
    return which, part, max(quotient(steps + part_length - 1, part_length), 1), number
