"""``sscan.compat``: the import names, and the functions behind them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sscan
import sscan.compat
import sscan.compat.causal_conv1d
import sscan.compat.mamba_ssm
import sscan.torch
from sscan.compat import causal_conv1d_cuda, selective_scan_cuda, selective_scan_cuda_core, selective_scan_cuda_oflex
from sscan.compat.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
    causal_conv1d_varlen_states,
    causal_conv1d_varlen_states_ref,
)
from sscan.compat.mamba_ssm import (
    InferenceParams,
    MambaInnerFn,
    SelectiveScanFn,
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
    selective_state_update,
    selective_state_update_ref,
)
from sscan.compat.norms import RMSNorm, layer_norm_fn, rms_norm_fn

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = (
    "mamba_ssm", "causal_conv1d", "causal_conv1d_cuda", "selective_scan_cuda", "selective_scan_cuda_core",
    "selective_scan_cuda_oflex",
)  # fmt: skip


@pytest.fixture
def installed() -> Iterator[sscan.compat.Installation]:
    made = sscan.compat.install()
    yield made
    made.undo()


# --- Import names -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
def test_names_resolve() -> None:
    from causal_conv1d import causal_conv1d_fn as conv
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_update as update
    from mamba_ssm import Mamba
    from mamba_ssm.modules.mamba_simple import Mamba as Simple
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_ref as inner
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as scan
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update as step
    from selective_scan_cuda import bwd

    import sscan.torch

    assert Mamba is Simple is sscan.torch.Mamba
    assert (conv, update, scan, step) == (
        causal_conv1d_fn, causal_conv1d_update, selective_scan_fn, selective_state_update,
    )  # fmt: skip
    assert (inner, bwd) == (mamba_inner_ref, selective_scan_cuda.bwd)


ABSENT = {
    "mamba_ssm.Mamba2": "Mamba-2", "mamba_ssm.modules.mamba2.Mamba2": "Mamba-2",
    "mamba_ssm.modules.mamba2_simple.Mamba2Simple": "Mamba-2",
    "mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined": "Mamba-2",
    "mamba_ssm.ops.triton.layernorm_gated.RMSNorm": "Mamba-2", "mamba_ssm.Mamba3": "Mamba-3",
    "mamba_ssm.distributed.tensor_parallel.ColumnParallelLinear": "tensor parallelism",
    "mamba_ssm.modules.mha.MHA": "attention", "mamba_ssm.modules.mlp.GatedMLP": "MLPs",
}  # fmt: skip


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ABSENT)
def test_what_is_not_there_says_so(name: str) -> None:
    """In words, and as the error that code which can do without has an answer for."""
    module, _, attribute = name.rpartition(".")
    with pytest.raises(ModuleNotFoundError, match=rf"^mamba_ssm\.[\w.]+ is not here: .* is of {ABSENT[name]}$"):
        exec(f"from {module} import {attribute}")


@pytest.mark.usefixtures("installed")
def test_what_nobody_has_is_an_ordinary_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'mamba_ssm\.nothing'"):
        importlib.import_module("mamba_ssm.nothing")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        getattr(importlib.import_module("mamba_ssm"), "nothing")  # noqa: B009
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from mamba_ssm.utils.generation import nothing  # noqa: F401


PROVIDED = {
    "mamba_ssm": ("Mamba", "MambaLMHeadModel", "selective_scan_fn", "mamba_inner_fn"),
    "mamba_ssm.modules.mamba_simple": ("Mamba", "Block"),
    "mamba_ssm.modules.block": ("Block",),
    "mamba_ssm.models.config_mamba": ("MambaConfig",),
    "mamba_ssm.models.mixer_seq_simple": (
        "MambaLMHeadModel", "MixerModel", "MambaConfig", "create_block", "_init_weights", "Block", "GenerationMixin",
    ),
    "mamba_ssm.utils.hf": ("load_config_hf", "load_state_dict_hf"),
    "mamba_ssm.ops.selective_scan_interface": (
        "selective_scan_fn", "selective_scan_ref", "mamba_inner_fn", "mamba_inner_ref", "SelectiveScanFn",
        "MambaInnerFn",
    ),
    "mamba_ssm.ops.triton.selective_state_update": ("selective_state_update", "selective_state_update_ref"),
    "mamba_ssm.ops.triton.layer_norm": ("RMSNorm", "rms_norm_fn", "layer_norm_fn"),
    "mamba_ssm.ops.triton.layernorm": ("RMSNorm", "rms_norm_fn", "layer_norm_fn"),
    "mamba_ssm.utils.generation": (
        "InferenceParams", "GenerationMixin", "decode", "sample", "update_graph_cache", "capture_graph",
        "DecodingCGCache",
    ),
    "causal_conv1d": ("causal_conv1d_fn", "causal_conv1d_update"),
    "causal_conv1d.causal_conv1d_interface": (
        "causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_ref", "causal_conv1d_update_ref",
    ),
    "causal_conv1d.causal_conv1d_varlen": ("causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref"),
    "causal_conv1d.cpp_functions": (
        "causal_conv1d_fwd_function", "causal_conv1d_bwd_function", "causal_conv1d_update_function",
    ),
    "causal_conv1d_cuda": ("causal_conv1d_fwd", "causal_conv1d_bwd", "causal_conv1d_update"),
    "selective_scan_cuda": ("fwd", "bwd"),
    "selective_scan_cuda_core": ("fwd", "bwd"),
    "selective_scan_cuda_oflex": ("fwd", "bwd"),
}  # fmt: skip


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("module", PROVIDED)
def test_names_of_public_code(module: str) -> None:
    """They are there, come from sscan, and their module has a file."""
    found = importlib.import_module(module)
    assert Path(found.__file__ or "").is_file()
    for name in PROVIDED[module]:
        assert getattr(found, name).__module__.startswith("sscan."), name


@pytest.mark.usefixtures("installed")
def test_attributes_of_the_package_are_its_modules() -> None:
    import mamba_ssm

    assert mamba_ssm.ops.triton.selective_state_update.selective_state_update is selective_state_update
    assert mamba_ssm.__version__ == importlib.metadata.version("mamba_ssm") == "1.2.2+sscan"


def test_what_asks_for_packages_finds_them_and_no_more_after_undo() -> None:
    assert [importlib.util.find_spec(name) for name in NAMES] == [None] * 6
    made = sscan.compat.install()
    assert all(importlib.util.find_spec(name) for name in NAMES)
    assert importlib.util.find_spec("mamba_ssm.ops.triton") is not None
    assert importlib.metadata.version("mamba-ssm") == importlib.metadata.version("mamba_ssm")
    assert importlib.metadata.version("causal_conv1d") == importlib.import_module("causal_conv1d").__version__
    assert "mamba_ssm" in importlib.metadata.packages_distributions()
    importlib.import_module("mamba_ssm.ops")
    made.undo()
    made.undo()
    assert [importlib.util.find_spec(name) for name in NAMES] == [None] * 6
    assert not [name for name in sys.modules if name.partition(".")[0] in NAMES]
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("mamba_ssm")


def test_says_what_it_did_and_uninstalls(caplog: pytest.LogCaptureFixture) -> None:
    before = list(sys.path)
    with caplog.at_level("INFO", "sscan.compat"):
        made = sscan.compat.install()
    assert made.provided == NAMES
    assert made.kept == ()
    assert f"{', '.join(NAMES)} provided by sscan" in str(made)
    assert str(made) in caplog.text
    again = sscan.compat.install()
    assert sys.path == [*before, *again.folders]
    assert again.provided == NAMES
    sscan.compat.uninstall()
    sscan.compat.uninstall()
    made.undo()
    assert sys.path == before


def test_an_installed_original_is_not_shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mamba_ssm"
    package.mkdir()
    (package / "__init__.py").write_text("original = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    original = importlib.import_module("mamba_ssm")
    try:
        made = sscan.compat.install()
        assert (made.kept, made.provided) == (("mamba_ssm",), NAMES[1:])
        assert "left alone, because installed: mamba_ssm" in str(made)
        assert importlib.import_module("mamba_ssm").original
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("mamba_ssm.ops")

        forced = sscan.compat.install(force=True)
        assert (forced.kept, forced.provided) == ((), NAMES)
        assert importlib.import_module("mamba_ssm").Mamba
        forced.undo()
        assert importlib.import_module("mamba_ssm") is original
    finally:
        sscan.compat.uninstall()
        del sys.modules["mamba_ssm"]


def test_installing_imports_no_torch() -> None:
    code = "import sys, sscan.compat; sscan.compat.install(); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_a_script_runs_with_the_names(tmp_path: Path) -> None:
    """As a user runs it: transformers, imported by the script, chooses its kernels by itself."""
    (tmp_path / "beside.py").write_text("found = True\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import inspect, sys, beside, mamba_ssm\n"
        "from transformers.models.mamba import modeling_mamba as m\n"
        "kernels = [m.mamba_inner_fn, m.mamba_selective_scan, m.mamba_selective_state_update, m.causal_conv1d_fn,\n"
        "           m.causal_conv1d_update]\n"
        "chosen = [inspect.getclosurevars(k).nonlocals['implementation'].__module__ for k in kernels]\n"
        "print(sys.argv[1:], __name__, *sorted(set(chosen)))\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "sscan.compat", str(script), "--flag"], capture_output=True, text=True, check=True
    )
    assert run.stdout == "['--flag'] __main__ sscan.compat.causal_conv1d sscan.compat.mamba_ssm\n"
    assert "provided by sscan" in run.stderr


def python(*arguments: str, given: str = "", **options: Any) -> tuple[str, str, int]:
    """What Python writes, without the line of what was installed, and its exit code."""
    run = subprocess.run(
        [sys.executable, *arguments], input=given, capture_output=True, text=True, check=False, **options
    )
    lines = run.stderr.splitlines(keepends=True)
    return run.stdout, "".join(line for line in lines if not line.startswith("sscan.compat: ")), run.returncode


LIKE_PYTHON: dict[str, tuple[list[str], str]] = {
    "code": (["-c", "import sys; print(sys.argv, __name__, sys.path[0])", "-x"], ""),
    "module": (["-m", "module", "--flag"], ""),
    "package": (["-m", "package"], ""),
    "folder": (["folder", "1"], ""),
    "zip": (["app.zip"], ""),
    "standard input": (["-", "1"], "import sys; print(sys.argv)"),
    "no argument": ([], "print(2)"),
    "options": (["-O", "-W", "error", "-c", "import sys; print(sys.flags.optimize, sys.warnoptions)"], ""),
    "missing file": (["missing.py"], ""),
    "missing module": (["-m", "missing"], ""),
    "bad option": (["-c"], ""),
    "version": (["--version"], ""),
    "exit code": (["-c", "raise SystemExit(7)"], ""),
    "traceback": (["-c", "1 / 0"], ""),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    text = "import sys; print(sys.argv[1:], __name__, __spec__ and __spec__.name, sys.path[0])\n"
    for name in ("module.py", "package/__main__.py", "package/__init__.py", "folder/__main__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("" if name.endswith("__init__.py") else text)
    with zipfile.ZipFile(folder / "app.zip", "w") as app:
        app.writestr("__main__.py", text)
    return folder


@pytest.mark.parametrize("kind", LIKE_PYTHON)
def test_answers_as_python_itself(kind: str, programs: Path) -> None:
    arguments, given = LIKE_PYTHON[kind]
    found = python("-m", "sscan.compat", *arguments, given=given, cwd=programs)
    assert found == python(*arguments, given=given, cwd=programs)
    assert any(found)


def test_says_how_it_is_used() -> None:
    out, _, code = python("-m", "sscan.compat", "--help")
    assert out.startswith("usage: python -m sscan.compat [what python takes: script.py | -m module | -c code")
    assert out.endswith(python("--help")[0])
    assert code == 0


def test_options_that_would_lose_the_names_are_refused() -> None:
    for arguments in (("-m", "sscan.compat", "-Iu", "script.py"), ("-E", "-m", "sscan.compat", "-c", "1")):
        out, error, code = python(*arguments)
        assert (out, code) == ("", 1)
        assert "PYTHONPATH, which -E and -I would ignore" in error
    of_script = python("-m", "sscan.compat", "-c", "import mamba_ssm, sys; print(sys.argv)", "-I")
    assert of_script == ("['-c', '-I']\n", "", 0)


WORKERS = """
import multiprocessing, subprocess, sys
import mamba_ssm  # in every process, before anything else of this file runs
from causal_conv1d import causal_conv1d_fn
import torch
from torch.utils.data import DataLoader, Dataset

