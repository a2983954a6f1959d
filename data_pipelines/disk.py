"""System errors while writing, turned into sentences."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastdrive_jax.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Raises `UserError` in place of a failed write to `target`; other errors pass unchanged."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # array_record reports a failed write as a RuntimeError with the system's text in it.
        text = str(error)
        code = getattr(error, "errno", None)
        if code in _FULL or any(os.strerror(number) in text for number in _FULL):
            raise UserError(
                f"The disk is full while writing {target} ({text}); free some space and run again."
            ) from error
        if isinstance(error, OSError):
            raise UserError(f"Cannot write {target} ({text}); check the folder.") from error
        raise


def check_space(size: int, folder: Path) -> None:
    """Raises `OSError` (disk full) if `folder`'s disk has fewer than `size` bytes left."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(errno.ENOSPC, f"{size / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")
