"""What the kernels of the selective scan have in common: their specialisations, who is who in a block, and a step.

Four lanes are a channel, a warp is 8 channels, a block has one, two or four warps. A lane has up to four states of its
channel; a block of 16 states is walked at a time. Time comes in tiles, of which four steps are a quad.

Parameters of the kernels are integers: addresses (0 where there is no array), sizes, and strides in stored reals.

    u delta z dy                            inputs along time
    y du ddelta dz                          results along time
    A B C D delta_bias delta_softplus       parameters of channels and states, B and C along time too
    initial_state last_state                states around the segments, (segments, dim, state)
    dlast_state dinitial_state              their gradients
    checkpoints                             states at every 16th step, (checkpoints, dim, padded states)
    carried                                 states, and what is summed for each, between tiles of many blocks of states
    part_ends part_starts part_sums         carries of parts, (parts, dim, padded states), and sums of step sizes
    matrix_sums                             dB and dC of each block of channels, (step, matrix, padded states)
    A_sums B_sums C_sums D_sums bias_sums   gradients of each part
    seq_idx cu_seqlens                      what is packed into rows
    dim state length                        sizes of the problem
    channel_blocks blocks_of_group          blocks of channels, in all and of a group
    channels_of_group                       channels that share B and C
    parts launched_parts part_length        parts of a segment, those of this launch, and their steps
    sequences state_blocks                  how many are packed, and blocks of states
    *_batch                                 from one batch row to the next
    B_group C_group                         from one group of B and C to the next
    *_stride                                from one channel, in columns step, to the next; of B and C, state or step
"""

from typing import Any, NamedTuple

from sscan.cuda._math import number_functions
from sscan.cuda._primitives import (
    block_index,
    dtype_of,
    local_array,
    quotient,
    reader,
    real_of,
    select,
    shared_set,
    shuffle_xor,
    writer,
)
from sscan.cuda._target import device
from sscan.cuda._unroll import unroll
from sscan.cuda.kernels._segments import part_of, read_integer, segment
from sscan.cuda.kernels._waves import QUAD

LANES = 4  # of a channel
WARP_CHANNELS = 32 // LANES
BLOCK = 16  # states that B and C are staged for at a time
CHECKPOINT = 16  # steps between checkpoints; x >> 4 is x // CHECKPOINT


class Variant(NamedTuple):
    """What the kernels are specialised for. dtypes by name."""

    storage: str  # of the inputs along time
    number: str  # of A and the states
    B: str  # storage of its reals; "" if it is constant
    C: str
    zoh: bool
    gated: bool  # whether there is a z
    order: str  # of the arrays along time: "rows" whose channels lie ``length`` apart, "spread" rows, or "columns"
    together: bool  # whether four steps, in columns four channels, can be read by one instruction
    matrix_order: str  # of varying B and C: "rows", or "columns" whose states are neighbours
    matrices_together: bool
    states: int  # of a lane: 1, 2 or 4
    many: bool  # whether there is more than one block of states
    resets: bool  # whether there is a seq_idx

    @property
    def dtype(self):
        """The dtype of A and the states."""
        return dtype_of(self.number)

    @property
    def real(self):
        """The real dtype of their parts."""
        return real_of(self.dtype)

    @property
    def varying_B(self):
        return self.B != ""

    @property
    def varying_C(self):
        return self.C != ""

    @property
    def matrices(self):
        """How many of B and C vary."""
        return self.varying_B + self.varying_C

    @property
    def spread(self):
        """Whether kernels are told how far apart channels, in columns steps, are."""
        return self.order != "rows"

    @property
    def heavy(self):
        """Whether exponentials are polynomials: NVVM leaves loops over them as they are, even short ones."""
        return self.zoh or self.number != "float32"


# --- where a block is, and who a thread is ---------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a block is: its channels, and the part of a segment that it walks along."""

    block: Any  # of channels, its number
    group: Any
    channel: Any  # its first
    channel_end: Any  # the one after the last of its group
    number: Any  # of the part, among all
    part: Any  # its number in the segment
    parts: Any  # of the segment
    segment: Any
    row: Any  # of the batch
    begin: Any  # the part's first step in the row
    steps: Any
    checkpoint: Any  # number of its first one


