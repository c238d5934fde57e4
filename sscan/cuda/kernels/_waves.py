"""Tiles of the arrays along time, (batch, dim, length) in rows or columns: which part of a tile a thread has.

In *rows* time is contiguous, and a thread has quads of steps of a channel; in *columns* channels are neighbours, and it
has quads of channels of a step. Both come to shared memory as rows, one for each channel, from where lanes walk along
time. Columns come there in another order of channels, so that neighbouring threads, which have neighbouring channels,
meet in no memory bank.
"""

from types import SimpleNamespace

import numpy as np

from sscan.cuda._primitives import (
    local_array,
    select,
    shared_get,
    shared_reader,
    shared_set,
    shared_writer,
    shifted_reader,
    shifted_widener,
    shifted_writer,
    stored_array,
    stored_reader,
    widener,
    writer,
)
from sscan.cuda._target import device
from sscan.cuda._unroll import unroll

QUAD = 4


def wave_tile(v, storage, real, threads, channels, steps, row_size, keep=False, swizzled=False):
    """What a block of so many threads needs to read and write tiles of so many channels and steps.

    Each thread has ``count`` quads, which lie ``apart`` channels (in columns steps) from each other. In shared memory
    channels are ``row_size`` apart; if ``swizzled``, the quads of a row are in an order of its own, against bank
    conflicts of threads that read the same step of all channels. ``keep`` as for ``stored_reader``.
    """
    count, size = channels * steps // QUAD // threads, storage.itemsize
    columns, together = v.order == "columns", v.together
    shifted = storage.itemsize == 2 and not together and not columns
    follows = v.order == "rows"  # one channel another
    held = QUAD // 2 + 1 if shifted else QUAD  # of a quad in registers
    stored = local_array(count * held, np.int32) if shifted else stored_array(count * held, storage)
    read_stored = None if shifted else stored_reader(storage, QUAD, together, keep)
    read_shifted = shifted_reader(storage, QUAD) if shifted else None
    widen_stored = None if shifted else widener(storage, real, QUAD)
    widen_shifted = shifted_widener(storage, real, QUAD) if shifted else None
    write = shifted_writer(storage, real) if shifted else writer(storage, real, QUAD, together)
    groups = channels // QUAD if columns else steps // QUAD  # quads side by side in memory
    shift, mask, apart = groups.bit_length() - 1, groups - 1, threads // groups
    load_quad, store_quad = shared_reader(real, QUAD), shared_writer(real, QUAD)
    turned = (groups >> 1) & 3 if swizzled else 0

    @device
    def own(thread):
        """First channel and first step of the thread's first quad."""
        if columns:
            return (thread & mask) * QUAD, thread >> shift
        return thread >> shift, (thread & mask) * QUAD

    @device
    def start(channel, step, stride):
        """Index of that quad in an array whose channels (steps) lie ``stride`` apart."""
        return channel + step * stride if columns else channel * stride + step

    @device
    def at(first, p, t, stride):
        """Index of the p-th quad, t steps on."""
        return first + (p * apart + t) * stride if columns else first + p * apart * stride + t

    @device
    def address(array, batch, stride, place):
        """Where a part begins in an array whose batch rows lie ``batch`` apart."""
        return array + size * (place.row * batch + at(0, 0, place.begin, stride))

    @device
    def known(p, channel, channel_end, ahead):
        """How many elements of the p-th quad there are; ``ahead``: how many steps from the first one's first on."""
        if columns:
            return select(ahead > p * apart, channel_end - channel, 0 * channel)
        return select(channel + p * apart < channel_end, ahead, 0 * channel)

    @device
    def known_next(known, p, channel, channel_end, ahead):
        """How many there are of it in the next tile."""
        if columns:
            return select(ahead > p * apart + steps, channel_end - channel, 0 * channel)
        return known - steps

    @device
    def past(step, channel, begin):
        """How many steps are known to be in memory before one; ``begin``: where the part begins."""
        return step + select((begin > 0) | (follows & (channel > 0)), 1, 0 * channel)

    @device
    def read(into, p, address, index, known, before):
        """The p-th quad from an index on, as it lies in memory; ``before``: how many steps there are before it."""
        if shifted:
            read_shifted(into, p * held, address, index, known, before)
        else:
            read_stored(into, p * held, address, index, known)

    @device
    def widen(into, held_quads, p, address, first, stride):
        """The p-th quad as numbers; ``first``: the index of the first one, in any tile."""
        if shifted:
            widen_shifted(into, held_quads, p * held, address, at(first, p, 0, stride))
        else:
            widen_stored(into, held_quads, p * held)

    @device
    def inside(p, i, ahead):
        """Whether there is a step for element i of the p-th quad."""
        return ahead > (p * apart if columns else 0 if together else i)

    @device
    def parameter_of(p, i):
        """Which of the thread's parameters, of which it has ``parameters``, belongs to an element."""
        return i if columns else p

    @device
    def parameter_channel(k, channel):
        """The channel of a parameter."""
        return channel + k if columns else channel + k * apart

    @device
    def slot(channel, step):
        """Where the first quad goes in shared memory."""
        row = channel >> 2 if columns else channel
        if swizzled:
            return row * row_size + ((((row >> 1) ^ (step >> 2)) & 3) << 2) + (step & 3)
        return row * row_size + step

    @device
    def element(first, p, i):
        """Where element i of a quad of columns is: in the i-th of four sets of rows."""
        if swizzled:
            return (first ^ ((((i * turned) & 3) ^ (p * (apart >> 2))) << 2)) + i * groups * row_size
        return first + i * groups * row_size + p * apart

    @device
    def put(tile, first, p, values):
        if columns:
            for i in unroll(QUAD):
                shared_set(tile, element(first, p, i), values[i])
        else:
            store_quad(tile, first + p * apart * row_size, values)

    @device
    def get(values, tile, first, p):
        if columns:
            for i in unroll(QUAD):
                values[i] = shared_get(tile, element(first, p, i))
        else:
            load_quad(values, tile, first + p * apart * row_size)

    @device
    def channel_of(row):
        """The channel of a row of shared memory."""
        return ((row & mask) << 2) | (row >> shift) if columns else row

    return SimpleNamespace(
        count=count, parameters=QUAD if columns else count, own=own, start=start, at=at, address=address, known=known,
        known_next=known_next, inside=inside, parameter_of=parameter_of, parameter_channel=parameter_channel, slot=slot,
        put=put, get=get, channel_of=channel_of, past=past, stored=stored, read=read, widen=widen, write=write,
    )  # fmt: skip
