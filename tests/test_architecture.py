"""The layers of docs/design.md: imports go down only, and importing sscan brings in no other array library."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import sscan

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(sscan.__file__).parent
ROOT = PACKAGE.parent

# Layer of each package and file below sscan/. A public file that is not named is an op: layer 3.
LAYERS = {
    "torch": 4, "jax": 4, "nn": 4, "compat": 4, "tasks": 4, "cli": 4, "lm_eval": 4, "testing": 4, "__main__": 4,
    "models": 3,
    "_backends": 2, "_arrays": 2, "_checks": 2, "_plans": 2,
    "cpu": 1, "cuda": 1,
    "_cache": 0, "_recording": 0, "_segments": 0, "reference": 0,
}  # fmt: skip
OP_LAYER = 3

# Which modules and packages may name a library other than NumPy: the array layer, the launcher of the library that CUDA
# arrays are viewed in, the plug-ins of the frameworks, and the command that lists versions.
ARRAY_LIBRARIES = {"torch", "jax", "jaxlib", "cupy"}
MAY_NAME = {
    "sscan._arrays": ARRAY_LIBRARIES,
    "sscan.cuda._launch": {"cupy"},  # for the current device, stream and allocator
    "sscan.cuda._graphs": {"cupy"},  # which records them
    "sscan.cuda._products": {"cupy"},  # for its cuBLAS
    "sscan.models.pickled": {"torch"},  # which alone reads pytorch_model.bin
    "sscan.torch": {"torch"},
    "sscan.jax": {"jax", "jaxlib", "cupy"},  # XLA's GPU memory is viewed in CuPy too
    "sscan.compat": {"torch"},
    "sscan.cli._devices": {"cupy"},
    "sscan.cli.info": {"torch", "jax", "cupy"},  # for their versions
    "sscan.lm_eval": {"cupy"},
}


def module_name(path: Path) -> str:
    """Dotted name of a source file below sscan/."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in SOURCES.items()}
modules = pytest.mark.parametrize("module", SOURCES)


def imported(module: str) -> Iterator[str]:
    """Every dotted name that a module imports anywhere, relative ones resolved; `from a import b` gives a.b."""
    is_package = SOURCES[module].name == "__init__.py"
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def ours(module: str) -> set[str]:
    """The modules of sscan that a module imports."""
    found = set()
    for name in imported(module):
        if name.split(".")[0] == "sscan":
            parts = name.split(".")
            prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))  # a.b.function is defined in a.b
            found.add(next(prefix for prefix in prefixes if prefix in SOURCES))
    return found - {module}


def layer(module: str) -> int:
    """The layer that a module stands in; the package's own __init__ re-exports the ops."""
    head = [*module.split("."), "__init__"][1]
    assert head in LAYERS or head == "__init__" or not head.startswith("_"), f"{module}: give it a layer in LAYERS"
    return LAYERS.get(head, OP_LAYER)


@modules
def test_imports_go_down_only(module: str) -> None:
    up = {other: layer(other) for other in ours(module) if layer(other) > layer(module)}
    assert not up, f"{module} (layer {layer(module)}) imports upwards: {up}"


def test_no_import_cycle() -> None:
    # Modules of one layer may use each other, in one direction.
    remaining = {module: ours(module) for module in SOURCES}
    while free := [module for module, needs in remaining.items() if not needs & remaining.keys()]:
        for module in free:
            del remaining[module]
    assert not remaining, f"these import each other in a circle, or import one that does: {sorted(remaining)}"


@pytest.mark.parametrize(("package", "other"), [("cpu", "cuda"), ("cuda", "cpu"), ("torch", "jax"), ("jax", "torch")])
def test_twins_do_not_import_each_other(package: str, other: str) -> None:
    prefix, forbidden = f"sscan.{package}", f"sscan.{other}"
    for module in SOURCES:
        if module == prefix or module.startswith(prefix + "."):
            assert not [name for name in ours(module) if name == forbidden or name.startswith(forbidden + ".")], module


def test_reference_imports_nothing_of_ours() -> None:
    assert not ours("sscan.reference")


@modules
def test_only_the_target_file_imports_numba_cuda(module: str) -> None:
    if module == "sscan.cuda._target":
        return
    names = set(imported(module))
    names |= {ast.unparse(node) for node in ast.walk(TREES[module]) if isinstance(node, ast.Attribute)}
    assert not [name for name in names if re.match(r"numba\.cuda\b", name)], f"{module}: only cuda/_target.py may"


@modules
def test_only_the_array_layer_knows_array_libraries(module: str) -> None:
    names = {name.split(".")[0] for name in imported(module)}
    # Also as text: sys.modules["torch"], importlib.import_module("jax.numpy").
    names |= {
        node.value.split(".")[0]
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value)
    }
    package = ".".join(module.split(".")[:2])
    allowed = MAY_NAME.get(module, set()) | MAY_NAME.get(package, set())
    assert not (names & ARRAY_LIBRARIES) - allowed, f"{module} names another array library"


def test_import_brings_in_no_other_array_library() -> None:
    code = "import sys, sscan; print(*{'cupy', 'numba.cuda', 'torch', 'jax', 'matplotlib'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split() == [], "import sscan must import none of these"


@pytest.mark.parametrize(("library", "title"), [("torch", "PyTorch"), ("jax", "JAX")])
def test_plug_ins_say_what_they_need(library: str, title: str) -> None:
    code = (
        f"import sys; sys.modules['{library}'] = None\n"
        f"try: import sscan.{library}\n"
        "except ImportError as error: print(error, error.name)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    line = f'sscan.{library} needs {title}, which is installed by: pip install "sscan[{library}]" {library}\n'
    assert run.stdout == line


def test_backends_export_the_same_functions() -> None:
    import sscan.cpu
    import sscan.cuda

    assert sscan.cuda.__all__ == sscan.cpu.__all__
    for name in sscan.cpu.__all__:
        there, here = (inspect.signature(getattr(package, name)) for package in (sscan.cuda, sscan.cpu))
        assert list(there.parameters) == list(here.parameters), name


def test_importing_the_gpu_package_loads_no_compiler() -> None:
    """A process that finds its kernels in the cache needs none."""
    code = "import sys, sscan.cuda; print(*{'cupy', 'numba', 'numba_cuda', 'llvmlite', 'cuda'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split() == [], "import sscan.cuda must import none of these"


def test_type_marker_is_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_version_is_the_newest_in_the_changelog() -> None:
    versions = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == sscan.__version__
