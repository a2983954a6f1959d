import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.config import TINY_DECODER, TINY_VISION, QwenVLConfig
from fastdrive_jax.models.qwen2_5_vl.sequence import Sample, collate, expand_images, mrope_ids

IMAGE = 9
CONFIG = QwenVLConfig(TINY_VISION, TINY_DECODER, image_token_id=IMAGE, pad_token_id=3)


def rows(grid, value):
    return np.full((grid[0] * grid[1], 588), value, np.uint8)


def test_one_mark_becomes_a_token_for_each_block_of_patches():
    ids = expand_images([5, IMAGE, 6, IMAGE], [(4, 6), (2, 2)], CONFIG)
    assert ids.tolist() == [5, *[IMAGE] * 6, 6, IMAGE]
    assert expand_images([5, 6], [], CONFIG).tolist() == [5, 6]


def test_positions_by_hand():
    grids = [(4, 6), (2, 2)]
    ids = expand_images([5, IMAGE, 6, IMAGE, 7], grids, CONFIG)
    where = mrope_ids(ids, grids, CONFIG)
    assert where[0].tolist() == [0, 1, 1, 1, 1, 1, 1, 4, 5, 6]
    assert where[1].tolist() == [0, 1, 1, 1, 2, 2, 2, 4, 5, 6]
    assert where[2].tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 5, 6]


def test_pictures_side_by_side_keep_apart():
    grids = [(2, 4), (4, 2)]
    ids = expand_images([IMAGE, IMAGE], grids, CONFIG)
    where = mrope_ids(ids, grids, CONFIG)
    assert where.tolist() == [[0, 0, 2, 2], [0, 0, 2, 3], [0, 1, 2, 2]]


def test_a_batch_by_hand():
    samples = [
        Sample([5, IMAGE, 6, IMAGE], [rows((2, 4), 1), rows((4, 4), 2)], [(2, 4), (4, 4)]),
        Sample([5, 7]),
        Sample([IMAGE, 8], [rows((2, 2), 3)], [(2, 2)]),
    ]
    batch = collate(samples, CONFIG, length=10, patches=20)
    assert batch.lengths.tolist() == [8, 2, 2]
    assert batch.ids[1].tolist() == [5, 7, *[3] * 8]
    # Pictures have room for five tokens each; the first has two, the second four, the third one.
    assert batch.visual[0].tolist() == [-1, 0, 1, -1, 5, 6, 7, 8, -1, -1]
    assert batch.visual[2].tolist() == [10, -1, *[-1] * 8]
    assert batch.next_position.tolist() == [6, 2, 2]
    assert batch.rows.shape == (3, 20, 588)
    assert batch.rows[:, :, 0].sum(axis=1).tolist() == [8, 32, 12]
    assert batch.layout.count.tolist() == [8, 16, 4]


def test_text_alone_needs_no_pictures():
    batch = collate([Sample([5, 6])], CONFIG)
    assert batch.rows is None
    assert batch.layout is None


@pytest.mark.parametrize(
    ("samples", "settings", "message"),
    [
        ([], {}, "no sample"),
        ([Sample([])], {}, "at least one token"),
        ([Sample([5, 6, 7])], {"length": 2}, r"\[3\] tokens do not fit into length=2"),
        ([Sample([5], [rows((2, 2), 0)], [(2, 2)])], {}, "0 picture marks .* 1 pictures"),
        ([Sample([IMAGE])], {}, "1 picture marks .* 0 pictures"),
        ([Sample([IMAGE], [rows((2, 2), 0)], [(2, 4)])], {}, "do not fit their grids"),
        ([Sample([IMAGE], [rows((2, 4), 0)], [(2, 4)])], {"patches": 4}, "2 x 4 patches"),
        ([Sample([IMAGE], [rows((3, 4), 0)], [(3, 4)])], {}, "multiples of 2"),
    ],
)
def test_what_is_no_batch_is_refused(samples, settings, message):
    with pytest.raises(UserError, match=message):
        collate(samples, CONFIG, **settings)
