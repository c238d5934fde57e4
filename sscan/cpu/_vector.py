"""SIMD numbers for the CPU kernels: 16 channels side by side, real or complex, float32 or float64.

Numba has no vector type and LLVM's auto-vectoriser leaves a factor of two to three behind on a scan, so this file
adds two types to Numba. ``Vector`` is LLVM's ``<lanes x float>``; ``Complex`` is a pair of them. LLVM cuts either
into whatever registers the machine has (AVX-512, AVX2, NEON). Kernels then read like the equations: ``h = fma(a, h,
b)``.

Two widths occur. A *narrow* vector holds one value for each of 16 channels. A *wide* one holds ``states`` of them
after another (16 channels of state n, 16 of state n + 1, ...), enough to keep the arithmetic units busy; ``STATES``
says how many for each dtype. A complex number lies in scratch memory as its real vector followed by its imaginary
vector.

No fast-math flag is set anywhere: every operation rounds as IEEE 754 says, so results do not depend on the machine.
"""

import operator
import platform
from typing import Any

import ml_dtypes
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, overload, register_jitable, register_model

WIDTH = 16  # channels in a narrow vector

# Storage dtypes: run-time codes, so that one compiled kernel reads and writes all of those of its accumulation dtype.
FLOAT32, FLOAT16, BFLOAT16, FLOAT64 = range(4)
STORAGE = {
    np.dtype(np.float32): FLOAT32,
    np.dtype(np.float16): FLOAT16,
    np.dtype(ml_dtypes.bfloat16): BFLOAT16,
    np.dtype(np.float64): FLOAT64,
}

_MACHINE = platform.machine().lower()
_X86 = _MACHINE in ("x86_64", "amd64")
# Numba compiles for the host unless NUMBA_CPU_FEATURES or NUMBA_CPU_NAME says otherwise.
FEATURES = get_host_cpu_features() if numba.config.CPU_FEATURES is None else numba.config.CPU_FEATURES
_HALF_INSTRUCTIONS = "+f16c" in FEATURES or _MACHINE in ("aarch64", "arm64")
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_HALF, _FLOAT, _DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()


class Vector(types.Type):
    """``lanes`` values of the Numba type ``element`` (float32 or float64)."""

    def __init__(self, element: types.Float, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(f"Vector({element}, {lanes})")


class Complex(types.Type):
    """A real and an imaginary ``Vector``."""

    def __init__(self, part: Vector) -> None:
        self.part = part
        super().__init__(f"Complex({part})")


def _llvm_vector(element: types.Float, lanes: int) -> ir.VectorType:
    return ir.VectorType(_DOUBLE if element.bitwidth == 64 else _FLOAT, lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, frontend: Vector) -> None:
        super().__init__(manager, frontend, _llvm_vector(frontend.element, frontend.lanes))


@register_model(Complex)
class _ComplexModel(models.StructModel):
    def __init__(self, manager: Any, frontend: Complex) -> None:
        super().__init__(manager, frontend, [("re", frontend.part), ("im", frontend.part)])


# The same on every machine, since sums are formed in this order, although without AVX-512 the scan would be a tenth
# faster with half of it.
STATES = {types.float32: 4, types.float64: 2, types.complex64: 2, types.complex128: 1}


def _wide(dtype: Any) -> Any:
    """The wide type of a scratch dtype."""
    if isinstance(dtype, types.Complex):
        return Complex(Vector(dtype.underlying_float, WIDTH * STATES[dtype]))
    return Vector(dtype, WIDTH * STATES[dtype])


# --- arithmetic ------------------------------------------------------------------------------------------------------
# Values of either type are handled as (re, im) with im None for a real vector.


def _parts(context, builder, ty, value):
    if isinstance(ty, Complex):
        pair = cgutils.create_struct_proxy(ty)(context, builder, value)
        return pair.re, pair.im
    return value, None


def _value(context, builder, ty, re, im):
    if not isinstance(ty, Complex):
        return re
    pair = cgutils.create_struct_proxy(ty)(context, builder)
    pair.re, pair.im = re, im
    return pair._getvalue()


def _call(builder, name, ty, args):
    suffix = f"v{ty.count}f{64 if ty.element == _DOUBLE else 32}" if isinstance(ty, ir.VectorType) else ""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ty, [a.type for a in args]), f"llvm.{name}.{suffix}"
    )
    return builder.call(function, args)


