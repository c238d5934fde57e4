"""How Sphinx builds this folder: ``python -m sphinx -W --keep-going docs site``."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

import sscan

if TYPE_CHECKING:
    from sphinx.application import Sphinx

logger = logging.getLogger(__name__)

project, author, release = "sscan", "the sscan authors", sscan.__version__
extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc"]
exclude_patterns = ["examples"]
default_role = "literal"  # `x` names an argument
nitpicky = True  # a reference to nothing is a warning, and CI makes warnings errors

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "inherited-members": "Module, list, tuple",  # of our own classes above these
}
autodoc_mock_imports = ["lm_eval"]  # large, and only the base class of sscan.lm_eval
autodoc_preserve_defaults = True  # as they stand in the code
autodoc_typehints = "none"  # the lists of parameters say more
numpydoc_show_class_members = False  # autodoc has listed them

html_theme = "pydata_sphinx_theme"
html_title = f"sscan {release}"
html_static_path = ["static"]
html_css_files = ["sscan.css"]
html_copy_source = False
html_math_renderer = "mathml"
html_theme_options = {
    "navbar_align": "left",
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}


def mathml(node: Any, display: str) -> str:
    """A formula that browsers draw; LaTeX that docutils does not know is a warning."""
    try:
        formula = tex2mathml(node.astext())
    except (ValueError, SyntaxError) as error:
        logger.warning("%s: %s", error, node.astext(), location=node)
        return ""
    # Without a font for mathematics, Chromium draws an accent into its letter.
    formula = formula.replace('<mover accent="true">', "<mover>")
    return formula.replace("<math", f'<math display="{display}"', 1)


def inline(page: Any, node: Any) -> None:
    """The formula in a line."""
    page.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def displayed(page: Any, node: Any) -> None:
    """The formula on lines of its own."""
    page.body.append(mathml(node, "block"))
    raise nodes.SkipNode


def of_init(app: Any, what: str, name: str, thing: Any, *_: Any) -> Any:
    """The signature of a class whose metaclass hides it, as Flax' and Equinox' do."""
    if what != "class" or type(thing).__call__ is type.__call__:
        return None
    source = inspect.getsource(inspect.unwrap(thing.__init__))
    arguments = ast.parse(textwrap.dedent(source)).body[0].args
    for node in ast.walk(arguments):
        if isinstance(node, ast.arg):
            node.annotation = None
    return f"({ast.unparse(arguments).removeprefix('self, ')})", ""


def fields(app: Any, what: str, name: str, thing: Any, *_: Any) -> bool | None:
    """Leave out what Python writes about the fields of named tuples."""
    return True if f"{thing.__doc__}".startswith("Alias for field") else None


class Help(SphinxDirective):
    """What a command prints when it is asked for help."""

    optional_arguments = 9

    def run(self) -> list[nodes.Node]:
        """Ask it."""
        command = [sys.executable, "-m", "sscan.cli", *self.arguments, "--help"]
        environment = {**os.environ, "COLUMNS": "88", "NO_COLOR": "1"}
        done = subprocess.run(
            command, env=environment, check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise self.error(done.stderr)
        return [nodes.literal_block(done.stdout, done.stdout, language="none")]


def setup(app: Sphinx) -> None:
    """Add what is above."""
    app.add_html_math_renderer("mathml", (inline, None), (displayed, None))
    app.add_directive("help", Help)
    app.connect("autodoc-process-signature", of_init)
    app.connect("autodoc-skip-member", fields)
