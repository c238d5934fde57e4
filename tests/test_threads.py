"""Kernels among threads and processes: concurrent calls, forks, the GIL, interrupts, and the cache on disk."""

from __future__ import annotations

import ast
import compileall
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from cases import Arguments, Array, backward, case_of, cotangents, forward

import sscan
from sscan import _cache
from sscan.cpu import _parallel

OP = "selective_scan"
ROOT = Path(sscan.__file__).parents[1]


def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A program in a new process."""
    # Python 3.12 warns of forks in processes with threads; forking there is what some of these programs are about.
    options = ["-W", "error", "-W", "ignore:.*fork:DeprecationWarning"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *options, "-c", textwrap.dedent(code), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, cwd=os.sep, **pipes)  # not where another sscan may lie


def output(process: subprocess.Popen[str]) -> str:
    """What it prints, once it has ended well."""
    try:
        out, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, error
    return out


# --- Threads ----------------------------------------------------------------------------------------------------------


def both_directions(problem: Arguments) -> list[Array]:
    outputs = forward(sscan, OP, problem)
    return [*outputs.values(), *backward(sscan, OP, problem, cotangents(outputs)).values()]


def test_calls_from_several_threads() -> None:
    """Eight at once, of different kinds and sizes, share the helpers and give what they give alone."""
    names = ("base", "zoh", "complex groups", "cu_seqlens with empty sequences", "length 500", "bfloat16")
    problems = [case_of(OP, name).arguments() for name in names]
    expected = [both_directions(problem) for problem in problems]
    gate = threading.Barrier(8)

    def work(worker: int) -> None:
        gate.wait()
        for i in range(12):
            which = (worker + i) % len(problems)
            for x, y in zip(both_directions(problems[which]), expected[which], strict=True):
                assert x.tobytes() == y.tobytes(), names[which]

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, worker) for worker in range(8)]:
            done.result()


def test_first_calls_from_several_threads() -> None:
    """The helpers are started, and everything is compiled, by whichever comes first."""
    code = """
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        digests = set(pool.map(lambda _: digest(), range(8)))
    sys.stdout.write(str(digests == {digest()}))
    """
    for _ in range(3):
        assert output(start(SCAN.replace("expected = digest()", "") + code, NUMBA_NUM_THREADS="3")) == "True"


def long_problem() -> Arguments:
    """A scan of 2^30 states, from inputs with strides of 0."""
    dim, state, length = 128, 256, 2**15
    wave = np.full((1, dim, length), 0.01, np.float32)
    matrix = np.broadcast_to(np.ones((1, 1, length), np.float32), (1, state, length))
    return {"u": wave, "delta": wave, "A": -np.ones((dim, state), np.float32), "B": matrix, "C": matrix}


def test_python_runs_while_a_kernel_does() -> None:
    """The GIL is released: another thread is never kept waiting for anything like the time of a call."""
    problem = long_problem()
    sscan.selective_scan(**{name: x[..., :64] if x.ndim > 2 else x for name, x in problem.items()})  # compiles
    stop, longest = threading.Event(), [0.0]

    def tick() -> None:
        last = time.perf_counter()
        while not stop.is_set():
            now = time.perf_counter()
            longest[0], last = max(longest[0], now - last), now

    ticking = threading.Thread(target=tick)
    ticking.start()
    begin = time.perf_counter()
    sscan.selective_scan(**problem)
    duration = time.perf_counter() - begin
    stop.set()
    ticking.join()
    assert longest[0] < duration / 2


@pytest.mark.parametrize("wanted", [1, 3])
def test_number_of_threads(wanted: int) -> None:
    """NUMBA_NUM_THREADS is obeyed; helpers are started by the first call that needs them."""
    code = """
        import sys
        import threading
        import numpy as np
        import sscan
        from sscan.cpu import _parallel

        assert threading.active_count() == 1
        sscan.rms_norm(np.ones((4000, 64), np.float32), np.ones(64, np.float32))
        sys.stdout.write(f"{_parallel.threads()} {threading.active_count()}")
    """
    assert output(start(code, NUMBA_NUM_THREADS=str(wanted))) == f"{wanted} {wanted}"


def test_interrupt_waits_for_the_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C leaves no thread behind that still writes to arrays which are about to be freed."""
    monkeypatch.setattr(_parallel, "threads", lambda: 2)
    begun, finished = threading.Event(), threading.Event()
    caller = threading.current_thread()

    def kernel(counter: Any, tasks: int) -> None:
        if threading.current_thread() is caller:
            begun.wait()  # so that the helper is past being cancelled
        else:
            begun.set()
            time.sleep(0.4)
            finished.set()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            _parallel.run(kernel, 2)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert finished.is_set()


