"""The site is built without a warning: every page, every docstring, every link between them."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
from pages import ROOT

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_nb", "furo")),
    reason="needs the extra docs",
)

# Sphinx seeks each name in each signature among all names of the project, a fifth of the time. What
# it doesn't find is no warning, nor is what it finds twice (docs/conf.py).
BUILD = """
import sys
from sphinx.cmd.build import main
from sphinx.domains.python import PythonDomain
PythonDomain.find_obj = lambda *given, **more: []
sys.exit(main(sys.argv[1:]))
"""


def test_it_is_built(tmp_path):
    """All but the writing of HTML; notebooks are run by a test of their own."""
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("api"))
    words = ["-q", "-b", "dummy", "-W", "-D", "nb_execution_mode=off", "docs", "site"]
    built = subprocess.run(
        [sys.executable, "-c", BUILD, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    modules = {path.name for path in (tmp_path / "docs" / "api").glob("*.rst")}
    assert "fastdrive_jax.pruning.recon_pruner.rst" in modules
