"""``python -m sscan.compat script.py [arguments]``: a script, with the names installed before it starts."""

import os
import runpy
import sys

from sscan.compat import install


def main() -> None:
    """Run the script that the command line names."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m sscan.compat script.py [arguments]")
    sys.stderr.write(f"{install()}\n")
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
