"""A camera picture as OpenVLA was trained on it: the steps of its data pipeline, on the host.

LIBERO's cameras are upside down, so the picture is turned; the data sets were stored as JPEG; they
were resized by TensorFlow's antialiased Lanczos kernel; and training cropped nine tenths of the
area at random, of which evaluation takes the middle. TensorFlow is not needed here.
"""

import io
from functools import lru_cache

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from fastdrive_jax.errors import UserError

_QUALITY = 95  # of `tf.image.encode_jpeg`
_RADIUS = 3  # of the Lanczos kernel
CROP_AREA = 0.9


def policy_picture(
    image: UInt8[np.ndarray, "H W 3"],
    size: int = 224,
    *,
    turn: bool = True,
    jpeg: bool = True,
    crop: bool = True,
) -> UInt8[np.ndarray, "S S 3"]:
    """The picture that the model is shown.

    Args:
        image: Of the camera.
        size: Pixels along the result.
        turn: By 180 degrees, as LIBERO's need.
        jpeg: Write and read it as JPEG, as the training data was.
        crop: Take the middle, for a model that was trained on random crops.

    Raises:
        UserError: See `jpeg_round_trip`.
        ValueError: It is no picture of three bytes a pixel.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"picture {image.dtype} {image.shape} is not uint8 [H, W, 3]")
    if turn:
        image = image[::-1, ::-1]
    if jpeg:
        image = jpeg_round_trip(image)
    image = resize_lanczos(image, (size, size))
    return centre_crop(image) if crop else image


def jpeg_round_trip(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """What is left of a picture that was stored as JPEG and read by TensorFlow.

    TensorFlow decodes with the fast inverse cosine transform, which is off by up to 10 of 255 from
    the accurate one of Pillow and OpenCV, in seven of ten values.

    Raises:
        UserError: The package that has that transform is absent.
    """
    try:
        from simplejpeg import decode_jpeg
    except ImportError as error:
        raise UserError(
            "OpenVLA's pictures need simplejpeg; run `pip install -e '.[openvla]'` in the clone."
        ) from error
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=_QUALITY, subsampling="4:2:0")
    return decode_jpeg(file.getvalue(), colorspace="RGB", fastdct=True)


def resize_lanczos(
    image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "h w 3"]:
    """Rounded `tf.image.resize(image, size, method="lanczos3", antialias=True)`."""
    rows, columns = (lanczos_matrix(*sides) for sides in zip(size, image.shape[:2], strict=True))
    mixed = np.einsum("yh,hwc->ywc", rows, image.astype(np.float32), optimize=True)
    mixed = np.einsum("xw,ywc->yxc", columns, mixed, optimize=True)
    return np.clip(np.round(mixed), 0, 255).astype(np.uint8)


@lru_cache(maxsize=64)
def lanczos_matrix(new: int, old: int) -> Float[np.ndarray, "new old"]:
    """Weights of each source pixel in each target pixel; a row sums to 1.

    The kernel is as wide as three source pixels or, where the picture shrinks, three target pixels,
    and is cut off at the border. All of it is float32, whose rounding decides where TensorFlow's
    pixels lie half way between two bytes.
    """
    half, shrink = np.float32(0.5), 1 / (np.float32(new) / np.float32(old))
    centre = (np.arange(new, dtype=np.float32) + half) * shrink
    distance = np.abs(np.arange(old, dtype=np.float32) + half - centre[:, None])
    distance = distance * (1 / np.maximum(shrink, np.float32(1)))
    weights = np.sinc(distance) * np.sinc(distance / _RADIUS) * (distance <= _RADIUS)
    return weights / weights.sum(axis=1, keepdims=True)


def centre_crop(
    image: UInt8[np.ndarray, "H W 3"], area: float = CROP_AREA
) -> UInt8[np.ndarray, "H W 3"]:
    """The middle of a picture, enlarged to its size as `tf.image.crop_and_resize` does.

    Corners of the crop map to corner pixels' centres, so its edges are sampled exactly.
    """
    x = image.astype(np.float32) * np.float32(1 / 255)
    side = np.sqrt(np.float32(area))
    for axis in (1, 0):
        length = image.shape[axis]
        first = (1 - side) / 2
        step = side * (length - 1) / np.float32(max(length - 1, 1))
        place = first * np.float32(length - 1) + np.arange(length, dtype=np.float32) * step
        low = np.floor(place).astype(np.int64)
        share = (place - low).reshape(-1, *[1] * (2 - axis))
        below, above = (np.take(x, np.minimum(i, length - 1), axis) for i in (low, low + 1))
        x = below + (above - below) * share
    return (np.clip(x, 0, 1) * np.float32(255.5)).astype(np.uint8)
