"""The site: `make docs-site`. Sphinx reads the Markdown pages from where they lie; GitHub shows the same ones."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "site")]

project = "svdpeft"
author = copyright = "The svdpeft developers"
extensions = [
    "myst_parser",
    "sphinx_design",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "gallery",
    "formulas",
    "reading",
]
root_doc = "docs/index"
include_patterns = ["docs/**", "benchmarks/**.md", "CHANGELOG.md", "SECURITY.md"]
exclude_patterns = ["docs/site/**"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4

# The docstrings are Google's, with sections of their own.
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
napoleon_custom_sections = ["When to use", "Paper and code"]
napoleon_use_rtype = False
nitpicky = True
nitpick_ignore_regex = [  # what others define, shapes, and names of types within: all else must be found
    ("py:.*", r"(collections|contextlib|huggingface_hub|jaxtyping|os|pathlib|torch|transformers)\..*"),
    ("py:class", r".*'|'.*|Float|Tensor|nn\.Module|svdpeft\.registry\.T|(list\[)?dict\[str"),
    ("py:class", r"BaseWeight|BatchNorm|Condition|Patterns|Place|Rule"),
]

# The inventories of others are fetched, which a build without a network cannot: SVDPEFT_INTERSPHINX=1 links to them.
if os.environ.get("SVDPEFT_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "transformers": ("https://huggingface.co/docs/transformers/main/en", None),
        "timm": ("https://huggingface.co/docs/timm/main/en", None),
    }

html_theme = "pydata_sphinx_theme"
html_title = "svdpeft"
html_static_path = ["site/static"]
html_math_renderer = "mathml"
html_css_files = ["style.css"]
html_extra_path = ["site/root", "../benchmarks/results/demo/report.html"]
html_show_sourcelink = False
html_sidebars = {"docs/index": [], "docs/gallery": []}
html_context = {"default_mode": "auto"}  # light or dark, as the system has it
html_theme_options = {
    "logo": {"text": "svdpeft"},
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
