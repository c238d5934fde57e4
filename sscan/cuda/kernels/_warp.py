"""Scans and sums over the lanes of a warp, or of equal groups of its lanes."""

import functools

import numpy as np

from sscan.cuda._math import number_functions
from sscan.cuda._primitives import shuffle_up, shuffle_xor
from sscan.cuda._target import device

WARP = 32


@functools.cache
def zero_test(number):
    """``is_zero(x)`` for numbers of a dtype."""
    zero = number_functions(number).zero

    @device
    def real_is_zero(x):
        return x == zero

    @device
    def complex_is_zero(x):
        return (x.real == zero) & (x.imag == zero)

    return complex_is_zero if np.dtype(number).kind == "c" else real_is_zero


@functools.cache
def affine_map(number):
    """``follow(decay, value, state)`` = decay state + value; but value if the state is 0, whatever the decay."""
    f, is_zero = number_functions(number), zero_test(number)
    product, choose = f.product, f.choose

    @device
    def follow(decay, value, state):
        return choose(is_zero(state), value, product(decay, state) + value)

    return follow


@functools.cache
def affine_scan(number, lanes):
    """``scan(lane, decay, value)``: the maps h -> decay h + value of all lanes of a group up to this one, as one map.

    ``lane`` counts within the group of ``lanes`` lanes, a power of two. A decay of 0 stays 0 whatever comes later, as
    states do.
    """
    number = np.dtype(number)
    f, follow = number_functions(number), affine_map(number)
    choose, one, zero = f.choose, number.type(1), number.type(0)
    levels = lanes.bit_length() - 1

    @device
    def scan(lane, decay, value):
        for level in range(levels):
            distance = 1 << level
            inside = lane >= distance
            decay_before = choose(inside, shuffle_up(decay, distance), one)
            value_before = choose(inside, shuffle_up(value, distance), zero)
            value = follow(decay, value, value_before)
            decay = follow(decay, zero, decay_before)
        return decay, value

    return scan


@functools.cache
def lane_sum(lanes, stride=1):
    """``total(x)``: the sum over the ``lanes`` lanes that differ in one digit of their number, the same in all of them.

    The digit is of weight ``stride``; both are powers of two. The order of the sum is the same in every run.
    """
    levels, first = lanes.bit_length() - 1, stride.bit_length() - 1

    @device
    def total(x):
        for level in range(levels):
            x = x + shuffle_xor(x, 1 << (first + level))
        return x

    return total