def places(channels, without_first=False, without_last=False):
    """``place(...)`` of a block of so many channels.

    ``without_first``, ``without_last``: fewer than all parts may be launched, all but the first or the last of each
    row. Of packed sequences that one is then launched, but has no steps.
    """

    @device
    def place(
        channel_blocks, blocks_of_group, channels_of_group, parts, launched_parts, part_length, length, sequences,
        cu_seqlens,
    ):  # fmt: skip
        number = quotient(block_index(), channel_blocks)
        block = block_index() - number * channel_blocks
        group = quotient(block, blocks_of_group)
        channel = group * channels_of_group + (block - group * blocks_of_group) * channels
        not_launched = parts - launched_parts if without_first else 0
        if cu_seqlens != 0:
            number += not_launched
        which, part, parts_here, number = part_of(
            number, parts, launched_parts, length, part_length, sequences, cu_seqlens
        )
        row, begin, steps = segment(which, length, cu_seqlens)
        checkpoint = first_checkpoint(which, begin, length, cu_seqlens)
        if cu_seqlens == 0:
            part, number = part + not_launched, number + not_launched
        elif (without_first and part == 0) or (without_last and part >= parts_here - 1):
            steps = 0
        first = min(part * part_length, steps)
        return Place(
            block, group, channel, (group + 1) * channels_of_group, number, part, parts_here, which, row,
            begin + first, min(part_length, steps - first), checkpoint + (first >> 4),
        )  # fmt: skip

    return place


@device
def first_checkpoint(number, begin, length, cu_seqlens):
    """Number of a segment's first checkpoint: rows have all that fit, packed sequences one more than needed each."""
    if cu_seqlens == 0:
        return number * ((length + CHECKPOINT - 1) >> 4)
    return (begin >> 4) + number


class Sizes(NamedTuple):
    """Sizes of the problem that several stages need."""

    dim: Any
    state: Any
    blocks: Any  # of states
    padded: Any  # states of a channel in memory that the kernels lay out


class Row(NamedTuple):
    """The states of a block of states that a lane has of a channel."""

    channel: Any
    n: Any  # the first of them
    at: Any  # index of that in A
    valid: Any  # how many there are in A, and in states that are given
    alive: Any  # and in memory that the kernels lay out: all or none


# Shared memory serves eight neighbouring threads at a time, twice as fast if they ask for two pieces of 16 bytes as if
# for four. So the lanes of a channel are counted by the first and the fourth bit of a thread's number, not by the first
# two: eight neighbours then read two pieces of B, and two of C.


@device
def lane_of(thread):
    """Which of the lanes of its channel a thread is."""
    return (thread & 1) | ((thread >> 2) & 2)


@device
def row_of(thread):
    """Which channel of the block a thread has states of."""
    return ((thread >> 1) & 3) | ((thread >> 2) & -4)


@device
def lane_total(x):
    """The sum over the lanes of a channel, in all of them."""
    x = x + shuffle_xor(x, 1)
    return x + shuffle_xor(x, 8)


@device
def across(values, upper, odd):
    """Sum four values over the four lanes of a channel; lane g gets the sum of value g."""
    sent, kept = select(upper, values[0], values[2]), select(upper, values[2], values[0])
    x = kept + shuffle_xor(sent, 8)
    sent, kept = select(upper, values[1], values[3]), select(upper, values[3], values[1])
    y = kept + shuffle_xor(sent, 8)
    return select(odd, y, x) + shuffle_xor(select(odd, x, y), 1)


# --- along time -------------------------------------------------------------------------------------------------------


class Quads(NamedTuple):
    """The quads of a tile that a thread reads and writes along time."""

    channel: Any  # of the first
    step: Any
    slot: Any  # where that is in shared memory


