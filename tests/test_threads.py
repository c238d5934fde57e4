"""Kernels among threads and processes: concurrent calls, forks, the GIL, interrupts, and the cache on disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import Arguments, Array, backward, case_of, cotangents, forward

import sscan
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


def test_cache_folder_of_the_user(tmp_path: Path) -> None:
    """Without NUMBA_CACHE_DIR it lies where the user's caches do."""
    inherited = {"NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path)}
    assert Path(output(start(FOLDER, **inherited))).parent == tmp_path / "sscan"
