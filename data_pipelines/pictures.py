"""Encoded pictures: checks on bytes as they come in, and one normal form for masks and labels."""

import io
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from data_pipelines.schema import TOKEN_PIXELS, Classes
from fastdrive_jax.errors import UserError

# What Pillow raises of a file that is none, is damaged, or has more pixels than it takes for safe.
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_PNG = b"\x89PNG\r\n\x1a\n"


def reason(error: Exception) -> str:
    """What is wrong with a picture, for a sentence that names it."""
    return "it is none" if isinstance(error, UnidentifiedImageError) else str(error)


def read_bytes(path: Path) -> bytes:
    """The file's bytes.

    Raises:
        UserError: The file is missing or cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; restore it or leave out what refers to it.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error


def size_of_files(paths: Iterable[Path]) -> tuple[int, list[Path]]:
    """Bytes of the files that are there, and the files that are missing.

    Of one that cannot be reached for another reason `read_bytes` says which, when it is needed.
    """
    size, missing = 0, []
    for path in paths:
        try:
            size += path.stat().st_size
        except FileNotFoundError:
            missing.append(path)
        except OSError:
            continue
    return size, missing


def check_bad(bad: Sequence[str], skip_bad: int) -> None:
    """Stops where more samples are bad than may be left out.

    Args:
        bad: A sentence for each bad sample.
        skip_bad: How many may be left out.

    Raises:
        UserError: There are more.
    """
    if len(bad) <= max(skip_bad, 0):
        return
    if not skip_bad:
        raise UserError(
            f"{bad[0]} (`fastdrive data build --skip-bad N` leaves out N such samples.)"
        )
    raise UserError(
        f"{len(bad)} samples are bad, more than skip_bad={skip_bad}; the last: {bad[-1]}"
    )


def check_picture(data: bytes, path: Path) -> tuple[int, int]:
    """Height and width of an encoded picture that decodes to its last byte.

    Pillow is slower than OpenCV but refuses truncated files, which OpenCV fills with grey.

    Raises:
        UserError: The picture is not JPEG or PNG, is damaged, or is smaller than one token.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as picture:
            width, height = picture.size
            # An eighth of the size still reads the whole entropy-coded stream of a JPEG.
            picture.draft("L", (max(1, width // 8), max(1, height // 8)))
            picture.load()
    except BROKEN as error:
        raise UserError(
            f"{path} cannot be decoded as JPEG or PNG ({reason(error)}); replace it or take it out."
        ) from error
    if min(height, width) < TOKEN_PIXELS:
        raise UserError(
            f"{path} is {height} x {width} pixels, smaller than one {TOKEN_PIXELS} x "
            f"{TOKEN_PIXELS} token; use a larger picture."
        )
    return height, width


def decode_map(data: bytes, path: Path, size: tuple[int, int]) -> np.ndarray:
    """A label map or mask as uint8 [H, W], as stored; of a palette PNG, the palette indices.

    Raises:
        UserError: Not a one-channel picture of at most 8 bits, or not of `size` (H, W).
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            mode = picture.mode
            array = stored_values(np.asarray(picture), data)
    except BROKEN as error:
        raise UserError(
            f"{path} cannot be decoded as PNG ({reason(error)}); write it again."
        ) from error
    if mode not in ("1", "L", "P"):
        raise UserError(
            f"{path} has pixel format {mode}; masks and label maps must be one-channel PNGs of at "
            "most 8 bits."
        )
    if array.shape != tuple(size):
        raise UserError(
            f"{path} is {array.shape[0]} x {array.shape[1]} pixels but its picture is "
            f"{size[0]} x {size[1]}; make them the same size."
        )
    return array.astype(np.uint8)


def stored_values(array: np.ndarray, data: bytes) -> np.ndarray:
    """The ids in a PNG, of what Pillow made of it.

    Pillow stretches grey of 2 and 4 bits to 0..255, which is right for a picture, but an id is the
    number that is stored. It leaves grey of 1 bit and palette indices as they are.
    """
    depth, color = _png_format(data)
    return array // (255 // (2**depth - 1)) if color == 0 and depth in (2, 4) else array


def mask_png(data: bytes, path: Path, size: tuple[int, int]) -> bytes:
    """The mask as a 1-bit PNG (anything but 0 is foreground); unchanged if it is one already."""
    mask = decode_map(data, path, size)
    return data if _png_format(data) == (1, 0) else encode_mask(mask)


def labels_png(data: bytes, path: Path, size: tuple[int, int], classes: Classes):
    """Class ids as an 8-bit grey PNG (unchanged if it is one already) and as uint8 [H, W].

    Raises:
        UserError: As `decode_map`, or a pixel has an id that `classes` does not name.
    """
    labels = decode_map(data, path, size)
    allowed = set(classes.ignore)
    if classes.names:
        ids = np.flatnonzero(np.bincount(labels.ravel(), minlength=256))
        stray = [int(i) for i in ids if i >= len(classes.names) and i not in allowed and i != 255]
        if stray:
            raise UserError(
                f"{path} holds class ids {stray} but only {len(classes.names)} classes are named; "
                "correct the label map or the class list."
            )
    return (data if _png_format(data) == (8, 0) else encode_labels(labels)), labels


def encode_mask(mask: np.ndarray) -> bytes:
    """1-bit PNG of an array [H, W]: anything but 0 is foreground."""
    flags = [cv2.IMWRITE_PNG_BILEVEL, 1]
    return cv2.imencode(".png", np.where(mask > 0, 255, 0).astype(np.uint8), flags)[1].tobytes()


def encode_labels(labels: np.ndarray) -> bytes:
    """8-bit grey PNG of class ids uint8 [H, W]."""
    return cv2.imencode(".png", labels)[1].tobytes()


def _png_format(data: bytes) -> tuple[int, int] | None:
    """Bit depth and colour type (0 = grey) from a PNG header."""
    if not data.startswith(_PNG):
        return None
    return struct.unpack(">BB", data[24:26])
