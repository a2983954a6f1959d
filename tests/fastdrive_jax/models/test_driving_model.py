import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.generate import decode, generate, prefill
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.qwen2_5_vl.config import VisionConfig
from fastdrive_jax.models.qwen2_5_vl.driving import (
    DrivingConfig,
    DrivingVLA,
    positions,
    visual_positions,
)
from fastdrive_jax.models.qwen2_5_vl.patches import patch_grid, patchify, window_table
from fastdrive_jax.models.trajectory_tokens import PLAN, DrivingVocabulary
from fastdrive_jax.training.driving import class_fractions

VOCABULARY = DrivingVocabulary()
TEXT = DecoderConfig(
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=256,
    mrope_section=(1, 1, 2),
    tie_word_embeddings=False,  # a tied head on random weights repeats its input
)
CONFIG = DrivingConfig(text=TEXT, image_size=(56, 84), cameras=("CAM_FRONT", "CAM_BACK"))
BATCH = 2


@pytest.fixture(scope="module")
def model():
    """The model, params of its decoder, tokens [2, 12, 16], their ids and a prompt."""
    vla = DrivingVLA(CONFIG)
    rng = np.random.default_rng(1)
    tokens = rng.normal(size=(BATCH, CONFIG.visual_tokens, 16)).astype(np.float32)
    where = visual_positions(CONFIG, BATCH)
    prompt = VOCABULARY.prompt(jnp.array([0.0, 9.0]), jnp.array([0, 2]))
    plan = jnp.zeros((BATCH, VOCABULARY.plan_length), jnp.int32)
    init = jax.jit(lambda key: vla.init(key, tokens, where, prompt, plan, method="plan_logits"))
    params = init(jax.random.key(0))
    # Larger than at the start of training, so that what comes before decides what follows.
    params = jax.tree.map(lambda leaf: 3 * np.asarray(leaf) if leaf.ndim > 1 else leaf, params)
    return vla, params, tokens, where, prompt


@pytest.fixture(scope="module")
def teacher(model):
    """Compiled teacher-forced logits of a plan."""
    vla, params, tokens, where, prompt = model
    return jax.jit(
        lambda plan: vla.apply(params, tokens, where, prompt, plan, method="plan_logits")
    )


def test_trajectory_round_trip_is_within_half_a_bin_at_every_waypoint():
    vocabulary = DrivingVocabulary(steps=30)
    moves = np.random.default_rng(0).uniform(-4.5, 7.2, (5, 30, 2))
    moves[0] = 0.04  # rounded one by one these would all be nothing, 1.2 m lost at the end
    future = np.cumsum(moves, axis=1)
    ids = jax.jit(vocabulary.encode)(future.astype(np.float32))
    assert ids.shape == (5, 60)
    assert int(ids.min()) >= vocabulary.first_displacement
    assert int(ids.max()) < vocabulary.size
    error = np.abs(np.asarray(jax.jit(vocabulary.decode)(ids)) - future)
    assert error.max() <= vocabulary.displacement_step / 2 + 1e-3
    assert error.max() > vocabulary.displacement_step / 4  # random ones do reach into the bin


def test_moves_beyond_the_bins_stop_at_the_last_and_are_made_up_for():
    future = np.float32([[[9.0, 0.0], [9.0, 0.0]]])
    vocabulary = DrivingVocabulary(steps=2)
    got = jax.jit(lambda future: vocabulary.decode(vocabulary.encode(future)))(future)
    np.testing.assert_allclose(got, [[[7.7, 0.0], [9.0, 0.0]]], atol=1e-4)


def test_prompt_by_hand():
    got = jax.jit(VOCABULARY.prompt)(np.float32([0.0, 1.1, 999.0]), np.array([0, 1, 2]))
    np.testing.assert_array_equal(got, [[4, 7, PLAN], [5, 7 + 4, PLAN], [6, 7 + 63, PLAN]])


def test_positions_of_two_cameras_by_hand():
    where = positions(CONFIG)  # 2 x 3 tokens a camera, so each camera takes up 3 places
    np.testing.assert_array_equal(where.before, [[0, 1]] * 3)
    time, row, column = where.visual
    np.testing.assert_array_equal(time, [2] * 6 + [5] * 6)
    np.testing.assert_array_equal(row, [2, 2, 2, 3, 3, 3, 5, 5, 5, 6, 6, 6])
    np.testing.assert_array_equal(column, [2, 3, 4, 2, 3, 4, 5, 6, 7, 5, 6, 7])
    np.testing.assert_array_equal(where.after, [np.arange(8, 8 + 4 + 12)] * 3)


