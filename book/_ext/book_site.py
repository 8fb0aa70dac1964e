"""The site stands alone, and its HTML is valid where extensions are not: MathJax is copied into it, and no page loads a
script from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

# What a page can ask for: the program, its fonts, TeX extensions on demand, and speech for screen readers.
MATHJAX = ("tex-chtml.js", "output/chtml", "input/tex", "a11y", "sre")


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    package = distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax")
    site = Path(app.outdir) / "_static" / "mathjax"
    for part in MATHJAX:
        source, target = Path(str(package)) / part, site / part
        if target.exists():
            continue
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def drop_thebe(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """The book runs no code in its pages; sphinx-thebe's script is emitted twice and its `const` clashes."""
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in str(script.filename) + script.attributes.get("body", "")
    ]


# What other extensions write: an id for many elements, a role that is no longer one, a name other than what is read.
CORRECTIONS = {
    re.compile(r' id="(?:proof|exercise|solution)(?:-content)?"'): "",
    re.compile(r'role="doc-biblioentry"'): 'role="listitem"',
    re.compile(r'<summary aria-label="Toggle hidden content">'): "<summary>",
}


def correct(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    for wrong, right in CORRECTIONS.items():
        context["body"] = wrong.sub(right, context.get("body", ""))


def point_to_repository(app: Sphinx, config: Config) -> None:
    """Published from GitHub, a chapter opens in Colab: the address is known there and nowhere else."""
    repository = os.environ.get("GITHUB_REPOSITORY")
    options = config.html_theme_options
    if repository:
        options["repository_url"] = f"{os.environ['GITHUB_SERVER_URL']}/{repository}"
        options["launch_buttons"]["colab_url"] = "https://colab.research.google.com"


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", point_to_repository)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("html-page-context", correct)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