def _fma(builder, x, y, z):
    return _call(builder, "fma", x.type, [x, y, z])


def _times(builder, x, y):
    """Product of two (re, im) pairs."""
    (xr, xi), (yr, yi) = x, y
    if xi is None and yi is None:
        return builder.fmul(xr, yr), None
    if yi is None:
        return builder.fmul(xr, yr), builder.fmul(xi, yr)
    if xi is None:
        return builder.fmul(xr, yr), builder.fmul(xr, yi)
    return (
        _fma(builder, xr, yr, builder.fneg(builder.fmul(xi, yi))),
        _fma(builder, xr, yi, builder.fmul(xi, yr)),
    )


def _times_plus(builder, x, y, z):
    """x y + z of three (re, im) pairs."""
    (xr, xi), (yr, yi), (zr, zi) = x, y, z
    re = _fma(builder, xr, yr, zr)
    if xi is None and yi is None:
        return re, zi
    if zi is None:
        zi = _constant(zr.type, 0.0)
    if yi is None:
        return re, _fma(builder, xi, yr, zi)
    if xi is None:
        return re, _fma(builder, xr, yi, zi)
    re = _fma(builder, builder.fneg(xi), yi, re)
    return re, _fma(builder, xr, yi, _fma(builder, xi, yr, zi))


def _common(*operands):
    """The result type of an operation: complex if any operand is; None if the shapes do not agree."""
    parts = [x.part if isinstance(x, Complex) else x for x in operands]
    if not all(isinstance(p, Vector) and p == parts[0] for p in parts):
        return None
    return next((x for x in operands if isinstance(x, Complex)), operands[0])


class _Binary(AbstractTemplate):
    def generic(self, args, kws):
        result = _common(*args) if len(args) == 2 else None
        return signature(result, *args) if result is not None else None


for _operator in (operator.add, operator.sub, operator.mul, operator.truediv):
    infer_global(_operator)(type(f"_{_operator.__name__}", (_Binary,), {"key": _operator}))


def _lower_binary(op, combine):
    for left, right in ((Vector, Vector), (Complex, Complex), (Complex, Vector), (Vector, Complex)):

        @lower_builtin(op, left, right)
        def lower(context, builder, sig, args):
            x, y = (_parts(context, builder, t, a) for t, a in zip(sig.args, args))
            return _value(context, builder, sig.return_type, *combine(builder, x, y))


def _plus(builder, x, y):
    return builder.fadd(x[0], y[0]), x[1] if y[1] is None else y[1] if x[1] is None else builder.fadd(x[1], y[1])


def _minus(builder, x, y):
    im = x[1] if y[1] is None else builder.fneg(y[1]) if x[1] is None else builder.fsub(x[1], y[1])
    return builder.fsub(x[0], y[0]), im


def _over(builder, x, y):
    if y[1] is None:
        return builder.fdiv(x[0], y[0]), x[1] if x[1] is None else builder.fdiv(x[1], y[0])
    norm = _fma(builder, y[0], y[0], builder.fmul(y[1], y[1]))
    re, im = _times(builder, x, (y[0], builder.fneg(y[1])))
    return builder.fdiv(re, norm), builder.fdiv(im, norm)


_lower_binary(operator.add, _plus)
_lower_binary(operator.sub, _minus)
_lower_binary(operator.mul, _times)
_lower_binary(operator.truediv, _over)


@intrinsic
def fma(typingctx, x, y, z):
    """x y + z, rounded once in each real multiply-add."""
    result = _common(x, y, z)

    def codegen(context, builder, sig, args):
        pairs = [_parts(context, builder, t, a) for t, a in zip(sig.args, args)]
        return _value(context, builder, result, *_times_plus(builder, *pairs))

    return result(x, y, z), codegen


@intrinsic
def conj(typingctx, x):
    """Complex conjugate; a real vector is its own."""

    def codegen(context, builder, sig, args):
        re, im = _parts(context, builder, x, args[0])
        return _value(context, builder, x, re, None if im is None else builder.fneg(im))

    return x(x), codegen