def test_error_in_the_caller_waits_for_the_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same when the calling thread's share of a kernel fails, for want of memory say."""
    monkeypatch.setattr(_parallel, "threads", lambda: 2)
    begun, finished = threading.Event(), threading.Event()
    caller = threading.current_thread()

    def kernel(counter: Any, tasks: int) -> None:
        if threading.current_thread() is caller:
            begun.wait()
            raise MemoryError
        begun.set()
        time.sleep(0.2)
        finished.set()

    with pytest.raises(MemoryError):
        _parallel.run(kernel, 2)
    assert finished.is_set()


# A handler for signals that raises if it finds ``run`` on its way, and with it every time that a timer rings.
RINGING = """
    import signal
    import sys
    import threading
    import time
    import numpy as np
    import sscan
    from sscan.cpu import _parallel

    class TimeOut(BaseException):
        pass

    def ring(_, frame):
        while frame is not None:
            if frame.f_code is _parallel.run.__code__:
                raise TimeOut
            frame = frame.f_back

    left = 0
    signal.signal(signal.SIGALRM, ring)
    signal.signal(signal.SIGPROF, ring)
"""


def test_no_exception_leaves_while_a_helper_works() -> None:
    """Whatever a handler raises, anywhere in ``run`` and many times over: also while helpers are called."""
    code = """
    inside = []

    def work(counter, tasks):
        if threading.current_thread() is threading.main_thread():
            time.sleep(0.001)
        else:
            inside.append(1)
            time.sleep(0.003)
            inside.pop()

    _parallel.run(work, 3)  # starts the helpers
    signal.setitimer(signal.ITIMER_REAL, 0.00021, 0.00021)
    signal.setitimer(signal.ITIMER_PROF, 0.00013, 0.00013)
    end = time.monotonic() + 3
    while time.monotonic() < end:
        try:
            _parallel.run(work, 3)
        except TimeOut:
            left += 1
        assert not inside
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.write(f"{left > 100}")
    """
    assert output(start(RINGING + code, NUMBA_NUM_THREADS="3")) == "True"


def test_nothing_is_written_after_a_time_out() -> None:
    """Three long tasks on two threads: one of them works longer, and the calling thread waits for it."""
    code = """
    import numba

    @numba.njit(nogil=True)
    def work(counter, tasks, out):
        while True:
            task = _parallel.take(counter)
            if task >= tasks:
                break
            for i in range(out.shape[1]):
                for k in range(50):
                    out[task, i] = out[task, i] * 0.5 + k

    out = np.zeros((3, 10**6))
    _parallel.run(work, 3, out[:, :10])  # compiles
    for _ in range(8):
        out[:] = 0
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
            _parallel.run(work, 3, out)
        except TimeOut:
            signal.setitimer(signal.ITIMER_REAL, 0)
            left += 1
            before = out.copy()
            time.sleep(0.2)
            assert (before == out).all()
    sys.stdout.write(str(left))
    """
    assert output(start(RINGING + code, NUMBA_NUM_THREADS="2")) == "8"


def test_error_in_a_helper_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parallel, "threads", lambda: 2)
    begun, caller = threading.Event(), threading.current_thread()

    def kernel(counter: Any, tasks: int) -> None:
        if threading.current_thread() is caller:
            begun.wait()
        else:
            begun.set()
            raise MemoryError("no more")

    with pytest.raises(MemoryError, match="no more"):
        _parallel.run(kernel, 2)
    _parallel.run(lambda counter, tasks: None, 2)  # the helper lives on