def found(depth):
    below = []
    if depth:
        with multiprocessing.get_context(METHOD).Pool(1) as pool:
            below = pool.map(found, [0])
    return [causal_conv1d_fn.__module__, *below]

class Data(Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        return sys.modules["mamba_ssm"].Mamba.__module__

def tell(queue):
    queue.put(found(1))

def spawned(rank, queue):
    queue.put(mamba_ssm.Mamba.__module__)

METHOD = sys.argv[1]
if __name__ == "__main__":
    context = multiprocessing.get_context(METHOD)
    queue = context.SimpleQueue()
    process = context.Process(target=tell, args=(queue,))
    process.start()
    process.join()
    print(process.exitcode, None if process.exitcode else queue.get())
    print(list(DataLoader(Data(), num_workers=1, multiprocessing_context=METHOD, batch_size=None)))
    if METHOD == "spawn":
        torch.multiprocessing.spawn(spawned, (queue,))
        print(queue.get())
"""


LAUNCHER = """
if __name__ == "__main__":
    import runpy, sys, sscan.compat
    sscan.compat.install()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_workers_have_the_names(tmp_path: Path) -> None:
    """Of every start method, before the main module is imported in them; and those that they start."""
    script, launcher = tmp_path / "workers.py", tmp_path / "launcher.py"
    script.write_text(WORKERS)
    launcher.write_text(LAUNCHER)
    installed_by = {"command": ["-m", "sscan.compat"], "call": [str(launcher)]}
    name = "sscan.compat.causal_conv1d"
    expected = [f"0 {[name, [name]]}", "['sscan.torch.mamba']"]

    def check(case: tuple[str, str]) -> None:
        how, method = case
        out, error, code = python(*installed_by[how], str(script), method, timeout=300)
        after = ["sscan.torch.mamba"] if method == "spawn" else []
        assert (out.splitlines(), code) == (expected + after, 0), f"{how}, {method}: {error}"

    with ThreadPoolExecutor(2) as two_at_a_time:
        list(two_at_a_time.map(check, itertools.product(installed_by, ("fork", "spawn", "forkserver"))))


def test_processes_that_a_script_starts_have_the_names() -> None:
    """Which is how torchrun and pytest-xdist work; and installing again in one of them finds no original."""
    code = "import sscan.compat; made = sscan.compat.install(); import mamba_ssm; print(made.kept, len(made.provided))"
    started = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    assert python("-m", "sscan.compat", "-c", started) == ("() 6\n", "", 0)


def test_runs_where_sscan_lies_in_the_current_folder(tmp_path: Path) -> None:
    """As for one who has not installed it; the script is elsewhere, and so would not find what else lies there."""
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text("import mamba_ssm, sscan; print(mamba_ssm.Mamba.__module__, sscan.__file__)")
    (tmp_path / "sscan").symlink_to(Path(sscan.__file__).parent)
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("from nowhere import kernels")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = python("-m", "sscan.compat", str(script), cwd=tmp_path, env=environment)
    assert found == (f"sscan.torch.mamba {tmp_path}/sscan/__init__.py\n", "", 0)


# --- mamba_ssm --------------------------------------------------------------------------------------------------------


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def scan_inputs(dtype: torch.dtype = torch.float64, number: torch.dtype = torch.float64) -> dict[str, Any]:
    inputs = {
        "u": random(2, 6, 21), "delta": random(2, 6, 21, seed=1), "A": -random(6, 4).exp(), "B": random(2, 4, 21),
        "C": random(2, 2, 4, 21), "D": random(6), "z": random(2, 6, 21, seed=2), "delta_bias": random(6, seed=1) - 2,
    }  # fmt: skip
    return {name: x.to(number if name in ("A", "D", "delta_bias") else dtype) for name, x in inputs.items()}


FORMS: dict[str, dict[str, Any]] = {
    "base": {},
    "constant B and C": {"B": random(6, 4), "C": random(6, 4, seed=1)},
    "bare": {"D": None, "z": None, "delta_bias": None},
    "complex": {"A": torch.complex(-random(6, 4).exp(), random(6, 4)), "B": random(2, 4, 42), "C": random(2, 4, 42)},
}


@pytest.mark.parametrize("change", FORMS.values(), ids=list(FORMS))
def test_scan_is_its_reference(change: dict[str, Any]) -> None:
    """Outputs, last state and gradients, those through the last state too."""
    inputs = {name: x.requires_grad_() for name, x in (scan_inputs() | change).items() if x is not None}
    results = []
    for scan in (selective_scan_fn, selective_scan_ref):
        y, last_state = scan(**inputs, delta_softplus=True, return_last_state=True)
        total = (y * random(2, 6, 21, seed=5)).sum() + (last_state * random(2, 6, 4, seed=6)).real.sum()
        results.append([y, last_state, *torch.autograd.grad(total, inputs.values())])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(selective_scan_fn(**inputs, delta_softplus=True), results[0][0])


def test_autograd_functions_are_called_as_the_originals() -> None:
    inputs, inner = scan_inputs(), inner_inputs()
    assert torch.equal(SelectiveScanFn.apply(*inputs.values(), True)[0], selective_scan_fn(*inputs.values(), True)[0])
    *first, D, bias = inner.values()
    assert torch.equal(MambaInnerFn.apply(*first, None, None, D, bias), mamba_inner_fn(**inner))


def test_constant_matrices_do_not_widen_the_scan() -> None:
    """Only what varies with time decides on the arithmetic; B and C that do not are parameters."""
    inputs = scan_inputs(torch.float32, torch.float32) | {"B": random(6, 4), "C": random(6, 4, seed=1)}
    with Ops() as ops:
        _, last_state = selective_scan_fn(**inputs, return_last_state=True)
    assert last_state.dtype is torch.float32
    half = {name: inputs[name].half() for name in ("u", "delta", "z")}
    with Ops() as halves:
        selective_scan_fn(**inputs | half)
    for seen, dtype in ((ops, torch.float32), (halves, torch.float16)):
        assert seen.dtypes[seen.names.index("sscan::selective_scan")] is dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scan_of_mixed_dtypes(dtype: torch.dtype) -> None:
    """Half u, z, B, C, A and D with a float32 step: only results are rounded, gradients like their inputs."""
    inputs = scan_inputs(dtype, dtype) | {"delta": scan_inputs(torch.float32)["delta"]}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    y = selective_scan_fn(**leaves, delta_softplus=True)
    expected = selective_scan_ref(**leaves, delta_softplus=True)
    assert y.dtype is expected.dtype is dtype
    torch.testing.assert_close(y, expected)
    gradients = torch.autograd.grad(y.float().sum(), leaves.values())
    assert [g.dtype for g in gradients] == [x.dtype for x in leaves.values()]


def test_autocast_changes_neither_scan_nor_convolution() -> None:
    inputs = scan_inputs(torch.float32, torch.float32)
    x, weight = inputs["u"], inputs["A"]
    with torch.autocast("cpu", torch.bfloat16):
        y, conv = selective_scan_fn(**inputs, delta_softplus=True), causal_conv1d_fn(x, weight)
    assert torch.equal(y, selective_scan_fn(**inputs, delta_softplus=True))
    assert torch.equal(conv, causal_conv1d_fn(x, weight))


def inner_inputs(dtype: torch.dtype = torch.float64, states: int = 3) -> dict[str, Any]:
    shapes = {
        "xz": (2, 12, 17), "conv1d_weight": (6, 1, 4), "conv1d_bias": (6,), "x_proj_weight": (2 + 2 * states, 6),
        "delta_proj_weight": (6, 2), "out_proj_weight": (5, 6), "out_proj_bias": (5,), "A": (6, 3), "D": (6,),
        "delta_bias": (6,),
    }  # fmt: skip
    inputs = {name: 0.5 * random(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    inputs["A"] = -inputs["A"].exp()
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


INNER: dict[str, dict[str, Any]] = {
    "fused": {},
    "checkpoint_lvl 0": {"checkpoint_lvl": 0},
    "without biases": {"conv1d_bias": None, "out_proj_bias": None, "delta_bias": None, "D": None},
    "given B": {"B": random(6, 3), "C_proj_bias": random(3)},
    "given C": {"C": random(2, 3, 17), "B_proj_bias": random(3)},
    "strided": {"xz": random(2, 17, 12).mT},
}


@pytest.mark.parametrize("change", INNER.values(), ids=list(INNER))
def test_inner_is_its_reference(change: dict[str, Any]) -> None:
    inputs = {name: x for name, x in (inner_inputs() | change).items() if isinstance(x, torch.Tensor)}
    absent = {name: x for name, x in change.items() if x is None}
    options = {"checkpoint_lvl": change["checkpoint_lvl"]} if "checkpoint_lvl" in change else {}
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    wanted = [x for name, x in leaves.items() if x is not None]
    results = []
    for inner, more in ((mamba_inner_fn, options), (mamba_inner_ref, {})):
        out = inner(**leaves, **absent, **more)
        results.append([out, *torch.autograd.grad((out * random(2, 17, 5)).sum(), wanted, allow_unused=True)])
    for ours, expected in zip(*results, strict=True):
        if expected is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_inner_with_a_complex_state_matrix() -> None:
    inputs = inner_inputs(states=6) | {"A": torch.complex(-random(6, 3).exp(), random(6, 3))}
    out, expected = mamba_inner_fn(**inputs), mamba_inner_ref(**inputs)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)


def test_inner_with_norms() -> None:
    """Unit weights: the norm of B times a number is the norm of B, whatever the number."""
    inputs = inner_inputs()
    norms = {"b_rms_weight": torch.ones(3), "c_rms_weight": torch.ones(3), "dt_rms_weight": torch.ones(6)}
    norms = {name: weight.double() for name, weight in norms.items()} | {"b_c_dt_rms_eps": 0.0}
    out = mamba_inner_fn(**inputs, **norms)
    scaled = dict(inputs, x_proj_weight=3 * inputs["x_proj_weight"])
    torch.testing.assert_close(mamba_inner_fn(**scaled, **norms), out, rtol=1e-9, atol=1e-11)
    assert (out - mamba_inner_fn(**inputs)).abs().max() > 0.01
    (gradient,) = torch.autograd.grad(out.sum(), [inputs["x_proj_weight"]])
    assert gradient.abs().max() > 0


def test_inner_under_autocast() -> None:
    inputs = inner_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = mamba_inner_fn(**inputs)
    expected = mamba_inner_fn(**inputs)
    assert out.dtype is torch.bfloat16
    assert (out - expected).norm() < 0.03 * expected.norm()


def test_inner_refuses_what_it_cannot_do() -> None:
    inputs = inner_inputs()
    with pytest.raises(ValueError, match="checkpoint_lvl must be 0 or 1, got 2"):
        mamba_inner_fn(**inputs, checkpoint_lvl=2)
    with pytest.raises(ValueError, match="B is given, so it must not have a bias or a norm"):
        mamba_inner_fn(**inputs, B=random(6, 3), B_proj_bias=random(3))


def update_inputs(heads: int = 0, groups: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    channels = (heads, 3) if heads else (6,)
    matrix = (2, groups, 5) if groups else (2, 5)
    shapes = {
        "state": (2, *channels, 5), "x": (2, *channels), "dt": (2, *channels), "A": (*channels, 5), "B": matrix,
        "C": matrix, "D": channels, "z": (2, *channels), "dt_bias": channels,
    }  # fmt: skip
    inputs = {name: random(*shape, seed=k).to(dtype) for k, (name, shape) in enumerate(shapes.items())}
    return inputs | {"A": -inputs["A"].exp()}


def update_compared(inputs: dict[str, Any], **tolerance: float) -> None:
    """The step and its reference: results and states."""
    mine, theirs = (inputs | {"state": inputs["state"].clone(memory_format=torch.preserve_format)} for _ in range(2))
    y = selective_state_update(**mine, dt_softplus=True)
    expected = selective_state_update_ref(**theirs, dt_softplus=True)
    assert y.dtype is expected.dtype is inputs["x"].dtype
    torch.testing.assert_close(y, expected, **tolerance)
    torch.testing.assert_close(mine["state"], theirs["state"], **tolerance)


@pytest.mark.parametrize(("heads", "groups"), [(0, 0), (0, 1), (0, 2), (4, 0), (4, 1), (4, 2), (1, 1)])
def test_state_update_is_its_reference(heads: int, groups: int) -> None:
    inputs = update_inputs(heads, groups)
    update_compared(inputs, rtol=1e-9, atol=1e-11)
    update_compared({n: x for n, x in inputs.items() if n not in ("D", "z", "dt_bias")}, rtol=1e-9, atol=1e-11)
    if heads:  # a state whose heads and channels do not lie one behind the other
        apart = inputs["state"].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
        update_compared(inputs | {"state": apart}, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("heads", [0, 4])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", ["", "B", "C", "dt", "z", "B C", "dt z B C", "state"])
def test_state_update_of_mixed_dtypes(wide: str, half: torch.dtype, heads: int) -> None:
    """Each in its own dtype, as the original: nothing but results is rounded to that of x."""
    inputs = update_inputs(heads, dtype=torch.float32)
    inputs |= {name: inputs[name].to(half) for name in ("state", "x", "dt", "z", "B", "C") if name not in wide.split()}
    exact = {name: x.double() for name, x in inputs.items()}
    y, expected = (selective_state_update(**given, dt_softplus=True) for given in (inputs, exact))
    assert y.dtype is half
    # Half an ulp of results that were never rounded before.
    assert ((y.double() - expected).abs() <= torch.finfo(half).eps / 2 * expected.abs() + 1e-6).all()
    error = (inputs["state"].double() - exact["state"]).abs()
    assert (error <= torch.finfo(inputs["state"].dtype).eps / 2 * exact["state"].abs() + 1e-6).all()


def test_state_update_of_one_dtype_is_one_kernel() -> None:
    """No cast, whose result would be another tensor."""
    inputs = update_inputs(dtype=torch.float16)
    inputs |= {name: inputs[name].float() for name in ("state", "A", "D", "dt_bias")}
    with Ops() as ops:
        selective_state_update(**inputs)
    assert set(ops.names) == {"sscan::selective_state_update", "aten::promote_types"}


class Ops(TorchDispatchMode):
    """The names of the ops that run, and the dtypes of their first arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.dtypes: list[Any] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(op._schema.name)
        self.dtypes.append(getattr(args[0], "dtype", None) if args else None)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("heads", [0, 6])
def test_state_update_compiles(heads: int) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(selective_state_update, fullgraph=True, backend="aot_eager")
    for layout in (torch.contiguous_format, "apart"):
        inputs = update_inputs(heads)
        if layout == "apart" and heads:
            inputs["state"] = inputs["state"].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
        mine = inputs | {"state": inputs["state"].clone(memory_format=torch.preserve_format)}
        y, expected = compiled(**mine, dt_softplus=True), selective_state_update(**inputs, dt_softplus=True)
        assert torch.equal(y, expected)
        assert torch.equal(mine["state"], inputs["state"])


def test_inference_params_carry_the_states_of_the_block() -> None:
    torch.manual_seed(0)
    block = sscan.torch.Mamba(8, d_state=3, layer_idx=0)
    hidden = random(2, 7, 8, dtype=torch.float32)
    given = InferenceParams(max_seqlen=7, max_batch_size=2)
    with torch.no_grad():
        for _ in range(2):
            outs = [block(hidden[:, :4], given)]
            given.seqlen_offset = 4
            outs += [block(hidden[:, 4:5], given)]
            given.seqlen_offset = 5
            outs += [block(hidden[:, 5:], given)]
            torch.testing.assert_close(torch.cat(outs, 1), block(hidden))
            given.reset(7, 2)


# --- norms ------------------------------------------------------------------------------------------------------------

NORMS: dict[str, dict[str, Any]] = {
    "bare": {"bias": None},
    "bias": {},
    "residual": {"bias": None, "residual": random(2, 5, 8, seed=1)},
    "prenorm": {"residual": random(2, 5, 8, seed=1), "prenorm": True},
    "prenorm without residual": {"bias": None, "prenorm": True},
    "rowscale": {"rowscale": random(2, 5), "residual": random(2, 5, 8, seed=1), "prenorm": True},
    "parallel": {
        "x1": random(2, 5, 8, seed=3), "weight1": random(8, seed=4), "bias1": random(8, seed=5), "prenorm": True,
        "residual": random(2, 5, 8, seed=1),
    },
    "parallel, one weight": {"x1": random(2, 5, 8, seed=3)},
}  # fmt: skip


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("change", NORMS.values(), ids=list(NORMS))
def test_norms_are_those_of_torch(change: dict[str, Any], is_rms_norm: bool) -> None:
    given = {"x": random(2, 5, 8), "weight": random(8), "bias": random(8, seed=1), "eps": 1e-3} | change
    leaves = {name: x.requires_grad_() for name, x in given.items() if isinstance(x, torch.Tensor)}
    found = rms_norm_fn(**given) if is_rms_norm else layer_norm_fn(**given)
    total = given["x"] * given["rowscale"][..., None] if "rowscale" in given else given["x"]
    total = total + given.get("x1", 0) + given.get("residual", 0)
    expected = []
    for weight, bias in ((given["weight"], given["bias"]), (given.get("weight1"), given.get("bias1"))):
        if weight is not None:
            norm = torch.nn.functional.rms_norm if is_rms_norm else torch.nn.functional.layer_norm
            y = norm(total, (8,), weight, eps=1e-3)
            expected.append(y if bias is None else y + bias)
    expected += [total] if given.get("prenorm") else []
    found = found if isinstance(found, tuple) else (found,)
    torch.testing.assert_close(found, tuple(expected))
    results = [
        torch.autograd.grad(sum((y * random(2, 5, 8, seed=9)).sum() for y in made), leaves.values(), retain_graph=True)
        for made in (found, expected)
    ]
    torch.testing.assert_close(*results)


def test_norms_keep_dtypes_and_drop_out() -> None:
    x, weight = random(2, 5, 8, dtype=torch.bfloat16), torch.ones(8)
    wide = random(2, 5, 8, seed=1, dtype=torch.float32)
    for function in (rms_norm_fn, layer_norm_fn):
        for residual, in_fp32, dtype in (
            (None, False, torch.bfloat16), (None, True, torch.float32), (wide, False, torch.float32),
            (wide.bfloat16(), True, torch.bfloat16),
        ):  # fmt: skip
            y, total = function(x, weight, None, residual, prenorm=True, residual_in_fp32=in_fp32)
            assert (y.dtype, total.dtype) == (torch.bfloat16, dtype)
            whole = x.float() + (0 if residual is None else residual.float())
            assert torch.equal(total, whole.to(dtype))
        with pytest.raises(NotImplementedError, match="return_dropout_mask is not there"):
            function(x, weight, None, return_dropout_mask=True)
        with pytest.raises(ValueError, match="rowscale must not be given together with x1"):
            function(x, weight, None, x1=x, rowscale=x[..., 0])
    norm = RMSNorm(8, dropout_p=0.5)
    assert torch.equal(norm.eval()(wide), rms_norm_fn(wide, norm.weight, None, eps=1e-5))
    _, total = norm.train()(wide, prenorm=True)
    dropped = total == 0
    assert 5 < dropped.sum() < 75
    assert torch.equal(total[~dropped], 2 * wide[~dropped])
    assert list(norm.state_dict()) == ["weight"]


@pytest.mark.parametrize("checkpoint_lvl", [0, 1])
def test_functions_on_meta(checkpoint_lvl: int) -> None:
    """Shapes and dtypes of results without data, as in PyTorch."""

    def results(device: str) -> list[Any]:
        scan, inner, step = (
            {name: x.detach().to(device) for name, x in inputs.items()}
            for inputs in (scan_inputs(torch.float16, torch.float32), inner_inputs(), update_inputs(4))
        )
        return [
            selective_scan_fn(**scan), mamba_inner_fn(**inner, checkpoint_lvl=checkpoint_lvl),
            selective_state_update(**step), causal_conv1d_fn(scan["u"], scan["A"], activation="silu"),
            causal_conv1d_update(scan["u"][..., 0], scan["u"].float(), scan["A"]),
            rms_norm_fn(scan["u"], scan["u"][0, 0], None),
        ]  # fmt: skip

    found, expected = results("meta"), results("cpu")
    assert {x.device.type for x in found} == {"meta"}
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]


# --- causal_conv1d ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_convolution_is_that_of_torch(activation: str | None) -> None:
    x, weight, bias = random(2, 5, 11), random(5, 4), random(5)
    before = random(2, 5, 3)
    y, states = causal_conv1d_fn(x, weight, bias, None, before, True, activation=activation)
    whole = torch.cat([before, x], -1)
    expected = torch.nn.functional.conv1d(whole, weight[:, None], bias, groups=5)
    torch.testing.assert_close(y, expected if activation is None else torch.nn.functional.silu(expected))
    assert torch.equal(states, whole[..., -3:])
    out = torch.empty(2, 5, 3, dtype=torch.float64)
    assert causal_conv1d_fn(x, weight, bias, None, before, True, out)[1] is out
    assert torch.equal(out, states)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_steps_with_a_negative_seq_idx_are_padding(activation: str | None) -> None:
    """Zeros, from whatever stands there, and no gradient; the sequences between are as they are alone."""
    seq_idx = torch.tensor([[-1, -1, 0, 0, 0, -1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, -1, -1, -2]], dtype=torch.int32)
    parts = [(0, 2, 5), (0, 6, 10), (1, 0, 7)]
    x = random(2, 5, 10)
    x[(seq_idx < 0)[:, None].expand_as(x)] = float("nan")
    leaves = [x.requires_grad_(), random(5, 4).requires_grad_(), random(5).requires_grad_()]
    y = causal_conv1d_fn(*leaves, seq_idx, activation=activation)
    assert torch.equal(y.mT[seq_idx < 0], torch.zeros(6, 5, dtype=y.dtype))
    alone = [causal_conv1d_ref(x[row : row + 1, :, a:b], *leaves[1:], activation=activation) for row, a, b in parts]
    for (row, a, b), expected in zip(parts, alone, strict=True):
        torch.testing.assert_close(y[row : row + 1, :, a:b], expected)
    found = torch.autograd.grad(y.square().sum(), leaves)
    expected = torch.autograd.grad(sum(part.square().sum() for part in alone), leaves)
    torch.testing.assert_close(found, expected)


def test_references_of_the_convolution() -> None:
    """They are what they are named after, the states too."""
    x, weight, bias, before = random(2, 5, 11), random(5, 4), random(5), random(2, 5, 3)
    for options in ({}, {"initial_states": before}, {"return_final_states": True}, {"activation": "swish"}):
        torch.testing.assert_close(
            causal_conv1d_ref(x, weight, bias, **options), causal_conv1d_fn(x, weight, bias, **options)
        )
    for filled in (None, torch.tensor([0, 3])):
        mine, theirs = random(2, 5, 6), random(2, 5, 6)
        y = causal_conv1d_update(x, mine, weight, bias, "silu", filled)
        torch.testing.assert_close(y, causal_conv1d_update_ref(x, theirs, weight, bias, "silu", filled))
        assert torch.equal(mine, theirs)


def test_last_inputs_of_packed_sequences() -> None:
    x, borders = random(9, 5), torch.tensor([0, 2, 2, 9], dtype=torch.int32)
    states = causal_conv1d_varlen_states(x, borders, 4)
    assert torch.equal(states, causal_conv1d_varlen_states_ref(x, borders, 4))
    assert torch.equal(states[0], torch.cat([torch.zeros(2, 5), x[:2]]).mT.double())
    assert not states[1].any()
    assert torch.equal(states[2], x[5:].mT)
    assert causal_conv1d_varlen_states(x[:0], borders[:1], 4).shape == (0, 5, 4)


@pytest.mark.parametrize("states", [False, True])
def test_functions_behind_the_autograd_function(states: bool) -> None:
    """As mamba_ssm and its forks call them."""
    x, weight, bias = (t.requires_grad_() for t in (random(2, 5, 11), random(5, 4), random(5)))
    before = random(2, 5, 3).requires_grad_() if states else None
    y, end = causal_conv1d_fn(x, weight, bias, None, before, True, activation="silu")
    dout, dend = random(2, 5, 11, seed=1), random(2, 5, 3, seed=1) if states else None
    inputs = [x, weight, bias, *([before] if states else [])]
    expected = torch.autograd.grad([y, end], inputs, [dout, torch.zeros_like(end) if dend is None else dend])
    final = torch.empty_like(end)
    out = causal_conv1d_cuda.causal_conv1d_fwd_function(x, weight, bias, None, before, final, True)
    assert torch.equal(out, y)
    assert torch.equal(final, end)
    dx = torch.empty_like(x)
    found = causal_conv1d_cuda.causal_conv1d_bwd_function(x, weight, bias, dout, None, before, dend, dx, states, True)
    assert found[0] is dx
    assert (found[3] is None) == (not states)
    torch.testing.assert_close(tuple(t for t in found if t is not None), expected)
    mine, theirs = random(2, 5, 3), random(2, 5, 3)
    step = causal_conv1d_cuda.causal_conv1d_update_function(x[..., 0], mine, weight, bias, True, None, None)
    assert torch.equal(step, causal_conv1d_update(x[..., 0], theirs, weight, bias, "silu"))
    assert torch.equal(mine, theirs)


def test_what_is_no_tensor_is_named() -> None:
    x, weight, bias = random(2, 5, 11), random(5, 4), random(5)
    with pytest.raises(TypeError, match=r"^causal_conv1d_fn: seq_idx must be a torch\.Tensor, got str$"):
        causal_conv1d_fn(x, weight, bias, "silu")
    with pytest.raises(TypeError, match=r"^causal_conv1d_update: cache_seqlens must be a torch\.Tensor, got list$"):
        causal_conv1d_update(x, random(2, 5, 4), weight, bias, None, [0, 1])
    with pytest.raises(TypeError, match=r"^selective_scan_fn: delta must be a torch\.Tensor, got NoneType$"):
        selective_scan_fn(**scan_inputs() | {"delta": None})
    with pytest.raises(TypeError, match=r"^selective_state_update: dt must be a torch\.Tensor, got NoneType$"):
        selective_state_update(**update_inputs() | {"dt": None})
    with pytest.raises(TypeError, match=r"^mamba_inner_fn: A must be a torch\.Tensor, got float$"):
        mamba_inner_fn(**inner_inputs() | {"A": 1.0})
    with pytest.raises(TypeError, match=r"^rms_norm_fn: weight must be a torch\.Tensor, got NoneType$"):
        rms_norm_fn(x, None, None)


@pytest.mark.parametrize("kept", [3, 5])
@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("ring", [False, True])
def test_convolution_of_the_next_tokens(kept: int, tokens: int, ring: bool) -> None:
    """Shifted or a ring, chunk after chunk: what the whole sequence gives."""
    x, weight, bias = random(2, 5, 14), random(5, 4), random(5)
    expected = causal_conv1d_fn(x, weight, bias, activation="silu")
    state, filled = torch.zeros(2, 5, kept, dtype=torch.float64), torch.tensor([0, 3])
    outs = []
    for t in range(0, 14, tokens):
        outs.append(
            causal_conv1d_update(x[..., t : t + tokens], state, weight, bias, "silu", filled + t if ring else None)
        )
    torch.testing.assert_close(torch.cat(outs, -1), expected)
    if not ring:
        assert torch.equal(state, x[..., 14 - kept :])


def test_convolution_of_some_rows() -> None:
    x, weight, pool = random(4, 5), random(5, 4), random(6, 5, 4, seed=1)
    indices = torch.tensor([4, -1, 0, -1], dtype=torch.int32)
    expected_pool = pool.clone()
    rows = pool[[4, 0]].clone()
    expected = causal_conv1d_update(x[[0, 2]], rows, weight)
    expected_pool[[4, 0]] = rows
    y = causal_conv1d_update(x, pool, weight, conv_state_indices=indices)
    torch.testing.assert_close(y[[0, 2]], expected)
    assert not y[[1, 3]].any()
    assert torch.equal(pool, expected_pool)
    assert not causal_conv1d_update(x, pool, weight, conv_state_indices=torch.full((4,), -1)).any()
    assert torch.equal(pool, expected_pool)
    with pytest.raises(ValueError, match="keep width - 1 = 3 columns"):
        causal_conv1d_update(x[..., None].expand(4, 5, 2), pool[:4, :, :2], weight)


# --- selective_scan_cuda ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
def test_extension_module(gated: bool) -> None:
    """As the autograd functions of VMamba, Vim and fla use it."""
    inputs = {name: x.requires_grad_() for name, x in scan_inputs().items() if gated or name != "z"}
    u, delta, A, B, C, D, bias = (inputs[name] for name in ("u", "delta", "A", "B", "C", "D", "delta_bias"))
    z = inputs.get("z")
    y, last_state = selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True)
    dout = random(2, 6, 21, seed=9)
    expected = torch.autograd.grad((y * dout).sum(), inputs.values())
    with torch.no_grad():
        out, x, *rest = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, bias, True)
        dz = torch.empty_like(u) if gated else None
        found = selective_scan_cuda.bwd(u, delta, A, B, C, D, z, bias, dout, x, out, dz, True, gated)
    torch.testing.assert_close(rest[0] if gated else out, y)
    torch.testing.assert_close(x[:, :, -1, 1::2], last_state)
    du, ddelta, dA, dB, dC, dD, dbias, *more = found
    assert len(more) == (2 if gated else 0)
    if gated:
        assert more[0] is dz
        torch.testing.assert_close(more[1], y)
    ours = dict(u=du, delta=ddelta, A=dA, B=dB, C=dC, D=dD, delta_bias=dbias, **({"z": dz} if gated else {}))
    for name, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(ours[name], gradient)


@pytest.mark.parametrize("out_float", [False, True])
def test_extension_modules_of_vmamba(out_float: bool) -> None:
    """As its autograd function calls them: half inputs, and a gradient of float32 where the output is."""
    inputs = scan_inputs(torch.float16, torch.float32)
    del inputs["z"]
    u, delta, A, B, C, D, bias = inputs.values()
    wide = {name: x.float().clone().requires_grad_() for name, x in inputs.items()}
    y = selective_scan_fn(**wide, delta_softplus=True)
    dout = random(2, 6, 21, seed=9, dtype=torch.float32 if out_float else torch.float16)
    expected = torch.autograd.grad(y, wide.values(), dout.float())
    module = selective_scan_cuda_oflex if out_float else selective_scan_cuda_core
    out, x, *_ = module.fwd(u, delta, A, B, C, D, bias, True, 1, *([True] if out_float else []))
    assert out.dtype is dout.dtype
    torch.testing.assert_close(out, y.detach().to(out.dtype), rtol=1e-3 if not out_float else 1e-6, atol=1e-6)
    found = module.bwd(u, delta, A, B, C, D, bias, dout, x, True, 1)
    assert [g.dtype for g in found] == [t.dtype for t in (u, delta, A, B, C, D, bias)]
    for mine, theirs, given in zip(found, expected, inputs.values(), strict=True):
        rtol = 2 * torch.finfo(given.dtype).eps
        torch.testing.assert_close(mine.float(), theirs, rtol=rtol, atol=rtol * theirs.abs().max().item())
    narrow, _ = selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, bias, True, 1, False)
    assert narrow.dtype is torch.float16


SCAN_OPTIONS = {"D": None, "z": None, "delta_bias": None, "delta_softplus": False, "return_last_state": False}
INNER_OPTIONS = {
    **dict.fromkeys(("B", "C", "D", "delta_bias", "B_proj_bias", "C_proj_bias")), "delta_softplus": True,
}  # fmt: skip
STEP_OPTIONS = {"D": None, "z": None, "dt_bias": None, "dt_softplus": False}


@pytest.mark.parametrize(
    ("function", "defaults"),
    [
        (selective_scan_fn, SCAN_OPTIONS),
        (selective_scan_ref, SCAN_OPTIONS),
        (mamba_inner_fn, {**INNER_OPTIONS, "checkpoint_lvl": 1, "b_c_dt_rms_eps": 1e-6}),
        (mamba_inner_ref, INNER_OPTIONS),
        (selective_state_update, {**STEP_OPTIONS, "state_batch_indices": None}),
        (selective_state_update_ref, STEP_OPTIONS),
        (causal_conv1d_fn, {"bias": None, "seq_idx": None, "return_final_states": False, "activation": None}),
        (causal_conv1d_update, {"bias": None, "activation": None, "cache_seqlens": None}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_defaults_are_those_of_the_originals(function: Any, defaults: dict[str, Any]) -> None:
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in defaults} == defaults
