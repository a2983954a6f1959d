"""Functions of a person's own, by FILE.py:FUNCTION."""

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
