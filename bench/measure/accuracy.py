"""Print the errors of the scan's results and gradients, and those of the plain reference in the same dtypes.

In units of the eps of the dtype that a result is stored in; the definition of the error is in docs/numerics.md.
"""

from typing import Any

import ml_dtypes
import numpy as np
from problems import cotangent, scan_problem

import sscan
from sscan import reference

SHAPE = (2, 48, 2048)
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, zoh": {"discretization": "zoh"},
    "float32, complex A": {"imaginary": 3.0},
    "bfloat16": {"dtype": ml_dtypes.bfloat16},
    "float16": {"dtype": np.float16},
}


def problem(dtype: Any = np.float32, imaginary: float = 0.0, **options: Any) -> dict[str, Any]:
    """A problem of the benchmarks; a complex one has that many radians to a unit of decay in its slowest state."""
    arguments = {**scan_problem(SHAPE, dtype), **options}
    if imaginary:
        arguments["A"] = arguments["A"] * (1 + 1j * imaginary)
        for name in ("B", "C"):
            arguments[name] = arguments[name] + 1j * arguments[name][..., ::-1]
    return arguments


def exact(values: dict[str, Any]) -> dict[str, Any]:
    """The same stored values in float64 or complex128."""

    def widen(x: Any) -> Any:
        return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64) if isinstance(x, np.ndarray) else x

    return {name: widen(x) for name, x in values.items()}


def results(library: Any, arguments: dict[str, Any], dy: Any) -> dict[str, Any]:
    y, last_state = library.selective_scan(**arguments, return_last_state=True)
    gradients = library.selective_scan_backward(dy, **arguments)
    return {"y": y, "last_state": last_state, **{n: g for n, g in gradients._asdict().items() if g is not None}}


def error(x: Any, expected: Any) -> float:
    """In eps of x's dtype."""
    eps = float(ml_dtypes.finfo(x.real.dtype).eps)
    wide = x.astype(expected.dtype)
    return float(np.abs(wide - expected).max() / max(1.0, np.abs(expected).max()) / eps)


def main() -> None:
    names = ("y", "last_state", "du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias")
    print(f"| {SHAPE}, state 16 | " + " | ".join(names) + " |")
    print("| --- |" + " --- |" * len(names))
    for case, options in CASES.items():
        arguments = problem(**options)
        dy = cotangent(arguments)
        expected = results(reference, exact(arguments), dy.astype(np.float64))
        ours, plain = results(sscan, arguments, dy), results(reference, arguments, dy)
        cells = [f"{error(ours[n], expected[n]):.1f} ({error(plain[n], expected[n]):.1f})" for n in names]
        print(f"| {case} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
