"""Checksums of a folder's files.

Orbax's own format doesn't notice a flipped bit in an array, and reports a missing file with pages
of tracebacks from background threads. So files are checked before it reads them.
"""

import zlib
from pathlib import Path

from fastdrive_jax.errors import UserError
from fastdrive_jax.files import read_json, write_json

CHECKSUM_FILE = "checksums.json"
_BLOCK = 1 << 20
_ADVICE = "Remove its folder to go on from the one before."


def write_checksums(folder: Path) -> None:
    """Record size and CRC-32 of the files in all subfolders of `folder`.

    Files directly in `folder` are left out: Orbax still touches those while it commits.
    """
    files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): _checksum(path) for path in files}
    write_json(folder / CHECKSUM_FILE, sums)


def verify_checksums(folder: Path, index: int = 0, count: int = 1) -> None:
    """Check the files against what was recorded.

    Args:
        folder: of a checkpoint.
        index: which share of the files, from 0, so that hosts can check them together.
        count: how many shares.

    Raises:
        UserError: a file is missing or differs, or nothing was recorded.
    """
    if not (folder / CHECKSUM_FILE).exists():
        raise UserError(f"{folder} is not a whole checkpoint: it has no {CHECKSUM_FILE}.")
    sums = read_json(folder / CHECKSUM_FILE)
    if not isinstance(sums, dict):
        raise UserError(f"The checkpoint {folder} is damaged: {CHECKSUM_FILE} holds no object.")
    for name, expected in sorted(sums.items())[index::count]:
        path = folder / name
        try:
            found = _checksum(path)
        except OSError as error:
            raise UserError(
                f"The checkpoint {folder} is damaged: {name} can't be read ({error.strerror}). "
                + _ADVICE
            ) from error
        if found != expected:
            raise UserError(f"The checkpoint {folder} is damaged: {name} has changed. {_ADVICE}")


def _checksum(path: Path) -> list[int]:
    """Size in bytes and CRC-32."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]
