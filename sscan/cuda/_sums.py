"""Sums over what blocks left behind."""

import functools
import math
from typing import NamedTuple

from sscan.cuda import _launch
from sscan.cuda._launch import Kernel

THREADS, READS = 512, 4  # of a block; of a thread at once
MOST_SHARES = 16  # threads for one sum
MOST = 5  # pairs of one launch


class Plan(NamedTuple):
    """How up to ``MOST`` pairs are summed by one launch."""

    kernel: Kernel
    blocks: int
    parts: int  # of each pair
    slots: tuple[tuple[int, int], ...]  # of each pair, size in reals and first block


@functools.lru_cache(4096)
def planned(count, of_parts, of_sums, *sizes):
    """The plan of sums of these sizes (0: there is no such pair) over ``count`` parts, from the two dtypes."""
    reals = 2 if of_parts.kind == "c" else 1
    real = f"float{8 * of_parts.itemsize // reals}"
    shares = min(MOST_SHARES, 1 << (max(count - 1, 0) // READS).bit_length())  # enough that each reads once
    slots, blocks = [], 0
    for size in (*sizes, *(0,) * (MOST - len(sizes))):
        slots.append((size, blocks))
        blocks += -(-size // (THREADS // shares))
    kernel = Kernel("_sums", "over_parts", (real, real if of_sums.kind == "c" else of_sums.name, shares))
    return Plan(kernel, blocks, count, tuple(slots))


def launch(plan, *pairs):
    """Of ``MOST`` pairs (parts, sums): sums = the sum of parts over its first axis; (None, None) where is no pair."""
    tables = []
    for pair, slot in zip(pairs, plan.slots, strict=True):
        tables += pair
        tables += slot
    _launch.launch(plan.kernel, plan.blocks, plan.parts, *tables)


def over_parts(*pairs):
    """Of up to ``MOST`` pairs (parts, sums): sums = the sum of parts over its first axis, all in one launch.

    All arrays are contiguous, parts have one length and one real type, sums one storage; complex ones are pairs of
    reals.
    """
    (parts, sums), *_ = pairs
    sizes = [math.prod(x.shape[1:]) * (2 if x.dtype.kind == "c" else 1) for x, _ in pairs]
    launch(planned(parts.shape[0], parts.dtype, sums.dtype, *sizes), *pairs, *[(None, None)] * (MOST - len(pairs)))
