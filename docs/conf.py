"""How the documentation site is built: Sphinx over the Markdown of this folder (``make docs``).

The pages are written to be read as plain Markdown too, so their links are relative paths in the repository. Two things
need help here: ``readme.md`` and ``changelog.md`` show the files at the repository's root, and links to files outside
of this folder lead to copies of them. Formulas become MathML when the site is built, so that
pages load nothing from elsewhere. Nothing here is needed to read the pages as they are.
"""

import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from hesscale_lightning import __version__  # noqa: E402

logger = logging.getLogger(__name__)

project = "hesscale_lightning"
author = copyright = "the hesscale_lightning authors"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
default_role = "literal"

myst_heading_anchors = 4  # headings are link targets, by the names that the usual hosts of Markdown give them

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the text of a docstring says what its arguments are
autosummary_generate = False  # the pages of api/ name what they show
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False

html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"hesscale_lightning {__version__}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"

AT_THE_ROOT = {"readme": "README.md", "changelog": "CHANGELOG.md"}  # page: the file that it shows
# Code, in which nothing is a link; or [text](target#anchor) with a target in the repository.
_CODE_OR_LINK = re.compile(
    r"^```.*?^```|`[^`\n]*`"
    r"|\[(?P<text>[^\]]*)\]\((?!https?:|mailto:|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)",
    re.MULTILINE | re.DOTALL,
)


def links_of_site(source: str, folder: Path, page: str) -> str:
    """The Markdown of a page with its links changed from the repository's files to the site's.

    Args:
        source: Markdown, with links relative to ``folder``.
        folder: the folder that its links are relative to.
        page: name of the page in the site, relative to this folder.
    """
    shown_at_root = {ROOT / name: f"{shown}.md" for shown, name in AT_THE_ROOT.items()}
    up = "../" * page.count("/")

    def moved(link: re.Match[str]) -> str:
        if link["target"] is None:  # code
            return link[0]
        target = (folder / link["target"]).resolve()
        if not target.exists():
            return link[0]  # the builder will tell
        if target.is_dir() and not (target / "index.md").exists():  # a site has no folders: name it
            return f"{link['text']} (`{target.relative_to(ROOT)}/`)"
        if target in shown_at_root:
            place = shown_at_root[target]
        elif target.is_relative_to(HERE):
            place = target.relative_to(HERE).as_posix()
        else:  # offered as a copy of the file
            place = f"../{target.relative_to(ROOT).as_posix()}"
        return f"[{link['text']}]({up}{place}{link['anchor'] or ''})"

    return _CODE_OR_LINK.sub(moved, source)


def _read(app: Sphinx, page: str, source: list[str]) -> None:
    folder = (HERE / page).parent
    if page in AT_THE_ROOT:
        shown = ROOT / AT_THE_ROOT[page]
        source[0], folder = shown.read_text(), ROOT
        app.env.note_dependency(str(shown))
    source[0] = links_of_site(source[0], folder, page)


def _formula(self: HTML5Translator, node: nodes.Element) -> None:
    """Writes a formula as MathML; several lines are aligned at their ampersands."""
    lines = re.sub(r"\\[bB]igg?[lr]?(?![a-zA-Z])", "", node.astext())  # sizes of delimiters, which it does not know
    lines = re.sub(r"(?<=\\text)\{[^}]*\}", lambda words: words[0].replace(r"\_", "_"), lines)
    block = isinstance(node, nodes.math_block)
    if block and "&" in lines:
        lines = rf"\begin{{aligned}}{lines}\end{{aligned}}"
    try:
        self.body.append(tex2mathml(lines, as_block=block))
    except MathError as error:
        logger.warning("formula %r: %s", lines, error, location=node)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))
    app.connect("source-read", _read)
