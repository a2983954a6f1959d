"""Folders that a data set grows in, with system errors turned into sentences."""

import contextlib
import errno
import fcntl
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


def files_below(folder: Path) -> list[Path]:
    """Everything in a folder and those in it that is no folder, sorted.

    Links to folders are followed, but not to one that they lie in.
    """
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place)
        folders[:] = [f for f in folders if not here.resolve().is_relative_to((here / f).resolve())]
        found += [here / name for name in names]
    return sorted(found)


def own_place(folder: Path) -> Path:
    """Where a new folder really is, links followed, if another can be renamed to it.

    Raises:
        UserError: It is the working folder, or a disk is mounted on it.
    """
    place = Path(folder).resolve()
    if place == Path.cwd() or os.path.ismount(place):
        what = "the working folder" if place == Path.cwd() else "where a disk is mounted"
        raise UserError(f"{folder} is {what}; name a folder in it.")
    return place


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for this process; the system lets go of it when the process dies.

    Raises:
        UserError: Another process holds it.
    """
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder} is being written by another process; wait for it to end."
            ) from error
        yield
