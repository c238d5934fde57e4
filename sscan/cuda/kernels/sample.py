"""The next token of each row of a batch, drawn on the GPU from float32 logits; a block has a row.

Warp w has the w-th part of the row, which it walks through several times: for the largest logit, for the thresholds
below which tokens are left out, for the sum of what is left, and to where the cumulated sum passes what was drawn.
"""

import numpy as np

from sscan.cuda._launch import Kernel, Shape
from sscan.cuda._math import real_functions
from sscan.cuda._primitives import (
    INTEGER_READERS,
    as_real,
    await_previous,
    block_index,
    local_array,
    rank_of,
    reader,
    select,
    shared_array,
    shared_get,
    shared_set,
    shuffle_from,
    shuffle_up,
    shuffle_xor,
    synchronize,
    thread_index,
    write_integer,
)
from sscan.cuda._target import device
from sscan.cuda.kernels._warp import WARP, lane_sum
from sscan.cuda.sample import THREADS

WARPS = THREADS // WARP
read_integer = INTEGER_READERS[64]
SINGLE, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)


def row_reader(each):
    """``read(into, logits, row, at, count)``: logits of a row from ``at`` on, minus infinity from ``count`` on."""
    load, lowest = reader(SINGLE, SINGLE, each, each > 1), SINGLE.type(-np.inf)

    @device
    def read(into, logits, row, at, count):
        load(into, logits, row + at, select(at < count, each, 0))
        for j in range(each):
            into[j] = select(at + j < count, into[j], lowest)

    return read


@device
def mixed(x):
    """A bijection of 64-bit integers that leaves no pattern (the finaliser of splitmix64)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * np.int64(-4658895280553007687)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * np.int64(-7723592293110705685)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@device
def uniform(seed, step):
    """A number in [0, 1), for each seed and step another."""
    bits = mixed(mixed(seed) + step * np.int64(-7046029254386353131))
    return np.float64((bits >> 11) & 0x1FFFFFFFFFFFFF) * np.float64(2**-53)


def largest(each):
    """``find(shared, logits, row, start, steps, count)``: a row's largest, where it is first, and if one is NaN."""
    read, numbers = row_reader(each), local_array(each, SINGLE)
    lowest, zero, one, single, double = SINGLE.type(-np.inf), SINGLE.type(0), SINGLE.type(1), SINGLE.type, DOUBLE.type

    @device
    def find(shared, logits, row, start, steps, count):
        values, best, place, broken = numbers(), lowest, zero, zero
        for step in range(steps):
            at = start + step * WARP * each
            read(values, logits, row, at, count)
            for j in range(each):
                broken = select(values[j] == values[j], broken, one)
                place = select(values[j] > best, single(at + j), place)
                best = select(values[j] > best, values[j], best)
        for level in range(5):
            other, elsewhere = shuffle_xor(best, 1 << level), shuffle_xor(place, 1 << level)
            better = (other > best) | ((other == best) & (elsewhere < place))
            best, place = select(better, other, best), select(better, elsewhere, place)
            also = shuffle_xor(broken, 1 << level)
            broken = select(also > broken, also, broken)
        warp = thread_index() >> 5
        shared_set(shared, warp, double(best))
        shared_set(shared, WARPS + warp, double(place))
        shared_set(shared, 2 * WARPS + warp, double(broken))
        synchronize()
        best, place, broken = lowest, zero, zero
        for w in range(WARPS):
            other = single(shared_get(shared, w))
            place = select(other > best, single(shared_get(shared, WARPS + w)), place)
            best = select(other > best, other, best)
            broken = broken + single(shared_get(shared, 2 * WARPS + w))
        synchronize()
        return best, place, broken

    return find


def threshold(each, by_mass):
    """``find(shared, logits, row, start, steps, count, best, sharpness, low, least, target)``.

    The largest rank at which tokens of at least this rank are ``target`` many, or if ``by_mass`` have that share of the
    mass; only those count that have a rank of ``low`` and a mass of ``least`` at least. Two bits in each walk.
    """
    read, numbers, decay, over_warp = (
        row_reader(each),
        local_array(each, SINGLE),
        real_functions(SINGLE).decay,
        lane_sum,
    )
    over_warp, zero, double = lane_sum(WARP), DOUBLE.type(0), DOUBLE.type

    @device
    def find(shared, logits, row, start, steps, count, best, sharpness, floor, least, target):
        values, warp = numbers(), thread_index() >> 5
        low, quarter = floor * 0 - (1 << 31), 1 << 30
        for turn in range(16):
            all_of_it, first, second, third = zero, zero, zero, zero
            for step in range(steps):
                at = start + step * WARP * each
                read(values, logits, row, at, count)
                for j in range(each):
                    rank, mass = rank_of(values[j]), decay(values[j] - best, sharpness)
                    own = select((rank >= floor) & (mass >= least) & (at + j < count), double(1), zero)
                    if by_mass:
                        own = own * double(mass)
                    all_of_it = all_of_it + own
                    first = first + select(rank >= low + quarter, own, zero)
                    second = second + select(rank >= low + 2 * quarter, own, zero)
                    third = third + select(rank >= low + 3 * quarter, own, zero)
            place = (turn & 1) * 4 * WARPS
            shared_set(shared, place + warp, over_warp(all_of_it))
            shared_set(shared, place + WARPS + warp, over_warp(first))
            shared_set(shared, place + 2 * WARPS + warp, over_warp(second))
            shared_set(shared, place + 3 * WARPS + warp, over_warp(third))
            synchronize()
            all_of_it, first, second, third = zero, zero, zero, zero
            for w in range(WARPS):
                all_of_it = all_of_it + shared_get(shared, place + w)
                first = first + shared_get(shared, place + WARPS + w)
                second = second + shared_get(shared, place + 2 * WARPS + w)
                third = third + shared_get(shared, place + 3 * WARPS + w)
            wanted = target
            if by_mass:
                wanted = target * all_of_it
            low = select(first >= wanted, low + quarter, low) + select(second >= wanted, quarter, 0)
            low = low + select(third >= wanted, quarter, 0)
            quarter = quarter >> 2
        synchronize()
        return low

    return find


