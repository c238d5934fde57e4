"""What the API pages show: every public name, each with all of its parameters and the defaults that the code has."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpydoc.docscrape import NumpyDocString

import sscan
import sscan.models

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "api"
# Packages whose public names are those of __all__; what lies below is not a public module unless it is named here.
PACKAGES = ["sscan", "sscan.compat", "sscan.jax", "sscan.models", "sscan.nn", "sscan.testing", "sscan.torch"]
MODULES = [
    "sscan.jax.distributed",
    "sscan.jax.equinox",
    "sscan.jax.nnx",
    "sscan.reference",
    "sscan.torch.distributed",
    *(f"sscan.tasks.{path.stem}" for path in sorted((ROOT / "sscan" / "tasks").glob("[!_]*.py"))),
]
NOT_IMPORTED = {"sscan.lm_eval", "sscan.cli", "sscan.tasks"}  # no names: commands, and a package of modules
INTERNAL = {"cpu", "cuda", "ssm"}  # the last holds ssm_kernel and ssm_convolution
# What is no library: the definition, whose functions take what the ops of their names take, and the tasks.
SHORT = ("sscan.reference", "sscan.tasks")


def names_of(module: Any) -> list[str]:
    """What is public in a module."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = {name for name, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__}
    return sorted(name for name in own if not name.startswith("_"))


def methods_of(thing: type) -> list[str]:
    """The methods of a class that its entry shows: with those of our classes that it inherits from."""
    shown = itertools.takewhile(lambda x: x is thing or x.__name__ not in ("Module", "list", "tuple"), thing.__mro__)
    known = {name: x for owner in reversed([*shown]) for name, x in vars(owner).items() if owner is not object}
    methods = (FunctionType, classmethod, staticmethod)
    return [name for name, x in known.items() if not name.startswith("_") and isinstance(x, methods)]


def public() -> Iterator[tuple[str, Any]]:
    """Every public function, class and method that is ours, with its full name."""
    for module in map(importlib.import_module, [*PACKAGES, *MODULES]):
        for name in names_of(module):
            thing = getattr(module, name)
            if not inspect.isclass(thing) and not inspect.isfunction(inspect.unwrap(thing)):
                continue
            yield f"{module.__name__}.{name}", thing
            if inspect.isclass(thing):
                for method in methods_of(thing):
                    yield f"{module.__name__}.{name}.{method}", getattr(thing, method)


PUBLIC = dict(public())
every = pytest.mark.parametrize("name", PUBLIC)


def parameters_of(thing: Any) -> dict[str, inspect.Parameter]:
    """The public parameters of a function, or of what makes objects of a class, behind what hides them."""
    hidden = inspect.isclass(thing) and type(thing).__call__ is not type.__call__
    signature = inspect.signature(inspect.unwrap(thing.__init__) if hidden else thing)
    return {name: x for name, x in signature.parameters.items() if name != "self" and not name.startswith("_")}


@cache
def entries(thing: Any) -> dict[str, tuple[str, str]]:
    """The parameters in a docstring, and for a class its attributes: of each the type, and what is said of it."""
    parsed = NumpyDocString(inspect.getdoc(thing) or "")
    listed = [*parsed["Parameters"], *parsed["Other Parameters"]]
    if inspect.isclass(thing):
        listed += parsed["Attributes"]
    return {name.strip().lstrip("*"): (x.type, " ".join(x.desc)) for x in listed for name in x.name.split(",")}


def referred(name: str) -> list[str]:
    """What a docstring refers to, and so on, as far as it is public."""
    found, to_read = [], [name]
    while to_read:
        name = to_read.pop()
        found.append(name)
        for target in re.findall(r":(?:func|class|meth):`([\w.]+)`", inspect.getdoc(PUBLIC[name]) or ""):
            to_read += [x for x in (target, f"{name.rsplit('.', 1)[0]}.{target}") if x in PUBLIC and x not in found]
    return found


@every
def test_has_a_docstring(name: str) -> None:
    """Without one it is not on the page."""
    assert inspect.getdoc(PUBLIC[name])


