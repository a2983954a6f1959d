import json

import numpy as np
import pytest
from PIL import Image

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.config import TINY_VISION
from fastdrive_jax.models.qwen2_5_vl.image_processor import (
    ImageProcessorConfig,
    process_pictures,
    read_image_processor,
    resize_picture,
    smart_resize,
)
from fastdrive_jax.models.qwen2_5_vl.patches import IMAGE_MEAN, IMAGE_STD, normalise, patchify


@pytest.mark.parametrize(
    ("size", "bounds", "expected"),
    [
        ((900, 1600), {}, (896, 1596)),  # 32 x 57 tokens
        ((900, 1600), {"max_pixels": 262_144}, (364, 672)),  # 13 x 24
        ((1596, 1596), {}, (1596, 1596)),  # FastDriveVLA, 3249 tokens
        ((42, 70), {}, (56, 56)),  # 1.5 and 2.5 tokens: halves go to the even side
        ((10, 2000), {}, (28, 812)),
        ((1, 1), {}, (56, 56)),
        ((28, 5600), {"max_pixels": 28 * 28 * 4}, (28, 784)),
    ],
)
def test_sizes_by_hand(size, bounds, expected):
    assert smart_resize(*size, ImageProcessorConfig(**bounds)) == expected


def picture(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def test_a_picture_that_fits_is_not_touched():
    whole = picture(56, 84)
    np.testing.assert_array_equal(resize_picture(whole), whole)


def test_grey_and_transparent_pictures_become_rgb():
    for mode in ("L", "RGBA", "P"):
        out = resize_picture(Image.fromarray(picture(56, 56)).convert(mode))
        assert out.shape == (56, 56, 3)


def test_rows_on_the_host_are_the_encoders_rows():
    pictures = [picture(56, 84), picture(112, 56)]
    rows, grids = process_pictures(pictures)
    assert grids == [(4, 6), (8, 4)]
    for one, whole in zip(rows, pictures, strict=True):
        assert one.dtype == np.uint8
        np.testing.assert_array_equal(
            normalise(one, TINY_VISION), patchify(whole[None], TINY_VISION)[0]
        )


def test_rows_hold_colour_then_frame_then_pixel():
    whole = picture(28, 28)
    row = np.asarray(patchify(whole[None], TINY_VISION))[0, 1].reshape(3, 2, 14, 14)
    for colour in range(3):
        pixels = (whole[:14, 14:, colour] / 255 - IMAGE_MEAN[colour]) / IMAGE_STD[colour]
        np.testing.assert_allclose(row[colour, 0], pixels, atol=1e-5)
        np.testing.assert_array_equal(row[colour, 0], row[colour, 1])


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ([], "no picture"),
        ([np.zeros((56, 56, 3))], "float64"),
        ([np.zeros((56, 56), np.uint8)], r"\(56, 56\)"),
        ([np.zeros((0, 56, 3), np.uint8)], "no pixel"),
        ([np.zeros((10, 2001, 3), np.uint8)], "10 x 2001"),
    ],
)
def test_what_is_no_picture_is_refused(pictures, message):
    with pytest.raises(UserError, match=message):
        process_pictures(pictures)


def test_setting_of_a_checkpoint(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": 14}))
    assert read_image_processor(tmp_path) == ImageProcessorConfig()
    path.write_text(json.dumps({"size": {"shortest_edge": 4000, "longest_edge": 262_144}}))
    assert read_image_processor(tmp_path) == ImageProcessorConfig(4000, 262_144)
    path.write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(UserError, match="image_mean"):
        read_image_processor(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        read_image_processor(tmp_path)
    with pytest.raises(UserError, match="min_pixels=10"):
        ImageProcessorConfig(10, 9)
