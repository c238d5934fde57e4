"""Scalar mathematics of the kernels, one set of device functions for each type of number.

float32 uses the GPU's exp2 and reciprocal (1 to 2 ulp); float64 and the angles of complex numbers use polynomials:
Chebyshev interpolants of the functions named beside them, computed with 60 digits.
"""

import functools
import math
from types import SimpleNamespace

import numpy as np

from sscan.cuda._primitives import (
    absolute,
    complex_number,
    exp2_approx,
    fma,
    maximum,
    nearest,
    power_of_two,
    real_of,
    reciprocal_approx,
    select,
)
from sscan.cuda._target import device

# (2^r - 1) / r on [-1/2, 1/2]
EXP2_MINUS_ONE_OVER = {
    4: (
        0.6931471824645996, 0.24022647738456726, 0.05550359934568405, 0.009618505835533142, 0.0013390806270763278,
        0.00015326471475418657,
    ),
    8: (
        0.6931471805599453, 0.24022650695910072, 0.055504108664821625, 0.00961812910762848, 0.001333355814640647,
        0.00015403530393370734, 1.5252733841556773e-05, 1.3215486808705563e-06, 1.0178057087733941e-07,
        7.0548973041554995e-09, 4.4558179083360645e-10, 2.5729324177362305e-11,
    ),
}  # fmt: skip
# log1p(e) / e on [0, 1], of the least relative error: 3e-8
LOG1P_OVER = (
    1.0, -0.49999647963, 0.33321322618, -0.24857163668, 0.19153654942, -0.13753802344, 0.079204535594, -0.030065792303,
    0.005364824332,
)  # fmt: skip
# atanh(s) / s as a function of s^2 on [0, 1/9]
ATANH_OVER = (
    1.0, 0.3333333333333334, 0.19999999999996435, 0.14285714286311463, 0.11111111059551837, 0.09090911711247626,
    0.07692223530229984, 0.06668438407871918, 0.05857637334055213, 0.05488308318973747, 0.03490195249166216,
    0.08244142965694784,
)  # fmt: skip
# sin(r / 2) / r and (cos(r / 2) - 1) / r^2 as functions of r^2 on [0, pi^2]
HALF_SINE_OVER = {
    4: (0.5, -0.020833333270709464, 0.00026041659265119014, -1.5500671847990015e-06, 5.376016917e-09,
        -1.16641017521e-11),
    8: (
        0.5, -0.020833333333333332, 0.00026041666666666666, -1.5500992063491928e-06, 5.382288910925867e-09,
        -1.22324747942227e-11, 1.9603324223375436e-14, -2.3337181496086197e-17, 2.1440216609983525e-20,
        -1.522499880621639e-23,
    ),
}  # fmt: skip
HALF_COSINE_LESS_ONE_OVER = {
    4: (-0.125, 0.002604166208187576, -2.1701017097630956e-05, 9.677549409e-08, -2.567996605e-10),
    8: (
        -0.125, 0.0026041666666666665, -2.170138888888889e-05, 9.688120039682509e-08, -2.6911444554653505e-10,
        5.096864498226977e-13, -7.001187322664207e-16, 7.292878562937026e-19, -5.956092164179213e-22,
        3.8164614144531184e-25,
    ),
}  # fmt: skip
# (z exp(z) - exp(z) + 1) / z^2 = sum z^k / (k! (k + 2)), for |z| < 1
PSI_SERIES = {
    size: tuple(1 / (math.factorial(k) * (k + 2)) for k in range(terms)) for size, terms in ((4, 11), (8, 19))
}
TURN = {4: (float(np.float32(2 * math.pi)), -1.7484556e-07), 8: (2 * math.pi, 2.4492935982947064e-16)}


def polynomial(real, coefficients):
    """Device function: a polynomial of one real, lowest degree first, by Horner's rule."""
    falling = tuple(real.type(c) for c in reversed(coefficients))
    count = len(falling)

    @device
    def evaluate(x):
        total = falling[0]
        for k in range(1, count):
            total = fma(total, x, falling[k])
        return total

    return evaluate


