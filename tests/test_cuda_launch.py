"""The cache of compiled kernels, and what a launch hands to the driver; no GPU is needed."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import gc
import importlib.metadata
import os
import subprocess
import sys
import threading
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from driver_double import Driver, Launch

from sscan import _cache
from sscan.cuda import _inspect, _launch, _target, _workspace
from sscan.cuda._launch import Kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for path in (ROOT / "sscan" / "cuda").rglob("*.py") if path.name != "__init__.py")
KERNEL = Kernel("_sums", "over_parts", ("float32", "float32", 1))
CUBIN = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    _launch.cache_folder.cache_clear()
    yield tmp_path
    _launch.cache_folder.cache_clear()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was compiled; nothing really is."""
    seen: list[Any] = []

    def compile_ptx(kernel: Kernel) -> tuple[str, int]:
        seen.append(kernel)
        return "ptx", 128

    monkeypatch.setattr(_launch, "compile_ptx", compile_ptx)
    monkeypatch.setattr(_launch, "assemble", lambda ptx, capability: (CUBIN + bytes(capability), "log"))
    return seen


def files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


# --- Compiling --------------------------------------------------------------------------------------------------------


def code(kernel: Kernel) -> list[str]:
    """Its PTX, but for a name that counts how often Numba compiled a function."""
    return [line for line in _launch.compile_ptx(kernel)[0].split("\n") if "NumbaEnv" not in line]


