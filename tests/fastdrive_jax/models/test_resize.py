import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdrive_jax.models.resize import resize_bicubic

SHARED = Path(os.environ.get("FASTDRIVE_SHARED") or Path(__file__).parents[4] / "shared")


def pillow(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Across, then down: one call does so too, but from Pillow 13 on not for every size."""
    across = Image.fromarray(image).resize((size[1], image.shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(across.resize(size[::-1], Image.Resampling.BICUBIC))


def pictures(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Noise, and black and white alone, where the kernel overshoots and sums are clipped."""
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 256, shape, np.uint8),
        rng.choice(np.array([0, 255], np.uint8), shape),
    ]


@pytest.mark.parametrize("largest", [3, 40, 400])
@pytest.mark.parametrize("colours", [(), (3,)])
def test_equals_pillow_at_random_sizes(largest, colours):
    rng = np.random.default_rng(largest)
    for height, width, *size in rng.integers(1, largest + 1, (100, 4)).tolist():
        for image in pictures((height, width, *colours)):
            got = resize_bicubic(image, tuple(size))
            assert got.dtype == np.uint8
            np.testing.assert_array_equal(got, pillow(image, tuple(size)), err_msg=str(image.shape))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((1, 1), (28, 28)),
        ((1, 300), (28, 28)),
        ((300, 1), (28, 28)),
        ((300, 200), (1, 1)),
        ((300, 200), (1, 1500)),
        ((129, 7), (129, 700)),
        ((300, 200), (300, 56)),
        ((300, 200), (56, 200)),
        ((3000, 5), (2, 5)),
        ((5, 3000), (5, 2)),
    ],
)
def test_edges(source, target):
    for colours in ((), (3,)):
        for image in pictures((*source, *colours)):
            np.testing.assert_array_equal(resize_bicubic(image, target), pillow(image, target))


@pytest.mark.parametrize("size", [(1596, 1596), (896, 1596), (392, 672), (224, 392), (28, 28)])
def test_equals_one_call_of_pillow_for_a_camera_picture(size):
    for image in pictures((900, 1600, 3)):
        one_call = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(resize_bicubic(image, size), np.asarray(one_call))


def test_equals_pillow_on_real_pictures():
    paths = sorted((SHARED / "data").glob("nuscenes_samples/original/*/*.jpg"))
    if not paths:
        pytest.skip(f"no real pictures under {SHARED} (set FASTDRIVE_SHARED)")
    for path in paths:
        image = np.asarray(Image.open(path))
        for size in ((1596, 1596), (392, 672)):
            np.testing.assert_array_equal(resize_bicubic(image, size), pillow(image, size))


def test_layout_of_the_input_does_not_matter():
    image = pictures((60, 90, 3))[0]
    for view in (image[::-1, ::-1], image[..., ::-1], image[5:50, 7:80], image.transpose(1, 0, 2)):
        for size in ((28, 28), (28, view.shape[1]), (view.shape[0], 28)):
            want = pillow(np.ascontiguousarray(view), size)
            np.testing.assert_array_equal(resize_bicubic(view, size), want)
    image.flags.writeable = False
    np.testing.assert_array_equal(resize_bicubic(image, (28, 90)), pillow(image, (28, 90)))


def test_same_size_is_the_same_picture():
    image = pictures((30, 40, 3))[0]
    np.testing.assert_array_equal(resize_bicubic(image, (30, 40)), image)


def test_threads_share_nothing():
    images = pictures((300, 200, 3)) * 8
    alone = [resize_bicubic(image, (224, 392)) for image in images]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda image: resize_bicubic(image, (224, 392)), images))
    np.testing.assert_array_equal(together, alone)


def test_other_threads_run_during_the_sums():
    from fastdrive_jax.models import resize

    rows = np.zeros((4000, 6000), np.uint8)
    out = np.empty((2000, 6000), np.uint8)
    tables = resize._coefficients(len(rows), len(out))
    done, count = threading.Event(), [0]

    def work():
        while not done.is_set():
            count[0] += 1
            time.sleep(1e-4)

    other = threading.Thread(target=work)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(30)  # who holds the GIL keeps it until it lets go itself
    try:
        other.start()
        resize._weighted_sums(rows[:4, :4].copy(), *resize._coefficients(4, 2), out[:2, :4].copy())
        before = count[0]
        resize._weighted_sums(rows, *tables, out)
        after = count[0]
    finally:
        done.set()
        sys.setswitchinterval(interval)
        other.join()
    assert after > before


@pytest.mark.parametrize(
    ("image", "size"),
    [
        (np.zeros((4, 4, 3), np.float32), (2, 2)),
        (np.zeros((4, 4, 4), np.uint8), (2, 2)),
        (np.zeros((4,), np.uint8), (2, 2)),
        (np.zeros((0, 4, 3), np.uint8), (2, 2)),
        (np.zeros((4, 4, 3), np.uint8), (0, 2)),
    ],
)
def test_what_is_no_picture_or_size_is_refused(image, size):
    with pytest.raises(ValueError, match="picture"):
        resize_bicubic(image, size)
