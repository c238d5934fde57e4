"""What checkers say of programs that use sscan: nothing but the errors that are expected, each where it is expected."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
USAGE = Path("tests", "types", "usage.py")
CHECKERS = {
    "mypy": ["mypy", "--config-file", "tests/types/mypy.ini", "--cache-dir", ".mypy_cache/usage", str(USAGE)],
    "pyright": ["pyright", "--pythonpath", sys.executable, str(USAGE)],
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_errors_are_found_where_they_are_expected(checker: str) -> None:
    lines = (ROOT / USAGE).read_text(encoding="utf-8").splitlines()
    expected = {number for number, line in enumerate(lines, 1) if line.endswith("# expect: an error")}
    assert len(expected) > 10
    command = [sys.executable, "-m", *CHECKERS[checker]]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    found = {int(number) for number in re.findall(r"usage\.py:(\d+)(?::\d+ -|:) error", run.stdout)}
    assert found == expected, run.stdout + run.stderr
