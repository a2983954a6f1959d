"""A short name of what a folder of pictures holds, for what is made of it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path


def folder_digest(folder: Path, *classes: Sequence[int] | None) -> str:
    """Changes with every file that comes, goes or is edited, and with the class ids.

    Args:
        folder: Of pictures and label maps.
        classes: What the ids mean: foreground, objects and ignored ones.
    """
    digest = hashlib.sha256(repr(classes).encode())
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            info = path.stat()
            name = path.relative_to(folder)
            digest.update(f"{name} {info.st_size} {info.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]
