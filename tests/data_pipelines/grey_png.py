"""Grey PNGs of few bits, which neither Pillow nor OpenCV writes."""

import struct
import zlib
from pathlib import Path

import numpy as np


def write_grey_png(path: Path, ids: np.ndarray, depth: int) -> None:
    """Writes `ids` [H, W] with `depth` bits per pixel, the numbers as they are."""
    height, width = ids.shape
    bits = (ids[..., None] >> np.arange(depth)[::-1] & 1).astype(np.uint8)
    rows = np.packbits(bits.reshape(height, -1), axis=1)
    unfiltered = np.pad(rows, ((0, 0), (1, 0)))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(unfiltered.tobytes())),
        (b"IEND", b""),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )
