"""Figure 8, left, on this GPU: the scan beside attention, an FFT convolution and PyTorch's unfused scan, by length.

    python bench/measure/figure8.py --out bench/results/figure8-DATE.md
    python bench/measure/figure8.py --device cpu --d-model 128 --lengths 64 128 256    # to try it

Alone, and as a whole block: two residual Mamba blocks beside attention and an MLP of as many parameters (section 3.4 of
the paper). Every candidate's results and gradients are compared with formulas in float64 before it is timed. A series
ends with a length that does not fit into memory or takes too long, and the page says which. Exit code 1 if a check
fails or one of ours cannot be timed. A JSON file with every measurement lies beside the page.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import math
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from records import OUT_OF_MEMORY, Record, about, cause, free, named, table, write
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_graph import in_a_graph

from sscan.torch import Mamba, selective_scan

if TYPE_CHECKING:
    from collections.abc import Callable

HALF = torch.bfloat16
HEAD = 128  # width of an attention head, the one that the kernels are fastest with
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
LENGTHS = [2**k for k in range(9, 20)]
WAYS = ("forward", "forward and backward")
CHECKED_LENGTH = 128
WARM_UP, MEASURED = 0.02, 0.06  # seconds a measurement takes at least, and about
IN_A_ROW, REPEATS = 10, (3, 9)
SLOW = 200.0  # milliseconds: longer calls are measured once
HOST_MATTERS = 20.0  # milliseconds: shorter calls are also timed without the host, as a CUDA graph

INTRODUCTION = """\
# Figure 8 (left) on {device}, {date}

{named}

Batch 1, as in the paper, at every length; bfloat16. Milliseconds of the GPU, medians by CUDA events: a call of less
than {host:.0f} ms as a CUDA graph, in brackets what it takes when called from Python, if that is a tenth more; one of
more than {slow:g} ms once, after a first. The inputs are the same for every call, so short ones are found in the L2
cache. A series ends where memory does, or before a call of more than {longest:g} s; the reason stands at the first
length that is missing.

- *scan*: `sscan.torch.selective_scan`, width {scan}, A and D and bias in float32, with D, z, bias and softplus;
  gradients of all eight inputs.
- *attention*: `scaled_dot_product_attention`, causal, width {width} (heads: {heads} of {head}), by each backend of
  PyTorch alone (flash is the FlashAttention that PyTorch comes with); no projections; gradients of q, k and v.
- *FFT convolution*: width {scan}, `torch.fft` in float32, the filter as long as the input and transformed in every
  call; gradients of both.
- *unfused scan*: the scan of 16 states in PyTorch, all decays and states in memory in float32, by pairs in
  log2(length) levels, so that work grows with the length alone; gradients of all eight inputs.

Largest relative distance from formulas in float64, of results and gradients, at length {checked}: {differences}.
"""
BLOCKS = """\
Weights in bfloat16, residual, RMSNorm before each part; gradients of the input and of all parameters; nothing is
compiled. *two Mamba*: two `sscan.torch.Mamba` of d_model {width}, 16 states, {mamba:,} parameters. *attention + MLP*:
projections, attention as above, an MLP with GELU {inner} wide, {attention:,} parameters; no positions, in its favour.
"""
CLAIMS = """\
## Beside the paper (A100, width 1024)

