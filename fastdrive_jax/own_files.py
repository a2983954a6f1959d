"""Functions of a person's own, named as FILE.py:FUNCTION where names of ours are taken too."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdrive_jax.errors import UserError


def own_function(name: str, what: str) -> Callable[..., Any]:
    """The function that a FILE.py:FUNCTION names.

    Args:
        name: Path of the file, a colon and the function.
        what: It makes, for errors.

    Raises:
        UserError: There is no such file, or it has no such function.
    """
    file, _, function = name.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"There is no file {file} to take the {what} {function!r} from.")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise UserError(f"{file} has no function {function!r} that makes a {what}.")
    return getattr(module, function)
