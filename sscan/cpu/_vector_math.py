"""Exponentials and what is built on them, for the vectors of ``_vector.py``.

Every function is branch-free, correct for every finite input and accurate to a few units in the last place of its
accumulation dtype; tests/test_vector_math.py measures it. Polynomials are Chebyshev interpolants (near-minimax) of the
function named beside them, computed with 60 digits.
"""

import math

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload, register_jitable

from sscan.cpu._vector import (
    _I32,
    Complex,
    _call,
    _common,
    _concatenate,
    _fma,
    _llvm_vector,
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
_AVX512 = bool(llvm.get_host_cpu_features().get("avx512dq"))


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
    (0.6931471824645996, 0.24022282660007477, 0.05550558492541313, 0.009669659659266472, 0.0013300515711307526),
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
# log1p(e) / e and 1 / (1 + e) on [0, 1]: in float32 ten multiply-adds cost half of a division
_log1p_over = _polynomial(
    (
        1.0, -0.49999892648, 0.33329710499, -0.24951616263, 0.19663274257, -0.15269667074, 0.10543623795,
        -0.05637361283, 0.019542527261, -0.0031760570184,
    ),
    (),
)  # fmt: skip
_reciprocal = _polynomial(
    (
        0.99999995579, -0.99999111388, 0.99969933072, -0.99596450626, 0.97168814729, -0.88105640712, 0.67507517948,
        -0.38534334279, 0.13907128161, -0.023178546935,
    ),
    (),
)  # fmt: skip
# sin(pi r) / r as a function of r^2 on [0, 1/4]
_sin_over = _polynomial(
    (3.1415927410, -5.1677126884, 2.5501632690, -0.59925216436, 0.082050353289, -0.0070283040400),
    (
        3.141592653589793, -5.16771278004997, 2.5501640398773455, -0.5992645293207869, 0.08214588661099356,
        -0.007370430943702136, 0.0004663027874593273, -2.1915250301851375e-05, 7.94853903737232e-07,
        -2.228371216069697e-08,
    ),
)  # fmt: skip
# cos(pi r) / (1 - 4 r^2) as a function of r^2 on [0, 1/4]
_cos_over = _polynomial(
    (1.0, -0.9348021997, 0.3195032840, -0.05724878378, 0.006327418759, -0.0004568714690),
    (
        1.0, -0.9348022005446793, 0.319503324238051, -0.05724947190238539, 0.0063327427493461135,
        -0.00047592039253877, 2.5892738310339097e-05, -1.067145403663655e-06, 3.446077157566583e-08,
        -8.727391982828253e-10,
    ),
)  # fmt: skip
# (z exp(z) - exp(z) + 1) / z^2 = sum z^k / (k! (k + 2)), for |z| < 1/2
_psi_series = _polynomial(
    tuple(1 / (math.factorial(k) * (k + 2)) for k in range(9)),
    tuple(1 / (math.factorial(k) * (k + 2)) for k in range(16)),
)

_at_least = _clamp(-88.0, -709.0)  # exp of less is 0


@intrinsic
def _nearest(typingctx, x):
    """(x - k, k, s) for the integer k nearest to x; ``_scale`` turns s into a factor 2^k.

    AVX-512 has instructions for the remainder and for the factor: s is k. Elsewhere, adding 1.5 * 2^23 leaves no room for a
    fraction and puts k, limited to [-127, 128] and biased by 127, into the low bits of the sum, which is s.
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
def _round(typingctx, x):
    """Nearest integer of a real vector of any size."""

    def codegen(context, builder, sig, args):
        return _call(builder, "rint", args[0].type, [args[0]])

    return x(x), codegen


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


def sigmoid(x):
    """1 / (1 + exp(-x)) of a real vector, without overflow on either side. Only inside compiled code."""
    raise NotImplementedError


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


@overload(sigmoid)
def _sigmoid(x):
    def single(x):
        e = exp_nonpositive(minus_absolute(x))
        larger = _reciprocal(e)
        return where_negative(x, e * larger, larger)

    def double(x):
        e = exp_nonpositive(minus_absolute(x))
        larger = constant(x, 1.0) / (e + constant(x, 1.0))
        return where_negative(x, e * larger, larger)

    return double if x.element.bitwidth == 64 else single


def rate(A):
    """A scaled for ``decay``: A log2(e); a complex A's imaginary part in turns of 2 pi. Only inside compiled code."""
    raise NotImplementedError


@overload(rate)
def _rate(A):
    if isinstance(A, types.Complex):
        turns = 1 / (2 * math.pi)
        return lambda A: complex(A.real * LOG2_E, A.imag * turns)
    return lambda A: A * LOG2_E


def decay(delta, rate):
    """exp(delta A) from a real vector delta and ``rate(A)``; exactly 1 where delta is 0. Only inside compiled code."""
    raise NotImplementedError


def decay_and_change(delta, rate):
    """(exp(delta A), exp(delta A) - 1), the second without cancellation. Only inside compiled code."""
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
            turns = delta * imag(rate)
            r = turns - _round(turns)
            square = r * r
            one = constant(r, 1.0)
            sine = r * _sin_over(square)  # of half the angle
            cosine = fma(square, constant(r, -4.0), one) * _cos_over(square)
            lost = magnitude * (sine * sine + sine * sine)  # magnitude (1 - cos of the angle)
            im = magnitude * (sine * cosine + sine * cosine)
            return complex_(magnitude - lost, im), complex_(change - lost, im)

        return complex_decay

    def real_decay(delta, rate):
        r, _, s = _nearest(delta * rate)
        power, rest = _scale(constant(r, 1.0), s), r * _exp2_minus_one_over(r)
        return fma(power, rest, power), fma(power, rest, power - constant(r, 1.0))

    return real_decay


@register_jitable
def psi(z, a, change):
    """(z exp(z) - (exp(z) - 1)) / z^2 from z, a = exp(z) and change = exp(z) - 1; real or complex."""
    closed = (z * a - change) / (z * z)
    near = real(z) * real(z) + imag(z) * imag(z) - constant(z, 0.25)
    return where_negative(near, _psi_series(z), closed)
