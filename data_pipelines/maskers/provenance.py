"""Which masker with which settings made a PNG: a text chunk that every PNG reader skips."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipelines.maskers.interface import Masker

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
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.info.get(KEY)
    except (OSError, SyntaxError, ValueError):
        return None


def read_provenance(path: Path) -> dict[str, Any] | None:
    """`{"name": ..., "settings": {...}}` of a mask or label map; None where it tells nothing."""
    text = stamp_of(path)
    return None if text is None else json.loads(text)
