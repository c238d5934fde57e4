"""Exponentials and what is built on them, for the vectors of ``_vector.py``.

Every function is branch-free and, unless it says otherwise, correct for every finite input and accurate to a few units
in the last place of its accumulation dtype (softplus and sigmoid lose one more for every eight units of x below zero);
tests/test_vector_math.py measures it. Polynomials are Chebyshev interpolants (near-minimax) of the
function named beside them, computed with 60 digits.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload, register_jitable

from sscan.cpu._vector import (
    _I32,
    FEATURES,
    Complex,
    _call,
    _common,
    _concatenate,
    _fma,
    _parts,
    _slice,
    _times_plus,
    _value,
    complex_,
    constant,
    fma,
    imag,
    real,
)

LOG2_E = math.log2(math.e)
_AVX512 = "+avx512dq" in FEATURES


def _literal(ty, element, number):
    """A number in all lanes, rounded to the element type."""
    return ir.Constant(ty, [float(np.float32(number)) if element.bitwidth == 32 else number] * ty.count)


def _element(x):
    return (x.part if isinstance(x, Complex) else x).element


def _polynomial(single, double):
    """An intrinsic that evaluates one of two coefficient lists, lowest degree first, by Horner's rule."""

    @intrinsic
    def evaluate(typingctx, x):
        element = _element(x)

        def codegen(context, builder, sig, args):
            value = _parts(context, builder, x, args[0])
            ty = value[0].type
            terms = [(_literal(ty, element, c), None) for c in (double if element.bitwidth == 64 else single)]
            total = terms[-1]
            for term in terms[-2::-1]:
                total = _times_plus(builder, total, value, term)
            if isinstance(x, Complex) and total[1] is None:
                total = total[0], ir.Constant(ty, [0.0] * ty.count)
            return _value(context, builder, x, *total)

        return x(x), codegen

    return evaluate


def _clamp(single, double):
    """An intrinsic that raises a real vector to at least one of two bounds; NaN passes."""

    @intrinsic
    def limit(typingctx, x):
        def codegen(context, builder, sig, args):
            low = _literal(args[0].type, x.element, double if x.element.bitwidth == 64 else single)
            return builder.select(builder.fcmp_ordered("<", args[0], low), low, args[0])

        return x(x), codegen

    return limit


# (2^r - 1) / r on [-1/2, 1/2]; in float32 with the first coefficient fixed, so that slow decays keep their rate
_exp2_minus_one_over = _polynomial(
    (
        0.6931471824645996, 0.24022647738456726, 0.05550359934568405, 0.009618505835533142, 0.0013390806270763278,
        0.00015326471475418657,
    ),
    (
        0.6931471805599453, 0.24022650695910072, 0.055504108664821625, 0.00961812910762848, 0.001333355814640647,
        0.00015403530393370734, 1.5252733841556773e-05, 1.3215486808705563e-06, 1.0178057087733941e-07,
        7.0548973041554995e-09, 4.4558179083360645e-10, 2.5729324177362305e-11,
    ),
)  # fmt: skip
# atanh(s) / s as a function of s^2 on [0, 1/9]
_atanh_over = _polynomial(
    (),
    (
        1.0, 0.3333333333333334, 0.19999999999996435, 0.14285714286311463, 0.11111111059551837, 0.09090911711247626,
        0.07692223530229984, 0.06668438407871918, 0.05857637334055213, 0.05488308318973747, 0.03490195249166216,
        0.08244142965694784,
    ),
)  # fmt: skip
# log1p(e) / e on [0, 1]
_log1p_over = _polynomial(
    (
        1.0, -0.49999892648, 0.33329710499, -0.24951616263, 0.19663274257, -0.15269667074, 0.10543623795,
        -0.05637361283, 0.019542527261, -0.0031760570184,
    ),
    (),
)  # fmt: skip
# sin(r / 2) / r and (cos(r / 2) - 1) / r^2 as functions of r^2 on [0, pi^2]
_half_sine_over = _polynomial(
    (0.5, -0.020833333270709464, 0.00026041659265119014, -1.5500671847990015e-06, 5.376016917e-09, -1.16641017521e-11),
    (
        0.5, -0.020833333333333332, 0.00026041666666666666, -1.5500992063491928e-06, 5.382288910925867e-09,
        -1.22324747942227e-11, 1.9603324223375436e-14, -2.3337181496086197e-17, 2.1440216609983525e-20,
        -1.522499880621639e-23,
    ),
)  # fmt: skip
_half_cosine_less_one_over = _polynomial(
    (-0.125, 0.002604166208187576, -2.1701017097630956e-05, 9.677549409e-08, -2.567996605e-10),
    (
        -0.125, 0.0026041666666666665, -2.170138888888889e-05, 9.688120039682509e-08, -2.6911444554653505e-10,
        5.096864498226977e-13, -7.001187322664207e-16, 7.292878562937026e-19, -5.956092164179213e-22,
        3.8164614144531184e-25,
    ),
)  # fmt: skip
# (z exp(z) - exp(z) + 1) / z^2 = sum z^k / (k! (k + 2)), for |z| < 1
_psi_series = _polynomial(
    tuple(1 / (math.factorial(k) * (k + 2)) for k in range(11)),
    tuple(1 / (math.factorial(k) * (k + 2)) for k in range(19)),
)

