"""Named instructions: what kernels do with memory, lanes and numbers beyond plain Python arithmetic.

Kernels are written for threads in lockstep: control flow depends on compile-time constants, kernel arguments and the
block only, and whatever depends on the thread goes through ``select`` and predicated reads and writes. So the same
bodies run on a GPU, one thread at a time, and in ``sscan.testing``, all threads of a block as one NumPy vector; its
emulator has a twin for every name that ``primitive`` registers here.

Addresses are int64, indices count elements and are int64 too. Numbers are float32, float64, complex64 or complex128;
storage is float64, float32, float16 or bfloat16, and holds complex numbers as interleaved real and imaginary parts.
"""

from typing import Any

import ml_dtypes
import numpy as np
from llvmlite import ir

from sscan.cuda._launch import AWAIT_PREVIOUS, BEFORE_SM_90, FROM_SM_90
from sscan.cuda._target import cgutils, intrinsic, types

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PRIMITIVES: dict[Any, tuple] = {}  # intrinsic -> (name, parameters), for the emulator

_I1, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
_F32, _F64 = ir.FloatType(), ir.DoubleType()
_REALS = {np.dtype(np.float32): (types.float32, _F32), np.dtype(np.float64): (types.float64, _F64)}
_INTEGERS = {np.dtype(np.int32): types.int32}
_COMPLEX = {np.dtype(np.complex64): types.complex64, np.dtype(np.complex128): types.complex128}


def primitive(name, *parameters):
    """Register an intrinsic under a name and the parameters that its factory was called with."""

    def register(function):
        made = intrinsic(function)
        PRIMITIVES[made] = (name, parameters)
        return made

    return register


def dtype_of(name):
    """The dtype of a name, "bfloat16" included."""
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def planes(number):
    """Reals in a number: 2 for complex ones."""
    return 2 if np.dtype(number).kind == "c" else 1


def real_of(number):
    """The real dtype of a number's parts."""
    return np.dtype(number).type(0).real.dtype


def _number_type(number):
    number = np.dtype(number)
    if number in _INTEGERS:
        return _INTEGERS[number]
    return _COMPLEX[number] if number.kind == "c" else _REALS[number][0]


def _assembly(builder, text, constraints, result, arguments, volatile=False):
    kind = ir.FunctionType(result, [x.type for x in arguments])
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=volatile), arguments)


# --- numbers ---------------------------------------------------------------------------------------------------------


def _unary(name, text):
    """A float32 instruction of one operand."""

    @primitive(name)
    def instruction(typingctx, x):
        def codegen(context, builder, sig, args):
            return _assembly(builder, text, "=f,f", _F32, args)

        return types.float32(types.float32), codegen

    return instruction


exp2_approx = _unary("exp2_approx", "ex2.approx.ftz.f32 $0, $1;")  # 2 ulp; exact for 0; subnormals are 0
reciprocal_approx = _unary("reciprocal_approx", "rcp.approx.ftz.f32 $0, $1;")  # 1 ulp


@primitive("select")
def select(typingctx, condition, x, y):
    """x where the condition holds, else y, without a branch."""
    if x != y:
        return None

    def codegen(context, builder, sig, args):
        condition = args[0] if args[0].type == _I1 else builder.trunc(args[0], _I1)
        return builder.select(condition, args[1], args[2])

    return x(types.boolean, x, y), codegen


@primitive("fma")
def fma(typingctx, x, y, z):
    """x y + z, rounded once."""

    def codegen(context, builder, sig, args):
        return builder.fma(*args)

    return x(x, x, x), codegen


def _real_instruction(name, operands):
    """A PTX instruction of float32 or float64 operands."""

    def codegen(context, builder, sig, args):
        double = args[0].type == _F64
        names = ", ".join(f"${i}" for i in range(1 + operands))
        constraints = ",".join((["=d", "d"] if double else ["=f", "f"])[min(i, 1)] for i in range(1 + operands))
        return _assembly(builder, f"{name}.f{64 if double else 32} {names};", constraints, args[0].type, args)

    return codegen


@primitive("absolute")
def absolute(typingctx, x):
    return x(x), _real_instruction("abs", 1)


@primitive("maximum")
def maximum(typingctx, x, y):
    return x(x, x), _real_instruction("max", 2)


@primitive("nearest")
def nearest(typingctx, x):
    """The integer nearest to x, as a number of x's type."""
    return x(x), _real_instruction(f"cvt.rni.f{x.bitwidth}", 1)


@primitive("square_root")
def square_root(typingctx, x):
    """Rounded to nearest."""
    return x(x), _real_instruction("sqrt.rn", 1)


@primitive("power_of_two")
def power_of_two(typingctx, k):
    """2^k for an integral k within the range of normal numbers."""

    def codegen(context, builder, sig, args):
        double = args[0].type == _F64
        integer, mantissa, bias = (_I64, 52, 1023) if double else (_I32, 23, 127)
        exponent = builder.add(builder.fptosi(args[0], integer), ir.Constant(integer, bias))
        return builder.bitcast(builder.shl(exponent, ir.Constant(integer, mantissa)), args[0].type)

    return k(k), codegen


