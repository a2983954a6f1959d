"""Folders that are whole or absent: written beside their place, then renamed into it."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors

from fastdrive_jax.errors import UserError
from fastdrive_jax.export import manifest as manifests


def write_folder(out_dir: str | Path, size: int, fill: Callable[[Path], None]) -> Path:
    """Make a bundle's folder, atomically as a whole.

    Args:
      out_dir: the folder to make. An empty folder or an earlier bundle there is replaced.
      size: bytes that it will hold, nearly.
      fill: writes everything into the folder that it is given, and seals it (`manifest.seal`).

    Returns:
      The folder.

    Raises:
      UserError: the place is taken by something else, or cannot be written (full disk).
    """
    out = Path(out_dir).resolve()
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or manifests.is_bundle(out))):
        raise UserError(f"{out} exists and is no bundle; choose another folder or remove it")
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _need_space(out.parent, size + 2**20)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.part-", dir=out.parent))
        try:
            fill(temporary)
            _flush_all(temporary)
            _swap(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return out


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write bundle {out}: {error.strerror or error}; "
            "free some space or choose another folder"
        ) from error
    except (ValueError, safetensors.SafetensorError) as error:
        # how Orbax and safetensors say that the disk is full
        if "RESOURCE_EXHAUSTED" not in str(error) and "I/O error" not in str(error):
            raise
        raise UserError(
            f"cannot write bundle {out}: {str(error).splitlines()[0]}; "
            "free some space or choose another folder"
        ) from error


def _need_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"cannot write a bundle below {folder}: it needs {size / 2**20:.0f} MiB and "
            f"{free / 2**20:.0f} MiB are free; free some space or choose another folder"
        )


def _flush_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
        _flush(path)
    folder.chmod(0o755)
    _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(temporary: Path, out: Path) -> None:
    """Put the finished folder in place; an earlier bundle is moved aside first, then removed."""
    if not out.exists() or not any(out.iterdir()):
        temporary.rename(out)  # onto nothing or an empty folder: one atomic step
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent)) / out.name
        out.rename(aside)
        try:
            temporary.rename(out)
        except OSError:
            aside.rename(out)
            raise
        finally:
            shutil.rmtree(aside.parent, ignore_errors=True)
    _flush(out.parent)
