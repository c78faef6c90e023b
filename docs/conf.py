"""Sphinx: `make docs`. The build and its pages need no network, and no compiled core."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import figures  # noqa: E402

project = "snnlstm"
author = "The snnlstm authors"
project_copyright = author
release = re.search(r'__version__ = "(.+)"', (ROOT / "snnlstm" / "version.py").read_text())[1]
version = release

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",  # copies MathJax, which draws the formulas, to the pages
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the outputs are committed

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings state types, with shapes
# These keep types as text: "int or (int, int), default 0" is no cross-reference.
napoleon_use_param = False
napoleon_use_rtype = False

nitpicky = True
# Docstrings name these, and their documentation is not fetched.
nitpick_ignore_regex = [("py:.*", r"(torch|snntorch|nn|Tensor)\b.*")]

html_theme = "furo"
pygments_style = "default"  # furo's own for the light theme has no red and green in diffs
html_title = f"snnlstm {release}"
html_copy_source = False

# Links of the pages at the root to their neighbours, and the same links on the pages here.
LINKS = {
    "](docs/": "](",
    "](CONTRIBUTING.md": "](contributing.md",
    "](CHANGELOG.md": "](changelog.md",
}


def _mend_links(app, relative_path, parent_docname, content):
    for link, here in LINKS.items():
        content[0] = content[0].replace(link, here)


# What a page has so that it reads well in the repository, and what it means here.
MEANT = (
    (r"<!-- (\w+\.svg): (.+) -->", r"![\2](_generated/\1)"),  # a picture that is drawn here
    (r"\[`([^`]+)`\]\(api\.md#([\w.]+)\)", r"{py:obj}`\1 <\2>`"),
    (r"\[(\w+)\]\(\.\./README\.md[^)]*\)", r"\1"),  # which is no page here
    (r"> \[!WARNING\]\n((?:>.*\n)+)", lambda m: f"```{{warning}}\n{_unquoted(m[1])}```\n"),
    (r"<!-- (\w+): (\w+(?:, \w+)+) -->", lambda m: _contents(m[1], m[2].split(", "))),
)


def _unquoted(text):
    return re.sub(r"(?m)^> ?", "", text)


def _contents(title, pages):
    return "\n".join(["```{toctree}", f":caption: {title}", ":hidden:", "", *pages, "```"])


def _mend_page(app, docname, source):
    """Turn what a page has for the repository into what Sphinx reads."""
    for pattern, meant in MEANT:
        source[0] = re.sub(pattern, meant, source[0])


def setup(app):
    """Draw the pictures, and mend pages and the links of included ones."""
    app.connect("source-read", _mend_page)
    app.connect("builder-inited", lambda app: figures.draw(Path(app.srcdir) / "_generated"))
    app.connect("include-read", _mend_links)