@primitive("quotient")
def quotient(typingctx, x, y):
    """x // y of integers in [0, 2^32): a fraction of what a division of int64 takes."""

    def codegen(context, builder, sig, args):
        narrow = [builder.trunc(a, _I32) for a in args]
        return builder.zext(builder.udiv(*narrow), _I64)

    return types.int64(types.int64, types.int64), codegen


@primitive("complex_number")
def complex_number(typingctx, re, im):
    kind = types.complex128 if re == types.float64 else types.complex64

    def codegen(context, builder, sig, args):
        z = context.make_complex(builder, kind)
        z.real, z.imag = args
        return z._getvalue()

    return kind(re, im), codegen


@primitive("rank_of")
def rank_of(typingctx, x):
    """The place of a float32 among all of them, within 32 bits: in the order of the numbers."""

    def codegen(context, builder, sig, args):
        word = builder.bitcast(args[0], _I32)
        negative = builder.icmp_signed("<", word, ir.Constant(_I32, 0))
        return builder.sext(builder.select(negative, builder.xor(word, ir.Constant(_I32, 0x7FFFFFFF)), word), _I64)

    return types.int64(types.float32), codegen


@primitive("anew")
def anew(typingctx, x):
    """x; but what is computed from it is computed here, and no register keeps it from an earlier use of x."""

    def codegen(context, builder, sig, args):
        return _assembly(builder, "mov.b64 $0, $1;", "=l,l", _I64, args, volatile=True)

    return types.int64(types.int64), codegen


