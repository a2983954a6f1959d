"""openpi's resizing beside the triangle filter, written out."""

import numpy as np
import pytest

from fastdrive_jax.models.pi0.images import resize_with_pad


def triangle(new, old):
    """Weights of an antialiased linear filter [new, old]."""
    ratio = old / new
    reach = max(ratio, 1)
    centres = (np.arange(new) + 0.5) * ratio
    weights = np.clip(1 - np.abs(np.arange(old) + 0.5 - centres[:, None]) / reach, 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


def expected(image, size):
    height, width = image.shape[:2]
    ratio = max(width / size, height / size)
    new = int(height / ratio), int(width / ratio)
    rows, columns = triangle(new[0], height), triangle(new[1], width)
    # Pillow rounds behind each of its two passes, halves up.
    mixed = np.floor(np.einsum("xw,hwc->hxc", columns, image.astype(np.float64)) + 0.5)
    mixed = np.floor(np.einsum("yh,hxc->yxc", rows, mixed) + 0.5)
    square = np.zeros((size, size, 3))
    top, left = int((size - new[0]) / 2), int((size - new[1]) / 2)
    square[top : top + new[0], left : left + new[1]] = mixed
    return square


@pytest.mark.parametrize("sides", [(64, 64), (48, 64), (64, 37), (20, 20), (31, 17)])
def test_pixels(sides):
    image = np.random.default_rng(0).integers(0, 256, (*sides, 3), np.uint8)
    found = resize_with_pad(image, 56)
    assert found.shape == (56, 56, 3)
    assert found.dtype == np.uint8
    # It computes with whole numbers, so sums that end in nearly a half may fall on the other side.
    off = np.abs(found - expected(image, 56))
    assert off.max() <= 1
    assert off.mean() < 0.05


def test_a_picture_of_the_size_is_left_alone():
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    np.testing.assert_array_equal(resize_with_pad(image, 24), image)


def test_odd_padding_is_more_below_and_right():
    white = np.full((32, 19, 3), 255, np.uint8)
    lit = np.flatnonzero(resize_with_pad(white, 32)[0, :, 0])
    np.testing.assert_array_equal(lit, np.arange(6, 25))


def test_other_arrays_are_refused():
    with pytest.raises(ValueError, match="not uint8"):
        resize_with_pad(np.zeros((8, 8, 3)))
