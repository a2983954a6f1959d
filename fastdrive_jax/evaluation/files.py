"""Files that are either whole or absent: written beside their place, then renamed into it."""

import os
import tempfile
from pathlib import Path

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
