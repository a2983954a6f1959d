"""Pictures beside numbers that TensorFlow 2.21 gave for the same pattern."""

import sys

import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.openvla.images import (
    centre_crop,
    jpeg_round_trip,
    lanczos_matrix,
    policy_picture,
    resize_lanczos,
)

JPEG = [
    *(7, 94, 200, 146, 78, 181, 145, 21, 93, 179, 97, 171, 80, 70, 45, 134, 181, 149),
    *(143, 58, 141, 173, 188, 159, 112, 127, 84, 123, 35, 75, 111, 150, 157, 116, 82, 107),
]
SMALLER = [
    *(14, 113, 231, 189, 61, 172, 188, 174, 108, 130, 120, 50, 185, 77, 195, 179),
    *(121, 92, 79, 177, 69, 129, 135, 162, 201, 44, 161, 86, 201, 43, 145, 92),
    *(179, 130, 144, 134, 178, 46, 144, 85, 159, 159, 174, 103, 129, 94, 129, 176),
]
LARGER = [0, 98, 192, 73, 166, 19, 142, 255, 95, 252, 71, 164, 46, 139, 255, 115, 250, 69]
CROP = [
    *(54, 155, 150, 14, 115, 216, 230, 75, 176, 116, 116, 182, 198, 43, 144, 125, 140, 71),
    *(163, 78, 179, 126, 153, 72, 104, 120, 142, 195, 40, 141, 54, 155, 145, 169, 152, 115),
]


def pattern(height: int = 40, width: int = 56) -> np.ndarray:
    row, column, colour = np.mgrid[:height, :width, :3]
    return ((row * 37 + column * 11 + row * column + colour * 101) % 256).astype(np.uint8)


def total(image) -> int:
    return int(image.astype(np.int64).sum())


def test_jpeg_is_tensorflows():
    pytest.importorskip("simplejpeg", reason="simplejpeg is not installed (extra: openvla)")
    image = jpeg_round_trip(pattern())
    assert image[::13, ::19].reshape(-1).tolist() == JPEG
    assert total(image) == 851_310


def test_lanczos_is_tensorflows():
    """A value half way between two bytes may go either way: one in a thousand is off by 1."""
    image = resize_lanczos(pattern(), (28, 28))
    np.testing.assert_allclose(image[::9, ::9].reshape(-1).astype(int), SMALLER, atol=1)
    assert total(image) == pytest.approx(299_944, abs=3)
    image = resize_lanczos(pattern(), (64, 72))
    np.testing.assert_allclose(image[::9, ::9].reshape(-1).astype(int)[:18], LARGER, atol=1)
    assert total(image) == pytest.approx(1_763_026, abs=14)


def test_the_crop_is_tensorflows():
    image = centre_crop(pattern())
    np.testing.assert_allclose(image[::13, ::19].reshape(-1).astype(int), CROP, atol=1)
    assert total(image) == pytest.approx(855_477, abs=7)


def test_weights_sum_to_one():
    for new, old in ((224, 256), (256, 224), (5, 5), (3, 100)):
        np.testing.assert_allclose(lanczos_matrix(new, old).sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(lanczos_matrix(6, 6), np.eye(6), atol=1e-6)


def test_steps_come_in_the_published_order():
    pytest.importorskip("simplejpeg", reason="simplejpeg is not installed (extra: openvla)")
    image = pattern(32, 32)
    steps = jpeg_round_trip(np.ascontiguousarray(image[::-1, ::-1]))
    steps = resize_lanczos(steps, (24, 24))
    np.testing.assert_array_equal(policy_picture(image, 24, crop=False), steps)
    np.testing.assert_array_equal(policy_picture(image, 24), centre_crop(steps))


def test_without_steps_a_picture_of_the_size_stays():
    image = pattern(24, 24)
    same = policy_picture(image, 24, turn=False, jpeg=False, crop=False)
    np.testing.assert_array_equal(same, image)


def test_what_is_no_picture():
    for wrong in (pattern().astype(np.float32), pattern()[..., 0], pattern()[:0]):
        with pytest.raises(ValueError, match="is not uint8"):
            policy_picture(wrong)


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[openvla\]'"):
        jpeg_round_trip(pattern())
