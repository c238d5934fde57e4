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

    Rows have ``parts`` each. Packed sequences have as many as they need and at least one, and are numbered one after
    the other; numbers that are left over are parts behind the end of the last sequence.
    """
    if cu_seqlens == 0 or parts == 1:
        which = quotient(number, launched_parts)
        part = number - which * launched_parts
        return which, part, parts, which * parts + part
    which, first, parts_here, behind = 0, 0, 1, 0
    for i in range(sequences):
        _, _, steps = segment(i, length, cu_seqlens)
        if number >= behind:
            which, first, parts_here = i, behind, max(quotient(steps + part_length - 1, part_length), 1)
        behind += max(quotient(steps + part_length - 1, part_length), 1)
    return which, number - first, min(parts_here, parts - first), number  # no more than there are, whatever the borders
