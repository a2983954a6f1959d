import io
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data_pipelines.decode import decode_image, decode_labels, decode_mask
from data_pipelines.schema import Classes
from data_pipelines.token_mask import mask_fractions
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.foreground import token_fractions
from fastdrive_jax.models.qwen2_5_vl.image_processor import ImageProcessorConfig, resize_picture

SHARED = Path(os.environ.get("FASTDRIVE_SHARED") or Path(__file__).parents[3] / "shared")


def picture(height: int = 123, width: int = 211) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    blurred = cv2.GaussianBlur(noise, (0, 0), 2)
    return Image.fromarray(cv2.normalize(blurred, None, 0, 255, cv2.NORM_MINMAX))


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_decodes_to_pillows_pixels(subsampling, progressive):
    data = encoded(picture(), subsampling=subsampling, progressive=progressive, quality=90)
    np.testing.assert_array_equal(decode_image(data, (123, 211)), np.asarray(pillow(data)))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_png_decodes_to_pillows_pixels(mode):
    data = encoded(picture().convert(mode), "PNG")
    np.testing.assert_array_equal(decode_image(data, (123, 211)), np.asarray(pillow(data)))


def test_camera_pictures_decode_to_pillows_pixels():
    paths = [
        *sorted((SHARED / "data").glob("nuscenes_samples/*/*/*.jpg"))[::7],
        *sorted((SHARED / "data").glob("camvid/**/*.jpg"))[::40],
    ]
    if not paths:
        pytest.skip(f"no real pictures under {SHARED} (set FASTDRIVE_SHARED)")
    for path in paths:
        data = path.read_bytes()
        want = np.asarray(pillow(data))
        np.testing.assert_array_equal(decode_image(data, want.shape[:2]), want, err_msg=str(path))


@pytest.mark.parametrize("tokens", [40, 400, 3249])
def test_default_is_what_the_processor_gives(tokens):
    """The size follows the picture's shape, so the order of passes is that of any Pillow."""
    config = ImageProcessorConfig(max_pixels=tokens * 28 * 28)
    data = encoded(picture(900, 1600))
    want = resize_picture(pillow(data), config)
    np.testing.assert_array_equal(decode_image(data, want.shape[:2]), want)


def test_area_averages():
    image = picture(112, 168)
    data = encoded(image, "PNG")
    got = decode_image(data, (56, 56), "area")
    blocks = np.asarray(image).reshape(56, 2, 56, 3, 3).mean((1, 3))
    assert np.abs(got - blocks).max() <= 0.5
    assert (got != decode_image(data, (56, 56))).any()


def test_unknown_resize_and_bytes_are_refused():
    with pytest.raises(ValueError, match="cubic"):
        decode_image(encoded(picture()), (56, 56), "cubic")
    with pytest.raises(UserError, match="cannot be decoded"):
        decode_image(b"no picture", (56, 56))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_mask_fractions_equal_the_measure(batch):
    rng = np.random.default_rng(0)
    mask = (rng.random((*batch, 84, 140)) < rng.random((*batch, 84, 1))).astype(np.uint8)
    got = mask_fractions(mask)
    want = token_fractions(mask.reshape(-1, 84, 140), (1,)).astype(np.float32)
    assert got.dtype == np.float32
    assert got.shape == (*batch, 15)
    np.testing.assert_array_equal(got.reshape(-1, 15), want)


def test_every_count_of_pixels_gives_the_share_of_the_measure():
    tokens = (np.arange(784) < np.arange(785)[:, None]).astype(np.uint8).reshape(785, 28, 28)
    want = token_fractions(tokens, (1,)).astype(np.float32)
    np.testing.assert_array_equal(mask_fractions(tokens), want)


@pytest.mark.parametrize(
    "mask",
    [np.zeros((28, 30), np.uint8), np.full((28, 28), 255, np.uint8), np.zeros((28, 28), np.int32)],
)
def test_what_is_no_mask_is_refused(mask):
    with pytest.raises(ValueError, match="mask"):
        mask_fractions(mask)


def test_an_exif_rotation_turns_neither_mask_nor_labels():
    half = np.zeros((28, 56), np.uint8)
    half[:14] = 1
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    png = encoded(Image.fromarray(half), "PNG", exif=exif.tobytes())
    np.testing.assert_array_equal(decode_labels(png, (28, 56), Classes()), half)
    np.testing.assert_array_equal(decode_mask(png, (28, 56)), half)
