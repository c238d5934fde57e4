"""``sscan kernels``: the CUDA kernels, the registers and memory that they take, their PTX and their machine code."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from sscan.cli._failures import Mistake, line_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sscan.cuda._launch import Kernel


def add_to(commands: Any) -> None:
    """Add the command to those that there are."""
    parser = commands.add_parser(
        "kernels",
        help="CUDA kernels: registers and memory, PTX, machine code",
        description="Without a name, list the kernels; no GPU is needed. Those shown stand for all specialisations.",
    )
    parser.add_argument(
        "kernel", nargs="?", metavar="NAME", help="such as rms_norm.forward: compile it, and say what it takes"
    )
    parser.add_argument("--number", type=int, metavar="N", help="only this one of its specialisations")
    code = parser.add_mutually_exclusive_group()
    code.add_argument("--ptx", action="store_true", help="print the PTX of the one with this number")
    code.add_argument("--sass", action="store_true", help="print its machine code; needs nvdisasm")
    parser.add_argument(
        "--capability",
        type=_capability,
        default=(9, 0),
        metavar="X.Y",
        help="compute capability of the GPU (default 9.0)",
    )
    parser.set_defaults(command=_kernels)


def _capability(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"(\d+)\.(\d)", text)) or (capability := (int(found[1]), int(found[2]))) < (8, 0):
        raise argparse.ArgumentTypeError(f"must be 8.0 or above, as in 9.0, got {text!r}")
    return capability


def _kernels(options: argparse.Namespace) -> int:
    kernels = _shipped()
    if options.kernel is None:
        if options.ptx or options.sass or options.number is not None:
            raise Mistake("--number, --ptx and --sass are of a kernel: give its name")
        for name, count in Counter(map(_name, kernels)).items():
            print(f"{name:<42}{count:>4} specialisation{'s' * (count > 1)}")
        return 0
    chosen = [kernel for kernel in kernels if _name(kernel) == options.kernel]
    if not chosen:
        raise Mistake(f"there is no kernel {options.kernel!r}; `sscan kernels` lists them")
    numbers = range(len(chosen)) if options.number is None else [options.number]
    if not set(numbers) <= set(range(len(chosen))):
        raise Mistake(f"--number must be from 0 to {len(chosen) - 1}, got {options.number}")
    if options.ptx or options.sass:
        if len(numbers) > 1:
            raise Mistake(f"{options.kernel} has {len(chosen)} specialisations: say which by --number")
        print(_code(chosen[numbers[0]], options.sass, options.capability))
        return 0
    return _table(options.kernel, {n: chosen[n] for n in numbers}, options.capability)


def _shipped() -> list[Kernel]:
    try:
        from sscan.cuda._inspect import shipped

        return shipped()
    except ImportError as error:
        raise Mistake(f'the compiler of the kernels is not there: pip install "sscan[cuda13]" ({error})') from error


def _name(kernel: Kernel) -> str:
    return f"{kernel.module}.{kernel.factory}"


def _code(kernel: Kernel, machine: bool, capability: tuple[int, int]) -> str:
    from sscan.cuda import _inspect
    from sscan.tasks.progress import Phase

    try:
        with Phase("compiling", sys.stderr), _known(capability):
            return _inspect.sass(kernel, capability) if machine else _inspect.ptx(kernel)
    except FileNotFoundError as error:
        raise Mistake(line_of(error)) from error


@contextlib.contextmanager
def _known(capability: tuple[int, int]) -> Iterator[None]:
    """A GPU that the assembler does not know is the user's mistake."""
    try:
        yield
    except Exception as error:
        if "UNRECOGNIZED_ARCH" not in str(error):
            raise
        raise Mistake(f"--capability: the assembler knows no GPU of {capability[0]}.{capability[1]}") from error


def _table(name: str, kernels: dict[int, Kernel], capability: tuple[int, int]) -> int:
    """A line for each as soon as it is compiled, which takes seconds."""
    from sscan.cuda import _inspect
    from sscan.tasks.progress import Phase

    head = (  # which a GPU that the assembler does not know gets nothing of
        f"{name} on {_inspect.architecture(capability)}: "
        "registers and local bytes of a thread, shared bytes of a block\n"
        "   N  threads  registers  shared  local  specialisation\n"
    )
    for n, kernel in kernels.items():
        with Phase("compiling", sys.stderr), _known(capability):
            threads, (usage,) = _inspect.usages(kernel, capability)
        sizes = f"{n:>4}{threads:>9}{usage.registers:>11}{usage.shared:>8}{usage.stack:>7}"
        print(f"{head}{sizes}  {', '.join(str(part) or '-' for part in kernel.key)}", flush=True)
        head = ""
    return 0
