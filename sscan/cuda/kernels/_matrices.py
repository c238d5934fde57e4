"""Tiles of varying B and C: which part of a tile a thread reads, and how it comes to shared memory."""

from typing import Any, NamedTuple

import numpy as np

from sscan.cuda._math import number_functions
from sscan.cuda._primitives import (
    dtype_of,
    local_array,
    planes,
    select,
    shared_set,
    shared_writer,
    shifted_reader,
    shifted_widener,
    stored_array,
    stored_reader,
    widener,
)
from sscan.cuda._target import device
from sscan.cuda._unroll import unroll
from sscan.cuda.kernels._scan import BLOCK
from sscan.cuda.kernels._waves import QUAD


def matrix_tile(v, storage, conjugated, keep, tile, threads, step_size, quad_size, turned=0):
    """B or C on its way to shared memory: every thread has a few consecutive steps of one or more states of a tile.

    In columns it has a few consecutive states of one or more steps. ``make()`` is where ``read`` puts them, from
    ``start``, and ``stage`` takes them from there to [quad][step][state]. C is staged as 2 conj(C) if it is complex, of
    which both y and the gradient of the state are made. If ``turned``, a second copy follows the tile, in which states
    n and n ^ turned have changed places. ``stride`` is that from state to state, in columns from step to step.
    """
    number, columns = dtype_of(v.number), v.matrix_order == "columns"
    count = min(QUAD, tile * BLOCK // threads)  # of neighbours
    groups = (BLOCK if columns else tile) // count
    shift, mask, apart = groups.bit_length() - 1, groups - 1, threads // groups
    pieces = tile * BLOCK // threads // count  # ``apart`` states, in columns steps
    f, per_number, size = number_functions(number), planes(number), storage.itemsize
    reals = count * per_number
    shifted = storage.itemsize == 2 and per_number == 1 and not v.matrices_together and not columns
    held = reals // 2 + 1 if shifted else reals  # of a piece in registers
    make = local_array(pieces * held, np.int32) if shifted else stored_array(pieces * held, storage)
    read_stored = None if shifted else stored_reader(storage, reals, v.matrices_together, keep)
    read_shifted = shifted_reader(storage, reals) if shifted else None
    widen_stored = None if shifted else widener(storage, number, count)
    widen_shifted, numbers = shifted_widener(storage, number, reals) if shifted else None, local_array(count, number)
    store = shared_writer(number, count)
    conj, times, shares, copy = f.conj, f.times, f.shares, tile // QUAD * quad_size

    @device
    def address(array, at, begin, stride):
        """Where a part begins that begins with a step; ``at``: the index of its batch row and group."""
        return array + size * (at + begin * (stride if columns else per_number))

    @device
    def start(address, stride, thread):
        """Address of the thread's share of the first tile and block of states."""
        if columns:
            return address + size * ((thread & mask) * count + (thread >> shift) * stride)
        return address + size * ((thread >> shift) * stride + per_number * (thread & mask) * count)

    @device
    def read(into, address, n0, stride, state, t, steps, thread):
        """``steps`` from t on are there to be read."""
        for k in unroll(pieces):
            if columns:
                known = select(steps - k * apart > (thread >> shift), state - n0 - (thread & mask) * count, 0 * thread)
                read_stored(into, k * held, address, n0 + (t + k * apart) * stride, known)
            else:
                steps_known = per_number * (steps - (thread & mask) * count)
                known = select(n0 + k * apart + (thread >> shift) < state, steps_known, 0 * thread)
                at = (n0 + k * apart) * stride + per_number * t
                if shifted:
                    read_shifted(into, k * held, address, at, known, per_number * (t + (thread & mask) * count))
                else:
                    read_stored(into, k * held, address, at, known)

    @device
    def stage(tile, held_pieces, address, n0, stride, thread):
        values = numbers()
        for k in unroll(pieces):
            if shifted:
                widen_shifted(values, held_pieces, k * held, address, (n0 + k * apart) * stride)
            else:
                widen_stored(values, held_pieces, k * held)
            if columns:
                t = k * apart + (thread >> shift)
                at = (t >> 2) * quad_size + (t & 3) * step_size + (thread & mask) * count
                store(tile, at, values)
                for i in unroll(count if turned else 0):
                    shared_set(tile, copy + ((at + i) ^ turned), values[i])
            else:
                t = (thread & mask) * count
                at = (t >> 2) * quad_size + (t & 3) * step_size + k * apart + (thread >> shift)
                for i in unroll(count):
                    value = values[i]
                    if conjugated:
                        value = times(conj(value), shares)
                    shared_set(tile, at + i * step_size, value)
                    if turned:
                        shared_set(tile, copy + (at ^ turned) + i * step_size, value)

    return make, address, start, read, stage


class Matrices(NamedTuple):
    """One thing for each of B and C."""

    B: Any
    C: Any


def matrix_tiles(v, varying_B, varying_C, keep, *sizes):
    """``matrix_tile`` of B and of C, of which those that do not vary are left alone."""
    make_B, address_B, start_B, read_B, stage_B = matrix_tile(v, dtype_of(v.B or v.storage), False, keep, *sizes)
    make_C, address_C, start_C, read_C, stage_C = matrix_tile(v, dtype_of(v.C or v.storage), True, keep, *sizes)

    @device
    def make():
        return Matrices(make_B(), make_C())

    @device
    def address(B, C, batches, groups, strides, place):
        return Matrices(
            address_B(B, place.row * batches.B + place.group * groups.B, place.begin, strides.B),
            address_C(C, place.row * batches.C + place.group * groups.C, place.begin, strides.C),
        )

    @device
    def start(arrays, strides, thread):
        return Matrices(start_B(arrays.B, strides.B, thread), start_C(arrays.C, strides.C, thread))

    @device
    def read(into, arrays, strides, n0, state, t, steps, thread):
        if varying_B:
            read_B(into.B, arrays.B, n0, strides.B, state, t, steps, thread)
        if varying_C:
            read_C(into.C, arrays.C, n0, strides.C, state, t, steps, thread)

    @device
    def stage(tiles, held, arrays, strides, n0, thread):
        if varying_B:
            stage_B(tiles.B, held.B, arrays.B, n0, strides.B, thread)
        if varying_C:
            stage_C(tiles.C, held.C, arrays.C, n0, strides.C, thread)

    return make, address, start, read, stage