def test_a_busy_helper_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who finds no helper does the work alone, and leaves no arrays behind with those that come later."""
    monkeypatch.setattr(_parallel, "threads", lambda: 2)
    monkeypatch.setattr(_parallel, "_calls", SimpleQueue())  # whose only helper is the one that is started here
    monkeypatch.setattr(_parallel, "_helpers", 0)
    begun, ending = threading.Event(), threading.Event()
    found: list[Any] = []

    def long_kernel(counter: Any, tasks: int) -> None:
        if threading.current_thread() is caller:
            begun.wait()
            array = np.zeros(10)
            died = weakref.ref(array)
            _parallel.run(lambda counter, tasks, array: found.append(threading.current_thread()), 2, array)
            del array
            found.append(died())
            ending.set()
        else:
            begun.set()
            ending.wait()

    caller = threading.Thread(target=_parallel.run, args=(long_kernel, 2), daemon=True)
    caller.start()
    caller.join(timeout=30)  # a hang fails
    ending.set()
    assert found == [caller, None]


# --- The end of a process ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["", "digest()"], ids=["first", "again"])
def test_work_after_the_main_thread_is_done(before: str) -> None:
    """In a thread that lives on, and in an atexit handler."""
    code = f"""
    import atexit
    import time

    def later():
        threading.main_thread().join()
        time.sleep(0.1)
        sys.stdout.write(digest() + " ")

    atexit.register(lambda: sys.stdout.write(digest()))
    {before}
    threading.Thread(target=later).start()
    """
    results = output(start(SCAN.replace("expected = digest()", "") + code, NUMBA_NUM_THREADS="3")).split()
    expected = output(start(SCAN + "    sys.stdout.write(expected)", NUMBA_NUM_THREADS="1"))
    assert results == [expected, expected]


def test_helpers_do_not_keep_a_process() -> None:
    """Not even when one of its daemon threads is in a kernel."""
    code = """
    threading.Thread(target=lambda: [digest() for _ in iter(int, 1)], daemon=True).start()
    sys.stdout.write("well")
    """
    assert output(start(SCAN + code, NUMBA_NUM_THREADS="3")) == "well"


def test_no_more_threads() -> None:
    """Where no thread can be started, the calling one does it all."""
    code = """
    def refuse(*_, **__):
        raise RuntimeError("can't start new thread")

    import _thread
    threading._start_new_thread = threading._start_joinable_thread = refuse
    sys.stdout.write(digest())
    """
    first = SCAN.replace("expected = digest()", "")
    alone = output(start(first + code, NUMBA_NUM_THREADS="3"))
    assert alone == output(start(SCAN + "    sys.stdout.write(expected)", NUMBA_NUM_THREADS="3"))


# --- Forks ------------------------------------------------------------------------------------------------------------

SCAN = """
    import hashlib
    import multiprocessing
    import os
    import sys
    import threading
    import numpy as np
    import sscan

    rng = np.random.default_rng(0)
    u, delta, dy = rng.standard_normal((3, 2, 200, 300), np.float32)
    B, C = rng.standard_normal((2, 2, 8, 300), np.float32)
    A = -np.ones((200, 8), np.float32)

    def digest(_=None):
        results = [sscan.selective_scan(u, delta, A, B, C, delta_softplus=True)]
        results += sscan.selective_scan_backward(dy, u, delta, A, B, C, delta_softplus=True)
        return hashlib.sha256(b"".join(x.tobytes() for x in results if x is not None)).hexdigest()

    expected = digest()  # the helpers of this process have run
    context = multiprocessing.get_context("fork")
