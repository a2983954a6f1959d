"""The batch made within a program is the one that the host makes."""

import jax
import numpy as np
import pytest
from tiny_checkpoint import CONFIG, random_params

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.device_batch import device_batch
from fastdrive_jax.models.qwen2_5_vl.image_processor import process_pictures
from fastdrive_jax.models.qwen2_5_vl.model import QwenVL
from fastdrive_jax.models.qwen2_5_vl.sequence import Sample, collate

IMAGE = CONFIG.image_token_id
# Pictures first, between words, side by side and last; prompts of different lengths.
jit_device_batch = jax.jit(device_batch, static_argnums=3)
PROMPTS = [[IMAGE, 5, 6, IMAGE, 7, 8, 9], [4, IMAGE, IMAGE], [1, 2, 3, IMAGE, 4, IMAGE, 5, 6]]


@pytest.fixture(params=[(56, 112), (140, 84)], ids=str)
def given(request):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (len(PROMPTS), 2, *request.param, 3), np.uint8)
    ids = np.full((len(PROMPTS), 10), CONFIG.pad_token_id, np.int32)
    for row, prompt in zip(ids, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    return images, ids, np.array([len(prompt) for prompt in PROMPTS], np.int32)


def test_it_is_what_the_host_collates(given):
    images, ids, lengths = given
    samples = [
        Sample(prompt, *process_pictures(list(own)))
        for prompt, own in zip(PROMPTS, images, strict=True)
    ]
    each = images.shape[2] * images.shape[3] // 28**2
    want = collate(samples, CONFIG, ids.shape[1] + 2 * (each - 1))
    have = jit_device_batch(images, ids, lengths, CONFIG)
    for name in ("ids", "visual", "lengths", "next_position", "rows"):
        np.testing.assert_array_equal(getattr(have, name), getattr(want, name), err_msg=name)
    for number, length in enumerate(want.lengths):  # behind it positions mean nothing
        np.testing.assert_array_equal(
            np.asarray(have.positions)[:, number, :length], want.positions[:, number, :length]
        )
    apply = jax.jit(QwenVL(CONFIG).apply)
    params = {"params": random_params()}
    own, hosts = (np.asarray(apply(params, batch)) for batch in (have, want))
    for number, length in enumerate(want.lengths):
        np.testing.assert_allclose(own[number, :length], hosts[number, :length], atol=1e-5)


def test_a_mark_behind_the_end_of_a_prompt_is_no_picture(given):
    images, ids, lengths = given
    filled = np.where(np.arange(10) < lengths[:, None], ids, IMAGE)
    want, have = (jit_device_batch(images, one, lengths, CONFIG) for one in (ids, filled))
    np.testing.assert_array_equal(have.lengths, want.lengths)
    np.testing.assert_array_equal(have.visual, want.visual)


def test_pictures_of_parts_of_tokens_are_refused(given):
    _, ids, lengths = given
    with pytest.raises(UserError, match="not made of 28 x 28 tokens"):
        device_batch(np.zeros((3, 2, 30, 56, 3), np.uint8), ids, lengths, CONFIG)