It claims a crossover with FlashAttention-2 at 2K, 7x at 32K, and 20 to 40x over the unfused scan; users of its code
found no crossover at 2K. Here, how many times as long as the scan of 16 states a kernel takes:
"""


# --- those that are compared ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Candidate:
    """A line of the figure.

    `inputs` makes those of a length; `exact` is the formula of `call`, given both in float64.
    """

    name: str
    kind: str
    inputs: Callable[[int], list[Any]]
    call: Callable[..., Any]
    exact: Callable[..., Any]
    tolerance: float = 0.02  # relative, in the norm of a result, in bfloat16
    module: nn.Module | None = None

    def wanted(self, inputs: list[Any]) -> list[Any]:
        """What gradients are made of."""
        return [*inputs, *(self.module.parameters() if self.module is not None else ())]


def made(d_model: int, device: str) -> list[Candidate]:
    """All of them. The first of each kind are ours, and there is an attention for each backend."""
    heads, wide = max(d_model // HEAD, 1), 2 * d_model
    mamba = MambaPair(d_model).to(device)
    attention = AttentionLayer(d_model, heads, mlp_width(d_model, count(mamba))).to(device, HALF)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return scale * torch.randn(shape, device=device, dtype=HALF)

    def scanned(length: int, states: int = 16) -> list[Any]:
        step = torch.empty(wide, device=device).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        u, delta, z = normal(1, wide, length), normal(1, wide, length, scale=0.5), normal(1, wide, length)
        A = -torch.arange(1.0, states + 1, device=device).repeat(wide, 1)
        B, C = normal(1, states, length), normal(1, states, length)
        return [u, delta, A, B, C, torch.randn(wide, device=device), z, step.expm1().log()]

    def heads_of(length: int) -> list[Any]:
        return [normal(1, length, heads, HEAD).transpose(1, 2) for _ in range(3)]

    def filtered(length: int) -> list[Any]:
        return [normal(1, wide, length), torch.randn(wide, length, device=device) / math.sqrt(length)]

    def hidden(length: int) -> list[Any]:
        return [normal(1, length, d_model)]

    return [
        *(Candidate(f"scan, N {n}", "kernel", lambda length, n=n: scanned(length, n), fused_scan, unfused_scan)
          for n in (16, 4)),
        *(Candidate(f"attention, {name}", "kernel", heads_of, through(backend, attend), exact_attention)
          for name, backend in BACKENDS.items()),
        Candidate("FFT convolution", "kernel", filtered, fft_convolution, direct_convolution),
        Candidate("unfused scan", "kernel", scanned, unfused_scan, unfused_scan),
        Candidate("two Mamba", "block", hidden, mamba, exact_module(mamba), 0.05, mamba),
        *(Candidate(f"attention + MLP, {name}", "block", hidden, through(backend, attention),
                    exact_module(attention), 0.05, attention) for name, backend in BACKENDS.items()),
    ]  # fmt: skip


def through(backend: SDPBackend, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call with this backend of attention, or an error."""

    def run(*inputs: Any) -> Any:
        with sdpa_kernel(backend):
            return call(*inputs)

    return run


def fused_scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any) -> Any:
    return selective_scan(u, delta, A, B, C, D, z, bias, True)


def attend(q: Any, k: Any, v: Any) -> Any:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


exact_attention = through(SDPBackend.MATH, attend)


def unfused_scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any) -> Any:
    """The selective scan in A's dtype with everything in memory, time first; lengths are powers of two."""
    dtype = u.dtype
    u, delta, B, C, z = (x.to(A.dtype).movedim(-1, 0) for x in (u, delta, B, C, z))
    delta = functional.softplus(delta + bias)
    h = linear_scan(torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[..., None, :])
    y = (torch.einsum("lbdn,lbn->lbd", h, C) + D * u) * functional.silu(z)
    return y.movedim(0, -1).to(dtype)


def linear_scan(a: Any, b: Any) -> Any:
    """All h_t = a_t h_(t-1) + b_t: of two steps one is made, those are scanned, and the rest follows."""
    if len(a) == 1:
        return b
    (a_even, a_odd), (b_even, b_odd) = (x.unflatten(0, (-1, 2)).unbind(1) for x in (a, b))
    odd = linear_scan(a_even * a_odd, a_odd * b_even + b_odd)
    even = torch.cat([b_even[:1], a_even[1:] * odd[:-1] + b_even[1:]])
    return torch.stack([even, odd], 1).flatten(0, 1)


def fft_convolution(u: Any, k: Any) -> Any:
    length = u.shape[-1]
    product = torch.fft.rfft(u.to(k.dtype), 2 * length) * torch.fft.rfft(k, 2 * length)
    return torch.fft.irfft(product, 2 * length)[..., :length].to(u.dtype)


def direct_convolution(u: Any, k: Any) -> Any:
    padded = functional.pad(u, (u.shape[-1] - 1, 0))
    return functional.conv1d(padded, k.flip(-1)[:, None], groups=len(k))


