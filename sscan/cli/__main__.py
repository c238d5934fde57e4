"""``python -m sscan.cli``, for where the command itself is not on the path."""

import sys

from sscan.cli import main

sys.exit(main())