@primitive("as_real")
def as_real(typingctx, bits):
    """The float64 whose bits a kernel argument is."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], _F64)

    return types.float64(types.int64), codegen


# --- threads and barriers --------------------------------------------------------------------------------------------


def _special_register(name, register):
    @primitive(name)
    def index(typingctx):
        def codegen(context, builder, sig, args):
            kind = ir.FunctionType(_I32, [])
            function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.nvvm.read.ptx.sreg.{register}")
            return builder.zext(builder.call(function, []), _I64)

        return types.int64(), codegen

    return index


thread_index = _special_register("thread_index", "tid.x")
block_index = _special_register("block_index", "ctaid.x")


def _barrier(name, function, *arguments):
    @primitive(name)
    def wait(typingctx):
        def codegen(context, builder, sig, args):
            kind = ir.FunctionType(ir.VoidType(), [_I32] * len(arguments))
            barrier = cgutils.get_or_insert_function(builder.module, kind, function)
            builder.call(barrier, [ir.Constant(_I32, n) for n in arguments])
            return context.get_dummy_value()

        return types.void(), codegen

    return wait


synchronize = _barrier("synchronize", "llvm.nvvm.barrier0")  # all threads of the block
synchronize_warp = _barrier("synchronize_warp", "llvm.nvvm.bar.warp.sync", 0xFFFFFFFF)


def _barrier_of_warp(text):
    """A barrier that all 32 lanes come to together, as PTX."""

    def codegen(context, builder, sig, args):
        barrier = ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), text, "~{memory}", side_effect=True)
        builder.call(barrier, [], attrs=("convergent",))
        return context.get_dummy_value()

    return codegen


@primitive("converge")
def converge(typingctx):
    """Nothing has to be waited for, but warps are together, which ptxas should know. Later GPUs do without.

    For GPUs before sm_90 it takes a warp in a loop for divergent unless there is an aligned barrier in the loop (other
    than bar.warp.sync), and what lanes exchange for a call, with twice the registers. Barrier 1 is complete as soon as
    any warp arrives.
    """
    return types.void(), _barrier_of_warp(f"bar.sync 1, 32; {BEFORE_SM_90}")


@primitive("ask_now")
def ask_now(typingctx):
    """Reads before this are sent before anything after it is done; else ptxas puts some off for want of registers.

    A barrier that the warp is at anyway, of the kind that ``converge`` asks for.
    """
    return types.void(), _barrier_of_warp(f"bar.sync 1, 32; {BEFORE_SM_90}\n\tbar.warp.sync 0xffffffff; {FROM_SM_90}")


@primitive("prefetch")
def prefetch(typingctx, address):
    """Bring the 128 bytes around an address nearer: to the L2 cache, which every read of later goes through."""

    def codegen(context, builder, sig, args):
        _assembly(builder, "prefetch.global.L2 [$0];", "l", ir.VoidType(), args, volatile=True)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@primitive("await_previous")
def await_previous(typingctx):
    """Wait until the kernel before this one is through: a kernel with this comes early, where GPUs know that.

    Nothing may be read or written before. It is for short blocks: those of a kernel that has room for all of its blocks
    at once go where there is room early, and some multiprocessors get too many.
    """

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(ir.InlineAsm(kind, f"{AWAIT_PREVIOUS} {FROM_SM_90}", "~{memory}", side_effect=True), [])
        return context.get_dummy_value()

    return types.void(), codegen


# --- memory of a thread and of a block -------------------------------------------------------------------------------


def _array(context, builder, kind, data, size, itemsize):
    array = context.make_array(kind)(context, builder)
    count, step = (ir.Constant(_I64, n) for n in (size, itemsize))
    context.populate_array(array, data=data, shape=[count], strides=[step], itemsize=step, meminfo=None)
    return array._getvalue()


def local_array(size, number):
    """``make()``: an array of a thread, in registers as long as every index into it is known when compiling."""
    kind = types.Array(_number_type(number), 1, "C")

    @primitive("local_array", size, np.dtype(number))
    def make(typingctx):
        def codegen(context, builder, sig, args):
            memory = cgutils.alloca_once(builder, ir.ArrayType(context.get_data_type(kind.dtype), size))
            start = builder.bitcast(memory, context.get_data_type(kind.dtype).as_pointer())
            return _array(context, builder, kind, start, size, np.dtype(number).itemsize)

        return kind(), codegen

    return make


class SharedMemory:
    """The memory of a block, as one variable: all arrays in it have a base address in common, which costs registers."""

    def __init__(self):
        self.size, self._made = 0, (None, None)  # the module that is being compiled, and the variable in it

    def array(self, size, number):
        """``make()``: an array of it, aligned to 16 bytes, for ``shared_reader`` and ``shared_writer``."""
        number, offset = np.dtype(number), self.size
        self.size += -(-size * number.itemsize // 16) * 16
        kind = types.Array(_number_type(number), 1, "C")

        @primitive("shared_array", size, number)
        def make(typingctx):
            def codegen(context, builder, sig, args):
                start = builder.gep(self._variable(builder.module), [ir.Constant(_I32, 0), ir.Constant(_I32, offset)])
                generic = builder.addrspacecast(start, ir.IntType(8).as_pointer())
                data = builder.bitcast(generic, context.get_data_type(kind.dtype).as_pointer())
                return _array(context, builder, kind, data, size, number.itemsize)

            return kind(), codegen

        return make

    def _variable(self, module):
        if self._made[0] is not module:
            memory = ir.ArrayType(ir.IntType(8), self.size)
            variable = cgutils.add_global_variable(module, memory, module.get_unique_name("sscan_shared"), 3)
            variable.linkage, variable.align, variable.initializer = "internal", 16, ir.Constant(memory, ir.Undefined)
            self._made = module, variable
        return self._made[1]


def shared_array(size, number):
    """``SharedMemory().array``, for kernels with one array."""
    return SharedMemory().array(size, number)


# --- lanes of a warp -------------------------------------------------------------------------------------------------


def _shuffle(name, mode, clamp):
    """Value of another lane of the warp, for numbers of any type; all 32 lanes take part."""

    @primitive(name)
    def shuffle(typingctx, x, lane):
        def one(builder, word, lane):
            kind = ir.FunctionType(_I32, [_I32] * 4)
            exchange = cgutils.get_or_insert_function(builder.module, kind, f"llvm.nvvm.shfl.sync.{mode}.i32")
            return builder.call(exchange, [ir.Constant(_I32, 0xFFFFFFFF), word, lane, ir.Constant(_I32, clamp)])

        def real(builder, value, lane):
            if value.type == _F32:
                return builder.bitcast(one(builder, builder.bitcast(value, _I32), lane), _F32)
            pair = builder.bitcast(value, ir.VectorType(_I32, 2))
            for i in (0, 1):
                at = ir.Constant(_I32, i)
                pair = builder.insert_element(pair, one(builder, builder.extract_element(pair, at), lane), at)
            return builder.bitcast(pair, _F64)

        def codegen(context, builder, sig, args):
            to = args[1] if args[1].type == _I32 else builder.trunc(args[1], _I32)
            if not isinstance(x, types.Complex):
                return real(builder, args[0], to)
            z = context.make_complex(builder, x, value=args[0])
            z.real, z.imag = real(builder, z.real, to), real(builder, z.imag, to)
            return z._getvalue()

        return x(x, lane), codegen

    return shuffle


shuffle_xor = _shuffle("shuffle_xor", "bfly", 31)  # of lane ^ mask
shuffle_up = _shuffle("shuffle_up", "up", 0)  # of lane - distance; the own value where there is none
shuffle_from = _shuffle("shuffle_from", "idx", 31)  # of the lane given


@primitive("in_all_lanes")
def in_all_lanes(typingctx, condition):
    """Whether a condition holds in all lanes of the warp; all 32 take part.

    For GPUs before sm_90 ptxas takes a vote in a loop for a call, as ``converge`` says, and a barrier's sum for none.
    """
    text = f"""{{
	.reg .pred p, q;
	setp.ne.u32 q, $1, 0;
	bar.red.and.pred p, 1, 32, q; {BEFORE_SM_90}
	vote.sync.all.pred p, q, 0xffffffff; {FROM_SM_90}
	selp.u32 $0, 1, 0, p;
	}}"""

    def codegen(context, builder, sig, args):
        asked = builder.zext(args[0] if args[0].type == _I1 else builder.trunc(args[0], _I1), _I32)
        vote = ir.InlineAsm(ir.FunctionType(_I32, [_I32]), text, "=r,r", side_effect=True)
        held = builder.call(vote, [asked], attrs=("convergent",))
        return builder.icmp_unsigned("!=", held, ir.Constant(_I32, 0))

    return types.boolean(types.boolean), codegen


# --- global memory ---------------------------------------------------------------------------------------------------


def _storage_type(storage):
    storage = np.dtype(storage)
    if storage in _REALS:
        return _REALS[storage][1]
    return _I16  # float16 and bfloat16, as bits


def _widen(builder, storage, real, value):
    """A stored real as a number."""
    if storage == real:
        return value
    if storage == BFLOAT16:
        word = builder.shl(builder.zext(value, _I32), ir.Constant(_I32, 16))
        single = builder.bitcast(word, _F32)
    elif storage == np.float16:
        single = _assembly(builder, "cvt.f32.f16 $0, $1;", "=f,h", _F32, [value])
    else:
        single = value
    return _widen_single(builder, real, single)


def _narrow(builder, storage, value):
    """A number as a stored real, rounded to nearest even."""
    if np.dtype(storage) in _REALS:
        wanted = _REALS[np.dtype(storage)][1]
        if value.type == wanted:
            return value
        return builder.fptrunc(value, _F32) if wanted == _F32 else builder.fpext(value, _F64)
    if value.type == _F64:
        value = builder.fptrunc(value, _F32)
    kind = "bf16" if storage == BFLOAT16 else "f16"
    return _assembly(builder, f"cvt.rn.{kind}.f32 $0, $1;", "=h,f", _I16, [value])


def _narrow_two(builder, storage, low, high):
    """Two numbers as halves of a word."""
    if low.type == _F64:
        low, high = builder.fptrunc(low, _F32), builder.fptrunc(high, _F32)
    kind = "bf16x2" if storage == BFLOAT16 else "f16x2"
    return _assembly(builder, f"cvt.rn.{kind}.f32 $0, $1, $2;", "=r,f,f", _I32, [high, low])


def _more_than(builder, valid, count):
    """Whether ``valid``, which must be within 32 bits, is more than a number."""
    return builder.icmp_signed(">", builder.trunc(valid, _I32), ir.Constant(_I32, count))


def _element_pointer(builder, address, index, element):
    return builder.gep(builder.inttoptr(address, element.as_pointer(1)), [index])


def _local_reals(context, builder, array_type, array, real):
    """Pointer to a local array's memory, seen as reals."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(data, real.as_pointer(data.type.addrspace))