@intrinsic
def real(typingctx, x):
    def codegen(context, builder, sig, args):
        return _parts(context, builder, x, args[0])[0]

    return (x.part if isinstance(x, Complex) else x)(x), codegen


@intrinsic
def imag(typingctx, x):
    def codegen(context, builder, sig, args):
        re, im = _parts(context, builder, x, args[0])
        return ir.Constant(re.type, [0.0] * re.type.count) if im is None else im

    return (x.part if isinstance(x, Complex) else x)(x), codegen


@intrinsic
def complex_(typingctx, re, im):
    result = Complex(re)

    def codegen(context, builder, sig, args):
        return _value(context, builder, result, *args)

    return result(re, im), codegen


@intrinsic
def real_dot(typingctx, x, y, accumulator):
    """accumulator + sum over the wide vector's states of Re(conj(x) y); the accumulator is narrow."""

    def codegen(context, builder, sig, args):
        total = args[2]
        pairs = zip(_parts(context, builder, x, args[0]), _parts(context, builder, y, args[1]))
        for p, q in pairs:
            if p is not None:
                for k in range(p.type.count // WIDTH):
                    total = _fma(builder, _slice(builder, p, k, WIDTH), _slice(builder, q, k, WIDTH), total)
        return total

    return accumulator(x, y, accumulator), codegen


# --- shuffles and splats ---------------------------------------------------------------------------------------------


def _shuffle(builder, x, y, lanes):
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes)))


def _slice(builder, vector, k, lanes):
    """The k-th group of ``lanes`` lanes."""
    return _shuffle(builder, vector, ir.Constant(vector.type, ir.Undefined), range(k * lanes, (k + 1) * lanes))


