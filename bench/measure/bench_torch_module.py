"""The selective scan and the Mamba module in PyTorch on a GPU, under bfloat16 autocast, beside mamba_ssm where it is.

    python bench/measure/bench_torch_module.py [--out bench/results/torch-DATE.md] [--d-model 768 2560]

"Sum of its parts" is what a call cannot do without: its matrix products and sscan's kernels, each timed alone on arrays
of the same shapes and strides. Both are also measured as CUDA graphs, which take the time of the host away. Results are
compared with float32 ones before anything is timed; exit code 1 if they are wrong. CUDA events, medians.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch_graph import WAYS

import sscan
from sscan.torch import Mamba, selective_scan
from sscan.torch._block import applied, applied_back

REPEATS, IN_A_ROW, WARM_UP = 9, 10, 0.1  # seconds
HALF = torch.bfloat16


def milliseconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARM_UP:  # the first calls of a process take the host twice as long
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(IN_A_ROW):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / IN_A_ROW)
    return statistics.median(times)


def host_milliseconds(call: Callable[[], Any]) -> float:
    """Until the call returns, the GPU idle before it."""
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return statistics.median(times)


def training_step(module: Any, x: Any, dy: Any) -> Callable[[], Any]:
    inputs = [x, *module.parameters()]

    def step() -> Any:
        with torch.autocast("cuda", HALF):
            y = module(x)
        return torch.autograd.grad(y, inputs, dy)

    return step


def forward(module: Any, x: Any) -> Callable[[], Any]:
    def step() -> Any:
        with torch.no_grad(), torch.autocast("cuda", HALF):
            return module(x)

    return step


Times = dict[str, float]


def parts(made: Mamba, x: Any, prepared: Callable[[Any], Any]) -> tuple[Times, Times]:
    """Milliseconds of every product and kernel of a forward, and of those that the backward adds."""
    with torch.no_grad():
        hidden = x.to(HALF)
        w_in, w_x, w_dt, w_out = (
            m.weight.to(HALF) for m in (made.in_proj, made.x_proj, made.dt_proj, made.out_proj)
        )  # fmt: skip
        w_x_in, w_z_in = w_in.chunk(2)
        x, z = applied(w_x_in, hidden.mT), applied(w_z_in, hidden.mT)
        taps = made.conv1d.weight.squeeze(1), made.conv1d.bias, "silu"
        u = sscan.causal_conv1d(x, *taps)
        x_dbl = applied(w_x, u)
        dt, B, C = x_dbl.split([made.dt_rank, made.d_state, made.d_state], 1)
        delta, A = applied(w_dt, dt), made._A()
        scanned = (u, delta, A, B, C, made.D, z, made.dt_proj.bias, True)
        y, _, checkpoints = sscan.selective_scan_forward(*scanned)
        dout, dx_dbl = torch.randn_like(hidden), torch.randn_like(x_dbl)
        calls = {
            "in_proj": lambda: (applied(w_x_in, hidden.mT), applied(w_z_in, hidden.mT)),
            "convolution": lambda: sscan.causal_conv1d(x, *taps),
            "x_proj": lambda: applied(w_x, u),
            "dt_proj": lambda: applied(w_dt, dt),
            "scan": lambda: sscan.selective_scan(*scanned),
            "out_proj": lambda: applied_back(w_out, None, y),
        }
        again = {f"{name}, again": calls[name] for name in ("convolution", "x_proj", "dt_proj")}
        more = {
            "scan, again": lambda: sscan.selective_scan_forward(*scanned),
            "out_proj, dy": lambda: applied(w_out.t(), dout.mT),
            "out_proj, dW": lambda: torch.bmm(dout.mT, y.mT),
            "scan, backward": lambda: sscan.selective_scan_backward(y, *scanned, checkpoints=checkpoints),
            "dt_proj, dx": lambda: applied(w_dt.t(), delta),
            "dt_proj, dW": lambda: torch.bmm(delta, dt.mT),
            "x_proj, dx": lambda: u.baddbmm_(w_x.t().expand(len(u), -1, -1), dx_dbl, beta=0.5, alpha=0.1),
            "x_proj, dW": lambda: torch.bmm(dx_dbl, u.mT),
            "convolution, backward": lambda: sscan.causal_conv1d_backward(u, x, *taps),
            "in_proj, dx": lambda: (applied(w_x_in.t(), x), applied(w_z_in.t(), z)),
            "in_proj, dW": lambda: (torch.bmm(x, hidden), torch.bmm(z, hidden)),
        }
        of_forward = {name: milliseconds(prepared(call)) for name, call in calls.items()}
        return of_forward, {name: milliseconds(prepared(call)) for name, call in (again | more).items()}


def scan_calls(d_inner: int, batch: int, length: int, scan: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    u, delta, z, dy = (torch.randn(batch, d_inner, length, device="cuda", dtype=HALF) for _ in range(4))
    B, C = (torch.randn(batch, 16, length, device="cuda", dtype=HALF) for _ in range(2))
    A = -torch.arange(1.0, 17, device="cuda").expand(d_inner, 16).contiguous()
    D, bias = torch.ones(d_inner, device="cuda"), torch.full((d_inner,), -4.0, device="cuda")
    inputs = [t.requires_grad_() for t in (u, delta, A, B, C, D, z, bias)]

    def without_gradient() -> Any:
        with torch.no_grad():
            return scan(*inputs, True)

    return without_gradient, lambda: torch.autograd.grad(scan(*inputs, True), inputs, dy)


def check(made: Mamba, x: Any, dy: Any) -> float:
    """The largest relative difference of a result under autocast from float32, in the norm of each."""
    inputs = [x, *made.parameters()]
    wide = made(x)
    expected = [wide, *torch.autograd.grad(wide, inputs, dy.float())]
    with torch.autocast("cuda", HALF):
        half = made(x)
    found = [half, *torch.autograd.grad(half, inputs, dy)]
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


def measure(d_model: int, batch: int, length: int) -> tuple[list[str], bool]:
    torch.manual_seed(0)
    made = Mamba(d_model, device="cuda")
    x = torch.randn(batch, length, d_model, device="cuda", requires_grad=True)
    dy = torch.randn(batch, length, d_model, device="cuda", dtype=HALF)
    difference = check(made, x[:1, :256].detach().requires_grad_(), dy[:1, :256].contiguous())
    rows, ofs = [], []

    def add(name: str, calls: tuple[Any, Any], sums: tuple[float, float] | None = None) -> None:
        times = [milliseconds(call) for call in calls]
        cells = [f"{t:.3f}" for t in times]
        if sums:
            cells = [f"{cell} ({t / s:.2f} of {s:.3f})" for cell, t, s in zip(cells, times, sums, strict=True)]
        rows.append(f"| {name} | {cells[0]} | {cells[1]} | {host_milliseconds(calls[1]):.2f} |")

    d_inner = 2 * d_model
    add("selective_scan", scan_calls(d_inner, batch, length, selective_scan))
    for way, prepared in WAYS.items():
        of_forward, of_backward = parts(made, x, prepared)
        total = sum(of_forward.values())
        sums = (total, total + sum(of_backward.values()))
        add(f"Mamba{way}", (prepared(forward(made, x)), prepared(training_step(made, x, dy))), sums)
        times = "; ".join(f"{name} {t:.3f}" for name, t in (of_forward | of_backward).items())
        ofs.append(f"Parts{way}, ms: {times}.")
    made.use_fast_path = False
    add("Mamba, use_fast_path=False", (forward(made, x), training_step(made, x, dy)))
    try:
        from mamba_ssm import Mamba as Theirs
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        rows.append(f"| mamba_ssm | not importable: {error} | | |")
    else:
        add("mamba_ssm selective_scan_fn", scan_calls(d_inner, batch, length, selective_scan_fn))
        theirs = Theirs(d_model, device="cuda")
        add("mamba_ssm Mamba", (forward(theirs, x), training_step(theirs, x, dy)))
    lines = [
        f"## d_model {d_model}, batch {batch}, length {length}",
        "",
        f"Largest difference from float32, relative, of outputs and gradients: {difference:.3f}.",
        "",
        "| | forward, ms (of the sum of its parts) | forward and backward, ms | host, ms |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        "\n\n".join(ofs),
        "",
    ]
    return lines, difference < 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-model", type=int, nargs="+", default=[768, 2560])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    device = torch.cuda.get_device_properties(0)
    versions = f"sscan {sscan.__version__}, torch {torch.__version__}"
    about = f"# Mamba in PyTorch on {device.name}\n\nbfloat16 autocast; {versions}.\n"
    measured = [measure(d_model, args.batch, args.length) for d_model in args.d_model]
    text = "\n".join([about, *(line for lines, _ in measured for line in lines)])
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    return int(not all(right for _, right in measured))


if __name__ == "__main__":
    sys.exit(main())
