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


def test_it_is_built(tmp_path):
    """All but the writing of HTML; notebooks are run by a test of their own."""
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("api"))
    words = ["-q", "-b", "dummy", "-W", "-D", "nb_execution_mode=off", "docs", "site"]
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    modules = {path.name for path in (tmp_path / "docs" / "api").glob("*.rst")}
    assert "fastdrive_jax.pruning.recon_pruner.rst" in modules
