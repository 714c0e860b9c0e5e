"""Sphinx: pages in Markdown, the API from docstrings. `make docs` builds them into build/docs."""

project = "lit_prune"
author = "The lit_prune authors"
copyright = "The lit_prune authors, Apache-2.0"  # noqa: A001 - Sphinx's name for it

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # pages that include a part of the README begin at its level

html_theme = "furo"
html_title = "lit_prune"
templates_path: list[str] = []
exclude_patterns: list[str] = []

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"show-inheritance": True}
python_use_unqualified_type_names = True
# Docstrings name things of the package in single backticks: a link where there is a page for it.
default_role = "any"
nitpicky = False
# `any` finds no page for options and local names: that is no mistake of the text.
suppress_warnings += ["ref.any"]
