"""One command each: `nox -s test`, `lint`, `types`, `docs`, `sdist`, `bench`, `mutants`, `lowest`, and others."""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "test", "docs"]
nox.options.reuse_existing_virtualenvs = True

TRANSFORMERS = [f"tests/test_{name}.py" for name in ("transformers", "models", "generation", "cli_models")]
COMPILED = "tests/compiled/test_registers.py"
PROCESSES = ["-n", "2", "--dist", "worksteal"]  # as in the README
PROJECT = nox.project.load_toml("pyproject.toml")


def install(session: nox.Session, *groups: str) -> None:
    """Install the package, editable, with dependency groups of pyproject.toml."""
    session.install("--upgrade", "pip>=25.1")  # the first that reads dependency groups
    session.install("--editable", ".", *(f"--group={group}" for group in groups))


@nox.session
def test(session: nox.Session) -> None:
    """The tests; arguments after `--` go to pytest."""
    install(session, "test")
    session.run("pytest", *(session.posargs or PROCESSES))


@nox.session
def compiled(session: nox.Session) -> None:
    """Every CUDA kernel, compiled and assembled for three generations of GPUs."""
    install(session, "test")
    session.run("pytest", COMPILED, *session.posargs, env={"SSCAN_COMPILE": "1"})


@nox.session
@nox.parametrize("release", ["oldest", "newest"], ids=["oldest", "newest"])
def transformers(session: nox.Session, release: str) -> None:
    """The tests with transformers, on the oldest release that pyproject.toml allows and on the newest there is."""
    install(session, "test")
    (bound,) = (line for line in nox.project.dependency_groups(PROJECT, "test") if line.startswith("transformers>="))
    session.install("--upgrade", bound.replace(">=", "==") if release == "oldest" else bound)
    session.run("pytest", *(session.posargs or TRANSFORMERS))


@nox.session
def typeseg(session: nox.Session) -> None:
    """A trained Mamba from PyPI on sscan's ops, against the reference that comes with it."""
    install(session, "test")
    session.install("--no-deps", "typeseg==0.2.7")  # its own reference takes NumPy alone
    session.run("pytest", "tests/published/test_typeseg.py", *session.posargs)


@nox.session
def lm_eval(session: nox.Session) -> None:
    """sscan's models in lm-evaluation-harness."""
    install(session, "test")
    session.install("lm_eval>=0.4.9")
    session.run("pytest", "tests/published/test_lm_eval.py", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and likely mistakes; `-- --fix` mends what can be mended."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", *(() if session.posargs else ("--check",)))


@nox.session
def types(session: nox.Session) -> None:
    """Strict types outside the kernels, and what checkers say of programs that use sscan."""
    install(session, "test", "lint")
    session.run("mypy", *session.posargs)
    session.run("pytest", "tests/types/test_types.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/; a warning is an error."""
    install(session, "test")  # the documented modules import its libraries
    session.run("python", "-m", "sphinx", "-W", "--keep-going", *session.posargs, "docs", "site")


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks; arguments after `--` go to pytest."""
    install(session, "bench")
    session.run("pytest", "bench", "--override-ini=python_files=bench_*.py", *session.posargs)


@nox.session
def sdist(session: nox.Session) -> None:
    """The tests of an unpacked source distribution, on the package in it; arguments after `--` go to pytest."""
    install(session, "test", "sdist")
    folder = Path(session.create_tmp()) / "sdist"
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "build", "--sdist", "--outdir", str(folder), ".")
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    session.chdir(folder / archive.name.removesuffix(".tar.gz"))
    session.run("pytest", *(session.posargs or PROCESSES), env={"PYTHONPATH": str(Path.cwd())})


@nox.session
def mutants(session: nox.Session) -> None:
    """Which small changes to host code no test notices: `-- nn 40` makes 40 in sscan.nn; see tests/mutants.py."""
    install(session, "test")
    session.install("cosmic-ray>=8.4,<9")
    session.run("python", "tests/mutants.py", *(session.posargs or ("nn",)), success_codes=[0, 1])


@nox.session(venv_backend="uv", python="3.10")
def lowest(session: nox.Session) -> None:
    """The tests on the oldest Python and the oldest dependencies that pyproject.toml allows."""
    session.install("--resolution=lowest-direct", "--editable", ".", "--group=test")
    session.run("pytest", *(session.posargs or PROCESSES))
    session.run("pytest", COMPILED)