"""


def test_forked_workers() -> None:
    """Workers forked from a process whose helpers have run start helpers of their own."""
    code = """
    with context.Pool(2) as pool:
        digests = pool.map_async(digest, range(8), chunksize=1).get(timeout=60)
    assert set(digests) == {expected} and digest() == expected
    sys.stdout.write("well")
    """
    assert output(start(SCAN + code, NUMBA_NUM_THREADS="3")) == "well"


def test_fork_while_kernels_run() -> None:
    """Other threads are inside kernels, or between them, at the moment of the fork."""
    code = """
    stop, wrong = threading.Event(), []

    def work():
        while not stop.is_set():
            if digest() != expected:
                wrong.append(1)

    def child(queue):
        queue.put(digest())

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    queue = context.SimpleQueue()
    for _ in range(10):
        process = context.Process(target=child, args=(queue,))
        process.start()
        process.join(60)
        assert process.exitcode == 0, process.exitcode
        assert queue.get() == expected
    stop.set()
    for worker in workers:
        worker.join()
    assert not wrong
    sys.stdout.write("well")
    """
    assert output(start(SCAN + code, NUMBA_NUM_THREADS="3")) == "well"


def test_fork_while_a_kernel_is_compiled(tmp_path: Path) -> None:
    """The child compiles for itself."""
    code = """
    import multiprocessing
    import os
    import sys
    import threading
    import time
    import numpy as np
    import sscan
    from numba.core.compiler_lock import global_compiler_lock

    x, weight = np.ones((4, 64), np.float32), np.ones(64, np.float32)
    entered = threading.Event()

    def work():
        import sscan.cpu
        entered.set()
        sscan.rms_norm(x, weight)

    def child(queue):
        queue.put(float(sscan.rms_norm(2 * x, weight).sum()))

    worker = threading.Thread(target=work)
    worker.start()
    entered.wait()
    free = True
    while free:  # until the worker compiles
        free = global_compiler_lock._lock.acquire(blocking=False)
        if free:
            global_compiler_lock._lock.release()
            time.sleep(0.001)
    queue = multiprocessing.get_context("fork").SimpleQueue()
    process = multiprocessing.get_context("fork").Process(target=child, args=(queue,))
    process.start()
    process.join(60)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0, process.exitcode
    worker.join(60)
    sys.stdout.write(f"{queue.get():.2f}")
    """
    assert output(start(code, NUMBA_CACHE_DIR=str(tmp_path))) == "256.00"


# --- The environment of threads ---------------------------------------------------------------------------------------


def test_an_error_in_a_kernel_leaves_subnormal_numbers() -> None:
    """No memory for a kernel's workspace: the thread goes on as it was."""
    code = """
    import resource
    import sys
    import numpy as np
    import sscan

    def scan(state):
        u, A = np.ones((1, 1, 40), np.float32), -np.ones((1, state), np.float32)
        sscan.selective_scan(u, u, A, A, A)

    scan(3)  # compiles
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + 2**28
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    tiny = np.full(4, 1e-40, np.float32)
    try:
        scan(2**21)
    except MemoryError:
        sys.stdout.write(f"{(tiny * np.float32(1) != 0).all()}")
    """
    assert output(start(code, NUMBA_NUM_THREADS="1")) == "True"


FLUSHING = [
    pytest.param(node, id=f"{path.stem}.{node.name}")
    for path in sorted((ROOT / "sscan" / "cpu").glob("*.py"))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.FunctionDef)
    and any(isinstance(x, ast.Assign) and "flush_subnormals()" in ast.unparse(x) for x in node.body)
]


def test_kernels_that_flush_are_known() -> None:
    assert len(FLUSHING) >= 9


@pytest.mark.parametrize("kernel", FLUSHING)
def test_kernels_allocate_before_they_flush(kernel: ast.FunctionDef) -> None:
    """What fails for want of memory fails while the environment is the caller's."""
    lines = [ast.unparse(x) for x in kernel.body]
    begin = next(i for i, line in enumerate(lines) if "flush_subnormals()" in line)
    assert lines[-1] == "restore_environment(environment)"
    assert any("scratch" in line for line in lines[:begin])
    assert not [line for line in lines[begin:] if re.search(r"scratch\(|np\.(empty|zeros|full)|\.copy\(", line)]


# --- The cache on disk ------------------------------------------------------------------------------------------------

