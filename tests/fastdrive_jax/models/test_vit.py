from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.vit import ViT, normalise_pictures
from fastdrive_jax.models.vit_config import ViTConfig
from fastdrive_jax.models.vit_positions import cubic_matrix, interpolate_positions

TINY = ViTConfig(depth=2, hidden_size=64, intermediate_size=256, num_heads=2, image_size=56)
apply = jax.jit(ViT(TINY).apply)


@pytest.fixture(scope="module")
def params():
    pixels = np.zeros((1, 56, 56, 3), np.float32)
    return jax.jit(ViT(TINY).init)(jax.random.key(0), pixels)["params"]


def test_default_sizes_are_those_of_vit_s():
    shapes = jax.eval_shape(ViT(ViTConfig()).init, jax.random.key(0), jnp.zeros((1, 14, 14, 3)))
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    # Of facebook/dinov2-small, whose mask token is not ours and whose class token has a position.
    assert count + 2 * 384 == 22_056_576


@pytest.mark.parametrize("size", [(56, 56), (28, 84), (14, 14)])
def test_shapes(params, size):
    pixels = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    tokens = jax.eval_shape(ViT(TINY).apply, {"params": params}, pixels)
    assert tokens.shape == (2, 1 + size[0] * size[1] // 196, 64)


def test_partial_patches_are_refused(params):
    with pytest.raises(ValueError, match="14 px"):
        apply({"params": params}, np.zeros((1, 56, 50, 3), np.float32))


def test_pictures_of_a_batch_do_not_mix(params):
    pixels = np.random.default_rng(1).normal(size=(3, 56, 28, 3)).astype(np.float32)
    together = np.asarray(apply({"params": params}, pixels))
    alone = apply({"params": params}, pixels[1:2])
    np.testing.assert_allclose(together[1:2], alone, atol=1e-5)


def test_patch_order_is_raster(params):
    """Without attention's output, a token sees its own patch only."""
    flat = traverse_util.flatten_dict(params)
    flat = {k: np.zeros_like(v) if k[-2:] == ("proj", "kernel") else v for k, v in flat.items()}
    cut = traverse_util.unflatten_dict(flat)
    pixels = np.zeros((1, 42, 56, 3), np.float32)
    base = np.asarray(apply({"params": cut}, pixels))
    pixels[0, 14:28, 28:42] = 1.0
    moved = np.asarray(apply({"params": cut}, pixels))
    where = np.flatnonzero(np.abs(moved - base).max(axis=-1)[0] > 1e-6)
    assert where.tolist() == [1 + 1 * 4 + 2]


def test_positions_of_the_stored_grid_are_untouched():
    positions = np.random.default_rng(0).normal(size=(1, 16, 8)).astype(np.float32)
    np.testing.assert_array_equal(interpolate_positions(positions, (4, 4), (4, 4)), positions)


def test_cubic_weights():
    for new, old in ((3, 4), (4, 4), (9, 4), (26, 37)):
        np.testing.assert_allclose(cubic_matrix(new, old).sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(cubic_matrix(5, 5), np.eye(5), atol=1e-6)
    # Half way between two samples the kernel with a = -0.75 gives -3/32 and 19/32.
    row = cubic_matrix(4, 8)[1]
    np.testing.assert_allclose(row[1:5], [-0.09375, 0.59375, 0.59375, -0.09375], atol=1e-6)


def test_positions_keep_rows_and_columns_apart():
    square = np.zeros((4, 4, 2), np.float32)
    square[..., 0] = np.arange(4)[:, None]
    square[..., 1] = np.arange(4)
    positions = square.reshape(1, 16, 2)
    out = np.asarray(interpolate_positions(positions, (4, 4), (2, 8))).reshape(2, 8, 2)
    assert np.ptp(out[..., 0], axis=1).max() < 1e-5
    assert np.ptp(out[..., 1], axis=0).max() < 1e-5
    assert (np.diff(out[0, 1:-1, 1]) > 0).all()


def test_normalisation_is_imagenets():
    image = np.full((1, 1, 1, 3), 255, np.uint8)
    np.testing.assert_allclose(
        np.asarray(normalise_pictures(image, TINY))[0, 0, 0], [2.2489, 2.4286, 2.64], atol=1e-3
    )


def test_what_a_picture_is_made_of():
    """Tokens of each kind, and no block behind the one that is read."""
    config = replace(TINY, class_token=False, registers=3, layer_scale=False)
    pixels = jax.ShapeDtypeStruct((1, 28, 28, 3), jnp.float32)
    init = ViT(config, whole=False).init_with_output
    tokens, variables = jax.eval_shape(init, jax.random.key(0), pixels)
    assert tokens.shape == (1, 3 + 4, 64)
    params = variables["params"]
    assert set(params) == {"patch_embed", "position_embeddings", "register_tokens", "blocks_0"}
    assert set(params["blocks_0"]) == {"norm1", "attn", "norm2", "fc1", "fc2"}


@pytest.mark.parametrize("wrong", [{"num_heads": 3}, {"patch_size": 10}])
def test_sizes_that_do_not_divide_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        replace(TINY, **wrong)