@functools.cache
def real_functions(real):
    """Device functions of reals of a dtype: softplus, sigmoid, inverse, rate, decay, decay_and_change, psi, ..."""
    real = np.dtype(real)
    f = SimpleNamespace(zero=real.type(0), one=real.type(1))
    _elementary(real, f)
    _scaled_exponentials(real, f)
    one = f.one
    series = polynomial(real, PSI_SERIES[real.itemsize])

    @device
    def psi(z, a, change):
        """(z exp(z) - (exp(z) - 1)) / z^2 from z, a = exp(z) and change = exp(z) - 1."""
        near = z * z < one
        safe = select(near, one, z)
        return select(near, series(z), (z * a - change) / (safe * safe))

    f.psi = psi
    f.conj = device(lambda x: x)
    f.real_part = device(lambda x: x)
    f.times = device(lambda x, r: x * r)
    f.product = device(lambda x, y: x * y)
    f.overlap = device(lambda x, y: x * y)
    f.overlap_with_rate = device(lambda rate, x: rate * x)  # log(2) times it is the overlap of A and x
    ln2 = real.type(math.log(2))
    f.of_rate = device(lambda rate: rate * ln2)  # A again
    f.nonzero = _nonzero(real)
    f.choose = select
    f.shares = real.type(1)
    return f


def _elementary(real, f):
    """inverse, softplus and sigmoid."""
    zero, one, two = f.zero, f.one, real.type(2)
    log2_e = real.type(math.log2(math.e))
    if real == np.float32:
        log1p_over = polynomial(real, LOG1P_OVER)

        @device
        def exp_minus_absolute(x):
            return exp2_approx(-absolute(x) * log2_e)

        @device
        def softplus(x):
            e = exp_minus_absolute(x)
            return fma(e, log1p_over(e), maximum(x, zero))

        @device
        def sigmoid(x):
            return reciprocal_approx(one + exp2_approx(-x * log2_e))

        f.inverse = reciprocal_approx
    else:
        exp2_minus_one_over = polynomial(real, EXP2_MINUS_ONE_OVER[8])
        atanh_over = polynomial(real, ATANH_OVER)
        least = real.type(-700)

        @device
        def exp_minus_absolute(x):
            x = maximum(-absolute(x), least)
            k = nearest(x * log2_e)
            r = fma(x, log2_e, -k)
            return fma(r, exp2_minus_one_over(r), one) * power_of_two(k)

        @device
        def softplus(x):
            e = exp_minus_absolute(x)
            s = e / (e + two)  # log1p(e) = 2 atanh(e / (2 + e))
            return fma(s + s, atanh_over(s * s), maximum(x, zero))

        @device
        def sigmoid(x):
            e = exp_minus_absolute(x)
            return select(x < zero, e, one) / (one + e)

        f.inverse = device(lambda x: one / x)
    f.softplus, f.sigmoid = softplus, sigmoid


def _scaled_exponentials(real, f):
    """rate(A), with which decay(delta, rate) = exp(delta A) and decay_and_change = (that, that - 1) are computed."""
    one, single = f.one, real == np.float32
    log2_e, most = real.type(math.log2(math.e)), real.type(2e38 if single else 1e307)
    low, high = (real.type(-126), real.type(127)) if single else (real.type(-1022), real.type(1023))
    exp2_minus_one_over = polynomial(real, EXP2_MINUS_ONE_OVER[real.itemsize])

    @device
    def rate(A):
        return select(absolute(A) < most, A * log2_e, A)  # infinity times a step of 0 would be no decay

    @device
    def decay_and_change(delta, rate):
        x = delta * rate
        k = nearest(select(x < low, low, select(x > high, high, x)))
        r = select(x < low, f_zero, x - k)
        power = select(x < low, f_zero, power_of_two(k))
        rest = r * exp2_minus_one_over(r)
        return fma(power, rest, power), fma(power, rest, power - one)

    f_zero = f.zero
    if single:
        # exp2_approx is too small on average, on an H200 by 5e-9 to 1e-8 within 2^-8 of an exponent of 0 and by 2e-8
        # from there to -1/2, which would add up along slow decays. This much more in the exponent leaves less than
        # 1.4e-8, of either sign, and still gives 1 for a step of 0.
        bias = real.type(2e-8)

        @device
        def decay(delta, rate):
            return exp2_approx(fma(delta, rate, bias))
    else:

        @device
        def decay(delta, rate):
            return decay_and_change(delta, rate)[0]

    f.rate, f.decay, f.decay_and_change = rate, decay, decay_and_change