def test_cached_greedy_decoding_equals_teacher_forcing(model, teacher):
    vla, params, tokens, where, prompt = model

    @jax.jit
    def run(tokens):
        prefilled = prefill(vla, params, tokens, where, prompt)
        waypoints = generate(vla, params, tokens, where, prompt)
        return prefilled.logits, decode(vla, params, prefilled).ids, waypoints

    first_logits, ids, waypoints = run(tokens)
    assert len(np.unique(ids)) > 3  # a plan that stands still would prove nothing
    logits = np.asarray(teacher(ids))
    np.testing.assert_allclose(first_logits, logits[:, 0], atol=1e-3)
    first, bins = VOCABULARY.first_displacement, VOCABULARY.displacement_bins
    want = first + np.argmax(logits[..., first : first + bins], axis=-1)
    np.testing.assert_array_equal(ids, want)
    np.testing.assert_allclose(waypoints, jax.jit(VOCABULARY.decode)(ids), atol=1e-5)


def test_logits_of_a_plan_token_see_only_those_before_it(teacher):
    plan = np.full((BATCH, 12), VOCABULARY.first_displacement, np.int32)
    changed = plan.copy()
    changed[:, 5] += 40
    before, after = np.asarray(teacher(plan)), np.asarray(teacher(changed))
    assert before.shape == (BATCH, 12, TEXT.vocab_size)
    np.testing.assert_allclose(before[:, :6], after[:, :6], atol=1e-5)
    moved = np.abs(before - after).max(axis=-1)
    assert (moved[:, 6] > 0.1).all()
    assert (moved[:, 7:].max(axis=1) > 1e-3).all()  # through attention; some may look elsewhere


@pytest.mark.parametrize("grid", [(16, 28), (10, 12), (2, 2)])
def test_windows_cover_each_patch_once_and_are_squares_of_the_picture(grid):
    config = VisionConfig()
    rows, columns = grid
    members, slots = window_table(rows, columns, config)
    count = rows * columns
    np.testing.assert_array_equal(np.sort(members[members < count]), np.arange(count))
    np.testing.assert_array_equal(members.ravel()[slots], np.arange(count))
    assert members.max() <= count
    # Patches by merge block, counted out one by one: four neighbours, then the next block.
    places = [
        (2 * block_row + r, 2 * block_column + c)
        for block_row in range(rows // 2)
        for block_column in range(columns // 2)
        for r in range(2)
        for c in range(2)
    ]
    for window in members:
        inside = {(places[p][0] // 8, places[p][1] // 8) for p in window[window < count]}
        assert len(inside) == 1
    assert len(members) == -(-rows // 8) * -(-columns // 8)


def test_patch_rows_are_the_pictures_squares_in_merge_order():
    picture = np.zeros((1, 28, 56, 3), np.uint8)
    picture[0, 14:, 28:42] = 255  # lower left patch of the second token: row 4 + 2
    rows = np.asarray(jax.jit(patchify, static_argnums=1)(picture, VisionConfig()))
    assert rows.shape == (1, 8, 3 * 2 * 14 * 14)
    bright = rows[0].min(axis=1) > 0
    np.testing.assert_array_equal(np.flatnonzero(bright), [6])


@pytest.mark.parametrize("size", [(56, 90), (30, 56), (14, 28), (0, 28)])
def test_a_picture_that_is_not_made_of_tokens_is_refused(size):
    with pytest.raises(UserError, match=f"{size[0]} x {size[1]}.*resize"):
        patch_grid(*size, VisionConfig())
    assert patch_grid(56, 84, VisionConfig()) == (4, 6)


def test_class_fractions_by_hand():
    labels = np.full((1, 8, 16), 2)
    labels[0, :4, :8] = 0
    labels[0, 4:, :4] = 1
    labels[0, 4:, 4:8] = 255  # unknown counts for none
    got = jax.jit(functools.partial(class_fractions, classes=3, edge=8))(labels)
    np.testing.assert_allclose(got, [[[0.5, 0.25, 0.0], [0.0, 0.0, 1.0]]])


def test_pictures_of_another_size_are_refused():
    encode = functools.partial(DrivingVLA(CONFIG).init, method="encode")
    with pytest.raises(UserError, match=r"RGB of 56 x 84 pixels, not 84 x 56 x 3"):
        jax.eval_shape(encode, jax.random.key(0), jnp.zeros((1, 2, 84, 56, 3), jnp.uint8))


@pytest.mark.parametrize("steps", [4, 8])
def test_a_plan_of_another_length_is_refused(steps):
    with pytest.raises(UserError, match=rf"\(1, {steps}, 2\) must be \[B, 6, 2\]"):
        VOCABULARY.encode(jnp.zeros((1, steps, 2)))
