"""Pictures of a request: their type by content and their size by header, then pixels."""

import io
import struct

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from fastdrive_jax.serving.refusals import Refusal

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_SCAN, _MOST_SCANS = b"\xff\xda", 50  # encoders write about 10 in a progressive JPEG


def read_picture(
    data: bytes, name: str, size: tuple[int, int], megapixels: float
) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels of an encoded picture, resized to what the model sees.

    Args:
        data: JPEG or PNG bytes.
        name: Of the camera, for errors.
        size: H, W.
        megapixels: More are not decoded.

    Raises:
        Refusal: It is another kind of file, too large or damaged.
    """
    if not data.startswith((_JPEG, _PNG)):
        raise Refusal(
            415, "picture_type", f"The file for {name} is neither JPEG nor PNG; send a picture."
        )
    # A scan takes 30 bytes and goes over all pixels: a small file of them would take hours.
    if data.startswith(_JPEG) and (scans := data.count(_SCAN)) > _MOST_SCANS:
        raise Refusal(
            413,
            "picture_scans",
            f"The picture for {name} has {scans} scans; at most {_MOST_SCANS} are taken.",
        )
    try:
        # Only the header is read here: what a small file may unpack to is told before it does.
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as picture:
            width, height = picture.size
            if width * height > megapixels * 1e6:
                raise Refusal(
                    413,
                    "picture_size",
                    f"The picture for {name} has {width} x {height} pixels; at most "
                    f"{megapixels:g} megapixels are taken.",
                )
            # Refuses truncated files, which OpenCV fills with grey; an eighth of a JPEG's size
            # still reads all of it.
            picture.draft("L", (max(1, width // 8), max(1, height // 8)))
            picture.load()
    except Image.DecompressionBombError as error:  # before its size could be asked for
        raise Refusal(
            413,
            "picture_size",
            f"The picture for {name} is too large by far; at most {megapixels:g} megapixels "
            "are taken.",
        ) from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        # Of a file whose header it cannot read, Pillow names an object of ours.
        why = "its header is damaged" if isinstance(error, UnidentifiedImageError) else error
        raise Refusal(
            422, "picture_damaged", f"The picture for {name} cannot be decoded ({why})."
        ) from error
    pixels = cv2.imdecode(
        np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    )
    if pixels is None:
        raise Refusal(422, "picture_damaged", f"The picture for {name} cannot be decoded.")
    if pixels.shape[:2] == size:
        return pixels
    # As the pictures that the packaged model learned from: averaged where they shrink.
    shrinks = pixels.shape[0] >= size[0] and pixels.shape[1] >= size[1]
    mode = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(pixels, size[::-1], interpolation=mode)
