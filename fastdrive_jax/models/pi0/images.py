"""A camera picture as pi0 was trained on it: openpi's resizing, on the host."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def resize_with_pad(
    image: UInt8[np.ndarray, "H W 3"], size: int = 224
) -> UInt8[np.ndarray, "S S 3"]:
    """The whole picture within a square, antialiased, with black at its shorter sides.

    Args:
        image: Of the camera, upright.
        size: Pixels along the result.

    Raises:
        ValueError: It is no picture of three bytes a pixel.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"picture {image.dtype} {image.shape} is not uint8 [H, W, 3]")
    sides = image.shape[:2]
    if sides == (size, size):
        return image
    # Divided in this order, as openpi does: rounding may lose a row that `size / longest` keeps.
    ratio = max(side / size for side in sides)
    height, width = (int(side / ratio) for side in sides)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    top, left = (size - height) // 2, (size - width) // 2
    square = np.zeros((size, size, 3), np.uint8)
    square[top : top + height, left : left + width] = np.asarray(resized)
    return square
