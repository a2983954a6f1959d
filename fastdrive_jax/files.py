"""Files that are either whole or absent: written beside their place, then renamed into it."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from fastdrive_jax.errors import UserError


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write a file so that a reader sees the old content or the new, never a part.

    Args:
      path: where the file goes; missing parent folders are made.
      data: the whole content.

    Returns:
      The path.

    Raises:
      UserError: the folder cannot be written (full disk, no permission, a file in its place).
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes private files; results are there to be shared
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; free some space or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text; see `write_bytes`."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> Path:
    """Write a value as JSON that people read too; see `write_bytes`."""
    return write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
      UserError: it is absent, unreadable or no JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; restore it or leave out what refers to it.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); write it again.") from error