# Calls one small kernel from four threads at once; prints how often it was read from disk and compiled, and its result.
FIRST_CALL = """
    import hashlib
    import sys
    from concurrent.futures import ThreadPoolExecutor
    import numpy as np
    import sscan
    from sscan.cpu import rms_norm

    x, weight = np.random.default_rng(0).standard_normal((2, 64), np.float32)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(sscan.rms_norm, x[None], weight) for _ in range(4)]
        results = {call.result().tobytes() for call in calls}
    (result,) = results
    stats = sys.modules["sscan.cpu.rms_norm"].forward.stats
    sys.stdout.write(f"{sum(stats.cache_hits.values())} {sum(stats.cache_misses.values())} ")
    sys.stdout.write(hashlib.sha256(result).hexdigest())
"""


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache folder that two processes have compiled into at the same time, and the digest that both came to."""
    folder = tmp_path_factory.mktemp("cache") / "empty"
    together = [start(FIRST_CALL, NUMBA_CACHE_DIR=str(folder)) for _ in range(2)]
    (digest,) = {output(process).split()[2] for process in together}
    return folder, digest


def test_processes_share_their_cache(filled: tuple[Path, str]) -> None:
    """A third one compiles nothing."""
    folder, digest = filled
    assert output(start(FIRST_CALL, NUMBA_CACHE_DIR=str(folder))).split() == ["1", "0", digest]


def test_cache_folder_that_cannot_be_written(filled: tuple[Path, str], tmp_path: Path) -> None:
    """Kernels are compiled for this process alone."""
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "below"  # permissions would not stop root
    assert output(start(FIRST_CALL, NUMBA_CACHE_DIR=str(folder))).split() == ["0", "1", filled[1]]


def test_cached_kernels_that_are_damaged(filled: tuple[Path, str], tmp_path: Path) -> None:
    """Files cut short, by a full disk say, are compiled anew, once."""
    shutil.copytree(filled[0], tmp_path, dirs_exist_ok=True)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for counts in (["0", "1"], ["1", "0"]):
        assert output(start(FIRST_CALL, NUMBA_CACHE_DIR=str(tmp_path))).split() == [*counts, filled[1]]


def test_cached_kernels_of_which_bits_flipped(filled: tuple[Path, str], tmp_path: Path) -> None:
    """Anywhere in the file: what does not add up is not run."""
    shutil.copytree(filled[0], tmp_path, dirs_exist_ok=True)
    (file,) = (path for path in tmp_path.rglob("*.rms_norm.forward-*"))
    whole = file.read_bytes()
    assert _cache.read(file.parent, file.name) is not None
    for at in (0, 40, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert _cache.read(file.parent, file.name) is None
    assert output(start(FIRST_CALL, NUMBA_CACHE_DIR=str(tmp_path))).split() == ["0", "1", filled[1]]
    assert output(start(FIRST_CALL, NUMBA_CACHE_DIR=str(tmp_path))).split() == ["1", "0", filled[1]]


def of_others(change: str, folder: Path) -> None:
    """Make the folder, or the files in it, what others may have written."""
    (kernels,) = folder.iterdir()
    for path in [kernels] if "folder" in change else list(kernels.iterdir()):
        if "writable" in change:
            path.chmod(path.stat().st_mode | 0o002)
        else:
            os.chown(path, 12345, 12345)


@pytest.mark.parametrize("change", ["writable folder", "writable file", "folder of another", "file of another"])
def test_cached_kernels_that_others_may_have_written(filled: tuple[Path, str], tmp_path: Path, change: str) -> None:
    """They are compiled, with one warning."""
    shutil.copytree(filled[0], tmp_path, dirs_exist_ok=True)
    if "another" in change and os.geteuid() != 0:  # only root can give files away: be the other one instead
        change = change.replace("of another", "writable")
    of_others(change, tmp_path)
    always = "    import warnings; warnings.simplefilter('always')"
    process = start(always + FIRST_CALL, NUMBA_CACHE_DIR=str(tmp_path))
    out, error = process.communicate(timeout=120)
    assert out.split() == ["0", "1", filled[1]]
    assert re.findall(r"RuntimeWarning: (sscan: compiled kernels in \S+ are not used)", error), error
    assert error.count("Warning") == 1
    if "file" in change:  # it was replaced
        assert output(start(FIRST_CALL, NUMBA_CACHE_DIR=str(tmp_path))).split() == ["1", "0", filled[1]]


def test_cache_of_a_user_without_a_home(filled: tuple[Path, str]) -> None:
    """A number without a name, as in containers: NUMBA_CACHE_DIR is enough, and without it nothing is kept."""
    code = """
    import os
    import pwd
    import sys

    def nobody(uid):
        raise KeyError(uid)

    pwd.getpwuid = nobody
    for name in ("HOME", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
    """
    without = output(start(textwrap.dedent(code) + textwrap.dedent(FIRST_CALL), NUMBA_CACHE_DIR=""))
    assert without.split() == ["0", "1", filled[1]]
    given = output(start(textwrap.dedent(code) + textwrap.dedent(FIRST_CALL), NUMBA_CACHE_DIR=str(filled[0])))
    assert given.split() == ["1", "0", filled[1]]


def test_compiled_where_numba_is_switched_off(filled: tuple[Path, str], tmp_path: Path) -> None:
    """NUMBA_DISABLE_JIT is for somebody's own functions: they stay Python."""
    own = """
    import numba

    assert not hasattr(numba.njit(lambda x: x), "py_func")
    """
    folder = str(tmp_path)
    found = output(start(FIRST_CALL + own, NUMBA_CACHE_DIR=folder, NUMBA_DISABLE_JIT="1"))
    assert found.split() == ["0", "1", filled[1]]


FOLDER = "import sys; from sscan.cpu import _parallel; sys.stdout.write(str(_parallel.cache_folder()))"


def test_cache_folder_is_named_by_the_kernels_sources(tmp_path: Path) -> None:
    """An edit of any file that kernels are made of changes it; one elsewhere in the package does not."""
    shutil.copytree(ROOT / "sscan", tmp_path / "sscan", ignore=shutil.ignore_patterns("__pycache__"))

    def folder() -> Path:
        return Path(output(start(FOLDER, PYTHONPATH=str(tmp_path), NUMBA_CACHE_DIR=str(tmp_path / "cache"))))

    names = [folder()]
    assert names[0].parent == tmp_path / "cache"
    for edited in ("selective_scan.py", "cpu/_tiles.py", "cpu/_vector.py"):
        with (tmp_path / "sscan" / edited).open("a") as file:
            file.write("\n# edited\n")
        names.append(folder())
    assert names[1] == names[0]
    assert len(set(names)) == 3


def zipped(source: Path, file: Path) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(source.rglob("*")):
            archive.write(path, path.relative_to(source))
    return file


def test_cache_folder_of_a_zip(filled: tuple[Path, str], tmp_path: Path) -> None:
    """The same sources have the same name there, other sources have another one; and kernels are kept."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "sscan", tmp_path / "tree" / "sscan", ignore=ignored)
    same = zipped(tmp_path / "tree", tmp_path / "same.zip")
    with (tmp_path / "tree" / "sscan" / "cpu" / "_tiles.py").open("a") as file:
        file.write("\n# edited\n")
    other = zipped(tmp_path / "tree", tmp_path / "other.zip")
    names = [output(start(FOLDER, PYTHONPATH=str(path))) for path in (ROOT, same, other)]
    assert names[0] == names[1] != names[2]
    found = output(start(FIRST_CALL, PYTHONPATH=str(same), NUMBA_CACHE_DIR=str(filled[0])))
    assert found.split() == ["1", "0", filled[1]]


def test_cache_folder_without_sources(tmp_path: Path) -> None:
    """Byte code alone, as in a frozen program: each release has its own."""
    names = []
    for release in ("1.2.3", "1.2.4"):
        tree = tmp_path / release / "sscan"
        shutil.copytree(ROOT / "sscan", tree, ignore=shutil.ignore_patterns("__pycache__"))
        first = tree / "__init__.py"
        first.write_text(re.sub(r'__version__ = ".*"', f'__version__ = "{release}"', first.read_text()))
        compileall.compile_dir(tree, quiet=2, legacy=True)
        for path in tree.rglob("*.py"):
            path.unlink()
        names.append(output(start(FOLDER, PYTHONPATH=str(tree.parent))))
    assert len(set(names)) == 2
    assert all("cpu-" in name for name in names)


def test_cache_folder_of_the_user(tmp_path: Path) -> None:
    """Without NUMBA_CACHE_DIR it lies where the user's caches do."""
    inherited = {"NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path)}
    assert Path(output(start(FOLDER, **inherited))).parent == tmp_path / "sscan"
