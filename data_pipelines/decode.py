"""Encoded record to arrays of one size.

OpenCV decodes straight into an array and to Pillow's pixels: none differs in 528 real camera JPEGs
(480 x 360 and 1600 x 900), nor in baseline, progressive, grey, 4:4:4, 4:2:2 and 4:2:0 ones or in
8-bit PNGs. CMYK JPEGs differ by one level; 16-bit PNGs are scaled here and clipped there.
"""

from typing import Literal

import cv2
import numpy as np

from data_pipelines.schema import TOKEN_PIXELS, UNKNOWN_LABEL, Classes
from fastdrive_jax.errors import UserError
from fastdrive_jax.models.resize import resize_bicubic

# An EXIF rotation would turn the picture but not its mask, or the other way, so it is ignored.
_COLOR = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_GREY = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION


def check_size(size: tuple[int, int]) -> tuple[int, int]:
    """Returns `size` (H, W) if it is made of whole tokens.

    Raises:
        UserError: It is not; the sentence names the nearest sizes that are.
    """
    if len(size) != 2 or any(not isinstance(v, int) or v < 1 for v in size):
        raise UserError(f"Image size {size} must be two positive whole numbers, height and width.")
    if any(value % TOKEN_PIXELS for value in size):
        down = tuple(max(1, value // TOKEN_PIXELS) * TOKEN_PIXELS for value in size)
        up = tuple(-(-value // TOKEN_PIXELS) * TOKEN_PIXELS for value in size)
        near = f"{up[0]} x {up[1]}"
        if down != up:
            near = f"{down[0]} x {down[1]} or {near}"
        raise UserError(
            f"Image size {size[0]} x {size[1]} is not divisible into {TOKEN_PIXELS} x "
            f"{TOKEN_PIXELS} tokens; the nearest that are: {near}."
        )
    return tuple(size)


def nearest_size(size: tuple[int, int]) -> tuple[int, int]:
    """The whole-token size (H, W) nearest to `size`, at least one token each way."""
    return tuple(max(1, round(value / TOKEN_PIXELS)) * TOKEN_PIXELS for value in size)


def decode_image(
    data: bytes, size: tuple[int, int], resize: Literal["bicubic", "area"] = "bicubic"
) -> np.ndarray:
    """The picture as RGB uint8 [H, W, 3] at `size` (H, W).

    Args:
        data: JPEG or PNG bytes.
        size: Height and width in pixels.
        resize: "bicubic" gives what the published Qwen2.5-VL processor gives; "area" averages when
            it shrinks and is linear otherwise, for models that were trained that way.

    Raises:
        UserError: The bytes are no picture.
    """
    image = _decode(data, _COLOR)
    if resize == "bicubic":
        return resize_bicubic(image, size)
    if resize != "area":
        raise ValueError(f"resize={resize!r} must be 'bicubic' or 'area'")
    if image.shape[:2] == size:
        return image
    shrinks = image.shape[0] >= size[0] and image.shape[1] >= size[1]
    mode = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, size[::-1], interpolation=mode)


def decode_mask(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Foreground uint8 {0, 1} [H, W] at `size`, by nearest neighbour."""
    return (_resize_nearest(_decode(data, _GREY), size) > 0).astype(np.uint8)


def decode_labels(data: bytes, size: tuple[int, int], classes: Classes) -> np.ndarray:
    """Class ids uint8 [H, W] at `size`, 255 where ignored; all 255 where there are none."""
    if not data:
        return np.full(size, UNKNOWN_LABEL, np.uint8)
    labels = _resize_nearest(_decode(data, _GREY), size)
    table = np.arange(256, dtype=np.uint8)
    table[list(classes.ignore)] = UNKNOWN_LABEL
    return table[labels]


def _decode(data: bytes, flags: int) -> np.ndarray:
    array = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if array is None:
        raise UserError("A picture in the shards cannot be decoded; build the shards again.")
    return array


def _resize_nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if array.shape == size:
        return array
    # NEAREST_EXACT samples pixel centres; plain NEAREST is shifted by half a pixel.
    return cv2.resize(array, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