_at_least = _clamp(-88.0, -709.0)  # exp of less is 0


@intrinsic
def _nearest(typingctx, x):
    """(x - k, k, s) for the integer k nearest to x; ``_scale`` turns s into a factor 2^k.

    AVX-512 has instructions for the remainder and for the factor: s is k. Elsewhere, adding 1.5 * 2^23 leaves no room
    for a fraction and puts k, limited to [-127, 128] and biased by 127, into the low bits of the sum, which is s.
    """

    def codegen(context, builder, sig, args):
        value, ty = args[0], args[0].type
        if _AVX512:
            rest = _avx512(builder, "reduce", value, ir.Constant(_I32, 8))  # 8: to nearest, no exceptions
            k = s = builder.fsub(value, rest)
        else:
            mantissa, bias, _ = _float_format(x.element)
            low, high = (ir.Constant(ty, [b] * ty.count) for b in (-float(bias), bias + 1.0))
            value = builder.select(builder.fcmp_ordered("<", value, low), low, value)
            value = builder.select(builder.fcmp_ordered(">", value, high), high, value)
            shift = ir.Constant(ty, [1.5 * 2.0**mantissa + bias] * ty.count)
            s = builder.fadd(value, shift)
            k = builder.fsub(s, shift)
            rest = builder.fsub(value, k)
        return context.make_tuple(builder, sig.return_type, [rest, k, s])

    return types.UniTuple(x, 3)(x), codegen


@intrinsic
def _scale(typingctx, x, s):
    """x 2^k, 0 or infinite where 2^k leaves the exponent range."""

    def codegen(context, builder, sig, args):
        value, ty = args[0], args[0].type
        if _AVX512:
            return _avx512(builder, "scalef", value, args[1])
        mantissa, _, bits = _float_format(x.element)
        integers = ir.VectorType(ir.IntType(bits), ty.count)
        exponent = builder.shl(builder.bitcast(args[1], integers), ir.Constant(integers, [mantissa] * ty.count))
        return builder.fmul(value, builder.bitcast(exponent, ty))

    return x(x, x), codegen


def _float_format(element):
    """Bits of mantissa, exponent bias, bits in all."""
    return (52, 1023, 64) if element.bitwidth == 64 else (23, 127, 32)


