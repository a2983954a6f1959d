"""The site: `sphinx-build -W docs site` (extra `docs`). Notebooks are run while it is built."""

from importlib import metadata

project = "FastDrive-JAX"
author = "The FastDrive-JAX authors"
release = version = metadata.version("fastdrive-jax")
copyright = "2026, the FastDrive-JAX authors. Apache-2.0"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = "FastDrive-JAX"
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": False}
# Heavy or absent on the machine that builds the site; nothing of them is in a signature.
autodoc_mock_imports = ["torch", "transformers", "mujoco", "libero", "robosuite", "apache_beam"]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # else each attribute is described twice
# A package's page lists its modules; what it exports is described where it is written.
autodoc_default_options["ignore-module-all"] = True
# Links into the source are for readers of the repository; several fields are called `bytes`.
suppress_warnings = ["myst.xref_missing", "myst.header", "ref.python"]