@pytest.mark.parametrize("module", ["linear_scan", "causal_conv1d_last", "selective_state_update"])
def test_numba_makes_the_same_code_in_less_time(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = next(kernel for kernel in _inspect.shipped() if kernel.module == module)
    ours, theirs, compared = _target._live_map, _target.analysis.compute_live_map, []

    def live_map(*arguments: Any) -> Any:
        alive = ours(*arguments)
        compared.append(alive == theirs(*arguments))
        return alive

    monkeypatch.setattr(_target, "_live_map", live_map)
    hastened = code(kernel)
    assert compared
    assert all(compared)
    monkeypatch.setattr(_target, "_hastened", contextlib.nullcontext)
    assert code(kernel) == hastened


def test_numba_is_as_it_was_after_a_kernel_that_does_not_compile() -> None:
    def kernel(address: int) -> None:
        undefined(address)  # type: ignore[name-defined]  # noqa: F821

    def of_numba() -> list[Any]:
        inlining = _target.inline_closurecall
        resolve = _target.BaseContext.resolve_function_type
        live_map = _target.analysis.compute_live_map
        return [inlining.InlineWorker.inline_function, inlining.copy, live_map, resolve, gc.isenabled()]

    before = of_numba()
    with pytest.raises(Exception, match="undefined"):
        _target.compile_ptx(kernel, "kernel", 32, 1)
    assert of_numba() == before


# --- Cache ------------------------------------------------------------------------------------------------------------


def test_a_kernel_is_compiled_once(folder: Path, compilations: list[Any]) -> None:
    for _ in range(2):
        assert _launch.cached(KERNEL, (9, 0)) == (CUBIN + bytes([9, 0]), 128, False)
    assert compilations == [KERNEL]
    (file,) = files(folder)
    assert file.parent == _launch.cache_folder()
    assert file.suffix == ".cubin", "no temporary file is left"


@pytest.mark.parametrize(
    ("kernel", "capability"),
    [
        (KERNEL, (8, 0)),
        (KERNEL._replace(module="other"), (9, 0)),
        (KERNEL._replace(factory="other"), (9, 0)),
        (KERNEL._replace(key=("float32", "float16")), (9, 0)),
        (KERNEL._replace(key=("float32", "float32", 2)), (9, 0)),
        (KERNEL._replace(key=("float32", "float32", True)), (9, 0)),
    ],
    ids=str,
)
def test_other_kernels_have_other_files(
    folder: Path, compilations: list[Any], kernel: Kernel, capability: tuple[int, int]
) -> None:
    _launch.cached(KERNEL, (9, 0))
    assert _launch.cached(kernel, capability)[0] == CUBIN + bytes(capability)
    assert len(compilations) == len(files(folder)) == 2


@pytest.mark.parametrize("kept", [0, 3, 20, 32, 36, 37, -1])
def test_a_truncated_file_is_made_again(folder: Path, compilations: list[Any], kept: int) -> None:
    first = _launch.cached(KERNEL, (9, 0))
    (file,) = files(folder)
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    assert _launch.cached(KERNEL, (9, 0)) == first
    assert len(compilations) == 2
    assert file.read_bytes() == whole


@pytest.mark.parametrize("at", [0, 31, 32, 33, 36, -1])
def test_a_damaged_file_is_made_again(folder: Path, compilations: list[Any], at: int) -> None:
    """Its checksum, the number of threads, the cubin."""
    first = _launch.cached(KERNEL, (9, 0))
    (file,) = files(folder)
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    assert _launch.cached(KERNEL, (9, 0)) == first
    assert len(compilations) == 2


@pytest.mark.parametrize("owner", [0, "another"])
@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_cache_of_another_owner(
    folder: Path, compilations: list[Any], monkeypatch: pytest.MonkeyPatch, what: str, owner: Any
) -> None:
    """Kernels of the administrator are used, those of others are not, with one warning for all of them."""
    first = _launch.cached(KERNEL, (9, 0))
    place = _launch.cache_folder()
    (file,) = files(folder)
    changed = place if what == "folder" else file
    stat, fstat = os.stat, os.fstat
    given = SimpleNamespace(st_uid=os.geteuid() + 1 if owner == "another" else owner, st_mode=0o755)
    inode = stat(changed).st_ino
    monkeypatch.setattr(Path, "stat", lambda path: given if stat(path).st_ino == inode else stat(path))
    monkeypatch.setattr(os, "fstat", lambda handle: given if fstat(handle).st_ino == inode else fstat(handle))
    _cache._warn.cache_clear()
    if owner == 0:
        assert _launch.cached(KERNEL, (9, 0)) == first
        assert len(compilations) == 1
        return
    with pytest.warns(RuntimeWarning, match=f"sscan: compiled kernels in {place} are not used") as seen:
        found = [_launch.cached(KERNEL, (9, 0)) for _ in range(2)]
    assert found == [first] * 2
    assert len(seen) == 1
    # A folder of another is not written to; a file of another in a folder of one's own is replaced.
    assert len(compilations) == (3 if what == "folder" else 2)


def test_others_cannot_write_to_the_cache(folder: Path, compilations: list[Any]) -> None:
    """Whatever the umask, and they may read."""
    before = os.umask(0)
    try:
        _launch.cached(KERNEL, (9, 0))
    finally:
        os.umask(before)
    (file,) = files(folder)
    assert _launch.cache_folder().stat().st_mode & 0o777 == 0o755
    assert file.stat().st_mode & 0o777 == 0o644


def test_a_user_without_a_home(compilations: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept."""
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    _launch.cache_folder.cache_clear()
    assert _launch.cache_folder() is None
    for _ in range(2):
        assert _launch.cached(KERNEL, (9, 0)) == (CUBIN + bytes([9, 0]), 128, False)
    assert len(compilations) == 2


def test_a_folder_that_cannot_be_written(
    folder: Path, compilations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a file stands where the folder should: permissions would not stop root."""
    (folder / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder / "file"))
    _launch.cache_folder.cache_clear()
    for _ in range(2):
        assert _launch.cached(KERNEL, (9, 0)) == (CUBIN + bytes([9, 0]), 128, False)
    assert len(compilations) == 2


def test_a_full_disk(folder: Path, compilations: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half-written is left behind."""

    def replace(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", replace)
    assert _launch.cached(KERNEL, (9, 0))[1] == 128
    assert not files(folder)


def test_many_writers_of_one_file(folder: Path) -> None:
    """Whoever reads sees all of what one of them wrote."""
    contents, failures = [bytes([i]) * 10**6 for i in range(4)], []
    _cache.write(folder, "file", contents[0])
    reading = threading.Event()

    def write(data: bytes) -> None:
        for _ in range(20):
            _cache.write(folder, "file", data)

    def read() -> None:
        while not reading.is_set():
            if _cache.read(folder, "file") not in contents:
                failures.append("a mixture")

    reader, writers = threading.Thread(target=read), [threading.Thread(target=write, args=(x,)) for x in contents]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    reading.set()
    reader.join()
    assert not failures
    assert files(folder) == [folder / "file"]


def test_the_folder_is_of_the_sources_and_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    def folder_now() -> Path:
        _launch.cache_folder.cache_clear()
        return _launch.cache_folder()

    before, version = folder_now(), importlib.metadata.version
    assert folder_now() == before
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "0" if name == "numba-cuda" else version(name))
        assert folder_now() != before
    read = Path.read_bytes
    for edited in SOURCES:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path, edited=edited: read(path) + b"#" * (path == edited))
            assert folder_now() != before, edited


def test_kernels_are_made_of_these_sources_alone() -> None:
    """Constants too, which kernels share with what launches them."""
    kernels = [path for path in SOURCES if path.parent.name == "kernels"]
    assert kernels
    for path in kernels:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sscan"):
                assert (node.module or "").startswith("sscan.cuda"), path


WARM = """
import hashlib, sys
from sscan.cuda import _launch
cubin, threads, early = _launch.cached(_launch.Kernel("_sums", "over_parts", ("float32", "float32", 1)), (9, 0))
loaded = {"numba", "numba_cuda", "llvmlite", "cuda", "sscan.cuda.kernels", "sscan.cuda._target"} & sys.modules.keys()
print(threads, hashlib.sha256(cubin).hexdigest(), cubin[:4] == b"\\x7fELF", *sorted(loaded))
"""


def test_a_warm_process_loads_no_compiler() -> None:
    """The first compiles, the second only reads."""

    def run() -> list[str]:
        command = [sys.executable, "-c", WARM]
        process = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=300)
        return process.stdout.split()

    cold, warm = run(), run()
    assert {"numba_cuda", "llvmlite", "cuda"} <= set(cold[3:])
    assert warm == [*cold[:3]], "the same kernel, and nothing was imported"
    assert warm[2] == "True"


# --- Driver -----------------------------------------------------------------------------------------------------------


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    _launch._driver.cache_clear()
    with pytest.raises(RuntimeError, match=r"no NVIDIA driver \(.*\) on this machine: .*cannot open"):
        _launch._driver()
    _launch._driver.cache_clear()


def device_of(monkeypatch: pytest.MonkeyPatch, **capabilities: int) -> None:
    """A driver that knows one device of a capability."""

    def attribute(value: Any, number: int, device: int) -> int:
        value._obj.value = {75: capabilities["major"], 76: capabilities["minor"]}[number]
        return 0

    driver = SimpleNamespace(cuInit=lambda flags: 0, cuDeviceGetAttribute=attribute)
    monkeypatch.setattr(_launch, "_driver", lambda: driver)
    _launch.capability_of.cache_clear()


@pytest.mark.parametrize(("major", "minor"), [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_gpus_that_are_new_enough(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    device_of(monkeypatch, major=major, minor=minor)
    assert _launch.capability_of(0) == (major, minor)
    _launch.capability_of.cache_clear()


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    device_of(monkeypatch, major=7, minor=5)
    with pytest.raises(RuntimeError, match=r"device 0 has compute capability 7\.5; the kernels need 8\.0 \(Ampere\)"):
        _launch.capability_of(0)
    _launch.capability_of.cache_clear()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A driver, and what a launch asks of CuPy."""
    double = Driver()
    cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDevice=lambda: 1, free=double.freed.append),
        get_current_stream=lambda: SimpleNamespace(ptr=77),
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(_launch, "_driver", lambda: double)
    monkeypatch.setattr(_launch, "_functions", {(KERNEL, 1): _launch.Function(KERNEL.name, 4242, 128, False)})
    return double


def test_what_a_launch_hands_over(driver: Driver) -> None:
    """Function, blocks and threads, current stream; addresses, 0 for None, and integers of 64 bits."""
    array = SimpleNamespace(data=SimpleNamespace(ptr=2**46 + 16))
    _launch.launch(KERNEL, 2**31 - 1, array, None, 2**62, -5, 0)
    parameters = [2**46 + 16, 0, 2**62, -5, 0]
    assert driver.launches == [Launch(4242, (2**31 - 1, 1, 1), (128, 1, 1), 0, 77, [], parameters)]


def test_a_kernel_that_waits_by_itself_may_come_early(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION is 6."""
    monkeypatch.setitem(_launch._functions, (KERNEL, 1), _launch.Function(KERNEL.name, 4242, 128, True))
    _launch.launch(KERNEL, 3, 1)
    assert driver.launches == [Launch(4242, (3, 1, 1), (128, 1, 1), 0, 77, [(6, 1)], [1])]


def test_products_of_a_repeated_call_are_told_the_stream_once(driver: Driver) -> None:
    streams, seen = [], []

    class Product:
        def starter(self, stream: int) -> Any:
            streams.append(stream)
            return lambda product, *addresses: seen.append((product, addresses))

    first, second = Product(), Product()
    _launch.repeat([(first, itemgetter(0, 1, 2)), (second, itemgetter(2, 1, 0))], [10, 11, 12], 7)
    assert (streams, seen) == ([7], [(first, (10, 11, 12)), (second, (12, 11, 10))])


def test_no_blocks_no_launch(driver: Driver) -> None:
    _launch.launch(KERNEL, 0, 1, 2)
    assert not driver.launches


def test_parameters_of_each_thread(driver: Driver) -> None:
    """Many launches at once do not mix their parameters."""

    def work(number: int) -> None:
        for _ in range(200):
            _launch.launch(KERNEL, number, *[number] * number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(driver.launches) == 1600
    assert all(launch.parameters == [launch.blocks[0]] * launch.blocks[0] for launch in driver.launches)


def test_a_thread_without_a_context(driver: Driver) -> None:
    driver.statuses.append(_launch.NO_CONTEXT)
    _launch.launch(KERNEL, 3, 1)
    assert len(driver.launches) == 2
    assert driver.freed == [0]


def test_a_launch_that_fails(driver: Driver) -> None:
    driver.statuses.append(700)
    with pytest.raises(RuntimeError, match=r"launching _sums_over_parts: error 700 of the driver \(CUDA error 700\)"):
        _launch.launch(KERNEL, 3, 1)


def test_workspaces_of_one_allocation_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, base = (1, 0, 256, 300, 4), 2**46
    made: list[int] = []
    monkeypatch.setattr(_launch, "empty", lambda size, dtype: made.append(size * dtype.itemsize) or "memory")
    monkeypatch.setattr(_launch, "address", {"memory": base}.__getitem__)
    memory, addresses = _workspace.take(_workspace.layout(*sizes))
    assert (memory, addresses[1]) == ("memory", None), "of no bytes: none"
    ends = [(at, at + size) for at, size in zip(addresses, sizes, strict=True) if size]
    assert all(at % 256 == 0 for at, _ in ends)
    assert all(end <= after for (_, end), (after, _) in zip(ends, [*ends[1:], (base + made[0], 0)], strict=True))
    assert len(made) == 1
