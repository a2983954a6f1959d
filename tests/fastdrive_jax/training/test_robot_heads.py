"""Labels by hand, and losses that are zero where the heads say what is so."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from small_openvla import small_openvla

from fastdrive_jax.errors import UserError
from fastdrive_jax.training.robot_heads import (
    HeadConfig,
    init_heads,
    prompt_losses,
    read_labels,
    token_losses,
    token_places,
    view_centres,
)

HEADS = HeadConfig(kinds=5, located=(2, 4), point_layer=0, locate_layer=1)
TARGET = np.array([1])

labels_of = jax.jit(read_labels, static_argnums=(1, 2))
centres_of = jax.jit(view_centres, static_argnums=1)
losses_of_tokens = jax.jit(token_losses, static_argnums=1)
losses_of_prompt = jax.jit(prompt_losses, static_argnums=(1, 2))


@pytest.fixture(scope="module")
def config():
    return small_openvla()[0].config


def pictures(config, places):
    """Pictures [1, V, H, W] of kind 0 with pixels of kind 1 at (view, row, column)."""
    segments = np.zeros((1, config.views, config.image_size, config.image_size), np.int32)
    for view, row, column in places:
        segments[0, view, row, column] = 1
    return segments


def zero_heads(config):
    shapes = jax.eval_shape(partial(init_heads, config, HEADS), jax.random.key(0))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)


def test_labels_are_areas_and_centres_within_tokens():
    # One token row of two tokens of 2 x 4 pixels.
    segments = np.array([[[[1, 1, 0, 0, 0, 2, 0, 0], [1, 1, 0, 0, 0, 0, 0, 2]]]])
    labels = labels_of(segments, 3, (1, 2))
    np.testing.assert_allclose(labels.area[0], [[0.5, 0.5, 0], [0.75, 0, 0.25]])
    np.testing.assert_allclose(labels.centre[0, 0, 1], [0, -0.5], atol=1e-6)  # columns 0 and 1
    # Kind 2 in the second token: row 0 column 1 and row 1 column 3 of 2 x 4.
    np.testing.assert_allclose(labels.centre[0, 1, 2], [0, 0.25], atol=1e-6)


def test_the_centre_in_a_picture_is_the_mean_of_its_pixels(config):
    edge = config.image_size
    given = [(0, 0, 0), (0, 0, 1), (0, edge - 1, edge - 1), (1, 3, 5)]
    labels = labels_of(pictures(config, given), HEADS.kinds, config.token_grid)
    found = np.asarray(centres_of(labels, config))[0, :, 1]
    pixel = lambda k: (2 * k + 1) / edge - 1  # noqa: E731
    mean = np.mean([[pixel(row), pixel(column)] for view, row, column in given if not view], axis=0)
    np.testing.assert_allclose(found[0], mean, atol=1e-5)
    np.testing.assert_allclose(found[1], [pixel(3), pixel(5)], atol=1e-5)


def test_places_are_the_centres_of_tokens(config):
    places = np.asarray(token_places(config))
    rows, columns = config.token_grid
    assert places.shape == (config.views * rows * columns, 3)
    np.testing.assert_allclose(places[0], [-1, 1 / rows - 1, 1 / columns - 1], atol=1e-6)
    np.testing.assert_allclose(places[-1], [1, 1 - 1 / rows, 1 - 1 / columns], atol=1e-6)


def test_heads_that_know_lose_nothing(config):
    labels = labels_of(pictures(config, [(0, 2, 3), (1, 4, 1)]), HEADS.kinds, config.token_grid)
    count, size = config.visual_tokens, config.text.hidden_size
    heads = zero_heads(config)
    tokens = np.zeros((1, count, size), np.float32)
    # The place head reads the answer from the first channels.
    own = np.broadcast_to(token_places(config), (1, count, 3))
    answer = np.concatenate([own, np.reshape(labels.centre, (1, count, -1))], axis=-1)
    known = tokens.copy()
    known[..., : answer.shape[-1]] = answer
    eye = np.eye(size, answer.shape[-1], dtype=np.float32)
    told = heads | {"place": heads["place"] | {"kernel": eye}}
    assert losses_of_tokens(told, config, known, labels)["place_loss"] < 1e-10
    blind = losses_of_tokens(told, config, tokens, labels)
    assert blind["place_loss"] > 0.1
    np.testing.assert_allclose(blind["kind_loss"], np.log(HEADS.kinds), rtol=1e-5)


def test_pointing_and_locating_ask_for_what_is_left(config):
    labels = labels_of(pictures(config, [(0, 2, 3), (1, 4, 1)]), HEADS.kinds, config.token_grid)
    count, size = config.visual_tokens, config.text.hidden_size
    heads = zero_heads(config)

    def losses(kept, heads=heads):
        hidden = np.zeros((1, 1 + kept.shape[1] + 8, size), np.float32)
        given, place = {0: hidden, 1: hidden}, np.array([0])
        return losses_of_prompt(heads, config, HEADS, given, place, labels, TARGET, kept)

    everything = np.arange(count)[None]
    # Nothing known: every token as likely as any other.
    np.testing.assert_allclose(losses(everything)["point_loss"], np.log(count), rtol=1e-5)
    true = np.asarray(centres_of(labels, config))[:, :, [1, *HEADS.located]]
    told = heads | {"locate": heads["locate"] | {"bias": true.reshape(-1)}}
    assert losses(everything, told)["locate_loss"] < 1e-10
    # Of the two targets only that of the second picture is left.
    holds = np.asarray(labels.area[0, :, 1]) > 0
    second = np.flatnonzero(holds)[-1]
    left = np.array([[second - 1, second]])
    np.testing.assert_allclose(losses(left)["point_loss"], np.log(2), rtol=1e-5)
    np.testing.assert_allclose(
        losses(left)["locate_loss"], np.square(true[0, 1, 0]).mean(), rtol=1e-5
    )
    # Nothing is asked of what cannot be seen.
    none = np.array([[k for k in range(count) if not holds[k]][:2]])
    assert losses(none)["point_loss"] == losses(none)["locate_loss"] == 0


def test_each_sample_is_asked_for_its_own_thing(config):
    """Two samples of one picture whose instructions ask for different kinds."""
    one = pictures(config, [(0, 2, 3)])
    one[0, 0, 9, 9] = 3
    labels = labels_of(np.concatenate([one, one]), HEADS.kinds, config.token_grid)
    count, size = config.visual_tokens, config.text.hidden_size
    heads = zero_heads(config)
    heads["point"]["bias"][0] = 1024  # rounds nowhere
    first = np.flatnonzero(np.asarray(labels.area[0, :, 1]) > 0)
    hidden = np.zeros((2, 1 + count, size), np.float32)
    hidden[:, 1 + first, 0] = 1
    kept, places = np.broadcast_to(np.arange(count), (2, count)), np.zeros(2, int)
    given = {0: hidden, 1: hidden}

    def loss(*target):
        losses = losses_of_prompt(
            heads, config, HEADS, given, places, labels, np.array(target), kept
        )
        return float(losses["point_loss"])

    # It points at what kind 1 is in: right for those that ask for it.
    assert loss(1, 1) < 1e-6
    assert loss(1, 3) == loss(3, 1) == loss(3, 3) / 2 > 10


def test_a_layer_that_is_not_there_is_refused(config):
    layers = config.text.num_layers
    with pytest.raises(UserError, match=f"locate_layer={layers} must be"):
        init_heads(config, replace(HEADS, locate_layer=layers), jax.random.key(0))