def quads_of_tile(v, waves):
    """``quads_at``: a thread's quads of the first tile. ``parameters_of``: what their channels have of an array."""
    own, slot, parameters, parameter_channel = waves.own, waves.slot, waves.parameters, waves.parameter_channel
    of_channels, (read_real, _) = local_array(parameters, v.real), reals_of_channels(v.real)

    @device
    def quads_at(thread, place):
        channel, step = own(thread)
        return Quads(place.channel + channel, step, slot(channel, step))

    @device
    def parameters_of(address, quads, place):
        values = of_channels()
        for k in unroll(parameters):
            values[k] = read_real(address, parameter_channel(k, quads.channel), place.channel_end)
        return values

    return quads_at, parameters_of


def step_sizes(v, waves, heavy):
    """``sized``: the step sizes of a quad from its delta, 0 past the end of the part: nothing moves there."""
    f, inside, parameter_of = number_functions(v.dtype), waves.inside, waves.parameter_of
    softplus, zero = f.softplus, f.zero

    @device
    def sized(d, bias, p, ahead, delta_softplus):
        for i in unroll(QUAD, heavy):
            size = d[i] + bias[parameter_of(p, i)]
            if delta_softplus != 0:
                size = softplus(size)
            d[i] = select(inside(p, i, ahead), size, zero)

    return sized


# --- a channel's parameters -------------------------------------------------------------------------------------------


def reals_of_channels(real):
    """``read_real(address, index, end)``: 0 if there is no such array, or the index is past it. ``write_real``."""
    one_real, read_one, write_one = local_array(1, real), reader(real, real, 1, False, False), writer(real, real, 1)
    zero = real.type(0)

    @device
    def read_real(address, index, end):
        value = one_real()
        value[0] = zero
        if address != 0:
            read_one(value, address, index, end - index)
        return value[0]

    @device
    def write_real(address, index, number, valid):
        value = one_real()
        value[0] = number
        write_one(address, index, value, valid)

    return read_real, write_real


def rates_of_states(number, states, zoh):
    """``read_rates(rate, per_A, A, index, valid)``: A as ``decay`` takes it and, for zero-order hold, 1 / A."""
    f, read_numbers = number_functions(number), reader(real_of(number), number, states)
    nonzero, inverse, rate_of, choose = f.nonzero, f.inverse, f.rate, f.choose
    padding = number.type(-1)  # for states that are not there: an infinite step makes 0 of them, and times 0 it is NaN

    @device
    def read_rates(rate, per_A, A, index, valid):
        read_numbers(rate, A, index, valid)
        for j in range(states):
            value = rate[j]
            if zoh:
                value = choose(j < valid, nonzero(value), padding)
                per_A[j] = inverse(value)
            rate[j] = rate_of(value)

    return read_rates


# --- a step -----------------------------------------------------------------------------------------------------------


def sequence_markers(v, tile):
    """``mark_sequences``: to ``keep`` in shared memory, [step], 0 where a new sequence starts in a tile, else 1.

    It is a factor of the decay: what is left of the state before. A thread has one step.
    """
    resets, zero, one = v.resets, v.real.type(0), v.real.type(1)

    @device
    def mark_sequences(keep, seq_idx, place, length, t, thread):
        if resets:
            i = thread & (tile - 1)
            step, row, known = place.begin + t + i, place.row * length, select(i < place.steps - t, 1, 0 * thread)
            here = read_integer(seq_idx, row + step, known)
            before = read_integer(seq_idx, row + step - 1, select(step > 0, known, 0 * thread))
            shared_set(keep, i, select((here == before) | (step == 0), one, zero))

    return mark_sequences


def steps_of_state(v):
    """``step(size, x, rate, per_A, B, keep)``: the decay a, and what is added, of h = a h + B_bar u.

    x is delta u, under zero-order hold u.
    """
    f, zoh, resets = number_functions(v.dtype), v.zoh, v.resets
    decay, decay_and_change, product, times = f.decay, f.decay_and_change, f.product, f.times

    @device
    def step(size, x, rate, per_A, B, keep):
        added = times(B, x)
        if zoh:
            a, change = decay_and_change(size, rate)
            added = product(product(change, per_A), added)
        else:
            a = decay(size, rate)
        if resets:
            a = times(a, keep)
        return a, added

    return step
