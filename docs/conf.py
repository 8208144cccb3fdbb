"""Settings of the documentation: ``make docs`` builds it with Sphinx, from these pages and the docstrings, without a network."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "kancompile"
author = "the kancompile authors"
version = release = metadata.version("kancompile")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "recipe_keys"]
exclude_patterns = ["_build"]
# fences of languages that no highlighter knows or that hold output stay plain
highlight_language = "text"

myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# an attribute that a class docstring describes is not listed a second time
napoleon_use_ivar = True

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
html_title = "kancompile"
html_copy_source = False
html_show_sphinx = False
