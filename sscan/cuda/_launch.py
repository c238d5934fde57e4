"""How kernels are compiled, kept on disk and launched.

A *kernel* is named by a module of ``sscan.cuda.kernels``, a factory in it and the factory's arguments, its
specialisation. The factory returns the kernel's Python function and how many threads it runs in. Numba makes PTX of it,
nvJitLink a cubin for the GPU, and the driver launches that: Numba's own launch costs 60 to 300 microseconds, this 3.

Cubins are kept in a folder named by a digest of all that decides them; a process that finds its kernels there imports
neither Numba nor the kernels' source.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import operator
import os
import re
import struct
import sys
import threading
from typing import Any, NamedTuple

import numpy as np

from sscan import _cache, _recording

OLDEST = (8, 0)  # Ampere: the first with bfloat16
OVERLAPPING = (9, 0)  # Hopper: the first that puts a kernel's blocks in place while the kernel before it ends
RECORDS_OVERLAPPING = 12030  # CUDA: the first whose graphs do so too
# These end lines of PTX, which are for older GPUs only, or for later ones.
BEFORE_SM_90, FROM_SM_90 = "// before sm_90", "// from sm_90"
LET_NEXT_COME, AWAIT_PREVIOUS = "griddepcontrol.launch_dependents;", "griddepcontrol.wait;"


class Kernel(NamedTuple):
    """A specialised kernel: ``sscan.cuda.kernels.<module>.<factory>(*key)``."""

    module: str
    factory: str
    key: tuple

    @property
    def name(self):
        return f"{self.module}_{self.factory}"


class Shape(NamedTuple):
    """What a factory says about its kernel: threads of a block, and blocks to fit on a multiprocessor at once."""

    threads: int
    blocks_per_processor: int


# --- from Python to a cubin ------------------------------------------------------------------------------------------


def build(kernel):
    """The kernel's Python function and its shape."""
    module = importlib.import_module(f"sscan.cuda.kernels.{kernel.module}")
    return getattr(module, kernel.factory)(*kernel.key)


def compile_ptx(kernel):
    """PTX, the same for every GPU, and the number of threads."""
    from sscan.cuda import _target

    function, shape = build(kernel)
    return _target.compile_ptx(function, kernel.name, shape.threads, shape.blocks_per_processor), shape.threads


def comes_early(ptx, capability):
    """Whether a kernel waits by itself for the one before it, on a GPU where it can be in place before that ends."""
    return capability >= OVERLAPPING and AWAIT_PREVIOUS in ptx


def _overlapping(ptx):
    """PTX of a kernel that comes early: it lets the next one come, too.

    Reads marked as of what nobody writes are made before the wait by the assembler, so none is marked.
    """
    ptx = ptx.replace(".target sm_80", ".target sm_90").replace("ld.global.nc.", "ld.global.")
    ptx, kernels = re.subn(r"\.entry [^{]*{", lambda entry: f"{entry[0]}\n\t{LET_NEXT_COME}\n", ptx)
    if kernels != 1:
        raise ValueError(f"sscan: expected PTX of one kernel, got {kernels}")
    return ptx


def assemble(ptx, capability):
    """A cubin for a compute capability such as (9, 0), and what the assembler says of registers and spills.

    The number of blocks that a kernel wants on a multiprocessor at once limits its registers. It is lowered while the
    assembler says that they do not suffice.
    """
    from cuda.core import Linker, LinkerOptions, ObjectCode

    ptx = re.sub(f".*{BEFORE_SM_90 if capability >= OVERLAPPING else FROM_SM_90}\n", "", ptx)
    if comes_early(ptx, capability):
        ptx = _overlapping(ptx)
    # nvJitLink's own cache, on machines with a driver, gives the cubin back but not what the assembler said of it.
    options = LinkerOptions(arch=f"sm_{capability[0]}{capability[1]}", ptxas_options=["-v"], no_cache=True)
    wanted = re.search(r"\.minnctapersm (\d+)", ptx)
    for blocks in range(int(wanted[1]), 0, -1):
        text = ptx.replace(wanted[0], f".minnctapersm {blocks}")
        linker = Linker(ObjectCode.from_ptx(text.encode()), options=options)
        cubin, log = bytes(linker.link("cubin").code), linker.get_info_log()
        if not re.search(r"\b[1-9]\d* bytes spill stores", log):
            break
    return cubin, log