def _avx512(builder, name, x, operand):
    """An AVX-512 instruction with a vector and a vector or immediate operand, 64 bytes at a time."""
    double = x.type.element == ir.DoubleType()
    lanes, kind = (8, "pd") if double else (16, "ps")
    register, mask = ir.VectorType(x.type.element, lanes), ir.IntType(lanes)
    immediate = isinstance(operand.type, ir.IntType)
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(register, [register, operand.type if immediate else register, register, mask, _I32]),
        f"llvm.x86.avx512.mask.{name}.{kind}.512",
    )
    unmasked = ir.Constant(register, ir.Undefined), ir.Constant(mask, -1), ir.Constant(_I32, 4)
    pieces = [
        builder.call(
            function,
            [_slice(builder, x, i, lanes), operand if immediate else _slice(builder, operand, i, lanes), *unmasked],
        )
        for i in range(x.type.count // lanes)
    ]
    return _concatenate(builder, pieces)


@intrinsic
def _reduced_angle(typingctx, angle):
    """The angle less the nearest multiple of 2 pi, in [-pi, pi] whatever it is (meaningful up to about 1e6)."""
    turn = 2 * math.pi
    high, low = (turn, 2.4492935982947064e-16) if angle.element.bitwidth == 64 else (np.float32(turn), -1.7484556e-07)

    def codegen(context, builder, sig, args):
        ty = args[0].type
        turns = _call(builder, "rint", ty, [builder.fmul(args[0], _literal(ty, angle.element, 1 / turn))])
        minus = builder.fneg(turns)
        r = _fma(builder, minus, _literal(ty, angle.element, float(high)), args[0])
        r = _fma(builder, minus, _literal(ty, angle.element, low), r)
        limit = _literal(ty, angle.element, math.pi)
        r = builder.select(builder.fcmp_ordered(">", r, limit), limit, r)
        return builder.select(builder.fcmp_ordered("<", r, builder.fneg(limit)), builder.fneg(limit), r)

    return angle(angle), codegen


@intrinsic
def minus_absolute(typingctx, x):
    def codegen(context, builder, sig, args):
        return builder.fneg(_call(builder, "fabs", args[0].type, [args[0]]))

    return x(x), codegen


@intrinsic
def where_negative(typingctx, x, then, otherwise):
    """Lane by lane ``then`` where x < 0, else ``otherwise``; a NaN counts as not negative."""
    kind = _common(then, otherwise)

    def codegen(context, builder, sig, args):
        negative = builder.fcmp_ordered("<", args[0], ir.Constant(args[0].type, [0.0] * args[0].type.count))
        pairs = zip(*(_parts(context, builder, kind, a) for a in args[1:]))
        return _value(context, builder, kind, *(p if p is None else builder.select(negative, p, q) for p, q in pairs))

    return kind(x, then, otherwise), codegen


@register_jitable
def exp_nonpositive(x):
    """exp(x) of a real vector with x <= 0."""
    x = _at_least(x)
    _, k, s = _nearest(x * constant(x, LOG2_E))
    r = fma(x, constant(x, LOG2_E), constant(x, 0.0) - k)  # without the product's rounding error
    return _scale(fma(r, _exp2_minus_one_over(r), constant(x, 1.0)), s)


def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)) of a real vector. Only inside compiled code."""
    raise NotImplementedError


@register_jitable
def sigmoid(x):
    """1 / (1 + exp(-x)) of a real vector, without overflow on either side."""
    one, e = constant(x, 1.0), exp_nonpositive(minus_absolute(x))
    larger = one / (e + one)
    return where_negative(x, e * larger, larger)


@overload(softplus)
def _softplus(x):
    def single(x):
        zero = constant(x, 0.0)
        e = exp_nonpositive(minus_absolute(x))
        return fma(e, _log1p_over(e), where_negative(x, zero, x))

    def double(x):
        zero = constant(x, 0.0)
        e = exp_nonpositive(minus_absolute(x))
        s = e / (e + constant(x, 2.0))  # log1p(e) = 2 atanh(e / (2 + e))
        return fma(s + s, _atanh_over(s * s), where_negative(x, zero, x))

    return double if x.element.bitwidth == 64 else single


def rate(A):
    """A scaled for ``decay``: its real part times log2(e). Only inside compiled code."""
    raise NotImplementedError


@overload(rate)
def _rate(A):
    if isinstance(A, types.Complex):
        return lambda A: complex(rate(A.real), A.imag)
    most = 1e307 if A.bitwidth == 64 else 2e38  # times log2(e) it would overflow, and infinity times 0 is no decay
    return lambda A: A * LOG2_E if abs(A) < most else A + 0.0


def decay(delta, rate):
    """exp(delta A) from a real vector delta and ``rate(A)``; exactly 1 where delta is 0. Only inside compiled code."""
    raise NotImplementedError


def decay_and_change(delta, rate):
    """(exp(delta A), exp(delta A) - 1), the second without cancellation. Only inside compiled code.

    NaN instead of infinity where the exponential overflows.
    """
    raise NotImplementedError


@overload(decay)
def _decay(delta, rate):
    if isinstance(rate, Complex):
        return lambda delta, rate: decay_and_change(delta, rate)[0]

    def decay_real(delta, rate):
        r, _, s = _nearest(delta * rate)
        return _scale(fma(r, _exp2_minus_one_over(r), constant(r, 1.0)), s)

    return decay_real


@overload(decay_and_change)
def _decay_and_change(delta, rate):
    if isinstance(rate, Complex):

        def complex_decay(delta, rate):
            magnitude, change = decay_and_change(delta, real(rate))
            r = _reduced_angle(delta * imag(rate))
            square = r * r
            sine = r * _half_sine_over(square)
            cosine = fma(square, _half_cosine_less_one_over(square), constant(r, 1.0))
            lost = magnitude * (sine * sine + sine * sine)  # magnitude (1 - cos r)
            im = magnitude * (sine * cosine + sine * cosine)
            return complex_(magnitude - lost, im), complex_(change - lost, im)

        return complex_decay

    def real_decay(delta, rate):
        r, _, s = _nearest(delta * rate)
        power, rest = _scale(constant(r, 1.0), s), r * _exp2_minus_one_over(r)
        return fma(power, rest, power), fma(power, rest, power - constant(r, 1.0))

    return real_decay


def psi(z, a, change):
    """(z exp(z) - (exp(z) - 1)) / z^2 from z, a = exp(z) and change = exp(z) - 1. Only inside compiled code."""
    raise NotImplementedError


@overload(psi)
def _psi(z, a, change):
    def psi_real(z, a, change):
        return where_negative(z * z - constant(z, 1.0), _psi_series(z), (z * a - change) / (z * z))

    def psi_complex(z, a, change):
        near = real(z) * real(z) + imag(z) * imag(z) - constant(z, 1.0)
        return where_negative(near, _psi_series(z), (z * a - change) / z / z)  # z^2 may overflow to infinity - infinity

    return psi_complex if isinstance(z, Complex) else psi_real