def _splat(builder, ty, scalar):
    one = builder.insert_element(ir.Constant(ty, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return _shuffle(builder, one, ir.Constant(ty, ir.Undefined), [0] * ty.count)


def _concatenate(builder, vectors):
    while len(vectors) > 1:
        count = vectors[0].type.count
        vectors = [_shuffle(builder, a, b, range(2 * count)) for a, b in zip(vectors[::2], vectors[1::2])]
    return vectors[0]


@intrinsic
def splat(typingctx, x):
    """A scalar in all 16 lanes."""
    result = Vector(x, WIDTH)

    def codegen(context, builder, sig, args):
        return _splat(builder, _llvm_vector(x, WIDTH), args[0])

    return result(x), codegen


@intrinsic
def first(typingctx, x, count):
    """A narrow vector with zeros after its first ``count`` lanes."""

    def codegen(context, builder, sig, args):
        integers = ir.VectorType(_I64, WIDTH)
        inside = builder.icmp_signed("<", ir.Constant(integers, list(range(WIDTH))), _splat(builder, integers, args[1]))
        return builder.select(inside, args[0], _constant(args[0].type, 0.0))

    return x(x, types.intp), codegen


@intrinsic
def constant(typingctx, like, x):
    """The literal x in all lanes of a vector shaped like ``like`` (its real part, if complex)."""
    part = like.part if isinstance(like, Complex) else like

    def codegen(context, builder, sig, args):
        ty = _llvm_vector(part.element, part.lanes)
        return _splat(builder, ty, context.cast(builder, args[1], sig.args[1], part.element))

    return part(like, x), codegen


@intrinsic
def repeat(typingctx, x, like):
    """A narrow vector once for every state of the wide vector ``like``."""
    part = like.part if isinstance(like, Complex) else like

    def codegen(context, builder, sig, args):
        return _concatenate(builder, [args[0]] * (part.lanes // WIDTH))

    return part(x, like), codegen


# --- memory ----------------------------------------------------------------------------------------------------------


def _element_pointer(context, builder, array_type, array, offset, plane=0):
    """Address of element ``offset`` of a flat real array, or of the same count of real-imaginary planes."""
    data = context.make_array(array_type)(context, builder, array).data
    if isinstance(array_type.dtype, types.Complex):
        scalar = _DOUBLE if array_type.dtype.underlying_float.bitwidth == 64 else _FLOAT
        data = builder.bitcast(data, scalar.as_pointer())
        offset = builder.add(builder.mul(offset, ir.Constant(offset.type, 2)), ir.Constant(offset.type, plane))
    return builder.gep(data, [offset], inbounds=True)


def _piece_pointer(context, builder, array_type, array, offset, stride, row, lane=0):
    """Address of one lane of one of the rows that begin at ``offset`` and are ``stride`` apart."""
    index = builder.add(offset, builder.mul(stride, ir.Constant(_I64, row)))
    return _element_pointer(context, builder, array_type, array, builder.add(index, ir.Constant(_I64, lane)))


def _load(builder, pointer, ty):
    return builder.load(builder.bitcast(pointer, ty.as_pointer()), align=4 if ty.element == _FLOAT else 8)


def _store(builder, vector, pointer):
    ty = vector.type
    builder.store(vector, builder.bitcast(pointer, ty.as_pointer()), align=4 if ty.element == _FLOAT else 8)


@intrinsic
def load(typingctx, array, offset):
    """16 consecutive values of a flat real array."""
    result = Vector(array.dtype, WIDTH)

    def codegen(context, builder, sig, args):
        pointer = _element_pointer(context, builder, array, *args)
        return _load(builder, pointer, _llvm_vector(array.dtype, WIDTH))

    return result(array, types.intp), codegen


@intrinsic
def store(typingctx, array, offset, x):
    """Put a narrow vector at ``offset`` of a flat real array."""

    def codegen(context, builder, sig, args):
        _store(builder, args[2], _element_pointer(context, builder, array, args[0], args[1]))
        return context.get_dummy_value()

    return types.void(array, types.intp, x), codegen


@intrinsic
def load_wide(typingctx, array, offset):
    """The wide number at ``offset`` of flat scratch; its dtype says whether real or complex, and how wide."""
    result = _wide(array.dtype)
    part = result.part if isinstance(result, Complex) else result

    def codegen(context, builder, sig, args):
        ty = _llvm_vector(part.element, part.lanes)
        planes = 2 if isinstance(result, Complex) else 1
        values = [
            _load(builder, _element_pointer(context, builder, array, *args, plane=p * part.lanes), ty)
            for p in range(planes)
        ]
        return _value(context, builder, result, *(values + [None])[:2])

    return result(array, types.intp), codegen


@intrinsic
def store_wide(typingctx, array, offset, x):
    """The inverse of ``load_wide``."""

    def codegen(context, builder, sig, args):
        for p, vector in enumerate(_parts(context, builder, x, args[2])):
            if vector is not None:
                pointer = _element_pointer(context, builder, array, args[0], args[1], plane=p * vector.type.count)
                _store(builder, vector, pointer)
        return context.get_dummy_value()

    return types.void(array, types.intp, x), codegen


@intrinsic
def load_column(typingctx, array, offset, stride):
    """16 values of a flat real array, ``stride`` apart."""
    result = Vector(array.dtype, WIDTH)

    def codegen(context, builder, sig, args):
        value = ir.Constant(_llvm_vector(array.dtype, WIDTH), ir.Undefined)
        for k in range(WIDTH):
            pointer = _piece_pointer(context, builder, array, *args, k)
            value = builder.insert_element(value, builder.load(pointer), ir.Constant(_I32, k))
        return value

    return result(array, types.intp, types.intp), codegen


@intrinsic
def store_column(typingctx, array, offset, stride, x):
    """The inverse of ``load_column``."""

    def codegen(context, builder, sig, args):
        for k in range(WIDTH):
            pointer = _piece_pointer(context, builder, array, *args[:3], k)
            builder.store(builder.extract_element(args[3], ir.Constant(_I32, k)), pointer)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, x), codegen


@intrinsic
def spread(typingctx, array, offset, stride):
    """The scalars at ``offset, offset + stride, ...`` of a flat array, each in the 16 lanes of one state."""
    result = _wide(array.dtype)
    part = result.part if isinstance(result, Complex) else result

    def codegen(context, builder, sig, args):
        ty, planes = _llvm_vector(part.element, WIDTH), []
        for plane in range(2 if isinstance(result, Complex) else 1):
            vectors = []
            for k in range(part.lanes // WIDTH):
                index = builder.add(args[1], builder.mul(args[2], ir.Constant(args[2].type, k)))
                pointer = _element_pointer(context, builder, array, args[0], index, plane=plane)
                vectors.append(_splat(builder, ty, builder.load(pointer)))
            planes.append(_concatenate(builder, vectors))
        return _value(context, builder, result, *(planes + [None])[:2])

    return result(array, types.intp, types.intp), codegen


def states_per_step(array):
    """How many states a wide number of this scratch dtype holds; only inside compiled code."""
    raise NotImplementedError


@overload(states_per_step)
def _states_per_step(array):
    count = STATES[array.dtype]
    return lambda array: count


def reals(array):
    """A flat array's real numbers: itself, or its interleaved real and imaginary parts. Only inside compiled code."""
    raise NotImplementedError


@overload(reals)
def _reals(array):
    if not isinstance(array.dtype, types.Complex):
        return lambda array: array
    scalar = np.float64 if array.dtype == types.complex128 else np.float32
    return lambda array: array.view(scalar)


def lanes_of(array, state):
    """Where the 16 lanes of one state begin among ``reals`` of scratch laid out as wide numbers from state 0 up."""
    raise NotImplementedError


@overload(lanes_of)
def _lanes_of(array, state):
    if not isinstance(array.dtype, types.Complex):
        return lambda array, state: state * WIDTH
    count = STATES[array.dtype]
    return lambda array, state: (state // count * 2 * count + state % count) * WIDTH


def imaginary(array):
    """From a state's real lanes to its imaginary ones. Only inside compiled code."""
    raise NotImplementedError


@overload(imaginary)
def _imaginary(array):
    distance = STATES[array.dtype] * WIDTH if isinstance(array.dtype, types.Complex) else 0
    return lambda array: distance


def put(array, offset, state, lane, value):
    """Write one number where ``load_wide(array, offset + 16 state)`` finds it. Only inside compiled code."""
    raise NotImplementedError


def get(array, offset, state, lane):
    """The number that ``put`` wrote. Only inside compiled code."""
    raise NotImplementedError


@overload(put)
def _put(array, offset, state, lane, value):
    if not isinstance(array.dtype, types.Complex):

        def put_real(array, offset, state, lane, value):
            array[offset + state * WIDTH + lane] = value

        return put_real

    def put_complex(array, offset, state, lane, value):
        planes = reals(array)
        index = 2 * offset + lanes_of(array, state) + lane
        planes[index] = value.real
        planes[index + imaginary(array)] = value.imag

    return put_complex


@overload(get)
def _get(array, offset, state, lane):
    if not isinstance(array.dtype, types.Complex):
        return lambda array, offset, state, lane: array[offset + state * WIDTH + lane]

    def get_complex(array, offset, state, lane):
        planes = reals(array)
        index = 2 * offset + lanes_of(array, state) + lane
        return complex(planes[index], planes[index + imaginary(array)])

    return get_complex


@register_jitable
def scratch(count, dtype):
    """Uninitialised flat memory that starts on a cache line."""
    raw = np.empty(count + 64, dtype)
    start = (-raw.ctypes.data % 64) // raw.itemsize
    return raw[start : start + count]


@intrinsic
def borrowed(typingctx, array):
    """The same array, whose references nobody counts: threads that share it would wait for each other to do so.

    The one that it is made from has to outlive it.
    """

    def codegen(context, builder, sig, args):
        view = context.make_array(array)(context, builder, args[0])
        view.meminfo = ir.Constant(view.meminfo.type, None)
        return view._getvalue()

    return array(array), codegen


# --- arrays of the caller --------------------------------------------------------------------------------------------
# Kernels see a caller's array as an address, byte strides and a storage code (``View`` in _tiles.py).


def _at(builder, address):
    return builder.inttoptr(address, ir.IntType(8).as_pointer())


def _constant(ty, number):
    return ir.Constant(ty, [number] * ty.count)


def _stored_as(builder, pointer, code, element):
    """16 values that are stored in the dtype of ``code``, a Python number, in the accumulation type."""
    target = _llvm_vector(element, WIDTH)

    def fetch(ty):
        ty = ir.VectorType(ty, WIDTH)
        return builder.load(builder.bitcast(pointer, ty.as_pointer()), align=2)

    if code == BFLOAT16:
        integers = ir.VectorType(_I32, WIDTH)
        bits = builder.zext(fetch(_I16), integers)
        return builder.bitcast(builder.shl(bits, _constant(integers, 16)), target)
    if code == FLOAT16:
        return builder.fpext(fetch(_HALF), target) if _HALF_INSTRUCTIONS else _from_half(builder, fetch(_I16))
    return fetch(_DOUBLE if code == FLOAT64 else _FLOAT)


def _stored(builder, pointer, code, element):
    """16 stored values in the accumulation type: an LLVM switch over the storage codes."""
    if element.bitwidth == 64:
        return _stored_as(builder, pointer, FLOAT64, element)
    result = cgutils.alloca_once(builder, _llvm_vector(element, WIDTH))

    def fetch(code):
        return lambda: builder.store(_stored_as(builder, pointer, code, element), result)

    _switch(builder, code, {code: fetch(code) for code in (FLOAT32, FLOAT16, BFLOAT16)})
    return builder.load(result)


def _put_stored(builder, pointer, code, value, element):
    """The inverse of ``_stored``; rounds to nearest, ties to even."""

    def put_back(x):
        builder.store(x, builder.bitcast(pointer, x.type.as_pointer()), align=2)

    def bfloat16():
        integers = ir.VectorType(_I32, WIDTH)
        bits, half = builder.bitcast(value, integers), _constant(integers, 16)
        odd = builder.and_(builder.lshr(bits, half), _constant(integers, 1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, _constant(integers, 0x7FFF))), half)
        nan = builder.fcmp_unordered("uno", value, value)
        bits = builder.select(nan, _constant(integers, 0x7FC0), rounded)
        put_back(builder.trunc(bits, ir.VectorType(_I16, WIDTH)))

    def float16():
        if _HALF_INSTRUCTIONS:
            return builder.fptrunc(value, ir.VectorType(_HALF, WIDTH))
        return _to_half(builder, value)

    if element.bitwidth == 64:
        put_back(value)
        return
    _switch(
        builder,
        code,
        {
            FLOAT32: lambda: put_back(value),
            FLOAT16: lambda: put_back(float16()),
            BFLOAT16: bfloat16,
        },
    )


# Half precision in integer arithmetic: without instructions for it LLVM calls functions that are not there. A half
# number has 5 bits of exponent, with bias 15, and 10 of mantissa; a float32 8, with bias 127, and 23.


def _from_half(builder, bits):
    """float32 of 16 half numbers, given as integers."""
    integers, floats = ir.VectorType(_I32, WIDTH), ir.VectorType(_FLOAT, WIDTH)
    bits = builder.zext(bits, integers)
    sign = builder.shl(builder.and_(bits, _constant(integers, 0x8000)), _constant(integers, 16))
    size = builder.and_(bits, _constant(integers, 0x7FFF))
    normal = builder.add(builder.shl(size, _constant(integers, 13)), _constant(integers, (127 - 15) << 23))
    small = builder.bitcast(builder.fmul(builder.sitofp(size, floats), _constant(floats, 2.0**-24)), integers)
    endless = builder.or_(normal, _constant(integers, 0x7F800000))
    quiet = builder.or_(endless, _constant(integers, 1 << 22))
    result = builder.select(builder.icmp_unsigned("<", size, _constant(integers, 0x0400)), small, normal)
    result = builder.select(builder.icmp_unsigned("<", size, _constant(integers, 0x7C00)), result, endless)
    result = builder.select(builder.icmp_unsigned(">", size, _constant(integers, 0x7C00)), quiet, result)
    return builder.bitcast(builder.or_(result, sign), floats)


def _to_half(builder, value):
    """16 half numbers, as integers, of float32; rounded to nearest, ties to even."""
    integers, floats = ir.VectorType(_I32, WIDTH), value.type
    bits = builder.bitcast(value, integers)
    sign = builder.and_(builder.lshr(bits, _constant(integers, 16)), _constant(integers, 0x8000))
    size = builder.and_(bits, _constant(integers, 0x7FFFFFFF))
    # 2^16 and more become 2^16, which is infinity in half precision.
    within = builder.select(
        builder.icmp_unsigned("<", size, _constant(integers, 0x47800000)), size, _constant(integers, 0x47800000)
    )
    odd = builder.and_(builder.lshr(within, _constant(integers, 13)), _constant(integers, 1))
    rounding = builder.sub(builder.add(odd, _constant(integers, 0x0FFF)), _constant(integers, (127 - 15) << 23))
    normal = builder.lshr(builder.add(within, rounding), _constant(integers, 13))
    # The last bit of numbers from 1/2 on is 2^-24, that of a small half number: the addition rounds.
    half = _constant(floats, 0.5)
    small = builder.bitcast(builder.fadd(builder.bitcast(size, floats), half), integers)
    small = builder.sub(small, builder.bitcast(half, integers))
    result = builder.select(builder.icmp_unsigned("<", size, _constant(integers, 0x38800000)), small, normal)
    nan = builder.and_(builder.lshr(size, _constant(integers, 13)), _constant(integers, 0x03FF))
    nan = builder.or_(nan, _constant(integers, 0x7E00))
    result = builder.select(builder.icmp_unsigned(">", size, _constant(integers, 0x7F800000)), nan, result)
    return builder.trunc(builder.or_(result, sign), ir.VectorType(_I16, WIDTH))


def _switch(builder, code, cases):
    done = builder.append_basic_block("done")
    unknown = builder.append_basic_block("unknown")
    switch = builder.switch(code, unknown)
    for key, emit in cases.items():
        block = builder.append_basic_block(f"storage{key}")
        switch.add_case(ir.Constant(code.type, key), block)
        builder.position_at_end(block)
        emit()
        builder.branch(done)
    builder.position_at_end(unknown)
    builder.unreachable()
    builder.position_at_end(done)


def _bounce(builder):
    """Stack memory for 16 elements of any storage dtype, through which fewer than 16 are read and written."""
    memory = cgutils.alloca_once(builder, _I64, size=WIDTH)
    memory.align = 8 * WIDTH  # LLVM was seen to put a vector there too, which it expects on a border of its own size
    return builder.bitcast(memory, ir.IntType(8).as_pointer())


@intrinsic
def read(typingctx, like, address, count, item, storage):
    """``count`` <= 16 elements of ``item`` bytes, then zeros, as a vector like the narrow vector ``like``."""

    def codegen(context, builder, sig, args):
        _, address, count, item, storage = args
        buffer, pointer = _bounce(builder), cgutils.alloca_once(builder, ir.IntType(8).as_pointer())
        builder.store(_at(builder, address), pointer)
        with builder.if_then(builder.icmp_signed("<", count, ir.Constant(_I64, WIDTH)), likely=False):
            cgutils.memset(builder, buffer, ir.Constant(_I64, 8 * WIDTH), 0)
            cgutils.raw_memcpy(builder, buffer, _at(builder, address), count, item)
            builder.store(buffer, pointer)
        return _stored(builder, builder.load(pointer), storage, like.element)

    return like(like, *[types.intp] * 4), codegen


@intrinsic
def write(typingctx, address, count, item, storage, x):
    """Round the first ``count`` <= 16 lanes of a narrow vector to elements of ``item`` bytes, and store them."""

    def codegen(context, builder, sig, args):
        address, count, item, storage, value = args
        buffer, full = _bounce(builder), builder.icmp_signed("==", count, ir.Constant(_I64, WIDTH))
        pointer = builder.select(full, _at(builder, address), buffer)
        _put_stored(builder, pointer, storage, value, x.element)
        with builder.if_then(builder.not_(full), likely=False):
            cgutils.raw_memcpy(builder, _at(builder, address), buffer, count, item)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, x), codegen


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at an address; any address is allowed."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32]),
            "llvm.prefetch.p0",
        )
        builder.call(function, [pointer] + [ir.Constant(_I32, k) for k in (0, 3, 1)])  # read, keep, data
        return context.get_dummy_value()

    return types.void(types.intp), codegen


# --- transposition ---------------------------------------------------------------------------------------------------


# In squares of 256 bits by as many lanes, with shuffles that every processor does in one instruction, or in none: first
# halves of registers are joined, and what is left to do stays in 128 bits. LLVM finds no such way by itself.
SQUARE_BITS = 256


def _square(builder, rows):
    """The transpose of a square: as many vectors as they have lanes."""
    size, half = len(rows), len(rows) // 2
    low = [at + i for at in (0, half) for k in range(half // 2) for i in (k, size + k)]
    high = [i + half // 2 for i in low]
    columns = []
    for side in (0, half):
        joined = [side + k for k in range(half)] + [size + side + k for k in range(half)]
        part = [_shuffle(builder, rows[i], rows[i + half], joined) for i in range(half)]
        for _ in range(half.bit_length() - 1):  # each vector interleaved with the one half of them further on
            pairs = [(part[i], part[i + half // 2]) for i in range(half // 2)]
            part = [_shuffle(builder, *pair, lanes) for pair in pairs for lanes in (low, high)]
        columns += part
    return columns


@intrinsic
def transpose(typingctx, source, start, stride, destination, to, step):
    """destination[to + k step + r] = source[start + r stride + k] for r, k in 0..15.

    The destination may be the source itself, with the same stride; else they must not overlap.
    """

    def codegen(context, builder, sig, args):
        size = SQUARE_BITS // source.dtype.bitwidth
        piece = _llvm_vector(source.dtype, size)

        def transposed(row, lane):
            pointers = (_piece_pointer(context, builder, source, *args[:3], row + r, lane) for r in range(size))
            return _square(builder, [_load(builder, pointer, piece) for pointer in pointers])

        def put(row, lane, vectors):
            for k, vector in enumerate(vectors):
                _store(builder, vector, _piece_pointer(context, builder, destination, *args[3:], row + k, lane))

        for row in range(0, WIDTH, size):
            for lane in range(0, row + size, size):  # with the square across the diagonal, which may lie there
                here, across = transposed(row, lane), transposed(lane, row) if lane < row else None
                put(lane, row, here)
                if across:
                    put(row, lane, across)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, destination, types.intp, types.intp), codegen


@intrinsic
def lane_sums(typingctx, source, start, stride):
    """A vector whose k-th lane is the sum of the 16 lanes of the vector at ``start + k stride``, in a fixed order."""
    result = Vector(source.dtype, WIDTH)

    def codegen(context, builder, sig, args):
        size = SQUARE_BITS // source.dtype.bitwidth
        piece = _llvm_vector(source.dtype, size)

        def folded(row):
            """The lanes of one vector, added up to as many as a square has: first those 8 apart, then 4."""
            parts = [
                _load(builder, _piece_pointer(context, builder, source, *args, row, lane), piece)
                for lane in range(0, WIDTH, size)
            ]
            while len(parts) > 1:
                parts = _halves_added(builder, parts)
            return parts[0]

        sums = []
        for row in range(0, WIDTH, size):
            columns = _square(builder, [folded(row + r) for r in range(size)])
            while len(columns) > 1:
                columns = _halves_added(builder, columns)
            sums += columns
        return _concatenate(builder, sums)

    return result(source, types.intp, types.intp), codegen


def _halves_added(builder, vectors):
    half = len(vectors) // 2
    return [builder.fadd(vectors[k], vectors[k + half]) for k in range(half)]


# --- the floating-point environment ----------------------------------------------------------------------------------


@intrinsic
def flush_subnormals(typingctx):
    """Flush subnormal numbers to zero from here on; returns what ``restore_environment`` needs. x86 only, else nothing.

    A state that has decayed below 1e-38 costs over a hundred cycles an operation until it reaches zero. Kernels
    allocate before they call it: an error, for want of memory, would leave the thread so.
    """

    def codegen(context, builder, sig, args):
        if not _X86:
            return ir.Constant(_I32, 0)
        slot = cgutils.alloca_once(builder, _I32)
        _control_register(builder, "stmxcsr", slot)
        before = builder.load(slot)
        builder.store(builder.or_(before, ir.Constant(_I32, 0x8040)), slot)  # FTZ and DAZ
        _control_register(builder, "ldmxcsr", slot)
        return before

    return types.int32(), codegen


@intrinsic
def restore_environment(typingctx, before):
    def codegen(context, builder, sig, args):
        if _X86:
            slot = cgutils.alloca_once(builder, _I32)
            builder.store(args[0], slot)
            _control_register(builder, "ldmxcsr", slot)
        return context.get_dummy_value()

    return types.void(types.int32), codegen


def _control_register(builder, name, slot):
    pointer = ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [pointer]), f"llvm.x86.sse.{name}"
    )
    builder.call(function, [builder.bitcast(slot, pointer)])
