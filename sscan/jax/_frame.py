"""The memory that XLA hands to a foreign function, read with ctypes: the structs of ``xla/ffi/api/c_api.h``.

Only the fields that are needed, in the order that every version of the interface with major number 0 has them.
"""

import ctypes
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

MAJOR = 0
METADATA, EXECUTE, STRING = 1, 3, 4  # a kind of extension, a stage of execution, a type of attributes
INVALID_ARGUMENT, INTERNAL = 3, 13  # codes of errors

DTYPES = {
    number: np.dtype(dtype)
    for number, dtype in {
        1: np.bool_, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.uint8, 7: np.uint16, 8: np.uint32,
        9: np.uint64, 10: np.float16, 11: np.float32, 12: np.float64, 15: np.complex64, 16: ml_dtypes.bfloat16,
        18: np.complex128,
    }.items()
}  # fmt: skip


class Struct(Structure):
    """What most structs start with."""

    _fields_: ClassVar[Any] = (("struct_size", c_size_t), ("extension_start", c_void_p))


class Version(Struct):
    _fields_ = (("major", c_int32), ("minor", c_int32))


class Metadata(Structure):
    _fields_ = (("struct_size", c_size_t), ("api_version", Version), ("traits", c_uint32))


class Extension(Structure):
    _fields_ = (("struct_size", c_size_t), ("type", c_int32), ("next", c_void_p), ("metadata", POINTER(Metadata)))


class ErrorCreate(Struct):
    _fields_ = (("message", c_char_p), ("code", c_int32))


class StreamGet(Struct):
    _fields_ = (("context", c_void_p), ("stream", c_void_p))


class Api(Struct):
    _fields_ = (
        ("api_version", Version),
        ("internal_api", c_void_p),
        ("error_create", CFUNCTYPE(c_void_p, POINTER(ErrorCreate))),
        ("error_message", c_void_p),
        ("error_destroy", c_void_p),
        ("handler_register", c_void_p),
        ("stream_get", CFUNCTYPE(c_void_p, POINTER(StreamGet))),
    )


class Buffer(Struct):
    _fields_ = (("dtype", c_int32), ("data", c_void_p), ("rank", c_int64), ("dims", POINTER(c_int64)))


class Buffers(Struct):
    """Arguments or results."""

    _fields_ = (("size", c_int64), ("types", POINTER(c_int32)), ("items", POINTER(POINTER(Buffer))))


class Text(Structure):
    _fields_ = (("start", c_void_p), ("length", c_size_t))


class Attributes(Struct):
    _fields_ = (("size", c_int64), ("types", POINTER(c_int32)), ("names", c_void_p), ("values", POINTER(POINTER(Text))))


class CallFrame(Struct):
    _fields_ = (
        ("api", POINTER(Api)),
        ("context", c_void_p),
        ("stage", c_int32),
        ("arguments", Buffers),
        ("results", Buffers),
        ("attributes", Attributes),
    )


HANDLER = CFUNCTYPE(c_void_p, POINTER(CallFrame))  # gives an error, or NULL


class Region(NamedTuple):
    """Memory of an argument or result, row-major."""

    address: int  # 0 if there is none because the size is 0
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def regions(buffers: Any) -> list[Region]:
    """The memory of all arguments or results."""
    items = [item.contents for item in buffers.items[: buffers.size]]
    return [Region(item.data or 0, DTYPES[item.dtype], tuple(item.dims[: item.rank])) for item in items]


def text(frame: Any) -> bytes:
    """The one attribute of a call, a string."""
    attributes = frame.attributes
    if attributes.size != 1 or attributes.types[0] != STRING:
        raise TypeError("sscan.jax: this call was made by another version of sscan")
    value = attributes.values[0].contents
    return ctypes.string_at(value.start, value.length)


class XLAError(Exception):
    """An error that XLA made; it goes back there as it is."""

    def __init__(self, pointer: int) -> None:
        super().__init__("XLA refuses a request")
        self.pointer = pointer


def stream(frame: Any) -> int:
    """The CUDA stream to launch on."""
    request = StreamGet(struct_size=ctypes.sizeof(StreamGet), context=frame.context)
    failure = frame.api.contents.stream_get(request)
    if failure:
        raise XLAError(failure)
    return request.stream or 0


def error(frame: Any, code: int, message: str) -> Any:
    """An error for XLA, which raises it with this message."""
    request = ErrorCreate(struct_size=ctypes.sizeof(ErrorCreate), message=message.encode(), code=code)
    return frame.api.contents.error_create(request)


def answer_metadata(frame: Any) -> bool:
    """Whether the call only asked, as registration does, for which version of the interface the handler is written."""
    if not frame.extension_start:
        return False
    extension = Extension.from_address(frame.extension_start)
    if extension.type != METADATA:
        return False
    metadata = extension.metadata.contents
    # The structs above are those of every minor version, so the handler is of the running one. JAX 0.5 does not say
    # which that is; it is the first.
    minor = frame.api.contents.api_version.minor if frame.api else 1
    metadata.api_version = Version(ctypes.sizeof(Version), None, MAJOR, minor)
    metadata.traits = 0
    return True