def _nonzero(real):
    tiny = real.type(1e-100 if real.itemsize == 8 else 1e-15)  # its square is a number too

    @device
    def nonzero(A):
        """A, or a number too small to matter where that is nearer to zero."""
        return select(absolute(A) < tiny, tiny, A)

    return nonzero


@functools.cache
def number_functions(number):
    """Device functions of numbers of a dtype, which for a real one are those of ``real_functions``."""
    number = np.dtype(number)
    f = real_functions(real_of(number))
    return f if number.kind != "c" else _complex_functions(f, real_of(number))


def _complex_functions(of_real, real):
    f = SimpleNamespace(**vars(of_real))
    zero, one, real_rate, real_decay_and_change = f.zero, f.one, f.rate, f.decay_and_change
    real_decay, tiny_or_more, real_of_rate = f.decay, f.nonzero, f.of_rate
    half_sine_over = polynomial(real, HALF_SINE_OVER[real.itemsize])
    half_cosine_less_one_over = polynomial(real, HALF_COSINE_LESS_ONE_OVER[real.itemsize])
    turn, turn_low = (real.type(x) for x in TURN[real.itemsize])
    log2_e = real.type(math.log2(math.e))
    turns_each, limit = real.type(1 / (2 * math.pi)), real.type(math.pi)

    @device
    def half_angle(angle):
        """Sine and cosine of half the angle less its whole turns."""
        turns = nearest(angle * turns_each)
        r = fma(-turns, turn_low, fma(-turns, turn, angle))
        r = select(r > limit, limit, select(r < -limit, -limit, r))
        square = r * r
        return r * half_sine_over(square), fma(square, half_cosine_less_one_over(square), one)

    @device
    def rate(A):
        return complex_number(real_rate(A.real), A.imag)

    @device
    def decay(delta, rate):
        magnitude = real_decay(delta, rate.real)
        sine, cosine = half_angle(delta * rate.imag)
        lost, im = magnitude * (sine * sine + sine * sine), magnitude * (sine * cosine + sine * cosine)
        return complex_number(magnitude - lost, im)

    @device
    def decay_and_change(delta, rate):
        magnitude, change = real_decay_and_change(delta, rate.real)
        sine, cosine = half_angle(delta * rate.imag)
        lost, im = magnitude * (sine * sine + sine * sine), magnitude * (sine * cosine + sine * cosine)
        return complex_number(magnitude - lost, im), complex_number(change - lost, im)

    @device
    def product(x, y):
        return complex_number(x.real * y.real - x.imag * y.imag, x.real * y.imag + x.imag * y.real)

    @device
    def inverse(x):
        scale = one / (x.real * x.real + x.imag * x.imag)
        return complex_number(x.real * scale, -x.imag * scale)

    @device
    def choose(condition, x, y):
        return complex_number(select(condition, x.real, y.real), select(condition, x.imag, y.imag))

    @device
    def nonzero(A):
        size = absolute(A.real) + absolute(A.imag)
        return choose(tiny_or_more(size) == size, A, complex_number(tiny_or_more(zero), zero))

    series = tuple(real.type(c) for c in reversed(PSI_SERIES[real.itemsize]))
    terms = len(series)

    @device
    def psi(z, a, change):
        near = z.real * z.real + z.imag * z.imag < one
        total = complex_number(series[0], zero * z.real)
        for k in range(1, terms):
            total = product(total, z)
            total = complex_number(total.real + series[k], total.imag)
        safe = inverse(choose(near, complex_number(one + zero * z.real, zero * z.real), z))
        far = product(product(product(z, a) - change, safe), safe)
        return choose(near, total, far)

    f.rate, f.decay, f.decay_and_change, f.psi = rate, decay, decay_and_change, psi
    f.product, f.inverse, f.choose, f.nonzero = product, inverse, choose, nonzero
    f.conj = device(lambda x: complex_number(x.real, -x.imag))
    f.real_part = device(lambda x: x.real)
    f.times = device(lambda x, r: complex_number(x.real * r, x.imag * r))
    f.overlap = device(lambda x, y: x.real * y.real + x.imag * y.imag)  # Re(conj(x) y)
    f.overlap_with_rate = device(lambda rate, x: rate.real * x.real + rate.imag * x.imag * log2_e)
    f.of_rate = device(lambda rate: complex_number(real_of_rate(rate.real), rate.imag))
    f.shares = real.type(2)  # a state stands for itself and its conjugate
    return f
