"""Small problems that touch every kernel on a GPU, checked against the reference: something to run a sanitizer on.

    compute-sanitizer --tool memcheck --error-exitcode 9 python bench/inspect/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python bench/inspect/sanitize.py

Every array has memory of its own from cudaMalloc, of exactly its size. Exit code 1 if a result is wrong or a kernel of
``shipped()`` was not run. Fill the kernel cache first, without a sanitizer and on all cores::

    for i in $(seq 0 15); do python bench/inspect/sanitize.py --share $i/16 & done; wait
"""

import argparse
import functools
import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cupy
import numpy as np

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path.insert(0, str(TESTS))

import cases  # noqa: E402
import state_passing_cases  # noqa: E402
from cases import DIFFERENTIABLE, Case, check_backward, check_forward  # noqa: E402

import sscan.nn  # noqa: E402
from sscan.cuda import _launch  # noqa: E402

Check = functools.partial[None]

SOME: dict[str, tuple[str, ...]] = {
    "selective_scan": (
        "base", "bare", "initial state", "float64", "float16", "bfloat16", "length 1", "length 33", "state 1",
        "state 4", "state 16", "state 17", "state 64", "dim 40", "groups 2", "groups 2, 17 states", "groups bfloat16",
        "constant B", "constant C", "constant B and C", "constant B, groups in C", "constant B and C float16",
        "seq_idx int64, initial state", "seq_idx bfloat16", "cu_seqlens with empty sequences", "cu_seqlens groups",
        "zoh", "zoh everything", "zoh bfloat16", "zoh constant B and C", "complex", "complex arrays", "complex groups",
        "complex constant B and C", "complex seq_idx", "complex float64", "complex bfloat16", "complex state 17",
        "complex zoh", "strided memory", "offset memory", "broadcast memory",
    ),
    "selective_state_update": (
        "base", "bare", "float64", "float16", "bfloat16", "bfloat16 state", "groups 2", "complex", "state 1",
        "state 17", "state 256", "indices with skipped rows",
    ),
    "discretize": (
        "zoh", "mamba", "bilinear", "euler", "zoh lti", "zoh complex", "zoh lti complex", "zoh float64", "zoh bfloat16",
        "zoh constant B", "zoh 2 B", "zoh complex 2 B", "zoh state 1", "zoh strided memory",
    ),
    "linear_scan": (
        "initial state", "reverse, initial state", "float64", "float16", "bfloat16", "complex64", "complex128",
        "complex64 reverse", "length 1", "length 33", "length 500", "offset memory",
    ),
    "causal_conv1d": (
        "base", "bare", "initial state", "float64", "float16", "bfloat16", "width 1", "width 2", "width 5", "width 8",
        "length 1", "length 500", "dim 17", "seq_idx, initial state", "seq_idx, width 8", "cu_seqlens",
        "cu_seqlens with empty sequences", "cu_seqlens bfloat16", "offset memory",
    ),
    "causal_conv1d_update": (
        "base", "float64", "bfloat16", "width 1, wide state", "wide state", "very wide state", "bfloat16, all in it",
    ),
    "rms_norm": (
        "base", "residual", "float64 residual", "float16", "bfloat16, float32 residual", "bfloat16 residual", "width 1",
        "width 17", "width 1000", "strided memory",
    ),
    "ssm_kernel": ("zoh", "zoh complex", "zoh float64", "zoh length 500"),
}  # fmt: skip


def problem(builder: str, **changes: Any) -> Any:
    return functools.partial(getattr(cases, builder), **changes)


