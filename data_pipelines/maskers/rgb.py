"""Pictures as torch models want them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from data_pipelines.maskers.interface import Frame
from data_pipelines.pictures import BROKEN, read_bytes, reason
from fastdrive_jax.errors import UserError

_In = TypeVar("_In")
_Out = TypeVar("_Out")
_THREADS = 8  # decoding and resizing release the interpreter lock


def read_rgb(path: Path) -> np.ndarray:
    """RGB uint8 [H, W, 3] of a JPEG or PNG, as it is stored: an EXIF rotation is ignored.

    Raises:
        UserError: The file is missing, of another format, or damaged, if only at its end.
    """
    data = read_bytes(path)
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as picture:
            if picture.mode.startswith("I;16"):  # Pillow would cut it off at 255
                grey = (np.asarray(picture) >> 8).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=-1)
            return np.array(picture.convert("RGB"))
    except BROKEN as error:
        raise UserError(
            f"{path} cannot be decoded as JPEG or PNG ({reason(error)}); replace it or take it out."
        ) from error


def read_frames(frames: Sequence[Frame]) -> list[np.ndarray]:
    """`read_rgb` of each frame's picture, several at a time."""
    return in_threads(lambda frame: read_rgb(frame.picture), frames)


def in_threads(work: Callable[[_In], _Out], items: Sequence[_In]) -> list[_Out]:
    """`work` of each item, in order."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(_THREADS, len(items))) as pool:
        return list(pool.map(work, items))
