"""Functions of a person's own, named as FILE.py:FUNCTION where names of ours are taken too."""

import importlib.util
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
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
    module = _run(Path(file))
    if not hasattr(module, function):
        raise UserError(f"{file} has no function {function!r} that makes a {what}.")
    return getattr(module, function)


def _run(path: Path) -> ModuleType:
    """The file as a module, run anew, under a name that no other module has.

    Dataclasses look up their module by its name where annotations are kept as text.
    """
    name = f"own_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
