"""Settings of the documentation; `make site` copies these sources and builds them."""

import os
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(os.environ["SITE_OF"]) / "pyproject.toml").read_text())["project"]

project = PROJECT["name"]
version = release = PROJECT["version"]
author = "the authors of jaxlib-unlearn"
project_copyright = f"{author}; Apache-2.0"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "myst_nb",
]
templates_path = ["_templates"]
exclude_patterns = ["_templates", "colab/runs"]

# Pages in Markdown.
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# Notebooks are stored without outputs: they run while the site is built, or show their code alone.
nb_execution_mode = "force" if os.environ.get("EXECUTE") else "off"
nb_execution_timeout = 3600
nb_execution_raise_on_error = True
nb_merge_streams = True

# Docstrings: `x` is code, an __all__ is the list of what a module shows.
default_role = "code"
napoleon_use_rtype = False
napoleon_preprocess_types = False
autosummary_ignore_module_all = False
autosummary_imported_members = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
add_module_names = False

html_theme = "sphinx_book_theme"
html_title = PROJECT["name"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_use_index = False
html_domain_indices = False
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
    "footer_content_items": ["copyright"],
}
