"""Functions of a person's own, by FILE.py:FUNCTION."""

import sys

import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.own_files import own_function


def test_the_function_is_taken_from_its_file(tmp_path):
    (tmp_path / "mine.py").write_text("def make(x):\n    return 2 * x\n")
    assert own_function(f"{tmp_path}/mine.py:make", "pruner")(4) == 8
    with pytest.raises(UserError, match=r"mine\.py has no function 'other' that makes a pruner"):
        own_function(f"{tmp_path}/mine.py:other", "pruner")
    with pytest.raises(UserError, match=r"no file .*yours"):
        own_function(f"{tmp_path}/yours.py:make", "pruner")


LATE = """
from __future__ import annotations
import dataclasses
import flax.struct
import jax

class State(flax.struct.PyTreeNode):
    mean: jax.Array

@dataclasses.dataclass
class Settings:
    decay: float = 0.5

def make():
    return State(Settings().decay)
"""


def test_a_file_whose_annotations_are_text(tmp_path):
    known = sys.modules["json"]
    for name in ("late", "json"):  # the second as a module is called that there is
        (tmp_path / f"{name}.py").write_text(LATE)
        assert own_function(f"{tmp_path}/{name}.py:make", "pruner")().mean == 0.5
    assert sys.modules["json"] is known


def test_files_of_one_name_are_apart_and_a_broken_one_leaves_nothing(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"def make():\n    return {folder!r}\n")
    first, second = (own_function(f"{tmp_path}/{folder}/mine.py:make", "pruner") for folder in "ab")
    assert (first(), second()) == ("a", "b")
    assert first.__module__ != second.__module__
    before = set(sys.modules)
    (tmp_path / "broken.py").write_text("def make():\n    return 1\n1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        own_function(f"{tmp_path}/broken.py:make", "pruner")
    assert set(sys.modules) == before
