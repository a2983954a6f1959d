"""Which masker with which settings made a PNG: a text chunk that every PNG reader skips."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipelines.maskers.interface import Masker
from data_pipelines.pictures import BROKEN
from fastdrive_jax.errors import UserError

KEY = "fastdrive:masker"
_HEADER_END = 33  # signature 8 bytes, IHDR chunk 25 bytes


def describe(masker: Masker) -> str:
    """The masker's name and settings as one line of JSON, equal for equal settings."""
    content = {"name": masker.name, "settings": dict(masker.settings)}
    return json.dumps(content, sort_keys=True, allow_nan=False)


def stamp(png: bytes, text: str) -> bytes:
    """The PNG with `text` (ASCII) under `KEY`, right behind its header; pixels stay untouched."""
    body = b"tEXt" + KEY.encode("latin-1") + b"\0" + text.encode("ascii")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:_HEADER_END] + chunk + png[_HEADER_END:]


def stamp_of(path: Path) -> str | None:
    """The text that `stamp` wrote; None where there is no file, no PNG or no such text.

    Reads the chunks before the pixels only.
    """
    return _stamp(path)


def check_stamp(png: bytes, path: Path, masker: Mapping[str, Any]) -> None:
    """Refuses a PNG of another masker, or of other settings; one that says nothing passes.

    Args:
        png: Its bytes.
        path: Named in the error.
        masker: What `masker.json` holds; empty where there is none.

    Raises:
        UserError: It is of another.
    """
    found = _stamp(io.BytesIO(png)) if masker else None
    if found is not None and json.loads(found) != masker:
        raise UserError(
            f"{path} was made by another masker, or with other settings, than masker.json beside "
            "it says; run `fastdrive data mask` to its end, or take the file out."
        )


def _stamp(file: Path | io.BytesIO) -> str | None:
    try:
        with Image.open(file, formats=("PNG",)) as picture:
            return picture.info.get(KEY)
    except BROKEN:
        return None


def read_provenance(path: Path) -> dict[str, Any] | None:
    """`{"name": ..., "settings": {...}}` of a mask or label map; None where it tells nothing."""
    text = stamp_of(path)
    return None if text is None else json.loads(text)