def sample(each, drawn, top_k, top_p):
    """tokens[b] = the largest of row b, or one drawn by its probability if ``drawn``; -1 where a logit is NaN or inf.

    Row b draws with the number of its seed and its step, which then goes on.
    """
    find, kth, nucleus = largest(each), threshold(each, False), threshold(each, True)
    read, numbers, decay = row_reader(each), local_array(each, SINGLE), real_functions(SINGLE).decay
    rate, over_warp, memory = real_functions(SINGLE).rate, lane_sum(WARP), shared_array(8 * WARPS, DOUBLE)
    single, double, zero, none = SINGLE.type, DOUBLE.type, DOUBLE.type(0), DOUBLE.type(2**52)
    most = SINGLE.type(np.finfo(SINGLE).max)

    def kernel(logits, tokens, seeds, turns, vocabulary, count, inverse_temperature, k, p, min_p):
        await_previous()
        shared, values, b = memory(), numbers(), block_index() + thread_index() * 0
        row, warp, lane = b * vocabulary, thread_index() >> 5, thread_index() & (WARP - 1)
        steps = (count + THREADS * each - 1) // (THREADS * each)
        start = warp * steps * WARP * each + lane * each
        best, place, broken = find(shared, logits, row, start, steps, count)
        broken = (broken > 0) | (best > most) | (best < -most)
        chosen = double(place)
        first = select(thread_index() == 0, 1, 0)
        if drawn:
            best = select(broken, single(0), best)
            sharpness, least = rate(single(as_real(inverse_temperature))), single(as_real(min_p))
            floor = b * 0 - (1 << 31)
            if top_k:
                floor = kth(shared, logits, row, start, steps, count, best, sharpness, floor, single(0), double(k))
            if top_p:
                floor = nucleus(shared, logits, row, start, steps, count, best, sharpness, floor, least, as_real(p))
            own = zero
            for step in range(steps):
                at = start + step * WARP * each
                read(values, logits, row, at, count)
                for j in range(each):
                    mass = decay(values[j] - best, sharpness)
                    own = own + select((rank_of(values[j]) >= floor) & (mass >= least), double(mass), zero)
            shared_set(shared, warp, over_warp(own))
            synchronize()
            total, before = zero, zero
            for w in range(WARPS):
                before = select(warp == w, total, before)
                total = total + shared_get(shared, w)
            turn = read_integer(turns, b, 1)
            target, found = uniform(read_integer(seeds, b, 1), turn) * total, none
            for step in range(steps):
                at = start + step * WARP * each
                read(values, logits, row, at, count)
                own = zero
                for j in range(each):
                    mass = decay(values[j] - best, sharpness)
                    own = own + select((rank_of(values[j]) >= floor) & (mass >= least), double(mass), zero)
                up_to = own
                for level in range(5):
                    earlier = shuffle_up(up_to, 1 << level)
                    up_to = up_to + select(lane >= (1 << level), earlier, zero)
                here = before + (up_to - own)
                for j in range(each):
                    mass = decay(values[j] - best, sharpness)
                    kept = select((rank_of(values[j]) >= floor) & (mass >= least), double(mass), zero)
                    here = here + kept
                    passed = (kept > zero) & (here > target) & (double(at + j) < found)
                    found = select(passed, double(at + j), found)
                before = before + shuffle_from(up_to, WARP - 1)
            for level in range(5):
                other = shuffle_xor(found, 1 << level)
                found = select(other < found, other, found)
            shared_set(shared, WARPS + warp, found)
            synchronize()
            found = none
            for w in range(WARPS):
                other = shared_get(shared, WARPS + w)
                found = select(other < found, other, found)
            chosen = select(found < none, found, chosen)
            write_integer(turns, b, turn + 1, first)
        write_integer(tokens, b, np.int64(select(broken, double(-1), chosen)), first)

    return kernel, Shape(THREADS, 1)


def shipped():
    """Kernels that stand for all."""
    keys = ((4, False, False, False), (4, True, False, False), (1, True, True, True), (4, True, True, False))
    return [Kernel("sample", "sample", key) for key in keys]