class MambaPair(nn.Module):
    """Two residual Mamba blocks, which the paper counts as one layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5, dtype=HALF) for _ in range(2))
        self.mixers = nn.ModuleList(Mamba(width, dtype=HALF) for _ in range(2))

    def forward(self, x: Any) -> Any:
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            mix = mixer if x.dtype is HALF else functools.partial(self.formula, mixer)  # what is exact is another's
            x = x + mix(norm(x))
        return x

    @staticmethod
    def formula(m: Any, x: Any) -> Any:
        """A block, by no kernel of ours."""
        x, z = m.in_proj(x).mT.chunk(2, 1)
        u = functional.silu(m.conv1d(x)[..., : x.shape[-1]])
        dt, B, C = (part.mT for part in m.x_proj(u.mT).split([m.dt_rank, m.d_state, m.d_state], -1))
        delta = m.dt_proj.weight @ dt
        return m.out_proj(unfused_scan(u, delta, -m.A_log.exp(), B, C, m.D, z, m.dt_proj.bias).mT)


class AttentionLayer(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads, self.inner = heads, inner
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: Any) -> Any:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        x = x + self.out(attend(*qkv.unbind(2)).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def mlp_width(d_model: int, parameters: int) -> int:
    """How wide an MLP is that makes attention as large as this, in steps of 64."""
    return max(64 * round((parameters - 4 * d_model**2) / (2 * d_model) / 64), 64)


def exact_module(module: nn.Module) -> Callable[..., Any]:
    """The module in float64; its parameters come behind the input."""

    def run(x: Any, *parameters: Any) -> Any:
        names = [name for name, _ in module.named_parameters()]
        wide = copy.deepcopy(module).double()
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.functional_call(wide, dict(zip(names, parameters, strict=True)), (x,))

    return run


# --- checks and times -------------------------------------------------------------------------------------------------


def check(candidate: Candidate, length: int) -> float:
    """The largest relative distance of y or a gradient from the formula in float64."""
    inputs = [x.requires_grad_() for x in candidate.inputs(length)]
    wanted = candidate.wanted(inputs)
    y = candidate.call(*inputs)
    dy = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, wanted, dy)]
    wide = [x.detach().double().requires_grad_() for x in wanted]
    exact = candidate.exact(*wide)
    expected = [exact, *torch.autograd.grad(exact, wide, dy.double())]
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


def elapsed(call: Callable[[], Any], calls: int, device: str) -> float:
    """Milliseconds of a call among several in a row, which follow another one so that the GPU waits for nobody."""
    if calls > 1:
        call()
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return 1e3 * (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """Median time of a call; fewer calls of longer ones."""
    start = time.perf_counter()
    while True:
        took = elapsed(call, 1, device)
        if time.perf_counter() - start > WARM_UP:
            break
    in_a_row = max(min(int(1e3 * MEASURED / took / REPEATS[0]), IN_A_ROW), 1)
    least = REPEATS[0] if took < SLOW else 1
    repeats = max(min(int(1e3 * MEASURED / took / in_a_row), REPEATS[1]), least)
    return statistics.median(elapsed(call, in_a_row, device) for _ in range(repeats))


def times(call: Callable[[], Any], device: str) -> Record:
    """Milliseconds of the GPU, and as called from Python."""
    called = milliseconds(call, device)
    if device == "cpu" or called > HOST_MATTERS:
        return {"ms": called, "called_ms": called}
    try:
        replay = in_a_graph(call)
    except Exception as error:  # whatever a capture says; the call itself has a time
        return {"ms": called, "called_ms": called, "no_graph": cause(error)}
    return {"ms": milliseconds(replay, device), "called_ms": called}


def calls_of(candidate: Candidate, length: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by way."""
    inputs = [x.requires_grad_() for x in candidate.inputs(length)]
    wanted = candidate.wanted(inputs)
    with torch.no_grad():
        dy = torch.randn_like(candidate.call(*inputs))

    def forward() -> Any:
        with torch.no_grad():
            return candidate.call(*inputs)

    return dict(zip(WAYS, (forward, lambda: torch.autograd.grad(candidate.call(*inputs), wanted, dy)), strict=True))


def measure(candidate: Candidate, length: int, record: Record, end: float) -> None:
    """Add the times of a length to the record, or why there is none."""
    calls: dict[str, Callable[[], Any]] = {}
    for way in WAYS:
        row: Record = {"kind": candidate.kind, "name": candidate.name, "way": way, "length": length}
        before = series(record, candidate.name, way)
        if any("ms" not in earlier for earlier in before.values()):
            continue
        expected = following([earlier["ms"] for earlier in before.values()]) / 1e3
        if time.monotonic() > end:
            row["not_run"] = "no time left"
        elif expected > record["longest_call"]:
            row["not_run"] = f"not run: about {expected:.1f} s"
        else:
            try:
                calls = calls or calls_of(candidate, length)
                row |= times(calls[way], record["on"])
            except Exception as error:  # memory; a backend that refuses
                row["failed"] = cause(error)
            if "failed" in row:
                free()
        print(f"{time.monotonic() - end:6.0f} s", row, file=sys.stderr, flush=True)
        record["measurements"].append(row)
    calls.clear()
    if length >= 2**14 and record["on"] == "cuda":  # smaller ones leave nothing to speak of
        torch.cuda.empty_cache()