_HEAD = struct.Struct("<I?")  # of a file: threads, and whether the kernel comes early


@functools.cache
def cache_folder():
    """Where cubins are kept, by digest of the kernels' sources and of the compilers' versions."""
    versions = []
    for package in ("numba-cuda", "llvmlite", "nvidia-cuda-nvvm", "nvidia-nvvm", "nvidia-nvjitlink", "cuda-core"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return _cache.folder("cuda", "*.py", "kernels/*.py", versions=" ".join(versions))


def cached(kernel, capability):
    """(cubin, threads, whether it comes early) of a kernel from the cache folder, or made and put there."""
    key = hashlib.sha256(repr((*kernel, capability)).encode()).hexdigest()[:24]
    name = f"{kernel.name}-{key}.cubin"
    data = _cache.read(cache_folder(), name)
    if data is None:
        ptx, threads = compile_ptx(kernel)
        data = _HEAD.pack(threads, comes_early(ptx, capability)) + assemble(ptx, capability)[0]
        _cache.write(cache_folder(), name, data)
    return data[_HEAD.size :], *_HEAD.unpack_from(data)


# --- the driver ------------------------------------------------------------------------------------------------------


class Function(NamedTuple):
    """A loaded kernel."""

    name: str
    handle: int
    threads: int
    early: bool  # in place before the kernel ahead of it has ended


@functools.cache
def _driver():
    """The driver's library; RuntimeError if there is none."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError as error:
        raise RuntimeError(f"sscan: no NVIDIA driver ({name}) on this machine: {error}") from None
    driver.cuLaunchKernelEx.argtypes = 4 * (ctypes.c_void_p,)
    return driver


def _check(status, doing):
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"sscan: {doing}: {(text.value or b'unknown error').decode()} (CUDA error {status})")


@functools.cache
def _version():
    """The version of CUDA that the driver is of: 1000 times the major number plus 10 times the minor one."""
    version = ctypes.c_int()
    _check(_driver().cuDriverGetVersion(ctypes.byref(version)), "asking for the driver's version")
    return version.value


@functools.cache
def capability_of(device):
    """Compute capability of a device by its number; RuntimeError if it is too old."""
    driver, major, minor = _driver(), ctypes.c_int(), ctypes.c_int()
    _check(driver.cuInit(0), "starting the driver")
    for value, attribute in ((major, 75), (minor, 76)):
        _check(driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device), "asking for the GPU's capability")
    if (major.value, minor.value) < OLDEST:
        raise RuntimeError(
            f"sscan: device {device} has compute capability {major.value}.{minor.value}; the kernels need "
            f"{OLDEST[0]}.{OLDEST[1]} (Ampere) or newer"
        )
    return major.value, minor.value


_functions: dict[Any, Any] = {}  # of (kernel, device)
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # a fork waits for a kernel that is being made: half of a compiler is of no use
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def function(kernel, device):
    """The kernel, loaded for a device."""
    with _lock:
        if (kernel, device) not in _functions:
            _functions[kernel, device] = _load(kernel, capability_of(device))
    return _functions[kernel, device]


def _load(kernel, capability):
    cubin, threads, early = cached(kernel, capability)
    library, handle = ctypes.c_void_p(), ctypes.c_void_p()
    nothing = (None, None, 0)
    _check(
        _driver().cuLibraryLoadData(ctypes.byref(library), cubin, *nothing, *nothing),
        f"loading the kernel {kernel.name}",
    )
    _check(_driver().cuLibraryGetKernel(ctypes.byref(handle), library, kernel.name.encode()), f"finding {kernel.name}")
    return Function(kernel.name, handle.value, threads, early and _version() >= RECORDS_OVERLAPPING)


def address(array):
    """Where an array lies."""
    return array.data.ptr


def aligned(count, *arrays):
    """Whether groups of ``count`` elements along the last axes of all arrays (None: no matter) start at whole groups.

    That is what vector accesses of up to 16 bytes need: aligned addresses, unit stride along the last axis, and sizes
    and other strides that are multiples of ``count``.
    """
    for array in arrays:
        if array is None:
            continue
        size = array.itemsize
        if array.shape[-1] % count or address(array) % min(16, count * size):
            return False
        if array.strides[-1] != size or any(step % (count * size) for step in array.strides[:-1]):
            return False
    return True


def empty(shape, dtype):
    """Workspace, in the memory of the current device and from the caller's allocator."""
    array = sys.modules["cupy"].empty(shape, dtype)
    _recording.allocated(array, array.data.ptr, array.nbytes)
    return array


def to_host(array):
    """The array in host memory, once the current stream has come to here."""
    return array.get()


class _Call(threading.local):
    """Memory for this thread's next launch: the parameters, where the driver finds them described, and the rest."""

    MOST = 127

    def __init__(self):
        self.parameters = (ctypes.c_int64 * (1 + self.MOST))()  # their size in bytes, then they
        size = ctypes.addressof(self.parameters)
        self._description = (ctypes.c_void_p * 5)(1, size + 8, 2, size, 0)  # buffer, its size, end
        self.description = ctypes.addressof(self._description)
        self.config = ctypes.create_string_buffer(_pack_config.size)
        self.address_of_config = ctypes.addressof(self.config)


# CUlaunchConfig: blocks, threads, shared memory, stream, attributes and how many; and the one attribute that there is,
# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION.
_pack_config = struct.Struct("7I4xQQI4x")
_overlaps = (ctypes.c_uint32 * 18)(6, 0, 1)
_address_of_overlaps = ctypes.addressof(_overlaps)
_call = _Call()
_packers = [struct.Struct(f"{1 + count}q").pack_into for count in range(1 + _Call.MOST)]
NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


def launch(kernel, blocks, *arguments):
    """Start ``blocks`` blocks of a kernel on CuPy's current device and stream; none if ``blocks`` is 0.

    Arguments are arrays, of which the address is passed, None (address 0) and integers.
    """
    if not blocks:
        return
    cuda = sys.modules["cupy"].cuda
    device = cuda.runtime.getDevice()
    loaded = _functions.get((kernel, device)) or function(kernel, device)
    _recording.launched(kernel, blocks, arguments)
    values = [x if isinstance(x, int) else 0 if x is None else x.data.ptr for x in arguments]
    _packers[len(values)](_call.parameters, 0, 8 * len(values), *values)
    _start(cuda, loaded, blocks, cuda.get_current_stream().ptr, _call)


def _start(cuda, loaded, blocks, stream, call):
    """Start a function of CuPy's current device with the parameters that are described there."""
    name, handle, threads, early = loaded
    _pack_config.pack_into(call.config, 0, blocks, 1, 1, threads, 1, 1, 0, stream, _address_of_overlaps, early)
    start, arguments = _driver().cuLaunchKernelEx, (call.address_of_config, handle, None, call.description)
    status = start(*arguments)
    if status == NO_CONTEXT:
        cuda.runtime.free(0)  # brings up the current device's, which a new thread has not
        status = start(*arguments)
    if status:
        _check(status, f"launching {name}")


class Repeatable(NamedTuple):
    """A launch whose arguments are picked from a pool of numbers."""

    loaded: Function
    blocks: int
    pick: Any
    pack: Any
    size: int  # of the arguments, in bytes


def repeatable(launched, blocks, places):
    """The launch of a kernel, or a product, on the current device, of what stands at these places of a pool."""
    pick = operator.itemgetter(*places)
    if not isinstance(launched, Kernel):
        return launched, pick
    loaded = function(launched, sys.modules["cupy"].cuda.runtime.getDevice())
    return Repeatable(loaded, blocks, pick, _packers[len(places)], 8 * len(places))


def repeat(launches, pool, stream):
    """Launch, with arguments from the pool, on a stream of the current device."""
    cuda, call = sys.modules["cupy"].cuda, _call
    parameters = call.parameters
    start = None  # of products, whose library is told the stream once
    for launch in launches:
        if type(launch) is Repeatable:
            loaded, blocks, pick, pack, size = launch
            pack(parameters, 0, size, *pick(pool))
            _start(cuda, loaded, blocks, stream, call)
        else:
            product, pick = launch
            start = start or product.starter(stream)
            start(product, *pick(pool))


def processors():
    """Multiprocessors of the current device."""
    return _processors(sys.modules["cupy"].cuda.runtime.getDevice())


@functools.cache
def _processors(device):
    count = ctypes.c_int()
    capability_of(device)  # starts the driver
    _check(_driver().cuDeviceGetAttribute(ctypes.byref(count), 16, device), "asking for the GPU's size")
    return count.value


def bits(number):
    """A float as the integer that the primitive ``as_real`` turns back."""
    return int(np.float64(number).view(np.int64))