def more() -> Iterator[Case]:
    """What the conformance suite has no small case for: aligned arrays, rows or time cut into parts, wide rows."""
    scans: dict[str, dict[str, Any]] = {
        "aligned": {"dim": 64, "length": 64, "state": 16},
        "aligned bfloat16": {"dim": 64, "length": 64, "state": 16, "dtype": "bfloat16"},
        "aligned zoh": {"dim": 32, "length": 64, "state": 16, "discretization": "zoh"},
        "aligned complex": {"dim": 32, "length": 64, "state": 16, "is_complex": True},
        "many blocks": {"batch": 140, "dim": 68, "length": 36, "state": 16},
        "many blocks bfloat16": {"batch": 140, "dim": 68, "length": 40, "state": 16, "dtype": "bfloat16"},
        "many blocks, odd length": {"batch": 140, "dim": 65, "length": 19, "state": 5, "dtype": "bfloat16"},
    }
    cut = {"batch": 1, "dim": 36, "length": 512, "initial_state": True}
    for name, changes in {
        "": {"state": 16},
        " bfloat16": {"state": 16, "dtype": "bfloat16"},
        " odd": {"length": 509, "state": 5, "dtype": "bfloat16"},
        " zoh": {"discretization": "zoh"},
        " complex": {"is_complex": True},
        " float64": {"dtype": "float64"},
        " many states": {"state": 20},
        " seq_idx": {"seq_idx": "int32"},
        " cu_seqlens": {"cu_seqlens": (0, 5, 300, 512)},
        " constant B and C": {"B": "constant", "C": "constant"},
    }.items():
        scans[f"time in parts{name}"] = {**cut, **changes}
    recurrences: dict[str, dict[str, Any]] = {
        f"time in parts {dtype}{' reverse' * reverse}": {"shape": (2, 9001), "dtype": dtype, "reverse": reverse}
        for dtype in ("float32", "bfloat16", "complex64")
        for reverse in (False, True)
    }
    recurrences["aligned, in parts"] = {"shape": (1, 8192), "dtype": "float32"}
    recurrences |= {f"a block for a row {d}": {"shape": (270, 1100), "dtype": d} for d in ("float32", "bfloat16")}
    norms = {f"width {n} {d}": {"shape": (5, n), "dtype": d, "residual": r} for n, d, r in (
        (512, "float32", None), (512, "bfloat16", "float32"), (5120, "bfloat16", "float32"), (5121, "float32", None),
        (20000, "float32", "float32"), (20001, "bfloat16", "bfloat16"),
    )}  # fmt: skip
    convolutions = {
        f"{name} {dtype}": {"dim": 8, "dtype": dtype, **changes}
        for dtype in ("float32", "bfloat16")
        for name, changes in {"aligned": {"length": 512}, "wide": {"width": 12, "initial_state": True}}.items()
    }
    convolutions |= {
        f"neighbouring channels {dtype}": {"dim": 8, "length": 77, "layout": "transposed", "dtype": dtype, **changes}
        for dtype, changes in {
            "float32": {"initial_state": True},
            "bfloat16": {"seq_idx": "int32"},
            "float64": {},
            "float16": {"batch": 1, "cu_seqlens": (0, 13, 45, 77), "initial_state": True},
        }.items()
    }
    convolutions |= {
        f"rows anywhere {dtype}": {"dim": 9, "length": 777, "dtype": dtype} for dtype in ("float32", "bfloat16")
    }
    convolutions["wide, packed"] = {"batch": 1, "width": 12, "cu_seqlens": (0, 13, 45, 70), "initial_state": True}
    discretizations = {
        f"aligned {d}": {"dim": 40, "length": 16, "state": 16, "dtype": d} for d in ("float32", "bfloat16")
    }
    discretizations["many states"] = {"state": 150}
    updates = {f"aligned {d}": {"dim": 64, "state": 16, "dtype": d} for d in ("float32", "bfloat16", "float64")}
    for op, builder, table in (
        ("selective_scan", "scan_problem", scans), ("linear_scan", "linear_scan_problem", recurrences),
        ("rms_norm", "norm_problem", norms), ("causal_conv1d", "conv_problem", convolutions),
        ("discretize", "discretize_problem", discretizations), ("selective_state_update", "update_problem", updates),
    ):  # fmt: skip
        for name, changes in table.items():
            yield Case(name, op, problem(builder, **changes))
    yield Case("aligned, length 5000", "ssm_kernel", problem("kernel_problem", dim=2, length=5000))


def chosen(op: str | None) -> list[Case]:
    named = [cases.case_of(name, case) for name, table in SOME.items() for case in table]
    return [case for case in (*named, *more()) if op in (None, case.op)]


# --- The lane ---------------------------------------------------------------------------------------------------------


def to_gpu(x: Any) -> Any:
    """Memory of exactly the array's size, unless its strides or its alignment are what a case is about."""
    if not x.size or (x.flags.c_contiguous and x.ctypes.data % 16 == 0):
        return cupy.asarray(x)
    sys.path.insert(0, str(TESTS / "gpu"))
    from test_gpu_conformance import to_gpu as with_strides

    return with_strides(x)


