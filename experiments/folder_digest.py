"""A short name of what a folder holds, for what is made of it."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipelines.disk import files_below

_WHOLE = 1 << 26  # bytes of a file of a checkpoint that is read whole
_STRIDE, _PIECE = 1 << 20, 1 << 12  # of larger ones so many bytes are read in every so many
# What any of the published layouts keeps in its folder and loading reads; logs are not among them.
_CHECKPOINT = ("*.json", "*.safetensors", "*.pt", "assets/**/*", "params/**/*")


def folder_digest(folder: Path, *classes: Sequence[int] | None) -> str:
    """Changes with every file that comes, goes or is edited, and with the class ids.

    Args:
        folder: Of pictures and label maps.
        classes: What the ids mean: foreground, objects and ignored ones.
    """
    digest = hashlib.sha256(repr(classes).encode())
    for path in files_below(folder):
        if path.is_file():
            info = path.stat()
            name = path.relative_to(folder)
            digest.update(f"{name} {info.st_size} {info.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def checkpoint_folder_digest(folder: Path) -> str:
    """Changes with what a checkpoint's folder holds, wherever it is and whenever it was written.

    Config, statistics, tokenizer and all other files up to 64 MiB count whole. Of larger ones, the
    weights, their sizes, 4 KiB of each MiB, and the last ones count: training changes every matrix,
    but an edit of a few numbers by hand may go unseen.

    Args:
        folder: Of a published OpenVLA, OpenVLA-OFT or pi0.
    """
    digest = hashlib.sha256()
    found = {path for pattern in _CHECKPOINT for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(found):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        for piece in _pieces(path):
            digest.update(piece)
    return digest.hexdigest()[:12]


def _pieces(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    if size <= _WHOLE:
        yield path.read_bytes()
        return
    with path.open("rb") as file:
        for start in (*range(0, size, _STRIDE), size - _PIECE):
            file.seek(start)
            yield file.read(_PIECE)
