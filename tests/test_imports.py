"""Imports point one way: down the three packages, and down the folders of the library."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("experiments", "data_pipelines", "fastdrive_jax")
FOLDERS = ("serving", "export", "evaluation", "inference", "training", "pruning", "models")
FOLDERS += ("parallel",)


def imported(path: Path) -> Iterator[str]:
    """Modules that a file names, within functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"{node.module}."
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def against(order: tuple[str, ...], root: Path, prefix: str) -> list[str]:
    """What a folder's files import of those above it."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for place, folder in enumerate(order)
        for path in sorted((root / folder).rglob("*.py"))
        for name in imported(path)
        if name.startswith(tuple(f"{prefix}{above}." for above in order[:place]))
    ]


@pytest.mark.parametrize(
    ("order", "root", "prefix"),
    [(PACKAGES, ROOT, ""), (FOLDERS, ROOT / "fastdrive_jax", "fastdrive_jax.")],
    ids=["packages", "folders"],
)
def test_nothing_imports_what_stands_above_it(order, root, prefix):
    assert all(any((root / folder).rglob("*.py")) for folder in order)
    assert not against(order, root, prefix)