class Lane:
    """sscan's functions on NumPy arrays by way of the GPU, where every array is one allocation."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(sscan, name)

        def call(*arguments: Any, **options: Any) -> Any:
            there = {key: to_gpu(x) if isinstance(x, np.ndarray) else x for key, x in options.items()}
            result = function(*(to_gpu(x) if isinstance(x, np.ndarray) else x for x in arguments), **there)
            for key, x in options.items():
                if isinstance(x, np.ndarray) and x.flags.writeable:  # what an update op changed
                    x[...] = there[key].get()
            if not isinstance(result, tuple):
                return result.get()
            values = [None if x is None else x.get() for x in result]
            return type(result)(*values) if hasattr(result, "_fields") else tuple(values)

        return call


def factories() -> set[tuple[str, str]]:
    """(module, factory) of every kernel that is shipped."""
    modules = sorted(path.stem for path in (Path(_launch.__file__).parent / "kernels").glob("*.py"))
    found = set()
    for name in modules:
        module = importlib.import_module(f"sscan.cuda.kernels.{name}")
        found |= {(kernel.module, kernel.factory) for kernel in getattr(module, "shipped", list)()}
    return found


def checks_of(lane: Any, case: Case) -> Iterator[Check]:
    for check in (check_forward, check_backward) if case.op in DIFFERENTIABLE else (check_forward,):
        yield functools.partial(check, lane, case)


def pieces(op: str | None) -> Iterator[Check]:
    """Sequences in pieces that hand on carries; the first piece is cut along time too."""
    if op not in (None, "selective_scan"):
        return
    ways = {"there": to_gpu, "home": cupy.asnumpy}
    for name in state_passing_cases.PROBLEMS:
        yield functools.partial(state_passing_cases.check_pieces, name, (300, 0, 7), **ways)
    for number in state_passing_cases.NUMBERS:
        for back in (False, True):
            yield functools.partial(state_passing_cases.check_prefix, number, 9, back, **ways)


def models(op: str | None) -> Iterator[Check]:
    """What models launch beside the ops: training steps, decoding and its draws, copies of a planned block."""
    if op is not None:
        return
    sys.path.insert(0, str(TESTS / "gpu"))
    import test_gpu_decode as decode

    for dtype in (np.float32, np.float64):
        yield functools.partial(check_training, dtype)
        yield functools.partial(check_block, dtype)
    for config in decode.ALL.values():
        for dtype in (np.float64, np.float16, decode.BFLOAT16):
            yield functools.partial(decode.check_steps, config, dtype, 3)
    for config in (decode.TILES, decode.ODD_TILES):
        yield functools.partial(decode.check_steps, config, decode.BFLOAT16, 17)
    for sampler in decode.FILTERS:
        yield functools.partial(decode.test_a_graph_draws_what_the_host_draws_from_the_same_logits, 8, sampler)


def check_training(dtype: Any) -> None:
    """A few steps of a language model on a GPU are those on the CPU: order, clipping and AdamW among them."""
    from test_nn_devices import SMALL, train

    losses = []
    for xp in (np, cupy):
        model = sscan.nn.MambaLM(SMALL, dtype, seed=0)
        model.to(xp)
        losses.append([float(loss) for loss in train(model, 3, xp)[0]])
    assert np.allclose(*losses, rtol=1e-3), losses


def check_block(dtype: Any) -> None:
    """Copies and A of a planned block."""
    from sscan.cuda import block

    x = np.random.default_rng(0).standard_normal((5, 3, 700)).astype(dtype)
    there, copy = cupy.asarray(x), cupy.empty((5, 9, 700), np.float32)
    block.copy((there[:, :2], copy[:, :2]), (there[:, 2:], copy[:, 8:]))
    assert (copy[:, [0, 1, 8]].get() == x.astype(np.float32)).all()
    A, dA_log = cupy.empty_like(there), cupy.empty_like(there)
    block.diagonal(there, A)
    block.diagonal_backward(there, A, dA_log)
    assert np.allclose(A.get(), -np.exp(x), rtol=1e-5)
    assert np.allclose(dA_log.get(), -x * np.exp(x), rtol=1e-5)


def run(checks: list[Check]) -> list[str]:
    """What is wrong."""
    wrong = []
    for check in checks:
        try:
            check()
        except AssertionError as failure:
            wrong.append(f"{check.func.__name__}: {failure}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=sorted(SOME), help="of this op only")
    parser.add_argument(
        "--share", default="0/1", help="I/N: every Nth problem from the Ith on, to fill the cache faster"
    )
    given = parser.parse_args()
    first, every = map(int, given.share.split("/"))
    cupy.cuda.set_allocator(None)  # no pool: every array is one allocation, whose bounds a sanitizer knows
    start, lane = time.perf_counter(), Lane()
    problems = [
        *(list(checks_of(lane, case)) for case in chosen(given.op)),
        *([x] for x in (*pieces(given.op), *models(given.op))),
    ]
    selected = problems[first::every]
    wrong = run([check for checks in selected for check in checks])
    cupy.cuda.Device().synchronize()
    launched = {kernel for kernel, _ in _launch._functions}
    missing = set() if given.op or every > 1 else factories() - {(kernel.module, kernel.factory) for kernel in launched}
    wrong += [f"not run: {module}.{factory}" for module, factory in sorted(missing)]
    print("\n".join(wrong) or "all right")
    print(f"{len(selected)} problems, {len(launched)} kernels, {time.perf_counter() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