# --- what follows from them -------------------------------------------------------------------------------------------


def following(taken: list[float]) -> float:
    """The time of the next length, by how it grew last; at least twice the last."""
    if not taken:
        return 0.0
    return taken[-1] * max(taken[-1] / taken[-2] if len(taken) > 1 else 2.0, 2.0)


def series(record: Record, name: str, way: str) -> dict[int, Record]:
    """The measurements of a line, by length."""
    return {row["length"]: row for row in record["measurements"] if (row["name"], row["way"]) == (name, way)}


def milliseconds_by_length(record: Record, name: str, way: str, time_of: str = "ms") -> dict[int, float]:
    """Of a line, where there are any."""
    return {length: row[time_of] for length, row in series(record, name, way).items() if "ms" in row}


def crossover(ours: dict[int, float], theirs: dict[int, float]) -> float:
    """The length from which on ours takes less time, by a straight line between logarithms of length and time.

    0 if it always does; infinite if it does not at the longest that both have. Of several the last.
    """
    lengths = sorted(ours.keys() & theirs.keys())
    if not lengths:
        raise ValueError("crossover: the two have no length in common")
    ratios = [math.log(ours[length] / theirs[length]) for length in lengths]
    if ratios[-1] >= 0:
        return math.inf
    slower = [i for i, ratio in enumerate(ratios) if ratio >= 0]
    if not slower:
        return 0.0
    i = slower[-1]
    part = ratios[i] / (ratios[i] - ratios[i + 1])
    return lengths[i] * (lengths[i + 1] / lengths[i]) ** part


def crossover_cell(record: Record, ours: str, theirs: str, way: str, time_of: str) -> str:
    """The crossover of two lines, in words."""
    known = [milliseconds_by_length(record, name, way, time_of) for name in (ours, theirs)]
    lengths = sorted(known[0].keys() & known[1].keys())
    if not lengths:
        return "not measured"
    found = crossover(*known)
    if found == 0:
        return f"below {lengths[0]:,}"
    return f"{found:,.0f}" if found < math.inf else f"beyond {lengths[-1]:,}"


def names(record: Record, kind: str) -> list[str]:
    """Of the lines of a kind, in order."""
    return list(dict.fromkeys(row["name"] for row in record["measurements"] if row["kind"] == kind))


def is_ours(name: str) -> bool:
    return name.startswith(("scan", "two Mamba"))


def time_cell(row: Record | None) -> str:
    """Milliseconds, or why there are none."""
    if row is None:
        return ""
    if "ms" not in row:
        return str(row.get("failed") or row["not_run"])
    called = f" ({digits(row['called_ms'])})" if row["called_ms"] > 1.1 * row["ms"] else ""
    return digits(row["ms"]) + called