def _slot(builder, pointer, i):
    return builder.gep(pointer, [ir.Constant(_I32, i)])


def _marked(builder, load, constant):
    """A load, marked as one from memory that nobody writes if it is."""
    if constant:
        load.set_metadata("invariant.load", builder.module.add_metadata([]))
    return load


def reader(storage, number, count, together=False, constant=True):
    """``read(into, address, index, valid)``: the local array ``into`` = ``count`` numbers from ``index`` on.

    Only the first ``valid`` of them are read, the others are 0. ``together``: in one instruction of up to 16 bytes at a
    time, for which address and index must be aligned and ``valid`` be 0 or at least ``count``. ``constant``: no thread
    of the kernel writes there.
    """
    storage, number = np.dtype(storage), np.dtype(number)
    real, element, reals = real_of(number), _storage_type(storage), planes(number)
    total, size = count * reals, storage.itemsize

    def group(builder, pointer, out, first, width):
        halves = size == 2 and width % 2 == 0  # as words: eight halves at once would be two loads
        vector = ir.VectorType(_I32, width // 2) if halves else ir.VectorType(element, width)
        start = builder.bitcast(_slot(builder, pointer, first), vector.as_pointer(1))
        loaded = _marked(builder, builder.load(start, align=width * size), constant)
        for i in range(width):
            value = builder.extract_element(loaded, ir.Constant(_I32, i // 2 if halves else i))
            if halves:
                value = builder.trunc(builder.lshr(value, ir.Constant(_I32, 16 * (i % 2))), _I16)
            builder.store(_widen(builder, storage, real, value), _slot(builder, out, first + i))

    @primitive("reader", storage, number, count, together, constant)
    def read(typingctx, into, address, index, valid):
        def codegen(context, builder, sig, args):
            out = _local_reals(context, builder, into, args[0], _REALS[real][1])
            at = builder.mul(args[2], ir.Constant(args[2].type, reals)) if reals > 1 else args[2]
            pointer = _element_pointer(builder, args[1], at, element)
            zero = ir.Constant(_REALS[real][1], 0.0)
            for i in range(total):
                builder.store(zero, _slot(builder, out, i))
            if together:
                width = min(total, 16 // size)
                with builder.if_then(_more_than(builder, args[3], 0)):
                    for first in range(0, total, width):
                        group(builder, pointer, out, first, width)
                return context.get_dummy_value()
            for k in range(count):
                with builder.if_then(_more_than(builder, args[3], k)):
                    for i in range(k * reals, (k + 1) * reals):
                        value = _marked(builder, builder.load(_slot(builder, pointer, i), align=size), constant)
                        builder.store(_widen(builder, storage, real, value), _slot(builder, out, i))
            return context.get_dummy_value()

        return types.void(into, types.int64, types.int64, types.int64), codegen

    return read


def writer(storage, number, count, together=False):
    """``write(address, index, values, valid)``: the first ``valid`` of ``count`` numbers of a local array, rounded.

    ``together`` as for ``reader``.
    """
    storage, number = np.dtype(storage), np.dtype(number)
    real, element, reals = real_of(number), _storage_type(storage), planes(number)
    total, size = count * reals, storage.itemsize

    @primitive("writer", storage, number, count, together)
    def write(typingctx, address, index, values, valid):
        def codegen(context, builder, sig, args):
            source = _local_reals(context, builder, values, args[2], _REALS[real][1])
            at = builder.mul(args[1], ir.Constant(args[1].type, reals)) if reals > 1 else args[1]
            pointer = _element_pointer(builder, args[0], at, element)

            def value_of(i):
                return builder.load(_slot(builder, source, i))

            def rounded(i):
                return _narrow(builder, storage, value_of(i))

            def word(i):
                return _narrow_two(builder, storage, value_of(i), value_of(i + 1))

            if together:
                width = min(total, 16 // size)
                step = 2 if size == 2 and width % 2 == 0 else 1  # two halves are a word
                vector = ir.VectorType(_I32 if step == 2 else element, width // step)
                with builder.if_then(_more_than(builder, args[3], 0)):
                    for first in range(0, total, width):
                        packed = ir.Constant(vector, ir.Undefined)
                        for i in range(0, width, step):
                            value = word(first + i) if step == 2 else rounded(first + i)
                            packed = builder.insert_element(packed, value, ir.Constant(_I32, i // step))
                        start = builder.bitcast(_slot(builder, pointer, first), vector.as_pointer(1))
                        builder.store(packed, start, align=width * size)
                return context.get_dummy_value()
            for k in range(count):
                with builder.if_then(_more_than(builder, args[3], k)):
                    for i in range(k * reals, (k + 1) * reals):
                        builder.store(rounded(i), _slot(builder, pointer, i), align=size)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, values, types.int64), codegen

    return write


def _words(storage, count):
    """How ``count`` stored reals lie in registers: their type and number. Two halves share a 32-bit word."""
    return (types.int32, _I32, (count + 1) // 2) if storage.itemsize == 2 else (*_REALS[storage], count)


def stored_array(size, storage):
    """``make()``: a local array of ``size`` (even) stored reals, as they lie in memory; at first zeros."""
    storage = np.dtype(storage)
    kind, element, words = _words(storage, size)
    kind = types.Array(kind, 1, "C")

    @primitive("stored_array", size, storage)
    def make(typingctx):
        def codegen(context, builder, sig, args):
            memory = cgutils.alloca_once(builder, ir.ArrayType(element, words), zfill=True)
            start = builder.bitcast(memory, element.as_pointer())
            itemsize = element.width // 8 if words != size else storage.itemsize
            return _array(context, builder, kind, start, words, itemsize)

        return kind(), codegen

    return make


def _stored_from(context, builder, array_type, array, start, half):
    """Pointer to the element ``start`` of a stored array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [builder.lshr(start, ir.Constant(start.type, 1)) if half else start])


def stored_reader(storage, count, together=False, keep=False, constant=True):
    """``read(into, start, address, index, valid)``: ``reader`` of reals without conversion, into a ``stored_array``.

    They go to ``into`` from its element ``start`` on, which must be known when compiling, and even for halves.
    ``keep``: where nothing is read, ``into`` keeps what it had, if ``together``. A load that is converted at once is
    waited for at once; one that stays as it is can be used much later.
    """
    storage = np.dtype(storage)
    _, element, words = _words(storage, count)
    half, size = storage.itemsize == 2, storage.itemsize

    def load(builder, pointer, align):
        return _marked(builder, builder.load(pointer, align=align), constant)

    @primitive("stored_reader", storage, count, together, keep, constant)
    def read(typingctx, into, first, address, index, valid):
        def codegen(context, builder, sig, args):
            out = _stored_from(context, builder, into, args[0], args[1], half)
            start = _element_pointer(builder, args[2], args[3], _storage_type(storage))
            for i in range(0 if together and keep else words):
                builder.store(ir.Constant(element, 0), _slot(builder, out, i))
            if together:
                width = min(words, 16 // (4 if half else size))
                vector = ir.VectorType(element, width)
                with builder.if_then(_more_than(builder, args[4], 0)):
                    wide = builder.bitcast(start, element.as_pointer(1))
                    for at in range(0, words, width):
                        group = builder.bitcast(_slot(builder, wide, at), vector.as_pointer(1))
                        loaded = load(builder, group, width * (4 if half else size))
                        for i in range(width):
                            value = builder.extract_element(loaded, ir.Constant(_I32, i))
                            builder.store(value, _slot(builder, out, at + i))
                return context.get_dummy_value()
            for k in range(count):
                with builder.if_then(_more_than(builder, args[4], k)):
                    value = load(builder, _slot(builder, start, k), size)
                    slot = _slot(builder, out, k // 2 if half else k)
                    if half:
                        value = builder.shl(builder.zext(value, _I32), ir.Constant(_I32, 16 * (k % 2)))
                        value = builder.or_(builder.load(slot), value)
                    builder.store(value, slot)
            return context.get_dummy_value()

        return types.void(into, types.int64, types.int64, types.int64, types.int64), codegen

    return read


def _half_shift(builder, address):
    """Bits from the start of the word that an address of a half lies in to the half."""
    return builder.shl(builder.and_(address, ir.Constant(_I32, 2)), ir.Constant(_I32, 3))


def shifted_reader(storage, count):
    """``read(into, start, address, index, valid, before)``: 2 or 4 halves that lie anywhere, as the words around them.

    Into ``count // 2 + 1`` words of ``into``, a ``local_array`` of int32, from ``start`` on; ``shifted_widener`` cuts
    the halves out of them, as late as it can, since then they are waited for. What is not valid is 0. Words are read
    where ``before`` says that a half precedes them, and ``valid`` that two follow; elsewhere halves one by one.
    """
    storage = np.dtype(storage)
    assert storage.itemsize == 2
    words = count // 2

    @primitive("shifted_reader", storage, count)
    def read(typingctx, into, first, address, index, valid, before):
        def codegen(context, builder, sig, args):
            out = builder.gep(context.make_array(into)(context, builder, args[0]).data, [args[1]])
            start, zero = _element_pointer(builder, args[2], args[3], _I16), ir.Constant(_I32, 0)
            for i in range(words + 1):
                builder.store(zero, _slot(builder, out, i))
            whole = builder.and_(_more_than(builder, args[4], count + 1), _more_than(builder, args[5], 0))
            at = builder.ptrtoint(start, _I64)
            with builder.if_else(whole) as (wide, single):
                with wide:
                    word = builder.inttoptr(builder.and_(at, ir.Constant(_I64, -4)), _I32.as_pointer(1))
                    for i in range(words + 1):
                        loaded = _marked(builder, builder.load(_slot(builder, word, i), align=4), True)
                        builder.store(loaded, _slot(builder, out, i))
                with single:
                    for k in range(count):
                        with builder.if_then(_more_than(builder, args[4], k)):
                            value = _marked(builder, builder.load(_slot(builder, start, k), align=2), True)
                            value = builder.shl(builder.zext(value, _I32), ir.Constant(_I32, 16 * (k % 2)))
                            slot = _slot(builder, out, k // 2)
                            builder.store(builder.or_(builder.load(slot), value), slot)
                    halves = [zero, *(builder.load(_slot(builder, out, i)) for i in range(words)), zero]
                    for i in range(words + 1):  # up by a half, if they begin with the upper half of a word
                        pair = [halves[i], halves[i + 1], _half_shift(builder, builder.trunc(at, _I32))]
                        word = _assembly(builder, "shf.l.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", _I32, pair)
                        builder.store(word, _slot(builder, out, i))
            return context.get_dummy_value()

        return types.void(into, *[types.int64] * 5), codegen

    return read


def shifted_widener(storage, number, count):
    """``widen(into, held, start, address, index)``: the numbers that ``shifted_reader`` read from there."""
    storage, real = np.dtype(storage), real_of(number)
    assert count in (2, 4)

    @primitive("shifted_widener", storage, np.dtype(number), count)
    def widen(typingctx, into, held, start, address, index):
        def codegen(context, builder, sig, args):
            out = _local_reals(context, builder, into, args[0], _REALS[real][1])
            source = builder.gep(context.make_array(held)(context, builder, args[1]).data, [args[2]])
            offset = builder.shl(builder.trunc(args[4], _I32), ir.Constant(_I32, 1))
            shift = _half_shift(builder, builder.add(builder.trunc(args[3], _I32), offset))
            for i in range(count // 2):
                pair = [builder.load(_slot(builder, source, k)) for k in (i, i + 1)]
                word = _assembly(builder, "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", _I32, [*pair, shift])
                for k in (0, 1):
                    value = _widen_single(builder, real, _half_of(builder, storage, word, k))
                    builder.store(value, _slot(builder, out, 2 * i + k))
            return context.get_dummy_value()

        return types.void(into, held, types.int64, types.int64, types.int64), codegen

    return widen


def shifted_writer(storage, number):
    """``write(address, index, values, valid)``: a ``writer`` of four halves that lie anywhere, as words if all are."""
    storage, number = np.dtype(storage), np.dtype(number)
    assert storage.itemsize == 2

    @primitive("shifted_writer", storage, number)
    def write(typingctx, address, index, values, valid):
        def codegen(context, builder, sig, args):
            source = _local_reals(context, builder, values, args[2], _REALS[number][1])
            pointer = _element_pointer(builder, args[0], args[1], _I16)
            given = [builder.load(_slot(builder, source, i)) for i in range(4)]
            odd = builder.trunc(builder.lshr(builder.ptrtoint(pointer, _I64), ir.Constant(_I64, 1)), _I1)

            def store(value, k, align):
                start = builder.bitcast(_slot(builder, pointer, k), value.type.as_pointer(1))
                builder.store(value, start, align=align)

            with builder.if_else(_more_than(builder, args[3], 3)) as (all_four, some):
                with all_four, builder.if_else(odd) as (around, even):
                    with around:
                        store(_narrow(builder, storage, given[0]), 0, 2)
                        store(_narrow_two(builder, storage, given[1], given[2]), 1, 4)
                        store(_narrow(builder, storage, given[3]), 3, 2)
                    with even:
                        for k in (0, 2):
                            store(_narrow_two(builder, storage, given[k], given[k + 1]), k, 4)
                with some:
                    for k in range(3):
                        with builder.if_then(_more_than(builder, args[3], k)):
                            store(_narrow(builder, storage, given[k]), k, 2)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, values, types.int64), codegen

    return write


def widener(storage, number, count):
    """``widen(into, stored, start)``: the numbers that stored reals are from ``start`` on."""
    storage, real = np.dtype(storage), real_of(number)
    total = count * planes(number)

    @primitive("widener", storage, np.dtype(number), count)
    def widen(typingctx, into, stored, start):
        def codegen(context, builder, sig, args):
            out = _local_reals(context, builder, into, args[0], _REALS[real][1])
            source = _stored_from(context, builder, stored, args[1], args[2], storage.itemsize == 2)
            for i in range(total):
                if storage.itemsize == 2:
                    word = builder.load(_slot(builder, source, i // 2))
                    value = _half_of(builder, storage, word, i % 2)
                else:
                    value = builder.load(_slot(builder, source, i))
                builder.store(_widen_single(builder, real, value), _slot(builder, out, i))
            return context.get_dummy_value()

        return types.void(into, stored, types.int64), codegen

    return widen


def product_adder(real, count):
    """``add(total, i, x, y)``: total[i] += x[0] y[0] + ..., of local arrays, each product rounded with its sum.

    A loop would do the same; this compiles many times as fast where it is written out often.
    """
    element = _REALS[np.dtype(real)][1]

    @primitive("product_adder", np.dtype(real), count)
    def add(typingctx, total, i, x, y):
        def codegen(context, builder, sig, args):
            sums, left, right = (
                _local_reals(context, builder, kind, args[n], element) for kind, n in ((total, 0), (x, 2), (y, 3))
            )
            place = builder.gep(sums, [args[1]])
            value = builder.load(place)
            for k in range(count):
                value = builder.fma(
                    builder.load(_slot(builder, left, k)), builder.load(_slot(builder, right, k)), value
                )
            builder.store(value, place)
            return context.get_dummy_value()

        return types.void(total, types.int64, x, y), codegen

    return add


def matrix_multiplier(storage):
    """``multiply(total, i, w, low, high, x, at)``: 16 rows times 8 columns of half precision, by the tensor cores.

    A warp's lane g * 4 + t, with g < 8 and t < 4, has of the stored array ``w`` the numbers k = 4 t ... 4 t + 3 of row
    g from ``low`` on and of row g + 8 from ``high`` on, and of ``x`` those of column g from ``at`` on; starts must be
    known when compiling, and even. Added to the float32 array ``total`` from ``i`` on, over the 16 k: row g with
    columns 2 t and 2 t + 1, then row g + 8 with them. All lanes of the warp take part.
    """
    storage = np.dtype(storage)
    kind = "bf16" if storage == BFLOAT16 else "f16"
    places = [f"${i}" for i in range(14)]
    d, a, b, c = (f"{{{', '.join(places[i:j])}}}" for i, j in ((0, 4), (4, 8), (8, 10), (10, 14)))
    text = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {d}, {a}, {b}, {c};"
    constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)

    @primitive("matrix_multiplier", storage)
    def multiply(typingctx, total, i, w, low, high, x, at):
        def codegen(context, builder, sig, args):
            sums = _local_reals(context, builder, total, args[0], _F32)
            sums = builder.gep(sums, [args[1]])
            starts = ((w, args[2], args[3]), (w, args[2], args[4]), (x, args[5], args[6]))
            pointers = [_stored_from(context, builder, *start, True) for start in starts]
            first, second, column = ([builder.load(_slot(builder, p, n)) for n in (0, 1)] for p in pointers)
            words = [first[0], second[0], first[1], second[1], *column]
            values = [*words, *(builder.load(_slot(builder, sums, n)) for n in range(4))]
            results = ir.LiteralStructType([_F32] * 4)
            instruction = ir.InlineAsm(ir.FunctionType(results, [v.type for v in values]), text, constraints)
            made = builder.call(instruction, values, attrs=("convergent",))
            for n in range(4):
                builder.store(builder.extract_value(made, n), _slot(builder, sums, n))
            return context.get_dummy_value()

        integer = types.int64
        return types.void(total, integer, w, integer, integer, x, integer), codegen

    return multiply


def _half_of(builder, storage, word, which):
    """The lower or upper half of a word as float32."""
    if storage == BFLOAT16:
        if which:
            bits = builder.and_(word, ir.Constant(_I32, 0xFFFF0000))
        else:
            bits = builder.shl(word, ir.Constant(_I32, 16))
        return builder.bitcast(bits, _F32)
    bits = builder.lshr(word, ir.Constant(_I32, 16)) if which else word
    return _assembly(builder, "cvt.f32.f16 $0, $1;", "=f,h", _F32, [builder.trunc(bits, _I16)])


def _widen_single(builder, real, value):
    return builder.fpext(value, _F64) if real == np.float64 and value.type == _F32 else value


def _integer_reader(bits):
    @primitive("integer_reader", bits)
    def read_integer(typingctx, address, index, valid):
        """One integer as int64, 0 where ``valid`` is not positive."""

        def codegen(context, builder, sig, args):
            pointer = _element_pointer(builder, args[0], args[1], ir.IntType(bits))
            out = cgutils.alloca_once_value(builder, ir.Constant(_I64, 0))
            with builder.if_then(_more_than(builder, args[2], 0)):
                value = builder.load(pointer, align=bits // 8)
                builder.store(value if bits == 64 else builder.sext(value, _I64), out)
            return builder.load(out)

        return types.int64(types.int64, types.int64, types.int64), codegen

    return read_integer


INTEGER_READERS = {bits: _integer_reader(bits) for bits in (8, 16, 32, 64)}


@primitive("write_integer")
def write_integer(typingctx, address, index, value, valid):
    """One int64, if ``valid``."""

    def codegen(context, builder, sig, args):
        pointer = _element_pointer(builder, args[0], args[1], _I64)
        with builder.if_then(_more_than(builder, args[3], 0)):
            builder.store(args[2], pointer, align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


# --- shared memory ---------------------------------------------------------------------------------------------------


@primitive("shared_get")
def shared_get(typingctx, shared, index):
    """One number of a shared array."""

    def codegen(context, builder, sig, args):
        return builder.load(builder.gep(context.make_array(shared)(context, builder, args[0]).data, [args[1]]))

    return shared.dtype(shared, types.int64), codegen


@primitive("shared_set")
def shared_set(typingctx, shared, index, value):
    """Set one number of a shared array."""

    def codegen(context, builder, sig, args):
        pointer = builder.gep(context.make_array(shared)(context, builder, args[0]).data, [args[1]])
        builder.store(args[2], pointer)
        return context.get_dummy_value()

    return types.void(shared, types.int64, shared.dtype), codegen


def _shared_vectors(context, builder, kind, array, index, element, total, width):
    """(first real, pointer, type) of each vector of the ``total`` reals from an index of a shared array on."""
    data, vector = context.make_array(kind)(context, builder, array).data, ir.VectorType(element, width)
    start = builder.bitcast(builder.gep(data, [index]), element.as_pointer(data.type.addrspace))
    for first in range(0, total, width):
        yield first, builder.bitcast(_slot(builder, start, first), vector.as_pointer(data.type.addrspace)), vector


def shared_reader(number, count):
    """``read(into, shared, index)``: ``count`` numbers of a shared array of their type, 16 bytes at a time.

    The index must be a multiple of ``count`` (1, 2 or 4).
    """
    number = np.dtype(number)
    real, total = real_of(number), count * planes(number)
    width = min(total, 16 // real.itemsize)

    @primitive("shared_reader", number, count)
    def read(typingctx, into, shared, index):
        def codegen(context, builder, sig, args):
            element = _REALS[real][1]
            out = _local_reals(context, builder, into, args[0], element)
            for first, pointer, _ in _shared_vectors(context, builder, shared, args[1], args[2], element, total, width):
                loaded = builder.load(pointer, align=width * real.itemsize)
                for i in range(width):
                    value = builder.extract_element(loaded, ir.Constant(_I32, i))
                    builder.store(value, _slot(builder, out, first + i))
            return context.get_dummy_value()

        return types.void(into, shared, types.int64), codegen

    return read


def shared_writer(number, count):
    """``write(shared, index, values)``: ``count`` numbers of a local array, as ``shared_reader`` reads them."""
    number = np.dtype(number)
    real, total = real_of(number), count * planes(number)
    width = min(total, 16 // real.itemsize)

    @primitive("shared_writer", number, count)
    def write(typingctx, shared, index, values):
        def codegen(context, builder, sig, args):
            element = _REALS[real][1]
            source = _local_reals(context, builder, values, args[2], element)
            for first, pointer, vector in _shared_vectors(
                context, builder, shared, args[0], args[1], element, total, width
            ):
                packed = ir.Constant(vector, ir.Undefined)
                for i in range(width):
                    value = builder.load(_slot(builder, source, first + i))
                    packed = builder.insert_element(packed, value, ir.Constant(_I32, i))
                builder.store(packed, pointer, align=width * real.itemsize)
            return context.get_dummy_value()

        return types.void(shared, types.int64, values), codegen

    return write
