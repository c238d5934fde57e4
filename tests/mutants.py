"""Small changes to host code, one at a time, each followed by the tests that should notice: which do not?

``nox -s mutants -- nn 40`` makes 40 changes, drawn at random, to `sscan.nn`: another operator, comparison, constant or
default. What survives is printed as a diff. Either it changes nothing that matters, or a test is missing.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cosmic_ray.work_db import WorkDB, use_db

if TYPE_CHECKING:
    from cosmic_ray.work_item import WorkItem

ROOT = Path(__file__).parent.parent

# The files of each area, and the tests of what stands in them.
AREAS = {
    "nn": ("sscan/nn/*.py", "test_nn_*.py test_broken_files.py"),
    "models": (
        "sscan/models/*.py sscan/torch/language_model.py sscan/compat/language_model.py sscan/compat/generation.py",
        "test_models.py test_generation.py test_compat_language_model.py test_cli_models.py test_broken_files.py",
    ),
    "shell": ("sscan/cli/*.py sscan/tasks/*.py", "test_cli.py test_cli_models.py test_broken_files.py"),
    "checks": ("sscan/_*.py sscan/[a-z]*_*.py", "test_ops.py test_selective_scan.py test_interchange.py"),
    "torch": ("sscan/torch/*.py", "test_torch_mamba.py test_torch_parts.py test_torch_ops.py"),
    "jax": ("sscan/jax/*.py", "test_jax.py"),
    "compat": ("sscan/compat/*.py", "test_transformers.py test_compat.py"),
}
SECONDS = 600.0  # after which a test run counts as one that noticed

CONFIGURATION = """
[cosmic-ray]
module-path = {files}
timeout = {seconds}
excluded-modules = []
test-command = {command}
[cosmic-ray.distributor]
name = "local"
"""


def expand(folder: Path, patterns: str) -> list[str]:
    """The files that match, each pattern at least one."""
    found = [sorted(folder.glob(pattern)) for pattern in patterns.split()]
    assert all(found), f"a pattern of {patterns!r} matches nothing"
    return [str(path) for paths in found for path in paths]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("area", choices=AREAS)
    parser.add_argument("count", type=int, nargs="?", default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "copy"  # so that nothing can leave a change in the working tree
        ignored = shutil.ignore_patterns(".*", "__pycache__", "site", "runs")
        shutil.copytree(ROOT, folder, ignore=ignored)
        files, tests = AREAS[options.area]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            *expand(folder / "tests", tests),
        ]
        # pytest's own folder first on the path: an editable installation would bring in the unchanged package.
        text = f"env PYTHONPATH={folder} {' '.join(command)}"
        configuration, session = folder / "mutants.toml", folder / "mutants.sqlite"
        configuration.write_text(
            CONFIGURATION.format(files=expand(folder, files), seconds=SECONDS, command=repr(text)), encoding="utf-8"
        )
        cosmic_ray = [sys.executable, "-m", "cosmic_ray.cli"]
        subprocess.run([*cosmic_ray, "init", str(configuration), str(session)], check=True, cwd=folder)
        with use_db(session) as work:
            sample(work, options.count, options.seed)
        subprocess.run([*cosmic_ray, "baseline", str(configuration)], check=True, cwd=folder)
        subprocess.run([*cosmic_ray, "exec", str(configuration), str(session)], check=True, cwd=folder)
        with use_db(session, WorkDB.Mode.open) as work:
            return report(work, options.count)


def sample(work: WorkDB, count: int, seed: int) -> None:
    """Leave one change at each of that many places."""
    places: dict[tuple[str, tuple[int, int]], list[WorkItem]] = {}
    for item in work.work_items:
        (mutation,) = item.mutations
        if "BitOr" not in mutation.operator_name:  # hardly ever more than the type of an annotation
            places.setdefault((str(mutation.module_path), tuple(mutation.start_pos)), []).append(item)
    print(f"{len(places)} places could be changed, {count} are")
    rng = random.Random(seed)
    chosen = [rng.choice(places[place]) for place in rng.sample(sorted(places), count)]
    work.clear()
    work.add_work_items(chosen)


def report(work: WorkDB, count: int) -> int:
    """Print the changes that no test noticed; 1 if there are any."""
    results = [result for _, result in work.completed_work_items]
    assert len(results) == count, f"only {len(results)} of {count} changes were tried"
    survivors = [result for result in results if not result.is_killed]
    for result in survivors:
        print(result.diff)
    print(f"{count - len(survivors)} of {count} changes were noticed")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