def digits(number: float) -> str:
    """Three of them, or all before the point."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def times_table(record: Record, kind: str, way: str) -> list[str]:
    lines = {name: series(record, name, way) for name in names(record, kind)}
    lengths = sorted({length for line in lines.values() for length in line})
    rows = ([f"{length:,}", *(time_cell(line.get(length)) for line in lines.values())] for length in lengths)
    return [f"## {way.capitalize()}, {kind}, milliseconds", "", *table(["length", *lines], *rows)]


def crossovers_table(record: Record) -> list[str]:
    """Every line of ours beside every attention."""
    rows = []
    for kind in ("kernel", "block"):
        found = names(record, kind)
        attentions = [name for name in found if name.startswith("attention")]
        for ours, theirs in itertools.product(filter(is_ours, found), attentions):
            cells = [crossover_cell(record, ours, theirs, way, "ms") for way in WAYS]
            called = [crossover_cell(record, ours, theirs, way, "called_ms") for way in WAYS]
            rows.append([ours, theirs, *cells, *called])
    head = ["from this length on", "takes less time than", *WAYS, *(f"{way}, called from Python" for way in WAYS)]
    return ["## Crossover", "", *table(head, *rows)]


def ratios(record: Record, theirs: str, ours: str = "scan, N 16", at: int = 2**15) -> list[str]:
    """By how much a line takes longer than the scan: at 32K, and at most. Cells."""
    cells = []
    for way in WAYS:
        of_ours, of_theirs = (milliseconds_by_length(record, name, way) for name in (ours, theirs))
        found = {length: of_theirs[length] / of_ours[length] for length in of_theirs.keys() & of_ours.keys()}
        most = max(found, key=lambda length: found[length], default=0)
        cells.append(f"{found[at]:.1f}" if at in found else "not measured")
        cells.append(f"{found[most]:.1f} at {most:,}" if found else "not measured")
    return cells


def ratios_table(record: Record) -> list[str]:
    head = ["", *(f"{way}, {where}" for way in WAYS for where in ("32,768", "most"))]
    others = [name for name in names(record, "kernel") if not is_ours(name)]
    return table(head, *([name, *ratios(record, name)] for name in others))


def page(record: Record) -> str:
    """All of it in Markdown."""
    found = record["checks"].items()
    differences = [f"{name} {x:.4f}" if isinstance(x, float) else f"{name} {x}" for name, x in found]
    graphs = [row for row in record["measurements"] if "no_graph" in row]
    lines = [
        INTRODUCTION.format(
            **record, named=named(record), host=HOST_MATTERS, slow=SLOW, longest=record["longest_call"], head=HEAD,
            scan=2 * record["width"], checked=CHECKED_LENGTH, differences="; ".join(differences),
        ),
        *(f"No CUDA graph of {row['name']}, {row['way']}, at {row['length']}: {row['no_graph']}.\n" for row in graphs),
        *(line for way in WAYS for line in times_table(record, "kernel", way)),
        BLOCKS.format(**record),
        *(line for way in WAYS for line in times_table(record, "block", way)),
        *crossovers_table(record),
        CLAIMS,
        *ratios_table(record),
    ]  # fmt: skip
    return "\n".join(lines)


def checked(candidates: list[Candidate], record: Record) -> bool:
    """Whether all are right, but for others that refuse; what was found goes into the record."""
    right = True
    for candidate in candidates:
        try:
            record["checks"][candidate.name] = found = check(candidate, CHECKED_LENGTH)
            right &= found < candidate.tolerance
        except Exception as error:  # a backend that refuses
            record["checks"][candidate.name] = cause(error)
            right &= not is_ours(candidate.name)
        print(candidate.name, record["checks"][candidate.name], file=sys.stderr, flush=True)
    free()
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--d-model", type=int, default=2048, help="width of attention, half of that of the scan")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="powers of two")
    parser.add_argument("--seconds", type=float, default=150, help="after which nothing new is measured")
    parser.add_argument("--longest-call", type=float, default=2, help="in seconds; series end before longer ones")
    parser.add_argument("--out", type=Path, help="the page; the JSON file lies beside it")
    args = parser.parse_args()
    if wrong := [length for length in args.lengths if length < 1 or length & (length - 1)]:
        parser.error(f"--lengths: must be powers of two, got {wrong[0]}")
    end = time.monotonic() + args.seconds
    torch.manual_seed(0)
    candidates = made(args.d_model, args.device)
    modules = {type(candidate.module): candidate.module for candidate in candidates}
    mamba, attention = modules[MambaPair], modules[AttentionLayer]
    record: Record = {
        **about(args.device), "on": args.device, "width": args.d_model, "heads": attention.heads,
        "inner": attention.inner, "mamba": count(mamba), "attention": count(attention),
        "longest_call": args.longest_call, "checks": {}, "measurements": [],
    }  # fmt: skip
    right = checked(candidates, record)
    for length in sorted(args.lengths):
        for candidate in candidates:
            measure(candidate, length, record, end)
        if args.out:
            write(args.out, record, page)
    print(page(record))
    of_ours = [row for row in record["measurements"] if is_ours(row["name"])]
    broken = any(row.get("failed", OUT_OF_MEMORY) != OUT_OF_MEMORY for row in of_ours)
    unmeasured = {row["name"] for row in of_ours} - {row["name"] for row in of_ours if "ms" in row}
    return int(not right or broken or bool(unmeasured))


if __name__ == "__main__":
    sys.exit(main())
