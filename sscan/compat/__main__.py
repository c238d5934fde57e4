"""``python -m sscan.compat`` and what ``python`` takes: python itself, with the names on its path from the start."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from sscan.compat import install

USAGE = """\
usage: python -m sscan.compat [what python takes: script.py | -m module | -c code | ..., and its arguments]

Runs python with the import names of mamba_ssm and causal_conv1d on sscan, in processes that it starts too.
"""


def main() -> None:
    """Become the Python that the command line asks for."""
    options = [*subprocess._args_from_interpreter_flags(), *sys.argv[1:]]  # type: ignore[attr-defined]
    if sys.argv[1:2] in (["-h"], ["--help"]):
        sys.stdout.write(f"{USAGE}\nOf python itself:\n\n")
    if _is_isolated(options):
        sys.exit("python -m sscan.compat: the names travel in PYTHONPATH, which -E and -I would ignore")
    # `python -m` put the current folder first. That Python may not have it, and if it has, before PYTHONPATH.
    here = None if getattr(sys.flags, "safe_path", False) else sys.path.pop(0)
    installation = install()
    sys.stderr.write(f"{installation}\n")
    path = [os.environ.get("PYTHONPATH"), *installation.folders, _own_folder(here)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *options])


def _own_folder(here: str | None) -> str | None:
    """The folder that sscan lies in, if it was found only because that is the current one."""
    folder = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return folder if folder == here and folder not in sys.path else None


def _is_isolated(options: list[str]) -> bool:
    """Whether -E or -I stands before the script, the module or the code, alone or among other letters."""
    left = iter(options)
    for option in left:
        if option in ("-W", "-X", "--check-hash-based-pycs"):
            next(left, None)
        elif not option.startswith("-") or re.match("-[A-Za-z]*[cm]|-$", option):
            return False
        elif re.match("-[A-VYZa-z]*[EI]", option):
            return True
    return False


if __name__ == "__main__":
    main()
