"""How the documentation becomes a site; CONTRIBUTING.md has the command."""

import dataclasses
import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

import cnn_jax

project = "cnn_jax"
copyright = "the authors of cnn_jax"
release = cnn_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["pictures"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

highlight_language = "none"  # of blocks that name none: commands and what they print

html_theme = "furo"
html_title = "cnn_jax"
html_math_renderer = "mathml"
html_copy_source = False

default_role = "code"  # docstrings write `names` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings have the shapes; the types' full names hide them
autodoc_preserve_defaults = True


def write_math(translator: Any, node: Any) -> None:
    """Writes a formula as MathML, which browsers draw themselves: no script, no network."""
    display = node.tagname == "math_block"
    formula = str(tex2mathml(node.astext(), as_block=display))
    translator.body.append(f"<p>{formula}</p>" if display else formula)
    raise nodes.SkipNode


def class_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: Any, result: Any
) -> tuple[str, None] | None:
    """Returns the fields of a dataclass, such as a linen module, with the defaults that are plain.

    The two that flax adds to each module, and the objects that a block is built from, have none.
    """
    if what != "class" or not dataclasses.is_dataclass(obj):
        return None
    fields = []
    for field in dataclasses.fields(obj):
        if field.name in ("parent", "name"):
            continue
        plain = isinstance(field.default, int | float | str | tuple | None)
        fields.append(f"{field.name}={field.default!r}" if plain else field.name)
    return f"({', '.join(fields)})", None


def as_restructured_text(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Makes literal blocks of indented formulas, and a known heading of one that says more."""
    text = "\n".join(lines)
    text = re.sub(r"(?<=\n)\n((?: {4}.*\n)+)(?=\n)", r"\n::\n\n\1", text)
    text = re.sub(
        r"^Attributes, (beside .*):$", r"Attributes: \1.\n\nAttributes:", text, flags=re.M
    )
    if what == "class":  # its attributes are the arguments that make it
        text = text.replace("Attributes:", "Arguments:")
        text = re.sub(r"^  \w+(?:, \w+)+:", lambda m: m[0].replace(", ", ","), text, flags=re.M)
    lines[:] = text.split("\n")


def setup(app: Sphinx) -> None:
    """Registers what is above."""
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("autodoc-process-signature", class_signature)
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)  # before napoleon