@every
def test_every_parameter_is_documented(name: str) -> None:
    """In the list, in the sentences, or where the docstring refers to; and the list has no others."""
    parameters, listed = parameters_of(PUBLIC[name]), entries(PUBLIC[name])
    if not inspect.isclass(PUBLIC[name]):
        assert [entry for entry in listed if entry not in parameters] == []
    if name.startswith(SHORT):
        return
    elsewhere = {entry for other in referred(name) for entry in entries(PUBLIC[other])}
    text = inspect.getdoc(PUBLIC[name]) or ""
    unsaid = [x for x in parameters if x not in elsewhere and not re.search(rf"\b{x}\b", text)]
    assert unsaid == []


def says(said: str, value: Any) -> bool:
    """Whether a docstring's default is what the code has."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(Fraction(said)) == value
    return said in (repr(value), f'"{value}"', getattr(value, "__name__", None))


@every
def test_defaults_are_those_of_the_code(name: str) -> None:
    """As far as a list of parameters gives them: ``float, default 0.1``, and ``int, optional`` has some default."""
    parameters = parameters_of(PUBLIC[name])
    for entry, (kind, _) in entries(PUBLIC[name]).items():
        default = parameters[entry].default if entry in parameters else inspect.Parameter.empty
        if re.search(r"\bdefault\b|\boptional\b", kind):
            assert default is not inspect.Parameter.empty, f"{entry} : {kind}"
        if re.search(r"\bdefault\b", kind):
            said = re.search(r", default (\S+)$", kind)
            assert said, f"{entry} : {kind} is not written as `, default X`"
            assert says(said[1], default), f"{entry} : {kind}, but the code has {default!r}"


@pytest.mark.parametrize(
    ("said", "value", "right"),
    [
        ("0.1", 0.1, True),
        ("1e-5", 1e-5, True),
        ("8/3", 8 / 3, True),
        ("4", 4, True),
        ("16", 4, False),
        ("0.001", 0.01, False),
        ('"random"', "random", True),
        ('"constant"', "random", False),
        ("True", False, False),
        ("False", False, True),
        ("None", None, True),
        ("float32", np.float32, True),
        ("float64", np.float32, False),
    ],
)
def test_a_wrong_default_is_noticed(said: str, value: Any, right: bool) -> None:
    assert says(said, value) is right


def shown_modules() -> dict[str, list[str]]:
    """The modules on the API pages, each with the names that its page leaves out of it."""
    shown = {}
    for page in PAGES.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for module, options in re.findall(r"^\.\. automodule:: ([\w.]+)\n((?:   :.*\n)*)", text, re.MULTILINE):
            left_out = re.findall(r":exclude-members: (.*)", options)
            shown[module] = left_out[0].split(", ") if left_out else []
            entries = re.findall(r"^\.\. py:class:: ([\w\s]+?)\n\n", text, re.MULTILINE)
            assert sorted(shown[module]) == sorted(entries[0].split() if entries and left_out else [])
    return shown


def test_every_public_module_is_on_a_page() -> None:
    shown = shown_modules()
    assert sorted(shown) == sorted([*PACKAGES, *MODULES, *NOT_IMPORTED])
    rooms = {path.stem for path in Path(sscan.__file__).parent.iterdir() if re.match(r"[a-z]\w*(\.py)?$", path.name)}
    assert rooms == {module.split(".")[1] for module in shown if "." in module} | INTERNAL | set(sscan.__all__) & rooms


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_neither_function_nor_class_is_on_a_page(package: str) -> None:
    """It has no docstring that would bring it there."""
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES.glob("*.md"))
    for name in importlib.import_module(package).__all__:
        assert f"{package}.{name}" in PUBLIC or f"\n.. py:data:: {name}\n" in pages, name


def test_what_a_page_leaves_out_of_a_module_is_on_another() -> None:
    for module, left_out in shown_modules().items():
        for name in left_out:
            assert getattr(importlib.import_module(module), name) is getattr(sscan.models, name)


def test_what_is_public_is_found() -> None:
    functions, classes = {"sscan.selective_scan", "sscan.tasks.loop.train"}, {"sscan.nn.Mamba", "sscan.jax.nnx.MambaLM"}
    methods = {"sscan.torch.Mamba.step", "sscan.nn.MambaLM.generate", "sscan.models.MambaConfig.from_dict"}
    assert functions | classes | methods <= set(PUBLIC)
